"""The grid: operations by backend, size, dirty share, pattern, layout and load; and two series beside it."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import attrs

from benchmark.baseline import HUGE, PEEK, PER_RUN, SHIFT, WHOLE, Ground, Taken, runs_of
from benchmark.measure import LIBRARY, Contenders, on_one_cpu, timed
from benchmark.session import BACKENDS, Session, size_name
from pagemapcompat import DirtyTracker, Feature, TrackedRange, probe

if TYPE_CHECKING:
    import array
    from collections.abc import Callable, Iterator, Sequence

    from benchmark.baseline import Baseline

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZES = (64 * KIB, MIB, 64 * MIB, GIB, 4 * GIB)
SHARES = (0.0, 0.001, 0.01, 0.1, 1.0)
QUICK_SIZES = (64 * KIB, MIB, 64 * MIB)
QUICK_SHARES = (0.0, 0.01, 1.0)
OPERATIONS = ("collect", "peek", "reset")
VMAS = 10_000
LARGE = 64 * MIB
"""From here on there is room for that many mappings, and for huge pages."""
TOO_MANY_RUNS = 30_000
"""On `uffd-wp` beside a busy thread each costs a flush of the other CPU's TLB, 16 us: half a second a call."""
ENOUGH_NS, MOST_LOOPS = 20_000, 200
"""What is measured at once, where calls can be repeated."""
MOSTLY = 0.9


@attrs.frozen
class Layout:
    """How the memory is laid out."""

    name: str
    options: dict[str, Any]
    sizes: tuple[int, ...]


LAYOUTS = (
    Layout("small", {}, SIZES),
    Layout("10000-vmas", {"vmas": VMAS}, tuple(size for size in SIZES if size >= LARGE)),
    Layout("huge", {"huge": True}, tuple(size for size in SIZES if size >= LARGE)),
    Layout("shared", {"shared": True}, (MIB, LARGE, GIB)),
)


@attrs.frozen
class Case:
    """What is written before each call."""

    share: float
    pattern: str
    count: int
    """Units, of the ground's step."""
    runs: array.array[int]


def cases(ground: Ground, shares: Sequence[float]) -> Iterator[Case]:
    """Shares and patterns that differ on this memory; the same pages in every run."""
    seen = set()
    for share in shares:
        for pattern in ("sequential", "random"):
            count = max(round(ground.units * share), 1) if share else 0
            key = (count, pattern if 1 < count < ground.units else "")
            if key in seen:
                continue
            seen.add(key)
            yield Case(share, pattern if key[1] else "any", count, pages(ground, count, pattern))


def pages(ground: Ground, count: int, pattern: str) -> array.array[int]:
    """The first *count* units, or as many anywhere."""
    if pattern == "sequential" or count in (0, ground.units):
        return runs_of(ground, range(count))
    dice = random.Random(count)  # noqa: S311 - the same ones every time
    return runs_of(ground, sorted(dice.sample(range(ground.units), count)))


def is_huge(ground: Ground) -> bool:
    """Whether the kernel gave huge pages."""
    kib = 0
    inside = False
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            first = line.split(maxsplit=1)[0]
            if "-" in first and not first.endswith(":"):
                start, end = (int(one, 16) for one in first.split("-"))
                inside = start < ground.used.end and end > ground.used.start
            elif inside and first == "AnonHugePages:":
                kib += int(line.split()[1])
    return kib << 10 >= ground.used.length * MOSTLY


def contenders(
    base: Baseline, ram: TrackedRange, operation: str, backend: str, *, shared: bool = False, loops: int = 1
) -> Contenders:
    """The library, and C by other names, on the same memory."""
    used = ram.range
    method = getattr(ram, operation)
    library = {LIBRARY: lambda: timed(method, loops)}
    if backend == "pagemap-scan":
        raw: Callable[[], Taken] = {
            "collect": lambda: base.scan(used, engage=True, loops=loops),
            "peek": lambda: base.scan(used, engage=False, loops=loops),
            "reset": lambda: base.scan_only(used, loops=loops),
        }[operation]
        return {"C": raw, **library}
    if operation == "reset":
        return {"C": lambda: base.protect(used, loops=loops), **library}
    if operation == "peek":
        return {"C": lambda: base.words(used, PEEK, loops=loops), **library}
    per_run: Contenders = {"C": lambda: base.words(used, PER_RUN, loops=loops)}
    if not shared:
        return {**per_run, **library}
    return {**per_run, "C-whole": lambda: base.words(used, WHOLE, loops=loops), **library}


def settle(base: Baseline, backend: str, ground: Ground) -> None:
    """Protect all of it, by raw calls."""
    if backend == "pagemap-scan":
        base.scan_only(ground.used)
    else:
        base.protect(ground.used)


def measure(
    session: Session, ram: TrackedRange, ground: Ground, name: str, case: Case, axes: dict[str, Any], section: str
) -> None:
    """One point: *axes* say what is called."""
    base, operation, backend = session.base, axes["operation"], axes["backend"]
    # What changes nothing is called several times at once, so that the clock does not show.
    loops = 1
    repeatable = operation == "peek" or not case.count
    with session.attempt(name):
        settle(base, backend, ground)
        if repeatable:
            base.dirty(case.runs)
            once = contenders(base, ram, operation, backend)["C"]()
            loops = max(1, min(MOST_LOOPS, int(ENOUGH_NS / max(once.ns, 1))))
        made = contenders(base, ram, operation, backend, shared=bool(axes.get("shared")), loops=loops)
        session.measure(
            name,
            section,
            made,
            baseline=[one for one in made if one != LIBRARY],
            axes={**axes, "pages": case.count * (ground.step >> SHIFT), "runs": len(case.runs) // 3, "loops": loops},
            prepare=(lambda: None) if repeatable else lambda: base.dirty(case.runs),
            expected=None if operation == "reset" else case.count * (ground.step >> SHIFT),
        )


def operations(layout: Layout, backend: str, length: int, *, busy: bool) -> tuple[str, ...]:
    """All three where they are cheap to measure or the plainest; else collect."""
    if (layout.name == "small" and not busy) or (backend == "pagemap-scan" and length < SIZES[-1]):
        return OPERATIONS
    return ("collect",)


def run_layout(session: Session, layout: Layout, length: int) -> None:
    """All points on one memory."""
    ending = f"{size_name(length)}/{layout.name}"
    names = [f"{operation}/{backend}/{ending}" for operation in OPERATIONS for backend in BACKENDS]
    if session.only and not any(_may_want(session, name) for name in names):
        return
    with session.memory(f"*/{ending}", length, **layout.options) as ground:
        if ground is None:
            return
        if ground.step == HUGE and not is_huge(ground):
            session.skip(
                f"*/{ending}", "the kernel gives no huge pages; remedy: transparent_hugepage=madvise or always"
            )
            return
        for backend in BACKENDS:
            if layout.name == "shared" and not probe().supports(Feature.UFFD_WP_HUGETLBFS_SHMEM):
                session.skip(f"*/{backend}/{ending}", "this kernel protects no shared memory")
                continue
            name = f"*/{backend}/{ending}"
            if not session.can_compare(name, backend):
                continue
            with (
                session.attempt(name),
                DirtyTracker(backend) as tracker,
                tracker.track(ground.used) as ram,
                on_one_cpu() as other,  # after the tracker has made its fault thread, which goes where it likes
            ):
                run_loads(session, ram, ground, layout, length, backend, other)


def _may_want(session: Session, prefix: str) -> bool:
    operation, backend, *_ = prefix.split("/")
    layout = prefix.removeprefix(f"{operation}/{backend}/")
    candidates = [
        f"{operation}/{backend}/{layout}/{share}/{pattern}/{load}"
        for share in map(share_name, SHARES)
        for pattern in ("any", "sequential", "random")
        for load in ("alone", "busy")
    ]
    return any(map(session.wants, candidates))


def share_name(share: float) -> str:
    """0%, 0.1%, 100%."""
    return f"{share * 100:g}%"


def run_loads(
    session: Session, ram: TrackedRange, ground: Ground, layout: Layout, length: int, backend: str, other: int | None
) -> None:
    """Every case, alone and beside a busy thread."""
    ending = f"{size_name(length)}/{layout.name}"
    for busy in (False, True):
        if busy and session.quick and length < LARGE:
            continue
        if busy and other is None:
            session.skip(f"*/{backend}/{ending}/busy", "one CPU: no thread can be busy on another")
            continue
        with session.base.spinner(other) if busy and other is not None else nullcontext():
            for case in cases(ground, QUICK_SHARES if session.quick else SHARES):
                for operation in operations(layout, backend, length, busy=busy):
                    load = "busy" if busy else "alone"
                    name = f"{operation}/{backend}/{ending}/{share_name(case.share)}/{case.pattern}/{load}"
                    if not session.wants(name):
                        continue
                    if busy and backend == "uffd-wp" and len(case.runs) // 3 > TOO_MANY_RUNS:
                        session.skip(name, f"{len(case.runs) // 3} runs beside a busy thread: seconds a call")
                        continue
                    axes = {
                        "operation": operation,
                        "backend": backend,
                        "bytes": length,
                        "layout": layout.name,
                        "shared": layout.name == "shared",
                        "vmas": layout.options.get("vmas", 1),
                        "share": case.share,
                        "pattern": case.pattern,
                        "busy": busy,
                    }
                    measure(session, ram, ground, name, case, axes, "grid")


def run(session: Session) -> None:
    """The grid."""
    session.section("Operations: medians of C and of the library (with its quartiles), and their ratio")
    layouts = LAYOUTS[:1] if session.quick else LAYOUTS
    for layout in layouts:
        for length in layout.sizes:
            if length in session.sizes and (length != MIB or not session.quick):
                run_layout(session, layout, length)
    if session.quick and MIB in session.sizes:
        run_layout(session, LAYOUTS[-1], MIB)


# -- How cost grows --------------------------------------------------------------------------------------------


def run_growth(session: Session) -> None:
    """Runs at a fixed number of pages, and mappings at a fixed memory. The other series are points of the grid."""
    session.section("How cost grows: with runs, and with mappings")
    length = MIB if session.quick else LARGE
    total = length >> SHIFT
    quarter = total // 4
    runs = [one for one in (1, 4, 16, 64, 256, 1024, 4096) if one <= quarter]
    mappings = [one for one in (1, 10, 100, 1000, VMAS) if one <= total]
    for backend in BACKENDS:
        spread = {}
        for count in runs:
            each, apart = quarter // count, total // count
            spread[count] = [run * apart + page for run in range(count) for page in range(each)]
        _grow(session, backend, length, 1, "runs", spread)
        dice = random.Random(1)  # noqa: S311 - the same ones every time
        hundredth = sorted(dice.sample(range(total), max(total // 100, 1)))
        for vmas in mappings:
            _grow(session, backend, length, vmas, "vmas", {vmas: hundredth})


def _grow(session: Session, backend: str, length: int, vmas: int, series: str, units: dict[int, list[int]]) -> None:
    names = {x: f"grow/{series}/{backend}/{x}" for x in units if session.wants(f"grow/{series}/{backend}/{x}")}
    if not names:
        return
    first = next(iter(names.values()))
    if not session.can_compare(first, backend):
        return
    with session.memory(first, length, vmas=vmas) as ground:
        if ground is None:
            return
        with session.attempt(first), DirtyTracker(backend) as tracker, tracker.track(ground.used) as ram, on_one_cpu():
            for x, name in names.items():
                case = Case(len(units[x]) / ground.units, series, len(units[x]), runs_of(ground, units[x]))
                axes = {"operation": "collect", "backend": backend, "bytes": length, "series": series, "x": x}
                measure(session, ram, ground, name, case, axes, "growth")
