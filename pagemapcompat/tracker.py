"""DirtyTracker and TrackedRange: what most people import."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Literal, NoReturn, Self, SupportsIndex

from pagemapcompat.abi import Guarantee
from pagemapcompat.cursors import Cursor
from pagemapcompat.errors import ClosedError, InvalidArgumentError
from pagemapcompat.memory import AddressRange, Memory, PinnedMemory, pin
from pagemapcompat.probe import probe
from pagemapcompat.registrations import Claim, claim, release
from pagemapcompat.selection import Selection, open_backend
from pagemapcompat.snapshots import History, Snapshot

if TYPE_CHECKING:
    from types import TracebackType

    from pagemapcompat.backends import Attached, BackendStatistics
    from pagemapcompat.results import ScanResult

OnUntracked = Literal["raise", "rearm"]


class TrackedRange(Cursor):
    """Memory that is being watched, and its first reader. Made by `DirtyTracker.track`; closes itself with its tracker.

    `peek`, `collect` and `reset` are those of `Cursor`, and so are the attributes.
    """

    def __init__(self, tracker: DirtyTracker, pinned: PinnedMemory, attached: Attached, claimed: Claim) -> None:
        self._pinned = pinned
        self._claim = claimed
        super().__init__(tracker._backend, attached, keep=tracker)  # noqa: SLF001 - its friend
        self._history = History(self._backend, attached)

    # -- What concerns every reader ---------------------------------------------------------------------------

    def cursor(self) -> Cursor:
        """Another, independent reader, to whom nothing is written yet.

        Raises:
            NotTrackedError: Part of the memory has lost its registration (ENOENT), unless the tracker rearms.

            ClosedError, FaultThreadError: As for `peek`.

        Cost: that of a collect, and one bit a page.
        """
        attached = self._backend.attach_cursor(self._attached)
        return Cursor(self._backend, attached, keep=self)

    def snapshot(self) -> Snapshot:
        """Copy the memory: all that is there the first time, later the pages written since the last one or restore.

        Stop the writers for a snapshot of one moment. A page that is written meanwhile is in it as it was when it was
        copied, and counts as written since.

        Pages that their mapping bars are held too. Where the kernel gives them to nobody (proc_mem.force_override,
        since 6.12) each is opened by mprotect(2) for as long as it is copied: let no other thread protect it then.

        Raises:
            NotTrackedError: Part of the memory has lost its registration (ENOENT), unless the tracker rearms.

            KernelError: A page that is there cannot be read (EIO), or not be opened (the errno of mprotect): `range`
                says which.

            PagemapCompatError: In a signal handler, while this thread takes or restores one.

            ClosedError, FaultThreadError: As for `peek`.

        Cost: a collect, a look at the mappings, and 0.5 to 3 us a page; the first time a read of every page that is
        there. Empty pages of private anonymous memory are not populated, except with `uffd-wp-unpopulated` on machines
        with swap; those of shared memory and files are.

        Source: process_vm_writev(2); proc_pid_mem(5); fs/proc/base.c: proc_mem_foll_force.
        """
        return self._history.snapshot()

    def restore(self, snapshot: Snapshot, *, verify: bool = False) -> ScanResult:
        """Make the memory what it was, and return the pages that could differ, which were written back.

        From any snapshot to any other, again and again; of other memory of the same length, too. For other readers
        what is written back is written. What the snapshot does not hold (guard pages, holes) is left alone; what it
        holds must be there. Protections do not matter; a page may be opened by mprotect(2) while it is copied, as for
        `snapshot`, and one of shared memory is on every kernel.

        Stop the writers. When this returns, there was a moment at which memory equalled the snapshot: what was written
        before is undone, what is written later will be reported. If somebody else's write is found in it, this raises.

        Args:
            snapshot: Of this memory, or of any of the same length.

            verify: Compare all of the memory afterwards.

        Raises:
            ConcurrentWriteError: Somebody wrote meanwhile; some pages are not the snapshot's. Restore again.

            RestoreError: *verify* found pages that differ, and were not reported as written.

            KernelError: A page that the snapshot holds cannot be written (EFAULT): `range` says which. Where it is
                unmapped nothing was written, else what lies before it was.

            InvalidArgumentError: It is of another length.

            NotTrackedError, ClosedError, FaultThreadError: As for `snapshot`.

        Cost: a peek, a collect, a look at the mappings, and 0.5 to 3 us a page; of another snapshot than the last, also
        of the pages in which the two differ.

        Source: process_vm_readv(2).
        """
        return self._history.restore(snapshot, verify=verify)

    def unprotect(self, start: SupportsIndex = 0, stop: SupportsIndex | None = None) -> None:
        """Let writers at these pages without a fault. Every reader finds them written once more.

        Raises:
            NotTrackedError: Part of it is not registered (ENOENT), whatever *on_untracked* says.

            AlignmentError, ClosedError, FaultThreadError: As for `peek`.
        """
        self._backend.disengage_wp(self._attached, self._asked(start, stop))

    def rearm(self, start: SupportsIndex = 0, stop: SupportsIndex | None = None) -> None:
        """Register and protect what has lost its registration, as memory mapped anew has. It is reported written once.

        What another thread maps anew meanwhile has lost it again when this returns, and is reported all the same.

        Raises:
            NotTrackableError, AlreadyRegisteredError: As for `DirtyTracker.track`.

            AlignmentError, ClosedError, FaultThreadError: As for `peek`.
        """
        self._backend.rearm(self._attached, self._asked(start, stop))

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
        backend: "auto" takes the best one that works and gives *require*; or a name. "paranoid" is for those who
            suspect it: what "auto" takes, with a copy of all tracked memory for each reader (snapshots are one more),
            all of which is read at each call. DisagreementError is raised for pages that changed unreported.

        require: Promises that you cannot do without.

        on_untracked: What `collect` and `reset` do where memory has lost its registration, because it was unmapped and
            mapped anew or moved there: "raise" NotTrackedError, or "rearm" it and report it written once. Memory that
            another thread keeps mapping anew is reported as written, and left for the next call to register.

    Raises:
        InvalidArgumentError: An unknown backend or policy.

        AccessError: No backend works, for want of privileges. The message says which call, errno and remedy.

        UnsupportedError: No backend works on this kernel, or none gives *require*.

        KernelError: Whether one works could not be found out, for lack of descriptors or memory (EMFILE, ENOMEM).

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

    def __reduce__(self) -> NoReturn:
        """Neither copied nor pickled: a copy's end would close it."""
        raise TypeError(f"{self!r} cannot be copied; make another DirtyTracker")

    def track(self, memory: Memory) -> TrackedRange:
        """Start watching *memory*. Writes after this returns are reported; earlier ones may not be.

        Holes in it are skipped, and what is mapped in them later is untracked. A buffer stays pinned until the range is
        closed: an mmap cannot be closed, an array not resized. What is given as addresses must stay mapped until then.
        Keep the result: dropping it ends the watching.

        Args:
            memory: Page aligned. Private anonymous memory works everywhere; shared memory since Linux 5.19, files since
                6.7.

        Raises:
            AlignmentError: It does not begin and end on page boundaries. The hint says how to get memory that does.

            AlreadyRegisteredError: Part of it is tracked already (EBUSY).

            NotTrackableError: A read-only buffer, a mapping the kernel refuses, nothing mapped, or the caller's stack.

            InvalidArgumentError: It is empty, or negative.

            KernelError: There is no memory for what is noted of so much (ENOMEM), one bit a page and more.

            ClosedError: The tracker is closed.

        Cost: 3 to 18 ns a page, and page tables for all of it, also where nothing is: a word a page, 2 MiB a GiB. On
        kernels without `uffd-wp-unpopulated` readable pages are populated too. With
        `pagemap-scan` an empty reserve of 32 MiB or more that is barred (PROT_NONE) costs next to nothing, here and
        later; its range then lacks EXACT, for a first write may bring a huge page, all of which counts.
        """
        if self._closed:
            raise ClosedError("this DirtyTracker is closed").with_hint("make a new one")
        pinned = pin(memory, writable=True)
        try:
            claimed = self._claim(pinned.range)
            try:
                attached = self._backend.attach(pinned.range, pinned.length, rearm=self._rearm)
                tracked = TrackedRange(self, pinned, attached, claimed)
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
        """Stop watching everything, end the fault threads, close the descriptors.

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
