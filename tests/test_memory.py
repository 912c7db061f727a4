"""Where memory lies, what is accepted as memory, and how long it is held."""

from __future__ import annotations

import ctypes
import gc
import mmap
from array import array
from typing import TYPE_CHECKING, Any

import pytest
from cffi import FFI
from conftest import PAGE, PRIVATE, Flavour, KeepingTracker, lacking, pages_of, private, write
from hypothesis import given, settings
from hypothesis import strategies as st

from pagemapcompat import (
    AddressRange,
    AlignmentError,
    AlreadyRegisteredError,
    DirtyTracker,
    InvalidArgumentError,
    KernelError,
    NotTrackableError,
    PageCategory,
    Pagemap,
    ScanQuery,
    page_size,
)
from pagemapcompat.memory import pin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


EVERYTHING = ScanQuery(report=PageCategory.PRESENT)
PLAIN = settings(deadline=None, database=None, derandomize=True)
ADDRESSES = st.integers(min_value=0, max_value=1 << 63)


@pytest.fixture
def any_tracker() -> Iterator[DirtyTracker]:
    """A tracker of whatever backend is best here: what memory is does not depend on it."""
    with KeepingTracker() as tracker:
        yield tracker


# -- Addresses ---------------------------------------------------------------------------------------------------


def test_page_size() -> None:
    """It is the kernel's."""
    assert page_size() == mmap.PAGESIZE


@PLAIN
@given(ADDRESSES, ADDRESSES)
def test_address_range(one: int, other: int) -> None:
    """Two addresses in order make a range; its pages are those that it touches, and growing it moves no page away."""
    start, end = sorted((one, other))
    made = AddressRange(start, end)
    assert (made.start, made.end, made.length) == (start, end, end - start)
    assert made == AddressRange.from_length(start, end - start)
    assert made.is_aligned == (start % PAGE == end % PAGE == 0)
    if end <= (1 << 63) - PAGE:
        grown = made.aligned_out()
        assert grown.is_aligned
        assert start - PAGE < grown.start <= start <= end <= grown.end < end + PAGE
        assert made.pages == grown.length // PAGE
        assert grown.aligned_out() == grown
    if start < end:
        with pytest.raises(InvalidArgumentError, match="before start"):
            AddressRange(end, start)


def test_address_range_shows_addresses_in_hexadecimal() -> None:
    """As /proc/PID/maps does."""
    assert repr(AddressRange(0x1000, 0x3000)) == "AddressRange(start=0x1000, end=0x3000)"


def test_address_range_is_a_value() -> None:
    """Ordered, hashable, immutable; integers of other types are taken, nothing else is."""
    numpy = pytest.importorskip("numpy", reason="numpy is not installed; remedy: pip install numpy")
    made = AddressRange(numpy.uint64(16), numpy.int32(32))
    assert made == AddressRange(16, 32)
    assert type(made.start) is int
    assert hash(made) == hash(AddressRange(16, 32))
    assert AddressRange(0, 64) < made
    with pytest.raises(AttributeError):
        made.start = 0  # type: ignore[misc]
    with pytest.raises(TypeError):
        AddressRange(1.0, 2.0)  # type: ignore[arg-type]


# -- What is memory ----------------------------------------------------------------------------------------------


def address_of(buffer: Any) -> int:
    """Where a writable buffer begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def whole(area: mmap.mmap) -> Any:
    """The mmap object itself."""
    return area


def as_memoryview(area: mmap.mmap) -> Any:
    """A memoryview."""
    return memoryview(area)


def as_words(area: mmap.mmap) -> Any:
    """A memoryview of two dimensions and larger items."""
    return memoryview(area).cast("Q", [8, len(area) // 64])  # type: ignore[call-overload]


def as_ctypes(area: mmap.mmap) -> Any:
    """A ctypes array."""
    return (ctypes.c_uint32 * (len(area) // 4)).from_buffer(area)


def as_cffi(area: mmap.mmap) -> Any:
    """A cffi buffer."""
    ffi = FFI()
    return ffi.buffer(ffi.from_buffer(area))


def as_numpy(area: mmap.mmap) -> Any:
    """A numpy array of two dimensions."""
    numpy = pytest.importorskip("numpy", reason="numpy is not installed; remedy: pip install numpy")
    return numpy.frombuffer(area, dtype=numpy.uint16).reshape(8, -1)


SPELLINGS = [whole, as_memoryview, as_words, as_ctypes, as_cffi, as_numpy]


@pytest.mark.parametrize("spell", SPELLINGS)
def test_every_kind_of_buffer(any_tracker: DirtyTracker, spell: Callable[[mmap.mmap], Any]) -> None:
    """The same memory, whatever object shows it: where it lies, how long it is, and what is written to it."""
    area = private(8)
    buffer = spell(area)
    ram = any_tracker.track(buffer)
    assert ram.range == AddressRange.from_length(address_of(area), 8 * PAGE)
    assert len(ram) == 8 * PAGE
    wrote = write(area, 2, 7)
    assert pages_of(ram.collect()) == wrote
    with Pagemap() as pagemap:
        assert pagemap.scan(buffer, EVERYTHING).range == ram.range


def test_slices(any_tracker: DirtyTracker) -> None:
    """A slice on page boundaries is memory of its own, with its own offsets, and so is its neighbour."""
    area = private(8)
    middle = any_tracker.track(memoryview(area)[2 * PAGE : 5 * PAGE])
    behind = any_tracker.track(memoryview(area)[5 * PAGE :])
    write(area, *range(8))
    assert middle.range.start == address_of(area) + 2 * PAGE
    assert list(middle.collect().spans()) == [(0, 3 * PAGE)]
    assert list(behind.collect().spans()) == [(0, 3 * PAGE)]


def test_plain_addresses(any_tracker: DirtyTracker) -> None:
    """A range, or a pair of address and length. Nothing is pinned: the caller keeps it."""
    area = private(8)
    start = address_of(area)
    gc.collect()
    one = any_tracker.track(AddressRange(start, start + 2 * PAGE))
    two = any_tracker.track((start + 2 * PAGE, 6 * PAGE))
    write(area, 1, 2)
    assert pages_of(one.collect()) == {1}
    assert pages_of(two.collect()) == {0}
    one.close()
    two.close()
    area.close()


@pytest.mark.parametrize("memory", [None, 5, "text", object(), [1, 2], 1.5], ids=repr)
def test_what_is_no_memory(any_tracker: DirtyTracker, memory: Any) -> None:
    """It is a TypeError, which says what would be memory."""
    with pytest.raises(TypeError) as caught:
        any_tracker.track(memory)
    assert any(type(memory).__name__ in note and "AddressRange" in note for note in caught.value.__notes__)


# -- Read-only, not contiguous -----------------------------------------------------------------------------------


@pytest.fixture
def file_of_pages(tmp_path: Path) -> Path:
    """A file of four pages."""
    path = tmp_path / "pages"
    path.write_bytes(b"x" * 4 * PAGE)
    return path


def test_read_only_buffers_are_read_and_not_tracked(any_tracker: DirtyTracker, file_of_pages: Path) -> None:
    """A mapping made for reading, a read-only view, a read-only array: Pagemap scans them, track refuses them."""
    numpy = pytest.importorskip("numpy", reason="numpy is not installed; remedy: pip install numpy")
    area = private(4)
    frozen = numpy.frombuffer(area, dtype=numpy.uint8)
    frozen.flags.writeable = False
    with file_of_pages.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for buffer, name in ((mapped, "mmap"), (memoryview(area).toreadonly(), "mmap"), (frozen, "ndarray")):
        with pytest.raises(NotTrackableError, match=f"{name} is read-only") as caught:
            any_tracker.track(buffer)
        assert "writable" in (caught.value.hint or "")
        with Pagemap() as pagemap:
            assert pagemap.scan(buffer, EVERYTHING).complete
            assert len(list(pagemap.entries(buffer))) == 4
    mapped.close()


def test_bytes_are_read_where_they_are_aligned(any_tracker: DirtyTracker) -> None:
    """An aligned slice of bytes is scanned; tracking says that nobody can write them, before anything else."""
    text = bytes(range(256)) * (4 * PAGE // 256)
    skip = -ctypes.cast(text, ctypes.c_void_p).value % PAGE  # type: ignore[operator]
    with Pagemap() as pagemap:
        result = pagemap.scan(memoryview(text)[skip : skip + 2 * PAGE], EVERYTHING)
    assert (result.pages, [region.categories for region in result]) == (2, [PageCategory.PRESENT])
    with pytest.raises(NotTrackableError, match="bytes is read-only"):
        any_tracker.track(text)


def test_memory_that_is_not_contiguous(any_tracker: DirtyTracker) -> None:
    """It is refused by both, and both say what to give instead."""
    area = private(8)
    sparse = memoryview(area)[::2]
    with pytest.raises(NotTrackableError, match="not contiguous") as caught:
        any_tracker.track(sparse)
    assert "slice" in (caught.value.hint or "")
    with Pagemap() as pagemap, pytest.raises(NotTrackableError, match="not contiguous"):
        pagemap.scan(sparse, EVERYTHING)
    numpy = pytest.importorskip("numpy", reason="numpy is not installed; remedy: pip install numpy")
    columns = numpy.frombuffer(area, dtype=numpy.uint8).reshape(8, PAGE)[:, : PAGE // 2]
    with pytest.raises(NotTrackableError, match="ndarray is not contiguous"):
        any_tracker.track(columns)


# -- Alignment ---------------------------------------------------------------------------------------------------


def names_both_ends(error: AlignmentError, start: int, length: int) -> bool:
    """Whether the message and the attributes say where the memory lies, and the hint what lies right."""
    grown = AddressRange.from_length(start, length).aligned_out()
    return (
        f"{start:#x}" in str(error)
        and f"{start + length:#x}" in str(error)
        and (error.address, error.length) == (start, length)
        and str(grown) in (error.hint or "")
        and "mmap.mmap(" in (error.hint or "")
    )


def test_unaligned_numpy(any_tracker: DirtyTracker) -> None:
    """An array from the heap is refused; both ends, what lies around it, and how to get memory that fits are said."""
    numpy = pytest.importorskip("numpy", reason="numpy is not installed; remedy: pip install numpy")
    for array_ in (numpy.zeros(5 * PAGE, numpy.uint8)[3:], numpy.ones(100, numpy.float64)):
        with pytest.raises(AlignmentError) as caught:
            any_tracker.track(array_)
        assert names_both_ends(caught.value, array_.ctypes.data, array_.nbytes)
        assert "np.frombuffer" in (caught.value.hint or "")
        with Pagemap() as pagemap, pytest.raises(AlignmentError):
            pagemap.scan(array_, EVERYTHING)


@pytest.mark.parametrize(("lo", "hi"), [(1, 2 * PAGE), (0, 2 * PAGE - 1), (PAGE, 2 * PAGE + 8), (16, PAGE + 16)])
def test_unaligned_slices(any_tracker: DirtyTracker, lo: int, hi: int) -> None:
    """A slice that begins or ends inside a page is refused, whatever object and however long it is a slice of."""
    area = private(4)
    start = address_of(area) + lo
    for memory in (memoryview(area)[lo:hi], AddressRange(start, start + hi - lo), (start, hi - lo)):
        with pytest.raises(AlignmentError) as caught:
            any_tracker.track(memory)
        assert names_both_ends(caught.value, start, hi - lo)


def test_an_mmap_may_end_inside_its_last_page(any_tracker: DirtyTracker) -> None:
    """Its tail page is its own. So may a slice that goes to its end, but none that stops before, or begins askew."""
    area = mmap.mmap(-1, 3 * PAGE + 100, flags=PRIVATE)
    for memory, first in ((area, 0), (memoryview(area)[PAGE:], 1)):
        with any_tracker.track(memory) as ram:
            assert ram.range == AddressRange.from_length(address_of(area) + first * PAGE, (4 - first) * PAGE)
            assert len(ram) == 3 * PAGE + 100 - first * PAGE
            area[-1] = 1
            assert list(ram.collect().spans()) == [((3 - first) * PAGE, len(ram))]
    for view in (memoryview(area)[: 3 * PAGE + 50], memoryview(area)[1:]):
        with pytest.raises(AlignmentError):
            any_tracker.track(view)


def test_only_an_mmap_owns_its_tail(any_tracker: DirtyTracker) -> None:
    """Any other object that ends inside a page shares it with who knows whom."""
    area = private(4)
    short = (ctypes.c_char * (2 * PAGE + 8)).from_buffer(area)
    with pytest.raises(AlignmentError) as caught:
        any_tracker.track(short)
    assert names_both_ends(caught.value, address_of(area), 2 * PAGE + 8)
    with pytest.raises(AlignmentError):
        any_tracker.track(array("B", bytes(PAGE + 1)))


# -- Pins --------------------------------------------------------------------------------------------------------


def test_pinned_while_tracked(flavour: Flavour) -> None:
    """An mmap cannot be closed while it is tracked, and can be once the range is closed."""
    area = private(4)
    with flavour.tracker() as tracker:
        ram = tracker.track(area)
        with pytest.raises(BufferError):
            area.close()
        ram.close()
        area.close()


def test_pinned_until_the_tracker_closes(flavour: Flavour) -> None:
    """Closing the tracker lets go of everything that it tracked."""
    areas = [private(4) for _ in range(3)]
    tracker = flavour.tracker()
    rams = [tracker.track(area) for area in areas]
    for area in areas:
        with pytest.raises(BufferError):
            area.close()
    tracker.close()
    for area, ram in zip(areas, rams, strict=True):
        area.close()
        ram.close()


def test_a_bytearray_cannot_grow_while_tracked(any_tracker: DirtyTracker) -> None:
    """And can afterwards, through a view of its aligned part."""
    owner = bytearray(4 * PAGE)
    skip = -address_of(owner) % PAGE
    view = memoryview(owner)[skip : skip + 2 * PAGE]
    ram = any_tracker.track(view)
    view.release()
    with pytest.raises(BufferError):
        owner.extend(b"x" * PAGE)
    ram.close()
    owner.extend(b"x" * PAGE)


def test_a_tracked_view_may_be_released(any_tracker: DirtyTracker) -> None:
    """The pin is the library's own: releasing the view that was given changes nothing."""
    area = private(4)
    with memoryview(area) as view:
        ram = any_tracker.track(view)
    wrote = write(area, 1)
    assert pages_of(ram.collect()) == wrote
    with pytest.raises(BufferError):
        area.close()
    ram.close()
    area.close()


def test_nothing_is_pinned_after_a_refusal(any_tracker: DirtyTracker, file_of_pages: Path) -> None:
    """Whatever the reason was, and at whatever step it came up."""
    area, taken = private(4), private(4)
    ram = any_tracker.track(taken)
    view = memoryview(taken)
    with pytest.raises(AlreadyRegisteredError):
        any_tracker.track(view)
    with file_of_pages.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for memory in (mapped, memoryview(area)[1:], memoryview(area)[::2], memoryview(area)[:0]):
        with pytest.raises((NotTrackableError, AlignmentError, InvalidArgumentError)):
            any_tracker.track(memory)
        if isinstance(memory, memoryview):
            memory.release()
    view.release()
    ram.close()
    for one in (area, taken, mapped):
        one.close()


def test_nothing_is_pinned_after_the_kernel_refused(file_of_pages: Path) -> None:
    """A private mapping of a file, on the backend that cannot track it."""
    with file_of_pages.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        tracker = DirtyTracker("uffd-wp")
    except KernelError as error:
        lacking("uffd-wp", f"{error}", error.hint or "none")
    with tracker, pytest.raises(NotTrackableError) as caught:
        tracker.track(mapped)
    assert "pagemap-scan" in (caught.value.hint or "")
    mapped.close()


def test_pagemap_holds_nothing(any_tracker: DirtyTracker) -> None:
    """Neither a scan nor entries that were never read keep the memory."""
    area = private(4)
    with Pagemap() as pagemap:
        result = pagemap.scan(area, EVERYTHING)
        entries = pagemap.entries(area)
        area.close()
        assert result.complete
        del entries
    assert any_tracker.statistics().ranges == 0


def test_pin_says_what_is_held() -> None:
    """And lets go as often as it is told to."""
    area = private(2)
    held = pin(area, writable=True)
    assert (held.range.length, held.length) == (2 * PAGE, 2 * PAGE)
    with pytest.raises(BufferError):
        area.close()
    held.release()
    held.release()
    area.close()
