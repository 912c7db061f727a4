"""This library's descriptors, closed or replaced by somebody, as a loop does that closes all there may be."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from children import in_child
from conftest import PAGE, Flavour, disable, libc, pages_of, private, write

from pagemapcompat import (
    DirtyTracker,
    FaultThreadError,
    KernelError,
    NotTrackedError,
    PageCategory,
    Pagemap,
    ScanQuery,
    TargetGoneError,
)


def descriptors(kind: str) -> set[int]:
    """Of this process, whose name ends so."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").endswith(kind):
                found.add(int(name))
        except FileNotFoundError:
            continue  # that of the listing itself
    return found


def close(fd: int) -> None:
    """Its number is nobody's."""
    os.close(fd)


def replace_by(fd: int, other: int) -> None:
    """Its number is that of another file."""
    os.dup2(other, fd)
    os.close(other)


WAYS: dict[str, Callable[[int], None]] = {
    "closed": close,
    "empty": lambda fd: replace_by(fd, os.open(os.devnull, os.O_RDWR)),
    "zeros": lambda fd: replace_by(fd, os.open("/dev/zero", os.O_RDWR)),
    "pipe": lambda fd: replace_by(fd, os.pipe()[0]),
    "folder": lambda fd: replace_by(fd, os.open("/", os.O_RDONLY)),
    "text": lambda fd: replace_by(fd, os.open("/proc/self/status", os.O_RDONLY)),
}
KINDS = ("[userfaultfd]", "/pagemap", "/maps")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_descriptor_that_is_lost(flavour: Flavour, kind: str, way: str) -> None:
    """What needs it fails and says so; nothing hangs, calls written pages clean or memory gone; a new tracker works."""
    memory, spare = private(16), private(4)

    def check() -> None:
        write(memory, *range(16))
        before = descriptors(kind)
        tracker = flavour.tracker()
        ram = tracker.track(memory)
        lost = descriptors(kind) - before
        assert lost
        for fd in lost:
            WAYS[way](fd)
        write(memory, 3)
        errors = []
        another_range = lambda: DirtyTracker.track(tracker, spare)  # noqa: E731 - beside methods
        for call in (
            ram.peek,
            ram.collect,
            ram.rearm,
            ram.reset,
            ram.unprotect,
            ram.snapshot,
            another_range,
            ram.close,
        ):
            written = write(memory, 3, 5)
            try:
                result = call()
            except (KernelError, FaultThreadError) as error:
                errors.append(error)
            else:
                assert call not in {ram.peek, ram.collect} or pages_of(result) >= written
        tracker.close()
        assert errors
        for error in errors:
            assert not isinstance(error, NotTrackedError | TargetGoneError)
            assert error.hint
            assert "closed or replaced" in error.hint
        with flavour.tracker() as another:
            again = another.track(memory)
            assert pages_of(again.collect()) == set()
            written = write(memory, 7)
            assert pages_of(again.collect()) == written

    in_child(check, seconds=20)


@pytest.mark.parametrize("way", ["closed", "folder"])
@pytest.mark.parametrize("disabled", ["", "pagemap-scan"])
def test_a_pagemap_that_lost_its_descriptors(monkeypatch: pytest.MonkeyPatch, way: str, disabled: str) -> None:
    """Its methods fail and say so; it is closed all the same."""
    disable(monkeypatch, *filter(None, [disabled]))
    memory, query = private(16), ScanQuery(all_of=PageCategory.PRESENT, report=PageCategory.PRESENT)

    def check() -> None:
        before = descriptors("")
        with Pagemap() as pagemap:
            for fd in descriptors("/pagemap") | descriptors("/maps"):
                WAYS[way](fd)
            for call in (lambda: pagemap.scan(memory, query), lambda: list(pagemap.entries(memory))):
                with pytest.raises(KernelError) as caught:
                    call()
                assert caught.value.hint
                assert "closed or replaced" in caught.value.hint
        assert descriptors("") == before

    in_child(check)


@pytest.mark.parametrize("way", ["empty", "zeros"])
def test_maps_without_an_end_or_a_line(flavour: Flavour, way: str) -> None:
    """Neither is waited for, nor taken for a process without memory: the error names the file."""
    memory = private(16)

    def check() -> None:
        before = descriptors("/maps")
        tracker = flavour.tracker()
        ram = tracker.track(memory)
        for fd in descriptors("/maps") - before:
            WAYS[way](fd)
        libc.mmap(PAGE, address=ram.range.start + 3 * PAGE)
        with pytest.raises(KernelError) as caught:
            ram.rearm()
        assert caught.value.operation == "/proc/self/maps"
        tracker.close()

    in_child(check, seconds=20)
