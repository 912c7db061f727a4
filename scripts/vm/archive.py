"""Debian's own kernels, downloaded with apt under a configuration of its own. Nothing is installed."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import attrs

from vm.machine import CACHE, KEYRING, MachineError, run

SUITES = (
    ("http://deb.debian.org/debian-security", "bullseye-security"),
    ("http://deb.debian.org/debian-security", "bookworm-security"),
    ("http://deb.debian.org/debian-security", "trixie-security"),
    ("http://deb.debian.org/debian", "trixie-backports"),
    ("http://deb.debian.org/debian", "sid"),
)
PARTS = re.compile(r"Depends: (linux-(?:binary|modules)-\S+)")
"""From 7.0 on, linux-image-* is empty, and depends on where its image and its modules are."""


@attrs.frozen
class Image:
    """A kernel that can be booted."""

    package: str
    vmlinuz: Path
    ramdisk: Path
    """Its brd.ko, for swap."""
    served: bool
    """Whether a suite still has it; else it comes from an earlier run."""


class Archive:
    """The kernels of every suite. What was unpacked once is kept, and found again without a network."""

    def __init__(self) -> None:
        apt = CACHE / "apt"
        for folder in ("lists/partial", "cache/archives/partial"):
            (apt / folder).mkdir(parents=True, exist_ok=True)
        sources = [f"deb [signed-by={KEYRING}] {url} {suite} main\n" for url, suite in SUITES]
        (apt / "sources.list").write_text("".join(sources))
        settings = {
            "Dir::Etc::sourcelist": apt / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": apt / "lists",
            "Dir::Cache": apt / "cache",
            "Dir::State::status": "/dev/null",
            "APT::Architecture": "amd64",
            "APT::Get::AllowUnauthenticated": "false",
            "Acquire::AllowInsecureRepositories": "false",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "",
        }
        (apt / "apt.conf").write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()))
        self._env = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}
        # A suite that is gone, or cannot be reached, must not hide the others.
        done = subprocess.run(["apt-get", "update", "-q"], env=self._env, capture_output=True, text=True, check=False)
        self.complaints = [line for line in done.stderr.splitlines() if line.startswith(("E:", "W:"))]
        listed = run("apt-cache", "search", "--names-only", "^linux-image-[0-9]", env=self._env)
        self._served = {line.split()[0] for line in listed.splitlines()}

    def kernel(self, pattern: str) -> Image | None:
        """The highest version whose package name matches; None where no suite has one and no earlier run left one."""
        kept = {vmlinuz.parent.name for vmlinuz in (CACHE / "kernels").glob("*/vmlinuz")}
        names = sorted((name for name in self._served | kept if re.fullmatch(pattern, name)), key=_version)
        # An index can name a version whose parts are gone; the next one serves as well.
        for name in reversed(names):
            folder = CACHE / "kernels" / name
            if name in kept or self._unpack(name, folder):
                return Image(name, folder / "vmlinuz", folder / "brd.ko", name in self._served)
        return None

    def _unpack(self, name: str, folder: Path) -> bool:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
            scratch = Path(temporary)
            depends = run("apt-cache", "depends", name, env=self._env)
            for package in [name, *PARTS.findall(depends)]:
                command = ["apt-get", "download", "-q", package]
                done = subprocess.run(command, cwd=scratch, env=self._env, capture_output=True, text=True, check=False)
                if done.returncode:
                    self.complaints.append(f"{package}: {done.stderr.strip()}")
                    return False
            for deb in scratch.glob("*.deb"):
                run("dpkg-deb", "-x", deb, scratch / "root")
            images = [*scratch.glob("root/boot/vmlinuz*"), *scratch.glob("root/usr/lib/modules/*/vmlinuz")]
            ramdisks = [*scratch.glob("root/**/kernel/drivers/block/brd.ko*")]
            if not images or not ramdisks:
                raise MachineError(f"{name} has no vmlinuz or no brd.ko: Debian's packages are laid out anew")
            (scratch / "kept").mkdir()
            shutil.copy(images[0], scratch / "kept/vmlinuz")
            (scratch / "kept/brd.ko").write_bytes(_plain(ramdisks[0]))
            (scratch / "kept").rename(folder)
        return True


def _version(name: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", name)]


def _plain(module: Path) -> bytes:
    data = module.read_bytes()
    if module.suffix == ".xz":
        return lzma.decompress(data)
    if module.suffix != ".ko":
        raise MachineError(f"{module.name} is compressed in a way that is new")
    return data
