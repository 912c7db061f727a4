"""Builds `baseline.c` into a temporary directory, and calls it."""

from __future__ import annotations

import array
import ctypes
import os
import shutil
import subprocess
import tempfile
from ctypes import POINTER, byref, c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import attrs

import pagemapcompat
from pagemapcompat import AddressRange, Feature, page_size, probe
from pagemapcompat.abi import UffdFeature

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCE = Path(__file__).with_name("baseline.c")
HEADERS = Path(pagemapcompat.__file__).parent / "native"
PAGE = page_size()
SHIFT = PAGE.bit_length() - 1
HUGE = PAGE * (PAGE // 8)
"""What one page table of the lowest level maps."""
REGION = 24
"""Bytes of a `struct page_region`."""
PEEK, PER_RUN, WHOLE = 0, 1, 2
"""How `words` protects what it read as written."""
PM_SCAN_WP_MATCHING = 1


class BaselineError(Exception):
    """The baseline cannot be built, or a call of it failed."""


def compiler() -> str | None:
    """The C compiler."""
    return shutil.which("gcc") or shutil.which("cc")


def build() -> ctypes.CDLL:
    """Compile and load."""
    gcc = compiler()
    if gcc is None:
        raise BaselineError("no C compiler; remedy: sudo apt install gcc")
    with tempfile.TemporaryDirectory(prefix="pagemapcompat-bench-") as folder:
        into = Path(folder, "baseline.so")
        flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-pthread", f"-I{HEADERS}"]
        done = subprocess.run([gcc, *flags, SOURCE, "-o", into], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BaselineError(f"{SOURCE.name} does not compile:\n{done.stderr}")
        return ctypes.CDLL(str(into), use_errno=True)


def check(rc: int, what: str) -> int:
    """Raise what a negative result says."""
    if rc < 0:
        raise BaselineError(f"{what}: {os.strerror(-rc)}")
    return rc


@attrs.frozen
class Taken:
    """One measurement."""

    ns: float
    """A call."""
    pages: int | None = None
    """What it found, where it tells."""


@attrs.frozen
class Ground:
    """Memory that is measured: populated, page by page."""

    whole: AddressRange
    """All that is reserved."""
    used: AddressRange
    """The part that can be written."""
    step: int
    """The size of what is written at once: a page, or a huge page."""

    @property
    def units(self) -> int:
        """How many of those there are."""
        return self.used.length // self.step


class Baseline:
    """The C functions, on this process's own pagemap and a userfaultfd of their own.

    UFFDIO_WRITEPROTECT works on whatever memory of the process is registered, with any userfaultfd
    (mm/userfaultfd.c: mwriteprotect_range). So the raw calls and the library's are made on the very same memory.
    """

    def __init__(self) -> None:
        self._lib = build()
        number, count, address, ns = c_int, c_uint64, c_void_p, POINTER(c_int64)
        for name, result, *arguments in (
            ("bench_map", count, count, count, count, count, number, number, count),
            ("bench_unmap", number, count, count),
            ("bench_split", number, count, count, count, c_uint32),
            ("bench_uffd", number, count),
            ("bench_register", number, number, count, count),
            ("bench_unregister", number, number, count, count),
            ("bench_protect", number, number, count, count, count, ns),
            ("bench_dirty", number, number, address, count, count),
            (
                "bench_scan",
                c_int64,
                number,
                count,
                count,
                count,
                address,
                count,
                count,
                c_uint32,
                POINTER(count),
                ns,
                ns,
            ),
            (
                "bench_words",
                c_int64,
                number,
                number,
                count,
                count,
                number,
                address,
                count,
                c_uint32,
                POINTER(count),
                ns,
            ),
            ("bench_bitmap", number, address, count, count, c_uint32, address, count, ns),
            ("bench_copy", number, address, address, count, ns),
            ("bench_compare", number, address, address, count, count, POINTER(count), ns),
            ("bench_fault_thread", address, number, number),
            ("bench_fault_thread_end", None, address),
            ("bench_store", number, count, count, count, count, ns),
            ("bench_spinner", address, number),
            ("bench_spinner_end", None, address),
        ):
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments
        self.pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        features = UffdFeature.PAGEFAULT_FLAG_WP
        if probe().supports(Feature.UFFD_WP_HUGETLBFS_SHMEM):
            features |= UffdFeature.WP_HUGETLBFS_SHMEM
        if probe().supports(Feature.UFFD_WP_UNPOPULATED):
            features |= UffdFeature.WP_UNPOPULATED
        self.uffd = check(self._lib.bench_uffd(features), "userfaultfd")
        self._vector = array.array("Q")
        self._ns, self._cpu, self._pages = c_int64(), c_int64(), c_uint64()

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the descriptors."""
        os.close(self.uffd)
        os.close(self.pagemap)

    # -- Memory -----------------------------------------------------------------------------------------------

    def map(self, length: int, *, reserve: int = 0, shared: bool = False, huge: bool = False, vmas: int = 1) -> Ground:
        """New memory of *length* bytes, every page written once; in the middle of a PROT_NONE *reserve*, if any."""
        whole = reserve or length
        offset = (whole - length) // 2 // HUGE * HUGE
        start = self._lib.bench_map(whole, offset, length, HUGE, shared, huge, PAGE)
        if not start:
            raise BaselineError(f"mmap: {os.strerror(ctypes.get_errno())}")
        ground = Ground(
            AddressRange.from_length(start, whole),
            AddressRange.from_length(start + offset, length),
            HUGE if huge else PAGE,
        )
        if vmas > 1:
            check(self._lib.bench_split(ground.used.start, length >> SHIFT, vmas, SHIFT), "madvise")
        return ground

    def unmap(self, ground: Ground) -> None:
        """Give it back."""
        check(self._lib.bench_unmap(ground.whole.start, ground.whole.length), "munmap")

    def dirty(self, runs: array.array[int]) -> None:
        """Write to each page of *runs* (start, end, 0 of each)."""
        if runs:
            check(self._lib.bench_dirty(self.uffd, _address(runs), len(runs) // 3, PAGE), "UFFDIO_WRITEPROTECT")

    # -- The operations ---------------------------------------------------------------------------------------

    def _room(self, memory: AddressRange) -> tuple[int, int]:
        # No more regions than there can be: the kernel allocates room for them, 512 at most, in every call.
        regions = memory.pages // 2 + 1
        if len(self._vector) < 3 * regions:
            self._vector = array.array("Q", [1]) * (3 * regions)
        return _address(self._vector), regions

    def scan(self, memory: AddressRange, *, engage: bool, loops: int = 1, cpu: bool = False) -> Taken:
        """One PAGEMAP_SCAN into a vector that has room for every answer."""
        flags = PM_SCAN_WP_MATCHING if engage else 0
        room, vec_len = self._room(memory)
        rc = self._lib.bench_scan(
            self.pagemap, memory.start, memory.end, flags, room, vec_len, loops, SHIFT, self._pages, self._ns, self._cpu
        )
        check(rc, "PAGEMAP_SCAN")
        return Taken((self._cpu if cpu else self._ns).value / loops, self._pages.value)

    def scan_only(self, memory: AddressRange, *, loops: int = 1) -> Taken:
        """Protect without an answer."""
        rc = self._lib.bench_scan(
            *(self.pagemap, memory.start, memory.end, PM_SCAN_WP_MATCHING, None, 0, loops, SHIFT),
            *(self._pages, self._ns, self._cpu),
        )
        check(rc, "PAGEMAP_SCAN")
        return Taken(self._ns.value / loops)

    def words(self, memory: AddressRange, how: int, *, loops: int = 1) -> Taken:
        """Read pagemap, and protect."""
        room, _ = self._room(memory)
        rc = self._lib.bench_words(
            self.pagemap, self.uffd, memory.start, memory.end, how, room, loops, SHIFT, self._pages, self._ns
        )
        check(rc, "pagemap or UFFDIO_WRITEPROTECT")
        return Taken(self._ns.value / loops, self._pages.value)

    def protect(self, memory: AddressRange, *, loops: int = 1) -> Taken:
        """One UFFDIO_WRITEPROTECT."""
        check(self._lib.bench_protect(self.uffd, memory.start, memory.end, loops, self._ns), "UFFDIO_WRITEPROTECT")
        return Taken(self._ns.value / loops)

    def bitmap(self, regions: array.array[int], base: int, bits: bytearray, loops: int) -> Taken:
        """Set a bit a page."""
        into = (ctypes.c_char * len(bits)).from_buffer(bits)
        self._lib.bench_bitmap(
            _address(regions), len(regions) // 3, base, SHIFT, ctypes.addressof(into), loops, self._ns
        )
        return Taken(self._ns.value / loops)

    def copy(self, to: int, start: int, length: int) -> Taken:
        """memcpy(3)."""
        self._lib.bench_copy(to, start, length, self._ns)
        return Taken(self._ns.value)

    def compare(self, copy: int, start: int, length: int) -> Taken:
        """memcmp(3) a page, and copy what differs."""
        self._lib.bench_compare(copy, start, length, PAGE, self._pages, self._ns)
        return Taken(self._ns.value, self._pages.value)

    # -- Threads ----------------------------------------------------------------------------------------------

    def store(self, memory: AddressRange, threads: int = 1) -> Taken:
        """Store a byte into each page, as *threads* writers: ns a store, as a writer sees it."""
        pages = memory.pages // threads * threads
        check(self._lib.bench_store(memory.start, pages, PAGE, threads, self._ns), "pthread_create")
        return Taken(self._ns.value / pages)

    def minimal_fault_thread(self, memory: AddressRange, cpu: int = -1) -> MinimalFaultThread:
        """The fault thread that everybody writes, on memory of its own; on any CPU, or tied to one."""
        return MinimalFaultThread(self._lib, memory, cpu)

    def spinner(self, cpu: int) -> Spinner:
        """A thread that keeps a CPU busy."""
        return Spinner(self._lib, cpu)


class MinimalFaultThread:
    """A synchronous userfaultfd with a thread that polls, reads a message and un-protects its page."""

    def __init__(self, lib: ctypes.CDLL, memory: AddressRange, cpu: int) -> None:
        self._lib, self._memory = lib, memory
        self._uffd = check(lib.bench_uffd(UffdFeature.PAGEFAULT_FLAG_WP), "userfaultfd")
        check(lib.bench_register(self._uffd, memory.start, memory.length), "UFFDIO_REGISTER")
        self._thread = lib.bench_fault_thread(self._uffd, cpu)

    def protect(self) -> None:
        """All of it anew."""
        ns = c_int64()
        check(self._lib.bench_protect(self._uffd, self._memory.start, self._memory.end, 1, byref(ns)), "protect")

    def close(self) -> None:
        """End the thread after the last fault."""
        self._lib.bench_unregister(self._uffd, self._memory.start, self._memory.length)
        self._lib.bench_fault_thread_end(self._thread)
        os.close(self._uffd)


class Spinner:
    """Keeps a CPU busy inside a with block."""

    def __init__(self, lib: ctypes.CDLL, cpu: int) -> None:
        self._lib, self._cpu = lib, cpu
        self._thread: Any = None

    def __enter__(self) -> Self:
        """Start."""
        self._thread = self._lib.bench_spinner(self._cpu)
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._lib.bench_spinner_end(self._thread)


def _address(words: array.array[int]) -> int:
    return words.buffer_info()[0]


def runs_of(ground: Ground, units: Sequence[int]) -> array.array[int]:
    """Ascending units as regions: start, end and 0 of each run."""
    runs = array.array("Q")
    first = last = -1
    for unit in (*units, -1):
        if unit == last:
            last += 1
            continue
        if last > first:
            runs.extend((ground.used.start + first * ground.step, ground.used.start + last * ground.step, 0))
        first, last = unit, unit + 1
    return runs
