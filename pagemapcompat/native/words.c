// Engine `uffd-wp`: PAGEMAP_SCAN answered from the words of /proc/self/pagemap and UFFDIO_WRITEPROTECT.
//
// What makes it lossless. A page is protected only after it was read as written, and is then part of this answer:
// stores before the protection are covered by it, stores after it fault. A page read as unchanged is left alone, so
// whatever happens to it next is seen next time. Protecting a whole range after reading it would be cheaper, and lose
// writes: a lock would hold off a fault thread, but none holds off a MADV_DONTNEED, or a mremap(2) with
// MREMAP_DONTUNMAP, after which a page is empty, can be written without a fault, and would then be protected with
// nobody told. Shared pages keep their mark through the first (mm/memory.c: zap_install_uffd_wp_if_needed, since 5.19),
// not through the second (seen on 6.18.44).
//
// What a word tells:
//   mark (bit 57)      unchanged since it was protected
//   no mark            written, or never protected, or not mapped at all: then the word is 0 and the mappings decide
//   empty or guard     cannot carry a mark (empty: private anonymous memory without WP_UNPOPULATED). One bit a page,
//                      *quiet*, remembers that it was so when last asked for; still so is unchanged.
//
// Without bit 57 (before 5.14) the fault threads' log stands in for it, and each call protects everything again, under
// fault_lock: a page discarded and written again has lost its protection, and nothing shows that. Such a write is
// missed, but none that follows a call which went over the page; one whose limit was reached only looked at what lies
// behind.
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "internal.h"

int pmc_words_read(int pagemap, uint64_t start, uint64_t count, uint32_t unit_shift, uint32_t page_shift,
		   uint64_t *words)
{
	// A huge page has one entry, which pagemap repeats for each of its pages.
	uint64_t step = unit_shift == page_shift ? count : 1;
	for (uint64_t done = 0; done < count; done += step) {
		char *into = (char *)(words + done);
		size_t left = step * sizeof(*words);
		off_t from = (off_t)(((start + (done << unit_shift)) >> page_shift) * sizeof(*words));
		while (left) {
			ssize_t got = pread(pagemap, into, left, from);
			if (got < 0 && errno == EINTR)
				continue;
			if (got < 0)
				return -errno;
			if (!got)
				return -ESRCH;
			into += got;
			from += got;
			left -= (size_t)got;
		}
	}
	return 0;
}

int pmc_own_words_read(struct pmc_tracker *tracker, uint64_t start, uint64_t count, uint32_t unit_shift,
		       uint64_t *words)
{
	uint64_t at = (uint64_t)(uintptr_t)tracker, word, i = 0;
	tracker->operation = "/proc/self/pagemap";
	int rc = pmc_words_read(tracker->pagemap, start, count, unit_shift, tracker->page_shift, words);
	while (!rc && i < count && !words[i])
		i++;
	if (!rc && i < count)
		return 0;
	// All of it is empty, or the file is one of zeros, by which the tracker itself would not be in memory.
	if (!rc)
		rc = pmc_words_read(tracker->pagemap, at, 1, tracker->page_shift, tracker->page_shift, &word);
	if (!rc && !(word & (PM_WORD_PRESENT | PM_WORD_SWAPPED)))
		return -EBADF;
	return rc == -ESRCH ? -EBADF : rc; // while this runs, the process is not gone
}

// One pass over one piece.
struct pass {
	struct pmc_range *range;
	struct pmc_tracker *tracker;
	uint32_t unit_shift;
	uint32_t kind;
	bool engage;
	uint64_t marked; // a page with any of these bits is unchanged
	bool plain; // words tell all: there is no log, and no page is quiet
	bool unmarkable; // there may be such among the written ones
	bool more; // chunks to come, into which a run may go on
	uint64_t late; // from there on to the end of the chunks so far lies a run that is not protected yet; or PAST
	struct output out;
};

#define PAST UINT64_MAX

static uint64_t unit_of(const struct pass *pass)
{
	return 1ull << pass->unit_shift;
}

// What is looked at. Soft-dirty says nothing of the page: in a new mapping it is set on every entry, empty ones too
// (seen on 5.10 and 6.1).
#define TOLD (PM_WORD_PRESENT | PM_WORD_SWAPPED | PM_WORD_GUARD | PM_WORD_UFFD_WP)

static bool is_empty(uint64_t word)
{
	return !(word & TOLD);
}

static bool is_unmarkable(const struct pass *pass, uint64_t word)
{
	if (word & PM_WORD_GUARD)
		return true;
	return is_empty(word) && pass->kind == PMC_KIND_ANON && !(pass->tracker->abilities & PMC_CAN_MARK_EMPTY);
}

enum state { UNCHANGED, WRITTEN, WRITTEN_IF_MAPPED };

static enum state state_of(const struct pass *pass, uint64_t word, uint64_t page)
{
	if (word & pass->marked)
		return UNCHANGED;
	bool quiet = bit_test(pass->range->quiet, page);
	if (pmc_logs(pass->tracker)) {
		if (!bit_test(pass->range->log, page) && is_unmarkable(pass, word) == quiet)
			return UNCHANGED;
	} else if (quiet && is_unmarkable(pass, word)) {
		return UNCHANGED;
	}
	return is_empty(word) ? WRITTEN_IF_MAPPED : WRITTEN;
}

// Puts the written pages among [pos, end) out. *stop: the first written page that did not fit, else end.
static int gather(struct pass *pass, uint64_t pos, uint64_t end, uint64_t *stop)
{
	const uint64_t *words = pass->tracker->words;
	uint64_t unit = unit_of(pass), pages = unit >> pass->tracker->page_shift;
	uint64_t count = (end - pos) >> pass->unit_shift, first = page_index(pass->range, pos);

	for (uint64_t i = 0; i < count;) {
		// Nearly all pages of nearly all ranges end here.
		while (i < count && words[i] & pass->marked)
			i++;
		if (i == count)
			break;
		enum state state = state_of(pass, words[i], first + i * pages);
		uint64_t run = i++;
		if (pass->plain)
			while (i < count && !((words[i] ^ words[run]) & TOLD))
				i++;
		else
			while (i < count && state_of(pass, words[i], first + i * pages) == state)
				i++;
		if (state == UNCHANGED)
			continue;
		pass->unmarkable |= !pass->plain || is_unmarkable(pass, words[run]);
		uint64_t from = pos + run * unit, to = pos + i * unit;
		while (from < to) {
			uint64_t until = to;
			if (state == WRITTEN_IF_MAPPED) {
				struct vma vma;
				int rc = pmc_find_vma(pass->tracker, from, &vma);
				if (rc < 0)
					return rc;
				if (!rc || vma.start >= to)
					break;
				from = max_u64(from, vma.start);
				until = min_u64(to, vma.end);
			}
			uint64_t fitted = pmc_output_add(&pass->out, from, until, PAGE_IS_WRITTEN, unit);
			if (fitted < until) {
				*stop = fitted;
				return 0;
			}
			from = until;
		}
	}
	*stop = end;
	return 0;
}

// Gives every empty page of the readable private anonymous mappings in [start, end) the zero page, so that it can carry
// a mark and a later read does not look like a change. Never by a plain load: a mprotect in another thread would turn
// it into a SIGSEGV. Returns whether all of it is populated now.
static bool populate(struct pmc_tracker *tracker, uint64_t start, uint64_t end)
{
	bool all = true;
	struct vma vma;
	for (uint64_t pos = start; pos < end;) {
		int rc = pmc_find_vma(tracker, pos, &vma);
		if (rc < 0)
			return false;
		if (!rc || vma.start >= end)
			break;
		uint64_t from = max_u64(vma.start, pos), to = min_u64(vma.end, end);
		pos = to;
		if (vma.kind != PMC_KIND_ANON)
			continue;
		if (!(vma.protection & PROT_READ)) {
			all = false;
			continue;
		}
		if (tracker->abilities & PMC_CAN_POPULATE && pmc_madvise(from, to, PMC_MADV_POPULATE_READ) == 0)
			continue;
		struct iovec remote[64];
		char bytes[sizeof(remote) / sizeof(*remote)];
		struct iovec local = { bytes, 0 };
		uint64_t size = page_size_of(tracker);
		while (from < to) {
			unsigned n = 0;
			uint64_t at = from;
			for (; at < to && n < sizeof(bytes); at += size)
				remote[n++] = (struct iovec){ (void *)(uintptr_t)at, 1 };
			local.iov_len = n;
			ssize_t got = process_vm_readv(getpid(), &local, 1, remote, n, 0);
			if (got <= 0) {
				all = false; // a guard page, or unmapped meanwhile: step over it
				got = 1;
			}
			from += (uint64_t)got * size;
		}
	}
	return all;
}

static bool needs_population(const struct pass *pass)
{
	return pass->kind == PMC_KIND_ANON && !(pass->tracker->abilities & PMC_CAN_MARK_EMPTY);
}

// Whether the page at *address* could be read, and so populated, in *vma*, the mapping that was looked up last.
static bool is_readable(struct pmc_tracker *tracker, uint64_t address, struct vma *vma)
{
	if (address < vma->start || address >= vma->end) {
		if (!vma->end)
			pmc_vmas_refresh(&tracker->vmas);
		if (pmc_find_vma(tracker, address, vma) <= 0)
			return true; // reported once more is better than missed
	}
	return address >= vma->start && vma->protection & PROT_READ;
}

// Notes for each page of [from, to), whose words begin at *pos*, whether it could carry a mark. A page that is empty
// though it was populated is being discarded at this moment, and may be written, read and discarded again before the
// next call, which would find it as it is now; or the kernel does not let it be populated. It is not called quiet, and
// comes once more. Where there is a log, fault_lock is held.
static void remember(const struct pass *pass, uint64_t pos, uint64_t from, uint64_t to)
{
	struct pmc_range *range = pass->range;
	const uint64_t *words = pass->tracker->words;
	uint64_t pages = unit_of(pass) >> pass->tracker->page_shift;
	struct vma vma = { 0 };

	for (uint64_t i = (from - pos) >> pass->unit_shift; i < (to - pos) >> pass->unit_shift; i++) {
		uint64_t page = page_index(range, pos) + i * pages;
		bool quiet = is_unmarkable(pass, words[i]);
		if (quiet == bit_test(range->quiet, page))
			continue;
		if (!quiet)
			bit_clear(range->quiet, page);
		else if (words[i] & PM_WORD_GUARD || !is_readable(pass->tracker, pos + i * unit_of(pass), &vma))
			bit_set(range->quiet, page);
		else if (pmc_logs(pass->tracker))
			bit_set(range->log, page); // once written it will look as if it had been populated
		range->quiet_used |= quiet;
	}
}

// Populates the run [from, to) if a page of it is empty, which could carry no mark, and reads its words anew. The first
// word is that of *pos*.
static int populate_run(const struct pass *pass, uint64_t pos, uint64_t from, uint64_t to)
{
	struct pmc_tracker *tracker = pass->tracker;
	uint64_t *words = tracker->words + ((from - pos) >> pass->unit_shift);
	uint64_t count = (to - from) >> pass->unit_shift, k = 0;

	while (k < count && !is_empty(words[k]))
		k++;
	if (k == count)
		return 0;
	// One that is not empty any more looks unchanged, and is not protected yet.
	if (pmc_logs(tracker))
		pmc_bits_fill(pass->range->log, page_index(pass->range, from), page_index(pass->range, to), true);
	populate(tracker, from, to);
	return pmc_own_words_read(tracker, from, count, pass->unit_shift, words);
}

// The first region of the answer that reaches behind *address*.
static uint64_t first_behind(const struct output *out, uint64_t address)
{
	uint64_t index = out->count;
	while (index && out->vec[index - 1].end > address)
		index--;
	return index;
}

// With marks: protects each run of the answer that reaches into [pos, *stop), and the one that waits. A run that may go
// on in the next chunk waits for that. On an error *stop is where the answer ends; -ENOENT: the untracked page.
static int protect_runs(struct pass *pass, uint64_t pos, uint64_t *stop)
{
	struct output *out = &pass->out;
	uint64_t first = min_u64(pass->late, pos), untracked;

	for (uint64_t i = first_behind(out, first); i < out->count; i++) {
		uint64_t from = max_u64(out->vec[i].start, first), to = out->vec[i].end;
		pass->late = pass->more && to == *stop && !pass->unmarkable ? from : PAST;
		if (pass->late != PAST)
			break;
		int rc = needs_population(pass) ? populate_run(pass, pos, from, to) : 0;
		if (!rc)
			rc = pmc_protect(pass->tracker, from, to, pass->unit_shift, 1, &untracked);
		if (rc) {
			// After another error nobody knows how far it got: the run stays in the answer, protected or
			// still written.
			*stop = rc == -ENOENT ? untracked : to;
			pmc_output_cut(out, *stop);
			return rc;
		}
	}
	return 0;
}

// Without marks: protects all of [pos, *stop). On an error *stop is where the answer ends; -ENOENT: the untracked page.
static int protect_chunk(struct pass *pass, uint64_t pos, uint64_t *stop)
{
	struct pmc_range *range = pass->range;
	struct output *out = &pass->out;
	uint64_t untracked;
	int rc = 0;

	for (uint64_t i = first_behind(out, pos); i < out->count && needs_population(pass) && !rc; i++)
		rc = populate_run(pass, pos, max_u64(out->vec[i].start, pos), out->vec[i].end);
	if (!rc && *stop > pos)
		rc = pmc_protect(pass->tracker, pos, *stop, pass->unit_shift, 1, &untracked);
	if (rc) {
		// What is done stays done: an untracked page among it is the next call's. After another error what may
		// be open stays in the log, and with it in the next answer instead of this one.
		*stop = rc == -ENOENT ? untracked : pos;
		pmc_output_cut(out, *stop);
	}
	pmc_bits_fill(range->log, page_index(range, pos), page_index(range, *stop), false);
	return rc;
}

// Protects what gather() put out of [pos, *stop), and remembers what could not be.
static int engage(struct pass *pass, uint64_t pos, uint64_t *stop)
{
	const struct output *out = &pass->out;
	int rc = (pmc_logs(pass->tracker) ? protect_chunk : protect_runs)(pass, pos, stop);
	// Only a written page can have become unmarkable; one that was has to be looked at wherever it is.
	if (pass->range->quiet_used) {
		remember(pass, pos, pos, max_u64(pos, *stop));
	} else if (pass->unmarkable) {
		for (uint64_t i = first_behind(out, pos); i < out->count; i++)
			remember(pass, pos, max_u64(out->vec[i].start, pos), out->vec[i].end);
	}
	return rc;
}

// Protects the run that ends at *pos, if it waits for one that did not come. -ENOENT: *pos is the untracked page.
static int protect_late(struct pass *pass, uint64_t *pos)
{
	uint64_t untracked;
	if (pass->late == PAST)
		return 0;
	int rc = pmc_protect(pass->tracker, pass->late, *pos, pass->unit_shift, 1, &untracked);
	if (rc == -ENOENT) {
		*pos = untracked;
		pmc_output_cut(&pass->out, untracked);
	}
	return rc;
}

// Reads [pos, end), puts what was written into the answer, and protects it. *stop: done up to there.
static int scan_chunk(struct pass *pass, uint64_t pos, uint64_t end, uint64_t *stop)
{
	struct pmc_tracker *tracker = pass->tracker;
	uint64_t count = (end - pos) >> pass->unit_shift;
	sigset_t signals;

	*stop = pos;
	if (pmc_logs(tracker)) // also for a peek
		pmc_hold_fault_threads(tracker, &signals);
	int rc = pmc_own_words_read(tracker, pos, count, pass->unit_shift, tracker->words);
	if (!rc)
		rc = gather(pass, pos, end, stop);
	if (rc) {
		// Nothing of this chunk is protected yet: take back what was put out of it.
		pmc_output_cut(&pass->out, pos);
		*stop = pos;
	} else if (pass->engage) {
		rc = engage(pass, pos, stop);
	}
	if (pmc_logs(tracker))
		pmc_release_fault_threads(tracker, &signals);
	return rc;
}

int pmc_words_scan(struct pmc_range *range, const struct piece *piece, struct pm_scan_arg *arg)
{
	struct pmc_tracker *tracker = range->tracker;
	struct pass pass = {
		.range = range,
		.tracker = tracker,
		.unit_shift = piece->page_shift,
		.kind = piece->kind,
		.engage = arg->flags & PM_SCAN_WP_MATCHING,
		.marked = pmc_logs(tracker) ? 0 : PM_WORD_UFFD_WP,
		.plain = !pmc_logs(tracker) && !range->quiet_used,
		.late = PAST,
		.out = {
			.vec = (struct page_region *)(uintptr_t)arg->vec,
			.capacity = arg->vec_len,
			.max_pages = arg->max_pages,
			.page_shift = tracker->page_shift,
		},
	};
	// Whether registration must be confirmed first: where a remapped page may still show its old mark, where
	// nothing shows marks, and where an empty or a guard page can have none.
	bool confirm = pmc_logs(tracker) || range->quiet_used ||
		       ~tracker->abilities & (PMC_CAN_TRUST_MARKS | PMC_CAN_MARK_EMPTY);
	uint64_t pos = arg->start, chunk = (uint64_t)PMC_WORDS << piece->page_shift;
	uint64_t untracked_from = 0, untracked_to = 0;
	int rc = 0;

	pmc_vmas_refresh(&tracker->vmas);
	while (pos < arg->end && !rc) {
		uint64_t end = min_u64(arg->end, align_down(pos, chunk) + chunk);
		if (confirm && untracked_to <= pos) {
			rc = pmc_next_untracked(range, pos, arg->end, &untracked_from, &untracked_to);
			if (rc < 0)
				break;
			if (!rc)
				untracked_from = untracked_to = UINT64_MAX;
			rc = 0;
		}
		if (confirm && untracked_from <= pos) {
			if (pass.engage) {
				// With as many pages as were asked for, it is the next call that meets it; so the ioctl
				// has it.
				rc = arg->max_pages && pass.out.pages >= arg->max_pages ? 0 : -ENOENT;
				break;
			}
			uint64_t to = min_u64(untracked_to, arg->end);
			uint64_t fitted = pmc_output_add(&pass.out, pos, to, PAGE_IS_WRITTEN, unit_of(&pass));
			pos = fitted;
			if (fitted < to)
				break;
			continue;
		}
		if (confirm)
			end = min_u64(end, untracked_from);
		// A run of the answer is protected by one call, for each flushes the TLB of whatever CPU is busy;
		// unless each chunk is a step of its own.
		pass.more = end < arg->end && !pmc_logs(tracker) && !needs_population(&pass);

		uint64_t stop;
		rc = scan_chunk(&pass, pos, end, &stop);
		pos = stop;
		// An answer is handed on in pieces of so many, so that little of the vector is touched.
		if (stop < end || pass.out.count >= PMC_REGIONS)
			break;
	}
	int failed = protect_late(&pass, &pos);
	rc = failed ? failed : rc;
	arg->walk_end = pos;
	return rc ? rc : (int)pass.out.count;
}

int pmc_words_reset(struct pmc_range *range, const struct piece *piece, uint64_t start, uint64_t end,
		    uint64_t *walk_end)
{
	struct pmc_tracker *tracker = range->tracker;
	struct pass pass = {
		.range = range,
		.tracker = tracker,
		.unit_shift = piece->page_shift,
		.kind = piece->kind,
	};
	// Which pages could not be marked has to be read only where there can be such pages.
	bool look = needs_population(&pass) || tracker->abilities & PMC_CAN_GUARD || pmc_logs(tracker);
	sigset_t signals;
	uint64_t chunk = look ? (uint64_t)PMC_WORDS << piece->page_shift : end - start, untracked;
	int rc = 0;

	pmc_vmas_refresh(&tracker->vmas);
	*walk_end = start;
	for (uint64_t pos = start; pos < end; pos = *walk_end) {
		uint64_t to = look ? min_u64(end, align_down(pos, chunk) + chunk) : end;
		if (needs_population(&pass)) {
			// One mapping at a time: behind one that is not tracked, where this ends, what was populated
			// would look written.
			struct vma vma;
			if (pmc_find_vma(tracker, pos, &vma) > 0)
				to = min_u64(to, vma.start > pos ? vma.start : vma.end);
			if (!populate(tracker, pos, to))
				range->exact = false;
		}
		// Read first: a page that was empty then and is protected now has been written meanwhile, and is found
		// by its mark or by being empty no more. The other way round a page written in between would be neither
		// protected nor noticed.
		if (look)
			rc = pmc_own_words_read(tracker, pos, (to - pos) >> piece->page_shift, piece->page_shift,
						tracker->words);
		if (pmc_logs(tracker))
			pmc_hold_fault_threads(tracker, &signals);
		if (!rc) {
			rc = pmc_protect(tracker, pos, to, piece->page_shift, 1, &untracked);
			*walk_end = rc == -ENOENT ? untracked : rc ? pos : to;
		}
		if (pmc_logs(tracker)) {
			pmc_bits_fill(range->log, page_index(range, pos), page_index(range, *walk_end), false);
			// What was populated looks unchanged, and may be open.
			pmc_bits_fill(range->log, page_index(range, *walk_end), page_index(range, to), true);
		}
		if (look)
			remember(&pass, pos, pos, *walk_end);
		if (pmc_logs(tracker))
			pmc_release_fault_threads(tracker, &signals);
		if (rc)
			break;
	}
	return rc;
}

int pmc_words_next_untracked(struct pmc_range *range, uint64_t start, uint64_t end, uint64_t *from, uint64_t *to)
{
	struct pmc_tracker *tracker = range->tracker;
	struct vma vma;
	bool found = false;

	for (uint64_t pos = start; pos < end;) {
		int rc = pmc_find_vma(tracker, pos, &vma);
		if (rc < 0)
			return rc;
		if (!rc || vma.start >= end)
			break;
		if (found && vma.start > *to)
			break;
		pos = max_u64(pos, vma.start);
		tracker->operation = "UFFDIO_COPY";
		// The text of maps says nothing of huge pages; what was found at registration does.
		uint32_t known = pmc_piece_at(range, pos)->page_shift;
		uint64_t size = 1ull << (known > vma.page_shift ? known : vma.page_shift);
		rc = pmc_uffd_is_registered(tracker, align_down(pos, size), size);
		if (rc < 0)
			return rc;
		if (rc && found)
			break;
		if (!rc) {
			*from = found ? *from : pos;
			*to = min_u64(vma.end, end);
			found = true;
		}
		pos = vma.end;
	}
	return found;
}
