"""The first screen: what README shows runs as written, and what lies under scripts can be run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PAGE, run_child

from pagemapcompat import DirtyTracker, KernelError, page_size

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = SCRIPTS / "examples" / "framebuffer.py"
BASH = [path for path in (*SCRIPTS.rglob("*"), ROOT / ".ci" / "run") if path.is_file() and not path.suffix]
DEMO_SECONDS = 300
"""Importing Unicorn alone takes a while in an emulated machine."""


def fenced(language: str) -> list[str]:
    """README's blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def usable(backend: str) -> bool:
    """Whether a backend works here."""
    try:
        DirtyTracker(backend).close()
    except KernelError:
        return False
    return True


def demo(disabled: str = "") -> subprocess.CompletedProcess[str]:
    """Run the demo's program, small."""
    return subprocess.run(
        [sys.executable, str(DEMO), "--mib", "2", "--frames", "2", "--rounds", "1"],
        env={**os.environ, "PAGEMAPCOMPAT_DISABLE": disabled},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=DEMO_SECONDS,
        check=False,
    )


def test_the_five_line_program_runs_as_written() -> None:
    """README's first program has five lines and prints what its comment says."""
    program = fenced("python")[0]
    assert len(program.splitlines()) == 5
    printed = run_child(program).strip()
    at = int(re.search(r"memory\[([\d_]+)\]", program)[1].replace("_", ""))
    first = at - at % PAGE
    assert printed == str([(first, first + PAGE)])
    lo, hi = map(int, re.search(r"# \[\((\d+), (\d+)\)\]", program).groups())
    if hi - lo == page_size():
        assert (lo, hi) == (first, first + PAGE)


def test_the_program_with_numpy_runs_as_written() -> None:
    """It prints what its comment says, and leaves nothing written."""
    program = fenced("python")[1]
    wrote = [int(number) * 4 for number in re.search(r"pixels\[(\d+):(\d+)\]", program).groups()]
    first, last = wrote[0] // PAGE * PAGE, -(-wrote[1] // PAGE) * PAGE
    *printed, left = run_child(f"{program}    print(ram.peek().pages, result.complete)\n").split("\n")[:2]
    assert (printed, left) == ([f"[[{first}, {last}]]"], "0 True")
    if page_size() == 1 << 12:
        assert f"# [[{first}, {last}]]" in program


def test_the_command_lines_of_readme_are_understood() -> None:
    """Each is run as it stands, with this process where a process is named."""
    lines = [line for block in fenced("sh") for line in block.splitlines() if line.startswith("pagemapcompat ")]
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        words = [str(os.getpid()) if word == "PID" else word for word in words]
        done = subprocess.run(
            [sys.executable, "-m", "pagemapcompat", *words], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode in (0, 1, 77), (line, done.stderr)
        assert "usage" not in done.stderr
    assert len(lines) == 5


def test_the_commands_of_readme_are_there() -> None:
    """The two that try it exist and can be executed, like every script that README names; the others are commands."""
    shown = [line.split()[0] for block in fenced("sh") for line in block.splitlines()]
    assert shown[:2] == ["scripts/demo", "scripts/test"]
    assert set(shown[2:]) == {"pagemapcompat"}
    for name in {*shown[:2], *re.findall(r"`(scripts/[\w/.]+)`", README)}:
        assert os.access(ROOT / name, os.X_OK), name
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("*.py")), ids=lambda path: path.name)
def test_python_scripts_compile(path: Path) -> None:
    """No syntax error, and no warning of one."""
    compile(path.read_text(encoding="utf-8"), path, "exec")


@pytest.mark.parametrize("path", BASH, ids=lambda path: path.name)
def test_bash_scripts_parse(path: Path) -> None:
    """`bash -n` has nothing to say. All of them are bash, whatever the login shell is."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert "bash" in first or not os.access(path, os.X_OK)
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_scripts_say_what_is_missing(tmp_path: Path) -> None:
    """With neither a fit Python nor gcc in reach, one apt command names them all, and no .venv is begun."""
    for name in ("dirname", "uname", "id", "cat", "mktemp"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    scripts = tmp_path / "clone" / "scripts"
    scripts.mkdir(parents=True)
    for name in ("_setup", "demo", "test"):
        (scripts / name).write_bytes((SCRIPTS / name).read_bytes())
    for name in ("demo", "test"):
        done = subprocess.run(
            [str(shutil.which("bash")), scripts / name],
            env={"PATH": str(tmp_path), "PYTHON": "/nowhere/python3"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert "sudo apt install python3 python3-venv python3-dev gcc\n" in done.stderr
        assert "Python 3.11 or newer is needed" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "clone" / ".venv").exists()


def test_the_demo_shows_every_backend() -> None:
    """It runs from any directory, names each backend, shows its operations or why it cannot; every answer is right."""
    done = demo()
    if not usable("auto"):
        assert done.returncode == 1
        assert "remedy:" in done.stdout
        return
    assert (done.returncode, done.stderr) == (0, "")
    for backend in ("pagemap-scan", "uffd-wp"):
        if usable(backend):
            three = rf"^{backend} \(.*ok\)\n  GET .*\n  ENGAGE_WP\+GET .*\n  WP-only "
            assert re.search(three, done.stdout, re.MULTILINE)
        else:
            assert re.search(rf"^{backend} does not work here: .+\n  remedy: .+", done.stdout, re.MULTILINE)
    assert done.stdout.count("pages, the same") == 2
    assert "Every answer was exactly right." in done.stdout


def test_the_demo_says_why_a_backend_is_not_used() -> None:
    """What was disabled is named with its reason and remedy; with nothing left the demo fails, and says so."""
    if usable("uffd-wp"):
        done = demo("pagemap-scan")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("Backend: uffd-wp")
        assert "pagemap-scan does not work here" in done.stdout
        assert "remedy: unset PAGEMAPCOMPAT_DISABLE" in done.stdout
    done = demo("pagemap-scan,uffd-wp")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("No backend works here")
    assert "remedy: unset PAGEMAPCOMPAT_DISABLE" in done.stdout
