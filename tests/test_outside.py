"""What the promises leave out, shown where it happens: pages pinned before they were protected, pages merged by KSM."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import tempfile

import pytest
from conftest import CHILD_SECONDS, PAGE, Flavour, Lacking, claims, ksmd, lacking, merged, pages_of, private, write

from pagemapcompat import Guarantee

pytestmark = pytest.mark.kernel

SETUP, ENTER, REGISTER = 425, 426, 427
READ_FIXED, GETEVENTS, OFF_SQES = 4, 1, 0x10000000


class Ring:
    """An io_uring of one entry, and one registered buffer."""

    def __init__(self, address: int, length: int) -> None:
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._params = ctypes.create_string_buffer(120)
        self.fd = self._call(SETUP, 1, self._params)
        words = struct.unpack_from("10I", self._params.raw, 40)  # struct io_sqring_offsets
        self._tail, self._array = words[1], words[6]
        (entries,) = struct.unpack_from("I", self._params.raw, 0)
        self._ring = mmap.mmap(self.fd, self._array + 4 * entries, mmap.MAP_SHARED)
        self._sqes = mmap.mmap(self.fd, 64 * entries, mmap.MAP_SHARED, offset=OFF_SQES)
        self._address, self._length = address, length
        self._call(REGISTER, self.fd, 0, ctypes.create_string_buffer(struct.pack("QQ", address, length)), 1)

    def _call(self, number: int, *arguments: object) -> int:
        result = int(self._syscall(number, *arguments))
        if result < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return result

    def read(self, file: int) -> None:
        """Fill the buffer from the start of a file, through its pinned pages."""
        sqe = struct.pack("BBHiQQIIQHHiQQ", READ_FIXED, 0, 0, file, 0, self._address, self._length, 0, 0, 0, 0, 0, 0, 0)
        self._sqes[: len(sqe)] = sqe
        struct.pack_into("I", self._ring, self._array, 0)
        struct.pack_into("I", self._ring, self._tail, 1)
        assert self._call(ENTER, self.fd, 1, 1, GETEVENTS, None, 0) == 1

    def close(self) -> None:
        """Unpin."""
        self._sqes.close()
        self._ring.close()
        os.close(self.fd)


def test_pages_pinned_before_they_were_protected(flavour: Flavour) -> None:
    """A registered io_uring buffer is written without a fault, so the write is not seen; a plain read is."""
    memory = private(8)
    write(memory, *range(8))
    with flavour.tracker() as tracker, tempfile.TemporaryFile() as file:
        file.write(b"\xaa" * PAGE)
        file.flush()
        probe_range = tracker.track(memory)
        address = probe_range.range.start
        probe_range.close()
        try:
            ring = Ring(address + 2 * PAGE, PAGE)
        except OSError as error:
            lacking("io-uring", f"refused ({error.strerror})", "sysctl kernel.io_uring_disabled=0; a seccomp profile")
        try:
            ram = tracker.track(memory)
            ring.read(file.fileno())
            assert memory[2 * PAGE] == 0xAA
            assert pages_of(ram.collect()) == set()
            ram.close()
        finally:
            ring.close()


def test_pages_merged_by_the_kernel(flavour: Flavour, ksm: Lacking | None) -> None:
    """One that is written again is reported where DISCARDS is promised; elsewhere its next write is."""
    if ksm:
        lacking(*ksm)
    memory = private(64)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory[:] = b"\x55" * len(memory)
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        memory.madvise(mmap.MADV_MERGEABLE)
        if not ksmd.rescan():
            lacking("ksm", f"ksmd did not get through in {CHILD_SECONDS:.0f} s (EAGAIN)", "an idle machine")
        ksmd.set(run="0")
        assert merged(ram.range.start, 64) >= {3, 40, 41}
        wrote = write(memory, 3, 40)
        if claims(tracker, Guarantee.DISCARDS):
            assert pages_of(ram.collect()) >= wrote
        else:
            ram.collect()
        wrote = write(memory, 3, 41)
        assert pages_of(ram.collect()) >= {3}
