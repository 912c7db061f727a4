// The operations: peek, collect, reset, unprotect, rearm; the same for both engines.
//
// A scan alternates between two sources: pages that are owed, because an earlier scan took them and could not hand them
// over, and pages that the engine finds. Room for an answer is made before the engine is called, so nothing that was
// taken is ever without a place.
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static int enter_range(struct pmc_range *range)
{
	if (!range)
		return -PMC_ECLOSED;
	int rc = pmc_enter(range->tracker);
	if (rc || range->open)
		return rc;
	pthread_mutex_unlock(&range->tracker->mutex);
	return -PMC_ECLOSED;
}

// The memory at *pos* turned out to be untracked: registers it, or says in *result* where it is. 0 to go on, or -errno.
static int untracked_at(struct pmc_range *range, uint64_t pos, uint64_t end, uint32_t flags, bool owe,
			struct pmc_result *result)
{
	uint64_t stop;
	struct vma vma;
	int rc = flags & PMC_REARM ? pmc_rearm_next(range, pos, end, owe, &stop, result) :
				     pmc_next_untracked(range, pos, end, &result->untracked_start, &result->untracked_end);
	if (rc < 0)
		return rc;
	if (rc)
		return flags & PMC_REARM ? 0 : -ENOENT;
	// Registered, but not by us: with another userfaultfd, which protects nothing here.
	result->untracked_start = pos;
	result->untracked_end = end;
	if (pmc_vmas_at(&range->tracker->vmas, pos, &vma) > 0 && vma.start < end)
		result->untracked_end = min_u64(vma.end, end);
	return -ENOENT;
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
	int rc = pmc_engine_scan(range, piece, &arg);
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
		if (rc == -ENOENT && engage)
			rc = untracked_at(range, pos, end, flags, true, result);
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
	result->walk_end = start;
	int rc = enter_range(range);
	if (rc)
		return rc;
	struct pmc_tracker *tracker = range->tracker;
	max_pages = min_u64(max_pages, (end - start) >> tracker->page_shift);
	if (flags & PMC_ENGAGE && !result->range) {
		atomic_fetch_add(&range->references, 1);
		result->range = range;
	}
	rc = scan_locked(range, start, end, max_pages, flags, result);
	// A fault thread that died meanwhile has let writes through that this scan could not see.
	if (!rc && atomic_load(&tracker->fault_errno))
		rc = -PMC_EFAULTTHREAD;
	tracker->scans++;
	if (flags & PMC_ENGAGE)
		tracker->pages += result->pages;
	return pmc_leave(tracker, rc, result);
}

int pmc_reset(struct pmc_range *range, uint64_t start, uint64_t end, uint32_t flags, struct pmc_result *result)
{
	int rc = enter_range(range);
	if (rc)
		return rc;
	uint64_t pos = start;
	while (pos < end) {
		rc = pmc_reset_stretch(range, pos, end, &pos);
		if (rc != -ENOENT)
			break;
		rc = untracked_at(range, pos, end, flags, false, result);
		if (rc < 0)
			break;
		rc = 0;
	}
	if (range->owed_count)
		range->owed_count -= pmc_bits_fill(range->owed, page_index(range, start), page_index(range, pos), false);
	result->walk_end = pos;
	range->tracker->resets++;
	return pmc_leave(range->tracker, rc, result);
}

int pmc_unprotect(struct pmc_range *range, uint64_t start, uint64_t end, struct pmc_result *result)
{
	int rc = enter_range(range);
	if (rc)
		return rc;
	struct pmc_tracker *tracker = range->tracker;
	uint64_t pos = start, untracked = end;

	while (pos < end && !rc) {
		const struct piece *piece = pmc_piece_at(range, pos);
		uint64_t to = min_u64(end, piece->end);
		pmc_vmas_refresh(&tracker->vmas);
		rc = pmc_protect(tracker, pos, to, piece->page_shift, 0, &untracked);
		int owed = pmc_owe_mapped(range, pos, rc == -ENOENT ? untracked : to);
		pos = rc == -ENOENT ? untracked : to;
		rc = rc ? rc : owed;
	}
	if (rc == -ENOENT) {
		rc = untracked_at(range, pos, end, 0, false, result);
		tracker->operation = "UFFDIO_WRITEPROTECT";
	}
	result->walk_end = pos;
	return pmc_leave(tracker, rc, result);
}

int pmc_rearm(struct pmc_range *range, uint64_t start, uint64_t end, struct pmc_result *result)
{
	int rc = enter_range(range);
	if (rc)
		return rc;
	do
		rc = pmc_rearm_next(range, start, end, true, &start, result);
	while (rc > 0 && start < end);
	result->walk_end = start;
	return pmc_leave(range->tracker, rc < 0 ? rc : 0, result);
}

int pmc_owe(struct pmc_result *result)
{
	struct pmc_range *range = result->range;
	if (!range || result->delivered)
		return 0;
	int rc = enter_range(range);
	result->delivered = 1;
	if (rc)
		return rc;
	for (uint64_t i = 0; i < result->count; i++)
		range->owed_count += pmc_bits_fill(range->owed, page_index(range, result->regions[i].start),
						   page_index(range, result->regions[i].end), true);
	return pmc_leave(range->tracker, 0, NULL);
}

void pmc_result_release(struct pmc_result *result)
{
	(void)pmc_owe(result); // closed, or forked: nobody will ask for them
	if (result->range)
		pmc_range_put(result->range);
	free(result->regions);
	*result = (struct pmc_result){ 0 };
}
