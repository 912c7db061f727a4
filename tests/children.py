"""Forked children with a time limit, threads that are joined, and memory mirrored by what is collected."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import mmap
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conftest import CHILD_SECONDS, PAGE, PRIVATE, SANITIZED, lacking, need_shared

from pagemapcompat import Cursor, ScanResult

plain = ctypes.PyDLL(None, use_errno=True)
"""The C library, called with the GIL held: what forks through it has a GIL that works, and ran no hook of Python's."""


class Child:
    """A forked process that runs a function, and what it says when that fails or hangs.

    Cheaper than `run_child`, which starts an interpreter; it ends by `os._exit`, also while threads of it run.
    """

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: faulthandler's timer is one
            self._output, to_parent = os.pipe()
            self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._output)
                os.setsid()  # so that whatever it leaves behind can be ended with it
                plain.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: an aborted test run leaves nothing running
                faulthandler.enable(to_parent)
                function(*arguments)
                status = 0
            except BaseException:
                os.write(to_parent, traceback.format_exc().encode())
            finally:
                os._exit(status)
        os.close(to_parent)
        os.set_blocking(self._output, False)
        self._ended = os.pidfd_open(self.pid)
        self._said = b""

    def wait(self, seconds: float, answer: int = -1, progress: Callable[[], object] = bool) -> None:
        """Until there is something to read from *answer*, or it ends.

        Fails with its traceback, or with every thread's if it hangs: for so long it did not end, nor *progress* change.
        """
        hung = False
        # Until it ends, not until the pipe does: processes that it leaves behind may hold the other end.
        deadline, seen = time.monotonic() + seconds, progress()
        reading = [self._ended, self._output, *([answer] if answer >= 0 else [])]
        while True:
            ready, _, _ = select.select(reading, [], [], max(0.0, deadline - time.monotonic()))
            if self._output in ready:
                piece = os.read(self._output, 1 << 16)
                self._said += piece
                if not piece:
                    reading.remove(self._output)
                continue
            if self._ended in ready:
                break
            if answer in ready and not hung:
                return
            if hung:
                os.kill(self.pid, signal.SIGKILL)
            elif seen != (now := progress()):
                deadline, seen = time.monotonic() + seconds, now
            else:
                os.kill(self.pid, signal.SIGABRT)  # faulthandler shows where everybody is
                hung, deadline = True, time.monotonic() + 5
        status = self.end()
        text = self._said.decode(errors="replace")
        assert not hung, f"the child hung for {seconds} s\n{text}"
        assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}\n{text}"

    def end(self) -> int:
        """End it with all that it left behind, if that has not been done. Returns its status."""
        if self.pid:
            os.close(self._ended)
            os.close(self._output)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            _, self._status = os.waitpid(self.pid, 0)
            self.pid = 0
        return self._status


def in_child(
    function: Callable[..., object],
    *arguments: Any,
    seconds: float = CHILD_SECONDS,
    progress: Callable[[], object] = bool,
) -> None:
    """Run a function that could hang in a forked child. Fails as `Child.wait` does."""
    child = Child(function, *arguments)
    try:
        child.wait(seconds, progress=progress)
    finally:
        child.end()


def memory_of(kind: str, pages: int) -> mmap.mmap:
    """Private or shared anonymous memory, or a skip where this flavour refuses it."""
    if kind == "private":
        return mmap.mmap(-1, pages * PAGE, flags=PRIVATE)
    need_shared()
    return mmap.mmap(-1, pages * PAGE)


class Mirror:
    """A copy of tracked memory, brought up to date only by pages that were collected. Any thread may merge into it."""

    def __init__(self, ram: Cursor, memory: mmap.mmap) -> None:
        self.ram = ram
        self.memory = memory
        self.copy = bytearray(memory[:])
        self.lock = threading.Lock()

    def merge(self, result: ScanResult) -> None:
        """Copy the pages of a result. Reading and storing are one step, so that of two copies the newer one stays."""
        with self.lock:
            for lo, hi in result.spans():
                self.copy[lo:hi] = self.memory[lo:hi]

    def finish(self) -> None:
        """Collect once more, with no writer left, and compare."""
        result = self.ram.collect()
        assert result.complete
        self.merge(result)
        pages = [slice(at, at + PAGE) for at in range(0, len(self.copy), PAGE)]
        differ = [one.start // PAGE for one in pages if self.copy[one] != self.memory[one]]
        assert differ == [], f"lost pages {differ}"


class Crew:
    """Threads that are joined, and whose exceptions are raised here."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.failures: list[BaseException] = []
        self._ended: list[None] = []

    def add(self, function: Callable[..., object], *arguments: Any) -> None:
        """Start one."""

        def run() -> None:
            try:
                function(*arguments)
            except BaseException as error:
                self.failures.append(error)
            finally:
                self._ended.append(None)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.threads.append(thread)

    @property
    def working(self) -> bool:
        """Whether any of them still runs. Two threads may ask at once, where is_alive() of Python 3.11 asserts."""
        return len(self._ended) < len(self.threads)

    def join(self) -> None:
        """Wait for all, and raise what one of them raised."""
        for thread in self.threads:
            thread.join()
        for failure in self.failures:
            raise failure


class Raw:
    """Children forked by C, of which Python knows nothing, kept alive until they are let go.

    Only for processes with one Python thread: the GIL of such a child may wait for threads that it does not have.
    """

    def __init__(self) -> None:
        self._hold, self._let_go = os.pipe()
        self.pids: list[int] = []

    def fork(self, then: Callable[[], object] | None = None) -> int:
        """Fork. The child calls *then*, whose failure is its exit status, and stays until `end`."""
        pid: int = plain.fork()
        if pid:
            self.pids.append(pid)
            return pid
        status = 1
        try:
            os.close(self._let_go)
            if then:
                then()
            os.read(self._hold, 1)
            status = 0
        except BaseException:
            faulthandler.disable()
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)

    def end(self) -> None:
        """Let them go, and check that they ended well."""
        os.close(self._let_go)
        os.close(self._hold)
        for pid in self.pids:
            _, status = os.waitpid(pid, 0)
            assert status == 0, f"a forked child ended with {os.waitstatus_to_exitcode(status)}"


def clone_that_pauses() -> int:
    """A child forked by C that runs nothing of Python, so that threads may be doing anything. Until it is killed.

    It holds copies of every descriptor, as children do that were forked without Python's hooks.
    """
    stack = ctypes.create_string_buffer(1 << 16)
    top = ctypes.addressof(stack) + len(stack) & -64  # of its own copy, from which it grows down
    pid: int = plain.clone(plain.pause, ctypes.c_void_p(top), signal.SIGCHLD, None)
    assert pid > 0, os.strerror(ctypes.get_errno())
    return pid


def hold_fault_thread_back() -> None:
    """All threads on one CPU, and every other one before it: it goes on only once all others sleep."""
    cpu = min(os.sched_getaffinity(0))
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that has ended meanwhile
            os.sched_setaffinity(int(task), {cpu})
            if name_of(task) == "pagemapcompat":
                os.sched_setscheduler(int(task), os.SCHED_IDLE, os.sched_param(0))


@contextlib.contextmanager
def kept_busy() -> Iterator[None]:
    """The CPUs that this thread may use have something to do at any time, so that what is SCHED_IDLE hardly runs."""
    program = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", program]) as busy:
        try:
            yield
        finally:
            busy.kill()


def preloaded(source: str, folder: Path) -> dict[str, str]:
    """The environment in which a program has functions of *source* instead of the C library's."""
    if not shutil.which("gcc"):
        lacking("cc", "no C compiler (ENOENT)", "apt-get install gcc")
    built = folder / "preloaded.so"
    built.with_suffix(".c").write_text(source)
    subprocess.run(["gcc", "-shared", "-fPIC", built.with_suffix(".c"), "-o", built], check=True, timeout=60)
    return {"LD_PRELOAD": str(built)}


def name_of(task: str) -> str:
    """Of a thread."""
    with open(f"/proc/self/task/{task}/comm", encoding="ascii") as comm:
        return comm.read().rstrip()


def resources() -> tuple[list[str], int, list[tuple[str, str]]]:
    """Descriptors, threads and anonymous mappings of this process, to be the same before and after."""
    gc.collect()
    descriptors = []
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors.append(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue  # that of the listing itself
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        named = [tuple(line.split()[:2]) for line in maps]
    if SANITIZED:
        named = []
    return sorted(descriptors), len(os.listdir("/proc/self/task")), named  # type: ignore[return-value]
