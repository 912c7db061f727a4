"""numpy: used without a copy where it is installed, and never needed."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from conftest import PAGE, Flavour, pages_of, private, run_child, write
from unicorn import UC_ARCH_X86, UC_MODE_64, Uc

from pagemapcompat import (
    AlignmentError,
    DirtyTracker,
    InvalidArgumentError,
    NotTrackableError,
    PageCategory,
    Pagemap,
    PagemapEntry,
)
from pagemapcompat.unicorn import TrackedGuest


def test_regions_as_an_array_without_a_copy(tracker: DirtyTracker) -> None:
    """np.asarray of as_u64 is a view of the regions that C wrote: all such arrays share memory, none is writable."""
    memory = private(64)
    ram = tracker.track(memory)
    write(memory, 1, 2, 3, 40, 63)
    result = ram.collect()
    words = result.as_u64()
    array = np.asarray(words)
    assert array.dtype == np.uint64
    assert array.ndim == 1
    assert not array.flags.owndata
    assert np.shares_memory(array, np.asarray(result.as_u64()))
    regions = array.reshape(-1, 3)
    assert np.shares_memory(regions, array)
    base = ram.range.start
    assert ((regions[:, :2].astype(np.int64) - base) // PAGE).tolist() == [[1, 4], [40, 41], [63, 64]]
    assert regions[:, 2].tolist() == [PageCategory.WRITTEN] * 3
    assert int((regions[:, 1] - regions[:, 0]).sum()) == result.pages * PAGE
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_the_array_outlives_everything(flavour: Flavour) -> None:
    """The regions live as long as the last array of them, after the result, the tracker and the memory are gone."""
    memory = private(4096)
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        wrote = sorted(write(memory, *range(0, 4096, 2)))
        base = ram.range.start
        regions = np.asarray(ram.collect().as_u64()).reshape(-1, 3)
        for _ in range(4):  # what was freed would be used again
            write(memory, *range(1, 4096, 2))
            ram.collect()
    memory.close()
    del ram, tracker
    assert ((regions[:, 0].astype(np.int64) - base) // PAGE).tolist() == wrote


def test_an_empty_result_is_an_empty_array(tracker: DirtyTracker) -> None:
    """No regions make an array of shape (0, 3)."""
    ram = tracker.track(private(4))
    assert np.asarray(ram.collect().as_u64()).reshape(-1, 3).shape == (0, 3)


@pytest.mark.parametrize("pages", [1, 7, 8, 9, 64, 129, 1000])
def test_the_bitmap_unpacks_to_the_page_indices(tracker: DirtyTracker, pages: int) -> None:
    """np.unpackbits(bitorder="little") of the bitmap has a one for each index, in arrays of numpy's own too."""
    dice = random.Random(pages)
    memory = private(pages)
    ram = tracker.track(memory)
    bitmap = np.zeros((pages + 7) // 8, dtype=np.uint8)
    sofar: set[int] = set()
    for share in (2, 8, 20):  # nearly all in runs, some, and nearly none
        wrote = write(memory, *dice.sample(range(pages), -(-pages // share)))
        result = ram.collect()
        fresh = np.zeros_like(bitmap)
        assert result.fill_bitmap(fresh) == len(wrote)
        bits = np.unpackbits(fresh, bitorder="little")
        assert np.flatnonzero(bits).tolist() == list(result.page_indices()) == sorted(wrote)
        sofar |= wrote
        result.fill_bitmap(bitmap)  # sets, and clears none
        assert set(np.flatnonzero(np.unpackbits(bitmap, bitorder="little")).tolist()) == sofar


def test_the_bitmap_may_be_of_wider_words(tracker: DirtyTracker) -> None:
    """An array of 64-bit words is as good as bytes, and what lies behind the last page stays untouched."""
    memory = private(70)
    ram = tracker.track(memory)
    wrote = write(memory, 0, 63, 64, 69)
    words = np.zeros(3, dtype="<u8")
    words[2] = 0xFFFF
    assert ram.collect().fill_bitmap(words) == 4
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    assert set(np.flatnonzero(bits[:128]).tolist()) == wrote
    assert words[2] == 0xFFFF


def test_a_bitmap_has_no_bools(tracker: DirtyTracker) -> None:
    """An element a page is what they look like; filled as bits they would be wrong."""
    memory = private(16)
    ram = tracker.track(memory)
    wrote, bools = write(memory, 0, 3), np.zeros(16, bool)
    with pytest.raises(InvalidArgumentError, match="bools") as caught:
        ram.peek().fill_bitmap(bools)
    assert not bools.any()
    assert "np.zeros(2, np.uint8)" in str(caught.value.hint)
    assert pages_of(ram.collect()) == wrote


def test_assignments_are_collected_exactly(tracker: DirtyTracker) -> None:
    """numpy's stores, scalar, sliced, strided, by index and in place, touch the pages of their bytes and no others."""
    pages = 64
    memory = private(pages)
    array = np.frombuffer(memory, dtype=np.uint32)
    per_page = PAGE // array.itemsize
    ram = tracker.track(array)
    assert ram.range.length == pages * PAGE

    array[5 * per_page] = 1
    assert pages_of(ram.collect()) == {5}
    array[7 * per_page - 1 : 9 * per_page + 1] = 2
    assert pages_of(ram.collect()) == {6, 7, 8, 9}
    array[: 40 * per_page : 10 * per_page] = 3
    assert pages_of(ram.collect()) == {0, 10, 20, 30}
    array[np.array([11, 13, 17]) * per_page] += 1
    assert pages_of(ram.collect()) == {11, 13, 17}
    array[-1] = 4
    assert pages_of(ram.collect()) == {pages - 1}
    np.copyto(array[20 * per_page : 22 * per_page], array[40 * per_page : 42 * per_page])
    assert pages_of(ram.collect()) == {20, 21}
    assert int(array.sum()) > 0
    assert pages_of(ram.collect()) == set()


def test_spans_index_the_array(tracker: DirtyTracker) -> None:
    """array[lo:hi] of every span is enough to bring a copy up to date, and the spans are no larger than the pages."""
    dice = np.random.default_rng(5)
    memory = private(200)
    array = np.frombuffer(memory, dtype=np.uint8)
    ram = tracker.track(array)
    copy = array.copy()
    for _ in range(5):
        places = dice.integers(0, array.size, 30)
        array[places] += 1
        assert not np.array_equal(array, copy)
        result = ram.collect()
        for lo, hi in result.spans():
            copy[lo:hi] = array[lo:hi]
        assert np.array_equal(array, copy)
        assert set(result.page_indices()) == set((places // PAGE).tolist())
        assert sum(hi - lo for lo, hi in result.spans()) == result.pages * PAGE


def test_a_tracked_array_keeps_its_memory(flavour: Flavour) -> None:
    """The mmap below the array cannot be closed while it is tracked, and can when array and range are gone."""
    memory = private(4)
    array = np.frombuffer(memory, dtype=np.uint8)
    with flavour.tracker() as tracker:
        ram = tracker.track(array)
        del array
        with pytest.raises(BufferError):
            memory.close()
        write(memory, 2)
        assert pages_of(ram.collect()) == {2}
    memory.close()


def test_arrays_that_cannot_be_tracked_say_what_can(tracker: DirtyTracker) -> None:
    """One off a page boundary, a strided and a read-only one are refused with a hint; the whole one can be tracked."""
    memory = private(8)
    array = np.frombuffer(memory, dtype=np.uint8)
    with pytest.raises(AlignmentError) as unaligned:
        tracker.track(array[16:])
    assert unaligned.value.address % PAGE == 16
    assert "np.frombuffer" in (unaligned.value.hint or "")
    with pytest.raises(NotTrackableError) as strided:
        tracker.track(array[::2])
    readonly = array.view()
    readonly.flags.writeable = False
    with pytest.raises(NotTrackableError) as locked:
        tracker.track(readonly)
    assert strided.value.hint
    assert locked.value.hint
    ram = tracker.track(array)
    array[3 * PAGE] = 1
    assert pages_of(ram.collect()) == {3}


def test_numpy_is_never_needed(flavour: Flavour) -> None:
    """Where importing numpy fails, everything works: package, tracking, spans, bitmap, words."""
    printed = run_child(
        """
        import sys

        class NoNumpy:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name.partition(".")[0] == "numpy":
                    raise ImportError("numpy is refused here")

        sys.meta_path.insert(0, NoNumpy)
        try:
            import numpy
        except ImportError as error:
            print(error)

        import mmap
        import pagemapcompat as p

        page = p.page_size()
        memory = mmap.mmap(-1, 16 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with p.DirtyTracker(sys.argv[1]) as tracker, tracker.track(memory) as ram:
            memory[3 * page] = memory[4 * page] = 1
            assert list(ram.peek().page_indices()) == [3, 4]
            result = ram.collect()
            assert list(result.spans()) == [(3 * page, 5 * page)]
            bitmap = bytearray(2)
            assert result.fill_bitmap(bitmap) == 2 and bitmap == bytes([0b11000, 0])
            assert len(result.as_u64().tolist()) == 3
            ram.reset()
        print("numpy" in sys.modules)
        """,
        flavour.backend,
    )
    assert printed.splitlines() == ["numpy is refused here", "False"]


def test_a_process_and_a_word_may_be_numpys() -> None:
    """As read from a file of them."""
    with Pagemap(np.int64(os.getpid())) as pagemap:
        assert pagemap.pid == os.getpid()
    word = 1 << 63 | 5
    assert PagemapEntry.decode(np.uint64(word)) == PagemapEntry.decode(word)


def test_a_guests_memory_may_have_numpys_length(tracker: DirtyTracker) -> None:
    """An integer is a length, whoever made it."""
    guest = TrackedGuest(Uc(UC_ARCH_X86, UC_MODE_64), tracker)
    assert len(guest.map(1 << 30, np.int64(2 * PAGE))) == 2 * PAGE
