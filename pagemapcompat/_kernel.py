"""The typed door to the C core: one function per C function, and nothing else in the package touches `ffi` or `lib`.

Functions return what C returned: 0 or more, or a negative error. What it means is decided by the caller, which knows
what it asked for. cffi releases the GIL around every call.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

from pagemapcompat._native import ffi, lib
from pagemapcompat.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Buffer

    from pagemapcompat.abi import UffdFeature


class _Handle:
    """Owns what C creates into `out`. Once finalized it is closed for whoever still has it, as in a reference cycle."""

    __slots__ = ("c", "out")
    _POINTER: ClassVar[str]
    """The C type of `out`."""

    def __init__(self) -> None:
        self.out: Any = ffi.new(self._POINTER)
        self.c: Any = _NULL
        """What is in `out`, for calls."""

    def __del__(self) -> None:
        c = self.out[0]
        self.out[0] = self.c = _NULL
        self._destroy(c)

    @staticmethod
    def _destroy(c: object) -> None:
        raise NotImplementedError


class TrackerHandle(_Handle):
    """Owns a `struct pmc_tracker`."""

    __slots__ = ()
    _POINTER = "struct pmc_tracker **"
    _destroy = staticmethod(lib.pmc_tracker_destroy)


class RangeHandle(_Handle):
    """Owns a `struct pmc_range`."""

    __slots__ = ()
    _POINTER = "struct pmc_range **"
    _destroy = staticmethod(lib.pmc_range_destroy)


class CursorHandle(_Handle):
    """Owns a `struct pmc_cursor`."""

    __slots__ = ()
    _POINTER = "struct pmc_cursor **"
    _destroy = staticmethod(lib.pmc_cursor_destroy)


class ImageHandle:
    """Owns a `struct pmc_image`, alone or not. It cannot be closed, and is good until the last user has gone."""

    __slots__ = ("_owner", "out")

    def __init__(self) -> None:
        self.out: Any = ffi.new("struct pmc_image **")
        # By a function in C: an interrupt in a destructor in Python is printed and lost, and the rest with it.
        self._owner = ffi.gc(self.out, lib.pmc_image_put)

    @property
    def c(self) -> Any:  # noqa: ANN401 - a cdata
        """What is in `out`, for calls.

        Raises:
            ClosedError: The garbage collector ended it, and a finalizer in the same reference cycle asks.
        """
        image = self.out[0]
        if not image:
            raise ClosedError("this snapshot ended with the reference cycle that it was part of").with_hint(
                "a finalizer can rely on nothing that ends with its object: keep the snapshot elsewhere"
            )
        return image


_NULL: Any = ffi.NULL


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
CAN_SEE_GUARDS: int = lib.PMC_CAN_SEE_GUARDS
CAN_TIE: int = lib.PMC_CAN_TIE

KIND_ANON: int = lib.PMC_KIND_ANON
KIND_FILE: int = lib.PMC_KIND_FILE
KIND_HUGETLB: int = lib.PMC_KIND_HUGETLB

TELLABLE: int = lib.PMC_TELLABLE
"""The categories that pagemap words can tell."""

ENGAGE: int = lib.PMC_ENGAGE

KEEP: int = lib.PMC_KEEP
KEEP_ASYNC: int = lib.PMC_KEEP_ASYNC
"""Regions, at most, of an answer whose memory is kept to be used again."""

MADV_POPULATE_READ: int = lib.PMC_MADV_POPULATE_READ
MADV_GUARD_INSTALL: int = lib.PMC_MADV_GUARD_INSTALL
MAP_NORESERVE: int = lib.PMC_MAP_NORESERVE
MAP_HUGETLB: int = lib.PMC_MAP_HUGETLB


_gc: Any = ffi.gc
_from_buffer = ffi.from_buffer
_BYTES = ffi.typeof("unsigned char[]")
_WRITABLE: Final = True
"""By position: an argument with a name costs as much as the rest of the call."""
_new_result = ffi.new_allocator(should_clear_after_alloc=True)
_release_result = lib.pmc_result_release
_RESULT = ffi.typeof("struct pmc_result *")
_REGION_SIZE = ffi.sizeof("struct page_region")
REGION: Final = Struct("=QQQ")
"""The words of a `struct page_region`: start, end, categories."""
_SPAN = Struct("=QQ")
_PAGE_SIZE = 1 << lib.pmc_page_shift()


def compiled(name: str) -> int:
    """The value the C compiler gave a constant of the kernel's headers as restated in `native/uapi.h`."""
    return int(getattr(lib, name))


# -- Buffers ---------------------------------------------------------------------------------------------------


class Pin:
    """Holds a buffer where it is: an mmap cannot be closed nor a bytearray resized until `release`.

    Takes over *view*, so that the owner of the memory may release views of its own.
    """

    __slots__ = ("_held", "_view", "address")

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._held = ffi.from_buffer("char[]", view)
        self.address = int(ffi.cast("uintptr_t", self._held))

    def release(self) -> None:
        """Let go. Idempotent."""
        ffi.release(self._held)
        self._view.release()


# -- Results ---------------------------------------------------------------------------------------------------


class Result(Protocol):
    """A `struct pmc_result`: what C fills, and the owner of its regions."""

    cursor: Any
    regions: Any
    count: int
    pages: int
    walk_end: int
    untracked_start: int
    untracked_end: int
    operation: Any


def new_result() -> Result:
    """An empty one."""
    result: Result = _gc(_new_result(_RESULT), _release_result)
    return result


def new_request(cursor: CursorHandle) -> Result:
    """One for calls about all of a cursor's range, during which the handle must be there. `own` frees its regions."""
    made: Any = _new_result(_RESULT)
    made.cursor = cursor.out
    result: Result = made
    return result


def own(result: Result) -> object:
    """What frees the regions of a plain result at its own end.

    Beside the result, whose memory then stays as long as anybody has it: the collector ends an owner in a reference
    cycle before finalizers in the same cycle have run, and these may still ask.
    """
    return _gc(result, _release_result)


def restore_result(words: bytes, walk_end: int) -> Result:
    """The result that had these words: what unpickling needs."""
    result = new_result()
    fill(result, words)
    result.walk_end = walk_end
    return result


def fill(result: Result, words: bytes) -> None:
    """Append regions that ascend."""
    regions = ffi.from_buffer("struct page_region[]", words)
    if lib.pmc_result_fill(result, regions, len(regions)):
        raise MemoryError


def result_of(start: int, end: int) -> Result:
    """One region."""
    return restore_result(region(start, end), end)


def region(start: int, end: int) -> bytes:
    """The words of one."""
    return REGION.pack(start, end, lib.PAGE_IS_WRITTEN)


def triples(result: Result) -> Iterator[tuple[int, int, int]]:
    """start, end and categories of every region."""
    return REGION.iter_unpack(words(result))


def words(result: Result, owner: object = None) -> memoryview:
    """start, end and categories of every region in turn, as read-only 64-bit words. Copies nothing.

    *owner*: of the regions, if it is not the result.
    """
    if not result.count:
        return memoryview(b"").cast("Q")
    # A buffer keeps the pointer alive that it was made from, and this one keeps what owns the memory: by a method
    # in C, for an interrupt that strikes in a destructor in Python is printed and lost.
    regions = _gc(result.regions, (result if owner is None else owner,).count)
    return memoryview(ffi.buffer(regions, result.count * _REGION_SIZE)).cast("Q").toreadonly()


def spans(result: Result, base: int, length: int) -> Iterator[tuple[int, int]]:
    """Start and end of every region, as offsets from *base* that are *length* at most."""
    made = bytearray(result.count * _SPAN.size)
    lib.pmc_fill_spans(result.regions, result.count, base, length, ffi.from_buffer("uint64_t[]", made))
    return _SPAN.iter_unpack(made)


def unite(a: Result, b: Result) -> Result:
    """The pages that are in one of two results."""
    result = new_result()
    if lib.pmc_result_unite(result, a, b):
        raise MemoryError
    return result


def fill_bitmap(result: Result, base: int, length: int, out: Buffer) -> int:
    """Set the bit of each page, counted from *base*, and return how many there are.

    Below 0: *out* cannot be written, is of bools, or has less than a bit for each page of *length* bytes.
    """
    try:
        with memoryview(out) as view:
            if view.format == "?":
                return -1
        bits = _from_buffer(_BYTES, out, _WRITABLE)
    except (BufferError, TypeError, ValueError):
        return -1
    return lib.pmc_fill_bitmap(result, base, length, bits, len(bits))  # type: ignore[no-any-return]


def fill_addresses(regions: Buffer, shift: int, step: int, out: Buffer) -> None:
    """Store the address, plus *shift* modulo 2**64, of every *step* bytes of *regions*. *out* has room for all."""
    given = ffi.from_buffer("struct page_region[]", regions)
    lib.pmc_fill_addresses(given, len(given), shift % (1 << 64), step, ffi.from_buffer("uint64_t[]", out))


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
    return int(lib.pmc_uffd_writeprotect(uffd, start, end, int(protect)))


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


def mprotect(start: int, end: int, protection: int) -> int:
    """mprotect(2): 0 or -errno."""
    return int(lib.pmc_mprotect(start, end, protection))


def mremap_pages(start: int, to: int, length: int) -> int:
    """Move the pages of one private anonymous mapping into another: 0 or -errno."""
    return int(lib.pmc_mremap_pages(start, to, length))


def munlock(start: int, end: int) -> int:
    """munlock(2): 0 or -errno."""
    return int(lib.pmc_munlock(start, end))


def dumpable() -> int:
    """PR_GET_DUMPABLE: 1 if this process may open its own files in /proc whatever its user, or -errno."""
    return int(lib.pmc_dumpable())


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
    result = new_result()
    arg: Any = ffi.new("struct pm_scan_arg *")
    arg.start, arg.end, arg.max_pages = start, end, max_pages
    arg.category_inverted, arg.category_mask, arg.category_anyof_mask, arg.return_mask = masks
    known = ffi.new("struct page_region[]", [(a, b, 0) for a, b in registered])
    rc = int(lib.pmc_query(pagemap, maps, arg, known, len(registered), drop_empty, result))
    return rc, result


# -- Trackers --------------------------------------------------------------------------------------------------


def tracker_create(uffd: int, pagemap: int, abilities: int) -> tuple[int, TrackerHandle | None, Result]:
    """Start a tracker, which owns both descriptors from now on, on failure too."""
    result = new_result()
    config = ffi.new("struct pmc_config *", {"uffd": uffd, "pagemap": pagemap, "abilities": abilities})
    handle = TrackerHandle()  # before the call, so that an interrupt after it leaks nothing
    rc = int(lib.pmc_tracker_create(handle.out, config, result))
    handle.c = handle.out[0]
    return rc, None if rc else handle, result


def tracker_close(tracker: TrackerHandle) -> int:
    """Unregister everything, end the fault threads, close the descriptors. In a forked child: only the last."""
    return int(lib.pmc_tracker_close(tracker.c))


def tracker_state(tracker: TrackerHandle) -> int:
    """0, or the error that a call would get now."""
    return int(lib.pmc_tracker_state(tracker.c))


def tracker_fault_errno(tracker: TrackerHandle) -> int:
    """Why a fault thread ended."""
    return int(lib.pmc_tracker_fault_errno(tracker.c))


def tracker_statistics(tracker: TrackerHandle) -> tuple[int, dict[str, int]]:
    """Counters by name."""
    out = ffi.new("struct pmc_statistics *")
    rc = int(lib.pmc_tracker_statistics(tracker.c, out))
    names = [name for name, _ in ffi.typeof("struct pmc_statistics").fields or ()]
    return rc, {name: int(getattr(out, name)) for name in names}


def range_create(
    tracker: TrackerHandle, start: int, end: int, *, rearm: bool = False
) -> tuple[int, RangeHandle | None, Result]:
    """Register and protect. *rearm*: collects and resets do so with what has lost its registration."""
    result = new_result()
    handle = RangeHandle()
    rc = int(lib.pmc_range_create(handle.out, tracker.c, start, end, lib.PMC_REARM if rearm else 0, result))
    handle.c = handle.out[0]
    return rc, None if rc else handle, result


def range_close(handle: RangeHandle) -> int:
    """Unregister. Idempotent."""
    return int(lib.pmc_range_close(handle.c))


def range_kinds(handle: RangeHandle) -> int:
    """The kinds of memory in it, KIND_* bits."""
    return int(lib.pmc_range_kinds(handle.c))


def range_granularity(handle: RangeHandle) -> int:
    """The size of its largest page, in bytes."""
    return int(lib.pmc_range_granularity(handle.c))


def range_exact(handle: RangeHandle) -> bool:
    """Whether reads can never be taken for writes in it."""
    return bool(lib.pmc_range_exact(handle.c))


def cursor_create(handle: RangeHandle) -> tuple[int, CursorHandle | None]:
    """A reader of a range."""
    cursor = CursorHandle()
    rc = int(lib.pmc_cursor_create(cursor.out, handle.c))
    cursor.c = cursor.out[0]
    return rc, None if rc else cursor


def cursor_close(handle: CursorHandle) -> int:
    """Stop noting pages for it. Idempotent."""
    return int(lib.pmc_cursor_close(handle.c))


scan: Callable[[Any, int, int, int, int, Result], int] = lib.pmc_scan
"""Peek, or with ENGAGE collect, into a result: of a cursor (what is in its handle), start, end, max_pages and flags.

Returns 0, or 1 where *result* holds more regions than are kept: KEEP, on `pagemap-scan` KEEP_ASYNC.

These are the C functions themselves: where memory is small, a call in between takes as long as the scan.
"""
reset: Callable[[Any, int, int, Result], int] = lib.pmc_reset
"""Protect, whatever was written: of a cursor, start and end. Says in *result* what failed."""
peek_all: Callable[[Result], int] = lib.pmc_peek_all
"""Peek at all of the range, without a limit: for the cursor whose `new_request` it is."""
collect_all: Callable[[Result], int] = lib.pmc_collect_all
"""Likewise collect."""
reset_all: Callable[[Result], int] = lib.pmc_reset_all
"""Likewise reset."""
owe: Callable[[Any, Result], int] = lib.pmc_owe
"""Give back what was taken for a cursor, into a result that reached nobody.

Also the C function itself: where it is called first thing in a handler, no second interrupt comes before it.
"""


def unprotect(handle: RangeHandle, start: int, end: int, result: Result) -> int:
    """Un-protect; counts as written once."""
    return int(lib.pmc_unprotect(handle.c, start, end, result))


def rearm(handle: RangeHandle, start: int, end: int, result: Result) -> int:
    """Register and protect what has lost its registration."""
    return int(lib.pmc_rearm(handle.c, start, end, result))


def operation(result: Result) -> str:
    """The system call that failed."""
    name = result.operation
    return ffi.string(name).decode() if name else ""  # type: ignore[union-attr]


# -- Images ----------------------------------------------------------------------------------------------------


LIST_HELD: int = lib.PMC_LIST_HELD
LIST_MISSING: int = lib.PMC_LIST_MISSING


def image_create(pages: int) -> ImageHandle:
    """An image of so many pages, all zeros."""
    handle = ImageHandle()
    if lib.pmc_image_create(handle.out, _NULL, pages):
        raise MemoryError
    return handle


def image_next(base: ImageHandle) -> ImageHandle:
    """An image like *base*, to be changed: the same one, if nobody else owns it."""
    handle = ImageHandle()
    if lib.pmc_image_next(handle.out, base.c):
        raise MemoryError
    return handle


def image_share(image: ImageHandle) -> ImageHandle:
    """Another owner of the same image."""
    handle = ImageHandle()
    lib.pmc_image_share(handle.out, image.c)
    return handle


def image_load(image: ImageHandle, first: int, content: Buffer) -> None:
    """Set the pages from *first* on. Only before anybody else has the image."""
    with memoryview(content).cast("B") as view:
        if lib.pmc_image_load(image.c, first, view.nbytes // _PAGE_SIZE, ffi.from_buffer(view)):
            raise MemoryError


def image_miss(image: ImageHandle, first: int, count: int) -> None:
    """Make pages missing. Only before anybody else has the image."""
    if lib.pmc_image_miss(image.c, first, count):
        raise MemoryError


def image_copied(image: ImageHandle) -> int:
    """How many pages were copied into it, beside those of what it was made from."""
    return int(lib.pmc_image_copied(image.c))


def image_read(image: ImageHandle, first: int, count: int) -> bytearray:
    """The content of some pages; zeros where there is none."""
    content = bytearray(count * _PAGE_SIZE)
    lib.pmc_image_read(image.c, first, count, ffi.from_buffer(content))
    return content


def image_list(image: ImageHandle, base: int, categories: int) -> Result:
    """The pages that are held, missing or both (LIST_*), as addresses from *base* on."""
    result = new_result()
    if lib.pmc_image_list(image.c, base, categories, result):
        raise MemoryError
    return result


def image_diff(a: ImageHandle, b: ImageHandle, base: int) -> Result:
    """The pages whose content differs."""
    result = new_result()
    if lib.pmc_image_diff(a.c, b.c, base, result):
        raise MemoryError
    return result


def capture(handle: RangeHandle, image: ImageHandle, pages: Result, result: Result) -> int:
    """Copy pages from memory. Only before anybody else has the image."""
    return int(lib.pmc_capture(handle.c, image.c, pages.regions, pages.count, result))


def restore(handle: RangeHandle, image: ImageHandle, pages: Result, result: Result) -> int:
    """Write pages back."""
    return int(lib.pmc_restore(handle.c, image.c, pages.regions, pages.count, result))


def compare(handle: RangeHandle, image: ImageHandle, pages: Result, result: Result) -> int:
    """Which of *pages* are not as the image has them, into *result*."""
    return int(lib.pmc_compare(handle.c, image.c, pages.regions, pages.count, result))
