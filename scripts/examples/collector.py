"""A garbage collector that marks while the program runs, as .NET's does on Windows with GetWriteWatch.

It marks what can be reached from the roots. Meanwhile the program moves references, perhaps from where the collector
has not looked yet to where it will not look again; such an object would pass for garbage. So it asks which pages were
written since it began, and looks once more at what is marked on them, until few are written meanwhile. Only for those
must the program stop. --without-write-watch leaves that out, and shows what is lost.
"""

from __future__ import annotations

import argparse
import mmap
import random
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from time import perf_counter
from typing import TYPE_CHECKING, Self

from pagemapcompat import DirtyTracker, KernelError
from pagemapcompat.writewatch import WRITE_WATCH_GRANULARITY, WriteWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

WORDS = 8
"""An object is so many words of 8 bytes. A reference is the number of its first word; 0 refers to none."""
IN_USE, NEXT, VALUE = range(3)
"""The words that mean something: whether there is an object, the next of its chain, another that it refers to."""
PAGE = WRITE_WATCH_GRANULARITY // 8
"""In words."""
CHAINS, LINKS, BUSY = 512, 32, 64
"""How many chains, how long each is in the beginning, and on how many of them the program works at a time."""
FEW, MOST_ROUNDS = 8, 6
"""Stop the program when so few pages were written, or after so many rounds."""
TURN = 250
"""How many objects the collector visits between two operations of the program, unless that runs freely."""


class Heap:
    """Objects in an mmap. The roots are the first of them, the heads of the chains."""

    def __init__(self, mebibytes: int) -> None:
        self.memory = mmap.mmap(-1, mebibytes << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.words = memoryview(self.memory).cast("Q")
        self._free = deque(range(WORDS, len(self.words), WORDS))
        self.roots = [self.allocate(0, 0) for _ in range(CHAINS)]
        for root in self.roots:
            for _ in range(LINKS):
                self.words[root + NEXT] = self.allocate(self.words[root + NEXT], self.allocate(0, 0))

    def allocate(self, following: int, value: int) -> int:
        """A new object."""
        new = self._free.popleft()
        self.words[new + IN_USE], self.words[new + NEXT], self.words[new + VALUE] = 1, following, value
        return new

    def is_full(self) -> bool:
        """Whether nothing can be allocated before garbage is found."""
        return not self._free

    def unmarked(self) -> bytearray:
        """A byte for each object that can be."""
        return bytearray(len(self.words) // WORDS)

    def sweep(self, marked: bytearray) -> int:
        """Free all objects that are not marked. How many."""
        words = self.words
        dead = [at for at in range(WORDS, len(words), WORDS) if words[at + IN_USE] and not marked[at // WORDS]]
        for at in dead:
            words[at + IN_USE] = 0
        self._free.extend(dead)
        return len(dead)


class Program:
    """The mutator: a thread that works on the chains while this is entered, and stands still while it is not."""

    def __init__(self, heap: Heap, *, freely: bool) -> None:
        self.operations = 0
        self._heap = heap
        self._dice = random.Random(1)  # noqa: S311 - the same operations every time
        self._freely = freely
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._stop = Event()
        self._busy: list[int] = []
        self._work: Future[None]

    def __enter__(self) -> Self:
        """Let it run."""
        self._busy = self._dice.sample(self._heap.roots, BUSY)
        self._stop.clear()
        self._work = self._thread.submit(self._run)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop it between two operations."""
        self._stop.set()
        self._work.result()

    def _run(self) -> None:
        while self._freely and not self._stop.is_set():
            self.operate()

    def turn(self) -> None:
        """Wait for an operation, so that every run is the same. Nothing to wait for where it runs freely."""
        if not self._freely:
            self._thread.submit(self.operate).result()

    def operate(self) -> None:
        """Change a chain or two. What can no longer be reached is garbage from now on."""
        words, here, there = self._heap.words, self._somewhere(), self._somewhere()
        following = words[here + NEXT]
        match self._dice.randrange(4):
            case 0 if not self._heap.is_full():  # a new object
                words[here + NEXT] = self._heap.allocate(following, words[there + VALUE])
            case 1 if following:  # one gone
                words[here + NEXT] = words[following + NEXT]
            case 2 if following not in {0, there}:  # one moved
                words[here + NEXT] = words[following + NEXT]
                words[following + NEXT] = words[there + NEXT]
                words[there + NEXT] = following
            case _:
                words[here + VALUE], words[there + VALUE] = words[there + VALUE], words[here + VALUE]
        self.operations += 1

    def _somewhere(self) -> int:
        at = self._dice.choice(self._busy)
        for _ in range(self._dice.randrange(LINKS)):
            at = self._heap.words[at + NEXT] or at
        return at


def mark(heap: Heap, marked: bytearray, objects: Iterable[int], turn: Callable[[], None] = lambda: None) -> None:
    """Mark everything that *objects* refer to, and so on."""
    words = heap.words
    visits = list(objects)
    visited = 0
    while visits:
        at = visits.pop()
        for reference in (words[at + NEXT], words[at + VALUE]):
            if reference and not marked[reference // WORDS]:
                marked[reference // WORDS] = 1
                visits.append(reference)
        visited += 1
        if visited % TURN == 0:
            turn()


def mark_roots(heap: Heap) -> bytearray:
    """The marks to begin with."""
    marked = heap.unmarked()
    for root in heap.roots:
        marked[root // WORDS] = 1
    return marked


def marked_on(pages: Iterable[int], marked: bytearray) -> list[int]:
    """The marked objects on some pages, given by their addresses."""
    return [at for page in pages for at in range(page // 8, page // 8 + PAGE, WORDS) if marked[at // WORDS]]


def mark_beside(program: Program, heap: Heap, watch: WriteWatch | None) -> bytearray:
    """Mark what is alive, mostly while the program runs. It stands still when this returns."""
    marked = mark_roots(heap)
    pages: list[int] = []
    if watch:
        watch.reset()
    with program:
        mark(heap, marked, heap.roots, program.turn)
        while watch and len(pages) < MOST_ROUNDS and (not pages or pages[-1] > FEW):
            written = watch.get(reset=True)
            mark(heap, marked, marked_on(written, marked), program.turn)
            pages.append(len(written))
    if watch:
        before = perf_counter()
        written = watch.get(reset=True)
        mark(heap, marked, marked_on(written, marked))
        took = (perf_counter() - before) * 1e3
        print(f"  looked again at {', '.join(map(str, pages))} pages beside the program")
        print(f"  and at {len(written)} while it stood still, which took {took:.1f} ms")
    return marked


def collect(program: Program, heap: Heap, watch: WriteWatch | None) -> int:
    """Free the garbage. How many objects were lost: freed, although they can be reached."""
    before = program.operations
    marked = mark_beside(program, heap, watch)
    print(f"  {program.operations - before} operations meanwhile")

    # What a collector that stops the program for all of it would find.
    start = perf_counter()
    reachable = mark_roots(heap)
    mark(heap, reachable, heap.roots)
    took = (perf_counter() - start) * 1e3
    late = sum(m > r for m, r in zip(marked, reachable, strict=True))

    freed = heap.sweep(marked)
    lost = sum(not heap.words[i * WORDS + IN_USE] for i, alive in enumerate(reachable) if alive)
    print(
        f"  {reachable.count(1)} objects are alive, as marking everything while it stands still says in {took:.1f} ms"
    )
    print(f"  {freed} freed; {late} that became garbage too late for that; {lost} lost")
    return lost


def main() -> int:
    """Run it. 0 if no object was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", choices=("auto", "pagemap-scan", "uffd-wp"))
    parser.add_argument("--collections", type=int, default=3, help="how many (3); none after one that lost objects")
    parser.add_argument("--freely", action="store_true", help="let the program run as it likes, not turn by turn")
    parser.add_argument(
        "--without-write-watch", action="store_true", help="do not look again at pages written meanwhile"
    )
    options = parser.parse_args()
    if options.collections < 1:
        parser.error("there is 1 collection at least")
    try:
        tracker = DirtyTracker(options.backend)
    except KernelError as error:
        print(f"This does not work here: {error.strerror}" + (f"\n  remedy: {error.hint}" if error.hint else ""))
        return 1
    heap = Heap(mebibytes=4)
    program = Program(heap, freely=options.freely)
    lost = 0
    with tracker, tracker.track(heap.memory) as ram, WriteWatch(ram, base=0) as watch:
        print(f"Backend {tracker.selection.chosen}, a heap of {len(heap.words) // PAGE} pages")
        for number in range(1, options.collections + 1):
            print(f"Collection {number}:")
            lost = collect(program, heap, None if options.without_write_watch else watch)
            if lost:
                break
    print("Objects that the program still refers to were LOST." if lost else "Nothing was lost.")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
