"""Tracked memory in a Qiling instance: `ql.save` copies, and `ql.restore` writes, only what was written."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import attrs

from pagemapcompat.errors import InvalidArgumentError, MissingPackageError
from pagemapcompat.memory import page_size, whole_number
from pagemapcompat.unicorn import PROT_ALL, TrackedGuest
from pagemapcompat.writewatch import WRITE_WATCH_GRANULARITY, Win32Error, WriteWatch, WriteWatchAnswer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from qiling import Qiling

    from pagemapcompat.snapshots import Snapshot
    from pagemapcompat.tracker import DirtyTracker, TrackedRange

MEM_WRITE_WATCH = 0x20_0000
MEM_RESERVE = 0x2000
MEM_DECOMMIT = 0x4000
MEM_RELEASE = 0x8000
_ERROR_INVALID_ADDRESS = 487
_ALLOCATION_GRANULARITY = 0x1_0000
_LOWEST_ALLOCATION = 0x2000_0000
_NOTHING_WATCHED = WriteWatchAnswer(status=0xFFFF_FFFF, error=Win32Error.ERROR_INVALID_PARAMETER)


@attrs.frozen(eq=False)
class SavedMemory:
    """What stands in a saved state where Qiling has bytes. Pickled it is bytes, so that any Qiling reads the file."""

    region: int
    """Where the tracked region that it is of begins."""
    snapshot: Snapshot
    """Of all of the region."""
    start: int
    """The first byte of it, as an offset."""
    stop: int
    """Behind the last one."""

    def __len__(self) -> int:
        """In bytes."""
        return self.stop - self.start

    def __bytes__(self) -> bytes:
        """Copy it out."""
        return self.snapshot.read(self.start, self.stop)

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        """Become bytes."""
        return bytes, (bytes(self),)


class TrackedMemory:
    """Tracks chosen memory of a Qiling instance, and takes the place of `ql.mem.save`, `restore` and `unmap`.

    `ql.save` and `ql.restore` work as ever, with all parts of a state and with files. Of tracked regions they copy and
    write what was written; the rest is copied whole, as ever. Where tracked memory is written back, code that was
    translated from it is forgotten, which Qiling does not do by itself.

    As ever, a restore unmaps nothing and changes no protection. A region that was unmapped since comes back untracked.
    Threads and hooks: as for `TrackedGuest`.

    Args:
        ql: Of any architecture and system.

        tracker: Watches the memory. Once it is closed, `ql.save` and `ql.restore` raise ClosedError.

    Raises:
        MissingPackageError: Unicorn is not installed.

        InvalidArgumentError: This guest has another TrackedMemory.

        TypeError: No tracker.

    Attributes:
        guest: Its `ranges` are the tracked regions, by address.

        watches: The write watches of tracked regions, which end with these.
    """

    def __init__(self, ql: Qiling, tracker: DirtyTracker) -> None:
        if isinstance(getattr(ql.mem.save, "__self__", None), TrackedMemory):
            raise InvalidArgumentError("this guest has another TrackedMemory").with_hint("map and adopt by that one")
        self.guest = TrackedGuest(ql.uc, tracker)
        self.watches: dict[TrackedRange, WriteWatch] = {}
        self._mem = ql.mem
        self._restore, self._unmap = ql.mem.restore, ql.mem.unmap
        ql.mem.save, ql.mem.restore, ql.mem.unmap = self.save, self.restore, self.unmap

    # -- Regions ----------------------------------------------------------------------------------------------

    def map(self, addr: int, size: int, perms: int = PROT_ALL, info: str | None = None) -> TrackedRange:
        """Map new memory, as `ql.mem.map` does, and track it.

        Raises:
            AlignmentError, InvalidArgumentError, ClosedError: As for `TrackedGuest.map`.
        """
        return self._add(addr, size, perms, info)

    def adopt(self, addr: int) -> TrackedRange:
        """Track what is mapped at *addr* already: a stack, a heap, a program. Its content stays.

        Raises:
            InvalidArgumentError: No memory is mapped there, or it is tracked already.

            NotTrackableError, ClosedError: As for `DirtyTracker.track`. It stays as it was.

        Cost: copying it twice.
        """
        addr = whole_number(addr, f"addr={addr!r}: give the guest's, as a whole number")
        found = [entry for entry in self._mem.map_info if entry[0] <= addr < entry[1] and not entry[4]]
        if not found or self.region(addr):
            raise InvalidArgumentError(
                f"{addr:#x} is tracked already" if found else f"no memory is mapped at {addr:#x}"
            ).with_hint("ql.mem.map_info is what is mapped, guest.ranges what is tracked")
        start, stop, perms, info, _ = found[0]
        content = bytes(self._mem.read(start, stop - start))
        memory = mmap.mmap(-1, stop - start, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for at in range(0, stop - start, page_size()):
            # Empty pages need not be there, nor be saved.
            if (page := content[at : at + page_size()]).strip(b"\0"):
                memory[at : at + len(page)] = page
        self._unmap(start, stop - start)
        try:
            return self._add(start, memory, perms, info)
        except BaseException:
            self._mem.map(start, stop - start, perms, info)
            self._mem.write(start, content)
            raise

    def unmap(self, addr: int, size: int) -> None:
        """As `ql.mem.unmap`. What is left of a tracked region goes on as ordinary memory, watched no more."""
        self._unmap(addr, size)
        self.guest.unmapped(addr, addr + size)
        for ram in self.watches.keys() - set(self.guest.ranges.values()):
            self.watches.pop(ram).close()

    def region(self, addr: int) -> tuple[int, TrackedRange] | None:
        """The tracked region around *addr*, and where it begins; None where there is none."""
        for start, ram in self.guest.ranges.items():
            if start <= addr < start + len(ram):
                return start, ram
        return None

    def _add(self, addr: int, memory: mmap.mmap | int, perms: int, info: str | None) -> TrackedRange:
        ram = self.guest.map(addr, memory, perms)
        self._mem.add_mapinfo(addr, addr + len(ram), perms, info or "[mapped]")
        return ram

    # -- States -----------------------------------------------------------------------------------------------

    def save(self) -> dict[str, list[tuple[Any, ...]]]:
        """As `ql.mem.save`, with a SavedMemory in the place of the bytes of tracked regions.

        Raises:
            NotTrackedError, KernelError, ClosedError, FaultThreadError: As for `TrackedRange.snapshot`.
        """
        snapshots = {start: ram.snapshot() for start, ram in self.guest.ranges.items()}
        saved: dict[str, list[tuple[Any, ...]]] = {"ram": [], "mmio": []}
        for start, stop, perms, info, is_mmio in self._mem.map_info:
            if is_mmio:
                saved["mmio"].append((start, stop, perms, info, *self._mem.mmio_cbs[start, stop]))
                continue
            content: SavedMemory | bytes
            if found := self.region(start):
                first, _ = found
                content = SavedMemory(first, snapshots[first], start - first, stop - first)
            else:
                content = bytes(self._mem.read(start, stop - start))
            saved["ram"].append((start, stop, perms, info, content))
        return saved

    def restore(self, mem_dict: Mapping[str, Sequence[tuple[Any, ...]]]) -> None:
        """As `ql.mem.restore`, of what `save` returned, here or in any Qiling.

        Raises:
            ConcurrentWriteError, KernelError, ClosedError, FaultThreadError: As for `TrackedRange.restore`.
        """
        snapshots: dict[int, Snapshot] = {}
        others = []
        for *entry, content in mem_dict["ram"]:
            if isinstance(content, SavedMemory) and self._fits(content):
                snapshots[content.region] = content.snapshot
            else:
                others.append((*entry, bytes(content)))
        self.guest.write_back(snapshots)
        self._restore({"ram": others, "mmio": mem_dict["mmio"]})
        self.guest.forget_code((start, stop) for start, stop, *_ in others if self.region(start))

    def _fits(self, saved: SavedMemory) -> bool:
        ram = self.guest.ranges.get(saved.region)
        return ram is not None and len(ram) == len(saved.snapshot)


class WriteWatchApi:
    """Answers a Windows guest's GetWriteWatch and ResetWriteWatch.

    What the guest gets from VirtualAlloc with MEM_WRITE_WATCH is tracked and watched; so is what `watch` is called for.
    All of it is committed, and readable, writable and executable, as all memory from Qiling is; VirtualFree with
    MEM_DECOMMIT leaves it so, but zero, and clean for the guest; with MEM_RELEASE it unmaps it. Other memory comes from
    Qiling's heap, as ever.

    For the guest, what `ql.restore` writes back is written.

    Args:
        ql: A Windows guest.

        memory: Its memory.

    Raises:
        ImportError: Qiling is not installed.
    """

    def __init__(self, ql: Qiling, memory: TrackedMemory) -> None:
        self._ql = ql
        self._memory = memory
        self._install()

    def watch(self, addr: int) -> WriteWatch:
        """Watch the tracked region around *addr*. Nothing is written to it yet.

        Raises:
            InvalidArgumentError: There is none.

            AlignmentError, NotTrackedError, ClosedError, FaultThreadError: As for `WriteWatch`.
        """
        found = self._memory.region(addr)
        if found is None:
            raise InvalidArgumentError(f"{addr:#x} is not tracked").with_hint("map or adopt it first")
        start, ram = found
        watch = self._memory.watches[ram] = WriteWatch(ram, base=start)
        return watch

    # -- The calls, with the arguments as the guest gave them --------------------------------------------------

    def _allocate(self, addr: int, size: int, kind: int, _protection: int) -> int:
        if kind & MEM_WRITE_WATCH and not kind & MEM_RESERVE:
            return self._refuse(Win32Error.ERROR_INVALID_PARAMETER)
        if self._at(addr):
            return addr  # committed already
        if not kind & MEM_WRITE_WATCH:
            return int(self._ql.os.heap.alloc(size))
        mem, size = self._ql.mem, self._ql.mem.align_up(size)
        if size and not addr:
            where = mem.find_free_space(size, _LOWEST_ALLOCATION, align=_ALLOCATION_GRANULARITY)
        else:
            where = addr - addr % _ALLOCATION_GRANULARITY
        if not (size and where and mem.is_available(where, size)):
            return self._refuse(_ERROR_INVALID_ADDRESS if size else Win32Error.ERROR_INVALID_PARAMETER)
        self._memory.map(where, size, info="[VirtualAlloc]")
        self.watch(where)
        return int(where)

    def _free(self, addr: int, size: int, kind: int) -> int:
        found = self._memory.region(addr)
        if found is None or found[1] not in self._memory.watches:
            self._ql.os.heap.free(addr)
            return 1
        start, ram = found
        stop = start + len(ram)
        first = addr - addr % WRITE_WATCH_GRANULARITY
        if kind not in {MEM_DECOMMIT, MEM_RELEASE} or (kind == MEM_RELEASE and size) or addr + size > stop:
            return self._refuse(Win32Error.ERROR_INVALID_PARAMETER)
        if not size and first != start:
            return self._refuse(_ERROR_INVALID_ADDRESS)
        if kind == MEM_RELEASE:
            self._ql.mem.unmap(start, len(ram))
        else:
            last = self._ql.mem.align_up(addr + size, WRITE_WATCH_GRANULARITY) if size else stop
            self._decommit(start, ram, first, last)
        return 1

    def _decommit(self, start: int, ram: TrackedRange, first: int, last: int) -> None:
        watch, size = self._memory.watches[ram], last - first
        if (first - start) % ram.granularity or size % ram.granularity:
            # In a larger page of the host, whose rest stays.
            self._ql.mem.write(first, bytes(size))
            watch.reset(first, size)
            return
        try:
            watch.decommit(first, size)
        finally:
            # Unicorn does not know of it: where nobody has access the guest's would end this process.
            watch.commit(first, size)
            self._memory.guest.forget_code([(first, last)])

    def _get(self, flags: int, base: int, size: int, addresses: int, count_at: int, granularity: int) -> int:
        mem, pointer_size = self._ql.mem, self._ql.arch.pointersize
        # Where nothing is watched any other watch refuses it, after the checks that come first.
        watches = self._memory.watches
        others = (watches[ram] for ram in self._memory.guest.ranges.values() if ram in watches)
        watch = self._at(base) or next(others, None)
        if watch is None:
            return self._answer(_NOTHING_WATCHED)
        count = mem.read_ptr(count_at) if self._is_mapped(count_at, pointer_size) else None
        answer = watch.get_write_watch(
            flags,
            base,
            size,
            addresses if self._is_mapped(addresses, (count or 0) * pointer_size) else None,
            count,
            granularity if self._is_mapped(granularity, 4) else None,
        )
        if answer.addresses:
            mem.write(addresses, answer.addresses.packed(pointer_size))
        if answer.count is not None:
            mem.write_ptr(count_at, answer.count)
        if answer.granularity is not None:
            mem.write_ptr(granularity, answer.granularity, 4)
        return self._answer(answer)

    def _reset(self, base: int, size: int) -> int:
        watch = self._at(base)
        return self._answer(watch.reset_write_watch(base, size) if watch else _NOTHING_WATCHED)

    def _refuse(self, error: int) -> int:
        self._ql.os.last_error = int(error)
        return 0

    def _answer(self, answer: WriteWatchAnswer) -> int:
        if answer.status:
            self._ql.os.last_error = int(answer.error)
        return answer.status

    def _at(self, addr: int) -> WriteWatch | None:
        found = self._memory.region(addr)
        return self._memory.watches.get(found[1]) if found else None

    def _is_mapped(self, addr: int, size: int) -> bool:
        """Whether the guest can write there. If not Windows answers as to NULL."""
        return bool(addr and size and self._ql.mem.is_mapped(addr, size))

    def _install(self) -> None:
        try:
            from qiling.os.const import DWORD, POINTER, SIZE_T  # noqa: PLC0415 - only who has a guest needs it
            from qiling.os.windows.fncc import STDCALL, winsdkapi  # noqa: PLC0415
        except ImportError as error:
            raise MissingPackageError("Qiling is not installed", name="qiling").with_hint(
                "pip install 'pagemapcompat[qiling]'"
            ) from error

        def hook(name: str, params: dict[str, int], answer: Callable[..., int]) -> None:
            def call(_ql: Qiling, _pc: int, given: dict[str, int]) -> int:
                return answer(*given.values())

            call.__name__ = f"hook_{name}"  # as which Qiling logs it
            self._ql.os.set_api(name, winsdkapi(cc=STDCALL, params=params)(call))

        memory = {"lpAddress": POINTER, "dwSize": SIZE_T}
        region = {"lpBaseAddress": POINTER, "dwRegionSize": SIZE_T}
        results = {"lpAddresses": POINTER, "lpdwCount": POINTER, "lpdwGranularity": POINTER}
        hook("VirtualAlloc", {**memory, "flAllocationType": DWORD, "flProtect": DWORD}, self._allocate)
        hook("VirtualFree", {**memory, "dwFreeType": DWORD}, self._free)
        hook("GetWriteWatch", {"dwFlags": DWORD, **region, **results}, self._get)
        hook("ResetWriteWatch", region, self._reset)
