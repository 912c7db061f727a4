"""Real input: an emulator's guest, the kernel and the sockets write, and exactly the pages they wrote are collected."""

from __future__ import annotations

import mmap
import os
import random
import socket
from collections.abc import Iterable

import pytest
from conftest import (  # noqa: F401
    CHILD_SECONDS,
    PAGE,
    Flavour,
    area,
    claims,
    disable,
    libc,
    need,
    need_shared,
    pages_of,
    private,
    write,
)
from unicorn import UC_ARCH_X86, UC_HOOK_MEM_WRITE, UC_MODE_64, UC_PROT_ALL, Uc, UcError
from unicorn.unicorn_const import UC_ERR_WRITE_UNMAPPED
from unicorn.x86_const import UC_X86_REG_RAX, UC_X86_REG_RCX

from pagemapcompat import DirtyTracker, Feature, Guarantee, TrackedRange

pytestmark = pytest.mark.kernel

RAM = 0x4000_0000
"""Where the guest sees the tracked memory."""
CODE = 0x1000_0000
"""Where it sees its program, which is not tracked unless a test puts it into RAM."""
CODE_SIZE = 1 << 20

STORES = {
    1: "8808",  # mov [rax], cl
    2: "668908",  # mov [rax], cx
    4: "8908",  # mov [rax], ecx
    8: "488908",  # mov [rax], rcx
    16: "0f1100",  # movups [rax], xmm0
}
"""x86-64 instructions that store so many bytes at rax."""


class Guest:
    """An x86-64 machine whose RAM is tracked memory, or some pages of it: (first, count) each."""

    def __init__(self, ram: TrackedRange, *, hooked: bool, pieces: Iterable[tuple[int, int]] = ()) -> None:
        self.uc = Uc(UC_ARCH_X86, UC_MODE_64)
        self.uc.mem_map(CODE, CODE_SIZE, UC_PROT_ALL)
        self._next = CODE
        for first, count in pieces or [(0, len(ram) // PAGE)]:
            self.uc.mem_map_ptr(RAM + first * PAGE, count * PAGE, UC_PROT_ALL, ram.range.start + first * PAGE)
        self.seen: set[int] = set()
        """The pages of RAM that the hook saw stored to."""
        if hooked:
            self.uc.hook_add(UC_HOOK_MEM_WRITE, self._on_write)

    def _on_write(self, _uc: Uc, _access: int, address: int, size: int, _value: int, _data: object) -> None:
        self.seen |= touched(address - RAM, size)

    def run(self, program: bytes) -> None:
        """Run a program from its first byte to its end, from memory that is not tracked.

        Each gets a place of its own: Unicorn may go on with what it translated before the host wrote over it.
        """
        at = self._next
        self._next += len(program) + 16
        self.uc.mem_write(at, program)
        self.uc.emu_start(at, at + len(program))

    def store(self, stores: Iterable[tuple[int, int]]) -> set[int]:
        """Have the guest store *size* bytes at each *offset* of RAM. Returns the pages, by construction."""
        program, pages = bytearray(), set()
        for offset, size in stores:
            program += b"\x48\xb8" + (RAM + offset).to_bytes(8, "little")  # mov rax, address
            program += bytes.fromhex(STORES[size])
            pages |= touched(offset, size)
        self.run(bytes(program))
        return pages


def touched(offset: int, size: int) -> set[int]:
    """The pages that *size* bytes at *offset* lie in."""
    return set(range(offset // PAGE, (offset + size - 1) // PAGE + 1))


def random_stores(dice: random.Random, pages: int, count: int) -> list[tuple[int, int]]:
    """Stores of every size; a third of them across a page boundary."""
    stores = []
    for _ in range(count):
        size = dice.choice(list(STORES))
        if size > 1 and dice.randrange(3) == 0:
            offset = dice.randrange(1, pages) * PAGE - dice.randrange(1, size)
        else:
            offset = dice.randrange(pages * PAGE - size + 1)
        stores.append((offset, size))
    return stores


@pytest.mark.parametrize("hooked", [True, False], ids=["hooked", "unhooked"])
def test_guest_stores_are_collected_exactly(tracker: DirtyTracker, hooked: bool) -> None:
    """Rounds of stores of every size: the pages stored to by construction, seen by a hook, and collected are equal."""
    pages, dice = 600, random.Random(2)
    memory = private(pages)
    ram = tracker.track(memory)
    guest = Guest(ram, hooked=hooked)
    for number in range(12):
        guest.seen.clear()
        stored = guest.store(random_stores(dice, pages, number * 4))
        if hooked:
            assert guest.seen == stored
        assert pages_of(ram.peek()) == stored
        assert pages_of(ram.collect()) == stored
    assert pages_of(ram.collect()) == set()


def test_a_guest_store_across_a_page_boundary_touches_both_pages(tracker: DirtyTracker) -> None:
    """One byte on either side is enough, whichever page was written before, and the value arrives whole."""
    memory = private(8)
    ram = tracker.track(memory)
    guest = Guest(ram, hooked=False)
    guest.uc.reg_write(UC_X86_REG_RCX, 0x1122334455667788)
    for before in (set(), {2}, {3}):
        write(memory, *before)
        assert guest.store([(3 * PAGE - 1, 8)]) == {2, 3}
        assert pages_of(ram.collect()) == {2, 3}
        assert memory[3 * PAGE - 1 : 3 * PAGE + 7] == (0x1122334455667788).to_bytes(8, "little")
    assert guest.store([(3 * PAGE - 16, 16)]) == {2}
    assert pages_of(ram.collect()) == {2}


def test_guest_loads_are_not_stores(tracker: DirtyTracker) -> None:
    """A guest that reads all of its memory, touched and untouched, leaves it clean."""
    memory = private(64)
    write(memory, *range(0, 64, 2))
    ram = tracker.track(memory)
    guest = Guest(ram, hooked=False)
    program = bytearray()
    for page in range(64):
        program += b"\x48\xb8" + (RAM + page * PAGE).to_bytes(8, "little") + b"\x8a\x08"  # mov cl, [rax]
    guest.run(bytes(program))
    assert pages_of(ram.collect()) == set()


def test_host_writes_through_the_emulator(tracker: DirtyTracker) -> None:
    """uc.mem_write is collected like a guest's store, mixed with them, several pages at a time too."""
    memory = private(64)
    ram = tracker.track(memory)
    guest = Guest(ram, hooked=False)
    for offset, length in ((5 * PAGE, 1), (9 * PAGE - 1, 2), (20 * PAGE + 7, 3 * PAGE), (63 * PAGE, PAGE)):
        stored = guest.store([(40 * PAGE, 4)])
        guest.uc.mem_write(RAM + offset, b"\xa5" * length)
        assert pages_of(ram.collect()) == stored | touched(offset, length)
        assert memory[offset : offset + length] == b"\xa5" * length


def test_a_guest_that_modifies_its_own_program(tracker: DirtyTracker) -> None:
    """Code in tracked memory patches code on another page, which then runs as patched: that page alone is collected."""
    memory = private(16)
    ram = tracker.track(memory)
    guest = Guest(ram, hooked=False)
    patched, patcher = RAM + 9 * PAGE, RAM + 3 * PAGE
    store = b"\x88\x0d" + (patched + 1 - (patcher + 6)).to_bytes(4, "little", signed=True)
    jump = b"\xe9" + (patched - (patcher + 11)).to_bytes(4, "little", signed=True)
    guest.uc.mem_write(patched, b"\xb0\x00")  # mov al, 0
    guest.uc.mem_write(patcher, store + jump)  # mov [patched + 1], cl; jmp patched
    assert pages_of(ram.collect()) == {3, 9}
    for value in (7, 77, 77, 177):
        guest.uc.reg_write(UC_X86_REG_RCX, value)
        guest.uc.emu_start(patcher, patched + 2)
        assert guest.uc.reg_read(UC_X86_REG_RAX) & 0xFF == value
        assert pages_of(ram.collect()) == {9}


def test_guest_memory_among_guard_pages(flavour: Flavour, area) -> None:  # noqa: F811
    """Every fourth page made PROT_NONE makes many mappings; the guest's stores between them are collected exactly."""
    pages, dice = 64, random.Random(3)
    memory = area(pages)
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        for page in range(3, pages, 4):
            libc.mprotect(memory.start + page * PAGE, PAGE, libc.PROT_NONE)
        guest = Guest(ram, hooked=False, pieces=[(page, 3) for page in range(0, pages, 4)])
        for _ in range(5):
            chosen = dice.sample([page for page in range(pages) if page % 4 != 3], 12)
            stored = guest.store((page * PAGE + 8, 8) for page in chosen)
            assert stored == set(chosen)
            assert pages_of(ram.collect()) == stored
        # A guest that runs into a guard page is stopped by its emulator; its page is not reported.
        with pytest.raises(UcError) as caught:
            guest.store([(3 * PAGE, 8)])
        assert caught.value.errno == UC_ERR_WRITE_UNMAPPED
        assert pages_of(ram.collect()) == set()


def received(memory: memoryview) -> int:
    """Receive as much as fits from a socket that has it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        theirs.settimeout(CHILD_SECONDS)
        theirs.sendall(b"\x5a" * len(memory))
        return ours.recv_into(memory, len(memory), socket.MSG_WAITALL)


def read(memory: memoryview) -> int:
    """Read as much as fits, scattered over two buffers."""
    middle = len(memory) // 2
    with open("/dev/zero", "rb", buffering=0) as zero:
        return os.readv(zero.fileno(), [memory[:middle], memory[middle:]])


def read_into(memory: memoryview) -> int:
    """Read as file objects do."""
    with open("/dev/zero", "rb", buffering=0) as zero:
        return zero.readinto(memory) or 0


@pytest.mark.parametrize("privileged", [True, False], ids=["any-userfaultfd", "user-mode-only"])
@pytest.mark.parametrize("fill", [read, read_into, received])
def test_what_the_kernel_fills_is_collected(
    flavour: Flavour, monkeypatch: pytest.MonkeyPatch, fill, privileged: bool
) -> None:
    """Where KERNEL_WRITES is promised; where it is not, the call fails with EFAULT, and nothing is changed."""
    if not privileged:
        need(Feature.UFFD_USER_MODE_ONLY)
        disable(monkeypatch, *flavour.disabled, "uffd-syscall", "uffd-device")
    memory = private(64)
    write(memory, *range(10, 20))  # pages that are there, and pages that are not
    with flavour.tracker() as tracker, memoryview(memory) as view:
        ram = tracker.track(memory)
        assert claims(tracker, Guarantee.KERNEL_WRITES) == (
            flavour.backend == "pagemap-scan" or "USER_MODE_ONLY" not in tracker.selection.userfaultfd[-1]
        )
        for first, length in ((12 * PAGE + 3, PAGE), (15 * PAGE, 8 * PAGE), (40 * PAGE - 1, 2), (60 * PAGE, 4 * PAGE)):
            before = memory[first : first + length]
            with view[first : first + length] as target:
                if claims(tracker, Guarantee.KERNEL_WRITES):
                    assert fill(target) == length
                    assert pages_of(ram.collect()) == touched(first, length)
                    continue
                with pytest.raises(OSError, match="Bad address"):
                    fill(target)
            assert memory[first : first + length] == before
            assert pages_of(ram.collect()) == set()


def test_the_kernel_fills_what_is_unprotected(flavour: Flavour) -> None:
    """The way out where KERNEL_WRITES is not promised: unprotect, read, collect."""
    memory = private(16)
    with flavour.tracker() as tracker, memoryview(memory) as view:
        ram = tracker.track(memory)
        ram.unprotect(4 * PAGE, 8 * PAGE)
        with view[4 * PAGE : 8 * PAGE] as target:
            assert received(target) == 4 * PAGE
        assert memory[4 * PAGE : 8 * PAGE] == b"\x5a" * 4 * PAGE
        assert pages_of(ram.collect()) == {4, 5, 6, 7}
        assert pages_of(ram.collect()) == set()


def test_guest_memory_that_is_shared(flavour: Flavour) -> None:
    """Guest RAM in a shared mapping is collected exactly, where shared memory can be tracked at all."""
    need_shared()
    dice = random.Random(4)
    memory = mmap.mmap(-1, 64 * PAGE)
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        guest = Guest(ram, hooked=True)
        for _ in range(4):
            guest.seen.clear()
            stored = guest.store(random_stores(dice, 64, 20))
            assert pages_of(ram.collect()) == stored == guest.seen
