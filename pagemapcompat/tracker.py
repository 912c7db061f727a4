"""DirtyTracker and TrackedRange: what most people import."""

from __future__ import annotations

import operator
import warnings
import weakref
from typing import TYPE_CHECKING, Literal, Self, SupportsIndex

from pagemapcompat.abi import Guarantee
from pagemapcompat.errors import AlignmentError, ClosedError, InvalidArgumentError
from pagemapcompat.memory import AddressRange, Memory, PinnedMemory, pin
from pagemapcompat.pagemap import ScanResult, check_max_pages
from pagemapcompat.probe import probe
from pagemapcompat.registrations import Claim, claim, release
from pagemapcompat.selection import Selection, open_backend

if TYPE_CHECKING:
    from types import TracebackType

    from pagemapcompat.backends import Attached, Backend, BackendStatistics

OnUntracked = Literal["raise", "rearm"]


class TrackedRange:
    """Memory that is being watched. Made by `DirtyTracker.track`; closes itself with its tracker.

    Offsets are in bytes from the start of the memory, page aligned; *stop* is exclusive, and None is the end. Every
    method may be called from any thread; calls on one tracker run one after the other.

    Attributes:
        range: Where it lies.

        guarantees: What the backend promises for this mapping.

        granularity: What offsets are multiples of, in bytes: the page size, or in hugetlb memory that of its huge
            pages.
    """

    def __init__(
        self, tracker: DirtyTracker, pinned: PinnedMemory, attached: Attached, claimed: Claim, *, rearm: bool
    ) -> None:
        self._tracker = tracker  # lives as long as there is something to track
        self._backend: Backend = tracker._backend  # noqa: SLF001 - its friend
        self._pinned = pinned
        self._attached = attached
        self._claim = claimed
        self._rearm = rearm
        self._closed = False
        self.range: AddressRange = attached.range
        self.guarantees: Guarantee = attached.guarantees
        self.granularity: int = attached.granularity

    def __repr__(self) -> str:
        """For people."""
        return f"<TrackedRange {self.range}, {self._backend.name}{', closed' if self._closed else ''}>"

    def __len__(self) -> int:
        """In bytes, as the owner of the memory sees it."""
        return self._attached.length

    # -- The three operations and their relatives -----------------------------------------------------------

    def peek(
        self, start: SupportsIndex = 0, stop: SupportsIndex | None = None, *, max_pages: int | None = None
    ) -> ScanResult:
        """Return the pages written since they were last collected or reset. Changes nothing.

        Memory that is not, or no longer, registered is reported as written; unmapped memory is skipped.

        Args:
            start: Where to begin.

            stop: Where to end.

            max_pages: Stop after this many pages; the result's `resume_at` says where to go on.

        Raises:
            AlignmentError: An offset is not on a page boundary.

            ClosedError: The range or its tracker is closed, or belongs to the parent process.

            FaultThreadError: The fault thread of `uffd-wp` has ended.

        Cost: on `pagemap-scan` 0.3 us and 0.7 to 3 ns a page, on `uffd-wp` 7 to 15 ns a page.
        """
        return self._backend.get(self._attached, self._asked(start, stop), check_max_pages(max_pages))

    def collect(
        self, start: SupportsIndex = 0, stop: SupportsIndex | None = None, *, max_pages: int | None = None
    ) -> ScanResult:
        """Return the pages written since they were last collected or reset, and watch them anew in the same step.

        Each write is reported by the collect during or after which it happened; a concurrent one perhaps twice, none
        never. The pages of an error or an interrupt stay owed to the next peek or collect. Regions carry WRITTEN alone.

        Args:
            start: Where to begin.

            stop: Where to end.

            max_pages: Stop after this many pages. Those that were not returned stay written.

        Raises:
            NotTrackedError: Part of it has lost its registration (ENOENT), unless the tracker rearms. `range` is the
                first such stretch, `collected` what was taken before it; nothing behind it was touched.

            AlignmentError, ClosedError, FaultThreadError: As for `peek`.

        Cost: on `pagemap-scan` 0.3 us and 0.7 to 10 ns a page, on `uffd-wp` 7 to 15 ns a page and 1 us a run.

        Source: fs/proc/task_mmu.c, do_pagemap_scan; mm/userfaultfd.c, mwriteprotect_range.
        """
        asked = self._asked(start, stop)
        limit = check_max_pages(max_pages)
        return self._backend.get_and_engage_wp(self._attached, asked, limit, rearm=self._rearm)

    def reset(self, start: SupportsIndex = 0, stop: SupportsIndex | None = None) -> None:
        """Start watching anew, whatever was written until now. What is owed is forgotten too.

        Raises:
            NotTrackedError: Part of it has lost its registration (ENOENT), unless the tracker rearms; everything before
                `range` was reset.

            AlignmentError, ClosedError, FaultThreadError: As for `peek`.
        """
        self._backend.engage_wp(self._attached, self._asked(start, stop), rearm=self._rearm)

    def unprotect(self, start: SupportsIndex = 0, stop: SupportsIndex | None = None) -> None:
        """Let writers at these pages without a fault. All of them count as written until the next reset or collect.

        Raises:
            NotTrackedError: Part of it is not registered (ENOENT), whatever *on_untracked* says.

            AlignmentError, ClosedError, FaultThreadError: As for `peek`.
        """
        self._backend.disengage_wp(self._attached, self._asked(start, stop))

    def rearm(self, start: SupportsIndex = 0, stop: SupportsIndex | None = None) -> None:
        """Register and protect what has lost its registration, as memory mapped anew has. It is reported written once.

        Raises:
            NotTrackableError, AlreadyRegisteredError: As for `DirtyTracker.track`.

            AlignmentError, ClosedError, FaultThreadError: As for `peek`.
        """
        self._backend.rearm(self._attached, self._asked(start, stop))

    def _asked(self, start: SupportsIndex, stop: SupportsIndex | None) -> AddressRange:
        whole = self.range
        if stop is None and type(start) is int and start == 0:
            return whole
        length = self._attached.length
        first = operator.index(start)
        last = length if stop is None else operator.index(stop)
        for name, value in (("start", first), ("stop", last)):
            if not 0 <= value <= length and value != whole.length:
                raise InvalidArgumentError(f"{name}={value} lies outside of the {length} tracked bytes").with_hint(
                    "offsets count from the start of the tracked memory; negative ones have no meaning"
                )
            if (whole.start + value) % self.granularity and value not in (0, length):
                error = AlignmentError(f"{name}={value} is not a multiple of {self.granularity} bytes")
                error.address, error.length = whole.start + value, last - first
                down = value - (whole.start + value) % self.granularity
                raise error.with_hint(f"use {down} or {down + self.granularity}")
        if last < first:
            raise InvalidArgumentError(f"stop={last} lies before start={first}").with_hint(
                "stop is exclusive, not a length"
            )
        # Where the memory ends inside its last page, so does the last offset.
        first, last = (whole.length if value == length else value for value in (first, last))
        return AddressRange(whole.start + first, whole.start + last)

    # -- Life -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop watching, then let the buffer go. Idempotent; waits for running calls."""
        if self._closed:
            return
        try:
            self._backend.detach(self._attached)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        release(self._claim)
        self._pinned.release()
        self._closed = True

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """Close what was forgotten, and say so."""
        if getattr(self, "_closed", True):
            return
        try:
            if not self._backend.is_inherited:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        finally:
            self.close()


class DirtyTracker:
    """Tells which pages of this process's memory were written since they were last asked for.

    Use it in a with block: leaving it closes everything. Any number of trackers can exist; a page belongs to one.

    Args:
        backend: "auto" takes the best one that works and gives *require*; or a name.

        require: Promises that you cannot do without.

        on_untracked: What `collect` and `reset` do where memory has lost its registration, because it was unmapped and
            mapped anew or moved there: "raise" NotTrackedError, or "rearm" it and report it written once.

    Raises:
        InvalidArgumentError: An unknown backend or policy.

        AccessError: No backend works, for want of privileges. The message says which call, errno and remedy.

        UnsupportedError: No backend works on this kernel, or none gives *require*.

    Attributes:
        selection: The backend that was chosen, its guarantees, and why each better one was not.
    """

    def __init__(
        self, backend: str = "auto", require: Guarantee = Guarantee(0), on_untracked: OnUntracked = "raise"
    ) -> None:
        self._closed = True
        if on_untracked not in ("raise", "rearm"):
            raise InvalidArgumentError(f"on_untracked={on_untracked!r} is no policy").with_hint(
                'use "raise" or "rearm"'
            )
        self._rearm = on_untracked == "rearm"
        self._ranges: weakref.WeakValueDictionary[int, TrackedRange] = weakref.WeakValueDictionary()
        self.selection: Selection
        self._backend, self.selection = open_backend(backend, require, probe())
        self._closed = False

    def __repr__(self) -> str:
        """For people."""
        if not hasattr(self, "selection"):
            return "<DirtyTracker, not opened>"
        return f"<DirtyTracker {self.selection.chosen}{', closed' if self._closed else ''}>"

    def track(self, memory: Memory) -> TrackedRange:
        """Start watching *memory*. Writes after this returns are reported; earlier ones may not be.

        Holes in it are skipped, and what is mapped in them later is untracked. A buffer stays pinned until the range is
        closed: an mmap cannot be closed, an array not resized. Keep the result: dropping it ends the watching.

        Args:
            memory: Page aligned. Private anonymous memory works everywhere; shared memory since Linux 5.19, files since
                6.7.

        Raises:
            AlignmentError: It does not begin and end on page boundaries; the message says what does.

            AlreadyRegisteredError: Part of it is tracked already (EBUSY).

            NotTrackableError: A read-only buffer, a mapping the kernel refuses, nothing mapped, or the caller's stack.

            ClosedError: The tracker is closed.

        Cost: 3 to 18 ns a page; on kernels without `uffd-wp-unpopulated` readable pages are populated too.
        """
        if self._closed:
            raise ClosedError("this DirtyTracker is closed").with_hint("make a new one")
        pinned = pin(memory, writable=True)
        try:
            claimed = self._claim(pinned.range)
            try:
                attached = self._backend.attach(pinned.range, pinned.length)
                tracked = TrackedRange(self, pinned, attached, claimed, rearm=self._rearm)
                self._ranges[id(tracked)] = tracked
            except BaseException:
                release(claimed)
                raise
        except BaseException:
            pinned.release()
            raise
        return tracked

    def _claim(self, memory: AddressRange) -> Claim:
        if not memory.length:
            raise InvalidArgumentError(f"the memory at {memory.start:#x} is empty").with_hint("track at least one page")
        return claim(memory)

    def statistics(self) -> BackendStatistics:
        """Counters since the tracker was made."""
        return self._backend.statistics()

    def close(self) -> None:
        """Stop watching everything, end the fault thread, close the descriptors.

        Idempotent; waits for running calls.
        """
        if self._closed:
            return
        try:
            self._backend.close()
        finally:
            for reference in self._ranges.valuerefs():
                if tracked := reference():
                    tracked._let_go()  # noqa: SLF001 - its friend
            self._closed = True

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """Close what was forgotten, and say so."""
        if getattr(self, "_closed", True):
            return
        try:
            if not self._backend.is_inherited:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        finally:
            self.close()
