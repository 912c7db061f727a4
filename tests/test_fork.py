"""A forked child's trackers are closed, and nothing that it does or outlives disturbs the parent's."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from children import PAGE, Crew, Mirror, Raw, in_child
from conftest import Flavour, libc, pages_of, private, write

from pagemapcompat import ClosedError, DirtyTracker, TrackedRange


def refuses(call: Callable[[], object]) -> None:
    """Check that a call in a child says whose tracker this is."""
    with pytest.raises(ClosedError, match=f"belongs to process {os.getppid()}.*process {os.getpid()} was forked"):
        call()


def uses_everything(tracker: DirtyTracker, ram: TrackedRange) -> None:
    """Each method, in a child, refuses; closing is quiet."""
    spare = private(1)
    for call in (ram.peek, ram.collect, ram.reset, ram.unprotect, ram.rearm, tracker.statistics):
        refuses(call)
    refuses(lambda: DirtyTracker.track(tracker, spare))
    gc.collect()
    ram.close()
    tracker.close()
    ram.close()
    gc.collect()


def forked(then: Callable[[], object]) -> None:
    """Run in a child made by os.fork, which must end well."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            then()
            status = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("by", ["os.fork", "C"])
def test_a_child_cannot_use_its_parents_tracker(flavour: Flavour, by: str) -> None:
    """Every method says ClosedError and why, whoever forked; afterwards the parent's pages are as they were."""
    memory = private(64)

    def check() -> None:
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            write(memory, 3, 9)
            for _ in range(3):
                if by == "os.fork":
                    forked(lambda: uses_everything(tracker, ram))
                else:
                    children = Raw()
                    children.fork(lambda: uses_everything(tracker, ram))
                    children.end()
            assert pages_of(ram.collect()) == {3, 9}
            wrote = write(memory, 4, 63)
            assert pages_of(ram.collect()) == wrote

    in_child(check)


def exits(tracker: DirtyTracker, ram: TrackedRange) -> None:
    """Writes to its own copy and ends by falling off the end."""
    memory = (libc, ram.range.start)
    memory[0].fill(memory[1], 8 * PAGE)


def drops(tracker: DirtyTracker, ram: TrackedRange) -> None:
    """Collects the garbage with the last references gone."""
    del tracker, ram
    gc.collect()


def closes(tracker: DirtyTracker, ram: TrackedRange) -> None:
    """Both, in the wrong order."""
    tracker.close()
    ram.close()


def unmaps(_tracker: DirtyTracker, ram: TrackedRange) -> None:
    """Its copy of the memory, which the parent's descriptors must not hear of."""
    libc.munmap(ram.range.start, ram.range.length)


def executes(_tracker: DirtyTracker, _ram: TrackedRange) -> None:
    """Becomes another program."""
    os.execv("/bin/true", ["true"])


@pytest.mark.parametrize("deed", [exits, drops, closes, unmaps, executes], ids=lambda deed: deed.__name__)
def test_nothing_a_child_does_disturbs_the_parent(flavour: Flavour, deed: Callable[..., object]) -> None:
    """While the parent's writers fault and its collector collects, children come and go; the mirror stays right."""
    memory = private(256)

    def check() -> None:
        sys.setswitchinterval(1e-5)
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            mirror, writers, forkers = Mirror(ram, memory), Crew(), Crew()

            def fill() -> None:
                number = 0
                while forkers.working:
                    number = number % 250 + 1
                    for page in range(0, 256, 8):
                        libc.fill(ram.range.start + page * PAGE, 8 * PAGE, number)

            def fork() -> None:
                for _ in range(4):
                    forked(lambda: deed(tracker, ram))

            forkers.add(fork)
            writers.add(fill)
            while writers.working:
                mirror.merge(ram.collect())
            forkers.join()
            writers.join()
            mirror.finish()

    in_child(check)


@pytest.mark.kernel
def test_a_child_that_holds_descriptors_leaves_no_writer_asleep(flavour: Flavour) -> None:
    """While others keep copies of every descriptor, closing a tracker, or a range, wakes its writers all the same."""
    memory = private(256)

    def check() -> None:
        children: list[subprocess.Popen[bytes]] = []
        crew, stop = Crew(), threading.Event()
        before = {int(name) for name in os.listdir("/proc/self/fd")}

        def fill() -> None:
            while not stop.is_set():
                libc.fill(address, 256 * PAGE)

        with flavour.tracker() as tracker:
            address = tracker.track(memory).range.start
        crew.add(fill)
        crew.add(fill)
        for number in range(12):
            tracker = flavour.tracker()
            ram = tracker.track(memory)
            copies = {int(name) for name in os.listdir("/proc/self/fd")} - before
            copies = {fd for fd in copies if os.path.exists(f"/proc/self/fd/{fd}")}
            children.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=sorted(copies)))
            before |= {children[-1].stdin.fileno()}  # type: ignore[union-attr]
            ram.collect()
            if number % 2:
                ram.close()
                assert crew.working
            tracker.close()
        # Not one of them needs anybody any more: each is seen to get through the memory once again.
        stop.set()
        crew.join()
        for child in children:
            assert child.poll() is None
            child.communicate()

    in_child(check)


def test_tracking_goes_on_beside_a_living_child(flavour: Flavour) -> None:
    """Exactly, and memory can be tracked again after a close that the child's copies outlive."""
    memory = private(64)

    def check() -> None:
        children = Raw()
        for _ in range(2):
            with flavour.tracker() as tracker, tracker.track(memory) as ram:
                write(memory, 1)
                children.fork()
                write(memory, 2)
                assert pages_of(ram.collect()) == {1, 2}
                children.fork(lambda: write(memory, 7))
                wrote = write(memory, 5)
                assert pages_of(ram.collect()) == wrote
                assert pages_of(ram.collect()) == set()
        children.end()

    in_child(check)


@pytest.mark.parametrize("by", ["os.fork", "C"])
def test_a_child_can_track_its_own_copy(flavour: Flavour, by: str) -> None:
    """With a tracker of its own, exactly, while the parent tracks the original."""
    memory = private(64)

    def track() -> None:
        with flavour.tracker() as own:
            copy = own.track(memory)
            assert pages_of(copy.collect()) == set()
            wrote = write(memory, 10, 20, 21)
            assert pages_of(copy.collect()) == wrote
            assert pages_of(copy.collect()) == set()

    def check() -> None:
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            write(memory, 1)
            if by == "os.fork":
                forked(track)
            else:
                children = Raw()
                children.fork(track)
                children.end()
            assert pages_of(ram.collect()) == {1}

    in_child(check)


def test_a_grandchild_is_a_child(flavour: Flavour) -> None:
    """Of a child that made its own tracker: both are closed to it."""

    def check() -> None:
        memory, other = private(8), private(8)
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)

            def child() -> None:
                with flavour.tracker() as own:
                    mine = own.track(other)
                    write(other, 3)
                    forked(lambda: refuses(mine.collect))
                    assert pages_of(mine.collect()) == {3}
                with pytest.raises(ClosedError):
                    ram.collect()

            write(memory, 2)
            forked(child)
            assert pages_of(ram.collect()) == {2}

    in_child(check)


_inherited: list[Any] = []
"""What a worker finds of its parent's: a tracker and a range."""


def _in_worker(queue) -> None:  # type: ignore[no-untyped-def]
    tracker, ram = _inherited
    answers = []
    for call in (ram.collect, tracker.statistics):
        try:
            call()
            answers.append("no error")
        except ClosedError:
            answers.append("closed")
    gc.collect()
    queue.put(answers)


def test_multiprocessing_while_others_collect(flavour: Flavour) -> None:
    """Start method fork, in the midst of collects, resets, tracks and faults of other threads: children end well."""
    memory, other = private(128), private(16)

    def check() -> None:
        sys.setswitchinterval(1e-5)
        context = multiprocessing.get_context("fork")
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            _inherited[:] = [tracker, ram]
            crew, stop = Crew(), threading.Event()

            def collect() -> None:
                while not stop.is_set():
                    ram.collect()
                    ram.reset(0, 8 * PAGE)

            def fill() -> None:
                while not stop.is_set():
                    libc.fill(ram.range.start, 128 * PAGE)

            def come_and_go() -> None:
                while not stop.is_set():
                    with DirtyTracker.track(tracker, other) as short:
                        short.collect()

            for function in (collect, fill, come_and_go):
                crew.add(function)
            for _ in range(4):
                queue = context.SimpleQueue()
                process = context.Process(target=_in_worker, args=(queue,))
                process.start()
                process.join()
                assert process.exitcode == 0
                assert queue.get() == ["closed", "closed"]
            stop.set()
            crew.join()
            ram.reset()
            wrote = write(memory, 77)
            assert pages_of(ram.collect()) == wrote

    in_child(check)


def test_subprocesses_get_no_descriptor(flavour: Flavour) -> None:
    """What is executed inherits none of a tracker's descriptors, and running it changes nothing."""

    def check() -> None:
        memory = private(8)
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            write(memory, 3)
            script = "for f in /proc/self/fd/*; do readlink $f; done; true"
            done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, check=True, close_fds=False)
            assert "userfaultfd" not in done.stdout.decode()
            assert "/pagemap" not in done.stdout.decode()
            assert "/maps" not in done.stdout.decode()
            assert pages_of(ram.collect()) == {3}

    in_child(check)
