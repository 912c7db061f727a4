// Ranges: what kinds of memory they hold, their registration, and which engine answers for them.
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "internal.h"

static bool overlaps(uint64_t start, uint64_t end, const void *pages, size_t size)
{
	uint64_t from = (uint64_t)(uintptr_t)pages;
	return from < end && start < from + size;
}

// Whether a page fault in [start, end) could be one that a fault thread, or a holder of its lock, has to wait for.
static bool is_own_memory(const struct pmc_tracker *tracker, uint64_t start, uint64_t end)
{
	if (overlaps(start, end, tracker, sizeof(*tracker)) ||
	    overlaps(start, end, tracker->alive, page_size_of(tracker)) ||
	    overlaps(start, end, (const void *)tracker->bells,
		     tracker->bells ? PMC_FAULT_THREADS * page_size_of(tracker) : 0))
		return true;
	for (unsigned i = 0; i < PMC_FAULT_THREADS; i++)
		if (overlaps(start, end, tracker->fault_threads[i].stack, tracker->fault_threads[i].stack_size))
			return true;
	for (const struct pmc_range *range = tracker->ranges; range; range = range->next) {
		if (overlaps(start, end, range, sizeof(*range)) ||
		    overlaps(start, end, range->quiet, 2 * range->bits_size) ||
		    overlaps(start, end, range->bare, range->bare_size))
			return true;
		for (const struct pmc_cursor *cursor = range->cursors; cursor; cursor = cursor->next)
			if (overlaps(start, end, cursor, sizeof(*cursor)) ||
			    overlaps(start, end, cursor->owed, range->bits_size))
				return true;
	}
	return false;
}

// ---- Memory of our own ----------------------------------------------------------------------------------------

// The first range that has a page of [start, end), or NULL.
static const struct pmc_range *range_over(const struct pmc_tracker *tracker, uint64_t start, uint64_t end)
{
	const struct pmc_range *range = tracker->ranges;
	while (range && (range->start >= end || start >= range->end))
		range = range->next;
	return range;
}

// Where a mapping of *size* bytes fits from *from* on, outside of every range and of [start, end). 0: nowhere.
static uint64_t find_room(struct pmc_tracker *tracker, uint64_t from, uint64_t start, uint64_t end, uint64_t size)
{
	for (;;) {
		const struct pmc_range *range = range_over(tracker, from, from + size);
		struct vma vma;
		if (range) {
			from = range->end;
		} else if (from < end && start < from + size) {
			from = end;
		} else {
			int rc = pmc_find_vma(tracker, from, &vma);
			if (rc <= 0)
				return 0; // behind the last mapping, the stack, lies nothing that can be had
			if (vma.start >= from + size)
				return from;
			from = vma.end;
		}
	}
}

void *pmc_own_pages(struct pmc_tracker *tracker, uint64_t start, uint64_t end, size_t size)
{
	void *pages = pmc_pages_alloc(size);
	uint64_t at = (uint64_t)(uintptr_t)pages;
	const struct pmc_range *range = range_over(tracker, at, at + size);
	if (!pages || (!range && (at >= end || start >= at + size)))
		return pages;
	pmc_pages_free(pages, size);
	pmc_vmas_refresh(&tracker->vmas);
	for (at = range ? range->end : end; (at = find_room(tracker, at, start, end, size));
	     at += page_size_of(tracker)) {
		pages = mmap((void *)(uintptr_t)at, size, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | PMC_MAP_NORESERVE | PMC_MAP_FIXED_NOREPLACE, -1, 0);
		tracker->operation = "mmap";
		if (pages != MAP_FAILED)
			return pages;
		if (errno != EEXIST)
			break;
	}
	return NULL;
}

// ---- Which engine -----------------------------------------------------------------------------------------------

int pmc_engine_scan(struct pmc_range *range, const struct piece *piece, struct pm_scan_arg *arg)
{
	return pmc_is_async(range->tracker) ? pmc_kernel_scan(range, piece, arg) : pmc_words_scan(range, piece, arg);
}

static int engine_reset(struct pmc_range *range, const struct piece *piece, uint64_t start, uint64_t end,
			uint64_t *walk_end)
{
	return pmc_is_async(range->tracker) ? pmc_kernel_reset(range, piece, start, end, walk_end) :
					  pmc_words_reset(range, piece, start, end, walk_end);
}

int pmc_next_untracked(struct pmc_range *range, uint64_t start, uint64_t end, uint64_t *from, uint64_t *to)
{
	pmc_vmas_refresh(&range->tracker->vmas);
	return pmc_is_async(range->tracker) ? pmc_kernel_next_untracked(range, start, end, from, to) :
					  pmc_words_next_untracked(range, start, end, from, to);
}

// ---- Pieces and registration ------------------------------------------------------------------------------

struct pieces {
	struct piece *items;
	uint32_t count;
	uint32_t capacity;
};

static void pieces_free(struct pieces *pieces)
{
	pmc_pages_free(pieces->items, pieces->capacity * sizeof(*pieces->items));
}

static int piece_append(const struct pmc_range *range, struct pieces *pieces, uint64_t end, uint32_t kind,
			uint32_t page_shift)
{
	struct piece *last = pieces->count ? &pieces->items[pieces->count - 1] : NULL;
	if (last && last->kind == kind && last->page_shift == page_shift) {
		last->end = end;
		return 0;
	}
	if (pieces->count == pieces->capacity) {
		struct pieces larger = {
			.count = pieces->count,
			.capacity = pieces->capacity ? pieces->capacity * 2 : 64,
		};
		larger.items = pmc_own_pages(range->tracker, range->start, range->end,
					     larger.capacity * sizeof(*larger.items));
		if (!larger.items)
			return -ENOMEM;
		if (pieces->count)
			memcpy(larger.items, pieces->items, pieces->count * sizeof(*larger.items));
		pieces_free(pieces);
		*pieces = larger;
	}
	pieces->items[pieces->count++] = (struct piece){ end, kind, page_shift };
	return 0;
}

// A hole goes with the piece before it, but not with huge pages, to which it would lend its odd ends.
static int append_hole(const struct pmc_range *range, struct pieces *pieces, uint64_t end, uint32_t page_shift)
{
	struct piece *last = pieces->count ? &pieces->items[pieces->count - 1] : NULL;
	if (!last || last->kind == PMC_KIND_HUGETLB)
		return piece_append(range, pieces, end, PMC_KIND_ANON, page_shift);
	last->end = end;
	return 0;
}

// Lists the kinds of memory in the range as they are now.
static int list_pieces(const struct pmc_range *range, struct vmas *vmas, struct pieces *pieces)
{
	struct pmc_tracker *tracker = range->tracker;
	uint32_t page_shift = tracker->page_shift;
	struct vma vma;
	int rc = 0;

	pmc_vmas_refresh(vmas);
	for (uint64_t pos = range->start; pos < range->end && !rc;) {
		int found = pmc_own_vma_at(vmas, pos, &vma);
		tracker->operation = found < 0 ? vmas->operation : "mmap";
		if (found < 0)
			return found;
		if (!found || vma.start >= range->end)
			return append_hole(range, pieces, range->end, page_shift);
		if (vma.start > pos)
			rc = append_hole(range, pieces, vma.start, page_shift);
		pos = min_u64(vma.end, range->end);
		if (!rc)
			rc = piece_append(range, pieces, pos, vma.kind, vma.page_shift);
	}
	return rc;
}

// Finds out anew what kinds of memory the range holds. *sizes*: some of it is hugetlb, which plain maps does not show.
static int classify(struct pmc_range *range, bool sizes)
{
	struct pmc_tracker *tracker = range->tracker;
	struct vmas *slow = NULL;
	struct pieces pieces = { 0 }, old = { range->pieces, range->piece_count, range->piece_capacity };
	int rc = 0;

	if (sizes && !tracker->vmas.query) {
		slow = pmc_pages_alloc(sizeof(*slow));
		tracker->operation = slow ? "/proc/self/smaps" : "mmap";
		rc = slow ? pmc_vmas_open(slow, false, true) : -ENOMEM;
	}
	if (!rc)
		rc = list_pieces(range, slow ? slow : &tracker->vmas, &pieces);
	if (slow) {
		pmc_vmas_close(slow);
		pmc_pages_free(slow, sizeof(*slow));
	}
	if (rc) {
		pieces_free(&pieces);
		return rc;
	}
	range->pieces = pieces.items;
	range->piece_count = pieces.count;
	range->piece_capacity = pieces.capacity;
	pieces_free(&old);
	return 0;
}

static uint32_t kinds_of(const struct pmc_range *range)
{
	uint32_t kinds = 0;
	for (uint32_t i = 0; i < range->piece_count; i++)
		kinds |= range->pieces[i].kind;
	return kinds;
}

// Once a fault thread has ended nobody would answer the faults of what it has not unregistered.
static int check_fault_thread(struct pmc_tracker *tracker, uint64_t start, uint64_t end)
{
	if (!atomic_load(&tracker->fault_errno))
		return 0;
	(void)pmc_unregister_all(tracker, &tracker->vmas, start, end);
	return -PMC_EFAULTTHREAD;
}

int pmc_register_stretch(struct pmc_range *range, uint64_t start, uint64_t end)
{
	struct pmc_tracker *tracker = range->tracker;
	uint64_t ioctls;
	tracker->operation = "UFFDIO_REGISTER";
	int rc = pmc_uffd_register(tracker->uffd, start, end, &ioctls);
	if (rc)
		return rc;
	// Only hugetlb memory takes no UFFDIO_ZEROPAGE (fs/userfaultfd.c: UFFD_API_RANGE_IOCTLS_BASIC).
	bool huge = !(ioctls >> UFFDIO_ZEROPAGE_BIT & 1) || kinds_of(range) & PMC_KIND_HUGETLB;
	rc = classify(range, huge);
	if (rc) {
		const char *operation = tracker->operation;
		(void)pmc_unregister_all(tracker, &tracker->vmas, start, end);
		tracker->operation = operation;
		return rc;
	}
	return check_fault_thread(tracker, start, end);
}

int pmc_reset_stretch(struct pmc_range *range, uint64_t start, uint64_t end, uint64_t *walk_end)
{
	int rc = 0;
	for (*walk_end = start; *walk_end < end && !rc;) {
		const struct piece *piece = pmc_piece_at(range, *walk_end);
		rc = engine_reset(range, piece, *walk_end, min_u64(end, piece->end), walk_end);
	}
	return rc;
}

// ---- Life of a range ----------------------------------------------------------------------------------------

int pmc_range_close_locked(struct pmc_range *range)
{
	struct pmc_tracker *tracker = range->tracker;
	sigset_t signals;
	if (!range->open)
		return 0;
	range->open = false;
	tracker->operation = "UFFDIO_UNREGISTER";
	pmc_touch_callers();
	// Before the descriptor is closed, always: while a forked child holds a copy of it, closing it wakes no writer.
	int rc = pmc_unregister_all(tracker, &tracker->vmas, range->start, range->end);
	pmc_answer(tracker, range->start, range->end);
	if (atomic_load(&tracker->fault_errno))
		rc = 0;
	pmc_hold_fault_threads(tracker, &signals);
	struct pmc_range **link = &tracker->ranges;
	while (*link && *link != range)
		link = &(*link)->next;
	if (*link)
		*link = range->next;
	pmc_release_fault_threads(tracker, &signals);
	return rc;
}

static void range_free(struct pmc_range *range)
{
	pmc_pages_free(range->quiet, 2 * range->bits_size);
	pmc_pages_free(range->bare, range->bare_size);
	pmc_pages_free(range->pieces, range->piece_capacity * sizeof(*range->pieces));
	pmc_pages_free(range, sizeof(*range));
}

static int range_setup(struct pmc_range *range, struct pmc_result *result)
{
	struct pmc_tracker *tracker = range->tracker;
	uint64_t words = align_up(((range->end - range->start) >> tracker->page_shift), 64) / 64, walk_end;
	sigset_t signals;

	range->bits_size = words * sizeof(uint64_t);
	range->quiet = pmc_own_pages(tracker, range->start, range->end, 2 * range->bits_size);
	if (!range->quiet)
		return -ENOMEM;
	if (pmc_logs(tracker)) {
		range->log = range->quiet + words;
		// Touched now, so that a fault thread never has to wait for memory.
		memset(range->log, 0, range->bits_size);
	}
	if (is_own_memory(tracker, range->start, range->end) || pmc_is_callers(range->start, range->end))
		return -PMC_EOWNMEMORY;

	range->bare_size = pmc_kernel_bare_size(range);
	if (range->bare_size) {
		range->bare = pmc_own_pages(tracker, range->start, range->end, range->bare_size);
		if (!range->bare)
			return -ENOMEM;
	}
	int rc = pmc_register_stretch(range, range->start, range->end);
	if (rc)
		return rc;
	// Fault threads must know a range before it protects its first page.
	pmc_hold_fault_threads(tracker, &signals);
	range->next = tracker->ranges;
	tracker->ranges = range;
	pmc_release_fault_threads(tracker, &signals);
	range->open = true;
	rc = check_fault_thread(tracker, range->start, range->end);
	if (!rc && range->bare)
		rc = pmc_kernel_bare_all(range);
	if (!rc)
		rc = pmc_reset_stretch(range, range->start, range->end, &walk_end);
	if (rc == -ENOENT) {
		result->untracked_start = walk_end;
		result->untracked_end = range->end;
	}
	if (rc) {
		const char *operation = tracker->operation;
		(void)pmc_range_close_locked(range);
		tracker->operation = operation;
	}
	return rc;
}

int pmc_range_create(struct pmc_range **ret, struct pmc_tracker *tracker, uint64_t start, uint64_t end, uint32_t flags,
		     struct pmc_result *result)
{
	int rc = pmc_enter(tracker);
	if (rc)
		return rc;
	struct pmc_range *range = pmc_own_pages(tracker, start, end, sizeof(*range));
	tracker->operation = "mmap";
	if (!range)
		return pmc_leave(tracker, -ENOMEM, result);
	range->references = 1;
	range->tracker = tracker;
	range->start = start;
	range->end = end;
	range->exact = true;
	range->rearm = flags & PMC_REARM;
	rc = range_setup(range, result);
	if (rc) {
		range_free(range);
		return pmc_leave(tracker, rc, result);
	}
	atomic_fetch_add(&tracker->references, 1);
	*ret = range;
	return pmc_leave(tracker, 0, result);
}

int pmc_range_close(struct pmc_range *range)
{
	if (!range)
		return 0;
	struct pmc_tracker *tracker = range->tracker;
	if (!atomic_load_explicit(tracker->alive, memory_order_relaxed))
		return 0;
	pthread_mutex_lock(&tracker->mutex);
	int rc = pmc_range_close_locked(range);
	pthread_mutex_unlock(&tracker->mutex);
	return rc;
}

void pmc_range_put(struct pmc_range *range)
{
	struct pmc_tracker *tracker = range->tracker;
	if (atomic_fetch_sub(&range->references, 1) != 1)
		return;
	range_free(range);
	pmc_tracker_put(tracker);
}

void pmc_range_destroy(struct pmc_range *range)
{
	if (!range)
		return;
	(void)pmc_range_close(range);
	pmc_range_put(range);
}

// What is known of the mappings changes with them, under the mutex, which in a forked child may be held for ever.
static bool lock(struct pmc_range *range)
{
	return range && atomic_load_explicit(range->tracker->alive, memory_order_relaxed) &&
	       !pthread_mutex_lock(&range->tracker->mutex);
}

uint32_t pmc_range_kinds(struct pmc_range *range)
{
	if (!lock(range))
		return 0;
	uint32_t kinds = kinds_of(range);
	pthread_mutex_unlock(&range->tracker->mutex);
	return kinds;
}

uint64_t pmc_range_granularity(struct pmc_range *range)
{
	if (!lock(range))
		return 0;
	uint32_t shift = range->tracker->page_shift;
	for (uint32_t i = 0; i < range->piece_count; i++)
		if (range->pieces[i].page_shift > shift)
			shift = range->pieces[i].page_shift;
	pthread_mutex_unlock(&range->tracker->mutex);
	return 1ull << shift;
}

int pmc_range_exact(struct pmc_range *range)
{
	if (!lock(range))
		return 0;
	bool exact = range->exact;
	pthread_mutex_unlock(&range->tracker->mutex);
	return exact;
}
