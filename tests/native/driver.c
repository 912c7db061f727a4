// The C core without Python: everything pmc.h offers, on one tracker, by many threads at once, for a sanitizer to watch.
//
//     driver HOW FEATURES ABILITIES KIND ROUNDS
//
// HOW is PMC_UFFD_*, FEATURES and ABILITIES are bit masks, KIND is private, shared, hugetlb or mixed (several mappings of
// several kinds, and a barred page). Each page, or huge page, belongs to one writer, who counts in it until the readers have
// collected ROUNDS times. Each reader keeps the counts it saw in pages that were collected for it; when it has collected once
// more after the writers ended, those must be the counts in memory.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pmc.h"

#define PAGES 96
#define SPARE 8 // at the end: mapped anew again and again, and nobody counts there
#define HUGE_PAGES 8
#define HUGE_SPARE 2
#define HUGE_SIZE (2 << 20)
#define WRITERS 3
#define READERS 3 // cursors; the first one has two threads
#define PATIENCE 300 // seconds

uint64_t pages_outstanding(void); // checked.c

struct reader {
	struct pmc_cursor *cursor;
	atomic_ullong seen[PAGES];
	atomic_ullong collects;
};

struct drive {
	const char *kind;
	unsigned long rounds;
	uint64_t page; // of memory, which may be a huge one
	uint64_t pages;
	uint64_t spare;
	uint64_t base_pages;
	int flags;
	uint64_t start;
	uint64_t end;
	struct pmc_tracker *tracker;
	struct pmc_range *range;
	struct reader readers[READERS];
	struct pmc_image *image; // the copier's last one
	atomic_uint reading; // threads that have collects to do
	atomic_bool stop;
};

struct job {
	struct drive *drive;
	unsigned number;
	uint64_t random;
	pthread_t thread;
};

_Noreturn static void fail(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	exit(1);
}

static void check(const char *what, int rc)
{
	if (rc < 0)
		fail("%s: %d (%s)", what, rc, -rc < 10000 ? strerror(-rc) : "ours");
}

// 0 to limit - 1; xorshift.
static uint64_t pick(struct job *job, uint64_t limit)
{
	job->random ^= job->random << 13;
	job->random ^= job->random >> 7;
	job->random ^= job->random << 17;
	return job->random % limit;
}

// The count in a page. Memory is read and written here by plain loads and stores, if atomic ones, and by the library through
// the kernel alone, which no sanitizer sees.
static atomic_ullong *count_of(const struct drive *drive, uint64_t page)
{
	return (atomic_ullong *)(uintptr_t)(drive->start + page * drive->page);
}

static bool is_nobodys(const struct drive *drive, uint64_t page)
{
	return page >= drive->pages - drive->spare || (strcmp(drive->kind, "mixed") == 0 && page == drive->pages / 2);
}

// ---- Memory -----------------------------------------------------------------------------------------------------

static void map(uint64_t start, uint64_t length, int flags)
{
	void *at = (void *)(uintptr_t)start;
	if (mmap(at, length, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_ANONYMOUS | flags, -1, 0) != at)
		fail("mmap: %s", strerror(errno));
}

static void map_memory(struct drive *drive)
{
	bool mixed = strcmp(drive->kind, "mixed") == 0, huge = strcmp(drive->kind, "hugetlb") == 0;
	uint64_t base = (uint64_t)1 << pmc_page_shift();
	drive->page = huge ? HUGE_SIZE : base;
	drive->pages = huge ? HUGE_PAGES : PAGES;
	drive->spare = huge ? HUGE_SPARE : SPARE;
	drive->flags = huge ? MAP_PRIVATE | MAP_HUGETLB : MAP_PRIVATE;
	uint64_t length = drive->pages * drive->page;
	drive->base_pages = length / base;
	void *at = mmap(NULL, length + drive->page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		fail("mmap: %s", strerror(errno));
	drive->start = ((uint64_t)(uintptr_t)at + drive->page - 1) / drive->page * drive->page;
	drive->end = drive->start + length;
	map(drive->start, length, strcmp(drive->kind, "shared") == 0 ? MAP_SHARED : drive->flags);
	if (mixed) {
		map(drive->start + 16 * drive->page, 8 * drive->page, MAP_PRIVATE); // one that does not merge everywhere
		map(drive->start + 32 * drive->page, 8 * drive->page, MAP_SHARED);
		// Not unmapped: a sanitizer's own pages would come and go in the hole.
		mprotect((void *)(uintptr_t)(drive->start + drive->pages / 2 * drive->page), drive->page, PROT_NONE);
	}
}

// ---- The threads --------------------------------------------------------------------------------------------------

static void *write_pages(void *arg)
{
	struct job *job = arg;
	struct drive *drive = job->drive;
	while (atomic_load(&drive->reading)) {
		uint64_t page = pick(job, drive->pages / WRITERS) * WRITERS + job->number;
		if (!is_nobodys(drive, page))
			atomic_fetch_add_explicit(count_of(drive, page), 1, memory_order_relaxed);
	}
	return NULL;
}

// Notes what is in the pages of a result. Two threads may do so for one reader: the higher count is the newer one.
static void note(struct drive *drive, struct reader *reader, const struct pmc_result *result)
{
	for (uint64_t i = 0; i < result->count; i++) {
		uint64_t first = (result->regions[i].start - drive->start) / drive->page;
		uint64_t last = (result->regions[i].end - drive->start) / drive->page;
		for (uint64_t page = first; page < last; page++) {
			if (is_nobodys(drive, page))
				continue;
			unsigned long long now = atomic_load(count_of(drive, page)), before = atomic_load(&reader->seen[page]);
			while (before < now && !atomic_compare_exchange_weak(&reader->seen[page], &before, now))
				;
		}
	}
}

static void check_order(const struct pmc_result *result)
{
	for (uint64_t i = 0; i < result->count; i++)
		if (result->regions[i].start >= result->regions[i].end ||
		    (i && result->regions[i].start <= result->regions[i - 1].end))
			fail("regions do not ascend");
}

static void collect(struct drive *drive, struct reader *reader, uint64_t first, uint64_t last, uint64_t most, bool deliver)
{
	struct pmc_result result = { .cursor = &reader->cursor };
	if (!first && last == drive->pages && !most)
		check("collect all", pmc_collect_all(&result));
	else
		check("collect", pmc_scan(reader->cursor, drive->start + first * drive->page,
					  drive->start + last * drive->page, most, PMC_ENGAGE, &result));
	check_order(&result);
	if (deliver)
		note(drive, reader, &result);
	else
		check("give back", pmc_owe(reader->cursor, &result));
	pmc_result_release(&result);
	atomic_fetch_add(&reader->collects, 1);
}

static void *collect_pages(void *arg)
{
	struct job *job = arg;
	struct drive *drive = job->drive;
	struct reader *reader = &drive->readers[job->number % READERS];
	for (unsigned long i = 0; i < drive->rounds; i++) {
		uint64_t first = pick(job, drive->pages), last = first + 1 + pick(job, drive->pages - first);
		if (pick(job, 2))
			collect(drive, reader, 0, drive->pages, 0, pick(job, 8));
		else
			collect(drive, reader, first, last, pick(job, 9), pick(job, 8));
	}
	atomic_fetch_sub(&drive->reading, 1);
	return NULL;
}

// A reader who forgets, one who only looks, and whoever asks for numbers: nobody loses a write by them.
static void *disturb(void *arg)
{
	struct job *job = arg;
	struct drive *drive = job->drive;
	struct pmc_statistics statistics;
	struct pmc_cursor *cursor;
	check("open a cursor", pmc_cursor_create(&cursor, drive->range));
	while (atomic_load(&drive->reading)) {
		uint64_t counted = drive->pages - drive->spare;
		uint64_t first = pick(job, counted), last = first + 1 + pick(job, counted - first);
		uint64_t from = drive->start + first * drive->page, to = drive->start + last * drive->page;
		struct pmc_result result = { .cursor = &cursor };
		bool all = pick(job, 4) == 0;
		switch (pick(job, 7)) {
		case 0:
			check("peek", all ? pmc_peek_all(&result) : pmc_scan(cursor, from, to, 0, 0, &result));
			break;
		case 1:
			check("reset", all ? pmc_reset_all(&result) : pmc_reset(cursor, from, to, &result));
			break;
		case 2:
			check("unprotect", pmc_unprotect(drive->range, from, to, &result));
			break;
		case 3:
			map(drive->end - drive->spare * drive->page, drive->spare * drive->page, drive->flags);
			check("rearm", pmc_rearm(drive->range, drive->start, drive->end, &result));
			break;
		case 4:
			check("statistics", pmc_tracker_statistics(drive->tracker, &statistics));
			check("state", pmc_tracker_state(drive->tracker));
			break;
		case 5:
			if (!pmc_range_kinds(drive->range) || pmc_range_granularity(drive->range) < drive->page)
				fail("no kinds or no granularity");
			check("exact", pmc_range_exact(drive->range));
			break;
		default:
			pmc_cursor_destroy(cursor);
			check("open a cursor", pmc_cursor_create(&cursor, drive->range));
		}
		pmc_result_release(&result);
	}
	pmc_cursor_destroy(cursor);
	return NULL;
}

// A chain of images, each the one before and what was written since.
static void capture(struct drive *drive, struct pmc_cursor *cursor)
{
	struct pmc_image *next;
	struct pmc_result result = { 0 }, errors = { 0 };
	check("collect", pmc_scan(cursor, drive->start, drive->end, 0, PMC_ENGAGE, &result));
	check("make an image", drive->image ? pmc_image_next(&next, drive->image) :
						pmc_image_create(&next, NULL, drive->base_pages));
	check("capture", pmc_capture(drive->range, next, result.regions, result.count, &errors));
	pmc_result_release(&result);
	pmc_result_release(&errors);
	pmc_image_put(&drive->image);
	drive->image = next;
}

static void *copy_pages(void *arg)
{
	struct job *job = arg;
	struct drive *drive = job->drive;
	struct pmc_cursor *cursor = drive->readers[job->number].cursor;
	for (unsigned long i = 0; i < drive->rounds / 4; i++) {
		struct pmc_image *before, *base = drive->image;
		struct pmc_result result = { 0 };
		if (base && i % 2) // then the next one is another
			pmc_image_share(&before, base);
		else
			check("make an image", pmc_image_create(&before, base, drive->base_pages));
		capture(drive, cursor);
		check("diff", pmc_image_diff(before, drive->image, drive->start, &result));
		pmc_result_release(&result);
		pmc_image_put(&before);
	}
	atomic_fetch_sub(&drive->reading, 1);
	return NULL;
}

static void *write_until_told(void *arg)
{
	struct job *job = arg;
	while (!atomic_load(&job->drive->stop)) {
		uint64_t page = pick(job, job->drive->pages);
		if (!is_nobodys(job->drive, page))
			atomic_fetch_add_explicit(count_of(job->drive, page), 1, memory_order_relaxed);
	}
	return NULL;
}

static void *collect_until_closed(void *arg)
{
	struct job *job = arg;
	int rc;
	do {
		struct pmc_result result = { 0 };
		rc = pmc_scan(job->drive->readers[0].cursor, job->drive->start, job->drive->end, 0, PMC_ENGAGE, &result);
		pmc_result_release(&result);
	} while (rc >= 0);
	if (rc != -PMC_ECLOSED)
		check("collect while closing", rc);
	return NULL;
}

static void start(struct job *job, struct drive *drive, unsigned number, void *(*run)(void *))
{
	job->drive = drive;
	job->number = number;
	job->random = 0x9E3779B97F4A7C15u * (number + 1) + (uint64_t)(uintptr_t)run;
	int rc = pthread_create(&job->thread, NULL, run, job);
	if (rc)
		fail("pthread_create: %s", strerror(rc));
}

// ---- The course of it -----------------------------------------------------------------------------------------------

static void open_tracker(struct drive *drive, int how, uint64_t features, uint32_t abilities)
{
	struct pmc_config config = { pmc_uffd_open(how), open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC), abilities };
	struct pmc_result result = { 0 };
	uint64_t granted;
	check("open userfaultfd", config.uffd);
	check("open pagemap", config.pagemap);
	check("handshake", pmc_uffd_handshake(config.uffd, features, &granted));
	check("open tracker", pmc_tracker_create(&drive->tracker, &config, &result));
	check("track", pmc_range_create(&drive->range, drive->tracker, drive->start, drive->end, PMC_REARM, &result));
	pmc_result_release(&result);
	for (unsigned i = 0; i < READERS; i++)
		check("open a cursor", pmc_cursor_create(&drive->readers[i].cursor, drive->range));
}

static void check_counts(struct drive *drive, const struct reader *reader, const char *when)
{
	for (uint64_t page = 0; page < drive->pages; page++)
		if (!is_nobodys(drive, page) && atomic_load(&reader->seen[page]) != atomic_load(count_of(drive, page)))
			fail("%s: page %llu has %llu writes and %llu were seen", when, (unsigned long long)page,
			     atomic_load(count_of(drive, page)), atomic_load(&reader->seen[page]));
}

static void compare(struct drive *drive, const char *when, bool equal)
{
	const struct page_region all = { drive->start, drive->end, 0 };
	struct pmc_result result = { 0 };
	check("compare", pmc_compare(drive->range, drive->image, &all, 1, &result));
	if (equal != !result.count)
		fail("%s: %llu pages differ", when, (unsigned long long)result.pages);
	pmc_result_release(&result);
}

// Nobody else runs. The copier's image is what memory was; then memory is changed, and made so again.
static void restore(struct drive *drive)
{
	const struct page_region all = { drive->start, drive->end, 0 };
	struct reader *copier = &drive->readers[READERS - 1];
	struct pmc_result result = { 0 };

	capture(drive, copier->cursor);
	compare(drive, "captured", true);
	for (uint64_t page = 0; page < drive->pages; page++) {
		atomic_store(&copier->seen[page], is_nobodys(drive, page) ? 0 : atomic_load(count_of(drive, page)));
		if (!is_nobodys(drive, page))
			atomic_fetch_add(count_of(drive, page), 1000);
	}
	compare(drive, "written", false);
	for (unsigned i = 0; i < READERS - 1; i++)
		collect(drive, &drive->readers[i], 0, drive->pages, 0, true);
	check("restore", pmc_restore(drive->range, drive->image, &all, 1, &result));
	pmc_result_release(&result);
	compare(drive, "restored", true);
	check_counts(drive, copier, "restored");
	for (unsigned i = 0; i < READERS - 1; i++) {
		for (uint64_t page = 0; page < drive->pages; page++)
			atomic_store(&drive->readers[i].seen[page], 0);
		// What restore wrote was reported, so this sees every page.
		collect(drive, &drive->readers[i], 0, drive->pages, 0, true);
		check_counts(drive, &drive->readers[i], "collected after a restore");
	}
}

// Closing under load: writers wake up, collectors are told.
static void close_tracker(struct drive *drive)
{
	struct job jobs[4];
	unsigned i;
	for (i = 0; i < 2; i++) {
		start(&jobs[i], drive, i, write_until_told);
		start(&jobs[i + 2], drive, i, collect_until_closed);
	}
	usleep(2000);
	if (drive->rounds % 2)
		check("close range", pmc_range_close(drive->range));
	check("close tracker", pmc_tracker_close(drive->tracker));
	atomic_store(&drive->stop, true);
	for (i = 0; i < 4; i++)
		pthread_join(jobs[i].thread, NULL);
	if (pmc_tracker_state(drive->tracker) != -PMC_ECLOSED)
		fail("not closed");
	pmc_tracker_destroy(drive->tracker);
	for (i = 0; i < READERS; i++)
		pmc_cursor_destroy(drive->readers[i].cursor);
	pmc_range_destroy(drive->range);
	pmc_image_put(&drive->image);
}

int main(int count, char **arguments)
{
	static struct drive drive;
	struct job jobs[WRITERS + READERS + 2];
	unsigned job = 0, i;

	if (count != 6)
		fail("usage: driver HOW FEATURES ABILITIES KIND ROUNDS");
	alarm(PATIENCE); // whatever hangs ends
	drive.kind = arguments[4];
	drive.rounds = strtoul(arguments[5], NULL, 0);
	map_memory(&drive);
	open_tracker(&drive, (int)strtol(arguments[1], NULL, 0), strtoull(arguments[2], NULL, 0),
		     (uint32_t)strtoul(arguments[3], NULL, 0));
	capture(&drive, drive.readers[READERS - 1].cursor);

	atomic_store(&drive.reading, READERS + 1);
	for (i = 0; i < WRITERS; i++)
		start(&jobs[job++], &drive, i, write_pages);
	for (i = 0; i < READERS - 1; i++)
		start(&jobs[job++], &drive, i, collect_pages);
	start(&jobs[job++], &drive, READERS, collect_pages); // a second one for the first cursor
	start(&jobs[job++], &drive, READERS - 1, copy_pages);
	start(&jobs[job++], &drive, 0, disturb);
	for (i = 0; i < job; i++)
		pthread_join(jobs[i].thread, NULL);

	unsigned long long collects = 0, written = 0;
	for (i = 0; i < READERS - 1; i++) {
		collect(&drive, &drive.readers[i], 0, drive.pages, 0, true);
		check_counts(&drive, &drive.readers[i], "collected");
		collects += atomic_load(&drive.readers[i].collects);
	}
	for (uint64_t page = 0; page < drive.pages; page++)
		written += is_nobodys(&drive, page) ? 0 : atomic_load(count_of(&drive, page));
	restore(&drive);
	close_tracker(&drive);
	if (pages_outstanding())
		fail("%llu allocations were not freed", (unsigned long long)pages_outstanding());
	munmap((void *)(uintptr_t)drive.start, drive.end - drive.start);
	printf("%llu writes, %llu collects\n", written, collects);
	return 0;
}
