"""Each write is numbered and each number accounted for, whoever writes and collects; nobody starves."""

from __future__ import annotations

import os
from collections.abc import Callable

import attrs
import figures
import pytest
from children import in_child
from conftest import PAGE, Flavour, flavours, lacking
from storms import (
    BY_KERNEL,
    MEMORIES,
    TROUBLES,
    WRITERS,
    Counts,
    Finding,
    Mix,
    Reader,
    Storm,
    draw,
    drawn,
    lacking_for,
    library,
    reduced,
)

from pagemapcompat import Cursor, ScanResult


def account(counts: Counts) -> None:
    """All that was written was reported."""
    assert counts.accounted == counts.writes > 0
    assert counts.collects > 0
    figures.add(
        "storms",
        {
            "storms": 1,
            "writes": counts.writes,
            "writes accounted for": counts.accounted,
            "collects": counts.collects,
            "pages reported": counts.pages,
            "faults": counts.faults,
            "interrupts": counts.interrupts,
        },
    )


def run(
    flavour: Flavour, mix: Mix, seed: int, rounds: int, phases: int = 1, check: Callable[[Counts], object] = str
) -> None:
    """A storm, in a child; all that it wrote is accounted for."""
    play(Storm(flavour, mix, seed), rounds, phases, check)


def play(storm: Storm, rounds: int, phases: int, check: Callable[[Counts], object] = str) -> None:
    """The same. It may take as long as it gets on."""
    library()  # compiled once, not in every child

    def go() -> None:
        counts = storm.run(rounds, phases)
        account(counts)
        check(counts)

    in_child(go, progress=storm.progress)


def exactly(flavour: Flavour, mix: Mix) -> Mix:
    """A mix, or a skip where part of it cannot be had."""
    for name, why in lacking_for(flavour, mix).items():
        reason, _, remedy = why.partition(": ")
        lacking(name, reason, remedy)
    return mix


@pytest.mark.parametrize("writer", WRITERS)
def test_each_write_of_each_kind_is_reported_by_itself(flavour: Flavour, writer: str) -> None:
    """A page is written anew only once its last number is accounted for: no later report stands in for a lost one."""
    run(flavour, exactly(flavour, Mix(writers=(writer,), handshake=True)), 1, 60)


@pytest.mark.parametrize("writers", [("store", "add", "signal", "held"), BY_KERNEL], ids=["threads", "kernel"])
def test_no_write_is_lost_at_full_speed(flavour: Flavour, writers: tuple[str, ...]) -> None:
    """By two cursors, each read by two threads."""
    run(flavour, exactly(flavour, Mix(writers=writers, readers=2, hands=2)), 2, 20)


@pytest.mark.parametrize("memory", MEMORIES)
def test_all_kinds_at_once(flavour: Flavour, memory: str) -> None:
    """Among mappings that split, pages that are barred and discarded, and children that are forked."""
    mix = Mix(memory=memory, pages=256, writers=WRITERS, readers=2, troubles=TROUBLES, snapshots=True)
    if memory in lacking_for(flavour, mix):
        exactly(flavour, Mix(memory=memory))
    run(flavour, reduced(flavour, mix), 3, 8, phases=2)


@pytest.mark.parametrize("seed", range(2))
def test_random_storms(flavour: Flavour, seed: int) -> None:
    """Mixes that nobody thought of."""
    play(drawn(flavour, seed), 12, 4)


@pytest.mark.parametrize("cpus", [1, 2])
def test_nobody_starves(flavour: Flavour, cpus: int) -> None:
    """Between several pairs of collects of each reader each writer wrote; on one CPU too, where all take turns.

    A storm lasts until everybody got as far as it goes, so one that starves is a child that hangs.
    """
    mix = reduced(flavour, Mix(writers=("store", "held", "add", "read"), pages=128, readers=2))

    def fair(counts: Counts) -> None:
        assert min(counts.by_writer) >= 50
        assert min(counts.gaps) > 5
        figures.add(
            f"fairness on {cpus} CPU, {flavour.name}",
            {
                "collects": counts.collects // mix.readers,
                "of them with news of the slowest writer": min(counts.gaps),
                "writes by it": min(counts.by_writer),
            },
        )

    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:cpus])  # which its threads and children inherit
    try:
        run(flavour, mix, 5, 50, check=fair)
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("flavour", flavours("uffd-wp")[:1], indirect=True)
def test_a_writer_that_starves_is_found(flavour: Flavour, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much the others write and collect meanwhile."""
    storm = Storm(flavour, reduced(flavour, Mix(writers=("store", "held"))), 9)
    monkeypatch.setattr(Storm, "hold", lambda *_: None)
    library()
    with pytest.raises(AssertionError, match="the child hung for 1 s"):
        in_child(storm.run, 20, seconds=1, progress=storm.progress)
    assert storm.progress() > 20


@pytest.mark.parametrize("handshake", [False, True], ids=["free", "handshake"])
def test_keyboard_interrupts_lose_nothing(flavour: Flavour, handshake: bool) -> None:
    """SIGINT at random moments, sent by another process: what an interrupted collect took comes with a later one."""

    def interrupted(counts: Counts) -> None:
        assert counts.interrupts > 6

    mix = Mix(writers=("store", "held", "read", "signal"), readers=2, handshake=handshake, interrupts=True)
    run(flavour, reduced(flavour, mix), 6, 60, check=interrupted)


# ---- A storm sees what it is for --------------------------------------------------------------------------------


def forgets(cursor: Cursor, *where: int, **options: int) -> ScanResult:
    """As if what was written since the last collect were lost now and then."""
    forgets.calls += 1
    if forgets.calls % forgets.every == 0:
        cursor.reset(3 * PAGE, 5 * PAGE)
    return type(cursor).taken(cursor, *where, **options)


forgets.every = 5


def looks_then_resets(cursor: Cursor, *where: int, **options: int) -> ScanResult:
    """As if pages were read first, and protected in a second step."""
    result = cursor.peek(*where, **options)
    cursor.reset(*where[:1], (result.walk_end - cursor.range.start))
    return result


@pytest.mark.parametrize("collect", [forgets, looks_then_resets], ids=lambda collect: collect.__name__)
def test_a_lost_write_is_found(
    flavour: Flavour, monkeypatch: pytest.MonkeyPatch, collect: Callable[..., ScanResult]
) -> None:
    """And the message says which, and by which seed."""
    mix = reduced(flavour, Mix(writers=("store", "add", "held"), handshake=True))
    # What had begun when its page was reported counts as reported. If it is stored then, and lost, it is not there.
    how = r"written and not reported to reader 0: |reported to reader 0 and not there: \d+ instead of "

    def go() -> None:
        with pytest.raises(Finding, match=rf"seed 7, .* numbers were ({how})\d+ of \w+ in page \d+"):
            Storm(flavour, mix, 7).run(100_000)

    library()
    forgets.calls = 0
    monkeypatch.setattr(Cursor, "taken", Cursor.collect, raising=False)
    monkeypatch.setattr(Cursor, "collect", collect)
    in_child(go)


def test_a_lost_content_is_found(flavour: Flavour, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is reported and has another number than was written last."""
    mix = reduced(flavour, Mix(writers=("store", "held"), handshake=True))

    def go() -> None:
        note = Reader.note

        def spoil(reader: Reader, *what: object) -> None:
            note(reader, *what)
            reader.copy[5] = 99

        monkeypatch.setattr(Reader, "note", spoil)
        with pytest.raises(
            Finding, match=r"seed 8, .* numbers were reported to reader 0 and not there: 99 instead of \d"
        ):
            Storm(flavour, mix, 8).run(10)

    library()
    in_child(go)


def test_the_same_seed_draws_the_same_mix() -> None:
    """So that a finding can be seen again."""
    assert [draw(seed) for seed in range(50)] == [draw(seed) for seed in range(50)]
    assert len({attrs.astuple(draw(seed)) for seed in range(50)}) > 40
