"""A picture of a run. Needs matplotlib, which is in the extra `bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmark.measure import LIBRARY, Point
from benchmark.report import SERIES, Curve, growth
from benchmark.session import BACKENDS, size_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

COLOURS = dict(zip(BACKENDS, ("tab:blue", "tab:orange"), strict=True))


def save(said: Mapping[str, Any], path: Path) -> None:
    """Draw it."""
    import matplotlib as mpl  # noqa: PLC0415 - of the extra `bench`

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after its output is chosen

    points = [Point.from_json(one) for one in said["points"]]
    figure, panels = plt.subplots(2, 4, figsize=(22, 10), layout="constrained")
    flat = list(panels.flat)
    for axis, (name, curves) in zip(flat, growth(points).items(), strict=False):
        _growth(axis, name, curves)
    _ratios(flat[5], points)
    _faults(flat[6], points)
    _byhand(flat[7], points)
    metadata = said["metadata"]
    figure.suptitle(f"pagemapcompat on Linux {metadata['kernel']}, {metadata['cpus']} CPUs, {metadata['date']}")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _growth(axis: Any, name: str, curves: Mapping[str, Curve]) -> None:  # noqa: ANN401 - matplotlib's
    axis.set(xscale="log", yscale="log", xlabel=SERIES[name], ylabel="ns", title=f"collect, by {name}")
    if name == "threads":
        axis.set_title("first write, by writers")
    for backend, curve in curves.items():
        xs = [x for x, _ in curve]
        for contender, style in ((curve[0][1].baseline, "--"), (LIBRARY, "-")):
            chosen = [point.contenders[contender] for _, point in curve if contender in point.contenders]
            if len(chosen) != len(xs):
                continue
            label = f"{backend}, {contender}"
            axis.plot(xs, [one.median for one in chosen], style, marker=".", color=COLOURS[backend], label=label)
            low, high = ([one.quartiles[i] for one in chosen] for i in (0, 1))
            axis.fill_between(xs, low, high, color=COLOURS[backend], alpha=0.15)
    if curves:
        axis.legend(fontsize="small")
    axis.grid(visible=True, which="major", alpha=0.3)


def _ratios(axis: Any, points: Sequence[Point]) -> None:  # noqa: ANN401 - matplotlib's
    axis.set(xscale="log", yscale="log", xlabel="bytes", ylabel="library / C", title="every point of the grid")
    for backend in BACKENDS:
        for busy, marker in ((False, "o"), (True, "x")):
            own = [
                p
                for p in points
                if p.section == "grid" and p.axes["backend"] == backend and p.axes["busy"] == busy and p.ratio > 0
            ]
            label = f"{backend}{', beside a busy thread' if busy else ''}"
            xs = [p.axes["bytes"] * (1.15 if busy else 1.0) for p in own]
            axis.scatter(xs, [p.ratio for p in own], marker=marker, s=14, color=COLOURS[backend], label=label)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.legend(fontsize="small")


def _faults(axis: Any, points: Sequence[Point]) -> None:  # noqa: ANN401 - matplotlib's
    boxes = [
        (f"{name}\n{point.axes['writers']}", [value / 1e3 for value in samples.values])
        for point in points
        if point.section == "faults"
        for name, samples in point.contenders.items()
    ]
    axis.set(yscale="log", ylabel="us a store", title="first write, by fault thread and number of writers")
    if boxes:
        axis.boxplot([values for _, values in boxes], whis=(0, 100))
        axis.set_xticks(range(1, len(boxes) + 1), [name for name, _ in boxes], fontsize="x-small", rotation=45)


def _byhand(axis: Any, points: Sequence[Point]) -> None:  # noqa: ANN401 - matplotlib's
    axis.set(xscale="log", xlabel="ns a collect", title="what else one could do")
    names, values, colours = [], [], []
    for point in points:
        if point.section != "byhand":
            continue
        where = f"{point.axes['backend']} {size_name(point.axes['bytes'])} {point.axes['share']:.0%}"
        for name, samples in sorted(point.contenders.items(), key=lambda pair: pair[1].median):
            names.append(f"{where} {name}")
            values.append(samples.median)
            colours.append(COLOURS[point.axes["backend"]] if name == LIBRARY else "lightgrey")
    axis.barh(names, values, color=colours)
    axis.tick_params(axis="y", labelsize="xx-small")
    axis.invert_yaxis()
