"""Random programs of several cursors, snapshots and restores beside writer threads, against a model in plain Python.

Some pages are written by the program alone: what is said of them, and what they hold, is known exactly. The rest are
written by threads, all the time or until the program stops them: of these every reader must in the end have an exact
copy, made of what it collected.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from children import Crew, Mirror, in_child, memory_of
from conftest import PAGE, Flavour, rounds
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from programs import Counts

from pagemapcompat import ConcurrentWriteError, Cursor, DirtyTracker, Snapshot

OWN = 40
"""Pages that the program writes alone; as many, one by one between them, are the threads'."""
ACTIONS = (
    *("write", "write", "write", "collect", "collect", "peek", "part", "reset", "unprotect", "cursor", "leave"),
    *("snapshot", "snapshot", "restore", "restore", "restore", "drop", "squash", "diff", "threads"),
)
STEP = st.tuples(st.sampled_from(ACTIONS), st.integers(0, 1 << 16), st.integers(0, 1 << 16))


class Writers:
    """Threads that write to every second page, and can be stopped for a while."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._crew = Crew()
        self._run = threading.Event()
        self.running = False

    def _work(self, seed: int) -> None:
        dice = random.Random(seed)
        while self._run.is_set():
            at = (2 * dice.randrange(OWN) + 1) * PAGE + dice.randrange(PAGE)
            self._memory[at] = dice.randrange(256)

    def start(self) -> None:
        """Let them write."""
        self._run.set()
        for seed in range(2):
            self._crew.add(self._work, seed)
        self.running = True

    def stop(self) -> None:
        """Wait until none of them does."""
        self._run.clear()
        self._crew.join()
        self.running = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop them for a while, if they run."""
        was = self.running
        self.stop()
        yield
        if was:
            self.start()


class Reader:
    """A cursor, what it is due by the model, and a copy of the memory made of what it collects."""

    def __init__(self, cursor: Cursor, memory: Any) -> None:
        self.cursor = cursor
        self.due: set[int] = set()
        self.mirror = Mirror(cursor, memory)


class Program:
    """Memory with all that is open on it, and the model: `own` is what the program's pages hold."""

    def __init__(self, tracker: DirtyTracker, kind: str) -> None:
        self.memory = memory_of(kind, 2 * OWN)
        self.writers = Writers(memoryview(self.memory))
        self.ram = tracker.track(self.memory)
        self.readers = [Reader(self.ram, self.memory)]
        self.own = {page: bytes(PAGE) for page in range(0, 2 * OWN, 2)}
        self.snapshots: list[tuple[Snapshot, dict[int, bytes]]] = []
        self.known: dict[int, bytes] | None = None  # what the memory was last equal to
        self.since: set[int] = set()  # the program's pages written since
        self.counts = Counts()

    def page(self, number: int) -> int:
        """One of the program's own."""
        return number % OWN * 2

    def wrote(self, pages: set[int]) -> None:
        """Somebody stored to these pages of the program."""
        for reader in self.readers:
            reader.due |= pages
        self.since |= pages

    def result(self, pages: set[int], expected: set[int]) -> None:
        """An answer has exactly these of the program's pages."""
        assert {page for page in pages if page % 2 == 0} == expected

    def step(self, action: str, a: int, b: int) -> None:
        """One step of the program."""
        self.counts.operations += 1
        getattr(self, f"do_{action}")(a, b)

    def do_write(self, a: int, b: int) -> None:
        """The program stores a byte into some pages."""
        pages = {self.page(a * step) for step in range(1, 2 + b % 4)}
        for page in pages:
            content = bytearray(self.own[page])
            content[b % PAGE] = (content[b % PAGE] + 1 + a % 255) % 256
            self.memory[page * PAGE + b % PAGE] = content[b % PAGE]
            self.own[page] = bytes(content)
        self.counts.written += len(pages)
        self.wrote(pages)

    def _reader(self, number: int) -> Reader:
        return self.readers[number % len(self.readers)]

    def do_peek(self, a: int, _b: int) -> None:
        """A reader looks."""
        reader = self._reader(a)
        self.result(set(reader.cursor.peek().page_indices()), reader.due)

    def do_collect(self, a: int, _b: int) -> None:
        """A reader takes everything."""
        reader = self._reader(a)
        result = reader.cursor.collect()
        self.counts.reported += result.pages
        reader.mirror.merge(result)
        self.result(set(result.page_indices()), reader.due)
        reader.due = set()

    def do_part(self, a: int, b: int) -> None:
        """A reader takes a few pages of a part."""
        reader, first = self._reader(a), b % (2 * OWN)
        result = reader.cursor.collect(first * PAGE, None, max_pages=1 + a % 7)
        self.counts.reported += result.pages
        reader.mirror.merge(result)
        end = (result.walk_end - self.ram.range.start) // PAGE
        done = {page for page in reader.due if first <= page < end}
        self.result(set(result.page_indices()), done)
        reader.due -= done

    def do_reset(self, a: int, b: int) -> None:
        """A reader forgets a part."""
        reader, first = self._reader(a), b % (2 * OWN)
        # What is forgotten, the copy must have by other means; the threads' pages too, which change meanwhile.
        with self.writers.paused():
            reader.cursor.reset(first * PAGE)
            reader.mirror.copy[first * PAGE :] = self.memory[first * PAGE :]
        reader.due = {page for page in reader.due if page < first}

    def do_unprotect(self, a: int, b: int) -> None:
        """Some pages are declared written."""
        first = a % (2 * OWN)
        last = min(first + 1 + b % 5, 2 * OWN)
        self.ram.unprotect(first * PAGE, last * PAGE)
        self.wrote({page for page in range(first, last) if page % 2 == 0})

    def do_cursor(self, _a: int, _b: int) -> None:
        """One reader more."""
        if len(self.readers) < 5:
            with self.writers.paused():
                self.readers.append(Reader(self.ram.cursor(), self.memory))

    def do_leave(self, a: int, _b: int) -> None:
        """One less."""
        if len(self.readers) > 1:
            self.readers.pop(1 + a % (len(self.readers) - 1)).cursor.close()

    def do_snapshot(self, _a: int, _b: int) -> None:
        """Of the threads' pages too, as they happen to be."""
        snapshot = self.ram.snapshot()
        self.known, self.since = dict(self.own), set()
        self.snapshots.append((snapshot, self.known))
        for page, content in self.own.items():
            assert snapshot.read(page * PAGE, (page + 1) * PAGE) == content

    def do_restore(self, a: int, b: int) -> None:
        """Of any snapshot; beside writers it may raise, and what differs is then the threads' alone."""
        if not self.snapshots:
            return
        snapshot, content = self.snapshots[a % len(self.snapshots)]
        if self.known is None:
            expected = {page for page in self.own if self.own[page] != content[page]}
        else:
            expected = self.since | {page for page in self.own if self.known[page] != content[page]}
        # From here on the memory is changing: whatever comes, the pages that could differ are written.
        self.own = dict(content)
        try:
            result = self.ram.restore(snapshot, verify=bool(b % 2) and not self.writers.running)
        except ConcurrentWriteError as error:
            assert self.writers.running
            assert error.differing is not None
            self.result(set(error.differing.page_indices()), set())
            self.wrote(expected)
        else:
            self.result(set(result.page_indices()), expected)
            self.wrote(expected)
            self.known, self.since = content, set()
            if not self.writers.running:
                assert self.memory[:] == snapshot.read()
        self.check()

    def do_drop(self, a: int, _b: int) -> None:
        """Forget a snapshot."""
        if self.snapshots:
            self.snapshots.pop(a % len(self.snapshots))[0].drop()

    def do_squash(self, a: int, _b: int) -> None:
        """Forget all before one."""
        if self.snapshots:
            self.snapshots[a % len(self.snapshots)][0].squash()
            self.snapshots = [pair for pair in self.snapshots if not pair[0].is_dropped]

    def do_diff(self, a: int, b: int) -> None:
        """Compare any two."""
        if self.snapshots:
            one, had = self.snapshots[a % len(self.snapshots)]
            other, has = self.snapshots[b % len(self.snapshots)]
            self.result(set(one.diff(other).page_indices()), {page for page in had if had[page] != has[page]})

    def do_threads(self, _a: int, _b: int) -> None:
        """Start or stop the writers."""
        if self.writers.running:
            self.writers.stop()
        else:
            self.writers.start()

    def check(self) -> None:
        """The program's pages hold what they should."""
        for page, content in self.own.items():
            assert self.memory[page * PAGE : (page + 1) * PAGE] == content, page

    def finish(self) -> None:
        """With no writer left every reader's copy is the memory."""
        self.writers.stop()
        self.check()
        for reader in self.readers:
            self.do_peek(self.readers.index(reader), 0)
            reader.mirror.finish()


def play(flavour: Flavour, kind: str, steps: Iterable[tuple[str, int, int]]) -> Counts:
    """Run one program."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0003)  # the writers hold the GIL nearly all the time
    with flavour.tracker() as tracker:
        program = Program(tracker, kind)
        try:
            for action, a, b in steps:
                program.step(action, a, b)
            program.finish()
            return program.counts
        finally:
            program.writers.stop()
            for reader in program.readers[1:]:
                reader.cursor.close()
            sys.setswitchinterval(interval)


def explore(flavour: Flavour, kind: str, examples: int, steps: int) -> None:
    """Random programs of so many steps or twice as many, always the same ones."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )
    @given(st.lists(STEP, min_size=steps, max_size=2 * steps))
    def run(steps: list[tuple[str, int, int]]) -> None:
        play(flavour, kind, steps)

    run()


@pytest.mark.parametrize("kind", [pytest.param("private", marks=pytest.mark.kernel), "shared"])
def test_a_few_programs(flavour: Flavour, kind: str) -> None:
    """On every kernel. By seeds, for the first programs that Hypothesis makes are the simplest."""
    memory_of(kind, 1)  # skips where it is refused

    def check() -> None:
        done = []
        for seed in range(rounds(6)):
            dice = random.Random(seed)
            steps = [(dice.choice(ACTIONS), dice.randrange(1 << 16), dice.randrange(1 << 16)) for _ in range(40)]
            try:
                done.append(play(flavour, kind, steps))
            except Exception as error:
                error.add_note(f"seed {seed}")
                raise
        assert sum(counts.written for counts in done) > len(done)
        assert sum(counts.reported for counts in done) > len(done)

    in_child(check)


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_many_programs(flavour: Flavour, kind: str) -> None:
    """More than there is time for in a guest."""
    memory_of(kind, 1)
    in_child(explore, flavour, kind, 30, 40)  # a restore needs two snapshots, and writes around them
