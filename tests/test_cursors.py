"""Several readers of one memory: each sees every write once, whatever the others do."""

from __future__ import annotations

import contextlib
import gc
import mmap
import random
import sys
import threading
from collections.abc import Callable
from types import FrameType

import pytest
from children import Crew, Mirror, in_child, memory_of, resources
from conftest import PAGE, Flavour, libc, pages_of, part, private, rounds, run_child, write

from pagemapcompat import (
    ClosedError,
    Cursor,
    DirtyTracker,
    NotTrackedError,
    ScanResult,
    TrackedRange,
    _kernel,
    backends,
    page_size,
)

pytestmark = pytest.mark.kernel

PAGES = 96


def three(ram: TrackedRange) -> tuple[Cursor, Cursor, Cursor]:
    """The first reader, and two more."""
    return ram, ram.cursor(), ram.cursor()


def test_each_reader_sees_every_write_once(tracker: DirtyTracker) -> None:
    """In whatever order they ask."""
    memory = private(PAGES)
    readers = three(tracker.track(memory))
    due: list[set[int]] = [set(), set(), set()]
    dice = random.Random(5)
    for _ in range(60):
        written = write(memory, *dice.sample(range(PAGES), dice.randrange(6)))
        due = [pages | written for pages in due]
        for number in dice.sample(range(3), dice.randrange(3)):
            assert pages_of(readers[number].peek()) == due[number]
            assert pages_of(readers[number].collect()) == due[number]
            due[number] = set()
    for reader, pages in zip(readers, due, strict=True):
        assert pages_of(reader.collect()) == pages
        assert pages_of(reader.collect()) == set()


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_a_new_reader_starts_clean_and_takes_nothing(tracker: DirtyTracker, kind: str) -> None:
    """What was written before it was made is the others' alone."""
    memory = memory_of(kind, PAGES)
    ram = tracker.track(memory)
    earlier = write(memory, 1, 2, 3, 40)
    cursor = ram.cursor()
    assert pages_of(cursor.collect()) == set()
    later = write(memory, 3, 50)
    assert pages_of(cursor.collect()) == later
    assert pages_of(ram.collect()) == earlier | later


def test_a_reset_is_its_readers_own(tracker: DirtyTracker) -> None:
    """The others keep what they were to get, a sub-range of it too."""
    memory = private(PAGES)
    first, second, third = three(tracker.track(memory))
    written = write(memory, 0, 10, 20, 95)
    second.reset()
    assert pages_of(second.collect()) == set()
    assert pages_of(third.peek()) == written
    first.reset(5 * PAGE, 15 * PAGE)
    assert pages_of(first.collect()) == written - {10}
    assert pages_of(third.collect()) == written


def test_declared_writes_reach_every_reader(tracker: DirtyTracker) -> None:
    """unprotect concerns the memory, not a reader."""
    memory = private(PAGES)
    ram, second, third = three(tracker.track(memory))
    ram.unprotect(4 * PAGE, 6 * PAGE)
    assert pages_of(second.collect()) == {4, 5}
    write(memory, 5)
    assert pages_of(third.collect()) == {4, 5}
    assert pages_of(second.collect()) == {5}
    assert pages_of(ram.collect()) == {4, 5}
    assert pages_of(ram.collect()) == set()


def test_pages_owed_and_pages_written_come_together(tracker: DirtyTracker) -> None:
    """A page that another reader took and that was written again is one page, and new for both."""
    memory = private(PAGES)
    ram, second, _ = three(tracker.track(memory))
    write(memory, 7, 8)
    ram.collect()
    write(memory, 8, 9)
    assert pages_of(second.collect()) == {7, 8, 9}
    assert pages_of(ram.collect()) == {8, 9}


def test_max_pages_and_parts(tracker: DirtyTracker) -> None:
    """What is left behind stays, for the reader that left it."""
    memory = private(PAGES)
    ram, second, _ = three(tracker.track(memory))
    written = write(memory, 1, 3, 5, 60, 61)
    ram.collect()  # owed to the second from here on
    written |= write(memory, 62)
    got: set[int] = set()
    at: int | None = 0
    while at is not None:
        result = second.collect(at, max_pages=2)
        assert result.pages <= 2
        got |= set(result.page_indices())
        at = result.resume_at
    assert got == written
    write(memory, 2, 80)
    assert pages_of(second.collect(0, 10 * PAGE)) == {2}
    assert pages_of(second.collect()) == {80}
    assert pages_of(ram.collect()) == {2, 62, 80}


def test_a_limit_is_not_reached_by_what_was_unmapped(tracker: DirtyTracker, area) -> None:
    """Pages that are owed and gone are no reason to come again."""
    ram = tracker.track(area(PAGES))
    second = ram.cursor()
    for page in (1, 5, 6, 9):
        libc.fill(ram.range.start + page * PAGE)
    ram.collect()
    for page in (5, 9):
        libc.munmap(ram.range.start + page * PAGE, PAGE)
    for ask in (second.peek, second.collect):
        assert ask(max_pages=1).resume_at == 6 * PAGE
    for ask in (second.peek, second.collect):
        assert pages_of(ask(max_pages=1)) == {6}
    assert pages_of(second.collect(max_pages=1)) == set()


def test_a_limit_is_not_reached_by_what_was_unprotected_and_unmapped(tracker: DirtyTracker, area) -> None:
    """It counts as written only while it is there."""
    ram = tracker.track(area(PAGES))
    libc.fill(ram.range.start, PAGES * PAGE)
    ram.reset()
    ram.unprotect(5 * PAGE, 6 * PAGE)
    libc.munmap(ram.range.start + 5 * PAGE, PAGE)
    libc.fill(ram.range.start)
    for ask in (ram.peek, ram.collect):
        assert pages_of(ask(max_pages=1)) == {0}


def test_untracked_memory(flavour: Flavour, area) -> None:
    """The error takes nothing from the other readers, nor does their policy."""
    with flavour.tracker() as strict:
        place = area(16)
        ram = strict.track(place)
        other = ram.cursor()
        libc.fill(place.start + 2 * PAGE)
        libc.fill(place.start + 12 * PAGE)
        hole = part(ram, 8, 2)
        libc.munmap(hole.start, hole.length)
        libc.mmap(hole.length, address=hole.start)
        with pytest.raises(NotTrackedError) as caught:
            other.collect()
        assert caught.value.range == hole
        assert caught.value.collected is not None
        taken = set(caught.value.collected.page_indices())
        assert 2 in taken
        with pytest.raises(NotTrackedError):
            ram.cursor()
        ram.rearm()
        rest = pages_of(other.collect())
        assert {8, 9, 12} <= rest
        assert not rest & taken
        assert pages_of(ram.collect()) >= {2, 8, 9, 12}
        other.close()
    with flavour.tracker(on_untracked="rearm") as lenient:
        place = area(16)
        ram = lenient.track(place)
        other = ram.cursor()
        libc.munmap(place.start, 4 * PAGE)
        libc.mmap(4 * PAGE, address=place.start)
        other.reset()
        assert pages_of(other.collect()) == set()
        assert pages_of(ram.collect()) == {0, 1, 2, 3}


def test_life(tracker: DirtyTracker) -> None:
    """A reader can end before, with and after its range; the others go on."""
    memory = private(PAGES)
    ram = tracker.track(memory)
    with ram.cursor() as cursor:
        assert repr(cursor) == f"<Cursor {ram.range}, {tracker.selection.chosen}>"
        assert len(cursor) == len(memory)
        assert (cursor.range, cursor.guarantees, cursor.granularity) == (ram.range, ram.guarantees, page_size())
    cursor.close()
    with pytest.raises(ClosedError):
        cursor.collect()
    written = write(memory, 3)
    assert pages_of(ram.collect()) == written
    orphan = ram.cursor()
    ram.close()
    with pytest.raises(ClosedError):
        orphan.peek()
    with pytest.raises(ClosedError):
        ram.cursor()
    orphan.close()


def test_an_answer_outlives_its_reader(tracker: DirtyTracker) -> None:
    """A result is a value, and closing a reader during its life harms nobody."""
    memory = private(PAGES)
    ram = tracker.track(memory)
    cursor = ram.cursor()
    written = write(memory, 5, 6)
    result = cursor.collect()
    cursor.close()
    del cursor
    assert pages_of(result) == written
    assert pages_of(ram.collect()) == written


@pytest.mark.anywhere
def test_readers_come_and_go_without_a_trace(flavour: Flavour) -> None:
    """Also those that are dropped instead of closed."""

    def scenario() -> None:
        with flavour.tracker() as tracker:
            memory = private(PAGES)
            ram = tracker.track(memory)
            ram.cursor()
            before = resources()
            for _ in range(20):
                kept = [ram.cursor() for _ in range(3)]
                write(memory, 1)
                kept.pop().close()
                kept.pop().collect()
            del kept
            after = resources()
            assert after == before

    in_child(scenario)


def test_a_reader_that_stops_reading_costs_one_bit_a_page(tracker: DirtyTracker) -> None:
    """However much is written meanwhile."""
    memory = private(PAGES)
    ram = tracker.track(memory)
    idle = ram.cursor()
    for _ in range(10):
        write(memory, *range(0, PAGES, 3))
        ram.collect()
        assert tracker.statistics().owed_pages == PAGES // 3
    assert pages_of(idle.collect()) == set(range(0, PAGES, 3))
    assert tracker.statistics().owed_pages == 0


def test_an_answer_that_nobody_has_is_filled_again(tracker: DirtyTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks again and again makes no new memory, also if the last answer, or a view of it, is kept till then."""
    made = 0
    new_request = _kernel.new_request

    def counted(cursor: _kernel.CursorHandle) -> _kernel.Result:
        nonlocal made
        made += 1
        return new_request(cursor)

    memory = private(8)
    ram = tracker.track(memory)
    monkeypatch.setattr(_kernel, "new_request", counted)
    for _ in range(20):
        write(memory, 1, 3)
        answer = ram.collect()
        assert answer.as_u64()[0] == ram.range.start + PAGE
        ram.reset()
    assert made <= 3
    del answer
    for _ in range(20):
        write(memory, 2, 5)
        view = ram.collect().as_u64()
        assert view[0] == ram.range.start + 2 * PAGE
    assert made <= 5


def test_a_view_outlives_any_number_of_answers(tracker: DirtyTracker) -> None:
    """Of an answer that nobody else has, while others are made that nobody keeps."""
    memory = private(8)
    ram = tracker.track(memory)
    write(memory, 1)
    view = ram.collect().as_u64()
    content = view.tolist()
    for page in range(2, 8):
        write(memory, page)
        assert pages_of(ram.peek()) == pages_of(ram.collect()) == {page}
        assert view.tolist() == content


@pytest.mark.parametrize("name", ["peek", "collect"])
def test_a_large_answer_is_not_kept(tracker: DirtyTracker, name: str) -> None:
    """Its memory is free again once its owner has let it go; that of a small one serves the next call."""
    most = _kernel.KEEP_ASYNC if tracker.statistics().backend == "pagemap-scan" else _kernel.KEEP
    memory = private(2 * most + 2)
    ram = tracker.track(memory)
    for runs in (most + 1, most, 1):
        ram.reset()
        write(memory, *range(0, 2 * runs, 2))
        answer = getattr(ram, name)()
        assert len(answer) == runs
        assert (ram._attached.answers.last is answer) == (runs <= most)


def test_a_debugger_makes_nothing_be_filled_too_early(tracker: DirtyTracker) -> None:
    """One that looks at local variables holds what is in them (before Python 3.13): also while it is found out how."""
    memory = private(8)
    ram = tracker.track(memory)
    copies = []
    sys.setprofile(lambda frame, *_: copies.append(dict(frame.f_locals)))
    try:
        backends._calibrate()
    finally:
        sys.setprofile(None)
    copies.clear()
    try:
        for page in range(4):
            wrote = write(memory, page)
            kept, _ = ram.collect(), [ram.collect() for _ in range(3)]
            assert pages_of(kept) == wrote
    finally:
        backends._calibrate()


def test_others_ask_while_it_is_found_out_who_has_an_answer(tracker: DirtyTracker) -> None:
    """As a profiler that asks too makes them, or that has another thread run: nobody's answer is filled again."""
    memory = private(8)
    ram = tracker.track(memory)

    def asks(_frame: object, event: str, called: object) -> None:
        if event == "c_call" and called is sys.getrefcount:
            sys.setprofile(None)
            for page in (6, 7):
                write(memory, page)
                ram.collect()

    for _ in range(6):
        kept = []
        for page in range(3):
            wrote = write(memory, page)
            sys.setprofile(asks if page == 2 else None)
            answer = ram.collect()
            sys.setprofile(None)
            kept.append((answer, wrote))
        for answer, wrote in kept[:2]:
            assert pages_of(answer) == wrote
        assert pages_of(kept[2][0]) <= {2, 6, 7}


def test_an_interrupt_while_it_is_found_out_who_has_a_view(tracker: DirtyTracker) -> None:
    """Leaves the view to whoever has it."""

    class Interrupt(BaseException):
        """Stands for KeyboardInterrupt."""

    def strikes(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_name == "_references":
            sys.setprofile(None)
            raise Interrupt

    memory = private(8)
    ram = tracker.track(memory)
    write(memory, 0)
    view = ram.collect().as_u64()
    content = view.tolist()
    ram.collect()
    sys.setprofile(strikes)
    try:
        with pytest.raises(Interrupt):
            ram.collect()
    finally:
        sys.setprofile(None)
    for page in range(1, 6):
        write(memory, page)
        ram.collect()
        assert view.tolist() == content


@pytest.mark.parametrize("older", [False, True], ids=["younger", "older"])
@pytest.mark.parametrize("name", ["peek", "collect", "reset", "snapshot", "granularity", "held", "read", "drop"])
def test_a_finalizer_in_the_same_reference_cycle(flavour: Flavour, name: str, older: bool) -> None:
    """The collector ends what is in one in any order: who asks is refused, or answered for good; nothing crashes."""

    class Node:
        """Asks at its end."""

        def __init__(self) -> None:
            self.objects: tuple[object, ...] = ()
            self.itself = self

        def __del__(self) -> None:
            for one in self.objects:
                with contextlib.suppress(ClosedError):
                    call = getattr(one, name, None)
                    answer = call() if callable(call) else call
                    view = answer.as_u64() if isinstance(answer, ScanResult) else memoryview(b"")
                    outcomes.append((answer, view, view.tolist()))
                    continue
                outcomes.append((None, memoryview(b""), []))

    outcomes: list[tuple[object, memoryview, list[int]]] = []

    def check() -> None:
        for _ in range(20):
            with flavour.tracker() as tracker:
                memory = private(16)
                nodes = [Node(), Node()] if older else []
                ram = tracker.track(memory)
                cursor, snapshot = ram.cursor(), ram.snapshot()
                for _ in range(2):
                    write(memory, 1)
                    cursor.collect()
                    ram.collect()
                    cursor.reset()
                write(memory, 2, 3, 9)
                nodes = nodes or [Node(), Node()]
                nodes[0].objects, nodes[1].objects = (cursor, ram, snapshot), (ram, cursor)
                del nodes, ram, cursor, snapshot
                gc.collect()
                again = private(16)
                other = tracker.track(again)
                for page in range(8):  # what was freed is filled
                    write(again, page)
                    other.collect()
        assert len(outcomes) == 20 * 5
        for answer, view, content in outcomes:
            assert view.tolist() == content
            if isinstance(answer, ScanResult):
                assert answer.as_u64().tolist() == content
        if older and name == "collect":
            assert any(content for _, _, content in outcomes), "it was never answered"

    in_child(check)


@pytest.mark.anywhere
@pytest.mark.parametrize("number", range(5))
def test_a_profiler_that_keeps_a_frame_makes_nothing_be_filled_too_early(number: int) -> None:
    """One, of those that this package makes while it is imported, and with it what is counted then."""
    printed = run_child(
        """
        import mmap, sys
        frames = []

        def hook(frame, event, _argument):
            if event == "call" and frame.f_code.co_qualname == "ScanResult.__init__":
                frames.append(frame if len(frames) == int(sys.argv[1]) else None)

        sys.setprofile(hook)
        from pagemapcompat import DirtyTracker
        sys.setprofile(None)
        assert len(frames) > int(sys.argv[1]), len(frames)
        memory = mmap.mmap(-1, 8 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with DirtyTracker() as tracker:
            ram = tracker.track(memory)
            for page in range(1, 8):
                memory[page * mmap.PAGESIZE] = 1
                view = ram.collect().as_u64()
                content, answers = view.tolist(), []
                for _ in range(4):
                    memory[0] = 1
                    answers += [ram.peek(), ram.collect()]
                assert view.tolist() == content
        print("done")
        """,
        str(number),
    )
    assert printed.strip() == "done"


def test_what_an_interrupt_took_goes_back_to_its_reader_alone(
    tracker: DirtyTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as C has returned: the taker still gets its pages, and the others theirs once."""
    memory = private(PAGES)
    ram = tracker.track(memory)
    cursor = ram.cursor()
    written = write(memory, 11, 12)

    class Interrupt(BaseException):
        """Stands for KeyboardInterrupt."""

    def interrupted(result: _kernel.Result, collect_all: Callable[..., int] = _kernel.collect_all) -> int:
        assert not collect_all(result)
        assert result.pages == 2
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(_kernel, "collect_all", interrupted)
        with pytest.raises(Interrupt):
            cursor.collect()
    assert pages_of(ram.collect()) == written
    assert pages_of(ram.collect()) == set()
    assert pages_of(cursor.collect()) == written
    assert pages_of(cursor.collect()) == set()


def test_a_collect_that_fails_in_a_signal_handler_loses_nothing_of_the_one_it_interrupts(
    tracker: DirtyTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the handler's had taken is in the error, which ends both; what the other had taken comes again."""
    memory = private(16)
    ram = tracker.track(memory)

    def interrupted(cursor: object, start: int, end: int, most: int, flags: int, result: _kernel.Result) -> int:
        assert not scan(cursor, start, end, most, flags, result)
        assert result.pages == 1
        write(memory, 5)
        ram.collect()
        raise AssertionError

    scan = _kernel.scan
    libc.mmap(PAGE, address=ram.range.start + 10 * PAGE)
    write(memory, 1)
    with monkeypatch.context() as patch:
        patch.setattr(_kernel, "scan", interrupted)
        with pytest.raises(NotTrackedError) as caught:
            ram.collect(0, 4 * PAGE)
    assert caught.value.collected is not None
    assert set(caught.value.collected.page_indices()) == {5}
    ram.rearm()
    assert pages_of(ram.collect()) == {1, 10}


def test_readers_go_while_pages_are_noted(flavour: Flavour, area) -> None:
    """For those that are there, in memory that is theirs until nobody notes anything in it."""
    memory = area(1 << 14, libc.PROT_NONE)

    def close(readers: list[Cursor]) -> None:
        for reader in readers:
            reader.close()

    def scenario() -> None:
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            for _ in range(rounds(6)):
                crew, readers = Crew(), [ram.cursor() for _ in range(200)]
                for half in (readers[::2], readers[1::2]):
                    crew.add(close, half)
                while crew.working:
                    ram.unprotect()
                    assert ram.collect().pages == 1 << 14
                crew.join()

    in_child(scenario)


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_nothing_is_lost_with_readers_and_writers_in_threads(flavour: Flavour, kind: str) -> None:
    """Each reader keeps a mirror of the memory by what it collects; in the end all of them are right."""

    def writer(memory: mmap.mmap, seed: int, stop: threading.Event) -> None:
        dice = random.Random(seed)
        while not stop.is_set():
            at = dice.randrange(len(memory))
            memory[at] = dice.randrange(256)

    def reader(mirror: Mirror, rounds: int) -> None:
        for number in range(rounds):
            if number % 7 == 3:
                mirror.merge(mirror.ram.collect(0, PAGES // 2 * PAGE, max_pages=5))
            else:
                mirror.merge(mirror.ram.collect())

    def scenario() -> None:
        sys.setswitchinterval(0.0003)  # else a reader waits for the GIL most of the time
        with flavour.tracker() as tracker:
            memory = memory_of(kind, PAGES)
            ram = tracker.track(memory)
            mirrors = [Mirror(one, memory) for one in three(ram)]
            writers, readers, stop = Crew(), Crew(), threading.Event()
            for seed in range(2):
                writers.add(writer, memory, seed, stop)
            for number, mirror in enumerate(mirrors):
                readers.add(reader, mirror, 10 + 15 * number)
            readers.join()
            stop.set()
            writers.join()
            for mirror in mirrors:
                mirror.finish()

    memory_of(kind, 1)  # skips where shared memory is refused
    in_child(scenario)
