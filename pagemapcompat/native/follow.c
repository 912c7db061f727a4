// Where the fault threads run.
//
// If a fault thread runs on its writer's CPU a fault takes two switches of context. If not, each has to wake the
// other's CPU, which takes up to 10 times as long where that is idle, or a virtual one; and the scheduler leaves the
// thread wherever it was.
//
// Where a tracker is made on two CPUs, each has a fault thread of its own. Every message wakes both, and the one beside
// the writer is nearly always first; the other one keeps the scheduler from taking its CPU for an idle one, to which it
// would send the writer as it wakes (kernel/sched/fair.c: select_idle_sibling). They are SCHED_BATCH, so that the one
// that is not needed takes no time from a program that keeps its CPU busy.
//
// On more CPUs each message would wake them all. There is one thread then, and while it has one writer it looks where
// that runs, and ties itself to the CPU. A look takes about as long as a fault: the first comes after LOOK_FIRST
// faults, the next after twice as many, in the end each LOOK_EVERY. A writer that has moved at each look is left alone,
// and so are several that take turns.
//
// One that is SCHED_IDLE would keep any writer on its CPU, for what runs nothing else counts as idle (sched_idle_cpu).
// But pushed aside with a message in its hands it left its writer for 1.3 s, beside three busy threads a CPU (6.18.44).
//
// The threads stay on the CPUs that they were given: those of the thread that made the tracker, or what somebody sets
// later, unless that is the very CPU one is tied to, which looks the same.
//
// Where a thread is, /proc tells. To open a file there takes a lock of its directory, which a thread may hold that
// waits for this one; reading a file that is open takes none but its own (fs/proc/array.c: do_task_stat, 5.10 to 6.18).
// So whoever scans or resets opens it.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"

#define LOOK_FIRST 8 // faults in a row before the first look
#define LOOK_EVERY 32
#define MOVES 4 // in a row: it is moved whenever it wakes
#define REST 5000 // faults without a look, after that

// ---- Before they are started ------------------------------------------------------------------------------------

// -1: it has ended, or is none of this process.
static int open_stat(uint32_t thread, struct file_id *id)
{
	char path[64];
	snprintf(path, sizeof(path), "/proc/self/task/%u/stat", thread);
	int stat = open(path, O_RDONLY | O_CLOEXEC);
	*id = (struct file_id){ 0 };
	(void)pmc_file_id(stat, id); // where that fails it is closed whatever has its number
	return stat;
}

void pmc_follower_start(struct follower *follower)
{
	// Whoever makes a tracker is likely to be a writer; and so there is one descriptor from the first to the last.
	follower->known = (uint32_t)syscall(SYS_gettid);
	follower->stat = open_stat(follower->known, &follower->stat_file);
	follower->wait = LOOK_FIRST;
	follower->cpu = PMC_NO_CPU;
}

unsigned pmc_place(struct pmc_tracker *tracker)
{
	struct cpus given = { 0 }; // the kernel fills in as many as it has
	unsigned count = 0;
	bool tied = tracker->abilities & PMC_CAN_TIE && !sched_getaffinity(0, sizeof(given), (cpu_set_t *)&given);
	for (uint32_t cpu = 0; tied && cpu < PMC_CPUS; cpu++) {
		if (!bit_test(given.bits, cpu))
			continue;
		if (count < PMC_FAULT_THREADS)
			tracker->fault_threads[count].cpu = cpu;
		count++;
	}
	if (count > 1 && count <= PMC_FAULT_THREADS) {
		tracker->follower.given = given;
		return count;
	}
	tracker->fault_threads[0].cpu = PMC_NO_CPU;
	return 1;
}

// ---- Whose file is open -----------------------------------------------------------------------------------------

// The file of a thread says its number first. One that does not is somebody else's, put in the place of ours.
static bool is_of(const char *text, uint32_t thread)
{
	char *end;
	return strtoul(text, &end, 10) == thread && *end == ' ';
}

void pmc_follower_close(struct follower *follower)
{
	pmc_close_file(&follower->stat, follower->stat_file);
}

void pmc_find_writer(struct pmc_tracker *tracker)
{
	struct follower *follower = &tracker->follower;
	uint32_t wanted = atomic_load_explicit(&follower->wanted, memory_order_relaxed);
	if (!wanted)
		return;
	sigset_t signals;
	struct file_id id, old_id = follower->stat_file;
	int stat = open_stat(wanted, &id); // if it is not to be had nobody looks for it again
	pmc_hold_fault_threads(tracker, &signals);
	int old = follower->stat;
	follower->stat = stat;
	follower->stat_file = id;
	follower->known = wanted;
	atomic_store_explicit(&follower->wanted, 0, memory_order_relaxed);
	pmc_release_fault_threads(tracker, &signals);
	pmc_close_file(&old, old_id);
}

// ---- In the fault threads ------------------------------------------------------------------------------------------

// The CPU that a thread last ran on, by "tid (name) state ...": the name may hold anything, and processor is the 37th
// field behind it (proc_pid_stat(5)).
static uint32_t parse_cpu(const char *text)
{
	const char *at = strrchr(text, ')');
	for (int field = 0; field < 37 && at; field++)
		at = strchr(at + 1, ' ');
	unsigned long cpu = at ? strtoul(at, NULL, 10) : PMC_NO_CPU;
	return cpu < PMC_CPUS ? (uint32_t)cpu : PMC_NO_CPU;
}

static uint32_t look(struct pmc_tracker *tracker, uint32_t thread)
{
	struct follower *follower = &tracker->follower;
	uint32_t cpu = PMC_NO_CPU;
	char text[1024];
	pmc_fair_lock(&tracker->fault_lock);
	if (follower->known != thread) {
		atomic_store_explicit(&follower->wanted, thread, memory_order_relaxed);
	} else if (follower->stat >= 0) {
		ssize_t got = pread(follower->stat, text, sizeof(text) - 1, 0);
		int error = got < 0 ? errno : 0;
		text[got < 0 ? 0 : got] = 0;
		if (error == ESRCH) // it has ended, and another has its number
			atomic_store_explicit(&follower->wanted, thread, memory_order_relaxed);
		else if (got > 0 && is_of(text, thread))
			cpu = parse_cpu(text);
		else if (got > 0 || (error && error != EINTR && error != ENOMEM))
			follower->stat = -1; // and is not ours to close
	}
	pmc_fair_unlock(&tracker->fault_lock);
	return cpu;
}

void pmc_settle(struct fault_thread *self)
{
	struct pmc_tracker *tracker = self->tracker;
	struct cpus tied = { 0 };
	struct sched_param no_priority = { 0 };
	if (self->cpu == PMC_NO_CPU)
		return;
	bit_set(tied.bits, self->cpu);
	pmc_fair_lock(&tracker->fault_lock);
	// A thread that cannot be had there, or not so, serves wherever it is.
	if (!tracker->untied && !sched_setaffinity(0, sizeof(tied), (cpu_set_t *)&tied))
		self->id = (uint32_t)syscall(SYS_gettid);
	pmc_fair_unlock(&tracker->fault_lock);
	// By number: musl's functions refuse. And what whoever made the tracker has chosen stays.
	if (syscall(SYS_sched_getscheduler, 0) == SCHED_OTHER)
		(void)syscall(SYS_sched_setscheduler, 0, SCHED_BATCH, &no_priority);
}

// Before anything may have a thread let go of the file, if the descriptor was lost. Until the last one has released it,
// writers come back from their faults to fault again, inside the kernel and, where that does not preempt itself, for
// ever if the one that releases may run on their CPU alone (fs/userfaultfd.c, handle_userfault: ctx->released; seen on
// 6.18.44).
void pmc_untie(struct pmc_tracker *tracker)
{
	tracker->untied = true;
	for (unsigned i = 0; i < PMC_FAULT_THREADS; i++)
		if (tracker->fault_threads[i].id)
			(void)sched_setaffinity((pid_t)tracker->fault_threads[i].id, sizeof(struct cpus),
						(cpu_set_t *)&tracker->follower.given);
}

// Ties the thread to a CPU, or with PMC_NO_CPU no more. What fails leaves it tied, or not, as it was, and is tried
// again.
static void tie(struct follower *follower, uint32_t cpu)
{
	struct cpus now = { 0 }, tied = { 0 }; // the kernel fills in as many as it has
	if (cpu == follower->cpu || sched_getaffinity(0, sizeof(now), (cpu_set_t *)&now))
		return;
	// What it is tied to is all that it may use, unless somebody else had a say meanwhile: then that holds.
	if (follower->cpu != PMC_NO_CPU)
		bit_set(tied.bits, follower->cpu);
	if (memcmp(&now, &tied, sizeof(now)) != 0) {
		follower->given = now;
		follower->cpu = PMC_NO_CPU;
	}
	if (cpu != PMC_NO_CPU && bit_test(follower->given.bits, cpu)) {
		memset(&tied, 0, sizeof(tied));
		bit_set(tied.bits, cpu);
		if (!sched_setaffinity(0, sizeof(tied), (cpu_set_t *)&tied)) {
			follower->cpu = cpu;
			return;
		}
	}
	if (follower->cpu != PMC_NO_CPU && !sched_setaffinity(0, sizeof(now), (cpu_set_t *)&follower->given))
		follower->cpu = PMC_NO_CPU;
}

void pmc_follow(struct pmc_tracker *tracker, uint32_t thread)
{
	struct follower *follower = &tracker->follower;
	if (thread != follower->thread) {
		tie(follower, PMC_NO_CPU);
		follower->thread = thread;
		follower->faults = follower->moves = 0;
		follower->wait = LOOK_FIRST;
	}
	// 0 where the handshake did not ask for it.
	if (!thread || ++follower->faults < follower->wait)
		return;
	follower->faults = 0;
	uint32_t cpu = look(tracker, thread), before = follower->cpu;
	tie(follower, cpu);
	if (follower->cpu == before) {
		follower->moves = 0;
		follower->wait = (uint32_t)min_u64(2 * follower->wait, LOOK_EVERY);
	} else if (++follower->moves < MOVES) {
		follower->wait = LOOK_FIRST;
	} else {
		tie(follower, PMC_NO_CPU);
		follower->moves = 0;
		follower->wait = REST;
	}
}
