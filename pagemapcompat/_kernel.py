"""The typed door to the C core: one function per C function, and nothing else in the package touches `ffi` or `lib`.

Functions return what C returned: 0 or more, or a negative error. What it means is decided by the caller, which knows
what it asked for. cffi releases the GIL around every call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NewType

from pagemapcompat._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from pagemapcompat.abi import UffdFeature

TrackerHandle = NewType("TrackerHandle", object)
RangeHandle = NewType("RangeHandle", object)

ECLOSED: int = lib.PMC_ECLOSED
EFORKED: int = lib.PMC_EFORKED
EFAULTTHREAD: int = lib.PMC_EFAULTTHREAD
EOWNMEMORY: int = lib.PMC_EOWNMEMORY

UFFD_SYSCALL: int = lib.PMC_UFFD_SYSCALL
UFFD_DEVICE: int = lib.PMC_UFFD_DEVICE
UFFD_USER_MODE_ONLY: int = lib.PMC_UFFD_USER_MODE_ONLY

CAN_ASYNC: int = lib.PMC_CAN_ASYNC
CAN_SCAN_HOLES: int = lib.PMC_CAN_SCAN_HOLES
CAN_SEE_MARKS: int = lib.PMC_CAN_SEE_MARKS
CAN_MARK_EMPTY: int = lib.PMC_CAN_MARK_EMPTY
CAN_SPAN_VMAS: int = lib.PMC_CAN_SPAN_VMAS
CAN_TRUST_MARKS: int = lib.PMC_CAN_TRUST_MARKS
CAN_QUERY_MAPS: int = lib.PMC_CAN_QUERY_MAPS
CAN_POPULATE: int = lib.PMC_CAN_POPULATE
CAN_GUARD: int = lib.PMC_CAN_GUARD

KIND_ANON: int = lib.PMC_KIND_ANON
KIND_SHARED: int = lib.PMC_KIND_SHARED
KIND_FILE: int = lib.PMC_KIND_FILE
KIND_HUGETLB: int = lib.PMC_KIND_HUGETLB

TELLABLE: int = lib.PMC_TELLABLE
"""The categories that pagemap words can tell."""

ENGAGE: int = lib.PMC_ENGAGE
REARM: int = lib.PMC_REARM

MADV_POPULATE_READ: int = lib.PMC_MADV_POPULATE_READ
MADV_GUARD_INSTALL: int = lib.PMC_MADV_GUARD_INSTALL

_pmc_scan = lib.pmc_scan
_new_result = ffi.new_allocator(should_clear_after_alloc=True)
_RESULT = ffi.typeof("struct pmc_result *")


def compiled(name: str) -> int:
    """The value the C compiler gave a constant of the kernel's headers as restated in `native/uapi.h`."""
    return int(getattr(lib, name))


# -- Buffers ---------------------------------------------------------------------------------------------------


class Pin:
    """Holds a buffer where it is: an mmap cannot be closed nor a bytearray resized until `release`."""

    __slots__ = ("_held", "address")

    def __init__(self, view: memoryview) -> None:
        self._held = ffi.from_buffer("char[]", view)
        self.address = int(ffi.cast("uintptr_t", self._held))

    def release(self) -> None:
        """Let go. Idempotent."""
        ffi.release(self._held)


# -- Results ---------------------------------------------------------------------------------------------------


class Result:
    """A `struct pmc_result`: what C fills, and the owner of its regions."""

    __slots__ = ("_regions", "c")

    def __init__(self) -> None:
        self.c: Any = _new_result(_RESULT)
        self._regions: Any = None

    @classmethod
    def restore(cls, words: bytes, pages: int, walk_end: int) -> Result:
        """The result that had these words: what unpickling needs."""
        result = cls()
        count = len(words) // ffi.sizeof("struct page_region")
        result._regions = ffi.new("struct page_region[]", count)
        ffi.memmove(result._regions, words, len(words))
        result.c.regions = result._regions
        result.c.count = result.c.capacity = count
        result.c.pages, result.c.walk_end = pages, walk_end
        return result

    def own(self) -> None:
        """Take over the regions, so that views of them outlive this object and they are freed with the last."""
        regions = self.c.regions
        if regions and self._regions is None:
            self._regions = ffi.gc(regions, lib.pmc_regions_free, self.c.capacity * ffi.sizeof("struct page_region"))

    def words(self) -> memoryview:
        """start, end and categories of every region in turn, as read-only 64-bit words. Copies nothing."""
        count = self.c.count
        if not count:
            return memoryview(b"").cast("Q")
        view = memoryview(ffi.buffer(self._regions, count * ffi.sizeof("struct page_region")))
        return view.cast("Q").toreadonly()


def fill_bitmap(result: Result, base: int, page_shift: int, out: Buffer) -> None:
    """Set the bit of each page, counted from *base*. *out* must be writable and long enough."""
    with memoryview(out).cast("B") as view:
        lib.pmc_fill_bitmap(result.c.regions, result.c.count, base, page_shift, ffi.from_buffer(view))


# -- Single calls ----------------------------------------------------------------------------------------------


def uffd_open(how: int) -> int:
    """Open a userfaultfd: the descriptor, or -errno."""
    return int(lib.pmc_uffd_open(how))


def uffd_handshake(uffd: int, features: UffdFeature | int) -> tuple[int, int]:
    """Ask for *features*: (0 or -errno, what the kernel said it has)."""
    granted = ffi.new("uint64_t *")
    rc = lib.pmc_uffd_handshake(uffd, int(features), granted)
    return int(rc), int(granted[0])


def uffd_register(uffd: int, start: int, end: int) -> tuple[int, int]:
    """Register for write-protect faults: (0 or -errno, the ioctls the range answers)."""
    ioctls = ffi.new("uint64_t *")
    rc = lib.pmc_uffd_register(uffd, start, end, ioctls)
    return int(rc), int(ioctls[0])


def uffd_unregister(uffd: int, start: int, end: int) -> int:
    """Unregister: 0 or -errno."""
    return int(lib.pmc_uffd_unregister(uffd, start, end))


def uffd_writeprotect(uffd: int, start: int, end: int, *, protect: bool) -> int:
    """Protect or un-protect, in one ioctl: 0 or -errno."""
    return int(lib.pmc_uffd_writeprotect(uffd, start, end, protect))


def pagemap_scan(
    pagemap: int,
    start: int,
    end: int,
    *,
    flags: int = 0,
    inverted: int = 0,
    all_of: int = 0,
    any_of: int = 0,
    report: int = 0,
    vec_len: int = 0,
) -> tuple[int, list[tuple[int, int, int]]]:
    """One raw PAGEMAP_SCAN: (regions stored or -errno, the regions)."""
    vec = ffi.new("struct page_region[]", vec_len)
    arg: Any = ffi.new("struct pm_scan_arg *")
    arg.flags, arg.start, arg.end = flags, start, end
    arg.vec, arg.vec_len = int(ffi.cast("uintptr_t", vec)) if vec_len else 0, vec_len
    arg.category_inverted, arg.category_mask = inverted, all_of
    arg.category_anyof_mask, arg.return_mask = any_of, report
    rc = int(lib.pmc_pagemap_scan(pagemap, arg))
    return rc, [(vec[i].start, vec[i].end, vec[i].categories) for i in range(max(rc, 0))]


def maps_query(maps: int) -> int:
    """1 if a descriptor of /proc/PID/maps answers PROCMAP_QUERY, else -errno."""
    return int(lib.pmc_maps_query(maps))


def madvise(start: int, end: int, advice: int) -> int:
    """madvise(2): 0 or -errno."""
    return int(lib.pmc_madvise(start, end, advice))


def mremap_pages(start: int, to: int, length: int) -> int:
    """Move the pages of one private anonymous mapping into another: 0 or -errno."""
    return int(lib.pmc_mremap_pages(start, to, length))


def query(
    pagemap: int,
    maps: int,
    start: int,
    end: int,
    masks: tuple[int, int, int, int],
    max_pages: int,
    registered: Sequence[tuple[int, int]],
    *,
    drop_empty: bool,
) -> tuple[int, Result]:
    """GET on any process. *masks*: inverted, all of, any of, report. *maps* below 0: by the ioctl."""
    result = Result()
    arg: Any = ffi.new("struct pm_scan_arg *")
    arg.start, arg.end, arg.max_pages = start, end, max_pages
    arg.category_inverted, arg.category_mask, arg.category_anyof_mask, arg.return_mask = masks
    known = ffi.new("struct page_region[]", [(a, b, 0) for a, b in registered])
    rc = int(lib.pmc_query(pagemap, maps, arg, known, len(registered), drop_empty, result.c))
    result.own()
    return rc, result


# -- Trackers --------------------------------------------------------------------------------------------------


def tracker_create(uffd: int, pagemap: int, abilities: int) -> tuple[int, TrackerHandle | None]:
    """Start a tracker, which owns both descriptors from now on, on failure too."""
    config = ffi.new("struct pmc_config *", {"uffd": uffd, "pagemap": pagemap, "abilities": abilities})
    out = ffi.new("struct pmc_tracker **")
    rc = int(lib.pmc_tracker_create(out, config))
    return rc, None if rc else TrackerHandle(ffi.gc(out[0], lib.pmc_tracker_destroy))


def tracker_close(tracker: TrackerHandle) -> int:
    """Unregister everything, end the fault thread, close the descriptors. In a forked child: only the last."""
    return int(lib.pmc_tracker_close(tracker))


def tracker_state(tracker: TrackerHandle) -> int:
    """0, or the error that a call would get now."""
    return int(lib.pmc_tracker_state(tracker))


def tracker_fault_errno(tracker: TrackerHandle) -> int:
    """Why the fault thread ended."""
    return int(lib.pmc_tracker_fault_errno(tracker))


def tracker_statistics(tracker: TrackerHandle) -> tuple[int, dict[str, int]]:
    """Counters by name."""
    out = ffi.new("struct pmc_statistics *")
    rc = int(lib.pmc_tracker_statistics(tracker, out))
    names = [name for name, _ in ffi.typeof("struct pmc_statistics").fields or ()]
    return rc, {name: int(getattr(out, name)) for name in names}


def range_create(tracker: TrackerHandle, start: int, end: int) -> tuple[int, RangeHandle | None, Result]:
    """Register and protect."""
    result = Result()
    out = ffi.new("struct pmc_range **")
    rc = int(lib.pmc_range_create(out, tracker, start, end, result.c))
    return rc, None if rc else RangeHandle(ffi.gc(out[0], lib.pmc_range_destroy)), result


def range_close(handle: RangeHandle) -> int:
    """Unregister. Idempotent."""
    return int(lib.pmc_range_close(handle))


def range_kinds(handle: RangeHandle) -> int:
    """The kinds of memory in it, KIND_* bits."""
    return int(lib.pmc_range_kinds(handle))


def range_granularity(handle: RangeHandle) -> int:
    """The size of its largest page, in bytes."""
    return int(lib.pmc_range_granularity(handle))


def range_exact(handle: RangeHandle) -> bool:
    """Whether reads can never be taken for writes in it."""
    return bool(lib.pmc_range_exact(handle))


def scan(handle: RangeHandle, start: int, end: int, max_pages: int, flags: int, result: Result) -> int:
    """Peek, or with ENGAGE collect, into *result*."""
    rc: int = _pmc_scan(handle, start, end, max_pages, flags, result.c)
    result.own()
    return rc


def reset(handle: RangeHandle, start: int, end: int, flags: int, result: Result) -> int:
    """Protect, whatever was written."""
    return int(lib.pmc_reset(handle, start, end, flags, result.c))


def unprotect(handle: RangeHandle, start: int, end: int, result: Result) -> int:
    """Un-protect; counts as written once."""
    return int(lib.pmc_unprotect(handle, start, end, result.c))


def rearm(handle: RangeHandle, start: int, end: int, result: Result) -> int:
    """Register and protect what has lost its registration."""
    return int(lib.pmc_rearm(handle, start, end, result.c))


def owe(handle: RangeHandle, result: Result) -> int:
    """Give the pages of a result that reached nobody back."""
    result.own()  # an interrupt may have come before `scan` did
    return int(lib.pmc_owe(handle, result.c))


def operation(result: Result) -> str:
    """The system call that failed."""
    name = result.c.operation
    return ffi.string(name).decode() if name else ""  # type: ignore[union-attr]
