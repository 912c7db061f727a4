"""The backends.

A backend is an engine of the C core with the descriptors it works on. The operations of the mailing list are here:
`scan` is GET, and with a flag ENGAGE_WP + GET, as with the ioctl; `engage_wp` is ENGAGE_WP && !GET, and `disengage_wp`
its opposite.
"""

from __future__ import annotations

import os
import sys
import weakref
from errno import EACCES, EBUSY, EDEADLK, EINVAL, EMFILE, ENFILE, ENOENT, ENOMEM, EOPNOTSUPP, EPERM, ESRCH
from sys import getrefcount
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final, Literal, NoReturn

import attrs

from pagemapcompat import _kernel
from pagemapcompat.abi import Feature, Guarantee, UffdFeature
from pagemapcompat.errors import (
    AccessError,
    AlreadyRegisteredError,
    ClosedError,
    FaultThreadError,
    KernelError,
    NotTrackableError,
    NotTrackedError,
    PagemapCompatError,
    TargetGoneError,
    UnsupportedError,
)
from pagemapcompat.limits import NOT_DUMPABLE_HINT
from pagemapcompat.memory import AddressRange
from pagemapcompat.refusals import LOST_FILE, raise_einval
from pagemapcompat.results import ScanResult
from pagemapcompat.userfaultfd import Attempt, Way, open_hint, open_userfaultfd

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pagemapcompat.probe import FeatureReport


@attrs.frozen(kw_only=True)
class BackendStatistics:
    """Counters since the tracker was made.

    Attributes:
        backend: Its name.

        ranges: Tracked now.

        tracked_bytes: In them.

        scans: Calls of peek and collect.

        resets: Calls of reset.

        pages: Handed out by collect.

        faults: Resolved by fault threads; 0 where there are none.

        owed_pages: Taken, or declared written, and not yet handed out: the sum over all cursors.
    """

    backend: Literal["pagemap-scan", "uffd-wp"]
    ranges: int
    tracked_bytes: int
    scans: int
    resets: int
    pages: int
    faults: int
    owed_pages: int


_NO_ANSWER: Final = ScanResult(_kernel.new_result(), AddressRange(0, 0), 0, 0)
"""Where there is none: like one that somebody has, it is never used again."""


class _Answers:
    """Those of one cursor that may be filled again."""

    __slots__ = ("last", "scratch", "spare")

    def __init__(self) -> None:
        self.spare = _NO_ANSWER
        """The answer before the last one, to be used again if its owner has let it go."""
        self.last = _NO_ANSWER
        """The last answer, which who asks again and again still has meanwhile."""
        self.scratch: _kernel.Result | None = None
        """For what is no answer, unless somebody is using it."""

    def let_go(self) -> None:
        """Nobody asks any more."""
        self.spare = self.last = _NO_ANSWER


@attrs.frozen(kw_only=True, eq=False)
class Attached:
    """A range that a backend watches, as seen by one of its cursors. Compared by identity."""

    handle: _kernel.RangeHandle
    cursor: _kernel.CursorHandle
    range: AddressRange
    """Page aligned."""
    start: int
    """Of the range."""
    length: int
    """In bytes, as the owner of the memory sees it."""
    guarantees: Guarantee
    answers: _Answers = attrs.field(factory=_Answers, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        # That holds them until this ends, so that they are no garbage when the collector ends a reference cycle that
        # this is part of: else it would end an answer that a finalizer in that cycle was given.
        weakref.finalize(self, _Answers.let_go, self.answers).atexit = False

    def new_answer(self) -> ScanResult:
        """One to be filled, in the place of one that somebody has."""
        result = _kernel.new_request(self.cursor)
        return ScanResult(result, self.range, self.start, self.length, _kernel.own(result))


_ABILITIES: Final[Mapping[Feature, int]] = MappingProxyType(
    {
        Feature.PAGEMAP_UFFD_WP: _kernel.CAN_SEE_MARKS,
        Feature.PAGEMAP_SCAN_HOLES: _kernel.CAN_SCAN_HOLES,
        Feature.UFFD_WP_UNPOPULATED: _kernel.CAN_MARK_EMPTY,
        Feature.UFFD_WP_MULTI_VMA: _kernel.CAN_SPAN_VMAS,
        Feature.UFFD_WP_REMAP_CLEARS: _kernel.CAN_TRUST_MARKS,
        Feature.PROCMAP_QUERY: _kernel.CAN_QUERY_MAPS,
        Feature.MADV_POPULATE_READ: _kernel.CAN_POPULATE,
        Feature.MADV_GUARD: _kernel.CAN_GUARD,
        Feature.PAGEMAP_GUARD: _kernel.CAN_SEE_GUARDS,
    }
)


_ENGAGE: Final = _kernel.ENGAGE
_ALONE = 0
"""What getrefcount() says in `Backend.scan` of an answer that nobody else has; 0: nobody knows."""


class Backend:
    """What both backends share. Every method may be called from any thread, and blocks while another call runs.

    Attributes:
        guarantees: For private anonymous memory.

        attempts: Every way of opening a userfaultfd that was tried, the last one being the one in use.
    """

    name: ClassVar[Literal["pagemap-scan", "uffd-wp"]]
    needs: ClassVar[tuple[Feature, ...]]
    """Features without which it cannot work."""
    ways: ClassVar[tuple[Way, ...]]
    """Of opening a userfaultfd, in the order that serves it best."""

    def __init__(self, report: FeatureReport) -> None:
        """Open everything.

        Raises:
            AccessError: Something it needs is denied.

            UnsupportedError: Something it needs is not there.

            KernelError: Whether it is there could not be found out, for lack of descriptors or memory.
        """
        self._report = report
        if self.name in report.disabled:
            raise UnsupportedError.make(
                EOPNOTSUPP, self.name, "PAGEMAPCOMPAT_DISABLE names it", hint="unset PAGEMAPCOMPAT_DISABLE"
            )
        report.require(Feature.PAGEMAP)
        if not any(report.supports(way.feature) for way in self.ways):
            os.close(self._open_uffd()[0])  # fails, and says how each way does
        report.require(*self.needs)
        pagemap = self._open_pagemap()
        try:
            uffd, self.attempts = self._open_uffd()
        except BaseException:
            os.close(pagemap)
            raise
        self.way: Way = self.attempts[-1].way
        self._pid = os.getpid()
        rc, handle, result = _kernel.tracker_create(uffd, pagemap, self._abilities())
        if handle is None:
            hint = "see ulimit -n, -u and -v"
            raise KernelError.make(-rc, _kernel.operation(result), os.strerror(-rc), hint=hint)
        self._handle = handle
        _open_backends.add(self)

    @property
    def label(self) -> str:
        """What `Selection.chosen` says."""
        return self.name

    # -- What the two differ in -----------------------------------------------------------------------------

    @property
    def guarantees(self) -> Guarantee:
        """See the class."""
        raise NotImplementedError

    def _features(self) -> UffdFeature:
        raise NotImplementedError

    def _abilities(self) -> int:
        return sum(bit for feature, bit in _ABILITIES.items() if self._report.supports(feature))

    # -- Opening ----------------------------------------------------------------------------------------------

    def _open_pagemap(self) -> int:
        try:
            return os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            raise AccessError.make(
                error.errno or EPERM, "open /proc/self/pagemap", error.strerror or "", hint=NOT_DUMPABLE_HINT
            ) from error
        except OSError as error:
            hint = _TOO_MANY_HINT if error.errno in (EMFILE, ENFILE) else None
            raise KernelError.make(
                error.errno or 0, "open /proc/self/pagemap", error.strerror or "", hint=hint
            ) from error

    def _open_uffd(self) -> tuple[int, tuple[Attempt, ...]]:
        attempts: list[Attempt] = []
        features = self._features()
        for way in self.ways:
            if way.feature.value in self._report.disabled:
                continue
            fd, _, attempt = open_userfaultfd(way, features)
            attempts.append(attempt)
            if fd >= 0:
                return fd, tuple(attempts)
        tried = "; ".join(map(str, attempts)) or "every way is disabled by PAGEMAPCOMPAT_DISABLE"
        # The system call is what most people can have; the device is for those who were given it.
        by_call = [attempt for attempt in attempts if attempt.way is not Way.DEVICE] or attempts
        worst = next((attempt for attempt in by_call if attempt.errno == EPERM), by_call[0] if by_call else None)
        number = worst.errno if worst else EOPNOTSUPP
        kind: type[KernelError] = UnsupportedError
        if number in (EPERM, EACCES):
            kind = AccessError
        elif number in (EMFILE, ENFILE, ENOMEM):
            kind = KernelError
        hint = open_hint(worst) if worst else "unset PAGEMAPCOMPAT_DISABLE"
        raise kind.make(number, "userfaultfd", f"no userfaultfd can be opened ({tried})", hint=hint)

    # -- Ranges -----------------------------------------------------------------------------------------------

    def attach(self, memory: AddressRange, length: int, *, rearm: bool) -> Attached:
        """Register and protect *memory*.

        Raises:
            AlreadyRegisteredError: Another userfaultfd owns part of it (EBUSY).

            AlignmentError: It begins or ends inside a huge page (EINVAL).

            NotTrackableError: The kernel refuses this mapping, nothing is mapped, or it is the caller's stack.
        """
        rc, handle, result = _kernel.range_create(self._handle, memory.start, memory.end, rearm=rearm)
        if handle is None:
            self._refuse(-rc, memory, _kernel.operation(result))
        kinds = _kernel.range_kinds(handle)
        if kinds & ~_kernel.KIND_ANON and not self._report.supports(Feature.UFFD_WP_HUGETLBFS_SHMEM):
            # Only where PAGEMAPCOMPAT_DISABLE says so: a kernel without the feature has refused already.
            _kernel.range_close(handle)
            self._refuse(EINVAL, memory, "UFFDIO_REGISTER")
        cursor = self._cursor(handle)
        guarantees = self.guarantees
        if kinds & _kernel.KIND_HUGETLB or not _kernel.range_exact(handle):
            guarantees &= ~Guarantee.EXACT
        if kinds & _kernel.KIND_FILE:
            # What is discarded in a private mapping of a file is as in the file, and keeps its mark (seen on 6.18.44).
            guarantees &= ~Guarantee.DISCARDS
        return Attached(
            handle=handle,
            cursor=cursor,
            range=memory,
            start=memory.start,
            length=length,
            guarantees=guarantees,
        )

    def _cursor(self, handle: _kernel.RangeHandle) -> _kernel.CursorHandle:
        rc, cursor = _kernel.cursor_create(handle)
        if cursor is None:
            self._fail(-rc, "mmap", None)
        return cursor

    def attach_cursor(self, attached: Attached) -> Attached:
        """Another reader of the same range, to whom nothing is written yet."""
        other = attrs.evolve(attached, cursor=self._cursor(attached.handle))
        self.engage_wp(other, attached.range)
        return other

    def detach_cursor(self, attached: Attached) -> None:
        """Note pages for this reader no longer. Idempotent; waits for running calls."""
        _kernel.cursor_close(attached.cursor)

    def _refuse(self, number: int, memory: AddressRange, operation: str) -> NoReturn:
        if number == _kernel.EOWNMEMORY or number in _OWN_ERRORS | LOST_FILE or operation != "UFFDIO_REGISTER":
            self._fail(number, operation, memory)
        if number == EBUSY:
            raise AlreadyRegisteredError.make(
                EBUSY,
                operation,
                f"part of {memory} belongs to another userfaultfd",
                range=memory,
                hint="memory has one userfaultfd at a time; the mappings with um, uw or ui in VmFlags of "
                "/proc/self/smaps have one already",
            )
        if number == EPERM:
            raise NotTrackableError.make(
                EPERM,
                operation,
                f"part of {memory} is a shared mapping of a file that was opened read-only",
                range=memory,
                hint="open the file for writing, or map it privately",
            )
        if number == EINVAL:
            raise_einval(operation, memory, self.name)
        raise KernelError.make(number, operation, os.strerror(number), range=memory)

    def detach(self, attached: Attached) -> None:
        """Unregister. Idempotent; waits for running calls."""
        rc = _kernel.range_close(attached.handle)
        if rc < 0:
            hint = _LOST_FILE_HINT if -rc in LOST_FILE else None
            raise KernelError.make(-rc, "UFFDIO_UNREGISTER", os.strerror(-rc), range=attached.range, hint=hint)

    # -- The operations ---------------------------------------------------------------------------------------

    def scan(self, on: Attached, asked: AddressRange, max_pages: int, flags: int) -> ScanResult:
        """GET: what was written. With `_kernel.ENGAGE` as *flags* ENGAGE_WP + GET: protected again in the same step.

        What that took is in the ScanResult, in the exception's `collected`, or owed to the next call; an interrupt
        changes which, not that.
        """
        # One function, and as much of it as possible before the scan: where that protected a page the kernel has
        # flushed this CPU's TLB, and each page that is touched from then on, of code too, takes long the first time.
        answers = on.answers
        answer = answers.spare
        answers.spare = answers.last
        # Only while it is in neither place does the count say who else has it, whatever comes in between.
        if getrefcount(answer) != _ALONE or (answer._words is not None and answer._is_viewed()):  # noqa: SLF001 - its friend
            answer = on.new_answer()
        answers.last = answer
        answer.range = asked
        result = answer._result  # noqa: SLF001 - its friend
        try:
            if asked is on.range and not max_pages:
                rc = _kernel.collect_all(result) if flags else _kernel.peek_all(result)
            else:
                rc = _kernel.scan(on.cursor.c, asked.start, asked.end, max_pages, flags, result)
            # CPython looks for signals when a function begins, when one in C has returned, and in loops. None of these
            # is between here and the caller, if there is no error, nor between an interrupt and the owe() below: pages
            # are always delivered or given back, even where somebody keeps the interrupt, its traceback and this frame.
            if not rc:
                return answer
            if rc < 0:
                self._fail(-rc, _kernel.operation(result), asked, result if flags else None)
        except PagemapCompatError as error:
            if flags and error.collected is None:
                error.collected = answer
            elif flags:  # that of a signal handler, which collected too
                _kernel.owe(on.cursor.c, result)
            answers.last = _NO_ANSWER
            raise
        except BaseException:
            if flags:
                _kernel.owe(on.cursor.c, result)
            answers.last = _NO_ANSWER
            raise
        answers.last = _NO_ANSWER  # it is large
        return answer

    def take(self, on: Attached, pages: _kernel.Result) -> None:
        """ENGAGE_WP + GET of all of it, into *pages*, which the caller delivers or gives back, on errors too."""
        rc = _kernel.scan(on.cursor.c, on.range.start, on.range.end, 0, _ENGAGE, pages)
        if rc < 0 or pages.walk_end < on.range.end:
            self._fail(-rc if rc < 0 else ENOMEM, _kernel.operation(pages), on.range, pages)

    def written(self, on: Attached) -> _kernel.Result:
        """GET of all of it."""
        result = _kernel.new_result()
        rc = _kernel.scan(on.cursor.c, on.range.start, on.range.end, 0, 0, result)
        if rc < 0 or result.walk_end < on.range.end:
            self._fail(-rc if rc < 0 else ENOMEM, _kernel.operation(result), on.range)
        return result

    def capture(self, on: Attached, image: _kernel.ImageHandle, pages: _kernel.Result) -> None:
        """Copy *pages* from memory into *image*."""
        result = _kernel.new_result()
        rc = _kernel.capture(on.handle, image, pages, result)
        if rc:
            self._fail_to_copy(-rc, on, result, "read", "it may belong to a file that is too short, or swap has failed")

    def write_back(self, on: Attached, image: _kernel.ImageHandle, pages: _kernel.Result) -> None:
        """Write *pages* of *image* into memory, whatever its protection."""
        result = _kernel.new_result()
        rc = _kernel.restore(on.handle, image, pages, result)
        if rc:
            hint = "it was unmapped or made a guard page: undo that, then restore"
            self._fail_to_copy(-rc, on, result, "written", hint)

    def differing(self, on: Attached, image: _kernel.ImageHandle, pages: _kernel.Result) -> _kernel.Result:
        """Which of *pages* are not what *image* holds."""
        result = _kernel.new_result()
        rc = _kernel.compare(on.handle, image, pages, result)
        if rc:
            self._fail_to_copy(-rc, on, result, "read", "it may belong to a file that is too short, or swap has failed")
        return result

    def _fail_to_copy(self, number: int, on: Attached, result: _kernel.Result, done: str, hint: str) -> NoReturn:
        if result.untracked_end and number != ENOENT:
            where = AddressRange(result.untracked_start, result.untracked_end)
            raise KernelError.make(
                number, _kernel.operation(result), f"{where} cannot be {done} now", range=where, hint=hint
            )
        self._fail(number, _kernel.operation(result), on.range)

    def engage_wp(self, on: Attached, asked: AddressRange) -> None:
        """ENGAGE_WP && !GET: protect, whatever was written."""
        answers = on.answers
        result, answers.scratch = answers.scratch, None
        if result is None:
            result = _kernel.new_request(on.cursor)
        if asked is on.range:
            rc = _kernel.reset_all(result)
        else:
            rc = _kernel.reset(on.cursor.c, asked.start, asked.end, result)
        if rc:
            self._fail(-rc, _kernel.operation(result), asked, result)
        answers.scratch = result

    def disengage_wp(self, on: Attached, asked: AddressRange) -> None:
        """Un-protect; all of it counts as written once."""
        result = _kernel.new_result()
        rc = _kernel.unprotect(on.handle, asked.start, asked.end, result)
        if rc:
            self._fail(-rc, _kernel.operation(result), asked, result)

    def rearm(self, on: Attached, asked: AddressRange) -> None:
        """Register and protect what has lost its registration; counts as written once."""
        result = _kernel.new_result()
        rc = _kernel.rearm(on.handle, asked.start, asked.end, result)
        if not rc:
            return
        self._fail(-rc, _kernel.operation(result), asked, result)

    def _fail(
        self, number: int, operation: str, asked: AddressRange | None, result: _kernel.Result | None = None
    ) -> NoReturn:
        if number == _kernel.EFORKED:
            raise ClosedError(
                f"this tracker belongs to process {self._pid}, which process {os.getpid()} was forked from"
            ).with_hint("a forked child's memory is not tracked; make a DirtyTracker in the child")
        if number == _kernel.ECLOSED:
            raise ClosedError("the tracker, or this range or cursor of it, is closed").with_hint(
                "make another: DirtyTracker(), its track(), or the range's cursor()"
            )
        if number == _kernel.EFAULTTHREAD:
            cause = _kernel.tracker_fault_errno(self._handle)
            raise FaultThreadError(
                f"the fault thread ended: {os.strerror(cause)} (errno {cause}); writers went on, untracked"
            ).with_hint(_LOST_FILE_HINT if cause in LOST_FILE else _START_ANEW)
        if number == _kernel.EOWNMEMORY:
            raise NotTrackableError.make(
                EDEADLK,
                "track",
                f"{asked}, or memory that is tracked, holds the caller's stack or this library's own memory",
                range=asked,
                hint="a write fault there could not be answered; track only memory that you allocated",
            )
        if operation == "UFFDIO_REGISTER" and result is not None and result.untracked_end:
            self._refuse(number, AddressRange(result.untracked_start, result.untracked_end), operation)
        if number == ENOENT and not operation.startswith("/proc/"):
            where = asked
            if result is not None and result.untracked_end:
                where = AddressRange(result.untracked_start, result.untracked_end)
            raise NotTrackedError.make(
                ENOENT,
                operation,
                f"{where} is mapped and not registered: it was mapped anew or moved there",
                range=where,
                hint='call rearm() on it, or make the tracker with on_untracked="rearm"',
            )
        if number == ESRCH:
            raise TargetGoneError.make(ESRCH, operation, "the memory is gone", range=asked)
        text = os.strerror(number) if asked is None else f"{os.strerror(number)}, for {asked}"
        hint = _LOST_FILE_HINT if number in LOST_FILE else _HINTS.get(number)
        raise KernelError.make(number, operation, text, range=asked, hint=hint)

    # -- Life ---------------------------------------------------------------------------------------------------

    @property
    def is_inherited(self) -> bool:
        """Whether this process was forked from the one that made it."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """Raise what a call would raise now, before taking a lock that nobody would release in a forked child."""
        rc = _kernel.tracker_state(self._handle)
        if rc:
            self._fail(-rc, "", None)

    def statistics(self) -> BackendStatistics:
        """Counters since it was made."""
        rc, counters = _kernel.tracker_statistics(self._handle)
        if rc:
            self._fail(-rc, "statistics", None)
        return BackendStatistics(backend=self.name, **counters)

    def close(self) -> None:
        """Unregister everything, end the fault threads, close the descriptors. Idempotent; waits for running calls.

        In a forked child it closes the child's copies of the descriptors, and touches nothing else.
        """
        rc = _kernel.tracker_close(self._handle)
        if rc < 0:
            raise KernelError.make(-rc, "UFFDIO_UNREGISTER", os.strerror(-rc))


_OWN_ERRORS = frozenset({_kernel.ECLOSED, _kernel.EFORKED, _kernel.EFAULTTHREAD})
_START_ANEW = "take all memory as written, close this tracker and make a new one"
_TOO_MANY_HINT = "see ulimit -n, and /proc/sys/fs/file-nr"
_HINTS = {ENOMEM: "memory for page tables or results ran out; of what is large, ask for what is mapped, in parts"}
_LOST_FILE_HINT = (
    f"somebody closed or replaced this library's descriptor; {_START_ANEW}, and close only descriptors that you opened"
)


def _calibrate() -> None:
    """Find out by calling `scan` itself whether `_ALONE` is what it is to be: a local, and before 3.14 an argument.

    If it does not fit, as under a debugger that holds references, it stays 0, and no answer is used again.
    """
    global _ALONE  # noqa: PLW0603 - so that to ask costs no more than to look up a name
    nobody, nowhere, old, new = Backend.__new__(Backend), AddressRange(0, 0), 1, 2
    closed = Attached(
        handle=_kernel.RangeHandle(),
        cursor=_kernel.CursorHandle(),
        range=nowhere,
        start=new,
        length=0,
        guarantees=Guarantee(0),
    )
    _ALONE = 1 if sys.version_info >= (3, 14) else 2
    held, found = [], []
    for is_held in (True, False):
        closed.answers.spare = ScanResult(_kernel.new_request(closed.cursor), nowhere, old, 0)
        if is_held:
            held.append(closed.answers.spare)
        try:
            nobody.scan(closed, nowhere, 0, _ENGAGE)
        except ClosedError as error:
            found.append(error.collected._base if error.collected is not None else 0)  # noqa: SLF001 - made here
    if found != [new, old]:
        _ALONE = 0


_calibrate()


class PagemapScanBackend(Backend):
    """PAGEMAP_SCAN on memory registered with an asynchronous userfaultfd. Since Linux 6.7.

    The kernel resolves write faults itself (0.5 us each) and answers in one call.
    """

    name = "pagemap-scan"
    needs = (Feature.PAGEMAP, Feature.PAGEMAP_SCAN, Feature.UFFD_WP_ASYNC, Feature.PAGEMAP_UFFD_WP)
    # No fault is ever delivered, so the one that needs no privileges serves as well as any.
    ways = (Way.USER_MODE_ONLY, Way.SYSCALL, Way.DEVICE)

    @property
    def guarantees(self) -> Guarantee:
        """All of them."""
        return ~Guarantee(0)

    def _features(self) -> UffdFeature:
        features = UffdFeature.PAGEFAULT_FLAG_WP | UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED
        if self._report.supports(Feature.UFFD_WP_HUGETLBFS_SHMEM):
            features |= UffdFeature.WP_HUGETLBFS_SHMEM
        return features

    def _abilities(self) -> int:
        # WP_ASYNC implies WP_UNPOPULATED (seen on 6.18).
        return super()._abilities() | _kernel.CAN_ASYNC | _kernel.CAN_MARK_EMPTY


class UffdWpBackend(Backend):
    """Pagemap words and UFFDIO_WRITEPROTECT, with a fault thread in C. Since Linux 5.7.

    A writer sleeps until the fault thread has un-protected its page, once per page and collect. Made on two CPUs, a
    tracker has a fault thread on each; else there is one, which as long as it has one writer ties itself to that one's
    CPU, within those that it was given. A real-time thread that takes such a CPU keeps it waiting.
    PAGEMAPCOMPAT_DISABLE=uffd-thread-id has one, and leaves it to the scheduler.
    """

    name = "uffd-wp"
    needs = (Feature.PAGEMAP, Feature.UFFD_WP)
    # Only the first two deliver faults of kernel mode, without which read(2) into protected memory fails with EFAULT.
    ways = (Way.SYSCALL, Way.DEVICE, Way.USER_MODE_ONLY)

    @property
    def guarantees(self) -> Guarantee:
        """Without KERNEL_WRITES when opened for user mode only, without DISCARDS when marks cannot be seen."""
        result = Guarantee.EXACT | Guarantee.ATOMIC_COLLECT
        if self.way is not Way.USER_MODE_ONLY:
            result |= Guarantee.KERNEL_WRITES
        if self._report.supports(Feature.PAGEMAP_UFFD_WP):
            result |= Guarantee.DISCARDS
        return result

    @property
    def _marks_empty(self) -> bool:
        return self._report.supports(Feature.UFFD_WP_UNPOPULATED, Feature.PAGEMAP_UFFD_WP)

    def _features(self) -> UffdFeature:
        features = UffdFeature.PAGEFAULT_FLAG_WP
        if self._report.supports(Feature.UFFD_WP_HUGETLBFS_SHMEM):
            features |= UffdFeature.WP_HUGETLBFS_SHMEM
        if self._marks_empty:
            features |= UffdFeature.WP_UNPOPULATED
        if self._may_tie:
            features |= UffdFeature.THREAD_ID
        return features

    @property
    def _may_tie(self) -> bool:
        # A real-time thread may take the CPU that a fault thread is tied to: without a limit, for ever.
        return self._report.supports(Feature.UFFD_THREAD_ID) and self._report.limits.real_time_limit is not False

    def _abilities(self) -> int:
        abilities = super()._abilities() & ~(0 if self._marks_empty else _kernel.CAN_MARK_EMPTY)
        return abilities | (_kernel.CAN_TIE if self._may_tie else 0)


BACKENDS: Final[tuple[type[Backend], ...]] = (PagemapScanBackend, UffdWpBackend)
"""Best first; "auto" walks it."""


_open_backends: weakref.WeakSet[Backend] = weakref.WeakSet()


def _close_in_child() -> None:
    # Only the copies of the descriptors; the parent's trackers go on. Where C code forks, the first call does the same.
    for backend in list(_open_backends):
        backend.close()


os.register_at_fork(after_in_child=_close_in_child)
