// The operations: peek, collect, reset, unprotect, rearm; the same for both engines.
//
// A scan alternates between two sources: pages that are owed to its cursor, because an earlier scan took them for
// another one or could not hand them over, and pages that the engine finds. Room for an answer is made before the
// engine is called, so nothing that was taken is ever without a place.
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "internal.h"

#define REARMS 8 // of one place, by one call, beside somebody who maps it anew each time

int pmc_enter_range(struct pmc_range *range)
{
	if (!range)
		return -PMC_ECLOSED;
	int rc = pmc_enter(range->tracker);
	if (rc || range->open)
		return rc;
	pthread_mutex_unlock(&range->tracker->mutex);
	return -PMC_ECLOSED;
}

static int enter_cursor(struct pmc_cursor *cursor)
{
	if (!cursor)
		return -PMC_ECLOSED;
	int rc = pmc_enter_range(cursor->range);
	if (rc || cursor->owed)
		return rc;
	pthread_mutex_unlock(&cursor->range->tracker->mutex);
	return -PMC_ECLOSED;
}

// One call of a reader: what it asks for beside where, and where its answer goes.
struct scan {
	struct pmc_cursor *cursor;
	uint64_t max_pages; // 0: all
	bool engage;
	struct pmc_result *result;
};

static bool is_alone(const struct pmc_cursor *cursor)
{
	return cursor->range->cursors == cursor && !cursor->next;
}

// Registers and protects [start, end), and counts it as written for all cursors: where nothing shows marks, nothing
// else tells what is written to it if that fails half-way. Who resets has settled its own debt by the end.
static int rearm(struct pmc_range *range, uint64_t start, uint64_t end)
{
	struct pmc_tracker *tracker = range->tracker;
	uint64_t walk_end;
	int rc = pmc_register_stretch(range, start, end);
	const char *operation = tracker->operation;
	// What is mapped from here on is not registered, so nothing is protected that was not counted. A registration
	// that fails may have been made in part.
	int owed = pmc_owe_mapped(range, start, end);
	if (rc)
		tracker->operation = operation;
	rc = rc ? rc : owed;
	return rc ? rc : pmc_reset_stretch(range, start, end, &walk_end);
}

// Registers and protects the first untracked stretch of [start, end), and puts it in *result*. 1: there was one; by now
// it is tracked, or unmapped, or mapped anew at once and owed to all cursors. 0: there was none. Or -errno.
static int rearm_next(struct pmc_range *range, uint64_t start, uint64_t end, struct pmc_result *result)
{
	struct pmc_tracker *tracker = range->tracker;
	uint64_t from, to;
	struct vma vma;
	int rc = pmc_next_untracked(range, start, end, &from, &to);
	if (rc <= 0)
		return rc;
	result->untracked_start = from;
	result->untracked_end = to;
	for (unsigned looks = 1;; looks++) {
		rc = rearm(range, from, to);
		if (!rc || rc == -ENOENT) // it may be mapped anew as soon as it is registered
			return 1;
		if (rc != -EINVAL || looks == PMC_LOOKS)
			return rc;
		// Part of it was unmapped in between; of what is a hole now, nothing is left to do.
		pmc_look_again(&tracker->vmas, looks);
		rc = pmc_find_vma(tracker, from, &vma);
		if (rc <= 0 || vma.start >= to)
			return rc < 0 ? rc : 1;
	}
}

// What it means that memory is not registered: -ENOENT, or that the userfaultfd is somebody else's file, and the kernel
// let go of everything with ours.
static int not_registered(struct pmc_tracker *tracker)
{
	uint64_t page = (uint64_t)(uintptr_t)tracker->unreadable;
	int rc = pmc_uffd_wake(tracker->uffd, page, page + page_size_of(tracker));
	if (rc != -EBADF && rc != -ENOTTY)
		return -ENOENT;
	tracker->operation = "UFFDIO_WAKE";
	return rc;
}

// What a call has tried where it came upon untracked memory.
struct refusals {
	uint64_t at; // which the numbers are of
	unsigned rearms;
	unsigned looks; // since the last rearm, each of which found nothing untracked
	uint64_t left_until; // the memory from *at* to here stays untracked, and is owed; 0: none does
};

// Somebody maps the memory at *pos* anew whenever it is registered. It is left as it is, for the next call will find
// that: until then all of it counts as written.
static int leave_untracked(struct pmc_range *range, uint64_t pos, uint64_t end, uint64_t *until)
{
	uint64_t from;
	int rc = pmc_next_untracked(range, pos, end, &from, until);
	if (rc < 0)
		return rc;
	if (!rc || from > pos) { // by now it is tracked, or a hole; the engine has seen otherwise
		uint64_t unit = 1ull << pmc_piece_at(range, pos)->page_shift;
		*until = min_u64(end, align_down(pos, unit) + unit);
	}
	if (range->log) { // since it was looked at some of it may have been registered, and be open
		sigset_t signals;
		pmc_hold_fault_threads(range->tracker, &signals);
		pmc_bits_fill(range->log, page_index(range, pos), page_index(range, *until), true);
		pmc_release_fault_threads(range->tracker, &signals);
	}
	pmc_owe_others(range, pos, *until, NULL);
	return 0;
}

// The engine met untracked memory at *pos*, and a look found none. It went, or was registered, in between: then the
// engine is asked again. Or it is registered, but not by us: with another userfaultfd, which protects nothing here. 0
// to go on, or -ENOENT.
static int found_none(struct pmc_tracker *tracker, uint64_t pos, uint64_t end, struct refusals *refusals,
		      struct pmc_result *result)
{
	struct vma vma;
	if (++refusals->looks < PMC_LOOKS) {
		pmc_look_again(&tracker->vmas, refusals->looks);
		return 0;
	}
	result->untracked_start = pos;
	result->untracked_end = end;
	if (pmc_own_vma_at(&tracker->vmas, pos, &vma) > 0 && vma.start < end)
		result->untracked_end = min_u64(vma.end, end);
	return -ENOENT;
}

// The engine met untracked memory at *pos*: registers it, or says in *result* where it is. 0 to go on, or -errno.
static int untracked_at(struct pmc_range *range, uint64_t pos, uint64_t end, bool rearm, struct refusals *refusals,
			struct pmc_result *result)
{
	struct pmc_tracker *tracker = range->tracker;
	uint64_t *from = &result->untracked_start, *to = &result->untracked_end;
	if (refusals->at != pos)
		*refusals = (struct refusals){ .at = pos };
	int rc = rearm ? rearm_next(range, pos, end, result) : pmc_next_untracked(range, pos, end, from, to);
	if (rc < 0)
		return rc;
	if (!rc)
		return found_none(tracker, pos, end, refusals, result);
	if (!rearm)
		return not_registered(tracker);
	refusals->looks = 0;
	if (++refusals->rearms >= REARMS)
		return leave_untracked(range, pos, end, &refusals->left_until);
	pmc_vmas_refresh(&tracker->vmas);
	return 0;
}

// Runs the engine over [start, end) into tracker->regions, whose ends must be zero again before the next run.
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

// Empties the vector of the last run into *result*, if there is one. With *engaged* the pages were taken, for *cursor*.
// An engine that fails has stored what it took.
static void drain(struct pmc_cursor *cursor, int rc, bool engaged, struct pmc_result *result)
{
	struct pmc_tracker *tracker = cursor->range->tracker;
	uint64_t count = pmc_stored(tracker->regions, PMC_VECTOR, rc);
	for (uint64_t i = 0; engaged && !is_alone(cursor) && i < count; i++)
		pmc_owe_others(cursor->range, tracker->regions[i].start, tracker->regions[i].end, cursor);
	if (result)
		pmc_result_move_in(result, tracker->regions, count, tracker->page_shift);
	else
		memset(tracker->regions, 0, count * sizeof(*tracker->regions));
}

// Takes what was written of [start, end), which lies in one piece, for the other cursors alone. *walk_end: done up to
// there.
static int take_for_others(struct pmc_cursor *cursor, const struct piece *piece, uint64_t start, uint64_t end,
			   uint64_t *walk_end)
{
	int rc = 0;
	for (*walk_end = start; *walk_end < end && rc >= 0;) {
		rc = run_engine(cursor->range, piece, *walk_end, end, 0, PMC_VECTOR, true, walk_end);
		drain(cursor, rc, true, NULL);
	}
	return rc < 0 ? rc : 0;
}

// Makes room for *more* regions. False: there is no memory for them.
static bool make_room(struct pmc_tracker *tracker, struct pmc_result *result, uint64_t more)
{
	if (!pmc_result_reserve(result, more))
		return true;
	tracker->operation = "malloc";
	return false;
}

// Hands out the owed pages [start, end). *walk_end: done up to there.
static int pay(const struct scan *scan, uint64_t start, uint64_t end, uint64_t *walk_end)
{
	struct pmc_tracker *tracker = scan->cursor->range->tracker;
	struct vma vma;

	*walk_end = start;
	pmc_vmas_refresh(&tracker->vmas);
	while (*walk_end < end) {
		uint64_t from = *walk_end;
		int rc = pmc_find_vma(tracker, from, &vma);
		if (rc < 0)
			return rc;
		if (!rc || vma.start >= end) {
			*walk_end = end; // what was unmapped meanwhile is not reported
		} else {
			if (!make_room(tracker, scan->result, 1))
				return 0;
			*walk_end = min_u64(vma.end, end);
			pmc_result_append(scan->result, max_u64(vma.start, from), *walk_end, PAGE_IS_WRITTEN,
					  tracker->page_shift);
		}
		if (scan->engage)
			pmc_cursor_settle(scan->cursor, from, *walk_end);
	}
	return 0;
}

// Hands out the owed pages [start, end), which lie in one piece, and protects them again. *walk_end: done up to there.
static int take_owed(const struct scan *scan, const struct piece *piece, uint64_t start, uint64_t end,
		     uint64_t *walk_end)
{
	uint64_t done = end;
	// All of it is owed to this cursor already.
	int failed = scan->engage ? take_for_others(scan->cursor, piece, start, end, &done) : 0;
	int rc = pay(scan, start, done, walk_end);
	return rc ? rc : failed;
}

// Whether the page at *start* is owed to the cursor, and up to where, at most *end*, the next ones are as it is.
static bool is_owed(const struct pmc_cursor *cursor, const struct piece *piece, uint64_t start, uint64_t *end)
{
	const struct pmc_range *range = cursor->range;
	if (!cursor->owed_count)
		return false;
	uint64_t first = page_index(range, start), last = page_index(range, *end);
	uint64_t next = pmc_bits_find(cursor->owed, first, last, true);
	bool owed = next == first;
	if (owed)
		next = pmc_bits_find(cursor->owed, first, last, false);
	*end = range->start + (next << range->tracker->page_shift);
	if (owed)
		*end = align_up(*end, 1ull << piece->page_shift);
	return owed;
}

// Where the first page of [start, end) is that is owed and was not unmapped since, or end.
static int next_owed(struct pmc_cursor *cursor, uint64_t start, uint64_t end, uint64_t *ret)
{
	struct pmc_range *range = cursor->range;
	struct pmc_tracker *tracker = range->tracker;
	struct vma vma;

	*ret = end;
	if (!cursor->owed_count)
		return 0;
	uint64_t from = page_index(range, start), last = page_index(range, end);
	pmc_vmas_refresh(&tracker->vmas);
	while ((from = pmc_bits_find(cursor->owed, from, last, true)) < last) {
		uint64_t pos = range->start + (from << tracker->page_shift);
		int rc = pmc_find_vma(tracker, pos, &vma);
		if (rc < 0)
			return rc;
		if (!rc || vma.start >= end)
			return 0;
		if (vma.start <= pos) {
			*ret = pos;
			return 0;
		}
		from = page_index(range, vma.start);
	}
	return 0;
}

// Where the first written or owed page of [start, end) is, or end; on an error start.
static int next_written(struct pmc_cursor *cursor, uint64_t start, uint64_t end, uint64_t *ret)
{
	struct pmc_range *range = cursor->range;
	uint64_t limit;
	int rc = next_owed(cursor, start, end, &limit);

	for (uint64_t pos = start; pos < limit && !rc;) {
		const struct piece *piece = pmc_piece_at(range, pos);
		rc = run_engine(range, piece, pos, min_u64(limit, piece->end), 0, 1, false, &pos);
		if (rc > 0)
			limit = range->tracker->regions[0].start;
		drain(cursor, rc, false, NULL);
	}
	*ret = rc < 0 ? start : limit;
	return rc < 0 ? rc : 0;
}

// Answers what comes next of [pos, end), which lies in one piece and is not empty: pages that are owed, or what the
// engine finds. With a limit, *left* pages at most, but one huge page at least. There is room for a region. *walk_end:
// done up to there. 0 or -errno.
static int scan_step(const struct scan *scan, const struct piece *piece, uint64_t pos, uint64_t end, uint64_t left,
		     const struct refusals *refusals, uint64_t *walk_end)
{
	struct pmc_cursor *cursor = scan->cursor;
	uint64_t unit = 1ull << piece->page_shift;

	if (!is_owed(cursor, piece, pos, &end)) {
		int rc = run_engine(cursor->range, piece, pos, end, left, PMC_VECTOR, scan->engage, walk_end);
		drain(cursor, rc, scan->engage, scan->result);
		return rc < 0 ? rc : 0;
	}
	if (scan->max_pages) {
		uint64_t most = align_down(left << cursor->range->tracker->page_shift, unit);
		end = min_u64(end, pos + max_u64(most, unit));
	}
	// What stays untracked cannot be taken for the others, to whom it is owed already.
	if (pos < refusals->left_until)
		return pay(scan, pos, min_u64(end, refusals->left_until), walk_end);
	return take_owed(scan, piece, pos, end, walk_end);
}

static int scan_locked(const struct scan *scan, uint64_t start, uint64_t end)
{
	struct pmc_range *range = scan->cursor->range;
	struct pmc_tracker *tracker = range->tracker;
	struct pmc_result *result = scan->result;
	uint32_t shift = tracker->page_shift;
	uint64_t pos = start, max_pages = scan->max_pages;
	struct refusals refusals = { 0 };
	int rc = 0;

	while (pos < end && !rc) {
		const struct piece *piece = pmc_piece_at(range, pos);
		uint64_t limit = min_u64(end, piece->end), left = 0;
		if ((pos | limit) & ((1ull << piece->page_shift) - 1)) {
			// Asked for with what was mapped before: a part of a huge page has no word of its own.
			tracker->operation = "UFFDIO_WRITEPROTECT";
			rc = -EINVAL;
			break;
		}
		if (max_pages) {
			left = max_pages > result->pages ? max_pages - result->pages : 0;
			if (result->pages && left < 1ull << (piece->page_shift - shift)) {
				rc = next_written(scan->cursor, pos, end, &pos);
				break;
			}
		}
		if (!make_room(tracker, result, min_u64(PMC_VECTOR, ((end - pos) >> shift) / 2 + 1)))
			break;
		rc = scan_step(scan, piece, pos, limit, left, &refusals, &pos);
		if (rc == -ENOENT && scan->engage)
			rc = untracked_at(range, pos, end, range->rearm, &refusals, result);
	}
	result->walk_end = pos;
	return rc;
}

// ---- What reached nobody --------------------------------------------------------------------------------------

int pmc_owe(struct pmc_cursor *cursor, const struct pmc_result *result)
{
	if (!cursor)
		return -PMC_ECLOSED;
	struct pmc_tracker *tracker = cursor->range->tracker;
	int rc = pmc_enter_briefly(tracker);
	if (rc)
		return rc;
	if (!cursor->range->open || !cursor->owed)
		return pmc_leave(tracker, -PMC_ECLOSED, NULL);
	for (uint64_t i = 0; i < result->count; i++)
		pmc_cursor_owe(cursor, result->regions[i].start, result->regions[i].end);
	return pmc_leave(tracker, 0, NULL);
}

// ---- Scans, and the rest ------------------------------------------------------------------------------------

int pmc_scan(struct pmc_cursor *cursor, uint64_t start, uint64_t end, uint64_t max_pages, uint32_t flags,
	     struct pmc_result *result)
{
	pmc_result_empty(result);
	result->walk_end = start;
	int rc = enter_cursor(cursor);
	if (rc)
		return rc;
	struct pmc_tracker *tracker = cursor->range->tracker;
	uint64_t pages = (end - start) >> tracker->page_shift;
	max_pages = min_u64(max_pages, pages);
	// Room for as many as last time, if there is: else what is there is copied each time more comes.
	if (cursor->last_count > PMC_VECTOR && !max_pages)
		(void)pmc_result_reserve(result, min_u64(cursor->last_count + PMC_VECTOR, pages / 2 + 1));
	struct scan scan = { cursor, max_pages, flags & PMC_ENGAGE, result };
	rc = scan_locked(&scan, start, end);
	// A fault thread that died meanwhile has let writes through that this scan could not see.
	if (!rc && atomic_load(&tracker->fault_errno))
		rc = -PMC_EFAULTTHREAD;
	cursor->last_count = result->count;
	if (result->capacity > 2 * (result->count + PMC_VECTOR))
		pmc_result_trim(result);
	tracker->scans++;
	if (flags & PMC_ENGAGE)
		tracker->pages += result->pages;
	pmc_find_writer(tracker);
	rc = pmc_leave(tracker, rc, result);
	return rc ? rc : result->count > (pmc_is_async(tracker) ? PMC_KEEP_ASYNC : PMC_KEEP);
}

static int scan_all(uint32_t flags, struct pmc_result *result)
{
	struct pmc_cursor *cursor = *result->cursor;
	return pmc_scan(cursor, cursor ? cursor->range->start : 0, cursor ? cursor->range->end : 0, 0, flags, result);
}

int pmc_peek_all(struct pmc_result *result)
{
	return scan_all(0, result);
}

int pmc_collect_all(struct pmc_result *result)
{
	return scan_all(PMC_ENGAGE, result);
}

// Takes nothing from the other cursors: where there are any, pages are protected as a collect does, and owed to them.
static int reset_locked(struct pmc_cursor *cursor, uint64_t start, uint64_t end, uint64_t *walk_end)
{
	struct pmc_range *range = cursor->range;
	int rc = 0;
	if (is_alone(cursor))
		return pmc_reset_stretch(range, start, end, walk_end);
	for (*walk_end = start; *walk_end < end && !rc;) {
		const struct piece *piece = pmc_piece_at(range, *walk_end);
		rc = take_for_others(cursor, piece, *walk_end, min_u64(end, piece->end), walk_end);
	}
	return rc;
}

int pmc_reset(struct pmc_cursor *cursor, uint64_t start, uint64_t end, struct pmc_result *result)
{
	pmc_result_empty(result);
	int rc = enter_cursor(cursor);
	if (rc)
		return rc;
	uint64_t pos = start;
	struct refusals refusals = { 0 };
	while (pos < end) {
		rc = reset_locked(cursor, pos, end, &pos);
		if (rc != -ENOENT)
			break;
		rc = untracked_at(cursor->range, pos, end, cursor->range->rearm, &refusals, result);
		if (rc < 0)
			break;
		pos = max_u64(pos, refusals.left_until);
	}
	pmc_cursor_settle(cursor, start, pos);
	result->walk_end = pos;
	cursor->range->tracker->resets++;
	pmc_find_writer(cursor->range->tracker);
	return pmc_leave(cursor->range->tracker, rc, result);
}

int pmc_reset_all(struct pmc_result *result)
{
	struct pmc_cursor *cursor = *result->cursor;
	return pmc_reset(cursor, cursor ? cursor->range->start : 0, cursor ? cursor->range->end : 0, result);
}

int pmc_unprotect(struct pmc_range *range, uint64_t start, uint64_t end, struct pmc_result *result)
{
	int rc = pmc_enter_range(range);
	if (rc)
		return rc;
	struct pmc_tracker *tracker = range->tracker;
	uint64_t pos = start, untracked = end;
	struct refusals refusals = { 0 };

	while (pos < end && !rc) {
		const struct piece *piece = pmc_piece_at(range, pos);
		uint64_t unit = 1ull << piece->page_shift;
		uint64_t to = align_up(min_u64(end, piece->end), unit);
		pos = align_down(pos, unit);
		pmc_vmas_refresh(&tracker->vmas);
		rc = pmc_protect(tracker, pos, to, piece->page_shift, 0, &untracked);
		pmc_answer(tracker, pos, to);
		int owed = pmc_owe_mapped(range, pos, rc == -ENOENT ? untracked : to);
		pos = rc == -ENOENT ? untracked : to;
		if (rc == -ENOENT && !owed) {
			rc = untracked_at(range, pos, end, false, &refusals, result);
			if (rc == -ENOENT)
				tracker->operation = "UFFDIO_WRITEPROTECT";
		}
		rc = owed ? owed : rc;
	}
	result->walk_end = pos;
	return pmc_leave(tracker, rc, result);
}

int pmc_rearm(struct pmc_range *range, uint64_t start, uint64_t end, struct pmc_result *result)
{
	int rc = pmc_enter_range(range);
	if (rc)
		return rc;
	while (start < end) {
		rc = rearm_next(range, start, end, result);
		start = rc > 0 ? result->untracked_end : end;
	}
	result->walk_end = start;
	return pmc_leave(range->tracker, rc < 0 ? rc : 0, result);
}
