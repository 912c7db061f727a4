// Trackers: their state, their locks, and what a fork leaves of them.
//
// One call at a time per tracker (mutex).
//
// Forks: the kernel zeroes the page behind *alive* in a child, however it was forked. A child does no ioctl (the
// descriptor acts on the parent's memory), takes no lock (its holder does not exist there) and joins no thread.
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

// How much of the caller's stack a call of this library, and the signal handlers on top of it, may use: below the frame
// that pmc_is_callers() sees, and above it, for the calls in between.
#define STACK_REACH (128 << 10)
#define STACK_ABOVE (4 << 10)
// How much of it closing a range uses, the handlers left out, and in what steps that is touched: no page is smaller.
#define STACK_CLOSE (8 << 10)
#define STACK_STEP (1 << 10)
// How much of what it keeps for each thread the C library changes, in calls that can be cancelled, as pread(2) is.
#define THREAD_REACH (1 << 10)

int pmc_tracker_state(struct pmc_tracker *tracker)
{
	if (!tracker)
		return -PMC_ECLOSED;
	if (!atomic_load_explicit(tracker->alive, memory_order_relaxed))
		return -PMC_EFORKED;
	if (__atomic_load_n(&tracker->closed, __ATOMIC_ACQUIRE))
		return -PMC_ECLOSED;
	return atomic_load(&tracker->fault_errno) ? -PMC_EFAULTTHREAD : 0;
}

int pmc_tracker_fault_errno(struct pmc_tracker *tracker)
{
	return !tracker ? 0 : atomic_load(&tracker->fault_errno);
}

static bool is_near(uint64_t start, uint64_t end, const void *address, uint64_t below, uint64_t above)
{
	uint64_t at = (uint64_t)(uintptr_t)address;
	return start < at + above && at - below < end;
}

bool pmc_is_callers(uint64_t start, uint64_t end)
{
	// In glibc and in musl a pthread_t is the address of that.
	return is_near(start, end, __builtin_frame_address(0), STACK_REACH, STACK_ABOVE) ||
	       is_near(start, end, &errno, 0, sizeof(errno)) ||
	       is_near(start, end, (const void *)(uintptr_t)pthread_self(), 0, THREAD_REACH);
}

void pmc_touch_callers(void)
{
	volatile char below[STACK_CLOSE];
	for (size_t at = 0; at < sizeof(below); at += STACK_STEP)
		below[at] = 0;
	*(volatile int *)&errno = 0;
}

int pmc_enter_briefly(struct pmc_tracker *tracker)
{
	int rc = pmc_tracker_state(tracker);
	if (rc)
		return rc;
	pthread_mutex_lock(&tracker->mutex);
	rc = pmc_tracker_state(tracker);
	if (rc)
		pthread_mutex_unlock(&tracker->mutex);
	return rc;
}

int pmc_enter(struct pmc_tracker *tracker)
{
	int rc = pmc_enter_briefly(tracker);
	if (rc)
		return rc;
	// A caller whose stack is tracked would wait for a fault thread while that waits for fault_lock.
	for (struct pmc_range *range = tracker->ranges; range && !rc && !pmc_is_async(tracker); range = range->next)
		if (pmc_is_callers(range->start, range->end))
			rc = -PMC_EOWNMEMORY;
	if (rc)
		pthread_mutex_unlock(&tracker->mutex);
	return rc;
}

int pmc_leave(struct pmc_tracker *tracker, int rc, struct pmc_result *result)
{
	// A fault thread that ends unregisters everything; a call that runs meanwhile then finds memory untracked.
	if (rc == -ENOENT && atomic_load(&tracker->fault_errno))
		rc = -PMC_EFAULTTHREAD;
	if (result)
		result->operation = tracker->operation;
	pthread_mutex_unlock(&tracker->mutex);
	return rc;
}

void pmc_tracker_put(struct pmc_tracker *tracker)
{
	if (atomic_fetch_sub(&tracker->references, 1) != 1)
		return;
	for (unsigned i = 0; i < PMC_FAULT_THREADS; i++)
		pmc_pages_free(tracker->fault_threads[i].stack, tracker->fault_threads[i].stack_size);
	pmc_pages_free(tracker->alive, page_size_of(tracker));
	pmc_pages_free((void *)tracker->bells, PMC_FAULT_THREADS * page_size_of(tracker));
	pmc_pages_free(tracker->unreadable, page_size_of(tracker));
	pmc_pages_free(tracker->copier, tracker->copier_size);
	pmc_pages_free(tracker, sizeof(*tracker));
}

static void close_descriptors(struct pmc_tracker *tracker)
{
	pmc_close_file(&tracker->uffd, tracker->uffd_file);
	pmc_close_file(&tracker->pagemap, tracker->pagemap_file);
	pmc_follower_close(&tracker->follower);
	pmc_vmas_close(&tracker->vmas);
	pmc_vmas_close(&tracker->thread_vmas);
}

// Makes what belongs to a new tracker, and starts its threads.
static int set_up(struct pmc_tracker *tracker)
{
	bool query = tracker->abilities & PMC_CAN_QUERY_MAPS;
	tracker->operation = "fstat";
	int rc = pmc_file_id(tracker->uffd, &tracker->uffd_file);
	if (!rc)
		rc = pmc_file_id(tracker->pagemap, &tracker->pagemap_file);
	if (rc)
		return rc;
	tracker->operation = "/proc/self/maps";
	rc = pmc_vmas_open(&tracker->vmas, query, false);
	if (!rc)
		rc = pmc_vmas_open(&tracker->thread_vmas, query, false);
	if (rc)
		return rc;
	tracker->operation = "mmap";
	tracker->alive = pmc_pages_alloc(page_size_of(tracker));
	tracker->unreadable = pmc_pages_alloc(page_size_of(tracker));
	if (!tracker->alive || !tracker->unreadable)
		return -ENOMEM;
	tracker->operation = "mprotect";
	if (mprotect(tracker->unreadable, page_size_of(tracker), PROT_NONE))
		return -errno;
	tracker->operation = "madvise";
	uint64_t alive = (uint64_t)(uintptr_t)tracker->alive;
	rc = pmc_madvise(alive, alive + page_size_of(tracker), PMC_MADV_WIPEONFORK);
	atomic_store(tracker->alive, 1);
	return rc || pmc_is_async(tracker) ? rc : pmc_fault_threads_start(tracker);
}

int pmc_tracker_create(struct pmc_tracker **ret, const struct pmc_config *config, struct pmc_result *result)
{
	struct pmc_tracker *tracker = pmc_pages_alloc(sizeof(*tracker));
	if (!tracker) {
		close(config->uffd);
		close(config->pagemap);
		result->operation = "mmap";
		return -ENOMEM;
	}
	tracker->references = 1;
	tracker->abilities = config->abilities;
	tracker->page_shift = pmc_page_shift();
	tracker->uffd = config->uffd;
	tracker->pagemap = config->pagemap;
	tracker->vmas.fd = tracker->thread_vmas.fd = -1;
	tracker->follower.stat = -1;
	pthread_mutex_init(&tracker->mutex, NULL);

	int rc = set_up(tracker);
	result->operation = tracker->operation;
	if (rc) {
		close_descriptors(tracker);
		pmc_tracker_put(tracker);
		return rc;
	}
	*ret = tracker;
	return 0;
}

// Whether a fault thread ended because the descriptor was another file's by then. A userfaultfd itself fails only for
// want of memory, or of an address space.
static bool is_of_another_file(int error)
{
	return error && error != ENOMEM && error != ESRCH && error != EFAULT;
}

int pmc_tracker_close(struct pmc_tracker *tracker)
{
	if (!tracker)
		return 0;
	if (!atomic_load_explicit(tracker->alive, memory_order_relaxed)) {
		close_descriptors(tracker);
		return 0;
	}
	pthread_mutex_lock(&tracker->mutex);
	int rc = 0;
	if (!tracker->closed) {
		while (tracker->ranges) {
			int failed = pmc_range_close_locked(tracker->ranges);
			rc = rc ? rc : failed;
		}
		pmc_fault_threads_stop(tracker);
		// Somebody closed our descriptor, and its number may be anybody's now. The kernel let go of everything
		// with it.
		if (rc == -EBADF || rc == -ENOTTY || is_of_another_file(atomic_load(&tracker->fault_errno))) {
			tracker->uffd = -1;
			rc = 0;
		}
		close_descriptors(tracker);
		__atomic_store_n(&tracker->closed, true, __ATOMIC_RELEASE);
	}
	pthread_mutex_unlock(&tracker->mutex);
	return rc;
}

void pmc_tracker_destroy(struct pmc_tracker *tracker)
{
	if (!tracker)
		return;
	(void)pmc_tracker_close(tracker);
	pmc_tracker_put(tracker);
}

int pmc_tracker_statistics(struct pmc_tracker *tracker, struct pmc_statistics *ret)
{
	int rc = pmc_enter(tracker);
	if (rc)
		return rc;
	*ret = (struct pmc_statistics){
		.faults = atomic_load(&tracker->faults),
		.scans = tracker->scans,
		.resets = tracker->resets,
		.pages = tracker->pages,
	};
	for (struct pmc_range *range = tracker->ranges; range; range = range->next) {
		ret->ranges++;
		ret->tracked_bytes += range->end - range->start;
		for (struct pmc_cursor *cursor = range->cursors; cursor; cursor = cursor->next)
			ret->owed_pages += cursor->owed_count;
	}
	return pmc_leave(tracker, 0, NULL);
}

