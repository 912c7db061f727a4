"""Writers that sleep in a fault wake, or end with their process, whatever becomes of their tracker meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress

import pytest
from children import Crew, clone_that_pauses, hold_fault_thread_back, in_child, kept_busy
from conftest import PAGE, Flavour, flavours, libc, pages_of, private, run_child, write

from pagemapcompat import ClosedError, DirtyTracker, TrackedRange

SLEEPERS = 4
# The newest and the oldest: they wake alike, but the oldest keeps a log of who slept.
pytestmark = pytest.mark.parametrize("flavour", flavours("uffd-wp")[:: len(flavours("uffd-wp")) - 1], indirect=True)


def sleeps(thread: threading.Thread) -> bool:
    """Whether it is blocked, and in no system call: -1 stands for its number (proc_pid_syscall(5), since 2.6.27)."""
    try:
        with open(f"/proc/self/task/{thread.native_id}/syscall", encoding="ascii") as call:
            return call.read().startswith("-1 ")
    except FileNotFoundError:
        return False


class Asleep:
    """A tracker, and threads that sleep in faults because its fault thread has no time for them."""

    def __init__(self, tracker: DirtyTracker) -> None:
        self.tracker = tracker
        self.memory = private(2 * SLEEPERS)
        self.ram: TrackedRange = tracker.track(self.memory)
        self.base = self.ram.range.start
        self.crew = Crew()
        self.stop = threading.Event()
        hold_fault_thread_back()
        with kept_busy():
            for number in range(SLEEPERS):
                self.crew.add(self.fill, number)
            while not all(map(sleeps, self.crew.threads)):
                self.ram.collect()

    def fill(self, number: int) -> None:
        """Store into a page of its own, which is protected again and again."""
        while not self.stop.is_set():
            libc.fill(self.base + number * PAGE)

    def wake(self) -> None:
        """Have them end; one that nobody wakes is a child that hangs."""
        self.stop.set()
        self.crew.join()


def close_tracker(asleep: Asleep) -> None:
    """As at the end of a with block."""
    asleep.tracker.close()


def close_range(asleep: Asleep) -> None:
    """Which leaves the tracker as it is."""
    asleep.ram.close()


def close_beside_a_child(asleep: Asleep) -> None:
    """While a forked child holds every descriptor."""
    pid = clone_that_pauses()
    asleep.tracker.close()
    write(asleep.memory, *range(2 * SLEEPERS))  # nobody is there to resolve it any more
    asleep.wake()
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def raise_inside(asleep: Asleep) -> None:
    """An exception leaves both with blocks."""
    with pytest.raises(ZeroDivisionError), asleep.tracker, asleep.ram:
        raise ZeroDivisionError


def drop_everything(asleep: Asleep) -> None:
    """Nobody has a name for them any more."""
    with pytest.warns(ResourceWarning):
        asleep.tracker.__dict__.pop("kept").clear()
        del asleep.ram, asleep.tracker


def unmap(asleep: Asleep) -> None:
    """The memory is mapped anew: they go on in the new one."""
    libc.mmap(2 * SLEEPERS * PAGE, address=asleep.base)
    asleep.wake()
    asleep.tracker.close()


DEEDS = (close_tracker, close_range, close_beside_a_child, raise_inside, drop_everything, unmap)


def wake(flavour: Flavour, deed: Callable[[Asleep], None]) -> int:
    """By a deed. What they wrote to can be tracked anew, exactly. Returns how many pages were."""
    asleep = Asleep(flavour.tracker())
    deed(asleep)
    asleep.wake()
    with flavour.tracker() as another:
        again = another.track(asleep.memory)
        wrote = write(asleep.memory, 1, 3, 6)
        assert pages_of(again.collect()) == wrote
    return len(wrote)


@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
def test_sleepers_wake(flavour: Flavour, deed: Callable[[Asleep], None]) -> None:
    """Whatever is done to their tracker."""
    in_child(wake, flavour, deed)


def ends(status: int, how: Callable[[], object]) -> Callable[[Flavour], int]:
    """A process whose writers sleep ends in some way."""

    def check(flavour: Flavour) -> int:
        pid = os.fork()
        if pid == 0:
            Asleep(flavour.tracker())
            how()
            os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
        return 0

    return check


ENDS = {
    "os._exit": ends(3, lambda: os._exit(3)),
    "exec": ends(0, lambda: os.execv("/bin/true", ["true"])),
    "SIGKILL": ends(-9, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "SIGTERM": ends(-15, lambda: os.kill(os.getpid(), signal.SIGTERM)),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_process_ends_around_its_sleepers(flavour: Flavour, how: str) -> None:
    """Nobody has to wake them for that."""
    in_child(ENDS[how], flavour)


@pytest.mark.parametrize(
    "how", ["", "sys.exit(0)", "signal.raise_signal(signal.SIGINT)"], ids=["end", "exit", "SIGINT"]
)
def test_the_interpreter_ends_around_its_sleepers(flavour: Flavour, how: str) -> None:
    """With its trackers open and its writers asleep, as a script and among exceptions."""
    code = f"""
import os, signal, sys, warnings
from conftest import FLAVOURS
from test_sleepers import Asleep
warnings.simplefilter("ignore")
sys.excepthook = lambda kind, *_: print(kind.__name__)
signal.signal(signal.SIGINT, signal.default_int_handler)
asleep = Asleep(next(one for one in FLAVOURS if one.name == "{flavour.name}").tracker())
try:
    {how or "pass"}
except KeyboardInterrupt:
    sys.exit(0)
"""
    assert run_child(code) == ""


def outlive(flavour: Flavour) -> int:
    """A child holds the descriptors that its parent's writers wait for when that ends. Returns the pages it tracked."""

    def child(asleep: Asleep, alone: int, answer: int) -> None:
        os.read(alone, 1)  # until the parent is gone, and with it the other end
        with pytest.raises(ClosedError):
            asleep.ram.collect()
        wrote = write(asleep.memory, *range(2 * SLEEPERS))
        asleep.ram.close()
        asleep.tracker.close()
        with flavour.tracker() as own:
            ram = own.track(asleep.memory)
            assert pages_of(ram.collect()) == set()
            write(asleep.memory, *wrote)
            assert pages_of(ram.collect()) == wrote
        os.write(answer, b"well")

    def parent(answer: int) -> None:
        asleep = Asleep(flavour.tracker())
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # that of the listing itself
                os.dup(int(name))  # which the child keeps: its fork hook knows the first copies only
        alone, end = os.pipe()
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        if os.fork() == 0:
            try:
                os.close(end)
                child(asleep, alone, answer)
            finally:
                os._exit(0)
        os._exit(0)

    told, answer = os.pipe()
    pid = os.fork()
    if pid == 0:
        parent(answer)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(answer)
    assert os.read(told, 4) == b"well"
    os.close(told)
    return 2 * SLEEPERS


def test_a_child_outlives_its_parent_and_its_sleepers(flavour: Flavour) -> None:
    """The parent ends; the child goes on, and ends."""
    in_child(outlive, flavour)
