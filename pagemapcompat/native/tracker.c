// Trackers and ranges: what is common to both engines.
//
// One call at a time per tracker (mutex). A scan alternates between two sources: pages that are owed, because an earlier scan
// took them and could not hand them over, and pages that the engine finds. Room for an answer is made before the
// engine is called, so nothing that was taken is ever without a place.
//
// Forks: the kernel zeroes the page behind *alive* in a child, however it was forked. A child does no ioctl (the descriptor acts
// on the parent's memory), takes no lock (its holder does not exist there) and joins no thread.
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

// ---- Life of a tracker ----------------------------------------------------------------------------------

static bool is_async(const struct pmc_tracker *tracker)
{
	return tracker->abilities & PMC_CAN_ASYNC;
}

int pmc_tracker_state(struct pmc_tracker *tracker)
{
	if (!atomic_load_explicit(tracker->alive, memory_order_relaxed))
		return -PMC_EFORKED;
	if (__atomic_load_n(&tracker->closed, __ATOMIC_ACQUIRE))
		return -PMC_ECLOSED;
	return atomic_load(&tracker->fault_errno) ? -PMC_EFAULTTHREAD : 0;
}

int pmc_tracker_fault_errno(struct pmc_tracker *tracker)
{
	return atomic_load(&tracker->fault_errno);
}

static bool overlaps(uint64_t start, uint64_t end, const void *pages, size_t size)
{
	uint64_t from = (uint64_t)(uintptr_t)pages;
	return from < end && start < from + size;
}

// Whether a page fault in [start, end) could be one that the fault thread, or a holder of its lock, has to wait for.
static bool is_own_memory(const struct pmc_tracker *tracker, uint64_t start, uint64_t end)
{
	if (overlaps(start, end, tracker, sizeof(*tracker)) || overlaps(start, end, tracker->stack, tracker->stack_size) ||
	    overlaps(start, end, tracker->alive, page_size_of(tracker)))
		return true;
	for (const struct pmc_range *range = tracker->ranges; range; range = range->next)
		if (overlaps(start, end, range, sizeof(*range)) ||
		    overlaps(start, end, range->owed, 3 * range->bits_size))
			return true;
	return false;
}

// Begins a call: 0 with the mutex held, or the reason why there is none.
static int enter(struct pmc_tracker *tracker)
{
	int rc = pmc_tracker_state(tracker);
	if (rc)
		return rc;
	pthread_mutex_lock(&tracker->mutex);
	rc = pmc_tracker_state(tracker);
	// A caller whose stack is tracked would wait for the fault thread while that waits for fault_lock.
	uint64_t here = (uint64_t)(uintptr_t)__builtin_frame_address(0);
	for (struct pmc_range *range = tracker->ranges; range && !rc && !is_async(tracker); range = range->next)
		if (here >= range->start && here < range->end)
			rc = -PMC_EOWNMEMORY;
	if (rc)
		pthread_mutex_unlock(&tracker->mutex);
	return rc;
}

static int leave(struct pmc_tracker *tracker, int rc, struct pmc_result *result)
{
	if (result)
		result->operation = tracker->operation;
	pthread_mutex_unlock(&tracker->mutex);
	return rc;
}

// Drops a reference; the last one frees.
static void put(struct pmc_tracker *tracker)
{
	if (atomic_fetch_sub(&tracker->references, 1) != 1)
		return;
	pmc_pages_free(tracker->stack, tracker->stack_size);
	pmc_pages_free(tracker->alive, page_size_of(tracker));
	pmc_pages_free(tracker->unreadable, page_size_of(tracker));
	pmc_pages_free(tracker, sizeof(*tracker));
}

static void close_descriptor(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void close_descriptors(struct pmc_tracker *tracker)
{
	close_descriptor(&tracker->uffd);
	close_descriptor(&tracker->pagemap);
	close_descriptor(&tracker->stop);
	pmc_vmas_close(&tracker->vmas);
	pmc_vmas_close(&tracker->thread_vmas);
}

int pmc_tracker_create(struct pmc_tracker **ret, const struct pmc_config *config)
{
	struct pmc_tracker *tracker = pmc_pages_alloc(sizeof(*tracker));
	if (!tracker) {
		close(config->uffd);
		close(config->pagemap);
		return -ENOMEM;
	}
	tracker->references = 1;
	tracker->abilities = config->abilities;
	tracker->page_shift = pmc_page_shift();
	tracker->uffd = config->uffd;
	tracker->pagemap = config->pagemap;
	tracker->stop = tracker->vmas.fd = tracker->thread_vmas.fd = -1;
	pthread_mutex_init(&tracker->mutex, NULL);

	bool query = config->abilities & PMC_CAN_QUERY_MAPS;
	int rc = pmc_vmas_open(&tracker->vmas, query, false);
	if (!rc)
		rc = pmc_vmas_open(&tracker->thread_vmas, query, false);
	if (!rc) {
		tracker->alive = pmc_pages_alloc(page_size_of(tracker));
		tracker->unreadable = pmc_pages_alloc(page_size_of(tracker));
		rc = tracker->alive && tracker->unreadable ? 0 : -ENOMEM;
	}
	if (!rc)
		rc = mprotect(tracker->unreadable, page_size_of(tracker), PROT_NONE) ? -errno : 0;
	if (!rc) {
		uint64_t alive = (uint64_t)(uintptr_t)tracker->alive;
		rc = pmc_madvise(alive, alive + page_size_of(tracker), PMC_MADV_WIPEONFORK);
		atomic_store(tracker->alive, 1);
	}
	if (!rc && !is_async(tracker)) {
		tracker->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		rc = tracker->stop < 0 ? -errno : pmc_fault_thread_start(tracker);
	}
	if (rc) {
		close_descriptors(tracker);
		put(tracker);
		return rc;
	}
	*ret = tracker;
	return 0;
}

static int close_range_locked(struct pmc_range *range)
{
	struct pmc_tracker *tracker = range->tracker;
	if (!range->open)
		return 0;
	range->open = false;
	tracker->operation = "UFFDIO_UNREGISTER";
	// Before the descriptor is closed, always: while a forked child holds a copy of it, closing it wakes no writer.
	int rc = atomic_load(&tracker->fault_errno) ?
			 0 :
			 pmc_unregister_all(tracker, &tracker->vmas, range->start, range->end);
	pmc_fair_lock(&tracker->fault_lock);
	struct pmc_range **link = &tracker->ranges;
	while (*link && *link != range)
		link = &(*link)->next;
	if (*link)
		*link = range->next;
	pmc_fair_unlock(&tracker->fault_lock);
	return rc;
}

int pmc_tracker_close(struct pmc_tracker *tracker)
{
	if (!atomic_load_explicit(tracker->alive, memory_order_relaxed)) {
		close_descriptors(tracker);
		return 0;
	}
	pthread_mutex_lock(&tracker->mutex);
	int rc = 0;
	if (!tracker->closed) {
		while (tracker->ranges) {
			int failed = close_range_locked(tracker->ranges);
			rc = rc ? rc : failed;
		}
		pmc_fault_thread_stop(tracker);
		close_descriptors(tracker);
		__atomic_store_n(&tracker->closed, true, __ATOMIC_RELEASE);
	}
	pthread_mutex_unlock(&tracker->mutex);
	return rc;
}

void pmc_tracker_destroy(struct pmc_tracker *tracker)
{
	(void)pmc_tracker_close(tracker);
	put(tracker);
}

int pmc_tracker_statistics(struct pmc_tracker *tracker, struct pmc_statistics *ret)
{
	int rc = enter(tracker);
	if (rc)
		return rc;
	*ret = (struct pmc_statistics){
		.faults = atomic_load(&tracker->faults),
		.scans = tracker->scans,
		.resets = tracker->resets,
		.pages = tracker->pages,
	};
	for (struct pmc_range *range = tracker->ranges; range; range = range->next) {
		ret->ranges++;
		ret->tracked_bytes += range->end - range->start;
		ret->owed_pages += range->owed_count;
	}
	return leave(tracker, 0, NULL);
}

// ---- Which engine ---------------------------------------------------------------------------------------

static int engine_scan(struct pmc_range *range, const struct piece *piece, struct pm_scan_arg *arg)
{
	return is_async(range->tracker) ? pmc_kernel_scan(range, piece, arg) : pmc_words_scan(range, piece, arg);
}

static int engine_reset(struct pmc_range *range, const struct piece *piece, uint64_t start, uint64_t end,
			uint64_t *walk_end)
{
	return is_async(range->tracker) ? pmc_kernel_reset(range, piece, start, end, walk_end) :
					  pmc_words_reset(range, piece, start, end, walk_end);
}

static int next_untracked(struct pmc_range *range, uint64_t start, uint64_t end, uint64_t *from, uint64_t *to)
{
	pmc_vmas_refresh(&range->tracker->vmas);
	return is_async(range->tracker) ? pmc_kernel_next_untracked(range, start, end, from, to) :
					  pmc_words_next_untracked(range, start, end, from, to);
}

// ---- Pieces and registration ------------------------------------------------------------------------------

static int piece_append(struct pmc_range *range, uint64_t end, uint32_t kind, uint32_t page_shift)
{
	struct piece *last = range->piece_count ? &range->pieces[range->piece_count - 1] : NULL;
	if (last && last->kind == kind && last->page_shift == page_shift) {
		last->end = end;
		return 0;
	}
	if (range->piece_count == range->piece_capacity) {
		uint32_t capacity = range->piece_capacity ? range->piece_capacity * 2 : 64;
		struct piece *pieces = pmc_pages_alloc(capacity * sizeof(*pieces));
		if (!pieces)
			return -ENOMEM;
		if (range->piece_count)
			memcpy(pieces, range->pieces, range->piece_count * sizeof(*pieces));
		pmc_pages_free(range->pieces, range->piece_capacity * sizeof(*pieces));
		range->pieces = pieces;
		range->piece_capacity = capacity;
	}
	range->pieces[range->piece_count++] = (struct piece){ end, kind, page_shift };
	return 0;
}

// Finds out anew what kinds of memory the range holds. *sizes*: some of it is hugetlb, which plain maps does not show.
static int classify(struct pmc_range *range, bool sizes)
{
	struct pmc_tracker *tracker = range->tracker;
	struct vmas *vmas = &tracker->vmas, *slow = NULL;
	uint64_t pos = range->start;
	struct vma vma;
	int rc = 0;

	if (sizes && !vmas->query) {
		vmas = slow = pmc_pages_alloc(sizeof(*slow));
		if (!slow)
			return -ENOMEM;
		rc = pmc_vmas_open(slow, false, true);
	}
	range->piece_count = 0;
	tracker->operation = "/proc/self/maps";
	if (!rc)
		pmc_vmas_refresh(vmas);
	while (!rc && pos < range->end) {
		int found = pmc_vmas_at(vmas, pos, &vma);
		if (found < 0)
			rc = found;
		if (found <= 0 || vma.start >= range->end)
			break;
		// A hole goes with the piece before it; without one it must not lend its odd start to huge pages.
		if (vma.start > pos && range->piece_count)
			range->pieces[range->piece_count - 1].end = vma.start;
		else if (vma.start > pos)
			rc = piece_append(range, vma.start, PMC_KIND_ANON, tracker->page_shift);
		pos = min_u64(vma.end, range->end);
		if (!rc)
			rc = piece_append(range, pos, vma.kind, vma.page_shift);
	}
	if (!rc && !range->piece_count)
		rc = piece_append(range, range->end, PMC_KIND_ANON, tracker->page_shift);
	if (!rc)
		range->pieces[range->piece_count - 1].end = range->end;
	if (slow) {
		pmc_vmas_close(slow);
		pmc_pages_free(slow, sizeof(*slow));
	}
	return rc;
}

static int register_stretch(struct pmc_range *range, uint64_t start, uint64_t end)
{
	uint64_t ioctls;
	range->tracker->operation = "UFFDIO_REGISTER";
	int rc = pmc_uffd_register(range->tracker->uffd, start, end, &ioctls);
	if (rc)
		return rc;
	// Only hugetlb memory takes no UFFDIO_ZEROPAGE (fs/userfaultfd.c: UFFD_API_RANGE_IOCTLS_BASIC).
	bool huge = !(ioctls >> UFFDIO_ZEROPAGE_BIT & 1) || pmc_range_kinds(range) & PMC_KIND_HUGETLB;
	return classify(range, huge);
}

static int reset_stretch(struct pmc_range *range, uint64_t start, uint64_t end, uint64_t *walk_end)
{
	int rc = 0;
	for (*walk_end = start; *walk_end < end && !rc;) {
		const struct piece *piece = pmc_piece_at(range, *walk_end);
		rc = engine_reset(range, piece, *walk_end, min_u64(end, piece->end), walk_end);
	}
	return rc;
}

// Owes every mapped page of [start, end).
static int owe_mapped(struct pmc_range *range, uint64_t start, uint64_t end)
{
	struct pmc_tracker *tracker = range->tracker;
	struct vma vma;
	int rc = 0;

	pmc_vmas_refresh(&tracker->vmas);
	for (uint64_t pos = start; pos < end; pos = vma.end) {
		rc = pmc_vmas_at(&tracker->vmas, pos, &vma);
		if (rc <= 0 || vma.start >= end)
			break;
		range->owed_count += pmc_bits_fill(range->owed, page_index(range, max_u64(vma.start, pos)),
						   page_index(range, min_u64(vma.end, end)), true);
	}
	if (rc < 0)
		tracker->operation = "/proc/self/maps";
	return rc < 0 ? rc : 0;
}

// Registers the first untracked stretch of [start, end), protects it and, with *owe*, counts it as written. 1: there was one.
static int rearm_next(struct pmc_range *range, uint64_t start, uint64_t end, bool owe, uint64_t *stop,
		      struct pmc_result *result)
{
	uint64_t from, to, walk_end;
	*stop = end;
	int rc = next_untracked(range, start, end, &from, &to);
	if (rc <= 0)
		return rc;
	result->untracked_start = from;
	result->untracked_end = to;
	*stop = to;
	rc = register_stretch(range, from, to);
	if (!rc && owe)
		rc = owe_mapped(range, from, to);
	if (!rc)
		rc = reset_stretch(range, from, to, &walk_end);
	return rc ? rc : 1;
}

// ---- Life of a range ----------------------------------------------------------------------------------------

static void range_free(struct pmc_range *range)
{
	pmc_pages_free(range->owed, 3 * range->bits_size);
	pmc_pages_free(range->pieces, range->piece_capacity * sizeof(*range->pieces));
	pmc_pages_free(range, sizeof(*range));
}

static int range_setup(struct pmc_range *range, struct pmc_result *result)
{
	struct pmc_tracker *tracker = range->tracker;
	uint64_t words = align_up(((range->end - range->start) >> tracker->page_shift), 64) / 64, walk_end;

	range->bits_size = words * sizeof(uint64_t);
	range->owed = pmc_pages_alloc(3 * range->bits_size);
	if (!range->owed)
		return -ENOMEM;
	range->quiet = range->owed + words;
	if (!(tracker->abilities & PMC_CAN_SEE_MARKS)) {
		range->log = range->quiet + words;
		// Touched now, so that the fault thread never has to wait for memory.
		memset(range->log, 0, range->bits_size);
	}
	if (is_own_memory(tracker, range->start, range->end) ||
	    overlaps(range->start, range->end, range, sizeof(*range)) ||
	    overlaps(range->start, range->end, range->owed, 3 * range->bits_size) ||
	    overlaps(range->start, range->end, __builtin_frame_address(0), 1))
		return -PMC_EOWNMEMORY;

	int rc = register_stretch(range, range->start, range->end);
	if (rc)
		return rc;
	// The fault thread must know a range before it protects its first page.
	pmc_fair_lock(&tracker->fault_lock);
	range->next = tracker->ranges;
	tracker->ranges = range;
	pmc_fair_unlock(&tracker->fault_lock);
	range->open = true;
	rc = reset_stretch(range, range->start, range->end, &walk_end);
	if (rc == -ENOENT) {
		result->untracked_start = walk_end;
		result->untracked_end = range->end;
	}
	if (rc) {
		const char *operation = tracker->operation;
		(void)close_range_locked(range);
		tracker->operation = operation;
	}
	return rc;
}

int pmc_range_create(struct pmc_range **ret, struct pmc_tracker *tracker, uint64_t start, uint64_t end,
		     struct pmc_result *result)
{
	int rc = enter(tracker);
	if (rc)
		return rc;
	struct pmc_range *range = pmc_pages_alloc(sizeof(*range));
	tracker->operation = "mmap";
	if (!range)
		return leave(tracker, -ENOMEM, result);
	range->tracker = tracker;
	range->start = start;
	range->end = end;
	range->exact = true;
	rc = range_setup(range, result);
	if (rc) {
		range_free(range);
		return leave(tracker, rc, result);
	}
	atomic_fetch_add(&tracker->references, 1);
	*ret = range;
	return leave(tracker, 0, result);
}

int pmc_range_close(struct pmc_range *range)
{
	struct pmc_tracker *tracker = range->tracker;
	if (!atomic_load_explicit(tracker->alive, memory_order_relaxed))
		return 0;
	pthread_mutex_lock(&tracker->mutex);
	int rc = close_range_locked(range);
	pthread_mutex_unlock(&tracker->mutex);
	return rc;
}

void pmc_range_destroy(struct pmc_range *range)
{
	struct pmc_tracker *tracker = range->tracker;
	(void)pmc_range_close(range);
	range_free(range);
	put(tracker);
}

uint32_t pmc_range_kinds(struct pmc_range *range)
{
	uint32_t kinds = 0;
	for (uint32_t i = 0; i < range->piece_count; i++)
		kinds |= range->pieces[i].kind;
	return kinds;
}

uint64_t pmc_range_granularity(struct pmc_range *range)
{
	uint32_t shift = range->tracker->page_shift;
	for (uint32_t i = 0; i < range->piece_count; i++)
		if (range->pieces[i].page_shift > shift)
			shift = range->pieces[i].page_shift;
	return 1ull << shift;
}

int pmc_range_exact(struct pmc_range *range)
{
	return range->exact;
}

// ---- The operations -----------------------------------------------------------------------------------------

static int enter_range(struct pmc_range *range)
{
	int rc = enter(range->tracker);
	if (rc || range->open)
		return rc;
	pthread_mutex_unlock(&range->tracker->mutex);
	return -PMC_ECLOSED;
}

// Runs the engine over [start, end) into tracker->regions, which must be zero again before the next run.
static int run_engine(struct pmc_range *range, const struct piece *piece, uint64_t start, uint64_t end,
		      uint64_t max_pages, uint64_t vec_len, bool engage, uint64_t *walk_end)
{
	struct pm_scan_arg arg = {
		.flags = engage ? PM_SCAN_WP_MATCHING : 0,
		.start = start,
		.end = end,
		.vec = (uint64_t)(uintptr_t)range->tracker->regions,
		.vec_len = vec_len,
		.max_pages = max_pages,
	};
	int rc = engine_scan(range, piece, &arg);
	*walk_end = arg.walk_end;
	return rc;
}

// How many regions the last run stored. An engine that fails has stored what it took.
static uint64_t stored(const struct pmc_tracker *tracker, int rc)
{
	uint64_t count = 0;
	if (rc >= 0)
		return (uint64_t)rc;
	while (count < PMC_REGIONS && tracker->regions[count].end)
		count++;
	return count;
}

static void drain(struct pmc_tracker *tracker, int rc, struct pmc_result *result)
{
	uint64_t count = stored(tracker, rc);
	for (uint64_t i = 0; result && i < count; i++)
		pmc_result_append(result, tracker->regions[i].start, tracker->regions[i].end, PAGE_IS_WRITTEN,
				  tracker->page_shift);
	memset(tracker->regions, 0, count * sizeof(*tracker->regions));
}

// Hands out the owed pages [start, end), which lie in one piece, and protects them again. *walk_end: done up to there.
static int take_owed(struct pmc_range *range, const struct piece *piece, uint64_t start, uint64_t end, bool engage,
		     struct pmc_result *result, uint64_t *walk_end)
{
	struct pmc_tracker *tracker = range->tracker;
	uint64_t done = engage ? start : end;
	struct vma vma;
	int rc = 0;

	while (done < end && rc >= 0) {
		rc = run_engine(range, piece, done, end, 0, PMC_REGIONS, true, &done);
		drain(tracker, rc, NULL); // all of it is owed already
	}
	int failed = rc < 0 ? rc : 0;
	*walk_end = start;
	pmc_vmas_refresh(&tracker->vmas);
	while (*walk_end < done) {
		uint64_t from = *walk_end;
		rc = pmc_vmas_at(&tracker->vmas, from, &vma);
		if (rc < 0) {
			tracker->operation = "/proc/self/maps";
			return rc;
		}
		if (!rc || vma.start >= done) {
			*walk_end = done; // what was unmapped meanwhile is not reported
		} else {
			if (pmc_result_reserve(result, 1))
				return 0;
			*walk_end = min_u64(vma.end, done);
			pmc_result_append(result, max_u64(vma.start, from), *walk_end, PAGE_IS_WRITTEN,
					  tracker->page_shift);
		}
		if (engage)
			range->owed_count -= pmc_bits_fill(range->owed, page_index(range, from),
							   page_index(range, *walk_end), false);
	}
	return failed;
}

// Where the first written or owed page of [start, end) is, or end.
static int next_written(struct pmc_range *range, uint64_t start, uint64_t end, uint64_t *ret)
{
	uint32_t shift = range->tracker->page_shift;
	if (range->owed_count)
		end = range->start + (pmc_bits_find(range->owed, page_index(range, start), page_index(range, end), true)
				      << shift);
	for (uint64_t pos = start; pos < end;) {
		const struct piece *piece = pmc_piece_at(range, pos);
		int rc = run_engine(range, piece, pos, min_u64(end, piece->end), 0, 1, false, &pos);
		*ret = range->tracker->regions[0].start;
		drain(range->tracker, rc, NULL);
		if (rc)
			return rc < 0 ? rc : 0;
	}
	*ret = end;
	return 0;
}

static int scan_locked(struct pmc_range *range, uint64_t start, uint64_t end, uint64_t max_pages, uint32_t flags,
		       struct pmc_result *result)
{
	struct pmc_tracker *tracker = range->tracker;
	bool engage = flags & PMC_ENGAGE;
	uint32_t shift = tracker->page_shift;
	uint64_t pos = start;
	int rc = 0;

	while (pos < end) {
		const struct piece *piece = pmc_piece_at(range, pos);
		uint64_t limit = min_u64(end, piece->end), left = 0, walk_end;
		if (max_pages) {
			left = max_pages > result->pages ? max_pages - result->pages : 0;
			if (result->pages && left < 1ull << (piece->page_shift - shift)) {
				rc = next_written(range, pos, end, &pos);
				break;
			}
		}
		if (pmc_result_reserve(result, PMC_REGIONS))
			break;
		if (range->owed_count) {
			uint64_t first = page_index(range, pos), last = page_index(range, limit);
			uint64_t owed = pmc_bits_find(range->owed, first, last, true);
			if (owed == first) {
				limit = range->start + (pmc_bits_find(range->owed, first, last, false) << shift);
				limit = align_up(limit, 1ull << piece->page_shift);
				if (max_pages)
					limit = min_u64(limit, pos + max_u64(align_down(left << shift, 1ull << piece->page_shift),
									     1ull << piece->page_shift));
				rc = take_owed(range, piece, pos, limit, engage, result, &walk_end);
				if (walk_end == pos && !rc)
					break;
				pos = walk_end;
				goto check;
			}
			limit = range->start + (owed << shift);
		}
		rc = run_engine(range, piece, pos, limit, left, PMC_REGIONS, engage, &walk_end);
		drain(tracker, rc, result);
		pos = walk_end;
check:
		if (rc == -ENOENT && engage) {
			uint64_t to;
			rc = flags & PMC_REARM ? rearm_next(range, pos, end, true, &to, result) :
						 next_untracked(range, pos, end, &result->untracked_start, &to);
			if (rc > 0 && !(flags & PMC_REARM)) {
				result->untracked_end = to;
				rc = -ENOENT;
			}
		}
		if (rc < 0)
			break;
		rc = 0;
	}
	result->walk_end = pos;
	return rc;
}

int pmc_scan(struct pmc_range *range, uint64_t start, uint64_t end, uint64_t max_pages, uint32_t flags,
	     struct pmc_result *result)
{
	int rc = enter_range(range);
	if (rc)
		return rc;
	struct pmc_tracker *tracker = range->tracker;
	rc = scan_locked(range, start, end, max_pages, flags, result);
	// A fault thread that died meanwhile has let writes through that this scan could not see.
	if (!rc && atomic_load(&tracker->fault_errno))
		rc = -PMC_EFAULTTHREAD;
	tracker->scans++;
	if (flags & PMC_ENGAGE)
		tracker->pages += result->pages;
	return leave(tracker, rc, result);
}

int pmc_reset(struct pmc_range *range, uint64_t start, uint64_t end, uint32_t flags, struct pmc_result *result)
{
	int rc = enter_range(range);
	if (rc)
		return rc;
	uint64_t pos = start, stop;
	while (pos < end) {
		rc = reset_stretch(range, pos, end, &pos);
		if (rc != -ENOENT)
			break;
		rc = flags & PMC_REARM ? rearm_next(range, pos, end, false, &stop, result) :
					 next_untracked(range, pos, end, &result->untracked_start, &stop);
		if (rc > 0 && !(flags & PMC_REARM)) {
			result->untracked_end = stop;
			rc = -ENOENT;
		}
		if (rc < 0)
			break;
		rc = 0;
	}
	if (range->owed_count)
		range->owed_count -= pmc_bits_fill(range->owed, page_index(range, start), page_index(range, pos), false);
	result->walk_end = pos;
	range->tracker->resets++;
	return leave(range->tracker, rc, result);
}

int pmc_unprotect(struct pmc_range *range, uint64_t start, uint64_t end, struct pmc_result *result)
{
	int rc = enter_range(range);
	if (rc)
		return rc;
	struct pmc_tracker *tracker = range->tracker;
	uint64_t pos = start, untracked = end;

	while (pos < end && !rc) {
		uint64_t to = min_u64(end, pmc_piece_at(range, pos)->end);
		pmc_vmas_refresh(&tracker->vmas);
		rc = pmc_protect(tracker, pos, to, 0, &untracked);
		int owed = owe_mapped(range, pos, rc == -ENOENT ? untracked : to);
		pos = rc == -ENOENT ? untracked : to;
		rc = rc ? rc : owed;
	}
	if (rc == -ENOENT) {
		result->untracked_start = untracked;
		result->untracked_end = end;
		uint64_t from, to;
		if (next_untracked(range, untracked, end, &from, &to) > 0) {
			result->untracked_start = from;
			result->untracked_end = to;
		}
		tracker->operation = "UFFDIO_WRITEPROTECT";
	}
	result->walk_end = pos;
	return leave(tracker, rc, result);
}

int pmc_rearm(struct pmc_range *range, uint64_t start, uint64_t end, struct pmc_result *result)
{
	int rc = enter_range(range);
	if (rc)
		return rc;
	do
		rc = rearm_next(range, start, end, true, &start, result);
	while (rc > 0 && start < end);
	result->walk_end = start;
	return leave(range->tracker, rc < 0 ? rc : 0, result);
}

int pmc_owe(struct pmc_range *range, const struct pmc_result *result)
{
	int rc = enter_range(range);
	if (rc)
		return rc;
	for (uint64_t i = 0; i < result->count; i++)
		range->owed_count += pmc_bits_fill(range->owed, page_index(range, result->regions[i].start),
						   page_index(range, result->regions[i].end), true);
	return leave(range->tracker, 0, NULL);
}
