"""The trials: each finds out one feature by doing it, in throw-away memory, never by version.

None of them makes a signal or a child, touches a tracker, or leaves a descriptor, a mapping or a thread behind.
"""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from errno import EACCES, EFAULT, EFBIG, EINVAL, ENODEV, ENOENT, ENOSYS, ENOTTY, ENXIO, EOPNOTSUPP, EPERM
from pathlib import Path
from struct import unpack
from typing import Literal

from pagemapcompat import _kernel
from pagemapcompat.abi import EntryFlag, Feature, PageCategory, UffdFeature
from pagemapcompat.memory import PAGE_SHIFT, page_size
from pagemapcompat.userfaultfd import Way, open_hint, open_userfaultfd

State = Literal["yes", "no", "denied", "disabled", "unknown"]

_HUGE = page_size() * (page_size() // 8)
"""What one page table of the lowest level maps."""
_PFN_MASK = (1 << 55) - 1
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _kernel.MAP_NORESERVE
_ABSENT = {ENOENT, ENODEV, ENXIO, ENOSYS, EINVAL, ENOTTY, EOPNOTSUPP}
"""What a kernel says that does not have a call, or a device, or a part of either."""
_DENIED = {EPERM, EACCES}
_SINCE = {
    UffdFeature.MINOR_HUGETLBFS: "5.13",
    UffdFeature.MINOR_SHMEM: "5.14",
    UffdFeature.EXACT_ADDRESS: "5.18",
    UffdFeature.WP_HUGETLBFS_SHMEM: "5.19",
    UffdFeature.POISON: "6.6",
    UffdFeature.WP_ASYNC: "6.7",
    UffdFeature.MOVE: "6.8",
}
"""For hints; nothing is decided by it."""

Answer = tuple[State, int | None, str, str | None]
"""State, errno, one sentence, and for anything but yes what to change."""
Trial = Callable[["Laboratory"], Answer]


def _yes(detail: str) -> Answer:
    return "yes", None, detail, None


class Laboratory:
    """Throw-away memory and descriptors for one round of trials. Nothing in it outlives the round."""

    def __init__(self) -> None:
        self.pagemap = -1
        self.answers: dict[Feature, Answer] = {}
        self.way: Way | None = None
        """The best way to open a userfaultfd."""
        self.written: tuple[int, int, int, int] | None = None
        """How many bytes the ioctl calls written, see `_scan_answers`."""

    def close(self) -> None:
        """End the round."""
        if self.pagemap >= 0:
            os.close(self.pagemap)

    def word(self, address: int) -> int:
        """The pagemap word of the page at *address*."""
        (value,) = unpack("=Q", os.pread(self.pagemap, 8, (address >> PAGE_SHIFT) * 8))
        return int(value)

    def has(self, feature: Feature) -> bool:
        """Whether an earlier answer was yes."""
        return self.answers[feature][0] == "yes"

    def lacks(self, *features: Feature) -> Answer | None:
        """The answer for whatever builds on something that is not there, or of which nobody knows whether it is."""
        missing = [feature for feature in features if not self.has(feature)]
        for feature in missing:
            state, number, _, hint = self.answers[feature]
            if state == "no":
                return "no", number, f"it needs {feature.value}, which is not there", hint
        for feature in missing:
            return "unknown", None, f"it needs {feature.value}", self.answers[feature][3]
        return None

    @contextmanager
    def memory(self, length: int) -> Iterator[tuple[int, memoryview]]:
        """*length* bytes of empty private anonymous memory that begin on a 2 MiB boundary: (address, view)."""
        with _mapping(length + _HUGE) as (address, whole):
            start = address + -address % _HUGE
            # mlockall(MCL_FUTURE) populates and locks it, and locked memory takes neither discards nor guard pages.
            _kernel.munlock(start, start + length)
            _kernel.madvise(start, start + length, mmap.MADV_DONTNEED)
            with whole[start - address : start - address + length] as view:
                yield start, view

    @contextmanager
    def uffd(self, features: UffdFeature) -> Iterator[int]:
        """A userfaultfd with *features*. Nothing ever writes to what it protects: nobody would answer."""
        assert self.way is not None  # noqa: S101 - lacks() saw to it
        fd, _, attempt = open_userfaultfd(self.way, features)
        if fd < 0:
            raise OSError(attempt.errno, str(attempt))
        try:
            yield fd
        finally:
            os.close(fd)


@contextmanager
def _mapping(length: int, flags: int = _PRIVATE, fd: int = -1) -> Iterator[tuple[int, memoryview]]:
    with mmap.mmap(fd, length, flags=flags) as area, memoryview(area) as view:
        held = _kernel.Pin(view)
        try:
            yield held.address, view
        finally:
            held.release()


def _check(rc: int, call: str) -> int:
    if rc < 0:
        raise OSError(-rc, call)
    return rc


def _pagemap(lab: Laboratory) -> Answer:
    try:
        lab.pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _DENIED:
            hint = "this process is not dumpable, as after dropping privileges: prctl(PR_SET_DUMPABLE, 1)"
            return "denied", error.errno, "/proc/self/pagemap may not be opened", hint
        if error.errno not in _ABSENT:
            raise
        hint = "mount /proc; a kernel needs CONFIG_PROC_PAGE_MONITOR"
        return "no", error.errno, "/proc/self/pagemap cannot be opened", hint
    return _yes("/proc/self/pagemap opens")


def _opens(way: Way) -> Trial:
    def answer(lab: Laboratory) -> Answer:
        fd, _, attempt = open_userfaultfd(way, UffdFeature(0))
        if fd < 0 and attempt.errno not in _ABSENT | _DENIED:
            raise OSError(attempt.errno, os.strerror(attempt.errno))
        if fd < 0:
            state: State = "denied" if attempt.errno in _DENIED else "no"
            return state, attempt.errno, f"{attempt.call} fails", open_hint(attempt)
        os.close(fd)
        lab.way = lab.way or way
        return _yes(f"{attempt.call} opens")

    return answer


def _offers(feature: UffdFeature) -> Trial:
    def answer(lab: Laboratory) -> Answer:
        if lab.way is None:
            _, number, _, hint = lab.answers[Feature.UFFD_USER_MODE_ONLY]
            # If one of them is there, and not for this process, nobody knows what it could do.
            absent = all(lab.answers[way.feature][0] == "no" for way in Way)
            return "no" if absent else "unknown", number, "no userfaultfd can be opened", hint
        fd, _, attempt = open_userfaultfd(lab.way, feature)
        if fd < 0 and attempt.errno in _DENIED:
            return "denied", attempt.errno, f"UFFDIO_API refuses {feature.name}", _PTRACE
        if fd < 0 and attempt.errno not in _ABSENT:
            raise OSError(attempt.errno, os.strerror(attempt.errno))
        if fd < 0:
            since = f"Linux {_SINCE[feature]} or newer" if feature in _SINCE else open_hint(attempt)
            return "no", attempt.errno, f"UFFDIO_API refuses {feature.name}", since
        os.close(fd)
        return _yes(f"UFFDIO_API grants {feature.name}")

    return answer


def _uffd_wp(lab: Laboratory) -> Answer:
    answer = _offers(UffdFeature.PAGEFAULT_FLAG_WP)(lab)
    if answer[0] != "yes":
        return answer
    with lab.uffd(UffdFeature.PAGEFAULT_FLAG_WP) as uffd, lab.memory(page_size()) as (at, _):
        rc, _ = _kernel.uffd_register(uffd, at, at + page_size())
        if -rc in _ABSENT:
            hint = "a kernel whose architecture has userfaultfd write-protection"
            return "no", -rc, "UFFDIO_REGISTER refuses write-protection of private anonymous memory", hint
        _check(rc, "UFFDIO_REGISTER")
    return _yes("private anonymous memory can be write-protected")


@contextmanager
def _shared() -> Iterator[int]:
    with _mapping(page_size(), mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as (at, _):
        yield at


@contextmanager
def _memfd() -> Iterator[int]:
    fd = os.memfd_create("pagemapcompat")
    try:
        _check_file_size()
        os.ftruncate(fd, page_size())
        with _mapping(page_size(), mmap.MAP_SHARED, fd) as (at, _):
            yield at
    finally:
        os.close(fd)


@contextmanager
def _hugetlb() -> Iterator[int]:
    # No page is taken from the reserve, which may well be empty.
    flags = _PRIVATE | _kernel.MAP_HUGETLB | _kernel.MAP_NORESERVE
    with _mapping(huge_page_size(), flags) as (at, _):
        yield at


def huge_page_size() -> int:
    """What MAP_HUGETLB gives, in bytes; 0 where there is none. Source: proc_meminfo(5)."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("Hugepagesize:"):
            return int(line.split()[1]) << 10
    return 0


@contextmanager
def _private_file() -> Iterator[int]:
    # Any file will do, for nothing is written to it: this one.
    fd = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check_on_disk(fd)
        with _mapping(page_size(), mmap.MAP_PRIVATE, fd) as (at, _):
            yield at
    finally:
        os.close(fd)


@contextmanager
def _shared_file() -> Iterator[int]:
    fd = _scratch_file()
    try:
        _check_file_size()
        os.ftruncate(fd, page_size())
        with _mapping(page_size(), mmap.MAP_SHARED, fd) as (at, _):
            yield at
    finally:
        os.close(fd)


class _NowhereError(OSError):
    """There is no place to try in."""


def _scratch_file() -> int:
    """A file on a disk that no folder lists."""
    for folder in ("/var/tmp", os.environ.get("TMPDIR", "/tmp")):  # noqa: S108 - no name is ever in it
        with suppress(OSError):
            fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
            try:
                _check_on_disk(fd)
            except OSError:
                os.close(fd)
                raise
            return fd
    raise _NowhereError(ENOENT, "neither /var/tmp nor TMPDIR is a folder on a disk that takes O_TMPFILE")


def _check_on_disk(fd: int) -> None:
    """The pages of a tmpfs are shared memory, and no file's."""
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == number and rest.split()[0] in {"tmpfs", "devtmpfs", "hugetlbfs"}:
            raise _NowhereError(ENOENT, "the file is in memory, and not on a disk")


def _check_file_size() -> None:
    """A file that grows beyond RLIMIT_FSIZE is a SIGXFSZ."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and limit < page_size():
        raise OSError(EFBIG, "RLIMIT_FSIZE is below a page")


def _registers(
    make: Callable[[], AbstractContextManager[int]],
    what: str,
    needed: Feature,
    hint: str,
    *,
    huge: bool = False,
    where: str = "",
) -> Trial:
    """Whether memory of a kind can be registered. *needed*: what makes it so, where somebody disabled it."""

    def answer(lab: Laboratory) -> Answer:
        missing = lab.lacks(Feature.UFFD_WP)
        if not missing and lab.answers[needed][0] == "disabled":
            missing = lab.lacks(needed)
        if missing:
            return missing
        features = UffdFeature.PAGEFAULT_FLAG_WP
        for feature, bit in _KIND_FEATURES.items():
            features |= bit if lab.has(feature) else UffdFeature(0)
        size = huge_page_size() if huge else page_size()
        if not size:
            return "no", None, "this kernel has no huge pages", "a kernel with CONFIG_HUGETLBFS"
        try:
            with lab.uffd(features) as uffd, make() as at:
                rc, _ = _kernel.uffd_register(uffd, at, at + size)
        except _NowhereError as error:
            return "unknown", error.errno, f"{error.strerror}", "TMPDIR=/a/folder/on/a/disk"
        if rc == -EINVAL:
            return "no", EINVAL, f"UFFDIO_REGISTER refuses {what}", hint
        _check(rc, "UFFDIO_REGISTER")
        return _yes(f"{what} can be write-protected{where}")

    return answer


_KIND_FEATURES = {
    Feature.UFFD_WP_HUGETLBFS_SHMEM: UffdFeature.WP_HUGETLBFS_SHMEM,
    Feature.UFFD_WP_ASYNC: UffdFeature.WP_ASYNC,
}
_SHARED_HINT = "Linux 5.19 or newer; until then map it MAP_PRIVATE | MAP_ANONYMOUS"
_ASYNC_ALONE = ", asynchronously: by backend pagemap-scan alone"
_FILE_HINT = "Linux 6.7 or newer, whose WP_ASYNC takes files; until then map it MAP_PRIVATE | MAP_ANONYMOUS"


def _unpopulated(lab: Laboratory) -> Answer:
    answer = _offers(UffdFeature.WP_UNPOPULATED)(lab)
    if answer[0] != "yes" or not lab.has(Feature.PAGEMAP_UFFD_WP):
        return answer
    with (
        lab.uffd(UffdFeature.PAGEFAULT_FLAG_WP | UffdFeature.WP_UNPOPULATED) as uffd,
        lab.memory(page_size()) as (at, _),
    ):
        _check(_kernel.uffd_register(uffd, at, at + page_size())[0], "UFFDIO_REGISTER")
        _check(_kernel.uffd_writeprotect(uffd, at, at + page_size(), protect=True), "UFFDIO_WRITEPROTECT")
        if lab.word(at) & EntryFlag.UFFD_WP:
            return _yes("an untouched page carries a mark")
    return "no", None, "an untouched page carries no mark, though UFFDIO_API grants WP_UNPOPULATED", "a newer kernel"


def _fills(view: memoryview) -> bool:
    """Whether the kernel can store into *view*, which is protected."""
    zero = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.readv(zero, [view]) == len(view)
    except OSError as error:
        if error.errno != EFAULT:
            raise
        return False
    finally:
        os.close(zero)


_FILLS = "read(2) into a protected page succeeds"
_FILLS_NOT = "read(2) into a protected page fails"


def _kernel_writes(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP, Feature.UFFD_WP)
    if missing:
        return missing
    # Somebody has to answer the fault, or the read would never end: a tracker, of which nobody else knows.
    assert lab.way is not None  # noqa: S101 - lacks() saw to it
    pagemap = os.dup(lab.pagemap)
    uffd, _, attempt = open_userfaultfd(lab.way, UffdFeature.PAGEFAULT_FLAG_WP)
    if uffd < 0:
        os.close(pagemap)
    _check(-attempt.errno, str(attempt))
    rc, tracker = _kernel.tracker_create(uffd, pagemap, 0)
    _check(rc, "start a fault thread")
    assert tracker is not None  # noqa: S101 - rc is 0
    try:
        with lab.memory(page_size()) as (at, view):
            view[0] = 1
            rc, handle, _ = _kernel.range_create(tracker, at, at + page_size())
            _check(rc, "UFFDIO_REGISTER")
            assert handle is not None  # noqa: S101 - rc is 0
            filled = _fills(view)
            _kernel.range_close(handle)
    finally:
        _kernel.tracker_close(tracker)
    if filled:
        return _yes(f"{_FILLS}, resolved by a thread")
    return "denied", EFAULT, f"{_FILLS_NOT}: faults are reported in user mode alone", _FULL_HINT


_PTRACE = "CAP_SYS_PTRACE, in the initial user namespace"
_FULL_HINT = f"{_PTRACE}, read and write permission on /dev/userfaultfd, or sysctl vm.unprivileged_userfaultfd=1"


def _async_kernel_writes(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.UFFD_WP, Feature.UFFD_WP_ASYNC)
    if missing:
        return missing
    with lab.uffd(UffdFeature.WP_ASYNC) as uffd, lab.memory(page_size()) as (at, view):
        view[0] = 1
        _check(_kernel.uffd_register(uffd, at, at + page_size())[0], "UFFDIO_REGISTER")
        _check(_kernel.uffd_writeprotect(uffd, at, at + page_size(), protect=True), "UFFDIO_WRITEPROTECT")
        filled = _fills(view)
    return _yes(f"{_FILLS}, resolved by the kernel") if filled else ("no", EFAULT, _FILLS_NOT, "a newer kernel")


def _pfn(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP)
    if missing:
        return missing
    with lab.memory(page_size()) as (at, view):
        view[0] = 1
        if lab.word(at) & _PFN_MASK:
            return _yes("pagemap words show page frame numbers")
    return "denied", EPERM, "pagemap words show 0 for page frame numbers", "CAP_SYS_ADMIN, since Linux 4.2"


def _soft_dirty_clears(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP_SOFT_DIRTY)
    if missing:
        return missing
    hint = "`pagemapcompat probe` tries it, in a process of its own"
    return "unknown", None, "clearing soft-dirty would clear it for the whole process", hint


def _marks(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP, Feature.UFFD_WP)
    if missing:
        return missing
    with lab.uffd(UffdFeature.PAGEFAULT_FLAG_WP) as uffd, lab.memory(page_size()) as (at, view):
        view[0] = 1
        _check(_kernel.uffd_register(uffd, at, at + page_size())[0], "UFFDIO_REGISTER")
        before = lab.word(at)
        _check(_kernel.uffd_writeprotect(uffd, at, at + page_size(), protect=True), "UFFDIO_WRITEPROTECT")
        protected = lab.word(at)
        _check(_kernel.uffd_writeprotect(uffd, at, at + page_size(), protect=False), "UFFDIO_WRITEPROTECT")
        # Both ways: Valve's kernels once used this bit for something of their own.
        if protected & EntryFlag.UFFD_WP and not (before | lab.word(at)) & EntryFlag.UFFD_WP:
            return _yes("bit 57 of a pagemap word shows write-protection")
    return "no", None, "bit 57 of a pagemap word does not show write-protection", "Linux 5.14 or newer has it"


def _soft_dirty(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP)
    if missing:
        return missing
    with lab.memory(page_size()) as (at, view):
        view[0] = 1
        # A new mapping is soft-dirty as a whole; clearing it would be the whole process's.
        if lab.word(at) & EntryFlag.SOFT_DIRTY:
            return _yes("bit 55 of a pagemap word shows soft-dirty")
    return "no", None, "bit 55 of a pagemap word is not set in new memory", "a kernel with CONFIG_MEM_SOFT_DIRTY"


def _guard(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP, Feature.MADV_GUARD)
    if missing:
        return missing
    with lab.memory(page_size()) as (at, _):
        _check(_kernel.madvise(at, at + page_size(), _kernel.MADV_GUARD_INSTALL), "madvise")
        if lab.word(at) & EntryFlag.GUARD:
            return _yes("bit 58 of a pagemap word shows guard pages")
    return "no", None, "bit 58 of a pagemap word does not show guard pages", "Linux 6.15 or newer has it"


def _multi_vma(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.UFFD_WP)
    if missing:
        return missing
    size = page_size()
    with lab.uffd(UffdFeature.PAGEFAULT_FLAG_WP) as uffd, lab.memory(2 * size) as (at, _):
        # Advice that a mapping carries, so that the kernel has to split it; it changes nothing here.
        _check(_kernel.madvise(at, at + size, mmap.MADV_DONTDUMP), "madvise")
        _check(_kernel.uffd_register(uffd, at, at + 2 * size)[0], "UFFDIO_REGISTER")
        rc = _kernel.uffd_writeprotect(uffd, at, at + 2 * size, protect=True)
    if rc == -ENOENT:
        hint = "Linux 6.4 or newer (a1b92a3f1498); until then every mapping takes a call of its own"
        return "no", ENOENT, "UFFDIO_WRITEPROTECT refuses a range of two mappings", hint
    _check(rc, "UFFDIO_WRITEPROTECT")
    return _yes("UFFDIO_WRITEPROTECT takes a range of two mappings")


def _remap_clears(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP_UFFD_WP)
    if missing:
        return missing
    size = page_size()
    with (
        lab.uffd(UffdFeature.PAGEFAULT_FLAG_WP) as uffd,
        lab.memory(size) as (at, view),
        lab.memory(size) as (elsewhere, _),
    ):
        view[0] = 1
        _check(_kernel.uffd_register(uffd, at, at + size)[0], "UFFDIO_REGISTER")
        _check(_kernel.uffd_writeprotect(uffd, at, at + size, protect=True), "UFFDIO_WRITEPROTECT")
        # Leaves an empty mapping behind: a hole could be somebody else's memory by the time it is unmapped.
        _check(_kernel.mremap_pages(at, elsewhere, size), "mremap")
        word = lab.word(elsewhere)
    if word & EntryFlag.UFFD_WP:
        hint = "Linux 6.13, 6.12.11 or newer; until then each collect asks for every mapping's registration"
        return "no", None, "a page keeps its mark when mremap takes its registration away", hint
    return _yes("a page that mremap moves loses its mark with its registration")


def _pagemap_scan(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP)
    if missing:
        return missing
    rc, _ = _kernel.pagemap_scan(lab.pagemap, 0, 0)
    if rc == 0:
        return _yes("the ioctl answers")
    if -rc in _DENIED:
        return "denied", -rc, "the ioctl is refused", "a seccomp profile that allows ioctl(2) on /proc/PID/pagemap"
    if -rc not in _ABSENT:
        _check(rc, "PAGEMAP_SCAN")
    return "no", -rc, "the ioctl is not there", "Linux 6.7 or newer, or a kernel that has it back-ported"


def _scan_written(lab: Laboratory, start: int, end: int) -> int:
    """How many bytes of [start, end) the ioctl calls written."""
    written = PageCategory.WRITTEN
    rc, regions = _kernel.pagemap_scan(lab.pagemap, start, end, all_of=written, report=written, vec_len=8)
    _check(rc, "PAGEMAP_SCAN")
    return sum(stop - first for first, stop, _ in regions)


def _scan_answers(lab: Laboratory) -> tuple[int, int, int, int]:
    """How much of 4 MiB is called written: untouched, armed, with one page discarded, with 2 MiB discarded."""
    if lab.written is None:
        size = page_size()
        with lab.uffd(UffdFeature.WP_ASYNC) as uffd, lab.memory(2 * _HUGE) as (at, view):
            end = at + 2 * _HUGE
            _check(_kernel.madvise(at, end, mmap.MADV_NOHUGEPAGE), "madvise")
            _check(_kernel.uffd_register(uffd, at, end)[0], "UFFDIO_REGISTER")
            untouched = _scan_written(lab, at, end)
            view[0] = view[size] = 1
            _check(_kernel.uffd_writeprotect(uffd, at, end, protect=True), "UFFDIO_WRITEPROTECT")
            armed = _scan_written(lab, at, end)
            _check(_kernel.madvise(at, at + size, mmap.MADV_DONTNEED), "madvise")
            one = _scan_written(lab, at, end)
            _check(_kernel.madvise(at, at + _HUGE, mmap.MADV_DONTNEED), "madvise")
            lab.written = untouched, armed, one, _scan_written(lab, at, end)
    return lab.written


def _scan_discards(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP_SCAN, Feature.UFFD_WP_ASYNC)
    if missing:
        return missing
    _, armed, one, _ = _scan_answers(lab)
    if (armed, one) == (0, page_size()):
        return _yes("a discarded page is called written")
    return "no", None, "a discarded page is called clean", "a newer kernel; the library asks twice until then"


def _scan_holes(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP_SCAN, Feature.UFFD_WP_ASYNC)
    if missing:
        return missing
    if _scan_answers(lab) == (2 * _HUGE, 0, page_size(), _HUGE):
        return _yes("empty memory that carries no mark is called written")
    hint = "a kernel with 07b4377bdbe7; until then a second query finds what the first calls clean"
    return "no", None, "memory that was discarded, or never armed, is called clean", hint


def _knows(category: PageCategory) -> Trial:
    def answer(lab: Laboratory) -> Answer:
        missing = lab.lacks(Feature.PAGEMAP_SCAN)
        if missing:
            return missing
        rc, _ = _kernel.pagemap_scan(lab.pagemap, 0, 0, report=category)
        if rc == 0 and category is PageCategory.SOFT_DIRTY:
            # Accepted is not supported: a kernel without CONFIG_MEM_SOFT_DIRTY never sets it.
            missing = lab.lacks(Feature.PAGEMAP_SOFT_DIRTY)
        if missing:
            return missing
        if rc == 0:
            return _yes(f"PAGEMAP_SCAN knows PAGE_IS_{category.name}")
        if rc != -EINVAL:
            _check(rc, "PAGEMAP_SCAN")
        return "no", -rc, f"PAGEMAP_SCAN refuses PAGE_IS_{category.name}", "a newer kernel, or a query without it"

    return answer


def _procmap_query(_lab: Laboratory) -> Answer:
    fd = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        rc = _kernel.maps_query(fd)
    finally:
        os.close(fd)
    if rc > 0:
        return _yes("mappings can be asked for one by one")
    if -rc in _DENIED:
        return "denied", -rc, "the ioctl on /proc/self/maps is refused", "a seccomp profile that allows ioctl(2) on it"
    if -rc not in _ABSENT:
        _check(rc, "PROCMAP_QUERY")
    return "no", -rc, "the ioctl on /proc/self/maps is not there", "Linux 6.11 or newer; until then the text is read"


def _advises(advice: int, name: str, since: str) -> Trial:
    def answer(lab: Laboratory) -> Answer:
        with lab.memory(page_size()) as (at, _):
            rc = _kernel.madvise(at, at + page_size(), advice)
        if rc == 0:
            return _yes(f"{name} is accepted")
        if -rc in _DENIED:
            return "denied", -rc, f"{name} is refused", "a seccomp profile that allows madvise(2)"
        if -rc not in _ABSENT:
            _check(rc, name)
        return "no", -rc, f"{name} is refused", f"Linux {since} or newer"

    return answer


_KINDS: Mapping[Feature, Trial] = {
    Feature.UFFD_WP_SHARED: _registers(
        _shared, "shared anonymous memory", Feature.UFFD_WP_HUGETLBFS_SHMEM, _SHARED_HINT
    ),
    Feature.UFFD_WP_MEMFD: _registers(_memfd, "memfd memory", Feature.UFFD_WP_HUGETLBFS_SHMEM, _SHARED_HINT),
    Feature.UFFD_WP_HUGETLB: _registers(
        _hugetlb, "hugetlb memory", Feature.UFFD_WP_HUGETLBFS_SHMEM, _SHARED_HINT, huge=True
    ),
    Feature.UFFD_WP_PRIVATE_FILE: _registers(
        _private_file, "a private file mapping", Feature.UFFD_WP_ASYNC, _FILE_HINT, where=_ASYNC_ALONE
    ),
    Feature.UFFD_WP_SHARED_FILE: _registers(
        _shared_file, "a shared file mapping", Feature.UFFD_WP_ASYNC, _FILE_HINT, where=_ASYNC_ALONE
    ),
}

TRIALS: Mapping[Feature, Trial] = {
    Feature.PAGEMAP: _pagemap,
    Feature.UFFD_SYSCALL: _opens(Way.SYSCALL),
    Feature.UFFD_DEVICE: _opens(Way.DEVICE),
    Feature.UFFD_USER_MODE_ONLY: _opens(Way.USER_MODE_ONLY),
    Feature.UFFD_WP: _uffd_wp,
    Feature.UFFD_WP_HUGETLBFS_SHMEM: _offers(UffdFeature.WP_HUGETLBFS_SHMEM),
    Feature.UFFD_WP_ASYNC: _offers(UffdFeature.WP_ASYNC),
    Feature.PAGEMAP_UFFD_WP: _marks,
    Feature.UFFD_WP_UNPOPULATED: _unpopulated,
    Feature.UFFD_WP_MULTI_VMA: _multi_vma,
    Feature.UFFD_WP_REMAP_CLEARS: _remap_clears,
    **_KINDS,
    Feature.UFFD_WP_KERNEL_WRITES: _kernel_writes,
    Feature.UFFD_WP_ASYNC_KERNEL_WRITES: _async_kernel_writes,
    **{
        feature: _offers(UffdFeature[feature.name.removeprefix("UFFD_")])
        for feature in Feature
        if feature.name.removeprefix("UFFD_") in UffdFeature.__members__ and not feature.name.startswith("UFFD_WP")
    },
    Feature.PAGEMAP_SOFT_DIRTY: _soft_dirty,
    Feature.PAGEMAP_SCAN: _pagemap_scan,
    Feature.PAGEMAP_SCAN_DISCARDS: _scan_discards,
    Feature.PAGEMAP_SCAN_HOLES: _scan_holes,
    **{Feature[f"CATEGORY_{category.name}"]: _knows(category) for category in PageCategory},
    Feature.PROCMAP_QUERY: _procmap_query,
    Feature.MADV_POPULATE_READ: _advises(_kernel.MADV_POPULATE_READ, "MADV_POPULATE_READ", "5.14"),
    Feature.MADV_GUARD: _advises(_kernel.MADV_GUARD_INSTALL, "MADV_GUARD_INSTALL", "6.13"),
    Feature.SOFT_DIRTY: _soft_dirty_clears,
    Feature.PAGEMAP_GUARD: _guard,
    Feature.PAGEMAP_PFN: _pfn,
}
"""In an order in which each comes after what it builds on."""


def try_soft_dirty(lab: Laboratory) -> Answer:
    """Clear soft-dirty and store, twice round. Only for a process in which nobody else uses it.

    Accepted is not supported: without CONFIG_MEM_SOFT_DIRTY the clear succeeds, and bit 55 never appears.
    """
    with lab.memory(page_size()) as (at, view):
        for number in (1, 2):
            view[0] = number
            try:
                with open("/proc/self/clear_refs", "w", encoding="ascii") as refs:
                    refs.write("4")
            except OSError as error:
                state: State = "denied" if error.errno in (EACCES, EPERM) else "no"
                hint = "prctl(PR_SET_DUMPABLE, 1), or a kernel with CONFIG_PROC_PAGE_MONITOR"
                return state, error.errno, "/proc/self/clear_refs cannot be written", hint
            clean = lab.word(at)
            view[0] = number + 2
            if clean & EntryFlag.SOFT_DIRTY or not lab.word(at) & EntryFlag.SOFT_DIRTY:
                return "no", None, "clearing soft-dirty has no effect", "a kernel with CONFIG_MEM_SOFT_DIRTY"
    return _yes("clear_refs clears soft-dirty, and a store sets it again")
