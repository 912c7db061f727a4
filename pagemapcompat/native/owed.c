// What is owed to each cursor: pages that were taken from the engine, and that it has not been told of. All under the
// tracker's mutex.
#include "internal.h"

void pmc_cursor_owe(struct pmc_cursor *cursor, uint64_t start, uint64_t end)
{
	cursor->owed_count += pmc_bits_fill(cursor->owed, page_index(cursor->range, start),
					    page_index(cursor->range, end), true);
}

void pmc_cursor_settle(struct pmc_cursor *cursor, uint64_t start, uint64_t end)
{
	if (cursor->owed_count)
		cursor->owed_count -= pmc_bits_fill(cursor->owed, page_index(cursor->range, start),
						    page_index(cursor->range, end), false);
}

void pmc_owe_others(struct pmc_range *range, uint64_t start, uint64_t end, const struct pmc_cursor *except)
{
	for (struct pmc_cursor *cursor = range->cursors; cursor; cursor = cursor->next)
		if (cursor != except)
			pmc_cursor_owe(cursor, start, end);
}
