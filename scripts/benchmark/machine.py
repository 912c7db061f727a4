"""Where it was measured: what pyperf knows of the system and warns of, or what Python tells where it is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from pagemapcompat import page_size

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from benchmark.measure import Point


PRIVATE = ("date", "hostname", "python_executable", "python_config_args", "python_cflags")
"""What files that are shown to others need not say, or say already."""


def has(module: str) -> bool:
    """Whether a package of the extra `bench` is installed."""
    return importlib.util.find_spec(module) is not None


def metadata() -> dict[str, Any]:
    """What a figure means little without."""
    load = os.getloadavg()
    own: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": sys.version.split()[0],
        "pagemapcompat": importlib.metadata.version("pagemapcompat"),
        "cpus": len(os.sched_getaffinity(0)),
        "page_size": page_size(),
        "load_at_start": [round(one, 2) for one in load],
        "clock_ns": clock_ns(),
    }
    for name in ("enabled", "shmem_enabled"):
        try:
            with open(f"/sys/kernel/mm/transparent_hugepage/{name}", encoding="ascii") as file:
                own[f"transparent_hugepage_{name}"] = file.read().strip()
        except OSError:
            continue
    if has("pyperf"):
        import pyperf  # noqa: PLC0415 - of the extra `bench`

        known = pyperf.Run([1.0]).get_metadata()
        own["pyperf"] = {key: str(value) for key, value in known.items() if key not in PRIVATE}
    return own


def clock_ns() -> int:
    """What reading the clock twice takes: a part of each sample of the library."""
    taken = []
    for _ in range(1000):
        before = time.perf_counter_ns()
        taken.append(time.perf_counter_ns() - before)
    return sorted(taken)[len(taken) // 2]


def warnings() -> list[str]:
    """What makes figures of this machine unsteady."""
    found = []
    busy, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if busy > cpus / 4:
        found.append(f"other programs run here: a load of {busy:.2f} on {cpus} CPUs")
    if not has("pyperf"):
        return [*found, "pyperf is not installed, so the state of the system is not known; remedy: pip install pyperf"]
    # A program of its own, before anything is measured.
    done = subprocess.run(
        [sys.executable, "-m", "pyperf", "system", "show"], capture_output=True, text=True, timeout=60, check=False
    )
    titled = zip(blocks := done.stdout.split("\n\n"), blocks[1:], strict=False)
    said = [lines for title, lines in titled if title.startswith(("Advices\n", "Warnings\n"))]
    return found + [line for lines in said for line in lines.splitlines()]


def save_pyperf(points: Iterable[Point], path: Path) -> None:
    """Every contender as a benchmark, for pyperf's own tools: compare_to, stats, hist, check."""
    import pyperf  # noqa: PLC0415 - of the extra `bench`

    benchmarks = [
        pyperf.Benchmark(
            [
                pyperf.Run(
                    [value / 1e9 for value in samples.values],
                    metadata={"name": f"{point.id}/{name}", "unit": "second"},
                    collect_metadata=False,
                )
            ]
        )
        for point in points
        if point.unit == "ns"
        for name, samples in point.contenders.items()
        if min(samples.values) > 0
    ]
    pyperf.BenchmarkSuite(benchmarks).dump(str(path), replace=True)
