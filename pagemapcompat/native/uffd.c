// userfaultfd: one function per ioctl, and write-protection over any mix of mappings.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"

int pmc_uffd_open(int how)
{
	if (how == PMC_UFFD_DEVICE) {
		int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
		if (device < 0)
			return -errno;
		int uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
		int rc = uffd < 0 ? -errno : uffd;
		close(device);
		return rc;
	}
	int flags = O_CLOEXEC | O_NONBLOCK | (how == PMC_UFFD_USER_MODE_ONLY ? UFFD_USER_MODE_ONLY : 0);
	long uffd = syscall(SYS_userfaultfd, flags);
	return uffd < 0 ? -errno : (int)uffd;
}

int pmc_uffd_handshake(int uffd, uint64_t features, uint64_t *granted)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	if (ioctl(uffd, UFFDIO_API, &api))
		return -errno;
	*granted = api.features;
	return 0;
}

int pmc_uffd_register(int uffd, uint64_t start, uint64_t end, uint64_t *ioctls)
{
	struct uffdio_register arg = {
		.range = { start, end - start },
		.mode = UFFDIO_REGISTER_MODE_WP,
	};
	if (ioctl(uffd, UFFDIO_REGISTER, &arg))
		return -errno;
	*ioctls = arg.ioctls;
	return 0;
}

int pmc_uffd_unregister(int uffd, uint64_t start, uint64_t end)
{
	struct uffdio_range arg = { start, end - start };
	return ioctl(uffd, UFFDIO_UNREGISTER, &arg) ? -errno : 0;
}

int pmc_uffd_wake(int uffd, uint64_t start, uint64_t end)
{
	struct uffdio_range arg = { start, end - start };
	return ioctl(uffd, UFFDIO_WAKE, &arg) ? -errno : 0;
}

int pmc_uffd_writeprotect(int uffd, uint64_t start, uint64_t end, uint64_t mode)
{
	struct uffdio_writeprotect arg = {
		.range = { start, end - start },
		.mode = mode,
	};
	// EAGAIN only while an EVENT_* message is unread (mmap_changing), and none is ever asked for; EINTR is a
	// signal.
	int rc;
	do
		rc = ioctl(uffd, UFFDIO_WRITEPROTECT, &arg);
	while (rc && (errno == EINTR || errno == EAGAIN));
	return rc ? -errno : 0;
}

int pmc_uffd_is_registered(const struct pmc_tracker *tracker, uint64_t address, uint64_t size)
{
	// A copy that must fail. The kernel first looks for a mapping that has a userfaultfd, ENOENT without one; then
	// at the page, EEXIST; then reads the source, which nobody may, EFAULT; and only then would it change anything
	// (mm/userfaultfd.c: find_dst_vma, mfill_atomic; the same order in 5.10 and 6.18). ENOMEM is the answer for a
	// huge page where the pool is empty; for others, since 6.9, it may come before the first look
	// (find_vma_and_prepare_anon), and says nothing.
	struct uffdio_copy arg = {
		.dst = address,
		.src = (uint64_t)(uintptr_t)tracker->unreadable,
		.len = size,
		.mode = UFFDIO_COPY_MODE_DONTWAKE,
	};
	int rc;
	do
		rc = ioctl(tracker->uffd, UFFDIO_COPY, &arg);
	while (rc && (errno == EINTR || errno == EAGAIN));
	if (!rc || errno == EFAULT || errno == EEXIST || (errno == ENOMEM && size > page_size_of(tracker)))
		return 1;
	return errno == ENOENT ? 0 : -errno;
}

int pmc_munlock(uint64_t start, uint64_t end)
{
	return munlock((void *)(uintptr_t)start, end - start) ? -errno : 0;
}

int pmc_dumpable(void)
{
	int state = prctl(PR_GET_DUMPABLE, 0, 0, 0, 0);
	return state < 0 ? -errno : state;
}

int pmc_madvise(uint64_t start, uint64_t end, int advice)
{
	return madvise((void *)(uintptr_t)start, end - start, advice) ? -errno : 0;
}

int pmc_mprotect(uint64_t start, uint64_t end, int protection)
{
	return mprotect((void *)(uintptr_t)start, end - start, protection) ? -errno : 0;
}

// One mapping after the other: what kernels before 6.4 need (a1b92a3f1498 let one call span mappings), and what finds
// the culprit on any. They refuse also a mapping that was split since it was read, which another thread's mprotect may
// do again and again; so a refusal is tried anew with what is mapped now, then with half as much. A page is never
// split: refused again, it is not registered.
static int protect_each(struct pmc_tracker *tracker, uint64_t start, uint64_t end, uint64_t unit,
			uint64_t mode, uint64_t *untracked)
{
	uint64_t pos = start, most = UINT64_MAX, refused = UINT64_MAX;

	while (pos < end) {
		struct vma vma;
		int rc = pmc_find_vma(tracker, pos, &vma);
		if (rc < 0)
			return rc;
		if (!rc || vma.start >= end)
			return 0;
		uint64_t from = max_u64(vma.start, pos), to = min_u64(vma.end, end);
		if (to - from > most)
			to = from + most;
		rc = pmc_uffd_writeprotect(tracker->uffd, from, to, mode);
		if (rc && rc != -ENOENT)
			return rc;
		if (!rc) {
			pos = to;
			most = UINT64_MAX;
			continue;
		}
		if (from == refused && to - from <= unit) {
			*untracked = from;
			return -ENOENT;
		}
		if (from == refused)
			most = max_u64(align_down((to - from) / 2, unit), unit);
		refused = from;
		pmc_vmas_refresh(&tracker->vmas);
	}
	return 0;
}

int pmc_protect(struct pmc_tracker *tracker, uint64_t start, uint64_t end, uint32_t unit_shift, int protect,
		uint64_t *untracked)
{
	// Un-protecting wakes nobody here: a fault thread may have read a writer's message already, and would open its
	// page late, when that is protected again.
	uint64_t mode = protect ? UFFDIO_WRITEPROTECT_MODE_WP : UFFDIO_WRITEPROTECT_MODE_DONTWAKE;
	*untracked = end;
	tracker->operation = "UFFDIO_WRITEPROTECT";
	if (tracker->abilities & PMC_CAN_SPAN_VMAS) {
		int rc = pmc_uffd_writeprotect(tracker->uffd, start, end, mode);
		if (rc != -ENOENT)
			return rc;
		pmc_vmas_refresh(&tracker->vmas);
	}
	return protect_each(tracker, start, end, 1ull << unit_shift, mode, untracked);
}

int pmc_unregister_all(struct pmc_tracker *tracker, struct vmas *vmas, uint64_t start, uint64_t end)
{
	int first = pmc_uffd_unregister(tracker->uffd, start, end);
	if (first == -EINVAL) {
		// Nothing is mapped, or something that no userfaultfd may hold was mapped in a hole: the kernel then
		// refuses the whole call, and leaving the rest registered would leave its writers asleep.
		struct vma vma;
		uint64_t pos = start;
		int found = 0;
		first = 0;
		pmc_vmas_refresh(vmas);
		while (pos < end && (found = pmc_own_vma_at(vmas, pos, &vma)) > 0 && vma.start < end) {
			pos = min_u64(vma.end, end);
			int rc = pmc_uffd_unregister(tracker->uffd, max_u64(vma.start, start), pos);
			if (rc != -EINVAL && !first)
				first = rc;
		}
		if (found < 0 && !first)
			first = found;
	}
	// A writer that waits where a munmap has just been is in no mapping that UNREGISTER could find.
	int rc = pmc_uffd_wake(tracker->uffd, start, end);
	return first ? first : rc;
}

int pmc_mremap_pages(uint64_t from, uint64_t to, uint64_t length)
{
	int flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP; // the last since 5.7
	void *moved = mremap((void *)(uintptr_t)from, length, length, flags, (void *)(uintptr_t)to);
	return moved == MAP_FAILED ? -errno : 0;
}
