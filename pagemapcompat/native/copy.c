// Copying between memory and images: capture, restore, compare.
//
// Memory is read and written through the kernel, never by a load or a store: a page that another thread has just
// protected, unmapped or made a guard page is then an answer and not a SIGSEGV. process_vm_writev(2) and
// process_vm_readv(2) move many pages a call and obey their protection; what they refuse is tried by force. They look
// up and pin each page of the remote side, and touch the local side as write(2) does (mm/process_vm_access.c). So
// memory is always the local side, and the remote side is a buffer of ours, one huge page where there are any, which
// takes a third of what the other way round does: memory is read by process_vm_writev, into the buffer, and written by
// process_vm_readv, from it.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/uio.h>
#include <unistd.h>

#include "internal.h"

#define BATCH 512 // pages of the buffer, and of one call
#define LOOK_FROM 16 // pages of a region from which on it pays to ask first which of them hold anything

// What is known of a page before it is read.
enum { MAY_HOLD, IS_EMPTY, IS_NOT_THERE };

// One job: pages are gathered into batches, each of which is one call. Its memory stays with the tracker, for it takes
// longer to get than a few pages to copy.
struct copier {
	struct pmc_range *range;
	struct pmc_tracker *tracker;
	struct pmc_result *result;
	uint32_t page_shift;
	int mem; // /proc/self/mem, once it was needed
	bool swap; // there is any; else a page that is neither here nor empty is a mark
	bool write;
	// What is done with a page: before, when nothing is to be read from it, and after it was read.
	int (*unread)(struct copier *copier, uint64_t from, uint64_t to, enum pmc_content content);
	int (*read)(struct copier *copier, uint64_t page, enum pmc_content content, const unsigned char *bytes);
	struct pmc_image *image; // that is made
	const struct pmc_image *given;
	uint32_t count;
	uint32_t pieces;
	unsigned char *buffer; // where pages are on their way between memory and images
	struct iovec memory[BATCH]; // what is in it, as pieces of memory and as pages
	uint64_t pages[BATCH];
	enum pmc_content content[BATCH];
	unsigned char known[PMC_WORDS];
	unsigned char resident[PMC_WORDS];
};

static unsigned char *buffer_at(const struct copier *copier, uint32_t index)
{
	return copier->buffer + ((uint64_t)index << copier->page_shift);
}

// Whether a guard page can be told from an empty one that is marked.
static bool shows_guards(const struct pmc_tracker *tracker)
{
	return !(tracker->abilities & PMC_CAN_GUARD) || tracker->abilities & PMC_CAN_SEE_GUARDS;
}

static int refused_by(struct copier *copier, const char *operation, uint64_t address, int error)
{
	copier->tracker->operation = operation;
	copier->result->untracked_start = address;
	copier->result->untracked_end = address + (1ull << copier->page_shift);
	return error;
}

static int refused(struct copier *copier, uint64_t address, int error)
{
	return refused_by(copier, copier->write ? "process_vm_readv" : "process_vm_writev", address, error);
}

// What a function said that fails for want of memory alone.
static int check_memory(struct copier *copier, int rc)
{
	if (rc)
		copier->tracker->operation = "malloc";
	return rc;
}

// 1: done, 0: refused, or -errno.
static int by_mem(struct copier *copier, uint64_t address, void *bytes)
{
	size_t size = (size_t)1 << copier->page_shift;
	copier->tracker->operation = "/proc/self/mem";
	if (copier->mem < 0) {
		copier->mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
		if (copier->mem < 0)
			return -errno;
	}
	ssize_t got;
	do
		got = copier->write ? pwrite(copier->mem, bytes, size, (off_t)address) :
				      pread(copier->mem, bytes, size, (off_t)address);
	while (got < 0 && errno == EINTR);
	return got < 0 && errno == ENOMEM ? -ENOMEM : got == (ssize_t)size;
}

// One page, whatever its protection. 1: done, 0: it cannot be had, or -errno.
static int force(struct copier *copier, uint64_t address, void *bytes)
{
	const int needed = copier->write ? PROT_READ | PROT_WRITE : PROT_READ;
	struct pmc_tracker *tracker = copier->tracker;
	struct vma vma;

	int rc = by_mem(copier, address, bytes);
	if (rc)
		return rc;
	pmc_vmas_refresh(&tracker->vmas);
	rc = pmc_find_vma(tracker, address, &vma);
	if (rc <= 0 || vma.start > address || (vma.protection & needed) == needed)
		return rc < 0 ? rc : 0;
	// Not even by force: a shared mapping is never written so, and since 6.12 a kernel may be told to force nothing
	// (proc_mem.force_override, fs/proc/base.c; Debian's 7.3 is). The page is opened for as long as it is copied.
	size_t size = (size_t)1 << vma.page_shift;
	void *unit = (void *)(uintptr_t)align_down(address, size);
	if (mprotect(unit, size, vma.protection | needed))
		return refused_by(copier, "mprotect", address, -errno);
	rc = by_mem(copier, address, bytes);
	return mprotect(unit, size, vma.protection) ? refused_by(copier, "mprotect", address, -errno) : rc;
}

// Whether a page is empty and must stay so: it cannot carry a mark, and populated by a read it would count as written.
// Or -errno.
static int must_stay_empty(struct copier *copier, uint64_t address)
{
	struct pmc_tracker *tracker = copier->tracker;
	uint64_t word;
	struct vma vma;
	if (tracker->abilities & PMC_CAN_MARK_EMPTY)
		return 0;
	pmc_vmas_refresh(&tracker->vmas);
	int rc = pmc_find_vma(tracker, address, &vma);
	if (rc <= 0 || vma.start > address || vma.kind != PMC_KIND_ANON)
		return rc < 0 ? rc : 0;
	rc = pmc_own_words_read(tracker, address, 1, copier->page_shift, &word);
	return rc ? rc : !(word & (PM_WORD_PRESENT | PM_WORD_SWAPPED | PM_WORD_GUARD));
}

// Reads a page by force, or finds out why it cannot be read: there is none, or it is empty. -EAGAIN: it is there, and
// nobody can read it, or it came after it was tried.
static int read_by_force(struct copier *copier, uint32_t index)
{
	struct pmc_tracker *tracker = copier->tracker;
	uint64_t word, address = copier->range->start + (copier->pages[index] << copier->page_shift);
	struct vma vma;
	int rc = must_stay_empty(copier, address);
	if (rc) {
		copier->content[index] = PMC_ZERO;
		return rc < 0 ? rc : 0;
	}
	copier->content[index] = PMC_HELD; // whatever it was when it was tried before
	rc = force(copier, address, buffer_at(copier, index));
	if (rc)
		return rc < 0 ? rc : 0;
	pmc_vmas_refresh(&tracker->vmas);
	rc = pmc_find_vma(tracker, address, &vma);
	if (rc < 0)
		return rc;
	copier->content[index] = PMC_MISSING;
	if (!rc || vma.start > address)
		return 0;
	rc = pmc_own_words_read(tracker, address, 1, copier->page_shift, &word);
	if (rc || word & PM_WORD_GUARD)
		return rc;
	if (word & PM_WORD_SWAPPED && !(word & PM_WORD_PRESENT) && !shows_guards(tracker))
		return 0;
	if (vma.kind != PMC_KIND_ANON || word & (PM_WORD_PRESENT | PM_WORD_SWAPPED))
		return -EAGAIN;
	copier->content[index] = PMC_ZERO;
	return 0;
}

static int read_refused(struct copier *copier, uint32_t index)
{
	for (unsigned looks = 1;; looks++) {
		int rc = read_by_force(copier, index);
		if (rc != -EAGAIN)
			return rc;
		if (looks == PMC_LOOKS)
			break;
		pmc_look_again(&copier->tracker->vmas, looks);
	}
	return refused(copier, copier->range->start + (copier->pages[index] << copier->page_shift), -EIO);
}

// Protected by us with nobody there to resolve a fault of the kernel's, or by its mapping.
static int write_refused(struct copier *copier, uint32_t index)
{
	struct pmc_tracker *tracker = copier->tracker;
	uint64_t address = copier->range->start + (copier->pages[index] << copier->page_shift), untracked;
	const struct piece *piece = pmc_piece_at(copier->range, address);
	uint64_t size = 1ull << piece->page_shift, unit = align_down(address, size);

	int rc = pmc_owe_mapped(copier->range, unit, unit + size);
	pmc_vmas_refresh(&tracker->vmas);
	if (!rc)
		rc = pmc_protect(tracker, unit, unit + size, piece->page_shift, 0, &untracked);
	pmc_answer(tracker, unit, unit + size);
	if (rc && rc != -ENOENT)
		return rc;
	rc = force(copier, address, buffer_at(copier, index));
	if (rc)
		return rc < 0 ? rc : 0;
	return refused(copier, address, -EFAULT);
}

// Runs the batch, page by page where the kernel stops.
static int flush(struct copier *copier)
{
	uint32_t done = 0, piece = 0;
	int rc = 0;
	while (done < copier->count && !rc) {
		struct iovec *memory = copier->memory + piece;
		const struct iovec buffer = {
			.iov_base = buffer_at(copier, done),
			.iov_len = (size_t)(copier->count - done) << copier->page_shift,
		};
		// Not by the C library's functions: a sanitizer takes their local side for this program's own loads and
		// stores.
		long got = syscall(copier->write ? SYS_process_vm_readv : SYS_process_vm_writev, getpid(), memory,
				   copier->pieces - piece, &buffer, 1, 0);
		uint64_t pages = got > 0 ? (uint64_t)got >> copier->page_shift : 0;
		if (!pages) {
			rc = copier->write ? write_refused(copier, done) : read_refused(copier, done);
			pages = 1;
		}
		done += (uint32_t)pages;
		for (uint64_t left = pages << copier->page_shift; left;) {
			uint64_t step = min_u64(left, copier->memory[piece].iov_len);
			copier->memory[piece].iov_base = (char *)copier->memory[piece].iov_base + step;
			copier->memory[piece].iov_len -= step;
			piece += !copier->memory[piece].iov_len;
			left -= step;
		}
	}
	for (uint32_t i = 0; i < copier->count && !rc && copier->read; i++)
		rc = copier->read(copier, copier->pages[i], copier->content[i], buffer_at(copier, i));
	copier->count = copier->pieces = 0;
	return rc;
}

// Puts a page into the batch. What is to be written there is in the buffer already, at copier->count.
static int add(struct copier *copier, uint64_t page)
{
	uint64_t address = copier->range->start + (page << copier->page_shift), size = 1ull << copier->page_shift;
	struct iovec *last = copier->pieces ? &copier->memory[copier->pieces - 1] : NULL;
	if (last && (uint64_t)(uintptr_t)last->iov_base + last->iov_len == address)
		last->iov_len += size;
	else
		copier->memory[copier->pieces++] = (struct iovec){ (void *)(uintptr_t)address, size };
	copier->pages[copier->count] = page;
	copier->content[copier->count++] = PMC_HELD;
	return copier->count == BATCH ? flush(copier) : 0;
}

// ---- What holds anything ------------------------------------------------------------------------------------

// An empty page that is write-protected shows as a swapped one. Where there is no swap, and nothing is in memory, it is
// that.
static void look_for_marks(struct copier *copier, uint64_t start, uint64_t count, unsigned char *known)
{
	const uint64_t *words = copier->tracker->words;
	const uint64_t marked = PM_WORD_SWAPPED | PM_WORD_UFFD_WP;
	bool asked = false;
	for (uint64_t i = 0; i < count && !copier->swap && shows_guards(copier->tracker); i++) {
		if ((words[i] & (marked | PM_WORD_PRESENT | PM_WORD_GUARD)) != marked)
			continue;
		// A page that is being moved is neither present nor empty; mincore(2) knows it.
		if (!asked && mincore((void *)(uintptr_t)start, count << copier->page_shift, copier->resident))
			return;
		asked = true;
		if (!(copier->resident[i] & 1))
			known[i] = IS_EMPTY;
	}
}

// Finds out which of *count* pages hold anything, by their words, without populating one.
static int look(struct copier *copier, uint64_t start, uint64_t count)
{
	struct pmc_tracker *tracker = copier->tracker;
	uint32_t shift = copier->page_shift;
	uint64_t finish = start + (count << shift);
	struct vma vma;

	pmc_vmas_refresh(&tracker->vmas);
	memset(copier->known, IS_NOT_THERE, count);
	for (uint64_t pos = start; pos < finish; pos = vma.end) {
		int rc = pmc_find_vma(tracker, pos, &vma);
		if (rc <= 0)
			return rc;
		if (vma.start >= finish)
			return 0;
		pos = max_u64(pos, vma.start);
		uint64_t pages = (min_u64(vma.end, finish) - pos) >> shift;
		unsigned char *known = copier->known + ((pos - start) >> shift);
		memset(known, MAY_HOLD, pages);
		// Of files and shared memory a word tells what this process has mapped, not what there is.
		if (vma.kind != PMC_KIND_ANON)
			continue;
		rc = pmc_own_words_read(tracker, pos, pages, shift, tracker->words);
		if (rc)
			return rc;
		for (uint64_t i = 0; i < pages; i++) {
			uint64_t word = tracker->words[i];
			if (word & PM_WORD_GUARD)
				known[i] = IS_NOT_THERE;
			else if (!(word & (PM_WORD_PRESENT | PM_WORD_SWAPPED)))
				known[i] = IS_EMPTY;
		}
		look_for_marks(copier, pos, pages, known);
	}
	return 0;
}

static int restore_page(struct copier *copier, uint64_t page, unsigned char known)
{
	unsigned char *buffer = buffer_at(copier, copier->count);
	size_t size = (size_t)1 << copier->page_shift;
	const unsigned char *bytes;
	switch (pmc_image_at(copier->given, page, &bytes)) {
	case PMC_HELD:
		memcpy(buffer, bytes, size);
		return add(copier, page);
	case PMC_ZERO:
		if (known == IS_EMPTY)
			return 0;
		memset(buffer, 0, size);
		return add(copier, page);
	default:
		return 0;
	}
}

// A run of pages of which the same is known.
static int run(struct copier *copier, uint64_t from, uint64_t to, unsigned char known)
{
	int rc = 0;
	if (!copier->write && known != MAY_HOLD) {
		rc = flush(copier);
		return rc ? rc : copier->unread(copier, from, to, known == IS_EMPTY ? PMC_ZERO : PMC_MISSING);
	}
	for (uint64_t page = from; page < to && !rc; page++)
		rc = copier->write ? restore_page(copier, page, known) : add(copier, page);
	return rc;
}

static int copy_region(struct copier *copier, const struct page_region *region)
{
	int rc = 0;
	for (uint64_t pos = region->start; pos < region->end && !rc;) {
		uint64_t count = min_u64((region->end - pos) >> copier->page_shift, PMC_WORDS);
		uint64_t first = page_index(copier->range, pos);
		if (count >= LOOK_FROM)
			rc = look(copier, pos, count);
		else
			memset(copier->known, MAY_HOLD, count);
		for (uint64_t i = 0, to; i < count && !rc; i = to) {
			for (to = i + 1; to < count && copier->known[to] == copier->known[i];)
				to++;
			rc = run(copier, first + i, first + to, copier->known[i]);
		}
		pos += count << copier->page_shift;
	}
	return rc;
}

// The tracker's copier. NULL: out of memory.
static struct copier *copier_of(struct pmc_tracker *tracker)
{
	uint64_t size = (uint64_t)BATCH << tracker->page_shift;
	size_t header = align_up(sizeof(struct copier), page_size_of(tracker));
	if (!tracker->copier) {
		tracker->copier = pmc_own_pages(tracker, 0, 0, header + 2 * size);
		if (!tracker->copier)
			return NULL;
		tracker->copier_size = header + 2 * size;
		// A child has no use for it, and a huge page that is shared with one falls to pieces at the next copy.
		uint64_t start = (uint64_t)(uintptr_t)tracker->copier;
		(void)pmc_madvise(start, start + tracker->copier_size, PMC_MADV_WIPEONFORK);
	}
	struct copier *copier = tracker->copier;
	uint64_t buffer = align_up((uint64_t)(uintptr_t)copier + header, size);
	if (!copier->buffer && size == huge_size_of(tracker))
		(void)pmc_madvise(buffer, buffer + size, MADV_HUGEPAGE);
	memset(copier, 0, offsetof(struct copier, memory));
	copier->buffer = (unsigned char *)(uintptr_t)buffer;
	return copier;
}

// Begins a job, under the tracker's mutex.
static int begin(struct copier **ret, struct pmc_range *range, struct pmc_result *result)
{
	struct sysinfo info;
	int rc = pmc_enter_range(range);
	if (rc)
		return rc;
	struct pmc_tracker *tracker = range->tracker;
	tracker->operation = "mmap";
	struct copier *copier = copier_of(tracker);
	if (!copier)
		return pmc_leave(tracker, -ENOMEM, result);
	copier->range = range;
	copier->tracker = tracker;
	copier->result = result;
	copier->page_shift = tracker->page_shift;
	copier->mem = -1;
	copier->swap = sysinfo(&info) || info.totalswap;
	*ret = copier;
	return 0;
}

// What was unmapped is in no scan: [from, to) is made missing in the image that is made, and must be so in one that is
// restored.
static int gap(struct copier *copier, uint64_t start, uint64_t end)
{
	uint64_t from = page_index(copier->range, start), to = page_index(copier->range, end);
	if (copier->image)
		return check_memory(copier, pmc_image_clear(copier->image, from, to, PMC_MISSING));
	uint64_t page = pmc_image_first_there(copier->given, from, to);
	return page == to ? 0 : refused(copier, copier->range->start + (page << copier->page_shift), -EFAULT);
}

static int find_gaps(struct copier *copier)
{
	struct pmc_range *range = copier->range;
	struct vma vma;
	int rc = 1;

	pmc_vmas_refresh(&copier->tracker->vmas);
	for (uint64_t pos = range->start; pos < range->end && rc > 0; pos = vma.end) {
		rc = pmc_find_vma(copier->tracker, pos, &vma);
		if (rc < 0)
			return rc;
		if (!rc || vma.start >= range->end)
			return gap(copier, pos, range->end);
		if (vma.start > pos && (rc = gap(copier, pos, vma.start)))
			return rc;
		rc = 1;
	}
	return 0;
}

// Does it, and ends it.
static int copy_regions(struct copier *copier, const struct page_region *regions, uint64_t count)
{
	struct pmc_tracker *tracker = copier->tracker;
	struct pmc_result *result = copier->result;
	// What is copied must be seen to change from then on, and of what comes to a bare block and is discarded again
	// nothing is.
	int rc = copier->image && copier->range->bare ? pmc_kernel_arm_all(copier->range) : 0;
	// A comparison is of what it is asked about alone.
	if (!rc && (copier->image || copier->write))
		rc = find_gaps(copier);
	for (uint64_t i = 0; i < count && !rc; i++)
		rc = copy_region(copier, &regions[i]);
	if (!rc)
		rc = flush(copier);
	if (copier->mem >= 0)
		close(copier->mem);
	return pmc_leave(tracker, rc, result);
}

// ---- The three ----------------------------------------------------------------------------------------------------

static int capture_unread(struct copier *copier, uint64_t from, uint64_t to, enum pmc_content content)
{
	return check_memory(copier, pmc_image_clear(copier->image, from, to, content));
}

static int capture_read(struct copier *copier, uint64_t page, enum pmc_content content, const unsigned char *bytes)
{
	if (content == PMC_HELD)
		return check_memory(copier, pmc_image_load(copier->image, page, 1, bytes));
	return check_memory(copier, pmc_image_clear(copier->image, page, page + 1, content));
}

int pmc_capture(struct pmc_range *range, struct pmc_image *image, const struct page_region *regions, uint64_t count,
		struct pmc_result *result)
{
	struct copier *copier;
	int rc = begin(&copier, range, result);
	if (rc)
		return rc;
	copier->image = image;
	copier->unread = capture_unread;
	copier->read = capture_read;
	return copy_regions(copier, regions, count);
}

int pmc_restore(struct pmc_range *range, const struct pmc_image *image, const struct page_region *regions,
		uint64_t count, struct pmc_result *result)
{
	struct copier *copier;
	int rc = begin(&copier, range, result);
	if (rc)
		return rc;
	copier->given = image;
	copier->write = true;
	return copy_regions(copier, regions, count);
}

static int differs(struct copier *copier, uint64_t page)
{
	uint64_t address = copier->range->start + (page << copier->page_shift);
	int rc = check_memory(copier, pmc_result_reserve(copier->result, 1));
	if (rc)
		return rc;
	pmc_result_append(copier->result, address, address + (1ull << copier->page_shift), PAGE_IS_WRITTEN,
			  copier->page_shift);
	return 0;
}

// Where an image has nothing, whatever is there now is right.
static int compare_unread(struct copier *copier, uint64_t from, uint64_t to, enum pmc_content content)
{
	int rc = 0;
	for (uint64_t page = from; page < to && !rc; page++) {
		const unsigned char *bytes;
		enum pmc_content wanted = pmc_image_at(copier->given, page, &bytes);
		if (wanted != PMC_MISSING && (wanted != PMC_ZERO || content != PMC_ZERO))
			rc = differs(copier, page);
	}
	return rc;
}

static int compare_read(struct copier *copier, uint64_t page, enum pmc_content content, const unsigned char *bytes)
{
	const unsigned char *wanted;
	if (content != PMC_HELD)
		return compare_unread(copier, page, page + 1, content);
	switch (pmc_image_at(copier->given, page, &wanted)) {
	case PMC_HELD:
		return memcmp(bytes, wanted, (size_t)1 << copier->page_shift) ? differs(copier, page) : 0;
	case PMC_ZERO:
		return pmc_is_zero(bytes, copier->page_shift) ? 0 : differs(copier, page);
	default:
		return 0;
	}
}

int pmc_compare(struct pmc_range *range, const struct pmc_image *image, const struct page_region *regions,
		uint64_t count, struct pmc_result *result)
{
	struct copier *copier;
	int rc = begin(&copier, range, result);
	if (rc)
		return rc;
	copier->given = image;
	copier->unread = compare_unread;
	copier->read = compare_read;
	result->walk_end = range->end;
	return copy_regions(copier, regions, count);
}
