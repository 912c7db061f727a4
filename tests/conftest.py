"""What the tests share: flavours of the backends, memory, children, and skips that say what to do.

Also what they borrow of the machine, as root: huge pages, swap, ksmd.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from array import array
from collections.abc import Callable, Iterator
from errno import errorcode
from pathlib import Path
from typing import Any, ClassVar

import attrs
import figures
import pytest

from pagemapcompat import (
    AddressRange,
    DirtyTracker,
    Feature,
    Guarantee,
    KernelError,
    ScanResult,
    TrackedRange,
    page_size,
    probe,
)

PAGE = page_size()
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
CHILD_SECONDS = float(os.environ.get("PAGEMAPCOMPAT_TEST_SECONDS", "60"))
"""How long anything that could hang may take. Machines are slow and shared, or emulated; a hang lasts for ever."""
ROUNDS_SHARE = float(os.environ.get("PAGEMAPCOMPAT_TEST_ROUNDS", "1"))
"""How much of what tests repeat is done: 10 looks longer for what is rare, and emulated machines have time for less."""
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
"""Whether AddressSanitizer watches, which maps memory as it goes, and gives none back."""
DISABLED = tuple(filter(None, os.environ.get("PAGEMAPCOMPAT_DISABLE", "").split(",")))
"""What is switched off for all tests. They add to it."""


def rounds(number: int) -> int:
    """How often to do what is usually done as often as that."""
    return max(round(number * ROUNDS_SHARE), 1)


class KeepingTracker(DirtyTracker):
    """Keeps its ranges until it is closed, so that tests need not close each."""

    def track(self, memory: Any) -> TrackedRange:
        """Track, and keep."""
        ram = super().track(memory)
        self.__dict__.setdefault("kept", []).append(ram)
        return ram


@attrs.frozen
class Flavour:
    """A backend as some generation of kernels has it, by switching off what that generation lacks."""

    name: str
    backend: str
    disabled: tuple[str, ...] = ()

    def tracker(self, **options: Any) -> DirtyTracker:
        """A tracker of this flavour, for which the environment must be set."""
        return KeepingTracker(self.backend, **options)


class Paranoid(Flavour):
    """One whose answers are compared with the memory."""

    def tracker(self, **options: Any) -> DirtyTracker:
        """The backend is what is left of both."""
        return KeepingTracker("paranoid", **options)


def paranoid(one: Flavour) -> Paranoid:
    """A flavour, compared."""
    others = {other.backend for other in FLAVOURS} - {one.backend}
    return Paranoid(f"paranoid-{one.name}", one.backend, (*one.disabled, *others))


_BEFORE_6_11 = ("procmap-query",)
_BEFORE_6_4 = (*_BEFORE_6_11, "uffd-wp-multi-vma", "uffd-wp-unpopulated")
FLAVOURS = (
    Flavour("pagemap-scan", "pagemap-scan"),
    Flavour("pagemap-scan-as-6.7", "pagemap-scan", (*_BEFORE_6_11, "pagemap-scan-holes", "uffd-wp-remap-clears")),
    Flavour("uffd-wp", "uffd-wp"),
    Flavour("uffd-wp-as-6.5", "uffd-wp", (*_BEFORE_6_11, "uffd-wp-remap-clears")),
    Flavour("uffd-wp-as-6.1", "uffd-wp", _BEFORE_6_4),
    Flavour(
        "uffd-wp-as-5.10",
        "uffd-wp",
        (*_BEFORE_6_4, "uffd-wp-hugetlbfs-shmem", "pagemap-uffd-wp", "madv-populate-read", "uffd-wp-remap-clears"),
    ),
)


def expected() -> frozenset[str]:
    """Backends and features whose absence is a failure: PAGEMAPCOMPAT_TEST_EXPECT."""
    return frozenset(os.environ.get("PAGEMAPCOMPAT_TEST_EXPECT", "").split(",")) - {""}


def lacking(name: str, reason: str, remedy: str) -> None:
    """Skip, or fail where *name* is expected to be there."""
    message = f"{name}: {reason}; remedy: {remedy}"
    if name in expected():
        pytest.fail(f"PAGEMAPCOMPAT_TEST_EXPECT names {message}")
    pytest.skip(message)


def need(*features: Feature) -> None:
    """Skip unless this kernel has *features*."""
    for feature in features:
        result = probe()[feature]
        if not result and result.state != "disabled":
            error = errorcode.get(result.errno or 0, "no errno")
            lacking(feature.value, f"{result.state}, {error}", result.hint or "none")


def need_shared() -> None:
    """Skip where shared and hugetlb memory cannot be tracked."""
    if probe()[Feature.UFFD_WP_HUGETLBFS_SHMEM].state == "disabled":
        pytest.skip("this flavour imitates a kernel that refuses shared memory; remedy: the other flavours")
    need(Feature.UFFD_WP_HUGETLBFS_SHMEM)


def disable(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Switch features off for this test."""
    monkeypatch.setenv("PAGEMAPCOMPAT_DISABLE", ",".join([*DISABLED, *names]))


@contextlib.contextmanager
def environment(flavour: Flavour) -> Iterator[None]:
    """With what a flavour lacks switched off."""
    name = "PAGEMAPCOMPAT_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = ",".join([*DISABLED, *flavour.disabled])
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def use_flavour(chosen: Flavour, monkeypatch: pytest.MonkeyPatch) -> Flavour:
    """Set the environment for a flavour, or skip where it cannot run."""
    disable(monkeypatch, *chosen.disabled)
    try:
        chosen.tracker().close()
    except KernelError as error:
        lacking(chosen.backend, f"{errorcode.get(error.errno or 0)}, {error.strerror}", error.hint or "none")
    return chosen


def flavours(*backends: str) -> list[Any]:
    """Parameters: the flavours of some backends, or all. The matrix of real kernels needs no imitations of them."""
    chosen = [one for one in FLAVOURS if not backends or one.backend in backends]
    return [pytest.param(one, id=one.name, marks=pytest.mark.imitated if one.disabled else ()) for one in chosen]


@pytest.fixture(params=flavours())
def flavour(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Flavour:
    """Each generation of each backend that can run here."""
    return use_flavour(request.param, monkeypatch)


@pytest.fixture
def tracker(flavour: Flavour) -> Iterator[DirtyTracker]:
    """A tracker of each flavour."""
    with flavour.tracker() as made:
        yield made


def private(pages: int) -> mmap.mmap:
    """Private anonymous memory, empty."""
    return mmap.mmap(-1, pages * PAGE, flags=PRIVATE)


def write(memory: mmap.mmap | memoryview, *pages: int) -> set[int]:
    """Store a byte into each of *pages*, and return them as a set."""
    for page in pages:
        memory[page * PAGE] = (memory[page * PAGE] + 1) % 256
    return set(pages)


def pages_of(result: ScanResult) -> set[int]:
    """The pages of a result, which must be complete."""
    assert result.complete
    return set(result.page_indices())


def address_of(memory: TrackedRange) -> int:
    """Where it begins."""
    return memory.range.start


def part(ram: TrackedRange, first: int, count: int) -> AddressRange:
    """The addresses of some pages of it."""
    return AddressRange.from_length(ram.range.start + first * PAGE, count * PAGE)


class Libc:
    """mmap(2) and its family, raw: Python's own mmap objects cannot be cut into pieces."""

    PROT_NONE, PROT_READ, PROT_WRITE = 0, mmap.PROT_READ, mmap.PROT_WRITE
    MAP_FIXED, MAP_NORESERVE, MAP_HUGETLB = 0x10, 0x4000, 0x40000
    MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
    GUARD_INSTALL, GUARD_REMOVE = 102, 103

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(None, use_errno=True)
        size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
        for name, result, arguments in (
            ("mmap", pointer, (pointer, size, number, number, number, ctypes.c_long)),
            ("munmap", number, (pointer, size)),
            ("mprotect", number, (pointer, size, number)),
            ("madvise", number, (pointer, size, number)),
            ("mremap", pointer, (pointer, size, size, number, pointer)),
            ("memset", pointer, (pointer, number, size)),
            ("swapon", number, (ctypes.c_char_p, number)),
            ("swapoff", number, (ctypes.c_char_p,)),
        ):
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments

    def _check(self, bad: bool, name: str) -> None:
        if bad:
            number = ctypes.get_errno()
            raise OSError(number, f"{name}: {os.strerror(number)}")

    def mmap(self, length: int, prot: int = 3, flags: int = PRIVATE, fd: int = -1, address: int | None = None) -> int:
        """The address of a new mapping."""
        at = self._lib.mmap(address, length, prot, flags | (self.MAP_FIXED if address else 0), fd, 0)
        self._check(at == ctypes.c_void_p(-1).value, "mmap")
        return int(at)

    def munmap(self, address: int, length: int) -> None:
        """munmap(2)."""
        self._check(self._lib.munmap(address, length) != 0, "munmap")

    def mprotect(self, address: int, length: int, prot: int) -> None:
        """mprotect(2)."""
        self._check(self._lib.mprotect(address, length, prot) != 0, "mprotect")

    def madvise(self, address: int, length: int, advice: int) -> None:
        """madvise(2)."""
        self._check(self._lib.madvise(address, length, advice) != 0, "madvise")

    def mremap(self, address: int, length: int, to: int) -> None:
        """Move a mapping to a fixed place."""
        flags = self.MREMAP_MAYMOVE | self.MREMAP_FIXED
        moved = self._lib.mremap(address, length, length, flags, to)
        self._check(moved == ctypes.c_void_p(-1).value, "mremap")

    def fill(self, address: int, length: int = 1, value: int = 1) -> None:
        """Store, with the GIL released."""
        self._lib.memset(address, value, length)

    def swapon(self, path: str) -> None:
        """swapon(2)."""
        self._check(self._lib.swapon(path.encode(), 0) != 0, "swapon")

    def swapoff(self, path: str) -> None:
        """swapoff(2)."""
        self._check(self._lib.swapoff(path.encode()) != 0, "swapoff")


libc = Libc()


PRESENT, FRAME = 63, (1 << 55) - 1
"""Of a word of pagemap: the bit that says that the page is in memory, and where that is, if root asks."""
MERGED = 21
"""Of a word of kpageflags: KPF_KSM."""


def words(address: int, pages: int) -> array[int]:
    """Those of /proc/self/pagemap. Read here, and not by the library that is under test."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        return array("Q", os.pread(file.fileno(), 8 * pages, address // PAGE * 8))


def marked(address: int, pages: int, bit: int) -> set[int]:
    """The pages that have a bit."""
    return {page for page, word in enumerate(words(address, pages)) if word >> bit & 1}


def merged(address: int, pages: int) -> set[int]:
    """The pages that the kernel has merged with others. Only root is told."""
    if not os.access("/proc/kpageflags", os.R_OK):
        return set()
    with open("/proc/kpageflags", "rb", buffering=0) as file:
        flags = {
            page: int.from_bytes(os.pread(file.fileno(), 8, (word & FRAME) * 8), sys.byteorder)
            for page, word in enumerate(words(address, pages))
            if word >> PRESENT
        }
    return {page for page, word in flags.items() if word >> MERGED & 1}


@pytest.fixture
def area() -> Iterator[Callable[..., AddressRange]]:
    """Makes raw mappings where the kernel puts none by itself, and unmaps whatever is there in the end.

    A hole that a test makes must not be filled by the next mmap of somebody else, whom a later MAP_FIXED would hit.
    """
    made: list[AddressRange] = []

    def make(pages: int, prot: int = 3, flags: int = PRIVATE, fd: int = -1) -> AddressRange:
        room = AddressRange.from_length(next(_places), (pages + 1024) * PAGE)
        start = -(-room.start // (2 << 20)) * (2 << 20)
        made.append(AddressRange.from_length(libc.mmap(pages * PAGE, prot, flags, fd, start), pages * PAGE))
        return made[-1]

    yield make
    for one in made:
        libc.munmap(one.start, one.length)


_places = itertools.count(1 << 45, 1 << 33)
"""Above what AddressSanitizer has for itself on x86-64."""


# ---- What is borrowed of the machine ------------------------------------------------------------------------------

HUGE = 2 << 20
HUGE_PAGES = HUGE // PAGE
POOL = Path("/proc/sys/vm/nr_hugepages")
SWAP_BYTES, SWAP_PREFIX = 64 << 20, "pagemapcompat-swap-"
Lacking = tuple[str, str, str]
"""What `lacking` is called with."""


@contextlib.contextmanager
def borrowed(setting: Path) -> Iterator[None]:
    """By one test run at a time: two at once would each restore what the other one set."""
    with setting.open(encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def meminfo() -> dict[str, str]:
    """By name, as text."""
    return dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())


@pytest.fixture
def pool() -> Iterator[None]:
    """At least eight free huge pages of 2 MiB."""
    if meminfo().get("Hugepagesize", "").split()[:1] != [str(HUGE >> 10)]:
        lacking("hugetlb", "no huge pages of 2 MiB (ENOENT)", "a kernel with CONFIG_HUGETLBFS")
    with borrowed(POOL):
        before = POOL.read_text()
        if int(meminfo()["HugePages_Free"].split()[0]) < 8:
            try:
                POOL.write_text("16")
            except OSError as error:
                lacking("hugetlb", f"no huge pages are reserved ({error.strerror})", "sysctl vm.nr_hugepages=16")
        yield
        if POOL.read_text() != before:
            POOL.write_text(before)


def swap_areas() -> list[str]:
    """But those that test runs have for themselves."""
    return [line for line in Path("/proc/swaps").read_text().splitlines()[1:] if SWAP_PREFIX not in line]


@pytest.fixture
def swap() -> Iterator[Lacking | None]:
    """Something to swap to: what there is, or a file of our own; or what is lacking."""
    if swap_areas():
        yield None
        return
    folder = next(path for path in ("/var/tmp", "/tmp") if os.path.isdir(path))  # noqa: S108 - a disk first
    with tempfile.NamedTemporaryFile(dir=folder, prefix=SWAP_PREFIX) as file:
        header = struct.pack("1024x3I", 1, SWAP_BYTES // PAGE - 1, 0).ljust(PAGE - 10, b"\0") + b"SWAPSPACE2"
        try:
            if os.geteuid() == 0:
                os.posix_fallocate(file.fileno(), 0, SWAP_BYTES)
                os.pwrite(file.fileno(), header, 0)
            libc.swapon(file.name)
        except OSError as error:
            yield "swap", f"no swap area, nor one of our own ({error.strerror})", "root; or swapon a file or a ram disk"
            return
        try:
            yield None
        finally:
            libc.swapoff(file.name)


class Ksm:
    """ksmd, by its files."""

    FOLDER = Path("/sys/kernel/mm/ksm")
    RUN = FOLDER / "run"
    FAST: ClassVar = {"pages_to_scan": "10000", "sleep_millisecs": "1", "run": "1"}

    def __init__(self) -> None:
        self.waited = 0.0
        """Seconds, in this process."""

    def __getitem__(self, name: str) -> int:
        return int((self.FOLDER / name).read_text())

    def set(self, **values: str) -> None:
        """Switch it on, or off."""
        for name, value in values.items():
            (self.FOLDER / name).write_text(value)

    def rescan(self) -> bool:
        """If it runs, let it look at all that may be merged now, and again at what has not changed."""
        begun = time.monotonic()
        # One that may have begun before; one to note what pages hold; one to merge those that still hold it.
        last = self["full_scans"] + 3 if os.path.exists(self.RUN) and self["run"] == 1 else 0
        while last and self["full_scans"] < last and time.monotonic() < begun + CHILD_SECONDS:
            os.sched_yield()
        self.waited += time.monotonic() - begun
        return bool(last) and self["full_scans"] >= last


ksmd = Ksm()


@pytest.fixture
def ksm() -> Iterator[Lacking | None]:
    """ksmd, as fast as it can; or what is lacking."""
    if not os.access(ksmd.RUN, os.W_OK):
        yield "ksm", "it cannot be switched on (EACCES or ENOENT)", "root, and a kernel with CONFIG_KSM"
        return
    with borrowed(ksmd.RUN):
        before = {name: (ksmd.FOLDER / name).read_text() for name in ksmd.FAST}
        try:
            ksmd.set(**ksmd.FAST)
            yield None
        finally:
            ksmd.set(**before)


# ---- Children, and what is said of a run --------------------------------------------------------------------------


def run_child(code: str, *arguments: str, env: dict[str, str] | None = None, seconds: float = CHILD_SECONDS) -> str:
    """Run Python code that could hang in a process of its own. Returns what it printed; fails if it fails or hangs."""
    program = textwrap.dedent(code)
    path = os.pathsep.join(filter(None, (os.path.dirname(__file__), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "error", "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"child ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def claims(tracker: DirtyTracker, guarantee: Guarantee) -> bool:
    """Whether a tracker promises something for private anonymous memory."""
    return guarantee in tracker.selection.guarantees


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What there was of everything that is counted."""
    for number, line in enumerate(figures.lines()):
        if number == 0:
            terminalreporter.section("figures")
        terminalreporter.write_line(line)


def pytest_report_header() -> list[str]:
    """Where this ran."""
    states: dict[str, list[str]] = {}
    for feature, result in probe().items():
        states.setdefault(result.state, []).append(feature.value)
    who = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    return [
        f"kernel {os.uname().release}, {who}, {os.cpu_count()} CPUs, pages of {PAGE} bytes",
        *(f"features {state}: {', '.join(names)}" for state, names in states.items()),
    ]
