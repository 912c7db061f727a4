"""What the library is meant to cost, and whether it does: a table, never an exit status."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from benchmark.grid import LARGE, OPERATIONS
from benchmark.parts import CURSORS, HERTZ
from benchmark.session import BACKENDS, amount, duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from benchmark.measure import Point, Samples

US = 1e3
HELD = 64 << 10
QUIET = 25


def _ratio(point: Point) -> str:
    return f"{point.ratio:.3g}x"


def _difference(point: Point) -> str:
    return f"{point.ratio:.3g}x, {(point.library.median - point.reference.median) / US:+.2f} us"


def _times_faster(point: Point) -> str:
    return f"{1 / point.ratio:.3g}x faster" if point.ratio else "nothing"


def _spread(samples: Samples) -> str:
    low, high = samples.quartiles
    return f"{duration(min(samples.values))} [{duration(low)} {duration(high)}] {duration(max(samples.values))}"


def _both_spreads(point: Point) -> str:
    spreads = f"{point.baseline} {_spread(point.reference)}, library {_spread(point.library)}"
    return f"{point.ratio:.3g}x; min [quartiles] max: {spreads}"


def _share_of_core(point: Point) -> str:
    return f"{point.library.median * HERTZ / 1e9:.3%} of a core"


@attrs.frozen
class Target:
    """A promise about some points."""

    name: str
    bound: str
    chosen: Callable[[Point], bool]
    allowed: Callable[[Point], float]
    """The most that the library's median may be."""
    figure: Callable[[Point], str] = _ratio

    def excess(self, point: Point) -> float:
        """What the library took of what it may."""
        return point.library.median / max(self.allowed(point), 1e-9)

    def verdict(self, points: Iterable[Point]) -> dict[str, Any]:
        """A row of the table."""
        chosen = sorted(filter(self.chosen, points), key=self.excess)
        row: dict[str, Any] = {"target": self.name, "bound": self.bound, "points": len(chosen)}
        if not chosen:
            return {**row, "reached": None, "within": 0, "within_at_best": 0, "worst": None, "measured": "not measured"}
        worst, middle = chosen[-1], chosen[len(chosen) // 2]
        within = sum(self.excess(point) <= 1 for point in chosen)
        at_best = sum(self.excess(point.at_best) <= 1 for point in chosen)
        measured = self.figure(worst)
        if len(chosen) > 1:
            share = f"{within} of {len(chosen)} ({at_best} by their least samples)"
            measured = f"{share}; middle {self.figure(middle)}; worst {measured}"
        return {
            **row,
            "reached": within == len(chosen),
            "within": within,
            "within_at_best": at_best,
            "worst": worst.id,
            "measured": measured,
        }


def _times(factor: float) -> Callable[[Point], float]:
    return lambda point: point.reference.median * factor


def _operation(backend: str, operation: str, *, shared: bool | None = None, large: bool | None = None) -> Any:  # noqa: ANN401
    def chosen(point: Point) -> bool:
        axes = point.axes
        return (
            point.section == "grid"
            and (axes["backend"], axes["operation"]) == (backend, operation)
            and (shared is None or axes["shared"] == shared)
            and (large is None or (axes["bytes"] >= LARGE) == large)
        )

    return chosen


def _named(name: str) -> Callable[[Point], bool]:
    return lambda point: point.id == name


def _beside_quiet_cursors(backend: str) -> Callable[[Point], bool]:
    wanted = (backend, CURSORS[-1], "quiet")
    return lambda point: (
        point.section == "cursors" and tuple(point.axes[axis] for axis in ("backend", "cursors", "others")) == wanted
    )


SCAN, WP = BACKENDS
TARGETS = (
    *(
        Target(
            f"{operation} on {SCAN}, 64 MiB and up",
            "1.03x C, or C + 1 us",
            _operation(SCAN, operation, large=True),
            lambda point: max(point.reference.median * 1.03, point.reference.median + US),
            _difference,
        )
        for operation in OPERATIONS
    ),
    *(
        Target(
            f"{operation} on {SCAN}, 64 KiB and 1 MiB",
            "C + 1 us",
            _operation(SCAN, operation, large=False),
            lambda point: point.reference.median + US,
            _difference,
        )
        for operation in OPERATIONS
    ),
    Target(
        f"collect on {WP}, private memory",
        "1.10x C, a call a run",
        _operation(WP, "collect", shared=False),
        _times(1.1),
    ),
    Target(
        f"collect on {WP}, shared memory",
        "1.10x the better of a call a run and one call",
        _operation(WP, "collect", shared=True),
        _times(1.1),
    ),
    Target(
        f"first write on {WP}, one writer",
        "0.25x the usual fault thread",
        _named("faults/1-writers"),
        _times(0.25),
        _both_spreads,
    ),
    Target(
        f"first write on {WP}, two writers",
        "1.0x the usual fault thread",
        _named("faults/2-writers"),
        _times(1.0),
        _both_spreads,
    ),
    Target(
        "as_u64 of a million regions to numpy",
        "1.0x np.frombuffer, no copy",
        _named("results/as_u64"),
        lambda point: 0 if point.axes["copies"] else point.reference.median,
    ),
    Target("spans() of 100,000 regions", "1.0x struct.iter_unpack", _named("results/spans"), _times(1.0)),
    Target("fill_bitmap, 1 GiB, 1 % written", "1.05x a loop in C", _named("results/fill_bitmap"), _times(1.05)),
    Target(
        f"memory held per tracked GiB, {WP}",
        "64 KiB beside page tables",
        _named(f"memory/{WP}"),
        lambda _: HELD,
        lambda point: amount(point.library.median, point.unit),
    ),
    *(
        Target(
            f"{what} of {pages} on {backend}",
            f"{factor}x faster than a full copy",
            _named(f"{what}/{backend}"),
            _times(1 / factor),
            _times_faster,
        )
        for what, backend, factor, pages in (
            ("snapshot", SCAN, 60, "256 pages in 64 MiB"),
            ("restore", SCAN, 30, "256 pages in 64 MiB"),
            ("snapshot", WP, 15, "256 pages in 64 MiB"),
            ("restore", WP, 15, "256 pages in 64 MiB"),
        )
    ),
    *(
        Target(
            f"collect beside {CURSORS[-1] - 1} quiet cursors, {backend}",
            f"that of one + {QUIET} ns a page and cursor",
            _beside_quiet_cursors(backend),
            lambda point: point.reference.median + QUIET * point.axes["pages"] * (point.axes["cursors"] - 1),
            _difference,
        )
        for backend in BACKENDS
    ),
    Target(
        f"framebuffer of 8 MiB, 5 % at 60 Hz, {SCAN}",
        "under 0.1 % of a core",
        _named(f"framebuffer/{SCAN}"),
        lambda _: 0.001 / HERTZ * 1e9,
        _share_of_core,
    ),
    Target(
        f"64 GiB reserve with 1 GiB populated, {SCAN}", "1.5x that 1 GiB alone", _named(f"reserve/{SCAN}"), _times(1.5)
    ),
)


def verdicts(points: Iterable[Point]) -> list[dict[str, Any]]:
    """A row a target."""
    known = list(points)
    return [target.verdict(known) for target in TARGETS]
