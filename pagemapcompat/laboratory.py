"""Where features are tried: throw-away memory and descriptors, of which nothing outlives the round."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EACCES, EINVAL, ENODEV, ENOENT, ENOSYS, ENOTTY, ENXIO, EOPNOTSUPP, EPERM
from struct import unpack
from typing import TYPE_CHECKING, Literal

from pagemapcompat import _kernel
from pagemapcompat.memory import PAGE_SHIFT, page_size
from pagemapcompat.userfaultfd import Way, open_userfaultfd

if TYPE_CHECKING:
    from pagemapcompat.abi import Feature, UffdFeature

State = Literal["yes", "no", "denied", "disabled", "unknown"]
HUGE = page_size() * (page_size() // 8)
"""What one page table of the lowest level maps."""
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _kernel.MAP_NORESERVE
ABSENT = {ENOENT, ENODEV, ENXIO, ENOSYS, EINVAL, ENOTTY, EOPNOTSUPP}
"""What a kernel says that does not have a call, or a device, or a part of either."""
DENIED = {EPERM, EACCES}
Answer = tuple[State, int | None, str, str | None]
"""State, errno, one sentence, and for anything but yes what to change."""
Trial = Callable[["Laboratory"], Answer]


def yes(detail: str) -> Answer:
    """The answer that something is there."""
    return "yes", None, detail, None


def check(rc: int, call: str) -> int:
    """Raise for -errno, which is then no answer but a trial that failed."""
    if rc < 0:
        raise OSError(-rc, call)
    return rc


class Laboratory:
    """Throw-away memory and descriptors for one round of trials. Nothing in it outlives the round."""

    def __init__(self) -> None:
        self.pagemap = -1
        self.answers: dict[Feature, Answer] = {}
        self.way: Way | None = None
        """The best way to open a userfaultfd."""
        self.written: tuple[int, int, int, int] | None = None
        """How many bytes the ioctl calls written, see `_scan_answers`."""

    def close(self) -> None:
        """End the round."""
        if self.pagemap >= 0:
            os.close(self.pagemap)

    def word(self, address: int) -> int:
        """The pagemap word of the page at *address*."""
        (value,) = unpack("=Q", os.pread(self.pagemap, 8, (address >> PAGE_SHIFT) * 8))
        return int(value)

    def has(self, feature: Feature) -> bool:
        """Whether an earlier answer was yes."""
        return self.answers[feature][0] == "yes"

    def lacks(self, *features: Feature) -> Answer | None:
        """The answer for whatever builds on something that is not there, or of which nobody knows whether it is."""
        missing = [feature for feature in features if not self.has(feature)]
        for feature in missing:
            state, number, _, hint = self.answers[feature]
            if state == "no":
                return "no", number, f"it needs {feature.value}, which is not there", hint
        for feature in missing:
            _, number, _, hint = self.answers[feature]
            return "unknown", number, f"it needs {feature.value}", hint
        return None

    @contextmanager
    def memory(self, length: int) -> Iterator[tuple[int, memoryview]]:
        """*length* bytes of empty private anonymous memory that begin on a 2 MiB boundary: (address, view)."""
        with mapping(length + HUGE) as (address, whole):
            start = address + -address % HUGE
            # mlockall(MCL_FUTURE) populates and locks it, and locked memory takes neither discards nor guard pages.
            _kernel.munlock(start, start + length)
            _kernel.madvise(start, start + length, mmap.MADV_DONTNEED)
            with whole[start - address : start - address + length] as view:
                yield start, view

    @contextmanager
    def uffd(self, features: UffdFeature) -> Iterator[int]:
        """A userfaultfd with *features*. Nothing ever writes to what it protects: nobody would answer."""
        assert self.way is not None  # noqa: S101 - lacks() saw to it
        fd, _, attempt = open_userfaultfd(self.way, features)
        if fd < 0:
            raise OSError(attempt.errno, str(attempt))
        try:
            yield fd
        finally:
            os.close(fd)


@contextmanager
def mapping(length: int, flags: int = PRIVATE, fd: int = -1) -> Iterator[tuple[int, memoryview]]:
    """A mapping: (address, view)."""
    with mmap.mmap(fd, length, flags=flags) as area, memoryview(area) as view:
        held = _kernel.Pin(view)
        try:
            yield held.address, view
        finally:
            held.release()


__all__ = ["ABSENT", "DENIED", "HUGE", "PRIVATE", "Answer", "Laboratory", "State", "Trial", "check", "mapping", "yes"]
