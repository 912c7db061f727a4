"""Random programs, run side by side on equal memories of several backends, against a model of what each must report.

A program is a list of steps: stores, kernel writes, whatever else happens to memory, and what readers ask. No threads
of its own run, so every answer is known: the pages that must be in it, and those that may. Swap and ksmd are used where
they are there.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import random
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from errno import errorcode

import attrs
from children import Raw, plain
from conftest import FLAVOURS, HUGE_PAGES, PAGE, PRESENT, PRIVATE, Flavour, environment, ksmd, libc, marked, merged

from pagemapcompat import (
    AddressRange,
    Cursor,
    Feature,
    Guarantee,
    KernelError,
    NotTrackedError,
    PageCategory,
    PagemapCompatError,
    ScanResult,
    TrackedRange,
    _kernel,
    probe,
)

PAGES = {"private": 72, "shared": 72, "huge": 2 * HUGE_PAGES}
"""Kinds of memory and their sizes: private, shared, and private with transparent huge pages."""
POLICIES = ("raise", "rearm")
SPANS = (1, 1, 1, 2, 3, 8, 30, HUGE_PAGES)
KERNEL_PAGES = 8
"""Most that one kernel write fills: a socket's buffer holds as much."""
MADV_FREE, MERGEABLE, HUGEPAGE, NOHUGEPAGE, PAGEOUT, COLLAPSE = 8, 12, 14, 15, 21, 25
NONE, READ, WRITABLE = 0, 1, 3
KSM_SECONDS = 5
"""How long one process waits for ksmd, before the last time."""

_PLACE, _ROOM = 1 << 45, 1 << 33  # where the kernel puts no mapping by itself, so that a hole stays one


@attrs.frozen
class Step:
    """One step: what, on which pages, and a number from which the operation takes the rest."""

    name: str
    lo: int
    hi: int
    value: int


@attrs.define
class Counts:
    """How much was done."""

    operations: int = 0
    written: int = 0
    """Pages, by user and kernel, on one side."""
    reported: int = 0
    """Pages, to all readers of all sides."""
    effects: Counter[str] = attrs.field(factory=Counter, eq=False)
    """Steps that did what they are for, by operation. What the kernel does is its own affair, the next time too."""
    refused: Counter[str] = attrs.field(factory=Counter, eq=False)
    """Advice that it did not take, by operation and errno."""


class Finding(AssertionError):
    """A program that went wrong: `replay` with its arguments does it again."""


def runs(pages: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Stretches of consecutive pages, ends exclusive."""
    start = end = None
    for page in sorted(pages):
        if page != end:
            if start is not None and end is not None:
                yield start, end
            start = page
        end = page + 1
    if start is not None and end is not None:
        yield start, end


class Memory:
    """What the memory is, by the model; the same on every side."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.pages = PAGES[kind]
        self.content = bytearray(self.pages * PAGE)
        self.mapped = set(range(self.pages))
        self.protection = [WRITABLE] * self.pages
        self.guards: set[int] = set()
        self.populated: set[int] = set()
        self.freed: set[int] = set()  # what they hold, or zeros: the kernel decides, and when
        self.mergeable: set[int] = set()  # which the kernel may merge at any time, if it does that

    @property
    def unsteady(self) -> set[int]:
        """What the kernel may change at any time, so that it looks written."""
        return self.freed | self.mergeable

    def writable(self, lo: int, hi: int) -> set[int]:
        """Of [lo, hi)."""
        return {page for page in self.readable(lo, hi) if self.protection[page] == WRITABLE}

    def readable(self, lo: int, hi: int) -> set[int]:
        """Of [lo, hi)."""
        return {page for page in self.there(lo, hi) - self.guards if self.protection[page] != NONE}

    def there(self, lo: int, hi: int) -> set[int]:
        """What of [lo, hi) is mapped."""
        return self.mapped & set(range(lo, hi))

    def write(self, at: int, data: bytes) -> None:
        """At a byte."""
        self.content[at : at + len(data)] = data
        pages = range(at // PAGE, -(-(at + len(data)) // PAGE))
        self.populated.update(pages)
        self.freed.difference_update(pages)

    def lose(self, pages: Iterable[int]) -> None:
        """They are empty from now on."""
        for page in pages:
            self.content[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
            self.populated.discard(page)
            self.freed.discard(page)

    def agrees(self, page: int, found: bytes) -> bool:
        """Whether a page may hold these bytes."""
        expected = self.content[page * PAGE : (page + 1) * PAGE]
        return found == expected or (page in self.freed and not any(found))


@attrs.define(eq=False)
class Reader:
    """A cursor, and what it is due."""

    cursor: Cursor
    must: set[int] = attrs.field(factory=set)
    may: set[int] = attrs.field(factory=set)


class Due:
    """What the readers of one side are due, by what design.md and the README promise of its backend."""

    def __init__(self, memory: Memory, *, discards: bool, words: bool, marks_empty: bool) -> None:
        self._memory = memory
        self._discards = discards
        self._words = words
        self._marks_empty = marks_empty
        self.readers: list[Reader] = []
        self.untracked: set[int] = set()
        # Without DISCARDS "a page discarded or merged by the kernel (KSM) and then written again" is not reported,
        # until it is protected again. A limit that is reached passes over it without that, looking for more.
        self._unwatched: set[int] = set()
        # With uffd-wp "a guard page (before 6.4 also a PROT_NONE page) that was reported as such, then opened, written,
        # read, discarded and barred again before the next call" is not; before 6.4 the last is not needed, for what is
        # empty again cannot be marked either. By page: who was due it when it was found unmarkable.
        self._quiet: dict[int, frozenset[Reader]] = {}

    # -- What happens to memory ---------------------------------------------------------------------------------

    def _add(self, must: Iterable[int] = (), may: Iterable[int] = ()) -> None:
        for reader in self.readers:
            reader.must.update(must)
            reader.may.update(may)

    def wrote(self, pages: set[int]) -> None:
        """Somebody stored to them; before the memory forgets what was freed."""
        missed = set() if self._discards else self._unwatched | self._memory.unsteady
        self._add(pages - missed, pages & missed)
        self._unwatched |= pages & missed

    def read(self, pages: set[int]) -> None:
        """Somebody read them. What nobody could mark while it was empty looks written when that populates it."""
        if not self._marks_empty:
            self._add(may=pages & set(self._quiet) - self._memory.populated)

    def lost(self, pages: set[int]) -> None:
        """They were discarded; before the memory forgets what they held."""
        if self._discards and self._memory.kind != "shared":
            self._add(pages & self._memory.populated - self._memory.freed)
        self._add(may=pages)
        self._unwatched |= pages

    def replaced(self, pages: set[int]) -> None:
        """They became guard pages, or ceased to be: "reported at most once"."""
        self._add(may=pages)
        self._unwatched |= pages

    def gone(self, pages: set[int]) -> None:
        """They are mapped no more."""
        for reader in self.readers:
            reader.must -= pages
            reader.may -= pages
        self.untracked -= pages
        self._unwatched -= pages
        for page in pages:
            self._quiet.pop(page, None)

    def mapped(self, pages: set[int]) -> None:
        """They were mapped anew, or moved here."""
        self.gone(pages)
        self.untracked |= pages

    def _is_unmarkable(self, page: int) -> bool:
        holds = page in self._memory.populated and page not in self._memory.freed
        return page in self._memory.guards or not (self._marks_empty or holds)

    # -- What readers do ----------------------------------------------------------------------------------------

    def expected(self, reader: Reader, lo: int, hi: int) -> tuple[set[int], set[int]]:
        """What the reader must find in [lo, hi), and what it may."""
        inside = self._memory.there(lo, hi)
        overlooked = {page for page, due in self._quiet.items() if self._is_unmarkable(page) and reader not in due}
        must = (reader.must - overlooked) | self.untracked
        may = must | reader.must | reader.may | self._memory.unsteady
        return must & inside, may & inside

    def armed(self, lo: int, hi: int, by: Reader | None = None, *, protected: int | None = None) -> None:
        """[lo, hi) was asked for, and protected up to a page; what of it one reader was due is settled."""
        inside = set(range(lo, hi))
        if by:
            by.must -= inside
            by.may -= inside
        self._unwatched -= {page for page in inside if protected is None or page < protected}
        for page in self._memory.there(lo, hi) if self._words else ():
            was = self._quiet.pop(page, None)
            if not self._is_unmarkable(page):
                continue
            for reader in self.readers if was is not None else ():
                if reader not in was and page in reader.must:  # nobody could see it, and nobody will
                    reader.must.discard(page)
                    reader.may.add(page)
            if was is not None or page in self._memory.guards or self._memory.protection[page] == NONE:
                self._quiet[page] = frozenset(one for one in self.readers if page in one.must)

    def rearmed(self, lo: int, hi: int, by: Reader | None = None) -> None:
        """What was untracked of [lo, hi) is tracked again, and written for all but one."""
        pages = self.untracked & set(range(lo, hi))
        for reader in self.readers:
            if reader is not by:
                reader.must |= pages
        self.untracked -= pages
        for start, end in runs(pages):
            self.armed(start, end)


class Side:
    """One backend with its memory, tracker and readers."""

    def __init__(self, flavour: Flavour, memory: Memory, number: int, policy: str, counts: Counts) -> None:
        self.flavour = flavour
        self.memory = memory
        self.policy = policy
        self.counts = counts
        self.place = AddressRange.from_length(_PLACE + number * _ROOM, memory.pages * PAGE)
        self.spare = self.place.start + _ROOM // 2
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS if memory.kind == "shared" else PRIVATE
        self.map = lambda lo, hi: libc.mmap((hi - lo) * PAGE, address=self.at(lo), flags=flags)
        self.map(0, memory.pages)
        if memory.kind == "huge":
            libc.madvise(self.place.start, self.place.length, HUGEPAGE)
        with environment(flavour):
            self.tracker = flavour.tracker(on_untracked=policy)
            marks_empty = probe().supports(Feature.UFFD_WP_UNPOPULATED, Feature.PAGEMAP_UFFD_WP)
        self._traits = {"words": flavour.backend == "uffd-wp", "marks_empty": marks_empty}
        self.ram: TrackedRange
        self.due: Due
        self.track()

    def track(self) -> None:
        """Start clean."""
        self.ram = self.tracker.track(self.place)
        self.due = Due(self.memory, discards=Guarantee.DISCARDS in self.ram.guarantees, **self._traits)
        self.due.readers.append(Reader(self.ram))
        self.due.armed(0, self.memory.pages)

    def close(self) -> None:
        """Leave nothing behind."""
        for reader in self.due.readers:
            reader.cursor.close()
        self.tracker.close()
        libc.munmap(self.place.start, self.place.length)

    def at(self, page: int) -> int:
        """Where a page begins."""
        return self.place.start + page * PAGE

    def advise(self, pages: Iterable[int], advice: int) -> None:
        """madvise(2)."""
        for lo, hi in runs(pages):
            libc.madvise(self.at(lo), (hi - lo) * PAGE, advice)

    def suggest(self, what: str, pages: Iterable[int], advice: int) -> bool:
        """madvise(2), which may be refused. Whether it was not."""
        try:
            self.advise(pages, advice)
        except OSError as error:
            self.counts.refused[f"{what} {errorcode.get(error.errno or 0)}"] += 1
            return False
        return True

    def present(self) -> set[int]:
        """What is in memory."""
        return marked(self.place.start, self.memory.pages, PRESENT)

    def merged(self) -> set[int]:
        """What the kernel has merged."""
        return merged(self.place.start, self.memory.pages)

    def huge(self) -> int:
        """KiB of it in transparent huge pages."""
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as smaps:
            found, inside = 0, False
            for line in smaps:
                first, *rest = line.split()
                if not first.endswith(":"):
                    inside = self.place.start <= int(first.split("-")[0], 16) < self.place.end
                elif inside and first == "AnonHugePages:":
                    found += int(rest[0])
        return found

    def read(self, pages: set[int]) -> None:
        """Memory is what the model says."""
        self.due.read(pages)
        for lo, hi in runs(pages):
            found = ctypes.string_at(self.at(lo), (hi - lo) * PAGE)
            if found != self.memory.content[lo * PAGE : hi * PAGE]:
                for page in range(lo, hi):
                    one = found[(page - lo) * PAGE : (page - lo + 1) * PAGE]
                    assert self.memory.agrees(page, one), f"{self.flavour.name}: page {page} holds something else"

    # -- Answers --------------------------------------------------------------------------------------------------

    def pages(self, result: ScanResult) -> set[int]:
        """Of a result, which is well-formed."""
        end = 0
        for region in result:
            assert region.categories == PageCategory.WRITTEN
            assert end < region.start < region.end, "regions ascend and are merged"
            end = region.end
        found = set(result.page_indices())
        assert len(found) == result.pages
        return found

    def check(self, reader: Reader, found: set[int], lo: int, hi: int) -> None:
        """An answer for [lo, hi) has what it must, and nothing that it may not."""
        must, may = self.due.expected(reader, lo, hi)
        who = f"{self.flavour.name}, reader {self.due.readers.index(reader)}, [{lo}, {hi})"
        assert not must - found, f"{who}: missed {sorted(must - found)}"
        assert not found - may, f"{who}: not written {sorted(found - may)}"

    def check_result(self, reader: Reader, result: ScanResult, lo: int, hi: int, limit: int | None) -> int:
        """What a peek or a collect of [lo, hi) returned. Returns the page where it stopped."""
        found = self.pages(result)
        stop = hi
        if not result.complete:
            assert limit is not None
            assert result.pages == limit
            assert result.resume_at is not None
            stop = result.resume_at // PAGE
            assert stop in self.due.expected(reader, lo, hi)[1], "it stops where more is written"
        elif limit is not None:
            assert result.pages <= limit
        self.check(reader, found, lo, stop)
        return stop

    def check_error(self, error: NotTrackedError, lo: int, hi: int) -> int:
        """It names the first untracked stretch of [lo, hi), whose first page is returned."""
        assert error.range is not None
        first = (error.range.start - self.place.start) // PAGE
        stretch = set(range(first, (error.range.end - self.place.start) // PAGE))
        untracked = self.due.untracked & set(range(lo, hi))
        assert first == min(untracked, default=None)
        assert stretch <= untracked
        return first

    def first_untracked(self, lo: int, hi: int) -> int:
        """Page of [lo, hi), or hi."""
        return min(self.due.untracked & set(range(lo, hi)), default=hi)

    def peek(self, reader: Reader, lo: int, hi: int, limit: int | None) -> set[int]:
        """Changes nothing, raises nothing."""
        result = reader.cursor.peek(lo * PAGE, hi * PAGE, max_pages=limit)
        self.check_result(reader, result, lo, hi, limit)
        return self.pages(result)

    def collect(self, reader: Reader, lo: int, hi: int, limit: int | None) -> set[int] | None:
        """Takes what it returns. None: it met untracked memory."""
        try:
            result = reader.cursor.collect(lo * PAGE, hi * PAGE, max_pages=limit)
        except NotTrackedError as error:
            assert self.policy == "raise"
            stop = self.check_error(error, lo, hi)
            assert error.collected is not None
            found = self.pages(error.collected)
            assert error.collected.resume_at == stop * PAGE
            assert limit is None or len(found) < limit, "a limit that is reached comes first"
            self.check(reader, found, lo, stop)
            self.due.armed(lo, stop, reader)
            self.counts.reported += len(found)
            return None
        stop = self.check_result(reader, result, lo, hi, limit)
        if self.policy == "raise":
            assert self.first_untracked(lo, stop) == stop, "untracked memory is not passed over"
        else:
            # A stretch that was begun is tracked as a whole.
            begun = stop
            while begun < hi and lo < begun and {begun - 1, begun} <= self.due.untracked:
                begun += 1
            self.due.rearmed(lo, begun)
        found = self.pages(result)
        self.due.armed(lo, stop, reader, protected=max(found) + 1 if len(found) == limit else stop)
        self.counts.reported += len(found)
        return found

    def reset(self, reader: Reader, lo: int, hi: int) -> None:
        """Settles [lo, hi), for one reader."""
        stop = hi
        try:
            reader.cursor.reset(lo * PAGE, hi * PAGE)
        except NotTrackedError as error:
            assert self.policy == "raise"
            stop = self.check_error(error, lo, hi)
        else:
            assert self.policy == "rearm" or self.first_untracked(lo, hi) == hi
        self.due.rearmed(lo, stop, reader)
        self.due.armed(lo, stop, reader)

    def unprotect(self, lo: int, hi: int) -> None:
        """All of it that is mapped is written, for all; untracked memory is refused whatever the policy."""
        stop = hi
        try:
            self.ram.unprotect(lo * PAGE, hi * PAGE)
        except NotTrackedError as error:
            stop = self.check_error(error, lo, hi)
        else:
            assert self.first_untracked(lo, hi) == hi
        pages = self.memory.there(lo, stop)
        for reader in self.due.readers:
            reader.must |= pages

    def rearm(self, lo: int, hi: int) -> None:
        """What was untracked is written, for all."""
        self.ram.rearm(lo * PAGE, hi * PAGE)
        self.due.rearmed(lo, hi)

    def cursor(self) -> None:
        """One reader more, to whom nothing is written yet."""
        reader = None
        try:
            reader = Reader(self.ram.cursor())
        except NotTrackedError as error:
            assert self.policy == "raise"
            stop = self.check_error(error, 0, self.memory.pages)
        else:
            assert self.policy == "rearm" or not self.due.untracked
            stop = self.memory.pages
        self.due.rearmed(0, stop)
        self.due.armed(0, stop)
        if reader:
            self.due.readers.append(reader)


class Program:
    """What runs: one memory, by the model, and as many real ones as there are sides."""

    def __init__(self, flavours: Sequence[Flavour], kind: str, policy: str) -> None:
        self.memory = Memory(kind)
        self.counts = Counts()
        self.done: list[Step] = []
        self.failed = False
        self._arguments = (flavours, kind, policy)
        self._file = os.memfd_create("programs")
        self._sockets = socket.socketpair()
        self._children = Raw()
        self.sides: list[Side] = []
        try:
            for number, flavour in enumerate(flavours):
                self.sides.append(Side(flavour, self.memory, number, policy, self.counts))
        except BaseException:
            self.close()
            raise
        self._kernel_writes = all(Guarantee.KERNEL_WRITES in side.ram.guarantees for side in self.sides)
        self._guards = kind != "shared" and probe().supports(Feature.MADV_GUARD)

    def step(self, step: Step) -> None:
        """Do one."""
        self.done.append(step)
        self.counts.operations += 1
        try:
            if getattr(self, f"do_{step.name}")(step.lo, step.hi, step.value):
                self.counts.effects[step.name] += 1
        except (AssertionError, OSError, PagemapCompatError) as error:
            raise self._finding(error) from error

    def _finding(self, error: Exception) -> Finding:
        self.failed = True
        flavours, kind, policy = self._arguments
        steps = "\n".join(f"    {attrs.astuple(step)}," for step in self.done)
        names = ", ".join(flavour.name for flavour in flavours)
        return Finding(f"{type(error).__name__}: {error}\n{names}; {kind}, on_untracked={policy}\n[\n{steps}\n]")

    def finish(self) -> None:
        """Every reader gets what it is due, memory is what it should be, and nothing is owed."""
        try:
            self._finish()
        except (AssertionError, OSError, PagemapCompatError) as error:
            raise self._finding(error) from error

    def _finish(self) -> None:
        pages = self.memory.pages
        for side in self.sides:
            side.read(self.memory.readable(0, pages))
            side.rearm(0, pages)
            for reader in side.due.readers:
                assert side.collect(reader, 0, pages, None) is not None
            # What the kernel did between the collects of two readers, one of them is owed.
            assert side.tracker.statistics().owed_pages <= len(self.memory.unsteady) * len(side.due.readers)
            for lo, hi in runs(self.memory.mapped - self.memory.readable(0, pages) - self.memory.guards):
                libc.mprotect(side.at(lo), (hi - lo) * PAGE, READ)
                side.read(set(range(lo, hi)))

    def close(self) -> None:
        """Leave nothing behind."""
        for side in self.sides:
            side.close()
        self._children.end()
        for one in self._sockets:
            one.close()
        os.close(self._file)

    # -- Writes -------------------------------------------------------------------------------------------------
    # Every operation says whether it did what it is for.

    def _wrote(self, pages: set[int]) -> None:
        self.counts.written += len(pages)
        for side in self.sides:
            side.due.wrote(pages)

    def do_store(self, lo: int, hi: int, value: int) -> bool:
        """A byte into each page; or all of a page of which it is not known what else it holds."""
        pages = self.memory.writable(lo, hi)
        self._wrote(pages)
        for page in pages:
            freed = page in self.memory.freed
            at, data = (0, bytes([value]) * PAGE) if freed else (value * PAGE // 256, bytes([value]))
            for side in self.sides:
                libc.fill(side.at(page) + at, len(data), value)
            self.memory.write(page * PAGE + at, data)
        return bool(pages)

    def do_fill(self, lo: int, hi: int, value: int) -> bool:
        """Many pages."""
        pages = self.memory.writable(lo, hi)
        self._wrote(pages)
        for start, end in runs(pages):
            for side in self.sides:
                libc.fill(side.at(start), (end - start) * PAGE, value)
            self.memory.write(start * PAGE, bytes([value]) * ((end - start) * PAGE))
        return bool(pages)

    def do_kernel_write(self, lo: int, hi: int, value: int) -> bool:
        """The kernel stores, in one of four ways."""
        if not self._kernel_writes:
            return self.do_fill(lo, hi, value)
        pages = self.memory.writable(lo, min(hi, lo + KERNEL_PAGES))
        self._wrote(pages)
        write = (self._preadv, self._readinto, self._receive, self._process_vm_writev)[value % 4]
        for start, end in runs(pages):
            data = bytes([value]) * ((end - start) * PAGE)
            for side in self.sides:
                buffer = (ctypes.c_char * len(data)).from_address(side.at(start))
                assert write(memoryview(buffer).cast("B"), data) == len(data)
            self.memory.write(start * PAGE, data)
        return bool(pages)

    def _preadv(self, buffer: memoryview, data: bytes) -> int:
        os.pwrite(self._file, data, 0)
        return os.preadv(self._file, [buffer], 0)

    def _readinto(self, buffer: memoryview, data: bytes) -> int:
        os.pwrite(self._file, data, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        with open(self._file, "rb", buffering=0, closefd=False) as file:
            return file.readinto(buffer) or 0

    def _receive(self, buffer: memoryview, data: bytes) -> int:
        ours, theirs = self._sockets
        theirs.sendall(data)
        return ours.recv_into(buffer, len(data), socket.MSG_WAITALL)

    def _process_vm_writev(self, buffer: memoryview, data: bytes) -> int:
        source = ctypes.create_string_buffer(data, len(data))
        size = ctypes.c_size_t(len(data))
        local = (ctypes.c_size_t * 2)(ctypes.addressof(source), size.value)
        remote = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), size.value)
        return int(plain.process_vm_writev(os.getpid(), local, 1, remote, 1, 0))

    # -- What else happens to memory --------------------------------------------------------------------------------

    @staticmethod
    def _some(pages: set[int], lo: int, hi: int) -> set[int]:
        """Those in [lo, hi); where there are none, as many of the others: of few pages it is rarely that any are."""
        return pages & set(range(lo, hi)) or set(sorted(pages)[: hi - lo])

    def do_read(self, lo: int, hi: int, _value: int) -> bool:
        """Memory is what the model says; and reading is not writing."""
        pages = self.memory.readable(lo, hi)
        for side in self.sides:
            side.read(pages)
        self.memory.populated |= pages
        return bool(pages)

    def do_protect(self, lo: int, hi: int, value: int) -> bool:
        """mprotect(2)."""
        protection = (NONE, READ, WRITABLE)[value % 3]
        pages = self.memory.there(lo, hi)
        changed = {page for page in pages if self.memory.protection[page] != protection}
        for start, end in runs(pages):
            for side in self.sides:
                libc.mprotect(side.at(start), (end - start) * PAGE, protection)
            self.memory.protection[start:end] = [protection] * (end - start)
        return bool(changed)

    def do_discard(self, lo: int, hi: int, _value: int) -> bool:
        """MADV_DONTNEED. Shared memory keeps what it holds; so do guard pages, being what they are."""
        pages = self.memory.there(lo, hi)
        held = pages & self.memory.populated
        for side in self.sides:
            side.due.lost(pages - self.memory.guards)
            side.advise(pages, mmap.MADV_DONTNEED)
        if self.memory.kind != "shared":
            self.memory.lose(pages)
        return bool(held)

    def do_free(self, lo: int, hi: int, _value: int) -> bool:
        """MADV_FREE: the kernel may discard them, until they are written."""
        if self.memory.kind == "shared":
            return False
        pages = self._some(self.memory.populated - self.memory.freed, lo, hi)
        for side in self.sides:
            side.advise(pages, MADV_FREE)
        self.memory.freed |= pages
        return bool(pages)

    def do_bar(self, lo: int, hi: int, _value: int) -> bool:
        """MADV_GUARD_INSTALL: what they held is gone."""
        if not self._guards:
            return False
        pages = self.memory.there(lo, hi) - self.memory.guards
        for side in self.sides:
            side.due.replaced(pages)
            side.advise(pages, libc.GUARD_INSTALL)
        self.memory.lose(pages)
        self.memory.guards |= pages
        return bool(pages)

    def do_open(self, lo: int, hi: int, _value: int) -> bool:
        """MADV_GUARD_REMOVE."""
        pages = self._some(self.memory.guards, lo, hi)
        for side in self.sides:
            side.due.replaced(pages)
            side.advise(pages, libc.GUARD_REMOVE)
        self.memory.guards -= pages
        return bool(pages)

    def do_unmap(self, lo: int, hi: int, _value: int) -> bool:
        """munmap(2): a hole."""
        pages = self.memory.there(lo, hi)
        for side in self.sides:
            side.due.gone(set(range(lo, hi)))
            libc.munmap(side.at(lo), (hi - lo) * PAGE)
        self._forget(pages)
        self.memory.mapped -= pages
        return bool(pages)

    def _forget(self, pages: set[int]) -> None:
        self.memory.lose(pages)
        self.memory.guards -= pages
        self.memory.mergeable -= pages

    def do_map(self, lo: int, hi: int, value: int) -> bool:
        """mmap(2) of the holes; or over all of it."""
        pages = set(range(lo, hi)) - (self.memory.mapped if value % 3 else set())
        for side in self.sides:
            side.due.mapped(pages)
            for start, end in runs(pages):
                side.map(start, end)
        self._forget(pages)
        self.memory.mapped |= pages
        for page in pages:
            self.memory.protection[page] = WRITABLE
        return bool(pages)

    def do_move(self, lo: int, hi: int, _value: int) -> bool:
        """mremap(2) somewhere else, page by page, and back."""
        pages = self.memory.there(lo, min(hi, lo + KERNEL_PAGES))
        for side in self.sides:
            for page in pages:
                libc.mremap(side.at(page), PAGE, side.spare)
                libc.mremap(side.spare, PAGE, side.at(page))
            side.due.mapped(pages)
        return bool(pages)

    def do_take_away(self, lo: int, hi: int, _value: int) -> bool:
        """mremap(2) with MREMAP_DONTUNMAP: the mapping stays, its pages go."""
        if self.memory.kind == "shared":
            return False
        pages = self.memory.there(lo, min(hi, lo + KERNEL_PAGES)) - self.memory.guards
        held = pages & self.memory.populated
        for side in self.sides:
            side.due.lost(pages)
            for page in pages:
                assert _kernel.mremap_pages(side.at(page), side.spare, PAGE) == 0
                libc.munmap(side.spare, PAGE)
        self.memory.lose(pages)
        return bool(held)

    def do_fork(self, lo: int, hi: int, value: int) -> bool:
        """A child writes to its copy and ends; or does nothing, and stays. Shared memory is written unseen."""
        if value % 2 and len(self._children.pids) < 2:
            self._children.fork()
            return True
        pages = self.memory.writable(lo, min(hi, lo + KERNEL_PAGES)) - self.memory.freed
        pid = plain.fork()
        if not pid:
            for side in self.sides:
                for page in pages:
                    plain.memset(ctypes.c_void_p(side.at(page)), value, PAGE)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        if self.memory.kind == "shared":
            for page in pages:
                self.memory.content[page * PAGE : (page + 1) * PAGE] = bytes([value]) * PAGE
        return bool(pages)

    def do_swap_out(self, lo: int, hi: int, _value: int) -> bool:
        """MADV_PAGEOUT: advice; without swap it takes only what was freed."""
        pages = self.memory.there(lo, hi)
        gone: set[int] = set()
        for side in self.sides:
            before = side.present()
            side.suggest("swap_out", pages, PAGEOUT)
            gone |= before - side.present()
        return bool(gone & pages - self.memory.freed)

    def do_merge(self, lo: int, hi: int, _value: int) -> bool:
        """MADV_MERGEABLE: if ksmd runs it merges what is equal, here and wherever else it may. Private memory only."""
        if self.memory.kind == "shared":
            return False
        pages = self._some(self.memory.populated, lo, hi)
        taken = [side.suggest("merge", pages, MERGEABLE) for side in self.sides]
        if not (pages and all(taken)):
            return False
        self.memory.mergeable |= pages
        # It may be slow, for it goes through every guest of the machine: then it is not waited for each time.
        return ksmd.waited < KSM_SECONDS and ksmd.rescan() and any(side.merged() for side in self.sides)

    def do_collapse(self, _lo: int, _hi: int, value: int) -> bool:
        """MADV_COLLAPSE of a huge page, all of which is written before: while a page is armed it is refused."""
        starts = range(0, self.memory.pages - HUGE_PAGES + 1, HUGE_PAGES)
        whole = [lo for lo in starts if len(self.memory.writable(lo, lo + HUGE_PAGES)) == HUGE_PAGES]
        if not whole:
            return False
        lo = whole[value % len(whole)]
        hi = lo + HUGE_PAGES
        self.do_fill(lo, hi, value)
        made = 0
        for side in self.sides:
            side.suggest("collapse", range(lo, hi), HUGEPAGE)
            before = side.huge()
            side.suggest("collapse", range(lo, hi), COLLAPSE)
            made += side.huge() - before
        return made > 0

    def do_huge(self, lo: int, hi: int, value: int) -> bool:
        """Transparent huge pages are admitted, or no more."""
        pages = self.memory.there(lo, hi)
        taken = [side.suggest("huge", pages, (HUGEPAGE, NOHUGEPAGE)[value % 2]) for side in self.sides]
        return bool(pages) and all(taken)

    # -- What is asked ------------------------------------------------------------------------------------------

    def _asked(self, lo: int, hi: int, value: int) -> tuple[int, int, int | None]:
        limit = (None, None, None, 1, 3, 10)[value // 2 % 6]
        return (lo, hi, limit) if value % 2 else (0, self.memory.pages, limit)

    def _readers(self, number: int) -> Iterator[tuple[Side, Reader]]:
        for side in self.sides:
            yield side, side.due.readers[number % len(side.due.readers)]

    def do_peek(self, lo: int, hi: int, value: int) -> bool:
        """Of one reader."""
        for side, reader in self._readers(value // 12):
            side.peek(reader, *self._asked(lo, hi, value))
        return True

    def do_collect(self, lo: int, hi: int, value: int) -> bool:
        """Of one reader; every second time what a peek promised before, but for what the kernel does meanwhile."""
        unsteady = self.memory.unsteady
        for side, reader in self._readers(value // 24):
            asked = self._asked(lo, hi, value // 2)
            seen = side.peek(reader, *asked) if value % 2 else None
            found = side.collect(reader, *asked)
            if seen is not None and found is not None and not (unsteady and asked[-1]):
                assert seen ^ found <= unsteady
        return True

    def do_reset(self, lo: int, hi: int, value: int) -> bool:
        """By one reader."""
        lo, hi, _ = self._asked(lo, hi, value)
        for side, reader in self._readers(value // 2):
            side.reset(reader, lo, hi)
        return True

    def do_unprotect(self, lo: int, hi: int, _value: int) -> bool:
        """Declared written, for all readers."""
        for side in self.sides:
            side.unprotect(lo, hi)
        return bool(self.memory.there(lo, hi))

    def do_rearm(self, lo: int, hi: int, value: int) -> bool:
        """All of it, mostly."""
        untracked = bool(self.sides[0].due.untracked)
        for side in self.sides:
            side.rearm(*((lo, hi) if value % 4 == 3 else (0, self.memory.pages)))
        return untracked

    def do_cursor(self, _lo: int, _hi: int, _value: int) -> bool:
        """One reader more."""
        sides = [side for side in self.sides if len(side.due.readers) < 3]
        for side in sides:
            side.cursor()
        return bool(sides)

    def do_leave(self, _lo: int, _hi: int, value: int) -> bool:
        """One less."""
        sides = [side for side in self.sides if len(side.due.readers) > 1]
        for side in sides:
            side.due.readers.pop(1 + value % (len(side.due.readers) - 1)).cursor.close()
        return bool(sides)

    def do_track(self, _lo: int, _hi: int, _value: int) -> bool:
        """Tracked anew, whatever it has become."""
        for side in self.sides if self.memory.mapped else ():
            for reader in side.due.readers:
                reader.cursor.close()
            side.track()
        return bool(self.memory.mapped)


OPERATIONS: dict[str, int] = {
    "store": 6,
    "fill": 2,
    "kernel_write": 2,
    "read": 2,
    "protect": 2,
    "discard": 2,
    "free": 2,
    "bar": 2,
    "open": 2,
    "unmap": 1,
    "map": 2,
    "move": 1,
    "take_away": 2,
    "fork": 1,
    "swap_out": 2,
    "merge": 2,
    "collapse": 2,
    "huge": 1,
    "peek": 2,
    "collect": 8,
    "reset": 2,
    "unprotect": 2,
    "rearm": 2,
    "cursor": 3,
    "leave": 2,
    "track": 1,
}
"""What a step can be, and how often."""
NEEDED = ("store", "collect", "rearm")
"""Without which a program finds out nothing."""


def make_step(name: str, kind: str, first: int, size: int, value: int) -> Step:
    """A step from any numbers: *size* pages from *first* on, as far as they fit; a huge page is aligned."""
    first %= PAGES[kind]
    if size == HUGE_PAGES:
        first -= first % HUGE_PAGES
    return Step(name, first, min(first + size, PAGES[kind]), value)


@functools.cache
def _kinds(flavour: Flavour) -> tuple[str, ...]:
    try:
        with environment(flavour), flavour.tracker():
            return tuple(PAGES) if probe().supports(Feature.UFFD_WP_HUGETLBFS_SHMEM) else ("private", "huge")
    except KernelError:
        return ()


def able(flavours: Iterable[Flavour], kind: str) -> list[Flavour]:
    """Those that run here, and can track memory of a kind."""
    return [one for one in flavours if kind in _kinds(one)]


def replay(flavours: Sequence[Flavour], kind: str, policy: str, steps: Iterable[tuple[str, int, int, int]]) -> Counts:
    """Run one program; raises `Finding`."""
    program = Program(flavours, kind, policy)
    try:
        for step in steps:
            program.step(Step(*step))
        program.finish()
        return program.counts
    finally:
        program.close()


def draw(seed: int, steps: int, kinds: Sequence[str]) -> tuple[str, str, list[Step]]:
    """The program that *seed* stands for: its kind of memory, what it does about untracked memory, its steps."""
    dice = random.Random(seed)
    kind, policy = dice.choice(kinds), dice.choice(POLICIES)
    # Few kinds of operations in one program meet more often than all of them.
    often = {name: weight for name, weight in OPERATIONS.items() if name in NEEDED or dice.random() < 0.6}
    names = dice.choices(list(often), list(often.values()), k=steps)
    made = [make_step(name, kind, dice.randrange(1024), dice.choice(SPANS), dice.randrange(256)) for name in names]
    return kind, policy, made


def run(
    seed: int, flavours: Sequence[Flavour] = FLAVOURS, steps: int = 60, kinds: Sequence[str] = tuple(PAGES)
) -> Counts:
    """Run the program that *seed* stands for, on those of *flavours* that are able; raises `Finding`.

    One at a time in a process, and with no other thread that writes.
    """
    kind, policy, made = draw(seed, steps, kinds)
    try:
        return replay(able(flavours, kind), kind, policy, map(attrs.astuple, made))
    except Finding as finding:
        finding.add_note(f"seed {seed}, {steps} steps, of kinds {', '.join(kinds)}")
        raise
