"""Tables: how cost grows, what was left out, and the targets."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

from benchmark.grid import GIB
from benchmark.measure import LIBRARY, Point
from benchmark.session import BACKENDS, duration, say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Curve = list[tuple[float, Point]]
SERIES = {
    "memory": "bytes, 1 % written at random",
    "dirty pages": "pages, at random",
    "runs": "runs of a quarter of the pages",
    "mappings": "mappings, 1 % written at random",
    "threads": "writers at once, a first write",
}
WIDTH = 118


def growth(points: Sequence[Point]) -> dict[str, dict[str, Curve]]:
    """Curves by series and backend: what it grows with, and the point."""
    plain = [
        point
        for point in points
        if point.section == "grid"
        and (point.axes["operation"], point.axes["layout"], point.axes["busy"]) == ("collect", "small", False)
    ]
    largest = max((point.axes["bytes"] for point in plain if point.axes["bytes"] <= GIB), default=0)
    found: dict[str, dict[str, Curve]] = {name: {} for name in SERIES}
    for backend in BACKENDS:
        own = [point for point in plain if point.axes["backend"] == backend]
        grown = [p for p in points if p.section == "growth" and p.axes["backend"] == backend]
        curves: dict[str, Curve] = {
            # 1 % of little memory is a page, written for a smaller share.
            "memory": [(p.axes["bytes"], p) for p in own if p.axes["pages"] == _hundredth(own, p)],
            "dirty pages": [
                (p.axes["pages"], p)
                for p in own
                if p.axes["bytes"] == largest and p.axes["pages"] and p.axes["pattern"] != "sequential"
            ],
            "runs": [(p.axes["x"], p) for p in grown if p.axes["series"] == "runs"],
            "mappings": [(p.axes["x"], p) for p in grown if p.axes["series"] == "vmas"],
            "threads": [(p.axes["writers"], p) for p in points if p.section == "faults" and backend == BACKENDS[1]],
        }
        for name, curve in curves.items():
            if curve:
                found[name][backend] = sorted(curve, key=lambda pair: pair[0])
    return found


def _hundredth(own: Sequence[Point], like: Point) -> int:
    same = [p for p in own if p.axes["bytes"] == like.axes["bytes"] and p.axes["pattern"] != "sequential"]
    nearest = min(same, key=lambda p: abs(p.axes["share"] - 0.01), default=like)
    return int(nearest.axes["pages"]) if like.axes["pattern"] != "sequential" else -1


def exponent(curve: Curve, contender: str) -> float | None:
    """Of the power of x that fits best: 0 costs the same, 1 grows as x does."""
    pairs = [
        (math.log(x), math.log(point.contenders[contender].median))
        for x, point in curve
        if x > 0 and contender in point.contenders and point.contenders[contender].median > 0
    ]
    if len({x for x, _ in pairs}) < 2:  # noqa: PLR2004 - a line has two points
        return None
    mean_x, mean_y = (sum(one) / len(pairs) for one in zip(*pairs, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / sum((x - mean_x) ** 2 for x, _ in pairs)
    return float(slope)


def show_growth(points: Sequence[Point]) -> None:
    """A line a curve."""
    found = growth(points)
    if any(found.values()):
        say("\nHow cost grows (exponent of the best power: 0 costs the same, 1 grows alike)")
    for name, curves in found.items():
        for backend, curve in curves.items():
            exponents = []
            for contender in (curve[0][1].baseline, LIBRARY):
                value = exponent(curve, contender)
                exponents.append(f"{contender} {'-' if value is None else format(value, '.2f')}")
            ends = f"{curve[0][0]:g} .. {curve[-1][0]:g}"
            costs = f"{duration(curve[0][1].library.median)} .. {duration(curve[-1][1].library.median)}"
            say(f"  {name:12} {backend:13} {', '.join(exponents):28} {ends} {SERIES[name]}: {costs}")


def show_skipped(skipped: Mapping[str, str]) -> None:
    """What was left out, by reason."""
    if not skipped:
        return
    say("\nLeft out")
    for reason in dict.fromkeys(skipped.values()):
        names = ", ".join(name for name, other in skipped.items() if other == reason)
        say(textwrap.fill(f"{names}: {reason}", WIDTH, initial_indent="  ", subsequent_indent="    "))


def show_targets(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table."""
    say("\nTargets")
    names = {None: "not measured", True: "reached", False: "not reached"}
    width = max(len(row["target"]) for row in rows)
    bounds = max(len(row["bound"]) for row in rows)
    for row in rows:
        say(f"  {row['target']:{width}}  {row['bound']:{bounds}}  {names[row['reached']]:12}  {row['measured']}")
        if row["points"] > 1:
            say(f"  {'':{width}}  {'':{bounds}}  {'':12}  worst at {row['worst']}")
    reached = sum(row["reached"] is True for row in rows)
    measured = sum(row["reached"] is not None for row in rows)
    say(f"  {reached} of {measured} measured targets reached")
