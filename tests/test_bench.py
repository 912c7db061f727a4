"""What scripts/bench measures: the right pages, in turn, of C and the library; never how long anything takes."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from conftest import CHILD_SECONDS, FLAVOURS, Flavour, lacking, need, run_child, use_flavour

from pagemapcompat import DirtyTracker, Feature, KernelError

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from benchmark import compare, grid, machine, session, targets  # noqa: E402 - after its folder is on the path
from benchmark.__main__ import main  # noqa: E402
from benchmark.baseline import PER_RUN, WHOLE, Baseline, Ground, Taken, compiler  # noqa: E402
from benchmark.measure import FULL, QUICK, Point, Samples, WrongAnswerError, sample, timed  # noqa: E402

REMEDY = "pip install -e '.[bench]'"
SECTIONS = {"grid", "growth", "faults", "results", "memory", "snapshots", "cursors", "framebuffer", "reserve", "byhand"}


def need_both() -> None:
    """Skip where C cannot be compiled, or the library has no backend."""
    if compiler() is None:
        lacking("gcc", "no C compiler", "sudo apt install gcc")
    if not works("auto"):
        lacking("auto", "no backend works here", "see pagemapcompat probe")


def need_package(name: str) -> None:
    """Skip what needs a package that is not installed."""
    if importlib.util.find_spec(name) is None:
        lacking(name, "not installed", REMEDY)


def works(backend: str) -> bool:
    """Whether a backend works here."""
    try:
        DirtyTracker(backend).close()
    except KernelError:
        return False
    return True


def bench(*options: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it, in a process of its own, from another directory."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmark", *map(str, options)],
        env={**os.environ, "PYTHONPATH": str(SCRIPTS)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS * 3,
        check=False,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file of one quick run of everything, and what it printed."""
    need_both()
    file = tmp_path_factory.mktemp("bench") / "run.json"
    done = bench("--quick", "--json", file)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return file, done.stdout


@pytest.fixture
def run(quick: tuple[Path, str]) -> dict[str, Any]:
    """What is in that file."""
    return json.loads(quick[0].read_text(encoding="utf-8"))


# -- A run -----------------------------------------------------------------------------------------------------


def test_every_point_has_samples_of_c_and_of_the_library(run: dict[str, Any]) -> None:
    """With units, figures that fit them, and their ratio."""
    assert (run["format"], run["version"]) == (compare.FORMAT, compare.VERSION)
    ids = [point["id"] for point in run["points"]]
    assert len(ids) == len(set(ids))
    for point in run["points"]:
        assert point["unit"] == ("bytes" if point["section"] == "memory" else "ns")
        assert {"library", point["baseline"]} <= point["contenders"].keys()
        assert point["baseline"] != "library"
        for name, one in point["contenders"].items():
            assert one["n"] == len(one["samples"]) > 0, (point["id"], name)
            assert min(one["samples"]) == one["min"] >= (0 if point["unit"] == "bytes" else 1)
            assert max(one["samples"]) == one["max"]
            assert one["min"] <= one["q1"] <= one["median"] <= one["q3"] <= one["max"]
        medians = [point["contenders"][name]["median"] for name in ("library", point["baseline"])]
        assert point["ratio"] == pytest.approx(medians[0] / medians[1], rel=1e-4)


def test_every_part_is_measured_or_left_out_for_a_reason(run: dict[str, Any]) -> None:
    """All sections are there, and both backends in each where they differ."""
    assert all(run["skipped"].values())
    if works("pagemap-scan") and works("uffd-wp") and not run["skipped"]:
        assert {point["section"] for point in run["points"]} == SECTIONS
        for section in ("grid", "growth", "memory", "snapshots", "cursors", "byhand"):
            found = {point["axes"]["backend"] for point in run["points"] if point["section"] == section}
            assert found == {"pagemap-scan", "uffd-wp"}
        assert {point["axes"]["operation"] for point in run["points"] if point["section"] == "grid"} == {
            "collect",
            "peek",
            "reset",
        }
        for name, curves in run["growth"].items():
            assert curves.keys() == ({"uffd-wp"} if name == "threads" else {"pagemap-scan", "uffd-wp"})
            assert all(len(curve) > 1 for curve in curves.values())


def test_every_target_has_a_row(quick: tuple[Path, str], run: dict[str, Any]) -> None:
    """Reached, not reached or not measured; the worst point is named, and the table is printed."""
    assert [row["target"] for row in run["targets"]] == [target.name for target in targets.TARGETS]
    ids = {point["id"] for point in run["points"]}
    table = quick[1].partition("\nTargets\n")[2]
    for row in run["targets"]:
        assert row["target"] in table
        assert row["bound"]
        assert 0 <= row["within"] <= row["points"]
        assert 0 <= row["within_at_best"] <= row["points"]
        if row["points"]:
            assert row["reached"] is (row["within"] == row["points"])
            assert row["worst"] in ids
        else:
            assert row["reached"] is row["worst"] is None
            assert row["measured"] == "not measured"
            assert run["skipped"]


@pytest.mark.parametrize(("factor", "reached"), [(1e-9, True), (1e9, False)])
def test_a_target_is_reached_by_what_costs_little(run: dict[str, Any], factor: float, reached: bool) -> None:
    """And missed by what costs much: every one of them, by the library's samples alone."""
    points = []
    for point in map(Point.from_json, run["points"]):
        library = Samples(tuple((value + 1e-3) * factor for value in point.library.values))
        points.append(attrs.evolve(point, contenders={**point.contenders, "library": library}))
    rows = targets.verdicts(points)
    assert {row["reached"] for row in rows if row["points"]} == {reached}
    assert all((row["within"] == row["points"]) is reached for row in rows if row["points"])


# -- How it is measured ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base() -> Iterator[Baseline]:
    """The C baseline, built once."""
    need_both()
    with Baseline() as made:
        yield made


@pytest.fixture
def ground(base: Baseline) -> Iterator[Ground]:
    """Some populated memory."""
    made = base.map(1 << 20)
    yield made
    base.unmap(made)


@pytest.fixture(params=[one for one in FLAVOURS if not one.disabled], ids=lambda one: one.name)
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Flavour:
    """Each backend as this kernel has it, for C asks no other."""
    need(Feature.PAGEMAP_UFFD_WP)
    return use_flavour(request.param, monkeypatch)


def test_samples_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A B B A after a first round that is thrown away, each after its own preparation."""
    log: list[str] = []

    def contender(name: str, ns: float) -> Callable[[], Taken]:
        def call() -> Taken:
            log.append(name)
            return Taken(ns)

        return call

    made = {"A": contender("A", 1), "B": contender("B", 2)}
    effort = attrs.evolve(QUICK, samples=4, most=4)
    samples = sample(made, effort, lambda: log.append("-"))
    assert "".join(log) == "-A-B" + "-A-B-B-A-A-B-B-A"
    assert (samples["A"].values, samples["B"].values) == ((1.0,) * 4, (2.0,) * 4)


def test_a_wrong_answer_is_no_sample() -> None:
    """A contender that finds more or fewer pages than were written ends its point."""
    made = {"C": lambda: Taken(1, 3), "library": lambda: Taken(1, 4)}
    with pytest.raises(WrongAnswerError, match="library found 4 pages of 3"):
        sample(made, FULL, expected=3)


def test_what_is_written_is_what_all_find(base: Baseline, ground: Ground, native: Flavour) -> None:
    """Exactly the chosen pages, in every case of the grid: by the raw calls and by the library, on the same memory."""
    with native.tracker() as tracker, tracker.track(ground.used) as ram:
        for case in grid.cases(ground, grid.SHARES):
            wanted = set()
            for start, end in zip(case.runs[::3], case.runs[1::3], strict=True):
                wanted.update(
                    range((start - ground.used.start) // ground.step, (end - ground.used.start) // ground.step)
                )
            assert len(wanted) == case.count
            base.dirty(case.runs)
            assert set(ram.peek().page_indices()) == wanted
            assert set(ram.collect().page_indices()) == wanted
            if native.backend == "pagemap-scan":
                raw = [lambda: base.scan(ground.used, engage=True)]
            else:
                raw = [lambda: base.words(ground.used, PER_RUN), lambda: base.words(ground.used, WHOLE)]
            for call in raw:
                base.dirty(case.runs)
                assert call().pages == case.count
                assert ram.peek().pages == 0
        assert tracker.statistics().faults == 0  # writing is prepared without a fault thread, which takes long


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_both_fault_threads_let_every_writer_through(
    base: Baseline, ground: Ground, native: Flavour, threads: int
) -> None:
    """Each page is stored to once, whoever resolves the fault."""
    count = ground.used.pages
    if native.backend == "uffd-wp":
        minimal = base.minimal_fault_thread(ground.used)
        minimal.protect()
        base.store(ground.used, threads)
        minimal.close()
    with native.tracker() as tracker, tracker.track(ground.used) as ram:
        base.store(ground.used, threads)
        assert ram.collect().pages == count
        # The last writer may go on before its fault is counted.
        assert tracker.statistics().faults in ((count - 1, count) if native.backend == "uffd-wp" else (0,))


def test_many_mappings_are_many(base: Baseline) -> None:
    """Memory of 100 mappings has 100."""
    made = base.map(1 << 20, vmas=100)
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        starts = [int(line.partition("-")[0], 16) for line in file]
    assert sum(made.used.start <= start < made.used.end for start in starts) == 100
    base.unmap(made)


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the memory that there is as the reason; the rest is measured."""
    need_both()
    monkeypatch.setattr(session, "available", lambda: 0)
    monkeypatch.setattr(machine, "warnings", list)
    file = tmp_path / "run.json"
    assert main(["--quick", "--only", "restore", "--only", "results/spans", "--json", str(file)]) == 0
    run = json.loads(file.read_text(encoding="utf-8"))
    assert {point["id"] for point in run["points"]} == {"results/spans"}
    assert run["skipped"]
    assert all(reason == "64M does not fit: 0 MiB are available" for reason in run["skipped"].values())


def test_a_sample_of_the_library_has_its_pages() -> None:
    """What `timed` returns is a figure a call, and the pages of the last answer."""
    calls: list[int] = []

    @attrs.frozen
    class Answer:
        pages: int = 7

    taken = timed(lambda: calls.append(1) or Answer(), 5)
    assert (len(calls), taken.pages) == (5, 7)
    assert taken.ns > 0


# -- Files -----------------------------------------------------------------------------------------------------


def test_a_run_against_itself_has_not_changed(quick: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Two files are compared, and nothing is measured."""
    assert main(["--against", str(quick[0]), str(quick[0])]) == 0
    printed = capsys.readouterr().out
    assert "no point changed" in printed
    assert "geometric mean over all points: 1x" in printed


def test_a_point_that_got_slower_is_shown(
    quick: tuple[Path, str], run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the ratio to the baseline of its own run: a machine that is slower throughout changes nothing."""
    slower = copy.deepcopy(run)
    for point in slower["points"]:
        for one in point["contenders"].values():
            one["samples"] = [3 * value for value in one["samples"]]
    victim = slower["points"][0]
    library = victim["contenders"]["library"]
    library["samples"] = [100 * value for value in library["samples"]]
    slower["targets"][0]["reached"], run["targets"][0]["reached"] = True, False
    for name, said in (("old", run), ("new", slower)):
        (tmp_path / name).write_text(json.dumps(said), encoding="utf-8")
    assert main(["--against", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    shown = [line.split()[0] for line in printed.splitlines() if " -> " in line and "target" not in line]
    assert shown == [victim["id"]]
    assert f"target {run['targets'][0]['target']}: not reached -> reached" in printed


def test_a_file_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one line that names it, and exit status 2."""
    for text in ("", "[]", '{"format": "another"}'):
        file = tmp_path / "run"
        file.write_text(text, encoding="utf-8")
        assert main(["--against", str(file), str(file)]) == 2
        error = capsys.readouterr().err
        assert str(file) in error
        assert error.count("\n") == 1


def test_against_an_older_run_measures_and_compares(quick: tuple[Path, str]) -> None:
    """One file, and a few points measured now."""
    done = bench("--quick", "--only", "results/spans", "--against", quick[0])
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert ": 1 points in both" in done.stdout


# -- Packages that may be missing ------------------------------------------------------------------------------


def test_a_picture_is_drawn(quick: tuple[Path, str], tmp_path: Path) -> None:
    """From a file, by matplotlib."""
    need_package("matplotlib")
    picture = tmp_path / "run.png"
    done = bench("--against", quick[0], quick[0], "--plot", picture)
    assert (done.returncode, done.stderr) == (0, "")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_pyperf_reads_what_is_kept_for_it(run: dict[str, Any], tmp_path: Path) -> None:
    """Every contender of every point that takes time is a benchmark with the same median."""
    need_package("pyperf")
    import pyperf

    points = [Point.from_json(point) for point in run["points"]]
    machine.save_pyperf(points, tmp_path / "suite.json")
    suite = pyperf.BenchmarkSuite.load(str(tmp_path / "suite.json"))
    medians = {one.get_name(): one.median() * 1e9 for one in suite}
    expected = {f"{p.id}/{name}": s.median for p in points if p.unit == "ns" for name, s in p.contenders.items()}
    assert medians == pytest.approx(expected)


def test_it_measures_without_any_package_of_the_extra(tmp_path: Path) -> None:
    """What needs numpy is left out, with a remedy; a picture and a file of pyperf are refused at once."""
    need_both()
    said = tmp_path / "run.json"
    run_child(
        """
        import sys
        sys.modules.update(numpy=None, matplotlib=None, pyperf=None)
        sys.path.insert(0, sys.argv[1])
        from benchmark.__main__ import main
        assert main(["--quick", "--only", "results", "--json", sys.argv[2]]) == 0
        for option in ("--plot", "--pyperf"):
            try:
                main(["--quick", option, sys.argv[2] + ".x"])
            except SystemExit as end:
                assert end.code == 2
            else:
                raise AssertionError(option)
        """,
        str(SCRIPTS),
        str(said),
    )
    run = json.loads(said.read_text(encoding="utf-8"))
    assert {point["id"] for point in run["points"]} == {"results/spans", "results/fill_bitmap"}
    assert "pip install" in run["skipped"]["results/as_u64"]
    assert any("pyperf is not installed" in line for line in run["warnings"])


def test_scripts_bench_can_be_run() -> None:
    """It is executable; that it parses is checked with the other scripts."""
    assert os.access(SCRIPTS / "bench", os.X_OK)
