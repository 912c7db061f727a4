"""Pages that the kernel swaps out keep what is known of them: written ones are reported, the others are not."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from typing import TYPE_CHECKING

import pytest
from children import memory_of
from conftest import PAGE, PRESENT, PRIVATE, Flavour, Lacking, lacking, libc, marked, need, pages_of, write

from pagemapcompat import AddressRange, Feature

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kernel

MADV_PAGEOUT = 21
TRIES = 200
PAGES = 64
BLOCK = 16 * (PAGE // 8)  # pages; BLOCK_TABLES in scan.c


@pytest.fixture(autouse=True)
def swapping(swap: Lacking | None) -> None:
    """Something to swap to, for this process too."""
    if swap:
        lacking(*swap)
    with mmap.mmap(-1, PAGES * PAGE, flags=PRIVATE) as plain:
        plain.madvise(mmap.MADV_NOHUGEPAGE)
        write(plain, *range(PAGES))
        if not goes_out(ctypes.addressof(ctypes.c_char.from_buffer(plain))):
            lacking("swap", "nothing is swapped out (ENOMEM)", "room in it, and a memory.swap.max above 0")


@pytest.fixture(params=["private", "shared"])
def memory(request: pytest.FixtureRequest, flavour: Flavour) -> mmap.mmap:
    """Memory in which every page is in use."""
    made = memory_of(request.param, PAGES)
    made.madvise(mmap.MADV_NOHUGEPAGE)
    write(made, *range(PAGES))
    return made


def goes_out(address: int) -> bool:
    """Ask for it until no page from there on is in memory. It is advice, which the kernel follows as far as it can now.

    It cannot move a page that waits in some CPU's list of new ones, and empties that of the CPU it runs on alone
    (mm/madvise.c, madvise_pageout: lru_add_drain).
    """
    allowed = os.sched_getaffinity(0)
    for _, cpu in zip(range(TRIES), itertools.cycle(allowed), strict=False):
        os.sched_setaffinity(0, {cpu})
        libc.madvise(address, PAGES * PAGE, MADV_PAGEOUT)
        os.sched_setaffinity(0, allowed)
        if not marked(address, PAGES, PRESENT):
            return True
    return False


def swap_out(memory: AddressRange) -> None:
    """Empty it."""
    assert goes_out(memory.start), f"MADV_PAGEOUT left pages in memory, {TRIES} times"


def test_written_pages_are_reported(flavour: Flavour, memory: mmap.mmap) -> None:
    """Whether they are asked for while they are out or after they came back."""
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        wrote = write(memory, 3, 4, 60)
        swap_out(ram.range)
        assert pages_of(ram.peek()) == wrote
        assert memory[3 * PAGE] == 2
        assert pages_of(ram.collect()) == wrote
        assert pages_of(ram.collect()) == set()
        wrote = write(memory, 4, 5)
        swap_out(ram.range)
        assert pages_of(ram.collect()) == wrote
        swap_out(ram.range)
        assert pages_of(ram.collect()) == set()


def test_clean_pages_stay_clean(flavour: Flavour, memory: mmap.mmap) -> None:
    """Going out and coming back by a read is no write; the first store afterwards is one."""
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        swap_out(ram.range)
        assert pages_of(ram.collect()) == set()
        assert sum(memory[page * PAGE] for page in range(PAGES)) == PAGES
        assert pages_of(ram.collect()) == set()
        swap_out(ram.range)
        wrote = write(memory, 7, 8)
        assert pages_of(ram.collect()) == wrote


def test_pages_are_protected_while_they_are_out(flavour: Flavour, memory: mmap.mmap) -> None:
    """By collect, reset and track; and let go by unprotect."""
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        swap_out(ram.range)
        ram.close()
        again = tracker.track(memory)
        wrote = write(memory, 0, 63)
        swap_out(again.range)
        assert pages_of(again.collect()) == wrote
        wrote = write(memory, 0)
        assert pages_of(again.collect()) == wrote
        write(memory, *range(10, 20))
        swap_out(again.range)
        again.reset()
        wrote = write(memory, 12)
        assert pages_of(again.collect()) == wrote
        swap_out(again.range)
        again.unprotect(20 * PAGE, 22 * PAGE)
        assert pages_of(again.collect()) == {20, 21}


def test_discarded_while_they_are_out(flavour: Flavour, memory: mmap.mmap) -> None:
    """A private page loses its contents, and is reported; a shared one keeps them."""
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        swap_out(ram.range)
        memory.madvise(mmap.MADV_DONTNEED, 8 * PAGE, 4 * PAGE)
        changed = pages_of(ram.collect())
        contents = [memory[page * PAGE] for page in range(8, 12)]
        assert (changed, contents) in (({8, 9, 10, 11}, [0] * 4), (set(), [1] * 4))
        wrote = write(memory, 9)
        assert pages_of(ram.collect()) == wrote


def test_snapshots_hold_pages_that_are_out(flavour: Flavour, memory: mmap.mmap) -> None:
    """They have a content, whether they are protected or written."""
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        write(memory, *range(10, 20))
        before = memory[:]
        swap_out(ram.range)
        taken = ram.snapshot()
        write(memory, *range(PAGES))
        ram.restore(taken, verify=True)
        assert memory[:] == before


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_what_comes_to_a_reserve_and_goes_out(
    flavour: Flavour, area: Callable[..., AddressRange], *, beside: bool
) -> None:
    """It is there, and written; also where another page of its block is in memory."""
    room = area(3 * BLOCK, libc.PROT_NONE, PRIVATE | libc.MAP_NORESERVE)
    begin = -(-room.start // (BLOCK * PAGE)) * BLOCK  # a page's number, of those of the process
    used = AddressRange.from_length((begin + 64) * PAGE, PAGES * PAGE)
    with flavour.tracker() as tracker:
        ram = tracker.track(room)
        libc.madvise(room.start, room.length, mmap.MADV_NOHUGEPAGE)
        libc.mprotect(begin * PAGE, used.end - begin * PAGE, libc.PROT_READ | libc.PROT_WRITE)
        libc.fill(used.start, used.length)
        swap_out(used)
        wrote = {page - room.start // PAGE for page in range(begin + 64, begin + 64 + PAGES)}
        if beside:
            libc.fill(begin * PAGE)
            wrote.add(begin - room.start // PAGE)
        assert pages_of(ram.peek()) == wrote
        assert pages_of(ram.collect()) == wrote
        assert pages_of(ram.collect()) == set()


def test_a_guard_page_among_pages_that_are_out(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """It is another thing than they are: they are protected around it, and it is reported once."""
    need(Feature.MADV_GUARD)
    with flavour.tracker() as tracker:
        ram = tracker.track(area(PAGES))
        libc.madvise(ram.range.start, ram.range.length, mmap.MADV_NOHUGEPAGE)
        libc.fill(ram.range.start, ram.range.length)
        swap_out(ram.range)
        libc.madvise(ram.range.start + 4 * PAGE, PAGE, libc.GUARD_INSTALL)
        assert pages_of(ram.collect()) == set(range(PAGES))
        assert pages_of(ram.collect()) == set()
