"""/proc/PID/pagemap: what it says of pages."""

from __future__ import annotations

import contextlib
import operator
import os
import threading
from errno import (
    EACCES,
    EFAULT,
    EINVAL,
    EMFILE,
    ENFILE,
    ENOENT,
    EOPNOTSUPP,
    EPERM,
    ESRCH,
)
from pathlib import Path
from struct import iter_unpack
from typing import TYPE_CHECKING, Literal, NoReturn, Self, SupportsIndex

import attrs

from pagemapcompat import _kernel
from pagemapcompat.abi import PFN_MASK, EntryFlag, Feature, PageCategory
from pagemapcompat.errors import (
    AccessError,
    ClosedError,
    InvalidArgumentError,
    KernelError,
    TargetGoneError,
    UnsupportedError,
)
from pagemapcompat.limits import NOT_DUMPABLE_HINT
from pagemapcompat.memory import PAGE_SHIFT, AddressRange, Memory, check_max_pages, pin, whole_number
from pagemapcompat.probe import probe
from pagemapcompat.refusals import LOST_FILE
from pagemapcompat.registrations import registered
from pagemapcompat.results import ScanResult

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType


_WORD_SIZE = 8
_SWAP_TYPE_BITS = 5
_SHOWN_BY = {
    PageCategory.WRITTEN: Feature.PAGEMAP_UFFD_WP,
    PageCategory.SOFT_DIRTY: Feature.PAGEMAP_SOFT_DIRTY,
    PageCategory.GUARD: Feature.PAGEMAP_GUARD,
}
"""What a kernel's words must show before they can tell a category."""
_LOST_FILE_HINT = (
    "somebody closed or replaced this library's descriptor; open another Pagemap, and close only what you opened"
)


def _mask(value: int) -> PageCategory:
    if isinstance(value, EntryFlag):
        error = TypeError(f"{value!r} is a bit of a pagemap word, and no category")
        error.add_note("hint: give PageCategory.PRESENT, or several joined by |")
        raise error
    value = whole_number(value, f"{value!r}: give PageCategory.PRESENT, or several joined by |")
    if not 0 <= value < 1 << 64:
        raise InvalidArgumentError(f"{value:#x} is no mask of categories").with_hint(
            "masks have 64 bits; use PageCategory"
        )
    return PageCategory(value)


@attrs.frozen(kw_only=True)
class ScanQuery:
    """Which pages to return, and what to say of them: the four masks of `struct pm_scan_arg`.

    A page with categories C matches when (C ^ inverted) has every bit of *all_of* and, unless that is empty, one of
    *any_of*. It is returned with `C & report`; neighbours that are equal then make one region.

    Attributes:
        all_of: `category_mask`.

        any_of: `category_anyof_mask`.

        inverted: `category_inverted`.

        report: `return_mask`.

        never: No page can match; answered without asking the kernel. Only `from_proposal` makes such queries.

        drop_empty: Leave out pages with nothing to report, before *max_pages* counts them. Only `from_proposal` asks
            for it.
    """

    all_of: PageCategory = attrs.field(default=PageCategory(0), converter=_mask)
    any_of: PageCategory = attrs.field(default=PageCategory(0), converter=_mask)
    inverted: PageCategory = attrs.field(default=PageCategory(0), converter=_mask)
    report: PageCategory = attrs.field(default=PageCategory(0), converter=_mask)
    never: bool = attrs.field(default=False, init=False)
    drop_empty: bool = attrs.field(default=False, init=False)

    @property
    def mentioned(self) -> PageCategory:
        """Every category that one of the masks names."""
        return self.all_of | self.any_of | self.inverted | self.report

    @classmethod
    def from_proposal(cls, required: int, anyof: int, excluded: int, returned: int) -> Self:
        """Translate the masks of PAGEMAP_IOCTL as proposed in February 2023 (v10), exactly.

        Args:
            required: Every one of these must be set.

            anyof: One of these must be set, if there are any.

            excluded: None of these may be set.

            returned: What to report; a page with none of it is left out.

        All four in the proposal's bits: WRITTEN 1, FILE 2, PRESENT 4, SWAPPED 8. (The merged ABI moved them.)

        Raises:
            InvalidArgumentError: A bit that the proposal does not have.
        """
        given = {"required": required, "anyof": anyof, "excluded": excluded, "returned": returned}
        names = {name: whole_number(value, f"{name}={value!r}: {_PROPOSED}") for name, value in given.items()}
        for name, value in names.items():
            if not 0 <= value < 1 << len(_PROPOSAL):
                raise InvalidArgumentError(f"{name}={value:#x} has bits that the proposal does not").with_hint(
                    f"{_PROPOSED}; for others build a ScanQuery of PageCategory"
                )
        r, a, e, report = (_merged(value) for value in names.values())
        query = cls(all_of=r | e, any_of=a & ~e, inverted=e, report=report)
        object.__setattr__(query, "never", bool(r & e) or bool(a and not a & ~e))
        object.__setattr__(query, "drop_empty", True)
        return query


_PROPOSED = "it knows WRITTEN 1, FILE 2, PRESENT 4 and SWAPPED 8"
_PROPOSAL = (PageCategory.WRITTEN, PageCategory.FILE, PageCategory.PRESENT, PageCategory.SWAPPED)


def _merged(bits: int) -> PageCategory:
    result = PageCategory(0)
    for position, category in enumerate(_PROPOSAL):
        if bits >> position & 1:
            result |= category
    return result


@attrs.frozen
class PagemapEntry:
    """One 64-bit word of /proc/PID/pagemap, decoded.

    Attributes:
        flags: Unknown bits of newer kernels included.

        pfn: The page frame number, or None: not present, or this process may not see it (CAP_SYS_ADMIN).

        swap: (type, offset) of a swap entry, or of a migration entry or marker, whose types are the kernel's own; or
            None. Both are 0 where they may not be seen.
    """

    flags: EntryFlag
    pfn: int | None
    swap: tuple[int, int] | None

    @classmethod
    def decode(cls, word: SupportsIndex) -> Self:
        """Decode a word, of 64 bits. Pure."""
        word = whole_number(word, f"{word!r}: give a word of /proc/PID/pagemap, as a whole number")
        if not 0 <= word < 1 << 64:
            raise InvalidArgumentError(f"{word:#x} is no word of 64 bits").with_hint("read it as an unsigned one")
        flags = EntryFlag(word & ~PFN_MASK)
        payload = word & PFN_MASK
        if flags & EntryFlag.PRESENT:
            return cls(flags, payload or None, None)
        if flags & EntryFlag.SWAPPED:
            return cls(flags, None, (payload & ((1 << _SWAP_TYPE_BITS) - 1), payload >> _SWAP_TYPE_BITS))
        return cls(flags, None, None)


def _pid_of(pidfd: int) -> int:
    """In this pid namespace. It stays the process's own until that is reaped."""
    no_pidfd = InvalidArgumentError(f"{pidfd!r} is no pidfd of a process that has a pid here").with_hint(
        "give what os.pidfd_open() returned"
    )
    try:
        with open(f"/proc/self/fdinfo/{operator.index(pidfd)}", encoding="ascii", errors="replace") as info:
            fields = dict(line.partition(":")[::2] for line in info)
    except FileNotFoundError as error:
        raise no_pidfd from error
    pid = int(fields.get("Pid", "0"))
    if not pid:
        raise no_pidfd
    if pid < 0:
        raise TargetGoneError.make(ESRCH, "pidfd", "its process ended", hint="its pid may be another process by now")
    return pid


class _Maps:
    """/proc/PID/maps, read by one call at a time: there is one place in it for all who have the descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.lock = threading.RLock()
        self.pid = os.getpid()

    @property
    def is_inherited(self) -> bool:
        """Whether the process that this one was forked from has it too."""
        return self.pid != os.getpid()

    def __del__(self) -> None:
        with contextlib.suppress(OSError):  # somebody closed it
            os.close(self.fd)


class _Files:
    """The descriptors of one Pagemap, closed when it ends. Whoever uses one holds this.

    So none is closed under a running call, and its number given to another file.
    """

    def __init__(self) -> None:
        self.process = self.pagemap = -1
        self.maps: _Maps | None = None

    def close(self) -> None:
        """Idempotent."""
        fds, self.process, self.pagemap, self.maps = (self.process, self.pagemap), -1, -1, None
        for fd in fds:
            if fd >= 0:
                with contextlib.suppress(OSError):  # somebody closed it
                    os.close(fd)

    def __del__(self) -> None:
        self.close()


class Pagemap:
    """GET on any process whose memory may be read (PTRACE_MODE_READ; checked once, here).

    The descriptor stays with the memory it was opened on: after an exec or the end of the process it answers nothing
    (TargetGoneError), never for whoever has its pid next. Which process a pid means is settled once, here; `from_pidfd`
    leaves no doubt. Any thread may use it. In a forked child "self" is another process: make a new one there.

    Args:
        pid: A process id, or "self".

    Raises:
        AccessError: Not ours to read (EACCES, EPERM), or this process is not dumpable.

        TargetGoneError: There is no such process, or it has no memory (ESRCH, ENOENT).
    """

    def __init__(self, pid: SupportsIndex | Literal["self"] = "self") -> None:
        self._files: _Files | None = None
        pid = _checked(pid)
        self._owner = os.getpid() if _is_own(pid) else None
        self.pid: int | Literal["self"] = pid
        files = _Files()
        try:
            files.process = self._open("pagemap", None)
            files.pagemap = self._open("pagemap", files.process)
            self._check_memory(files.pagemap)
            self._ioctl = probe().supports(Feature.PAGEMAP_SCAN)
            if not self._ioctl:
                files.maps = _Maps(self._open("maps", files.process))
        except BaseException:
            files.close()  # not when somebody lets go of the exception, and with it this frame
            raise
        self._files = files

    @classmethod
    def from_pidfd(cls, pidfd: int) -> Self:
        """Open the pagemap of the process that a pidfd stands for, and of no other, whatever became of its pid.

        The pidfd stays the caller's.

        Raises:
            InvalidArgumentError: It is no pidfd, or of a process that has no pid here (another pid namespace).

            TargetGoneError, AccessError: As for a pid.

        Source: pidfd_open(2); kernel/fork.c, pidfd_show_fdinfo.
        """
        pid = _pid_of(pidfd)
        made = cls(pid)
        try:
            # Still the same: it was not reaped meanwhile, so its pid was its own when it was opened.
            _pid_of(pidfd)
        except BaseException:
            made.close()
            raise
        return made

    def open_file(self, name: str) -> int:
        """Open /proc/PID/*name* of this process, to be read. The descriptor is the caller's.

        It is of the process, also when that has come to run another program since.

        Raises:
            InvalidArgumentError: *name* leads out of the directory.

            KernelError: There is no such file (ENOENT).

            AccessError, TargetGoneError, ClosedError: As for the object itself.
        """
        if not name or name.startswith("/") or ".." in name.split("/"):
            raise InvalidArgumentError(f"{name!r} is no file of a process").with_hint('give "smaps", "task/1/stat"')
        files = self._used()
        try:
            return self._open(name, files.process)
        finally:
            del files  # somebody may keep this frame, in an exception's traceback

    def _used(self) -> _Files:
        """The open descriptors, to be held by whoever uses them."""
        files = self._files
        if files is None:
            raise ClosedError(f"the pagemap of {self.pid} is closed").with_hint("open another one")
        if self.pid == "self" and not self._own:
            raise ClosedError(
                f"this is the pagemap of process {self._owner}, which process {os.getpid()} was forked from"
            ).with_hint("open another one in the child, or the parent's by its pid")
        return files

    @property
    def _own(self) -> bool:
        return self._owner == os.getpid()

    def _open(self, name: str, process: int | None) -> int:
        """Open a file in the directory of the process, or with None the directory in which it is to be."""
        path = f"/proc/{self.pid}/{name}"
        try:
            if process is None:
                return os.open(f"/proc/{self.pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
        except OSError as error:
            number = error.errno or 0
            if number == ESRCH and process is not None:
                raise _no_memory(self.pid, f"open {path}") from error
            if number == ENOENT and process is not None and _is_there(process):
                raise KernelError.make(
                    number, f"open {path}", "a process has no such file here", hint="proc_pid(5) lists them"
                ) from error
            if number in (ENOENT, ESRCH):
                raise TargetGoneError.make(
                    ESRCH, f"open {path}", f"there is no process {self.pid}", hint="it ended, or /proc is not mounted"
                ) from error
            if number in (EACCES, EPERM):
                hint = (
                    NOT_DUMPABLE_HINT
                    if self._own
                    else "it belongs to another user or is protected: CAP_SYS_PTRACE is needed"
                )
                raise AccessError.make(number, f"open {path}", os.strerror(number), hint=hint) from error
            remedy = "see ulimit -n" if number in (EMFILE, ENFILE) else None
            raise KernelError.make(number, f"open {path}", os.strerror(number), hint=remedy) from error

    def _check_memory(self, fd: int) -> None:
        # The pagemap of a zombie or kernel thread opens too. Its words are none; the ioctl on it is, on some kernels up
        # to 6.15, a NULL dereference in the kernel (65c66047259f). A descriptor keeps the memory it was opened on.
        if not os.pread(fd, _WORD_SIZE, 0):
            raise _no_memory(self.pid, f"read /proc/{self.pid}/pagemap")

    def fileno(self) -> int:
        """The descriptor of /proc/PID/pagemap."""
        return self._used().pagemap

    def close(self) -> None:
        """Close the descriptors, once the calls that run in other threads have ended. Idempotent."""
        self._files = None

    def __reduce__(self) -> NoReturn:
        """Neither copied nor pickled: a copy's end would close its descriptors."""
        raise TypeError(f"the Pagemap of {self.pid} cannot be copied; open another")

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def scan(self, memory: Memory, query: ScanQuery, *, max_pages: int | None = None) -> ScanResult:
        """Return the pages of *memory* that match *query*. Changes nothing.

        Where the ioctl is, the answer is the kernel's own; where it is not, it comes from pagemap words, the same but
        for what words cannot tell. Unmapped addresses are skipped. Cost: 0.7 to 10 ns a page by the ioctl, 7 to 15 by
        words.

        Args:
            memory: In the process that was opened. Read-only buffers are welcome.

            query: See `ScanQuery`.

            max_pages: Stop after this many pages; `resume_at` says where to go on.

        Raises:
            AlignmentError: The memory does not begin and end on page boundaries.

            InvalidArgumentError: *max_pages* is below 1; or, by the ioctl, the memory goes beyond the user's address
                space, which words read as unmapped.

            UnsupportedError: A category that this kernel does not have (EINVAL), or that words cannot tell
                (EOPNOTSUPP).

            TargetGoneError: The process ended (ESRCH).

            ClosedError: This is closed.

        Source: fs/proc/task_mmu.c, do_pagemap_scan.
        """
        limit = check_max_pages(max_pages)
        if not isinstance(query, ScanQuery):
            error = TypeError(f"{type(query).__name__} is no query")
            error.add_note("hint: give a ScanQuery, as ScanQuery(report=PageCategory.PRESENT)")
            raise error
        self.fileno()
        pinned = pin(memory, writable=False)
        files = None
        try:
            files = self._used()
            asked = pinned.range
            if query.never:
                result = _kernel.new_result()
                result.walk_end = asked.end
                return ScanResult(result, asked, asked.start, pinned.length)
            if not self._ioctl:
                self._check_words(query.mentioned)
            masks = (query.inverted, query.all_of, query.any_of, query.report)
            known = [] if self._ioctl else registered()
            with self._maps(files) as maps:
                rc, result = _kernel.query(
                    files.pagemap, maps, asked.start, asked.end, masks, limit, known, drop_empty=query.drop_empty
                )
            if rc < 0:
                self._fail(-rc, files.pagemap, query, asked, _kernel.operation(result))
            return ScanResult(result, asked, asked.start, pinned.length)
        finally:
            pinned.release()
            del files  # somebody may keep this frame, in an exception's traceback

    @contextlib.contextmanager
    def _maps(self, files: _Files) -> Iterator[int]:
        """The descriptor of maps while it is this call's alone; -1 where the ioctl needs none."""
        maps = files.maps
        if maps is None:
            yield -1
            return
        if maps.is_inherited:
            maps = files.maps = _Maps(self._open("maps", files.process))
        with maps.lock:
            yield maps.fd

    def _check_words(self, mentioned: PageCategory) -> None:
        if not self._own:
            self._refuse_any(mentioned & (PageCategory.WRITTEN | PageCategory.WPALLOWED), "of another process")
        for category, feature in _SHOWN_BY.items():
            if not probe().supports(feature):
                self._refuse_any(mentioned & category, f"on a kernel without {feature.value}")

    def _refuse_any(self, categories: PageCategory, where: str) -> None:
        if categories:
            raise UnsupportedError.make(
                EOPNOTSUPP,
                "/proc/PID/pagemap",
                f"{categories.name or int(categories)} cannot be told {where} without PAGEMAP_SCAN",
                hint=f"ask for other categories, or run on a kernel with feature {Feature.PAGEMAP_SCAN.value}",
            )

    def _fail(self, number: int, fd: int, query: ScanQuery, asked: AddressRange, operation: str) -> NoReturn:
        if number == EOPNOTSUPP:
            self._refuse_any(query.mentioned & ~_kernel.TELLABLE, "from pagemap words")
        if number == EINVAL:
            for bit in (PageCategory(1 << i) for i in range(64) if query.mentioned >> i & 1):
                if _kernel.pagemap_scan(fd, 0, 0, report=bit)[0] == -EINVAL:
                    raise UnsupportedError.make(
                        EINVAL, operation, f"this kernel has no category {bit!r}", range=asked, hint="leave it out"
                    )
        if number == ESRCH:
            raise TargetGoneError.make(
                ESRCH, operation, f"process {self.pid} has no memory any more", range=asked, hint=_GONE_HINT
            )
        if number == EFAULT:
            raise _beyond(asked)
        hint = _LOST_FILE_HINT if number in LOST_FILE else None
        raise KernelError.make(number, operation, os.strerror(number), range=asked, hint=hint)

    def entries(self, memory: Memory) -> Iterator[PagemapEntry]:
        """Decode the word of every page of *memory*, in order. Unmapped pages are words of 0.

        Reads 64 KiB of words at a time, as the iterator gets there. Cost: about a microsecond a page.

        Raises:
            TargetGoneError: The process ended.

            InvalidArgumentError: There is no such address space.

            KernelError: Somebody closed or replaced the descriptor.
        """
        pinned = pin(memory, writable=False)
        try:
            asked = pinned.range
        finally:
            pinned.release()
        self.fileno()
        return self._entries(asked)

    def _entries(self, asked: AddressRange) -> Iterator[PagemapEntry]:
        at = (asked.start >> PAGE_SHIFT) * _WORD_SIZE
        end = (asked.end >> PAGE_SHIFT) * _WORD_SIZE
        while at < end:
            words = self._read_words(at, min(end - at, 1 << 16), asked)
            for (word,) in iter_unpack("=Q", words):
                yield PagemapEntry.decode(word)
            at += len(words)

    def _read_words(self, at: int, size: int, asked: AddressRange) -> bytes:
        operation = f"read /proc/{self.pid}/pagemap"
        files = self._used()
        try:
            words = os.pread(files.pagemap, size, at)
            is_there = bool(words or os.pread(files.pagemap, _WORD_SIZE, 0))
        except OSError as error:
            number = error.errno or 0
            hint = _LOST_FILE_HINT if number in LOST_FILE else None
            raise KernelError.make(number, operation, os.strerror(number), range=asked, hint=hint) from error
        finally:
            del files
        if not is_there:
            raise TargetGoneError.make(ESRCH, operation, "no memory there", range=asked, hint=_GONE_HINT)
        if not words:
            raise _beyond(asked)
        return words


_GONE_HINT = "the process ended, or runs another program now"


def _checked(pid: SupportsIndex | Literal["self"]) -> int | Literal["self"]:
    if pid == "self":
        return "self"
    number = -1 if isinstance(pid, (bool, str)) or not hasattr(pid, "__index__") else operator.index(pid)
    if number <= 0:
        raise InvalidArgumentError(f"{pid!r} is not a process id").with_hint('give a positive number, or "self"')
    return number


def _is_there(process: int) -> bool:
    """Whether a directory of /proc is still that of a process."""
    try:
        os.stat("stat", dir_fd=process)
    except OSError:
        return False
    return True


def _is_own(pid: int | str) -> bool:
    # /proc may be that of another pid namespace, in which a process has another pid.
    if pid == "self":
        return True
    try:
        return str(Path("/proc/self").readlink()) == str(pid)
    except OSError:
        return False


def _no_memory(pid: int | str, operation: str) -> TargetGoneError:
    return TargetGoneError.make(
        ESRCH,
        operation,
        f"process {pid} has no memory",
        hint="it ended and its parent has yet to notice, or it is a kernel thread",
    )


def _beyond(asked: AddressRange) -> InvalidArgumentError:
    return InvalidArgumentError(f"{asked} is not in the user's address space").with_hint(
        "end it where the last mapping of /proc/PID/maps ends, [vsyscall] left out"
    )
