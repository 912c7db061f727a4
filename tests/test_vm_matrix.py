"""The matrix of kernels tells a library that fails from a machine that cannot, and a hang from a wait."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest

from pagemapcompat import Feature, Guarantee
from pagemapcompat.probe import BACKEND_NAMES

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

from vm import __main__, archive, initramfs, machine, qemu, report  # noqa: E402 - after its folder is on the path

ENTRIES = tomllib.loads((ROOT / "tests/kernels.toml").read_text(encoding="utf-8"))["kernel"]
SECONDS = 60
KERNEL = report.Kernel(
    name="9.9",
    package="linux-image-9.9",
    yes=["pagemap", "uffd-syscall"],
    no=["pagemap-scan"],
    denied=["uffd-syscall"],
    root={"uffd-wp": "EXACT DISCARDS"},
    nobody={"uffd-wp": "EXACT"},
)


def events(who: str, **changes: Any) -> list[dict[str, Any]]:
    """What a guest says in which all is well, but for *changes*."""
    said = {
        "release": "9.9.1",
        "features": {
            "pagemap": "yes",
            "uffd-syscall": "yes" if who == "root" else "denied",
            "pagemap-scan": "no",
            "pagemap-scan-holes": "unknown",
        },
        "backends": {
            "uffd-wp": ["DISCARDS", "EXACT"] if who == "root" else ["EXACT"],
            "pagemap-scan": "ENOTTY: there is none",
        },
        "tests": [
            ("test_a", "uffd-wp", "passed", ""),
            ("test_b", "uffd-wp", "skipped", "swap: no swap; remedy: swapon"),
            ("test_c", None, "passed", ""),
        ],
        "status": 0,
        "exit": 0,
    }
    said |= changes
    told: list[dict[str, Any]] = [{key: said[key] for key in ("release", "features", "backends")}]
    told.append({"collected": said.get("collected", len(said["tests"]))})
    for test, backend, outcome, why in said["tests"]:
        told += [{"starts": test}, {"test": test, "backend": backend, "outcome": outcome, "why": why}]
    if said["status"] is not None:
        told.append({"status": said["status"], "cpu": 7})
    if said["exit"] is not None:
        told.append({"exit": said["exit"]})
    return [{"who": who, **event} for event in told]


def guest(root: dict[str, Any] | None = None, nobody: dict[str, Any] | None = None) -> qemu.Guest:
    """One that came to its end."""
    told = events("root", **(root or {})) + events("nobody", **(nobody or {}))
    return qemu.Guest("a console", [*told, {"over": True}], hung=False)


def test_all_is_well() -> None:
    """Nothing is wrong, and each cell is where it belongs."""
    assert report.judge(KERNEL, guest()) == []
    table = report.matrix({"9.9": (KERNEL, guest())}, ["5.10"])
    assert "| pagemap | yes |" in table
    assert "| uffd-syscall | root |" in table
    assert "| pagemap-scan-holes | - |" in table
    assert "| 9.9.1 | root | uffd-wp | EXACT DISCARDS | 1 | 0 | 1 | 1: swap: no swap |" in table
    assert "| 9.9.1 | root | pagemap-scan | not there | - | - | all | ENOTTY: there is none |" in table
    assert "| 9.9.1 | nobody | neither |  | 1 | 0 | 0 |  |" in table
    assert "| **5.10** |" in table
    assert "NO SUITE SERVES THIS KERNEL ANY MORE" in table


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"features": {"pagemap": "no"}}, "pagemap is no, not yes"),
        ({"features": {"pagemap": "yes", "uffd-syscall": "yes", "pagemap-scan": "yes"}}, "pagemap-scan is yes, not no"),
        ({"backends": {"uffd-wp": ["EXACT"]}}, "uffd-wp guarantees ['EXACT'], not ['DISCARDS', 'EXACT']"),
        ({"backends": {"uffd-wp": "EPERM: denied"}}, "uffd-wp guarantees EPERM: denied"),
        (
            {"backends": {"uffd-wp": ["DISCARDS", "EXACT"], "pagemap-scan": ["EXACT"]}},
            "pagemap-scan works",
        ),
        ({"tests": [("test_a", "uffd-wp", "failed", "assert 1 == 2")]}, "test_a\nassert 1 == 2"),
        ({"tests": [("test_a", "uffd-wp", "skipped", "no reason")]}, "no test of uffd-wp passed"),
        ({"status": 3}, "pytest ended with 3"),
        ({"status": None, "exit": 139}, "its process ended with 139 in test_c"),
        ({"features": {}, "backends": {}}, "the console ends"),
        ({"collected": 90}, "90 tests were collected, and 3 told of"),
    ],
)
def test_what_is_missing_is_a_failure(changes: dict[str, Any], expected: str) -> None:
    """And is named; what came along is no excuse for it."""
    wrong = report.judge(KERNEL, guest(root=changes))
    assert any(text.startswith("as root: ") and expected in text for text in wrong), wrong


def test_a_failed_test_is_not_mended() -> None:
    """It stays failed, whatever is told of it later."""
    tests = [("test_a", "uffd-wp", "failed", "assert 1 == 2"), ("test_a", "uffd-wp", "passed", "")]
    assert any("test_a" in text for text in report.judge(KERNEL, guest(nobody={"tests": tests, "collected": 1})))


@pytest.mark.parametrize(("hung", "verb"), [(True, "hung"), (False, "panicked or stopped")])
def test_a_guest_that_dies_is_a_failure(hung: bool, verb: str) -> None:
    """With the tests that ran, and the end of its console; once, and not for a user who was through."""
    console, running = "boot\nKernel panic - not syncing: x", {"status": None, "exit": None}
    told = events("root", **running) + events("nobody", tests=[("test_b", None, "passed", "")], **running)
    (wrong,) = report.judge(KERNEL, qemu.Guest(console, told, hung))
    assert f"it {verb} in test_c as root and test_b as nobody;" in wrong
    assert "Kernel panic" in wrong
    (wrong,) = report.judge(KERNEL, qemu.Guest(console, events("root") + events("nobody", **running), hung))
    assert f"it {verb} in test_c as nobody;" in wrong
    (wrong,) = report.judge(KERNEL, qemu.Guest(console, [], hung))
    assert f"it {verb} in no test;" in wrong


@pytest.mark.parametrize(
    ("line", "fails"),
    [("WARNING: CPU: 0 at mm/x.c", False), ("BUG: unable to handle page fault", True), ("INFO: task x blocked", False)],
)
def test_the_kernels_own_complaints_are_found(line: str, fails: bool) -> None:
    """In the console, once each. A kernel that broke has not passed."""
    whole = guest()
    complaining = qemu.Guest(f"[1.0] {line}\n[2.0] {line}\nall is well\n", whole.events, hung=False)
    assert len(report.kernel_complaints(complaining)) == 1
    assert bool(report.judge(KERNEL, complaining)) == fails


def test_readme_keeps_everything_else() -> None:
    """The matrix is replaced between its marks, and what is around it stays."""
    document = f"one\n{report.BEGIN}\nold\n{report.END}\ntwo\n"
    assert report.put_into(document, "| new |") == f"one\n{report.BEGIN}\n\n| new |\n\n{report.END}\ntwo\n"
    with pytest.raises(ValueError, match="matrix"):
        report.put_into("no marks", "| new |")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.put_into(readme, "x") != readme


def test_the_kernels_that_must_be_there_are() -> None:
    """Every entry is understood, and names what the library knows."""
    kernels = [report.Kernel(**entry) for entry in ENTRIES]
    assert [kernel.name for kernel in kernels] == ["5.10", "6.1", "6.5-like", "6.12", "6.16", "6.18", "newest"]
    features, guarantees = {feature.value for feature in Feature}, set(Guarantee.__members__)
    for kernel in kernels:
        re.compile(kernel.package)
        assert set(kernel.yes + kernel.no + kernel.denied) <= features
        assert not set(kernel.yes) & set(kernel.no)
        assert set(kernel.denied) <= set(kernel.yes)
        for who in report.USERS:
            for name, promised in kernel.backends(who).items():
                assert name in BACKEND_NAMES
                assert promised <= guarantees
            expected = kernel.settings([])["expect"][who]
            assert set(report.RESOURCES[who]) | set(kernel.backends(who)) <= set(expected)
            assert not set(expected) & {*kernel.no, *kernel.disable}


def test_an_archive_is_as_the_kernel_unpacks_it(tmp_path: Path) -> None:
    """Headers of 110 bytes, everything on 4-byte boundaries, folders before what is in them, files unchanged."""
    (tmp_path / "file").write_bytes(b"contents")
    cpio = initramfs.Cpio()
    cpio.add_tree(tmp_path / "file", "one/two/file")
    data, at, found = cpio.close(), 0, {}
    assert len(data) % 512 == 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, length, named = fields[1], fields[6], fields[11]
        name = data[at + 110 : at + 109 + named].decode()
        if name == "TRAILER!!!":
            break
        begin = at + 110 + named + (-(at + 110 + named)) % 4
        found[name] = mode, data[begin : begin + length]
        at = begin + length + (-(begin + length)) % 4
    assert list(found) == ["one", "one/two", "one/two/file"]
    assert found["one/two/file"] == (0o100644, b"contents")
    assert found["one"][0] & 0o40000


@pytest.mark.parametrize(
    ("root", "faults", "status"),
    [({}, [], 0), ({"status": 1}, [], 1), ({}, ["9.9 could not be run"], 2)],
    ids=["passed", "failed", "machine"],
)
def test_write_is_for_a_whole_run_that_passed(
    root: dict[str, Any], faults: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README gets the matrix that was printed; after anything else it stays as it was."""
    readme = tmp_path / "README.md"
    readme.write_text(f"one\n{report.BEGIN}\n{report.END}\n")
    before = readme.read_text()
    guests = {name: (attrs.evolve(KERNEL, name=name), guest(root=root)) for name in ("7.7", "8.8", "9.9")}
    outcome = __main__.Outcome(guests=guests, machine=faults)
    monkeypatch.setattr(__main__, "README", readme)
    monkeypatch.setattr(machine, "check", lambda: None)
    monkeypatch.setattr(__main__, "boot_all", lambda *_: outcome)
    monkeypatch.setattr(sys, "argv", ["vm_matrix", "--write"])
    assert __main__.main() == status
    written = report.put_into(before, report.matrix(guests, []))
    assert readme.read_text() == (written if status == 0 else before)


# ---- The command ---------------------------------------------------------------------------------------------


def command(tmp_path: Path, *arguments: str, tools: dict[str, str], **env: str) -> subprocess.CompletedProcess[str]:
    """Run it with these programs alone."""
    for name, program in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / name).chmod(0o755)
    return subprocess.run(
        [sys.executable, "-m", "vm", *arguments],
        env={**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(SCRIPTS), "XDG_CACHE_HOME": str(tmp_path), **env},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_a_machine_without_qemu_is_told_what_to_install(tmp_path: Path) -> None:
    """With a status of its own."""
    done = command(tmp_path, "6.1", tools=dict.fromkeys(set(machine.TOOLS) - {"qemu-system-x86_64"}, ""))
    assert done.returncode == 2
    assert "qemu-system-x86 (apt-get install)" in done.stderr
    assert "PAGEMAPCOMPAT_SKIP_VM=1" in done.stderr


def test_one_bad_emulator_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other guests found is judged; the machine's fault is named beside it."""
    image = archive.Image("linux-image", tmp_path / "vmlinuz", tmp_path / "brd.ko", "")
    other = attrs.evolve(KERNEL, name="8.8")

    def boot(_vmlinuz: Path, _initrd: bytes, scratch: Path) -> qemu.Guest:
        if scratch.name == "8.8":
            raise machine.MachineError("qemu ended with 137")
        return guest()

    monkeypatch.setattr(__main__, "find", lambda kernels, _: {kernel.name: image for kernel in kernels})
    monkeypatch.setattr(initramfs, "base", lambda _: b"")
    monkeypatch.setattr(initramfs, "addition", lambda *_: b"")
    monkeypatch.setattr(qemu, "boot", boot)
    monkeypatch.setattr(machine, "CACHE", tmp_path)
    outcome = __main__.boot_all([other, KERNEL], [])
    assert list(outcome.guests) == ["9.9"]
    assert outcome.machine == ["8.8 could not be run: qemu ended with 137"]


def without(tmp_path: Path, apt_get: str) -> subprocess.CompletedProcess[str]:
    """Run it where every tool is there, and apt-get says what it says."""
    if not machine.KEYRING.exists() or not machine.PYTHON.exists():
        pytest.skip("debian-archive-keyring or .venv is missing (ENOENT); remedy: apt-get install it, run scripts/test")
    tools = dict.fromkeys(machine.TOOLS, "")
    return command(tmp_path, "6.1", tools={**tools, "apt-get": f"echo '{apt_get}' >&2; exit 100"})


def test_a_machine_without_a_network_is_told_apart(tmp_path: Path) -> None:
    """From a kernel that fails, and from one that no suite serves any more."""
    done = without(tmp_path, "E: Failed to fetch http://deb.debian.org  Could not resolve")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "6.1 could not be had" in done.stderr
    assert "Could not resolve" in done.stderr
    assert "NO SUITE" not in done.stdout


def test_a_kernel_that_nobody_serves_is_a_row(tmp_path: Path) -> None:
    """And no failure, nor this machine's fault."""
    done = without(tmp_path, "E: The repository does not have a Release file.")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NO SUITE SERVES THIS KERNEL ANY MORE" in done.stdout


def test_a_wrong_limit_is_named(tmp_path: Path) -> None:
    """Before anything is downloaded."""
    tools = dict.fromkeys(machine.TOOLS, "")
    done = command(tmp_path, "6.1", tools=tools, PAGEMAPCOMPAT_VM_SECONDS="soon")
    assert done.returncode == 2
    assert "PAGEMAPCOMPAT_VM_SECONDS='soon'" in done.stderr or not machine.PYTHON.exists()


@pytest.mark.parametrize("arguments", [["7.77"], ["--write", "6.1"], ["--frobnicate"]])
def test_a_wrong_command_line_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    """Before anything is done."""
    done = command(tmp_path, *arguments, tools={})
    assert done.returncode == 2
    assert "usage: scripts/vm_matrix" in done.stderr
    if arguments == ["7.77"]:
        assert "newest" in done.stderr


def test_it_can_be_skipped_by_hand() -> None:
    """And says so."""
    env = {**os.environ, "PAGEMAPCOMPAT_SKIP_VM": "1"}
    done = subprocess.run(
        [SCRIPTS / "vm_matrix"], env=env, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0
    assert "skipped" in done.stderr


@pytest.fixture
def emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a program that is run as qemu."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = tmp_path / "qemu-system-x86_64"
    program.touch(0o755)
    return program


SAY = """#!/bin/sh
for word; do case $word in file:*/console) console=${word#file:};; file:*/results) results=${word#file:};; esac; done
"""


def test_a_silent_guest_is_a_hang(emulator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much its kernel complains. It is ended, and what it said is kept."""
    monkeypatch.setenv("PAGEMAPCOMPAT_VM_SECONDS", "3")
    emulator.write_text(SAY + "while :; do echo rcu: stall >> $console; sleep 0.2; done\n")
    hung = qemu.boot(tmp_path / "vmlinuz", b"", tmp_path / "scratch")
    assert (hung.hung, hung.over) == (True, False)
    assert hung.console.startswith("rcu: stall\n")


def test_a_guest_that_ends(emulator: Path, tmp_path: Path) -> None:
    """Leaves its events, but for a line that it could not finish."""
    event = json.dumps({"over": True})
    emulator.write_text(
        SAY + f"echo done > $console; printf '%s\\n' '{event}' > $results; printf '{{\"who' >> $results\n"
    )
    ended = qemu.boot(tmp_path / "vmlinuz", b"", tmp_path / "scratch")
    assert (ended.hung, ended.over, ended.events) == (False, True, [{"over": True}])


def test_an_emulator_that_cannot_start_is_the_machines_fault(emulator: Path, tmp_path: Path) -> None:
    """Its own words are passed on."""
    emulator.write_text("#!/bin/sh\necho 'cannot set up guest memory' >&2; exit 1\n")
    with pytest.raises(machine.MachineError, match="cannot set up guest memory"):
        qemu.boot(tmp_path / "vmlinuz", b"", tmp_path / "scratch")
