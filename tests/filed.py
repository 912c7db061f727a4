"""Snapshots of memory that never was, and their files made by hand."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import PAGE, lacking

from pagemapcompat import AddressRange, Snapshot, SnapshotFileError, _kernel

Compression = Literal["zstd"] | None
AT = 1 << 32
HEADER = struct.Struct("<8sIIQQQQ")
RUN = struct.Struct("<QQQ")
HELD, MISSING = 1, 2


def zstandard() -> Any:
    """The package, or a skip."""
    if find_spec("zstandard") is None:
        lacking("zstandard", "not installed (ModuleNotFoundError)", "pip install 'pagemapcompat[zstd]'")
    return import_module("zstandard")


def page(number: int) -> bytes:
    """Content that tells pages apart and is no zeros."""
    return random.Random(number).randbytes(PAGE)


def made(
    pages: int, held: Iterable[int] = (), missing: Iterable[tuple[int, int]] = (), length: int | None = None
) -> Snapshot:
    """A snapshot of memory that never was."""
    image = _kernel.image_create(pages)
    for first, count in missing:
        _kernel.image_miss(image, first, count)
    for number in held:
        _kernel.image_load(image, number, page(number))
    return Snapshot(image, AddressRange.from_length(AT, pages * PAGE), pages * PAGE if length is None else length)


def sealed(body: bytes) -> bytes:
    """With the checksum that belongs to it."""
    return body + hashlib.sha256(body).digest()


def by_hand(
    runs: Iterable[tuple[int, int, int]],
    content: bytes = b"",
    *,
    magic: bytes = b"PMCSNAP\n",
    version: int = 1,
    flags: int = 0,
    size: int = PAGE,
    address: int = AT,
    length: int = 8 * PAGE,
    count: int | None = None,
) -> bytes:
    """A file, as the module's docstring describes it."""
    table = [RUN.pack(*run) for run in runs]
    header = HEADER.pack(magic, version, flags, size, address, length, len(table) if count is None else count)
    return sealed(header + b"".join(table) + content)


def assert_equal(a: Snapshot, b: Snapshot) -> None:
    """The same in everything that one can ask for."""
    assert (len(a), a.range) == (len(b), b.range)
    assert not a.diff(b).pages
    assert a.held() == b.held()
    assert a.missing() == b.missing()


def refuse(path: Path, *words: str, max_bytes: int | None = None) -> SnapshotFileError:
    """Load it in vain. The error names it, says what is wrong, and what to do."""
    with pytest.raises(SnapshotFileError) as caught:
        Snapshot.load(path, max_bytes=max_bytes)
    for word in (repr(str(path)), *words):
        assert word in str(caught.value)
    assert caught.value.hint
    return caught.value
