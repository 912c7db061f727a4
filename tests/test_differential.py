"""The same random programs on both engines and on the generations that they imitate, against one model."""

from __future__ import annotations

import os
from collections.abc import Callable

import figures
import programs
import pytest
from children import in_child
from conftest import FLAVOURS, HUGE, Flavour, Lacking, expected, lacking, libc, need_shared, rounds
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from pagemapcompat import Feature, probe

EXAMPLES = os.environ.get("PAGEMAPCOMPAT_TEST_EXAMPLES")
"""How many programs each test tries, other ones each time; without it, few, and always the same."""
TOGETHER = {
    "newest": ("pagemap-scan", "uffd-wp"),
    "6.5 to 6.7": ("pagemap-scan-as-6.7", "uffd-wp-as-6.5"),
    "oldest": ("uffd-wp-as-6.1", "uffd-wp-as-5.10"),
}
"""Flavours that run side by side."""
EFFECTIVE = "random programs, operations that took effect"


@pytest.fixture(autouse=True)
def lacks(swap: Lacking | None, ksm: Lacking | None) -> dict[str, Lacking | None]:
    """What operations lack here, by name. Swap and ksmd are there for as long as a program runs."""
    guards: Lacking | None = "madv-guard", "this kernel has no guard pages (EINVAL)", "Linux 6.13 or newer"
    return {
        "swap_out": swap,
        "merge": ksm,
        "collapse": no_collapse(),
        **dict.fromkeys(("bar", "open"), None if probe().supports(Feature.MADV_GUARD) else guards),
    }


def no_collapse() -> Lacking | None:
    """What MADV_COLLAPSE lacks."""
    at = libc.mmap(2 * HUGE)
    try:
        libc.fill(at, 2 * HUGE)
        libc.madvise(-(-at // HUGE) * HUGE, HUGE, programs.COLLAPSE)
    except OSError as error:
        return "thp-collapse", f"refused ({error.strerror})", "Linux 6.1 or newer, with CONFIG_TRANSPARENT_HUGEPAGE"
    finally:
        libc.munmap(at, 2 * HUGE)
    return None


def count(counts: programs.Counts) -> None:
    """Add what a program did to the figures of the run."""
    done = {
        "programs": 1,
        "operations": counts.operations,
        "pages written": counts.written,
        "pages reported": counts.reported,
    }
    figures.add("random programs", done)
    figures.add(EFFECTIVE, counts.effects)
    figures.add("random programs, advice refused", counts.refused)


class Machine(RuleBasedStateMachine):
    """A program, of which Hypothesis chooses the steps. Its rules are the operations."""

    flavours: list[Flavour]
    kind: str
    program: programs.Program | None = None

    @initialize(policy=st.sampled_from(programs.POLICIES))
    def begin(self, policy: str) -> None:
        """With memory that is tracked, and empty."""
        self.program = programs.Program(self.flavours, self.kind, policy)

    def teardown(self) -> None:
        """Nothing is left, in the end."""
        if self.program:
            try:
                if not self.program.failed:
                    self.program.finish()
                    count(self.program.counts)
            finally:
                self.program.close()


def _rule(operation: str) -> Callable[..., None]:
    def apply(self: Machine, first: int, size: int, value: int) -> None:
        assert self.program
        self.program.step(programs.make_step(operation, self.kind, first, size, value))

    apply.__name__ = operation
    numbers = st.integers(0, 255)
    return rule(first=st.integers(0, 1023), size=st.sampled_from(programs.SPANS), value=numbers)(apply)


# As often as an operation shall be chosen, so many rules it has.
for name, weight in programs.OPERATIONS.items():
    for number in range(weight):
        setattr(Machine, f"{name}_{number}", _rule(name))


def explore(flavours: list[Flavour], kind: str, examples: int, steps: int) -> None:
    """Try so many programs. What is found is shrunk."""
    run_state_machine_as_test(
        type("Machine", (Machine,), {"flavours": flavours, "kind": kind}),
        settings=settings(
            max_examples=int(EXAMPLES or examples),
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=EXAMPLES is None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        ),
    )


def partners(names: tuple[str, ...], kind: str) -> list[Flavour]:
    """Those that run here; skips where there are none, and fails where one was expected."""
    named = [one for one in FLAVOURS if one.name in names]
    found = programs.able(named, kind)
    if not found and kind == "shared":
        need_shared()
    for one in named:
        if not found or (one not in found and one.name in expected()):
            lacking(one.backend, f"it does not track {kind} memory here", "pagemapcompat probe says")
    return found


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["private", "shared"])
def test_a_few_programs(kind: str) -> None:
    """On every kernel. By seeds, for the first programs that Hypothesis makes are the simplest, and write nothing."""
    flavours = partners(TOGETHER["newest"], kind)

    def check() -> None:
        done = [programs.run(seed, flavours, 60, [kind]) for seed in range(rounds(20))]
        for counts in done:
            count(counts)
        assert sum(counts.written for counts in done) > len(done)
        assert sum(counts.reported for counts in done) > len(done)

    in_child(check)


@pytest.mark.parametrize("kind", programs.PAGES)
@pytest.mark.parametrize("names", TOGETHER.values(), ids=TOGETHER)
def test_many_programs(names: tuple[str, ...], kind: str) -> None:
    """More than there is time for in a guest."""
    in_child(
        explore, partners(names, kind), kind, 25 if kind == "huge" else 70, 40, seconds=max(600, 4 * int(EXAMPLES or 0))
    )


@pytest.mark.parametrize("operation", programs.OPERATIONS)
def test_each_operation_took_effect(operation: str, lacks: dict[str, Lacking | None]) -> None:
    """In one of the programs above at least: none of them is a test of nothing."""
    took = figures.sums().get(EFFECTIVE)
    if not took:
        pytest.skip("no program has run; remedy: run this file as a whole")
    if lack := lacks.get(operation):
        lacking(*lack)
    assert took[operation] > 0


@pytest.mark.parametrize("names", [("uffd-wp",), ("pagemap-scan",)], ids=lambda names: names[0])
def test_a_program_can_be_run_by_its_number(names: tuple[str, ...]) -> None:
    """What it does is said by its seed alone."""
    able = partners(names, "private")

    def twice() -> None:
        one, same, other = (programs.run(seed, able, 60, ["private"]) for seed in (3, 3, 4))
        assert one == same != other
        assert one.operations == 60
        assert one.written
        assert one.reported

    in_child(twice)
