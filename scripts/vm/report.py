"""What a guest found against what tests/kernels.toml expects of it, and the support matrix."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vm.qemu import Guest

USERS = ("root", "nobody")
RESOURCES = {"root": ["swap", "hugetlb", "io-uring", "ksm"], "nobody": ["swap", "hugetlb", "io-uring"]}
"""What each guest gives its tests, so that nothing there may be missed for the lack of it."""
GUARANTEES = ("EXACT", "ATOMIC_COLLECT", "KERNEL_WRITES", "DISCARDS", "NO_HELPER_THREAD")
REMARKS = ("WARNING", "INFO", "BUG: workqueue", "BUG: soft lockup")
"""Complaints that an overloaded emulator brings about as well."""
BEGIN, END = "<!-- matrix, by scripts/vm_matrix --write -->", "<!-- end of matrix -->"


@attrs.frozen
class Kernel:
    """One entry of tests/kernels.toml."""

    name: str
    package: str
    yes: list[str]
    no: list[str]
    root: dict[str, str]
    nobody: dict[str, str]
    denied: list[str] = attrs.field(factory=list)
    disable: list[str] = attrs.field(factory=list)
    expect: list[str] = attrs.field(factory=list)
    refuse_ioctls: bool = False
    about: str = ""

    def states(self, who: str) -> dict[str, str]:
        """What each feature must be answered."""
        named = {**dict.fromkeys(self.yes, "yes"), **dict.fromkeys(self.no, "no")}
        if who == "nobody":
            named |= dict.fromkeys(self.denied, "denied")
        return named | dict.fromkeys(self.disable, "disabled")

    def backends(self, who: str) -> dict[str, set[str]]:
        """The backends that must work, and what each must guarantee."""
        named = self.root if who == "root" else self.nobody
        return {name: set(guarantees.split()) for name, guarantees in named.items()}

    def settings(self, options: list[str]) -> dict[str, Any]:
        """What `guest` reads."""
        expect = {
            who: [
                *(name for name, state in self.states(who).items() if state == "yes"),
                *self.backends(who),
                *RESOURCES[who],
                *self.expect,
            ]
            for who in USERS
        }
        return {
            "disable": self.disable,
            "refuse_ioctls": self.refuse_ioctls,
            "expect": expect,
            "pytest": options,
        }


@attrs.frozen
class Half:
    """What one user found in one guest."""

    who: str
    found: dict[str, Any]
    tests: dict[tuple[str, str | None], tuple[str, str]]
    """(outcome, why) by (test, backend)."""
    collected: int | None
    last: str | None
    """What ran last."""
    status: int | None
    """Of pytest; None if it did not come to its end."""
    exit: int | None
    """Of the process."""
    cpu: int

    @classmethod
    def of(cls, guest: Guest, who: str) -> Half:
        """Its events, put together."""
        events = [event for event in guest.events if event.get("who") == who]
        found: dict[str, Any] = {"release": "?", "features": {}, "backends": {}}
        tests: dict[tuple[str, str | None], tuple[str, str]] = {}
        collected = last = status = code = None
        cpu = 0
        for event in events:
            if "features" in event:
                found = event
            elif "starts" in event:
                last = event["starts"]
            elif "test" in event:
                key = event["test"], event["backend"]
                if tests.get(key, ("passed", ""))[0] != "failed":  # a tear-down does not mend a test
                    tests[key] = event["outcome"], event["why"]
            elif "collected" in event:
                collected = event["collected"]
            elif "status" in event:
                status, cpu = event["status"], event["cpu"]
            elif "exit" in event:
                code = event["exit"]
        return cls(who, found, tests, collected, last, status, code, cpu)

    def counts(self, backend: str | None) -> Counter[str]:
        """Tests by outcome; None for those that are no backend's."""
        return Counter(outcome for (_, of), (outcome, _) in self.tests.items() if of == backend)

    def skips(self, backend: str | None) -> Counter[str]:
        """Why tests were skipped, and how many."""
        return Counter(why for (_, of), (outcome, why) in self.tests.items() if of == backend and outcome == "skipped")


def judge(kernel: Kernel, guest: Guest) -> list[str]:
    """What is wrong."""
    wrong = [f"the kernel itself: {line}" for line in kernel_complaints(guest) if not line.startswith(REMARKS)]
    halves = [Half.of(guest, who) for who in USERS]
    if not guest.over:
        running = " and ".join(f"{half.last} as {half.who}" for half in halves if half.exit is None and half.last)
        wrong.append(f"it {'hung' if guest.hung else 'panicked or stopped'} in {running or 'no test'}{_end(guest)}")
    for half in halves:
        about = [*_run(half, guest)]
        if half.found["features"]:
            about += [*_features(kernel, half), *_backends(kernel, half)]
        wrong += [f"as {half.who}: {text}" for text in about]
    return wrong


def _run(half: Half, guest: Guest) -> Iterator[str]:
    yield from (f"{test}\n{why}" for (test, _), (outcome, why) in half.tests.items() if outcome == "failed")
    if half.status:
        yield f"pytest ended with {half.status}"
    if half.exit is None and not guest.over:
        return
    if half.status is None or half.exit != 0 or not half.found["features"]:
        yield f"its process ended with {half.exit}{f' in {half.last}' if half.last else ''}{_end(guest)}"
    elif half.collected != len({test for test, _ in half.tests}):
        yield f"{half.collected} tests were collected, and {len(half.tests)} told of"


def _end(guest: Guest) -> str:
    tail = "\n".join(guest.console.splitlines()[-40:])
    return f"; the console ends\n{tail}"


def _features(kernel: Kernel, half: Half) -> Iterator[str]:
    found = half.found["features"]
    for name, state in kernel.states(half.who).items():
        # What needs something that is not there is unknown, and so not there.
        if found.get(name) not in ({"no", "unknown"} if state == "no" else {state}):
            yield f"{name} is {found.get(name)}, not {state}"


def _backends(kernel: Kernel, half: Half) -> Iterator[str]:
    expected, found = kernel.backends(half.who), half.found["backends"]
    for name, answer in found.items():
        if name not in expected and isinstance(answer, list):
            yield f"{name} works, which nobody expected"
    for name, guarantees in expected.items():
        answer = found.get(name)
        if not isinstance(answer, list) or set(answer) != guarantees:
            yield f"{name} guarantees {answer}, not {sorted(guarantees)}"
        if half.status is not None and not half.counts(name)["passed"]:
            yield f"no test of {name} passed"


def kernel_complaints(guest: Guest) -> list[str]:
    """What the kernel said of itself."""
    return sorted(set(re.findall(r"(?:WARNING|BUG|Oops|general protection fault|INFO: task)[: ].*", guest.console)))


# ---- The matrix ------------------------------------------------------------------------------------------------


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(map(_row, [head, ["---"] * len(head), *rows]))


def _cell(root: str, nobody: str) -> str:
    """One feature on one kernel."""
    short = {"no": "-", "unknown": "-", "disabled": "off"}
    one, two = short.get(root, root), short.get(nobody, nobody)
    if one == two:
        return one
    return "root" if (one, two) == ("yes", "denied") else f"{one}, nobody: {two}"


def _column(kernel: Kernel, guest: Guest) -> str:
    release = Half.of(guest, "root").found["release"]
    return release if release.startswith(kernel.name) else f"{kernel.name} ({release})"


def feature_table(guests: dict[str, tuple[Kernel, Guest]]) -> str:
    """Features by kernel."""
    halves = [[Half.of(guest, who).found["features"] for who in USERS] for _, guest in guests.values()]
    names = list(dict.fromkeys(name for pair in halves for half in pair for name in half))
    head = ["feature", *(_column(*pair) for pair in guests.values())]
    return _table(
        head, [[name, *(_cell(*(half.get(name, "?") for half in pair)) for pair in halves)] for name in names]
    )


def test_table(guests: dict[str, tuple[Kernel, Guest]], unserved: list[str]) -> str:
    """Guarantees and tests by kernel, user and backend."""
    rows = []
    for kernel, guest in guests.values():
        for who in USERS:
            half = Half.of(guest, who)
            for backend in ("pagemap-scan", "uffd-wp", None):
                counts = half.counts(backend)
                answer = half.found["backends"].get(backend, []) if backend else []
                promises = " ".join(name for name in GUARANTEES if name in answer)
                numbers = [str(counts[outcome]) for outcome in ("passed", "failed", "skipped")]
                why = _reasons(half.skips(backend))
                if isinstance(answer, str):
                    promises, numbers, why = "not there", ["-", "-", "all"], answer.partition("\n")[0]
                rows.append([_column(kernel, guest), who, backend or "neither", promises, *numbers, why])
    rows += [
        [f"**{name}**", "", "", "**NO SUITE SERVES THIS KERNEL ANY MORE: not run**", "", "", "", ""]
        for name in unserved
    ]
    return _table(["kernel", "as", "backend", "guarantees", "passed", "failed", "skipped", "why skipped"], rows)


def _reasons(skips: Counter[str]) -> str:
    short = Counter[str]()
    for why, count in skips.items():
        short[why.partition("; remedy")[0].replace("|", "/")] += count
    return "; ".join(f"{count}: {why}" for why, count in short.most_common())


def matrix(guests: dict[str, tuple[Kernel, Guest]], unserved: list[str], notes: dict[str, str] | None = None) -> str:
    """All of it, in Markdown. *notes*: on kernels, by name."""
    about = [(kernel.name, kernel.about) for kernel, _ in guests.values() if kernel.about]
    notes = [f"{name}: {text}." for name, text in [*about, *(notes or {}).items()]]
    return "\n\n".join([feature_table(guests), *notes, test_table(guests, unserved)])


def put_into(text: str, table: str) -> str:
    """A document with its matrix replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no line {BEGIN} followed by {END}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"
