"""Every attack of the suite, drawn by a seed, for as long as there is time; what scripts/soak runs.

A round is one attack. Its seed says all of it, and the next round has the next seed: `--seed` goes on from any round.
Half of them run in a process each; the other half in one that stays, and must not grow. What makes calls fail, and what
ends trackers and processes, always has a process to itself.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import math
import os
import random
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from errno import errorcode

import attrs
import programs
import storms
import test_fault_thread
import test_injection
import test_model
import test_sleepers
from children import Child, plain, resources
from conftest import CHILD_SECONDS, FLAVOURS, Flavour, Paranoid, environment, paranoid

from pagemapcompat import Feature, KernelError, probe

ROUND_SECONDS = 5 * CHILD_SECONDS
"""How long one may take. A hang lasts for ever."""
PROGRESS_SECONDS = 60
ALLOWED = {
    "descriptors": 0,
    "threads": 0,
    "mappings": 24,
    "mapped MiB": 64,
    "anonymous MiB": 4,
    "heap MiB": 2,
}
"""What may be more in the process that stays, late than early: allocators, and stacks that are kept, come and go."""
MIB = 1 << 20


# ---- Attacks ---------------------------------------------------------------------------------------------------


@attrs.frozen
class Done:
    """What a round did."""

    operations: int
    """Collects of a storm; steps of a program."""
    writes: int
    """Accounted for."""
    pages: int
    """Reported, to all readers."""


def storm(round_: Round) -> Done:
    """Writers of all kinds against collectors at full speed."""
    (flavour,) = round_.flavours
    counts = storms.storm(flavour, round_.seed, 12)
    assert counts.accounted == counts.writes > 0
    return Done(counts.collects, counts.accounted, counts.pages)


def program(round_: Round) -> Done:
    """Whatever happens to memory, on two backends side by side."""
    counts = programs.run(round_.seed, round_.flavours, 300, [round_.memory])
    return Done(counts.operations, counts.written, counts.reported)


def model_steps(seed: int) -> list[tuple[str, int, int]]:
    """The program of the model that *seed* stands for."""
    dice = random.Random(seed)
    return [(dice.choice(test_model.ACTIONS), dice.randrange(1 << 16), dice.randrange(1 << 16)) for _ in range(200)]


def model(round_: Round) -> Done:
    """Cursors, snapshots and restores beside writers."""
    (flavour,) = round_.flavours
    with environment(flavour):
        counts = test_model.play(flavour, round_.memory, model_steps(round_.seed))
    return Done(counts.operations, counts.written, counts.reported)


@functools.cache
def shim() -> test_injection.Shim:
    """What makes the calls of this process fail."""
    return test_injection.Shim(str(test_injection.compiled()))


def fault(round_: Round) -> Done:
    """Calls of the C core fail, one at a time."""
    (flavour,) = round_.flavours
    dice = random.Random(round_.seed)
    with environment(flavour):
        for _ in range(FAULTS):
            test_injection.strike(shim(), flavour, round_.memory, dice)
    return Done(FAULTS, shim().written, shim().told)


def end(round_: Round) -> Done:
    """Trackers end in any way, and processes with them, while their writers sleep in faults."""
    (flavour,) = round_.flavours
    dice = random.Random(round_.seed)
    with environment(flavour):
        pages = sum(dice.choice(WAYS_TO_END)(flavour) for _ in range(ENDS))
    return Done(ENDS, pages, pages)


FAULTS, ENDS = 12, 3
"""In one round."""
WAYS_TO_END: tuple[Callable[[Flavour], int], ...] = (
    *(functools.partial(test_sleepers.wake, deed=deed) for deed in test_sleepers.DEEDS),
    *(functools.partial(test_fault_thread.lose_the_descriptor, way=way) for way in test_fault_thread.WAYS),
    *test_sleepers.ENDS.values(),
    test_sleepers.outlive,
)
ATTACKS: dict[str, Callable[[Round], Done]] = {
    "storm": storm,
    "program": program,
    "model": model,
    "fault": fault,
    "end": end,
}


# ---- Rounds ----------------------------------------------------------------------------------------------------


@attrs.frozen
class Round:
    """One attack."""

    seed: int
    attack: str
    flavours: tuple[Flavour, ...]
    memory: str
    stays: bool
    """Whether it runs in the process that stays."""

    def __str__(self) -> str:
        """For people."""
        where = "in the process that stays" if self.stays else "in a process of its own"
        return f"{self.attack}, {' and '.join(one.name for one in self.flavours)}, {self.memory} memory, {where}"

    @staticmethod
    def draw(seed: int, flavours: Sequence[Flavour]) -> Round:
        """The round that *seed* stands for, on those of *flavours* that are able."""
        dice = random.Random(f"round {seed}")  # other numbers than those that the attack draws from the same seed
        attack = dice.choice([name for name in ATTACKS if fit_for(name, flavours)])
        stays = dice.random() < 0.5 and attack not in APART
        flavour = dice.choice(fit_for(attack, flavours))
        if attack == "storm":
            mix = storms.reduced(flavour, storms.draw(seed))
            return Round(seed, attack, (flavour,), mix.memory, stays)
        kinds = [kind for kind in programs.PAGES if programs.able([flavour], kind)]
        if attack == "program":
            memory = dice.choice(kinds)
            fit = [one for one in programs.able(flavours, memory) if is_fit(one, memory)]
            return Round(seed, attack, tuple(dice.sample(fit, min(2, len(fit)))), memory, stays)
        if attack == "end":
            return Round(seed, attack, (flavour,), "private", stays)
        return Round(seed, attack, (flavour,), dice.choice([kind for kind in kinds if kind != "huge"]), stays)


APART = ("fault", "end")
"""Attacks that have a process to themselves."""


def fit_for(attack: str, flavours: Sequence[Flavour]) -> Sequence[Flavour]:
    """Those of *flavours* that it can attack."""
    if attack not in APART:
        return flavours
    plain_ones = [one for one in flavours if not isinstance(one, Paranoid)]
    if attack == "fault":
        return plain_ones if test_injection.compiled() else []
    return [one for one in plain_ones if one.backend == "uffd-wp"]  # which has a fault thread


def is_fit(flavour: Flavour, memory: str) -> bool:
    """Whether programs keep within what it allows.

    To one that is compared, what nobody sees is lost: shared memory that a child wrote, and without DISCARDS what was
    discarded. Before 6.4 its own reading makes an empty page look written that could not be marked.
    """
    with environment(flavour):
        marks = probe().supports(Feature.UFFD_WP_UNPOPULATED, Feature.PAGEMAP_UFFD_WP)
    return not isinstance(flavour, Paranoid) or (marks and memory != "shared")


def flavours_here() -> tuple[list[Flavour], dict[str, str]]:
    """Those that run here, plain and compared; and why the others do not."""
    able, unable = [], {}
    for flavour in FLAVOURS:
        for one in (flavour, paranoid(flavour)):
            try:
                with environment(one), one.tracker():
                    able.append(one)
            except KernelError as error:
                unable[one.name] = f"{errorcode.get(error.errno or 0)}, {error.strerror}; remedy: {error.hint}"
    return able, unable


class Mallinfo(ctypes.Structure):
    """`struct mallinfo2`, of glibc from 2.33 on."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def sample() -> tuple[dict[str, float], list[str]]:
    """What this process has, by the names of ALLOWED; and its descriptors."""
    gc.collect()
    if hasattr(plain, "malloc_trim"):
        plain.malloc_trim(0)
    descriptors, threads, maps = resources()
    with open("/proc/self/status", encoding="ascii") as status:
        anonymous = next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))
    heap = 0
    if hasattr(plain, "mallinfo2"):
        plain.mallinfo2.restype = Mallinfo
        info = plain.mallinfo2()
        heap = info.uordblks + info.hblkhd
    ends = [[int(end, 16) for end in where.split("-")] for where, _ in maps]
    mapped = sum(end - start for start, end in ends)
    numbers = (len(descriptors), threads, len(maps), mapped / MIB, anonymous / MIB, heap / MIB)
    return dict(zip(ALLOWED, numbers, strict=True)), descriptors


class Worker:
    """A process that attacks by order, one round after the other."""

    def __init__(self, flavours: Sequence[Flavour]) -> None:
        self._flavours = flavours
        self._ours, self._theirs = socket.socketpair()
        self._child = Child(self._serve)
        self._theirs.close()

    def _serve(self) -> None:
        self._ours.close()
        if hasattr(plain, "mallopt"):
            plain.mallopt(-8, 1)  # M_ARENA_MAX: each thread's own takes 64 MiB of addresses for ever
        unraised: list[BaseException | None] = []
        # What Python would only print: of destructors, and of callbacks, in which a storm's interrupt may end too.
        sys.unraisablehook = lambda what: unraised.append(what.exc_value)
        while order := self._theirs.recv(1 << 16):
            chosen = Round.draw(int(order), self._flavours)
            done = ATTACKS[chosen.attack](chosen)
            failures = [error for error in unraised if not isinstance(error, KeyboardInterrupt)]
            assert not failures, f"raised where nobody could see it: {failures!r}"
            unraised.clear()
            self._theirs.sendall(json.dumps([attrs.astuple(done), *sample()]).encode() + b"\n")

    def attack(self, seed: int) -> tuple[Done, dict[str, float], list[str]]:
        """Run a round; fails as it does. Returns what it did, and what the process has."""
        with suppress(ConnectionError):  # then it has ended, and says how
            self._ours.sendall(str(seed).encode())
        self._child.wait(ROUND_SECONDS, self._ours.fileno())
        with self._ours.makefile() as answers:
            line = answers.readline()
        if not line:
            self._child.wait(ROUND_SECONDS)
            raise AssertionError("the process ended")
        done, numbers, descriptors = json.loads(line)
        return Done(*done), numbers, descriptors

    def close(self) -> None:
        """End it."""
        self._child.end()
        self._ours.close()


# ---- The soak --------------------------------------------------------------------------------------------------


class Flat:
    """What the process that stays had after each of its rounds."""

    def __init__(self) -> None:
        self.samples: list[dict[str, float]] = []
        self.descriptors: list[str] = []

    def add(self, numbers: dict[str, float], descriptors: list[str]) -> None:
        """After one more."""
        self.samples.append(numbers)
        self.descriptors = descriptors

    def line(self, name: str) -> tuple[float, float, float] | None:
        """Early, late and at most; None while there are too few to tell. The first fifth warms up."""
        fifth = len(self.samples) // 5
        if fifth < 2:
            return None
        had = [numbers[name] for numbers in self.samples[fifth:]]
        return statistics.median(had[:fifth]), statistics.median(had[-fifth:]), max(had)

    def findings(self) -> Iterator[str]:
        """What grew."""
        for name, allowed in ALLOWED.items():
            line = self.line(name)
            if line and line[1] > line[0] + allowed:
                now = f": {', '.join(self.descriptors)}" if name == "descriptors" else ""
                yield f"{name} grew from {line[0]:.1f} to {line[1]:.1f} in {len(self.samples)} rounds{now}"


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Soak:
    """Rounds, one after the other, and what came of them."""

    def __init__(self, seed: int, flavours: Sequence[Flavour], *, verbose: bool = False) -> None:
        self.first = self.seed = seed
        self.flavours = flavours
        self.verbose = verbose
        self.findings = 0
        self.staying: Worker | None = None
        self.flat = Flat()
        self.rounds: Counter[tuple[str, str]] = Counter()
        self.totals: dict[str, Counter[str]] = {attack: Counter() for attack in ATTACKS}
        self.begun = self.told = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.begun

    def total(self, name: str) -> int:
        """Of all attacks."""
        return sum(counter[name] for counter in self.totals.values())

    def find(self, what: str, repeat: str) -> None:
        """Tell of a finding."""
        self.findings += 1
        say(f"FINDING: {what}\nrepeat it: scripts/soak {repeat}")

    def run(self, seconds: float, rounds: int | None, *, keep_going: bool) -> None:
        """For so long, or so many rounds; until a finding, else."""
        try:
            while self.seconds < seconds and self.seed - self.first != rounds and (keep_going or not self.findings):
                self.round()
                if time.monotonic() >= self.told + PROGRESS_SECONDS:
                    self.told = time.monotonic()
                    self.progress()
        finally:
            self.end_staying()

    def round(self) -> None:
        """One more."""
        chosen = Round.draw(self.seed, self.flavours)
        if self.verbose:
            say(f"round {self.seed - self.first + 1}, seed {self.seed}: {chosen}")
        begun = time.monotonic()
        worker = self.worker(chosen)
        try:
            done, numbers, descriptors = worker.attack(self.seed)
        except AssertionError as error:
            self.find(f"seed {self.seed}: {chosen}\n{error}", f"1 --rounds 1 --seed {self.seed}")
            if chosen.stays:
                self.end_staying()  # nothing can be said of what a round leaves behind that failed
        else:
            self.totals[chosen.attack].update(attrs.asdict(done))
            if chosen.stays:
                self.flat.add(numbers, descriptors)
        finally:
            if not chosen.stays:
                worker.close()
        self.seed += 1
        self.totals[chosen.attack].update(rounds=1, milliseconds=round((time.monotonic() - begun) * 1000))
        self.rounds.update((chosen.attack, one.name) for one in chosen.flavours)

    def worker(self, chosen: Round) -> Worker:
        """The process that stays, or a new one."""
        if chosen.stays and self.staying:
            return self.staying
        worker = Worker(self.flavours)
        if chosen.stays:
            self.staying, self.flat = worker, Flat()
        return worker

    def end_staying(self) -> None:
        """End the process that stays, and judge it by what it had."""
        if self.staying:
            self.staying.close()
            self.staying = None
            for what in self.flat.findings():
                minutes = math.ceil(self.seconds / 60)
                self.find(what, f"{minutes} --rounds {self.seed - self.first} --seed {self.first}")

    def progress(self) -> None:
        """One line."""
        each = ", ".join(f"{attack} {counter['rounds']}" for attack, counter in self.totals.items())
        say(
            f"{self.seconds / 60:.0f} min: {self.total('rounds')} rounds ({each}), "
            f"{self.total('operations')} operations, {self.total('writes')} writes accounted for, "
            f"{self.findings} findings; next seed {self.seed}"
        )

    def summary(self) -> Iterator[str]:
        """Tables: the rounds by flavour and attack, what they did, and what the process that stays had."""
        width = max(len(one.name) for one in self.flavours) + 2
        yield f"{'rounds':{width}}" + "".join(f"{name:>14}" for name in (*self.totals, "all"))
        for flavour in self.flavours:
            counts = [self.rounds[attack, flavour.name] for attack in self.totals]
            yield f"{flavour.name:{width}}" + "".join(f"{count:14}" for count in (*counts, sum(counts)))
        for title, name, unit in (
            ("all", "rounds", 1),
            ("operations", "operations", 1),
            ("writes accounted", "writes", 1),
            ("pages reported", "pages", 1),
            ("seconds", "milliseconds", 1000),
        ):
            numbers = [*(counter[name] for counter in self.totals.values()), self.total(name)]
            yield f"{title:{width}}" + "".join(f"{number // unit:14}" for number in numbers)
        title = f"{len(self.flat.samples)} rounds in one process"
        yield f"{title:{width}}" + "".join(f"{title:>14}" for title in ("early", "late", "most"))
        for name in ALLOWED:
            line = self.flat.line(name)
            yield f"{name:{width}}" + "".join(f"{number:14.1f}" for number in line or ())
        yield f"{self.findings} findings in {self.total('rounds')} rounds; next seed {self.seed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if anything was found, 2 where nothing can be attacked, 130 if interrupted."""
    parser = argparse.ArgumentParser("scripts/soak", description="Every attack of the suite, drawn by a seed.")
    parser.add_argument("minutes", type=float, help="how long; the round that is running then is the last")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="begin where this round began")
    parser.add_argument("--rounds", type=int, help="stop after so many")
    parser.add_argument("--keep-going", action="store_true", help="after a finding")
    parser.add_argument("--verbose", action="store_true", help="a line for each round, before it begins")
    options = parser.parse_args(arguments)
    able, unable = flavours_here()
    for name, why in unable.items():
        say(f"not here: {name}: {why}")
    if not able:
        return 2
    storms.library()  # compiled once, not in every process
    test_injection.compiled()
    say(f"seed {options.seed}, kernel {os.uname().release}")
    soak = Soak(options.seed, able, verbose=options.verbose)
    status = 0
    try:
        soak.run(options.minutes * 60, options.rounds, keep_going=options.keep_going)
    except KeyboardInterrupt:
        status = 130
    for line in soak.summary():
        say(line)
    return status or int(soak.findings > 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs are started without
    sys.exit(main())
