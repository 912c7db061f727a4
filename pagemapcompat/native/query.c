// GET on any process: PAGEMAP_SCAN's answer, from the ioctl or from the words of /proc/PID/pagemap.
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "internal.h"

static uint64_t categories_of(uint64_t word, uint64_t base)
{
	return base | (word & PM_WORD_UFFD_WP ? 0 : PAGE_IS_WRITTEN) | (word & PM_WORD_FILE ? PAGE_IS_FILE : 0) |
	       (word & PM_WORD_PRESENT ? PAGE_IS_PRESENT : 0) | (word & PM_WORD_SWAPPED ? PAGE_IS_SWAPPED : 0) |
	       (word & PM_WORD_SOFT_DIRTY ? PAGE_IS_SOFT_DIRTY : 0) | (word & PM_WORD_GUARD ? PAGE_IS_GUARD : 0);
}

static bool matches(const struct pm_scan_arg *arg, uint64_t categories)
{
	categories ^= arg->category_inverted;
	return (categories & arg->category_mask) == arg->category_mask &&
	       (!arg->category_anyof_mask || categories & arg->category_anyof_mask);
}

// Moves regions from an output of the kernel's shape to the result. 0: all of them fitted.
static int deliver(struct pmc_result *result, const struct page_region *regions, uint64_t count, bool drop_empty,
		   uint64_t max_pages, uint32_t page_shift)
{
	for (uint64_t i = 0; i < count; i++) {
		uint64_t start = regions[i].start, end = regions[i].end;
		if (drop_empty && !regions[i].categories)
			continue;
		if (pmc_result_reserve(result, 1)) {
			result->walk_end = start;
			return 1;
		}
		if (max_pages)
			end = start + min_u64(end - start, (max_pages - result->pages) << page_shift);
		if (start < end)
			pmc_result_append(result, start, end, regions[i].categories, page_shift);
		if (end < regions[i].end) {
			result->walk_end = end;
			return 1;
		}
	}
	return 0;
}

static int query_kernel(int pagemap, const struct pm_scan_arg *wanted, bool drop_empty, struct pmc_result *result)
{
	struct page_region vec[PMC_REGIONS];
	uint32_t page_shift = pmc_page_shift();
	uint64_t pos = wanted->start;

	result->operation = "PAGEMAP_SCAN";
	while (pos < wanted->end) {
		struct pm_scan_arg arg = *wanted;
		arg.start = pos;
		arg.vec = (uint64_t)(uintptr_t)vec;
		arg.vec_len = sizeof(vec) / sizeof(*vec);
		// With drop_empty the kernel would count pages that are then left out; deliver() counts instead.
		arg.max_pages = wanted->max_pages && !drop_empty ? wanted->max_pages - result->pages : 0;
		bool look_ahead = wanted->max_pages && result->pages == wanted->max_pages;
		if (look_ahead) {
			arg.max_pages = drop_empty ? 0 : 1;
			arg.vec_len = drop_empty ? arg.vec_len : 1;
		}
		int count = pmc_pagemap_scan(pagemap, &arg);
		result->walk_end = pos;
		if (count < 0)
			return count;
		if (look_ahead && !drop_empty) {
			result->walk_end = count ? vec[0].start : wanted->end;
			return 0;
		}
		if (deliver(result, vec, (uint64_t)count, drop_empty, wanted->max_pages, page_shift))
			return 0;
		uint64_t last = count ? vec[count - 1].end : pos;
		bool full = (uint64_t)count == arg.vec_len || (arg.max_pages && result->pages == wanted->max_pages);
		uint64_t next = full ? max_u64(arg.walk_end, last) : wanted->end;
		if (next <= pos)
			return 0;
		pos = next;
	}
	result->walk_end = wanted->end;
	return 0;
}

struct words_query {
	const struct pm_scan_arg *arg;
	bool drop_empty;
	struct pmc_result *result;
	uint32_t page_shift;
};

// Answers [start, start + count pages). 1: full, walk_end is set.
static int answer_words(struct words_query *query, uint64_t start, uint64_t count, uint64_t base, const uint64_t *words)
{
	for (uint64_t i = 0; i < count;) {
		uint64_t categories = categories_of(words[i], base), run = i++;
		while (i < count && categories_of(words[i], base) == categories)
			i++;
		if (!matches(query->arg, categories))
			continue;
		struct page_region region = {
			start + (run << query->page_shift),
			start + (i << query->page_shift),
			categories & query->arg->return_mask,
		};
		if (deliver(query->result, &region, 1, query->drop_empty, query->arg->max_pages, query->page_shift))
			return 1;
	}
	return 0;
}

static int query_words(int pagemap, int maps, const struct pm_scan_arg *arg, const struct page_region *registered,
		       uint64_t registered_count, bool drop_empty, struct pmc_result *result)
{
	struct words_query query = { arg, drop_empty, result, pmc_page_shift() };
	uint64_t words[512], size = 1ull << query.page_shift;
	struct vmas vmas = { .fd = maps, .query = pmc_maps_query(maps) > 0, .page_shift = query.page_shift };
	struct vma vma;
	uint64_t next = 0;
	int rc = 0;

	if ((arg->category_inverted | arg->category_mask | arg->category_anyof_mask | arg->return_mask) & ~PMC_TELLABLE)
		return -EOPNOTSUPP;
	pmc_vmas_refresh(&vmas);
	result->walk_end = arg->start;
	while (result->walk_end < arg->end) {
		result->operation = "/proc/PID/maps";
		rc = pmc_vmas_at(&vmas, result->walk_end, &vma);
		if (rc < 0)
			return rc;
		if (!rc || vma.start >= arg->end)
			break;
		uint64_t pos = max_u64(vma.start, result->walk_end), end = min_u64(vma.end, arg->end);
		while (pos < end) {
			while (next < registered_count && registered[next].end <= pos)
				next++;
			bool allowed = next < registered_count && registered[next].start <= pos;
			uint64_t stop = min_u64(end, pos + sizeof(words) / sizeof(*words) * size);
			if (next < registered_count)
				stop = min_u64(stop, allowed ? registered[next].end : registered[next].start);
			uint64_t count = (stop - pos) >> query.page_shift;
			result->operation = "/proc/PID/pagemap";
			rc = pmc_words_read(pagemap, pos, count, query.page_shift, query.page_shift, words);
			if (rc)
				return rc;
			if (answer_words(&query, pos, count, allowed ? PAGE_IS_WPALLOWED : 0, words))
				return 0;
			pos = stop;
			result->walk_end = pos;
		}
	}
	result->walk_end = arg->end;
	return 0;
}

int pmc_query(int pagemap, int maps, const struct pm_scan_arg *arg, const struct page_region *registered,
	      uint64_t registered_count, int drop_empty, struct pmc_result *result)
{
	uint32_t shift = pmc_page_shift();
	uint64_t word;
	int rc = maps < 0 ? query_kernel(pagemap, arg, drop_empty, result) :
			    query_words(pagemap, maps, arg, registered, registered_count, drop_empty, result);
	// Of a process that has ended PAGEMAP_SCAN finds nothing, and no fault with it (seen on a build of 6.18.44;
	// another one, and 6.12.117, look whether there is memory left); its maps list nothing. A read of its pagemap
	// is at its end on every kernel.
	if (!rc) {
		result->operation = "/proc/PID/pagemap";
		rc = pmc_words_read(pagemap, 0, 1, shift, shift, &word);
	}
	return rc;
}
