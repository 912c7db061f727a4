"""Whatever reads what others wrote, and what must be true of it for any bytes: the targets of scripts/fuzz.

The suite replays tests/corpus with nothing but this file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import struct
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from pagemapcompat import AddressRange, Snapshot, SnapshotFileError, _kernel, cli_probe, cli_scan, page_size
from pagemapcompat.__main__ import main
from pagemapcompat.errors import TargetGoneError

PAGE = page_size()
HEADER, RUN = struct.Struct("<8sIIQQQQ"), struct.Struct("<QQQ")
HELD, MISSING = 1, 2
MAPS_END = 1 << 47

# -- Snapshot files --------------------------------------------------------------------------------------------

Told = tuple[int, int, dict[int, bytes], set[int]]
"""Address, length, the pages that are held, and those that are missing."""
_MOST = 1 << 12
"""Pages of content that are looked at one by one; what announces more is loaded, and not compared."""


class UndecidedError(Exception):
    """A file of which nothing more is asked than that it loads or is refused."""


def _inflated(content: bytes, size: int) -> bytes | None:
    """So many bytes, and one more if there are any. None: it is no zstd."""
    zstd = import_module("zstandard")
    decompressor = zstd.ZstdDecompressor(max_window_size=8 << 20)
    try:
        at_once = decompressor.stream_reader(content, read_across_frames=True).read(size + 1)
        reader = decompressor.stream_reader(content, read_across_frames=True)
        in_turn = b"".join(reader.read(PAGE) for _ in range(size // PAGE)) + reader.read(1)
    except zstd.ZstdError:
        return None
    if at_once != in_turn:
        # Of a frame that is cut off behind its last block zstandard gives what is asked for at first, and no more.
        raise UndecidedError
    return bytes(at_once)


def said_by(data: bytes) -> Told | None:
    """What a file says, read as the format is described, or None where it is none."""
    body, digest = data[:-32], data[-32:]
    if len(data) < HEADER.size + 32 or hashlib.sha256(body).digest() != digest:
        return None
    magic, version, flags, size, address, length, count = HEADER.unpack_from(body)
    if (magic, version, size) != (b"PMCSNAP\n", 1, PAGE) or flags > 1 or length >= 1 << 47:
        return None
    pages, start = -(-length // PAGE), HEADER.size
    if address % PAGE or address + pages * PAGE > cli_scan.USER_END or count * RUN.size > len(body) - start:
        return None
    runs = [RUN.unpack_from(body, start + i * RUN.size) for i in range(count)]
    end = 0
    for first, run, kind in runs:
        if first < end or run < 1 or first + run > pages or kind not in {HELD, MISSING}:
            return None
        end = first + run
    content: bytes | None = body[start + count * RUN.size :]
    held = sum(run for _, run, kind in runs if kind == HELD)
    if flags:
        if held > _MOST:
            raise UndecidedError
        content = _inflated(content, held * PAGE)
    if content is None or len(content) != held * PAGE:
        return None
    numbers = [page for first, run, kind in runs if kind == HELD for page in range(first, first + run)]
    there = {page: content[i * PAGE : (i + 1) * PAGE] for i, page in enumerate(numbers)}
    gone = {page for first, run, kind in runs if kind == MISSING for page in range(first, first + min(run, _MOST))}
    return address, length, {page: text for page, text in there.items() if any(text)}, gone


def snapshot_file(data: bytes) -> None:
    """A file loads as what it says, or is refused.

    Bit 0 of the first byte adds the checksum, the three bits above it so many pages of content in front of that.
    """
    if not data:
        return
    body = data[1:] + b"a" * ((data[0] >> 1 & 7) * PAGE)
    if data[0] & 1:
        body += hashlib.sha256(body).digest()
    try:
        said = said_by(body)
        decided = True
    except UndecidedError:
        said, decided = None, False
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, body)
        loaded = Snapshot.load(f"/proc/self/fd/{fd}")
    except SnapshotFileError as error:
        assert error.hint
        assert said is None, f"refused: {error}"
        return
    finally:
        os.close(fd)
    if not decided:
        assert loaded.pages <= loaded.range.length // PAGE
        return
    assert said is not None
    address, length, held, missing = said
    assert (loaded.range.start, len(loaded)) == (address, length)
    if loaded.pages + loaded.missing().pages <= _MOST:
        assert set(loaded.held().page_indices()) == set(held)
        assert set(loaded.missing().page_indices()) == missing
        for page, text in held.items():
            assert _kernel.image_read(loaded._image, page, 1) == text


# -- /proc -----------------------------------------------------------------------------------------------------


def proc_maps(data: bytes) -> None:
    """Lines as the kernel writes them, for any addresses and any names, are read as they were written."""
    wrote, text = [], b""
    at, rest = 0, data
    while len(rest) >= 8 and at < MAPS_END:
        skip, pages, bits, size = struct.unpack_from("<HHBB", rest)
        path, rest = rest[6 : 6 + size].strip(), rest[6 + size :]
        path = path.replace(b"\n", b"\\012").lstrip()
        if path:
            path = b"/" + path
        start = at + skip * PAGE
        at = start + (pages + 1) * PAGE
        permissions = bytes(letter if bits >> i & 1 else ord("-") for i, letter in enumerate(b"rwx"))
        permissions += b"s" if bits & 8 else b"p"
        line = b"%08x-%08x %s %08x %02x:%02x %d " % (start, at, permissions, bits, bits, bits, bits)
        text += (line.ljust(73) + path if path else line) + b"\n"
        wrote.append((start, at, permissions.decode(), path.decode(errors="backslashreplace")))
    asked = AddressRange(0, MAPS_END)
    found = list(cli_scan._mappings(io.BytesIO(text), asked))
    assert [(one.start, one.end, one.permissions, one.path) for one in found] == wrote
    for one in found:
        assert "\x1b" not in cli_scan._visible(one.path)
    covered = [chunk for chunk, _ in cli_scan._chunks(found)]
    assert all(a.end <= b.start for a, b in itertools.pairwise(covered))
    assert sum(mapped for _, mapped in cli_scan._chunks(found)) == sum(one.length for one in found)


# -- The command line ------------------------------------------------------------------------------------------

_STATUSES = {0, 1, 2, 3, 4, 5, 6, 7, 77, 130, 141}


def _nobody(request: Any, _wanted: Any) -> Any:
    raise TargetGoneError.make(3, f"/proc/{request.pid}", "there is no such process (any more)")


_find_once = cache(cli_probe.find)


def command_line(data: bytes) -> None:
    """Words, separated by newlines, end with a status that --help knows, and never with a traceback.

    No process is looked at and the kernel is tried once, which takes long and tells nothing of the words.
    """
    words = [os.fsdecode(word) for word in data.replace(b"\0", b"").split(b"\n")]
    if "selftest" in words:
        return
    look, find = cli_scan._look, cli_probe.find
    cli_scan._look, cli_probe.find = _nobody, _find_once
    output, errors = (io.TextIOWrapper(io.BytesIO(), errors="backslashreplace") for _ in range(2))
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                status = main(words)
            except SystemExit as stop:
                status = stop.code
                assert status in {0, 2}, status
    finally:
        cli_scan._look, cli_probe.find = look, find
    assert status in _STATUSES, status
    errors.flush()
    assert b"Traceback" not in errors.buffer.getvalue()
    if status not in {0, 141}:
        assert errors.buffer.getvalue() or "--quiet" in words or any(word.startswith("--q") for word in words)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (snapshot_file, proc_maps, command_line)
}


def fuzz() -> None:
    """Run the target that the command line names, under Atheris. libFuzzer takes the other words."""
    atheris = import_module("atheris")
    name = sys.argv.pop(1)
    if name == "snapshot_file" and find_spec("zstandard") is None:
        sys.exit("zstandard is not installed; pip install zstandard")
    _find_once()  # not on the fuzzer's clock
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()
