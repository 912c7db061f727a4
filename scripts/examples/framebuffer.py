"""A guest draws into a framebuffer among guard pages, and we watch which of its pages change.

Unicorn emulates an x86-64 machine whose video memory is our own mmap. As in graphics hardware it consists of tiles, of
a page each here, so that a map of the written pages is a picture of what moved. Behind every row is a guard page.
Afterwards each backend that works here does the mailing list's three operations on a larger memory, against the clock.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import mmap
import random
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any

from unicorn import UC_ARCH_X86, UC_HOOK_MEM_WRITE, UC_MODE_64, UC_PROT_ALL, UC_PROT_READ, UC_PROT_WRITE, Uc
from unicorn.x86_const import (
    UC_X86_REG_R8,
    UC_X86_REG_R9,
    UC_X86_REG_R10,
    UC_X86_REG_R11,
    UC_X86_REG_R12,
    UC_X86_REG_RBX,
    UC_X86_REG_RSI,
)

from pagemapcompat import DirtyTracker, KernelError, ScanResult, TrackedRange, page_size

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = page_size()
COLUMNS, ROWS = 37, 9
STRIDE = COLUMNS + 1
"""In tiles: a row and its guard page."""
VIDEO, PROGRAM, TABLE = 0x1000_0000, 0x10_0000, 0x11_0000
"""Where the guest sees its video memory, its code, and a wave."""
PERIOD = 64
BACKENDS = ("pagemap-scan", "uffd-wp")

# rbx: video memory, rsi: the wave, r8: frame, r9: stride in tiles, r10: bytes a tile, r11: colour, r12: columns
DRAW = bytes.fromhex(
    "31c9"  # xor ecx, ecx
    "428d0401"  # column: lea eax, [rcx + r8]
    "83e03f"  # and eax, PERIOD - 1
    "0fb61406"  # movzx edx, byte [rsi + rax]     the wave's height here
    "410fafd1"  # imul edx, r9d
    "01ca"  # add edx, ecx
    "490fafd2"  # imul rdx, r10
    "488d3c13"  # lea rdi, [rbx + rdx]            the tile
    "4489d8"  # mov eax, r11d
    "89ca"  # mov edx, ecx
    "b910000000"  # mov ecx, 16
    "f3ab"  # rep stosd                         16 pixels of it
    "89d1"  # mov ecx, edx
    "ffc1"  # inc ecx
    "4439e1"  # cmp ecx, r12d
    "72d2"  # jb column
)

libc: Any = ctypes.CDLL(None, use_errno=True)
for name, arguments in (
    ("mprotect", (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)),
    ("memcmp", (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)),
    ("memcpy", (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)),
):
    getattr(libc, name).argtypes = arguments
libc.memcpy.restype = ctypes.c_void_p


def private(length: int) -> mmap.mmap:
    """Private anonymous memory, which every backend tracks."""
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Guest:
    """An x86-64 machine with nothing but a wave to draw."""

    def __init__(self, video: TrackedRange) -> None:
        self._uc = Uc(UC_ARCH_X86, UC_MODE_64)
        self.stored: set[int] = set()
        """The pages of video memory that its stores touched, as Unicorn saw them."""
        for row in range(ROWS):
            at = row * STRIDE * PAGE
            self._uc.mem_map_ptr(VIDEO + at, COLUMNS * PAGE, UC_PROT_READ | UC_PROT_WRITE, video.range.start + at)
        self._uc.mem_map(PROGRAM, 0x2_0000, UC_PROT_ALL)
        self._uc.mem_write(PROGRAM, DRAW)
        middle = (ROWS - 1) / 2
        wave = (round(middle + middle * math.sin(2 * math.pi * i / PERIOD * 2)) for i in range(PERIOD))
        self._uc.mem_write(TABLE, bytes(wave))
        self._uc.hook_add(UC_HOOK_MEM_WRITE, self._on_store)

    def _on_store(self, _uc: Uc, _access: int, address: int, size: int, _value: int, _data: object) -> None:
        self.stored.update(((address - VIDEO) // PAGE, (address + size - 1 - VIDEO) // PAGE))

    def draw(self, frame: int, colour: int) -> None:
        """Run the guest: the wave of one frame, in one colour."""
        for register, value in (
            (UC_X86_REG_RBX, VIDEO),
            (UC_X86_REG_RSI, TABLE),
            (UC_X86_REG_R8, frame),
            (UC_X86_REG_R9, STRIDE),
            (UC_X86_REG_R10, PAGE),
            (UC_X86_REG_R11, colour),
            (UC_X86_REG_R12, COLUMNS),
        ):
            self._uc.reg_write(register, value)
        self._uc.emu_start(PROGRAM, PROGRAM + len(DRAW))


def picture(written: set[int]) -> list[str]:
    """A character a page: # written, . not, | guard page."""
    return ["".join("#" if row * STRIDE + x in written else "." for x in range(COLUMNS)) + "|" for row in range(ROWS)]


def show_frames(tracker: DirtyTracker, frames: int) -> bool:
    """Let the guest draw, and show what was collected after each frame. Whether it was what the guest had stored to."""
    video = private(ROWS * STRIDE * PAGE)
    ram = tracker.track(video)
    for row in range(ROWS):  # each mprotect cuts the mapping in two
        if libc.mprotect(ram.range.start + (row * STRIDE + COLUMNS) * PAGE, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    guest = Guest(ram)
    guest.draw(0, 0xFFFFFF)
    ram.reset()

    print(
        f"\nThe guest erases a wave and draws it 3 tiles on. {ROWS} x {COLUMNS} tiles, a page each, among guard pages."
    )
    print("Pages collected after each frame: # written, . not, | guard page\n")
    right = True
    shown: list[tuple[str, list[str]]] = []
    for frame in range(1, frames + 1):
        guest.stored.clear()
        guest.draw(3 * frame - 3, 0)
        guest.draw(3 * frame, 0xFFFFFF)
        written = set(ram.collect().page_indices())
        right &= written == guest.stored
        verdict = "the same" if written == guest.stored else f"NOT the {len(guest.stored)} the guest stored to"
        shown.append((f"frame {frame}: {len(written)} pages, {verdict}", picture(written)))
    for pair in zip(shown[::2], shown[1::2], strict=False):
        print("   ".join(f"{title:{STRIDE}}" for title, _ in pair).rstrip())
        for lines in zip(*(lines for _, lines in pair), strict=True):
            print("   ".join(lines))
        print()
    print('"The same": exactly the pages that Unicorn saw the guest store to.')
    return right


def clocked(call: Callable[[], Any]) -> tuple[float, Any]:
    """How many milliseconds it took, and what it returned."""
    before = perf_counter()
    answer = call()
    return (perf_counter() - before) * 1e3, answer


def amount(result: ScanResult) -> str:
    """The result in words."""
    return f"{result.pages} pages in {len(result)} regions"


def differing(one: int, other: int, pages: int) -> int:
    """Compare two memories page by page: how many differ."""
    return sum(libc.memcmp(one + at, other + at, PAGE) != 0 for at in range(0, pages * PAGE, PAGE))


class Bench:
    """Some memory of which a hundredth is written before every measurement. Each time is the best of *rounds*."""

    def __init__(self, mebibytes: int, rounds: int) -> None:
        self.length = mebibytes << 20
        self.pages = self.length // PAGE
        self.hundredth = max(self.pages // 100, 1)
        self.rounds = rounds
        self.memory = private(self.length)
        for page in range(self.pages):
            self.memory[page * PAGE] = 1
        self._dice = random.Random(1)  # noqa: S311 - the same pages every time

    def dirty(self) -> set[int]:
        """Store a byte into 1 % of the pages."""
        chosen = self._dice.sample(range(self.pages), self.hundredth)
        for page in chosen:
            self.memory[page * PAGE] = (self.memory[page * PAGE] + 1) % 256
        return set(chosen)

    def copy_and_compare(self, at: int) -> tuple[float, int]:
        """Do without a kernel's help: compare with a copy, page by page, and make a new copy."""
        copy = (ctypes.c_char * self.length)()
        other = ctypes.addressof(copy)
        libc.memcpy(other, at, self.length)
        best, found = math.inf, 0
        for _ in range(self.rounds):
            self.dirty()
            compared, found = clocked(lambda: differing(at, other, self.pages))
            copied, _ = clocked(lambda: libc.memcpy(other, at, self.length))
            best = min(best, compared + copied)
        return best, found

    def show(self, tracker: DirtyTracker) -> bool:
        """Do the three operations, and say what they returned. Whether all of it was right."""
        right = True
        with tracker.track(self.memory) as ram:
            stores = peeked = collected = reset = math.inf
            peek = collect = ram.peek()
            for _ in range(self.rounds):
                took, written = clocked(self.dirty)
                stores = min(stores, took)
                took, peek = clocked(ram.peek)
                peeked = min(peeked, took)
                took, collect = clocked(ram.collect)
                collected = min(collected, took)
                left = ram.peek()
                right &= set(peek.page_indices()) == set(collect.page_indices()) == written and left.pages == 0
                self.dirty()
                took, _ = clocked(ram.reset)
                reset = min(reset, took)
                after = ram.collect()
                right &= after.pages == 0
            whole, found = self.copy_and_compare(ram.range.start)
            right &= found == self.hundredth
        times = f"{whole / collected:.0f} times a collect"
        print(f"  GET            peek()    {peeked:9.3f} ms   {amount(peek)}; changes nothing")
        print(f"  ENGAGE_WP+GET  collect() {collected:9.3f} ms   {amount(collect)}; a peek right after: {left.pages}")
        print(f"  WP-only        reset()   {reset:9.3f} ms   no answer; a collect right after: {after.pages}")
        print(f"  compare with a copy      {whole:9.3f} ms   {found} pages; {times}, copying anew included")
        print(f"  the stores, on protected {stores:9.3f} ms   {len(written)} pages, the Python loop included")
        return right


def explain(error: KernelError) -> str:
    """Why something does not work here, and what to change."""
    return f"{error.strerror}" + (f"\n  remedy: {error.hint}" if error.hint else "")


def main() -> int:
    """Run it all. 0 if every answer was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4, help="how many frames to draw (4)")
    parser.add_argument("--mib", type=int, default=64, help="the memory for the measurements, in MiB (64)")
    parser.add_argument("--rounds", type=int, default=5, help="measure so often, take the best (5)")
    options = parser.parse_args()
    if min(options.frames, options.mib, options.rounds) < 1:
        parser.error("all numbers are 1 or more")

    try:
        tracker = DirtyTracker()
    except KernelError as error:
        print(f"No backend works here: {explain(error)}")
        return 1
    right = True
    with tracker:
        selection = tracker.selection
        print(f"Backend: {selection.chosen}, the best of {', '.join(BACKENDS)} that works here.")
        print(f"  it guarantees {', '.join(g.name or '' for g in selection.guarantees)}")
        print(f"  opened by {'; '.join(selection.userfaultfd)}")
        for name, reason in selection.rejected.items():
            print(f"  not {name}: {reason}")
        right &= show_frames(tracker, options.frames + options.frames % 2)

    bench = Bench(options.mib, options.rounds)
    print(f"\n{options.mib} MiB, {bench.hundredth} of its {bench.pages} pages written, best of {options.rounds}:")
    for name in BACKENDS:
        try:
            with DirtyTracker(name) as tracker:
                print(f"\n{name} ({'; '.join(tracker.selection.userfaultfd)})")
                right &= bench.show(tracker)
        except KernelError as error:
            print(f"\n{name} does not work here: {explain(error)}")
    print("\nEvery answer was exactly right." if right else "\nSome answers were WRONG.")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
