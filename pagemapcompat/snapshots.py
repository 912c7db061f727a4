"""Snapshots of tracked memory: later ones copy, and restores write, only the pages that were written."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, SupportsIndex, TypeVar

from pagemapcompat import _kernel, snapshot_files
from pagemapcompat.abi import Guarantee
from pagemapcompat.errors import (
    ClosedError,
    ConcurrentWriteError,
    InvalidArgumentError,
    NotTrackedError,
    PagemapCompatError,
    RestoreError,
)
from pagemapcompat.memory import PAGE_SHIFT, AddressRange, page_size, whole_number
from pagemapcompat.results import ScanResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagemapcompat.backends import Attached, Backend

_T = TypeVar("_T")


def checked(snapshot: Snapshot) -> Snapshot:
    """The same, if it is one."""
    if isinstance(snapshot, Snapshot):
        return snapshot
    error = TypeError(f"{type(snapshot).__name__} is no snapshot")
    error.add_note("hint: give what TrackedRange.snapshot() or Snapshot.load() returned")
    raise error


class Snapshot:
    """What tracked memory held. Made by `TrackedRange.snapshot`, or `load`.

    A value: it never changes, stays good when the tracker is closed, and any thread may read it. Snapshots share the
    pages that they have in common, so that one costs what was written since the one before it, and a few hundred bytes
    for each 16 pages in which anything was. Guard pages and holes are not held, and a restore leaves them alone. Its
    own memory comes from malloc(3): do not track that heap to restore it.

    Attributes:
        range: Where the memory lay.

        pages: How many pages it copied: those that were written since the last snapshot or restore, even of one that
            is dropped by now. Of a loaded one, how many it holds.
    """

    def __init__(
        self, image: _kernel.ImageHandle, where: AddressRange, length: int, parent: Snapshot | None = None
    ) -> None:
        self._image: _kernel.ImageHandle | None = image
        self._parent = parent
        self._length = length
        self.range: AddressRange = where
        self.pages: int = _kernel.image_copied(image)

    def __repr__(self) -> str:
        """For people."""
        return f"<Snapshot of {self.range}: {self.pages} pages{'' if self._image else ', dropped'}>"

    def __reduce__(self) -> NoReturn:
        """Neither copied, for it never changes, nor pickled."""
        raise TypeError(
            f"{self!r} cannot be copied or pickled; save() writes it to a file, which load() reads anywhere"
        )

    def __len__(self) -> int:
        """Bytes of memory, as its owner saw it."""
        return self._length

    @property
    def image(self) -> _kernel.ImageHandle:
        """The C core's side of it.

        Raises:
            ClosedError: It was dropped.
        """
        image = self._image
        if image is None:
            raise ClosedError(f"{self!r} cannot be used").with_hint("take another snapshot; drop() ends one for good")
        return image

    @property
    def is_dropped(self) -> bool:
        """Whether it was dropped."""
        return self._image is None

    @property
    def parent(self) -> Snapshot | None:
        """The snapshot that memory was equal to before this one, or the nearest one before that still there."""
        at = self._parent
        while at is not None and at.is_dropped:
            at = at._parent  # noqa: SLF001 - of the same class; not by recursion, for chains are long
        self._parent = at
        return at

    def drop(self) -> None:
        """Free the pages that no other snapshot holds. Those after it stay what they are. Idempotent.

        Of those pages 4 MiB are kept for the snapshots to come, until all that descend from the same one are gone.
        The snapshot that memory last equalled keeps its own, even if dropped, until the range ends, the next restore,
        or the next snapshot, which goes on with them.
        """
        self._image = None
        self._parent = self.parent

    def squash(self) -> None:
        """Drop everything before it: it becomes the first of its chain."""
        parent = self.parent
        while parent is not None:
            parent.drop()
            parent = parent.parent
        self._parent = None

    def diff(self, other: Snapshot) -> ScanResult:
        """Return the pages whose content differs; pages that only one of them holds, too.

        Raises:
            InvalidArgumentError: They are of different sizes.

            ClosedError: One of them was dropped.

        Cost: what differs, not what there is.
        """
        checked(other).check_fits(len(self))
        return self._result(_kernel.image_diff(self.image, other.image, self.range.start))

    def missing(self) -> ScanResult:
        """Return the guard pages and holes, which it does not hold."""
        return self._result(_kernel.image_list(self.image, self.range.start, _kernel.LIST_MISSING))

    def held(self) -> ScanResult:
        """Return the pages that are not all zeros."""
        return self._result(_kernel.image_list(self.image, self.range.start, _kernel.LIST_HELD))

    def read(self, start: SupportsIndex = 0, stop: SupportsIndex | None = None) -> bytes:
        """Copy out the bytes from *start* to *stop*, any offsets. Guard pages and holes read as zeros.

        Raises:
            InvalidArgumentError: An offset lies outside of the memory.

            ClosedError: It was dropped.
        """
        hint = f"start={start!r}, stop={stop!r}: give whole numbers of bytes, or None for the end"
        first = whole_number(start, hint)
        last = self._length if stop is None else whole_number(stop, hint)
        if not 0 <= first <= last <= self._length:
            raise InvalidArgumentError(f"start={first}, stop={last} are no part of {self._length} bytes").with_hint(
                "offsets count from the start of the memory; stop is exclusive"
            )
        if first == last:
            return b""
        page = first >> PAGE_SHIFT
        content = _kernel.image_read(self.image, page, -(-last >> PAGE_SHIFT) - page)
        at = first - (page << PAGE_SHIFT)
        return bytes(memoryview(content)[at : at + last - first])

    def save(self, path: snapshot_files.StrPath, *, compression: snapshot_files.Compression | None = None) -> None:
        """Write it to a file, which any process may `load` on a machine with the same page size.

        The file at *path* is the old one or the whole new one, also after a crash of the machine; when this returns it
        is the new one, on the disk. A symbolic link is replaced, not followed. Its mode is a new file's, by the umask.
        Only a crash, or SIGKILL, leaves a temporary file behind, `.pagemapcompat-*` in the same folder.

        Args:
            path: Where: in a folder that may be read and written, and has room for a second file.

            compression: "zstd", by the package zstandard (the extra `zstd`), or None.

        Raises:
            OSError: It cannot be written. The file at *path* is what it was, unless the last step fails, the fsync of
                its folder.

            InvalidArgumentError: *compression* is not known, or the memory is of 2**47 bytes or more.

            MissingPackageError: zstandard is not installed.

            ClosedError: It was dropped.

        Cost: a read of what is held, SHA-256, and the disk. Zero pages take no room, others all of theirs, also those
        shared with the parent.
        """
        snapshot_files.write(path, self.image, self.range, self._length, compression)

    @classmethod
    def load(cls, path: snapshot_files.StrPath, *, max_bytes: int | None = None) -> Snapshot:
        """Read a file that `save` wrote, into a snapshot without a parent.

        Files of strangers cannot do more than take time and memory. They can take as much as they announce, and a
        compressed one announces more than its size.

        Args:
            path: The file.

            max_bytes: How much content to take; more is refused before any of it is read.

        Raises:
            SnapshotFileError: It is no snapshot, of a newer version or of another page size, was truncated or altered,
                or announces more than *max_bytes*.

            OSError: It cannot be opened or read.

            MissingPackageError: It is compressed, and zstandard is not installed.
        """
        loaded = snapshot_files.read(path, max_bytes)
        return cls(loaded.image, loaded.where, loaded.length)

    def check_fits(self, length: int) -> None:
        """Refuse to be compared with, or restored into, memory of another size, and at all if it was dropped."""
        self.image  # noqa: B018 - raises
        if length != self._length:
            raise InvalidArgumentError(f"a snapshot of {self._length} bytes does not fit {length} bytes").with_hint(
                "snapshots fit memory of the same length"
            )

    def _result(self, result: _kernel.Result) -> ScanResult:
        return ScanResult(result, self.range, self.range.start, self._length)


class History:
    """Makes the snapshots of one tracked range, and restores them.

    It has its own cursor, and shares the image of the snapshot that memory last equalled. Memory differs from that
    image at most in the pages that the cursor has; from any other one at most in those, and in the pages in which the
    two images differ. Any thread may call; one call at a time.
    """

    def __init__(self, backend: Backend, attached: Attached) -> None:
        self._backend = backend
        self._attached = attached
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread that has it
        self._cursor: Attached | None = None
        self._image: _kernel.ImageHandle | None = None
        self._restored = False  # then memory may hold something where the image has nothing
        self._at: Snapshot | None = None

    def snapshot(self) -> Snapshot:
        """See `TrackedRange.snapshot`."""
        return self._in_turn(self._snapshot)

    def _snapshot(self, on: Attached) -> Snapshot:
        pages = _kernel.new_result()
        try:
            self._backend.take(on, pages)
            unknown = self._unknown(on, pages)
            if self._image is None:
                image = _kernel.image_create(on.range.length // page_size())
            else:
                # If the last snapshot was dropped nobody else has its image, and that is changed in place. A failure
                # then leaves it partly changed: each changed page is given back, or is as in memory.
                image = _kernel.image_next(self._image)
            self._backend.capture(on, image, unknown)
            at = self._at
            own = _kernel.image_share(image)
            made = Snapshot(image, on.range, on.length, at.parent if at is not None and at.is_dropped else at)
            # In this order: an interrupt in between makes pages come once too often, not once too seldom.
            self._image, self._at = own, made
            self._restored = False
        except BaseException:
            _kernel.owe(on.cursor.c, pages)
            raise
        return made

    def restore(self, snapshot: Snapshot, *, verify: bool) -> ScanResult:
        """See `TrackedRange.restore`."""
        checked(snapshot).check_fits(self._attached.length)
        image = snapshot.image
        return self._in_turn(lambda on: self._restore(on, snapshot, image, verify=verify))

    def _restore(self, on: Attached, snapshot: Snapshot, image: _kernel.ImageHandle, *, verify: bool) -> ScanResult:
        stale = self._stale(on, image)
        self._backend.write_back(on, image, stale)
        pages = _kernel.new_result()
        try:
            self._backend.take(on, pages)
            # Protected again, pages show who writes from now on; who wrote until then is shown by what they hold.
            touched = stale if _kernel.words(stale) == _kernel.words(pages) else _kernel.unite(stale, pages)
            self._refuse(ConcurrentWriteError, on, self._backend.differing(on, image, touched))
            own = _kernel.image_share(image)
            self._restored = True
            self._image, self._at = own, snapshot
        except BaseException:
            _kernel.owe(on.cursor.c, pages)
            raise
        if verify:
            self._image = None  # nothing is known, unless all is found right
            differing = self._backend.differing(on, image, _everything(on.range))
            # What is written beside the comparison will be reported like any write, and is no riddle.
            written = self._backend.written(on) if differing.count else differing
            seen = _kernel.unite(written, differing).pages == written.pages
            self._refuse(ConcurrentWriteError if seen else RestoreError, on, differing)
            self._image = own
        return _answer(on, stale)

    def _in_turn(self, act: Callable[[Attached], _T]) -> _T:
        """Wait for other threads, and do it with the cursor.

        No context manager of ours: an interrupt before the block it is for would leave it open for as long as somebody
        keeps the traceback.
        """
        self._backend.check()
        me = threading.get_ident()
        if self._owner == me:
            raise PagemapCompatError("a snapshot or restore of this memory is under way in this thread").with_hint(
                "do not take or restore snapshots in signal handlers and finalizers"
            )
        with self._lock:
            try:
                self._owner = me
                if self._cursor is None:
                    self._cursor = self._backend.attach_cursor(self._attached)
                return act(self._cursor)
            finally:
                self._owner = None

    def _unknown(self, on: Attached, written: _kernel.Result) -> _kernel.Result:
        """The pages that may not be as in the last image: what was written, and what a restore left alone."""
        if self._image is None:
            return _everything(on.range)
        if not self._restored:
            return written
        return _kernel.unite(written, _kernel.image_list(self._image, on.range.start, _kernel.LIST_MISSING))

    def _stale(self, on: Attached, image: _kernel.ImageHandle) -> _kernel.Result:
        """The pages in which memory may differ from *image*."""
        if self._image is None:
            return self._backend.differing(on, image, _everything(on.range))
        written = self._backend.written(on)
        if self._image.c == image.c:
            return written
        other = _kernel.image_diff(self._image, image, on.range.start)
        if Guarantee.NO_HELPER_THREAD not in on.guarantees:
            # One call a run is cheaper than one fault a page. What is untracked does not fault.
            with suppress(NotTrackedError):
                for start, end, _ in _kernel.triples(other):
                    self._backend.disengage_wp(on, AddressRange(start, end))
        return _kernel.unite(written, other)

    @staticmethod
    def _refuse(error: type[RestoreError], on: Attached, differing: _kernel.Result) -> None:
        if differing.count:
            raise error.of(_answer(on, differing))


def _answer(on: Attached, pages: _kernel.Result) -> ScanResult:
    return ScanResult(pages, on.range, on.range.start, on.length)


def _everything(where: AddressRange) -> _kernel.Result:
    return _kernel.result_of(where.start, where.end)
