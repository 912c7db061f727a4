"""Ready-made users of `pagemapcompat probe`: each is run, and what it leaves is read, as its consumer does."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import CHILD_SECONDS, DISABLED, run_child
from prometheus_client.parser import text_string_to_metric_families

from pagemapcompat import Feature, Guarantee, limits
from pagemapcompat.probe import BACKEND_NAMES

INTEGRATIONS = Path(__file__).parent.parent / "scripts" / "integrations"
FACT = INTEGRATIONS / "ansible" / "pagemapcompat.fact"
FEATURES = INTEGRATIONS / "nfd" / "pagemapcompat-features"
SYSTEMD = INTEGRATIONS / "systemd"
TEXTFILE = SYSTEMD / "pagemapcompat-textfile"
SERVICE = SYSTEMD / "pagemapcompat-probe.service"
TIMER = SYSTEMD / "pagemapcompat-probe.timer"
SNIPPET = INTEGRATIONS / "shell" / "emulator-flags.sh"
SCRIPTS = (FACT, FEATURES, TEXTFILE, SNIPPET)
SHELLS = ("sh", "bash")
MISSING = "/nowhere/pagemapcompat"
DISABLINGS = ("", "pagemap-scan", "pagemap-scan,uffd-syscall,uffd-device", "pagemap-scan,uffd-wp")
"""The backends one after the other; in between, one that the kernel's own writes into guest memory fail with."""

Done = subprocess.CompletedProcess[str]


def script(path: Path, *lines: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """`pagemapcompat`, in a folder of its own."""
    return script(tmp_path / "bin" / "pagemapcompat", f'exec {shlex.quote(sys.executable)} -m pagemapcompat "$@"')


def disabling(names: str) -> dict[str, str]:
    """The environment that switches these off, and what is off for all tests."""
    return {"PAGEMAPCOMPAT_DISABLE": ",".join(filter(None, [*DISABLED, names]))}


def run(
    *command: str | Path, program: Path | str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Done:
    """Run something that calls *program*, with a umask that lets nobody else read."""
    return subprocess.run(
        command,
        env={**os.environ, "PAGEMAPCOMPAT": str(program), **(env or {})},
        capture_output=True,
        text=True,
        umask=0o077,
        cwd=cwd,
        timeout=CHILD_SECONDS,
        check=False,
    )


def output(*command: str | Path, program: Path | str, env: Mapping[str, str] | None = None) -> str:
    """What it prints, where nothing goes wrong."""
    done = run(*command, program=program, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@functools.cache
def selected(disabled: str = "") -> tuple[str, frozenset[str]]:
    """The backend that DirtyTracker takes in a child, or "none", and what it guarantees."""
    printed = run_child(
        """
        from pagemapcompat import DirtyTracker, KernelError
        try:
            with DirtyTracker() as tracker:
                print(tracker.selection.chosen, *(one.name for one in tracker.selection.guarantees))
        except KernelError:
            print("none")
        """,
        env=disabling(disabled),
    )
    chosen, *guarantees = printed.split()
    return chosen, frozenset(guarantees)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_plain_shell(path: Path) -> None:
    """Each can be executed, and dash, bash and shellcheck, where that is installed, have nothing to say."""
    assert os.access(path, os.X_OK)
    checkers = [["sh", "-n"], ["bash", "-n"]]
    if shutil.which("shellcheck"):
        checkers.append(["shellcheck", "-s", "sh"])
    for checker in checkers:
        assert output(*checker, path, program=MISSING) == ""


def test_programs_are_looked_up_in_path(program: Path, tmp_path: Path) -> None:
    """Where PAGEMAPCOMPAT is not set, each calls `pagemapcompat`."""
    env = {name: value for name, value in os.environ.items() if name != "PAGEMAPCOMPAT"}
    env["PATH"] = f"{program.parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    for path, *arguments in ((FACT,), (FEATURES, tmp_path / "nfd"), (TEXTFILE, tmp_path / "a.prom"), (SNIPPET,)):
        done = subprocess.run(
            [path, *arguments], env=env, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "not installed" not in done.stdout + done.stderr
    assert (tmp_path / "nfd" / "pagemapcompat").stat().st_size > 0
    assert (tmp_path / "a.prom").stat().st_size > 0


# -- Ansible ---------------------------------------------------------------------------------------------------


def local_facts(folder: Path, program: Path | str, env: Mapping[str, str] | None = None) -> dict[str, object]:
    """What `setup` makes of facts.d: whatever is named *.fact, run if it is executable, is JSON."""
    facts = {}
    for path in sorted(folder.glob("*.fact")):
        assert path.stat().st_mode & stat.S_IXUSR
        facts[path.name.replace(".fact", "")] = json.loads(output(path, program=program, env=env))
    return facts


@pytest.fixture
def facts_d(tmp_path: Path) -> Path:
    """/etc/ansible/facts.d, with the fact installed as its header says."""
    folder = tmp_path / "facts.d"
    folder.mkdir()
    assert f"/etc/ansible/facts.d/{FACT.name}" in FACT.read_text(encoding="utf-8")
    shutil.copy(FACT, folder)
    return folder


@pytest.mark.parametrize("disabled", ["", "pagemap-scan,uffd-wp"])
def test_fact(facts_d: Path, program: Path, disabled: str) -> None:
    """It is what `probe --format ansible` says, with the backend that DirtyTracker takes, or null."""
    facts = local_facts(facts_d, program, disabling(disabled))
    said = output(program, "probe", "--format", "ansible", program=program, env=disabling(disabled))
    assert facts == {"pagemapcompat": json.loads(said)}
    chosen, guarantees = selected(disabled)
    backend = None if chosen == "none" else chosen
    assert json.loads(said)["backend"] == backend
    assert set(json.loads(said)["guarantees"]) == guarantees


def test_fact_where_it_is_not_installed(facts_d: Path) -> None:
    """An object with the reason, and exit status 0: the other facts are not lost."""
    awkward = '/nowhere/"quoted" \\ \t\n\x7fé'
    assert local_facts(facts_d, MISSING) == {"pagemapcompat": {"error": f"{MISSING} is not installed, or not in PATH"}}
    assert list(local_facts(facts_d, awkward)["pagemapcompat"]) == ["error"]  # type: ignore[call-overload]


def test_fact_where_the_program_fails(facts_d: Path, program: Path, tmp_path: Path) -> None:
    """The reason is the last thing that it said; half an answer is not printed."""
    facts = local_facts(facts_d, program, {"PAGEMAPCOMPAT_DISABLE": "nonsense"})
    assert re.search(r"ended with 2: .*'nonsense'", str(facts["pagemapcompat"]))
    broken = script(tmp_path / "broken", """printf '{"backend": '""", r"""printf 'a "\\b"\tc\033\n' >&2""", "exit 3")
    assert local_facts(facts_d, broken) == {"pagemapcompat": {"error": f'{broken} probe ended with 3: a "\\b"c'}}


# -- Files that others read while they are written -------------------------------------------------------------

HALF = "pagemapcompat"
BREAKDOWNS: dict[str, tuple[str, ...]] = {
    "fails": (f"printf {HALF}", "exit 3"),
    "is terminated": (f"printf {HALF}", "kill -TERM $PPID"),
    "is killed": (f"printf {HALF}", "kill -KILL $PPID"),
}
"""What a program does when it has written half. PPID is the script that runs it."""


def nfd_reads(name: str) -> bool:
    """NFD passes over files that begin with a dot."""
    return not name.startswith(".")


def collector_reads(name: str) -> bool:
    """The textfile collector reads *.prom, hidden or not."""
    return name.endswith(".prom")


WRITERS = (
    pytest.param(FEATURES, "", "pagemapcompat", nfd_reads, id="nfd"),
    pytest.param(TEXTFILE, "pagemapcompat.prom", "pagemapcompat.prom", collector_reads, id="textfile"),
)
writers = pytest.mark.parametrize(("writer", "argument", "name", "reads"), WRITERS)
"""A script, its argument in a folder, the file it writes there, and which files its reader reads."""


@writers
@pytest.mark.parametrize("shell", SHELLS)
def test_writers_replace_the_file(
    writer: Path, argument: str, name: str, reads: Callable[[str], bool], shell: str, program: Path, tmp_path: Path
) -> None:
    """The old file gives way to the new one, which all may read, whatever the umask; nothing lies beside it."""
    folder = tmp_path / "folder with blanks"
    folder.mkdir()
    (folder / name).write_text("old\n", encoding="utf-8")
    assert reads(name)
    assert output(shell, writer, folder / argument, program=program) == ""
    assert os.listdir(folder) == [name]
    assert stat.S_IMODE((folder / name).stat().st_mode) == 0o644
    written = (folder / name).read_text(encoding="utf-8")
    assert written.startswith(("pagemapcompat.backend=", "# HELP pagemapcompat_"))
    assert written.endswith("\n")


@writers
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("breakdown", [*BREAKDOWNS, "is missing"])
def test_writers_that_break_down_leave_the_old_file(
    writer: Path,
    argument: str,
    name: str,
    reads: Callable[[str], bool],
    shell: str,
    breakdown: str,
    tmp_path: Path,
) -> None:
    """It stays whole, and is all that is there; after SIGKILL, all that is read. The exit status tells."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_text("old\n", encoding="utf-8")
    lines = BREAKDOWNS.get(breakdown)
    program = script(tmp_path / "bin" / "pagemapcompat", *lines) if lines else MISSING
    done = run(shell, writer, folder / argument, program=program)
    assert done.returncode != 0
    assert (folder / name).read_text(encoding="utf-8") == "old\n"
    if breakdown == "is killed":
        assert done.returncode == -signal.SIGKILL
        assert [entry for entry in os.listdir(folder) if reads(entry)] == [name]
    else:
        assert os.listdir(folder) == [name]


@writers
def test_writers_at_the_same_time(
    writer: Path, argument: str, name: str, reads: Callable[[str], bool], program: Path, tmp_path: Path
) -> None:
    """Each writes under a name of its own: one whole file is left."""
    folder = tmp_path / "folder"
    folder.mkdir()
    command = [writer, folder / argument]
    env = {**os.environ, "PAGEMAPCOMPAT": str(program)}
    running = [subprocess.Popen(command, env=env) for _ in range(3)]
    assert [one.wait(CHILD_SECONDS) for one in running] == [0, 0, 0]
    assert os.listdir(folder) == [name]
    whole = (folder / name).read_bytes()
    assert output(writer, folder / argument, program=program) == ""
    assert (folder / name).read_bytes() == whole


@pytest.mark.parametrize("arguments", [(), ("a.prom", "b.prom"), (".",)], ids=["none", "two", "a folder"])
def test_textfile_refuses_what_is_no_file(arguments: tuple[str, ...]) -> None:
    """Its usage, and status 2: a file moved into a folder would never be found."""
    done = run(TEXTFILE, *arguments, program=MISSING)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


# -- Kubernetes: node-feature-discovery ------------------------------------------------------------------------

LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
"""The name part of a label's key, and a label's value."""
NFD_LARGEST_FILE = 64 << 10


def nfd_features(folder: Path) -> dict[str, str]:
    """What NFD's local source reads from features.d. A line that it would take for an instruction fails here."""
    features: dict[str, str] = {}
    for path in folder.iterdir():
        if not nfd_reads(path.name) or not path.is_file():
            continue
        assert path.stat().st_size <= NFD_LARGEST_FILE
        for line in map(str.strip, path.read_text(encoding="utf-8").split("\n")):
            if line:
                assert not line.startswith("#")
                name, equals, value = line.partition("=")
                assert name not in features
                features[name] = value if equals else "true"
    return features


@pytest.mark.parametrize("disabled", ["", "pagemap-scan", "pagemap-scan,uffd-wp"])
def test_nfd(program: Path, tmp_path: Path, disabled: str) -> None:
    """Every line can be a label, and says what DirtyTracker takes and guarantees, and the state of each feature."""
    folder = tmp_path / "kubernetes" / "features.d"
    assert output(FEATURES, folder, program=program, env=disabling(disabled)) == ""
    features = nfd_features(folder)
    for name, value in features.items():
        assert LABEL.fullmatch(name), name
        assert LABEL.fullmatch(value), value
    chosen, guarantees = selected(disabled)
    assert features["pagemapcompat.backend"] == chosen
    assert {name for name in Guarantee.__members__ if f"pagemapcompat.guarantee.{name}" in features} == guarantees
    assert {f"pagemapcompat.{feature.value}" for feature in Feature} <= features.keys()


def test_nfd_default_folder() -> None:
    """Without an argument it is the one that NFD reads."""
    assert "${1:-/etc/kubernetes/node-feature-discovery/features.d}" in FEATURES.read_text(encoding="utf-8")


# -- systemd and Prometheus ------------------------------------------------------------------------------------

TAKES_AWAY = {
    "DynamicUser",
    "LockPersonality",
    "MemoryDenyWriteExecute",
    "PrivateDevices",
    "PrivateUsers",
    "ProcSubset",
    "ProtectClock",
    "ProtectHostname",
    "ProtectKernelLogs",
    "ProtectKernelModules",
    "ProtectKernelTunables",
    "RestrictAddressFamilies",
    "RestrictNamespaces",
    "RestrictRealtime",
    "RestrictSUIDSGID",
    "SystemCallArchitectures",
    "SystemCallFilter",
    "SystemCallLog",
    "User",
}
"""Settings that hide or deny what is measured, and those that come with a seccomp filter: systemd.exec(5)."""


def unit(path: Path) -> ConfigParser:
    """A unit file."""
    parser = ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(path, encoding="utf-8")
    return parser


def exec_start() -> list[str]:
    """What the service runs."""
    return shlex.split(unit(SERVICE)["Service"]["ExecStart"])


def samples(path: Path) -> dict[str, dict[tuple[str, ...], float]]:
    """What Prometheus reads: by metric, the values by labels."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
        assert (family.type, bool(family.documentation)) == ("gauge", True)
        for sample in family.samples:
            assert sample.name.startswith("pagemapcompat_")
            assert sample.timestamp is None  # the collector passes over files with timestamps
            values = found.setdefault(sample.name, {})
            assert tuple(sample.labels.values()) not in values
            values[tuple(sample.labels.values())] = sample.value
    return found


def test_units_name_files_that_are_there() -> None:
    """The timer starts the service, and the service a script that is here and may write where it writes."""
    timer, service = unit(TIMER), unit(SERVICE)
    assert timer["Timer"].get("Unit", f"{TIMER.stem}.service") == SERVICE.name
    assert {"OnBootSec", "OnCalendar", "RandomizedDelaySec"} <= set(timer["Timer"])
    assert timer["Install"]["WantedBy"] == "timers.target"
    program, target = map(Path, exec_start())
    assert SYSTEMD / program.name == TEXTFILE
    assert f"as {program}," in TEXTFILE.read_text(encoding="utf-8")
    assert service["Service"]["Type"] == "oneshot"
    assert service["Service"]["ReadWritePaths"] == service["Unit"]["AssertPathIsDirectory"] == str(target.parent)
    assert collector_reads(target.name)


def test_hardening_takes_nothing_away() -> None:
    """No setting hides or denies what is measured, and the capabilities that decide stay."""
    settings = unit(SERVICE)["Service"]
    assert not TAKES_AWAY & set(settings)
    assert set(limits._CAPABILITIES.values()) <= set(settings["CapabilityBoundingSet"].split())
    assert settings["DevicePolicy"] == "closed"
    assert settings["DeviceAllow"] == "/dev/userfaultfd rw"
    assert (settings["ProtectSystem"], settings["PrivateTmp"]) == ("strict", "yes")


def test_hardened_capabilities_are_enough(program: Path, tmp_path: Path) -> None:
    """With the service's bounding set and no_new_privs, root measures what root does without them."""
    give_up = ("setpriv", "--bounding-set", "-all", "true")
    if os.geteuid() != 0 or not shutil.which("setpriv") or run(*give_up, program=MISSING).returncode:
        pytest.skip("capabilities cannot be given up here; remedy: run as root, with setpriv (util-linux)")
    names = unit(SERVICE)["Service"]["CapabilityBoundingSet"].lower().replace("cap_", "+").split()
    hardened = ("setpriv", "--no-new-privs", "--bounding-set", ",".join(["-all", *names]))
    assert output(*hardened, TEXTFILE, tmp_path / "hardened.prom", program=program) == ""
    assert output(TEXTFILE, tmp_path / "free.prom", program=program) == ""
    assert samples(tmp_path / "hardened.prom") == samples(tmp_path / "free.prom")


def test_units_verify(tmp_path: Path) -> None:
    """`systemd-analyze verify`, where it is installed, knows every setting, and finds the script where it is here."""
    for path in (SERVICE, TIMER):
        text = path.read_text(encoding="utf-8").replace(exec_start()[0], str(TEXTFILE))
        (tmp_path / path.name).write_text(text, encoding="utf-8")
    assert str(TEXTFILE) in (tmp_path / SERVICE.name).read_text(encoding="utf-8")
    if shutil.which("systemd-analyze"):
        verify = ("systemd-analyze", "verify", "--man=no")
        assert output(*verify, tmp_path / SERVICE.name, tmp_path / TIMER.name, program=MISSING) == ""


@pytest.mark.parametrize("disabled", ["", "pagemap-scan", "pagemap-scan,uffd-wp"])
def test_the_command_of_the_service(program: Path, tmp_path: Path, disabled: str) -> None:
    """Run with its paths redirected, it writes metrics: one state a feature, and the backends that work."""
    script_path, target = map(Path, exec_start())
    command = (SYSTEMD / script_path.name, tmp_path / target.name)
    assert output(*command, program=program, env=disabling(disabled)) == ""
    metrics = samples(tmp_path / target.name)
    states: dict[str, float] = {}
    for (name, _state), value in metrics["pagemapcompat_feature"].items():
        states[name] = states.get(name, 0) + value
    assert states == {feature.value: 1 for feature in Feature}
    usable = metrics["pagemapcompat_backend_usable"]
    assert usable.keys() == {(name,) for name in BACKEND_NAMES}
    chosen, guarantees = selected(disabled)
    assert next((name for name in BACKEND_NAMES if usable[name,]), "none") == chosen
    given = metrics.get("pagemapcompat_backend_guarantee", {})
    assert {guarantee for backend, guarantee in given if backend == chosen} == guarantees


# -- An emulator's launcher ------------------------------------------------------------------------------------


def expected_flags(disabled: str) -> dict[str, str]:
    """What DirtyTracker's choice comes to, without the huge pages."""
    chosen, guarantees = selected(disabled)
    if chosen == "none":
        return {"--dirty-tracking": "copy"}
    return {"--dirty-tracking": chosen, "--kernel-writes": "direct" if "KERNEL_WRITES" in guarantees else "bounce"}


def parsed_flags(words: str) -> dict[str, str]:
    """Flags by name."""
    pairs = [word.partition("=") for word in words.split()]
    assert len({name for name, _, _ in pairs}) == len(pairs)
    return {name: value for name, _, value in pairs}


def launcher(tmp_path: Path, options: str) -> Path:
    """A strict launcher that sources the snippet, and prints the words of the flags and what else has changed."""
    return script(
        tmp_path / "launcher",
        options,
        "program=mine copy=mine names=mine answer=mine huge=mine writes=mine",
        "before=$-",
        f". {shlex.quote(str(SNIPPET))}",
        "set -- $emulator_flags",
        '[ "$before" = "$-" ] || exit 7',
        'for word in "$program" "$copy" "$names" "$answer" "$huge" "$writes"; do [ "$word" = mine ] || exit 8; done',
        '[ "${PAGEMAPCOMPAT_BACKEND-untouched}" = untouched ] || exit 9',
        "printf '%s\\n' \"$@\"",
    )


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("disabled", DISABLINGS)
def test_flags_are_what_the_tracker_selects(shell: str, disabled: str, program: Path) -> None:
    """Run by dash and by bash, the snippet prints one line; where nothing works, each reason is on standard error."""
    done = run(shell, SNIPPET, program=program, env=disabling(disabled))
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    flags = parsed_flags(done.stdout)
    expected = expected_flags(disabled)
    if expected == {"--dirty-tracking": "copy"}:
        assert flags == expected
        assert "emulator-flags: copying: no backend works here\n" in done.stderr
        for name in BACKEND_NAMES:
            assert f" {name}: " in done.stderr
        assert "remedy: " in done.stderr
        return
    assert done.stderr == ""
    huge = flags.pop("--huge-pages")
    assert flags == expected
    assert huge in {"none", "transparent", "hugetlb", "transparent,hugetlb"}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("disabled", ["", "pagemap-scan,uffd-wp", None], ids=["all", "none", "missing"])
def test_flags_for_a_launcher_that_sources(shell: str, disabled: str | None, program: Path, tmp_path: Path) -> None:
    """`set -eu` in the launcher does no harm, and nothing but the flags is left behind, in words."""
    strict = launcher(tmp_path, "set -euo pipefail" if shell == "bash" else "set -eu")
    if disabled is None:
        done = run(shell, strict, program=MISSING)
        expected = {"--dirty-tracking": "copy"}
    else:
        done = run(shell, strict, program=program, env=disabling(disabled))
        expected = expected_flags(disabled)
    assert done.returncode == 0, done.stderr
    assert ("emulator-flags: copying: " in done.stderr) == (expected == {"--dirty-tracking": "copy"})
    flags = parsed_flags(done.stdout)
    assert done.stdout.splitlines() == [f"{name}={value}" for name, value in flags.items()]
    flags.pop("--huge-pages", None)
    assert flags == expected


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        pytest.param(None, 0, "is not installed, or not in PATH", id="missing"),
        pytest.param("PAGEMAPCOMPAT_BACKEND=uffd-wp", 3, "ended with 3", id="failing"),
        pytest.param("", 0, "names no backend", id="silent"),
        pytest.param("PAGEMAPCOMPAT_BACKEND=of-the-future", 0, "names no backend", id="unknown"),
        pytest.param("PAGEMAPCOMPAT_BACKEND=uffd-wp; touch owned", 0, "names no backend", id="command"),
        pytest.param("PAGEMAPCOMPAT_BACKEND=$(touch owned)", 0, "names no backend", id="substitution"),
        pytest.param("PAGEMAPCOMPAT_BACKEND=`touch owned`", 0, "names no backend", id="backquotes"),
        pytest.param("PAGEMAPCOMPAT_BACKEND=''uffd-wp' touch owned'", 0, "names no backend", id="quotes"),
        pytest.param("PATH=/nowhere\nPAGEMAPCOMPAT=owned\ntouch owned", 0, "names no backend", id="other names"),
    ],
)
def test_flags_without_an_answer(shell: str, answer: str | None, status: int, reason: str, tmp_path: Path) -> None:
    """Copying, and why; nothing but a plain assignment is evaluated, and no variable of the launcher is believed."""
    program: Path | str = MISSING
    if answer is not None:
        program = script(tmp_path / "bin" / "pagemapcompat", "cat <<'END'", answer, "END", f"exit {status}")
    inside = tmp_path / "inside"
    inside.mkdir()
    inherited = {"PAGEMAPCOMPAT_BACKEND": "pagemap-scan", "PAGEMAPCOMPAT_GUARANTEES": "KERNEL_WRITES"}
    done = run(shell, SNIPPET, program=program, env=inherited, cwd=inside)
    assert (done.returncode, done.stdout) == (0, "--dirty-tracking=copy\n")
    assert re.fullmatch(f"emulator-flags: copying: .*{reason}.*\n", done.stderr)
    assert os.listdir(inside) == []


@pytest.mark.parametrize("disabled", ["", "pagemap-scan"])
def test_huge_pages_of_the_flags_can_be_tracked(disabled: str, program: Path) -> None:
    """DirtyTracker takes memory of every kind that the flags allow, and answers for base pages of transparent ones."""
    flags = parsed_flags(run(SNIPPET, program=program, env=disabling(disabled)).stdout)
    kinds = set(flags.get("--huge-pages", "none").split(",")) - {"none"}
    printed = run_child(
        """
        import mmap, sys
        from pagemapcompat import DirtyTracker, page_size
        from pagemapcompat.trials_kinds import huge_page_size

        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        for kind in sys.argv[1:]:
            with DirtyTracker() as tracker:
                if kind == "hugetlb":  # without a reservation: no page of the pool is needed
                    memory = mmap.mmap(-1, huge_page_size(), flags=flags | 0x40000 | 0x4000)
                    tracker.track(memory).close()
                else:
                    memory = mmap.mmap(-1, 8 << 20, flags=flags)
                    memory.madvise(mmap.MADV_HUGEPAGE)
                    memory.write(b"x" * len(memory))
                    with tracker.track(memory) as ram:
                        ram.reset()
                        memory[5 * page_size()] = 1
                        assert list(ram.collect().page_indices()) == [5]
            print(kind)
        """,
        *sorted(kinds),
        env=disabling(disabled),
    )
    assert set(printed.split()) == kinds
