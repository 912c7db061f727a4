"""The kernel's vocabulary, spelled out, with sources. A test holds every number against the compiled one."""

from __future__ import annotations

from enum import Enum, Flag, IntFlag


class PageCategory(IntFlag):
    """What PAGEMAP_SCAN can say of a page (`include/uapi/linux/fs.h`, since Linux 6.7). Unknown bits pass through."""

    WPALLOWED = 1 << 0
    """Registered for asynchronous write-protection."""
    WRITTEN = 1 << 1
    """Not known to be unchanged since it was last write-protected."""
    FILE = 1 << 2
    """Not anonymous."""
    PRESENT = 1 << 3
    """In memory."""
    SWAPPED = 1 << 4
    """A swap entry, a migration entry, or a marker: an empty page that is write-protected is SWAPPED too."""
    PFNZERO = 1 << 5
    """The zero page; the huge one since Linux 6.16."""
    HUGE = 1 << 6
    """Part of a huge page that is mapped as one."""
    SOFT_DIRTY = 1 << 7
    """Since Linux 6.8 (e6a9a2cbc13b). Accepted, and never set, on kernels built without soft-dirty."""
    GUARD = 1 << 8
    """A MADV_GUARD_INSTALL page, since Linux 6.16."""


class EntryFlag(IntFlag):
    """The flag bits of a /proc/PID/pagemap word (`Documentation/admin-guide/mm/pagemap.rst`)."""

    SOFT_DIRTY = 1 << 55
    """Since Linux 3.11."""
    EXCLUSIVE = 1 << 56
    """Mapped once, since Linux 4.2."""
    UFFD_WP = 1 << 57
    """Write-protected through a userfaultfd, since Linux 5.14 (fb8e37f35a2f)."""
    GUARD = 1 << 58
    """Since Linux 6.15."""
    FILE = 1 << 61
    """A file's page or shared anonymous memory; also the huge zero page."""
    SWAPPED = 1 << 62
    """A swap entry, a migration entry or a marker."""
    PRESENT = 1 << 63
    """In memory."""


class UffdFeature(IntFlag):
    """The userfaultfd features this library asks for (`include/uapi/linux/userfaultfd.h`)."""

    PAGEFAULT_FLAG_WP = 1 << 0
    """Since Linux 5.7."""
    WP_HUGETLBFS_SHMEM = 1 << 12
    """Since Linux 5.19."""
    WP_UNPOPULATED = 1 << 13
    """Since Linux 6.4."""
    WP_ASYNC = 1 << 15
    """Since Linux 6.7 (d61ea1cb0095)."""


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
    PAGEMAP_SCAN = "pagemap-scan"
    """The PAGEMAP_SCAN ioctl answers."""
    PAGEMAP_SCAN_HOLES = "pagemap-scan-holes"
    """It calls empty memory written, a discarded 2 MiB included."""
    UFFD_SYSCALL = "uffd-syscall"
    """userfaultfd(2) for faults in user and kernel mode."""
    UFFD_DEVICE = "uffd-device"
    """/dev/userfaultfd, likewise."""
    UFFD_USER_MODE_ONLY = "uffd-user-mode-only"
    """userfaultfd(2) for faults in user mode alone."""
    UFFD_WP = "uffd-wp-anonymous"
    """Private anonymous memory can be write-protected."""
    UFFD_WP_HUGETLBFS_SHMEM = "uffd-wp-hugetlbfs-shmem"
    """Shared and hugetlb memory can."""
    UFFD_WP_UNPOPULATED = "uffd-wp-unpopulated"
    """Empty private pages can carry a mark."""
    UFFD_WP_ASYNC = "uffd-wp-async"
    """The kernel resolves write faults itself."""
    UFFD_WP_MULTI_VMA = "uffd-wp-multi-vma"
    """UFFDIO_WRITEPROTECT takes a range of several mappings."""
    UFFD_WP_REMAP_CLEARS = "uffd-wp-remap-clears"
    """mremap takes the marks away with the registration."""
    PROCMAP_QUERY = "procmap-query"
    """Mappings can be asked for one by one."""
    MADV_POPULATE_READ = "madv-populate-read"
    """Empty pages can be populated without being written."""
    MADV_GUARD = "madv-guard"
    """Guard pages inside a mapping."""


class Guarantee(Flag):
    """What a backend promises.

    Without a promise it may be less precise or slower; it never calls a written page clean, but for what DISCARDS says.
    """

    EXACT = 1
    """With no writer running during the call, and no discard, KSM merge, remap, guard change or hugetlb memory since
    the last collect, the answer is exactly the pages stored to."""
    ATOMIC_COLLECT = 2
    """Reading and protecting a page again is one step for its writers. Per page: the range is no snapshot."""
    KERNEL_WRITES = 4
    """read, recv, io_uring (unpinned) and process_vm_writev into tracked memory succeed and are reported."""
    DISCARDS = 8
    """A page discarded, replaced or merged by the kernel and then written again is still reported."""
    NO_HELPER_THREAD = 16
    """No thread of the library's own runs in this process."""
