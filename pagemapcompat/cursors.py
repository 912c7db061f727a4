"""Cursor: a reader of tracked memory. Several can read the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn, Self, SupportsIndex

from pagemapcompat import _kernel
from pagemapcompat.errors import AlignmentError, InvalidArgumentError
from pagemapcompat.memory import AddressRange, check_max_pages, page_size, whole_number

if TYPE_CHECKING:
    from types import TracebackType

    from pagemapcompat.abi import Guarantee
    from pagemapcompat.backends import Attached, Backend
    from pagemapcompat.results import ScanResult

_ENGAGE = _kernel.ENGAGE
_START = 0
"""There is one 0, so that whoever asks for everything is known by identity, and a 0.0 is not taken for it."""


class Cursor:
    """A reader of tracked memory: sees every page written since its own last collect. Made by `TrackedRange.cursor`.

    What one cursor collects or resets, all others still get. A cursor that nobody asks costs one bit a page, and the
    others a little time for each run of pages that they collect, whatever the size of the memory. Offsets are in bytes
    from the start of the memory, page aligned; *stop* is exclusive, and None is the end. Every method may be called
    from any thread; calls on one tracker run one after the other.

    Attributes:
        range: Where the memory lies.

        guarantees: What the backend promises for this mapping.
    """

    def __init__(self, backend: Backend, attached: Attached, *, keep: object = None) -> None:
        self._backend = backend
        self._attached = attached
        self._keep = keep  # the tracked range, which would else end with its last name
        self._closed = False
        self.range: AddressRange = attached.range
        self.guarantees: Guarantee = attached.guarantees

    def __repr__(self) -> str:
        """For people."""
        return f"<{type(self).__name__} {self.range}, {self._backend.label}{', closed' if self._closed else ''}>"

    def __reduce__(self) -> NoReturn:
        """Neither copied nor pickled: a copy's end would close it."""
        raise TypeError(f"{self!r} cannot be copied; make another by TrackedRange.cursor()")

    def __len__(self) -> int:
        """In bytes, as the owner of the memory sees it."""
        return self._attached.length

    @property
    def granularity(self) -> int:
        """What offsets are multiples of, in bytes: the size of the memory's largest page. A rearm may change it."""
        return _kernel.range_granularity(self._attached.handle) or page_size()

    def peek(
        self, start: SupportsIndex = 0, stop: SupportsIndex | None = None, *, max_pages: int | None = None
    ) -> ScanResult:
        """Return the pages written since they were last collected or reset. Changes nothing.

        Memory that is not, or no longer, registered is reported as written; unmapped memory is skipped.

        Args:
            start: Where to begin: an offset in bytes from the start of the memory.

            stop: Where to end.

            max_pages: Stop after this many pages; the result's `resume_at` says where to go on.

        Raises:
            AlignmentError: An offset is not on a page boundary.

            InvalidArgumentError: An offset lies outside of the memory, *stop* before *start*; *max_pages* is below 1.

            ClosedError: The range or its tracker is closed, or belongs to the parent process.

            FaultThreadError: The fault thread of `uffd-wp` has ended.

            NotTrackableError: On `uffd-wp`, tracked memory lies where this thread's stack is or may come to, within
                128 KiB below its frame (EDEADLK): a fault there could not be resolved.

        Cost: on `pagemap-scan` 0.3 us and 0.7 to 3 ns a page, on `uffd-wp` 7 to 15 ns a page.
        """
        asked = self.range if stop is None and start is _START else self._asked(start, stop)
        limit = 0 if max_pages is None else check_max_pages(max_pages)
        return self._backend.scan(self._attached, asked, limit, 0)

    def collect(
        self, start: SupportsIndex = 0, stop: SupportsIndex | None = None, *, max_pages: int | None = None
    ) -> ScanResult:
        """Return the pages written since they were last collected or reset, and watch them anew in the same step.

        Each write is reported by the collect that runs beside it or by the first that begins after it, perhaps by both;
        none is left out. The pages in an error's `collected` are delivered by that, and do not come again; what any
        other error or an interrupt took is owed to the next peek or collect. Regions carry WRITTEN alone.

        Args:
            start: Where to begin.

            stop: Where to end.

            max_pages: Stop after this many pages. Those that were not returned stay written.

        Raises:
            NotTrackedError: Part of it has lost its registration (ENOENT), unless the tracker rearms. `range` is the
                first such stretch, `collected` what was taken before it; nothing behind it was touched.

            AlignmentError, ClosedError, FaultThreadError, NotTrackableError: As for `peek`.

        Cost: on `pagemap-scan` 0.3 us and 0.7 to 10 ns a page, on `uffd-wp` 7 to 15 ns a page and 1 us a run.

        Source: fs/proc/task_mmu.c, do_pagemap_scan; mm/userfaultfd.c, mwriteprotect_range.
        """
        asked = self.range if stop is None and start is _START else self._asked(start, stop)
        limit = 0 if max_pages is None else check_max_pages(max_pages)
        return self._backend.scan(self._attached, asked, limit, _ENGAGE)

    def reset(self, start: SupportsIndex = 0, stop: SupportsIndex | None = None) -> None:
        """Start watching anew, whatever was written until now. What is owed is forgotten too.

        Raises:
            NotTrackedError: Part of it has lost its registration (ENOENT), unless the tracker rearms; everything before
                `range` was reset.

            AlignmentError, ClosedError, FaultThreadError, NotTrackableError: As for `peek`.
        """
        asked = self.range if stop is None and start is _START else self._asked(start, stop)
        self._backend.engage_wp(self._attached, asked)

    def _asked(self, start: SupportsIndex, stop: SupportsIndex | None) -> AddressRange:
        whole, unit = self.range, self.granularity
        length = self._attached.length
        hint = f"start={start!r}, stop={stop!r}: give whole numbers of bytes, or None for the end"
        first = whole_number(start, hint)
        last = length if stop is None else whole_number(stop, hint)
        for name, value in (("start", first), ("stop", last)):
            if not 0 <= value <= length and value != whole.length:
                raise InvalidArgumentError(f"{name}={value} lies outside of the {length} tracked bytes").with_hint(
                    "that is an address: subtract range.start"
                    if whole.start <= value <= whole.end
                    else f"offsets count from the start of the tracked memory, 0 to {length}; None is the end"
                )
            if (whole.start + value) % unit and value not in (0, length):
                odd = AlignmentError(f"{name}={value} is not a multiple of {unit} bytes")
                odd.address, odd.length = whole.start + value, last - first
                down = value - (whole.start + value) % unit
                raise odd.with_hint(f"use {down} or {down + unit}")
        if last < first:
            raise InvalidArgumentError(f"stop={last} lies before start={first}").with_hint(
                "stop is exclusive, not a length"
            )
        # Where the memory ends inside its last page, so does the last offset.
        first, last = (whole.length if value == length else value for value in (first, last))
        return AddressRange(whole.start + first, whole.start + last)

    def close(self) -> None:
        """Have no more pages noted for this reader. Idempotent; waits for running calls. Dropping it does the same."""
        self._backend.detach_cursor(self._attached)
        self._closed = True
        self._keep = None

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()
