"""Files that are no snapshots, or no longer: what is loaded is what was saved, and nothing else ever is."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from children import in_child
from conftest import PAGE
from filed import (
    AT,
    HEADER,
    HELD,
    MISSING,
    RUN,
    Compression,
    by_hand,
    page,
    refuse,
    sealed,
    zstandard,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pagemapcompat import AddressRange, Snapshot, SnapshotFileError, _kernel

PLAIN = settings(deadline=None, database=None, derandomize=True)


@pytest.fixture(params=[None, "zstd"], ids=["plain", "zstd"])
def compression(request: pytest.FixtureRequest) -> Compression:
    """Both ways to write a file."""
    if request.param:
        zstandard()
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def small(tmp_path: Path, compression: Compression) -> Iterator[tuple[Path, int, bytes]]:
    """A small file, its descriptor and its content."""
    path = tmp_path / "small"
    image = _kernel.image_create(8)
    _kernel.image_load(image, 2, (b"small" * PAGE)[:PAGE])
    _kernel.image_miss(image, 5, 2)
    Snapshot(image, AddressRange.from_length(AT, 8 * PAGE), 8 * PAGE).save(path, compression=compression)
    fd = os.open(path, os.O_RDWR)
    yield path, fd, path.read_bytes()
    os.close(fd)


def is_refused(path: Path) -> bool:
    """Cheaper than `refuse`, for thousands of files."""
    try:
        Snapshot.load(path)
    except SnapshotFileError:
        return True
    return False


def test_every_altered_byte_is_found(small: tuple[Path, int, bytes]) -> None:
    """One bit of each."""
    path, fd, data = small
    for at, byte in enumerate(data):
        os.pwrite(fd, bytes([byte ^ 1 << at % 8]), at)
        assert is_refused(path), at
        os.pwrite(fd, bytes([byte]), at)
    assert not is_refused(path)


def test_every_truncation_is_found(small: tuple[Path, int, bytes]) -> None:
    """To whatever length."""
    path, fd, data = small
    for length in reversed(range(len(data))):
        os.ftruncate(fd, length)
        assert is_refused(path), length
    refuse(path, "is no snapshot")


def test_whatever_is_appended_is_found(small: tuple[Path, int, bytes]) -> None:
    """Even another checksum, or the file once more."""
    path, _, data = small
    for tail in (b"\0", b"\n", bytes(32), data[-32:], data, bytes(PAGE), hashlib.sha256(data).digest()):
        path.write_bytes(data + tail)
        assert is_refused(path), tail
    path.write_bytes(b"\0" + data)
    refuse(path, "is no snapshot")


MANY = [(number, 1, MISSING) for number in range(8)]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (sealed(b""), "is no snapshot"),
        (sealed(b"PMCSNAP\n"), "ends inside its header"),
        (sealed(bytes(48)), "is no snapshot"),
        (by_hand([], magic=b"PMCSNAP\r"), "is no snapshot"),
        (by_hand([], version=2), "is of version 2, and this library reads version 1"),
        (by_hand([], version=0), "is of version 0"),
        (by_hand([], flags=2), "has flags 0x2"),
        (by_hand([], flags=1 << 31 | 1), "has flags 0x80000001"),
        (by_hand([], size=4 * PAGE), f"has pages of {4 * PAGE} bytes, and this machine pages of {PAGE}"),
        (by_hand([], size=0), "has pages of 0 bytes"),
        (by_hand([], address=AT + 1), "where no memory can be"),
        (by_hand([], address=(1 << 63) - 7 * PAGE), "where no memory can be"),
        (by_hand([], address=(1 << 64) - PAGE), "where no memory can be"),
        (by_hand([], length=1 << 47), "where no memory can be"),
        (by_hand([], length=(1 << 64) - 1), "where no memory can be"),
        (by_hand([], count=1), "is too short for its 1 runs"),
        (by_hand([], count=(1 << 64) - 1), "is too short for its"),
        (by_hand(MANY, count=7), "has 24 bytes of content where 0 are announced"),
        (by_hand([(0, 0, MISSING)]), "has an impossible run 0: 0 pages of kind 2 from page 0 of 8"),
        (by_hand([(0, 1, 0)]), "of kind 0"),
        (by_hand([(0, 1, 3)]), "of kind 3"),
        (by_hand([(0, 1, (1 << 64) - 1)]), "of kind"),
        (by_hand([(8, 1, MISSING)]), "impossible run 0: 1 pages of kind 2 from page 8"),
        (by_hand([(7, 2, MISSING)]), "impossible run 0: 2 pages"),
        (by_hand([(0, 1 << 63, MISSING)]), "pages of kind 2 from page 0"),
        (by_hand([((1 << 64) - 1, 2, MISSING)]), "impossible run 0: 2 pages"),
        (by_hand([(1, 2, MISSING), (2, 1, MISSING)]), "impossible run 1"),
        (by_hand([(4, 1, MISSING), (2, 1, MISSING)]), "impossible run 1"),
        (by_hand([(1, 1, HELD)], page(1)[1:]), f"has {PAGE - 1} bytes of content where {PAGE} are announced"),
        (by_hand([(1, 1, HELD)], page(1) + b"\0"), f"has {PAGE + 1} bytes of content"),
        (by_hand([(1, 1, MISSING)], page(1)), f"has {PAGE} bytes of content where 0 are announced"),
        (by_hand([(1, 1, HELD)], page(1))[:-1] + b"\0", "the checksum differs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_lies_with_a_valid_checksum(data: bytes, words: str, tmp_path: Path) -> None:
    """Files that somebody made, not that something damaged."""
    (tmp_path / "file").write_bytes(data)
    refuse(tmp_path / "file", words)


def test_a_newer_version_has_its_own_hint(tmp_path: Path) -> None:
    """As have flags; what is older was altered."""
    for data, newer in ((by_hand([], version=2), True), (by_hand([], flags=4), True), (by_hand([], version=0), False)):
        (tmp_path / "file").write_bytes(data)
        assert ("newer pagemapcompat" in str(refuse(tmp_path / "file").hint)) == newer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda compress: compress(b""), "less content"),
        (lambda compress: compress(page(1)[1:]), "less content"),
        (lambda compress: compress(page(1))[:-4], "cannot be decompressed"),
        (lambda compress: compress(page(1) + b"\0"), "more content"),
        (lambda compress: compress(page(1)) + compress(b"\0"), "more content"),
        (lambda compress: compress(page(1)) + b"\0\0\0\0", "cannot be decompressed"),
        (lambda compress: b"\0" + compress(page(1)), "cannot be decompressed"),
    ],
    ids=["empty", "short", "cut", "long", "frame", "behind", "before"],
)
def test_compressed_lies(make: Callable[[Any], bytes], words: str, tmp_path: Path) -> None:
    """What comes out is what was announced, no more and no less."""
    content = make(zstandard().ZstdCompressor().compress)
    (tmp_path / "file").write_bytes(by_hand([(1, 1, HELD)], content, flags=1))
    refuse(tmp_path / "file", words)


def with_memory(room: int, function: Callable[..., object], *arguments: object) -> None:
    """Call it with so many bytes of address space to grow into."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        used = int(statm.read().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    function(*arguments)


def test_a_bomb_is_not_set_off(tmp_path: Path) -> None:
    """256 MiB in a few kilobytes: what was not announced never comes out of it."""
    compressor = zstandard().ZstdCompressor().compressobj()
    bomb = b"".join([*(compressor.compress(b"\1" * (1 << 20)) for _ in range(256)), compressor.flush()])
    assert len(bomb) < 1 << 15
    (tmp_path / "file").write_bytes(by_hand([(1, 1, HELD)], bomb, flags=1))
    in_child(with_memory, 64 << 20, refuse, tmp_path / "file", "more content")


def test_no_more_than_is_allowed(tmp_path: Path) -> None:
    """A bomb that announces what is in it is refused by what the caller allows, before any of it is read."""
    pages = 1 << 16
    compressor = zstandard().ZstdCompressor().compressobj()
    blow = page(1) * 256
    bomb = b"".join([*(compressor.compress(blow) for _ in range(pages // 256)), compressor.flush()])
    (tmp_path / "file").write_bytes(by_hand([(0, pages, HELD)], bomb, flags=1, length=pages * PAGE))

    def allowed() -> None:
        refuse(tmp_path / "file", f"{pages * PAGE} bytes", f"{pages * PAGE - 1}", max_bytes=pages * PAGE - 1)

    in_child(with_memory, 64 << 20, allowed)
    small = by_hand([(0, 2, HELD)], page(1) + page(2))
    (tmp_path / "small").write_bytes(small)
    assert Snapshot.load(tmp_path / "small", max_bytes=2 * PAGE).pages == 2
    refuse(tmp_path / "small", "max_bytes is 0", max_bytes=0)


def test_a_window_beyond_the_format_is_refused(tmp_path: Path) -> None:
    """It would be allocated whatever the content."""
    module = zstandard()
    parameters = module.ZstdCompressionParameters.from_level(3, window_log=24)
    compressor = module.ZstdCompressor(compression_params=parameters).compressobj()
    content = compressor.compress(page(1)) + compressor.flush()
    (tmp_path / "file").write_bytes(by_hand([(1, 1, HELD)], content, flags=1))
    refuse(tmp_path / "file", "cannot be decompressed")


def test_size_alone_allocates_nothing(tmp_path: Path) -> None:
    """A file may be as long as it likes, without having anything in it."""
    count = 1 << 30
    header = by_hand([(5, 1, MISSING)], length=1 << 46, count=count)[:-32]
    (tmp_path / "file").write_bytes(header)
    os.truncate(tmp_path / "file", HEADER.size + count * RUN.size + 32)
    in_child(with_memory, 64 << 20, refuse, tmp_path / "file", "impossible run 1")


def test_only_regular_files(tmp_path: Path) -> None:
    """Nothing waits, whatever the path leads to; errors of the system stay what they are."""
    os.mkfifo(tmp_path / "fifo")
    in_child(refuse, tmp_path / "fifo", "is no regular file")
    refuse(Path("/dev/zero"), "is no regular file")
    with pytest.raises(IsADirectoryError):
        Snapshot.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Snapshot.load(tmp_path / "nowhere")


WORDS = st.one_of(st.integers(0, 9), st.integers(0, (1 << 64) - 1))
CHANGES = st.one_of(
    st.tuples(st.just("word"), st.integers(1, 15), WORDS),
    st.tuples(st.just("flip"), st.integers(0, 1 << 14), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.integers(0, 1 << 14), st.integers(1, 200)),
    st.tuples(st.just("insert"), st.integers(0, 1 << 14), st.binary(min_size=1, max_size=60)),
)


def changed(data: bytearray, change: tuple[str, int, Any]) -> None:
    """One change, in place. Words are those of header and table; other places are taken modulo the length."""
    kind, at, what = change
    if kind == "word":
        data[8 * at : 8 * at + 8] = struct.pack("<Q", what)
        return
    at %= len(data) or 1
    if kind == "flip" and data:
        data[at] ^= what
    elif kind == "cut":
        del data[at : at + what]
    elif kind == "insert":
        data[at:at] = what


@PLAIN
@given(st.booleans(), st.lists(CHANGES, min_size=1, max_size=4), st.booleans())
def test_changed_files_are_refused_or_whole(zstd: bool, changes: list[tuple[str, int, Any]], valid: bool) -> None:
    """Nothing else comes of any file; with a valid checksum it may be a snapshot, which is then good in every way."""
    runs = [(0, 2, HELD), (3, 1, MISSING), (5, 2, HELD)]
    content = b"".join(page(number) for number in (0, 1, 5, 6))
    if zstd:
        content = zstandard().ZstdCompressor().compress(content)
    body = bytearray(by_hand(runs, content, flags=int(zstd))[:-32])
    original = bytes(body)
    for change in changes:
        changed(body, change)
    end = hashlib.sha256(body if valid else original).digest()
    fd = os.memfd_create("changed")
    try:
        os.write(fd, body + end)
        loaded = Snapshot.load(f"/proc/self/fd/{fd}")
    except SnapshotFileError:
        return
    finally:
        os.close(fd)
    assert valid or body == original
    assert loaded.held().complete
    assert loaded.missing().complete
    assert 0 <= len(loaded) <= loaded.range.length
    assert loaded.pages == loaded.held().pages
    assert not loaded.diff(loaded).pages


@PLAIN
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    """With whatever in front and behind."""
    fd = os.memfd_create("bytes")
    try:
        for body in (data, b"PMCSNAP\n" + data, sealed(by_hand([])[:16] + data)):
            os.pwrite(fd, body, 0)
            os.ftruncate(fd, len(body))
            with contextlib.suppress(SnapshotFileError):
                assert len(Snapshot.load(f"/proc/self/fd/{fd}")) < 1 << 47
    finally:
        os.close(fd)
