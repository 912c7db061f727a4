"""Unicorn guests with tracked memory: they become what they were, and what they run is what they have."""

from __future__ import annotations

import doctest
import gc
import itertools
import mmap
import os
import random
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from conftest import PAGE, PRIVATE, Flavour, need_shared, private
from unicorn import (
    UC_ARCH_ARM,
    UC_ARCH_ARM64,
    UC_ARCH_M68K,
    UC_ARCH_MIPS,
    UC_ARCH_PPC,
    UC_ARCH_RISCV,
    UC_ARCH_S390X,
    UC_ARCH_SPARC,
    UC_ARCH_X86,
    UC_HOOK_CODE,
    UC_HOOK_TLB_FILL,
    UC_MODE_32,
    UC_MODE_64,
    UC_MODE_ARM,
    UC_MODE_BIG_ENDIAN,
    UC_MODE_MIPS32,
    UC_MODE_PPC32,
    UC_MODE_RISCV64,
    UC_MODE_SPARC32,
    UC_PROT_ALL,
    UC_PROT_EXEC,
    UC_PROT_READ,
    UC_PROT_WRITE,
    UC_TLB_VIRTUAL,
    Uc,
    UcError,
)
from unicorn.arm64_const import UC_ARM64_REG_X0
from unicorn.arm_const import UC_ARM_REG_R0
from unicorn.m68k_const import UC_M68K_REG_D0
from unicorn.mips_const import UC_MIPS_REG_2
from unicorn.ppc_const import UC_PPC_REG_3
from unicorn.riscv_const import UC_RISCV_REG_A0
from unicorn.s390x_const import UC_S390X_REG_R2
from unicorn.sparc_const import UC_SPARC_REG_O0
from unicorn.unicorn_const import UC_ERR_FETCH_UNMAPPED, UC_ERR_READ_UNMAPPED
from unicorn.x86_const import (
    UC_X86_REG_CR0,
    UC_X86_REG_CR3,
    UC_X86_REG_CR4,
    UC_X86_REG_EAX,
    UC_X86_REG_MSR,
    UC_X86_REG_RAX,
    UC_X86_REG_RBX,
    UC_X86_REG_RCX,
    UC_X86_REG_RIP,
    UC_X86_REG_RSP,
    UC_X86_REG_XMM0,
)

import pagemapcompat.unicorn
from pagemapcompat import (
    AlignmentError,
    AlreadyRegisteredError,
    ClosedError,
    DirtyTracker,
    InvalidArgumentError,
    KernelError,
    MissingPackageError,
    NotTrackableError,
    RestoreError,
    Snapshot,
)
from pagemapcompat.unicorn import GuestState, TrackedGuest

CODE = 0x1000
"""Memory that is not tracked."""
RAM = 0x2000_0000
SPACE_END = 1 << 64


def machine(tracker: DirtyTracker, *regions: tuple[int, int], **options: Any) -> TrackedGuest:
    """An x86-64 guest with regions of so many pages, and some memory that is not tracked, with a stack."""
    guest = TrackedGuest(Uc(UC_ARCH_X86, UC_MODE_64), tracker, **options)
    guest.uc.mem_map(CODE, 4 * PAGE)
    for address, pages in regions:
        guest.map(address, pages * PAGE)
    return guest


def answering(number: int) -> bytes:
    """A function that returns a number: mov eax, number; ret."""
    return b"\xb8" + number.to_bytes(4, "little") + b"\xc3"


def call(guest: TrackedGuest, address: int) -> int:
    """Call a function. Not as the first thing to run: that would be translated anew in any case."""
    uc = guest.uc
    program = b"\x48\xbb" + address.to_bytes(8, "little") + b"\xff\xd3\x90"  # mov rbx, address; call rbx; nop
    uc.mem_write(CODE, program)
    uc.ctl_remove_cache(CODE, CODE + PAGE)
    uc.reg_write(UC_X86_REG_RSP, CODE + 2 * PAGE)
    uc.emu_start(CODE, CODE + len(program))
    return int(uc.reg_read(UC_X86_REG_RAX))


def pages(written: Any) -> set[int]:
    """The pages of one region that were written back."""
    return set(written.page_indices())


# -- States ----------------------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_a_guest_becomes_what_it_was(tracker: DirtyTracker) -> None:
    """Two regions and the registers, from any state to any other; what is written back is what differs."""
    dice = random.Random(7)
    guest = machine(tracker, (RAM, 40), (RAM + (1 << 30), 9))
    uc, sizes = guest.uc, {RAM: 40, RAM + (1 << 30): 9}

    def look() -> tuple[Any, ...]:
        registers = (UC_X86_REG_RAX, UC_X86_REG_RCX, UC_X86_REG_RIP, UC_X86_REG_RSP, UC_X86_REG_XMM0)
        memory = {address: bytes(uc.mem_read(address, count * PAGE)) for address, count in sizes.items()}
        return memory, [uc.reg_read(one) for one in registers]

    states = []
    for number in range(6):
        for _ in range(number * 3):
            address = dice.choice(list(sizes))
            at = address + dice.randrange(sizes[address]) * PAGE + dice.randrange(PAGE - 8)
            program = (
                b"\x48\xb8" + at.to_bytes(8, "little") + b"\x48\x89\x08\x48\xff\xc1"
            )  # mov rax, at; mov [rax], rcx; inc rcx
            uc.mem_write(CODE, program)
            uc.ctl_remove_cache(CODE, CODE + PAGE)
            uc.emu_start(CODE, CODE + len(program))
        uc.reg_write(UC_X86_REG_XMM0, number << 100)
        states.append((guest.snapshot(), look()))
    for _ in range(20):
        uc.mem_write(RAM + dice.randrange(40) * PAGE, b"scribble")
        uc.reg_write(UC_X86_REG_RCX, dice.getrandbits(64))
        (before, _), (state, then) = look(), dice.choice(states)
        written = guest.restore(state, verify=dice.random() < 0.3)
        assert look() == then
        for address, result in written.items():
            changed = {
                page
                for page in range(sizes[address])
                if before[address][page * PAGE : (page + 1) * PAGE] != then[0][address][page * PAGE : (page + 1) * PAGE]
            }
            assert changed <= pages(result)


@pytest.mark.kernel
def test_only_what_was_written_is_copied_and_written_back(tracker: DirtyTracker) -> None:
    """And a reader of the memory finds it written by the restore."""
    guest = machine(tracker, (RAM, 64), (2 * RAM, 8))
    guest.uc.mem_write(RAM, b"x" * 64 * PAGE)
    first = guest.snapshot()
    assert first.memory[RAM].pages == 64
    guest.uc.mem_write(RAM + 5 * PAGE, b"y")
    second = guest.snapshot()
    assert {address: one.pages for address, one in second.memory.items()} == {RAM: 1, 2 * RAM: 0}
    assert second.memory[RAM].parent is first.memory[RAM]
    guest.uc.mem_write(RAM + 9 * PAGE, b"z")
    guest.ranges[RAM].reset()
    written = guest.restore(first)
    assert {address: pages(one) for address, one in written.items()} == {RAM: {5, 9}, 2 * RAM: set()}
    assert pages(guest.ranges[RAM].collect()) == {5, 9}
    assert guest.uc.mem_read(RAM, 64 * PAGE) == b"x" * 64 * PAGE


def test_a_snapshot_from_a_hook(tracker: DirtyTracker) -> None:
    """Between two instructions, while the guest runs: restored, it goes on from there."""
    guest = machine(tracker, (RAM, 4))
    uc = guest.uc
    step = b"\x48\xff\xc0\x48\x89\x03"  # inc rax; mov [rbx], rax
    uc.mem_write(RAM, step * 4)
    uc.reg_write(UC_X86_REG_RBX, RAM + 2 * PAGE)
    states = []

    def hook(_uc: Uc, address: int, _size: int, _data: object) -> None:
        if address == RAM + 2 * len(step):
            states.append(guest.snapshot())

    handle = uc.hook_add(UC_HOOK_CODE, hook)
    uc.emu_start(RAM, RAM + 4 * len(step))
    uc.hook_del(handle)
    assert uc.mem_read(RAM + 2 * PAGE, 1) == b"\x04"
    for _ in range(2):
        guest.restore(states[0])
        assert uc.mem_read(RAM + 2 * PAGE, 1) == b"\x02"
        assert uc.reg_read(UC_X86_REG_RIP) == RAM + 2 * len(step)
        uc.emu_start(uc.reg_read(UC_X86_REG_RIP), RAM + 4 * len(step))
        assert (uc.reg_read(UC_X86_REG_RAX), uc.mem_read(RAM + 2 * PAGE, 1)) == (4, b"\x04")


def test_protections_and_mappings_are_no_part_of_a_state(tracker: DirtyTracker) -> None:
    """Pages that the guest may not write, or sees no longer, are restored, and stay as they are for the guest."""
    guest = machine(tracker)
    memory = private(8)
    guest.map(RAM, memory)
    state = guest.snapshot()
    guest.uc.mem_write(RAM, b"x" * 8 * PAGE)
    guest.uc.mem_protect(RAM + 2 * PAGE, PAGE, UC_PROT_READ)
    guest.uc.mem_unmap(RAM + 5 * PAGE, 2 * PAGE)
    regions = list(guest.uc.mem_regions())
    assert pages(guest.restore(state, verify=True)[RAM]) == set(range(8))
    assert memory[:] == bytes(8 * PAGE)
    assert list(guest.uc.mem_regions()) == regions
    with pytest.raises(UcError) as caught:
        guest.uc.mem_read(RAM + 5 * PAGE, 1)
    assert caught.value.errno == UC_ERR_READ_UNMAPPED


def test_a_state_that_does_not_fit_is_refused_before_anything_changes(tracker: DirtyTracker) -> None:
    """That of another guest; regions mapped or unmapped since, or of other lengths; a snapshot that was dropped."""
    guest, other = machine(tracker, (RAM, 4), (2 * RAM, 4)), machine(tracker, (RAM, 4), (2 * RAM, 4))
    state = guest.snapshot()
    guest.uc.mem_write(RAM, b"kept")
    guest.uc.reg_write(UC_X86_REG_RCX, 5)

    def refused(error: type[Exception], message: str, state: GuestState = state) -> None:
        with pytest.raises(error, match=message) as caught:
            guest.restore(state)
        assert caught.value.__notes__
        assert guest.uc.mem_read(RAM, 4) == b"kept"
        assert guest.uc.reg_read(UC_X86_REG_RCX) == 5

    refused(InvalidArgumentError, "not of this guest", other.snapshot())
    guest.map(3 * RAM, PAGE)
    refused(InvalidArgumentError, f"has {PAGE} bytes at 0x60000000, and had no")
    guest.unmap(3 * RAM)
    guest.unmap(2 * RAM)
    refused(InvalidArgumentError, f"has no bytes at 0x40000000, and had {4 * PAGE}")
    guest.map(2 * RAM, 5 * PAGE)
    refused(InvalidArgumentError, f"has {5 * PAGE} bytes at 0x40000000, and had {4 * PAGE}")
    guest.unmap(2 * RAM)
    guest.map(2 * RAM, 4 * PAGE)
    state.memory[2 * RAM].drop()
    refused(ClosedError, "0x40000000 was dropped")


def test_what_the_memory_of_another_guest_held(tracker: DirtyTracker) -> None:
    """It can be written back here, without the registers; the code of it runs."""
    one, other = machine(tracker, (RAM, 4), (2 * RAM, 4)), machine(tracker, (RAM, 4))
    other.uc.mem_write(RAM, answering(11))
    one.uc.mem_write(RAM, answering(12))
    one.uc.reg_write(UC_X86_REG_RCX, 13)
    assert call(one, RAM) == 12
    assert pages(one.write_back(other.snapshot().memory)[RAM]) >= {0}
    assert call(one, RAM) == 11
    assert one.uc.reg_read(UC_X86_REG_RCX) == 13
    # Whatever is wrong is found before anything is written back.
    state, small = one.snapshot(), other.snapshot().memory[RAM]
    one.uc.mem_write(RAM, answering(14))
    for memory in ({RAM: state.memory[RAM], 3 * RAM: small}, {RAM: state.memory[RAM], 2 * RAM: part_of(tracker)}):
        with pytest.raises(InvalidArgumentError, match=r"no region of this guest begins at 0x60000000|does not fit"):
            one.write_back(memory)
    with pytest.raises(TypeError) as caught:
        one.write_back(state)  # type: ignore[arg-type]
    assert "give its memory" in caught.value.__notes__[0]
    assert one.uc.mem_read(RAM, len(answering(14))) == answering(14)
    with pytest.raises(InvalidArgumentError, match="no region of this guest begins at 0x40000000"):
        other.write_back(state.memory)


def part_of(tracker: DirtyTracker) -> Snapshot:
    """A snapshot of a single page."""
    return tracker.track(private(1)).snapshot()


# -- Translated code -------------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_restored_code_runs(tracker: DirtyTracker) -> None:
    """By itself it would not: the same restore, of the memory alone, leaves the old code running."""
    guest = machine(tracker, (RAM, 8))
    functions = (RAM, RAM + PAGE - 3, RAM + 5 * PAGE)

    def put(number: int) -> None:
        for function in functions:
            guest.uc.mem_write(function, answering(number))

    put(1)
    state = guest.snapshot()
    put(2)
    assert [call(guest, function) for function in functions] == [2, 2, 2]
    guest.ranges[RAM].restore(state.memory[RAM])
    assert [guest.uc.mem_read(function, 6) for function in functions] == [answering(1)] * 3
    assert [call(guest, function) for function in functions] == [2, 2, 2]
    put(2)
    guest.restore(state)
    assert [call(guest, function) for function in functions] == [1, 1, 1]


@attrs.frozen
class Architecture:
    """How to say: jump, and set a register."""

    arch: int
    mode: int
    register: int
    jump: Callable[[int], bytes]
    """Over 0x1000 bytes from its own address, which is given."""
    load: Callable[[int], bytes]
    """A number into the register."""
    nothing: bytes


def little(word: int) -> bytes:
    """An instruction, or an operand."""
    return word.to_bytes(4, "little")


def big(word: int) -> bytes:
    """The same, for the others."""
    return word.to_bytes(4, "big")


ARCHITECTURES = {
    "x86-64": Architecture(
        UC_ARCH_X86,
        UC_MODE_64,
        UC_X86_REG_EAX,
        lambda _: b"\xe9" + little(0xFFB),
        lambda n: b"\xb8" + little(n),
        b"\x90",
    ),
    "x86": Architecture(
        UC_ARCH_X86,
        UC_MODE_32,
        UC_X86_REG_EAX,
        lambda _: b"\xe9" + little(0xFFB),
        lambda n: b"\xb8" + little(n),
        b"\x90",
    ),
    "arm": Architecture(
        UC_ARCH_ARM,
        UC_MODE_ARM,
        UC_ARM_REG_R0,
        lambda _: little(0xEA0003FE),
        lambda n: little(0xE3A00000 + n),
        little(0xE320F000),
    ),
    "arm64": Architecture(
        UC_ARCH_ARM64,
        UC_MODE_ARM,
        UC_ARM64_REG_X0,
        lambda _: little(0x14000400),
        lambda n: little(0xD2800000 + (n << 5)),
        little(0xD503201F),
    ),
    "mips": Architecture(
        UC_ARCH_MIPS,
        UC_MODE_MIPS32,
        UC_MIPS_REG_2,
        lambda at: little(0x08000000 + (at + 0x1000 >> 2)) + little(0),
        lambda n: little(0x24020000 + n),
        little(0),
    ),
    "riscv": Architecture(
        UC_ARCH_RISCV,
        UC_MODE_RISCV64,
        UC_RISCV_REG_A0,
        lambda _: little(0x106F),
        lambda n: little(0x513 + (n << 20)),
        little(0x13),
    ),
    "ppc": Architecture(
        UC_ARCH_PPC,
        UC_MODE_PPC32 | UC_MODE_BIG_ENDIAN,
        UC_PPC_REG_3,
        lambda _: big(0x48001000),
        lambda n: big(0x38600000 + n),
        big(0x60000000),
    ),
    "s390x": Architecture(
        UC_ARCH_S390X,
        UC_MODE_BIG_ENDIAN,
        UC_S390X_REG_R2,
        lambda _: b"\xc0\xf4" + big(0x800),
        lambda n: big(0xA7290000 + n),
        b"\x07\0",
    ),
    "m68k": Architecture(
        UC_ARCH_M68K,
        UC_MODE_BIG_ENDIAN,
        UC_M68K_REG_D0,
        lambda _: big(0x60000FFE),
        lambda n: big(0x70004E71 + (n << 16)),
        b"\x4e\x71",
    ),
    "sparc": Architecture(
        UC_ARCH_SPARC,
        UC_MODE_SPARC32 | UC_MODE_BIG_ENDIAN,
        UC_SPARC_REG_O0,
        lambda _: big(0x10800400) + big(0x01000000),
        lambda n: big(0x90102000 + n),
        big(0x01000000),
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_restored_code_runs_on(name: str) -> None:
    """Every architecture that has a translator."""
    kind, base = ARCHITECTURES[name], 0x10000
    middle = base + 0x1000

    def put(number: int) -> int:
        program = kind.load(number)
        uc.mem_write(middle, program + kind.jump(middle + len(program)))
        return middle + 0x1000 + len(program)

    def run() -> int:
        uc.emu_start(base, end + len(kind.nothing))
        return int(uc.reg_read(kind.register))

    with DirtyTracker() as tracker, TrackedGuest(Uc(kind.arch, kind.mode), tracker) as guest:
        uc = guest.uc
        guest.map(base, 16 * PAGE)
        uc.mem_write(base, kind.jump(base))
        end = put(1)
        uc.mem_write(end, kind.nothing)
        state = guest.snapshot()
        assert run() == 1
        put(2)
        uc.ctl_flush_tb()
        assert run() == 2
        guest.ranges[base].restore(state.memory[base])
        assert run() == 2, "this architecture needs no help"
        put(2)
        guest.restore(state)
        assert run() == 1


def test_restored_code_runs_on_both_sides_of_a_border(tracker: DirtyTracker) -> None:
    """uc.mem_protect and uc.mem_unmap cut a region into several; pages in a row are restored on all of them."""
    guest = machine(tracker, (RAM, 8))
    functions = [RAM + page * PAGE for page in range(8)]
    for number in (1, 2):
        for function in functions:
            guest.uc.mem_write(function, answering(number))
        if number == 1:
            state = guest.snapshot()
    guest.uc.mem_protect(RAM + 2 * PAGE, PAGE, UC_PROT_READ | UC_PROT_EXEC)
    guest.uc.mem_protect(RAM + 4 * PAGE, PAGE, UC_PROT_READ | UC_PROT_EXEC)
    guest.uc.mem_unmap(RAM + 6 * PAGE, PAGE)
    del functions[6]
    assert {call(guest, function) for function in functions} == {2}
    guest.restore(state)
    assert {call(guest, function) for function in functions} == {1}


def test_code_restored_while_it_may_not_run(tracker: DirtyTracker) -> None:
    """A guest that writes its code and runs it by turns: what ran before is forgotten though it could not run."""
    guest = machine(tracker, (RAM, 8))
    guest.uc.mem_write(RAM, answering(1))
    guest.uc.mem_write(RAM + 5 * PAGE, answering(1))
    state = guest.snapshot()
    for function in (RAM, RAM + 5 * PAGE):
        guest.uc.mem_write(function, answering(2))
        assert call(guest, function) == 2
    guest.uc.mem_protect(RAM, 8 * PAGE, UC_PROT_READ | UC_PROT_WRITE)
    guest.restore(state)
    guest.uc.mem_protect(RAM, 8 * PAGE, UC_PROT_ALL)
    assert (call(guest, RAM), call(guest, RAM + 5 * PAGE)) == (1, 1)


class Paged:
    """An x86-64 guest that sees memory through page tables, which lie in tracked memory of their own."""

    TABLES = RAM + (1 << 24)

    def __init__(self, tracker: DirtyTracker) -> None:
        self.guest = machine(tracker, (RAM, 16), (self.TABLES, 32))
        self._free = itertools.count(self.TABLES, 0x1000)

    def space(self) -> int:
        """New page tables, by which the guest sees its untracked memory where it is."""
        root = next(self._free)
        for page in range(4):
            self.show(root, CODE + page * 0x1000, CODE + page * 0x1000)
        return root

    def show(self, root: int, address: int, where: int) -> None:
        """Let the guest see at *address* the 0x1000 bytes that are at *where*."""
        uc, table = self.guest.uc, root
        for shift in (39, 30, 21, 12):
            at = table + 8 * (address >> shift & 511)
            table = where if shift == 12 else int.from_bytes(uc.mem_read(at, 8), "little") & -0x1000 or next(self._free)
            uc.mem_write(at, (table | 0x63).to_bytes(8, "little"))  # present, writable, accessed, dirty

    def enter(self, root: int) -> None:
        """Use these tables from now on."""
        uc = self.guest.uc
        uc.reg_write(UC_X86_REG_CR3, root)
        uc.reg_write(UC_X86_REG_CR4, uc.reg_read(UC_X86_REG_CR4) | 1 << 5)  # PAE
        uc.reg_write(UC_X86_REG_MSR, (0xC0000080, 0x500))  # EFER: long mode
        uc.reg_write(UC_X86_REG_CR0, uc.reg_read(UC_X86_REG_CR0) | 1 << 31 | 1)


def test_code_of_a_guest_with_page_tables(tracker: DirtyTracker) -> None:
    """It is forgotten where it lies, wherever the guest sees it."""
    seen, machine = 0x80_7000_1000, Paged(tracker)
    guest, root = machine.guest, machine.space()
    machine.show(root, seen, RAM + 0x3000)
    guest.uc.mem_write(RAM + 0x3000, answering(1))
    machine.enter(root)
    state = guest.snapshot()
    guest.uc.mem_write(RAM + 0x3000, answering(2))
    assert call(guest, seen) == 2
    guest.ranges[RAM].restore(state.memory[RAM])
    assert call(guest, seen) == 2
    guest.uc.mem_write(RAM + 0x3000, answering(2))
    guest.restore(state)
    assert call(guest, seen) == 1


def test_page_tables_are_restored(tracker: DirtyTracker) -> None:
    """The guest sees again what it saw then: where other tables were written, and where others were used."""
    seen, machine = 0x80_7000_1000, Paged(tracker)
    guest, root, other = machine.guest, machine.space(), machine.space()
    machine.show(root, seen, RAM + 0x1000)
    machine.show(other, seen, RAM + 0x2000)
    for number in (1, 2, 3):
        guest.uc.mem_write(RAM + number * 0x1000, answering(number))
    machine.enter(root)
    assert call(guest, seen) == 1
    state = guest.snapshot()
    machine.show(root, seen, RAM + 0x3000)
    machine.enter(root)
    assert call(guest, seen) == 3
    guest.ranges[machine.TABLES].restore(state.memory[machine.TABLES])
    assert call(guest, seen) == 3, "the guest's TLB is gone by itself"
    guest.restore(state)
    assert call(guest, seen) == 1
    machine.enter(other)
    assert call(guest, seen) == 2
    assert {address: pages(one) for address, one in guest.restore(state).items()} == {RAM: set(), machine.TABLES: set()}
    assert call(guest, seen) == 1


def test_a_guest_with_a_tlb_of_its_own(tracker: DirtyTracker) -> None:
    """A hook decides where its memory is: it is never asked about an address that is not the guest's."""
    seen = 0x7000_0000
    guest = machine(tracker, (RAM, 8), virtual_tlb=True)
    uc = guest.uc

    def fill(_uc: Uc, address: int, _access: int, result: Any, _data: object) -> bool:
        asked.append(address)
        address &= -0x1000
        result.paddr = address - seen + RAM if seen <= address < seen + 8 * PAGE else address
        result.perms = UC_PROT_ALL
        return address < 4 * PAGE + CODE or address >= seen

    asked: list[int] = []
    uc.hook_add(UC_HOOK_TLB_FILL, fill)
    uc.ctl_set_tlb_mode(UC_TLB_VIRTUAL)
    uc.mem_write(RAM, answering(1))
    state = guest.snapshot()
    uc.mem_write(RAM, answering(2))
    assert call(guest, seen) == 2
    guest.ranges[RAM].restore(state.memory[RAM])
    assert call(guest, seen) == 2
    uc.mem_write(RAM, answering(2))
    guest.restore(state)
    assert call(guest, seen) == 1
    assert not [address for address in asked if RAM <= address < RAM + 8 * PAGE]


@pytest.mark.kernel
def test_after_a_restore_that_failed_no_old_code_runs(flavour: Flavour) -> None:
    """What verify=True is for, a write that no kernel shows, is found; and the guest runs what there is by then."""
    need_shared()
    file = os.memfd_create("ram")
    os.ftruncate(file, 8 * PAGE)
    memory, unseen = mmap.mmap(file, 8 * PAGE), mmap.mmap(file, 8 * PAGE)
    os.close(file)
    with flavour.tracker() as tracker:
        guest = machine(tracker)
        ram = guest.map(RAM, memory)
        guest.uc.mem_write(RAM, answering(1))
        state = guest.snapshot()
        guest.uc.mem_write(RAM, answering(2))
        guest.uc.reg_write(UC_X86_REG_RCX, 7)
        assert call(guest, RAM) == 2
        unseen[5 * PAGE] = 1
        with pytest.raises(RestoreError) as caught:
            guest.restore(state, verify=True)
        assert caught.value.differing is not None
        assert list(caught.value.differing.spans()) == [(5 * PAGE, 6 * PAGE)]
        assert guest.uc.reg_read(UC_X86_REG_RCX) == 7
        assert call(guest, RAM) == 1
        # The next one compares everything.
        assert 5 in pages(guest.restore(state, verify=True)[RAM])
        assert unseen[5 * PAGE] == 0
        assert ram.range.length == 8 * PAGE


# -- Regions ---------------------------------------------------------------------------------------------------

MISTAKES = {
    "unaligned address": (RAM + 1, PAGE, 7, AlignmentError, "at 0x20000001 are not made of whole pages of this guest"),
    "unaligned length": (RAM, PAGE + 1, 7, AlignmentError, f"{PAGE + 1} bytes at 0x20000000"),
    "nothing": (RAM, 0, 7, InvalidArgumentError, "0 bytes at 0x20000000 are no part of a guest"),
    "negative length": (RAM, -PAGE, 7, InvalidArgumentError, f"-{PAGE} bytes"),
    "negative address": (-PAGE, PAGE, 7, InvalidArgumentError, f"at -{PAGE:#x} are no part"),
    "over the end": (SPACE_END - PAGE, 2 * PAGE, 7, InvalidArgumentError, "are no part of a guest"),
    "in the way": (
        CODE,
        PAGE,
        7,
        InvalidArgumentError,
        f"0x1000 to {CODE + PAGE:#x} is not free: the guest has 0x1000 to {CODE + 4 * PAGE:#x}",
    ),
    "permissions": (RAM, PAGE, 8, InvalidArgumentError, "perms=8 are no permissions"),
    "more than there is": (RAM, 1 << 62, 7, KernelError, f"mmap: Cannot allocate memory, for {1 << 62} bytes"),
}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        (name, given)
        for name, mistake in MISTAKES.items()
        for given in (True, False)
        if 0 < mistake[1] < 1 << 62 or not given
    ],
)
def test_a_mistake_maps_and_tracks_nothing(name: str, given: bool) -> None:
    """The message has the numbers, the hint a way out; and the memory is as free as before."""
    address, length, perms, error, message = MISTAKES[name]
    with DirtyTracker() as tracker:
        guest = machine(tracker)
        before = list(guest.uc.mem_regions())
        memory = mmap.mmap(-1, length, flags=PRIVATE) if given else length
        with pytest.raises(error, match=message) as caught:
            guest.map(address, memory, perms)
        assert caught.value.hint
        assert list(guest.uc.mem_regions()) == before
        assert guest.ranges == {}
        if isinstance(memory, mmap.mmap):
            tracker.track(memory).close()
            memory.close()


@pytest.mark.parametrize("wrong", [None, "x"], ids=repr)
def test_a_wrong_type_names_itself_and_what_to_give(tracker: DirtyTracker, wrong: Any) -> None:
    """Whatever is given it for, and before anything is changed."""
    guest = machine(tracker, (RAM, PAGE))
    for ask in (
        lambda: TrackedGuest(wrong, tracker),
        lambda: TrackedGuest(guest.uc, wrong),
        lambda: guest.map(RAM + PAGE, PAGE, wrong),
        lambda: guest.write_back(wrong),
        lambda: guest.write_back({wrong: guest.snapshot().memory[RAM]}),
    ):
        with pytest.raises(TypeError) as caught:
            ask()
        assert repr(wrong) in str(caught.value) + str(caught.value.__notes__) or type(wrong).__name__ in str(
            caught.value
        )
        assert "hint: " in caught.value.__notes__[0]
    assert list(guest.ranges) == [RAM]


def test_memory_that_cannot_be_tracked_is_not_mapped() -> None:
    """Read-only, tracked by somebody else, or by a tracker that is closed."""
    memory = private(4)
    with DirtyTracker() as tracker:
        guest = machine(tracker)
        before = list(guest.uc.mem_regions())
        with pytest.raises(NotTrackableError, match="read-only"):
            guest.map(RAM, mmap.mmap(-1, PAGE, prot=mmap.PROT_READ))
        with tracker.track(memory), pytest.raises(AlreadyRegisteredError):
            guest.map(RAM, memory)
    with pytest.raises(ClosedError):
        guest.map(RAM, memory)
    assert (list(guest.uc.mem_regions()), guest.ranges) == (before, {})
    memory.close()


def test_memory_of_every_kind_of_owner(tracker: DirtyTracker) -> None:
    """An mmap, another buffer, an address: the guest and the owner see the same, and its stores are collected."""
    own = private(4)
    numbers = memoryview(private(4)).cast("Q")
    raw = private(4)
    with memoryview(raw) as view, DirtyTracker() as other, other.track(view) as found:
        where = found.range
    guest = machine(tracker)
    uc = guest.uc
    for number, memory in enumerate((own, numbers, where, (where.start, PAGE))):
        address = RAM + number * (1 << 24)
        if number == 3:
            guest.unmap(RAM + 2 * (1 << 24))
        ram = guest.map(address, memory)
        assert guest.ranges[address] is ram
        uc.mem_write(address, b"\x88\x05" + little(0x100 - 6) + b"\x90")  # mov [rip + 0xfa], al
        uc.reg_write(UC_X86_REG_RAX, 65 + number)
        ram.reset()
        uc.emu_start(address, address + 6)
        assert pages(ram.collect()) == {0}
    assert (own[0x100], numbers[0x20], raw[0x100]) == (65, 66, 68)


def test_the_guest_keeps_its_memory(flavour: Flavour) -> None:
    """As long as Unicorn can use it nobody can close it, whatever became of the tracker and of this object."""
    memory = private(4)
    with flavour.tracker() as tracker:
        guest = machine(tracker)
        uc = guest.uc
        guest.map(RAM, memory)
        guest.map(2 * RAM, PAGE)
    with pytest.raises(ClosedError):
        guest.snapshot()
    del guest
    gc.collect()
    with pytest.raises(BufferError):
        memory.close()
    for address in (RAM, 2 * RAM):
        uc.mem_write(address, b"here")
        assert uc.mem_read(address, 4) == b"here"
    del uc
    gc.collect()
    memory.close()


def test_unmap(tracker: DirtyTracker) -> None:
    """The guest has it no more, nor the tracker; the memory is the owner's, and its place is free."""
    memory = private(4)
    with machine(tracker, (RAM, 4)) as guest:
        ram = guest.map(2 * RAM, memory)
        guest.uc.mem_write(2 * RAM, answering(1))
        assert call(guest, 2 * RAM) == 1
        guest.uc.mem_protect(2 * RAM + PAGE, PAGE, UC_PROT_READ)
        guest.unmap(2 * RAM)
        with pytest.raises(ClosedError):
            ram.peek()
        with pytest.raises(UcError) as caught:
            call(guest, 2 * RAM)
        assert caught.value.errno == UC_ERR_FETCH_UNMAPPED
        memory.close()
        guest.map(2 * RAM, 4 * PAGE)
        guest.uc.mem_unmap(2 * RAM, 4 * PAGE)
        with pytest.raises(InvalidArgumentError, match=r"0x40000000 to \w+ is not free"):
            guest.map(2 * RAM, 4 * PAGE)
        guest.unmap(2 * RAM)
        guest.map(2 * RAM, 4 * PAGE)
        guest.uc.mem_write(2 * RAM, answering(2))
        assert call(guest, 2 * RAM) == 2
        with pytest.raises(InvalidArgumentError, match="no region of this guest begins at 0x40000001") as refused:
            guest.unmap(2 * RAM + 1)
        assert refused.value.hint == "its regions begin at 0x20000000, 0x40000000"
        assert repr(guest) == f"<TrackedGuest 0x20000000+{4 * PAGE:#x}, 0x40000000+{4 * PAGE:#x}>"
    assert guest.ranges == {}
    assert [first for first, _, _ in guest.uc.mem_regions()] == [CODE]
    guest.close()


def test_without_unicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "unicorn", None)
    with (
        DirtyTracker() as tracker,
        pytest.raises(MissingPackageError, match="not installed") as caught,
    ):
        TrackedGuest(SimpleNamespace(), tracker)  # type: ignore[arg-type]
    assert (caught.value.name, caught.value.hint) == ("unicorn", "pip install 'pagemapcompat[unicorn]'")


def test_the_example() -> None:
    """In the module's docstring."""
    assert doctest.testmod(pagemapcompat.unicorn) == (0, 5)
