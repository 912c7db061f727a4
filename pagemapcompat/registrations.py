"""What this process has registered: the bookkeeping behind AlreadyRegisteredError and WPALLOWED."""

from __future__ import annotations

import os
import threading
import weakref
from errno import EBUSY
from itertools import count
from typing import TYPE_CHECKING

import attrs

from pagemapcompat.errors import AlreadyRegisteredError

if TYPE_CHECKING:
    from pagemapcompat.memory import AddressRange


@attrs.define(eq=False)
class Claim:
    """Memory that one tracked range owns, for as long as the claim is referred to or until it is released."""

    range: AddressRange
    number: int
    pid: int
    """Of the process that made it: a forked child owns nothing of its parent's."""


_claims: weakref.WeakValueDictionary[int, Claim] = weakref.WeakValueDictionary()
_numbers = count()
_lock = threading.RLock()


def _held() -> list[Claim]:
    # A copy of the references first: a finalizer may release a claim at any point of a loop.
    claims = [reference() for reference in _claims.valuerefs()]
    return [held for held in claims if held is not None and held.pid == os.getpid()]


def claim(wanted: AddressRange) -> Claim:
    """Reserve *wanted*, before any system call.

    Raises:
        AlreadyRegisteredError: Part of it is claimed already (EBUSY).
    """
    with _lock:
        # Made before others are looked for: a finalizer that runs in between, and claims the same, finds it.
        made = Claim(wanted, next(_numbers), os.getpid())
        _claims[made.number] = made
        for held in _held():
            if held is not made and held.range.start < wanted.end and wanted.start < held.range.end:
                release(made)
                raise AlreadyRegisteredError.make(
                    EBUSY,
                    "track",
                    f"{wanted} overlaps {held.range}, which is tracked already",
                    range=held.range,
                    hint="a page has one tracker; close the other TrackedRange, or use it",
                )
        return made


def release(held: Claim) -> None:
    """Give a claim back. Idempotent."""
    _claims.pop(held.number, None)


def registered() -> list[tuple[int, int]]:
    """(start, end) of everything claimed, ascending."""
    return sorted((held.range.start, held.range.end) for held in _held())


def _renew_lock() -> None:
    global _lock  # noqa: PLW0603 - replaced, never shared with the parent
    _lock = threading.RLock()  # its holder, if it had one, does not exist in this process


os.register_at_fork(after_in_child=_renew_lock)
