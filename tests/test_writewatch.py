"""GetWriteWatch and ResetWriteWatch: each rule of Windows, documented or observed, on every flavour."""

from __future__ import annotations

import copy
import ctypes
import errno
import itertools
import mmap
import os
import pickle
import random
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest
from children import Crew, in_child, memory_of, plain
from conftest import (
    HUGE,
    PAGE,
    PRIVATE,
    Flavour,
    disable,
    flavours,
    lacking,
    libc,
    need_shared,
    pages_of,
    private,
    use_flavour,
    write,
)
from interrupter import Interrupted, Interrupter, SignalStorm
from test_kinds import hugetlb_refused

from pagemapcompat import (
    AddressRange,
    AlignmentError,
    ClosedError,
    DirtyTracker,
    Feature,
    Guarantee,
    InvalidArgumentError,
    KernelError,
    NotTrackedError,
    TrackedRange,
    own_memory,
    probe,
)
from pagemapcompat.mappings import Mapping, own_mappings
from pagemapcompat.writewatch import (
    WRITE_WATCH_FLAG_RESET,
    WRITE_WATCH_GRANULARITY,
    Win32Error,
    WriteWatch,
    WriteWatchAnswer,
    WrittenAddresses,
)

PAGES = 64
GUEST = 0x7000_0000
"""Where the guest sees the memory."""
STEP = WRITE_WATCH_GRANULARITY
RESET = WRITE_WATCH_FLAG_RESET
NOACCESS, INVALID = Win32Error.ERROR_NOACCESS, Win32Error.ERROR_INVALID_PARAMETER
ARRAY, SIZE = 0xA0000, 0xB0000
"""Pointers of the guest: to its array, and to where it wants the granularity."""
NONE, READ, WRITE = libc.PROT_NONE, libc.PROT_READ, libc.PROT_READ | libc.PROT_WRITE


def watched(tracker: DirtyTracker, memory: mmap.mmap) -> WriteWatch:
    """Tracked memory that a guest sees at GUEST."""
    return WriteWatch(tracker.track(memory), base=GUEST)


def of(*pages: int, base: int = GUEST) -> list[int]:
    """The addresses of pages, in order."""
    return [base + at for page in sorted(pages) for at in range(page * PAGE, (page + 1) * PAGE, STEP)]


def call(watch: WriteWatch, flags: int = 0, count: int = 1 << 32) -> list[int]:
    """A guest's call for all of the memory, which must succeed."""
    answer = watch.get_write_watch(flags, watch.base, watch.size, ARRAY, count, SIZE)
    assert (answer.status, answer.error, answer.granularity) == (0, Win32Error.ERROR_SUCCESS, STEP)
    assert answer.count == len(answer.addresses)
    return list(answer.addresses)


def view_of(memory: AddressRange) -> memoryview:
    """Raw memory as bytes."""
    import ctypes

    return memoryview((ctypes.c_ubyte * memory.length).from_address(memory.start)).cast("B")


@pytest.fixture
def reserved(area: Callable[..., AddressRange]) -> AddressRange:
    """Memory that is reserved and not committed."""
    return area(PAGES, NONE, PRIVATE | libc.MAP_NORESERVE)


# -- What is documented ----------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_written_since_allocation_or_the_last_reset(tracker: DirtyTracker) -> None:
    """Asking changes nothing; asking with RESET starts anew; ascending, 4096 bytes each."""
    memory = private(PAGES)
    watch = watched(tracker, memory)
    assert call(watch) == []
    write(memory, 40, 3, 4)
    assert call(watch) == of(3, 4, 40)
    assert call(watch, RESET) == of(3, 4, 40)
    assert call(watch) == []
    write(memory, 4)
    assert call(watch) == of(4)


@pytest.mark.kernel
def test_reset_write_watch(tracker: DirtyTracker) -> None:
    """Forgets what was written before it, in a part or everywhere."""
    memory = private(PAGES)
    watch = watched(tracker, memory)
    write(memory, 1, 2, 3)
    answer = watch.reset_write_watch(GUEST + 2 * PAGE, PAGE)
    assert answer == WriteWatchAnswer(status=0, error=Win32Error.ERROR_SUCCESS, addresses=answer.addresses)
    assert (list(answer.addresses), answer.count, answer.granularity) == ([], None, None)
    assert call(watch) == of(1, 3)
    assert watch.reset_write_watch(GUEST, watch.size).status == 0
    assert call(watch) == []
    write(memory, 2)
    assert call(watch) == of(2)


@pytest.mark.kernel
def test_no_write_is_lost_between_getting_and_resetting(flavour: Flavour) -> None:
    """Writers, callers with RESET for a few at a time and a reader of its own: in the end all counters were seen."""
    rounds = 60

    def scenario() -> None:
        memory = private(PAGES)
        last = [0] * PAGES
        lock = threading.Lock()
        with flavour.tracker() as tracker:
            watch = watched(tracker, memory)

            def merge(addresses: WrittenAddresses) -> None:
                with lock:
                    for address in addresses:
                        page = (address - GUEST) // PAGE
                        last[page] = memory[page * PAGE]

            def writer(seed: int) -> None:
                dice = random.Random(seed)
                for _ in range(rounds * 3):
                    page = dice.randrange(PAGES)
                    memory[page * PAGE] = dice.randrange(256)

            def caller(count: int | None) -> None:
                for _ in range(rounds):
                    merge(watch.get(count=count, reset=True))

            crew = Crew()
            for seed in range(2):
                crew.add(writer, seed)
            crew.add(caller, 3)
            crew.add(caller, None)
            crew.join()
            merge(watch.get(reset=True))
            assert last == [memory[page * PAGE] for page in range(PAGES)]

    in_child(scenario)


# -- Where the documents are silent ----------------------------------------------------------------------------


@pytest.mark.kernel
def test_a_store_across_a_page_edge_counts_for_both(tracker: DirtyTracker) -> None:
    """One store of two bytes."""
    memory = private(PAGES)
    watch = watched(tracker, memory)
    with memoryview(memory) as bytes_, bytes_[6 * PAGE - 4 : 6 * PAGE + 4] as edge:
        edge[:] = b"12345678"
    assert call(watch, RESET) == of(5, 6)


@pytest.mark.kernel
def test_an_answer_is_a_value(tracker: DirtyTracker) -> None:
    """Equal when it says the same, and the same elsewhere."""
    memory = private(8)
    watch = WriteWatch(tracker.track(memory), base=0x10000)
    write(memory, 1, 3)
    first, some = watch.get(), watch.get(count=1)
    assert first == watch.get()
    assert first != some
    assert first != list(first)
    for made in (pickle.loads(pickle.dumps(first)), copy.deepcopy(first)):  # noqa: S301 - our own
        assert made == first
        assert list(made) == [0x11000, 0x13000]
        assert made.complete


def test_too_few_slots_get_the_lowest_and_reset_those_alone(tracker: DirtyTracker) -> None:
    """Also one by one, until none is left."""
    memory = private(PAGES)
    watch = watched(tracker, memory)
    written = of(*write(memory, 9, 10, 30, 31, 63))
    assert call(watch, 0, 2) == written[:2]
    assert call(watch, RESET, 3) == written[:3]
    assert call(watch) == written[3:]
    for address in written[3:]:
        assert call(watch, RESET, 1) == [address]
    assert call(watch, RESET, 1) == []


@pytest.mark.kernel
def test_nothing_written_is_success_and_fills_no_slot(tracker: DirtyTracker) -> None:
    """The count becomes 0."""
    watch = watched(tracker, private(PAGES))
    answer = watch.get_write_watch(0, GUEST, PAGE, ARRAY, 8, SIZE)
    assert (answer.status, answer.count, len(answer.addresses), answer.granularity) == (0, 0, 0, STEP)
    assert answer.addresses.complete


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((0, GUEST, STEP, ARRAY, None, SIZE), NOACCESS),
        ((0, GUEST, STEP, ARRAY, 8, 0), NOACCESS),
        ((0, GUEST, STEP, ARRAY, 8, None), NOACCESS),
        ((2, GUEST, 0, None, None, SIZE), NOACCESS),  # a NULL count comes before everything
        ((2, 0, 0, None, 0, 0), NOACCESS),  # and so does a NULL granularity
        ((0, GUEST, STEP, ARRAY, 0, SIZE), INVALID),
        ((0, GUEST, 0, ARRAY, 8, SIZE), INVALID),
        ((2, GUEST, STEP, ARRAY, 8, SIZE), INVALID),
        ((RESET | 4, GUEST, STEP, ARRAY, 8, SIZE), INVALID),
        ((0, GUEST, STEP, None, 0, SIZE), INVALID),  # count, size and flags come before the array
        ((0, GUEST, 0, None, 8, SIZE), INVALID),
        ((2, GUEST, STEP, 0, 8, SIZE), INVALID),
        ((0, GUEST, STEP, None, 8, SIZE), NOACCESS),
        ((0, GUEST, STEP, 0, 8, SIZE), NOACCESS),
        ((0, 0, STEP, None, 8, SIZE), NOACCESS),  # the array comes before the range
        ((0, GUEST - 1, STEP, ARRAY, 8, SIZE), INVALID),
        ((0, GUEST, PAGES * PAGE + 1, ARRAY, 8, SIZE), INVALID),
        ((0, GUEST + PAGES * PAGE, 1, ARRAY, 8, SIZE), INVALID),
        ((0, 0, STEP, ARRAY, 8, SIZE), INVALID),
        ((0, GUEST, (1 << 64) - 1, ARRAY, 8, SIZE), INVALID),
        ((0, (1 << 64) - 1, 2, ARRAY, 8, SIZE), INVALID),
    ],
)
def test_order_of_checks(arguments: tuple[int, int, int, int | None, int | None, int | None], error: int) -> None:
    """A guest's mistake is answered with ~0 and its error; nothing is reset, and no variable of the guest changes."""
    memory = private(PAGES)
    with DirtyTracker() as tracker, tracker.track(memory) as ram:
        watch = WriteWatch(ram, base=GUEST)
        write(memory, 0, 63)
        answer = watch.get_write_watch(*arguments)
        assert (answer.status, answer.error) == (0xFFFF_FFFF, error)
        assert (list(answer.addresses), answer.count, answer.granularity) == ([], None, None)
        assert call(watch) == of(0, 63)


@pytest.mark.parametrize(
    ("base", "size"),
    [(GUEST, 0), (GUEST - 1, STEP), (GUEST, PAGES * PAGE + 1), (GUEST + PAGES * PAGE, 1), (0, STEP)],
)
def test_reset_has_the_same_rule_of_ranges(base: int, size: int) -> None:
    """ERROR_INVALID_PARAMETER; nothing is reset."""
    memory = private(PAGES)
    with DirtyTracker() as tracker, tracker.track(memory) as ram:
        watch = WriteWatch(ram, base=GUEST)
        write(memory, 0, 63)
        answer = watch.reset_write_watch(base, size)
        assert (answer.status, answer.error) == (0xFFFF_FFFF, INVALID)
        assert call(watch) == of(0, 63)


@pytest.mark.kernel
def test_base_and_size_are_rounded_out(tracker: DirtyTracker) -> None:
    """Two bytes on either side of an edge are two pages, for getting, resetting and declaring."""
    memory = private(PAGES)
    watch = watched(tracker, memory)
    edge = GUEST + 20 * PAGE - 1
    around = [GUEST + 20 * PAGE - STEP, GUEST + 20 * PAGE]
    write(memory, 18, 19, 20, 21)
    answer = watch.get_write_watch(RESET, edge, 2, ARRAY, 100, SIZE)
    assert list(answer.addresses) == around
    assert call(watch) == sorted(set(of(18, 19, 20, 21)) - set(around))
    write(memory, 18, 19, 20, 21)
    assert watch.reset_write_watch(edge, 2).status == 0
    assert call(watch, RESET) == sorted(set(of(18, 19, 20, 21)) - set(around))
    watch.mark_written(edge, 2)
    assert call(watch) == of(19, 20)


@pytest.mark.kernel
def test_protections_never_change_the_answer(tracker: DirtyTracker) -> None:
    """Read-only, no access, every page a mapping of its own, and back."""
    memory = private(PAGES)
    ram = tracker.track(memory)
    watch = WriteWatch(ram, base=GUEST)
    dice = random.Random(7)
    written = of(*write(memory, 2, 3, 5, 33, 62))
    for protection in (READ, NONE, READ):
        libc.mprotect(ram.range.start, ram.range.length, protection)
        assert call(watch) == written
    for page in range(PAGES):
        libc.mprotect(ram.range.start + page * PAGE, PAGE, dice.choice([NONE, READ, WRITE]))
    assert call(watch) == written
    assert call(watch, RESET, 2) == written[:2]
    assert call(watch, RESET) == written[2:]
    libc.mprotect(ram.range.start, ram.range.length, WRITE)
    assert call(watch) == []
    assert of(*write(memory, 3, 4)) == call(watch)


@pytest.mark.kernel
def test_reserved_memory_is_clean(tracker: DirtyTracker, reserved: AddressRange) -> None:
    """And no error, however it is asked for, resets included."""
    watch = WriteWatch(tracker.track(reserved), base=GUEST)
    assert call(watch) == []
    assert watch.reset_write_watch(GUEST, watch.size).status == 0
    watch.commit(GUEST + 8 * PAGE, 2 * PAGE)
    libc.fill(reserved.start + 9 * PAGE)
    assert call(watch, RESET) == of(9)
    assert call(watch) == []


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["private", "shared"])
def test_a_buffer_of_asynchronous_io_counts_at_once(tracker: DirtyTracker, kind: str) -> None:
    """All of it, whether or not data arrives, once, whatever it held."""
    memory = memory_of(kind, PAGES)
    watch = watched(tracker, memory)
    write(memory, 10)
    watch.mark_written(GUEST + 10 * PAGE + 5, 3 * PAGE)
    assert call(watch) == of(10, 11, 12, 13)
    assert call(watch, RESET) == of(10, 11, 12, 13)
    assert call(watch) == []
    assert of(*write(memory, 12)) == call(watch)


@pytest.mark.kernel
def test_read_into_a_declared_buffer(flavour: Flavour, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel stores into it without KERNEL_WRITES too, where it cannot store into its neighbours."""
    disable(monkeypatch, *flavour.disabled, "uffd-syscall", "uffd-device")
    if not probe().supports(Feature.UFFD_USER_MODE_ONLY):
        pytest.skip("uffd-user-mode-only is what fails such stores; remedy: Linux 5.11")
    memory = private(PAGES)
    with flavour.tracker() as tracker, open("/dev/zero", "rb", buffering=0) as file, memoryview(memory) as view:
        watch = watched(tracker, memory)
        write(memory, 1, 2, 3)
        watch.reset()
        if flavour.backend == "uffd-wp":
            assert Guarantee.KERNEL_WRITES not in tracker.selection.guarantees
            with view[PAGE : 3 * PAGE] as buffer, pytest.raises(OSError, match="Bad address"):
                file.readinto(buffer)
        watch.mark_written(GUEST + PAGE, 2 * PAGE)
        with view[PAGE : 3 * PAGE] as buffer:
            assert file.readinto(buffer) == 2 * PAGE
        assert call(watch, RESET) == of(1, 2)


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["private", "shared"])
def test_decommitted_memory_is_forgotten(tracker: DirtyTracker, kind: str) -> None:
    """Its pages are clean, nobody may access them, and committed again they are zero and clean."""
    memory = memory_of(kind, PAGES)
    memory[:] = b"x" * len(memory)
    ram = tracker.track(memory)
    watch = WriteWatch(ram, base=GUEST)
    write(memory, 3, 4, 5, 6)
    watch.decommit(GUEST + 4 * PAGE, 2 * PAGE)
    assert call(watch) == of(3, 6)
    assert permissions_at(ram.range.start + 4 * PAGE).startswith("---")
    watch.commit(GUEST + 4 * PAGE, 2 * PAGE)
    assert call(watch) == of(3, 6)
    assert memory[4 * PAGE : 6 * PAGE] == bytes(2 * PAGE)
    assert call(watch) == of(3, 6)
    assert memory[7 * PAGE] == ord("x")
    write(memory, 5)
    assert call(watch) == of(3, 5, 6)


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["private", "shared"])
def test_other_readers_see_a_decommit(tracker: DirtyTracker, kind: str) -> None:
    """All of it, as the content has changed; a copy that follows what they report stays right."""
    memory = memory_of(kind, PAGES)
    write(memory, *range(PAGES))
    ram = tracker.track(memory)
    other = ram.cursor()
    with WriteWatch(ram) as watch:
        watch.decommit(ram.range.start + 8 * PAGE, 4 * PAGE)
        assert pages_of(other.collect()) == {8, 9, 10, 11}
        watch.commit(ram.range.start + 8 * PAGE, 4 * PAGE)
        assert pages_of(ram.collect()) == {8, 9, 10, 11}
        assert call(watch) == []


def test_a_decommit_that_fails_half_way(tracker: DirtyTracker) -> None:
    """What it has taken back by then other readers and snapshots know, and nothing is forgotten."""
    need_shared()
    memory = mmap.mmap(-1, 8 * PAGE)
    write(memory, *range(8))
    ram = tracker.track(memory)
    watch, other = WriteWatch(ram, base=GUEST), ram.cursor()
    ram.snapshot()
    at = ram.range.start
    if plain.mlock(ctypes.c_void_p(at + 4 * PAGE), 4 * PAGE):
        lacking("mlock", "no memory can be locked (ENOMEM)", "ulimit -l 64")
    with pytest.raises(KernelError, match="madvise"):
        watch.decommit(GUEST, 8 * PAGE)
    assert plain.munlock(ctypes.c_void_p(at + 4 * PAGE), 4 * PAGE) == 0
    libc.mprotect(at, 8 * PAGE, WRITE)
    assert set(range(4)) <= pages_of(other.collect())
    assert memory[0] == 0
    assert ram.snapshot().read() == memory[:]


def test_what_the_mappings_leave_out_is_taken_back(tracker: DirtyTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer kernels list them without their lock, and may miss one beside mprotect: there, each in turn."""
    need_shared()
    memory, between = private(12), 4 * PAGE
    memory[:] = b"x" * len(memory)
    ram = tracker.track(memory)
    libc.mmap(between, WRITE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, address=ram.range.start + between)
    ram.rearm()
    write(memory, *range(4, 8))
    watch = WriteWatch(ram, base=GUEST)
    write(memory, 1, 5, 9)
    readings = 0

    def without_one(asked: AddressRange) -> list[Mapping]:
        nonlocal readings
        found = own_mappings(asked)
        assert len(found) == 3
        left_out, readings = readings, readings + 1
        return [one for number, one in enumerate(found) if number != left_out]

    monkeypatch.setattr(own_memory, "own_mappings", without_one)
    watch.decommit(GUEST, watch.size)
    assert readings == 4
    assert call(watch) == []
    monkeypatch.undo()
    watch.commit(GUEST, watch.size)
    assert memory[:] == bytes(len(memory))
    assert call(watch) == []


def test_a_decommit_that_is_refused_changes_nothing(tracker: DirtyTracker) -> None:
    """Memory of which a part is not tracked any more keeps its protection, and the rest its content."""
    memory = private(4)
    with tracker.track(memory) as ram, WriteWatch(ram, base=GUEST) as watch:
        write(memory, 0, 3)
        part = AddressRange.from_length(ram.range.start + PAGE, PAGE)
        libc.mmap(PAGE, address=part.start)
        before = [mapping.permissions for mapping in own_mappings(ram.range)]
        with pytest.raises(NotTrackedError):
            watch.decommit(GUEST, 4 * PAGE)
        assert [mapping.permissions for mapping in own_mappings(ram.range)] == before
        assert memory[0]
        assert memory[3 * PAGE]


def test_memory_that_is_unmapped_while_it_is_taken_back(
    tracker: DirtyTracker, monkeypatch: pytest.MonkeyPatch, area: Callable[..., AddressRange]
) -> None:
    """An error that says so: what is left may hold anything."""
    memory = area(8)
    watch = WriteWatch(tracker.track(memory), base=GUEST)

    def unmapped(asked: AddressRange) -> list[Mapping]:
        libc.munmap(memory.start + 2 * PAGE, PAGE)
        return own_mappings(asked)

    monkeypatch.setattr(own_memory, "own_mappings", unmapped)
    with pytest.raises(KernelError, match="/proc/self/maps") as caught:
        watch.decommit(GUEST, 4 * PAGE)
    assert (caught.value.errno, caught.value.range) == (errno.ENOMEM, AddressRange.from_length(memory.start, 4 * PAGE))
    assert "not mapped" in str(caught.value.hint)
    watch.decommit(GUEST + 4 * PAGE, 4 * PAGE)


def permissions_at(address: int) -> str:
    """Those of the mapping that holds an address."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            span, permissions = line.split()[:2]
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= address < end:
                return permissions
    pytest.fail(f"nothing is mapped at {address:#x}")


# -- Committing ------------------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_reading_committed_memory_is_not_writing(tracker: DirtyTracker, reserved: AddressRange) -> None:
    """Also where empty pages can carry no mark, for the first time and after a decommit."""
    watch = WriteWatch(tracker.track(reserved))
    view = view_of(reserved)
    for _ in range(2):
        watch.commit(watch.base + 4 * PAGE, 16 * PAGE)
        assert [view[page * PAGE] for page in range(4, 20)] == [0] * 16
        assert call(watch) == []
        libc.fill(reserved.start + 7 * PAGE)
        assert call(watch, RESET) == of(7, base=watch.base)
        assert call(watch) == []
        libc.fill(reserved.start + 8 * PAGE)
        watch.decommit(watch.base + 4 * PAGE, 16 * PAGE)
        assert call(watch) == []


@pytest.mark.parametrize("flavour", flavours("uffd-wp")[:1], indirect=True)
def test_reading_committed_memory_is_not_writing_without_marks(
    flavour: Flavour, monkeypatch: pytest.MonkeyPatch, reserved: AddressRange
) -> None:
    """Nor where the kernel would protect empty pages, and nobody could see it."""
    disable(monkeypatch, *flavour.disabled, "pagemap-uffd-wp")
    with flavour.tracker() as tracker:
        watch = WriteWatch(tracker.track(reserved))
        watch.commit(watch.base + 4 * PAGE, 16 * PAGE)
        view = view_of(reserved)
        assert [view[page * PAGE] for page in range(4, 20)] == [0] * 16
        assert call(watch) == []
        libc.fill(reserved.start + 7 * PAGE)
        assert call(watch, RESET) == of(7, base=watch.base)
        assert call(watch) == []


@pytest.mark.kernel
def test_committing_committed_memory_keeps_it(tracker: DirtyTracker) -> None:
    """Only the protection changes: neither content nor what was written, read-only or not."""
    memory = private(PAGES)
    ram = tracker.track(memory)
    watch = WriteWatch(ram, base=GUEST)
    write(memory, 1, 2)
    watch.commit(GUEST, 4 * PAGE, READ)
    assert permissions_at(ram.range.start).startswith("r--")
    assert call(watch) == of(1, 2)
    watch.commit(GUEST, 4 * PAGE)
    assert memory[PAGE] == memory[2 * PAGE] == 1
    assert memory[0] == memory[3 * PAGE] == 0
    assert call(watch) == of(1, 2)
    assert of(1, 2, *write(memory, 3)) == call(watch)


@pytest.mark.kernel
def test_committing_loses_nothing_that_a_protection_hides(tracker: DirtyTracker, reserved: AddressRange) -> None:
    """Pages that were written, or declared so while they were empty, then made inaccessible and committed again."""
    ram = tracker.track(reserved)
    other = ram.cursor()
    watch = WriteWatch(ram, base=GUEST)
    watch.commit(GUEST + 2 * PAGE, 12 * PAGE)
    other.reset()
    libc.fill(reserved.start + 3 * PAGE, PAGE, 9)
    libc.fill(reserved.start + 5 * PAGE, PAGE, 9)
    libc.madvise(reserved.start + 7 * PAGE, PAGE, mmap.MADV_DONTNEED)
    watch.mark_written(GUEST + 7 * PAGE, 2 * PAGE)
    libc.mprotect(reserved.start + 2 * PAGE, 12 * PAGE, NONE)
    watch.commit(GUEST, 16 * PAGE, NONE)
    assert call(watch) == of(3, 5, 7, 8)
    watch.commit(GUEST, 16 * PAGE)
    assert call(watch, RESET) == of(3, 5, 7, 8)
    assert {3, 5, 7, 8} <= pages_of(other.collect())
    view = view_of(reserved)
    assert [view[page * PAGE] for page in range(2, 9)] == [0, 9, 0, 9, 0, 0, 0]
    assert call(watch) == []


@pytest.mark.kernel
def test_committing_among_discarded_and_foreign_mappings(
    tracker: DirtyTracker, area: Callable[..., AddressRange]
) -> None:
    """A hole is refused, and what is shared beside private memory is committed and taken back as well."""
    need_shared()
    memory = area(PAGES, NONE)
    libc.mmap(4 * PAGE, WRITE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, address=memory.start + 4 * PAGE)
    ram = tracker.track(memory)
    watch = WriteWatch(ram, base=GUEST)
    watch.commit(GUEST, 12 * PAGE)
    view = view_of(memory)
    assert [view[page * PAGE] for page in range(12)] == [0] * 12
    assert call(watch) == []
    libc.fill(memory.start + 3 * PAGE, 2 * PAGE)
    watch.decommit(GUEST, 12 * PAGE)
    watch.commit(GUEST, 12 * PAGE)
    assert [view[page * PAGE] for page in range(12)] == [0] * 12
    assert call(watch) == []
    libc.munmap(memory.start + 20 * PAGE, PAGE)
    with pytest.raises(KernelError, match="mprotect: protection=0x3") as caught:
        watch.commit(GUEST + 16 * PAGE, 8 * PAGE)
    assert "not mapped" in str(caught.value.hint)
    with pytest.raises(InvalidArgumentError, match="protection=0x10000000000"):
        watch.commit(GUEST, PAGE, 1 << 40)
    with pytest.raises(InvalidArgumentError, match=f"base={GUEST + 99 * PAGE:#x} is not wholly"):
        watch.get(GUEST + 99 * PAGE)


def reservations(length: int, *backends: str) -> list[object]:
    """Flavours with a size; only the small one goes into guests, whose memory the page tables of the large one fill."""
    marks = () if length > 1 << 30 else (pytest.mark.kernel,)
    return [
        pytest.param(one.values[0], length, id=f"{one.id}-{length >> 30}GiB", marks=(*one.marks, *marks))
        for one in flavours(*backends)
    ]


@pytest.mark.parametrize(
    ("chosen", "length"), [*reservations(1 << 30), *(one for one in reservations(64 << 30) if not one.marks)]
)
def test_a_reservation_far_larger_than_what_is_committed(
    chosen: Flavour, length: int, monkeypatch: pytest.MonkeyPatch, area: Callable[..., AddressRange]
) -> None:
    """Pieces are committed, split into hundreds of mappings, written, hidden and taken back; every answer is exact."""
    flavour = use_flavour(chosen, monkeypatch)
    room = area(length // PAGE, NONE, PRIVATE | libc.MAP_NORESERVE)
    dice = random.Random(11)
    pieces = sorted(dice.sample(range(0, length // PAGE, 64), 4))
    with flavour.tracker() as tracker:
        watch = WriteWatch(tracker.track(room), base=GUEST << 12)
        due: set[int] = set()

        def look(first: int) -> None:
            base = watch.base + first * PAGE
            assert list(watch.get(base, 64 * PAGE)) == of(*(p for p in due if first <= p < first + 64), base=watch.base)

        for first in pieces:
            watch.commit(watch.base + first * PAGE, 64 * PAGE)
            for page in range(first, first + 64):
                if page % 3:
                    libc.fill(room.start + page * PAGE)
                    due.add(page)
                libc.mprotect(room.start + page * PAGE, PAGE, dice.choice([NONE, READ, WRITE]))
            look(first)
        watch.decommit(watch.base + pieces[1] * PAGE, 32 * PAGE)
        due -= set(range(pieces[1], pieces[1] + 32))
        watch.commit(watch.base + pieces[1] * PAGE, 48 * PAGE)
        watch.reset(watch.base + pieces[2] * PAGE, 64 * PAGE)
        due -= set(range(pieces[2], pieces[2] + 64))
        for first in pieces:
            look(first)
        assert call(watch, RESET) == of(*due, base=watch.base)
        due.clear()
        for first in pieces:
            look(first)


# -- Larger pages ----------------------------------------------------------------------------------------------


@pytest.fixture(params=[4, 16])
def large(
    request: pytest.FixtureRequest,
    tracker: DirtyTracker,
    area: Callable[..., AddressRange],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[memoryview, WriteWatch, int]:
    """Memory whose pages are so many base pages large: stores are, too, and the watch asks for no less at a time."""
    memory = area(PAGES)
    watch = WriteWatch(tracker.track(memory), base=GUEST)
    monkeypatch.setattr(WriteWatch, "_unit", request.param * PAGE)
    return view_of(memory), watch, request.param


def store(memory: memoryview, unit: int, *units: int) -> list[int]:
    """Store into large pages; the addresses of all that they hold."""
    pages = [page for one in units for page in range(one * unit, (one + 1) * unit)]
    write(memory, *pages)
    return of(*pages)


@pytest.mark.kernel
def test_granularity_is_4096_on_larger_pages(large: tuple[memoryview, WriteWatch, int]) -> None:
    """One slot gets one address, and RESET forgets that one alone; so do sub-ranges."""
    memory, watch, unit = large
    due = store(memory, unit, 1, 3)
    assert call(watch) == due
    assert call(watch, 0, 1) == due[:1]
    assert call(watch, RESET, 1) == due[:1]
    assert call(watch, RESET, 2) == due[1:3]
    assert call(watch) == due[3:]
    assert list(watch.get(due[4] + 5, 1, count=1, reset=True)) == [due[4]]
    due = due[3:4] + due[5:]
    assert call(watch) == due
    watch.reset(due[-1], STEP)
    assert call(watch) == due[:-1]
    again = store(memory, unit, 3)
    expected = sorted({*due, *again})
    for size in itertools.cycle((1, 3, 2)):
        assert call(watch) == expected
        assert call(watch, RESET, size) == expected[:size]
        expected = expected[size:]
        if not expected:
            break
    assert call(watch) == []
    assert not watch._kept


@pytest.mark.kernel
def test_a_part_of_a_larger_page_says_whether_there_is_more(large: tuple[memoryview, WriteWatch, int]) -> None:
    """`complete` is of what was asked about; nothing beside it is taken."""
    memory, watch, unit = large
    due = store(memory, unit, 1)
    middle = watch.get(due[1], 2 * STEP, reset=True)
    assert (list(middle), middle.complete) == (due[1:3], True)
    limited = watch.get(count=1)
    assert (list(limited), limited.complete) == (due[:1], False)
    assert call(watch) == due[:1] + due[3:]
    watch.reset()
    assert call(watch) == []


@pytest.mark.kernel
def test_pages_of_the_host_are_committed_whole(large: tuple[memoryview, WriteWatch, int]) -> None:
    """Rather than touch a neighbour both refuse, and name what would do."""
    memory, watch, unit = large
    due = store(memory, unit, 0, 1, 2)
    for change in (watch.commit, watch.decommit):
        with pytest.raises(AlignmentError, match=str(unit * PAGE)) as caught:
            change(due[1], unit * PAGE)
        assert f"{2 * unit * PAGE} bytes at {GUEST:#x}" in str(caught.value.hint)
    assert call(watch, RESET, 1) == due[:1]
    watch.decommit(GUEST + unit * PAGE, unit * PAGE)
    watch.commit(GUEST + unit * PAGE, unit * PAGE)
    assert memory[unit * PAGE] == 0
    assert call(watch) == sorted(set(due[1:]) - set(of(*range(unit, 2 * unit))))


@pytest.mark.kernel
@pytest.mark.parametrize("shared", [False, True], ids=["private", "memfd"])
def test_hugetlb(flavour: Flavour, pool: None, area: Callable[..., AddressRange], shared: bool) -> None:
    """A store into a huge page counts for all of it, 4096 bytes at a time."""
    if hugetlb_refused(flavour):
        pytest.skip("this kernel does not track huge pages; remedy: Linux 5.19")
    fd = os.memfd_create("huge", 4) if shared else -1
    if shared:
        os.ftruncate(fd, 4 * HUGE)
    memory = area(4 * HUGE // PAGE, 3, mmap.MAP_SHARED if shared else PRIVATE | libc.MAP_HUGETLB, fd)
    if shared:
        os.close(fd)
    with flavour.tracker() as tracker:
        watch = WriteWatch(tracker.track(memory), base=GUEST)
        libc.fill(memory.start + HUGE + 5 * PAGE)
        libc.fill(memory.start + 3 * HUGE)
        due = [*range(GUEST + HUGE, GUEST + 2 * HUGE, STEP), *range(GUEST + 3 * HUGE, GUEST + 4 * HUGE, STEP)]
        assert call(watch) == due
        # From inside a huge page on: not fewer than asked for, as long as there are more.
        within = [address for address in due if address >= GUEST + 2 * HUGE - STEP]
        for count in (1, 2, 300, 512, 513, 600):
            got = watch.get(GUEST + 2 * HUGE - STEP, 2 * HUGE + STEP, count=count)
            assert list(got) == within[:count]
        assert call(watch, RESET, 1) == due[:1]
        assert call(watch, RESET, 600) == due[1:601]
        assert call(watch) == due[601:]
        watch.reset(GUEST + 4 * HUGE - STEP, 1)
        assert call(watch) == due[601:-1]
        with pytest.raises(AlignmentError, match=str(HUGE)):
            watch.decommit(GUEST, STEP)
        watch.decommit(GUEST + 3 * HUGE, HUGE)
        assert call(watch) == []
        watch.commit(GUEST + 3 * HUGE, HUGE)
        assert view_of(memory)[3 * HUGE] == 0


# -- In Python's manner ----------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_addresses_are_a_sequence(tracker: DirtyTracker) -> None:
    """Length, order, index, slice, words, and the guest's array of either size."""
    memory = private(PAGES)
    watch = watched(tracker, memory)
    written = of(*write(memory, 1, 2, 3, 40, 63))
    got = watch.get()
    assert len(got) == len(written)
    assert list(got) == list(reversed(list(reversed(got)))) == written
    assert [got[index] for index in range(-len(written), len(written))] == written * 2
    assert (got[1:3], got[::-2]) == (written[1:3], written[::-2])
    with pytest.raises(IndexError):
        got[len(written)]
    words = got.as_u64()
    assert (words.format, words.readonly, words.ndim, words.tolist()) == ("Q", True, 1, written)
    assert got.packed(8) == b"".join(address.to_bytes(8, "little") for address in written)
    assert got.packed(4) == b"".join(address.to_bytes(4, "little") for address in written)
    assert repr(got) == f"<WrittenAddresses: {len(written)}>"
    limited = watch.get(count=1)
    assert repr(limited) == "<WrittenAddresses: 1, perhaps not all>"
    with pytest.raises(InvalidArgumentError, match="pointer_size=2"):
        got.packed(2)
    watch.close()
    assert list(got) == written
    with pytest.raises(ClosedError):
        watch.get()


@pytest.mark.parametrize("base", [0, (1 << 32) - 2 * STEP, (1 << 64) - PAGES * PAGE], ids=hex)
def test_guests_addresses(base: int) -> None:
    """From the first to the last that there can be; 4 bytes hold those below 2**32."""
    memory = private(PAGES)
    with DirtyTracker() as tracker, tracker.track(memory) as ram:
        watch = WriteWatch(ram, base=base)
        written = of(*write(memory, 0, 63), base=base)
        got = watch.get()
        assert list(got) == got.as_u64().tolist() == written
        assert got.packed(8) == b"".join(address.to_bytes(8, "little") for address in written)
        if base:
            with pytest.raises(InvalidArgumentError, match=f"{written[-1]:#x} does not fit"):
                got.packed(4)
        assert watch.get(base + PAGE, STEP).packed(4) == b""
        assert call(watch, RESET) == written


@pytest.mark.kernel
def test_by_default_the_guest_sees_it_where_it_lies(tracker: DirtyTracker) -> None:
    """The end of an mmap that ends inside a page is watched like the rest; parts need no size."""
    memory = mmap.mmap(-1, 3 * PAGE + 10, flags=PRIVATE)
    ram = tracker.track(memory)
    watch = WriteWatch(ram)
    assert (watch.base, watch.size) == (ram.range.start, 3 * PAGE + STEP)
    memory[3 * PAGE + 9] = 1
    memory[0] = 1
    last = ram.range.start + 3 * PAGE
    assert list(watch.get(last)) == [last]
    assert list(watch.get(size=PAGE)) == of(0, base=ram.range.start)
    watch.decommit(last, STEP)
    watch.commit(last, STEP)
    assert memory[3 * PAGE + 9] == 0
    assert list(watch.get()) == of(0, base=ram.range.start)


@pytest.mark.kernel
def test_readers_are_independent(tracker: DirtyTracker) -> None:
    """A watch takes nothing from the range, from another cursor or from another watch, nor they from it."""
    memory = private(PAGES)
    write(memory, 50)
    ram = tracker.track(memory)
    write(memory, 1)
    first, second = WriteWatch(ram, base=GUEST), WriteWatch(ram, base=2 * GUEST)
    write(memory, 2)
    assert call(first, RESET) == of(2)
    assert pages_of(ram.collect()) == {1, 2}
    assert call(second, RESET) == of(2, base=2 * GUEST)
    write(memory, 3)
    ram.reset()
    second.reset()
    assert call(first) == of(3)


def test_wrong_arguments() -> None:
    """Each is refused with its value and the range, before anything changed."""
    memory = private(PAGES)
    with DirtyTracker() as tracker, tracker.track(memory) as ram:
        with pytest.raises(AlignmentError, match="base=0x1001"):
            WriteWatch(ram, base=0x1001)
        for base in (-STEP, (1 << 64) - PAGES * PAGE + STEP):
            with pytest.raises(InvalidArgumentError, match=f"base={base:#x}"):
                WriteWatch(ram, base=base)
        watch = WriteWatch(ram, base=GUEST)
        write(memory, 0)
        calls: list[Callable[..., object]] = [
            lambda *arguments: watch.get(*arguments, reset=True),
            watch.reset,
            watch.mark_written,
            watch.commit,
            watch.decommit,
        ]
        for one in calls:
            for base, size in ((GUEST - 1, 2), (GUEST, watch.size + 1), (GUEST, 0), (GUEST, -1), (-1, 5)):
                with pytest.raises(InvalidArgumentError, match=f"size={size} at {base:#x}.*{GUEST:#x}"):
                    one(base, size)
            no_address: Any = memory
            with pytest.raises(TypeError, match="mmap"):
                one(no_address, STEP)
        for count in (0, -1):
            with pytest.raises(InvalidArgumentError, match=f"count={count}"):
                watch.get(count=count, reset=True)
        with pytest.raises(KernelError, match="mprotect"):
            watch.commit(GUEST, STEP, 1 << 20)
        assert call(watch) == of(0)


# -- Nothing is lost -------------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_untracked_memory_is_an_error_of_the_host(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """Not of the guest; what was found before it stays written."""
    place = area(16)
    with flavour.tracker() as tracker:
        ram = tracker.track(place)
        watch = WriteWatch(ram, base=GUEST)
        libc.fill(place.start + 2 * PAGE)
        libc.fill(place.start + 12 * PAGE)
        libc.munmap(place.start + 8 * PAGE, 2 * PAGE)
        libc.mmap(2 * PAGE, address=place.start + 8 * PAGE)
        with pytest.raises(NotTrackedError) as caught:
            watch.get_write_watch(RESET, GUEST, watch.size, ARRAY, 100, SIZE)
        assert caught.value.range == AddressRange.from_length(place.start + 8 * PAGE, 2 * PAGE)
        assert caught.value.collected is None
        with pytest.raises(NotTrackedError):
            watch.decommit(GUEST + 8 * PAGE, PAGE)
        ram.rearm()
        libc.fill(place.start + 3 * PAGE)
        assert set(of(2, 3, 9, 12)) <= set(call(watch))
        assert call(watch, RESET, 2) == of(2, 3)[:2]
        assert set(of(9, 12)) <= set(call(watch, RESET))
        assert call(watch) == []
        libc.fill(place.start + 4 * PAGE)
        assert call(watch, RESET) == of(4)


@pytest.mark.kernel
@pytest.mark.parametrize("unit", [1, 4])
def test_answers_that_cannot_be_made_lose_nothing(
    tracker: DirtyTracker, monkeypatch: pytest.MonkeyPatch, unit: int
) -> None:
    """Time after time, also what earlier ones left behind."""
    memory = private(PAGES)
    watch = watched(tracker, memory)
    monkeypatch.setattr(WriteWatch, "_unit", unit * PAGE)
    written = of(*write(memory, 1, 2, 30))

    class Interrupt(BaseException):
        """Stands for KeyboardInterrupt."""

    def interrupted(*_: object, **__: object) -> None:
        raise Interrupt

    for page in (2, 40, 41):
        with monkeypatch.context() as patch:
            patch.setattr("pagemapcompat.writewatch.WrittenAddresses", interrupted)
            for count in (None, 1):
                with pytest.raises(Interrupt):
                    watch.get(count=count, reset=True)
        written = sorted({*written, *of(*write(memory, page))})
        assert call(watch) == written
    watch.reset(GUEST, 2 * PAGE)
    assert call(watch, RESET) == sorted(set(written) - set(of(0, 1)))
    assert call(watch) == []


def by_the_contract(watch: WriteWatch, count: int) -> WrittenAddresses:
    """As a guest asks."""
    return watch.get_write_watch(RESET, GUEST, watch.size, ARRAY, count, SIZE).addresses


def in_pythons_manner(watch: WriteWatch, count: int) -> WrittenAddresses:
    """As a program does."""
    return watch.get(count=count, reset=True)


ASKED = ((by_the_contract, WriteWatch.get_write_watch), (in_pythons_manner, WriteWatch.get))


@pytest.mark.parametrize(("ask", "method"), ASKED, ids=["contract", "python"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("unit", [1, 4])
def test_an_interrupt_anywhere_loses_nothing(
    flavour: Flavour,
    ask: Callable[[WriteWatch, int], WrittenAddresses],
    method: Callable[..., object],
    twice: bool,
    unit: int,
) -> None:
    """At each point of a call, the release of the lock among them: the next one has its pages, and no other.

    Even while somebody keeps the interrupt, and with its traceback all that the call had.
    """
    memory = private(PAGES)
    kept: list[BaseException] = []

    def check() -> None:
        with flavour.tracker() as tracker:
            watch = watched(tracker, memory)
            WriteWatch._unit = unit * PAGE  # type: ignore[method-assign,assignment]
            for count in (2, 64):
                lost, step, raised = [], 0, 1
                while raised:
                    step += 1
                    due = of(*write(memory, 2, 5, 9))
                    interrupter, got = Interrupter(method, step, twice), []
                    try:
                        with interrupter:
                            answer = ask(watch, count)
                            got = list(answer)
                    except KeyboardInterrupt as error:
                        kept.append(error)
                    raised = interrupter.raised
                    if (rest := list(watch.get(reset=True))) != due[len(got) :]:
                        lost.append((step, got, rest))
                assert step > 10
                assert lost == [], f"points 1 to {step - 1}"

    in_child(check)


@pytest.mark.parametrize("unit", [1, 4])
def test_an_answer_on_its_way_is_nobody_elses(flavour: Flavour, unit: int) -> None:
    """Between the release of the lock and the return another thread gets nothing of it, and loses nothing either."""
    memory = private(PAGES)

    def check() -> None:
        with flavour.tracker() as tracker:
            watch = watched(tracker, memory)
            WriteWatch._unit = unit * PAGE  # type: ignore[method-assign,assignment]
            others: list[list[int]] = []

            def other() -> None:
                write(memory, 5)
                others.append(list(watch.get(reset=True)))

            def released(_frame: FrameType, event: str, function: object) -> None:
                if event == "c_return" and getattr(function, "__self__", None) is watch._lock and not others:
                    others.append([])
                    crew = Crew()
                    crew.add(other)
                    crew.join()

            due = of(*write(memory, 2, 9))
            sys.setprofile(released)
            try:
                mine = watch.get(reset=True)
            finally:
                sys.setprofile(None)
            assert (list(mine), others, call(watch)) == (due, [[], of(5)], [])

    in_child(check)


def test_signals_lose_nothing(flavour: Flavour) -> None:
    """A storm of them, whose handler raises inside of get, beside writers and another caller: all counters are seen."""

    def check() -> None:
        sys.setswitchinterval(1e-5)
        memory = private(PAGES)
        last = [0] * PAGES
        lock = threading.Lock()
        with flavour.tracker() as tracker:
            watch = watched(tracker, memory)
            writers, others, stop = Crew(), Crew(), threading.Event()

            def merge(addresses: WrittenAddresses) -> None:
                with lock:
                    for address in addresses:
                        page = (address - GUEST) // PAGE
                        last[page] = memory[page * PAGE]

            def writer(first: int) -> None:
                for number in range(1, 120):
                    for page in range(first, PAGES, 2):
                        memory[page * PAGE] = number

            def caller() -> None:
                while not stop.is_set():
                    merge(watch.get(count=3, reset=True))

            for first in range(2):
                writers.add(writer, first)
            others.add(caller)
            with SignalStorm(WriteWatch.get) as storm:
                while writers.working or storm.interrupts < 20:
                    with suppress(Interrupted):
                        merge(watch.get(reset=True))
            stop.set()
            for crew in (writers, others):
                crew.join()
            merge(watch.get(reset=True))
            assert last == [119] * PAGES

    in_child(check)


@pytest.mark.kernel
def test_a_forked_child_has_no_watch(flavour: Flavour) -> None:
    """Every method says so, also when another thread of the parent was inside one; the parent's goes on."""

    def scenario() -> None:
        memory = private(PAGES)
        with flavour.tracker() as tracker:
            watch = watched(tracker, memory)
            write(memory, 1)
            inside, leave = threading.Event(), threading.Event()

            def hold() -> None:
                with watch._lock:
                    inside.set()
                    leave.wait()

            crew = Crew()
            crew.add(hold)
            inside.wait()
            in_child(refuses, watch)
            leave.set()
            crew.join()
            assert call(watch, RESET) == of(1)

    def refuses(watch: WriteWatch) -> None:
        for one in (watch.get, watch.reset):
            with pytest.raises(ClosedError, match="forked"):
                one()
        for two in (watch.mark_written, watch.commit, watch.decommit):
            with pytest.raises(ClosedError, match="forked"):
                two(GUEST, PAGE)
        watch.close()

    in_child(scenario)


@pytest.mark.kernel
def test_life(tracker: DirtyTracker) -> None:
    """It ends by itself, with its range or with its tracker; closed, every method says so."""
    memory = private(PAGES)
    ram: TrackedRange = tracker.track(memory)
    with WriteWatch(ram, base=GUEST) as watch:
        assert repr(watch).startswith(f"<WriteWatch of {PAGES * PAGE} bytes at {GUEST:#x}: <Cursor")
    watch.close()
    for call_ in (watch.get, watch.reset):
        with pytest.raises(ClosedError):
            call_()
    for change in (watch.mark_written, watch.commit, watch.decommit):
        with pytest.raises(ClosedError):
            change(GUEST, PAGE)
    assert pages_of(ram.collect()) == set()
    orphan = WriteWatch(ram)
    ram.close()
    with pytest.raises(ClosedError):
        orphan.get()


@pytest.mark.kernel
def test_threads_that_commit_and_take_back(flavour: Flavour) -> None:
    """Each in a part of its own, with a caller that resets nothing: every thread finds its own part exact."""

    def scenario() -> None:
        length = 16
        memory = private(3 * length)
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            watch = WriteWatch(ram, base=GUEST)
            stop = threading.Event()

            def owner(number: int) -> None:
                dice = random.Random(number)
                base = GUEST + number * length * PAGE
                for _ in range(3):
                    watch.decommit(base, length * PAGE)
                    watch.commit(base, length * PAGE)
                    pages = dice.sample(range(number * length, (number + 1) * length), 5)
                    assert all(memory[page * PAGE] == 0 for page in range(number * length, (number + 1) * length))
                    write(memory, *pages)
                    assert list(watch.get(base, length * PAGE)) == of(*pages)
                    assert list(watch.get(base, length * PAGE, count=3, reset=True)) == of(*pages)[:3]
                    assert list(watch.get(base, length * PAGE)) == of(*pages)[3:]

            def onlooker() -> None:
                while not stop.is_set():
                    watch.get()
                    ram.collect()

            owners, others = Crew(), Crew()
            others.add(onlooker)
            for number in range(3):
                owners.add(owner, number)
            try:
                owners.join()
            finally:
                stop.set()
            others.join()

    in_child(scenario)
