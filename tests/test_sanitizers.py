"""The C core under AddressSanitizer, UndefinedBehaviorSanitizer, LeakSanitizer and ThreadSanitizer.

By a C program that does everything at once, and by this suite on an extension module that is built so. scripts/sanitize
does more of both: PAGEMAPCOMPAT_SANITIZE_ROUNDS and PAGEMAPCOMPAT_SANITIZE_TESTS say how much.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import figures
import pytest
from compilers import COMPILERS, HARNESS, ROOT, SANITIZERS, SOURCES, WALLED, build, need_sanitizer, run
from conftest import CHILD_SECONDS, Flavour, flavours

from pagemapcompat import Feature, _kernel, probe
from pagemapcompat.backends import Backend
from pagemapcompat.userfaultfd import Way

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="no source tree around the tests; remedy: run them in a checkout"
)

ROUNDS = int(os.environ.get("PAGEMAPCOMPAT_SANITIZE_ROUNDS", "0"))
TESTS = shlex.split(os.environ.get("PAGEMAPCOMPAT_SANITIZE_TESTS", "test_snapshots.py test_cursors.py -m kernel"))
"""Words for pytest."""
UNFIT = (
    *("injection", "sanitizers"),  # they are about an extension module of their own
    *("bench", "examples", "integrations", "native_build", "packaging", "scripts", "soak", "vm_matrix"),
    *("qiling", "unicorn"),  # whose machine code no sanitizer knows
)
"""Files that never run so: they start what does not find the copy, or build anew."""
HOW = {
    Way.SYSCALL: _kernel.UFFD_SYSCALL,
    Way.DEVICE: _kernel.UFFD_DEVICE,
    Way.USER_MODE_ONLY: _kernel.UFFD_USER_MODE_ONLY,
}
QUIET = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}
NO_LEAKS = re.compile("LeakSanitizer has encountered a fatal error|ptrace")
NO_ROOM = re.compile("unexpected memory mapping|personality")
DRIVEN = [param for param in flavours() if ROUNDS or param.id in {"pagemap-scan", "uffd-wp", "uffd-wp-as-5.10"}]
"""The two as they are, and the one with the fault thread's log. scripts/sanitize takes all."""


@pytest.fixture(scope="module")
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/native/driver.c, by one compiler for one sanitizer."""
    compiler, sanitizer = request.param
    folder = tmp_path_factory.mktemp(f"{compiler}-{sanitizer}")
    need_sanitizer(compiler, *SANITIZERS[sanitizer], folder=folder)
    files = [*SOURCES, HARNESS / "checked.c", HARNESS / "driver.c"]
    return build(compiler, folder / sanitizer, *SANITIZERS[sanitizer], *WALLED, *files)


def drive(driver: Path, backend: Backend, kind: str, rounds: int) -> str:
    """Run it as a backend would."""
    numbers = [HOW[backend.way], int(backend._features()), backend._abilities()]
    command = [str(driver), *map(str, numbers), kind, str(rounds)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, **QUIET}
    )
    if done.returncode and NO_ROOM.search(done.stderr) and shutil.which("setarch"):
        # The addresses that ThreadSanitizer needs are taken at random by kernels that randomize more of them.
        return run("setarch", "-R", *command, env=QUIET)
    if done.returncode and NO_LEAKS.search(done.stderr):
        return run(*command, env={**QUIET, "ASAN_OPTIONS": "detect_leaks=0"})  # as under ptrace
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("kind", ["private", "shared", "mixed", "hugetlb"])
@pytest.mark.parametrize("flavour", DRIVEN, indirect=True)
@pytest.mark.parametrize(
    "driver",
    [(compiler, sanitizer) for compiler in COMPILERS for sanitizer in SANITIZERS],
    ids=lambda pair: "-".join(pair),
    indirect=True,
)
def test_everything_at_once(driver: Path, flavour: Flavour, kind: str, request: pytest.FixtureRequest) -> None:
    """Writers, readers, a copier and a disturber on one range: nothing is lost, leaked, raced for or undefined."""
    if kind != "private" and not probe().supports(Feature.UFFD_WP_HUGETLBFS_SHMEM):
        pytest.skip("this flavour imitates a kernel that refuses shared memory; remedy: the other flavours")
    rounds = ROUNDS or (60 if driver.name == "thread" else 200)
    if kind == "hugetlb":
        request.getfixturevalue("pool")
        rounds //= 4
    with flavour.tracker() as tracker:
        backend = tracker._backend
    said = drive(driver, backend, kind, rounds)
    writes, collects = map(int, re.fullmatch(r"(\d+) writes, (\d+) collects\n", said).groups())
    assert writes
    assert collects
    figures.add("C program under sanitizers", {"runs": 1, "writes": writes, "collects": collects})


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package whose extension module was built for AddressSanitizer."""
    folder = tmp_path_factory.mktemp("sanitized")
    need_sanitizer("gcc", *SANITIZERS["address"], folder=folder)
    options = " ".join([*SANITIZERS["address"], "-g", "-O1"])
    walls = folder / "checked.o"
    run("gcc", *SANITIZERS["address"], "-fPIC", "-O1", "-c", HARNESS / "checked.c", "-o", walls)
    setup = "import os, setuptools; os.chdir(os.environ['ROOT']); setuptools.setup()"
    run(
        sys.executable,
        *("-c", setup, "-q", "build", "--build-base", folder / "build", "--build-lib", folder / "lib"),
        env={
            "ROOT": str(ROOT),
            "CC": "gcc",
            "CFLAGS": options,
            "LDFLAGS": " ".join([*SANITIZERS["address"], *WALLED, str(walls)]),
        },
    )
    return folder / "lib"


def under_address_sanitizer(sanitized: Path, *words: str, seconds: float = 3600) -> subprocess.CompletedProcess[str]:
    """Run Python with that copy, which also its children find first, being in its folder."""
    preload = run("gcc", "-print-file-name=libasan.so").strip()
    # Python itself frees at its end what it likes; the C program looks for leaks.
    options = "detect_leaks=0:verify_asan_link_order=0:allocator_may_return_null=1"
    return subprocess.run(
        [sys.executable, *words],
        cwd=sanitized,
        # Into files: pytest, and whoever starts a child, reads standard error and may keep it.
        env={
            **os.environ,
            "LD_PRELOAD": preload,
            "PAGEMAPCOMPAT_TEST_SECONDS": str(5 * CHILD_SECONDS),
            "ASAN_OPTIONS": f"{options}:log_path={sanitized}/report",
            "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={sanitized}/report",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )


def reports(sanitized: Path) -> str:
    """What sanitizers have written since it was asked last, in children too."""
    said = ""
    for path in sanitized.glob("report.*"):
        said += path.read_text(errors="replace")
        path.unlink()
    return said


def test_the_suite_under_address_sanitizer(sanitized: Path) -> None:
    """Its tests pass on an extension module that checks each access, with walls around the library's own pages."""
    tests = [str(ROOT / "tests" / word) if word.endswith(".py") else word for word in TESTS]
    unfit = [f"--ignore={ROOT}/tests/test_{name}.py" for name in UNFIT]
    # A fork that meets a thread just starting, such as that of faulthandler's timer, leaves the child a sanitizer that
    # is locked for ever.
    options = ["-p", "no:cacheprovider", "-o", "faulthandler_timeout=0"]
    command = ["-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), *options]
    done = under_address_sanitizer(sanitized, *command, *unfit, *tests)
    assert reports(sanitized) == ""
    assert done.returncode == 0, done.stdout[-20000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout)


def test_the_sanitizer_watches(sanitized: Path) -> None:
    """One page read beyond what was given ends the process: the copy is found, and is what it should be."""
    program = """
        from pagemapcompat import _kernel
        assert not _kernel.__file__.startswith(ROOT), _kernel.__file__
        image = _kernel.image_create(4)
        page = bytearray(_kernel._PAGE_SIZE)
        _kernel.lib.pmc_image_load(image.c, 0, 2, _kernel.ffi.from_buffer(page))
        """
    done = under_address_sanitizer(sanitized, "-c", textwrap.dedent(program).replace("ROOT", repr(str(ROOT))))
    assert done.returncode != 0, done.stdout
    assert "AddressSanitizer: heap-buffer-overflow" in reports(sanitized)
