// The library's pages with a wall behind them, and counted: linked in with -Wl,--wrap, where sanitizers watch malloc alone.
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__has_feature)
#define HAS(sanitizer) __has_feature(sanitizer)
#else
#define HAS(sanitizer) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || HAS(address_sanitizer)
#include <sanitizer/asan_interface.h>
#define POISON(start, size) ASAN_POISON_MEMORY_REGION(start, size)
#define UNPOISON(start, size) ASAN_UNPOISON_MEMORY_REGION(start, size)
#else
#define POISON(start, size) (void)(start)
#define UNPOISON(start, size) (void)(start)
#endif

void *__wrap_pmc_pages_alloc(size_t size);
void __wrap_pmc_pages_free(void *pages, size_t size);
uint64_t pages_outstanding(void);

#define MOST (1 << 16)

static atomic_ullong outstanding;
static _Atomic(char *) walled[MOST]; // those that have a wall: what the library puts at an address of its choice has none

// Allocations of the library that it has not freed yet.
uint64_t pages_outstanding(void)
{
	return atomic_load(&outstanding);
}

// What was asked for, in whole pages, and one more that nobody may touch.
static size_t room_of(size_t size)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	return (size + page - 1) / page * page + page;
}

// Puts *value* in the place of *old*, wherever that is. Whether it was there.
static int exchange(char *old, char *value)
{
	for (size_t i = 0; i < MOST; i++) {
		char *expected = old;
		if (atomic_compare_exchange_strong(&walled[i], &expected, value))
			return 1;
	}
	return 0;
}

void *__wrap_pmc_pages_alloc(size_t size)
{
	size_t room = room_of(size), page = (size_t)sysconf(_SC_PAGESIZE);
	char *pages = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (pages == MAP_FAILED)
		return NULL;
	if (!exchange(NULL, pages))
		abort();
	mprotect(pages + room - page, page, PROT_NONE);
	UNPOISON(pages, room);
	POISON(pages + size, room - size);
	atomic_fetch_add(&outstanding, 1);
	return pages;
}

void __wrap_pmc_pages_free(void *pages, size_t size)
{
	if (!pages)
		return;
	if (!exchange(pages, NULL)) {
		munmap(pages, size);
		return;
	}
	UNPOISON(pages, room_of(size));
	munmap(pages, room_of(size));
	atomic_fetch_sub(&outstanding, 1);
}
