"""The fault thread of `uffd-wp`: when it cannot go on its writers do, and the next call says so."""

from __future__ import annotations

import contextlib
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
from children import Crew, Mirror, in_child, name_of, plain, preloaded
from conftest import (
    PAGE,
    Flavour,
    claims,
    flavours,
    lacking,
    libc,
    pages_of,
    private,
    rounds,
    run_child,
    use_flavour,
    write,
)

from pagemapcompat import (
    AddressRange,
    ClosedError,
    DirtyTracker,
    FaultThreadError,
    Guarantee,
    KernelError,
    NotTrackableError,
    TrackedRange,
    _kernel,
    limits,
    probe,
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


def all_descriptors() -> set[int]:
    """Of this process; that of the listing itself is gone by then."""
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


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


def any_userfaultfd() -> int:
    """Opened in whatever way there is."""
    return next(fd for fd in map(_kernel.uffd_open, (2, 0, 1)) if fd >= 0)


def by_another_userfaultfd(uffd: int) -> None:
    """Put in its place, as when a program that closed it opens one: it may protect our memory, and wakes nobody."""
    other = any_userfaultfd()
    _kernel.uffd_handshake(other, 0)
    os.dup2(other, uffd)
    os.close(other)


def need_to_tell(way: Callable[[int], None]) -> None:
    """Skip where what that puts in the place of our file is not told from it."""
    first, second = any_userfaultfd(), any_userfaultfd()
    same = os.fstat(first).st_ino == os.fstat(second).st_ino
    os.close(first)
    os.close(second)
    if way is by_another_userfaultfd and same:
        lacking("userfaultfd-inode", "all userfaultfds have one inode", "Linux 6.1")


WAYS = (by_closing, by_dev_null, by_a_silent_pipe, by_dev_zero, by_another_userfaultfd)


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
    need_to_tell(way)

    def check() -> None:
        sys.setswitchinterval(1e-5)
        lose_the_descriptor(uffd_wp, way)

    in_child(check)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_lost_descriptor_ends_the_fault_thread(uffd_wp: Flavour, way: Callable[[int], None]) -> None:
    """It neither spins nor stays: once a writer has woken it, it is gone."""
    need_to_tell(way)
    memory = private(8)

    def check() -> None:
        before = descriptors("anon_inode:[userfaultfd]")
        threads = set(os.listdir("/proc/self/task"))
        tracker = uffd_wp.tracker()
        ram = tracker.track(memory)
        (uffd,) = descriptors("anon_inode:[userfaultfd]") - before
        fault_threads = set(os.listdir("/proc/self/task")) - threads
        way(uffd)
        write(memory, 1)
        if way in (by_a_silent_pipe, by_another_userfaultfd):
            # One may wait on it, and uses no time: to be found out by the next call is enough.
            with pytest.raises((FaultThreadError, KernelError)):
                ram.collect()
        else:
            while fault_threads & set(os.listdir("/proc/self/task")):
                os.sched_yield()  # a thread that never ends is the hang that this child's time limit catches
            with pytest.raises(FaultThreadError):
                ram.collect()
        tracker.close()

    in_child(check)


def test_files_that_have_the_numbers_of_ours(uffd_wp: Flavour) -> None:
    """A program that closes all descriptors, as daemons do, and opens its own: closing the tracker closes none."""
    memory = private(8)

    def check() -> None:
        before = all_descriptors()
        tracker = uffd_wp.tracker()
        tracker.track(memory)
        ours, own = all_descriptors() - before, os.open("/", os.O_RDONLY)
        for fd in ours:
            os.dup2(own, fd)
        assert len(ours) > 3
        with contextlib.suppress(KernelError):
            tracker.close()
        assert all(os.path.sameopenfile(fd, own) for fd in ours)

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
        fault_threads = {f"/proc/self/task/{thread}" for thread in set(os.listdir("/proc/self/task")) - threads}
        os.close(uffd)
        write(memory, 1)
        while any(map(os.path.exists, fault_threads)):
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
        started = set(os.listdir("/proc/self/task")) - threads
        assert started == {str(thread) for thread in fault_threads()}
        for thread in started:
            with open(f"/proc/self/task/{thread}/status", encoding="ascii") as status:
                blocked = next(line.split()[1] for line in status if line.startswith("SigBlk:"))
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
            taken = ram.collect()
            other = tracker.track(one.submit(where).result())
            wrote |= write(memory, 3)
            one.submit(refused, [ram.peek, ram.collect, ram.reset, ram.rearm, tracker.statistics]).result()
            assert one.submit(_kernel.owe, ram._attached.cursor.c, taken._result).result() == 0
            other.close()
            assert pages_of(one.submit(ram.collect).result()) == wrote

    in_child(check, seconds=20)


HOLDING = """
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

atomic_int hold, held; // the next thread that reads a message, and whether one is held

ssize_t read(int fd, void *into, size_t size)
{
	long rc = syscall(SYS_read, fd, into, size);
	if (rc > 0 && syscall(SYS_gettid) != getpid() && atomic_exchange(&hold, 0)) {
		atomic_store(&held, 1);
		while (atomic_load(&held))
			sched_yield();
	}
	return rc;
}
"""
"""A fault thread that is not given time once it has read a message."""


@pytest.mark.anywhere
def test_a_message_that_is_read_before_the_memory_is_tracked_anew(uffd_wp: Flavour, tmp_path: Path) -> None:
    """Its writer is through, and the page is not opened for it in the new range."""
    program = """
        import ctypes, os
        from conftest import PAGE, libc, pages_of
        from children import Crew
        from pagemapcompat import DirtyTracker
        own = ctypes.CDLL(None)
        hold, held = (ctypes.c_int.in_dll(own, name) for name in ("hold", "held"))
        memory = libc.mmap(4 * PAGE)
        for _ in range(20):
            with DirtyTracker("uffd-wp") as tracker:
                crew, ram = Crew(), tracker.track((memory, 4 * PAGE))
                hold.value = 1
                crew.add(libc.fill, memory)
                while not held.value:
                    os.sched_yield()
                ram.close()
                crew.join()
                ram = tracker.track((memory, 4 * PAGE))
                assert not pages_of(ram.collect())
                held.value = 0
                for _ in range(50):
                    crew.add(libc.fill, memory + 2 * PAGE)
                    crew.join()
                    assert pages_of(ram.collect()) == {2}
        """
    run_child(program, env=preloaded(HOLDING, tmp_path))


@pytest.mark.anywhere
def test_a_message_that_is_read_before_the_page_is_unprotected(uffd_wp: Flavour, tmp_path: Path) -> None:
    """A signal has its writer look, and go on. Once that is collected the page is not opened for it again."""
    program = """
        import ctypes, os, signal, threading
        from concurrent.futures import ThreadPoolExecutor
        from conftest import PAGE, libc, pages_of
        from pagemapcompat import DirtyTracker
        own = ctypes.CDLL(None)
        hold, held = (ctypes.c_int.in_dll(own, name) for name in ("hold", "held"))
        signal.signal(signal.SIGUSR1, lambda *_: None)
        memory = libc.mmap(4 * PAGE)
        with ThreadPoolExecutor(1) as writer, DirtyTracker("uffd-wp") as tracker:
            thread = writer.submit(threading.get_ident).result()
            ram = tracker.track((memory, 4 * PAGE))
            for _ in range(20):
                hold.value = 1
                store = writer.submit(libc.fill, memory)
                while not held.value:
                    os.sched_yield()
                ram.unprotect(0, PAGE)
                while not store.done():
                    signal.pthread_kill(thread, signal.SIGUSR1)
                assert pages_of(ram.collect()) == {0}
                held.value = 0
                for _ in range(50):
                    writer.submit(libc.fill, memory + 2 * PAGE).result()
                    assert pages_of(ram.collect()) == {2}
        """
    run_child(program, env=preloaded(HOLDING, tmp_path))


@pytest.mark.anywhere
def test_who_closes_a_range_while_a_page_is_opened_sleeps(uffd_wp: Flavour, tmp_path: Path) -> None:
    """It leaves its CPU to the fault thread, also if it is one of a real-time class."""
    program = """
        import ctypes, os, threading
        from concurrent.futures import ThreadPoolExecutor
        from conftest import PAGE, libc
        from pagemapcompat import DirtyTracker
        own, memory = ctypes.CDLL(None), libc.mmap(4 * PAGE)
        hold, held = (ctypes.c_int.in_dll(own, name) for name in ("hold", "held"))
        with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as closer, DirtyTracker("uffd-wp") as tracker:
            ram, thread = tracker.track((memory, 4 * PAGE)), closer.submit(threading.get_native_id).result()
            hold.value = 1
            store = writer.submit(libc.fill, memory)
            while not held.value:
                os.sched_yield()
            closing = closer.submit(ram.close)
            slept = 0
            while slept < 3:
                with open(f"/proc/self/task/{thread}/status") as status:
                    slept += any(line.startswith("State:\tS") for line in status)
                assert not closing.done()
            held.value = 0
            closing.result()
            store.result()
        """
    run_child(program, env=preloaded(OPENING_LATE, tmp_path))


@pytest.mark.anywhere
def test_closing_by_a_thread_whose_stack_is_tracked(uffd_wp: Flavour, two_cpus: list[int]) -> None:
    """It does not fault while it holds what fault threads need, also where the kernel keeps no notes in its memory."""
    program = f"""
        import os, threading
        from concurrent.futures import ThreadPoolExecutor
        from conftest import PAGE, libc, rounds
        from test_fault_thread import stack_of_this_thread
        from pagemapcompat import AddressRange, DirtyTracker
        first, second = {two_cpus}
        pool, whole = [libc.mmap(PAGE) for _ in range(64)], libc.mmap(1024 * PAGE)
        done = threading.Event()
        def write():
            os.sched_setaffinity(0, {{second}})
            while not done.is_set():
                libc.fill(whole, 1024 * PAGE)
        with ThreadPoolExecutor(1) as closer, ThreadPoolExecutor(1) as writer, DirtyTracker("uffd-wp") as tracker:
            closer.submit(os.sched_setaffinity, 0, {{first}}).result()
            end = closer.submit(stack_of_this_thread).result().end
            stack, ram = tracker.track(AddressRange(end - 64 * PAGE, end)), tracker.track((whole, 1024 * PAGE))
            writing = writer.submit(write)
            for _ in range(rounds(100)):
                small = [tracker.track((page, PAGE)) for page in pool]
                closing = closer.submit(lambda: [one.close() for one in small])
                while not closing.done():
                    ram.reset()
                    stack.reset()
                closing.result()
            done.set()
            writing.result()
            stack.close()
        """
    run_child(program, env={"GLIBC_TUNABLES": "glibc.pthread.rseq=0"})


@pytest.mark.anywhere
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


# -- Where it runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def two_cpus() -> list[int]:
    """Two that this process may use."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        lacking("cpus", "this process may use one", "a machine with two")
    return cpus[:2]


def fault_threads() -> list[int]:
    """The thread ids of those in this process."""
    found = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):  # one that has ended may be listed for a moment
            if name_of(task) == "pagemapcompat":
                found.append(int(task))
    return found


def fault_thread() -> int:
    """The thread id of the only one."""
    while len(found := fault_threads()) != 1:
        os.sched_yield()
    return found[0]


@contextlib.contextmanager
def on_cpus(*cpus: int) -> Iterator[None]:
    """With no others for this thread, and for those that it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def followed(flavour: Flavour, memory: AddressRange) -> Iterator[tuple[TrackedRange, int]]:
    """Memory that is tracked, and the thread that serves its faults: the only one, as on a machine of many CPUs."""
    with on_cpus(min(os.sched_getaffinity(0))):
        tracker = flavour.tracker()
    with tracker:
        thread = fault_thread()
        os.sched_setaffinity(thread, os.sched_getaffinity(0))
        with tracker.track(memory) as ram:
            yield ram, thread


def write_from(cpu: int, memory: AddressRange, ram: TrackedRange) -> None:
    """Write to each page for the first time since it was protected, on one CPU: more faults than between two looks."""
    with on_cpus(cpu):
        for _ in range(4):
            ram.reset()
            for address in range(memory.start, memory.end, PAGE):
                libc.fill(address)


def test_one_beside_each_writer(uffd_wp: Flavour, two_cpus: list[int]) -> None:
    """Each of two CPUs has one that stays there, and takes no time from who keeps it busy."""

    def check() -> None:
        with on_cpus(*two_cpus), uffd_wp.tracker():
            first, second = fault_threads()
            while (
                {*os.sched_getaffinity(first), *os.sched_getaffinity(second)} != set(two_cpus)
                or len(os.sched_getaffinity(first)) + len(os.sched_getaffinity(second)) != 2
                or {os.sched_getscheduler(first), os.sched_getscheduler(second)} != {os.SCHED_BATCH}
            ):
                os.sched_yield()  # they go there themselves; one that does not is caught by the child's time limit

    in_child(check)


ONE_THREAD = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>

int allowed;

int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *), void *argument)
{
	int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) = dlsym(RTLD_NEXT, "pthread_create");
	return allowed-- > 0 ? real(thread, attr, start, argument) : EAGAIN;
}
"""
"""What a pids cgroup, or RLIMIT_NPROC, leaves."""


@pytest.mark.anywhere
def test_a_second_one_that_cannot_be_had(uffd_wp: Flavour, two_cpus: list[int], tmp_path: Path) -> None:
    """The first serves alone, on any of the CPUs. Without that one there is no tracker, and the error says why."""
    program = f"""
        import ctypes, errno, os
        import pytest
        from children import resources
        from conftest import PAGE, libc, pages_of
        from test_fault_thread import fault_thread, on_cpus
        from pagemapcompat import DirtyTracker, KernelError, probe
        allowed, memory = ctypes.c_int.in_dll(ctypes.CDLL(None), "allowed"), libc.mmap(4 * PAGE)
        allowed.value = 1 << 20
        probe()
        with on_cpus(*{two_cpus}):
            allowed.value = 1
            with DirtyTracker("uffd-wp") as tracker, tracker.track((memory, 4 * PAGE)) as ram:
                while os.sched_getaffinity(fault_thread()) != set({two_cpus}):
                    os.sched_yield()  # it may have gone to its CPU before it was known that it is alone
                libc.fill(memory + PAGE)
                assert pages_of(ram.collect()) == {{1}}
            before = resources()
            with pytest.raises(KernelError, match="pthread_create") as caught:
                DirtyTracker("uffd-wp")
            assert caught.value.errno == errno.EAGAIN
            assert resources() == before
        """
    run_child(program, env=preloaded(ONE_THREAD, tmp_path))


def test_one_for_all_writers(uffd_wp: Flavour, two_cpus: list[int]) -> None:
    """On another number of CPUs, where it may run on any of them."""

    def check() -> None:
        for cpus in ({two_cpus[0]}, os.sched_getaffinity(0)):
            if len(cpus) != 2:
                with on_cpus(*cpus), uffd_wp.tracker():
                    assert os.sched_getaffinity(fault_thread()) == cpus
                    assert os.sched_getscheduler(fault_thread()) == os.sched_getscheduler(0)

    in_child(check)


def test_two_at_once_at_one_page(uffd_wp: Flavour, area: Callable[..., AddressRange], two_cpus: list[int]) -> None:
    """Once their stores are through nobody opens the page again: a collect has it, and the next has nothing."""
    memory = area(4)

    def check() -> None:
        with on_cpus(*two_cpus), uffd_wp.tracker() as tracker:
            ram, together = tracker.track(memory), threading.Barrier(3)

            def store() -> None:
                for _ in range(rounds(2000)):
                    together.wait()
                    libc.fill(memory.start, len(ram))
                    together.wait()

            crew = Crew()
            crew.add(store)
            crew.add(store)
            for _ in range(rounds(2000)):
                together.wait()
                seen = pages_of(ram.collect())
                together.wait()
                assert seen | pages_of(ram.collect()) == {0, 1, 2, 3}
                assert not pages_of(ram.collect())
            crew.join()

    in_child(check)


OPENING_LATE = """
#define _GNU_SOURCE
#include <linux/ioctl.h>
#include <linux/types.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

atomic_int hold, held, opened, wakes;

int ioctl(int fd, unsigned long request, void *argument)
{
	int own = syscall(SYS_gettid) != getpid(), late = 0;
	if (own && request == UFFDIO_WRITEPROTECT && atomic_exchange(&hold, 0)) {
		late = 1;
		atomic_store(&held, 1);
		while (atomic_load(&held))
			sched_yield();
	}
	if (own && request == UFFDIO_WAKE)
		atomic_fetch_add(&wakes, 1);
	int rc = syscall(SYS_ioctl, fd, request, argument);
	if (late)
		atomic_store(&opened, 1);
	return rc;
}
"""
"""A fault thread that is not given time when it is about to un-protect a page."""


@pytest.mark.anywhere
def test_two_at_a_page_that_is_being_opened(uffd_wp: Flavour, two_cpus: list[int], tmp_path: Path) -> None:
    """The second waits with the first, and is woken with it: nobody opens the page twice, or asks in between."""
    program = f"""
        import ctypes, os
        from children import Crew
        from conftest import PAGE, libc, pages_of
        from test_fault_thread import descriptors, on_cpus
        from pagemapcompat import DirtyTracker
        own, memory = ctypes.CDLL(None), libc.mmap(4 * PAGE)
        hold, held, opened, wakes = (ctypes.c_int.in_dll(own, name) for name in ("hold", "held", "opened", "wakes"))
        def waiting(uffd):
            with open(f"/proc/self/fdinfo/{{uffd}}") as info:
                fields = dict(line.split(":", 1) for line in info)
            return int(fields["pending"]), int(fields["total"])
        for _ in range(20):
            with on_cpus(*{two_cpus}):
                tracker = DirtyTracker("uffd-wp")
            with tracker:
                crew, ram = Crew(), tracker.track((memory, 4 * PAGE))
                (uffd,) = descriptors("anon_inode:[userfaultfd]")
                opened.value, hold.value, wakes.value = 0, 1, 0
                crew.add(libc.fill, memory)
                while not held.value:
                    os.sched_yield()
                crew.add(libc.fill, memory + 1)
                while crew.working and waiting(uffd) != (0, 2):
                    os.sched_yield()
                for _ in range(1000):  # in which the other thread could open it
                    os.sched_yield()
                stayed, held.value = crew.working, 0
                crew.join()
                assert stayed
                while not opened.value:
                    os.sched_yield()
                assert pages_of(ram.collect()) == {{0}}
                assert not pages_of(ram.collect())
                assert wakes.value <= 2
        """
    run_child(program, env=preloaded(OPENING_LATE, tmp_path))


def test_it_runs_where_its_writer_does(
    uffd_wp: Flavour, area: Callable[..., AddressRange], two_cpus: list[int]
) -> None:
    """A writer that goes to another CPU is followed, and so is the one after it; where it came from is forgotten."""
    memory = area(64)

    def check() -> None:
        with followed(uffd_wp, memory) as (ram, thread):
            given = os.sched_getaffinity(thread)
            assert given == os.sched_getaffinity(0)
            for cpu in (*two_cpus, *two_cpus):
                write_from(cpu, memory, ram)
                assert os.sched_getaffinity(thread) == {cpu}
                with ThreadPoolExecutor(1) as another:
                    another.submit(write_from, two_cpus[0], memory, ram).result()
                assert os.sched_getaffinity(thread) == {two_cpus[0]}

    in_child(check)


def test_it_follows_nobody_when_several_write(
    uffd_wp: Flavour, area: Callable[..., AddressRange], two_cpus: list[int]
) -> None:
    """It may run where it might before, as soon as another writes than the one it is with."""
    memory = area(64)

    def check() -> None:
        with followed(uffd_wp, memory) as (ram, thread):
            given = os.sched_getaffinity(thread)
            write_from(two_cpus[1], memory, ram)
            assert os.sched_getaffinity(thread) != given
            ram.reset()
            with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
                for address in range(memory.start, memory.end, 2 * PAGE):
                    one.submit(libc.fill, address).result()
                    other.submit(libc.fill, address + PAGE).result()
                assert os.sched_getaffinity(thread) == given
            assert len(pages_of(ram.collect())) == 64

    in_child(check)


def test_it_stays_on_the_cpus_it_was_given(
    uffd_wp: Flavour, area: Callable[..., AddressRange], two_cpus: list[int]
) -> None:
    """Those of who made the tracker, or what somebody says later, wherever its writers are."""
    memory, (first, second) = area(64), two_cpus

    def check() -> None:
        with on_cpus(first):
            tracker = uffd_wp.tracker()
        with tracker:
            ram, thread = tracker.track(memory), fault_thread()
            write_from(second, memory, ram)
            assert os.sched_getaffinity(thread) == {first}
            os.sched_setaffinity(thread, {first, second})
            write_from(second, memory, ram)
            assert os.sched_getaffinity(thread) == {second}
            os.sched_setaffinity(thread, {first})
            write_from(second, memory, ram)
            assert os.sched_getaffinity(thread) == {first}

    in_child(check)


REFUSE_ONCE = """
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

int refusals;

int sched_setaffinity(pid_t thread, size_t size, const cpu_set_t *cpus)
{
	if (thread == 0 && refusals && syscall(SYS_gettid) != getpid()) {
		refusals--;
		errno = EINVAL;
		return -1;
	}
	return syscall(SYS_sched_setaffinity, thread, size, cpus);
}
"""
"""What the kernel says of a CPU that has just gone."""


@pytest.mark.anywhere
def test_a_cpu_that_cannot_be_had(uffd_wp: Flavour, two_cpus: list[int], tmp_path: Path) -> None:
    """Then it may run where it might at first, not only where it is; and it follows as before."""
    program = f"""
        import ctypes, os
        from conftest import AddressRange, PAGE, libc
        from test_fault_thread import fault_thread, on_cpus, write_from
        from pagemapcompat import DirtyTracker
        memory = AddressRange.from_length(libc.mmap(64 * PAGE), 64 * PAGE)
        refusals = ctypes.c_int.in_dll(ctypes.CDLL(None), "refusals")
        first, second = {two_cpus}
        with on_cpus(first):
            tracker = DirtyTracker("uffd-wp")
        with tracker:
            ram, thread, given = tracker.track(memory), fault_thread(), os.sched_getaffinity(0)
            os.sched_setaffinity(thread, given)
            write_from(first, memory, ram)
            assert os.sched_getaffinity(thread) == {{first}}
            refusals.value = 1 << 30
            write_from(second, memory, ram)
            assert os.sched_getaffinity(thread) == {{first}}
            refusals.value = 1
            write_from(second, memory, ram)
            write_from(second, memory, ram)
            assert refusals.value == 0
            assert os.sched_getaffinity(thread) == {{second}}
            os.sched_setaffinity(thread, given)
            ram.close()
        """
    run_child(program, env=preloaded(REFUSE_ONCE, tmp_path))


def test_a_file_in_the_place_of_ours(uffd_wp: Flavour, area: Callable[..., AddressRange]) -> None:
    """Of a program that closed a descriptor once too often: its next one with that number stays open."""
    memory = area(64)

    def check() -> None:
        with followed(uffd_wp, memory) as (ram, _):
            (fd,) = (int(name) for name in os.listdir("/proc/self/fd") if is_of_a_thread(name))
            reader, writer = os.pipe()
            os.dup2(writer, fd)
            for _ in range(4):
                with ThreadPoolExecutor(1) as another:
                    for thread in (another, None):
                        for address in range(memory.start, memory.end, PAGE):
                            thread.submit(libc.fill, address).result() if thread else libc.fill(address)
                        assert len(pages_of(ram.collect())) == 64
            os.write(fd, b"mine")
            assert os.read(reader, 4) == b"mine"

    in_child(check)


def is_of_a_thread(name: str) -> bool:
    """Whether a descriptor is the file of one in /proc."""
    try:
        return os.readlink(f"/proc/self/fd/{name}").endswith("/stat")
    except FileNotFoundError:
        return False


def test_it_stays_where_real_time_has_no_limit(
    uffd_wp: Flavour, area: Callable[..., AddressRange], two_cpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of a real-time class could keep it from its CPU for ever, and its writer with it."""
    memory, text = area(64), limits._text

    def check() -> None:
        monkeypatch.setattr(limits, "_text", lambda path: "-1" if path.name == "sched_rt_runtime_us" else text(path))
        assert probe(refresh=True).limits.real_time_limit is False
        with on_cpus(*two_cpus), uffd_wp.tracker() as tracker:
            ram, thread = tracker.track(memory), fault_thread()
            write_from(two_cpus[1], memory, ram)
            assert os.sched_getaffinity(thread) == set(two_cpus)

    in_child(check)


def test_a_writer_that_has_proc_locked(uffd_wp: Flavour, area: Callable[..., AddressRange]) -> None:
    """It lists the very directory whose files say where writers are, into tracked memory: nobody waits for it for ever.

    Who opens one of these waits for it as soon as a third thread wants to create one.
    """
    memory = area(64)
    with uffd_wp.tracker() as tracker:
        if not claims(tracker, Guarantee.KERNEL_WRITES):
            lacking("kernel-writes", "no KERNEL_WRITES", "run as root, or vm.unprivileged_userfaultfd=1")

    def check() -> None:
        with uffd_wp.tracker() as tracker:
            ram = tracker.track(memory)
            crew, done = Crew(), threading.Event()

            def listing() -> None:
                unlocked, folder = ctypes.CDLL(None), os.open("/proc/self/task", os.O_RDONLY | os.O_DIRECTORY)
                while not done.is_set():
                    for page in range(0, 64, 2):
                        os.lseek(
                            folder, 0, os.SEEK_SET
                        )  # the first two entries, for what was listed is found without the lock
                        assert unlocked.getdents64(folder, ctypes.c_void_p(memory.start + page * PAGE), 64) >= 0
                os.close(folder)

            def writing() -> None:
                for page in range(1, 64, 2):
                    libc.fill(memory.start + page * PAGE)

            def creating() -> None:
                while not done.is_set():
                    with contextlib.suppress(OSError):
                        os.close(os.open("/proc/self/task/none", os.O_CREAT | os.O_WRONLY))

            crew.add(listing)
            crew.add(creating)
            for _ in range(rounds(60)):  # each a thread that nobody has looked for
                with ThreadPoolExecutor(1) as writer:
                    writer.submit(writing).result()
                    assert set(range(1, 64, 2)) <= pages_of(ram.collect())
            done.set()
            crew.join()

    in_child(check)


SET_FORWARD = """
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now)
{
	int rc = syscall(SYS_clock_gettime, clock, now);
	if (!rc && clock == CLOCK_REALTIME)
		now->tv_sec -= 3600;
	return rc;
}
"""
"""What a clock says that is set an hour forward before anybody waits by it."""


@pytest.mark.anywhere
def test_a_clock_that_is_set_while_a_tracker_is_closed(uffd_wp: Flavour, tmp_path: Path) -> None:
    """The fault thread is waited for all the same, and everything is given back."""
    program = """
        import mmap
        from children import resources
        from pagemapcompat import DirtyTracker
        DirtyTracker("uffd-wp").close()
        before = resources()
        for _ in range(200):  # of which some close before the fault thread has had time to end
            DirtyTracker("uffd-wp").close()
        assert resources() == before
        """
    run_child(program, env=preloaded(SET_FORWARD, tmp_path))


STORING_HANDLER = """
#include <signal.h>
#include <sys/time.h>

static volatile char *hot;

static void store(int number)
{
	hot[0] = (char)number;
}

void store_often(char *page)
{
	struct sigaction action = { .sa_handler = store, .sa_flags = SA_RESTART };
	struct itimerval often = { { 0, 37 }, { 0, 37 } };
	hot = page;
	sigaction(SIGALRM, &action, 0);
	setitimer(ITIMER_REAL, &often, 0);
}

void store_no_more(void)
{
	struct itimerval never = { { 0, 0 }, { 0, 0 } };
	setitimer(ITIMER_REAL, &never, 0);
}
"""
"""A handler in C, which runs at once, wherever its thread is."""


@pytest.mark.anywhere
def test_a_signal_handler_that_stores_while_ranges_come_and_go(uffd_wp: Flavour, tmp_path: Path) -> None:
    """The thread that it interrupts holds nothing then that resolves its fault."""
    program = """
        import ctypes
        from conftest import PAGE, libc
        from pagemapcompat import AddressRange, DirtyTracker
        own = ctypes.CDLL(None)
        own.store_often.argtypes = [ctypes.c_void_p]
        hot, other = libc.mmap(PAGE), libc.mmap(PAGE)
        with DirtyTracker("uffd-wp") as tracker, tracker.track((hot, PAGE)) as ram:
            own.store_often(hot)
            for _ in range(1000):
                with tracker.track((other, PAGE)):
                    ram.reset()
                ram.reset()
            own.store_no_more()
        """
    run_child(program, env=preloaded(STORING_HANDLER, tmp_path))
