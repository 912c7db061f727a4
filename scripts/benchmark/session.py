"""One run: what was asked for, what was measured, what was left out and why."""

from __future__ import annotations

import fnmatch
import sys
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

import attrs

from benchmark.baseline import Baseline, BaselineError
from benchmark.measure import LIBRARY, Contenders, Effort, Point, Samples, WrongAnswerError, sample
from pagemapcompat import Feature, KernelError, probe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmark.baseline import Ground

BACKENDS = ("pagemap-scan", "uffd-wp")
SPARE = 512 << 20
"""Bytes of the machine's memory that stay free."""


def size_name(length: int) -> str:
    """64K, 1M, 4G."""
    for letter, shift in (("G", 30), ("M", 20), ("K", 10)):
        if length >> shift and not length % (1 << shift):
            return f"{length >> shift}{letter}"
    return str(length)


def duration(ns: float) -> str:
    """In the unit that suits it."""
    for unit, factor in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= factor:
            return f"{ns / factor:.3g} {unit}"
    return f"{ns:.3g} ns"


def amount(value: float, unit: str) -> str:
    """A figure with its unit."""
    if unit == "bytes":
        return f"{value / 1024:.4g} KiB"
    return duration(value)


def available() -> int:
    """Bytes that can be had without swapping."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0


@attrs.define
class Session:
    """Collects points."""

    base: Baseline
    effort: Effort
    quick: bool
    only: Sequence[str]
    sizes: Sequence[int]
    points: list[Point] = attrs.field(factory=list)
    skipped: dict[str, str] = attrs.field(factory=dict)
    _title: str = ""
    _began: float = attrs.field(factory=monotonic)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return monotonic() - self._began

    def wants(self, name: str) -> bool:
        """Whether a point was asked for: a pattern, or a part of its name."""
        return not self.only or any(fnmatch.fnmatch(name, one) or one in name for one in self.only)

    def skip(self, name: str, reason: str) -> None:
        """Leave out what was asked for."""
        if name not in self.skipped:
            self.skipped[name] = reason
            self._say(f"{name}: left out: {reason}")

    def section(self, title: str) -> None:
        """Begin a part of the run. Its title is shown with the first thing in it."""
        self._title = title

    def _say(self, text: str) -> None:
        if self._title:
            say(f"\n{self._title}")
        self._title = ""
        say(f"  {text}")

    def measure(
        self,
        name: str,
        section: str,
        contenders: Contenders,
        *,
        baseline: str | Sequence[str],
        axes: dict[str, Any],
        unit: str = "ns",
        **options: Any,  # noqa: ANN401 - of `sample`
    ) -> None:
        """Sample all contenders. Of several baselines the quickest counts."""
        with self.attempt(name):
            samples = sample(contenders, options.pop("effort", self.effort), **options)
            self.record(name, section, samples, baseline=baseline, axes=axes, unit=unit)

    def record(
        self,
        name: str,
        section: str,
        samples: dict[str, Samples],
        *,
        baseline: str | Sequence[str],
        axes: dict[str, Any],
        unit: str = "ns",
    ) -> None:
        """Keep a point, and show it."""
        names = [baseline] if isinstance(baseline, str) else baseline
        best = min(names, key=lambda one: samples[one].median)
        point = Point(name, section, axes, samples, best, unit)
        self.points.append(point)
        others = [one for one in samples if one not in (best, LIBRARY)]
        more = "".join(f", {one} {amount(samples[one].median, unit)}" for one in others)
        low, high = point.library.quartiles
        self._say(
            f"{name:58} {best} {amount(point.reference.median, unit):>9}, library "
            f"{amount(point.library.median, unit):>9} ({amount(low, unit)} .. {amount(high, unit)}), "
            f"{point.ratio:.3g}x{more}"
        )

    @contextmanager
    def memory(self, name: str, length: int, **options: Any) -> Iterator[Ground | None]:  # noqa: ANN401 - of `map`
        """Memory of *length* bytes, or None where it does not fit."""
        ground = None
        if length + SPARE > available():
            self.skip(name, f"{size_name(length)} does not fit: {available() >> 20} MiB are available")
        else:
            with self.attempt(name):
                ground = self.base.map(length, **options)
        try:
            yield ground
        finally:
            if ground is not None:
                self.base.unmap(ground)

    def can_compare(self, name: str, backend: str) -> bool:
        """Whether C knows what was written to memory of this backend, and can write to it without a fault."""
        if backend == "uffd-wp" and not probe().supports(Feature.PAGEMAP_UFFD_WP):
            self.skip(name, "pagemap does not show protection (bit 57), and nobody but the library can tell")
            return False
        return True

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Leave out what fails, and say why."""
        try:
            yield
        except KernelError as error:
            self.skip(name, f"{error.strerror}; remedy: {error.hint or 'none'}")
        except (BaselineError, WrongAnswerError, OSError, MemoryError) as error:
            self.skip(name, f"{type(error).__name__}: {error}")


def say(text: str) -> None:
    """Tell how far it is."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
