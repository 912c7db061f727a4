"""Measures the library beside plain C, and beside what one would do without it, and compares.

C and the library are called in turn, in one process, on the same memory: A B B A. Before each call the same pages are
written, untimed. Figures are medians; on a loaded machine they mean little, the ratios more. No figure makes it fail:
it exits with 0 when it could measure, 2 when it could not. Ten minutes, and 5 GiB of memory, or less.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmark import byhand, compare, grid, machine, parts, plot, report, targets
from benchmark.baseline import Baseline, BaselineError
from benchmark.measure import FULL, QUICK
from benchmark.session import Session, say, size_name

PARTS = (
    grid.run,
    grid.run_growth,
    parts.run_faults,
    parts.run_results,
    parts.run_memory,
    parts.run_snapshots,
    parts.run_cursors,
    parts.run_framebuffer,
    parts.run_reserve,
    byhand.run,
)


def size(text: str) -> int:
    """64K, 1M, 4G: one of those that are measured."""
    known = {size_name(one): one for one in grid.SIZES}
    try:
        return known[text.upper().removesuffix("B").removesuffix("I")]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(known)}") from None


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds, little of everything: figures mean nothing")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="points whose name matches, or has this in it: 'collect/uffd-wp/*', faults, byhand; again for more",
    )
    parser.add_argument("--size", action="append", type=size, help="64K, 1M, 64M, 1G or 4G; again for more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all samples")
    parser.add_argument("--pyperf", type=Path, metavar="FILE", help="keep them for `python -m pyperf`, too")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw; needs matplotlib")
    parser.add_argument(
        "--against",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="compare with an older run; with two files measure nothing, and compare these",
    )
    chosen = parser.parse_args(given)
    if chosen.against and len(chosen.against) > 2:  # noqa: PLR2004 - old and new
        parser.error("--against takes OLD.json and, instead of measuring, NEW.json")
    for option, module in (("plot", "matplotlib"), ("pyperf", "pyperf")):
        if getattr(chosen, option) and not machine.has(module):
            parser.error(f"--{option} needs {module}; remedy: pip install -e '.[bench]'")
    if chosen.pyperf and chosen.against and len(chosen.against) > 1:
        parser.error("--pyperf keeps what is measured, and --against with two files measures nothing")
    return chosen


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """A run."""
    metadata, warnings = machine.metadata(), machine.warnings()
    say(f"Linux {metadata['kernel']}, {metadata['cpus']} CPUs, Python {metadata['python']}")
    for warning in warnings:
        say(f"  warning: {warning}")
    sizes = chosen.size or (grid.QUICK_SIZES if chosen.quick else grid.SIZES)
    with Baseline() as base:
        session = Session(base, QUICK if chosen.quick else FULL, chosen.quick, chosen.only, sizes)
        for part in PARTS:
            part(session)
    said: dict[str, Any] = {
        "format": compare.FORMAT,
        "version": compare.VERSION,
        "metadata": metadata,
        "warnings": warnings,
        "settings": {"quick": chosen.quick, "only": chosen.only, "sizes": list(sizes)},
        "seconds": round(session.seconds, 1),
        "points": [point.to_json() for point in session.points],
        "growth": {
            name: {backend: [[x, point.id] for x, point in curve] for backend, curve in curves.items()}
            for name, curves in report.growth(session.points).items()
        },
        "skipped": session.skipped,
        "targets": targets.verdicts(session.points),
    }
    report.show_growth(session.points)
    report.show_skipped(session.skipped)
    report.show_targets(said["targets"])
    say(f"  {len(session.points)} points in {session.seconds:.0f} s")
    if chosen.pyperf:
        machine.save_pyperf(session.points, chosen.pyperf)
    return said


def main(given: list[str] | None = None) -> int:
    """Measure or load, compare, keep, draw."""
    chosen = arguments(given)
    try:
        runs = [compare.load(path) for path in chosen.against or ()]
        said = runs[1] if len(runs) > 1 else measure(chosen)
    except (BaselineError, compare.NotARunError) as error:
        sys.stderr.write(f"scripts/bench: {error}\n")
        return 2
    if runs:
        compare.show(runs[0], said)
    if chosen.json:
        chosen.json.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    if chosen.plot:
        plot.save(said, chosen.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
