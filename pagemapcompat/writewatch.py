"""WriteWatch: GetWriteWatch and ResetWriteWatch of Windows, on tracked memory.

Where Windows' documents are silent its observed behaviour counts. Not imported by the package itself: `from
pagemapcompat.writewatch import WriteWatch`.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from itertools import chain
from typing import TYPE_CHECKING, NoReturn, Self, SupportsIndex, overload

import attrs

from pagemapcompat import _kernel
from pagemapcompat.abi import Feature, PageCategory
from pagemapcompat.errors import AlignmentError, InvalidArgumentError, PagemapCompatError
from pagemapcompat.mappings import own_mappings
from pagemapcompat.memory import AddressRange, whole_number
from pagemapcompat.own_memory import PROT_NONE, checked_protection, discard, mapped_throughout, populate, protect
from pagemapcompat.pagemap import Pagemap, ScanQuery
from pagemapcompat.probe import probe
from pagemapcompat.results import ScanResult
from pagemapcompat.tracker import TrackedRange

if TYPE_CHECKING:
    from types import TracebackType

WRITE_WATCH_GRANULARITY = 1 << 12
"""What Windows counts in, whatever the host's page size."""
WRITE_WATCH_FLAG_RESET = 1
_FAILURE = 0xFFFF_FFFF
_POINTER_SIZES = (4, 8)
_HOLDING = PageCategory.PRESENT | PageCategory.SWAPPED
_EMPTY = ScanQuery(all_of=_HOLDING, inverted=_HOLDING)


class Win32Error(IntEnum):
    """What GetLastError answers, by Windows' own names."""

    ERROR_SUCCESS = 0
    ERROR_INVALID_PARAMETER = 87
    ERROR_NOACCESS = 998


def _number(name: str, value: SupportsIndex) -> int:
    return whole_number(value, f"{name}={value!r}: give a whole number; where it may be left out, None")


class WrittenAddresses(Sequence[int]):
    """Where memory was written: ascending addresses, a WRITE_WATCH_GRANULARITY each.

    A value. It holds the runs that C filled, and iterates over them; the first index, slice, `as_u64` or `packed`
    expands them, 8 bytes an address. Any thread may read it.

    Attributes:
        complete: Whether these are all. Else *count*, or memory for the answer, was used up, and more may have been
            written behind them.
    """

    __slots__ = ("_expanded", "_length", "_shift", "_words", "complete")

    def __init__(self, words: memoryview[int], length: int, shift: int, *, complete: bool) -> None:
        self._words = words  # as those of a ScanResult
        self._length = length
        self._shift = shift  # from the host's addresses to the guest's
        self._expanded: memoryview[int] | None = None
        self.complete = complete

    def __len__(self) -> int:
        """How many addresses."""
        return self._length

    def __iter__(self) -> Iterator[int]:
        """Every address, in order."""
        return _addresses(self._words, self._shift)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        """One address, or a list of them."""
        return self.as_u64()[index].tolist() if isinstance(index, slice) else self.as_u64()[index]

    def __eq__(self, other: object) -> bool:
        """Equal when the answer is."""
        if not isinstance(other, WrittenAddresses):
            return NotImplemented
        return self.complete == other.complete and self.as_u64() == other.as_u64()

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Callable[..., WrittenAddresses], tuple[object, ...]]:
        """Pickle as the value it is."""
        return _restore, (self._words.tobytes(), self._length, self._shift, self.complete)

    def __repr__(self) -> str:
        """For people."""
        return f"<WrittenAddresses: {len(self)}{'' if self.complete else ', perhaps not all'}>"

    def as_u64(self) -> memoryview[int]:
        """All addresses: read-only, 1-D, format "Q". Cost: 1 ns an address, once."""
        if self._expanded is None:
            words = memoryview(bytearray(8 * self._length)).cast("Q")
            _kernel.fill_addresses(self._words, self._shift, WRITE_WATCH_GRANULARITY, words)
            self._expanded = words.toreadonly()
        return self._expanded

    def packed(self, pointer_size: int) -> bytes:
        """The guest's array of pointers: little-endian, of 4 or 8 bytes each.

        Raises:
            InvalidArgumentError: Another size, or an address that 4 bytes cannot hold.
        """
        if pointer_size not in _POINTER_SIZES:
            raise InvalidArgumentError(f"pointer_size={pointer_size!r} is that of no guest").with_hint("give 4 or 8")
        if pointer_size == min(_POINTER_SIZES) and self._length and self[-1] >> 32:
            raise InvalidArgumentError(f"address {self[-1]:#x} does not fit into 4 bytes").with_hint(
                "give 8, or make the WriteWatch with the base that the guest sees"
            )
        words = array("Q", self.as_u64().tobytes())
        if sys.byteorder == "big":
            words.byteswap()
        if pointer_size == words.itemsize:
            return words.tobytes()
        return memoryview(words).cast("B").cast("I")[::2].tobytes()


def _restore(words: bytes, length: int, shift: int, complete: bool) -> WrittenAddresses:  # noqa: FBT001 - as pickled
    return WrittenAddresses(memoryview(words).cast("Q"), length, shift, complete=complete)


_NOTHING = WrittenAddresses(memoryview(b"").cast("Q"), 0, 0, complete=True)


@attrs.frozen(kw_only=True)
class WriteWatchAnswer:
    """What a guest's call is answered with.

    Attributes:
        status: What the call returns: 0, or 0xFFFFFFFF.

        error: For SetLastError, which only a failure calls.

        addresses: For the guest's array, whose other slots stay as they are.

        count: For *lpdwCount; None leaves it as it is.

        granularity: For *lpdwGranularity; None leaves it as it is.
    """

    status: int
    error: Win32Error
    addresses: WrittenAddresses = _NOTHING
    count: int | None = None
    granularity: int | None = None


def _failed(error: Win32Error) -> WriteWatchAnswer:
    return WriteWatchAnswer(status=_FAILURE, error=error)


class WriteWatch:
    """Memory as VirtualAlloc(MEM_WRITE_WATCH) gives it: which pages were written since the last reset.

    A reader of its own (`TrackedRange.cursor`), to whom nothing is written yet: it takes nothing from other readers,
    nor they from it. All addresses are the guest's; sizes are in bytes. Both are rounded out to 4096 bytes, as Windows
    does. Where the memory has larger pages a store counts for all of its page, and each 4096 bytes of that are
    returned and reset by themselves. Every method may be called from any thread; calls run one after the other.

    Args:
        ram: Tracked memory. It stays tracked for as long as the watch is open.

        base: Where the guest sees it, a multiple of 4096. None: where it lies.

    Raises:
        AlignmentError: *base* is no multiple of 4096.

        InvalidArgumentError: The memory would not fit into 64 bits from *base* on.

        NotTrackedError, ClosedError, FaultThreadError: As for `TrackedRange.cursor`.

    Attributes:
        base: Where it begins, for the guest.

        size: In bytes, a multiple of 4096.
    """

    def __init__(self, ram: TrackedRange, *, base: int | None = None) -> None:
        if not isinstance(ram, TrackedRange):
            error = TypeError(f"{type(ram).__name__} is no tracked memory")
            error.add_note("hint: give what DirtyTracker.track() returned")
            raise error
        whole = ram.range
        self.base: int = whole.start if base is None else _number("base", base)
        self.size: int = _up(len(ram), WRITE_WATCH_GRANULARITY)
        if self.base % WRITE_WATCH_GRANULARITY:
            error = AlignmentError(f"base={self.base:#x} is not a multiple of {WRITE_WATCH_GRANULARITY} bytes")
            error.address, error.length = self.base, self.size
            raise error.with_hint(f"use {_down(self.base, WRITE_WATCH_GRANULARITY):#x}")
        if not 0 <= self.base <= (1 << 64) - self.size:
            raise InvalidArgumentError(
                f"{self.size} bytes from base={self.base:#x} on lie outside of a guest's 64 bits"
            ).with_hint("give the address at which the guest sees the memory")
        self._ram = ram
        self._shift = self.base - whole.start
        self._kept: set[int] = set()  # host addresses that were collected, and are still written
        self._lost: tuple[ScanResult | WrittenAddresses, ...] = ()  # what was taken, and then reached nobody
        self._lock = threading.RLock()  # around whatever touches those, and what reads the mappings to change them
        # What UFFD_WP_UNPOPULATED protects is seen in the marks alone: without those uffd-wp does not ask for it.
        self._empty_carry_marks = probe().supports(Feature.UFFD_WP_UNPOPULATED, Feature.PAGEMAP_UFFD_WP)
        self._pid = os.getpid()
        self._closed = False
        self._cursor = ram.cursor()

    @property
    def _unit(self) -> int:
        return self._ram.granularity

    def __reduce__(self) -> NoReturn:
        """Neither copied nor pickled: a copy's end would close it."""
        raise TypeError(f"{self!r} cannot be copied; make another WriteWatch")

    def __repr__(self) -> str:
        """For people."""
        return f"<WriteWatch of {self.size} bytes at {self.base:#x}: {self._cursor!r}>"

    # -- Reading and resetting --------------------------------------------------------------------------------

    def get(
        self, base: int | None = None, size: int | None = None, *, count: int | None = None, reset: bool = False
    ) -> WrittenAddresses:
        """Return what was written since the last reset; the whole range by default.

        Protections, and whether memory is committed, do not change the answer.

        Args:
            base: Where to begin. None: where the memory does.

            size: How many bytes. None: as many as there are.

            count: Return at most so many, the lowest.

            reset: Reset those that are returned, and no other, in the same step: no write is lost in between.

        Raises:
            InvalidArgumentError: It lies outside of the memory, or *size* or *count* is less than 1.

            NotTrackedError: With *reset*, part of it has lost its registration (ENOENT), unless the tracker rearms. All
                that was written stays so.

            ClosedError, FaultThreadError: As for `Cursor.peek`.

        Cost: that of `Cursor.peek` or `collect`; where pages are larger than 4096 bytes, 0.5 us an address more.
        """
        asked = self._asked(base, size)
        if count is not None and _number("count", count) < 1:
            raise InvalidArgumentError(f"count={count} asks for no address").with_hint(
                "give at least 1, or None for all"
            )
        self._check_open()
        return self._take(asked, count) if reset else self._look(asked, count)

    def reset(self, base: int | None = None, size: int | None = None) -> None:
        """Forget what was written until now: everywhere, or in *size* bytes from *base* on.

        Raises:
            InvalidArgumentError, NotTrackedError, ClosedError, FaultThreadError: As for `get`.
        """
        asked = self._asked(base, size)
        self._check_open()
        if self._unit != WRITE_WATCH_GRANULARITY:
            self._take(asked, None)
            return
        with self._lock:
            self._forget(asked)

    def _forget(self, asked: AddressRange) -> None:
        self._recover()
        self._cursor.reset(*self._offsets(asked))
        self._kept.difference_update([address for address in self._kept if asked.start <= address < asked.end])

    def _look(self, asked: AddressRange, count: int | None) -> WrittenAddresses:
        with self._lock:
            direct, start, stop, limit = self._plan(asked, count)
            result = self._cursor.peek(start, stop, max_pages=limit)
            if direct:
                return self._all_of(result)
            return self._choose(self._kept.union(_addresses(result.as_u64())), result, asked, count)[0]

    def _take(self, asked: AddressRange, count: int | None) -> WrittenAddresses:
        """What was written, watched anew.

        An interrupt can come when any call begins or has returned, the release of the lock included. What was taken is
        then in *taken* or in `_kept`, until the caller has it.
        """
        taken: ScanResult | WrittenAddresses | None = None
        try:
            with self._lock:
                direct, start, stop, limit = self._plan(asked, count)
                try:
                    taken = result = self._cursor.collect(start, stop, max_pages=limit)
                except PagemapCompatError as error:
                    taken, error.collected = error.collected, None  # later answers have it
                    raise
                if direct:
                    answer = self._all_of(result)
                else:
                    self._kept |= set(_addresses(result.as_u64()))
                    taken = None
                    answer, chosen = self._choose(self._kept, result, asked, count)
                    self._kept -= chosen
                    taken = answer
        except BaseException:
            if taken is not None:
                self._lost += (taken,)
            raise
        return answer

    def _recover(self) -> None:
        """Keep what was lost. It counts as written again."""
        while lost := self._lost:
            for taken in lost:
                self._kept.update(
                    _addresses(taken.as_u64())
                    if isinstance(taken, ScanResult)
                    else (address - self._shift for address in taken)
                )
            # Other threads add to it without the lock, which an interrupt could keep them from getting.
            if self._lost is lost:
                self._lost = ()

    def _plan(self, asked: AddressRange, count: int | None) -> tuple[bool, int, int, int | None]:
        """Whether a scan finds just what is asked for; and its start, stop and limit."""
        self._recover()
        direct = self._unit == WRITE_WATCH_GRANULARITY and not self._kept
        # Addresses of the first unit may lie before what is asked about, and a unit that would not fit is left out.
        limit = count if direct or count is None else count + 2 * self._unit // WRITE_WATCH_GRANULARITY
        return direct, *self._offsets(asked), limit

    def _all_of(self, result: ScanResult) -> WrittenAddresses:
        return WrittenAddresses(result.as_u64(), result.pages, self._shift, complete=result.complete)

    def _choose(
        self, written: set[int], result: ScanResult, asked: AddressRange, count: int | None
    ) -> tuple[WrittenAddresses, set[int]]:
        """Of what a scan and earlier ones found, what is asked for; as host addresses, too."""
        end = min(asked.end, result.walk_end)
        inside = sorted(address for address in written if asked.start <= address < end)
        chosen = inside[:count]
        complete = result.complete and len(chosen) == len(inside)
        return WrittenAddresses(_runs(chosen), len(chosen), self._shift, complete=complete), set(chosen)

    # -- What an emulator declares ----------------------------------------------------------------------------

    def mark_written(self, base: int, size: int) -> None:
        """Count memory as written, whether or not anybody writes: a buffer that is handed to asynchronous I/O.

        Until it is next reset, by whatever reader, writers do not fault there, so that read(2) into it succeeds without
        `Guarantee.KERNEL_WRITES` too. Rounded out to the pages of the memory. Other readers find it written as well.

        Raises:
            NotTrackedError: Part of it is not registered (ENOENT), whatever the tracker does elsewhere.

            InvalidArgumentError, ClosedError, FaultThreadError: As for `get`.
        """
        asked = self._asked(_number("base", base), _number("size", size))
        self._check_open()
        with self._lock:
            self._ram.unprotect(*self._offsets(asked))

    def commit(self, base: int, size: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> None:
        """Give memory a protection; content, and what was written, stay. What was never committed is zero and clean.

        Where empty pages cannot carry a mark (`Feature.UFFD_WP_UNPOPULATED`, `PAGEMAP_UFFD_WP`) those that were
        unreadable get the zero page, so that reading them is not taken for writing. Other readers find them written,
        once.

        Args:
            base: Rounded down to 4096 bytes, as *size* is rounded up.

            size: In bytes.

            protection: As for mprotect(2).

        Raises:
            AlignmentError: It begins or ends inside a page of the memory (`TrackedRange.granularity`).

            KernelError: mprotect failed: EACCES, EINVAL or ENOMEM.

            InvalidArgumentError, NotTrackedError, ClosedError, FaultThreadError: As for `get`.

        Cost: one mprotect; where empty pages cannot carry a mark also 1.5 us for each page that was unreadable.
        """
        memory = self._pages(base, size)
        protection = checked_protection(protection)
        self._check_open()
        with self._lock:
            if not self._empty_carry_marks:
                self._populate(memory)
            protect(memory, protection)

    def _populate(self, memory: AddressRange) -> None:
        """Let pages that hold nothing carry a mark, where nobody can write to them meanwhile."""
        with Pagemap("self") as pagemap:
            for mapping in own_mappings(memory):
                # Only private anonymous memory needs it, and readable memory has had it.
                is_hidden = mapping.permissions.startswith("--")
                if not is_hidden or mapping.is_shared or mapping.path.startswith("/"):
                    continue
                hidden = _common(mapping.range, memory)
                for lo, hi in pagemap.scan(hidden, _EMPTY).spans():
                    self._populate_empty(AddressRange(hidden.start + lo, hidden.start + hi))

    def _populate_empty(self, memory: AddressRange) -> None:
        start, stop = self._offsets(memory)
        if stop - start != memory.length:
            return  # among huge pages: what is beside it would be reset too
        written = self._cursor.peek(start, stop)
        populate(memory)
        # It may have been declared written, and hidden since.
        for lo, hi in chain(written.spans(), [(written.walk_end - self._ram.range.start, stop)]):
            self._cursor.reset(start, lo)
            start = hi

    def decommit(self, base: int, size: int) -> None:
        """Take memory back: nobody may access it, its content is gone, and for this watch it is clean.

        Other readers find it written. Shared memory loses its content for all who map it; private mappings of a file
        get back what the file has.

        Raises:
            AlignmentError: It begins or ends inside a page of the memory (`TrackedRange.granularity`).

            KernelError: mprotect or madvise failed, or part was unmapped meanwhile; it may be barred, and not empty.

            NotTrackedError: Part of it is not registered (ENOENT), whatever the tracker does elsewhere.

            InvalidArgumentError, ClosedError, FaultThreadError: As for `get`.

        Cost: four calls, and one reading of /proc/self/maps.
        """
        memory = self._pages(base, size)
        self._check_open()
        with self._lock:
            # No kernel shows the others a discard of shared memory, nor the oldest one of any. Declared before: if it
            # fails nothing has changed, and if a discard does they know; and after: somebody may have collected
            # meanwhile.
            self._ram.unprotect(*self._offsets(memory))
            protect(memory, PROT_NONE)
            try:
                for mapping in mapped_throughout(memory):
                    discard(_common(mapping.range, memory), shared=mapping.is_shared)
            finally:
                self._ram.unprotect(*self._offsets(memory))
            self._forget(memory)

    # -- The Win32 contract -----------------------------------------------------------------------------------

    def get_write_watch(
        self, flags: int, base: int, size: int, addresses: int | None, count: int | None, granularity: int | None
    ) -> WriteWatchAnswer:
        """GetWriteWatch, for an emulator's table of system calls. The guest's mistakes are answers, not exceptions.

        Args:
            flags: 0 or WRITE_WATCH_FLAG_RESET.

            base: As the guest gave it.

            size: As the guest gave it.

            addresses: The guest's pointer, of which only counts whether it is NULL (0 or None).

            count: What *lpdwCount holds; None when lpdwCount is NULL.

            granularity: The guest's pointer, likewise.

        Raises:
            NotTrackedError, ClosedError, FaultThreadError: As for `get`.

        Source: Wine, dlls/kernel32/tests/virtual.c, test_write_watch, which Windows passes.
        """
        if count is None or not granularity:
            return _failed(Win32Error.ERROR_NOACCESS)
        if not count or not size or flags & ~WRITE_WATCH_FLAG_RESET:
            return _failed(Win32Error.ERROR_INVALID_PARAMETER)
        if not addresses:
            return _failed(Win32Error.ERROR_NOACCESS)
        if self._inside(base, size) is None:
            return _failed(Win32Error.ERROR_INVALID_PARAMETER)
        reset = bool(flags & WRITE_WATCH_FLAG_RESET)
        written = self.get(base, size, count=count, reset=reset)
        try:
            return WriteWatchAnswer(
                status=0,
                error=Win32Error.ERROR_SUCCESS,
                addresses=written,
                count=len(written),
                granularity=WRITE_WATCH_GRANULARITY,
            )
        except BaseException:
            # An interrupt: what it would have returned is written still.
            if reset:
                self._lost += (written,)
            raise

    def reset_write_watch(self, base: int, size: int) -> WriteWatchAnswer:
        """ResetWriteWatch, likewise.

        Raises:
            NotTrackedError, ClosedError, FaultThreadError: As for `get`.
        """
        if not size or self._inside(base, size) is None:
            return _failed(Win32Error.ERROR_INVALID_PARAMETER)
        self.reset(base, size)
        return WriteWatchAnswer(status=0, error=Win32Error.ERROR_SUCCESS)

    # -- Addresses --------------------------------------------------------------------------------------------

    def _inside(self, base: int, size: int) -> AddressRange | None:
        """Where in the host it lies, rounded out to 4096 bytes; None: not wholly in the watched memory."""
        first, last = _down(base, WRITE_WATCH_GRANULARITY), _up(base + size, WRITE_WATCH_GRANULARITY)
        if size < 1 or first < self.base or last > self.base + self.size:
            return None
        return AddressRange(first - self._shift, last - self._shift)

    def _asked(self, base: int | None, size: int | None) -> AddressRange:
        base = self.base if base is None else _number("base", base)
        length = self.base + self.size - base if size is None else _number("size", size)
        asked = self._inside(base, length)
        if asked is None:
            given = f"base={base:#x}" if size is None else f"size={length} at {base:#x}"
            raise InvalidArgumentError(
                f"{given} is not wholly in the {self.size} bytes watched at {self.base:#x}"
            ).with_hint("give at least one byte, by the guest's addresses")
        return asked

    def _offsets(self, asked: AddressRange) -> tuple[int, int]:
        """In the tracked memory, of all units that *asked* touches."""
        whole = self._ram.range
        start = max(_down(asked.start, self._unit), whole.start)
        stop = min(_up(asked.end, self._unit), whole.end)
        return start - whole.start, stop - whole.start

    def _pages(self, base: int, size: int) -> AddressRange:
        """The pages of the host that are exactly this."""
        base = _number("base", base)
        asked = self._asked(base, _number("size", size))
        start, stop = self._offsets(asked)
        whole = self._ram.range
        memory = AddressRange(whole.start + start, whole.start + stop)
        # What follows the memory in its last page is its own.
        ends = asked.end == memory.end or asked.end == whole.start + self.size
        if asked.start != memory.start or not ends:
            error = AlignmentError(
                f"size={size} at {base:#x} begins or ends inside a page of the host ({self._unit} bytes)"
            )
            error.address, error.length = base, size
            raise error.with_hint(
                f"its neighbours would change too; take {memory.length} bytes at {memory.start + self._shift:#x}"
            )
        return memory

    # -- Life -------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        # Before the lock, which nobody would release in the forked child of a process whose other thread held it.
        if self._closed or os.getpid() != self._pid:
            self._cursor.peek(0, 0)  # says why not

    def close(self) -> None:
        """Stop watching; the memory stays tracked. Idempotent; waits for running calls. Dropping it does the same."""
        self._closed = True
        self._cursor.close()

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def _common(one: AddressRange, other: AddressRange) -> AddressRange:
    return AddressRange(max(one.start, other.start), min(one.end, other.end))


def _down(value: int, unit: int) -> int:
    return value - value % unit


def _up(value: int, unit: int) -> int:
    return value + -value % unit


def _addresses(words: memoryview[int], shift: int = 0) -> Iterator[int]:
    """The address, plus *shift*, of every 4096 bytes of the regions of a result."""
    return chain.from_iterable(
        range(start + shift, end + shift, WRITE_WATCH_GRANULARITY)
        for start, end, _ in _kernel.REGION.iter_unpack(words)
    )


def _runs(addresses: Iterable[int]) -> memoryview[int]:
    """Ascending addresses, as the words of a ScanResult."""
    words = array("Q")
    for address in addresses:
        if words and words[-2] == address:
            words[-2] += WRITE_WATCH_GRANULARITY
        else:
            words.extend((address, address + WRITE_WATCH_GRANULARITY, 0))
    return memoryview(words).toreadonly()


__all__ = [
    "WRITE_WATCH_FLAG_RESET",
    "WRITE_WATCH_GRANULARITY",
    "Win32Error",
    "WriteWatch",
    "WriteWatchAnswer",
    "WrittenAddresses",
]
