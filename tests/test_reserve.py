"""Memory far larger than what is in it: it is tracked by blocks that stay bare until something comes to them."""

from __future__ import annotations

import ctypes
import mmap
import random
from typing import TYPE_CHECKING

import pytest
from children import in_child
from conftest import PAGE, PRIVATE, Flavour, claims, libc, need, need_shared, pages_of, use_flavour

from pagemapcompat import AddressRange, Cursor, DirtyTracker, Feature, Guarantee

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kernel

BLOCK = 16 * (PAGE // 8)  # pages; BLOCK_TABLES in scan.c
PLACES = [block * BLOCK + page for block in range(4) for page in (0, 1, 5, BLOCK // 2, BLOCK - 1)]
"""Pages at both ends of blocks and within them; the memory begins and ends inside of one."""
BEGIN, PAGES = 700, 4 * BLOCK - 900
STEPS = ("write",) * 6 + ("read", "discard", "bar", "collect", "part", "limit", "peek", "reset", "reader", "unprotect")
HUGEPAGE, NOHUGEPAGE = 14, 15


def page_tables() -> int:
    """Of this process, in bytes."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmPTE:"))


def test_a_reserve_costs_what_is_there(monkeypatch: pytest.MonkeyPatch, area: Callable[..., AddressRange]) -> None:
    """64 GiB of nothing take no page tables, neither when they are tracked nor when they are asked about."""
    need(Feature.PAGEMAP_SCAN_HOLES)
    flavour = use_flavour(Flavour("pagemap-scan", "pagemap-scan"), monkeypatch)
    memory = area((64 << 30) // PAGE, libc.PROT_NONE, PRIVATE | libc.MAP_NORESERVE)
    before = page_tables()
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        assert pages_of(ram.collect()) == pages_of(ram.peek()) == set()
        ram.reset()
        libc.mprotect(memory.start + (40 << 30), PAGE, libc.PROT_READ | libc.PROT_WRITE)
        libc.fill(memory.start + (40 << 30))
        assert pages_of(ram.peek()) == pages_of(ram.collect()) == {(40 << 30) // PAGE}
        assert page_tables() - before < 1 << 20


class Reader:
    """A cursor, and what it must be told and what it may be."""

    def __init__(self, cursor: Cursor) -> None:
        self.cursor = cursor
        self.must: set[int] = set()
        self.may: set[int] = set()

    def judge(self, told: set[int], pages: range, *, takes: bool) -> None:
        """An answer about *pages*."""
        asked = set(pages)
        assert self.must & asked <= told <= asked, "a page was lost"
        if Guarantee.EXACT in self.cursor.guarantees:
            assert told <= self.must | self.may, "a page was told that nobody wrote"
        if takes:
            self.forget(pages)

    def discard(self, page: int, *, held: bool) -> None:
        """What nobody was told of yet may have come to a bare block, and gone without a trace."""
        if held and page not in self.must:
            self.must.add(page)
        else:
            self.must.discard(page)
            self.may.add(page)

    def forget(self, pages: range) -> None:
        """They are watched anew."""
        self.must.difference_update(pages)
        self.may.difference_update(pages)


def play(tracker: DirtyTracker, memory: AddressRange, dice: random.Random, *, discards: bool) -> None:
    """A random program on some pages of some blocks, against a model."""
    ram = tracker.track(memory)
    readers = [Reader(ram)]
    places = [place - BEGIN for place in PLACES if BEGIN <= place < BEGIN + PAGES]
    libc.mprotect(memory.start, memory.length, libc.PROT_READ | libc.PROT_WRITE)
    held: set[int] = set()
    for _ in range(150):
        page = dice.choice(places)
        at = memory.start + page * PAGE
        reader = dice.choice(readers)
        match dice.choice(STEPS):
            case "write":
                libc.fill(at, 1, dice.randrange(1, 256))
                held.add(page)
                for one in readers:
                    one.must.add(page)
            case "read":
                ctypes.string_at(at, 1)
            case "discard" if discards:
                libc.madvise(at, PAGE, mmap.MADV_DONTNEED)
                for one in readers:
                    one.discard(page, held=page in held)
                held.discard(page)
            case "bar":
                libc.mprotect(at, PAGE, libc.PROT_NONE)
                libc.mprotect(at, PAGE, libc.PROT_READ | libc.PROT_WRITE)
            case "collect":
                reader.judge(pages_of(reader.cursor.collect()), range(PAGES), takes=True)
            case "part":
                part = range(page, PAGES)
                reader.judge(pages_of(reader.cursor.collect(page * PAGE)), part, takes=True)
            case "limit":
                told, start = set(), 0
                while start is not None:
                    result = reader.cursor.collect(start, max_pages=2)
                    assert result.pages <= 2
                    told |= set(result.page_indices())
                    start = result.resume_at
                reader.judge(told, range(PAGES), takes=True)
            case "peek":
                reader.judge(pages_of(reader.cursor.peek()), range(PAGES), takes=False)
            case "reset":
                reader.cursor.reset(page * PAGE)
                reader.forget(range(page, PAGES))
            case "reader" if len(readers) < 3:
                readers.append(Reader(ram.cursor()))
            case "unprotect":
                ram.unprotect(page * PAGE, (page + 1) * PAGE)
                for one in readers:
                    one.must.add(page)
    for one in readers:
        one.judge(pages_of(one.cursor.collect()), range(PAGES), takes=True)
        assert pages_of(one.cursor.collect()) == set()


@pytest.mark.parametrize(
    "huge", [pytest.param(False, id="small"), pytest.param(True, id="huge", marks=pytest.mark.anywhere)]
)
def test_random_programs_over_blocks(flavour: Flavour, area: Callable[..., AddressRange], huge: bool) -> None:
    """Whatever comes to a block is told to every reader."""
    room = area(4 * BLOCK + BLOCK, libc.PROT_NONE, PRIVATE | libc.MAP_NORESERVE)
    start = -(-room.start // (BLOCK * PAGE)) * BLOCK * PAGE + BEGIN * PAGE
    memory = type(room).from_length(start, PAGES * PAGE)

    def check() -> None:
        libc.madvise(room.start, room.length, HUGEPAGE if huge else NOHUGEPAGE)
        with flavour.tracker() as tracker:
            play(tracker, memory, random.Random(1), discards=claims(tracker, Guarantee.DISCARDS))

    in_child(check)


def test_what_comes_to_a_bare_unit_has_changed(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """Also where it is zero again, or in another kind of memory that was mapped there."""
    block = BLOCK * PAGE
    room = area(4 * BLOCK, libc.PROT_NONE, PRIVATE | libc.MAP_NORESERVE)
    memory = type(room).from_length(-(-room.start // block) * block, 2 * block)
    with flavour.tracker(on_untracked="rearm") as tracker:
        ram = tracker.track(memory)
        libc.mprotect(memory.start, PAGE * 8, libc.PROT_READ | libc.PROT_WRITE)
        libc.madvise(memory.start, memory.length, NOHUGEPAGE)
        libc.fill(memory.start + 5 * PAGE, 1, 7)
        libc.fill(memory.start + 5 * PAGE, 1, 0)
        assert pages_of(ram.peek()) >= {5}
        assert pages_of(ram.collect()) >= {5}
        assert pages_of(ram.collect()) == set()
        if Feature.UFFD_WP_HUGETLBFS_SHMEM.value in flavour.disabled or not claims(tracker, Guarantee.DISCARDS):
            return
        at = memory.start + block + 6 * PAGE
        libc.mmap(PAGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, address=at)
        assert pages_of(ram.collect()) == {BLOCK + 6}
        libc.mprotect(at - PAGE, PAGE, libc.PROT_READ | libc.PROT_WRITE)
        libc.fill(at)
        libc.fill(at - PAGE)
        assert pages_of(ram.collect()) == {BLOCK + 5, BLOCK + 6}


def test_shared_memory_in_a_bare_block_is_no_part_of_it(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """A page that is written and then let go, which keeps its contents, is reported."""
    need_shared()
    room = area(3 * BLOCK, libc.PROT_NONE, PRIVATE | libc.MAP_NORESERVE)
    at = -(-room.start // (BLOCK * PAGE)) * BLOCK * PAGE + 6 * PAGE
    with flavour.tracker(on_untracked="rearm") as tracker:
        if not claims(tracker, Guarantee.DISCARDS):
            pytest.skip("this flavour does not promise DISCARDS; remedy: the other flavours")
        ram = tracker.track(room)
        libc.mmap(PAGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, address=at)
        there = {(at - room.start) // PAGE}
        assert pages_of(ram.collect()) == there
        libc.fill(at)
        libc.madvise(at, PAGE, mmap.MADV_DONTNEED)
        assert pages_of(ram.collect()) == there


def test_more_runs_come_to_a_bare_block_than_one_call_returns(
    flavour: Flavour, area: Callable[..., AddressRange]
) -> None:
    """All of them are collected, once."""
    room = area(3 * BLOCK, libc.PROT_NONE, PRIVATE | libc.MAP_NORESERVE)
    begin = -room.start // PAGE % BLOCK
    with flavour.tracker() as tracker:
        ram = tracker.track(room)
        at = room.start + begin * PAGE
        libc.madvise(at, BLOCK * PAGE, NOHUGEPAGE)
        libc.mprotect(at, BLOCK * PAGE, libc.PROT_READ | libc.PROT_WRITE)
        wrote = set(range(begin, begin + BLOCK, 2))
        for page in wrote:
            libc.fill(room.start + page * PAGE)
        assert pages_of(ram.collect()) == wrote
        assert pages_of(ram.collect()) == set()


def test_two_trackers_share_a_block(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """One tracks memory in use in its first half, the other one a reserve that begins there: each reports its own."""
    room = area(3 * BLOCK, libc.PROT_NONE, PRIVATE | libc.MAP_NORESERVE)
    start = -(-room.start // (BLOCK * PAGE)) * BLOCK * PAGE
    middle = start + BLOCK // 2 * PAGE
    libc.mprotect(start, middle - start, libc.PROT_READ | libc.PROT_WRITE)

    def check() -> None:
        with flavour.tracker() as one, flavour.tracker() as two:
            used = one.track(AddressRange(start, middle))
            reserve = two.track(AddressRange(middle, start + 2 * BLOCK * PAGE))
            libc.mprotect(middle, PAGE, libc.PROT_READ | libc.PROT_WRITE)
            libc.madvise(start, BLOCK * PAGE, NOHUGEPAGE)
            libc.fill(start + 5 * PAGE)
            libc.fill(middle)
            assert pages_of(reserve.collect()) == {0}
            assert pages_of(used.collect()) == {5}

    in_child(check)


def test_snapshots_of_a_reserve(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """What came to it, was copied and was discarded again is in the next one as it is then."""
    room = area(2 * BLOCK + 1, libc.PROT_NONE, PRIVATE | libc.MAP_NORESERVE)
    with flavour.tracker() as tracker:
        ram = tracker.track(room)
        libc.mprotect(room.start + BLOCK * PAGE, PAGE, libc.PROT_READ | libc.PROT_WRITE)
        first = ram.snapshot()
        libc.fill(room.start + BLOCK * PAGE, 1, 7)
        second = ram.snapshot()
        if claims(tracker, Guarantee.DISCARDS):
            libc.madvise(room.start + BLOCK * PAGE, PAGE, mmap.MADV_DONTNEED)
            assert list(ram.snapshot().diff(first)) == []
        assert list(second.diff(first).spans()) == [(BLOCK * PAGE, (BLOCK + 1) * PAGE)]
        ram.restore(second, verify=True)
        assert ctypes.string_at(room.start + BLOCK * PAGE, 1) == b"\x07"
