"""`pagemapcompat probe` and `selftest`: every form is read as its readers do, and every exit status is earned."""

from __future__ import annotations

import functools
import json
import os
import pty
import re
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from children import in_child
from conftest import CHILD_SECONDS, lacking
from prometheus_client.parser import text_string_to_metric_families

from pagemapcompat import (
    DirtyTracker,
    Feature,
    Guarantee,
    KernelError,
    PageCategory,
    TargetGoneError,
    cli_probe,
    cli_scan,
    page_size,
    probe,
)
from pagemapcompat.cli_scan import is_kernel_thread
from pagemapcompat.probe import BACKEND_NAMES

FORMATS = ("text", "json", "env", "macros", "nfd", "prometheus", "ansible")
NOTHING_WORKS = {"PAGEMAPCOMPAT_DISABLE": "pagemap-scan,uffd-wp"}


def command(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run it as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "pagemapcompat", *arguments],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        check=False,
    )


def printed(*arguments: str, env: dict[str, str] | None = None) -> str:
    """What it prints, where all goes well: data, and not a word beside them."""
    done = command(*arguments, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@functools.cache
def found(disabled: str | None = None) -> dict[str, Any]:
    """The JSON."""
    env = None if disabled is None else {"PAGEMAPCOMPAT_DISABLE": disabled}
    values: dict[str, Any] = json.loads(printed("probe", "--format", "json", env=env))
    return values


# -- Forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "disabled", [pytest.param(None, marks=pytest.mark.kernel), "pagemap-scan", "pagemap-scan,uffd-wp"]
)
def test_json(disabled: str | None) -> None:
    """It is as its schema says, has every feature, and its backend is the one that DirtyTracker takes."""
    schema = json.loads((files("pagemapcompat") / "probe.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    values = found(disabled)
    jsonschema.validate(values, schema)
    assert list(values["features"]) == [feature.value for feature in Feature]
    assert list(values["backends"]) == list(BACKEND_NAMES)
    assert values["limits"]["page_size"] == page_size()
    usable = [name for name, backend in values["backends"].items() if backend["usable"]]
    assert values["backend"] == (usable[0] if usable else None)
    for backend in values["backends"].values():
        assert backend["usable"] == (backend["reason"] is None)
        assert backend["usable"] or backend["hint"]
    if disabled is None:
        try:
            with DirtyTracker() as tracker:
                assert values["backend"] == tracker.selection.chosen
                assert values["guarantees"] == [str(guarantee.name) for guarantee in tracker.selection.guarantees]
        except KernelError:
            assert values["backend"] is None


@pytest.mark.kernel
def test_soft_dirty_is_tried_by_the_command_alone() -> None:
    """In a process of its own, by effect: the answer is yes or no where probe() cannot tell."""
    answer = found()["features"]["soft-dirty"]
    shown = found()["features"]["pagemap-soft-dirty"]
    assert answer["state"] == shown["state"]
    assert shown["state"] in ("yes", "no")


def test_text() -> None:
    """The backend on top, why a better one is not taken, every feature once, a remedy for whatever is not yes."""
    values = found()
    lines = printed("probe").splitlines()
    assert lines[0] == f"backend: {values['backend'] or 'none works here'}"
    for name, answer in values["features"].items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.split()[1] == answer["state"]
        assert answer["detail"] in line
        below = lines[lines.index(line) + 1 : lines.index(line) + 2]
        assert (answer["state"] == "yes") != any("remedy:" in one for one in below)
    without = printed("probe", env={"PAGEMAPCOMPAT_DISABLE": "pagemap-scan"}).splitlines()
    assert "not pagemap-scan: PAGEMAPCOMPAT_DISABLE names it (E" in "\n".join(without[:4])
    assert "remedy: unset PAGEMAPCOMPAT_DISABLE" in "\n".join(without[:5])


@pytest.mark.parametrize(("settings", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colour_is_for_terminals(settings: dict[str, str], coloured: bool) -> None:
    """And only where it is wanted."""
    assert "\033" not in printed("probe")
    terminal, end = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | settings
    with subprocess.Popen([sys.executable, "-m", "pagemapcompat", "probe"], stdout=end, env=env) as child:
        os.close(end)
        said = b""
        while True:
            try:
                piece = os.read(terminal, 1 << 16)
            except OSError:  # EIO: the other end is closed
                break
            if not piece:
                break
            said += piece
        child.wait(CHILD_SECONDS)
    os.close(terminal)
    assert (b"\033[" in said) == coloured


def test_env_is_what_a_shell_takes() -> None:
    """Every line is an assignment; a shell that reads them has the same values."""
    values = found()
    text = printed("probe", "--format", "env")
    assert all(re.fullmatch(r"PAGEMAPCOMPAT_[A-Z0-9_]+=.*", line) for line in text.splitlines())
    assert "PAGEMAPCOMPAT_DISABLE" not in text
    words = "$PAGEMAPCOMPAT_BACKEND|$PAGEMAPCOMPAT_GUARANTEES|$PAGEMAPCOMPAT_FEATURE_PAGEMAP_SCAN"
    script = f'set -eu; eval "$1"; echo "{words}"'
    read = subprocess.run(["sh", "-c", script, "sh", text], capture_output=True, text=True, timeout=30, check=True)
    state = values["features"]["pagemap-scan"]["state"]
    assert read.stdout.strip() == f"{values['backend'] or 'none'}|{' '.join(values['guarantees'])}|{state}"


def test_macros_are_what_a_compiler_takes(tmp_path: Path) -> None:
    """Included twice, each feature is defined if and only if it is there."""
    values = found()
    (tmp_path / "features.h").write_text(printed("probe", "--format", "macros"))
    names = {name: f"PAGEMAPCOMPAT_HAVE_{name.upper().replace('-', '_')}" for name in values["features"]}
    lines = ['#include "features.h"', '#include "features.h"', "int main(void) {"]
    for name, macro in names.items():
        there = values["features"][name]["state"] == "yes"
        lines += [f"#if{'n' if there else ''}def {macro}", f'#error "{name}"', "#endif"]
    lines += [f"return PAGEMAPCOMPAT_PAGE_SIZE == {page_size()} ? 0 : 1; }}"]
    (tmp_path / "main.c").write_text("\n".join(lines))
    program = str(tmp_path / "main")
    compiler = ["cc", "-Wall", "-Werror", "-o", program, str(tmp_path / "main.c")]
    try:
        subprocess.run(compiler, capture_output=True, text=True, timeout=60, check=True)
    except FileNotFoundError:
        lacking("cc", "no C compiler (ENOENT)", "apt-get install gcc")
    assert subprocess.run([program], timeout=30, check=False).returncode == 0


def test_nfd_lines_are_labels() -> None:
    """Names and values that Kubernetes takes."""
    values = found()
    lines = dict(line.split("=", 1) for line in printed("probe", "--format", "nfd").splitlines())
    part = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
    assert all(re.fullmatch(part, name) and re.fullmatch(part, value) for name, value in lines.items())
    assert lines["pagemapcompat.backend"] == (values["backend"] or "none")
    for name, answer in values["features"].items():
        assert lines[f"pagemapcompat.{name}"] == answer["state"]


def test_prometheus_reads_it() -> None:
    """By its own parser: one state of each feature is 1."""
    values = found()
    families = {
        family.name: family for family in text_string_to_metric_families(printed("probe", "--format", "prometheus"))
    }
    assert all(family.type == "gauge" and family.documentation for family in families.values())
    states = {}
    for sample in families["pagemapcompat_feature"].samples:
        if sample.value == 1:
            assert sample.labels["name"] not in states
            states[sample.labels["name"]] = sample.labels["state"]
    assert states == {name: answer["state"] for name, answer in values["features"].items()}
    usable = {sample.labels["name"]: bool(sample.value) for sample in families["pagemapcompat_backend_usable"].samples}
    assert usable == {name: backend["usable"] for name, backend in values["backends"].items()}
    assert families["pagemapcompat_page_size_bytes"].samples[0].value == page_size()


def test_ansible_facts_are_identifiers() -> None:
    """So that templates write ansible_local.pagemapcompat.features.pagemap_scan."""
    values = found()
    facts = json.loads(printed("probe", "--format", "ansible"))
    assert all(name.isidentifier() for kind in ("features", "backends", "limits") for name in facts[kind])
    assert facts["backend"] == values["backend"]
    assert facts["features"] == {name.replace("-", "_"): answer["state"] for name, answer in values["features"].items()}


# -- Requirements ----------------------------------------------------------------------------------------------


def test_list() -> None:
    """Everything that can be required, also where nothing can be tried."""
    names = printed("probe", "--list").split()
    assert set(names) == {feature.value for feature in Feature} | set(BACKEND_NAMES) | set(Guarantee.__members__)
    assert printed("probe", "--list", env={"PAGEMAPCOMPAT_DISABLE": "pagemap"}).split() == names


def test_require_agrees_with_what_is_there() -> None:
    """0 for what is there; 1, a reason and a remedy for what is not; 3 for what nobody can tell."""
    values = found()
    features = {name: answer for name, answer in values["features"].items() if name not in BACKEND_NAMES}
    names = [name for name, answer in features.items() if answer["state"] == "yes"]
    names += [name for name, backend in values["backends"].items() if backend["usable"]]
    done = command("probe", "--quiet", "--require", *names, *values["guarantees"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # One feature a state: each is a process, and an emulated one takes its time.
    for state, name in {answer["state"]: name for name, answer in features.items()}.items():
        if state != "yes":
            done = command("probe", "--format", "json", "--require", "pagemap", name)
            assert done.returncode == (3 if state == "unknown" else 1), name
            assert json.loads(done.stdout)["features"][name] == features[name]
            assert name in done.stderr
            assert "remedy:" in done.stderr


def test_require_names_what_is_missing() -> None:
    """Missing outweighs unknown; a guarantee is asked of the backends that are required with it."""
    done = command("probe", "--quiet", "--require", "pagemap-scan", env=NOTHING_WORKS)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    done = command("probe", "--require", "pagemap-scan", "EXACT", env=NOTHING_WORKS)
    assert done.returncode == 1
    assert "EXACT: none of pagemap-scan gives this; none of them works" in done.stderr
    disabled = {"PAGEMAPCOMPAT_DISABLE": "pagemap"}
    assert command("probe", "--quiet", "--require", "pagemap-uffd-wp", env=disabled).returncode == 3
    assert command("probe", "--quiet", "--require", "pagemap-uffd-wp", "pagemap", env=disabled).returncode == 1
    # Each is asked for, however often the option is given.
    arguments = ["probe", "--quiet", "--require", "pagemap-scan", "--require", "pagemap"]
    assert command(*arguments, env=NOTHING_WORKS).returncode == 1
    try:
        DirtyTracker("uffd-wp").close()
    except KernelError as error:
        lacking("uffd-wp", str(error), error.hint or "none")
    done = command("probe", "--require", "uffd-wp", "NO_HELPER_THREAD")
    assert done.returncode == 1
    assert "NO_HELPER_THREAD: none of uffd-wp gives this; uffd-wp gives " in done.stderr
    assert "pagemap-scan" not in done.stderr


def test_what_a_lack_of_descriptors_keeps_from_being_told() -> None:
    """Is not missing: it may be there for whoever asks again."""
    try:
        DirtyTracker("uffd-wp").close()
    except KernelError as error:
        lacking("uffd-wp", str(error), error.hint or "none")
    line = 'ulimit -n 6; exec "$@"'
    for arguments in (
        ["probe", "--quiet", "--require", "uffd-wp"],
        ["probe", "--quiet", "--require", "EXACT"],
        ["probe", "--quiet", "--require", "uffd-wp", "KERNEL_WRITES"],
        ["selftest"],
    ):
        program = ["sh", "-c", line, "sh", sys.executable, "-m", "pagemapcompat", *arguments]
        for disabled in ("", "pagemap-scan"):
            env = {**os.environ, "PAGEMAPCOMPAT_DISABLE": disabled}
            done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False)
            assert done.returncode == 3, (arguments, disabled, done)


def test_soft_dirty_is_tried_where_nobody_is_told_of_children() -> None:
    """SIGCHLD may be ignored by whoever started this program."""

    def check() -> None:
        expected = cli_probe._soft_dirty()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        assert cli_probe._soft_dirty() == expected

    in_child(check)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["probe", "--require", "nonsense"], "nonsense"),
        (["probe", "--require"], "--require"),
        (["probe", "--format", "xml"], "xml"),
        (["probe", "--pid", "0"], "--pid: '0' is not a process id"),
        (["probe", "--pid", "me"], "me"),
        (["probe", "--pid", "1", "--format", "env"], "--pid prints text or json"),
        (["probe", "--pid", "1", "--require", "pagemap"], "without --list and --pid"),
        (["probe", "--req", "pagemap"], "--req"),
        (["frobnicate"], "frobnicate"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], word: str) -> None:
    """2, the usage and the word that was wrong; no traceback."""
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert word in done.stderr
    assert "usage: pagemapcompat" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["probe", "selftest"])
def test_a_wrong_environment(name: str) -> None:
    """Is named, with what it takes."""
    done = command(name, env={"PAGEMAPCOMPAT_DISABLE": "nonsense"})
    assert (done.returncode, done.stdout) == (2, "")
    assert "nonsense" in done.stderr
    assert "Traceback" not in done.stderr


# -- Another process -------------------------------------------------------------------------------------------


def test_another_process() -> None:
    """What could be read of it; and one that is not there."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        values = json.loads(printed("probe", "--pid", str(child.pid), "--format", "json"))
        text = printed("probe", "--pid", str(child.pid))
        child.communicate(b"\n")
    assert values["pid"] == child.pid
    assert values["answers"]["pagemap"]["state"] == "yes"
    known = {f"category-{str(category.name).lower().replace('_', '-')}" for category in PageCategory}
    if probe().supports(Feature.PAGEMAP_SCAN):
        for name in known:
            assert values["answers"][name]["state"] == probe()[Feature(name)].state
    assert set(values["answers"]) == {"pagemap", "maps", "pfn"} | known
    assert all(name in text for name in values["answers"])
    done = command("probe", "--pid", str(child.pid))
    assert (done.returncode, done.stdout) == (4, "")
    assert str(child.pid) in done.stderr


def test_a_process_that_ends_while_it_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is gone, and nothing is said of what can be told of it."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:

        def ends(category: PageCategory, check: Any = cli_scan.check_is_set) -> None:
            child.kill()
            child.wait()
            check(category)

        monkeypatch.setattr(cli_scan, "check_is_set", ends)
        with pytest.raises(TargetGoneError):
            cli_probe.readable(child.pid)


def test_a_process_that_is_not_ours() -> None:
    """Denied, with the errno and a remedy, and a status that says so."""
    if os.geteuid() != 0:
        lacking("root", "another user's process is needed (EPERM)", "run as root")
    program = (
        "import os, sys; from pagemapcompat.__main__ import main, version; version('pagemapcompat')\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)  # who may not read the interpreter's own modules\n"
        "sys.exit(main(['probe', '--format', 'json', '--pid', str(os.getppid())]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=CHILD_SECONDS, check=False
    )
    assert done.returncode == 5, done.stderr
    answer = json.loads(done.stdout)["answers"]["pagemap"]
    assert (answer["state"], answer["errno"]) == ("denied", "EACCES")
    assert "CAP_SYS_PTRACE" in answer["hint"]


def test_processes_without_memory() -> None:
    """A zombie is gone, and a kernel thread is one, whoever asks and in whatever form."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        done = command("probe", "--pid", str(child.pid))
        assert done.returncode in (4, 5), done.stderr  # without privileges it is denied already
    if not os.path.exists("/proc/2/stat") or os.geteuid() != 0:
        lacking("kernel-thread", "no kernel thread may be seen (EACCES or ENOENT)", "root, outside of a container")
    if not is_kernel_thread(2):
        lacking("kernel-thread", "2 is a process of this container (ENOENT)", "root, outside of a container")
    done = command("probe", "--pid", "2")
    assert (done.returncode, done.stdout) == (6, "")
    assert "no memory" in done.stderr


# -- The rest ----------------------------------------------------------------------------------------------------


def test_a_closed_pipe_is_quiet() -> None:
    """`pagemapcompat probe | head -1` ends without a word, with the status of a program that SIGPIPE ended."""
    program = [sys.executable, "-m", "pagemapcompat", "probe"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.close()
        assert child.stderr is not None
        assert child.stderr.read() == b""
        assert child.wait(CHILD_SECONDS) == 141


@pytest.mark.parametrize(
    "arguments", [["probe"], ["probe", "--quiet"], ["probe", "--list"], ["selftest"]], ids=" ".join
)
def test_standard_output_may_be_closed(arguments: list[str]) -> None:
    """Or full: one line says so, and the status is none that means something else."""
    for redirection in (">&-", ">/dev/full"):
        line = f'exec "$@" {redirection}'
        program = ["sh", "-c", line, "sh", sys.executable, "-m", "pagemapcompat", *arguments]
        done = subprocess.run(program, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False)
        assert "Traceback" not in done.stderr
        if "--quiet" in arguments:
            assert (done.returncode, done.stderr) == (0, "")
        else:
            assert done.returncode == 3
            assert len(done.stderr.splitlines()) == 1


def test_version() -> None:
    """Of the package."""
    assert re.fullmatch(r"pagemapcompat \d+\.\d+\.\d+\n", printed("--version"))


@pytest.mark.kernel
def test_selftest() -> None:
    """A line for each backend; 0 where all that work pass, 77 where none works."""
    done = command("selftest")
    usable = [name for name, backend in found()["backends"].items() if backend["usable"]]
    assert done.returncode == (0 if usable else 77), done.stdout
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(BACKEND_NAMES)
    assert [line for line in done.stdout.splitlines() if line.endswith(": passed")] == [
        f"{name}: passed" for name in usable
    ]
    done = command("selftest", env=NOTHING_WORKS)
    assert done.returncode == 77
    assert done.stdout.count("not usable") == len(BACKEND_NAMES)
    assert done.stdout.count("hint: ") == len(BACKEND_NAMES)
