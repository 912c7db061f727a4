"""A fuzzer that gives every execution the same fresh machine, by restoring only the pages that the last one wrote.

How many executions a second that makes is measured beside the simple way, which copies all of the memory back.
"""

from __future__ import annotations

import argparse
import math
import mmap
import random
import sys
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

from pagemapcompat import DirtyTracker, KernelError, page_size

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = page_size()
BACKENDS = ("pagemap-scan", "uffd-wp")
INPUTS, LEAST_ROUNDS = 32, 2


def execute(memory: mmap.mmap, stores: list[int]) -> int:
    """The program under test: adds to bytes of the memory. Its outcome, a checksum, depends on what it found there."""
    outcome = 0
    for at in stores:
        byte = memory[at]
        outcome = (outcome * 31 + byte) & 0xFFFF_FFFF
        memory[at] = (byte + 1) & 0xFF
    return outcome


class Fuzzer:
    """A machine with content, and inputs that decide where the program under test stores: a byte a page."""

    def __init__(self, mebibytes: int, pages: int, seconds: float) -> None:
        length = mebibytes << 20
        dice = random.Random(1)  # noqa: S311 - the same inputs every time
        self.memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory[:] = dice.randbytes(length)
        self.inputs = [
            [page * PAGE + dice.randrange(PAGE) for page in dice.sample(range(length // PAGE), pages)]
            for _ in range(INPUTS)
        ]
        self._seconds = seconds

    def run(self, restore: Callable[[], object]) -> tuple[float, set[tuple[int, ...]]]:
        """Execute every input, twice at least and until time is up, and *restore* after each.

        Returns the executions a second of the fastest round, and the rounds' outcomes: all alike, if *restore* is good.
        """
        best, rounds = math.inf, 0
        seen = set()
        start = perf_counter()
        while rounds < LEAST_ROUNDS or perf_counter() - start < self._seconds:
            outcomes = []
            before = perf_counter()
            for stores in self.inputs:
                outcomes.append(execute(self.memory, stores))
                restore()
            best = min(best, perf_counter() - before)
            seen.add(tuple(outcomes))
            rounds += 1
        return INPUTS / best, seen


def show(name: str, rate: float, note: str) -> None:
    """A line of the table."""
    print(f"{name:16} {rate:9.0f} executions/s   {note}")


def working(names: tuple[str, ...]) -> list[str]:
    """Those backends that work here. Says why others do not."""
    found = []
    for name in names:
        try:
            DirtyTracker(name).close()
            found.append(name)
        except KernelError as error:
            print(f"{name} does not work here: {error.strerror}" + (f"\n  remedy: {error.hint}" if error.hint else ""))
    return found


def fuzz(fuzzer: Fuzzer, names: list[str]) -> bool:
    """Measure every way of restoring. Whether each gave each input the same fresh machine."""
    fresh = fuzzer.memory[:]
    with memoryview(fuzzer.memory) as whole:

        def copy_all_back() -> None:
            whole[:] = fresh

        alone, _ = fuzzer.run(lambda: None)
        copy_all_back()
        copying, expected = fuzzer.run(copy_all_back)
    show("nothing restored", alone, "the loop and the target by themselves; their outcomes are wrong")
    show("all copied back", copying, "not tracked")
    right = len(expected) == 1
    for name in names:
        with DirtyTracker(name) as tracker, tracker.track(fuzzer.memory) as ram:
            start = ram.snapshot()
            rate, outcomes = fuzzer.run(partial(ram.restore, start))
            execute(fuzzer.memory, fuzzer.inputs[0])
            restored = ram.restore(start, verify=True)
            right &= outcomes == expected and fuzzer.memory[:] == fresh
        show(name, rate, f"{rate / copying:.1f} times copying; {restored.pages} pages written back")
    return right


def main() -> int:
    """Run it. 0 if every execution found a fresh machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, help="only this one (each that works here)")
    parser.add_argument("--mib", type=int, default=64, help="the machine's memory, in MiB (64)")
    parser.add_argument("--pages", type=int, default=256, help="how many of its pages an execution writes (256)")
    parser.add_argument("--seconds", type=float, default=1.0, help="measure each way for so long (1.0)")
    options = parser.parse_args()
    if options.mib < 1 or not 1 <= options.pages <= (options.mib << 20) // PAGE:
        parser.error("the memory has at least 1 MiB, and an execution writes at least 1 of its pages, at most all")
    names = working((options.backend,) if options.backend else BACKENDS)
    if not names:
        return 1
    fuzzer = Fuzzer(options.mib, options.pages, options.seconds)
    pages = f"{options.pages} of its {len(fuzzer.memory) // PAGE} pages"
    print(
        f"A machine with {options.mib} MiB. Each execution writes into {pages}. The best of each, over {INPUTS} inputs:"
    )
    right = fuzz(fuzzer, names)
    print("Every input had the outcome that it has on a fresh machine." if right else "Some outcomes are WRONG.")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
