"""Pages that the kernel swaps out keep what is known of them: written ones are reported, the others are not."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os

import pytest
from children import memory_of
from conftest import PAGE, PRESENT, PRIVATE, Flavour, Lacking, lacking, marked, pages_of, write

from pagemapcompat import TrackedRange

pytestmark = pytest.mark.kernel

MADV_PAGEOUT = 21
TRIES = 200
PAGES = 64


@pytest.fixture(autouse=True)
def swapping(swap: Lacking | None) -> None:
    """Something to swap to, for this process too."""
    if swap:
        lacking(*swap)
    with mmap.mmap(-1, PAGES * PAGE, flags=PRIVATE) as plain:
        plain.madvise(mmap.MADV_NOHUGEPAGE)
        write(plain, *range(PAGES))
        address = ctypes.addressof(ctypes.c_char.from_buffer(plain))
        if not goes_out(plain, address):
            lacking("swap", "nothing is swapped out (ENOMEM)", "room in it, and a memory.swap.max above 0")


@pytest.fixture(params=["private", "shared"])
def memory(request: pytest.FixtureRequest, flavour: Flavour) -> mmap.mmap:
    """Memory in which every page is in use."""
    made = memory_of(request.param, PAGES)
    made.madvise(mmap.MADV_NOHUGEPAGE)
    write(made, *range(PAGES))
    return made


def goes_out(memory: mmap.mmap, address: int) -> bool:
    """Ask for it until no page is in memory. It is advice, which the kernel follows as far as it can at the moment.

    It cannot move a page that waits in some CPU's list of new ones, and empties that of the CPU it runs on alone
    (mm/madvise.c, madvise_pageout: lru_add_drain).
    """
    allowed = os.sched_getaffinity(0)
    for _, cpu in zip(range(TRIES), itertools.cycle(allowed), strict=False):
        os.sched_setaffinity(0, {cpu})
        memory.madvise(MADV_PAGEOUT)
        os.sched_setaffinity(0, allowed)
        if not marked(address, PAGES, PRESENT):
            return True
    return False


def swap_out(ram: TrackedRange, memory: mmap.mmap) -> None:
    """Empty the range."""
    assert goes_out(memory, ram.range.start), f"MADV_PAGEOUT left pages in memory, {TRIES} times"


def test_written_pages_are_reported(flavour: Flavour, memory: mmap.mmap) -> None:
    """Whether they are asked for while they are out or after they came back."""
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        wrote = write(memory, 3, 4, 60)
        swap_out(ram, memory)
        assert pages_of(ram.peek()) == wrote
        assert memory[3 * PAGE] == 2
        assert pages_of(ram.collect()) == wrote
        assert pages_of(ram.collect()) == set()
        wrote = write(memory, 4, 5)
        swap_out(ram, memory)
        assert pages_of(ram.collect()) == wrote
        swap_out(ram, memory)
        assert pages_of(ram.collect()) == set()


def test_clean_pages_stay_clean(flavour: Flavour, memory: mmap.mmap) -> None:
    """Going out and coming back by a read is no write; the first store afterwards is one."""
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        swap_out(ram, memory)
        assert pages_of(ram.collect()) == set()
        assert sum(memory[page * PAGE] for page in range(PAGES)) == PAGES
        assert pages_of(ram.collect()) == set()
        swap_out(ram, memory)
        wrote = write(memory, 7, 8)
        assert pages_of(ram.collect()) == wrote


def test_pages_are_protected_while_they_are_out(flavour: Flavour, memory: mmap.mmap) -> None:
    """By collect, reset and track; and let go by unprotect."""
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        swap_out(ram, memory)
        ram.close()
        again = tracker.track(memory)
        wrote = write(memory, 0, 63)
        swap_out(again, memory)
        assert pages_of(again.collect()) == wrote
        wrote = write(memory, 0)
        assert pages_of(again.collect()) == wrote
        write(memory, *range(10, 20))
        swap_out(again, memory)
        again.reset()
        wrote = write(memory, 12)
        assert pages_of(again.collect()) == wrote
        swap_out(again, memory)
        again.unprotect(20 * PAGE, 22 * PAGE)
        assert pages_of(again.collect()) == {20, 21}


def test_discarded_while_they_are_out(flavour: Flavour, memory: mmap.mmap) -> None:
    """A private page loses its contents, and is reported; a shared one keeps them."""
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        swap_out(ram, memory)
        memory.madvise(mmap.MADV_DONTNEED, 8 * PAGE, 4 * PAGE)
        changed = pages_of(ram.collect())
        contents = [memory[page * PAGE] for page in range(8, 12)]
        assert (changed, contents) in (({8, 9, 10, 11}, [0] * 4), (set(), [1] * 4))
        wrote = write(memory, 9)
        assert pages_of(ram.collect()) == wrote
