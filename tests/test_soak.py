"""scripts/soak: each round comes again by its seed, and what a round is for, it finds."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import figures
import programs
import pytest
import soak
import storms
import test_injection
from children import in_child, plain, resources
from conftest import CHILD_SECONDS, Flavour, libc
from soak import ALLOWED, ATTACKS, MIB, Done, Round
from test_injection import Fault, Scene, Shim
from test_storms import forgets

from pagemapcompat import Cursor

COMMAND = (sys.executable, soak.__file__)
LINE = re.compile(r"round (\d+), seed (\d+): (.+)")
SMALL, ROUNDS = 2193, 26
"""A seed, and how many rounds from there are soon done."""


@pytest.fixture(scope="module")
def able() -> list[Flavour]:
    """The flavours that run here."""
    found, unable = soak.flavours_here()
    if not found:
        pytest.skip(f"no backend works here; remedy: {unable}")
    return found


@pytest.fixture(scope="module")
def short(able: list[Flavour]) -> list[str]:
    """What a short soak prints."""
    done = subprocess.run(
        [*COMMAND, "60", "--rounds", str(ROUNDS), "--seed", str(SMALL), "--verbose"],
        capture_output=True,
        text=True,
        timeout=10 * CHILD_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    lines = done.stdout.splitlines()
    whole = {name: int(numbers[-1]) for name, numbers in table(lines).items()}
    figures.add(
        "soak", {"rounds": whole["all"], "operations": whole["operations"], "writes": whole["writes accounted"]}
    )
    return lines


def table(lines: list[str]) -> dict[str, list[float]]:
    """The numbers of the summary, by the names of its lines."""
    (begin,) = (number for number, line in enumerate(lines) if line.startswith("rounds "))
    rows = (re.fullmatch(r"(.+?) +((?: *\d+\.?\d*)+)", line) for line in lines[begin + 1 : -1])
    return {row[1]: [float(number) for number in row[2].split()] for row in rows if row}


def attack_only(monkeypatch: pytest.MonkeyPatch, function: Callable[[], object]) -> None:
    """Every round is this, and nothing else."""

    def attack(_round: Round) -> Done:
        function()
        return Done(1, 1, 1)

    monkeypatch.setattr(soak, "ATTACKS", {"deed": attack})


# ---- What it says --------------------------------------------------------------------------------------------------


def test_a_short_soak_finds_nothing(short: list[str]) -> None:
    """Its summary counts each round, each attack did something, and the process that stays is judged."""
    rounds = list(filter(None, map(LINE.fullmatch, short)))
    assert [(int(one[1]), int(one[2])) for one in rounds] == [(number + 1, SMALL + number) for number in range(ROUNDS)]
    rows = table(short)
    assert rows["all"] == [*(sum(one[3].startswith(name) for one in rounds) for name in ATTACKS), ROUNDS]
    for name in ("operations", "writes accounted", "pages reported"):
        assert min(rows[name]) > 0
        assert sum(rows[name][:-1]) == rows[name][-1]
    stayed = sum("process that stays" in one[3] for one in rounds)
    assert f"{stayed} rounds in one process" in "\n".join(short)
    for name in ALLOWED:
        early, late, most = rows[name]
        assert max(early, late) <= most
    assert short[-1] == f"0 findings in {ROUNDS} rounds; next seed {SMALL + ROUNDS}"


def test_a_seed_repeats_a_round(short: list[str]) -> None:
    """And goes on from there."""
    rounds = [one[3] for one in map(LINE.fullmatch, short) if one]
    first = next(number for number, what in enumerate(rounds[:-1]) if what.startswith("program"))
    done = subprocess.run(
        [*COMMAND, "60", "--rounds", "2", "--seed", str(SMALL + first), "--verbose"],
        capture_output=True,
        text=True,
        timeout=10 * CHILD_SECONDS,
        check=True,
    )
    again = [one[3] for one in map(LINE.fullmatch, done.stdout.splitlines()) if one]
    assert again == rounds[first : first + 2]


def test_a_seed_says_all(able: list[Flavour]) -> None:
    """The same seed is the same round, mix and program; with all of them every flavour is attacked."""

    def drawn(seed: int) -> tuple[object, ...]:
        return (
            Round.draw(seed, able),
            storms.draw(seed),
            programs.draw(seed, 300, ["private"]),
            soak.model_steps(seed),
        )

    seeds = range(150)
    assert [drawn(seed) for seed in seeds[:30]] == [drawn(seed) for seed in seeds[:30]]
    rounds = [Round.draw(seed, able) for seed in seeds]
    assert {one.attack for one in rounds} == set(ATTACKS)
    assert {flavour for one in rounds for flavour in one.flavours} == set(able)
    assert {len(one.flavours) for one in rounds if one.attack == "program"} == {min(2, len(able))}
    assert {one.stays for one in rounds if one.attack not in soak.APART} == {True, False}
    assert not any(one.stays for one in rounds if one.attack in soak.APART)


def test_a_seed_plays_the_same_faults(able: list[Flavour]) -> None:
    """In the same scenes."""
    chosen = next(one for one in (Round.draw(seed, able) for seed in range(SMALL, SMALL + 99)) if one.attack == "fault")
    played: list[tuple[str, str]] = []
    play = test_injection.play

    def note(shim: Shim, flavour: Flavour, kind: str, scene: Scene, fault: Fault | None) -> Counter[str]:
        played.append((scene.__name__, str(fault)))
        return play(shim, flavour, kind, scene, fault)

    def twice() -> None:
        test_injection.play = note
        soak.fault(chosen)
        soak.fault(chosen)
        assert len(played) == 4 * soak.FAULTS
        assert played[: len(played) // 2] == played[len(played) // 2 :]

    in_child(twice)


def test_an_interrupt_ends_it_with_the_summary(able: list[Flavour]) -> None:
    """And with every process that it made: what it prints into has an end."""
    with subprocess.Popen(
        [*COMMAND, "60", "--seed", str(SMALL), "--verbose"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout
        assert any(line.startswith("round 3, ") for line in running.stdout)
        running.send_signal(signal.SIGINT)
        rest, errors = running.communicate(timeout=10 * CHILD_SECONDS)
    assert (running.returncode, errors) == (130, "")
    assert "writes accounted" in rest
    assert re.fullmatch(r"0 findings in \d+ rounds; next seed \d+", rest.splitlines()[-1])


@pytest.mark.usefixtures("able")
def test_it_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And with which seed it can go on from there; until the time is over."""
    attack_only(monkeypatch, int)
    monkeypatch.setattr(soak, "PROGRESS_SECONDS", 0)
    assert soak.main(["60", "--rounds", "2", "--seed", "5"]) == 0
    assert re.findall(r"^\d+ min: (.+)$", capsys.readouterr().out, re.MULTILINE) == [
        f"{number} rounds (deed {number}), {number} operations, {number} writes accounted for, 0 findings; "
        f"next seed {5 + number}"
        for number in (1, 2)
    ]
    assert soak.main(["0"]) == 0
    assert "0 findings in 0 rounds" in capsys.readouterr().out


def test_without_minutes_it_says_what_it_wants() -> None:
    """Before it sets up anything."""
    script = Path(__file__).parent.parent / "scripts" / "soak"
    done = subprocess.run(["bash", script, "--rounds"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("usage: scripts/soak MINUTES ")


def test_with_no_backend_there_is_nothing_to_do() -> None:
    """It says why, and exits with 2."""
    done = subprocess.run(
        [*COMMAND, "60"],
        env={**os.environ, "PAGEMAPCOMPAT_DISABLE": "pagemap-scan,uffd-wp"},
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "")
    assert re.search("^not here: uffd-wp: .*; remedy: unset PAGEMAPCOMPAT_DISABLE", done.stdout, re.MULTILINE)


# ---- What it finds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.usefixtures("able")
def test_a_lost_write_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], attack: str
) -> None:
    """By each attack, and again by the command that is printed."""
    forgets.calls = 0
    if attack == "end":  # whose number of collects depends on when its writers sleep
        monkeypatch.setattr(forgets, "every", 1)
    monkeypatch.setattr(Cursor, "taken", Cursor.collect, raising=False)
    monkeypatch.setattr(Cursor, "collect", forgets)
    monkeypatch.setattr(soak, "ATTACKS", {attack: ATTACKS[attack]})
    assert soak.main(["60", "--rounds", "40", "--seed", "1"]) == 1
    said = capsys.readouterr().out
    assert re.search(rf"^FINDING: seed \d+: {attack}, ", said, re.MULTILINE)
    assert re.search(r"AssertionError|not reported|missed", said)
    (repeat,) = re.findall("^repeat it: scripts/soak (.+)$", said, re.MULTILINE)
    assert soak.main(repeat.split()) == 1
    assert f"FINDING: seed {repeat.split()[-1]}: {attack}, " in capsys.readouterr().out


def open_one() -> None:
    """A descriptor."""
    os.open("/dev/null", os.O_RDONLY)


def start_one() -> None:
    """A thread."""
    threading.Thread(target=signal.sigwait, args=([signal.SIGUSR1],), daemon=True).start()


def map_some() -> None:
    """Mappings, which cannot be merged."""
    for protection in (libc.PROT_NONE, libc.PROT_READ) * 2:
        libc.mmap(MIB // 16, protection)


def map_much() -> None:
    """Addresses without memory."""
    libc.mmap(16 * MIB, libc.PROT_NONE)


def fill() -> None:
    """Memory that malloc knows nothing of."""
    libc.fill(libc.mmap(MIB), MIB)


def allocate() -> None:
    """Memory that nobody has touched yet."""
    plain.malloc(MIB // 2)


@pytest.mark.parametrize(
    ("leak", "name"),
    list(zip((open_one, start_one, map_some, map_much, fill, allocate), ALLOWED, strict=True)),
    ids=lambda what: getattr(what, "__name__", ""),
)
@pytest.mark.usefixtures("able")
def test_a_leak_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], leak: Callable[[], object], name: str
) -> None:
    """Of each kind, and by its name."""
    attack_only(monkeypatch, leak)
    assert soak.main(["60", "--rounds", "40", "--seed", "1"]) == 1
    said = capsys.readouterr().out
    assert re.search(rf"^FINDING: {name} grew from [\d.]+ to [\d.]+ in \d+ rounds", said, re.MULTILINE)
    assert "repeat it: scripts/soak 1 --rounds 40 --seed 1\n" in said


@pytest.mark.usefixtures("able")
def test_what_is_given_back_is_no_leak(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A round may take as much as it likes."""

    def borrow() -> None:
        os.close(os.open("/dev/null", os.O_RDONLY))
        at = libc.mmap(64 * MIB)
        libc.fill(at, 8 * MIB)
        libc.munmap(at, 64 * MIB)
        bytearray(8 * MIB)

    attack_only(monkeypatch, borrow)
    assert soak.main(["60", "--rounds", "40", "--seed", "1"]) == 0
    rows = table(capsys.readouterr().out.splitlines())
    assert rows["descriptors"][0] == rows["descriptors"][2]


@pytest.mark.usefixtures("able")
def test_a_hang_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the place of every thread; the next round has a process to run in, and in the end nothing is left."""
    before = resources()[0]

    def waits_beside() -> None:
        threading.Event().wait()

    def waits_for_ever() -> None:
        threading.Thread(target=waits_beside, daemon=True).start()
        threading.Event().wait()

    attack_only(monkeypatch, waits_for_ever)
    monkeypatch.setattr(soak, "ROUND_SECONDS", 1)
    stays = next(
        seed for seed in range(100) if all(Round.draw(seed + one, soak.flavours_here()[0]).stays for one in (0, 1))
    )
    assert soak.main(["60", "--rounds", "2", "--seed", str(stays), "--keep-going"]) == 1
    said = capsys.readouterr().out
    for what in ("the child hung for 1 s", "in waits_beside", "in waits_for_ever"):
        assert said.count(what) == 2
    assert f"\n2 findings in 2 rounds; next seed {stays + 2}\n" in said
    assert resources()[0] == before


@pytest.mark.usefixtures("able")
def test_a_crash_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the place of it."""

    def stores_nowhere() -> None:
        libc.fill(8)

    attack_only(monkeypatch, stores_nowhere)
    assert soak.main(["60", "--rounds", "4", "--seed", "1"]) == 1
    said = capsys.readouterr().out
    assert f"the child ended with {-signal.SIGSEGV}" in said
    assert "in stores_nowhere" in said


@pytest.mark.usefixtures("able")
def test_an_error_that_python_only_prints_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a destructor."""

    class Bad:
        def __del__(self) -> NoReturn:
            raise ValueError("told to nobody")

    attack_only(monkeypatch, Bad)
    assert soak.main(["60", "--rounds", "4", "--seed", "1"]) == 1
    assert "ValueError('told to nobody')" in capsys.readouterr().out
