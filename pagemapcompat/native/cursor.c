// Cursors: several readers of one range, each with its own idea of what is new.
//
// The kernel keeps one mark a page. Whoever takes a page from the engine therefore notes it for every other cursor, in
// the same step under the tracker's mutex; a cursor's answer is what it is owed and what the engine finds now.
#define _GNU_SOURCE
#include <errno.h>

#include "internal.h"

int pmc_owe_mapped(struct pmc_range *range, uint64_t start, uint64_t end)
{
	struct pmc_tracker *tracker = range->tracker;
	struct vma vma;
	int rc = 0;

	pmc_vmas_refresh(&tracker->vmas);
	for (uint64_t pos = start; pos < end; pos = vma.end) {
		rc = pmc_find_vma(tracker, pos, &vma);
		// Reported once too often is better than missed.
		if (rc < 0)
			pmc_owe_others(range, pos, end, NULL);
		if (rc <= 0 || vma.start >= end)
			break;
		pmc_owe_others(range, max_u64(vma.start, pos), min_u64(vma.end, end), NULL);
	}
	return rc < 0 ? rc : 0;
}

int pmc_cursor_create(struct pmc_cursor **ret, struct pmc_range *range)
{
	if (!range)
		return -PMC_ECLOSED;
	int rc = pmc_enter(range->tracker);
	if (rc)
		return rc;
	struct pmc_cursor *cursor = range->open ? pmc_own_pages(range->tracker, 0, 0, sizeof(*cursor)) : NULL;
	if (cursor)
		cursor->owed = pmc_own_pages(range->tracker, 0, 0, range->bits_size);
	if (!cursor || !cursor->owed) {
		pmc_pages_free(cursor, sizeof(*cursor));
		range->tracker->operation = "mmap";
		return pmc_leave(range->tracker, range->open ? -ENOMEM : -PMC_ECLOSED, NULL);
	}
	cursor->range = range;
	atomic_fetch_add(&range->references, 1);
	cursor->next = range->cursors;
	range->cursors = cursor;
	*ret = cursor;
	return pmc_leave(range->tracker, 0, NULL);
}

int pmc_cursor_close(struct pmc_cursor *cursor)
{
	if (!cursor)
		return 0;
	struct pmc_tracker *tracker = cursor->range->tracker;
	// In a forked child the mutex may be held by a thread that does not exist there, and nobody asks the other
	// cursors.
	if (!atomic_load_explicit(tracker->alive, memory_order_relaxed))
		return 0;
	pthread_mutex_lock(&tracker->mutex);
	struct pmc_cursor **link = &cursor->range->cursors;
	while (*link && *link != cursor)
		link = &(*link)->next;
	if (*link) {
		*link = cursor->next;
		pmc_pages_free(cursor->owed, cursor->range->bits_size);
		cursor->owed = NULL;
	}
	pthread_mutex_unlock(&tracker->mutex);
	return 0;
}

void pmc_cursor_destroy(struct pmc_cursor *cursor)
{
	if (!cursor)
		return;
	struct pmc_range *range = cursor->range;
	(void)pmc_cursor_close(cursor);
	pmc_pages_free(cursor->owed, range->bits_size);
	pmc_pages_free(cursor, sizeof(*cursor));
	pmc_range_put(range);
}
