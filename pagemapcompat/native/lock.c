// The locks between fault threads and whoever needs pages to stay protected, or closes a range.
#define _GNU_SOURCE
#include <linux/futex.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"

void pmc_fair_lock(struct fair_lock *lock)
{
	unsigned ticket = atomic_fetch_add_explicit(&lock->next, 1, memory_order_relaxed);
	for (;;) {
		unsigned serving = atomic_load_explicit(&lock->serving, memory_order_acquire);
		if (serving == ticket)
			return;
		syscall(SYS_futex, &lock->serving, FUTEX_WAIT_PRIVATE, serving, NULL, NULL, 0);
	}
}

void pmc_fair_unlock(struct fair_lock *lock)
{
	unsigned serving = atomic_fetch_add(&lock->serving, 1) + 1;
	if (atomic_load(&lock->next) != serving)
		syscall(SYS_futex, &lock->serving, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

void pmc_hold_fault_threads(struct pmc_tracker *tracker, sigset_t *before)
{
	sigset_t all;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, before);
	pmc_fair_lock(&tracker->fault_lock);
}

void pmc_release_fault_threads(struct pmc_tracker *tracker, const sigset_t *before)
{
	pmc_fair_unlock(&tracker->fault_lock);
	pthread_sigmask(SIG_SETMASK, before, NULL);
}
