"""Qiling instances with tracked memory: states are what Qiling's own are; a Windows guest reads its write watches."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from children import in_child
from conftest import PAGE, Flavour, lacking, private

from pagemapcompat import ClosedError, DirtyTracker, InvalidArgumentError, MissingPackageError, TrackedRange
from pagemapcompat.qiling import SavedMemory, TrackedMemory, WriteWatchApi
from pagemapcompat.writewatch import WriteWatch

RAM = 0x2000_0000
STUBS = 0x7FFF_0000
"""Where kernel32 would be."""
COUNT = bytes.fromhex("49ffc7bf88130020" + "4c893f" + "4c89bf00001000")
"""inc r15; mov edi, RAM + 5000; mov [rdi], r15; mov [rdi + 0x100000], r15."""
CODE = 0x11FF000
"""Where Qiling puts a program without a file, on Linux."""

Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a Qiling instance that runs some x86-64 code."""
    if importlib.util.find_spec("qiling") is None:
        lacking("qiling", "not installed (ModuleNotFoundError)", "pip install -e '.[qiling]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        qiling = importlib.import_module("qiling")
        const = importlib.import_module("qiling.const")

    def new(code: bytes = COUNT, system: str = "LINUX") -> Any:
        return qiling.Qiling(
            code=code,
            rootfs=str(tmp_path),
            archtype=const.QL_ARCH.X8664,
            ostype=const.QL_OS[system],
            verbose=const.QL_VERBOSE.DISABLED,
        )

    return new


def content(ql: Any) -> list[tuple[int, int, int, str, bytes]]:
    """All that it has mapped."""
    return [(*entry[:4], bytes(ql.mem.read(entry[0], entry[1] - entry[0]))) for entry in ql.mem.map_info]


def look(ql: Any) -> tuple[int, ...]:
    """What COUNT counts."""
    return ql.arch.regs.r15, ql.mem.read_ptr(RAM + 5000), ql.mem.read_ptr(RAM + 5000 + (1 << 20))


def answering(number: int) -> bytes:
    """A function that returns a number: mov eax, number; ret."""
    return b"\xb8" + number.to_bytes(4, "little") + b"\xc3"


def call(ql: Any, address: int) -> int:
    """Call a function, from a program that is written anew at the end of its first page."""
    program = b"\x48\xbb" + address.to_bytes(8, "little") + b"\xff\xd3\x90"
    ql.mem.write(CODE, program)
    ql.uc.ctl_remove_cache(CODE, CODE + 0x1000)
    ql.arch.regs.rsp = CODE - 0x1000
    ql.emu_start(CODE, CODE + len(program))
    return int(ql.arch.regs.rax)


# -- States ----------------------------------------------------------------------------------------------------


def test_states_are_those_of_qiling(make: Make, tracker: DirtyTracker) -> None:
    """Beside an instance that is not tracked: the same programs, stores, saves and restores, the same memory."""
    dice = random.Random(11)
    stock, ql = make(), make()
    stock.mem.map(RAM, 4 << 20, info="[ram]")
    memory = TrackedMemory(ql, tracker)
    memory.map(RAM, 4 << 20, info="[ram]")
    memory.adopt(CODE)
    states: list[tuple[Any, Any]] = []
    for _ in range(14):
        kind = dice.choice(("run", "write", "save", "restore"))
        place, data = RAM + dice.randrange((4 << 20) - 9), dice.randbytes(9)
        number = dice.randrange(len(states) or 1)
        if kind == "save" or not states:
            states.append((stock.save(cpu_context=True), ql.save(cpu_context=True)))
        for one, state in zip((stock, ql), states[number], strict=True):
            if kind == "run":
                one.run()
            elif kind == "write":
                one.mem.write(place, data)
            elif kind == "restore":
                one.restore(state)
        assert look(ql) == look(stock)
        assert content(ql) == content(stock)
        assert ql.arch.regs.save() == stock.arch.regs.save()
    for theirs, ours in states:
        saved = [(*entry, bytes(given)) for *entry, given in ours["mem"]["ram"]]
        assert saved == theirs["mem"]["ram"]
        assert [len(entry[4]) for entry in ours["mem"]["ram"]] == [len(entry[4]) for entry in theirs["mem"]["ram"]]


def test_only_what_was_written_is_saved(make: Make, tracker: DirtyTracker) -> None:
    """The first state has what there is, the next one what was written since, and so for what is restored."""
    ql = make()
    memory = TrackedMemory(ql, tracker)
    ram, stack = memory.map(RAM, 4 << 20), memory.adopt(CODE)

    def copied(state: Any) -> dict[int, int]:
        return {entry[0]: entry[4].snapshot.pages for entry in state["mem"]["ram"] if isinstance(entry[4], SavedMemory)}

    first = ql.save()
    assert copied(first) == {RAM: 0, CODE - 0x1FF000: 1}
    ql.run()
    assert copied(ql.save()) == {RAM: 2, CODE - 0x1FF000: 0}
    ram.reset()
    stack.reset()
    ql.restore(first)
    assert set(ram.peek().page_indices()) == {5000 // PAGE, (5000 + (1 << 20)) // PAGE}
    assert stack.peek().pages == 0


def test_a_file_goes_both_ways(make: Make, tmp_path: Path) -> None:
    """ql.save(snapshot=...) writes what any Qiling reads, and reads what any wrote: code too, which then runs."""
    name = str(tmp_path / "state")
    with DirtyTracker() as tracker:
        ql, stock = make(), make()
        memory = TrackedMemory(ql, tracker)
        memory.map(RAM, 4 << 20)
        ql.run()
        ql.mem.write(RAM, answering(1))
        ql.save(snapshot=name)
        stock.restore(snapshot=name)
        assert content(stock) == content(ql)
        stock.run()
        assert look(stock) == (2, 2, 2)
        stock.save(snapshot=name)
        ql.restore(snapshot=name)  # the first one changes what Unicorn knows of the CPU: all is translated anew
        ql.mem.write(RAM, answering(2))
        assert call(ql, RAM) == 2
        ql.restore(snapshot=name)
        assert content(stock) == content(ql)
        assert look(ql) == (2, 2, 2)
        assert call(ql, RAM) == 1
        assert list(memory.guest.ranges) == [RAM]


def test_restored_code_runs(make: Make, tracker: DirtyTracker) -> None:
    """By itself it would not: the same restore, of the memory alone, leaves the old code running."""
    ql = make()
    ram = TrackedMemory(ql, tracker).map(RAM, 16 * PAGE)
    ql.mem.write(RAM, answering(1))
    state = ql.save()
    ql.restore(state)  # the first one changes what Unicorn knows of the CPU, so that all is translated anew
    saved = next(entry[4] for entry in state["mem"]["ram"] if entry[0] == RAM)
    ql.mem.write(RAM, answering(2))
    assert call(ql, RAM) == 2
    ram.restore(saved.snapshot)
    assert call(ql, RAM) == 2
    ql.mem.write(RAM, answering(2))
    ql.restore(state)
    assert call(ql, RAM) == 1


def test_all_parts_of_a_state(make: Make, tracker: DirtyTracker) -> None:
    """Those that Qiling can save and restore for a program without a file."""
    ql = make()
    TrackedMemory(ql, tracker).map(RAM, 4 << 20)
    ql.mem.map_mmio(0x6000_0000, PAGE, lambda *_: 7, lambda *_: None)
    ql.run()
    state = ql.save(reg=True, mem=True, fd=True, cpu_context=True, os=True, loader=True)
    assert [entry[:4] for entry in state["mem"]["mmio"]] == [(0x6000_0000, 0x6000_0000 + PAGE, 3, "[mmio]")]
    ql.mem.unmap(0x6000_0000, PAGE)
    ql.run()
    ql.restore(state)
    assert look(ql) == (1, 1, 1)
    assert ql.mem.read_ptr(0x6000_0000, 1) == 7


# -- Regions ---------------------------------------------------------------------------------------------------


def test_adopt(make: Make, tracker: DirtyTracker) -> None:
    """What was mapped already keeps its content, its name and its permissions; and runs."""
    ql = make()
    ql.mem.map(RAM, 4 << 20, 7, "[ram]")
    ql.mem.write(RAM + 9 * PAGE - 3, b"across")
    before = content(ql)
    memory = TrackedMemory(ql, tracker)
    memory.adopt(RAM + 5 * PAGE)
    memory.adopt(CODE)
    assert content(ql) == before
    assert sorted(memory.guest.ranges) == [CODE - 0x1FF000, RAM]
    ql.run()
    assert look(ql) == (1, 1, 1)
    for address, message in (
        (RAM, "0x20000000 is tracked already"),
        (0x6000_0000, "no memory is mapped at 0x60000000"),
    ):
        with pytest.raises(InvalidArgumentError, match=message) as caught:
            memory.adopt(address)
        assert caught.value.hint


def test_a_second_one_is_refused(make: Make, tracker: DirtyTracker) -> None:
    """Whatever it would track anew, the first one saves and restores; and what is no tracker replaces nothing."""
    ql = make()
    before = ql.mem.save
    with pytest.raises(TypeError, match="tracker=None is no DirtyTracker"):
        TrackedMemory(ql, None)  # type: ignore[arg-type]
    assert ql.mem.save == before
    memory = TrackedMemory(ql, tracker)
    with pytest.raises(InvalidArgumentError, match="has another TrackedMemory"):
        TrackedMemory(ql, tracker)
    assert ql.mem.save == memory.save


def test_what_cannot_be_adopted_stays_as_it_was(make: Make) -> None:
    """Its content, name and permissions; and it still runs."""
    ql = make()
    ql.mem.map(RAM, 4 << 20, 7, "[ram]")
    ql.mem.write(RAM, b"here")
    before = content(ql)
    with DirtyTracker() as tracker:
        memory = TrackedMemory(ql, tracker)
    with pytest.raises(ClosedError):
        memory.adopt(RAM)
    assert content(ql) == before
    assert memory.guest.ranges == {}
    ql.run()
    assert look(ql) == (1, 1, 1)


def test_unmap(make: Make, tracker: DirtyTracker) -> None:
    """A region that is unmapped comes back with a state, as ordinary memory; meanwhile its place is free for others."""
    ql = make()
    memory = TrackedMemory(ql, tracker)
    memory.map(RAM, 4 << 20, info="[ram]")
    ql.run()
    before, state = content(ql), ql.save()
    ql.mem.unmap(RAM, 4 << 20)
    assert memory.guest.ranges == {}
    ql.restore(state)
    assert content(ql) == before
    assert memory.guest.ranges == {}
    ql.mem.unmap(RAM, 4 << 20)
    ram = memory.map(RAM, 4 << 20, info="[ram]")
    assert ql.mem.read_ptr(RAM + 5000) == 0
    ram.reset()
    ql.restore(state)
    assert content(ql) == before
    assert ram.peek().pages == 2
    # Where a region of another length is, the state's bytes are written into what there is.
    ql.mem.unmap(RAM, 4 << 20)
    memory.map(RAM, 2 << 20, info="[half]")
    memory.map(RAM + (2 << 20), 2 << 20, info="[half]")
    ql.restore(state)
    assert look(ql) == (1, 1, 1)
    assert len(memory.guest.ranges) == 2


def test_unmap_a_part(make: Make, tracker: DirtyTracker) -> None:
    """What is left goes on as ordinary memory, with its content, also when the region's place is used again."""
    ql = make()
    memory = TrackedMemory(ql, tracker)
    memory.map(RAM, 16 * PAGE)
    for page in range(16):
        ql.mem.write(RAM + page * PAGE, bytes([page]))
    ql.mem.unmap(RAM, 2 * PAGE)
    assert memory.guest.ranges == {}
    memory.map(RAM, PAGE)
    ql.mem.write(RAM, b"new")
    state = ql.save()
    for page in (0, *range(2, 16)):
        assert ql.mem.read(RAM + page * PAGE, 1) == (bytes([page]) if page else b"n")
        ql.mem.write(RAM + page * PAGE, b"x")
    ql.restore(state)
    for page in (0, *range(2, 16)):
        assert ql.mem.read(RAM + page * PAGE, 1) == (bytes([page]) if page else b"n")


def test_memory_goes_with_the_last_part_of_it(make: Make, tracker: DirtyTracker) -> None:
    """Not before: Unicorn has its address. What else is mapped in its place does not keep it."""
    ql = make()
    memory = TrackedMemory(ql, tracker)
    mine = private(16)
    memory._add(RAM, mine, 7, None)
    for first, pages in ((4, 4), (0, 4), (12, 4)):
        ql.mem.unmap(RAM + first * PAGE, pages * PAGE)
        memory.map(RAM + first * PAGE, pages * PAGE)
        ql.mem.write(RAM + 9 * PAGE, b"still there")
        with pytest.raises(BufferError):
            mine.close()
    ql.mem.unmap(RAM + 2 * PAGE, 10 * PAGE)
    assert sorted(memory.guest.ranges) == [RAM + 12 * PAGE]
    mine.close()
    ql.mem.write(RAM, b"the rest of a new one")
    ql.mem.unmap(RAM, 2 * PAGE)
    ql.mem.unmap(RAM + 12 * PAGE, 4 * PAGE)
    assert memory.guest._pins == []


def test_protections_stay(make: Make, tracker: DirtyTracker) -> None:
    """ql.mem.protect cuts a region into entries; each is saved and restored, and keeps its new protection."""
    ql = make()
    memory = TrackedMemory(ql, tracker)
    memory.map(RAM, 4 << 20)
    ql.run()
    state, middle = ql.save(), RAM + 8 * PAGE
    ql.mem.protect(middle, PAGE, 1)
    ql.run()
    cut = ql.save()
    assert [entry[:2] for entry in cut["mem"]["ram"] if entry[0] >= RAM] == [
        (RAM, middle),
        (middle, middle + PAGE),
        (middle + PAGE, RAM + (4 << 20)),
    ]
    assert content(ql) == [(*entry, bytes(given)) for *entry, given in cut["mem"]["ram"]]
    protections = [entry[:3] for entry in ql.mem.map_info]
    for one, number in ((state, 1), (cut, 2), (state, 1)):
        ql.restore(one)
        assert look(ql) == (number, number, number)
        assert [entry[:3] for entry in ql.mem.map_info] == protections


def test_memory_in_the_way(make: Make, tracker: DirtyTracker) -> None:
    """Refused, and Qiling's own map of the memory stays as it was."""
    ql = make(b"\x90")
    memory = TrackedMemory(ql, tracker)
    before = list(ql.mem.map_info)
    with pytest.raises(InvalidArgumentError, match="is not free: the guest has 0x1000000 to 0x1a00000"):
        memory.map(CODE, PAGE)
    assert ql.mem.map_info == before
    ql.run()


# -- Windows ---------------------------------------------------------------------------------------------------

APIS = ("VirtualAlloc", "VirtualFree", "GetWriteWatch", "ResetWriteWatch")
MEM_WRITE_WATCH, MEM_COMMIT, MEM_RESERVE, MEM_DECOMMIT, MEM_RELEASE = 0x20_0000, 0x1000, 0x2000, 0x4000, 0x8000
FAILURE, INVALID_PARAMETER, NOACCESS, INVALID_ADDRESS = 0xFFFF_FFFF, 87, 998, 487


class Windows:
    """A Windows guest whose calls are made one by one."""

    def __init__(self, make: Make, tracker: DirtyTracker) -> None:
        self.ql = ql = make(b"\x90", "WINDOWS")
        self.memory = TrackedMemory(ql, tracker)
        self.api = WriteWatchApi(ql, self.memory)
        self.scratch = ql.mem.map_anywhere(0x10000)
        # As the loader does for each export of a library.
        ql.mem.map(STUBS, 0x1000)
        for number, name in enumerate(APIS):
            ql.loader.import_symbols[STUBS + 16 * number] = {
                "name": name.encode(),
                "ordinal": number,
                "dll": "kernel32",
            }

    def call(self, name: str, *arguments: int) -> int:
        """Call it from the guest, by Windows' convention for x86-64."""
        ql, regs = self.ql, self.ql.arch.regs
        program = b"\xff\xd0\x90"  # call rax; nop
        ql.mem.write(self.scratch, program)
        regs.rsp = self.scratch + 0x8000
        regs.rax = STUBS + 16 * APIS.index(name)
        for register, argument in zip(("rcx", "rdx", "r8", "r9"), arguments, strict=False):
            setattr(regs, register, argument)
        for number, argument in enumerate(arguments[4:], 4):
            ql.mem.write_ptr(regs.rsp + 8 * number, argument)
        ql.emu_start(self.scratch, self.scratch + len(program))
        return int(regs.rax)

    def run(self, address: int) -> int:
        """Have the guest call a function of no arguments."""
        self.ql.arch.regs.rsp = self.scratch + 0x8000
        self.ql.arch.regs.rax = address
        self.ql.mem.write(self.scratch + 0x300, b"\xff\xd0\x90")
        self.ql.emu_start(self.scratch + 0x300, self.scratch + 0x303)
        return int(self.ql.arch.regs.rax)

    def store(self, address: int) -> None:
        """Have the guest store a byte."""
        program = b"\x48\xb8" + address.to_bytes(8, "little") + b"\xc6\x00\x01"  # mov rax, address; mov byte [rax], 1
        self.ql.mem.write(self.scratch + 0x100, program)
        self.ql.uc.ctl_remove_cache(self.scratch, self.scratch + 0x1000)
        self.ql.emu_start(self.scratch + 0x100, self.scratch + 0x100 + len(program))

    def written(self, base: int, size: int, flags: int = 0, room: int = 64) -> list[int]:
        """GetWriteWatch: offsets of the pages that the guest finds in its array."""
        addresses, count, granularity = self.scratch + 0x1000, self.scratch + 0x200, self.scratch + 0x208
        self.ql.mem.write_ptr(count, room)
        assert self.call("GetWriteWatch", flags, base, size, addresses, count, granularity) == 0
        assert self.ql.mem.read_ptr(granularity, 4) == 0x1000
        found = self.ql.mem.read_ptr(count)
        return [self.ql.mem.read_ptr(addresses + 8 * number) - base for number in range(found)]


def test_a_guest_reads_its_write_watch(make: Make, tracker: DirtyTracker) -> None:
    """Pages in order, as many as fit; with the flag those are reset, and no other; ResetWriteWatch resets a range."""
    guest = Windows(make, tracker)
    base = guest.call("VirtualAlloc", 0, 0x400000, MEM_WRITE_WATCH | MEM_RESERVE | MEM_COMMIT, 4)
    assert base
    assert base % 0x10000 == 0
    assert guest.written(base, 0x400000) == []
    for offset in (0x5000, 0x1234, 0x3FF000):
        guest.store(base + offset)
    if PAGE == 0x1000:
        assert guest.written(base, 0x400000) == [0x1000, 0x5000, 0x3FF000]
        assert guest.written(base, 0x400000, flags=1, room=2) == [0x1000, 0x5000]
        assert guest.written(base, 0x400000) == [0x3FF000]
        guest.store(base + 0x9000)
    assert guest.call("ResetWriteWatch", base, 0x400000) == 0
    assert guest.written(base, 0x400000) == []
    # Committing what was reserved changes nothing.
    guest.store(base + 0x5000)
    assert guest.call("VirtualAlloc", base + 0x5000, 0x1000, MEM_COMMIT, 4) == base + 0x5000
    assert 0x5000 in guest.written(base, 0x400000)


def test_a_restore_counts_as_a_write_for_the_guest(make: Make, tracker: DirtyTracker) -> None:
    """And a watch goes on after it."""
    guest = Windows(make, tracker)
    base = guest.call("VirtualAlloc", 0, 0x400000, MEM_WRITE_WATCH | MEM_RESERVE | MEM_COMMIT, 4)
    state = guest.ql.save()
    guest.store(base + 5 * PAGE)
    assert guest.call("ResetWriteWatch", base, 0x400000) == 0
    guest.ql.restore(state)
    assert guest.ql.mem.read(base + 5 * PAGE, 1) == b"\0"
    assert 5 * PAGE in guest.written(base, 0x400000, flags=1)
    assert guest.written(base, 0x400000) == []


def test_what_windows_refuses(make: Make, tracker: DirtyTracker) -> None:
    """In Windows' order: NULL or no memory behind a pointer, then sizes and flags, then the array, then the range."""
    guest = Windows(make, tracker)
    ql, scratch, nowhere = guest.ql, guest.scratch, 0x6000_0000
    array, count, granularity = scratch + 0x1000, scratch + 0x200, scratch + 0x208
    assert guest.call("GetWriteWatch", 0, RAM, 0x1000, array, count, granularity) == FAILURE
    assert ql.os.last_error == INVALID_PARAMETER
    base = guest.call("VirtualAlloc", 0, 0x10000, MEM_WRITE_WATCH | MEM_RESERVE | MEM_COMMIT, 4)
    guest.store(base)

    def refused(flags: int, where: int, size: int, *pointers: int, room: int = 16) -> int:
        ql.os.last_error = 0
        ql.mem.write_ptr(count, room)
        assert guest.call("GetWriteWatch", flags, where, size, *pointers) == FAILURE
        assert ql.mem.read_ptr(count) == room
        return int(ql.os.last_error)

    for bad in (0, nowhere):
        assert refused(2, base, 0, bad, bad, granularity) == NOACCESS
        assert refused(2, base, 0, bad, count, bad) == NOACCESS
        assert refused(0, nowhere, 0x1000, bad, count, granularity) == NOACCESS
        assert refused(0, base, 0, bad, count, granularity) == INVALID_PARAMETER
    assert refused(2, base, 0x1000, array, count, granularity) == INVALID_PARAMETER
    assert refused(0, base, 0x1000, array, count, granularity, room=0) == INVALID_PARAMETER
    assert refused(1, base, 0x1000, array, count, granularity, room=1 << 32) == NOACCESS
    assert refused(0, nowhere, 0x1000, array, count, granularity) == INVALID_PARAMETER
    assert refused(0, base, 0x10001, array, count, granularity) == INVALID_PARAMETER
    assert guest.call("ResetWriteWatch", base, 0x10001) == FAILURE
    assert guest.call("ResetWriteWatch", nowhere, 0x1000) == FAILURE
    assert guest.written(base, 0x1000) == [0]


def test_what_the_guest_allocates_and_frees(make: Make, tracker: DirtyTracker) -> None:
    """Watched memory is mapped where it is wanted, or refused; freed, it is gone. Other memory is Qiling's heap's."""
    guest = Windows(make, tracker)
    kind = MEM_WRITE_WATCH | MEM_RESERVE | MEM_COMMIT
    base = guest.call("VirtualAlloc", 0x5000_1234, 0x1001, kind, 4)
    assert base == 0x5000_0000
    assert list(guest.memory.guest.ranges) == [base]
    guest.ql.mem.map(0x5100_0000, 0x10000)
    for address, size, error in (
        (0x5100_0000, 0x1000, INVALID_ADDRESS),
        (1, 0x1000, INVALID_ADDRESS),
        (0, 0, INVALID_PARAMETER),
    ):
        assert guest.call("VirtualAlloc", address, size, kind, 4) == 0
        assert guest.ql.os.last_error == error
    for address in (0, base):  # nobody may watch what is not reserved by the same call
        guest.ql.os.last_error = 0
        assert guest.call("VirtualAlloc", address, 0x1000, MEM_WRITE_WATCH | MEM_COMMIT, 4) == 0
        assert guest.ql.os.last_error == INVALID_PARAMETER
    other = guest.call("VirtualAlloc", 0, 0x1000, MEM_RESERVE | MEM_COMMIT, 4)
    assert guest.ql.os.heap.size(other) >= 0x1000
    assert guest.call("VirtualFree", other, 0, MEM_RELEASE) == 1
    assert guest.call("VirtualFree", base, 0, MEM_RELEASE) == 1
    assert guest.memory.guest.ranges == {}
    assert not guest.ql.mem.is_mapped(base, 0x1000)
    assert guest.call("ResetWriteWatch", base, 0x1000) == FAILURE
    assert guest.call("VirtualAlloc", base, 0x1000, kind, 4) == base
    assert guest.written(base, 0x1000) == []


def test_decommitted_memory_is_forgotten(make: Make, tracker: DirtyTracker) -> None:
    """Its pages are zero and clean at once and when they are committed again; code in them runs no more."""
    guest = Windows(make, tracker)
    ql, page = guest.ql, max(PAGE, 0x1000)
    base = guest.call("VirtualAlloc", 0, 16 * page, MEM_WRITE_WATCH | MEM_RESERVE | MEM_COMMIT, 4)
    for number in (3, 5, 6, 7):
        ql.mem.write(base + number * page, answering(number))
    assert guest.run(base + 5 * page) == 5
    # All pages of which it names a byte.
    assert guest.call("VirtualFree", base + 6 * page - 1, 2, MEM_DECOMMIT) == 1
    assert set(guest.written(base, 16 * page)) >= {3 * page, 7 * page}
    assert not {5 * page, 6 * page} & set(guest.written(base, 16 * page))
    assert ql.mem.read(base + 5 * page, 2 * page) == bytes(2 * page)
    assert guest.call("VirtualAlloc", base + 5 * page, 2 * page, MEM_COMMIT, 4) == base + 5 * page
    assert not {5 * page, 6 * page} & set(guest.written(base, 16 * page))
    place = guest.memory.guest.ranges[base].range.start
    ctypes.memmove(place + 5 * page, answering(9), 6)  # behind Unicorn's back, which notices what it writes itself
    assert guest.run(base + 5 * page) == 9
    guest.store(base + 6 * page)
    assert 6 * page in guest.written(base, 16 * page)
    # All of it.
    assert guest.call("VirtualFree", base, 0, MEM_DECOMMIT) == 1
    assert guest.written(base, 16 * page) == []
    assert ql.mem.read(base, 16 * page) == bytes(16 * page)
    assert list(guest.memory.guest.ranges) == [base]


def test_other_states_know_of_a_decommit(make: Make, tracker: DirtyTracker) -> None:
    """A state that was saved before has the content; one saved afterwards has none."""
    guest = Windows(make, tracker)
    base = guest.call("VirtualAlloc", 0, 16 * PAGE, MEM_WRITE_WATCH | MEM_RESERVE | MEM_COMMIT, 4)
    guest.ql.mem.write(base + 2 * PAGE, b"content")
    before = guest.ql.save()
    assert guest.call("VirtualFree", base, 0, MEM_DECOMMIT) == 1
    after = guest.ql.save()
    for state, there in ((before, b"content"), (after, bytes(7)), (before, b"content")):
        guest.ql.restore(state)
        assert guest.ql.mem.read(base + 2 * PAGE, 7) == there


def test_a_part_of_a_larger_page_is_decommitted(
    make: Make, tracker: DirtyTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 4096 bytes of it; the rest keeps its content and what was written."""
    guest = Windows(make, tracker)
    base = guest.call("VirtualAlloc", 0, 16 * PAGE, MEM_WRITE_WATCH | MEM_RESERVE | MEM_COMMIT, 4)
    monkeypatch.setattr(TrackedRange, "granularity", 4 * PAGE)
    for number in range(8):
        guest.ql.mem.write(base + number * PAGE, b"x")
    assert guest.call("VirtualFree", base + 5 * PAGE, PAGE, MEM_DECOMMIT) == 1
    assert [guest.ql.mem.read(base + number * PAGE, 1) for number in (4, 5, 6)] == [b"x", b"\0", b"x"]
    written = guest.written(base, 8 * PAGE)
    assert set(range(0, 8 * PAGE, PAGE)) - set(written) == {5 * PAGE}


def test_an_interrupted_decommit_leaves_the_guest_its_memory(
    make: Make, flavour: Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the host had taken it away, the guest's next access would end this process."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def check() -> None:
        with flavour.tracker() as tracker:
            guest = Windows(make, tracker)
            base = guest.call("VirtualAlloc", 0, 16 * PAGE, MEM_WRITE_WATCH | MEM_RESERVE | MEM_COMMIT, 4)
            with monkeypatch.context() as patch:
                patch.setattr(WriteWatch, "_forget", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    guest.api._free(base, 4 * PAGE, MEM_DECOMMIT)
            guest.store(base + PAGE)
            assert PAGE in guest.written(base, 16 * PAGE)

    in_child(check)


def test_frees_that_windows_refuses(make: Make, tracker: DirtyTracker) -> None:
    """Content and what was written stay."""
    guest = Windows(make, tracker)
    size = 0x10000
    base = guest.call("VirtualAlloc", 0, size, MEM_WRITE_WATCH | MEM_RESERVE | MEM_COMMIT, 4)
    guest.store(base + 0x2000)
    for address, length, kind, error in (
        (base, 0x1000, MEM_RELEASE, INVALID_PARAMETER),
        (base + 0x1000, 0x1000, MEM_RELEASE, INVALID_PARAMETER),
        (base + 0x1000, 0, MEM_RELEASE, INVALID_ADDRESS),
        (base + 0x1000, 0, MEM_DECOMMIT, INVALID_ADDRESS),
        (base, size + 1, MEM_DECOMMIT, INVALID_PARAMETER),
        (base + 0x2000, (1 << 64) - 1, MEM_DECOMMIT, INVALID_PARAMETER),
        (base, 0, 0, INVALID_PARAMETER),
        (base, size, MEM_DECOMMIT | MEM_RELEASE, INVALID_PARAMETER),
    ):
        guest.ql.os.last_error = 0
        assert guest.call("VirtualFree", address, length, kind) == 0
        assert guest.ql.os.last_error == error
    assert guest.ql.mem.read(base + 0x2000, 1) == b"\1"
    assert 0x2000 in guest.written(base, size)
    assert guest.call("VirtualFree", base + 5, 0, MEM_RELEASE) == 1
    assert not guest.ql.mem.is_mapped(base, size)
    assert guest.memory.watches == {}


def test_a_watch_ends_with_its_region(make: Make, tracker: DirtyTracker) -> None:
    """Also when the host unmaps it, all of it or a part: the guest is told that nothing is watched there."""
    guest = Windows(make, tracker)
    for size in (16 * PAGE, PAGE):
        base = guest.call("VirtualAlloc", 0, 16 * PAGE, MEM_WRITE_WATCH | MEM_RESERVE | MEM_COMMIT, 4)
        (watch,) = guest.memory.watches.values()
        guest.ql.mem.unmap(base, size)
        assert guest.memory.watches == {}
        with pytest.raises(ClosedError):
            watch.get()
        assert guest.call("ResetWriteWatch", base + 2 * PAGE, PAGE) == FAILURE
        assert guest.ql.os.last_error == INVALID_PARAMETER


def test_watch_memory_of_the_host(make: Make, tracker: DirtyTracker) -> None:
    """What the host mapped is watched from when it says so."""
    guest = Windows(make, tracker)
    guest.memory.map(0x5000_0000, 64 * PAGE)
    guest.store(0x5000_0000 + PAGE)
    guest.api.watch(0x5000_0000 + 7 * PAGE)
    guest.store(0x5000_0000 + 3 * PAGE)
    assert guest.written(0x5000_0000, 64 * PAGE)[0] == 3 * PAGE
    with pytest.raises(InvalidArgumentError, match="0x60000000 is not tracked"):
        guest.api.watch(0x6000_0000)


def test_without_qiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    for name in ("qiling", "qiling.os.const"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match="not installed") as caught:
        WriteWatchApi(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    assert (caught.value.name, caught.value.hint) == ("qiling", "pip install 'pagemapcompat[qiling]'")
