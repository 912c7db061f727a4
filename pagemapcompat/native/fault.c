// The fault threads, one, or one for each of two CPUs (follow.c): they resolve the write faults of a synchronous
// userfaultfd.
//
// Why a thread, and why in C. A thread that stores into a protected page sleeps in the kernel until somebody
// un-protects it. A Python thread that does so with ram[i] = 1 sleeps holding the GIL, so whoever resolves it must need
// neither the GIL nor anything that a thread holding the GIL may hold: no Python, no malloc, no stdio, no mutex of the
// tracker. What is left:
//  - memory: the tracker's own pages, this thread's own stack. None of it can be tracked (pmc_range_create refuses).
//  - one lock, fault_lock, which others hold only around system calls that touch nothing but the tracker's own pages.
//  - system calls: read, pread, ioctl, futex, and those that tie it to a CPU (follow.c).
// If one of these fails a message may have been read that nobody answers, so everything is unregistered, which wakes
// the writers and lets their stores through untracked; then all threads end, and the next call on the tracker fails
// loudly.
//
// The threads live from pmc_tracker_create to pmc_tracker_close, with all signals blocked. They do not survive a fork.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

#define STACK_SIZE (128 << 10) // and twice as much until it is enough
#define STACK_LIMIT (256 << 20)
#define STOP_SECONDS 3
#define OPENING_NS 50000 // until a page that is being opened is looked at again; that takes 5 us

static void log_write(struct pmc_tracker *tracker, uint64_t address)
{
	for (struct pmc_range *range = tracker->ranges; range; range = range->next)
		if (range->log && address >= range->start && address < range->end) {
			bit_set(range->log, page_index(range, address));
			return;
		}
}

static bool overlap(const struct stretch *one, const struct stretch *other)
{
	return one->start < other->end && other->start < one->end;
}

// The thread that is opening a page of *stretch* at this moment, or NULL; under answers_lock.
static struct fault_thread *opener(struct pmc_tracker *tracker, const struct stretch *stretch)
{
	for (unsigned i = 0; i < PMC_FAULT_THREADS; i++)
		if (overlap(&tracker->fault_threads[i].opening, stretch))
			return &tracker->fault_threads[i];
	return NULL;
}

// Whether the writer at *page*, whose message was read after so many answers, may have been woken by a later one; under
// answers_lock. Who waited for its message for longer than answers are kept does not know.
static bool may_be_answered(const struct pmc_tracker *tracker, unsigned long long answers, const struct stretch *page)
{
	unsigned long long now = atomic_load(&tracker->answered);
	if (now - answers > PMC_ANSWERS)
		return true;
	for (; answers < now; answers++)
		if (overlap(&tracker->answers[answers % PMC_ANSWERS], page))
			return true;
	return false;
}

static void note_answer(struct pmc_tracker *tracker, struct stretch stretch)
{
	tracker->answers[atomic_fetch_add(&tracker->answered, 1) % PMC_ANSWERS] = stretch;
}

// Un-protects *page*, and wakes whoever waits there. Hugetlb memory takes whole huge pages alone (else EINVAL), so
// twice as much is tried until it is accepted. 0 or -errno.
static int open_page(struct pmc_tracker *tracker, struct stretch *page)
{
	struct stretch whole = *page;
	int rc;
	// Logging and un-protecting are one step for a collector, else it could take the log and protect in between:
	// the page would end up open and unlogged.
	bool logs = pmc_logs(tracker);
	if (logs) {
		pmc_fair_lock(&tracker->fault_lock);
		log_write(tracker, page->start);
	}
	for (uint64_t size = page_size_of(tracker);; size <<= 1) {
		whole.start = align_down(page->start, size);
		whole.end = whole.start + size;
		rc = pmc_uffd_writeprotect(tracker->uffd, whole.start, whole.end, 0);
		if (rc != -EINVAL || !(size << 1))
			break;
	}
	if (logs)
		pmc_fair_unlock(&tracker->fault_lock);
	if (!rc)
		*page = whole;
	return rc;
}

// Answers a message that was read after *answers* answers. 0 or -errno.
//
// The message of a writer that has been woken is worth nothing: by now its page may have been collected, and opened
// again would be one that was written. Two may write to one page, and the messages of both be read before one is
// answered. So a page that was opened since the message was read is not opened again: its writer looks. Nor is one that
// is being opened, which no answer tells yet: its writer is woken by whoever opens it, once that is done.
static int resolve(struct fault_thread *self, unsigned long long answers, uint64_t address)
{
	struct pmc_tracker *tracker = self->tracker;
	uint64_t size = page_size_of(tracker);
	struct stretch page = { align_down(address, size), align_down(address, size) + size }, woken = page;

	pmc_fair_lock(&tracker->answers_lock);
	struct fault_thread *other = opener(tracker, &page);
	bool answered = !other && may_be_answered(tracker, answers, &page);
	if (other)
		other->again = true;
	else if (!answered)
		self->opening = page;
	pmc_fair_unlock(&tracker->answers_lock);
	if (other)
		return 0;
	if (answered)
		return pmc_uffd_wake(tracker->uffd, page.start, page.end);

	atomic_fetch_add_explicit(&tracker->faults, 1, memory_order_relaxed); // before its writer wakes, and asks
	int rc = open_page(tracker, &woken);
	pmc_fair_lock(&tracker->answers_lock);
	note_answer(tracker, woken);
	bool again = self->again;
	self->opening = (struct stretch){ 0 };
	self->again = false;
	pmc_fair_unlock(&tracker->answers_lock);
	// Or the mapping went away, or lost its registration: the writer must look again.
	bool gone = rc == -ENOENT || rc == -EINVAL;
	int failed = again || gone ? pmc_uffd_wake(tracker->uffd, page.start, page.end) : 0;
	return rc && !gone ? rc : failed;
}

void pmc_answer(struct pmc_tracker *tracker, uint64_t start, uint64_t end)
{
	struct stretch stretch = { start, end };
	sigset_t all, before;
	sigfillset(&all);
	for (bool first = true, opening = true; opening; first = false) {
		// A signal handler could store into tracked memory.
		pthread_sigmask(SIG_SETMASK, &all, &before);
		pmc_fair_lock(&tracker->answers_lock);
		if (first)
			note_answer(tracker, stretch);
		opening = opener(tracker, &stretch);
		pmc_fair_unlock(&tracker->answers_lock);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
		// It sleeps, for one that is real-time would leave its CPU to none that is not by yielding.
		if (opening)
			(void)nanosleep(&(struct timespec){ .tv_nsec = OPENING_NS }, NULL);
	}
}

static bool is_bell(const struct pmc_tracker *tracker, uint64_t address)
{
	uint64_t bells = (uint64_t)(uintptr_t)tracker->bells;
	return address >= bells && address < bells + PMC_FAULT_THREADS * page_size_of(tracker);
}

// Returns 0 when told to stop, -errno when it cannot go on. Blocks in read, not in poll: read holds on to the file it
// was called with, so a descriptor that somebody closes or replaces under us is found out with the next message, while
// poll would go to sleep on whatever has the number now, and keep the old file, its registrations and their writers
// with it (seen on 6.18). A thread that still reads the old file then keeps it; the one that found out rings for it.
static int serve(struct fault_thread *self)
{
	struct pmc_tracker *tracker = self->tracker;
	struct uffd_msg messages[PMC_MESSAGES];

	for (;;) {
		unsigned long long answers = atomic_load(&tracker->answered);
		ssize_t got = read(tracker->uffd, messages, sizeof(messages));
		if (got < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (got < 0)
			return -errno;
		// Nothing but faults was asked for in the handshake, so anything else comes from somebody else's file.
		if (!got || (size_t)got % sizeof(*messages) || !pmc_is_file(tracker->uffd, tracker->uffd_file))
			return -EBADF;
		size_t count = (size_t)got / sizeof(*messages);
		uint32_t writer = messages[0].arg.pagefault.thread_id;
		bool stop = false;
		for (size_t i = 0; i < count; i++) {
			if (messages[i].event != UFFD_EVENT_PAGEFAULT)
				return -EBADF;
			if (messages[i].arg.pagefault.thread_id != writer)
				writer = 0;
			int rc = resolve(self, answers, messages[i].arg.pagefault.address);
			if (rc)
				return rc;
			stop |= is_bell(tracker, messages[i].arg.pagefault.address);
		}
		if (stop)
			return 0;
		if (self->cpu == PMC_NO_CPU)
			pmc_follow(tracker, writer);
	}
}

// *count* threads serve no longer; under fault_lock. Returns whether none does. Then the bells are unregistered:
// whoever rings one goes on, also if it was told to look again.
static bool stop_serving(struct pmc_tracker *tracker, unsigned count)
{
	uint64_t bells = (uint64_t)(uintptr_t)tracker->bells;
	tracker->fault_threads_serving -= count;
	if (tracker->fault_threads_serving)
		return false;
	pmc_unregister_all(tracker, &tracker->thread_vmas, bells,
			   bells + PMC_FAULT_THREADS * page_size_of(tracker));
	return true;
}

static void *fault_thread(void *arg)
{
	struct fault_thread *self = arg;
	struct pmc_tracker *tracker = self->tracker;
	int none = 0;
	pmc_settle(self);
	int rc = serve(self);
	if (rc) // the first says why
		atomic_compare_exchange_strong(&tracker->fault_errno, &none, -rc);
	pmc_fair_lock(&tracker->fault_lock);
	pmc_untie(tracker);
	self->id = 0;
	for (struct pmc_range *range = tracker->ranges; rc && range; range = range->next)
		pmc_unregister_all(tracker, &tracker->thread_vmas, range->start, range->end);
	bool last = stop_serving(tracker, 1);
	pmc_fair_unlock(&tracker->fault_lock);
	// The other one would wait for ever, and if the descriptor is lost hold on to the file and to its writers.
	if (rc && !last)
		*tracker->bells = 1;
	atomic_fetch_sub(&tracker->fault_threads_left, 1);
	syscall(SYS_futex, &tracker->fault_threads_left, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
	return NULL;
}

// A bell is a protected page of our own, and there is one for each thread. Writing to it is a fault like any other, so
// it gets a thread out of its read; and as that ends only after it has answered it, whoever rings is never left
// standing.
static int hang_bells(struct pmc_tracker *tracker)
{
	uint64_t ioctls, size = page_size_of(tracker);
	tracker->operation = "mmap";
	tracker->bells = pmc_pages_alloc(PMC_FAULT_THREADS * size);
	if (!tracker->bells)
		return -ENOMEM;
	for (unsigned i = 0; i < PMC_FAULT_THREADS; i++)
		tracker->bells[i * size] = 0; // an empty page cannot be protected everywhere
	uint64_t bells = (uint64_t)(uintptr_t)tracker->bells;
	tracker->operation = "UFFDIO_REGISTER";
	int rc = pmc_uffd_register(tracker->uffd, bells, bells + PMC_FAULT_THREADS * size, &ioctls);
	if (rc)
		return rc;
	tracker->operation = "UFFDIO_WRITEPROTECT";
	return pmc_uffd_writeprotect(tracker->uffd, bells, bells + PMC_FAULT_THREADS * size,
				     UFFDIO_WRITEPROTECT_MODE_WP);
}

// glibc is told of the upper half. It refuses one that does not hold what it puts there, the thread-local storage of
// the program and its libraries, and 2 KiB more (nptl/allocatestack.c); the lower half is there in case that is all it
// leaves.
static int start_on_stack(struct fault_thread *self, size_t size)
{
	struct pmc_tracker *tracker = self->tracker;
	pthread_attr_t attr;
	sigset_t all, before;
	tracker->operation = "mmap";
	self->stack_size = 2 * size;
	self->stack = pmc_pages_alloc(2 * size);
	if (!self->stack)
		return -ENOMEM;
	tracker->operation = "pthread_create";
	int rc = pthread_attr_init(&attr);
	if (rc)
		return -rc;
	sigfillset(&all);
	rc = pthread_attr_setstack(&attr, (char *)self->stack + size, size);
	if (!rc)
		rc = pthread_sigmask(SIG_SETMASK, &all, &before);
	if (!rc) {
		rc = pthread_create(&self->thread, &attr, fault_thread, self);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
	}
	pthread_attr_destroy(&attr);
	return -rc;
}

static int start(struct pmc_tracker *tracker, struct fault_thread *self)
{
	size_t size = STACK_SIZE;
	int rc;
	self->tracker = tracker;
	while ((rc = start_on_stack(self, size)) == -EINVAL && size < STACK_LIMIT) {
		pmc_pages_free(self->stack, self->stack_size);
		size *= 2;
	}
	if (rc)
		return rc;
	// A name for debuggers; failing to set it harms nothing.
	(void)pthread_setname_np(self->thread, "pagemapcompat");
	return 0;
}

// So many could not be started. Where there is one it serves alone, wherever the scheduler puts it.
static void do_without(struct pmc_tracker *tracker, unsigned count)
{
	const char *operation = tracker->operation;
	sigset_t signals;
	pmc_hold_fault_threads(tracker, &signals);
	pmc_untie(tracker);
	stop_serving(tracker, count);
	pmc_release_fault_threads(tracker, &signals);
	atomic_fetch_sub(&tracker->fault_threads_left, count);
	tracker->operation = operation;
}

int pmc_fault_threads_start(struct pmc_tracker *tracker)
{
	unsigned count = pmc_place(tracker);
	if (count == 1)
		pmc_follower_start(&tracker->follower);
	tracker->operation = "fcntl";
	int flags = fcntl(tracker->uffd, F_GETFL);
	if (flags < 0 || fcntl(tracker->uffd, F_SETFL, flags & ~O_NONBLOCK))
		return -errno;
	int rc = hang_bells(tracker);
	if (rc)
		return rc;
	tracker->fault_threads_serving = count;
	tracker->fault_threads_left = count;
	for (unsigned i = 0; i < count && !rc; i++) {
		rc = start(tracker, &tracker->fault_threads[i]);
		if (rc)
			do_without(tracker, count - i);
		else
			tracker->fault_thread_count++;
	}
	return tracker->fault_thread_count ? 0 : rc;
}

// Not by a join with a time limit: the C libraries share none but by the clock that people set, and a limit by that is
// over at once, or never.
static bool have_ended(struct pmc_tracker *tracker, unsigned left)
{
	struct timespec limit;
	long rc;
	clock_gettime(CLOCK_MONOTONIC, &limit);
	limit.tv_sec += STOP_SECONDS;
	do
		rc = syscall(SYS_futex, &tracker->fault_threads_left, FUTEX_WAIT_BITSET_PRIVATE, left, &limit, NULL,
			     FUTEX_BITSET_MATCH_ANY);
	while ((left = atomic_load(&tracker->fault_threads_left)) && (!rc || errno != ETIMEDOUT));
	return !left;
}

void pmc_fault_threads_stop(struct pmc_tracker *tracker)
{
	unsigned count = tracker->fault_thread_count;
	sigset_t signals;
	if (!count)
		return;
	tracker->fault_thread_count = 0;
	pmc_hold_fault_threads(tracker, &signals);
	pmc_untie(tracker);
	pmc_release_fault_threads(tracker, &signals);
	for (unsigned i = 0; i < count; i++)
		tracker->bells[i * page_size_of(tracker)] = 1;
	bool ended = have_ended(tracker, count);
	for (unsigned i = 0; i < count; i++) {
		if (ended)
			pthread_join(tracker->fault_threads[i].thread, NULL);
		else
			pthread_detach(tracker->fault_threads[i].thread);
	}
	// One reads a file that somebody put in the place of ours, and may do so for ever. It keeps the memory it
	// stands on.
	if (!ended)
		atomic_fetch_add(&tracker->references, 1);
}
