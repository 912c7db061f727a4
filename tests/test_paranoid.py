"""Backend "paranoid": silent beside everything that is allowed, and loud about each page that is lost."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
import pytest
from children import Crew, Raw, in_child
from conftest import (
    PAGE,
    Flavour,
    claims,
    flavours,
    libc,
    need_shared,
    pages_of,
    paranoid,
    part,
    private,
    use_flavour,
    write,
)
from test_concurrency import Interrupter
from test_concurrency import test_an_interrupt_anywhere_in_collect_loses_no_page as test_interrupted_collects  # noqa: F401
from test_contract import *  # noqa: F403 - all promises hold here too
from test_cursors import test_each_reader_sees_every_write_once as test_readers  # noqa: F401
from test_cursors import test_readers_come_and_go_without_a_trace as test_readers_leave_no_trace  # noqa: F401
from test_kinds import test_hugetlb  # noqa: F401
from test_model import explore

from pagemapcompat import (
    AddressRange,
    ClosedError,
    DirtyTracker,
    DisagreementError,
    Feature,
    Guarantee,
    InvalidArgumentError,
    NotTrackedError,
    ScanResult,
    TrackedRange,
    UnsupportedError,
    _kernel,
    probe,
)

pytestmark: list[Any] = []
PAGES = 64


@pytest.fixture(params=[pytest.param(paranoid(one.values[0]), id=one.id, marks=one.marks) for one in flavours()])
def flavour(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Flavour:
    """Each generation of each backend that can run here, compared."""
    return use_flavour(request.param, monkeypatch)


@pytest.fixture
def twice(flavour: Flavour) -> Iterator[tuple[mmap.mmap, mmap.mmap]]:
    """Two mappings of the same pages. What is written through the second, nobody sees."""
    need_shared()
    fd = os.memfd_create("twice")
    os.ftruncate(fd, PAGES * PAGE)
    with mmap.mmap(fd, PAGES * PAGE) as memory, mmap.mmap(fd, PAGES * PAGE) as other:
        os.close(fd)
        yield memory, other


def loses(*pages: int, call: Callable[[], object]) -> DisagreementError:
    """The error of a call that finds exactly these pages lost."""
    with pytest.raises(DisagreementError) as caught:
        call()
    assert caught.value.lost is not None
    assert pages_of(caught.value.lost) == set(pages)
    return caught.value


# -- The choice --------------------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_it_is_the_backend_that_auto_takes(flavour: Flavour) -> None:
    """With its guarantees, reasons and counters, and its name."""
    with flavour.tracker() as tracker, DirtyTracker() as real:
        assert tracker.selection == attrs.evolve(real.selection, chosen=f"paranoid: {flavour.backend}")
        assert tracker.statistics() == real.statistics()
        ram = tracker.track(private(1))
        assert repr(ram) == f"<TrackedRange {ram.range}, paranoid: {flavour.backend}>"
        assert repr(tracker) == f"<DirtyTracker paranoid: {flavour.backend}>"
        assert real.selection.chosen == flavour.backend


def test_it_is_no_better() -> None:
    """What no backend gives, it does not; and its name is among those to choose from."""
    with pytest.raises(UnsupportedError), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAGEMAPCOMPAT_DISABLE", "pagemap-scan")
        DirtyTracker("paranoid", require=Guarantee.NO_HELPER_THREAD)
    with pytest.raises(InvalidArgumentError) as caught:
        DirtyTracker("suspicious")
    assert caught.value.hint == "choose one of auto, pagemap-scan, uffd-wp, paranoid"


# -- What is lost, is found ------------------------------------------------------------------------------------------


def test_writes_through_another_mapping(twice: tuple[mmap.mmap, mmap.mmap], tracker: DirtyTracker) -> None:
    """Each reader is told by every peek, and once by a collect, which hands over the rest."""
    memory, other = twice
    ram = tracker.track(memory)
    cursor = ram.cursor()
    first = ram.snapshot()
    seen = write(memory, 3)
    other[9 * PAGE + 17], other[10 * PAGE] = 5, 6
    for _ in range(2):
        loses(9, 10, call=ram.peek)
    for call in (ram.collect, cursor.collect):
        error = loses(9, 10, call=call)
        assert error.collected is not None
        assert pages_of(error.collected) == seen
        assert pages_of(call()) == set()
    assert str(error) == (
        f"2 pages changed and were not reported; the first is at {ram.range.start + 9 * PAGE:#x}, and byte 17 of it "
        f"was 0x00 and is 0x05 (backend {tracker.selection.chosen})"
    )
    assert "another mapping" in str(error.hint)
    loses(9, 10, call=lambda: ram.restore(first))
    loses(9, 10, call=ram.snapshot)
    write(memory, 9, 10)
    assert ram.snapshot().read() == memory[:]


def descriptor() -> int:
    """The tracker's userfaultfd, the newest one there is."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[userfaultfd]":
                found.append(int(name))
        except FileNotFoundError:
            continue  # that of the listing itself
    return max(found)


@pytest.mark.kernel
def test_a_page_protected_behind_its_back(tracker: DirtyTracker) -> None:
    """A written page that is protected before anybody was told of it is lost, and found to be."""
    memory = private(PAGES)
    uffd = descriptor()
    ram = tracker.track(memory)
    for call in (ram.peek, ram.collect):
        write(memory, 1, 5, 40)
        lost = part(ram, 5, 1)
        assert _kernel.uffd_writeprotect(uffd, lost.start, lost.end, protect=True) == 0
        if not probe().supports(Feature.PAGEMAP_UFFD_WP):
            # Marks that cannot be seen are kept by the fault thread, which knows better.
            assert pages_of(call()) == {1, 5, 40}
            continue
        error = loses(5, call=call)
        assert error.collected is None or pages_of(error.collected) == {1, 40}
    assert pages_of(ram.collect()) == set()
    wrote = write(memory, 5, 6)
    assert pages_of(ram.collect()) == wrote


def test_only_what_was_asked_about(twice: tuple[mmap.mmap, mmap.mmap], tracker: DirtyTracker) -> None:
    """A loss is told by the call that should have reported it: of its part, and before the end of its walk."""
    memory, other = twice
    ram = tracker.track(memory)
    other[30 * PAGE] = 1
    assert pages_of(ram.peek(0, 30 * PAGE)) == set()
    assert pages_of(ram.collect(31 * PAGE)) == set()
    write(memory, 10, 11, 20, 25)
    limited = ram.collect(max_pages=2)
    assert limited.pages == 2
    assert not limited.complete
    assert ram.peek(max_pages=1).resume_at == 25 * PAGE
    loses(30, call=lambda: ram.peek(30 * PAGE, 31 * PAGE))
    error = loses(30, call=lambda: ram.collect(limited.resume_at or 0))
    assert error.collected is not None
    assert pages_of(error.collected) == {20, 25}


def test_a_reset_forgets_losses_too(twice: tuple[mmap.mmap, mmap.mmap], tracker: DirtyTracker) -> None:
    """Its reader's, of its part."""
    memory, other = twice
    ram = tracker.track(memory)
    cursor = ram.cursor()
    other[3 * PAGE] = other[40 * PAGE] = 1
    ram.reset(0, 10 * PAGE)
    loses(40, call=ram.collect)
    loses(3, 40, call=cursor.collect)
    other[3 * PAGE] = other[40 * PAGE] = 2
    ram.reset()
    assert pages_of(ram.collect()) == set()


def test_what_an_error_hands_over(twice: tuple[mmap.mmap, mmap.mmap], tracker: DirtyTracker) -> None:
    """It is compared too, and is no loss afterwards."""
    memory, other = twice
    ram = tracker.track(memory)
    hole = part(ram, 50, 2)
    write(memory, 7)
    libc.munmap(hole.start, hole.length)
    libc.mmap(hole.length, address=hole.start)
    with pytest.raises(NotTrackedError) as caught:
        ram.collect()
    assert caught.value.collected is not None
    assert set(caught.value.collected.page_indices()) == {7}
    other[8 * PAGE] = 1
    error = loses(8, call=ram.collect)
    assert error.collected is not None
    assert set(error.collected.page_indices()) == set()
    with pytest.raises(NotTrackedError):
        ram.collect()
    ram.rearm()
    assert pages_of(ram.collect()) == {50, 51}
    assert pages_of(ram.collect()) == set()


# -- What is allowed, is silent --------------------------------------------------------------------------------------


def test_memory_that_goes_was_not_written(tracker: DirtyTracker, area: Callable[..., AddressRange]) -> None:
    """Unmapped, made a guard page or barred: for every reader, and when it is back."""
    place = area(PAGES)
    libc.fill(place.start, place.length, 7)
    ram = tracker.track(place)
    cursor = ram.cursor()
    libc.munmap(place.start + 4 * PAGE, PAGE)
    libc.munmap(place.start + 20 * PAGE, 20 * PAGE)
    libc.mprotect(place.start + 10 * PAGE, 2 * PAGE, libc.PROT_NONE)
    gone = {4, *range(20, 40)}
    if probe().supports(Feature.MADV_GUARD):
        libc.madvise(place.start + 50 * PAGE, 2 * PAGE, libc.GUARD_INSTALL)
    assert pages_of(ram.peek()) <= {50, 51}
    assert pages_of(ram.collect()) <= {50, 51}
    libc.mmap(PAGE, address=place.start + 4 * PAGE)
    libc.mmap(20 * PAGE, address=place.start + 20 * PAGE)
    libc.mprotect(place.start + 10 * PAGE, 2 * PAGE, 3)
    if probe().supports(Feature.MADV_GUARD):
        libc.madvise(place.start + 50 * PAGE, 2 * PAGE, libc.GUARD_REMOVE)
    ram.rearm()
    libc.fill(place.start + 10 * PAGE)
    assert gone | {10} <= pages_of(cursor.collect()) <= gone | {10, 50, 51}
    assert gone | {10} <= pages_of(ram.collect()) <= gone | {10, 50, 51}
    assert pages_of(ram.collect()) <= {50, 51}
    assert pages_of(cursor.collect()) <= {50, 51}


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_random_programs(flavour: Flavour, kind: str) -> None:
    """Readers, snapshots, restores, resets and declared writes, beside threads that write."""
    if kind == "shared":
        need_shared()
    explore(flavour, kind, 2, 25)


def test_threads_of_all_kinds(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """Several collect through one reader while others write, unmap, map, discard, bar and declare pages."""
    place = area(PAGES)

    def writer(seed: int, stop: threading.Event) -> None:
        dice = random.Random(seed)
        while not stop.is_set():
            libc.fill(place.start + dice.randrange(32) * PAGE + dice.randrange(PAGE - 8), 8, dice.randrange(256))

    def changer(ram: TrackedRange, stop: threading.Event) -> None:
        dice = random.Random(3)
        while not stop.is_set():
            at = place.start + (32 + dice.randrange(24)) * PAGE
            libc.fill(at, 8 * PAGE, dice.randrange(256))
            match dice.randrange(4 if claims(ram._keep, Guarantee.DISCARDS) else 3):  # type: ignore[arg-type]
                case 0:
                    libc.munmap(at, 2 * PAGE)
                    ram.peek(32 * PAGE)
                    libc.mmap(2 * PAGE, address=at)
                case 1:
                    libc.mprotect(at, 2 * PAGE, libc.PROT_NONE)
                    libc.mprotect(at, 2 * PAGE, 3)
                case 2:
                    first = (at - place.start) // PAGE
                    ram.rearm(first * PAGE, (first + 8) * PAGE)
                    ram.unprotect(first * PAGE, (first + 1) * PAGE)
                case _:
                    libc.madvise(at, 2 * PAGE, mmap.MADV_DONTNEED)

    def reader(ram: TrackedRange, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(25):
            first = dice.randrange(PAGES)
            match dice.randrange(6):
                case 0:
                    ram.peek(first * PAGE)
                case 1:
                    ram.collect(first * PAGE, max_pages=1 + dice.randrange(9))
                case 2:
                    ram.reset(first * PAGE, min(first + 5, PAGES) * PAGE)
                case 3:
                    with ram.cursor() as other:
                        other.collect()
                case 4:
                    ram.snapshot()
                case _:
                    ram.collect()

    def check() -> None:
        sys.setswitchinterval(1e-5)
        with flavour.tracker(on_untracked="rearm") as tracker:
            ram = tracker.track(place)
            changers, readers, stop = Crew(), Crew(), threading.Event()
            for seed in range(2):
                changers.add(writer, seed, stop)
            changers.add(changer, ram, stop)
            for seed in range(3):
                readers.add(reader, ram, seed)
            while readers.working:
                ram.collect()
            stop.set()
            changers.join()
            readers.join()

    in_child(check)


@pytest.mark.parametrize("operation", ["peek", "reset", "snapshot", "cursor"])
def test_interrupts_are_no_losses(flavour: Flavour, operation: str) -> None:
    """At each point of a call in turn."""

    def check() -> None:
        with flavour.tracker() as tracker:
            memory = private(16)
            ram = tracker.track(memory)
            ram.snapshot()
            call = getattr(ram, operation)
            for step in itertools.count(1):
                wrote = write(memory, 2, 5)
                interrupter = Interrupter(getattr(TrackedRange, operation), step, twice=False)
                try:
                    with interrupter:
                        call()
                except KeyboardInterrupt:
                    pass
                got = pages_of(ram.collect())
                assert got == wrote or (operation == "reset" and not got)
                assert ram.snapshot().read() == memory[:]
                if not interrupter.raised:
                    break
            assert step > 5

    in_child(check)


def test_a_signal_handler_may_ask_too(tracker: DirtyTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a call of the same reader. What it is told, the other was not, and need not be."""
    memory = private(PAGES)
    ram = tracker.track(memory)
    moments = {
        ram.collect: ("collect_all", "capture", "compare"),
        ram.peek: ("compare", "peek_all"),
        ram.snapshot: ("scan", "capture", "compare"),
    }
    for call, name in ((call, name) for call, names in moments.items() for name in names):
        original = getattr(_kernel, name)
        told: set[int] = set()
        asked: list[bool] = []

        def interrupted(*arguments: Any, original: Any = original, asked: Any = asked, told: Any = told) -> int:
            if not asked:
                asked.append(True)
                write(memory, 30)
                told |= pages_of(ram.collect())
                write(memory, 31)
            return int(original(*arguments))

        write(memory, 7)
        with monkeypatch.context() as patch:
            patch.setattr(_kernel, name, interrupted)
            result = call()
        assert asked
        if call == ram.collect:
            assert isinstance(result, ScanResult)
            told |= pages_of(result)
        assert told | pages_of(ram.collect()) == {7, 30, 31}
        wrote = write(memory, 7, 8)
        assert pages_of(ram.collect()) == wrote


def test_calls_of_one_reader_come_one_after_the_other(tracker: DirtyTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one thread takes between another's answer and its comparison would be lost for that."""
    ram = tracker.track(private(PAGES))
    free: list[bool] = []

    def looked_at(result: _kernel.Result, *, scan: Any) -> int:
        crew = Crew()
        crew.add(lambda: free.append(lock_of(ram).acquire(blocking=False)))
        crew.join()
        return int(scan(result))

    for name in ("peek_all", "collect_all"):
        monkeypatch.setattr(_kernel, name, partial(looked_at, scan=getattr(_kernel, name)))
    ram.peek()
    ram.collect()
    assert free == [False, False]


def lock_of(ram: TrackedRange) -> Any:
    """What a call of its first reader holds."""
    return ram._backend._shadows[ram._attached].lock  # type: ignore[attr-defined]


@pytest.mark.parametrize("by_python", [True, False], ids=["os.fork", "fork"])
def test_a_forked_child_does_not_wait(flavour: Flavour, by_python: bool) -> None:
    """For a thread of its parent's that was using the reader."""

    def scenario() -> None:
        with flavour.tracker() as tracker:
            ram = tracker.track(private(PAGES))
            held, release, crew = threading.Event(), threading.Event(), Crew()

            def hold() -> None:
                with lock_of(ram):
                    held.set()
                    release.wait()

            def child() -> None:
                for action in (ram.peek, ram.collect, ram.reset, ram.cursor, ram.snapshot):
                    with pytest.raises(ClosedError, match="forked"):
                        action()

            crew.add(hold)
            held.wait()
            if by_python:
                in_child(child)
            else:
                raw = Raw()
                raw.fork(child)
                raw.end()
            release.set()
            crew.join()

    in_child(scenario)


def test_copies_end_with_their_readers(tracker: DirtyTracker) -> None:
    """Closed, or dropped, or closed with their range."""
    ram = tracker.track(private(PAGES))
    shadows = ram._backend._shadows  # type: ignore[attr-defined]
    ram.snapshot()
    kept = [ram.cursor() for _ in range(3)]
    assert len(shadows) == 5
    kept.pop().close()
    kept.pop()
    assert len(shadows) == 3
    ram.close()
    assert len(shadows) == 0
