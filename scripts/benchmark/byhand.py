"""What a user of Python would do instead: the ioctl by hand, words with numpy and without, a copy, soft-dirty.

And the least that a call of C takes from Python: the same ioctl, by cffi, with everything prepared.
"""

from __future__ import annotations

import array
import fcntl
import importlib.util
import os
import struct
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from benchmark.baseline import PM_SCAN_WP_MATCHING, REGION, SHIFT, Ground, Taken
from benchmark.grid import GIB, LARGE, MIB, Case, contenders, pages, settle, share_name
from benchmark.measure import Contenders, on_one_cpu, sample
from benchmark.session import BACKENDS, Session, size_name
from pagemapcompat import DirtyTracker, Feature, TrackedRange, probe
from pagemapcompat._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

PAGE_IS_WRITTEN = 2
PM_SCAN_CHECK_WPASYNC = 2
SCAN_ARG = struct.Struct("=12Q")
RANGE_AND_MODE = struct.Struct("=3Q")
SOFT_DIRTY, UFFD_WP = 1 << 55, 1 << 57
SIZES = (MIB, LARGE, GIB)
SHARES = (0.01, 0.1)
WORD = 8


def _iowr(kind: int, number: int, size: int) -> int:
    return 3 << 30 | size << 16 | kind << 8 | number


PAGEMAP_SCAN = _iowr(ord("f"), 16, SCAN_ARG.size)
UFFDIO_WRITEPROTECT = _iowr(0xAA, 0x06, RANGE_AND_MODE.size)


def numpy() -> ModuleType | None:
    """Where it is installed."""
    if importlib.util.find_spec("numpy") is None:
        return None
    import numpy as np  # noqa: PLC0415 - only where it is there

    return np


class ByHand:
    """The same operation, without the library."""

    def __init__(self, session: Session, ground: Ground) -> None:
        self.base, self.used = session.base, ground.used
        self.np: Any = numpy()
        if self.np is not None:
            self._vector = self.np.ones((ground.used.pages // 2 + 1, REGION // WORD), dtype=self.np.uint64)

        self._regions = ffi.new("struct page_region[]", ground.used.pages // 2 + 1)
        self._arg: Any = ffi.new("struct pm_scan_arg *")
        self._arg.flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC
        self._arg.start, self._arg.end = ground.used.start, ground.used.end
        self._arg.vec, self._arg.vec_len = int(ffi.cast("uintptr_t", self._regions)), len(self._regions)
        self._arg.category_mask = self._arg.return_mask = PAGE_IS_WRITTEN

    def ioctl_cffi(self) -> Taken:
        """Nothing but the call."""
        scan, pagemap, arg = lib.pmc_pagemap_scan, self.base.pagemap, self._arg
        before = perf_counter_ns()
        count = scan(pagemap, arg)
        ns = perf_counter_ns() - before
        return Taken(ns, sum(self._regions[i].end - self._regions[i].start for i in range(count)) >> SHIFT)

    def ioctl_numpy(self) -> Taken:
        """fcntl.ioctl into a numpy array."""
        before = perf_counter_ns()
        arg = bytearray(
            SCAN_ARG.pack(
                *(SCAN_ARG.size, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, self.used.start, self.used.end, 0),
                *(self._vector.ctypes.data, len(self._vector), 0, 0, PAGE_IS_WRITTEN, 0, PAGE_IS_WRITTEN),
            )
        )
        regions = self._vector[: fcntl.ioctl(self.base.pagemap, PAGEMAP_SCAN, arg)]
        ns = perf_counter_ns() - before
        return Taken(ns, int((regions[:, 1] - regions[:, 0]).sum()) >> SHIFT)

    def contenders(self, backend: str) -> Contenders:
        """What collects by this backend's means."""
        if backend == "uffd-wp":
            words: Contenders = {"pread-loop": self.pread_loop}
            return words if self.np is None else {**words, "pread-numpy": self.pread_numpy}
        bare: Contenders = {"ioctl-cffi": self.ioctl_cffi}
        return bare if self.np is None else {**bare, "ioctl-numpy": self.ioctl_numpy}

    def _words(self) -> bytes:
        at, left = (self.used.start >> SHIFT) * WORD, self.used.pages * WORD
        read = []
        while left:
            read.append(os.pread(self.base.pagemap, left, at))
            at += len(read[-1])
            left -= len(read[-1])
        return b"".join(read) if len(read) > 1 else read[0]

    def _protect(self, first: int, end: int) -> None:
        start = self.used.start
        arg = RANGE_AND_MODE.pack(start + (first << SHIFT), (end - first) << SHIFT, 1)
        fcntl.ioctl(self.base.uffd, UFFDIO_WRITEPROTECT, arg)

    def pread_numpy(self) -> Taken:
        """os.pread of pagemap, numpy to find the runs, an fcntl.ioctl each."""
        np = self.np
        before = perf_counter_ns()
        written = np.frombuffer(self._words(), dtype=np.uint64) & UFFD_WP == 0
        edges = np.flatnonzero(np.diff(written, prepend=False, append=False))
        runs = edges.reshape(-1, 2).tolist()
        for first, end in runs:
            self._protect(first, end)
        ns = perf_counter_ns() - before
        return Taken(ns, sum(end - first for first, end in runs))

    def pread_loop(self) -> Taken:
        """os.pread of pagemap, a loop over its words, an fcntl.ioctl a run."""
        before = perf_counter_ns()
        first, found = None, 0
        words = array.array("Q", self._words())
        for page, word in enumerate(words):
            if word & UFFD_WP:
                if first is not None:
                    self._protect(first, page)
                    found += page - first
                    first = None
            elif first is None:
                first = page
        if first is not None:
            self._protect(first, len(words))
            found += len(words) - first
        return Taken(perf_counter_ns() - before, found)

    def soft_dirty(self) -> Taken:
        """Bit 55 of the words, then 4 into clear_refs: which write-protects all that this process has."""
        before = perf_counter_ns()
        words = self._words()
        if self.np is not None:
            found = int(self.np.count_nonzero(self.np.frombuffer(words, dtype=self.np.uint64) & SOFT_DIRTY))
        else:
            found = sum(1 for word in array.array("Q", words) if word & SOFT_DIRTY)
        with open("/proc/self/clear_refs", "wb", buffering=0) as file:
            file.write(b"4")
        return Taken(perf_counter_ns() - before, found)


def run(session: Session) -> None:
    """Each beside C and the library."""
    session.section("What a user of Python would do instead: collect, alone, small pages written at random")
    for length in (MIB,) if session.quick else SIZES:
        for backend in BACKENDS:
            names = {share: f"byhand/{backend}/{size_name(length)}/{share_name(share)}" for share in SHARES}
            wanted = {share: name for share, name in names.items() if session.wants(name)}
            if wanted and length in session.sizes:
                _run(session, length, backend, wanted)


def _run(session: Session, length: int, backend: str, wanted: Mapping[float, str]) -> None:
    prefix = f"byhand/{backend}/{size_name(length)}"
    if numpy() is None:
        session.skip(f"{prefix}/*-numpy", "numpy is not installed; remedy: pip install numpy")
    if not session.can_compare(prefix, backend):
        return
    with session.memory(prefix, length) as ground, session.memory(prefix, length) as copy:
        if ground is None or copy is None:
            return
        with session.attempt(prefix), DirtyTracker(backend) as tracker, tracker.track(ground.used) as ram, on_one_cpu():
            for share, name in wanted.items():
                count = max(int(ground.units * share), 1)
                case = Case(share, "random", count, pages(ground, count, "random"))
                with session.attempt(name):
                    _measure(session, name, ram, ground, copy, case, backend)


def _measure(
    session: Session, name: str, ram: TrackedRange, ground: Ground, copy: Ground, case: Case, backend: str
) -> None:
    base, used, hand = session.base, ground.used, ByHand(session, ground)

    def prepare() -> None:
        base.dirty(case.runs)

    def compare() -> Taken:
        taken = base.compare(copy.used.start, used.start, used.length)
        settle(base, backend, ground)  # which comparing does not do, and the next one expects
        return taken

    settle(base, backend, ground)
    base.copy(copy.used.start, used.start, used.length)
    made = {**contenders(base, ram, "collect", backend), **hand.contenders(backend), "copy-compare": compare}
    samples = sample(made, session.effort, prepare, case.count)
    if probe().supports(Feature.SOFT_DIRTY):
        # Not in turn with the others: whatever this process stores to afterwards faults, their results too.
        hand.soft_dirty()
        samples.update(sample({"soft-dirty": hand.soft_dirty}, session.effort, prepare, case.count))
        settle(base, backend, ground)
    axes = {"operation": "collect", "backend": backend, "bytes": used.length, "share": case.share, "pages": case.count}
    session.record(name, "byhand", samples, baseline="C", axes=axes)
