// Engine `pagemap-scan`: the ioctl itself, on memory registered with an asynchronous userfaultfd.
//
// Rules that every call here keeps, each for a kernel that needs it:
//  - The vector is ours and mapped: an ioctl that cannot copy out has protected the pages already.
//  - The ends in it are zero before the call: an ioctl that fails in its middle (EPERM at a mapping that is not
//    registered, ENOMEM, EINTR) returns -1 and an arbitrary walk_end, but has stored what it had protected by then.
//  - After more than 512 regions walk_end can lie (seen on 6.18). Fewer regions than the vector has is a finished scan;
//    else the next one starts at walk_end or behind the last region, whichever is further.
//  - WP_MATCHING never meets hugetlb memory, where kernels before 7.2 wait for themselves (e92d92bbafb2).
//  - WP_MATCHING without a vector never cuts through a huge page (NULL dereference up to 6.14 at least).
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "internal.h"

int pmc_pagemap_scan(int pagemap, struct pm_scan_arg *arg)
{
	arg->size = sizeof(*arg);
	int rc = ioctl(pagemap, PAGEMAP_SCAN, arg);
	return rc < 0 ? -errno : rc;
}

// Runs *arg* into its vector, whose ends must be zero. Returns what was stored, also on an error, which is put in
// *error*; arg->walk_end says where to go on.
static uint64_t scan(struct pmc_tracker *tracker, struct pm_scan_arg *arg, int *error)
{
	const struct page_region *vec = (const struct page_region *)(uintptr_t)arg->vec;

	tracker->operation = "PAGEMAP_SCAN";
	int rc = pmc_pagemap_scan(tracker->pagemap, arg);
	*error = rc < 0 ? rc : 0;
	uint64_t count = pmc_stored(vec, arg->vec_len, rc);
	uint64_t last = count ? vec[count - 1].end : arg->start;
	if (*error)
		arg->walk_end = last;
	else if (arg->max_pages || count == arg->vec_len)
		arg->walk_end = max_u64(arg->walk_end, last);
	else
		arg->walk_end = arg->end;
	return count;
}

// How many regions a scan of [start, end) can give, up to *most*: the kernel has less to allocate for a short range.
static uint64_t vec_len_for(const struct pmc_tracker *tracker, uint64_t start, uint64_t end, uint64_t most)
{
	return min_u64(most, ((end - start) >> tracker->page_shift) / 2 + 1);
}

static struct pm_scan_arg written_arg(uint64_t start, uint64_t end, bool engage, struct page_region *vec, uint64_t len)
{
	// CHECK_WPASYNC also without WP_MATCHING: unregistered memory fails the call then, instead of being written or
	// not by the state of its page tables. Exactly these masks take the kernel's fast path, 4 to 9 times quicker
	// than any other query, and the one on which an empty entry in an existing page table is written on every
	// kernel (fs/proc/task_mmu.c: pagemap_scan_pmd_entry).
	return (struct pm_scan_arg){
		.flags = PM_SCAN_CHECK_WPASYNC | (engage ? PM_SCAN_WP_MATCHING : 0),
		.start = start,
		.end = end,
		.vec = (uint64_t)(uintptr_t)vec,
		.vec_len = len,
		.category_mask = PAGE_IS_WRITTEN,
		.return_mask = PAGE_IS_WRITTEN,
	};
}

int pmc_kernel_next_untracked(struct pmc_range *range, uint64_t start, uint64_t end, uint64_t *from, uint64_t *to)
{
	struct page_region region = { 0 };
	struct pm_scan_arg arg = {
		.start = start,
		.end = end,
		.vec = (uint64_t)(uintptr_t)&region,
		.vec_len = 1,
		.category_inverted = PAGE_IS_WPALLOWED,
		.category_mask = PAGE_IS_WPALLOWED,
	};
	int error;
	uint64_t count = scan(range->tracker, &arg, &error);
	if (error || count) {
		*from = region.start;
		*to = region.end;
		return error ? error : 1;
	}
	// Mappings of device memory are in no answer, and fail CHECK_WPASYNC all the same (pagemap_scan_test_walk).
	struct vma vma;
	for (uint64_t pos = start; pos < end; pos = vma.end) {
		int rc = pmc_find_vma(range->tracker, pos, &vma);
		if (rc <= 0 || vma.start >= end)
			return rc < 0 ? rc : 0;
		struct pm_scan_arg check = {
			.flags = PM_SCAN_CHECK_WPASYNC,
			.start = max_u64(vma.start, pos),
			.end = min_u64(vma.end, end),
			.category_mask = PAGE_IS_WPALLOWED,
			.category_inverted = PAGE_IS_WPALLOWED,
		};
		*from = check.start;
		*to = check.end;
		rc = pmc_pagemap_scan(range->tracker->pagemap, &check);
		if (rc)
			return rc == -EPERM ? 1 : rc;
	}
	return 0;
}

// Kernels that call an empty page unchanged where no page table is left (6.7 to 7.1 but for those with 07b4377bdbe7),
// and misread swap entries on the fast path (6.7 and 6.8, fixed by 2c7ad9a590d1): a second query finds both. It asks
// first and changes nothing, so a page that it names is in this answer whatever happens until UFFDIO_WRITEPROTECT arms
// it.
static uint64_t scan_twice(struct pmc_tracker *tracker, struct pm_scan_arg *arg, int *error)
{
	struct page_region *missed = tracker->halves[0], *own = tracker->halves[1];
	struct pm_scan_arg ask = {
		.start = arg->start,
		.end = arg->end,
		.vec = (uint64_t)(uintptr_t)missed,
		.vec_len = PMC_REGIONS / 2,
		.category_inverted = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
		.category_mask = PAGE_IS_PRESENT,
		.category_anyof_mask = PAGE_IS_SWAPPED | PAGE_IS_WRITTEN,
	};
	uint64_t missed_count = scan(tracker, &ask, error), own_count = 0, count = 0;

	arg->walk_end = arg->start;
	if (!*error) {
		bool engage = arg->flags & PM_SCAN_WP_MATCHING;
		struct pm_scan_arg take = written_arg(arg->start, ask.walk_end, engage, own, PMC_REGIONS / 2);
		own_count = scan(tracker, &take, error);
		arg->walk_end = take.walk_end;
		for (uint64_t i = 0; engage && i < missed_count && missed[i].start < take.walk_end; i++) {
			uint64_t untracked;
			int rc = pmc_protect(tracker, missed[i].start, min_u64(missed[i].end, take.walk_end),
					     tracker->page_shift, 1, &untracked);
			// Lost its registration since the scan saw it: in this answer it is written, and the next scan
			// says why.
			if (rc && rc != -ENOENT && !*error)
				*error = rc;
		}
		count = pmc_unite((struct page_region *)(uintptr_t)arg->vec, missed, missed_count, own, own_count,
				  take.walk_end);
	}
	memset(missed, 0, missed_count * sizeof(*missed));
	memset(own, 0, own_count * sizeof(*own));
	return count;
}

// Nobody knows what was written to memory that is not registered, so GET calls all of it written.
static int put_untracked(struct pm_scan_arg *arg, uint64_t start, uint64_t end, const struct pmc_tracker *tracker)
{
	struct output out = {
		.vec = (struct page_region *)(uintptr_t)arg->vec,
		.capacity = arg->vec_len,
		.max_pages = arg->max_pages,
		.page_shift = tracker->page_shift,
	};
	arg->walk_end = pmc_output_add(&out, start, end, PAGE_IS_WRITTEN, page_size_of(tracker));
	return (int)out.count;
}

// ---- Bare blocks ----------------------------------------------------------------------------------------------
//
// A great reserve of which little is used must not cost what is not there: marks on all of its empty pages would fill
// page tables that each scan walks. So private memory that is barred when it is tracked is divided into blocks. A block
// in which nothing is stays *bare*: none of its pages has a mark. In bare blocks the kernel is asked for pages that are
// present or swapped, which lets it skip whole page tables; the zero page, which a read puts there, is none. When
// something has come, one query protects the whole block and takes each page of it, and what was in it is owed to all
// cursors (arm_block). From then on its empty pages have marks, which a discard takes away.
//
// What this costs: a first write that brings a huge page counts as one to all of it, so such a range is not exact; and
// a page that came and was discarded again between two calls leaves no trace, as it leaves no content.

#define BLOCK_TABLES 16 // lowest page tables of a block: 32 MiB with pages of 4 KiB

static uint64_t block_size(const struct pmc_tracker *tracker)
{
	return BLOCK_TABLES * huge_size_of(tracker);
}

static uint64_t block_index(const struct pmc_range *range, uint64_t address)
{
	uint64_t size = block_size(range->tracker);
	return (address - align_down(range->start, size)) / size;
}

size_t pmc_kernel_bare_size(const struct pmc_range *range)
{
	const struct pmc_tracker *tracker = range->tracker;
	// Kernels that call an empty page unchanged where no page table is left would leave it without a mark when its
	// block is armed.
	if (!pmc_is_async(tracker) || !(tracker->abilities & PMC_CAN_SCAN_HOLES) ||
	    range->end - range->start < block_size(tracker))
		return 0;
	return (block_index(range, range->end) / 64 + 1) * sizeof(*range->bare);
}

int pmc_kernel_bare_all(struct pmc_range *range)
{
	uint64_t size = block_size(range->tracker), barred = range->start;
	struct vma vma;

	// *barred*: from there on up to *pos* all is.
	for (uint64_t pos = range->start; pos < range->end;) {
		int rc = pmc_find_vma(range->tracker, pos, &vma);
		if (rc < 0)
			return rc;
		bool found = rc && vma.start <= pos;
		uint64_t end = rc ? min_u64(found ? vma.end : vma.start, range->end) : range->end;
		bool more = found && !vma.protection && vma.kind == PMC_KIND_ANON;
		if (more)
			pos = end;
		if (!more || end == range->end) {
			uint64_t from = align_up(barred, size), to = align_down(pos, size);
			if (from < to &&
			    pmc_bits_fill(range->bare, block_index(range, from), block_index(range, to), true))
				range->exact = false;
			barred = pos = end;
		}
	}
	return 0;
}

// Whether the block at *start* is bare, and up to where, at most *end*, the next ones are as it is.
static bool is_bare(const struct pmc_range *range, const struct piece *piece, uint64_t start, uint64_t *end)
{
	if (!range->bare || piece->kind != PMC_KIND_ANON || start >= *end)
		return false;
	uint64_t size = block_size(range->tracker);
	uint64_t first = block_index(range, start), last = block_index(range, *end - 1) + 1;
	bool bare = bit_test(range->bare, first);
	uint64_t other = pmc_bits_find(range->bare, first, last, !bare);
	*end = min_u64(*end, align_down(range->start, size) + other * size);
	return bare;
}

// Asks for pages that came to bare blocks.
static struct pm_scan_arg present_arg(uint64_t start, uint64_t end, struct page_region *vec, uint64_t len)
{
	return (struct pm_scan_arg){
		.flags = PM_SCAN_CHECK_WPASYNC,
		.start = start,
		.end = end,
		.vec = (uint64_t)(uintptr_t)vec,
		.vec_len = len,
		.category_inverted = PAGE_IS_PFNZERO,
		.category_mask = PAGE_IS_WRITTEN | PAGE_IS_PFNZERO,
		.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
		.return_mask = PAGE_IS_WRITTEN,
	};
}

// *forgotten*: whoever asks has no wish to be told of these pages; empty where it wants all.
static int arm_block(struct pmc_range *range, uint64_t address, struct stretch forgotten)
{
	struct pmc_tracker *tracker = range->tracker;
	struct page_region *vec = tracker->regions;
	uint64_t size = block_size(tracker), pos = align_down(address, size), end = pos + size;
	int error = 0;

	bit_clear(range->bare, block_index(range, address));
	while (pos < end && !error) {
		const struct piece *piece = pmc_piece_at(range, pos);
		struct pm_scan_arg take = {
			.flags = PM_SCAN_WP_MATCHING,
			.start = pos,
			.end = min_u64(end, piece->end),
			.vec = (uint64_t)(uintptr_t)vec,
			.vec_len = PMC_VECTOR,
			.category_mask = PAGE_IS_WRITTEN,
			.return_mask = PAGE_IS_WRITTEN | PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO,
		};
		pos = take.end;
		if (piece->kind != PMC_KIND_ANON)
			continue; // was mapped in between, and is armed
		uint64_t count = scan(tracker, &take, &error);
		for (uint64_t i = 0; i < count; i++) {
			uint64_t from = vec[i].start, to = vec[i].end, is = vec[i].categories;
			if (!(is & (PAGE_IS_PRESENT | PAGE_IS_SWAPPED)) || is & PAGE_IS_PFNZERO)
				continue;
			if (from < forgotten.start)
				pmc_owe_others(range, from, min_u64(to, forgotten.start), NULL);
			if (to > forgotten.end)
				pmc_owe_others(range, max_u64(from, forgotten.end), to, NULL);
		}
		memset(vec, 0, count * sizeof(*vec));
		pos = take.walk_end;
	}
	return error;
}

int pmc_kernel_arm_all(struct pmc_range *range)
{
	uint64_t size = block_size(range->tracker), last = block_index(range, range->end - 1) + 1;
	int rc = 0;
	for (uint64_t block = 0; !rc && (block = pmc_bits_find(range->bare, block, last, true)) < last;)
		rc = arm_block(range, align_down(range->start, size) + block * size, (struct stretch){ 0 });
	return rc;
}

static int scan_piece(struct pmc_range *range, const struct piece *piece, struct pm_scan_arg *arg,
		      struct stretch forgotten)
{
	struct pmc_tracker *tracker = range->tracker;
	bool twice = !(tracker->abilities & PMC_CAN_SCAN_HOLES);

	if (piece->kind == PMC_KIND_HUGETLB)
		return pmc_words_scan(range, piece, arg);

	bool engage = arg->flags & PM_SCAN_WP_MATCHING;
	uint64_t start = arg->start, limit = arg->end, to;
	bool bare = is_bare(range, piece, start, &limit);
	// Two queries cannot share a limit; a range that is no longer than it needs none.
	if (twice && arg->max_pages)
		limit = min_u64(limit, start + (arg->max_pages << tracker->page_shift));
	uint64_t end = limit;
	for (unsigned looks = 0; looks < PMC_LOOKS; looks++) {
		struct page_region *vec = (struct page_region *)(uintptr_t)arg->vec;
		uint64_t len = vec_len_for(tracker, start, end, arg->vec_len);
		struct pm_scan_arg take = bare ? present_arg(start, end, vec, engage ? 1 : len) :
						 written_arg(start, end, engage, vec, len);
		int error;
		take.max_pages = bare && engage ? 0 : arg->max_pages;
		uint64_t count = twice ? scan_twice(tracker, &take, &error) : scan(tracker, &take, &error);
		arg->walk_end = take.walk_end;
		if (bare && engage && count) {
			// What was in it is owed now: the caller goes on there.
			uint64_t address = vec->start;
			arg->walk_end = max_u64(align_down(address, block_size(tracker)), start);
			*vec = (struct page_region){ 0 };
			return arm_block(range, address, forgotten);
		}
		// An error that took pages with it is reported when it comes again, with nothing in its way.
		if (!error || count)
			return (int)count;
		if (error != -EPERM)
			return error;
		int found = pmc_kernel_next_untracked(range, start, limit, &end, &to);
		if (found < 0)
			return found;
		if (!found)
			end = limit;
		else if (end == start)
			return engage ? -ENOENT : put_untracked(arg, start, to, tracker);
		pmc_look_again(&tracker->vmas, looks);
	}
	return -EAGAIN;
}

int pmc_kernel_scan(struct pmc_range *range, const struct piece *piece, struct pm_scan_arg *arg)
{
	return scan_piece(range, piece, arg, (struct stretch){ 0 });
}

// Protects [start, end) without a vector.
static int protect_only(struct pmc_range *range, uint64_t start, uint64_t end, uint64_t *walk_end)
{
	uint64_t limit = end, to;
	*walk_end = start;
	for (unsigned looks = 0; looks < PMC_LOOKS; looks++) {
		struct pm_scan_arg arg = {
			.flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
			.start = start,
			.end = limit,
		};
		range->tracker->operation = "PAGEMAP_SCAN";
		int rc = pmc_pagemap_scan(range->tracker->pagemap, &arg);
		if (!rc) {
			*walk_end = limit;
			return limit < end ? -ENOENT : 0;
		}
		if (rc != -EPERM)
			return rc;
		int found = pmc_kernel_next_untracked(range, start, end, &limit, &to);
		if (found < 0)
			return found;
		if (!found)
			limit = end;
		else if (limit == start)
			return -ENOENT;
		pmc_look_again(&range->tracker->vmas, looks);
	}
	return -EAGAIN;
}

// Protects [start, end) by taking what is written and forgetting it.
static int take_and_forget(struct pmc_range *range, const struct piece *piece, uint64_t start, uint64_t end,
			   uint64_t *walk_end)
{
	struct pmc_tracker *tracker = range->tracker;
	struct stretch forgotten = { start, end };
	for (*walk_end = start; *walk_end < end;) {
		struct pm_scan_arg arg = {
			.flags = PM_SCAN_WP_MATCHING,
			.start = *walk_end,
			.end = end,
			.vec = (uint64_t)(uintptr_t)tracker->regions,
			.vec_len = PMC_VECTOR,
		};
		int count = scan_piece(range, piece, &arg, forgotten);
		*walk_end = arg.walk_end;
		if (count < 0)
			return count;
		memset(tracker->regions, 0, (size_t)count * sizeof(*tracker->regions));
	}
	return 0;
}

// Whether no huge page can lie across *address*. A huge page has one mapping, and one mapping has one userfaultfd: so
// none does where the range begins, unless the memory before it is this tracker's too; where it ends, unless the
// mapping was extended in place.
static bool is_seam(const struct pmc_range *range, uint64_t address)
{
	struct pmc_tracker *tracker = range->tracker;
	struct vma vma;
	for (const struct pmc_range *other = tracker->ranges; other; other = other->next)
		if (other != range && (address == other->start || address == other->end))
			return false;
	if (address == range->start)
		return true;
	return address == range->end && tracker->vmas.query &&
	       pmc_find_vma(tracker, address - page_size_of(tracker), &vma) > 0 && vma.end == address;
}

static int reset_armed(struct pmc_range *range, const struct piece *piece, uint64_t start, uint64_t end,
		       uint64_t *walk_end)
{
	uint64_t huge = huge_size_of(range->tracker);
	// A huge page that held any of it would hold what lies before it.
	if (align_down(end - 1, huge) < start && is_seam(range, start))
		return protect_only(range, start, end, walk_end);
	// For little memory a vector costs less than to look where its mapping ends.
	if (end - start < huge)
		return take_and_forget(range, piece, start, end, walk_end);
	uint64_t inner = is_seam(range, start) ? start : min_u64(align_up(start, huge), end), inner_end = end;
	if (end != align_down(end, huge) && !is_seam(range, end))
		inner_end = max_u64(align_down(end, huge), inner);
	int rc = take_and_forget(range, piece, start, inner, walk_end);
	if (!rc && inner < inner_end)
		rc = protect_only(range, inner, inner_end, walk_end);
	if (!rc && inner_end < end)
		rc = take_and_forget(range, piece, inner_end, end, walk_end);
	return rc;
}

int pmc_kernel_reset(struct pmc_range *range, const struct piece *piece, uint64_t start, uint64_t end,
		     uint64_t *walk_end)
{
	int rc = 0;
	if (piece->kind == PMC_KIND_HUGETLB)
		return pmc_words_reset(range, piece, start, end, walk_end);
	for (*walk_end = start; *walk_end < end && !rc;) {
		uint64_t limit = end;
		bool bare = is_bare(range, piece, *walk_end, &limit);
		rc = (bare ? take_and_forget : reset_armed)(range, piece, *walk_end, limit, walk_end);
	}
	return rc;
}
