"""Two runs side by side."""

from __future__ import annotations

import json
import math
import statistics
from typing import TYPE_CHECKING, Any

from benchmark.measure import Point
from benchmark.session import amount, say

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FORMAT = "pagemapcompat-bench"
VERSION = 1


class NotARunError(Exception):
    """A file that holds no run."""


def load(path: Path) -> dict[str, Any]:
    """Read what `--json` wrote."""
    try:
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotARunError(f"{path}: {error}") from error
    if not isinstance(said, dict) or (said.get("format"), said.get("version")) != (FORMAT, VERSION):
        raise NotARunError(f"{path} was not written by this version of scripts/bench --json")
    return said


def overlap(old: Point, new: Point) -> bool:
    """Whether the library's quartiles, as multiples of the baseline's median, reach into each other.

    Multiples, for the baseline was measured in the same run: it knows how fast the machine was then.
    """
    (a, b), (c, d) = (
        tuple(one / (point.reference.median or math.inf) for one in point.library.quartiles) for point in (old, new)
    )
    return a <= d and c <= b


def show(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """What changed, most first; then the targets that changed."""
    before = {one["id"]: Point.from_json(one) for one in old["points"]}
    after = {one["id"]: Point.from_json(one) for one in new["points"]}
    both = [name for name in after if name in before]
    say(f"\nAgainst {old['metadata']['date']}: {len(both)} points in both")
    say("  ratio: library to baseline of the same run. Shown where the quartiles do not overlap.")
    changes = []
    for name in both:
        one, other = before[name], after[name]
        if one.ratio and math.isfinite(one.ratio) and math.isfinite(other.ratio) and not overlap(one, other):
            changes.append((other.ratio / one.ratio, one, other))
    for change, one, other in sorted(changes, key=lambda each: -abs(math.log(each[0]))):
        say(
            f"  {other.id:58} {one.ratio:.3g}x -> {other.ratio:.3g}x ({change - 1:+.0%}); library "
            f"{amount(one.library.median, one.unit)} -> {amount(other.library.median, other.unit)}"
        )
    if not changes:
        say("  no point changed")
    ratios = [after[name].ratio / before[name].ratio for name in both if before[name].ratio and after[name].ratio]
    finite = [one for one in ratios if math.isfinite(one) and one > 0]
    if finite:
        say(f"  geometric mean over all points: {statistics.geometric_mean(finite):.3g}x")
    words = {None: "not measured", True: "reached", False: "not reached"}
    then = {row["target"]: row for row in old["targets"]}
    for row in new["targets"]:
        earlier = then.get(row["target"])
        if earlier and earlier["reached"] != row["reached"]:
            say(f"  target {row['target']}: {words[earlier['reached']]} -> {words[row['reached']]}")
    for kind, names in (("only before", before.keys() - after.keys()), ("only now", after.keys() - before.keys())):
        if names:
            say(f"  {kind}: {len(names)} points")
