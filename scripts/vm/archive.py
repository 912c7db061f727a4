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

KERNELS = CACHE / "kernels"
SUITES = (
    ("http://deb.debian.org/debian-security", "bullseye-security"),
    ("http://deb.debian.org/debian-security", "bookworm-security"),
    ("http://deb.debian.org/debian-security", "trixie-security"),
    ("http://deb.debian.org/debian", "trixie-backports"),
    ("http://deb.debian.org/debian", "sid"),
)
PARTS = re.compile(r"Depends: (linux-(?:binary|modules)-\S+)")
"""From 7.0 on, linux-image-* is empty, and depends on where its image and its modules are."""
GONE = re.compile(r"\b404\b|no longer has a Release file|does not have a Release file")
"""What apt says of something that a mirror answers for, and does not have."""


@attrs.frozen
class Image:
    """A kernel that can be booted."""

    package: str
    vmlinuz: Path
    ramdisk: Path
    """Its brd.ko, for swap."""
    note: str
    """Where it comes from, if not from a suite of today."""


class Suite:
    """One suite, asked now: an index of an earlier run says nothing of what is served today.

    Raises:
        MachineError: It could not be asked.
    """

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        apt = CACHE / "apt" / name
        for folder in ("lists/partial", "cache/archives/partial"):
            (apt / folder).mkdir(parents=True, exist_ok=True)
        (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {url} {name} main\n")
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
            "APT::Update::Error-Mode": "any",
        }
        (apt / "apt.conf").write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()))
        self._env = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}
        self.kernels: set[str] = set()
        """The packages it serves."""
        if self._apt("update"):
            listed = run("apt-cache", "search", "--names-only", "^linux-image-[0-9]", env=self._env)
            self.kernels = {line.split()[0] for line in listed.splitlines()}

    def _apt(self, *arguments: str, cwd: Path | None = None) -> bool:
        """Run apt-get. False if the mirror has no such thing."""
        command = ["apt-get", "-q", *arguments]
        done = subprocess.run(command, cwd=cwd, env=self._env, capture_output=True, text=True, check=False)
        if done.returncode and not GONE.search(done.stderr):
            raise MachineError(f"{self.name}: {' '.join(command)} failed\n{done.stderr.strip()}")
        return not done.returncode

    def unpack(self, package: str, into: Path) -> bool:
        """Download a kernel and what it is made of. False if the index names what is there no more."""
        depends = run("apt-cache", "depends", package, env=self._env)
        if not all(self._apt("download", part, cwd=into) for part in (package, *PARTS.findall(depends))):
            return False
        for deb in into.glob("*.deb"):
            run("dpkg-deb", "-x", deb, into / "root")
        return True


class Archive:
    """Every suite that could be asked. What was unpacked once is kept, and found again without a network."""

    def __init__(self) -> None:
        self.suites: list[Suite] = []
        self.unasked: list[MachineError] = []
        for url, name in SUITES:
            try:
                self.suites.append(Suite(url, name))
            except MachineError as error:
                self.unasked.append(error)

    def kernel(self, pattern: str) -> Image | None:
        """The highest version whose package name matches. None: every suite was asked, and none has one.

        Raises:
            MachineError: It could not be found out, or downloaded.
        """
        kept = {vmlinuz.parent.name for vmlinuz in KERNELS.glob("*/vmlinuz")}
        served = {name: suite for suite in self.suites for name in suite.kernels}
        names = sorted((name for name in kept | set(served) if re.fullmatch(pattern, name)), key=_version)
        for name in reversed(names):
            folder = KERNELS / name
            if name in kept or _keep(served[name], name, folder):
                return Image(name, folder / "vmlinuz", folder / "brd.ko", "" if name in served else self._note())
        if self.unasked:
            raise self.unasked[0]
        return None

    def _note(self) -> str:
        return "not every suite could be asked for it" if self.unasked else "no suite serves it any more"


def _keep(suite: Suite, name: str, folder: Path) -> bool:
    KERNELS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        if not suite.unpack(name, scratch):
            return False
        images = [*scratch.glob("root/boot/vmlinuz*"), *scratch.glob("root/usr/lib/modules/*/vmlinuz")]
        ramdisks = [*scratch.glob("root/**/kernel/drivers/block/brd.ko*")]
        if not images or not ramdisks:
            raise MachineError(f"{name} has no vmlinuz or no brd.ko: Debian's packages are laid out anew")
        folder.mkdir(exist_ok=True)
        (folder / "brd.ko").write_bytes(_plain(ramdisks[0]))
        # Last, and in one step: a folder with a vmlinuz is whole.
        shutil.copy(images[0], folder / ".vmlinuz")
        (folder / ".vmlinuz").replace(folder / "vmlinuz")
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
