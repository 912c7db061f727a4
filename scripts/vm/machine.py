"""What the matrix needs of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = ROOT / ".venv/bin/python"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagemapcompat"
TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "apt-get": "apt",
    "apt-cache": "apt",
    "dpkg-deb": "dpkg",
    "ldd": "libc-bin",
}
"""Programs, and Debian's packages that have them."""
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
GUEST_MEMORY = 3 << 30
"""In bytes; the tests of huge pages and swap want some."""
GUEST_CPUS = 2


class MachineError(Exception):
    """Something is wrong with this machine, not with the library."""


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a program, and return what it printed.

    Raises:
        MachineError: It failed.
    """
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachineError(f"{' '.join(map(str, command))} failed\n{done.stdout}{done.stderr}")
    return done.stdout


def check() -> None:
    """See whether the matrix can run here at all.

    Raises:
        MachineError: It cannot; the text says what to install.
    """
    if os.uname().machine != "x86_64":
        raise MachineError("the guests run this machine's Python on x86-64 kernels; set PAGEMAPCOMPAT_SKIP_VM=1")
    missing = {package for tool, package in TOOLS.items() if not shutil.which(tool)}
    if not KEYRING.exists():
        missing.add("debian-archive-keyring")
    if missing:
        raise MachineError(f"install {' '.join(sorted(missing))} (apt-get install), or set PAGEMAPCOMPAT_SKIP_VM=1")
    if not PYTHON.exists():
        raise MachineError("there is no .venv; run scripts/test first, which makes it")


def guests_at_once() -> int:
    """How many guests this machine can run side by side.

    Each on CPUs of its own: one that waits for its other CPU to answer an interrupt, which another guest's has pushed
    aside, waits for milliseconds, at each change of a mapping.
    """
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    available = int(facts["MemAvailable"].split()[0]) << 10
    return max(1, min(len(os.sched_getaffinity(0)) // GUEST_CPUS, available // (GUEST_MEMORY + GUEST_MEMORY // 3)))
