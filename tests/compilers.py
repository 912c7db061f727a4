"""The C core built by hand: the compilers, what they are told, and skips that say how to get one."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from conftest import lacking

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "pagemapcompat" / "native"
SOURCES = sorted(NATIVE.glob("*.c"))
HARNESS = ROOT / "tests" / "native"
COMPILERS = ("gcc", "clang")
WALLED = ["-Wl,--wrap=pmc_pages_alloc,--wrap=pmc_pages_free"]
"""Links the walls of checked.c around the library's own pages."""
SANITIZERS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread", "-fno-omit-frame-pointer"],
}


@cache
def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def options() -> list[str]:
    """What the extension module is compiled with."""
    (extension,) = project()["tool"]["setuptools"]["ext-modules"]
    return [*extension["extra-compile-args"], f"-I{NATIVE}"]


def run(*command: str | Path, seconds: float = 300, env: dict[str, str] | None = None) -> str:
    """Run a command; what it printed. Fails with that when it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}"
    return done.stdout


def need_compiler(name: str) -> None:
    """Skip where it is not installed."""
    if not shutil.which(name):
        lacking(name, "no such compiler (ENOENT)", f"apt-get install {name}")


def need_sanitizer(compiler: str, *wanted: str, folder: Path) -> None:
    """Skip where a compiler, or what it links for a sanitizer, is not there."""
    need_compiler(compiler)
    program = folder / "nothing.c"
    program.write_text(
        "#include <stdint.h>\n#include <stddef.h>\nint LLVMFuzzerTestOneInput(const uint8_t *, size_t);\n"
        "int LLVMFuzzerTestOneInput(const uint8_t *d, size_t n) { return n && *d; }\n"
        + ("" if "-fsanitize=fuzzer,address,undefined" in wanted else "int main(void) { return 0; }\n")
    )
    built = subprocess.run(
        [compiler, *wanted, program, "-o", folder / "nothing"], capture_output=True, text=True, timeout=60, check=False
    )
    if built.returncode:
        package = "libgcc-12-dev, or that of its version" if compiler == "gcc" else "libclang-rt-dev"
        lacking(f"{compiler}-sanitizers", built.stderr.strip().splitlines()[-1], f"apt-get install {package}")


def build(compiler: str, program: Path, *words: str | Path) -> Path:
    """Compile and link a program, with the options of the extension module."""
    run(compiler, *options(), "-O1", "-g", "-Werror", *words, "-o", program)
    return program
