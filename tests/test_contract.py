"""The promises, on every flavour of both backends."""

from __future__ import annotations

import mmap
import os
import random
from functools import partial
from typing import TYPE_CHECKING

import pytest
from conftest import PAGE, PRIVATE, Flavour, area, claims, lacking, libc, pages_of, part, private, write  # noqa: F401

from pagemapcompat import (
    AddressRange,
    DirtyTracker,
    Feature,
    Guarantee,
    NotTrackableError,
    NotTrackedError,
    PageCategory,
    ScanResult,
    probe,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kernel

MADV_DONTNEED = mmap.MADV_DONTNEED


def test_starts_clean_and_reports_each_write_once(tracker: DirtyTracker) -> None:
    """What was written before is not reported, what is written afterwards is, once."""
    memory = private(64)
    write(memory, 1, 2, 3)
    ram = tracker.track(memory)
    assert pages_of(ram.collect()) == set()
    wrote = write(memory, 0, 5, 6, 63)
    assert pages_of(ram.peek()) == wrote
    assert pages_of(ram.collect()) == wrote
    assert pages_of(ram.collect()) == set()
    assert pages_of(ram.peek()) == set()


def test_reading_is_not_writing(tracker: DirtyTracker) -> None:
    """A read of a page that was never touched, or of one that was, changes nothing."""
    memory = private(32)
    write(memory, 3)
    ram = tracker.track(memory)
    assert sum(memory[page * PAGE] for page in range(32)) == 1
    assert pages_of(ram.collect()) == set()


def test_peek_changes_nothing(tracker: DirtyTracker) -> None:
    """Any number of peeks leave the collect as it is."""
    memory = private(16)
    ram = tracker.track(memory)
    wrote = write(memory, 4, 9)
    for _ in range(3):
        assert pages_of(ram.peek()) == wrote
    assert pages_of(ram.collect()) == wrote


def test_reset_forgets(tracker: DirtyTracker) -> None:
    """What was written before a reset is not reported; a sub-range forgets its own alone."""
    memory = private(16)
    ram = tracker.track(memory)
    write(memory, *range(16))
    ram.reset(4 * PAGE, 8 * PAGE)
    assert pages_of(ram.peek()) == set(range(16)) - {4, 5, 6, 7}
    ram.reset()
    assert pages_of(ram.collect()) == set()
    assert pages_of(ram.collect()) == set()
    wrote = write(memory, 5)
    assert pages_of(ram.collect()) == wrote


def test_unprotect_counts_as_written_once(tracker: DirtyTracker) -> None:
    """Every page, empty ones too, until the next collect or reset."""
    memory = private(16)
    write(memory, 3)
    ram = tracker.track(memory)
    ram.unprotect(2 * PAGE, 6 * PAGE)
    assert pages_of(ram.peek()) == {2, 3, 4, 5}
    write(memory, 4)
    assert pages_of(ram.peek()) == {2, 3, 4, 5}
    assert pages_of(ram.collect()) == {2, 3, 4, 5}
    assert pages_of(ram.collect()) == set()
    wrote = write(memory, 3)
    assert pages_of(ram.collect()) == wrote
    ram.unprotect()
    ram.reset()
    assert pages_of(ram.collect()) == set()


def test_sub_ranges_collect_their_own(tracker: DirtyTracker) -> None:
    """Offsets count from the start of the memory, and what lies outside stays written."""
    memory = private(32)
    ram = tracker.track(memory)
    write(memory, *range(32))
    result = ram.collect(8 * PAGE, 16 * PAGE)
    assert list(result.spans()) == [(8 * PAGE, 16 * PAGE)]
    assert pages_of(ram.collect()) == set(range(32)) - set(range(8, 16))
    assert pages_of(ram.collect()) == set()


def test_max_pages_stops_and_resumes(tracker: DirtyTracker) -> None:
    """Each call returns at most so many, protects only those, and says where to go on."""
    memory = private(64)
    ram = tracker.track(memory)
    wrote = write(memory, *range(0, 64, 2))
    first = ram.collect(max_pages=10)
    assert first.pages == 10
    assert not first.complete
    assert first.resume_at == 20 * PAGE
    assert first.walk_end == ram.range.start + 20 * PAGE
    assert pages_of(ram.peek()) == {page for page in wrote if page >= 20}
    rest: set[int] = set(first.page_indices())
    at = first.resume_at
    while at is not None:
        result = ram.collect(at, max_pages=7)
        rest |= set(result.page_indices())
        at = result.resume_at
    assert rest == wrote
    assert pages_of(ram.collect()) == set()


@pytest.mark.parametrize("limit", [32, 33, 10**6])
def test_a_limit_that_is_not_reached_is_complete(tracker: DirtyTracker, limit: int) -> None:
    """Also when the last written page is the last one admitted."""
    memory = private(64)
    ram = tracker.track(memory)
    wrote = write(memory, *range(0, 64, 2))
    result = ram.collect(max_pages=limit)
    assert result.complete
    assert result.resume_at is None
    assert set(result.page_indices()) == wrote


def test_more_regions_than_one_vector(tracker: DirtyTracker) -> None:
    """1,200 regions come without a gap or a repeat, in order."""
    memory = private(2_400)
    ram = tracker.track(memory)
    wrote = write(memory, *range(1, 2_400, 2))
    result = ram.collect()
    assert len(result) == 1_200
    assert list(result.page_indices()) == sorted(wrote)
    assert all(region.categories == PageCategory.WRITTEN for region in result)
    assert pages_of(ram.collect()) == set()


def test_neighbours_are_one_region(tracker: DirtyTracker) -> None:
    """However many pieces the engine reads and protects them in."""
    memory = private(9_000)
    ram = tracker.track(memory)
    ram.unprotect(PAGE, 8_801 * PAGE)  # or writing would take a fault a page
    libc.fill(ram.range.start + PAGE, 8_900 * PAGE)
    assert [(region.start, region.pages) for region in ram.peek()] == [(ram.range.start + PAGE, 8_900)]
    assert [(region.start, region.pages) for region in ram.collect()] == [(ram.range.start + PAGE, 8_900)]
    ram.unprotect(5 * PAGE, 10 * PAGE)
    libc.fill(ram.range.start + 10 * PAGE, 3 * PAGE)
    assert [region.pages for region in ram.collect()] == [8]


def test_random_rounds_agree_with_a_model(tracker: DirtyTracker) -> None:
    """Sixty rounds of random writes, each collected exactly."""
    pages, dice = 2_000, random.Random(1)
    memory = private(pages)
    ram = tracker.track(memory)
    pending: set[int] = set()
    for _ in range(60):
        pending |= write(memory, *dice.sample(range(pages), dice.randrange(60)))
        match dice.randrange(4):
            case 0:
                assert pages_of(ram.peek()) == pending
            case 1:
                lo, hi = sorted(dice.sample(range(pages + 1), 2))
                inside = {page for page in pending if lo <= page < hi}
                assert pages_of(ram.collect(lo * PAGE, hi * PAGE)) == inside
                pending -= inside
            case 2:
                got = set(ram.collect(max_pages=20).page_indices())
                assert got == set(sorted(pending)[:20])
                pending -= got
            case 3:
                assert pages_of(ram.collect()) == pending
                pending = set()


def test_the_threads_own_scenario(flavour: Flavour, area) -> None:  # noqa: F811
    """16 PROT_NONE pages, half of them made read-write: protecting all 16 succeeds; so with guard pages and holes."""
    memory = area(16, libc.PROT_NONE)
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        libc.mprotect(memory.start, 8 * PAGE, 3)
        ram.reset()
        assert pages_of(ram.collect()) == set()
        for page in (0, 5, 7):
            libc.fill(memory.start + page * PAGE)
        assert pages_of(ram.collect()) == {0, 5, 7}

        # Guard pages among them, and protections juggled.
        libc.fill(memory.start + 2 * PAGE)
        libc.mprotect(memory.start + 2 * PAGE, PAGE, libc.PROT_NONE)
        libc.mprotect(memory.start + 4 * PAGE, PAGE, libc.PROT_READ)
        libc.mprotect(memory.start + 8 * PAGE, 4 * PAGE, 3)
        libc.fill(memory.start + 9 * PAGE)
        assert pages_of(ram.peek()) == {2, 9}
        assert pages_of(ram.collect()) == {2, 9}
        libc.mprotect(memory.start, 16 * PAGE, 3)
        ram.reset()
        libc.fill(memory.start + 2 * PAGE)
        assert pages_of(ram.collect()) == {2}

        # Holes are skipped.
        libc.munmap(memory.start + 6 * PAGE, 2 * PAGE)
        libc.fill(memory.start + 5 * PAGE)
        libc.fill(memory.start + 8 * PAGE)
        assert pages_of(ram.collect()) == {5, 8}
        ram.reset()
        assert pages_of(ram.collect()) == set()

        # Mapped anew: not tracked any more, and what came before it is handed over.
        libc.mmap(2 * PAGE, address=memory.start + 6 * PAGE)
        libc.fill(memory.start + 3 * PAGE)
        libc.fill(memory.start + 6 * PAGE)
        libc.fill(memory.start + 7 * PAGE)
        libc.fill(memory.start + 12 * PAGE)
        assert pages_of(ram.peek()) == {3, 6, 7, 12}
        with pytest.raises(NotTrackedError) as caught:
            ram.collect()
        assert caught.value.range == part(ram, 6, 2)
        assert caught.value.collected is not None
        assert set(caught.value.collected.page_indices()) == {3}
        assert caught.value.collected.resume_at == 6 * PAGE
        assert caught.value.hint is not None
        with pytest.raises(NotTrackedError):
            ram.reset()
        with pytest.raises(NotTrackedError):
            ram.unprotect(6 * PAGE, 8 * PAGE)
        ram.rearm()
        assert pages_of(ram.collect()) == {6, 7, 12}
        libc.fill(memory.start + 7 * PAGE)
        assert pages_of(ram.collect()) == {7}


def test_rearm_policy_goes_on(flavour: Flavour, area) -> None:  # noqa: F811
    """With on_untracked="rearm" new memory is reported written once, and watched from then on."""
    memory = area(32)
    with flavour.tracker(on_untracked="rearm") as tracker:
        ram = tracker.track(memory)
        libc.munmap(memory.start + 8 * PAGE, 8 * PAGE)
        assert pages_of(ram.collect()) == set()
        libc.mmap(4 * PAGE, address=memory.start + 10 * PAGE)
        for page in (1, 10, 11, 12, 13, 20):
            libc.fill(memory.start + page * PAGE)
        assert pages_of(ram.collect()) == {1, 10, 11, 12, 13, 20}
        assert pages_of(ram.collect()) == set()
        libc.fill(memory.start + 12 * PAGE)
        assert pages_of(ram.collect()) == {12}
        libc.mmap(4 * PAGE, address=memory.start + 10 * PAGE)
        libc.fill(memory.start + 11 * PAGE)
        ram.reset()
        assert pages_of(ram.collect()) == set()
        libc.fill(memory.start + 13 * PAGE)
        assert pages_of(ram.collect()) == {13}


@pytest.mark.parametrize("policy", ["raise", "rearm"])
def test_a_limit_comes_before_untracked_memory(flavour: Flavour, area, policy: str) -> None:  # noqa: F811
    """What lies behind the last page that was asked for is the next call's to find."""
    memory = area(32)
    with flavour.tracker(on_untracked=policy) as tracker:
        ram = tracker.track(memory)
        for page in (3, 4):
            libc.fill(memory.start + page * PAGE)
        libc.mmap(2 * PAGE, address=memory.start + 8 * PAGE)
        result = ram.collect(max_pages=2)
        assert set(result.page_indices()) == {3, 4}
        assert result.resume_at == 8 * PAGE
        with pytest.raises(NotTrackedError):
            ram.unprotect(8 * PAGE, 10 * PAGE)


def test_unmapped_memory_is_skipped_even_if_nothing_is_left(tracker: DirtyTracker, area) -> None:  # noqa: F811
    """No operation fails on a hole, and none reports it."""
    memory = area(16)
    ram = tracker.track(memory)
    for page in range(16):
        libc.fill(memory.start + page * PAGE)
    libc.munmap(memory.start, 16 * PAGE)
    assert pages_of(ram.peek()) == set()
    assert pages_of(ram.collect()) == set()
    ram.reset()
    ram.unprotect()
    ram.rearm()
    assert pages_of(ram.collect()) == set()
    libc.mmap(16 * PAGE, address=memory.start)


def test_a_discarded_page_is_a_changed_page(tracker: DirtyTracker) -> None:
    """MADV_DONTNEED of written and unwritten pages is reported, and so is what is written after it."""
    memory = private(1024)
    write(memory, *range(1024))
    ram = tracker.track(memory)
    memory.madvise(MADV_DONTNEED, 16 * PAGE, 4 * PAGE)
    assert pages_of(ram.collect()) == {16, 17, 18, 19}
    assert pages_of(ram.collect()) == set()
    wrote = write(memory, 17)
    assert pages_of(ram.collect()) == wrote
    memory.madvise(MADV_DONTNEED, 0, 1024 * PAGE)
    assert pages_of(ram.collect()) == set(range(1024))
    assert pages_of(ram.collect()) == set()


def test_a_page_discarded_and_written_again_is_reported(tracker: DirtyTracker) -> None:
    """Where DISCARDS is promised. Where it is not, the write is missed and later ones are not."""
    memory = private(64)
    write(memory, *range(64))
    ram = tracker.track(memory)
    memory.madvise(MADV_DONTNEED, 8 * PAGE, 2 * PAGE)
    wrote = write(memory, 8, 9)
    assert pages_of(ram.collect()) == (wrote if claims(tracker, Guarantee.DISCARDS) else set())
    wrote = write(memory, 8)
    assert pages_of(ram.collect()) == wrote


def test_trackers_on_different_memory_coexist(flavour: Flavour) -> None:
    """Each reports its own."""
    one, two = private(8), private(8)
    with flavour.tracker() as first, flavour.tracker() as second:
        a, b = first.track(one), second.track(two)
        write(one, 1)
        write(two, 2)
        assert pages_of(a.collect()) == {1}
        assert pages_of(b.collect()) == {2}


def test_several_ranges_of_one_tracker(tracker: DirtyTracker) -> None:
    """Closing one leaves the others."""
    memories = [private(8) for _ in range(5)]
    rams = [tracker.track(memory) for memory in memories]
    for i, memory in enumerate(memories):
        write(memory, i)
    rams[2].close()
    for i, ram in enumerate(rams):
        if i != 2:
            assert pages_of(ram.collect()) == {i}
    write(memories[2], 3)
    assert tracker.statistics().ranges == 4


def test_kernel_writes(tracker: DirtyTracker) -> None:
    """read(2) into protected pages succeeds and is reported, where KERNEL_WRITES is promised."""
    memory = private(16)
    ram = tracker.track(memory)
    assert claims(tracker, Guarantee.KERNEL_WRITES) or os.geteuid() != 0
    if not claims(tracker, Guarantee.KERNEL_WRITES):
        with memoryview(memory)[PAGE : 2 * PAGE] as view, open("/dev/zero", "rb") as zero:
            with pytest.raises(OSError, match="Bad address"):
                os.readv(zero.fileno(), [view])
        return
    with memoryview(memory)[3 * PAGE : 6 * PAGE - 1] as view, open("/dev/zero", "rb") as zero:
        assert os.readv(zero.fileno(), [view]) == 3 * PAGE - 1
    assert pages_of(ram.collect()) == {3, 4, 5}


def test_shared_memory(flavour: Flavour) -> None:
    """Where it can be tracked at all; and then exactly, also after a discard, which keeps its contents."""
    memory = mmap.mmap(-1, 600 * PAGE)
    write(memory, 1)
    with flavour.tracker() as tracker:
        if not probe().supports(Feature.UFFD_WP_HUGETLBFS_SHMEM):
            with pytest.raises(NotTrackableError, match="shared"):
                tracker.track(memory)
            return
        ram = tracker.track(memory)
        assert pages_of(ram.collect()) == set()
        wrote = write(memory, *range(0, 600, 2))
        assert pages_of(ram.peek()) == wrote
        assert pages_of(ram.collect()) == wrote
        assert pages_of(ram.collect()) == set()
        wrote = write(memory, 7)
        assert pages_of(ram.collect()) == wrote
        memory.madvise(MADV_DONTNEED, 0, 8 * PAGE)
        wrote = write(memory, 3)
        assert pages_of(ram.collect()) >= wrote


def test_unaligned_mmap_clips_its_last_span(tracker: DirtyTracker) -> None:
    """The tail page is the mapping's own, and the last span ends where the memory does."""
    memory = mmap.mmap(-1, 3 * PAGE + 100, flags=PRIVATE)
    ram = tracker.track(memory)
    memory[3 * PAGE + 5] = 1
    assert list(ram.collect().spans()) == [(3 * PAGE, 3 * PAGE + 100)]
    memory[2 * PAGE] = 1
    assert list(ram.collect(2 * PAGE, len(memory)).spans()) == [(2 * PAGE, 3 * PAGE)]


def test_a_large_reserve_stays_quiet(flavour: Flavour, area) -> None:  # noqa: F811
    """1 GiB of PROT_NONE, a little of it in use."""
    memory = area((1 << 30) // PAGE, libc.PROT_NONE, PRIVATE | libc.MAP_NORESERVE)
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        assert pages_of(ram.collect()) == set()
        libc.mprotect(memory.start + 1000 * PAGE, 100 * PAGE, 3)
        libc.fill(memory.start + 1000 * PAGE)
        libc.fill(memory.start + 1099 * PAGE)
        assert pages_of(ram.collect()) == {1000, 1099}
        assert pages_of(ram.collect()) == set()


def test_empty_ranges_are_complete(tracker: DirtyTracker) -> None:
    """start == stop asks for nothing and gets it."""
    ram = tracker.track(private(4))
    result = ram.collect(2 * PAGE, 2 * PAGE)
    assert (len(result), result.complete, result.resume_at) == (0, True, None)
    ram.reset(0, 0)
    ram.unprotect(PAGE, PAGE)
    assert ram.peek(4 * PAGE, 4 * PAGE).complete


def test_results_outlive_the_tracker(flavour: Flavour) -> None:
    """A result is a value."""
    memory = private(8)
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        write(memory, 1, 4)
        result = ram.collect()
        view = result.as_u64()
    base = result.range.start
    assert list(view) == [base + PAGE, base + 2 * PAGE, 2, base + 4 * PAGE, base + 5 * PAGE, 2]
    assert result.range == AddressRange.from_length(base, 8 * PAGE)
    memory.close()


def test_what_anybody_has_of_an_answer_never_changes(tracker: DirtyTracker) -> None:
    """Its memory is filled again only once nobody has it, a view of it, or an iterator over it."""
    takes: dict[str, Callable[[ScanResult], Callable[[], list[int]]]] = {
        "answer": lambda answer: lambda: list(answer.page_indices()),
        "view": lambda answer: partial(lambda view: [(word - base) // PAGE for word in view[::3]], answer.as_u64()),
        "view of a view": lambda answer: partial(
            lambda view: [(word - base) // PAGE for word in view], answer.as_u64()[::3]
        ),
        "regions": lambda answer: partial(lambda some: [(one.start - base) // PAGE for one in some], iter(answer)),
        "pages": lambda answer: partial(list, answer.page_indices()),
        "spans": lambda answer: partial(lambda some: [start // PAGE for start, _ in some], answer.spans()),
    }
    memory = private(64)
    ram = tracker.track(memory)
    base = ram.range.start
    kept: list[tuple[str, list[int], Callable[[], list[int]]]] = []
    for number in range(10):
        for name, take in takes.items():
            pages = [number, 12 + number * 2, 40 + number * 2]
            write(memory, *pages)
            kept.append((name, pages, take(ram.peek() if number % 2 else ram.collect())))
            ram.collect()
    for name, pages, read in kept:
        assert read() == pages, name


def test_guard_pages_are_reported_at_most_once(flavour: Flavour, area) -> None:  # noqa: F811
    """After they are installed, and again after they are removed."""
    memory = area(64)
    try:
        libc.madvise(memory.start, PAGE, libc.GUARD_INSTALL)
    except OSError:
        lacking("madv-guard", "this kernel has no guard pages (EINVAL)", "Linux 6.13 or newer")
    with flavour.tracker() as tracker:
        for page in range(1, 64):
            libc.fill(memory.start + page * PAGE)
        ram = tracker.track(memory)
        assert pages_of(ram.collect()) <= {0}
        libc.madvise(memory.start + 4 * PAGE, 2 * PAGE, libc.GUARD_INSTALL)
        assert pages_of(ram.collect()) == {4, 5}
        assert pages_of(ram.collect()) == set()
        libc.madvise(memory.start, 5 * PAGE, libc.GUARD_REMOVE)
        assert pages_of(ram.collect()) <= {0, 4}
        assert pages_of(ram.collect()) == set()
        libc.fill(memory.start + 4 * PAGE)
        assert pages_of(ram.collect()) == {4}
        libc.madvise(memory.start + 10 * PAGE, PAGE, libc.GUARD_INSTALL)
        ram.reset()
        assert pages_of(ram.collect()) == set()
