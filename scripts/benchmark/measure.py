"""Samples of several contenders in turn, and what is kept of them."""

from __future__ import annotations

import gc
import os
import statistics
from contextlib import contextmanager
from time import perf_counter, perf_counter_ns
from typing import TYPE_CHECKING, Any

import attrs

from benchmark.baseline import Taken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

LIBRARY = "library"


@attrs.frozen
class Effort:
    """How much to measure at each point."""

    samples: int
    """Of each contender, unless that takes longer than *seconds*."""
    most: int
    """While that takes no longer than *short*."""
    short: float
    seconds: float


FULL = Effort(samples=15, most=40, short=0.12, seconds=1.0)
QUICK = Effort(samples=2, most=2, short=0.0, seconds=0.2)
LEAST = 5
"""Samples of each, however long they take, unless fewer were asked for."""


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


@attrs.frozen
class Samples:
    """What one contender took."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter is below the first, a quarter above the second."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    def to_json(self) -> dict[str, Any]:
        """All of them, and the figures that are printed."""
        low, high = self.quartiles
        return {
            "n": len(self.values),
            "median": _rounded(self.median),
            "q1": _rounded(low),
            "q3": _rounded(high),
            "min": _rounded(min(self.values)),
            "max": _rounded(max(self.values)),
            "samples": [_rounded(value) for value in self.values],
        }


@attrs.frozen
class Point:
    """What was measured in one situation."""

    id: str
    section: str
    axes: Mapping[str, Any]
    """The situation."""
    contenders: Mapping[str, Samples]
    baseline: str
    """The contender whose median is what the library's is divided by."""
    unit: str = "ns"

    @property
    def library(self) -> Samples:
        """The library's samples."""
        return self.contenders[LIBRARY]

    @property
    def reference(self) -> Samples:
        """The baseline's samples."""
        return self.contenders[self.baseline]

    @property
    def ratio(self) -> float:
        """Of the medians: below 1 the library is quicker."""
        return self.library.median / self.reference.median if self.reference.median else float("inf")

    @property
    def at_best(self) -> Point:
        """The same with nothing but the least sample of each: what other programs disturb least."""
        best = {name: Samples((min(samples.values),)) for name, samples in self.contenders.items()}
        return attrs.evolve(self, contenders=best)

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "id": self.id,
            "section": self.section,
            "axes": dict(self.axes),
            "unit": self.unit,
            "baseline": self.baseline,
            "ratio": _rounded(self.ratio),
            "contenders": {name: samples.to_json() for name, samples in self.contenders.items()},
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Point:
        """From a file."""
        return cls(
            said["id"],
            said["section"],
            said["axes"],
            {name: Samples(tuple(one["samples"])) for name, one in said["contenders"].items()},
            said["baseline"],
            said["unit"],
        )


class WrongAnswerError(Exception):
    """A contender found other pages than were written: its figure would mean nothing."""


Contenders = dict[str, "Callable[[], Taken]"]


def sample(
    contenders: Contenders,
    effort: Effort,
    prepare: Callable[[], object] = lambda: None,
    expected: int | None = None,
) -> dict[str, Samples]:
    """Measure all of them in turn, forwards and backwards: A B B A. *prepare* runs before each, untimed.

    A first round is thrown away. Its answers, and all others, must have *expected* pages.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    gc.collect()
    gc.disable()
    try:
        for name in order:
            prepare()
            contenders[name]()
        began, done = perf_counter(), 0
        while True:
            for name in order:
                prepare()
                answer = contenders[name]()
                if expected is not None and answer.pages not in (None, expected):
                    raise WrongAnswerError(f"{name} found {answer.pages} pages of {expected} that were written")
                taken[name].append(answer.ns)
            order.reverse()
            done += 1
            elapsed = perf_counter() - began
            if done >= effort.samples and (done >= effort.most or elapsed >= effort.short):
                break
            if done >= min(LEAST, effort.samples) and elapsed >= effort.seconds:
                break
    finally:
        gc.enable()
    return {name: Samples(tuple(values)) for name, values in taken.items()}


def timed(call: Callable[[], Any], loops: int = 1) -> Taken:
    """What a call of Python takes, and the pages of what it returned."""
    if loops == 1:
        before = perf_counter_ns()
        answer = call()
        ns = perf_counter_ns() - before
    else:
        rounds = range(loops)
        before = perf_counter_ns()
        for _ in rounds:
            answer = call()
        ns = perf_counter_ns() - before
    return Taken(ns / loops, getattr(answer, "pages", None))


@contextmanager
def on_one_cpu() -> Iterator[int | None]:
    """Keep this thread on one CPU, so that "busy" and "alone" are that. Yields another one, if there is."""
    before = os.sched_getaffinity(0)
    own, *others = sorted(before)
    os.sched_setaffinity(0, {own})
    try:
        yield others[0] if others else None
    finally:
        os.sched_setaffinity(0, before)
