"""Snapshots in files: only the pages that are held, and SHA-256 over everything.

The format, version 1. All numbers are little-endian and unsigned; parts follow each other without padding.

- Header, 48 bytes: the magic `PMCSNAP` and a newline; version (32 bits); flags (32 bits: 1 is zstd, the others are 0);
  page size in bytes; the address where the memory lay, a multiple of the page size; its length in bytes, below 2**47,
  which need not be a multiple; the number of runs (64 bits each).
- The table, 24 bytes a run: first page, number of pages, kind (64 bits each). Pages count from the start of the memory,
  the last one may reach beyond its end. Kind 1 is held; kind 2 is missing, a guard page or a hole. Runs ascend, are
  disjoint and not empty. Pages in no run are all zeros.
- The content of the held pages, in order. With flag 1: in zstd frames (RFC 8878) with windows of at most 8 MiB.
- SHA-256 of everything before it, 32 bytes. The file ends here.

The checksum finds accidents; it proves nothing about who wrote the file. So nothing in a file is believed: whatever it
holds, reading it ends with a snapshot or an error, and memory is allocated only for what has come out of it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from itertools import chain
from struct import Struct
from typing import TYPE_CHECKING, BinaryIO, Literal, TypeAlias

import attrs

from pagemapcompat import _kernel
from pagemapcompat.errors import InvalidArgumentError, MissingPackageError, SnapshotFileError
from pagemapcompat.memory import PAGE_SHIFT, USER_END, AddressRange, page_size, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

StrPath: TypeAlias = "str | os.PathLike[str]"
Compression: TypeAlias = Literal["zstd"]

_MAGIC = b"PMCSNAP\n"
_VERSION = 1
_ZSTD = 1
_HEADER = Struct("<8sIIQQQQ")
_RUN = Struct("<QQQ")
_HELD, _MISSING = 1, 2
_LENGTH_END = 1 << 47
_WINDOW = 8 << 20
"""What RFC 8878 asks every reader to support, and so what a stranger's file makes this one allocate."""
_SEAL = b"."
_CHUNK = 1 << 20
_ALTERED = "it was truncated or altered: copy it again from where it was saved"
_NEWER = "load it with a newer pagemapcompat"


@attrs.frozen
class Loaded:
    """What was in a file."""

    image: _kernel.ImageHandle
    where: AddressRange
    """Page aligned."""
    length: int
    """In bytes, as the owner saw it."""


# -- Writing ---------------------------------------------------------------------------------------------------


def write(
    path: StrPath, image: _kernel.ImageHandle, where: AddressRange, length: int, compression: Compression | None
) -> None:
    """See `Snapshot.save`. In bounded memory, beside 24 bytes a run."""
    if compression not in (None, "zstd"):
        raise InvalidArgumentError(f"compression {compression!r} is not known").with_hint('give "zstd", or None')
    if length >= _LENGTH_END:
        raise InvalidArgumentError(f"{length} bytes of memory are too long for a file").with_hint(
            f"files hold less than {_LENGTH_END} bytes; track and save the memory in parts"
        )
    runs = _kernel.image_list(image, 0, _kernel.LIST_HELD | _kernel.LIST_MISSING)
    flags = _ZSTD if compression else 0
    header = _HEADER.pack(_MAGIC, _VERSION, flags, page_size(), where.start, length, runs.count)
    content = _content(image, runs)
    if compression:
        content = _deflated(_zstandard(), content)
    digest = hashlib.sha256()
    path = os.fsdecode(path)
    try:
        with _replacing(path) as file:
            for chunk in chain((header,), _table(runs), content):
                digest.update(chunk)
                file.write(chunk)
            file.write(digest.digest())
    except OSError as error:
        # It knows the temporary file alone, or none.
        raise OSError(error.errno, error.strerror, path) from error


def _table(runs: _kernel.Result) -> Iterator[bytes]:
    for start, end, category in _kernel.triples(runs):
        kind = _HELD if category == _kernel.LIST_HELD else _MISSING
        yield _RUN.pack(start >> PAGE_SHIFT, (end - start) >> PAGE_SHIFT, kind)


def _content(image: _kernel.ImageHandle, runs: _kernel.Result) -> Iterator[bytes | bytearray]:
    for start, end, category in _kernel.triples(runs):
        if category == _kernel.LIST_HELD:
            for first, count in _chunks(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
                yield _kernel.image_read(image, first, count)


def _deflated(zstandard: ModuleType, content: Iterator[bytes | bytearray]) -> Iterator[bytes]:
    compressor = zstandard.ZstdCompressor().compressobj()
    for chunk in content:
        yield compressor.compress(chunk)
    yield compressor.flush()


@contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """A new file that takes the place of the one at *path* once it is whole and on the disk, or vanishes."""
    folder, name = os.path.split(path)
    temporary = f".pagemapcompat-{os.urandom(8).hex()}"
    directory = os.open(folder or os.curdir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with open(temporary, "xb", opener=partial(os.open, mode=0o666, dir_fd=directory)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        raise
    finally:
        os.close(directory)


# -- Reading ---------------------------------------------------------------------------------------------------


def read(path: StrPath, max_bytes: int | None) -> Loaded:
    """See `Snapshot.load`."""
    path = os.fsdecode(path)
    if max_bytes is not None:
        max_bytes = whole_number(max_bytes, f"max_bytes={max_bytes!r}: give a whole number of bytes, or None for all")
    # Without O_NONBLOCK, opening a FIFO waits for its writer.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)) as file:
        status = os.fstat(file.fileno())
        source = _Source(path, file, status.st_size)
        if not stat.S_ISREG(status.st_mode):
            raise source.error("is no regular file", "copy what it delivers into one")
        loaded = _load(source, max_bytes)
        if source.left or file.read(source.digest.digest_size) != source.digest.digest():
            raise source.error("is not what was saved: the checksum differs")
        return loaded


class _Source:
    """A file up to its checksum, *left* bytes of it to come."""

    def __init__(self, path: str, file: BinaryIO, size: int) -> None:
        self.digest = hashlib.sha256()
        self.left = max(size - self.digest.digest_size, 0)
        self._path = path
        self._file = file

    def read(self, size: int) -> bytes:
        """So many bytes, fewer at the end."""
        chunk = self._file.read(min(size, self.left))
        self.left -= len(chunk)
        self.digest.update(chunk)
        return chunk

    def error(self, what: str, hint: str = _ALTERED) -> SnapshotFileError:
        """What is wrong with the file."""
        return SnapshotFileError(f"{self._path!r} {what}").with_hint(hint)


def _load(source: _Source, max_bytes: int | None) -> Loaded:
    flags, where, length, count = _header(source)
    read_content = _inflating(source) if flags & _ZSTD else source.read
    image = _kernel.image_create(where.pages)
    held = []
    for first, run, kind in _runs(source, count, where.pages):
        if kind == _HELD:
            held.append((first, run))
        else:
            _kernel.image_miss(image, first, run)
    announced = sum(run for _, run in held) << PAGE_SHIFT
    if max_bytes is not None and announced > max_bytes:
        hint = "load it with a greater max_bytes, if you trust it"
        raise source.error(f"announces {announced} bytes of content, and max_bytes is {max_bytes}", hint)
    if not flags & _ZSTD and announced != source.left:
        raise source.error(f"has {source.left} bytes of content where {announced} are announced")
    for first, run in held:
        for page, some in _chunks(first, first + run):
            content = read_content(some << PAGE_SHIFT)
            if len(content) != some << PAGE_SHIFT:
                raise source.error(f"has less content than the {announced} bytes that are announced")
            _kernel.image_load(image, page, content)
    rest = read_content(2)
    if rest != (_SEAL if flags & _ZSTD else b""):
        raise source.error(f"has {'more' if rest else 'less'} content than the {announced} bytes that are announced")
    return Loaded(image, where, length)


def _header(source: _Source) -> tuple[int, AddressRange, int, int]:
    """Flags, where memory lay, its length, and the number of runs."""
    head = source.read(_HEADER.size)
    if not head.startswith(_MAGIC):
        raise source.error("is no snapshot, or only the beginning of one", "give a file that Snapshot.save wrote")
    if len(head) < _HEADER.size:
        raise source.error("ends inside its header")
    _, version, flags, size, address, length, count = _HEADER.unpack(head)
    if version != _VERSION:
        hint = _NEWER if version > _VERSION else _ALTERED
        raise source.error(f"is of version {version}, and this library reads version {_VERSION}", hint)
    if flags & ~_ZSTD:
        raise source.error(f"has flags {flags:#x}, and this library knows {_ZSTD:#x}", _NEWER)
    if size != page_size():
        hint = "load it on a machine with pages of that size"
        raise source.error(f"has pages of {size} bytes, and this machine pages of {page_size()}", hint)
    end = address + -(-length // size) * size
    if address % size or length >= _LENGTH_END or end > USER_END:
        raise source.error(f"claims to be of {length} bytes at {address:#x}, where no memory can be")
    return flags, AddressRange(address, end), length, count


def _runs(source: _Source, count: int, pages: int) -> Iterator[tuple[int, int, int]]:
    """The table, checked run by run: whoever keeps them keeps no more than the file really has."""
    if count * _RUN.size > source.left:
        raise source.error(f"is too short for its {count} runs")
    end = 0
    for number in range(count):
        entry = source.read(_RUN.size)
        if len(entry) != _RUN.size:
            raise source.error("became shorter while it was read")
        first, run, kind = _RUN.unpack(entry)
        if not (end <= first and 0 < run <= pages - first and kind in {_HELD, _MISSING}):
            raise source.error(
                f"has an impossible run {number}: {run} pages of kind {kind} from page {first} of {pages}"
            )
        end = first + run
        yield first, run, kind


class _Sealed:
    """A source with a frame behind it that comes out only if all before it did.

    Without one, the reader of python-zstandard 0.25 drops what is left in a frame that is cut off behind a block.
    """

    def __init__(self, source: _Source, frame: bytes) -> None:
        self._source = source
        self._frame = frame

    def read(self, size: int) -> bytes:
        """So many bytes, or fewer."""
        chunk = self._source.read(size)
        if not chunk:
            chunk, self._frame = self._frame[:size], self._frame[size:]
        return chunk


def _inflating(source: _Source) -> Callable[[int], bytes]:
    """Reads decompressed bytes, then _SEAL: no more than it is asked for, however much a frame makes of one byte."""
    zstandard = _zstandard()
    sealed = _Sealed(source, zstandard.ZstdCompressor().compress(_SEAL))
    stream = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(sealed, read_across_frames=True)

    def read_inflated(size: int) -> bytes:
        try:
            content: bytes = stream.read(size)
        except zstandard.ZstdError as error:
            raise source.error(f"cannot be decompressed: {error}") from error
        return content

    return read_inflated


# -- Both ------------------------------------------------------------------------------------------------------


def _chunks(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Pages in chunks of at most _CHUNK bytes: first page, number of pages."""
    step = max(_CHUNK >> PAGE_SHIFT, 1)
    return ((page, min(step, end - page)) for page in range(first, end, step))


def _zstandard() -> ModuleType:
    try:
        return import_module("zstandard")
    except ImportError as error:
        raise MissingPackageError(f"zstd files need the package zstandard: {error}", name="zstandard").with_hint(
            "pip install 'pagemapcompat[zstd]'"
        ) from error
