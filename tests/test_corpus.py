"""What fuzzing has found, and what it begins with: every file of tests/corpus, without a fuzzer."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from children import in_child
from compilers import COMPILERS, HARNESS, NATIVE, ROOT, SANITIZERS, build, need_sanitizer, run
from conftest import PAGE
from filed import sealed, zstandard
from fuzzing import TARGETS, proc_maps, said_by, snapshot_file
from hypothesis import given, settings
from hypothesis import strategies as st

CORPUS = ROOT / "tests" / "corpus"
FILES = [path for name in TARGETS for path in sorted((CORPUS / name).iterdir())]
ROOM = 256 << 20
"""Bytes that one input may take, beside what the interpreter has."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input(path: Path) -> None:
    """Its target has nothing to object, in bounded memory."""
    if path.parent.name == "snapshot_file":
        zstandard()

    def check() -> None:
        with open("/proc/self/statm", encoding="utf-8") as statm:
            taken = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
        TARGETS[path.parent.name](path.read_bytes())

    in_child(check)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_texts_in_the_place_of_maps(compiler: str, tmp_path: Path) -> None:
    """vmas.c finds what is there, or says EBADMSG, and reads nothing beyond it, with sanitizers watching."""
    need_sanitizer(compiler, *SANITIZERS["address"], folder=tmp_path)
    files = [HARNESS / "fuzz_maps.c", *(NATIVE / f"{name}.c" for name in ("vmas", "files", "output"))]
    program = build(compiler, tmp_path / "replay", *SANITIZERS["address"], "-DREPLAY", *files)
    # Text that ends where the buffer does, whose last line is cut after each of its characters.
    line = b"7f0000000000-7f0000001000 rw-p 00000000 00:00 0 x\n"
    cut = []
    for length in range(len(line)):
        cut.append(tmp_path / f"cut-{length}")
        cut[-1].write_bytes(b"\0" + b"\n".rjust(16384 - length - 1, b"x") + line[:length] + b"\n" + line)
        cut.append(tmp_path / f"short-{length}")
        cut[-1].write_bytes(b"\0" + line * (16384 // len(line)) + line[:length] + b"\n")
    # As long as the kernel's own, of both kinds.
    own = []
    for kind, name in enumerate(("maps", "smaps")):
        own.append(tmp_path / name)
        own[-1].write_bytes(bytes([kind]) + Path(f"/proc/self/{name}").read_bytes())
    # By the sanitizer that it is linked with: one that watches this suite may be another compiler's.
    assert run(program, *sorted((CORPUS / "native_maps").iterdir()), *cut, *own, env={"LD_PRELOAD": ""}) == ""


def test_the_corpus_is_small() -> None:
    """A few files, a few KiB, for each target one at least."""
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {*TARGETS, "native_maps"}
    assert sum(path.stat().st_size for path in files) < 8192


def test_the_corpus_reaches_both_ends() -> None:
    """Those snapshot files that are whole load, with pages and without; without a checksum none is one."""
    zstandard()
    bodies = [(CORPUS / "snapshot_file" / name).read_bytes() for name in ("empty", "huge", "plain", "zstd")]
    told = [said_by(sealed(data[1:] + b"a" * ((data[0] >> 1 & 7) * PAGE))) for data in bodies]
    assert None not in told
    assert all(said_by(data[1:]) is None for data in bodies)
    assert any(one and one[2] and one[3] for one in told)
    assert any(one and not one[2] for one in told)


@settings(deadline=None, database=None, derandomize=True, max_examples=50)
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    """A little of what scripts/fuzz does more of."""
    proc_maps(data)
    snapshot_file(data)
