// The fault thread: resolves the write faults of a synchronous userfaultfd.
//
// Why a thread, and why in C. A thread that stores into a protected page sleeps in the kernel until somebody
// un-protects it. A Python thread that does so with ram[i] = 1 sleeps holding the GIL, so whoever resolves it must need
// neither the GIL nor anything that a thread holding the GIL may hold: no Python, no malloc, no stdio, no mutex of the
// tracker. What is left:
//  - memory: the tracker's own pages, this thread's own stack. None of it can be tracked (pmc_range_create refuses).
//  - one lock, fault_lock, which others hold only around system calls that touch nothing but the tracker's own pages.
//  - system calls: read, pread, ioctl, futex, and those that tie it to a CPU (follow.c).
// If one of these fails there is nobody left to wake the writers, so everything is unregistered first, which wakes them
// and lets their stores through untracked; the next call on the tracker fails loudly.
//
// The thread lives from pmc_tracker_create to pmc_tracker_close, with all signals blocked. It does not survive a fork.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

#define STACK_SIZE (128 << 10) // and twice as much until it is enough
#define STACK_LIMIT (256 << 20)
#define MESSAGES 16
#define STOP_SECONDS 3

static void log_write(struct pmc_tracker *tracker, uint64_t address)
{
	for (struct pmc_range *range = tracker->ranges; range; range = range->next)
		if (range->log && address >= range->start && address < range->end) {
			bit_set(range->log, page_index(range, address));
			return;
		}
}

struct stretch {
	uint64_t start;
	uint64_t end;
};

// Un-protects the page at *address* and wakes whoever waits there. *ret: where it woke them. 0 or -errno.
static int resolve(struct pmc_tracker *tracker, uint64_t address, struct stretch *ret)
{
	uint64_t size = page_size_of(tracker);
	uint64_t page = align_down(address, size);
	int rc;

	// Logging and un-protecting are one step for a collector, else it could take the log and protect in between:
	// the page would end up open and unlogged.
	pmc_fair_lock(&tracker->fault_lock);
	log_write(tracker, page);
	atomic_fetch_add_explicit(&tracker->faults, 1, memory_order_relaxed); // before its writer wakes, and asks
	rc = pmc_uffd_writeprotect(tracker->uffd, page, page + size, 0);
	// In hugetlb memory only whole huge pages are accepted.
	while (rc == -EINVAL && size << 1) {
		size <<= 1;
		page = align_down(address, size);
		rc = pmc_uffd_writeprotect(tracker->uffd, page, page + size, 0);
	}
	pmc_fair_unlock(&tracker->fault_lock);
	// The mapping went away, or lost its registration: the writer must look again.
	if (rc == -ENOENT || rc == -EINVAL) {
		size = page_size_of(tracker);
		page = align_down(address, size);
		rc = pmc_uffd_wake(tracker->uffd, page, page + size);
	}
	*ret = (struct stretch){ page, page + size };
	return rc;
}

static bool contains(const struct stretch *spans, size_t count, uint64_t address)
{
	for (size_t i = 0; i < count; i++)
		if (address >= spans[i].start && address < spans[i].end)
			return true;
	return false;
}

// Returns 0 when told to stop, -errno when it cannot go on. Blocks in read, not in poll: read holds on to the file it
// was called with, so a descriptor that somebody closes or replaces under us makes the next ioctl fail, while poll
// would go to sleep on whatever has the number now, and keep the old file, its registrations and their writers with it
// (seen on 6.18).
static int serve(struct pmc_tracker *tracker)
{
	struct uffd_msg messages[MESSAGES];
	struct stretch woken[MESSAGES];

	for (;;) {
		size_t answers = 0;
		ssize_t got = read(tracker->uffd, messages, sizeof(messages));
		if (got < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (got < 0)
			return -errno;
		// Nothing but faults was asked for in the handshake, so anything else comes from somebody else's file.
		if (!got || (size_t)got % sizeof(*messages))
			return -EBADF;
		size_t count = (size_t)got / sizeof(*messages);
		uint32_t writer = messages[0].arg.pagefault.thread_id;
		for (size_t i = 0; i < count; i++) {
			if (messages[i].event != UFFD_EVENT_PAGEFAULT)
				return -EBADF;
			if (messages[i].arg.pagefault.thread_id != writer)
				writer = 0;
			uint64_t address = messages[i].arg.pagefault.address;
			// Its writer was woken with the one before, and may be through: by now the page may have been
			// collected, and opening it again would make it one that was written. A message that is not
			// read yet goes with its writer.
			if (contains(woken, answers, address))
				continue;
			int rc = resolve(tracker, address, &woken[answers++]);
			if (rc || align_down(address, page_size_of(tracker)) == (uint64_t)(uintptr_t)tracker->bell)
				return rc;
		}
		pmc_follow(tracker, writer);
	}
}

static void *fault_thread(void *arg)
{
	struct pmc_tracker *tracker = arg;
	int rc = serve(tracker);
	if (rc) {
		atomic_store(&tracker->fault_errno, -rc);
		pmc_fair_lock(&tracker->fault_lock);
		for (struct pmc_range *range = tracker->ranges; range; range = range->next)
			pmc_unregister_all(tracker, &tracker->thread_vmas, range->start, range->end);
		pmc_fair_unlock(&tracker->fault_lock);
	}
	// Also after an answer, which may have been only to look again.
	uint64_t bell = (uint64_t)(uintptr_t)tracker->bell;
	pmc_unregister_all(tracker, &tracker->thread_vmas, bell, bell + page_size_of(tracker));
	atomic_store(&tracker->thread_ended, 1);
	syscall(SYS_futex, &tracker->thread_ended, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
	return NULL;
}

// The bell is a protected page of our own. Writing to it is a fault like any other, so it gets the thread out of its
// read; and as the thread ends only after it has answered it, whoever rings is never left standing.
static int hang_bell(struct pmc_tracker *tracker)
{
	uint64_t ioctls, size = page_size_of(tracker);
	tracker->operation = "mmap";
	tracker->bell = pmc_pages_alloc(size);
	if (!tracker->bell)
		return -ENOMEM;
	*tracker->bell = 0; // an empty page cannot be protected everywhere
	uint64_t bell = (uint64_t)(uintptr_t)tracker->bell;
	tracker->operation = "UFFDIO_REGISTER";
	int rc = pmc_uffd_register(tracker->uffd, bell, bell + size, &ioctls);
	if (rc)
		return rc;
	tracker->operation = "UFFDIO_WRITEPROTECT";
	return pmc_uffd_writeprotect(tracker->uffd, bell, bell + size, UFFDIO_WRITEPROTECT_MODE_WP);
}

// glibc is told of the upper half. It refuses one that does not hold what it puts there, the thread-local storage of
// the program and its libraries, and 2 KiB more (nptl/allocatestack.c); the lower half is there in case that is all it
// leaves.
static int start_on_stack(struct pmc_tracker *tracker, size_t size)
{
	pthread_attr_t attr;
	sigset_t all, before;
	tracker->operation = "mmap";
	tracker->stack_size = 2 * size;
	tracker->stack = pmc_pages_alloc(2 * size);
	if (!tracker->stack)
		return -ENOMEM;
	tracker->operation = "pthread_create";
	int rc = pthread_attr_init(&attr);
	if (rc)
		return -rc;
	sigfillset(&all);
	rc = pthread_attr_setstack(&attr, (char *)tracker->stack + size, size);
	if (!rc)
		rc = pthread_sigmask(SIG_SETMASK, &all, &before);
	if (!rc) {
		rc = pthread_create(&tracker->thread, &attr, fault_thread, tracker);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
	}
	pthread_attr_destroy(&attr);
	return -rc;
}

int pmc_fault_thread_start(struct pmc_tracker *tracker)
{
	pmc_follower_start(&tracker->follower);
	tracker->operation = "fcntl";
	int flags = fcntl(tracker->uffd, F_GETFL);
	if (flags < 0 || fcntl(tracker->uffd, F_SETFL, flags & ~O_NONBLOCK))
		return -errno;
	int rc = hang_bell(tracker);
	if (rc)
		return rc;
	size_t size = STACK_SIZE;
	while ((rc = start_on_stack(tracker, size)) == -EINVAL && size < STACK_LIMIT) {
		pmc_pages_free(tracker->stack, tracker->stack_size);
		size *= 2;
	}
	if (rc)
		return rc;
	tracker->thread_started = true;
	// A name for debuggers; failing to set it harms nothing.
	(void)pthread_setname_np(tracker->thread, "pagemapcompat");
	return 0;
}

// Not by a join with a time limit: the C libraries share none but by the clock that people set, and a limit by that is
// over at once, or never.
static bool has_ended(struct pmc_tracker *tracker)
{
	struct timespec limit;
	long rc;
	clock_gettime(CLOCK_MONOTONIC, &limit);
	limit.tv_sec += STOP_SECONDS;
	do
		rc = syscall(SYS_futex, &tracker->thread_ended, FUTEX_WAIT_BITSET_PRIVATE, 0, &limit, NULL,
			     FUTEX_BITSET_MATCH_ANY);
	while (!atomic_load(&tracker->thread_ended) && (!rc || errno != ETIMEDOUT));
	return atomic_load(&tracker->thread_ended);
}

void pmc_fault_thread_stop(struct pmc_tracker *tracker)
{
	if (!tracker->thread_started)
		return;
	tracker->thread_started = false;
	*tracker->bell = 1;
	if (has_ended(tracker)) {
		pthread_join(tracker->thread, NULL);
		return;
	}
	// It reads a file that somebody put in the place of ours, and may do so for ever. It keeps the memory it stands
	// on.
	atomic_fetch_add(&tracker->references, 1);
	pthread_detach(tracker->thread);
}
