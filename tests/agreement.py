"""Whether `probe` says what the library and the kernel then really do, for whoever runs it."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from errno import ENOENT

from conftest import PAGE, PRIVATE, libc

from pagemapcompat import (
    AddressRange,
    DirtyTracker,
    Feature,
    FeatureReport,
    Guarantee,
    KernelError,
    PageCategory,
    Pagemap,
    PagemapCompatError,
    ScanQuery,
    _kernel,
    probe,
)
from pagemapcompat.abi import UffdFeature

HUGE = 2 << 20
MFD_HUGETLB = 4
SCAN = (Feature.PAGEMAP, Feature.PAGEMAP_SCAN, Feature.UFFD_WP_ASYNC)
WORDS = (Feature.PAGEMAP, Feature.UFFD_WP)


def trackers() -> dict[str, DirtyTracker]:
    """Those that open."""
    opened = {}
    for name in ("pagemap-scan", "uffd-wp"):
        with contextlib.suppress(PagemapCompatError):
            opened[name] = DirtyTracker(name)
    return opened


@contextlib.contextmanager
def mapped(length: int, flags: int, fd: int = -1) -> Iterator[AddressRange]:
    """Raw memory, of which nothing is touched."""
    at = libc.mmap(length, 3, flags, fd)
    try:
        yield AddressRange.from_length(at, length)
    finally:
        libc.munmap(at, length)


@contextlib.contextmanager
def descriptor(fd: int, length: int) -> Iterator[int]:
    """A file of some length, closed in the end."""
    try:
        os.ftruncate(fd, length)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def kind(feature: Feature) -> Iterator[AddressRange]:
    """Memory of the kind that a feature speaks of."""
    with contextlib.ExitStack() as stack:
        if feature is Feature.UFFD_WP:
            yield stack.enter_context(mapped(PAGE, PRIVATE))
        elif feature is Feature.UFFD_WP_SHARED:
            yield stack.enter_context(mapped(PAGE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS))
        elif feature is Feature.UFFD_WP_MEMFD:
            fd = stack.enter_context(descriptor(os.memfd_create("ram"), PAGE))
            yield stack.enter_context(mapped(PAGE, mmap.MAP_SHARED, fd))
        elif feature is Feature.UFFD_WP_HUGETLB:
            flags = PRIVATE | libc.MAP_HUGETLB | libc.MAP_NORESERVE
            yield stack.enter_context(mapped(HUGE, flags))
        else:
            folder = next(path for path in ("/var/tmp", "/tmp") if os.path.isdir(path))  # noqa: S108 - a disk first
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            file.truncate(PAGE)
            flags = mmap.MAP_SHARED if feature is Feature.UFFD_WP_SHARED_FILE else mmap.MAP_PRIVATE
            yield stack.enter_context(mapped(PAGE, flags, file.fileno()))


KINDS = {
    Feature.UFFD_WP: ("pagemap-scan", "uffd-wp"),
    Feature.UFFD_WP_SHARED: ("pagemap-scan", "uffd-wp"),
    Feature.UFFD_WP_MEMFD: ("pagemap-scan", "uffd-wp"),
    Feature.UFFD_WP_HUGETLB: ("pagemap-scan", "uffd-wp"),
    Feature.UFFD_WP_PRIVATE_FILE: ("pagemap-scan",),
    Feature.UFFD_WP_SHARED_FILE: ("pagemap-scan",),
}
"""What takes memory of a kind where it can be registered at all."""


def tracks(tracker: DirtyTracker, memory: AddressRange) -> bool:
    """Whether it does."""
    try:
        tracker.track(memory).close()
    except PagemapCompatError:
        return False
    return True


def fills(tracker: DirtyTracker) -> bool:
    """Whether read(2) into protected memory succeeds."""
    memory = mmap.mmap(-1, PAGE, flags=PRIVATE)
    memory[0] = 1
    with tracker.track(memory), memoryview(memory) as view, open("/dev/zero", "rb", buffering=0) as zero:
        try:
            return zero.readinto(view) == PAGE
        except OSError:
            return False


def categories(report: FeatureReport) -> None:
    """Each category that is said to be known can be asked for, and no other."""
    memory = mmap.mmap(-1, PAGE, flags=PRIVATE)
    memory[0] = 1
    with Pagemap() as pagemap:
        for category in PageCategory:
            said = report[Feature[f"CATEGORY_{category.name}"]]
            try:
                pagemap.scan(memory, ScanQuery(report=category))
            except KernelError as error:
                assert not said, (said, error)
            else:
                # Accepted, and never set: what a kernel without soft-dirty does.
                assert said or category is PageCategory.SOFT_DIRTY, said


def raw(call: Callable[[], object]) -> bool:
    """Whether a call succeeds."""
    try:
        call()
    except OSError:
        return False
    return True


def system_call(flags: int) -> Callable[[], bool]:
    """Whether userfaultfd(2) opens with *flags*."""

    def opens() -> bool:
        fd = _kernel.uffd_open({0: _kernel.UFFD_SYSCALL, 1: _kernel.UFFD_USER_MODE_ONLY}[flags])
        if fd >= 0:
            os.close(fd)
        return fd >= 0

    return opens


def device() -> bool:
    """Whether /dev/userfaultfd gives a userfaultfd."""
    try:
        fd = os.open("/dev/userfaultfd", os.O_RDWR)
    except OSError:
        return False
    try:
        os.close(fcntl.ioctl(fd, USERFAULTFD_IOC_NEW, os.O_CLOEXEC))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


USERFAULTFD_IOC_NEW = 0xAA00
OPENINGS = {
    Feature.UFFD_SYSCALL: system_call(0),
    Feature.UFFD_USER_MODE_ONLY: system_call(1),
    Feature.UFFD_DEVICE: device,
}


@contextlib.contextmanager
def userfaultfd(report: FeatureReport) -> Iterator[int]:
    """One of our own, by a way that is said to open, before its handshake."""
    ways = {
        Feature.UFFD_SYSCALL: _kernel.UFFD_SYSCALL,
        Feature.UFFD_DEVICE: _kernel.UFFD_DEVICE,
        Feature.UFFD_USER_MODE_ONLY: _kernel.UFFD_USER_MODE_ONLY,
    }
    fd = _kernel.uffd_open(next(number for feature, number in ways.items() if report[feature]))
    assert fd >= 0, report.as_dict()
    try:
        yield fd
    finally:
        os.close(fd)


def grants(uffd: int, feature: int) -> bool:
    """Whether a handshake that asks for a feature succeeds and has it in its answer."""
    try:
        answer = fcntl.ioctl(uffd, UFFDIO_API, struct.pack("3Q", 0xAA, feature, 0))
    except OSError:
        return False
    return bool(struct.unpack("3Q", answer)[1] & feature)


def protects_two_mappings(uffd: int) -> bool:
    """Whether one UFFDIO_WRITEPROTECT does."""
    with mapped(2 * PAGE, PRIVATE) as memory:
        libc.mprotect(memory.start + PAGE, PAGE, libc.PROT_READ)
        fcntl.ioctl(uffd, UFFDIO_REGISTER, struct.pack("4Q", memory.start, 2 * PAGE, 2, 0))
        return raw(lambda: fcntl.ioctl(uffd, UFFDIO_WRITEPROTECT, struct.pack("3Q", memory.start, 2 * PAGE, 1)))


def queries_mappings() -> bool:
    """Whether PROCMAP_QUERY answers, be it that there is no mapping."""
    with open("/proc/self/maps", "rb") as maps:
        try:
            fcntl.ioctl(maps, PROCMAP_QUERY, bytearray(struct.pack("2Q", 104, 0x10).ljust(104, b"\0")))
        except OSError as error:
            return error.errno == ENOENT
    return True


def system_calls(report: FeatureReport) -> None:
    """What is said of calls that the library may do without, against the calls."""
    if any(report[feature] for feature in OPENINGS):
        for feature in Feature:
            name = feature.name.removeprefix("UFFD_")
            if name in UffdFeature.__members__ and report[feature].state != "disabled":
                with userfaultfd(report) as uffd:
                    assert grants(uffd, UffdFeature[name]) == bool(report[feature]), report[feature]
        if report[Feature.UFFD_WP]:
            with userfaultfd(report) as uffd:
                assert grants(uffd, UffdFeature.PAGEFAULT_FLAG_WP)
                assert protects_two_mappings(uffd) == bool(report[Feature.UFFD_WP_MULTI_VMA])
    if report[Feature.PROCMAP_QUERY].state != "disabled":
        assert queries_mappings() == bool(report[Feature.PROCMAP_QUERY])


UFFDIO_API, UFFDIO_REGISTER, UFFDIO_WRITEPROTECT = 0xC018AA3F, 0xC020AA00, 0xC018AA06
PROCMAP_QUERY = 0xC0686611


def check() -> dict[str, int]:
    """Compare the answers with what is then really so. Returns how many there were in each state."""
    report = probe(refresh=True)
    opened = trackers()
    with contextlib.ExitStack() as stack:
        for tracker in opened.values():
            stack.enter_context(tracker)
        assert ("pagemap-scan" in opened) == report.supports(*SCAN), (opened, report.as_dict())
        assert ("uffd-wp" in opened) == report.supports(*WORDS), (opened, report.as_dict())
        for feature, takers in KINDS.items():
            for name in takers:
                if name in opened:
                    with kind(feature) as memory:
                        assert tracks(opened[name], memory) == bool(report[feature]), (name, report[feature])
        for name, feature in (
            ("pagemap-scan", Feature.UFFD_WP_ASYNC_KERNEL_WRITES),
            ("uffd-wp", Feature.UFFD_WP_KERNEL_WRITES),
        ):
            if name in opened:
                claimed = Guarantee.KERNEL_WRITES in opened[name].selection.guarantees
                assert claimed == bool(report[feature]) == fills(opened[name]), (name, report[feature])
        if "uffd-wp" in opened:
            claimed = Guarantee.DISCARDS in opened["uffd-wp"].selection.guarantees
            assert claimed == bool(report[Feature.PAGEMAP_UFFD_WP])
    assert bool(report[Feature.PAGEMAP]) == raw(lambda: Pagemap().close())
    if report[Feature.PAGEMAP_SCAN]:
        categories(report)
    if report[Feature.PAGEMAP]:
        memory = mmap.mmap(-1, PAGE, flags=PRIVATE)
        memory[0] = 1
        with Pagemap() as pagemap:
            (entry,) = pagemap.entries(memory)
        assert (entry.pfn is not None) == bool(report[Feature.PAGEMAP_PFN])
    for feature, opens in OPENINGS.items():
        assert bool(report[feature]) == opens(), report[feature]
    memory = mmap.mmap(-1, PAGE, flags=PRIVATE)
    for feature, advice in ((Feature.MADV_POPULATE_READ, 22), (Feature.MADV_GUARD, libc.GUARD_INSTALL)):
        assert bool(report[feature]) == raw(lambda advice=advice: memory.madvise(advice)), report[feature]
    system_calls(report)
    assert report.limits.page_size == PAGE
    states: dict[str, int] = {}
    for result in report.values():
        assert bool(result.hint) == (result.state != "yes"), result
        states[result.state] = states.get(result.state, 0) + 1
    return states
