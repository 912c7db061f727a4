// Regions and bit arrays: where answers are put together.
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

uint32_t pmc_page_shift(void)
{
	return (uint32_t)__builtin_ctzl((unsigned long)sysconf(_SC_PAGESIZE));
}

void *pmc_pages_alloc(size_t size)
{
	void *pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return pages == MAP_FAILED ? NULL : pages;
}

void pmc_pages_free(void *pages, size_t size)
{
	if (pages)
		munmap(pages, size);
}

uint64_t pmc_output_add(struct output *out, uint64_t start, uint64_t end, uint64_t categories, uint64_t unit)
{
	if (out->max_pages) {
		uint64_t room = out->max_pages > out->pages ? (out->max_pages - out->pages) << out->page_shift : 0;
		// A page larger than max_pages is given whole, else a caller that asks for less never gets past it.
		if (room < unit && !out->pages)
			room = unit;
		end = start + min_u64(end - start, align_down(room, unit));
	}
	if (start == end)
		return start;
	struct page_region *last = out->count ? &out->vec[out->count - 1] : NULL;
	if (last && last->end == start && last->categories == categories) {
		last->end = end;
	} else {
		if (out->count == out->capacity)
			return start;
		out->vec[out->count++] = (struct page_region){ start, end, categories };
	}
	out->pages += (end - start) >> out->page_shift;
	return end;
}

uint64_t pmc_stored(const struct page_region *vec, uint64_t len, int rc)
{
	uint64_t count = 0;
	if (rc >= 0)
		return (uint64_t)rc;
	while (count < len && vec[count].end)
		count++;
	return count;
}

void pmc_output_cut(struct output *out, uint64_t end)
{
	while (out->count && out->vec[out->count - 1].end > end) {
		struct page_region *last = &out->vec[out->count - 1];
		uint64_t keep = max_u64(last->start, end);
		out->pages -= (last->end - keep) >> out->page_shift;
		last->end = keep;
		if (last->start < last->end)
			return;
		*last = (struct page_region){ 0 };
		out->count--;
	}
}

int pmc_result_reserve(struct pmc_result *result, uint64_t more)
{
	if (result->capacity - result->count >= more)
		return 0;
	uint64_t capacity = max_u64(result->capacity * 2, result->count + more);
	if (capacity > SIZE_MAX / sizeof(*result->regions))
		return -ENOMEM;
	struct page_region *regions = realloc(result->regions, capacity * sizeof(*regions));
	if (!regions)
		return -ENOMEM;
	result->regions = regions;
	result->capacity = capacity;
	return 0;
}

void pmc_result_trim(struct pmc_result *result)
{
	uint64_t capacity = max_u64(result->count, 1);
	struct page_region *regions = realloc(result->regions, capacity * sizeof(*regions));
	if (!regions)
		return;
	result->regions = regions;
	result->capacity = capacity;
}

void pmc_result_append(struct pmc_result *result, uint64_t start, uint64_t end, uint64_t categories,
		       uint32_t page_shift)
{
	struct page_region *last = result->count ? &result->regions[result->count - 1] : NULL;
	if (last && last->end == start && last->categories == categories)
		last->end = end;
	else
		result->regions[result->count++] = (struct page_region){ start, end, categories };
	result->pages += (end - start) >> page_shift;
}

void pmc_result_move_in(struct pmc_result *result, struct page_region *regions, uint64_t count, uint32_t page_shift)
{
	uint64_t bytes = 0;
	if (!count)
		return;
	// Only the first can go on where the last one ended.
	pmc_result_append(result, regions[0].start, regions[0].end, regions[0].categories, page_shift);
	regions[0].end = 0;
	// One pass: these are more than the nearest cache holds.
	struct page_region *to = result->regions + result->count;
	for (uint64_t i = 1; i < count; i++) {
		*to = regions[i];
		bytes += to->end - to->start;
		regions[i].end = 0;
		to++;
	}
	result->count += count - 1;
	result->pages += bytes >> page_shift;
}

int pmc_result_fill(struct pmc_result *result, const struct page_region *regions, uint64_t count)
{
	if (pmc_result_reserve(result, count))
		return -ENOMEM;
	for (uint64_t i = 0; i < count; i++)
		pmc_result_append(result, regions[i].start, regions[i].end, regions[i].categories, pmc_page_shift());
	return 0;
}

uint64_t pmc_unite(struct page_region *vec, const struct page_region *a, uint64_t a_count, const struct page_region *b,
		   uint64_t b_count, uint64_t stop)
{
	uint64_t count = 0;
	for (uint64_t i = 0, j = 0; i < a_count || j < b_count;) {
		bool from_a = j == b_count || (i < a_count && a[i].start <= b[j].start);
		struct page_region next = from_a ? a[i++] : b[j++];
		if (next.start >= stop)
			continue;
		next.end = min_u64(next.end, stop);
		next.categories = PAGE_IS_WRITTEN;
		if (count && next.start <= vec[count - 1].end)
			vec[count - 1].end = max_u64(vec[count - 1].end, next.end);
		else
			vec[count++] = next;
	}
	return count;
}

int pmc_result_unite(struct pmc_result *result, const struct pmc_result *a, const struct pmc_result *b)
{
	if (pmc_result_reserve(result, a->count + b->count))
		return -ENOMEM;
	result->count = pmc_unite(result->regions, a->regions, a->count, b->regions, b->count, UINT64_MAX);
	uint32_t shift = pmc_page_shift();
	for (uint64_t i = 0; i < result->count; i++)
		result->pages += (result->regions[i].end - result->regions[i].start) >> shift;
	result->walk_end = max_u64(a->walk_end, b->walk_end);
	return 0;
}

void pmc_result_empty(struct pmc_result *result)
{
	struct pmc_result empty = { .cursor = result->cursor };
	if (result->capacity <= PMC_KEEP_ASYNC) {
		empty.regions = result->regions;
		empty.capacity = result->capacity;
	} else {
		free(result->regions);
	}
	*result = empty;
}

void pmc_result_release(struct pmc_result *result)
{
	free(result->regions);
	*result = (struct pmc_result){ .cursor = result->cursor };
}

uint64_t pmc_bits_fill(uint64_t *bits, uint64_t from, uint64_t to, bool value)
{
	uint64_t changed = 0;
	while (from < to) {
		uint64_t stop = min_u64(to, (from / 64 + 1) * 64);
		uint64_t mask = (~0ull >> (64 - (stop - from))) << (from % 64);
		uint64_t *word = &bits[from / 64];
		uint64_t flip = value ? mask & ~*word : mask & *word;
		// Untouched words stay untouched: the arrays cost memory only where something happened.
		if (flip) {
			*word ^= flip;
			changed += (uint64_t)__builtin_popcountll(flip);
		}
		from = stop;
	}
	return changed;
}

uint64_t pmc_bits_find(const uint64_t *bits, uint64_t from, uint64_t to, bool value)
{
	while (from < to) {
		uint64_t word = (value ? bits[from / 64] : ~bits[from / 64]) >> (from % 64);
		if (word)
			return min_u64(to, from + (uint64_t)__builtin_ctzll(word));
		from = (from / 64 + 1) * 64;
	}
	return to;
}

struct bitmap {
	unsigned char *bits;
	uint64_t base;
	uint32_t page_shift;
};

static inline void set_page(const struct bitmap *bitmap, const struct page_region *region)
{
	uint64_t page = (region->start - bitmap->base) >> bitmap->page_shift;
	bitmap->bits[page / 8] |= (unsigned char)(1u << (page % 8));
}

static void set_run(const struct bitmap *bitmap, const struct page_region *region)
{
	unsigned char *bits = bitmap->bits;
	uint64_t from = (region->start - bitmap->base) >> bitmap->page_shift;
	uint64_t to = (region->end - bitmap->base) >> bitmap->page_shift;
	for (; from < to && from % 8; from++)
		bits[from / 8] |= (unsigned char)(1u << (from % 8));
	if (to - from >= 8) {
		memset(bits + from / 8, 0xff, (to - from) / 8);
		from = align_down(to, 8);
	}
	for (; from < to; from++)
		bits[from / 8] |= (unsigned char)(1u << (from % 8));
}

int64_t pmc_fill_bitmap(const struct pmc_result *result, uint64_t base, uint64_t length, unsigned char *bits,
			uint64_t size)
{
	const struct page_region *region = result->regions, *end = result->count ? region + result->count : region;
	const struct bitmap bitmap = { bits, base, pmc_page_shift() };
	uint64_t page = 1ull << bitmap.page_shift;

	if (size < (align_up(length, page) / page + 7) / 8)
		return -EINVAL;
	while (end - region >= 4) {
		// Where pages are written here and there nearly all regions are one, and four of those take little
		// longer than one.
		if ((region[0].end - region[0].start == page) & (region[1].end - region[1].start == page) &
		    (region[2].end - region[2].start == page) & (region[3].end - region[3].start == page)) {
			set_page(&bitmap, &region[0]);
			set_page(&bitmap, &region[1]);
			set_page(&bitmap, &region[2]);
			set_page(&bitmap, &region[3]);
			region += 4;
		} else {
			set_run(&bitmap, region++);
		}
	}
	while (region < end)
		set_run(&bitmap, region++);
	return (int64_t)result->pages;
}

void pmc_fill_spans(const struct page_region *regions, uint64_t count, uint64_t base, uint64_t length, uint64_t *spans)
{
	for (uint64_t i = 0; i < count; i++) {
		*spans++ = regions[i].start - base;
		*spans++ = min_u64(regions[i].end - base, length);
	}
}

void pmc_fill_addresses(const struct page_region *regions, uint64_t count, uint64_t shift, uint64_t step,
			uint64_t *addresses)
{
	for (uint64_t i = 0; i < count; i++)
		for (uint64_t at = regions[i].start; at < regions[i].end; at += step)
			*addresses++ = at + shift;
}
