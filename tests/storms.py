"""Storms: writers of every kind against collectors at full speed, each write numbered and each number accounted for.

A writer counts, page by page. Before it stores a number it says so in `begun`, afterwards in `done`, neither of which
is tracked. A reader takes what `done` says, collects, notes for each page that was reported what had `begun` when the
collect returned, and copies it. Whatever was done before a collect must then be noted: no later copy makes up for a
report that never came.

    python tests/storms.py             prints figures for each mix of writers, on each backend
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import numpy as np
from children import Crew, plain
from conftest import FLAVOURS, PAGE, Flavour, environment

from pagemapcompat import Cursor, Feature, Guarantee, ScanResult, Snapshot, TrackedRange, probe

WORD = 8
KINDS = ("store", "add", "read", "preadv", "recv", "uring", "remote", "signal", "refill")
"""Of writers in C, in the order of their enum in writers.c. The last one discards a page before it stores."""
WRITERS = (*KINDS, "held")
"""And one in Python, which holds the GIL while it stores."""
BY_KERNEL = ("read", "preadv", "recv", "uring", "remote")
"""Those whose stores are the kernel's own."""
TROUBLES = ("split", "bar", "discard", "fork")
"""What goes on beside, in C: mappings are split, pages barred by mprotect, pages discarded, children forked."""
MEMORIES = ("private", "shared", "huge")
GROUP = 8
"""Of so many pages the last may be barred, and the fourth discarded, at any time."""
BARRED, DISCARDED = GROUP - 1, 3


class Finding(AssertionError):
    """Something that was promised did not hold."""


@attrs.frozen(kw_only=True)
class Mix:
    """What a storm is made of."""

    memory: str = "private"
    pages: int = 64
    writers: tuple[str, ...] = ("store",)
    readers: int = 1
    """Cursors, each with a thread of its own."""
    hands: int = 1
    """Threads that collect for one cursor at once."""
    handshake: bool = False
    """A page is written anew once every reader has accounted for its last number: each is reported by itself."""
    troubles: tuple[str, ...] = ()
    snapshots: bool = False
    """Between phases the writers pause, and memory is restored, or readers come and go."""
    interrupts: bool = False
    """The first reader collects in the main thread, into which SIGINT raises KeyboardInterrupt at any moment."""


@attrs.frozen(kw_only=True)
class Counts:
    """What happened in a storm."""

    writes: int
    accounted: int
    """Of them, by every reader."""
    by_writer: tuple[int, ...]
    collects: int
    pages: int
    """Reported, to all readers."""
    faults: int
    """Resolved by the fault thread."""
    interrupts: int
    gaps: tuple[int, ...]
    """By writer: the consecutive collects of one reader between which it wrote. The least of all readers."""
    seconds: float

    def __str__(self) -> str:
        """For people."""
        return (
            f"{self.writes} writes, {self.accounted} accounted for, {self.collects} collects of {self.pages} pages, "
            f"{self.faults} faults, {self.interrupts} interrupts"
        )


@functools.cache
def library() -> Any:
    """writers.c, compiled; None without a compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        built = f"{folder}/writers.so"
        source = Path(__file__).with_name("writers.c")
        command = [
            compiler,
            "-std=gnu11",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
            "-o",
            built,
            source,
        ]
        subprocess.run(command, check=True, timeout=120)
        return ctypes.CDLL(built)


def numbers(*shape: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Zeros that forked processes share."""
    count = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, count * WORD), np.uint64).reshape(shape)


class Order(ctypes.Structure):
    """What a writer in C is to do: `struct writer`."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *(
                "kind",
                "memory",
                "page_size",
                "pages",
                "slot",
                "group",
                "barred",
                "discarded",
                "target",
                "seed",
                "readers",
                "stride",
            ),
            *("begun", "done", "checked", "count", "stop"),
        )
    )


def make_memory(kind: str, pages: int) -> mmap.mmap:
    """To be tracked."""
    memory = mmap.mmap(
        -1, pages * PAGE, flags=mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED, mmap.MAP_PRIVATE)[kind != "shared"]
    )
    if kind == "huge":
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Reader:
    """A cursor, what it has accounted for, and a copy of the memory made of what it collected."""

    def __init__(self, storm: Storm, cursor: Cursor, row: int) -> None:
        self.storm = storm
        self.cursor = cursor
        self.row = row
        self.checked = storm.checked[row]
        self.lock = threading.Lock()
        self.rounds = self.collects = self.pages = 0
        self.gaps = np.zeros(len(storm.mix.writers), int)
        self.result: ScanResult | None = None
        self.begin()

    def begin(self) -> None:
        """Know all that is there now, while nobody writes."""
        self.copy = self.storm.words.copy()
        self.accounted = self.storm.done.copy()
        self.checked[:] = self.storm.done

    def note(self, result: ScanResult, begun: Any) -> None:
        """Account for the pages of a result, which returned when these numbers had begun."""
        with self.lock:
            self.collects += 1
            for lo, hi in result.spans():
                at = slice(lo // PAGE, hi // PAGE)
                self.accounted[:, at] = np.maximum(self.accounted[:, at], begun[:, at])
                self.copy[at] = self.storm.words[at]
                self.pages += at.stop - at.start

    def take(self, *where: int, **options: int) -> int | None:
        """One collect. Returns where to go on."""
        result = self.cursor.collect(*where, **options)
        self.note(result, self.storm.begun.copy())
        return result.resume_at

    def whole(self) -> None:
        """All in one call."""
        at: int | None = 0
        while at is not None:
            at = self.take(at)

    def limited(self) -> None:
        """A few pages a call."""
        at: int | None = 0
        while at is not None:
            at = self.take(at, max_pages=len(self.storm.words) // 5 + 1)

    def parts(self) -> None:
        """Parts of odd sizes, from the last to the first."""
        length = len(self.storm.words) * PAGE
        step = (len(self.storm.words) // 4 | 1) * PAGE
        for first in reversed(range(0, length, step)):
            self.take(first, min(first + step, length))

    def round(self) -> None:
        """Collect everything, by as many threads as there are hands, and check it."""
        due = self.storm.done.copy()
        ways = (self.whole, self.limited, self.parts)
        crew = Crew()
        for number in range(1, self.storm.mix.hands):
            crew.add(ways[(self.rounds + number) % 3])
        ways[self.rounds % 3]()
        crew.join()
        self.check(due)

    def attempt(self) -> None:
        """The same in one call, to be tried again after an interrupt, which may come anywhere in here."""
        if self.result is None:
            self.due = self.storm.done.copy()
            self.result = self.cursor.collect()
        begun = self.storm.begun.copy()
        for lo, hi in self.result.spans():
            at = slice(lo // PAGE, hi // PAGE)
            self.accounted[:, at] = np.maximum(self.accounted[:, at], begun[:, at])
            self.copy[at] = self.storm.words[at]
        self.check(self.due)
        self.collects += 1
        self.pages += self.result.pages
        self.result = None

    def round_among_interrupts(self) -> None:
        """What a call did not return comes with a later one."""
        self.storm.patience = 4  # else on a busy machine each attempt is interrupted, for ever
        while True:
            try:
                self.attempt()
            except KeyboardInterrupt:
                self.storm.interrupts += 1
            else:
                return

    def check(self, due: Any) -> None:
        """What was done before a collect is accounted for, and where nothing has begun since, the copy has it."""
        lost = np.argwhere(self.accounted < due)
        if len(lost):
            self.storm.fail(
                f"{len(lost)} numbers were written and not reported to reader {self.row}: "
                + ", ".join(
                    f"{due[w, p]} of {self.storm.mix.writers[w]} in page {p} (reported until {self.accounted[w, p]})"
                    for w, p in lost[:5]
                )
            )
        held = self.copy[:, self.storm.slots].T
        wrong = np.argwhere((self.storm.begun == due) & (held != due) & self.storm.steady)
        if len(wrong):
            self.storm.fail(
                f"{len(wrong)} numbers were reported to reader {self.row} and not there: "
                + ", ".join(
                    f"{held[w, p]} instead of {due[w, p]} of {self.storm.mix.writers[w]} in page {p}"
                    for w, p in wrong[:5]
                )
            )
        self.gaps += (due > self.checked).any(axis=1)
        self.checked[:] = due
        self.rounds += 1

    def finish(self) -> None:
        """Collect once more, with no writer left, and compare."""
        self.round()
        self.compare()

    def catch_up(self) -> None:
        """Collect what was written back, and compare."""
        for lo, hi in self.cursor.collect().spans():
            at = slice(lo // PAGE, hi // PAGE)
            self.copy[at] = self.storm.words[at]
        self.compare()

    def compare(self) -> None:
        """The copy is the memory."""
        differ = np.argwhere((self.copy != self.storm.words).any(axis=1) & self.storm.steady).ravel()
        if len(differ):
            self.storm.fail(f"pages {differ.tolist()} differ from the copy of reader {self.row}")


class Storm:
    """Memory, its writers and its readers."""

    def __init__(self, flavour: Flavour, mix: Mix, seed: int) -> None:
        self.flavour, self.mix, self.seed = flavour, mix, seed
        self.dice = random.Random(seed)
        writers, pages = len(mix.writers), mix.pages
        self.begun, self.done = numbers(writers, pages), numbers(writers, pages)
        self.checked = numbers(mix.readers, writers, pages)
        self.counts, self.stopped, self.interrupting = numbers(writers), numbers(1), numbers(1)
        self.memory = make_memory(mix.memory, pages)
        self.words = np.frombuffer(self.memory, np.uint64).reshape(pages, PAGE // WORD)
        self.base = self.words.ctypes.data
        # Spread over the page, from its first word to its last.
        self.slots = [number * (PAGE // WORD - 1) // max(1, writers - 1) for number in range(writers)]
        discards = "discard" in mix.troubles or "refill" in mix.writers
        self.steady = np.array([not (discards and page % GROUP == DISCARDED) for page in range(pages)])
        self.writes = self.accounted = self.interrupts = self.patience = 0
        self._progress, self.past = numbers(1), 0
        self.failed = False
        self.readers: list[Reader] = []
        self.snapshots: list[Snapshot] = []
        self.gaps: list[Any] = []

    def fail(self, what: str) -> None:
        """Say what was found, and how to see it again."""
        self.failed = True
        raise Finding(f"seed {self.seed}, {self.flavour.name}, {self.mix}: {what}")

    # -- Writers ------------------------------------------------------------------------------------------------

    def order(self, number: int) -> Order:
        """For a writer in C."""
        return Order(
            kind=KINDS.index(self.mix.writers[number]),
            memory=self.base,
            page_size=PAGE,
            pages=self.mix.pages,
            slot=self.slots[number] * WORD,
            group=GROUP,
            barred=BARRED,
            discarded=DISCARDED,
            target=self.pid,
            seed=self.dice.randrange(1, 1 << 60),
            readers=self.mix.readers if self.mix.handshake else 0,
            stride=self.begun.size,
            begun=self.begun[number].ctypes.data,
            done=self.done[number].ctypes.data,
            checked=self.checked[0, number].ctypes.data,
            count=self.counts[number:].ctypes.data,
            stop=self.stopped.ctypes.data,
        )

    def write(self, number: int, order: Order) -> None:
        """In C, without the GIL."""
        rc = library().storm_write(ctypes.byref(order))
        if rc:
            self.fail(f"{self.mix.writers[number]} failed with {os.strerror(-rc)}")

    def hold(self, number: int, seed: int) -> None:
        """In Python, with the GIL."""
        dice = random.Random(seed)
        flat = memoryview(self.memory).cast("Q")
        begun, done = (memoryview(array[number]) for array in (self.begun, self.done))
        checked = [memoryview(rows[number]) for rows in self.checked] if self.mix.handshake else []
        page = 0
        while not self.stopped[0]:
            page = (page + 1 if dice.randrange(4) else dice.randrange(self.mix.pages)) % self.mix.pages
            if page % GROUP == BARRED or any(row[page] < done[page] for row in checked):
                continue
            begun[page] += 1
            flat[page * (PAGE // WORD) + self.slots[number]] = begun[page]
            done[page] += 1
            self.counts[number] += 1

    # -- Processes beside this one ------------------------------------------------------------------------------

    def fork(self, work: Callable[[int, int], object]) -> tuple[int, int]:
        """A process that works until what it reads ends. Returns where to tell it something, and where it answers."""
        orders, tell = os.pipe()
        answers, answer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                plain.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                for fd in (tell, answers, *(fd for pair in self.pipes for fd in pair)):
                    with suppress(OSError):
                        os.close(fd)
                work(orders, answer)
            finally:
                os._exit(0)
        os.close(orders)
        os.close(answer)
        self.pids.append(pid)
        self.pipes.append((tell, answers))
        return tell, answers

    def write_from_outside(self, order: Order) -> Callable[[int, int], object]:
        """A writer in another process: it begins when told to, and answers when it has ended."""

        def work(orders: int, answer: int) -> None:
            while os.read(orders, 1):
                os.write(answer, bytes([-library().storm_write(ctypes.byref(order))]))

        return work

    def interrupt(self, seed: int) -> Callable[[int, int], object]:
        """Sends SIGINT to this process at random moments."""

        def work(orders: int, _answer: int) -> None:
            dice = random.Random(seed)
            while not select.select([orders], [], [], dice.random() / 500)[0]:
                if self.interrupting[0]:
                    os.kill(self.pid, signal.SIGINT)

        return work

    @contextmanager
    def helpers(self) -> Iterator[None]:
        """Forked before anything is tracked; they live as long as the storm."""
        self.pid = os.getpid()
        self.pids: list[int] = []
        self.pipes: list[tuple[int, int]] = []
        self.outside: dict[int, tuple[int, int]] = {}
        try:
            for number, kind in enumerate(self.mix.writers):
                if kind == "remote":
                    plain.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER, which Yama asks for
                    self.outside[number] = self.fork(self.write_from_outside(self.order(number)))
            if self.mix.interrupts:
                self.fork(self.interrupt(self.dice.random()))
            yield
        finally:
            for fd in (fd for pair in self.pipes for fd in pair):
                os.close(fd)
            for pid in self.pids:
                os.waitpid(pid, 0)

    def tell(self, number: int) -> None:
        """Have a writer of another process write, until it is stopped."""
        tell, answers = self.outside[number]
        os.write(tell, b"w")
        rc = os.read(answers, 1)
        if rc != b"\0":
            self.fail(f"{self.mix.writers[number]} failed with {os.strerror(rc[0]) if rc else 'its process'}")

    def trouble(self, name: str) -> None:
        """Make it until everybody is stopped."""
        kind = TROUBLES.index(name)
        group, which = ((1, 0), (GROUP, BARRED), (GROUP, DISCARDED), (1, 0))[kind]
        where = (ctypes.c_uint64(number) for number in (self.base, PAGE, self.mix.pages, group, which))
        rc = library().storm_trouble(kind, *where, ctypes.c_void_p(self.stopped.ctypes.data))
        if rc:
            self.fail(f"{name} failed with {os.strerror(-rc)}")

    # -- Phases -------------------------------------------------------------------------------------------------

    def guarded(self, function: Callable[..., object], *arguments: Any) -> None:
        """Whatever fails ends the storm."""
        try:
            function(*arguments)
        except BaseException:
            self.failed = True
            raise

    def progress(self) -> int:
        """How far it got, for another process too. While one starves this stops, whatever the others do."""
        return int(self._progress[0])

    def over(self) -> bool:
        """Whether every writer and every reader got as far as this phase goes. If one starves it lasts for ever."""
        few = self.goal // 10 + 1
        got = [
            *((reader.rounds, self.goal) for reader in self.readers),
            *((gap, few) for reader in self.readers for gap in reader.gaps),
            *((count, self.goal) for count in self.counts - self.before),
            *([(self.interrupts, few)] if self.mix.interrupts else ()),
        ]
        self._progress[0] = self.past + sum(min(int(number), goal) for number, goal in got)
        return self.failed or all(number >= goal for number, goal in got)

    def read(self, reader: Reader) -> None:
        """Collect in a tight loop."""
        round_ = reader.round_among_interrupts if self.mix.interrupts and reader is self.readers[0] else reader.round
        while not self.over():
            round_()

    def on_interrupt(self, _number: int, frame: FrameType | None) -> None:
        """What Python's own handler does, inside of `Reader.attempt` and nowhere else."""
        while frame is not None:
            if frame.f_code is Reader.attempt.__code__ and self.patience:
                self.patience -= 1
                raise KeyboardInterrupt
            frame = frame.f_back

    def phase(self, goal: int) -> None:
        """Everybody at once, until all got so far; then nobody, and every copy is right."""
        self.goal, self.before, started = goal, self.counts.copy(), self.done.copy()
        self.past = self.progress()
        for reader in self.readers:
            reader.rounds, reader.gaps = 0, reader.gaps * 0
        self.stopped[0] = 0
        writers, others = Crew(), Crew()
        try:
            for number, kind in enumerate(self.mix.writers):
                if kind == "remote":
                    writers.add(self.guarded, self.tell, number)
                elif kind == "held":
                    writers.add(self.guarded, self.hold, number, self.dice.random())
                else:
                    writers.add(self.guarded, self.write, number, self.order(number))
            for name in self.mix.troubles:
                others.add(self.guarded, self.trouble, name)
            for reader in self.readers[1:]:
                others.add(self.guarded, self.read, reader)
            self.interrupting[0] = self.mix.interrupts
            self.guarded(self.read, self.readers[0])
        finally:
            self.interrupting[0] = 0
            self.stopped[0] = 1
            writers.join()
            others.join()
        for reader in self.readers:
            reader.finish()
        reported = np.minimum.reduce([self.done, *(reader.accounted for reader in self.readers)])
        self.writes += int((self.counts - self.before).sum())
        self.accounted += int((reported - started).sum())
        self.gaps.append(np.minimum.reduce([reader.gaps for reader in self.readers]))

    def between(self, ram: TrackedRange) -> None:
        """While the writers pause: snapshots, restores, readers that come and go."""
        deed = self.dice.choice(("snapshot", "restore", "restore", "reader", "unprotect"))
        if deed == "snapshot" or (deed == "restore" and not self.snapshots):
            self.snapshots.append(ram.snapshot())
            if self.snapshots[-1].read() != self.memory[:]:
                self.fail("a snapshot is not what the memory is")
        elif deed == "restore":
            snapshot = self.dice.choice(self.snapshots)
            ram.restore(snapshot, verify=self.dice.random() < 0.5)
            if snapshot.read() != self.memory[:]:
                self.fail("after a restore the memory is not what the snapshot is")
            for reader in self.readers:
                reader.catch_up()
            self.done[:] = self.begun[:] = self.words[:, self.slots].T
            for reader in self.readers:
                reader.begin()
        elif deed == "reader" and len(self.readers) > 1:
            self.readers[-1].cursor.close()
            self.readers[-1].cursor = ram.cursor()
        elif deed == "unprotect":
            first = self.dice.randrange(self.mix.pages)
            ram.unprotect(first * PAGE, self.dice.randrange(first, self.mix.pages + 1) * PAGE)

    def run(self, rounds: int, phases: int = 1) -> Counts:
        """So many rounds of every reader, in so many phases."""
        interval, handler = sys.getswitchinterval(), None
        begun = time.monotonic()
        try:
            sys.setswitchinterval(1e-5)
            if self.mix.interrupts:
                handler = signal.signal(signal.SIGINT, self.on_interrupt)
            with environment(self.flavour), self.helpers(), self.flavour.tracker() as tracker:
                ram = tracker.track(self.memory)
                cursors = [ram, *(ram.cursor() for _ in range(1, self.mix.readers))]
                self.readers = [Reader(self, cursor, row) for row, cursor in enumerate(cursors)]
                for number in range(phases):
                    if number and self.mix.snapshots:
                        self.between(ram)
                    self.phase(-(-rounds // phases))
                statistics = tracker.statistics()
                for cursor in cursors[1:]:
                    cursor.close()
        except Finding:
            raise
        except Exception as error:
            raise Finding(f"seed {self.seed}, {self.flavour.name}, {self.mix}: {error!r}") from error
        finally:
            sys.setswitchinterval(interval)
            if handler is not None:
                signal.signal(signal.SIGINT, handler)
        return Counts(
            writes=self.writes,
            accounted=self.accounted,
            by_writer=tuple(self.counts.tolist()),
            collects=sum(reader.collects for reader in self.readers),
            pages=sum(reader.pages for reader in self.readers),
            faults=statistics.faults,
            interrupts=self.interrupts,
            gaps=tuple(np.minimum.reduce(self.gaps).tolist()),
            seconds=time.monotonic() - begun,
        )


# ---- What to run ---------------------------------------------------------------------------------------------


def lacking_for(flavour: Flavour, mix: Mix) -> dict[str, str]:
    """What of a mix cannot be had here, and its remedy."""
    found = {}
    with environment(flavour), flavour.tracker() as tracker:
        guarantees = tracker.selection.guarantees
        shared = probe().supports(Feature.UFFD_WP_HUGETLBFS_SHMEM)
    for name in (*mix.writers, *mix.troubles):
        if name != "held" and library() is None:
            found[name] = "no C compiler: apt-get install gcc"
        elif name in BY_KERNEL and Guarantee.KERNEL_WRITES not in guarantees:
            found[name] = "no KERNEL_WRITES: run as root, or vm.unprivileged_userfaultfd=1"
        elif name == "uring" and (number := -library().storm_uring()):
            found[name] = f"{os.strerror(number)}: sysctl kernel.io_uring_disabled=0; a seccomp profile"
        elif name in ("discard", "refill") and Guarantee.DISCARDS not in guarantees:
            found[name] = "no DISCARDS: a newer kernel"
    if mix.memory == "shared" and not shared:
        found["shared"] = "no shared memory: a newer kernel"
    return found


def reduced(flavour: Flavour, mix: Mix) -> Mix:
    """A mix without what cannot be had here."""
    lacks = lacking_for(flavour, mix)
    return attrs.evolve(
        mix,
        writers=tuple(name for name in mix.writers if name not in lacks) or ("held",),
        troubles=tuple(name for name in mix.troubles if name not in lacks),
        memory="private" if mix.memory in lacks else mix.memory,
    )


def draw(seed: int) -> Mix:
    """A random mix."""
    dice = random.Random(seed)
    memory = dice.choice(("private", "private", "shared", "huge"))
    return Mix(
        memory=memory,
        pages=1024 if memory == "huge" else dice.choice((GROUP, 64, 256, 500)),
        writers=tuple(dice.sample(WRITERS, dice.randrange(1, 6))),
        readers=dice.randrange(1, 4),
        hands=dice.choice((1, 1, 2, 3)),
        handshake=dice.random() < 0.4,
        troubles=tuple(dice.sample(TROUBLES, dice.choice((0, 0, 1, 2)))),
        snapshots=dice.random() < 0.5,
        interrupts=dice.random() < 0.3,
    )


def flavour_of(name: Flavour | str) -> Flavour:
    """By its name."""
    return next(one for one in FLAVOURS if one.name == name) if isinstance(name, str) else name


def drawn(flavour: Flavour, seed: int) -> Storm:
    """The random storm that *seed* stands for."""
    return Storm(flavour, reduced(flavour, draw(seed)), seed)


def storm(flavour: Flavour | str, seed: int, rounds: int = 60) -> Counts:
    """One random storm, in this process and its main thread; it can hang, so give that a time limit.

    Raises:
        Finding: Something was lost or failed; the message has the seed.
    """
    return drawn(flavour_of(flavour), seed).run(rounds, phases=4)


MIXES = {
    **{name: Mix(writers=(name,)) for name in WRITERS},
    "store, 256 pages": Mix(writers=("store",), pages=256),
    "store, one at a time": Mix(writers=("store",), handshake=True),
    "four in C": Mix(writers=("store", "add", "store", "add"), pages=256),
    "all": Mix(writers=WRITERS, pages=256),
    "all, one at a time": Mix(writers=WRITERS, pages=256, handshake=True),
    "all, three readers": Mix(writers=WRITERS, pages=256, readers=3),
    "all, three hands": Mix(writers=WRITERS, pages=256, hands=3),
    "all, troubles": Mix(writers=WRITERS, pages=256, troubles=TROUBLES),
}


def figures(rounds: int = 300, names: tuple[str, ...] = ("pagemap-scan", "uffd-wp")) -> Iterator[str]:
    """Writes and collects a second, of each mix on each backend: lines of a table."""
    yield f"{'backend':13} {'mix':21} {'writes/s':>9} {'collects/s':>10} {'faults/s':>9}   writes/s by writer"
    for name in names:
        flavour = flavour_of(name)
        for title, mix in MIXES.items():
            counts = Storm(flavour, reduced(flavour, mix), 1).run(rounds)
            each = (f"{count / counts.seconds:.0f}" for count in counts.by_writer)
            rates = (round(count / counts.seconds) for count in (counts.writes, counts.collects, counts.faults))
            yield "{:13} {:21} {:9} {:10} {:9}   {}".format(name, title, *rates, " ".join(each))


if __name__ == "__main__":
    for line in figures():
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
