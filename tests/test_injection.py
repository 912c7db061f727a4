"""Every call of the C core fails in turn, with every errno that it may give.

What fails is then an error of the library's own that names the call, no page that was written is lost, no writer waits,
and nothing is left behind.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import (
    EACCES,
    EAGAIN,
    EBUSY,
    EFAULT,
    EINTR,
    EINVAL,
    EIO,
    EMFILE,
    ENFILE,
    ENODEV,
    ENOENT,
    ENOMEM,
    ENOSYS,
    ENOTTY,
    EPERM,
    ESRCH,
    ETIMEDOUT,
    errorcode,
)
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import attrs
import figures
import pytest
from children import Crew, Raw, in_child, memory_of, preloaded, resources
from conftest import (
    DISABLED,
    FLAVOURS,
    PAGE,
    PRIVATE,
    Flavour,
    disable,
    flavours,
    lacking,
    libc,
    meminfo,
    need,
    run_child,
    use_flavour,
)

from pagemapcompat import (
    ClosedError,
    Cursor,
    DirtyTracker,
    FaultThreadError,
    Feature,
    KernelError,
    NotTrackedError,
    PageCategory,
    Pagemap,
    PagemapCompatError,
    ScanQuery,
    ScanResult,
    Snapshot,
    TrackedRange,
    _native,
    probe,
)
from pagemapcompat.trials_kinds import huge_page_size

ROOT = Path(__file__).resolve().parent.parent
SHIM = Path(__file__).with_name("shim.c")

INSTEAD, AFTERWARDS, HALFWAY, SHORT, UNDONE = range(5)
HOW = ("instead", "afterwards", "halfway", "short", "undone")

ERRNOS = {
    "UFFDIO_API": (EINVAL, EPERM),
    "UFFDIO_REGISTER": (EBUSY, EINVAL, ENOMEM, EPERM),
    "UFFDIO_UNREGISTER": (EINVAL, ENOMEM),
    "UFFDIO_WAKE": (EINVAL,),
    "UFFDIO_COPY": (EAGAIN, EINTR, ENOMEM, ESRCH),
    "UFFDIO_WRITEPROTECT": (EAGAIN, EINTR, ENOENT, ENOMEM, ESRCH),
    "USERFAULTFD_IOC_NEW": (EINVAL, EMFILE, ENFILE, ENOMEM),
    "PAGEMAP_SCAN": (EFAULT, EINTR, ENOMEM, EPERM, ESRCH),
    "PROCMAP_QUERY": (EINTR, ENOENT, ENOMEM, ENOTTY, ESRCH),  # ENOENT: no mapping there, nor behind
    "F_GETFL": (EACCES,),
    "F_SETFL": (EACCES,),
    "PR_GET_DUMPABLE": (EPERM,),
    "SYS_gettid": (),  # never fails
    "SYS_process_vm_readv": (EFAULT, ENOMEM, ENOSYS, EPERM, ESRCH),
    "SYS_process_vm_writev": (EFAULT, ENOMEM, ENOSYS, EPERM, ESRCH),
    "SYS_sched_getscheduler": (),  # of oneself
    "SYS_sched_setscheduler": (),  # likewise, from SCHED_OTHER to SCHED_BATCH
    "SYS_userfaultfd": (EINVAL, EMFILE, ENFILE, ENOMEM, ENOSYS, EPERM),
    "FUTEX_WAIT_BITSET_PRIVATE": (EAGAIN, EINTR, ETIMEDOUT),
    "FUTEX_WAIT_PRIVATE": (EAGAIN, EINTR),
    "FUTEX_WAKE_PRIVATE": (),  # given an address that is there it wakes whoever waits
    "calloc": (ENOMEM,),
    "fstat": (ENOMEM,),
    "lseek": (EINVAL, ENOMEM),
    "madvise": (EAGAIN, EFAULT, EINVAL, ENOMEM, EPERM),
    "malloc": (ENOMEM,),
    "mincore": (EAGAIN, ENOMEM, EPERM),
    "mmap": (ENOMEM,),
    "mprotect": (EACCES, ENOMEM),
    "mremap": (EAGAIN, EFAULT, ENOMEM),
    "munlock": (ENOMEM, EPERM),
    "munmap": (ENOMEM,),
    "open": (EACCES, EMFILE, ENFILE, ENODEV, ENOENT, ENOMEM),
    "pread": (EACCES, EINTR, EIO, ENOMEM),
    "process_vm_readv": (EFAULT, ENOMEM, ENOSYS, EPERM, ESRCH),
    "pthread_attr_init": (ENOMEM,),
    "pthread_attr_setstack": (EINVAL,),
    "pthread_create": (EAGAIN, EPERM),
    "pthread_setname_np": (EACCES, EMFILE),
    "pwrite": (EACCES, EFAULT, EINTR, EIO, ENOMEM),
    "read": (EINTR, EIO, ENOMEM),
    "realloc": (ENOMEM,),
    "sched_getaffinity": (EINVAL,),
    "sched_setaffinity": (EINVAL, EPERM),
    "sysinfo": (EFAULT,),
}
"""Sources: the manual pages, and fs/userfaultfd.c, mm/userfaultfd.c and fs/proc/task_mmu.c of 5.10 to 6.18."""

OWN = {"read": (EAGAIN, EFAULT, EINTR), "pread": (EINTR, ENOMEM, ESRCH), "UFFDIO_WAKE": (), "fstat": ()}
"""Where a fault thread is told something else than others are. Of an open descriptor fstat says all; and waking whoever
waits at one page never fails, and is all that there is: UNREGISTER wakes only who waits for a missing page. Source:
fs/userfaultfd.c, userfaultfd_read, userfaultfd_wake, userfaultfd_unregister; fs/proc/base.c, proc_single_show."""

LATE = {
    AFTERWARDS: {
        "PAGEMAP_SCAN": (EFAULT, EINTR, ENOMEM, EPERM),
        "UFFDIO_REGISTER": (ENOMEM,),
        "UFFDIO_UNREGISTER": (ENOMEM,),
        "UFFDIO_WRITEPROTECT": (EAGAIN, ENOENT, ENOMEM),
        "close": (EINTR, EIO),
        "madvise": (EAGAIN, EFAULT, ENOMEM),
        "mprotect": (ENOMEM,),
    },
    HALFWAY: {"PAGEMAP_SCAN": (EINTR, ENOMEM, EPERM), "UFFDIO_WRITEPROTECT": (EAGAIN, EINTR, ENOENT, ENOMEM)},
    SHORT: dict.fromkeys(("SYS_process_vm_readv", "SYS_process_vm_writev", "pread", "process_vm_readv", "read"), (0,)),
}
"""What is done, or half done, when the call fails. Sources: close(2); fs/proc/task_mmu.c, pagemap_scan_flush_buffer."""

TRANSIENT = {EINTR, EAGAIN}
"""Not for ever: as long as something else goes on."""


def is_transient(name: str, error: int) -> bool:
    """Whether the call succeeds when it is made again. Since Linux 6.17 also one that has left a mapping out."""
    return error in TRANSIENT or (name, error) == ("PROCMAP_QUERY", ENOENT)


INFALLIBLE = {
    *("clock_gettime", "getpid", "sigfillset", "sysconf", "__errno_location"),
    *("memchr", "memcmp", "memcpy", "memmove", "memset", "strchr", "strcmp", "strcspn", "strncmp", "strrchr", "strspn"),
    *("snprintf", "__snprintf_chk", "strtoul", "__isoc23_strtoul"),
    "__stack_chk_fail",
    "nanosleep",  # cut short, it was a pause all the same
    *("pthread_attr_destroy", "pthread_detach", "pthread_join", "pthread_self", "pthread_sigmask"),
    *("pthread_mutex_init", "pthread_mutex_lock", "pthread_mutex_unlock"),
}
"""Imports that cannot fail as they are used: of glibc, and with arguments that are right."""


@attrs.frozen
class Fault:
    """One call that fails: which, with what, and how."""

    name: str
    nth: int
    errno: int
    how: int = INSTEAD
    always: bool = False
    own: bool = False
    """In a thread of the core's own."""

    def __str__(self) -> str:
        """One line for people."""
        error = errorcode.get(self.errno, "no errno")
        return f"{self.name} {self.nth}{' and on' if self.always else ''}, {error} {HOW[self.how]}"


class Shim:
    """The compiled shim, attached to the C core of this process."""

    def __init__(self, path: str) -> None:
        self._lib = ctypes.CDLL(path)
        self._lib.shim_name.restype = ctypes.c_char_p
        self._lib.shim_mapped.restype = self._lib.shim_allocated.restype = ctypes.c_long
        seen: set[str] = set()
        note = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda name: seen.add(name.decode()))
        assert self._lib.shim_attach(_native.__file__.encode(), note) > 0
        self.others = seen
        """What the core imports and the shim does not know."""
        names = (self._lib.shim_name(index) for index in count())
        self.names = [name.decode() for name in iter(lambda: next(names), None)]
        self.written = self.told = 0
        """Pages, on all stages."""

    def arm(self, fault: Fault | None) -> None:
        """Count from 0, and let one call fail."""
        one = fault or Fault(self.names[0], 0, 0)
        self._lib.shim_arm(self.names.index(one.name), one.own, one.nth, one.always, one.errno, one.how)

    def disarm(self) -> int:
        """Nothing fails any more. How often something did."""
        return int(self._lib.shim_disarm())

    def calls(self, *, own: bool = False) -> Counter[str]:
        """How often each function was called since it was armed."""
        return Counter({name: self._lib.shim_calls(index, own) for index, name in enumerate(self.names)})

    def kept(self) -> tuple[int, int]:
        """Bytes that the core has mapped, and pieces of memory that it has allocated."""
        return self._lib.shim_mapped(), self._lib.shim_allocated()


_folder = tempfile.TemporaryDirectory()


@cache
def compiled() -> str | None:
    """The path of the compiled shim; None without a compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    path = f"{_folder.name}/shim.so"
    options = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'pagemapcompat' / 'native'}"]
    done = subprocess.run([compiler, *options, "-o", path, SHIM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def shim() -> str:
    """The path of the compiled shim."""
    path = compiled()
    if path is None:
        lacking("cc", "no C compiler (ENOENT)", "apt-get install gcc")
    return str(path)


def test_every_import_of_the_core_is_known(shim: str) -> None:
    """A function that the core begins to call is made to fail here, or is said to be infallible."""

    def check() -> None:
        attached = Shim(shim)
        others = {name for name in attached.others if not name.startswith(("Py", "_Py", "_ITM", "__cxa", "__gmon"))}
        assert others <= INFALLIBLE
        assert set(attached.names) == set(ERRNOS) | {name for late in LATE.values() for name in late}

    in_child(check)


# -- The stage: tracked memory, what was written to it, and one fault ----------------------------------------------

PAGES = 24
PLACE, HUGE_PLACE = 1 << 38, 1 << 39
"""Where the kernel puts nothing by itself: what a test unmaps is nobody else's a moment later."""
HOLE = range(8, 10)
READ_ONLY = range(12, 14)
WRITABLE = [page for page in range(PAGES) if page not in HOLE and page not in READ_ONLY]
FLAGS = {"private": PRIVATE, "shared": mmap.MAP_SHARED | mmap.MAP_ANONYMOUS}


class Stage:
    """Memory of several mappings, watched by readers, of which each must be told every page."""

    def __init__(self, shim: Shim, flavour: Flavour, kind: str, fault: Fault | None) -> None:
        self.shim = shim
        self.flavour = flavour
        self.plan = fault
        self.kind = kind
        self.struck = 0
        self.error: Exception | None = None
        self.tracker: DirtyTracker | None = None
        self.owed: dict[Cursor, set[int]] = {}
        self.content = bytearray(PAGES)
        self.calls: Counter[str] = Counter()
        self.closed_off: set[int] = set()
        # A half of its own for each fault: the others show whether what was written before is lost.
        self.afterwards = sorted(random.Random(str(fault)).sample(WRITABLE, len(WRITABLE) // 2))
        libc.mmap(PAGES * PAGE, flags=FLAGS[kind], address=PLACE)
        libc.munmap(PLACE + HOLE.start * PAGE, len(HOLE) * PAGE)
        libc.mprotect(PLACE + READ_ONLY.start * PAGE, len(READ_ONLY) * PAGE, libc.PROT_READ)
        self.write(0, 2, 20)

    @property
    def ram(self) -> TrackedRange:
        """The first reader."""
        ram = next(iter(self.owed))
        assert isinstance(ram, TrackedRange)
        return ram

    def open(self, **options: Any) -> None:
        """Make the tracker."""
        self.tracker = DirtyTracker(self.flavour.backend, **options)

    def track(self) -> None:
        """Track the memory."""
        assert self.tracker is not None
        self.owed[self.tracker.track((PLACE, PAGES * PAGE))] = set()

    def ready(self, **options: Any) -> None:
        """Both."""
        self.open(**options)
        self.track()

    def write(self, *pages: int) -> None:
        """Store into pages, which every reader must find then."""
        for page in pages:
            self.content[page] = (self.content[page] + 1) % 256
            libc.fill(PLACE + page * PAGE, 1, self.content[page])
        for owed in self.owed.values():
            owed.update(pages)
        self.shim.written += len(pages)

    def remap(self, *pages: int) -> None:
        """Map pages anew, which takes their registration away."""
        for page in pages:
            libc.mmap(PAGE, flags=FLAGS[self.kind], address=PLACE + page * PAGE)
            self.content[page] = 0
        for owed in self.owed.values():
            owed.update(pages)

    def take(self, reader: Cursor, result: ScanResult) -> None:
        """A reader was told. What its answer has gone past and does not name is clean."""
        told = set(result.page_indices())
        assert result.range.start <= result.walk_end <= result.range.end
        assert told.isdisjoint(HOLE)
        passed = range((result.range.start - PLACE) // PAGE, (result.walk_end - PLACE) // PAGE)
        assert self.owed[reader].intersection(passed) <= told, "written pages were called clean"
        self.owed[reader] -= told
        self.shim.told += len(told)

    @contextmanager
    def fault(self, reader: Cursor | None = None) -> Iterator[None]:
        """Within it the call fails. What that leads to is judged here, and goes no further; then writes go on."""
        self.shim.arm(self.plan)
        try:
            yield
        except Exception as error:
            self.struck = self.shim.disarm()
            self.error = error
            self.judge(error)
            # Once the fault thread has ended, what was written since is not known.
            if not isinstance(error, FaultThreadError | MemoryError) and error.collected is not None:
                assert reader
                self.take(reader, error.collected)
        self.struck = self.shim.disarm()
        self.calls = self.shim.calls(own=self.plan is not None and self.plan.own)
        # Before anything protects again what the call may have left open.
        self.write(*(page for page in self.afterwards if page not in self.closed_off))

    def judge(self, error: Exception) -> None:
        """An error of the library's tree, that names the call and its errno."""
        assert self.struck, "an error, though nothing failed"
        assert self.plan
        name = self.plan.name
        if isinstance(error, MemoryError):
            assert name in {"malloc", "calloc", "realloc"}
            return
        assert isinstance(error, PagemapCompatError)
        assert self.plan.own == isinstance(error, FaultThreadError)
        if isinstance(error, KernelError):
            assert error.operation in OPERATIONS.get(name, {name})
            assert error.errno == self.plan.errno or (
                self.plan.errno != ENOMEM and error.errno in OTHERWISE.get(name, ())
            )
            # A file that is not there says nothing of the memory.
            assert not (isinstance(error, NotTrackedError) and error.operation.startswith("/proc/"))

    def check(self, snapshot: Snapshot, content: bytes | None = None) -> None:
        """A snapshot holds what memory holds, or held."""
        for page in WRITABLE:
            assert snapshot.read(page * PAGE, page * PAGE + 1)[0] == (content or self.content)[page]

    def restore(self, snapshot: Snapshot, content: bytes) -> None:
        """After whatever happened, memory can be made what it was; whatever changes on the way is written."""
        self.ram.restore(snapshot, verify=True)
        for owed in self.owed.values():
            owed.update(page for page in range(PAGES) if content[page] != self.content[page])
        self.content[:] = content

    @contextmanager
    def barred(self, *pages: int) -> Iterator[None]:
        """Within it some pages can be neither read nor written."""
        for page in pages:
            libc.mprotect(PLACE + page * PAGE, PAGE, libc.PROT_NONE)
        self.closed_off.update(pages)
        yield
        self.closed_off.difference_update(pages)
        for page in pages:
            libc.mprotect(PLACE + page * PAGE, PAGE, libc.PROT_READ | libc.PROT_WRITE)

    def forget(self) -> None:
        """Drop everything that is closed, so that it is freed."""
        self.owed.clear()
        self.tracker = None

    def finish(self) -> None:
        """Nothing is lost, nothing waits, everything is watched, and closing leaves nothing behind."""
        for reader in self.owed:
            self.take(reader, reader.collect())
            assert not self.owed[reader], "lost"
        self.write(*WRITABLE[::2])
        for reader in self.owed:
            self.take(reader, reader.collect())
            assert not self.owed[reader], "unwatched"
        if self.tracker:
            self.tracker.close()
        self.write(0, 7, 23)
        held = bytes(ctypes.string_at(PLACE + page * PAGE, 1)[0] for page in WRITABLE)
        assert held == bytes(self.content[page] for page in WRITABLE)

    def end(self) -> None:
        """Let everything go."""
        self.shim.disarm()
        self.owed.clear()
        self.tracker = self.error = None
        libc.munmap(PLACE, PAGES * PAGE)
        gc.collect()


OTHERWISE = {
    # Refused each in its own way, a page cannot be had.
    **dict.fromkeys(("SYS_process_vm_writev", "pread"), (EIO,)),
    **dict.fromkeys(("SYS_process_vm_readv", "pwrite"), (EFAULT,)),
}
"""Errnos that the failure of a call may come out as."""
OPERATIONS = {
    **dict.fromkeys(("UFFDIO_API", "SYS_userfaultfd", "USERFAULTFD_IOC_NEW"), frozenset({"userfaultfd"})),
    "SYS_process_vm_readv": {"process_vm_readv"},
    "SYS_process_vm_writev": {"process_vm_writev"},
    "UFFDIO_WAKE": {"UFFDIO_UNREGISTER"},  # of which it is a part
    "UFFDIO_WRITEPROTECT": {"UFFDIO_WRITEPROTECT", "UFFDIO_COPY"},  # what was refused is looked for
    **dict.fromkeys(("PROCMAP_QUERY", "lseek", "read"), frozenset({"/proc/self/maps", "/proc/self/smaps"})),
    **dict.fromkeys(("malloc", "calloc", "realloc"), frozenset({"malloc"})),
    **dict.fromkeys(("F_GETFL", "F_SETFL"), frozenset({"fcntl"})),
    **dict.fromkeys(("pthread_attr_init", "pthread_attr_setstack"), frozenset({"pthread_create"})),
    "fstat": {"fstat", "/proc/self/maps", "/proc/self/smaps"},
    "open": {"/proc/self/maps", "/proc/self/mem", "/proc/self/smaps"},
    "pread": {"/proc/self/pagemap", "/proc/self/mem", "process_vm_writev"},
    "pwrite": {"/proc/self/mem", "process_vm_readv"},
}
"""What it is called in the error, where that is not its name."""


def opening(stage: Stage) -> None:
    """DirtyTracker()."""
    with stage.fault():
        stage.open()


def tracking(stage: Stage) -> None:
    """track()."""
    stage.open()
    with stage.fault():
        stage.track()


WRITES = (1, 2, 3, 11, 17, 21, 23)


def peeking(stage: Stage) -> None:
    """peek()."""
    stage.ready()
    stage.write(*WRITES)
    with stage.fault():
        result = stage.ram.peek()
        passed = range((result.walk_end - PLACE) // PAGE)
        assert set(WRITES).intersection(passed) <= set(result.page_indices())


def collecting(stage: Stage) -> None:
    """collect()."""
    stage.ready()
    stage.write(*WRITES)
    with stage.fault(stage.ram):
        stage.take(stage.ram, stage.ram.collect())


def collecting_in_steps(stage: Stage) -> None:
    """collect(max_pages=2), until it is complete."""
    stage.ready()
    stage.write(*WRITES)
    with stage.fault(stage.ram):
        at, resume_at = -1, 0
        while resume_at is not None and at < resume_at:  # without memory for an answer there is none
            at = resume_at
            result = stage.ram.collect(at, max_pages=2)
            assert result.pages <= 2
            stage.take(stage.ram, result)
            resume_at = result.resume_at


def resetting(stage: Stage) -> None:
    """reset(), after which what was written before is nobody's."""
    stage.ready()
    stage.write(*WRITES)
    for owed in stage.owed.values():
        owed.clear()
    with stage.fault():
        stage.ram.reset()


def unprotecting(stage: Stage) -> None:
    """unprotect(), which all readers are told of."""
    stage.ready()
    other = stage.ram.cursor()
    stage.owed[other] = set()
    stage.write(*WRITES)
    with stage.fault():
        stage.ram.unprotect(0, 18 * PAGE)
        for owed in stage.owed.values():
            owed.update(page for page in range(18) if page not in HOLE)
    stage.write(0, 4, 5)  # at pages that may have been opened


def collecting_what_is_untracked(stage: Stage) -> None:
    """collect() of memory that has lost its registration, which is NotTrackedError once it gets there."""
    stage.ready()
    stage.write(*WRITES)
    stage.remap(20, 21)
    with stage.fault(stage.ram):
        try:
            result = stage.ram.collect()
            assert not result.complete
            stage.take(stage.ram, result)
        except NotTrackedError as error:
            assert error.collected is not None
            stage.take(stage.ram, error.collected)
    stage.ram.rearm()


def rearming(stage: Stage) -> None:
    """rearm(); whoever writes before it is done is told of all the same."""
    stage.ready()
    other = stage.ram.cursor()
    stage.owed[other] = set()
    stage.write(*WRITES)
    stage.remap(16, 20, 21)
    with stage.fault():
        stage.ram.rearm()
    if stage.error:
        stage.write(20)
        stage.ram.rearm()


def collecting_and_rearming(stage: Stage) -> None:
    """collect() with on_untracked="rearm"."""
    stage.ready(on_untracked="rearm")
    stage.write(*WRITES)
    stage.remap(20, 21)
    with stage.fault(stage.ram):
        stage.take(stage.ram, stage.ram.collect())


def resetting_and_rearming(stage: Stage) -> None:
    """reset() with on_untracked="rearm", beside another reader."""
    stage.ready(on_untracked="rearm")
    other = stage.ram.cursor()
    stage.owed[other] = set()
    stage.write(*WRITES)
    stage.remap(20, 21)
    stage.owed[stage.ram].clear()
    with stage.fault():
        stage.ram.reset()


def another_reader(stage: Stage) -> None:
    """cursor(), which takes nothing from the first."""
    stage.ready()
    stage.write(*WRITES)
    with stage.fault():
        stage.owed[stage.ram.cursor()] = set()


def two_readers(stage: Stage) -> None:
    """collect() by one of two."""
    stage.ready()
    other = stage.ram.cursor()
    stage.owed[other] = set()
    stage.write(*WRITES)
    with stage.fault(other):
        stage.take(other, other.collect())


def taking_what_is_owed(stage: Stage) -> None:
    """collect() of what another reader took."""
    stage.ready()
    other = stage.ram.cursor()
    stage.owed[other] = set()
    stage.write(*WRITES)
    stage.take(stage.ram, stage.ram.collect())
    with stage.fault(other):
        stage.take(other, other.collect())


def a_reader_less(stage: Stage) -> None:
    """Cursor.close()."""
    stage.ready()
    other = stage.ram.cursor()
    stage.write(*WRITES)
    with stage.fault():
        other.close()
    other.close()


def first_snapshot(stage: Stage) -> None:
    """snapshot(), of everything."""
    stage.ready()
    stage.write(*WRITES)
    with stage.fault():
        stage.check(stage.ram.snapshot())
    stage.check(stage.ram.snapshot())


def next_snapshot(stage: Stage) -> None:
    """snapshot(), of what was written since the last."""
    stage.ready()
    stage.write(*WRITES)
    first, before = stage.ram.snapshot(), bytes(stage.content)
    stage.write(4, 5, 22)
    with stage.fault():
        stage.check(stage.ram.snapshot())
    stage.check(stage.ram.snapshot())
    stage.check(first, before)


def snapshot_after_a_dropped_one(stage: Stage) -> None:
    """snapshot(), which goes on with what another left: the next restore knows what became of it."""
    stage.ready()
    stage.write(*WRITES)
    first, before = stage.ram.snapshot(), bytes(stage.content)
    stage.write(1, 5, 22)
    stage.ram.snapshot().drop()
    stage.write(4, 5, 22, 23)
    with stage.fault():
        stage.check(stage.ram.snapshot())
    stage.restore(first, before)
    stage.check(stage.ram.snapshot())


def snapshot_of_barred_pages(stage: Stage) -> None:
    """snapshot(), of pages that nobody may read."""
    stage.ready()
    stage.write(*WRITES)
    with stage.barred(*WRITES[:4]):
        with stage.fault():
            stage.check(stage.ram.snapshot())
        stage.check(stage.ram.snapshot())


def restoring(stage: Stage, *, verify: bool = False) -> None:
    """restore(), of what was written since."""
    stage.ready()
    stage.write(*WRITES)
    first, before = stage.ram.snapshot(), bytes(stage.content)
    stage.write(1, 4, 5, 22, 23)
    with stage.fault():
        stage.ram.restore(first, verify=verify)
    stage.restore(first, before)


def restoring_and_verifying(stage: Stage) -> None:
    """restore(verify=True)."""
    restoring(stage, verify=True)


def restoring_another(stage: Stage) -> None:
    """restore(), of a snapshot that memory was not last made equal to."""
    stage.ready()
    stage.write(*WRITES)
    first, before = stage.ram.snapshot(), bytes(stage.content)
    stage.write(1, 4, 5, 22, 23)
    second, after = stage.ram.snapshot(), bytes(stage.content)
    stage.write(6, 22)
    with stage.fault():
        stage.ram.restore(first)
    stage.restore(first, before)
    stage.restore(second, after)


def restoring_barred_pages(stage: Stage) -> None:
    """restore(), of pages that nobody may write."""
    stage.ready()
    stage.write(*WRITES)
    first, before = stage.ram.snapshot(), bytes(stage.content)
    stage.write(1, 4, 5, 22, 23)
    with stage.barred(1, 4, 5):
        with stage.fault():
            stage.ram.restore(first)
        stage.restore(first, before)


def tracking_huge_pages(stage: Stage) -> None:
    """track(), of huge pages, whose size is looked up; without a reservation, no page of the pool is needed."""
    stage.ready()
    flags = PRIVATE | libc.MAP_HUGETLB | libc.MAP_NORESERVE
    size = huge_page_size()
    if not size or not probe().supports(Feature.UFFD_WP_HUGETLBFS_SHMEM):
        return
    place = libc.mmap(2 * size, flags=flags, address=HUGE_PLACE)
    assert stage.tracker
    with stage.fault():
        stage.tracker.track((place, 2 * size)).close()
    stage.tracker.track((place, 2 * size)).close()
    libc.munmap(place, 2 * size)


def closing_a_range(stage: Stage) -> None:
    """TrackedRange.close(); the tracker goes on."""
    stage.ready()
    stage.write(*WRITES)
    with stage.fault():
        stage.ram.close()
    stage.owed.clear()
    stage.write(*WRITABLE)


def closing(stage: Stage) -> None:
    """DirtyTracker.close(), and the end of everything that it had."""
    stage.ready()
    stage.write(*WRITES)
    with stage.fault():
        assert stage.tracker
        stage.tracker.close()
        stage.forget()
    stage.forget()
    stage.write(*WRITABLE)


Scene = Callable[[Stage], None]
SCENES: tuple[Scene, ...] = (
    opening,
    tracking,
    peeking,
    collecting,
    collecting_in_steps,
    resetting,
    unprotecting,
    collecting_what_is_untracked,
    rearming,
    collecting_and_rearming,
    resetting_and_rearming,
    another_reader,
    two_readers,
    taking_what_is_owed,
    a_reader_less,
    first_snapshot,
    next_snapshot,
    snapshot_after_a_dropped_one,
    snapshot_of_barred_pages,
    restoring,
    restoring_and_verifying,
    restoring_another,
    restoring_barred_pages,
    tracking_huge_pages,
    closing_a_range,
    closing,
)


def faults(calls: Counter[str], *, own: bool = False) -> Iterator[Fault]:
    """Every call fails: the first two in every way, later ones in one after the other."""
    usual = {**ERRNOS, **OWN} if own else ERRNOS
    for name, number in calls.items():
        ways = [(how, error) for how, table in ((INSTEAD, usual), *LATE.items()) for error in table.get(name, ())]
        for nth in range(1, number + 1 if ways else 0):
            for how, error in ways if nth <= 2 else [ways[nth % len(ways)]]:
                yield Fault(name, nth, error, how, own=own)
        for how, error in ways if number else ():
            # Nobody waits for ever at a page that is not registered.
            if how is INSTEAD and not is_transient(name, error) and not (own and error == ENOENT):
                yield Fault(name, 1, error, how, always=True, own=own)


def is_made(fault: Fault) -> bool:
    """Whether a call is made each time that the same is played."""
    # Whether a lock is waited for depends on who runs when; the rest, on how long a text or an end takes.
    once = fault.name in {"read", "FUTEX_WAIT_BITSET_PRIVATE"}
    return fault.name != "FUTEX_WAIT_PRIVATE" and (not once or fault.own or fault.nth == 1)


def play(shim: Shim, flavour: Flavour, kind: str, scene: Scene, fault: Fault | None) -> Counter[str]:
    """One scene, with one fault, and what comes after. What it called."""
    stage = Stage(shim, flavour, kind, fault)
    try:
        scene(stage)
        assert stage.struck or not fault or not is_made(fault), "the call was not made"
        if not stage.tracker:
            stage.open()
        if not stage.owed:
            stage.track()
        stage.finish()
        return stage.calls
    finally:
        stage.end()


def strike(shim: Shim, flavour: Flavour, kind: str, dice: random.Random) -> None:
    """Play one scene, with one of the faults that it may have."""
    probe()  # whose answer is remembered
    scene = dice.choice(SCENES)
    calls = play(shim, flavour, kind, scene, None)
    ways = [list(filter(is_made, faults(Counter({name: number})))) for name, number in sorted(calls.items())]
    fault = dice.choice(dice.choice([some for some in ways if some] or [[None]]))
    kept = shim.kept()
    try:
        play(shim, flavour, kind, scene, fault)
        assert (fault and keeps(fault)) or shim.kept() == kept, "memory was not given back"
    except Exception as error:
        error.add_note(f"{scene.__name__}, with {fault}")
        raise


def keeps(fault: Fault) -> bool:
    """Whether memory stays when this fails: what cannot be unmapped, and what a thread that does not end stands on."""
    return fault.name == "munmap" or fault.errno == ETIMEDOUT


Play = tuple[str, Fault, Callable[[Fault], object]]
"""What is played, with which fault, and how."""


def in_turn(path: str, plan: Callable[[Shim], Iterator[Play]]) -> None:
    """Play with one fault after the other, in a child; each leaves nothing behind."""
    diary = mmap.mmap(-1, PAGE)

    def check() -> None:
        shim = Shim(path)
        probe()
        gc.collect()
        gc.freeze()
        plays = list(plan(shim))
        before, kept = resources(), shim.kept()
        for name, fault, once in plays:
            diary[:] = f"{name}, {fault}".encode().ljust(PAGE, b"\0")
            once(fault)
            if keeps(fault):
                kept = shim.kept()
            assert shim.kept() == kept, "memory was not given back"
        figures.add("faults injected", {"faults": len(plays)})
        after = resources()
        assert after[0] == before[0]
        assert after[1] == before[1]

    try:
        in_child(check, progress=lambda: diary[:])
    except AssertionError as error:
        error.add_note(f"with {diary[:].rstrip(bytes(1)).decode()}")
        raise
    finally:
        diary.close()


PLAYED = [one for one in FLAVOURS if one.name != "uffd-wp-as-6.5"]
"""What sets it apart, as-6.1 has too."""


@pytest.fixture(params=[pytest.param(one, id=one.name) for one in PLAYED])
def played(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Flavour:
    """Each generation of each backend that calls something of its own."""
    return use_flavour(request.param, monkeypatch)


@pytest.mark.parametrize("kind", FLAGS)
def test_every_call_fails_in_turn(shim: str, played: Flavour, kind: str) -> None:
    """Whatever the library does, on any backend and any memory."""
    if played.disabled and kind != "private":
        pytest.skip("what differs between kinds of memory does not between imitations; remedy: the backends themselves")
    memory_of(kind, 1).close()

    def plan(attached: Shim) -> Iterator[Play]:
        for scene in SCENES:
            for fault in faults(play(attached, played, kind, scene, None)):
                yield scene.__name__, fault, lambda one, scene=scene: play(attached, played, kind, scene, one)

    in_turn(shim, plan)


# -- The fault thread ------------------------------------------------------------------------------------------


@pytest.fixture(params=flavours("uffd-wp"))
def uffd_wp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Flavour:
    """Each generation of the backend that has a fault thread."""
    return use_flavour(request.param, monkeypatch)


def serving(stage: Stage) -> None:
    """Writers wait in three threads, and one of them has the GIL."""
    stage.ready()
    memory = (ctypes.c_char * (PAGES * PAGE)).from_address(PLACE)
    crew = Crew()
    with stage.fault():
        for first in range(3):
            crew.add(lambda pages=WRITABLE[first::3]: [libc.fill(PLACE + page * PAGE) for page in pages])
        for page in WRITABLE:
            memory[page * PAGE] = b"\1"
        crew.join()
        for page in WRITABLE:
            stage.content[page] = 1
            stage.owed[stage.ram].add(page)
        stage.take(stage.ram, stage.ram.collect())


def ending(stage: Stage) -> None:
    """The tracker is closed, which the fault thread is told by a fault."""
    stage.ready()
    stage.write(*WRITES)
    with stage.fault():
        assert stage.tracker
        stage.tracker.close()
    stage.forget()


def following(stage: Stage) -> None:
    """The only fault thread follows the thread that made the tracker."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    stage.open()
    os.sched_setaffinity(0, cpus)
    stage.track()
    for task in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(task), cpus)
    with stage.fault():
        for _ in range(4):
            stage.write(*WRITABLE)
            stage.take(stage.ram, stage.ram.collect())


def answer(stage: Stage, scene: Scene, fault: Fault | None) -> Counter[str]:
    """Play one of these. Writers go on; when the fault thread does not, the next call says so, and why."""
    try:
        scene(stage)
        if stage.tracker and not stage.error:
            try:
                stage.finish()
            except FaultThreadError as error:
                stage.error = error
        if stage.error:
            assert fault
            assert isinstance(stage.error, FaultThreadError)
            assert f"errno {fault.errno}" in str(stage.error)
            stage.write(*WRITABLE)
            with pytest.raises(FaultThreadError):
                stage.ram.peek()
            assert stage.tracker
            stage.tracker.close()
            stage.error = None
        stage.forget()
        stage.ready()
        stage.finish()
        return stage.calls
    finally:
        stage.end()


@pytest.mark.parametrize("scene", [serving, following, ending], ids=lambda scene: scene.__name__)
def test_every_call_of_the_fault_thread_fails_in_turn(shim: str, uffd_wp: Flavour, scene: Scene) -> None:
    """Nobody who waits for it waits for ever."""
    counting = Fault("read", 0, 0, own=True)

    def plan(attached: Shim) -> Iterator[Play]:
        calls = answer(Stage(attached, uffd_wp, "private", counting), scene, None)
        for fault in faults(calls, own=True):
            yield scene.__name__, fault, lambda one: answer(Stage(attached, uffd_wp, "private", one), scene, one)

    in_turn(shim, plan)


@pytest.mark.parametrize("error", [EAGAIN, EINTR], ids=errorcode.get)
def test_a_wait_for_the_lock_ends_early(shim: str, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """As a futex may, between a collector that reads the log and the fault thread; whoever waited looks again then."""
    flavour = use_flavour(next(one for one in FLAVOURS if one.name == "uffd-wp-as-5.10"), monkeypatch)

    def check() -> None:
        attached = Shim(shim)
        struck, own = 0, False
        while not struck:  # until they meet, which is soon
            own = not own
            stage = Stage(attached, flavour, "private", Fault("FUTEX_WAIT_PRIVATE", 1, error, always=True, own=own))
            stage.ready()
            crew = Crew()
            with stage.fault():
                for first in range(3):
                    crew.add(lambda pages=WRITABLE[first::3]: [libc.fill(PLACE + page * PAGE) for page in pages])
                while crew.working:
                    stage.ram.collect()
                crew.join()
                stage.content[:] = bytes(page in WRITABLE for page in range(PAGES))
            struck += stage.struck
            stage.finish()
            stage.end()

    in_child(check)


def registered() -> list[int]:
    """Where the mappings begin that have a userfaultfd for write faults, as the kernel says: uw in VmFlags."""
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as smaps:
        lines = [line.split() for line in smaps]
    starts = [line[0] for line in lines if "-" in line[0] and not line[0].endswith(":")]
    flags = [line[1:] for line in lines if line[0] == "VmFlags:"]
    return [int(start.split("-")[0], 16) for start, has in zip(starts, flags, strict=True) if "uw" in has]


def test_a_mapping_that_cannot_be_unregistered(shim: str, uffd_wp: Flavour) -> None:
    """What comes behind it is, and who waits in a hole is woken: where the whole is refused, each has its turn."""

    def check() -> None:
        attached = Shim(shim)
        stage = Stage(attached, uffd_wp, "private", Fault("UFFDIO_UNREGISTER", 2, ENOMEM))
        stage.ready()
        with open(__file__, "rb") as file:
            hole = PLACE + HOLE.start * PAGE
            libc.mmap(PAGE, libc.PROT_READ, mmap.MAP_PRIVATE, file.fileno(), hole)
        with stage.fault():
            stage.ram.close()
        assert isinstance(stage.error, KernelError)
        assert [start for start in registered() if PLACE <= start < PLACE + PAGES * PAGE] == [PLACE]
        assert stage.calls["UFFDIO_WAKE"] == 1
        stage.end()

    in_child(check)


@pytest.mark.parametrize("name", ["collect", "reset"])
def test_memory_that_is_mapped_anew_as_often_as_it_is_rearmed(shim: str, flavour: Flavour, name: str) -> None:
    """Nobody waits for that to end: it is reported, to every reader, and left untracked for the next call to find."""
    protecting = "PAGEMAP_SCAN" if flavour.backend == "pagemap-scan" else "UFFDIO_WRITEPROTECT"

    def check() -> None:
        stage = Stage(Shim(shim), flavour, "private", Fault(protecting, 1, 0, UNDONE, always=True))
        stage.ready(on_untracked="rearm")
        other = stage.ram.cursor()
        stage.owed[other] = set()
        stage.remap(20)
        stage.shim.arm(stage.plan)
        result = getattr(stage.ram, name)(20 * PAGE, 21 * PAGE)
        assert stage.shim.disarm() >= 8
        if result:
            stage.take(stage.ram, result)
            assert list(result.page_indices()) == [20]
        stage.owed[stage.ram] = {20}
        for reader in (stage.ram, other):
            for _ in range(2):
                stage.take(reader, reader.collect())
        stage.write(20, 21)
        stage.finish()
        stage.end()

    in_child(check)


BESIDE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/ioctl.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

uint64_t first, second; // pages
uint64_t registrations, last;

static void map_anew(uint64_t page)
{
	int before = errno;
	mmap((void *)page, 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	*(volatile char *)page = 9;
	errno = before;
}

int ioctl(int fd, unsigned long request, ...)
{
	int (*real)(int, unsigned long, void *) = (int (*)(int, unsigned long, void *))dlsym(RTLD_NEXT, "ioctl");
	va_list arguments;
	va_start(arguments, request);
	void *arg = va_arg(arguments, void *);
	va_end(arguments);
	int rc = real(fd, request, arg);
	if (first && request == UFFDIO_REGISTER && ((struct uffdio_register *)arg)->range.start == first) {
		map_anew(first);
		registrations++;
	}
	if (first && request == UFFDIO_COPY && ((struct uffdio_copy *)arg)->dst == first && registrations == last) {
		map_anew(second);
		last = 0;
	}
	return rc;
}
"""
"""A thread that maps one page anew whenever it was registered, and once the next one while that one is looked at."""


@pytest.mark.parametrize("name", ["collect", "reset"])
def test_memory_that_changes_while_it_is_left_alone(flavour: Flavour, name: str, tmp_path: Path) -> None:
    """What was registered beside it, by a call that did not get as far as to protect it, is not taken for unchanged."""
    program = f"""
        import ctypes
        from conftest import PAGE, libc, pages_of
        from pagemapcompat import DirtyTracker
        beside = {{
            name: ctypes.c_uint64.in_dll(ctypes.CDLL(None), name)
            for name in ("first", "second", "registrations", "last")
        }}
        start = libc.mmap(8 * PAGE)
        libc.fill(start, 8 * PAGE)
        with DirtyTracker({flavour.backend!r}, on_untracked="rearm") as tracker:
            ram = tracker.track((start, 8 * PAGE))
            for last in range(1, 20):  # one of them is the last registration that a call tries
                libc.mmap(4 * PAGE, address=start + 2 * PAGE)
                libc.fill(start + 2 * PAGE, 4 * PAGE)
                beside["second"].value = start + 3 * PAGE
                beside["registrations"].value, beside["last"].value = 0, last
                beside["first"].value = start + 2 * PAGE
                ram.{name}()
                beside["first"].value = 0
                for _ in range(2):
                    for page in range(2, 6):
                        libc.fill(start + page * PAGE)
                    assert pages_of(ram.collect()) == {{2, 3, 4, 5}}, last
        """
    environment = {**preloaded(BESIDE, tmp_path), "PAGEMAPCOMPAT_DISABLE": ",".join(flavour.disabled)}
    run_child(program, env=environment)


# -- What needs no tracker ------------------------------------------------------------------------------------------


def test_every_call_of_a_probe_fails_in_turn(shim: str) -> None:
    """The report then says less, never more, and what it says for lack of anything is not remembered."""

    def plan(attached: Shim) -> Iterator[Play]:
        best = probe(refresh=True)
        attached.arm(None)
        probe(refresh=True)
        attached.disarm()

        def once(fault: Fault) -> None:
            attached.arm(fault)
            report = probe(refresh=True)
            assert attached.disarm() or not is_made(fault), "the call was not made"
            for feature, result in report.items():
                assert not result or best[feature], f"{feature.value} is there all of a sudden"
                assert result or result.detail
            if any(result.errno in {EMFILE, ENFILE, ENOMEM, EAGAIN} for result in report.values()):
                assert probe().as_dict() == best.as_dict()

        for own in (False, True):
            for fault in faults(attached.calls(own=own), own=own):
                yield "probe", fault, once

    in_turn(shim, plan)


@pytest.mark.parametrize("way", ["pagemap-scan", "words"])
@pytest.mark.parametrize("whose", ["self", "another"])
def test_every_call_of_a_query_fails_in_turn(shim: str, monkeypatch: pytest.MonkeyPatch, way: str, whose: str) -> None:
    """The answer is the same, or ends where it says so, or is an error that names the call."""
    if way == "words":
        disable(monkeypatch, "pagemap-scan")
    else:
        need(Feature.PAGEMAP_SCAN)
    memory = memory_of("private", PAGES)
    for page in (*WRITES, *HOLE):
        memory[page * PAGE] = 1
    query = ScanQuery(all_of=PageCategory.PRESENT, report=PageCategory.PRESENT)

    def plan(attached: Shim) -> Iterator[Play]:
        pid: Any = "self" if whose == "self" else os.getppid()

        def ask(fault: Fault | None) -> ScanResult | None:
            with Pagemap(pid) as pagemap:
                attached.arm(fault)
                try:
                    return pagemap.scan(memory, query)
                except PagemapCompatError as error:
                    assert fault
                    if isinstance(error, KernelError):
                        assert error.errno == fault.errno
                        assert error.operation in {"PAGEMAP_SCAN", "/proc/PID/maps", "/proc/PID/pagemap"}
                    return None
                finally:
                    struck = attached.disarm()
                    assert struck or not fault or not is_made(fault), "the call was not made"

        whole = ask(None)
        assert whole is not None
        pages = list(whole.page_indices())
        assert pages

        def once(fault: Fault) -> None:
            result = ask(fault)
            if result is not None:
                end = PAGES if result.complete else (result.resume_at or 0) // PAGE
                assert list(result.page_indices()) == [page for page in pages if page < end]

        for fault in faults(attached.calls()):
            # Of another process nobody can tell whether a mapping was left out.
            if (fault.name, fault.errno) != ("PROCMAP_QUERY", ENOENT):
                yield way, fault, once

    in_turn(shim, plan)


@pytest.mark.parametrize("error", LATE[AFTERWARDS]["close"], ids=errorcode.get)
def test_a_forked_child_closes_what_it_can(shim: str, flavour: Flavour, error: int) -> None:
    """Every close(2) of it may fail; all descriptors are gone, and the parent goes on."""

    def check() -> None:
        attached = Shim(shim)
        stage = Stage(attached, flavour, "private", None)
        before = set(os.listdir("/proc/self/fd"))
        stage.ready()
        made = len(set(os.listdir("/proc/self/fd")) - before)
        assert made >= 3
        for nth in range(1, made + 1):
            raw = Raw()

            def close(nth: int = nth, raw: Raw = raw) -> None:
                assert stage.tracker
                attached.arm(Fault("close", nth, error, AFTERWARDS))
                stage.tracker.close()
                assert attached.disarm() == 1
                assert len(set(os.listdir("/proc/self/fd")) - before) <= 2  # its pipe, and this listing
                with pytest.raises(ClosedError):
                    stage.ram.collect()

            raw.fork(close)
            raw.end()
        stage.write(*WRITES)
        stage.finish()

    in_child(check)


# -- All of them ------------------------------------------------------------------------------------------------


def test_every_function_is_made_to_fail(shim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is called in one of the tests above, and so fails there. Prints how many faults there are, by function."""
    need(Feature.PAGEMAP_SCAN, Feature.PROCMAP_QUERY, Feature.UFFD_DEVICE, Feature.UFFD_WP_HUGETLBFS_SHMEM)
    need(Feature.MADV_GUARD, Feature.MADV_POPULATE_READ)
    if DISABLED:
        pytest.skip("some features are disabled; remedy: unset PAGEMAPCOMPAT_DISABLE")

    def check() -> None:
        attached = Shim(shim)
        done: Counter[str] = Counter({"FUTEX_WAIT_PRIVATE": 2})
        attached.arm(None)
        probe(refresh=True)
        for own in (False, True):
            done.update(fault.name for fault in faults(attached.calls(own=own), own=own))
        for flavour in PLAYED:
            os.environ["PAGEMAPCOMPAT_DISABLE"] = ",".join(flavour.disabled)
            for kind in ("private",) if flavour.disabled else FLAGS:
                for scene in SCENES:
                    done.update(fault.name for fault in faults(play(attached, flavour, kind, scene, None)))
            if flavour.backend == "uffd-wp":
                for scene in (serving, following, ending):
                    stage = Stage(attached, flavour, "private", Fault("read", 0, 0, own=True))
                    calls = answer(stage, scene, None)
                    done.update(fault.name for fault in faults(calls, own=True))
        print(*(f"{number:6} {name}" for name, number in done.most_common()), f"{done.total():6} in all", sep="\n")  # noqa: T201
        swap = int(meminfo()["SwapTotal"].split()[0])
        # mincore(2) is asked only on machines without swap.
        assert {name for name in attached.names if ERRNOS.get(name, True)} - set(done) <= (
            {"mincore"} if swap else set()
        )

    in_child(check)
