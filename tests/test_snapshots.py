"""Snapshots: what memory was, it is again; and nobody's write is lost by it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import random
import sys
import threading
import weakref
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from children import Crew, in_child, memory_of, resources
from conftest import PAGE, PRIVATE, Flavour, libc, need, need_shared, pages_of, part, private, write
from filed import by_hand
from interrupter import Interrupter

from pagemapcompat import (
    AddressRange,
    ClosedError,
    ConcurrentWriteError,
    DirtyTracker,
    Feature,
    InvalidArgumentError,
    KernelError,
    NotTrackedError,
    PagemapCompatError,
    RestoreError,
    Snapshot,
    TrackedRange,
    _kernel,
    snapshots,
)

pytestmark = pytest.mark.kernel

PAGES = 96
SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS


def scribble(memory: mmap.mmap, dice: random.Random, count: int) -> set[int]:
    """Store random bytes into random pages, and return them."""
    pages = {dice.randrange(len(memory) // PAGE) for _ in range(count)}
    for page in pages:
        at = page * PAGE + dice.randrange(PAGE)
        memory[at] = (memory[at] + 1 + dice.randrange(255)) % 256
    return pages


def peeked(where: AddressRange) -> bytes:
    """The bytes at an address."""
    return ctypes.string_at(where.start, where.length)


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_memory_is_what_it_was(tracker: DirtyTracker, kind: str) -> None:
    """From any snapshot to any other, again and again; and only pages that may differ are written."""
    memory = memory_of(kind, PAGES)
    dice = random.Random(3)
    scribble(memory, dice, 50)
    ram = tracker.track(memory)
    snapshots = [ram.snapshot()]
    contents = [memory[:]]
    for _ in range(5):
        written = scribble(memory, dice, 9)
        snapshots.append(ram.snapshot())
        contents.append(memory[:])
        assert snapshots[-1].parent is snapshots[-2]
        assert snapshots[-1].pages == len(written)
    assert [one.read() for one in snapshots] == contents
    at = len(snapshots) - 1
    for _ in range(25):
        written = scribble(memory, dice, dice.randrange(5))
        to = dice.randrange(len(snapshots))
        expected = written | pages_of(snapshots[at].diff(snapshots[to]))
        result = ram.restore(snapshots[to], verify=True)
        assert memory[:] == contents[to]
        assert pages_of(result) == expected
        at = to
    assert pages_of(ram.restore(snapshots[at])) == set()


def test_branches(tracker: DirtyTracker) -> None:
    """A snapshot after a restore is the child of what was restored."""
    memory = private(PAGES)
    ram = tracker.track(memory)
    root = ram.snapshot()
    write(memory, 1, 2)
    left = ram.snapshot()
    ram.restore(root)
    write(memory, 2, 3)
    right = ram.snapshot()
    assert (left.parent, right.parent, root.parent) == (root, root, None)
    assert pages_of(left.diff(right)) == {1, 3}  # page 2 holds the same in both
    assert list(left.diff(right).spans()) == [(PAGE, 2 * PAGE), (3 * PAGE, 4 * PAGE)]
    assert pages_of(right.diff(root)) == {2, 3}
    assert pages_of(root.diff(root)) == set()
    assert pages_of(ram.restore(left)) == {1, 2, 3} - ({2} - pages_of(right.diff(left)))
    assert memory[:] == left.read()


def test_other_readers_see_what_is_written_back(tracker: DirtyTracker) -> None:
    """A restore is a write to everybody else, and a snapshot is none."""
    memory = private(PAGES)
    ram = tracker.track(memory)
    screen = ram.cursor()
    first = ram.snapshot()
    written = write(memory, 4, 9)
    assert pages_of(screen.collect()) == written
    ram.snapshot()
    assert pages_of(screen.collect()) == set()
    ram.restore(first)
    assert pages_of(screen.collect()) == written
    assert pages_of(ram.collect()) == written


def test_pages_that_another_reader_collected(flavour: Flavour) -> None:
    """They are protected again when they are written back, also where the kernel's faults cannot be resolved."""

    def scenario() -> None:
        with flavour.tracker() as tracker:
            memory = private(PAGES)
            ram = tracker.track(memory)
            write(memory, *range(PAGES))
            first = ram.snapshot()
            before = memory[:]
            written = write(memory, 0, 3, 4, 5, 50)
            assert pages_of(ram.collect()) >= written
            assert pages_of(ram.restore(first, verify=True)) == written
            assert memory[:] == before
            assert pages_of(ram.collect()) == written

    in_child(scenario)


def test_without_privileges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a userfaultfd that resolves no fault of the kernel's: read(2) fails there, a restore does not."""
    flavour = Flavour("user-mode-only", "uffd-wp", ("uffd-syscall", "uffd-device"))
    need(Feature.UFFD_USER_MODE_ONLY)
    monkeypatch.setenv("PAGEMAPCOMPAT_DISABLE", ",".join(flavour.disabled))
    test_pages_that_another_reader_collected(flavour)


def test_a_chain_forgets(tracker: DirtyTracker) -> None:
    """drop frees one, squash all before it; the others stay what they are."""
    memory = private(PAGES)
    ram = tracker.track(memory)
    chain: list[Snapshot] = []
    contents: list[bytes] = []
    for number in range(6):
        write(memory, number, 50)
        chain.append(ram.snapshot())
        contents.append(memory[:])
    chain[2].drop()
    chain[2].drop()
    assert chain[3].parent is chain[1]
    with pytest.raises(ClosedError, match="dropped"):
        chain[2].read()
    with pytest.raises(ClosedError):
        ram.restore(chain[2])
    with pytest.raises(ClosedError):
        chain[3].diff(chain[2])
    chain[4].squash()
    assert chain[4].parent is None
    assert [one.is_dropped for one in chain] == [True, True, True, True, False, False]
    assert chain[5].parent is chain[4]
    chain[5].drop()  # the one that memory is equal to
    ram.restore(chain[4], verify=True)
    assert memory[:] == contents[4]
    write(memory, 7)
    assert ram.snapshot().parent is chain[4]


def test_the_next_one_goes_on_with_what_a_dropped_one_left(tracker: DirtyTracker) -> None:
    """Its pages and nodes, and nobody else's: not those of a snapshot that has them in common, or is being read."""
    memory = private(PAGES)
    ram = tracker.track(memory)
    write(memory, *range(0, PAGES, 2))
    first, content = ram.snapshot(), memory[:]
    write(memory, 4, 5)
    second, later = ram.snapshot(), memory[:]
    being_read = second.image
    second.drop()
    write(memory, 4, 5, 6)
    third, latest = ram.snapshot(), memory[:]
    assert _kernel.image_read(being_read, 0, PAGES) == later
    del being_read
    image = ram._history._image
    assert image is not None
    third.drop()
    memory[4 * PAGE : 5 * PAGE] = bytes(PAGE)  # from a page that is held to one that is not
    written = write(memory, 6, 7)
    fourth = ram.snapshot()
    assert fourth.image.c == image.c
    assert (fourth.pages, fourth.parent) == (2, first)
    assert fourth.read() == memory[:] != latest
    assert first.read() == content
    assert pages_of(first.diff(fourth)) == written | {4, 5}
    write(memory, 8)
    ram.restore(first, verify=True)
    assert memory[:] == content


@pytest.mark.anywhere
def test_a_ring_of_snapshots_keeps_no_more_than_it_holds(tracker: DirtyTracker) -> None:
    """As for rewinding: the oldest is dropped for each new one."""
    memory = private(PAGES)
    ram = tracker.track(memory)
    ring: list[Snapshot] = []
    made: weakref.WeakSet[Snapshot] = weakref.WeakSet()
    for number in range(40):
        write(memory, number % PAGES, 60)
        ring.append(ram.snapshot())
        made.add(ring[-1])
        if len(ring) > 4:
            ring.pop(0).drop()
    assert ring[0].parent is None
    gc.collect()
    assert len(made) == len(ring)
    for one in ring:
        ram.restore(one, verify=True)


def protections(memory: AddressRange) -> list[tuple[int, str]]:
    """Where they change, and to what."""
    with open("/proc/self/maps", encoding="ascii") as maps:
        parsed = [(line.split("-")[0], line.split()[1]) for line in maps]
    return [(int(start, 16), flags) for start, flags in parsed if memory.start <= int(start, 16) < memory.end]


@pytest.mark.parametrize("flags", [PRIVATE, SHARED], ids=["private", "shared"])
def test_protected_pages(tracker: DirtyTracker, area: Callable[..., AddressRange], flags: int) -> None:
    """Whatever may be done with a page now: its content is saved, and comes back, and its protection stays."""
    if flags == SHARED:
        need_shared()
    place = area(32, flags=flags)
    ram = tracker.track(place)
    for page in range(32):
        libc.fill(place.start + page * PAGE, PAGE, page + 1)
    for page in range(0, 32, 4):
        libc.mprotect(place.start + page * PAGE, PAGE, libc.PROT_NONE)
        libc.mprotect(place.start + (page + 1) * PAGE, PAGE, libc.PROT_READ)
    had = protections(place)
    first = ram.snapshot()
    assert first.pages == 32
    assert first.missing().pages == 0
    assert protections(place) == had
    expected = b"".join(bytes([page + 1]) * PAGE for page in range(32))
    assert first.read() == expected
    libc.mprotect(place.start, place.length, libc.PROT_READ | libc.PROT_WRITE)
    libc.fill(place.start, place.length, 99)
    for page in range(0, 32, 3):
        libc.mprotect(place.start + page * PAGE, PAGE, libc.PROT_NONE)
        libc.mprotect(place.start + (page + 1) * PAGE, PAGE, libc.PROT_READ)
    had = protections(place)
    assert ram.restore(first, verify=True).pages == 32
    assert protections(place) == had
    libc.mprotect(place.start, place.length, libc.PROT_READ)
    assert peeked(place) == expected


def test_pages_that_may_only_be_read_are_reported_when_they_are_written_back(
    tracker: DirtyTracker, area: Callable[..., AddressRange]
) -> None:
    """To readers that have seen what was written before."""
    place = area(32)
    ram = tracker.track(place)
    other = ram.cursor()
    libc.fill(place.start, place.length, 7)
    first = ram.snapshot()
    libc.fill(place.start, place.length, 8)
    for reader in (other, ram):
        assert pages_of(reader.collect()) == set(range(32))
    libc.mprotect(place.start, place.length, libc.PROT_READ)
    ram.restore(first)
    assert peeked(place) == b"\7" * place.length
    for reader in (other, ram):
        assert pages_of(reader.collect()) == set(range(32))


def test_more_pages_than_one_call_copies(tracker: DirtyTracker, area: Callable[..., AddressRange]) -> None:
    """Barred pages beside its ends are no others'."""
    pages = 1040
    place = area(pages)
    ram = tracker.track(place)
    expected = b"".join((page + 1).to_bytes(4, "little") * (PAGE // 4) for page in range(pages))
    ctypes.memmove(place.start, expected, place.length)
    barred = [0, 510, 511, 512, 514, 1022, 1023, 1025, pages - 1]
    for page in barred:
        libc.mprotect(place.start + page * PAGE, PAGE, libc.PROT_NONE)
    first = ram.snapshot()
    assert first.read() == expected
    libc.mprotect(place.start, place.length, libc.PROT_READ | libc.PROT_WRITE)
    libc.fill(place.start, place.length, 99)
    for page in barred:
        libc.mprotect(place.start + page * PAGE, PAGE, libc.PROT_READ)
    assert ram.restore(first, verify=True).pages == pages
    assert peeked(place) == expected


def test_holes(tracker: DirtyTracker, area: Callable[..., AddressRange]) -> None:
    """What was not there is not held, and left alone; what cannot be written any more is named."""
    place = area(48)
    libc.munmap(place.start + 8 * PAGE, 2 * PAGE)
    ram = tracker.track(place)
    libc.fill(place.start, PAGE, 1)
    libc.fill(place.start + 20 * PAGE, 5 * PAGE, 2)
    first = ram.snapshot()
    assert list(first.missing().spans()) == [(8 * PAGE, 10 * PAGE)]
    assert list(first.held().spans()) == [(0, PAGE), (20 * PAGE, 25 * PAGE)]
    libc.fill(place.start, PAGE, 9)
    ram.restore(first, verify=True)
    assert peeked(part(ram, 0, 1)) == b"\1" * PAGE
    libc.fill(place.start + 22 * PAGE, PAGE, 7)
    libc.munmap(place.start + 22 * PAGE, PAGE)
    libc.fill(place.start + 20 * PAGE, 1, 7)
    before = peeked(part(ram, 0, 8))
    with pytest.raises(KernelError, match="cannot be written now") as caught:
        ram.restore(first)
    assert caught.value.range == part(ram, 22, 1)
    assert peeked(part(ram, 20, 1))[0] == 7  # nothing was written
    assert peeked(part(ram, 0, 8)) == before
    later = ram.snapshot()
    assert list(later.missing().spans()) == [(8 * PAGE, 10 * PAGE), (22 * PAGE, 23 * PAGE)]
    libc.fill(place.start + 20 * PAGE, PAGE, 3)
    ram.restore(later, verify=True)


def test_a_hole_at_the_end(tracker: DirtyTracker, area: Callable[..., AddressRange]) -> None:
    """Behind it no mapping is left in the memory: what was there is missed like any other, and nothing is written."""
    place = area(32)
    ram = tracker.track(place)
    libc.fill(place.start, place.length, 7)
    whole = ram.snapshot()
    libc.munmap(place.start + 30 * PAGE, 2 * PAGE)
    later = ram.snapshot()
    assert list(later.missing().spans()) == [(30 * PAGE, 32 * PAGE)]
    assert pages_of(later.diff(whole)) == {30, 31}
    libc.fill(place.start, 1, 8)
    with pytest.raises(KernelError, match="cannot be written now") as caught:
        ram.restore(whole)
    assert caught.value.range == part(ram, 30, 1)
    assert peeked(part(ram, 0, 1))[0] == 8


def test_a_hole_where_nothing_was_held(tracker: DirtyTracker, area: Callable[..., AddressRange]) -> None:
    """Zeros are a content too, which cannot be written there: the page is named."""
    ram = tracker.track(area(32))
    empty = ram.snapshot()
    libc.munmap(ram.range.start + 5 * PAGE, PAGE)
    with pytest.raises(KernelError, match="cannot be written now") as caught:
        ram.restore(empty)
    assert caught.value.range == part(ram, 5, 1)


def test_guard_pages(tracker: DirtyTracker, area: Callable[..., AddressRange]) -> None:
    """Skipped and remembered; a snapshot with content there cannot be restored until they are gone."""
    need(Feature.MADV_GUARD, Feature.PAGEMAP_GUARD)
    place = area(48)
    ram = tracker.track(place)
    libc.fill(place.start, place.length, 5)
    whole = ram.snapshot()
    libc.madvise(place.start + 4 * PAGE, PAGE, libc.GUARD_INSTALL)
    libc.madvise(place.start + 20 * PAGE, 20 * PAGE, libc.GUARD_INSTALL)
    guarded = ram.snapshot()
    assert list(guarded.missing().spans()) == [(4 * PAGE, 5 * PAGE), (20 * PAGE, 40 * PAGE)]
    libc.fill(place.start, PAGE, 6)
    ram.restore(guarded, verify=True)
    assert pages_of(whole.diff(guarded)) == {4, *range(20, 40)}
    with pytest.raises(KernelError, match="cannot be written now") as caught:
        ram.restore(whole)
    assert caught.value.range == part(ram, 4, 1)
    libc.madvise(place.start, place.length, libc.GUARD_REMOVE)
    ram.restore(whole, verify=True)
    assert peeked(place) == b"\5" * place.length


def test_what_a_restore_leaves_alone_is_in_the_next_snapshot(
    tracker: DirtyTracker, area: Callable[..., AddressRange]
) -> None:
    """Pages that were no pages at the snapshot have a content since."""
    need(Feature.MADV_GUARD, Feature.PAGEMAP_GUARD)
    place = area(8)
    ram = tracker.track(place)
    libc.fill(place.start, place.length, 5)
    libc.madvise(place.start + PAGE, PAGE, libc.GUARD_INSTALL)
    guarded = ram.snapshot()
    libc.madvise(place.start + PAGE, PAGE, libc.GUARD_REMOVE)
    libc.fill(place.start + PAGE, PAGE, 7)
    ram.restore(guarded, verify=True)
    later = ram.snapshot()
    assert later.read(PAGE, 2 * PAGE) == b"\7" * PAGE
    libc.fill(place.start + PAGE, PAGE, 9)
    ram.restore(later, verify=True)
    assert peeked(part(ram, 1, 1)) == b"\7" * PAGE


def test_discarded_memory(tracker: DirtyTracker) -> None:
    """It is zero in a snapshot, and is filled again by a restore."""
    memory = private(PAGES)
    write(memory, *range(PAGES))
    ram = tracker.track(memory)
    full = ram.snapshot()
    before = memory[:]
    memory.madvise(mmap.MADV_DONTNEED, 10 * PAGE, 40 * PAGE)
    holey = ram.snapshot()
    assert holey.held().pages == PAGES - 40
    ram.restore(full, verify=True)
    assert memory[:] == before
    ram.restore(holey, verify=True)
    assert memory[10 * PAGE : 50 * PAGE] == bytes(40 * PAGE)


def test_empty_memory_stays_empty(tracker: DirtyTracker, area: Callable[..., AddressRange]) -> None:
    """A reserve of which little is used costs what is used, in the snapshot and in the memory."""
    with open("/proc/swaps", encoding="ascii") as swaps:
        swap = len(swaps.readlines()) > 1
    place = area(8192, libc.PROT_NONE)
    used = part_of(place, 5000, 3)
    libc.mprotect(used.start, used.length, libc.PROT_READ | libc.PROT_WRITE)
    ram = tracker.track(place)
    libc.fill(used.start, used.length, 8)
    before = resident()
    first = ram.snapshot()
    assert first.pages == 3
    if not swap:
        assert resident() - before < 1024
    libc.fill(used.start, 1, 1)
    assert ram.restore(first, verify=True).pages == 1
    assert peeked(used) == b"\x08" * used.length


@pytest.mark.parametrize("pages", [1, 15, 16])
def test_barred_memory_stays_empty(tracker: DirtyTracker, area: Callable[..., AddressRange], pages: int) -> None:
    """Of a page that cannot be marked while it is empty, even a read would count as a write."""
    place = area(pages, libc.PROT_NONE)
    ram = tracker.track(place)
    first = ram.snapshot()
    assert pages_of(ram.collect()) == set()
    assert first.read() == bytes(place.length)
    assert pages_of(ram.restore(first, verify=True)) == set()
    assert pages_of(ram.collect()) == set()


def part_of(place: AddressRange, first: int, count: int) -> AddressRange:
    """Some pages of it."""
    return AddressRange.from_length(place.start + first * PAGE, count * PAGE)


def resident() -> int:
    """Pages of this process that are in memory."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1])


def test_files(tracker: DirtyTracker, tmp_path) -> None:
    """A mapping's pages that nobody touched hold the file's content, not zeros."""
    need_shared()
    need(Feature.UFFD_WP_PRIVATE_FILE)
    if "pagemap-scan" not in tracker.selection.chosen:
        pytest.skip("uffd-wp cannot track files; remedy: the other backend")
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(64 * PAGE))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 64 * PAGE, flags=mmap.MAP_PRIVATE)
    ram = tracker.track(memory)
    first = ram.snapshot()
    assert first.read() == path.read_bytes()
    write(memory, 1, 40)
    assert pages_of(ram.restore(first, verify=True)) == {1, 40}
    assert memory[:] == path.read_bytes()


def test_an_odd_end(tracker: DirtyTracker) -> None:
    """Memory that ends inside its last page."""
    memory = mmap.mmap(-1, 3 * PAGE + 100, flags=PRIVATE)
    ram = tracker.track(memory)
    memory[-1] = 5
    first = ram.snapshot()
    assert len(first) == len(memory)
    assert first.read() == memory[:]
    assert first.read(3 * PAGE + 98, 3 * PAGE + 100) == b"\0\5"
    assert first.read(PAGE - 1, PAGE + 1) == b"\0\0"
    assert first.read(7, 7) == b""
    memory[-1] = 6
    assert list(ram.restore(first).spans()) == [(3 * PAGE, 3 * PAGE + 100)]
    assert memory[-1] == 5


@pytest.mark.parametrize("pages", [1, 2, 16, 17, 256, 257])
def test_sizes(tracker: DirtyTracker, pages: int) -> None:
    """Trees of any height, and their borders."""
    memory = private(pages)
    ram = tracker.track(memory)
    empty = ram.snapshot()
    write(memory, 0, pages - 1)
    full = ram.snapshot()
    assert pages_of(full.held()) == {0, pages - 1}
    assert pages_of(empty.held()) == set()
    assert pages_of(empty.diff(full)) == {0, pages - 1}
    ram.restore(empty, verify=True)
    assert memory[:] == bytes(pages * PAGE)
    ram.restore(full, verify=True)
    assert memory[:] == full.read()


@pytest.mark.kernel
def test_no_memory(tmp_path: Path) -> None:
    """A file of no pages is a snapshot, which holds, misses and differs in nothing, and goes into a file again."""
    (tmp_path / "file").write_bytes(by_hand([], length=0))
    snapshot = Snapshot.load(tmp_path / "file")
    assert len(snapshot) == snapshot.pages == 0
    for result in (snapshot.held(), snapshot.missing(), snapshot.diff(Snapshot.load(tmp_path / "file"))):
        assert (list(result), result.complete) == ([], True)
    assert snapshot.read() == b""
    snapshot.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_other_memory(tracker: DirtyTracker) -> None:
    """A snapshot fits any memory of its length, whatever that holds."""
    one, other, short = private(PAGES), private(PAGES), private(PAGES - 1)
    write(one, 3, 4, 70)
    write(other, 4, 5, 71)
    snapshot = tracker.track(one).snapshot()
    ram = tracker.track(other)
    assert pages_of(ram.restore(snapshot, verify=True)) == {3, 5, 70, 71}
    assert other[:] == one[:]
    unlike = tracker.track(short)
    with pytest.raises(InvalidArgumentError, match=f"{len(one)} bytes does not fit {len(short)}"):
        unlike.restore(snapshot)
    with pytest.raises(InvalidArgumentError):
        snapshot.diff(unlike.snapshot())
    no_snapshot: Any = "file"
    with pytest.raises(TypeError, match="str is no snapshot"):
        ram.restore(no_snapshot)
    with pytest.raises(TypeError, match="str is no snapshot"):
        snapshot.diff(no_snapshot)


def test_offsets_outside(tracker: DirtyTracker) -> None:
    """Named, with what is allowed."""
    snapshot = tracker.track(private(2)).snapshot()
    for start, stop in ((-1, None), (0, 2 * PAGE + 1), (5, 4)):
        with pytest.raises(InvalidArgumentError, match=str(2 * PAGE)):
            snapshot.read(start, stop)


def test_values(tracker: DirtyTracker) -> None:
    """They outlive what they were made of."""
    memory = private(4)
    write(memory, 2)
    ram = tracker.track(memory)
    snapshot = ram.snapshot()
    content = memory[:]
    ram.close()
    tracker.close()
    assert snapshot.read() == content
    assert repr(snapshot) == f"<Snapshot of {ram.range}: 1 pages>"
    with pytest.raises(ClosedError):
        ram.snapshot()
    with pytest.raises(ClosedError):
        ram.restore(snapshot)


def test_untracked_memory(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """No snapshot is made of memory that nobody watches, and no restore believed."""
    with flavour.tracker() as tracker:
        place = area(8)
        ram = tracker.track(place)
        libc.fill(place.start, place.length, 1)
        first = ram.snapshot()
        libc.mmap(PAGE, address=place.start + 3 * PAGE)
        libc.fill(place.start + PAGE, 1, 2)
        for call in (ram.snapshot, lambda: ram.restore(first)):
            with pytest.raises(NotTrackedError) as caught:
                call()
            assert caught.value.range == part(ram, 3, 1)
        ram.rearm()
        second = ram.snapshot()
        assert second.read() == peeked(place)
        ram.restore(first, verify=True)
        assert peeked(place) == b"\1" * place.length


def test_interrupts(tracker: DirtyTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever step one comes: the next restore and the next snapshot are right."""

    class Interrupt(BaseException):
        """Stands for KeyboardInterrupt."""

    memory = private(PAGES)
    ram = tracker.track(memory)
    write(memory, *range(10))
    first = ram.snapshot()
    content = memory[:]
    write(memory, 5, 20)
    second = ram.snapshot()
    later = memory[:]
    backend = ram._backend
    for name, dropped in product(("take", "capture", "write_back", "differing", "written"), (False, True)):
        for to, wanted in ((first, content), (second, later)):
            for action in (ram.snapshot, lambda to=to: ram.restore(to)):
                if dropped:
                    write(memory, 4, 6)
                    ram.snapshot().drop()
                original = getattr(backend, name)

                def interrupted(*arguments: Any, original: Any = original, **options: Any) -> None:
                    original(*arguments, **options)
                    raise Interrupt

                write(memory, 6, 33)
                with monkeypatch.context() as patch:
                    patch.setattr(backend, name, interrupted)
                    with contextlib.suppress(Interrupt):
                        action()
                write(memory, 7, 34)
                if not dropped:
                    third = ram.snapshot()
                    assert third.read() == memory[:]
                ram.restore(to, verify=True)
                assert memory[:] == wanted


def test_an_interrupt_that_is_kept(tracker: DirtyTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right behind the call that took the pages, with a traceback that holds on to everything."""

    class Interrupt(BaseException):
        """Stands for KeyboardInterrupt."""

    memory = private(PAGES)
    ram = tracker.track(memory)
    first = ram.snapshot()
    kept = []

    def interrupted(*arguments: Any, scan: Callable[..., int] = _kernel.scan) -> int:
        scan(*arguments)
        raise Interrupt

    for action in (ram.snapshot, lambda: ram.restore(first)):
        write(memory, 3, 30)
        with monkeypatch.context() as patch:
            patch.setattr(_kernel, "scan", interrupted)
            with pytest.raises(Interrupt) as caught:
                action()
        kept.append(caught.value)
        assert ram.snapshot().read() == memory[:]
        ram.restore(first, verify=True)


@pytest.mark.anywhere
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("name", ["snapshot", "restore"])
def test_an_interrupt_anywhere(flavour: Flavour, name: str, twice: bool) -> None:
    """At each point of one call in turn, and kept: the next ones are right, and no other thread waits for ever."""

    def check() -> None:
        with flavour.tracker() as tracker:
            memory = private(8)
            ram = tracker.track(memory)
            write(memory, 1, 2)
            first, content = ram.snapshot(), memory[:]
            kept: list[BaseException] = []
            step, interrupted = 0, True
            while interrupted:
                step += 1
                if step % 2:
                    write(memory, 2, 6)
                    ram.snapshot().drop()
                write(memory, 2, 5)
                interrupter, interrupted = Interrupter(getattr(TrackedRange, name), step, twice), False
                try:
                    with interrupter:
                        if name == "snapshot":
                            ram.snapshot()
                        else:
                            ram.restore(first)
                except KeyboardInterrupt as error:
                    kept.append(error)
                    interrupted = True
                interrupted = interrupted or interrupter.raised > 0
                write(memory, 3)
                taken: list[Snapshot] = []
                other = threading.Thread(target=lambda taken=taken: taken.append(ram.snapshot()))
                other.start()
                other.join()
                assert taken[0].read() == memory[:], step
                ram.restore(first, verify=True)
                assert memory[:] == content, step
            assert step > 10

    in_child(check)


def test_no_interrupt_comes_between_an_image_and_its_end() -> None:
    """It is let go without any Python code, in which one would be lost, and the pages with it."""
    image = _kernel.image_create(PAGES)
    events: list[str] = []
    sys.setprofile(lambda _frame, event, _argument: events.append(event))
    del image
    sys.setprofile(None)
    assert events == ["c_call"]  # of setprofile


def test_a_signal_handler_cannot_take_one_meanwhile(tracker: DirtyTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for itself, or miss what is being copied."""
    memory = private(PAGES)
    ram = tracker.track(memory)
    first = ram.snapshot()
    written = write(memory, 5)
    backend, asked = ram._backend, []

    def handler(*arguments: Any, capture: Any = backend.capture) -> None:
        for action in (ram.snapshot, lambda: ram.restore(first)):
            with pytest.raises(PagemapCompatError, match="under way in this thread"):
                action()
            asked.append(action)
        capture(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "capture", handler)
        second = ram.snapshot()
    assert len(asked) == 2
    assert pages_of(first.diff(second)) == written


def test_a_forked_child_does_not_wait(flavour: Flavour) -> None:
    """For a thread of its parent's that was taking a snapshot."""

    def scenario() -> None:
        with flavour.tracker() as tracker:
            memory = private(PAGES)
            ram = tracker.track(memory)
            first = ram.snapshot()
            with ram._history._lock:

                def child() -> None:
                    for action in (ram.snapshot, lambda: ram.restore(first)):
                        with pytest.raises(ClosedError, match="forked"):
                            action()

                in_child(child)

    in_child(scenario)


def test_long_chains(tracker: DirtyTracker) -> None:
    """However they are dropped."""
    memory = private(1)

    def scenario() -> None:
        sys.setrecursionlimit(150)
        ram = tracker.track(memory)
        chain = []
        for _ in range(200):
            write(memory, 0)
            chain.append(ram.snapshot())
        for one in reversed(chain):
            one.drop()
        assert ram.snapshot().parent is None

    thread = Crew()  # its calls are not as deep as pytest's
    thread.add(scenario)
    limit = sys.getrecursionlimit()
    try:
        thread.join()
    finally:
        sys.setrecursionlimit(limit)


def test_rearming(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """A tracker that rearms does so here too, and memory mapped anew is restored."""
    with flavour.tracker(on_untracked="rearm") as tracker:
        place = area(8)
        ram = tracker.track(place)
        libc.fill(place.start, place.length, 1)
        first = ram.snapshot()
        libc.fill(place.start, place.length, 2)
        second = ram.snapshot()
        libc.mmap(2 * PAGE, address=place.start + 2 * PAGE)
        ram.restore(first, verify=True)
        assert peeked(place) == b"\1" * place.length
        libc.mmap(2 * PAGE, address=place.start + 4 * PAGE)
        third = ram.snapshot()
        assert third.read() == peeked(place)
        ram.restore(second, verify=True)


def test_a_page_that_comes_to_a_large_hole(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """It alone is held from then on, and the others of the hole are missed as before."""
    with flavour.tracker(on_untracked="rearm") as tracker:
        place = area(64)
        ram = tracker.track(place)
        libc.munmap(place.start + 16 * PAGE, 16 * PAGE)
        ram.snapshot()
        libc.mmap(PAGE, address=place.start + 20 * PAGE)
        libc.fill(place.start + 20 * PAGE, PAGE, 7)
        second = ram.snapshot()
        assert list(second.missing().spans()) == [(16 * PAGE, 20 * PAGE), (21 * PAGE, 32 * PAGE)]
        libc.fill(place.start + 20 * PAGE, PAGE, 8)
        ram.restore(second)
        assert peeked(part(ram, 20, 1)) == b"\7" * PAGE


def test_writers_are_found_out(flavour: Flavour) -> None:
    """A restore beside writers raises, or leaves nothing unseen: what differs from the snapshot is written since."""

    def writer(memory: mmap.mmap, stop: threading.Event, seed: int) -> None:
        dice = random.Random(seed)
        while not stop.is_set():
            memory[dice.randrange(len(memory))] = dice.randrange(256)

    def scenario() -> None:
        sys.setswitchinterval(0.0003)  # else a restore waits for the GIL most of the time
        with flavour.tracker() as tracker:
            memory = private(PAGES)
            write(memory, *range(PAGES))
            ram = tracker.track(memory)
            first, content = ram.snapshot(), memory[:]
            for number in range(4):
                crew, stop = Crew(), threading.Event()
                for seed in range(2):
                    crew.add(writer, memory, stop, seed + 2 * number)
                raised = False
                while not raised:
                    try:
                        ram.restore(first)
                    except ConcurrentWriteError as error:
                        raised = True
                        assert error.differing is not None
                        assert error.differing.pages
                stop.set()
                crew.join()
                # What is not the snapshot's is known to be written.
                known = pages_of(ram.restore(first))
                assert memory[:] == content, known

    in_child(scenario)


def test_a_write_beside_the_comparison_is_no_riddle(tracker: DirtyTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported like any other; one through another mapping, which nobody reports, is a RestoreError."""
    need_shared()
    with open(os.memfd_create("twice"), "w+b") as file:
        file.truncate(PAGES * PAGE)
        memory, other = (mmap.mmap(file.fileno(), PAGES * PAGE) for _ in range(2))
    write(memory, 1, 2, 3)
    ram = tracker.track(memory)
    first = ram.snapshot()
    everything = snapshots._everything
    for writers, error in (
        ((memory,), ConcurrentWriteError),
        ((other,), RestoreError),
        ((memory, other), RestoreError),
    ):

        def beside(where: AddressRange, writers: tuple[mmap.mmap, ...] = writers) -> _kernel.Result:
            for page, writer in enumerate(writers):
                write(writer, page)
            return everything(where)

        with monkeypatch.context() as patch:
            patch.setattr(snapshots, "_everything", beside)
            with pytest.raises(RestoreError) as caught:
                ram.restore(first, verify=True)
        assert type(caught.value) is error
        assert caught.value.differing is not None
        assert pages_of(caught.value.differing) == set(range(len(writers)))
        ram.restore(first, verify=True)


def test_threads(flavour: Flavour) -> None:
    """Snapshots and restores from several threads are made one after the other."""

    def work(ram: TrackedRange, seed: int, known: list[Snapshot]) -> None:
        dice = random.Random(seed)
        for _ in range(15):
            if dice.randrange(3):
                ram.restore(dice.choice(known))
            else:
                known.append(ram.snapshot())

    def scenario() -> None:
        with flavour.tracker() as tracker:
            memory = private(PAGES)
            ram = tracker.track(memory)
            known: list[Snapshot] = []
            for number in range(4):
                write(memory, number, number + 10)
                known.append(ram.snapshot())
            crew = Crew()
            for seed in range(3):
                crew.add(work, ram, seed, known)
            crew.join()
            for one in known:
                ram.restore(one, verify=True)
                assert memory[:] == one.read()

    in_child(scenario)


@pytest.mark.anywhere
def test_a_family_in_two_threads() -> None:
    """Images that descend from one, made and dropped by two threads at once, hold their own pages alone."""

    def work(base: _kernel.ImageHandle, seed: int) -> None:
        for number in range(1000):
            content = bytes([seed + number % 100]) * (PAGES * PAGE)
            image = _kernel.image_next(base)
            _kernel.image_load(image, 0, content)
            assert _kernel.image_read(image, 0, PAGES) == content

    def scenario() -> None:
        base = _kernel.image_create(PAGES)
        content = b"\1" * (PAGES * PAGE)
        _kernel.image_load(base, 0, content)
        shared = _kernel.image_share(base)
        crew = Crew()
        crew.add(work, base, 2)
        crew.add(work, base, 102)
        crew.join()
        assert _kernel.image_read(shared, 0, PAGES) == content

    in_child(scenario)


@pytest.mark.anywhere
def test_nothing_leaks(flavour: Flavour) -> None:
    """Descriptors, threads and mappings are the same after many snapshots, restores, errors and drops."""

    def scenario() -> None:
        with flavour.tracker() as tracker:
            memory = private(PAGES)
            ram = tracker.track(memory)
            write(memory, 1)
            first = ram.snapshot()
            before = resources()
            for number in range(20):
                write(memory, number % PAGES)
                made = ram.snapshot()
                ram.restore(first)
                made.drop()
            first.squash()
            assert resources() == before

    in_child(scenario)
