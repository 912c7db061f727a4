"""What this process has registered with its userfaultfds: what AlreadyRegisteredError and WPALLOWED go by."""

from __future__ import annotations

import os
import threading
from errno import EBUSY
from typing import TYPE_CHECKING

import attrs

from pagemapcompat.errors import AlreadyRegisteredError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagemapcompat.memory import AddressRange


@attrs.define(eq=False)
class Claim:
    """Memory that one tracked range owns."""

    range: AddressRange
    is_alive: Callable[[], bool]
    """False once its tracker is closed, or belongs to the process that this one was forked from."""


_claims: list[Claim] = []
_lock = threading.RLock()  # a finalizer may release a claim while its own thread makes another


def claim(wanted: AddressRange, is_alive: Callable[[], bool]) -> Claim:
    """Reserve *wanted*, before any system call.

    Raises:
        AlreadyRegisteredError: Part of it is claimed already (EBUSY).
    """
    with _lock:
        _claims[:] = [held for held in _claims if held.is_alive()]
        for held in _claims:
            if held.range.start < wanted.end and wanted.start < held.range.end:
                raise AlreadyRegisteredError.make(
                    EBUSY,
                    "track",
                    f"{wanted} overlaps {held.range}, which is tracked already",
                    range=held.range,
                    hint="a page has one tracker; close the other TrackedRange, or use it",
                )
        made = Claim(wanted, is_alive)
        _claims.append(made)
        return made


def release(held: Claim) -> None:
    """Give a claim back. Idempotent."""
    with _lock:
        _claims[:] = [other for other in _claims if other is not held]


def registered() -> list[tuple[int, int]]:
    """(start, end) of everything claimed, ascending."""
    with _lock:
        return sorted((held.range.start, held.range.end) for held in _claims if held.is_alive())


def _renew_lock() -> None:
    global _lock  # noqa: PLW0603
    _lock = threading.RLock()  # its holder, if it had one, does not exist in this process


os.register_at_fork(after_in_child=_renew_lock)
