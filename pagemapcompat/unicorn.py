"""Tracked memory as the RAM of a Unicorn guest, and snapshots of that guest: its memory and its CPU in one value.

>>> from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
>>> from pagemapcompat import DirtyTracker
>>> from pagemapcompat.unicorn import TrackedGuest
>>> uc = Uc(UC_ARCH_X86, UC_MODE_64)
>>> with DirtyTracker() as tracker:
...     guest = TrackedGuest(uc, tracker)
...     ram = guest.map(0x10000, 1 << 20)
...     state = guest.snapshot()
...     uc.mem_write(0x10000, b"anything")
...     _ = guest.restore(state)
...     uc.mem_read(0x10000, 8) == bytes(8)
True
"""

from __future__ import annotations

import mmap
import operator
import weakref
from bisect import bisect_right
from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, NoReturn, Self, SupportsIndex

import attrs

from pagemapcompat.errors import (
    AlignmentError,
    ClosedError,
    InvalidArgumentError,
    KernelError,
    MissingPackageError,
    PagemapCompatError,
)
from pagemapcompat.memory import Memory, PinnedMemory, pin, whole_number
from pagemapcompat.snapshots import checked
from pagemapcompat.tracker import DirtyTracker

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType, TracebackType

    from unicorn import Uc
    from unicorn.unicorn import UcContext

    from pagemapcompat.results import ScanResult
    from pagemapcompat.snapshots import Snapshot
    from pagemapcompat.tracker import TrackedRange

PROT_ALL = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
"""Unicorn's UC_PROT_ALL; its other permissions are mmap's, too."""
_SPACE_END = 1 << 64
_PERMISSIONS_HINT = "or together UC_PROT_READ, UC_PROT_WRITE and UC_PROT_EXEC; or give UC_PROT_ALL"


@attrs.frozen(eq=False)
class GuestState:
    """What a guest was. Made by `TrackedGuest.snapshot`.

    Attributes:
        memory: What each of its regions held, by the address at which the guest sees it.

        cpu: What `Uc.context_save` gave: every register, the program counter among them.
    """

    memory: Mapping[int, Snapshot]
    cpu: UcContext


class TrackedGuest:
    """A Unicorn guest whose memory is tracked, and which can be made what it was, again and again.

    What is mapped by `map` belongs to its states; what is mapped by `uc.mem_map` does not. Unicorn goes on with code
    that it translated before memory was written behind its back; `restore` has it forget what it translated from the
    pages that are written back. Code seen through a second mapping of the same memory is not forgotten.

    Mappings are no part of a state. `uc.mem_protect` and `uc.mem_unmap` change what the guest may do with its memory,
    not what is tracked, saved and restored: pages that it may not write, or no longer sees, are restored too, and stay
    read-only or unseen.

    One thread at a time, and only while the guest stands still: not from a hook, nor beside `uc.emu_start`. Leave
    UC_CTL_CONTEXT_MODE alone: UC_CTL_CONTEXT_MEMORY has the guest write to copies that Unicorn makes.

    Args:
        uc: A guest, of any architecture.

        tracker: Watches its memory. Closing it stops that; the guest keeps its memory.

        virtual_tlb: Say so if `uc.ctl_set_tlb_mode(UC_TLB_VIRTUAL)` was called. Only the guest's own hook then knows
            where its memory is, so that `restore` drops all translated code. Otherwise it uses that mode itself, for a
            moment, to reach code by the address at which it is mapped, whatever the guest's page tables say.

    Raises:
        MissingPackageError: Unicorn is not installed.

        TypeError: No guest, or no tracker.

    Attributes:
        uc: The guest.

        ranges: Its regions, by the address at which the guest sees them.
    """

    def __init__(self, uc: Uc, tracker: DirtyTracker, *, virtual_tlb: bool = False) -> None:
        self._unicorn = import_unicorn()
        for name, value, kind in (("uc", uc, self._unicorn.Uc), ("tracker", tracker, DirtyTracker)):
            if not isinstance(value, kind):
                error = TypeError(f"{name}={value!r} is no {kind.__name__}")
                error.add_note(f"hint: give a {kind.__name__}, as TrackedGuest(Uc(...), DirtyTracker())")
                raise error
        self.uc = uc
        self.ranges: dict[int, TrackedRange] = {}
        self._tracker = tracker
        self._virtual_tlb = virtual_tlb
        self._states: weakref.WeakSet[GuestState] = weakref.WeakSet()
        # Start, end and memory of all that Unicorn has, by the guest's addresses. It has bare pointers: the memory must
        # outlive it, even if this object does not.
        self._pins: list[tuple[int, int, PinnedMemory]] = []
        weakref.finalize(uc, self._pins.clear).atexit = False

    def __reduce__(self) -> NoReturn:
        """Neither copied nor pickled: its memory is."""
        raise TypeError(f"{self!r} cannot be copied; snapshot() keeps what it is")

    def __repr__(self) -> str:
        """For people."""
        regions = (f"{address:#x}+{len(ram):#x}" for address, ram in sorted(self.ranges.items()))
        return f"<TrackedGuest {', '.join(regions) or 'without memory'}>"

    # -- Its memory -------------------------------------------------------------------------------------------

    def map(self, address: SupportsIndex, memory: Memory | int, perms: int = PROT_ALL) -> TrackedRange:
        """Let the guest see *memory* at *address*, and track it.

        Args:
            address: The guest's. A multiple of its page size, as the length is.

            memory: How many bytes of new, empty memory; or memory of yours, which is pinned as long as the guest may
                use it. If it is an address, and not a buffer, it must outlive `uc`. Holes and guard pages in it end
                this process when the guest comes to them.

            perms: What the guest may do, as for `uc.mem_map`. Where it runs no code, leave UC_PROT_EXEC out: that makes
                `restore` cheaper.

        Raises:
            AlignmentError: The address or the length is no multiple of the guest's page size.

            InvalidArgumentError: Something is mapped there already, or it does not fit a 64-bit address space.

            KernelError: So much new memory is not to be had (ENOMEM).

            PagemapCompatError: Unicorn refused it for another reason, which it gives.

            AlreadyRegisteredError, NotTrackableError, ClosedError: As for `DirtyTracker.track`.

        Nothing is mapped or tracked after an error. Cost: that of `DirtyTracker.track`.
        """
        address = whole_number(address, f"address={address!r}: give the guest's, as a whole number")
        if isinstance(memory, int | Integral):  # numpy's are no int; mypy's int is no Integral
            length = operator.index(memory)
            self._check(address, length, perms)
            memory = _new_memory(length)
        pinned = pin(memory, writable=True)
        try:
            self._check(address, pinned.length, perms)
            ram = self._tracker.track(memory)
            try:
                self._map(address, ram, perms)
            except BaseException:
                ram.close()
                raise
        except BaseException:
            pinned.release()
            raise
        self.ranges[address] = ram
        self._pins.append((address, address + len(ram), pinned))
        return ram

    def unmap(self, address: SupportsIndex) -> None:
        """Take a region away from the guest, stop tracking it, and let its memory go.

        States that were made with it cannot be restored any more.

        Raises:
            InvalidArgumentError: No region of this guest begins there.
        """
        address = whole_number(address, f"address={address!r}: give the guest's, as a whole number")
        ram = self._range(address)
        end = address + len(ram)
        self.forget_code([(address, end)])
        for first, last, _ in self._regions():
            # Pieces, where it was cut by uc.mem_protect or uc.mem_unmap.
            if first < end and address <= last:
                self.uc.mem_unmap(max(first, address), min(last + 1, end) - max(first, address))
        self.unmapped(address, end)

    def unmapped(self, start: int, end: int) -> None:
        """Note that *uc* has unmapped everything from *start* to *end*, which are multiples of the guest's page size.

        Regions that lie there are tracked no more. What is left of one goes on as memory that does not belong to the
        guest's states; when all of it is unmapped it is let go.
        """
        self._flush_tlb()
        for address, ram in list(self.ranges.items()):
            if address < end and start < address + len(ram):
                del self.ranges[address]
                ram.close()
        self._pins[:] = [
            (lo, hi, pinned)
            for first, last, pinned in self._pins
            for lo, hi in ((first, min(last, start)), (max(first, end), last))
            if lo < hi
        ]

    def _range(self, address: SupportsIndex) -> TrackedRange:
        address = whole_number(address, f"address={address!r}: give the guest's, as a whole number")
        if (ram := self.ranges.get(address)) is None:
            known = ", ".join(map(hex, sorted(self.ranges))) or "no address at all"
            raise InvalidArgumentError(f"no region of this guest begins at {address:#x}").with_hint(
                f"its regions begin at {known}"
            )
        return ram

    def _check(self, address: int, length: int, perms: int) -> None:
        unit = self.uc.ctl_get_page_size()
        perms = whole_number(perms, f"perms={perms!r}: {_PERMISSIONS_HINT}")
        if address % unit or length % unit:
            error = AlignmentError(f"{length} bytes at {address:#x} are not made of whole pages of this guest")
            error.address, error.length = address, length
            raise error.with_hint(f"use multiples of {unit} bytes")
        if not 0 <= address < address + length <= _SPACE_END:
            raise InvalidArgumentError(f"{length} bytes at {address:#x} are no part of a guest").with_hint(
                "map at least one page, at addresses of 0 to 2**64"
            )
        if perms & ~PROT_ALL:
            raise InvalidArgumentError(f"perms={perms} are no permissions").with_hint(_PERMISSIONS_HINT)
        taken = [(first, last + 1) for first, last, _ in self._regions()]
        # Its own are taken even where uc.mem_unmap took them away from the guest.
        for first, end in [*taken, *((start, start + len(ram)) for start, ram in self.ranges.items())]:
            if first < address + length and address < end:
                raise InvalidArgumentError(
                    f"{address:#x} to {address + length:#x} is not free: the guest has {first:#x} to {end:#x}"
                ).with_hint("choose another address, or unmap that first")

    def _map(self, address: int, ram: TrackedRange, perms: int) -> None:
        try:
            self.uc.mem_map_ptr(address, len(ram), perms, ram.range.start)
        except self._unicorn.UcError as error:
            raise PagemapCompatError(f"Unicorn cannot map {len(ram)} bytes at {address:#x}: {error}") from error

    def _regions(self) -> list[tuple[int, int, int]]:
        """First byte, last byte and permissions of all that the guest has, ascending."""
        return sorted(self.uc.mem_regions())

    # -- Its states -------------------------------------------------------------------------------------------

    def snapshot(self) -> GuestState:
        """Keep what its memory and its CPU are now.

        Raises:
            NotTrackedError, KernelError, ClosedError, FaultThreadError: As for `TrackedRange.snapshot`.

        Cost: that of `TrackedRange.snapshot` for each region, and 2 us.
        """
        memory = {address: ram.snapshot() for address, ram in self.ranges.items()}
        state = GuestState(memory, self.uc.context_save())
        self._states.add(state)
        return state

    def restore(self, state: GuestState, *, verify: bool = False) -> dict[int, ScanResult]:
        """Make the guest what it was, whatever has happened since. Returns what was written back, by region.

        Args:
            state: Of this guest. On some architectures (PowerPC) that of another one would have its pointers in it.

            verify: Compare all of the memory with it afterwards.

        Raises:
            InvalidArgumentError: It is of another guest, or regions were mapped or unmapped since.

            ClosedError: A snapshot in it was dropped.

            ConcurrentWriteError, RestoreError, KernelError, FaultThreadError: As for `TrackedRange.restore`. Memory is
                partly restored then, and the CPU is not: restore again.

        Cost: that of `TrackedRange.restore` for each region, and 15 to 50 us; where the guest may run code 3 us a run
        of pages, and 6 us a block of code in them when it runs again.
        """
        self._check_fits(state)
        written = self.write_back(state.memory, verify=verify)
        self.uc.context_restore(state.cpu)
        self._flush_tlb()  # page tables are memory, and where they are is a register
        return written

    def write_back(self, memory: Mapping[int, Snapshot], *, verify: bool = False) -> dict[int, ScanResult]:
        """Restore some of its regions, and not the CPU, from snapshots of the same lengths. Else as `restore`."""
        if not isinstance(memory, Mapping):
            error = TypeError(f"{type(memory).__name__} is no memory of a guest")
            error.add_note("hint: of a GuestState give its memory; restore() also brings the CPU back")
            raise error
        for address, snapshot in memory.items():
            checked(snapshot).check_fits(len(self._range(address)))
        try:
            written = {
                address: self._range(address).restore(snapshot, verify=verify) for address, snapshot in memory.items()
            }
            self.forget_code(
                (address + lo, address + hi) for address in sorted(written) for lo, hi in written[address].spans()
            )
        except BaseException:
            # Nobody knows what was written back.
            self.uc.ctl_flush_tb()
            raise
        return written

    def _check_fits(self, state: GuestState) -> None:
        if state not in self._states:
            raise InvalidArgumentError(f"{type(state).__name__} is not of this guest").with_hint(
                "what its memory held can be given to write_back(state.memory); its registers by reg_write"
            )
        now = {address: len(ram) for address, ram in self.ranges.items()}
        then = {address: len(snapshot) for address, snapshot in state.memory.items()}
        if now != then:
            (address, _), *_ = sorted(now.items() ^ then.items())
            raise InvalidArgumentError(
                f"the guest has {now.get(address, 'no')} bytes at {address:#x}, and had {then.get(address, 'no')}"
            ).with_hint("mappings are no part of a state: map what it had, and unmap what it had not")
        if dropped := [hex(address) for address, snapshot in state.memory.items() if snapshot.is_dropped]:
            raise ClosedError(f"the snapshot of the memory at {', '.join(dropped)} was dropped").with_hint(
                "take another; drop() ends one for good"
            )

    # -- Its translated code ----------------------------------------------------------------------------------

    def forget_code(self, runs: Iterable[tuple[int, int]]) -> None:
        """Have Unicorn forget what it translated from *runs* of guest memory: (start, end) each, ascending."""
        runs = list(runs)
        if not runs:
            return
        if self._virtual_tlb:
            self.uc.ctl_flush_tb()
            return
        starts, ends = zip(*runs, strict=True)
        try:
            # Unicorn takes the address by which code calls itself. With this TLB, that is where it is mapped.
            self._set_tlb(self._unicorn.UC_TLB_VIRTUAL)
            for first, last, perms in self._regions():
                here = runs[bisect_right(ends, first) : bisect_right(starts, last)]
                if here and not perms & mmap.PROT_EXEC:
                    # It may have been executable. What may not run need not be kept, and one call is cheaper than many.
                    here = [(here[0][0], here[-1][1])]
                for start, end in here:
                    # Not across the border of two regions: Unicorn looks up the first address only.
                    self.uc.ctl_remove_cache(max(start, first), min(end, last + 1, _SPACE_END - 1))
        finally:
            self._set_tlb(self._unicorn.UC_TLB_CPU)

    def _set_tlb(self, mode: int) -> None:
        self.uc.ctl(self._unicorn.UC_CTL_TLB_TYPE, self._unicorn.UC_CTL_IO_WRITE, mode)
        self._flush_tlb()

    def _flush_tlb(self) -> None:
        self.uc.ctl(self._unicorn.UC_CTL_TLB_FLUSH, self._unicorn.UC_CTL_IO_WRITE)

    # -- Life -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Unmap all its regions. Idempotent."""
        for address in list(self.ranges):
            self.unmap(address)

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def _new_memory(length: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise KernelError.make(
            error.errno or 0, "mmap", f"{error.strerror}, for {length} bytes", hint="map less at a time"
        ) from error


def import_unicorn() -> ModuleType:
    """The third-party module.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        import unicorn  # noqa: PLC0415 - only who has a guest needs it
    except ImportError as error:
        raise MissingPackageError("Unicorn is not installed", name="unicorn").with_hint(
            "pip install 'pagemapcompat[unicorn]'"
        ) from error
    module: ModuleType = unicorn
    return module
