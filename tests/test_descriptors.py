"""This library's descriptors, closed or replaced by somebody, as a loop does that closes all there may be."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from children import in_child
from conftest import PAGE, Flavour, libc, private

from pagemapcompat import KernelError

pytestmark = pytest.mark.kernel


def descriptors() -> dict[int, str]:
    """Of this process, and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # that of the listing itself
    return found


def close(fd: int) -> None:
    """Its number is nobody's."""
    os.close(fd)


def replace_by(path: str) -> Callable[[int], None]:
    """Its number is that of another file, whose reads end at once or never."""

    def replace(fd: int) -> None:
        other = os.open(path, os.O_RDWR)
        os.dup2(other, fd)
        os.close(other)

    return replace


WAYS = {"close": close, "null": replace_by("/dev/null"), "zero": replace_by("/dev/zero")}


@pytest.mark.parametrize("way", ["null", "zero"])
def test_maps_without_an_end_or_a_line(flavour: Flavour, way: str) -> None:
    """Neither is waited for, nor taken for a process without memory: the error names the file."""
    memory = private(16)

    def check() -> None:
        before = descriptors()
        tracker = flavour.tracker()
        ram = tracker.track(memory)
        for fd in set(descriptors()) - set(before):
            if descriptors()[fd].endswith("/maps"):
                WAYS[way](fd)
        libc.mmap(PAGE, address=ram.range.start + 3 * PAGE)
        with pytest.raises(KernelError) as caught:
            ram.rearm()
        assert caught.value.operation == "/proc/self/maps"
        tracker.close()

    in_child(check, seconds=20)
