"""What is opened is closed, whoever forgets it, in any order; the interpreter ends normally around open trackers."""

from __future__ import annotations

import gc
import mmap
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from children import Crew, in_child, resources
from conftest import PAGE, PRIVATE, Flavour, libc, pages_of, private, run_child, write

from pagemapcompat import (
    AlignmentError,
    AlreadyRegisteredError,
    ClosedError,
    DirtyTracker,
    NotTrackableError,
    NotTrackedError,
    PagemapCompatError,
)


def once(flavour: Flavour, memory: mmap.mmap) -> None:
    """Open, track, use, close."""
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        write(memory, 1, 3, 5)
        assert pages_of(ram.collect()) == {1, 3, 5}


def fail(flavour: Flavour, memory: mmap.mmap) -> None:
    """All kinds of failures, on a tracker that goes on."""
    address = 0
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        address = ram.range.start
        readonly = mmap.mmap(-1, PAGE, flags=PRIVATE, prot=mmap.PROT_READ)
        bad: tuple[tuple[Any, type[PagemapCompatError]], ...] = (
            (memory, AlreadyRegisteredError),
            ((address + PAGE, PAGE), AlreadyRegisteredError),
            ((address + 1, PAGE), AlignmentError),
            (readonly, NotTrackableError),
            ((PAGE * 4, PAGE), NotTrackableError),
        )
        for what, error in bad:
            with pytest.raises(error):
                DirtyTracker.track(tracker, what)
        with pytest.raises(AlignmentError):
            ram.collect(1)
        libc.mmap(PAGE, address=address + 4 * PAGE)
        with pytest.raises(NotTrackedError):
            ram.collect()
        ram.rearm()
        ram.collect()
        readonly.close()


@pytest.mark.parametrize("deed", [once, fail], ids=lambda deed: deed.__name__)
def test_fifty_rounds_leave_nothing_behind(flavour: Flavour, deed: Callable[[Flavour, mmap.mmap], None]) -> None:
    """Descriptors, threads and mappings are the same before and after, successes or failures."""

    def check() -> None:
        memory = private(8)
        for _ in range(5):
            deed(flavour, memory)  # what is imported, cached or pooled once
        before = resources()
        for _ in range(50):
            deed(flavour, memory)
        after = resources()
        assert before[:2] == after[:2]
        # The allocators of Python and C may take a piece more; fifty leaked mappings they do not make.
        assert len(after[2]) - len(before[2]) < 10

    in_child(check)


def test_an_opening_that_fails_leaves_nothing_behind(flavour: Flavour) -> None:
    """At whatever descriptor the limit strikes."""

    def check() -> None:
        import resource

        once(flavour, private(8))
        gc.collect()
        used = {int(name) for name in os.listdir("/proc/self/fd")}
        before = resources()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        failures, tracker = 0, None
        for spare in range(1, 20):
            room = sorted(set(range(200)) - used)[spare - 1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (room, limits[1]))
            try:
                tracker = DirtyTracker(flavour.backend)
            except PagemapCompatError:
                failures += 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            if tracker:
                tracker.close()
                break
        assert tracker is not None
        assert failures
        del tracker
        assert resources()[:2] == before[:2]

    in_child(check)


def warned(forget: Callable[[], object]) -> set[str]:
    """What kinds of objects warn that they were left unclosed when *forget* drops them."""
    with warnings.catch_warnings():
        kinds: set[str] = set()
        # Keeps the text alone: a recorded warning holds its source, which would bring it back to life.
        warnings.showwarning = lambda message, kind, *_: kinds.add(f"{kind.__name__} {str(message).split()[1]}")
        warnings.simplefilter("always")
        forget()
        gc.collect()
    return kinds


def test_forgotten_objects_close_themselves(flavour: Flavour) -> None:
    """With a ResourceWarning for each; their memory can be tracked again, and the buffer is let go."""

    def check() -> None:
        memory = private(8)
        kept = {"tracker": DirtyTracker(flavour.backend)}
        kept["ram"] = kept["tracker"].track(memory)
        before = resources()[:2]
        assert warned(lambda: kept.pop("ram")) == {"ResourceWarning <TrackedRange"}
        kept["ram"] = kept["tracker"].track(memory)
        write(memory, 1)
        assert pages_of(kept["ram"].collect()) == {1}
        assert warned(kept.clear) >= {"ResourceWarning <TrackedRange"}
        assert resources()[:2] != before
        memory.close()

    in_child(check)


@pytest.mark.parametrize("order", ["range", "tracker", "both"])
def test_forgotten_in_a_reference_cycle(flavour: Flavour, order: str) -> None:
    """The garbage collector finalises a cycle in any order: nothing crashes, and all of it is closed."""

    def check() -> None:
        memory = private(8)
        tracker = DirtyTracker(flavour.backend)
        ram = tracker.track(memory)
        kept = {"tracker": tracker, "ram": ram}
        if order in ("range", "both"):
            ram.__dict__["cycle"] = [ram]
        if order in ("tracker", "both"):
            tracker.__dict__["cycle"] = [tracker, ram]
        del tracker, ram
        assert "ResourceWarning <TrackedRange" in warned(kept.clear)
        memory.close()
        once(flavour, private(8))

    in_child(check)


def test_a_range_outlives_the_name_of_its_tracker(flavour: Flavour) -> None:
    """Dropping the tracker alone either keeps it for the range or closes both; nothing crashes and nothing is lost."""

    def check() -> None:
        memory = private(8)
        kept = {"tracker": DirtyTracker(flavour.backend)}
        ram = kept["tracker"].track(memory)
        closed = warned(kept.clear)
        wrote = write(memory, 3)
        if closed:
            with pytest.raises(ClosedError):
                ram.collect()
        else:
            assert pages_of(ram.collect()) == wrote
        ram.close()
        memory.close()

    in_child(check)


def test_closed_objects_give_no_warning(flavour: Flavour) -> None:
    """Whatever was closed, by hand or with its tracker, goes quietly."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory = private(8)
        tracker = DirtyTracker(flavour.backend)
        ram = tracker.track(memory)
        tracker.close()
        del ram, tracker
        gc.collect()


@pytest.mark.parametrize("first", ["range", "tracker"])
def test_closing_is_idempotent_and_in_any_order(flavour: Flavour, first: str) -> None:
    """Twice each, range or tracker first; afterwards every method says ClosedError and the pin is gone."""
    memory, spare = private(8), private(8)
    tracker = DirtyTracker(flavour.backend)
    ram = tracker.track(memory)
    write(memory, 2)
    result = ram.collect()
    with pytest.raises(BufferError):
        memory.close()
    for _ in range(2):
        (ram if first == "range" else tracker).close()
    if first == "range":
        with tracker.track(memory) as again:
            wrote = write(memory, 5)
            assert pages_of(again.collect()) == wrote
    for _ in range(2):
        tracker.close()
        ram.close()
    for call in (ram.peek, ram.collect, ram.reset, ram.unprotect, ram.rearm, tracker.statistics):
        with pytest.raises(ClosedError):
            call()
    with pytest.raises(ClosedError):
        tracker.track(spare)
    assert pages_of(result) == {2}
    assert "closed" in repr(tracker)
    assert "closed" in repr(ram)
    memory.close()


def test_memory_is_writable_after_close(flavour: Flavour) -> None:
    """No page stays protected: the kernel's own stores succeed too, and so does another tracker."""
    memory = private(16)
    write(memory, *range(16))
    for _ in range(2):
        with flavour.tracker() as tracker:
            tracker.track(memory).collect()
        with open("/dev/zero", "rb") as zero, memoryview(memory) as view:
            assert os.readv(zero.fileno(), [view]) == 16 * PAGE
        assert not any(memory[page * PAGE] for page in range(16))


def test_exceptions_leave_a_with_block_closed(flavour: Flavour) -> None:
    """The range, the tracker and the exception."""
    memory = private(8)
    with pytest.raises(ZeroDivisionError), DirtyTracker(flavour.backend) as tracker, tracker.track(memory) as ram:
        write(memory, 1)
        raise ZeroDivisionError
    with pytest.raises(ClosedError):
        ram.collect()
    memory.close()


def test_trackers_come_and_go_in_threads(flavour: Flavour) -> None:
    """Each is exact, memory that several want has one owner at a time, and nothing is left behind."""

    def check() -> None:
        wanted = private(8)
        owned: list[int] = []

        def come_and_go(number: int) -> None:
            memory = private(16)
            for _ in range(10):
                tracker = DirtyTracker(flavour.backend)
                ram = tracker.track(memory)
                cursor = ram.cursor()
                wrote = write(memory, number, 15)
                try:
                    with tracker.track(wanted) as mine:
                        owned.append(number)
                        write(wanted, 3)
                        assert pages_of(mine.collect()) == {3}
                        assert pages_of(mine.collect()) == set()
                except AlreadyRegisteredError:
                    pass
                assert pages_of(cursor.collect()) == pages_of(ram.collect()) == wrote
                for one in (cursor, ram, tracker) if number % 2 else (tracker, cursor, ram):
                    one.close()
            memory.close()

        once(flavour, private(8))
        before = resources()
        crew = Crew()
        for number in range(6):
            crew.add(come_and_go, number)
        crew.join()
        assert owned
        after = resources()
        assert before[0] == after[0]
        assert before[1] == after[1]
        once(flavour, wanted)

    in_child(check)


def test_an_array_pins_its_memory(flavour: Flavour) -> None:
    """While it is tracked, and no longer."""
    memory = private(8)
    with flavour.tracker() as tracker:
        array = np.frombuffer(memory, dtype=np.uint8)
        ram = tracker.track(array)
        del array
        with pytest.raises(BufferError):
            memory.close()
        ram.close()
        memory.close()


EXITS = {
    "falling off the end": "",
    "sys.exit": "sys.exit(0)",
    "os._exit": "os._exit(0)",
    "exec": "os.execv('/bin/true', ['true'])",
    "an exception": "sys.excepthook = lambda *_: os._exit(0)\nraise ValueError",
    "a signal": "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nsignal.raise_signal(signal.SIGTERM)",
}


@pytest.mark.parametrize("how", EXITS)
def test_the_interpreter_ends_around_an_open_tracker(how: str) -> None:
    """With writers running, with and without the GIL, and a collector, on either backend: normally and quietly."""
    code = f"""
import mmap, os, signal, sys, threading, warnings
from conftest import FLAVOURS, PAGE, KernelError, libc, private
warnings.simplefilter("ignore", ResourceWarning)
kept = []
for backend in ("pagemap-scan", "uffd-wp"):
    try:
        tracker = next(one for one in FLAVOURS if one.backend == backend).tracker()
    except KernelError:
        continue
    memory = private(64)
    ram = tracker.track(memory)
    def fill(ram=ram):
        while True:
            libc.fill(ram.range.start, 64 * PAGE)
    def hold(memory=memory):
        while True:
            for page in range(64):
                memory[page * PAGE] = 1
    def collect(ram=ram):
        while True:
            ram.collect()
    for function in (fill, hold, collect):
        threading.Thread(target=function, daemon=True).start()
    ram.collect()
    kept.append((tracker, ram, memory))
{EXITS[how]}
"""
    assert run_child(code) == ""


def test_globals_of_main_are_closed_at_exit() -> None:
    """An unclosed tracker in a module that is torn down warns, and changes neither exit status nor output."""
    code = """
import warnings
from conftest import private
from pagemapcompat import DirtyTracker
warnings.simplefilter("default", ResourceWarning)
memory = private(8)
tracker = DirtyTracker()
ram = tracker.track(memory)
memory[0] = 1
assert ram.collect().pages == 1
"""
    assert run_child(code) == ""
