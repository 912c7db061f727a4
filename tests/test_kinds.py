"""Each kind of memory, on every flavour: tracked as promised, or refused with a remedy."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from children import in_child
from conftest import HUGE, HUGE_PAGES, PAGE, PRIVATE, Flavour, libc, need_shared, pages_of, private, write

from pagemapcompat import (
    AddressRange,
    AlignmentError,
    DirtyTracker,
    Feature,
    Guarantee,
    NotTrackableError,
    TrackedRange,
    probe,
)

pytestmark = pytest.mark.kernel

MFD_HUGETLB = 4
MADV_COLLAPSE = 25


def hugetlb_refused(flavour: Flavour) -> bool:
    """Whether this generation takes private anonymous memory alone."""
    return "uffd-wp-hugetlbfs-shmem" in flavour.disabled or not probe().supports(Feature.UFFD_WP_HUGETLBFS_SHMEM)


def check_in_units(ram: TrackedRange, at: int, pages: int, unit: int) -> None:
    """Writes come back as whole units, once; so with limits, sub-ranges, un-protection and discards."""
    whole = lambda *units: {page for one in units for page in range(one * unit, (one + 1) * unit)}  # noqa: E731
    units = pages // unit
    assert pages_of(ram.collect()) == set()
    for one in (1, units - 1):
        libc.fill(at + (one * unit + unit // 2) * PAGE)
    assert pages_of(ram.peek()) == whole(1, units - 1)
    limited = ram.collect(max_pages=1)
    assert set(limited.page_indices()) == whole(1)
    assert not limited.complete
    assert pages_of(ram.collect()) == whole(units - 1)
    assert pages_of(ram.collect()) == set()
    libc.fill(at, units * unit * PAGE, 7)
    assert pages_of(ram.collect(unit * PAGE, 2 * unit * PAGE)) == whole(1)
    assert pages_of(ram.peek()) == whole(0, *range(2, units))
    ram.reset()
    assert pages_of(ram.collect()) == set()
    ram.unprotect(0, unit * PAGE)
    assert pages_of(ram.collect()) == whole(0)
    libc.fill(at + unit * PAGE)
    assert pages_of(ram.collect()) == whole(1)


@pytest.mark.parametrize("shared", [False, True], ids=["private", "memfd"])
def test_hugetlb(flavour: Flavour, pool: None, area: Callable[..., AddressRange], *, shared: bool) -> None:
    """A huge page is the unit; offsets inside one are refused; EXACT is not promised."""
    fd = os.memfd_create("huge", MFD_HUGETLB) if shared else -1
    if shared:
        os.ftruncate(fd, 4 * HUGE)
    flags = mmap.MAP_SHARED if shared else PRIVATE | libc.MAP_HUGETLB
    memory = area(4 * HUGE_PAGES, 3, flags, fd)
    if shared:
        os.close(fd)
    with flavour.tracker() as tracker:
        if hugetlb_refused(flavour):
            with pytest.raises((NotTrackableError, AlignmentError)):
                tracker.track(memory)
            return
        ram = tracker.track(memory)
        assert ram.granularity == HUGE
        assert Guarantee.EXACT not in ram.guarantees
        with pytest.raises(AlignmentError, match=str(HUGE)):
            ram.collect(PAGE)
        check_in_units(ram, memory.start, 4 * HUGE_PAGES, HUGE_PAGES)


def test_hugetlb_begins_inside_a_huge_page(flavour: Flavour, pool: None, area: Callable[..., AddressRange]) -> None:
    """Refused, with the size to use; nothing is left behind."""
    memory = area(2 * HUGE_PAGES, 3, PRIVATE | libc.MAP_HUGETLB)
    with flavour.tracker() as tracker:
        with pytest.raises((AlignmentError, NotTrackableError)) as caught:
            tracker.track(AddressRange(memory.start + PAGE, memory.end))
        if not hugetlb_refused(flavour):
            assert isinstance(caught.value, AlignmentError)
            assert str(HUGE) in str(caught.value.hint)
            assert tracker.track(memory).granularity == HUGE


def test_hugetlb_between_small_pages(flavour: Flavour, pool: None, area: Callable[..., AddressRange]) -> None:
    """One range of several kinds reports each in its own units."""
    need_shared()
    room = area(4 * HUGE_PAGES, libc.PROT_NONE)
    start = -(-room.start // HUGE) * HUGE
    libc.mmap(HUGE, address=start)
    libc.mmap(HUGE, 3, PRIVATE | libc.MAP_HUGETLB, address=start + HUGE)
    with flavour.tracker() as tracker:
        ram = tracker.track(AddressRange.from_length(start, 3 * HUGE))
        assert pages_of(ram.collect()) == set()
        libc.fill(start + 5 * PAGE)
        libc.fill(start + HUGE + 5 * PAGE)
        assert pages_of(ram.peek()) == {5, *range(HUGE_PAGES, 2 * HUGE_PAGES)}
        assert pages_of(ram.collect()) == {5, *range(HUGE_PAGES, 2 * HUGE_PAGES)}
        assert pages_of(ram.collect()) == set()
        ram.close()
        libc.munmap(start + HUGE, HUGE)


def test_a_limit_that_has_no_room_for_a_huge_page(
    flavour: Flavour, pool: None, area: Callable[..., AddressRange]
) -> None:
    """Behind other pages it is left to the next call, whole; alone it is given whole, however low the limit is."""
    need_shared()
    start = area(3 * HUGE_PAGES).start
    libc.mmap(2 * HUGE, 3, PRIVATE | libc.MAP_HUGETLB, address=start + HUGE)
    with flavour.tracker() as tracker:
        ram = tracker.track(AddressRange.from_length(start, 3 * HUGE))
        libc.fill(start + PAGE)
        libc.fill(start + HUGE, 2 * HUGE)
        for ask in (ram.peek, ram.collect):
            result = ask(max_pages=HUGE_PAGES)
            assert (set(result.page_indices()), result.resume_at) == ({1}, HUGE)
        for ask in (ram.peek, ram.collect):
            result = ask(max_pages=HUGE_PAGES + 1)
            assert (set(result.page_indices()), result.resume_at) == (set(range(HUGE_PAGES, 2 * HUGE_PAGES)), 2 * HUGE)
        assert pages_of(ram.collect(max_pages=1)) == set(range(2 * HUGE_PAGES, 3 * HUGE_PAGES))


def test_a_limit_among_huge_pages_that_were_unprotected(
    flavour: Flavour, pool: None, area: Callable[..., AddressRange]
) -> None:
    """They are reported like written ones, one a call where it asks for less."""
    need_shared()

    def check() -> None:
        memory = area(2 * HUGE_PAGES, 3, PRIVATE | libc.MAP_HUGETLB)
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            libc.fill(memory.start, 2 * HUGE)
            ram.reset()
            ram.unprotect()
            for ask in (ram.peek, ram.collect):
                result = ask(max_pages=1)
                assert (set(result.page_indices()), result.resume_at) == (set(range(HUGE_PAGES)), HUGE)
            assert pages_of(ram.collect(max_pages=1)) == set(range(HUGE_PAGES, 2 * HUGE_PAGES))

    in_child(check)


def test_transparent_huge_pages(tracker: DirtyTracker, area: Callable[..., AddressRange]) -> None:
    """Reports stay exact at the base page, through splits and partial resets."""
    room = area(4 * HUGE_PAGES)
    start = -(-room.start // HUGE) * HUGE
    libc.madvise(start, 3 * HUGE, mmap.MADV_HUGEPAGE)
    libc.fill(start, 3 * HUGE)
    ram = tracker.track(AddressRange.from_length(start, 3 * HUGE))
    assert pages_of(ram.collect()) == set()
    libc.fill(start + 700 * PAGE)
    assert pages_of(ram.collect()) == {700}
    libc.fill(start, 3 * HUGE, 2)
    ram.reset(100 * PAGE, HUGE + 100 * PAGE)
    assert pages_of(ram.peek()) == {*range(100), *range(HUGE_PAGES + 100, 3 * HUGE_PAGES)}
    assert ram.collect(max_pages=700).pages == 700
    assert pages_of(ram.collect()) == set(range(HUGE_PAGES + 700, 3 * HUGE_PAGES))
    assert pages_of(ram.collect()) == set()
    libc.madvise(start + HUGE, HUGE, mmap.MADV_DONTNEED)
    assert pages_of(ram.collect()) == set(range(HUGE_PAGES, 2 * HUGE_PAGES))
    assert pages_of(ram.collect()) == set()


@pytest.mark.parametrize("neighbour", [False, True])
def test_a_reset_of_part_of_a_huge_page(
    tracker: DirtyTracker, area: Callable[..., AddressRange], *, neighbour: bool
) -> None:
    """Two ranges may share one, of which one is reset: kernels up to 6.14 must not crash."""
    room = area(2 * HUGE_PAGES)
    start, half = -(-room.start // HUGE) * HUGE, HUGE // 2
    libc.madvise(start, HUGE, mmap.MADV_HUGEPAGE)
    libc.fill(start, HUGE)
    lower = tracker.track((start, half)) if neighbour else None
    upper = tracker.track((start + half, half))
    for value in (2, 3):
        libc.fill(start, HUGE, value)  # from here on no page is marked, and nothing keeps it from being one again
        with contextlib.suppress(OSError):  # Linux before 6.1, or it will not
            libc.madvise(start, HUGE, MADV_COLLAPSE)
        upper.reset()
        assert pages_of(upper.collect()) == set()
        libc.fill(start + half + 7 * PAGE)
        assert pages_of(upper.collect()) == {7}
        if lower:
            assert pages_of(lower.collect()) == set(range(HUGE_PAGES // 2))


def test_memfd_and_shared_anonymous(flavour: Flavour) -> None:
    """Tracked where the kernel can, refused with the remedy where it cannot."""
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 64 * PAGE)
    with flavour.tracker() as tracker, mmap.mmap(fd, 64 * PAGE) as memory:
        os.close(fd)
        if hugetlb_refused(flavour):
            with pytest.raises(NotTrackableError) as caught:
                tracker.track(memory)
            assert "MAP_PRIVATE" in str(caught.value.hint)
            return
        with tracker.track(memory) as ram:
            wrote = write(memory, 0, 31, 63)
            assert pages_of(ram.collect()) == wrote
            assert pages_of(ram.collect()) == set()


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_file_mappings(flavour: Flavour, *, shared: bool) -> None:
    """pagemap-scan tracks them; uffd-wp refuses them, names the file and says what would."""
    with tempfile.NamedTemporaryFile(dir=Path(__file__).parent) as file:
        file.truncate(16 * PAGE)
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        with mmap.mmap(file.fileno(), 16 * PAGE, flags=flags) as memory, flavour.tracker() as tracker:
            if flavour.backend == "uffd-wp":
                with pytest.raises(NotTrackableError, match=file.name) as caught:
                    tracker.track(memory)
                assert "pagemap-scan" in str(caught.value.hint)
                return
            with tracker.track(memory) as ram:
                # Only what is discarded in a private one is not what it was, and nobody tells.
                assert (Guarantee.DISCARDS in ram.guarantees) == shared
                wrote = write(memory, 2, 3, 15)
                assert pages_of(ram.peek()) == wrote
                assert pages_of(ram.collect()) == wrote
                assert pages_of(ram.collect()) == set()


def test_many_mappings(tracker: DirtyTracker, area: Callable[..., AddressRange]) -> None:
    """2,000 mappings of alternating protection behave as one."""
    memory = area(2_000)
    for page in range(0, 2_000, 2):
        libc.mprotect(memory.start + page * PAGE, PAGE, libc.PROT_READ)
    ram = tracker.track(memory)
    assert pages_of(ram.collect()) == set()
    wrote = set(range(1, 2_000, 40))
    for page in wrote:
        libc.fill(memory.start + page * PAGE)
    assert pages_of(ram.collect()) == wrote
    libc.mprotect(memory.start, 2_000 * PAGE, 3)
    ram.reset()
    libc.fill(memory.start + 6 * PAGE, 20 * PAGE)
    assert pages_of(ram.collect()) == set(range(6, 26))


def test_writes_through_another_mapping_are_not_seen(tracker: DirtyTracker) -> None:
    """Outside the promises: the mapping is tracked, not the file."""
    need_shared()
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 8 * PAGE)
    with mmap.mmap(fd, 8 * PAGE) as watched, mmap.mmap(fd, 8 * PAGE) as other:
        write(watched, *range(8))
        with tracker.track(watched) as ram:
            write(other, 1)
            os.pwrite(fd, b"x", 2 * PAGE)
            assert pages_of(ram.collect()) == set()
    os.close(fd)


def test_a_punched_hole_keeps_its_mark(tracker: DirtyTracker) -> None:
    """Outside the promises: MADV_REMOVE changes the contents, not the mark."""
    need_shared()
    with mmap.mmap(-1, 8 * PAGE) as memory:
        write(memory, *range(8))
        with tracker.track(memory) as ram:
            memory.madvise(mmap.MADV_REMOVE, 2 * PAGE, PAGE)
            assert memory[2 * PAGE] == 0
            assert pages_of(ram.collect()) == set()


def test_moved_memory_is_not_tracked(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """mremap over part of a range takes its registration away, whatever marks the kernel keeps."""
    memory, elsewhere = area(16), area(4)
    with flavour.tracker(on_untracked="rearm") as tracker:
        other = tracker.track(elsewhere)
        for page in range(16):
            libc.fill(memory.start + page * PAGE)
        for page in range(4):
            libc.fill(elsewhere.start + page * PAGE)
        ram = tracker.track(memory)
        other.reset()
        libc.mremap(elsewhere.start, 4 * PAGE, memory.start + 4 * PAGE)
        assert pages_of(ram.peek()) == {4, 5, 6, 7}
        assert pages_of(ram.collect()) == {4, 5, 6, 7}
        libc.fill(memory.start + 5 * PAGE)
        assert pages_of(ram.collect()) == {5}
        libc.mmap(4 * PAGE, address=elsewhere.start)


def test_private_memory_that_was_never_touched(tracker: DirtyTracker) -> None:
    """A thousand empty pages, one of them written, some of them read."""
    memory = private(1_000)
    ram = tracker.track(memory)
    assert sum(memory[page * PAGE] for page in range(0, 1_000, 3)) == 0
    wrote = write(memory, 500)
    assert pages_of(ram.collect()) == wrote
