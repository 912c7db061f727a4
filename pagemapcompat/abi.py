"""The kernel's vocabulary, spelled out, with sources. A test holds every number against the compiled one."""

from __future__ import annotations

from enum import Enum, Flag, IntFlag


class PageCategory(IntFlag):
    """What PAGEMAP_SCAN can say of a page (`include/uapi/linux/fs.h`, since Linux 6.7). Unknown bits pass through.

    Attributes:
        WPALLOWED: Registered for asynchronous write-protection.

        WRITTEN: Not known to be unchanged since it was last write-protected.

        FILE: Not anonymous.

        PRESENT: In memory.

        SWAPPED: A swap entry, a migration entry, or a marker: an empty page that is write-protected is SWAPPED too.

        PFNZERO: The zero page; the huge one since Linux 6.16.

        HUGE: Part of a huge page that is mapped as one.

        SOFT_DIRTY: Since Linux 6.8 (e6a9a2cbc13b). Accepted, and never set, on kernels built without soft-dirty.

        GUARD: A MADV_GUARD_INSTALL page, since Linux 6.16.
    """

    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7
    GUARD = 1 << 8


class EntryFlag(IntFlag):
    """The flag bits of a /proc/PID/pagemap word (`Documentation/admin-guide/mm/pagemap.rst`).

    Attributes:
        SOFT_DIRTY: Since Linux 3.11.

        EXCLUSIVE: Mapped once, since Linux 4.2.

        UFFD_WP: Write-protected through a userfaultfd, since Linux 5.14 (fb8e37f35a2f).

        GUARD: Since Linux 6.15.

        FILE: A file's page or shared anonymous memory; also the huge zero page.

        SWAPPED: A swap entry, a migration entry or a marker.

        PRESENT: In memory.
    """

    SOFT_DIRTY = 1 << 55
    EXCLUSIVE = 1 << 56
    UFFD_WP = 1 << 57
    GUARD = 1 << 58
    FILE = 1 << 61
    SWAPPED = 1 << 62
    PRESENT = 1 << 63


PFN_MASK = (1 << 55) - 1
"""The bits of such a word that say which page frame, or which swap entry."""


class UffdFeature(IntFlag):
    """The features of UFFDIO_API (`include/uapi/linux/userfaultfd.h`). Unknown bits pass through.

    This library asks for those with WP in their names alone.
    """

    PAGEFAULT_FLAG_WP = 1 << 0
    """Since Linux 5.7."""
    EVENT_FORK = 1 << 1
    """Needs CAP_SYS_PTRACE."""
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    """Since Linux 5.13."""
    MINOR_SHMEM = 1 << 10
    """Since Linux 5.14."""
    EXACT_ADDRESS = 1 << 11
    """Since Linux 5.18."""
    WP_HUGETLBFS_SHMEM = 1 << 12
    """Since Linux 5.19."""
    WP_UNPOPULATED = 1 << 13
    """Since Linux 6.4."""
    POISON = 1 << 14
    """Since Linux 6.6."""
    WP_ASYNC = 1 << 15
    """Since Linux 6.7 (d61ea1cb0095)."""
    MOVE = 1 << 16
    """Since Linux 6.8."""


class Feature(Enum):
    """What a kernel may let this process do. Values are the names used by the command line and the environment."""

    PAGEMAP = "pagemap"
    """/proc/self/pagemap can be opened."""
    PAGEMAP_UFFD_WP = "pagemap-uffd-wp"
    """Bit 57 of its words shows write-protection."""
    PAGEMAP_SOFT_DIRTY = "pagemap-soft-dirty"
    """Bit 55 shows soft-dirty."""
    PAGEMAP_GUARD = "pagemap-guard"
    """Bit 58 shows guard pages."""
    PAGEMAP_PFN = "pagemap-pfn"
    """Its words show page frame numbers."""
    SOFT_DIRTY = "soft-dirty"
    """clear_refs clears soft-dirty, and a store sets it again. Tried by the command line alone: it is process-wide."""
    PAGEMAP_SCAN = "pagemap-scan"
    """The PAGEMAP_SCAN ioctl answers."""
    PAGEMAP_SCAN_DISCARDS = "pagemap-scan-discards"
    """It calls a discarded page written."""
    PAGEMAP_SCAN_HOLES = "pagemap-scan-holes"
    """It calls empty memory written, a discarded 2 MiB included."""
    CATEGORY_WPALLOWED = "category-wpallowed"
    """It knows PAGE_IS_WPALLOWED; and so on."""
    CATEGORY_WRITTEN = "category-written"
    CATEGORY_FILE = "category-file"
    CATEGORY_PRESENT = "category-present"
    CATEGORY_SWAPPED = "category-swapped"
    CATEGORY_PFNZERO = "category-pfnzero"
    CATEGORY_HUGE = "category-huge"
    CATEGORY_SOFT_DIRTY = "category-soft-dirty"
    CATEGORY_GUARD = "category-guard"
    UFFD_SYSCALL = "uffd-syscall"
    """userfaultfd(2) for faults in user and kernel mode."""
    UFFD_DEVICE = "uffd-device"
    """/dev/userfaultfd, likewise."""
    UFFD_USER_MODE_ONLY = "uffd-user-mode-only"
    """userfaultfd(2) for faults in user mode alone."""
    UFFD_EVENT_FORK = "uffd-event-fork"
    """UFFDIO_API grants EVENT_FORK; and so on, for what this library does not use."""
    UFFD_EVENT_REMAP = "uffd-event-remap"
    UFFD_EVENT_REMOVE = "uffd-event-remove"
    UFFD_EVENT_UNMAP = "uffd-event-unmap"
    UFFD_MISSING_HUGETLBFS = "uffd-missing-hugetlbfs"
    UFFD_MISSING_SHMEM = "uffd-missing-shmem"
    UFFD_MINOR_HUGETLBFS = "uffd-minor-hugetlbfs"
    UFFD_MINOR_SHMEM = "uffd-minor-shmem"
    UFFD_SIGBUS = "uffd-sigbus"
    UFFD_THREAD_ID = "uffd-thread-id"
    UFFD_EXACT_ADDRESS = "uffd-exact-address"
    UFFD_POISON = "uffd-poison"
    UFFD_MOVE = "uffd-move"
    UFFD_WP = "uffd-wp-anonymous"
    """Private anonymous memory can be write-protected."""
    UFFD_WP_SHARED = "uffd-wp-shared"
    """Shared anonymous memory can."""
    UFFD_WP_MEMFD = "uffd-wp-memfd"
    """memfd_create(2)'s can."""
    UFFD_WP_HUGETLB = "uffd-wp-hugetlb"
    """hugetlb memory can."""
    UFFD_WP_PRIVATE_FILE = "uffd-wp-private-file"
    """A private mapping of a file can; by WP_ASYNC alone."""
    UFFD_WP_SHARED_FILE = "uffd-wp-shared-file"
    """A shared one can; likewise."""
    UFFD_WP_HUGETLBFS_SHMEM = "uffd-wp-hugetlbfs-shmem"
    """UFFDIO_API grants write-protection of shared and hugetlb memory."""
    UFFD_WP_UNPOPULATED = "uffd-wp-unpopulated"
    """Empty private pages can carry a mark."""
    UFFD_WP_ASYNC = "uffd-wp-async"
    """The kernel resolves write faults itself."""
    UFFD_WP_MULTI_VMA = "uffd-wp-multi-vma"
    """UFFDIO_WRITEPROTECT takes a range of several mappings."""
    UFFD_WP_REMAP_CLEARS = "uffd-wp-remap-clears"
    """mremap takes the marks away with the registration."""
    UFFD_WP_KERNEL_WRITES = "uffd-wp-kernel-writes"
    """read(2) into a protected page succeeds, resolved by a thread."""
    UFFD_WP_ASYNC_KERNEL_WRITES = "uffd-wp-async-kernel-writes"
    """read(2) into a protected page succeeds, resolved by the kernel."""
    PROCMAP_QUERY = "procmap-query"
    """Mappings can be asked for one by one."""
    MADV_POPULATE_READ = "madv-populate-read"
    """Empty pages can be populated without being written."""
    MADV_GUARD = "madv-guard"
    """Guard pages inside a mapping."""


def category_feature(category: PageCategory) -> Feature:
    """Whether PAGEMAP_SCAN knows *category*, one with a name."""
    return Feature[f"CATEGORY_{category.name}"]


class Guarantee(Flag):
    """What a backend promises.

    Without a promise it may be less precise or slower; it never calls a written page clean, but for what DISCARDS
    says, and for what the README lists as outside the promises.

    Attributes:
        EXACT: With no writer running during the call, and no discard, KSM merge, remap, guard change or hugetlb memory
            since the last collect, nor before 6.4 the opening of empty pages that were barred (PROT_NONE), the answer
            is exactly the pages stored to. `TrackedRange.guarantees` lacks it where memory cannot give it, as a great
            reserve.

        ATOMIC_COLLECT: Reading and protecting a page again is one step for its writers. Per page: the range is no
            snapshot.

        KERNEL_WRITES: read, recv, io_uring (unpinned) and process_vm_writev into tracked memory succeed and are
            reported.

        DISCARDS: A page discarded, replaced or merged by the kernel and then written again is still reported. Private
            mappings of files lack it: a discard, which gives them the file's content again, is not reported.

        NO_HELPER_THREAD: No thread of the library's own runs in this process.
    """

    EXACT = 1
    ATOMIC_COLLECT = 2
    KERNEL_WRITES = 4
    DISCARDS = 8
    NO_HELPER_THREAD = 16
