"""An initramfs with Python, the installed wheel, the tests and busybox. No root, no loop device, no cpio(1)."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

from vm.machine import PYTHON, ROOT, run

LEFT_OUT = re.compile(
    r"(?i)(pip|setuptools|pkg_resources|wheel|build|mypy|mypyc|ruff|numpy|_distutils_hack|ast_serialize"
    r"|pil|pillow|matplotlib|mpl_toolkits|fonttools|kiwisolver|contourpy|pyperf)\b|.*__mypyc\b"
)
"""What .venv has and nothing inside needs."""
UNUSED = re.compile(r"(tests?|idlelib|tkinter|ensurepip|lib2to3|config-.*|site-packages|dist-packages)$")
"""Folders of the standard library, and of packages."""

# Everything of the guest is on the console, ttyS0, but the results, which go to ttyS1. brd is the swap; unlike the
# tmpfs that a kernel makes by itself, a ramfs has no pages that register as shmem. Both users at once: one leaves half
# of the two CPUs idle.
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin PYTHONPATH=/site HOME=/tmp
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/shm; mount -t tmpfs -o mode=1777 tmp /dev/shm
ifconfig lo 127.0.0.1
stty raw -F /dev/ttyS1
insmod /brd.ko rd_nr=1 rd_size=65536
mkswap /dev/ram0 && swapon /dev/ram0
echo 32 > /proc/sys/vm/nr_hugepages
chmod 1777 {repo}/tests
cd {repo}
for who in root nobody; do
    {{
        {python} /guest.py /settings.json $who < /dev/null
        echo '{{"who": "'$who'", "exit": '$?'}}' > /dev/ttyS1
    }} &
done
wait
dmesg | grep -E 'WARNING:|BUG:|Oops|general protection|INFO: task'
echo '{{"over": true}}' > /dev/ttyS1
sync; sleep 1; poweroff -f
"""


class Cpio:
    """A newc archive, as the kernel unpacks it."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._inode = 0
        self._folders: set[str] = set()

    def add(
        self, name: str, data: bytes = b"", mode: int = 0o100644, mtime: int = 0, device: tuple[int, int] = (0, 0)
    ) -> None:
        """Add a file, and the folders above it."""
        parent = str(Path(name).parent)
        if parent not in {".", *self._folders}:
            self._folders.add(parent)
            self.add(parent, mode=0o40755)
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, mtime, len(data), 0, 0, *device, len(encoded), 0)
        self._out.write(b"070701" + b"".join(b"%08x" % field for field in fields) + encoded)
        self._out.write(b"\0" * (-self._out.tell() % 4) + data)
        self._out.write(b"\0" * (-self._out.tell() % 4))

    def add_tree(self, source: Path, name: str) -> None:
        """Add a file, or a folder and what is in it. Times stay, else every .pyc is stale."""
        if source.is_dir():
            for child in source.iterdir():
                if not UNUSED.match(child.name):
                    self.add_tree(child, f"{name}/{child.name}")
            return
        status = source.stat()
        self.add(name, source.read_bytes(), 0o100755 if status.st_mode & 0o100 else 0o100644, int(status.st_mtime))

    def close(self) -> bytes:
        """The whole archive. Another one may follow it."""
        self.add("TRAILER!!!", mode=0)
        return self._out.getvalue() + b"\0" * (-self._out.tell() % 512)


def _libraries(files: list[Path]) -> set[str]:
    """The shared libraries that programs and extension modules load."""
    found: set[str] = set()
    for file in files:
        listed = subprocess.run(["ldd", file], capture_output=True, text=True, check=False).stdout
        found |= set(re.findall(r"(/\S+) \(0x", listed))
    return found


def _tests(repo: Path) -> None:
    """What runs there, compiled: emulated, that takes a minute. Of use at this very place alone."""
    (repo / "tests").mkdir(parents=True)
    for file in (*(ROOT / "tests").iterdir(), ROOT / "pyproject.toml"):
        if file.is_file() and (not file.match("test_*.py") or "mark.kernel" in file.read_text(encoding="utf-8")):
            shutil.copy2(file, repo / file.relative_to(ROOT))
    writing = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    run(PYTHON, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", cwd=repo, env=writing)


def base(scratch: Path) -> bytes:
    """Everything but what differs from kernel to kernel."""
    python = Path(os.path.realpath(PYTHON))
    paths = run(PYTHON, "-c", "import sysconfig as s; print(s.get_path('stdlib')); print(s.get_path('platlib'))")
    stdlib, site = map(Path, paths.split())
    # From a copy: setuptools would put into the wheel whatever an earlier build left beside the sources.
    shutil.copytree(ROOT / "pagemapcompat", scratch / "source/pagemapcompat", ignore=shutil.ignore_patterns("*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, scratch / "source")
    wheel_command = ("pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", scratch, scratch / "source")
    run(PYTHON, "-m", *wheel_command)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        wheel.extractall(scratch / "site")
    packages = [
        child
        for child in site.iterdir()
        if not LEFT_OUT.match(child.name)
        and not child.name.startswith(("__editable__", "pagemapcompat"))
        and not child.name.endswith(("-stubs", ".pth"))
    ]
    cpio = Cpio()
    for child in [*packages, *(scratch / "site").iterdir()]:
        cpio.add_tree(child, f"site/{child.name}")
    cpio.add_tree(stdlib, str(stdlib)[1:])
    cpio.add_tree(python, str(python)[1:])
    busybox = Path(shutil.which("busybox") or "busybox")
    cpio.add_tree(busybox, "bin/busybox")
    binaries = [python, busybox, *(stdlib / "lib-dynload").glob("*.so"), *(scratch / "site").rglob("*.so")]
    binaries += [file for child in packages if child.is_dir() for file in child.rglob("*.so*")]
    libraries = _libraries(binaries)
    gcc_s = "/lib/x86_64-linux-gnu/libgcc_s.so.1"  # loaded by name, when a thread ends
    for library in sorted(libraries | ({gcc_s} if Path(gcc_s).exists() else set())):
        cpio.add_tree(Path(os.path.realpath(library)), library[1:])
    repo = scratch / "repo"
    _tests(repo)
    cpio.add_tree(repo / "pyproject.toml", str(repo / "pyproject.toml")[1:])
    for file in (repo / "tests").rglob("*"):
        if file.is_file():
            cpio.add_tree(file, str(file)[1:])
    for folder in ("proc", "sys", "dev"):
        cpio.add(folder, mode=0o40755)
    cpio.add("tmp", mode=0o41777)
    cpio.add("dev/console", mode=0o20600, device=(5, 1))
    cpio.add("etc/passwd", b"root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
    cpio.add_tree(Path(__file__).with_name("guest.py"), "guest.py")
    cpio.add("init", INIT.format(python=python, repo=repo).encode(), 0o100755)
    return cpio.close()


def addition(ramdisk: Path, settings: bytes) -> bytes:
    """What one kernel gets beyond the base."""
    cpio = Cpio()
    cpio.add("brd.ko", ramdisk.read_bytes())
    cpio.add("settings.json", settings)
    return cpio.close()
