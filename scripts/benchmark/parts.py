"""What has a target of its own: first writes, results, memory held, snapshots, readers, a framebuffer, a reserve."""

from __future__ import annotations

import array
import collections
import ctypes
import gc
import mmap
import os
import random
import struct
from contextlib import ExitStack, suppress
from time import monotonic, sleep, thread_time_ns
from typing import TYPE_CHECKING, Any

from benchmark.baseline import PAGE, SHIFT, Ground, Taken, runs_of
from benchmark.byhand import numpy
from benchmark.grid import GIB, LARGE, MIB, pages
from benchmark.measure import LIBRARY, Contenders, Effort, Samples, WrongAnswerError, on_one_cpu, timed
from benchmark.session import BACKENDS, Session, size_name
from pagemapcompat import (
    AddressRange,
    Cursor,
    DirtyTracker,
    Feature,
    KernelError,
    ScanResult,
    Snapshot,
    TrackedRange,
    probe,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

FAULT_PAGES = 1024
WRITERS = (1, 2, 4)
REGIONS = 1_000_000
SPANS = 100_000
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
HERTZ, FRAMES = 60, 90
FRAMEBUFFER, TWENTIETH = 8 * MIB, 0.05
SNAPSHOT_PAGES = 256
CURSORS = (8, 64)


# -- The first write to a protected page -----------------------------------------------------------------------


def run_faults(session: Session) -> None:
    """What a store takes, as the writer sees it. Nobody is pinned: the scheduler is part of it."""
    session.section("The first write to a protected page: a fault thread as everybody writes it, and the library's")
    length = (FAULT_PAGES // 8 if session.quick else FAULT_PAGES) * PAGE
    for writers in WRITERS:
        name = f"faults/{writers}-writers"
        if not session.wants(name):
            continue
        with (
            session.memory(name, length) as own,
            session.memory(name, length) as tracked,
            session.memory(name, length) as asynchronous,
            session.memory(name, length) as tied,
            session.attempt(name),
        ):
            grounds = [ground for ground in (own, tracked, asynchronous, tied) if ground is not None]
            if len(grounds) == 4:  # noqa: PLR2004 - all of them
                _faults(session, name, writers, *grounds)


def _faults(
    session: Session, name: str, writers: int, own: Ground, tracked: Ground, asynchronous: Ground, tied: Ground
) -> None:
    base = session.base
    with ExitStack() as stack:
        minimal = base.minimal_fault_thread(own.used)
        stack.callback(minimal.close)
        # What the kernel itself takes: nobody has to wake another CPU.
        floor = base.minimal_fault_thread(tied.used, min(os.sched_getaffinity(0)))
        stack.callback(floor.close)

        def on_its_cpu() -> Taken:
            with on_one_cpu():
                return base.store(tied.used, writers)

        tracker = stack.enter_context(DirtyTracker("uffd-wp"))
        ram = stack.enter_context(tracker.track(tracked.used))
        others: Contenders = {}
        resets: list[Callable[[], object]] = [minimal.protect, floor.protect, ram.reset]
        with suppress(KernelError):  # shown beside the others where it works
            native = stack.enter_context(DirtyTracker("pagemap-scan"))
            resets.append(stack.enter_context(native.track(asynchronous.used)).reset)
            others["pagemap-scan"] = lambda: base.store(asynchronous.used, writers)

        def prepare() -> None:
            for reset in resets:
                reset()

        session.measure(
            name,
            "faults",
            {
                "C": lambda: base.store(own.used, writers),
                LIBRARY: lambda: base.store(tracked.used, writers),
                "C-tied": on_its_cpu,
                **others,
            },
            baseline="C",
            axes={"operation": "first write", "backend": "uffd-wp", "writers": writers, "pages": own.units},
            prepare=prepare,
        )


# -- Results ---------------------------------------------------------------------------------------------------


def made_up(spans: Iterable[tuple[int, int]], length: int) -> tuple[ScanResult, array.array[int]]:
    """A result of these spans, made as unpickling makes one; and its regions in memory of our own."""
    base = 1 << 40
    words = array.array("Q")
    for lo, hi in spans:
        words.extend((base + lo, base + hi, 2))
    with mmap.mmap(-1, PAGE, flags=PRIVATE) as memory, DirtyTracker() as tracker, tracker.track(memory) as ram:
        make, _ = ram.peek().__reduce__()
    whole = AddressRange.from_length(base, length)
    return make(words.tobytes(), whole.end, whole, base, length), words


def run_results(session: Session) -> None:
    """What is made of the C array."""
    session.section("Results: from the C array to numpy, to spans, to a bitmap")
    for part in (_as_u64, _spans, _fill_bitmap):
        name = f"results/{part.__name__.removeprefix('_')}"
        if session.wants(name):
            with session.attempt(name):
                part(session, name)


def _every_other(count: int) -> Iterable[tuple[int, int]]:
    return ((2 * i * PAGE, (2 * i + 1) * PAGE) for i in range(count))


def _as_u64(session: Session, name: str) -> None:
    np: Any = numpy()
    if np is None:
        session.skip(name, "numpy is not installed; remedy: pip install numpy")
        return
    count = SPANS if session.quick else REGIONS
    result, words = made_up(_every_other(count), 2 * count * PAGE)
    first, second = np.asarray(result.as_u64()), np.asarray(result.as_u64())
    session.measure(
        name,
        "results",
        {
            "frombuffer": lambda: timed(lambda: np.frombuffer(words, dtype=np.uint64).reshape(-1, 3), 50),
            LIBRARY: lambda: timed(lambda: np.asarray(result.as_u64()).reshape(-1, 3), 50),
        },
        baseline="frombuffer",
        axes={"regions": count, "copies": first.ctypes.data != second.ctypes.data or first.flags.owndata},
    )


def _spans(session: Session, name: str) -> None:
    result, words = made_up(_every_other(SPANS), 2 * SPANS * PAGE)
    octets = words.tobytes()
    session.measure(
        name,
        "results",
        {
            "iter_unpack": lambda: timed(lambda: collections.deque(struct.iter_unpack("=QQQ", octets), maxlen=0)),
            LIBRARY: lambda: timed(lambda: collections.deque(result.spans(), maxlen=0)),
        },
        baseline="iter_unpack",
        axes={"regions": SPANS},
    )


def _fill_bitmap(session: Session, name: str) -> None:
    total = GIB >> SHIFT
    chosen = sorted(random.Random(1).sample(range(total), total // 100))  # noqa: S311 - the same ones every time
    result, words = made_up([(page * PAGE, (page + 1) * PAGE) for page in chosen], GIB)
    theirs, ours = bytearray(total // 8), bytearray(total // 8)
    session.base.bitmap(words, 1 << 40, theirs, 1)
    result.fill_bitmap(ours)
    if theirs != ours:
        raise WrongAnswerError("the bitmaps differ")
    session.measure(
        name,
        "results",
        {
            "C": lambda: session.base.bitmap(words, 1 << 40, theirs, 20),
            LIBRARY: lambda: timed(lambda: result.fill_bitmap(ours), 20),
        },
        baseline="C",
        axes={"bytes": GIB, "pages": len(chosen)},
    )


# -- Memory held -----------------------------------------------------------------------------------------------


def held(outside_of: AddressRange) -> tuple[int, int]:
    """Bytes: resident in this process outside of a range, by smaps; and in page tables, which are the kernel's."""
    resident, inside = 0, False
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            first, rest = line.split(maxsplit=1)
            if first == "Rss:":
                resident += 0 if inside else int(rest.split()[0]) << 10
            elif not first.endswith(":"):
                start, end = (int(one, 16) for one in first.split("-"))
                inside = start < outside_of.end and end > outside_of.start
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        tables = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmPTE:"))
    return resident, tables


def _growth(session: Session, backend: str, length: int) -> tuple[int, int]:
    # A hundredth is written and collected, and peeked at: whatever is allocated on first use is there then.
    with mmap.mmap(-1, length, flags=PRIVATE) as memory:
        gc.collect()
        with memoryview(memory) as view:
            where = AddressRange.from_length(ctypes.addressof(ctypes.c_char.from_buffer(view)), length)
        ground = Ground(where, where, PAGE)
        runs = pages(ground, max(ground.units // 100, 1), "random")
        before = held(where)
        with DirtyTracker(backend) as tracker, tracker.track(memory) as ram:
            session.base.dirty(runs)
            ram.collect()
            ram.peek()
            gc.collect()
            after = held(where)
    return after[0] - before[0], after[1] - before[1]


def run_memory(session: Session) -> None:
    """What a tracker keeps for each GiB: resident memory with a GiB less that with a page."""
    session.section("Memory held for each tracked GiB: resident growth by /proc/self/smaps, less that for one page")
    for backend in BACKENDS:
        name = f"memory/{backend}"
        if not session.wants(name):
            continue
        if backend == "uffd-wp" and not probe().supports(Feature.UFFD_WP_UNPOPULATED, Feature.PAGEMAP_UFFD_WP):
            session.skip(name, "needs uffd-wp-unpopulated and bit 57: else the memory is populated")
            continue
        kept: list[float] = []
        tables: list[float] = []
        with session.attempt(name):
            for _ in range(3 if session.quick else 7):
                (small, small_tables), (large, large_tables) = (_growth(session, backend, n) for n in (PAGE, GIB))
                kept.append(max(large - small, 0))
                tables.append(large_tables - small_tables)
            session.record(
                name,
                "memory",
                {"page-tables": Samples(tuple(tables[1:])), LIBRARY: Samples(tuple(kept[1:]))},
                baseline="page-tables",
                axes={"backend": backend, "bytes": GIB},
                unit="bytes",
            )


# -- Snapshots -------------------------------------------------------------------------------------------------


def run_snapshots(session: Session) -> None:
    """The next snapshot, and going back, beside a copy of everything."""
    session.section(f"Snapshots: {SNAPSHOT_PAGES} written pages of 64 MiB, beside a copy of all of it")
    for backend in BACKENDS:
        names = [f"snapshot/{backend}", f"restore/{backend}"]
        if not any(map(session.wants, names)) or not session.can_compare(names[0], backend):
            continue
        with session.memory(names[0], LARGE) as ground, session.memory(names[0], LARGE) as copy:
            if ground is None or copy is None:
                continue
            with session.attempt(names[0]), DirtyTracker(backend) as tracker, tracker.track(ground.used) as ram:
                _snapshots(session, names, ram, ground, copy, backend)


def _snapshots(
    session: Session, names: list[str], ram: TrackedRange, ground: Ground, copy: Ground, backend: str
) -> None:
    base, runs = session.base, pages(ground, SNAPSHOT_PAGES, "random")
    first = ram.snapshot()
    taken: list[Snapshot] = []

    def snapshot() -> Snapshot:
        taken.append(ram.snapshot())
        return taken[-1]

    def prepare() -> None:
        while taken:
            taken.pop().drop()
        base.dirty(runs)

    # What a snapshot is without the library: a copy of everything, in memory of its own. And beside it, into memory
    # that is there already.
    whole = memoryview((ctypes.c_char * LARGE).from_address(ground.used.start)).cast("B")
    full = {
        "copy": lambda: timed(lambda: bytes(whole)),
        "memcpy": lambda: base.copy(copy.used.start, ground.used.start, LARGE),
    }
    axes = {"backend": backend, "bytes": LARGE, "pages": SNAPSHOT_PAGES}
    if session.wants(names[0]):
        session.measure(
            names[0],
            "snapshots",
            {**full, LIBRARY: lambda: timed(snapshot)},
            baseline="copy",
            axes={**axes, "operation": "snapshot"},
            prepare=prepare,
            expected=SNAPSHOT_PAGES,
        )
    if session.wants(names[1]):
        ram.restore(first)
        session.measure(
            names[1],
            "snapshots",
            {**full, LIBRARY: lambda: timed(lambda: ram.restore(first))},
            baseline="copy",
            axes={**axes, "operation": "restore"},
            prepare=prepare,
            expected=SNAPSHOT_PAGES,
        )


# -- Several readers -------------------------------------------------------------------------------------------


def run_cursors(session: Session) -> None:
    """A collect of the same pages by an only cursor, and by one of many, on little memory and on much."""
    session.section(f"Cursors: a collect of {SNAPSHOT_PAGES} pages beside others that are quiet, or collect them too")
    for backend in BACKENDS:
        for length in (LARGE, GIB):
            ending = f"{backend}/{size_name(length)}"
            names = [f"cursors/{ending}/{count}/{others}" for count in CURSORS for others in ("quiet", "busy")]
            if length not in session.sizes or not any(map(session.wants, names)):
                continue
            if not session.can_compare(names[0], backend):
                continue
            with session.memory(names[0], length) as one, session.memory(names[0], length) as shared:
                if one is not None and shared is not None:
                    with session.attempt(names[0]), DirtyTracker(backend) as tracker:
                        _cursors(session, ending, tracker, one, shared)


def _cursors(session: Session, ending: str, tracker: DirtyTracker, one: Ground, shared: Ground) -> None:
    with ExitStack() as stack:
        alone, first = (stack.enter_context(tracker.track(ground.used)) for ground in (one, shared))
        written = [pages(ground, SNAPSHOT_PAGES, "random") for ground in (one, shared)]
        cursors: list[Cursor] = [first]

        def prepare() -> None:
            for runs in written:
                session.base.dirty(runs)

        def all_of_them() -> Taken:
            taken = [timed(cursor.collect) for cursor in cursors]
            if {each.pages for each in taken} != {SNAPSHOT_PAGES}:
                raise WrongAnswerError("not every cursor found every page")
            return Taken(sum(each.ns for each in taken) / len(taken))

        for count in CURSORS:
            while len(cursors) < count:
                cursors.append(stack.enter_context(first.cursor()))
            for others, call in (("quiet", lambda: timed(first.collect)), ("busy", all_of_them)):
                name = f"cursors/{ending}/{count}/{others}"
                if session.wants(name):
                    session.measure(
                        name,
                        "cursors",
                        {"alone": lambda: timed(alone.collect), LIBRARY: call},
                        baseline="alone",
                        axes={
                            "backend": tracker.selection.chosen,
                            "bytes": one.used.length,
                            "pages": SNAPSHOT_PAGES,
                            "cursors": count,
                            "others": others,
                        },
                        prepare=prepare,
                        expected=SNAPSHOT_PAGES,
                    )


# -- A framebuffer, and a reserve ------------------------------------------------------------------------------


def run_framebuffer(session: Session) -> None:
    """CPU time of the thread that collects at 60 Hz."""
    session.section("A framebuffer of 8 MiB at 60 Hz, 5 % of it written a frame: CPU time of the collecting thread")
    backend = BACKENDS[0]
    name = f"framebuffer/{backend}"
    if not session.wants(name):
        return
    with session.memory(name, FRAMEBUFFER) as ground:
        if ground is None:
            return
        with session.attempt(name), DirtyTracker(backend) as tracker, tracker.track(ground.used) as ram:
            count = int(ground.units * TWENTIETH)
            # A line of a picture is two pages: a rectangle writes one of each line.
            runs = runs_of(ground, range(0, 2 * count, 2))
            frames = 8 if session.quick else FRAMES
            due = monotonic()

            def frame() -> None:
                nonlocal due
                due = max(due + 1 / HERTZ, monotonic())
                sleep(max(due - monotonic(), 0))
                session.base.dirty(runs)

            def collect() -> Taken:
                before = thread_time_ns()
                result = ram.collect()
                return Taken(thread_time_ns() - before, result.pages)

            session.measure(
                name,
                "framebuffer",
                {"C": lambda: session.base.scan(ground.used, engage=True, cpu=True), LIBRARY: collect},
                baseline="C",
                axes={"backend": backend, "bytes": FRAMEBUFFER, "pages": count, "hertz": HERTZ},
                prepare=frame,
                expected=count,
                effort=Effort(samples=frames, most=frames, short=0.0, seconds=10.0),
            )


def run_reserve(session: Session) -> None:
    """A great PROT_NONE reserve of which little is populated, beside that little alone."""
    used = MIB if session.quick else GIB
    reserve = 64 * used
    backend = BACKENDS[0]
    name = f"reserve/{backend}"
    session.section(f"A PROT_NONE reserve of {size_name(reserve)} with {size_name(used)} populated, beside that alone")
    if not session.wants(name) or used > max(session.sizes):
        return
    with session.memory(name, used) as alone, session.memory(name, used, reserve=reserve) as inside:
        if alone is None or inside is None:
            return
        with (
            session.attempt(name),
            DirtyTracker(backend) as tracker,
            tracker.track(alone.whole) as small,
            tracker.track(inside.whole) as large,
        ):
            count = max(alone.units // 100, 1)
            written = [pages(ground, count, "random") for ground in (alone, inside)]

            def prepare() -> None:
                for runs in written:
                    session.base.dirty(runs)

            session.measure(
                name,
                "reserve",
                {"alone": lambda: timed(small.collect), LIBRARY: lambda: timed(large.collect)},
                baseline="alone",
                axes={"backend": backend, "bytes": used, "reserve": reserve, "pages": count},
                prepare=prepare,
                expected=count,
            )
