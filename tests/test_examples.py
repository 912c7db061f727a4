"""scripts/examples: each runs on every backend, and what it says of its own answers is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import PAGE, Flavour, lacking, use_flavour

EXAMPLES = Path(__file__).parent.parent / "scripts" / "examples"
SECONDS = 300
"""Machines are slow and shared."""
BALL, SKY, GRASS = (0xC8, 0x28, 0x32), (0x87, 0xCE, 0xEB), (0x3A, 0x7D, 0x2C)


def example(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one, in a place that is not the checkout."""
    return subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *arguments],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def answer(name: str, *arguments: str | Path) -> str:
    """What one prints that finds everything right."""
    done = example(name, *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


def need_pillow() -> None:
    """Skip where Pillow is not installed."""
    if find_spec("PIL") is None:
        lacking("PIL", "not installed (ModuleNotFoundError)", "pip install -e '.[test]'")


# -- redraw ----------------------------------------------------------------------------------------------------


def test_redraw_shows_what_was_drawn(flavour: Flavour, tmp_path: Path) -> None:
    """The pictures show one whole ball each, at three places; less than half was copied, at two paces."""
    need_pillow()
    from PIL import Image

    out = tmp_path / "pictures"
    printed = answer("redraw", "--backend", flavour.backend, "--frames", "20", "--every", "6", "--out", out)
    assert printed.startswith(f"Backend {flavour.backend}, 20 frames")
    assert "After every update, the copy was equal to the memory." in printed
    assert sorted(path.name for path in out.iterdir()) == ["frame-001.png", "frame-010.png", "frame-020.png"]
    shares = {}
    for name, updates, copied, whole, share in re.findall(
        r"(Screen|Autosave): +(\d+) updates copied ([\d.]+) MiB of ([\d.]+), (\d+)%", printed
    ):
        shares[name] = (int(updates), int(share))
        assert abs(100 * float(copied) / float(whole) - int(share)) < 2
    assert shares["Screen"][0] == 20
    assert shares["Autosave"][0] == 4
    assert shares["Screen"][1] < 50
    pixels = []
    for path in sorted(out.iterdir()):
        with Image.open(path) as picture:
            assert (picture.format, picture.size) == ("PNG", (1024, 600))
            pixels.append(picture.convert("RGB").tobytes())
            colours = {colour: count for count, colour in picture.getcolors()}
        assert set(colours) == {BALL, SKY, GRASS}
        assert 3.1 * 31**2 < colours[BALL] < 3.2 * 32**2  # one disc: nothing is left where it was before
    assert len(set(pixels)) == 3


def test_redraw_names_a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --out the pictures go to a temporary directory, whose files it names."""
    need_pillow()
    use_flavour(Flavour("auto", "auto"), monkeypatch)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (line,) = (line for line in answer("redraw", "--frames", "1").splitlines() if line.endswith(".png"))
    path = Path(line.strip())
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.parent.parent == tmp_path


def test_redraw_says_how_to_get_pillow() -> None:
    """Where that is missing: one line, no traceback."""
    code = "import runpy, sys; sys.modules['PIL'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, EXAMPLES / "redraw.py"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "Pillow" in line
    assert "pip install 'pagemapcompat[demo]'" in line


# -- fuzzer ----------------------------------------------------------------------------------------------------


def test_fuzzer_restores_every_machine(flavour: Flavour) -> None:
    """Each input has its outcome in every round, and what is written back is what an execution wrote."""
    printed = answer("fuzzer", "--backend", flavour.backend, "--mib", "1", "--pages", "9", "--seconds", "0")
    for row in ("nothing restored", "all copied back", flavour.backend):
        assert re.search(rf"^{row} +\d+ executions/s ", printed, re.MULTILINE)
    assert " times copying; 9 pages written back\n" in printed
    assert "Every input had the outcome that it has on a fresh machine." in printed


def test_fuzzer_compares_every_backend_with_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, in one run: the rate of copying 64 MiB back, that of each backend for 256 pages, and their ratio."""
    for name in ("pagemap-scan", "uffd-wp"):
        use_flavour(Flavour(name, name), monkeypatch)
    printed, pages = answer("fuzzer", "--seconds", "0"), (64 << 20) // PAGE
    assert printed.startswith(f"A machine with 64 MiB. Each execution writes into 256 of its {pages} pages.")
    copying = re.search(r"^all copied back +(\d+) executions/s   not tracked$", printed, re.MULTILINE)
    rows = re.findall(
        r"^(pagemap-scan|uffd-wp) +(\d+) executions/s   (\d+\.\d) times copying; 256 pages written back$",
        printed,
        re.MULTILINE,
    )
    assert [name for name, _, _ in rows] == ["pagemap-scan", "uffd-wp"]
    for _, rate, times in rows:
        assert int(rate)
        assert float(times) == pytest.approx(int(rate) / int(copying[1]), rel=0.1, abs=0.06)
    assert printed.endswith("\nEvery input had the outcome that it has on a fresh machine.\n")


def test_fuzzer_notices_a_machine_that_is_not_fresh() -> None:
    """Its program under test has another outcome in the second round, if nothing is restored, or a page is not."""
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import fuzzer
        one = fuzzer.Fuzzer(1, 3, 0)
        fresh = one.memory[:]
        spared = one.inputs[0][0]
        def all_but_one():
            one.memory[:spared], one.memory[spared + 1:] = fresh[:spared], fresh[spared + 1:]
        def everything():
            one.memory[:] = fresh
        seen = []
        for restore in (everything, all_but_one, everything, lambda: None):
            one.memory[:] = fresh
            seen.append(len(one.run(restore)[1]))
        print(seen)
    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line[8:] for line in code.splitlines()), EXAMPLES],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[1, 2, 1, 2]\n", "")


# -- collector -------------------------------------------------------------------------------------------------


def counts(printed: str) -> list[str]:
    """Everything but the backend's name and the times: what must be the same in every run."""
    return re.sub(r"^Backend [\w-]+,|[\d.]+ ms", "", printed, flags=re.MULTILINE).splitlines()


@pytest.mark.parametrize("freely", [(), ("--freely",)], ids=["in turns", "freely"])
def test_collector_loses_nothing(flavour: Flavour, freely: tuple[str, ...]) -> None:
    """Whether the program and the collector take turns or run as they like: garbage is freed, objects never."""
    printed = answer("collector", "--backend", flavour.backend, *freely)
    assert printed.startswith(f"Backend {flavour.backend}, ")
    collections = re.findall(r"looked again at ([\d, ]+) pages", printed)
    freed = [int(number) for number in re.findall(r"^  (\d+) freed; .* 0 lost$", printed, re.MULTILINE)]
    assert len(collections) == len(freed) == 3
    assert all(freed)
    if not freely:
        for rounds in collections:
            first, *_, last = map(int, rounds.split(", "))
            assert last <= 8 < first
    assert printed.endswith("\nNothing was lost.\n")


def test_collector_loses_objects_without_write_watch(flavour: Flavour) -> None:
    """Always the same ones: this is what the pages written meanwhile are for."""
    runs = [example("collector", "--backend", flavour.backend, "--without-write-watch") for _ in range(2)]
    assert [(done.returncode, done.stderr) for done in runs] == [(1, ""), (1, "")]
    first, second = (counts(done.stdout) for done in runs)
    assert first == second
    assert "looked again" not in runs[0].stdout
    assert int(re.search(r"; (\d+) lost$", runs[0].stdout, re.MULTILINE)[1]) > 100
    assert runs[0].stdout.endswith("LOST.\n")


def test_collector_gets_the_same_from_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """In turns, page for page."""
    for name in ("pagemap-scan", "uffd-wp"):
        use_flavour(Flavour(name, name), monkeypatch)
    one, other = (counts(answer("collector", "--backend", name)) for name in ("pagemap-scan", "uffd-wp"))
    assert one == other


# -- All of them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["redraw", "fuzzer", "collector"])
def test_an_example_says_why_it_cannot_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no backend left: the reason, the remedy, and failure."""
    if name == "redraw":
        need_pillow()
    monkeypatch.setenv("PAGEMAPCOMPAT_DISABLE", "pagemap-scan,uffd-wp")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = example(name)
    assert (done.returncode, done.stderr) == (1, "")
    assert "work here: " in done.stdout
    assert "remedy: unset PAGEMAPCOMPAT_DISABLE" in done.stdout
    assert list(tmp_path.iterdir()) == []
