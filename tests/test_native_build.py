"""The C core builds without Python, and no compiler and no analyzer has anything to say about it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from compilers import COMPILERS, NATIVE, ROOT, SOURCES, need_compiler, options, project, run

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="no source tree around the tests; remedy: run them in a checkout"
)

STRICT = [
    "-Werror",
    "-Wshadow",
    "-Wconversion",
    "-Wstrict-prototypes",
    "-Wmissing-prototypes",
    "-Wpointer-arith",
    "-Wwrite-strings",
    "-Wformat=2",
    "-Wundef",
    "-Wnull-dereference",
]


def test_every_file_is_built() -> None:
    """What setuptools compiles is what lies there."""
    (extension,) = project()["tool"]["setuptools"]["ext-modules"]
    assert sorted(ROOT / name for name in extension["sources"]) == SOURCES


def test_lines_fit() -> None:
    """120 columns, as in Python, with tabs of eight: what no compiler says."""
    long = [
        f"{path.name}:{number}"
        for path in NATIVE.glob("*.[ch]")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line.expandtabs(8)) > 120
    ]
    assert long == []


@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_warning(compiler: str) -> None:
    """With what gcc and clang can warn of and means something here; no include path leads to Python.

    gcc's analyzer finds no path that leaks, frees twice, or uses what was freed. Nothing is silenced.
    """
    need_compiler(compiler)
    analyzer = ["-fanalyzer"] if compiler == "gcc" else []
    for source in SOURCES:
        assert run(compiler, *options(), *STRICT, *analyzer, "-c", source, "-o", "/dev/null") == ""


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_headers_stand_alone(compiler: str, tmp_path: Path) -> None:
    """Each can be the first that a file includes."""
    need_compiler(compiler)
    for header in NATIVE.glob("*.h"):
        source = tmp_path / "first.c"
        source.write_text(f'#include "{header.name}"\n#include "{header.name}"\n')
        assert run(compiler, *options(), *STRICT, "-c", source, "-o", "/dev/null") == ""


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_plain_library(compiler: str, tmp_path: Path) -> None:
    """The C files alone link, with nothing left undefined but what the C library has, and have no state to change."""
    need_compiler(compiler)
    library = tmp_path / "libpmc.so"
    command = [compiler, *options(), "-fPIC", "-shared", "-Wl,--no-undefined", "-Wl,--fatal-warnings"]
    assert run(*command, *SOURCES, "-o", library) == ""
    symbols = run("nm", library)
    assert not re.findall(r"\b_?Py\w+", symbols)
    # Writable and initialized (d), or zeroed (b): what every shared library gets, and one byte whose address is a mark.
    state = re.findall(r"^[0-9a-f]+ [dDbB] (\w+)", symbols, re.MULTILINE)
    assert {name for name in state if not name.startswith(("_", "completed"))} <= {"missing"}
