"""Soft-dirty, where a kernel has it, knows by other means what was stored to: both engines must agree with it.

Its clear is the whole process's, so each test has a process of its own.
"""

from __future__ import annotations

import mmap
import random
import sys
from collections.abc import Callable

import pytest
from children import Crew, in_child, memory_of
from conftest import PAGE, Flavour, claims, libc, marked, need, pages_of

from pagemapcompat import Feature, Guarantee, TrackedRange

pytestmark = pytest.mark.kernel

SOFT_DIRTY = 55
PAGES = 256
KINDS = ["private", "shared"]


@pytest.fixture(autouse=True)
def oracle() -> None:
    """A kernel that has it."""
    need(Feature.PAGEMAP_SOFT_DIRTY)


def clear() -> None:
    """Forget every store of this process."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as refs:
        refs.write("4")


def stored(ram: TrackedRange) -> set[int]:
    """The pages stored to since the clear."""
    return marked(ram.range.start, ram.range.length // PAGE, SOFT_DIRTY)


def by_python(memory: mmap.mmap, _at: int, page: int) -> None:
    """With the GIL held."""
    memory[page * PAGE + 9] ^= 1


def by_c(_memory: mmap.mmap, at: int, page: int) -> None:
    """Over the edge of the page."""
    libc.fill(at + page * PAGE + PAGE // 2, PAGE if page + 1 < PAGES else 1, page % 256)


def by_reading(memory: mmap.mmap, _at: int, page: int) -> None:
    """Which is no store."""
    assert memory[page * PAGE] < 256


def by_protecting(_memory: mmap.mmap, at: int, page: int) -> None:
    """Neither is this, though it splits and merges the mapping."""
    libc.mprotect(at + page * PAGE, PAGE, libc.PROT_READ)
    libc.mprotect(at + page * PAGE, PAGE, libc.PROT_READ | libc.PROT_WRITE)


def by_the_kernel(memory: mmap.mmap, _at: int, page: int) -> None:
    """A system call that fills the page."""
    with memoryview(memory)[page * PAGE : (page + 1) * PAGE] as view, open("/dev/zero", "rb", buffering=0) as zero:
        assert zero.readinto(view) == PAGE


@pytest.mark.parametrize("kind", KINDS)
def test_each_round_agrees(flavour: Flavour, kind: str) -> None:
    """Stores of every sort, reads and changes of protection, in memory of which half was never touched."""
    memory = memory_of(kind, PAGES)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    ways: list[Callable[[mmap.mmap, int, int], None]] = [by_python, by_c, by_reading, by_protecting]

    def check() -> None:
        dice = random.Random(5)
        for page in range(0, PAGES, 2):
            memory[page * PAGE] = 1
        with flavour.tracker() as tracker:
            if claims(tracker, Guarantee.KERNEL_WRITES):
                ways.append(by_the_kernel)
            ram = tracker.track(memory)
            for number in range(12):
                clear()
                if number % 3 == 2:
                    ram.reset()
                for page in dice.sample(range(PAGES), dice.randrange(40)):
                    dice.choice(ways)(memory, ram.range.start, page)
                wanted = stored(ram)
                assert pages_of(ram.peek()) == wanted
                assert pages_of(ram.collect()) == wanted

    in_child(check)


@pytest.mark.parametrize("kind", KINDS)
def test_all_collects_together_agree(flavour: Flavour, kind: str) -> None:
    """Whatever threads store, and others do to the mapping, while a third collects: no page less, and no page more."""
    memory = memory_of(kind, PAGES)
    memory.madvise(mmap.MADV_NOHUGEPAGE)

    def check() -> None:
        sys.setswitchinterval(1e-5)
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            at = ram.range.start
            for first in (0, 1):  # the second time on pages that are there
                clear()
                ram.reset()
                crew, others = Crew(), Crew()

                def fill(first: int = first) -> None:
                    for number in range(4):
                        for page in range(first, PAGES, 3):
                            libc.fill(at + page * PAGE, 1, number)

                def hold() -> None:
                    for number in range(4):
                        for page in range(PAGES - 1, 0, -5):
                            memory[page * PAGE] = number

                def storm(crew: Crew = crew) -> None:
                    page = 0
                    while crew.working:
                        page = (page + 30) % PAGES
                        if page % 3 != 0 and page % 3 != 1 and (PAGES - 1 - page) % 5:
                            by_protecting(memory, at, page)

                crew.add(fill)
                crew.add(hold)
                others.add(storm)
                collected: set[int] = set()
                while crew.working:
                    collected |= pages_of(ram.collect())
                crew.join()
                others.join()
                collected |= pages_of(ram.collect())
                assert collected == stored(ram)

    in_child(check)
