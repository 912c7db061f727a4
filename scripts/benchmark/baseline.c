// What a C programmer writes by hand, to be measured beside the library: one ioctl PAGEMAP_SCAN; a read of pagemap and one
// UFFDIO_WRITEPROTECT a run; a fault thread of poll, read and UFFDIO_WRITEPROTECT. And what prepares the memory for both.
//
// Built by baseline.py and called through ctypes, which releases the GIL. Times are taken in here, around the call alone.
// Functions return 0 or more, or -errno.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "uapi.h"

#define WORDS 8192 // 64 KiB of pagemap a read: smaller ones cost more, larger ones no less

static int64_t clock_ns(clockid_t clock)
{
	struct timespec now;
	clock_gettime(clock, &now);
	return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static int64_t now_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

// -- Memory ---------------------------------------------------------------------------------------------------

// *reserve* bytes aligned to *align*, of which *used* from *offset* on can be written and are populated. 0 on failure, with errno.
uint64_t bench_map(uint64_t reserve, uint64_t offset, uint64_t used, uint64_t align, int shared, int huge, uint64_t step)
{
	int flags = MAP_ANONYMOUS | MAP_NORESERVE | (shared ? MAP_SHARED : MAP_PRIVATE);
	char *whole = mmap(NULL, reserve + align, PROT_NONE, flags, -1, 0);
	if (whole == MAP_FAILED)
		return 0;
	char *start = (char *)(((uintptr_t)whole + align - 1) & -align);
	if (start > whole)
		munmap(whole, (size_t)(start - whole));
	if (start + reserve < whole + reserve + align)
		munmap(start + reserve, (size_t)(whole + align - start));
	// A kernel without huge pages knows neither advice.
	(void)madvise(start, reserve, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	if (mprotect(start + offset, used, PROT_READ | PROT_WRITE)) {
		munmap(start, reserve);
		return 0;
	}
	for (uint64_t at = 0; at < used; at += step)
		((volatile char *)start)[offset + at] = 1;
	return (uint64_t)(uintptr_t)start;
}

int bench_unmap(uint64_t start, uint64_t length)
{
	return munmap((void *)(uintptr_t)start, length) ? -errno : 0;
}

// Cuts [start, start + pages) into *vmas* mappings, by an advice that changes nothing else.
int bench_split(uint64_t start, uint64_t pages, uint64_t vmas, uint32_t shift)
{
	for (uint64_t i = 1; i < vmas; i += 2) {
		uint64_t from = i * pages / vmas, to = (i + 1) * pages / vmas;
		if (madvise((void *)(uintptr_t)(start + (from << shift)), (to - from) << shift, MADV_DONTDUMP))
			return -errno;
	}
	return 0;
}

// -- userfaultfd ----------------------------------------------------------------------------------------------

int bench_uffd(uint64_t features)
{
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	if (fd < 0)
		return -errno;
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	if (ioctl(fd, UFFDIO_API, &api)) {
		int rc = -errno;
		close(fd);
		return rc;
	}
	return fd;
}

int bench_register(int uffd, uint64_t start, uint64_t length)
{
	struct uffdio_register arg = { .range = { start, length }, .mode = UFFDIO_REGISTER_MODE_WP };
	return ioctl(uffd, UFFDIO_REGISTER, &arg) ? -errno : 0;
}

int bench_unregister(int uffd, uint64_t start, uint64_t length)
{
	struct uffdio_range arg = { start, length };
	return ioctl(uffd, UFFDIO_UNREGISTER, &arg) ? -errno : 0;
}

static int protect(int uffd, uint64_t start, uint64_t end, uint64_t mode)
{
	struct uffdio_writeprotect arg = { .range = { start, end - start }, .mode = mode };
	while (ioctl(uffd, UFFDIO_WRITEPROTECT, &arg))
		if (errno != EAGAIN)
			return -errno;
	return 0;
}

// One call for all of it, *loops* times.
int bench_protect(int uffd, uint64_t start, uint64_t end, uint64_t loops, int64_t *ns)
{
	int rc = 0;
	int64_t before = now_ns();
	for (uint64_t i = 0; i < loops && !rc; i++)
		rc = protect(uffd, start, end, UFFDIO_WRITEPROTECT_MODE_WP);
	*ns = now_ns() - before;
	return rc;
}

// Writes to each page of *runs*, without a fault: un-protected by the call with which a fault thread resolves one.
int bench_dirty(int uffd, const struct page_region *runs, uint64_t count, uint64_t step)
{
	for (uint64_t i = 0; i < count; i++) {
		int rc = protect(uffd, runs[i].start, runs[i].end, 0);
		if (rc)
			return rc;
		for (uint64_t at = runs[i].start; at < runs[i].end; at += step)
			++*(volatile char *)(uintptr_t)at;
	}
	return 0;
}

// -- The operations -------------------------------------------------------------------------------------------

// PAGEMAP_SCAN, *loops* times. Returns the regions of the last; *pages*: in them; *ns* and *cpu_ns*: of all.
int64_t bench_scan(int pagemap, uint64_t start, uint64_t end, uint64_t flags, struct page_region *vec, uint64_t vec_len,
		   uint64_t loops, uint32_t shift, uint64_t *pages, int64_t *ns, int64_t *cpu_ns)
{
	int rc = 0;
	int64_t cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID), before = now_ns();
	for (uint64_t i = 0; i < loops && rc >= 0; i++) {
		struct pm_scan_arg arg = {
			.size = sizeof(arg),
			.flags = flags | PM_SCAN_CHECK_WPASYNC,
			.start = start,
			.end = end,
			.vec = (uint64_t)(uintptr_t)vec,
			.vec_len = vec ? vec_len : 0,
			.category_mask = vec ? PAGE_IS_WRITTEN : 0,
			.return_mask = vec ? PAGE_IS_WRITTEN : 0,
		};
		rc = ioctl(pagemap, PAGEMAP_SCAN, &arg);
	}
	*ns = now_ns() - before;
	*cpu_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID) - cpu;
	if (rc < 0)
		return -errno;
	*pages = 0;
	for (int i = 0; vec && i < rc; i++)
		*pages += (vec[i].end - vec[i].start) >> shift;
	return rc;
}

static int64_t words_once(int pagemap, int uffd, uint64_t start, uint64_t end, int how, struct page_region *vec,
			  uint32_t shift)
{
	static uint64_t words[WORDS];
	int64_t count = 0;
	uint64_t run = 0, at = start;
	int open = 0;

	for (uint64_t pos = start; pos < end;) {
		size_t wanted = min_u64((end - pos) >> shift, WORDS);
		ssize_t got = pread(pagemap, words, wanted * sizeof(*words), (off_t)((pos >> shift) * sizeof(*words)));
		if (got <= 0)
			return got ? -errno : -ESRCH;
		uint64_t n = (uint64_t)got / sizeof(*words);
		for (uint64_t i = 0; i < n; i++) {
			int written = !(words[i] & PM_WORD_UFFD_WP);
			if (written == open)
				continue;
			at = pos + (i << shift);
			open = written;
			if (written) {
				run = at;
				continue;
			}
			if (how == 1) {
				int rc = protect(uffd, run, at, UFFDIO_WRITEPROTECT_MODE_WP);
				if (rc)
					return rc;
			}
			vec[count++] = (struct page_region){ run, at, PAGE_IS_WRITTEN };
		}
		pos += n << shift;
	}
	if (open) {
		if (how == 1) {
			int rc = protect(uffd, run, end, UFFDIO_WRITEPROTECT_MODE_WP);
			if (rc)
				return rc;
		}
		vec[count++] = (struct page_region){ run, end, PAGE_IS_WRITTEN };
	}
	if (how == 2 && count) {
		int rc = protect(uffd, start, end, UFFDIO_WRITEPROTECT_MODE_WP);
		if (rc)
			return rc;
	}
	return count;
}

// Reads pagemap and, with *how* 1, protects every run as soon as it ends; with 2 all of the range at the end; with 0 nothing.
// One thread at a time.
int64_t bench_words(int pagemap, int uffd, uint64_t start, uint64_t end, int how, struct page_region *vec, uint64_t loops,
		    uint32_t shift, uint64_t *pages, int64_t *ns)
{
	int64_t rc = 0, before = now_ns();
	for (uint64_t i = 0; i < loops && rc >= 0; i++)
		rc = words_once(pagemap, uffd, start, end, how, vec, shift);
	*ns = now_ns() - before;
	*pages = 0;
	for (int64_t i = 0; i < rc; i++)
		*pages += (vec[i].end - vec[i].start) >> shift;
	return rc;
}

// Sets the bit of each page.
int bench_bitmap(const struct page_region *vec, uint64_t count, uint64_t base, uint32_t shift, unsigned char *bits,
		 uint64_t loops, int64_t *ns)
{
	int64_t before = now_ns();
	for (uint64_t loop = 0; loop < loops; loop++) {
		for (uint64_t i = 0; i < count; i++)
			for (uint64_t page = (vec[i].start - base) >> shift; page < (vec[i].end - base) >> shift; page++)
				bits[page / 8] |= (unsigned char)(1u << page % 8);
		__asm__ volatile("" ::: "memory"); // each loop stores
	}
	*ns = now_ns() - before;
	return 0;
}

// -- Without help from the kernel -----------------------------------------------------------------------------

int bench_copy(char *to, const char *from, uint64_t length, int64_t *ns)
{
	int64_t before = now_ns();
	memcpy(to, from, length);
	*ns = now_ns() - before;
	return 0;
}

// Compares page by page and copies what differs. *pages*: how many did.
int bench_compare(char *copy, const char *memory, uint64_t length, uint64_t page_size, uint64_t *pages, int64_t *ns)
{
	int64_t before = now_ns();
	*pages = 0;
	for (uint64_t at = 0; at < length; at += page_size)
		if (memcmp(copy + at, memory + at, page_size)) {
			memcpy(copy + at, memory + at, page_size);
			++*pages;
		}
	*ns = now_ns() - before;
	return 0;
}

// -- Threads --------------------------------------------------------------------------------------------------

struct fault_thread {
	pthread_t thread;
	int uffd;
	int stop;
	int cpu; // to which it is tied, or -1
};

static void tie_to(int cpu)
{
	cpu_set_t one;
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	(void)sched_setaffinity(0, sizeof(one), &one);
}

static void *resolve(void *arg)
{
	struct fault_thread *self = arg;
	if (self->cpu >= 0)
		tie_to(self->cpu);
	for (;;) {
		struct pollfd fds[] = { { .fd = self->uffd, .events = POLLIN }, { .fd = self->stop, .events = POLLIN } };
		struct uffd_msg message;
		if (poll(fds, 2, -1) < 0)
			continue;
		if (fds[1].revents)
			return NULL;
		if (read(self->uffd, &message, sizeof(message)) != sizeof(message))
			continue;
		uint64_t size = (uint64_t)sysconf(_SC_PAGESIZE), page = message.arg.pagefault.address & -size;
		(void)protect(self->uffd, page, page + size, 0);
	}
}

// The fault thread that everybody writes, on any CPU, or tied to one. NULL on failure.
struct fault_thread *bench_fault_thread(int uffd, int cpu)
{
	struct fault_thread *self = calloc(1, sizeof(*self));
	if (!self)
		return NULL;
	self->uffd = uffd;
	self->cpu = cpu;
	self->stop = eventfd(0, EFD_CLOEXEC);
	if (self->stop < 0 || pthread_create(&self->thread, NULL, resolve, self)) {
		free(self);
		return NULL;
	}
	return self;
}

void bench_fault_thread_end(struct fault_thread *self)
{
	(void)eventfd_write(self->stop, 1);
	pthread_join(self->thread, NULL);
	close(self->stop);
	free(self);
}

struct writer {
	pthread_t thread;
	pthread_barrier_t *together;
	uint64_t start;
	uint64_t pages;
	uint64_t step;
	int64_t ns;
};

static void *store(void *arg)
{
	struct writer *self = arg;
	if (self->together)
		pthread_barrier_wait(self->together);
	int64_t before = now_ns();
	for (uint64_t i = 0; i < self->pages; i++)
		++*(volatile char *)(uintptr_t)(self->start + i * self->step);
	self->ns = now_ns() - before;
	return NULL;
}

// Stores a byte into each of *pages* pages: in this thread, or split among *threads* that begin together. *ns*: what they took, added up.
int bench_store(uint64_t start, uint64_t pages, uint64_t step, uint64_t threads, int64_t *ns)
{
	struct writer writers[64];
	pthread_barrier_t together;
	uint64_t started = 0, share = pages / threads;
	int rc = 0;

	if (threads > sizeof(writers) / sizeof(*writers) || share * threads != pages)
		return -EINVAL;
	if (threads == 1) {
		writers[0] = (struct writer){ .start = start, .pages = pages, .step = step };
		store(&writers[0]);
		*ns = writers[0].ns;
		return 0;
	}
	pthread_barrier_init(&together, NULL, (unsigned)threads);
	for (; started < threads && !rc; started += !rc) {
		writers[started] = (struct writer){
			.together = &together,
			.start = start + started * share * step,
			.pages = share,
			.step = step,
		};
		rc = pthread_create(&writers[started].thread, NULL, store, &writers[started]);
	}
	if (rc)
		abort(); // those that were started wait for the others
	*ns = 0;
	for (uint64_t i = 0; i < threads; i++) {
		pthread_join(writers[i].thread, NULL);
		*ns += writers[i].ns;
	}
	pthread_barrier_destroy(&together);
	return 0;
}

struct spinner {
	pthread_t thread;
	atomic_int stop;
	int cpu;
};

static void *spin(void *arg)
{
	struct spinner *self = arg;
	tie_to(self->cpu);
	while (!atomic_load_explicit(&self->stop, memory_order_relaxed))
		;
	return NULL;
}

// A thread of this process that keeps a CPU busy, so that what it maps must be flushed there too. NULL on failure.
struct spinner *bench_spinner(int cpu)
{
	struct spinner *self = calloc(1, sizeof(*self));
	if (!self)
		return NULL;
	self->cpu = cpu;
	if (pthread_create(&self->thread, NULL, spin, self)) {
		free(self);
		return NULL;
	}
	return self;
}

void bench_spinner_end(struct spinner *self)
{
	atomic_store(&self->stop, 1);
	pthread_join(self->thread, NULL);
	free(self);
}
