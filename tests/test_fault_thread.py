"""The fault thread of `uffd-wp`: when it cannot go on its writers do, and the next call says so."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from children import Crew, Mirror, in_child, plain
from conftest import PAGE, Flavour, claims, flavours, lacking, libc, pages_of, private, run_child, use_flavour, write

from pagemapcompat import (
    AddressRange,
    ClosedError,
    DirtyTracker,
    FaultThreadError,
    Guarantee,
    KernelError,
    NotTrackableError,
    _kernel,
)

pytestmark = pytest.mark.kernel


@pytest.fixture(params=flavours("uffd-wp"))
def uffd_wp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Flavour:
    """Each generation of the backend that has a fault thread."""
    return use_flavour(request.param, monkeypatch)


def descriptors(kind: str) -> set[int]:
    """Of this process, by what they are."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == kind:
                found.add(int(name))
        except FileNotFoundError:
            continue  # that of the listing itself
    return found


def by_closing(uffd: int) -> None:
    """As a loop that closes every descriptor does."""
    os.close(uffd)


def by_dev_null(uffd: int) -> None:
    """Put in its place: always readable, and empty."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, uffd)
    os.close(null)


def by_a_silent_pipe(uffd: int) -> None:
    """Put in its place: never readable."""
    reading, _ = os.pipe()
    os.dup2(reading, uffd)


def by_dev_zero(uffd: int) -> None:
    """Put in its place: always readable, messages of zeros."""
    zero = os.open("/dev/zero", os.O_RDWR)
    os.dup2(zero, uffd)
    os.close(zero)


WAYS = (by_closing, by_dev_null, by_a_silent_pipe, by_dev_zero)


def lose_the_descriptor(flavour: Flavour, way: Callable[[int], None]) -> int:
    """While somebody writes. Memory can be tracked anew; returns how many pages then were written."""
    memory = private(64)
    before = descriptors("anon_inode:[userfaultfd]")
    tracker = flavour.tracker()
    ram = tracker.track(memory)
    (uffd,) = descriptors("anon_inode:[userfaultfd]") - before
    crew, stop = Crew(), threading.Event()

    def fill() -> None:
        while not stop.is_set():
            libc.fill(ram.range.start, 32 * PAGE)

    crew.add(fill)
    ram.collect()
    way(uffd)
    write(memory, *range(64))
    for _ in range(3):
        with pytest.raises((FaultThreadError, KernelError)):
            ram.collect()
        write(memory, *range(64))
    stop.set()
    crew.join()
    tracker.close()
    with pytest.raises(ClosedError):
        ram.collect()
    with flavour.tracker() as another:
        again = another.track(memory)
        wrote = write(memory, 1, 3)
        assert pages_of(again.collect()) == wrote
    return len(wrote)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_losing_the_descriptor_strands_nobody(uffd_wp: Flavour, way: Callable[[int], None]) -> None:
    """Writers go on, also one that holds the GIL; calls fail and say why; close works; memory can be tracked anew."""

    def check() -> None:
        sys.setswitchinterval(1e-5)
        lose_the_descriptor(uffd_wp, way)

    in_child(check)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_lost_descriptor_ends_the_fault_thread(uffd_wp: Flavour, way: Callable[[int], None]) -> None:
    """It neither spins nor stays: once a writer has woken it, it is gone."""
    memory = private(8)

    def check() -> None:
        before = descriptors("anon_inode:[userfaultfd]")
        threads = set(os.listdir("/proc/self/task"))
        tracker = uffd_wp.tracker()
        ram = tracker.track(memory)
        (uffd,) = descriptors("anon_inode:[userfaultfd]") - before
        (fault_thread,) = set(os.listdir("/proc/self/task")) - threads
        way(uffd)
        write(memory, 1)
        if way is by_a_silent_pipe:
            # Nobody waits on it and it uses no time: to be found out by the next call is enough.
            with pytest.raises((FaultThreadError, KernelError)):
                ram.collect()
        else:
            while os.path.exists(f"/proc/self/task/{fault_thread}"):
                os.sched_yield()  # a thread that never ends is the hang that this child's time limit catches
            with pytest.raises(FaultThreadError):
                ram.collect()
        tracker.close()

    in_child(check)


def test_after_the_fault_thread_every_call_fails(uffd_wp: Flavour) -> None:
    """FaultThreadError names the errno and what to do, from every method but close."""
    memory, spare = private(8), private(8)

    def check() -> None:
        before = descriptors("anon_inode:[userfaultfd]")
        threads = set(os.listdir("/proc/self/task"))
        tracker = uffd_wp.tracker()
        ram = tracker.track(memory)
        (uffd,) = descriptors("anon_inode:[userfaultfd]") - before
        (fault_thread,) = set(os.listdir("/proc/self/task")) - threads
        os.close(uffd)
        write(memory, 1)
        while os.path.exists(f"/proc/self/task/{fault_thread}"):
            os.sched_yield()  # and nothing is opened, which would get the number that was closed
        for call in (ram.peek, ram.collect, ram.reset, ram.unprotect, ram.rearm, tracker.statistics):
            with pytest.raises(FaultThreadError, match="errno 9") as caught:
                call()
            assert caught.value.hint
        with pytest.raises(FaultThreadError):
            DirtyTracker.track(tracker, spare)
        write(memory, *range(8))
        ram.close()
        tracker.close()
        with pytest.raises(ClosedError):
            ram.collect()

    in_child(check)


@pytest.fixture
def many() -> Iterator[list[mmap.mmap]]:
    """Enough ranges to have more waiting writers than one read of messages returns."""
    made = [private(16) for _ in range(40)]
    yield made
    for one in made:
        one.close()


def test_many_writers_wait_at_once(uffd_wp: Flavour, many: list[mmap.mmap]) -> None:
    """Forty threads at forty ranges, several at the same pages; each page is resolved and each write kept."""

    def check() -> None:
        with uffd_wp.tracker() as tracker:
            rams = [tracker.track(one) for one in many]
            mirrors = [Mirror(ram, one) for ram, one in zip(rams, many, strict=True)]
            crew = Crew()
            for index in range(len(many)):
                for which in (index, index // 8 * 8):
                    crew.add(libc.fill, rams[which].range.start, 16 * PAGE, index + 1)
            for mirror in mirrors:
                mirror.merge(mirror.ram.collect())
            crew.join()
            for mirror in mirrors:
                mirror.finish()
            assert tracker.statistics().faults > 0

    in_child(check)


def test_the_fault_thread_takes_no_signal(uffd_wp: Flavour) -> None:
    """All of them are blocked in it: signals of the program reach the program's own threads."""
    threads = set(os.listdir("/proc/self/task"))
    with uffd_wp.tracker():
        (thread,) = set(os.listdir("/proc/self/task")) - threads
        with open(f"/proc/self/task/{thread}/status", encoding="ascii") as status:
            blocked = next(line.split()[1] for line in status if line.startswith("SigBlk:"))
        with open(f"/proc/self/task/{thread}/comm", encoding="ascii") as name:
            assert name.read().startswith("pagemapcompat"[:15])
    for number in (1, 2, 10, 14, 15):
        assert int(blocked, 16) >> (number - 1) & 1


def stack_of_this_thread() -> AddressRange:
    """Where the C library put it."""
    start, size, attributes = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    plain.pthread_self.restype = ctypes.c_ulong
    assert plain.pthread_getattr_np(ctypes.c_ulong(plain.pthread_self()), attributes) == 0
    assert plain.pthread_attr_getstack(attributes, ctypes.byref(start), ctypes.byref(size)) == 0
    return AddressRange.from_length(start.value, size.value).aligned_out()


def below_its_frames() -> AddressRange:
    """What calls of this library reach of the stack of this thread, and its own calls do not."""
    end = stack_of_this_thread().end
    return AddressRange(end - (128 << 10), end - (64 << 10))


def its_errno() -> AddressRange:
    """The page that failing calls of this thread store into."""
    plain.__errno_location.restype = ctypes.c_size_t
    return AddressRange.from_length(plain.__errno_location() // PAGE * PAGE, PAGE)


@pytest.mark.parametrize("where", [below_its_frames, its_errno], ids=lambda where: where.__name__)
def test_a_caller_whose_own_memory_is_tracked(uffd_wp: Flavour, where: Callable[[], AddressRange]) -> None:
    """It is refused: it would fault while it holds the fault thread's lock. Only what it took it may give back."""
    memory = private(8)

    def refused(calls: list[Callable[[], object]]) -> None:
        for call in calls:
            with pytest.raises(NotTrackableError, match="stack"):
                call()

    def check() -> None:
        with uffd_wp.tracker() as tracker, ThreadPoolExecutor(1) as one:
            if not claims(tracker, Guarantee.KERNEL_WRITES):
                return  # the kernel keeps notes of its own on such pages
            ram = tracker.track(memory)
            wrote = write(memory, 5)
            undelivered = ram.collect()._result
            undelivered.delivered = 0
            other = tracker.track(one.submit(where).result())
            wrote |= write(memory, 3)
            one.submit(refused, [ram.peek, ram.collect, ram.reset, ram.rearm, tracker.statistics]).result()
            assert one.submit(_kernel.owe, undelivered).result() == 0
            other.close()
            assert pages_of(one.submit(ram.collect).result()) == wrote

    in_child(check, seconds=20)


@pytest.mark.parametrize("kib", [120, 254, 4096])
def test_thread_local_storage_of_any_size(kib: int, tmp_path: Path) -> None:
    """It starts, and resolves, in a program whose libraries have more of it than fits the stack it starts with."""
    source, library = tmp_path / "large.c", tmp_path / "large.so"
    source.write_text(f"__thread char large[{kib} << 10] = {{1}};")
    if not shutil.which("gcc"):
        lacking("cc", "no C compiler (ENOENT)", "apt-get install gcc")
    options = ["-shared", "-fPIC", "-ftls-model=initial-exec"]
    subprocess.run(["gcc", *options, source, "-o", library], check=True, timeout=60)
    program = """
        import mmap
        from pagemapcompat import DirtyTracker
        with DirtyTracker("uffd-wp") as tracker:
            memory = mmap.mmap(-1, 4 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            ram = tracker.track(memory)
            memory[2 * mmap.PAGESIZE] = 1
            assert list(ram.collect().page_indices()) == [2]
            assert tracker.statistics().faults >= 1
        """
    run_child(program, env={"LD_PRELOAD": str(library)})
