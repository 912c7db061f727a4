// The library's pages with a wall behind them, and counted: linked in with -Wl,--wrap, where sanitizers watch malloc alone.
#include <stdatomic.h>
#include <stdint.h>
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

static atomic_ullong outstanding;

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

void *__wrap_pmc_pages_alloc(size_t size)
{
	size_t room = room_of(size), page = (size_t)sysconf(_SC_PAGESIZE);
	char *pages = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (pages == MAP_FAILED)
		return NULL;
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
	UNPOISON(pages, room_of(size));
	munmap(pages, room_of(size));
	atomic_fetch_sub(&outstanding, 1);
}
