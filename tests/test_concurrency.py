"""Nothing is lost and nobody hangs while others write, remap, interrupt and close."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
from children import Crew, Mirror, hold_fault_thread_back, in_child, memory_of
from conftest import PAGE, PRIVATE, SANITIZED, Flavour, claims, flavours, libc, pages_of, private, rounds, write
from interrupter import Interrupted, Interrupter, SignalStorm

from pagemapcompat import ClosedError, Guarantee, NotTrackedError, TrackedRange, _kernel

PAGES = 256
ROUNDS = rounds(7)
"""How often each page is written. Few, so that a lost write is likely to be its page's last one, and stays visible."""


def released_writer(base: int, step: int) -> None:
    """Store growing numbers over runs of pages, with the GIL released."""
    for number in range(1, ROUNDS + 1):
        for page in range(0, PAGES, step):
            if page % 16 < 12:
                libc.fill(base + page * PAGE, min(step, 12 - page % 16) * PAGE // 2, number)


def holding_writer(memory: mmap.mmap) -> None:
    """Store growing numbers with the GIL held, from the end to the start."""
    for number in range(1, ROUNDS + 1):
        for page in range(PAGES - 1, -1, -1):
            if page % 16 < 12:
                memory[page * PAGE + PAGE - 1] = number


def storm(ram: TrackedRange, memory: mmap.mmap, working: Callable[[], bool], discards: bool, shared: bool) -> None:
    """Split and merge mappings and discard pages, as long as others work. Pages 12 to 15 of 16 are nobody else's."""
    base, at = ram.range.start, 0
    while working():
        at = (at + 16) % PAGES
        own = base + (at + 12) * PAGE
        libc.mprotect(own, 2 * PAGE, libc.PROT_READ)
        libc.mprotect(own + PAGE, PAGE, libc.PROT_NONE)
        libc.mprotect(own, 2 * PAGE, libc.PROT_READ | libc.PROT_WRITE)
        if not shared:
            libc.madvise(own + 2 * PAGE, 2 * PAGE, mmap.MADV_DONTNEED)
        if discards:
            libc.madvise(base + (at + 5) * PAGE, PAGE, mmap.MADV_DONTNEED)


def collect_whole(mirror: Mirror) -> None:
    """One call for all of it."""
    mirror.merge(mirror.ram.collect())


def collect_limited(mirror: Mirror) -> None:
    """A few pages a call, resumed."""
    at: int | None = 0
    while at is not None:
        result = mirror.ram.collect(at, max_pages=37)
        mirror.merge(result)
        at = result.resume_at


def collect_parts(mirror: Mirror) -> None:
    """Sub-ranges of odd sizes, with a peek into each before."""
    for first in range(0, PAGES, 123):
        last = min(first + 123, PAGES)
        mirror.merge(mirror.ram.peek(first * PAGE, last * PAGE))
        mirror.merge(mirror.ram.collect(first * PAGE, last * PAGE))


def collect_by_two(mirror: Mirror) -> None:
    """Two threads at once, one of them limited."""
    other = Crew()
    other.add(collect_limited, mirror)
    collect_whole(mirror)
    other.join()


WAYS = (collect_whole, collect_limited, collect_parts, collect_by_two)


@pytest.mark.parametrize("kind", ["private", "shared"])
@pytest.mark.parametrize(
    "way",
    # Inside emulated kernels one way has to do.
    [pytest.param(way, id=way.__name__, marks=pytest.mark.kernel if way is collect_limited else ()) for way in WAYS],
)
def test_a_mirror_of_collected_pages_equals_the_memory(
    flavour: Flavour, kind: str, way: Callable[[Mirror], None]
) -> None:
    """Whatever writers with and without the GIL, a storm of mprotect and discards and other collectors do meanwhile."""
    memory = memory_of(kind, PAGES)

    def check() -> None:
        sys.setswitchinterval(1e-5)
        with flavour.tracker() as tracker:
            for page in range(0, PAGES, 3):
                memory[page * PAGE] = 1
            ram = tracker.track(memory)
            mirror = Mirror(ram, memory)
            writers, others = Crew(), Crew()
            base = ram.range.start
            discards = Guarantee.DISCARDS in ram.guarantees
            writers.add(released_writer, base, 1)
            writers.add(released_writer, base, 16)
            writers.add(holding_writer, memory)
            others.add(storm, ram, memory, lambda: writers.working, discards, kind == "shared")
            while writers.working:
                way(mirror)
            writers.join()
            others.join()
            mirror.finish()
            assert max(memory[page * PAGE + PAGE - 1] for page in range(PAGES)) == ROUNDS

    in_child(check)


def test_nothing_is_lost_among_discards(flavour: Flavour) -> None:
    """Writers and a storm of MADV_DONTNEED over the same few pages, where DISCARDS is promised."""

    def check() -> None:
        sys.setswitchinterval(1e-5)
        for number in range(20):
            memory = private(32)
            with flavour.tracker() as tracker:
                if not claims(tracker, Guarantee.DISCARDS):
                    return
                ram = tracker.track(memory)
                mirror = Mirror(ram, memory)
                base = ram.range.start
                writers, others = Crew(), Crew()

                def fill(base: int = base) -> None:
                    for round_ in range(1, 60):
                        for page in range(32):
                            libc.fill(base + page * PAGE, 64, round_)

                def discard(base: int = base, writers: Crew = writers) -> None:
                    while writers.working:
                        for page in range(32):
                            libc.madvise(base + page * PAGE, PAGE, mmap.MADV_DONTNEED)

                writers.add(fill)
                writers.add(fill)
                others.add(discard)
                while writers.working:
                    mirror.merge(ram.collect(max_pages=5 if number % 2 else None))
                writers.join()
                others.join()
                mirror.finish()

    in_child(check)


@pytest.mark.kernel
def test_a_store_that_holds_the_gil_does_not_hang(flavour: Flavour) -> None:
    """Also while other threads are in collect, in track and in close of other ranges, and in reset and unprotect."""

    def check() -> None:
        sys.setswitchinterval(1e-5)
        memory, other = private(64), private(64)
        writers, others = Crew(), Crew()
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            stop = threading.Event()

            def collect() -> None:
                while not stop.is_set():
                    ram.collect()

            def protect() -> None:
                while not stop.is_set():
                    ram.reset(0, 32 * PAGE)
                    ram.unprotect(8 * PAGE, 16 * PAGE)

            def come_and_go() -> None:
                while not stop.is_set():
                    with type(tracker).__mro__[1].track(tracker, other) as short:  # type: ignore[attr-defined]
                        other[PAGE] = 1
                        short.collect()
                        other[PAGE] = 2

            for function in (collect, protect, come_and_go):
                others.add(function)
            for number in range(64 * rounds(15)):
                memory[number % 64 * PAGE] = number % 256
            stop.set()
            others.join()
        writers.join()

    in_child(check)


@pytest.mark.kernel
def test_closing_a_tracker_wakes_its_writers(flavour: Flavour) -> None:
    """Writers that fault while their tracker closes finish, time after time, whether they hold the GIL or not."""

    def check() -> None:
        sys.setswitchinterval(1e-5)
        memory = private(256)
        stop = threading.Event()

        def release() -> None:
            while not stop.is_set():
                libc.fill(address, 256 * PAGE)

        def hold() -> None:
            while not stop.is_set():
                for page in range(256):
                    memory[page * PAGE] = 1

        with flavour.tracker() as tracker:
            address = tracker.track(memory).range.start
        crew = Crew()
        for function in (release, release, hold):
            crew.add(function)
        for _ in range(rounds(15)):
            tracker = flavour.tracker()
            ram = tracker.track(memory)
            ram.collect()
            ram.collect()
            tracker.close()
        stop.set()
        crew.join()

    in_child(check)


def test_closing_a_range_leaves_the_others_exact(flavour: Flavour) -> None:
    """Their writers go on, and nothing of theirs is lost."""

    def check() -> None:
        sys.setswitchinterval(1e-5)
        kept = mmap.mmap(-1, PAGES * PAGE, flags=PRIVATE)
        with flavour.tracker() as tracker:
            ram = tracker.track(kept)
            mirror = Mirror(ram, kept)
            crew = Crew()
            crew.add(released_writer, ram.range.start, 4)
            crew.add(holding_writer, kept)
            while crew.working:
                short = private(32)
                other = tracker.track(short)
                write(short, 1, 2)
                mirror.merge(ram.collect())
                write(short, 3)
                other.close()
                write(short, 4)
                short.close()
            crew.join()
            mirror.finish()

    in_child(check)


def test_calls_during_close_get_closed_error(flavour: Flavour) -> None:
    """close() waits for the calls that run, and every later one of any thread says ClosedError, nothing else."""

    def check() -> None:
        for _ in range(10):
            tracker = flavour.tracker()
            memory, spare = private(512), private(8)
            ram = tracker.track(memory)
            ready = threading.Barrier(5)

            def until_closed(call: Callable[[], object], ready: threading.Barrier = ready) -> None:
                ready.wait()
                with pytest.raises(ClosedError):
                    while True:
                        call()

            def track(tracker=tracker, spare=spare) -> None:  # type: ignore[no-untyped-def]
                type(tracker).__mro__[1].track(tracker, spare).close()

            crew = Crew()
            for call in (ram.collect, ram.peek, tracker.statistics, track):
                crew.add(until_closed, call)
            ready.wait()
            write(memory, *range(512))
            tracker.close()
            crew.join()
            memory.close()
            spare.close()

    in_child(check)


def test_two_threads_close_at_once(flavour: Flavour) -> None:
    """Tracker and ranges, from several threads, while a writer faults."""

    def check() -> None:
        for _ in range(10):
            tracker = flavour.tracker()
            memories = [private(16) for _ in range(4)]
            rams = [tracker.track(memory) for memory in memories]
            crew = Crew()
            for memory in memories:
                crew.add(write, memory, *range(16))
            for ram in rams:
                crew.add(ram.close)
            crew.add(tracker.close)
            crew.add(tracker.close)
            crew.join()
            for memory in memories:
                memory.close()

    in_child(check)


@pytest.mark.kernel
@pytest.mark.parametrize("flavour", flavours("uffd-wp"), indirect=True)
def test_a_late_answer_opens_no_page(flavour: Flavour) -> None:
    """All writers of one page are woken by the answer to the first; the fault thread must not answer the rest late."""
    memory = private(8)

    def check() -> None:
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            hold_fault_thread_back()
            for _ in range(rounds(90)):
                crew = Crew()
                for _ in range(4):
                    crew.add(libc.fill, ram.range.start + 3 * PAGE)
                crew.join()
                assert pages_of(ram.collect()) == {3}
                wrote = write(memory, 6)  # waits until the fault thread is through with what came before
                assert pages_of(ram.collect()) == wrote

    in_child(check)


@pytest.mark.kernel
@pytest.mark.parametrize("flavour", flavours("uffd-wp"), indirect=True)
def test_unprotect_wakes_nobody_whose_answer_is_on_its_way(flavour: Flavour) -> None:
    """Else the writer would be through, its page collected, and then opened by that answer."""
    memory = private(8)

    def check() -> None:
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            hold_fault_thread_back()
            for _ in range(rounds(90)):
                crews = [Crew(), Crew()]
                for crew, page in zip(crews, (3, 4), strict=True):
                    crew.add(libc.fill, ram.range.start + page * PAGE)
                crews[0].join()  # as soon as the first of two messages is answered
                ram.unprotect(4 * PAGE, 5 * PAGE)
                crews[1].join()
                assert pages_of(ram.collect()) == {3, 4}
                wrote = write(memory, 6)
                assert pages_of(ram.collect()) == wrote

    in_child(check)


# ---- Memory that changes under a waiting writer ----------------------------------------------------------------


@pytest.mark.kernel
def test_memory_replaced_under_its_writer(flavour: Flavour, area) -> None:  # type: ignore[no-untyped-def]
    """A page that is mapped anew while its writer waits: the writer goes on in the new one; rearm watches it."""
    memory = area(64)

    def check() -> None:
        with flavour.tracker(on_untracked="rearm") as tracker:
            ram = tracker.track(memory)
            writers, stop = Crew(), threading.Event()

            def fill() -> None:
                while not stop.is_set():
                    libc.fill(memory.start, memory.length)

            writers.add(fill)
            writers.add(fill)
            for number in range(rounds(120)):
                libc.mmap(8 * PAGE, address=memory.start + number % 8 * 8 * PAGE)
                if number % 3 == 0:
                    ram.collect()
            stop.set()
            writers.join()
            ram.reset()
            libc.fill(memory.start + 9 * PAGE)
            assert pages_of(ram.collect()) == {9}

    in_child(check)


@pytest.mark.kernel
def test_memory_unmapped_or_barred_under_its_writer(flavour: Flavour, area) -> None:  # type: ignore[no-untyped-def]
    """The kernel's own stores, which fail with EFAULT instead of a signal, never wait for what is gone."""
    memory = area(64)

    def check() -> None:
        with flavour.tracker(on_untracked="rearm") as tracker:
            ram = tracker.track(memory)
            writers, stop = Crew(), threading.Event()
            zero = os.open("/dev/zero", os.O_RDONLY)
            view = memoryview((ctypes.c_char * memory.length).from_address(memory.start)).cast("B")

            def read() -> None:
                while not stop.is_set():
                    try:
                        os.readv(zero, [view])
                    except OSError as error:
                        assert error.errno == 14, error

            writers.add(read)
            writers.add(read)
            for number in range(rounds(120)):
                at = memory.start + number % 8 * 8 * PAGE
                if number % 2:
                    libc.munmap(at, 8 * PAGE)
                    ram.collect()
                    libc.mmap(8 * PAGE, address=at)
                else:
                    libc.mprotect(at, 8 * PAGE, libc.PROT_NONE)
                    ram.collect()
                    libc.mprotect(at, 8 * PAGE, libc.PROT_READ | libc.PROT_WRITE)
                ram.collect()
            stop.set()
            writers.join()
            ram.rearm()
            ram.reset()
            libc.fill(memory.start + 9 * PAGE)
            assert pages_of(ram.collect()) == {9}

    in_child(check)


def test_memory_that_comes_and_goes_is_armed_when_it_is_there(flavour: Flavour, area) -> None:  # type: ignore[no-untyped-def]
    """What is mapped when it is looked for and gone, or another, when it is to be registered is no error.

    Nothing around it is lost, and once it stays it is tracked.
    """
    room = area(16)
    hole = room.start + 8 * PAGE
    libc.munmap(hole, PAGE)

    def fill(*pages: int) -> None:
        for page in pages:
            libc.fill(room.start + page * PAGE)

    def check() -> None:
        sys.setswitchinterval(1e-5)
        with flavour.tracker(on_untracked="rearm") as tracker:
            ram = tracker.track(room)
            crew, done = Crew(), threading.Event()

            def come_and_go() -> None:
                while not done.is_set():
                    libc.mmap(PAGE, address=hole)
                    libc.mmap(PAGE, address=hole)
                    libc.munmap(hole, PAGE)

            crew.add(come_and_go)
            try:
                for _ in range(150):
                    fill(0, 12)
                    ram.rearm()
                    fill(1, 13)
                    assert {0, 1, 12, 13} <= pages_of(ram.collect())
                    ram.reset()
                    with ram.cursor() as other:
                        fill(2, 14)
                        assert {2, 14} <= pages_of(other.collect())
                    assert {2, 14} <= pages_of(ram.collect()) <= {2, 8, 14}
            finally:
                done.set()
            crew.join()
            libc.mmap(PAGE, address=hole)
            ram.collect()
            for page in range(16):
                fill(page)
                assert pages_of(ram.collect()) == {page}

    in_child(check)


# ---- Interrupts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 50])
def test_interrupts_lose_no_page(flavour: Flavour, limit: int | None) -> None:
    """A storm of signals whose handler raises inside of collect: what an interrupted one took comes with the next."""

    def check() -> None:
        sys.setswitchinterval(1e-5)
        memory = private(PAGES)
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            mirror = Mirror(ram, memory)
            writers = Crew()

            def work() -> None:
                for _ in range(3):
                    released_writer(ram.range.start, 2)

            writers.add(work)
            with SignalStorm(TrackedRange.collect) as storm:
                while writers.working or storm.interrupts < 20:
                    with suppress(Interrupted):
                        mirror.merge(ram.collect(max_pages=limit))
            writers.join()
            mirror.finish()

    in_child(check)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("untracked", [False, True], ids=["tracked", "untracked"])
def test_an_interrupt_anywhere_in_collect_loses_no_page(  # type: ignore[no-untyped-def]
    flavour: Flavour, area, twice: bool, untracked: bool
) -> None:
    """At each point of one collect in turn, whether it would succeed or raise: the pages come with the next one.

    Even while somebody keeps the interrupt, and with its traceback all that the call had, as interactive shells do.
    """
    memory = area(8)

    def collected(ram: TrackedRange) -> set[int]:
        try:
            return set(ram.collect().page_indices())
        except NotTrackedError as error:
            assert error.collected is not None
            return set(error.collected.page_indices())

    def check() -> None:
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            if untracked:
                libc.mmap(PAGE, address=memory.start + 7 * PAGE)
            lost, step, interrupted = [], 0, True
            kept: list[BaseException] = []
            while interrupted:
                step += 1
                for page in (2, 5):
                    libc.fill(memory.start + page * PAGE)
                interrupter, got, interrupted = Interrupter(TrackedRange.collect, step, twice), set(), False
                try:
                    with interrupter:
                        got = collected(ram)
                except KeyboardInterrupt as error:
                    kept.append(error)
                    interrupted = True
                interrupted = interrupted or interrupter.raised > 0
                if got | collected(ram) != {2, 5}:
                    lost.append(step)
        assert step > 5
        assert lost == [], f"lost when interrupted at points {lost} of {step - 1}"

    in_child(check)


def test_interrupts_of_untracked_collects_lose_no_page(flavour: Flavour, area) -> None:  # type: ignore[no-untyped-def]
    """What a NotTrackedError hands over arrives too, or comes again, when a signal cuts into its making."""
    memory = area(64)

    def check() -> None:
        sys.setswitchinterval(1e-5)
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            libc.mmap(PAGE, address=memory.start + 40 * PAGE)
            lost = []
            with SignalStorm(TrackedRange.collect) as storm:
                for number in range(300):
                    page = number % 40
                    storm.paused = True
                    libc.fill(memory.start + page * PAGE)
                    got: set[int] = set()
                    patience = storm.interrupts + 20  # or some calls would never get through
                    while True:
                        storm.paused = storm.interrupts >= patience
                        try:
                            ram.collect()
                        except Interrupted:
                            continue
                        except NotTrackedError as error:
                            assert error.collected is not None
                            got = set(error.collected.page_indices())
                            break
                    if got != {page}:
                        lost.append(number)
            assert lost == [], f"{len(lost)} of 300 lost or invented, with {storm.interrupts} interrupts"

    in_child(check)


# ---- Owed pages ------------------------------------------------------------------------------------------------


def give_back(ram: TrackedRange, *pages: int) -> None:
    """Have *pages* collected and give the answer back, as an interrupt between C and Python does."""
    result = ram.collect()
    assert pages_of(result) == set(pages)
    assert _kernel.owe(ram._attached.cursor.c, result._result) == 0


def test_owed_pages_come_once(flavour: Flavour) -> None:
    """In every peek, and in one collect; also together with what was written since."""
    memory = private(64)
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        give_back(ram, *write(memory, 3, 4, 20))
        assert tracker.statistics().owed_pages == 3
        assert pages_of(ram.peek()) == {3, 4, 20}
        assert pages_of(ram.peek()) == {3, 4, 20}
        write(memory, 4, 5)
        assert pages_of(ram.peek()) == {3, 4, 5, 20}
        assert pages_of(ram.collect()) == {3, 4, 5, 20}
        assert tracker.statistics().owed_pages == 0
        assert pages_of(ram.collect()) == set()
        wrote = write(memory, 3, 20)
        assert pages_of(ram.collect()) == wrote


def test_reset_forgets_owed_pages(tracker) -> None:  # type: ignore[no-untyped-def]
    """Of its own sub-range."""
    memory = private(64)
    ram = tracker.track(memory)
    give_back(ram, *write(memory, 3, 4, 20))
    ram.reset(4 * PAGE, 8 * PAGE)
    assert pages_of(ram.peek()) == {3, 20}
    ram.reset()
    assert tracker.statistics().owed_pages == 0
    assert pages_of(ram.collect()) == set()


def test_owed_pages_obey_limits_and_sub_ranges(tracker) -> None:  # type: ignore[no-untyped-def]
    """Those not handed out stay owed, and count against max_pages like others."""
    memory = private(64)
    ram = tracker.track(memory)
    give_back(ram, *write(memory, *range(10, 30)))
    wrote = write(memory, 8, 9, 30, 31)
    assert wrote
    assert pages_of(ram.collect(12 * PAGE, 15 * PAGE)) == {12, 13, 14}
    first = ram.collect(max_pages=3)
    assert (set(first.page_indices()), first.complete) == ({8, 9, 10}, False)
    assert first.resume_at is not None
    assert first.resume_at <= 11 * PAGE
    assert pages_of(ram.peek()) == {11, *range(15, 32)}
    got, at = set(), first.resume_at
    while at is not None:
        result = ram.collect(at, max_pages=4)
        assert result.pages <= 4
        assert not got & set(result.page_indices())
        got |= set(result.page_indices())
        at = result.resume_at
    assert got == {11, *range(15, 32)}
    assert pages_of(ram.collect()) == set()


def test_owed_pages_that_were_unmapped_are_skipped(tracker, area) -> None:  # type: ignore[no-untyped-def]
    """And are owed no more."""
    memory = area(64)
    ram = tracker.track(memory)
    for page in range(10, 20):
        libc.fill(memory.start + page * PAGE)
    give_back(ram, *range(10, 20))
    libc.munmap(memory.start + 12 * PAGE, 4 * PAGE)
    assert pages_of(ram.peek()) == {10, 11, 16, 17, 18, 19}
    assert pages_of(ram.collect()) == {10, 11, 16, 17, 18, 19}
    assert pages_of(ram.collect()) == set()
    assert tracker.statistics().owed_pages == 0


def test_owed_pages_are_watched_while_owed(tracker) -> None:  # type: ignore[no-untyped-def]
    """A write to an owed page, before or after it is handed out, is never swallowed by the debt."""
    memory = private(16)
    ram = tracker.track(memory)
    give_back(ram, *write(memory, 5))
    write(memory, 5)
    assert pages_of(ram.collect()) == {5}
    write(memory, 5)
    assert pages_of(ram.collect()) == {5}
    assert pages_of(ram.collect()) == set()


# ---- Memory that holds Python's own objects ---------------------------------------------------------------------


def test_memory_of_numpy_arrays(flavour: Flavour) -> None:
    """An array that lives in tracked memory is written by numpy, with and without the GIL; its pages are reported."""
    numpy = pytest.importorskip("numpy", reason="numpy is not installed; remedy: pip install numpy")

    def check() -> None:
        memory = private(512)
        array = numpy.frombuffer(memory, dtype=numpy.uint64)
        with flavour.tracker() as tracker:
            ram = tracker.track((array.__array_interface__["data"][0], array.nbytes))
            array[:: PAGE // 8] += 1
            assert pages_of(ram.collect()) == set(range(512))
            crew = Crew()
            mirror = Mirror(ram, memory)

            def add() -> None:
                for _ in range(20):
                    array[...] += 1

            crew.add(add)
            while crew.working:
                mirror.merge(ram.collect())
            crew.join()
            mirror.finish()

    in_child(check)


def test_the_c_heap_can_be_tracked(flavour: Flavour) -> None:
    """Results, buffers and Python's own objects lie in it: collecting while allocating neither hangs nor fails."""
    if SANITIZED:
        pytest.skip("AddressSanitizer allocates elsewhere, and there is no heap; remedy: run it without")
    with flavour.tracker() as tracker:
        if not claims(tracker, Guarantee.KERNEL_WRITES):
            pytest.skip(
                "uffd-syscall: EPERM, and user mode alone cannot take the kernel's stores into the heap; "
                "remedy: run as root, or vm.unprivileged_userfaultfd=1"
            )

    def check() -> None:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            line = next(line for line in maps if line.rstrip().endswith("[heap]"))
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        sys.setswitchinterval(1e-5)
        with flavour.tracker() as tracker:
            ram = tracker.track((start, end - start))
            crew, stop = Crew(), threading.Event()

            def allocate() -> None:
                while not stop.is_set():
                    _ = [bytearray(1000 + number) for number in range(100)]

            crew.add(allocate)
            pages = 0
            for number in range(60):
                result = ram.collect(max_pages=None if number % 2 else 7)
                pages += result.pages
                ram.peek()
                if number % 10 == 0:
                    ram.reset()
            stop.set()
            crew.join()
            assert pages

    in_child(check)
