"""Addresses: page size, ranges, and where a buffer lies."""

from __future__ import annotations

import mmap
import operator
import os
from errno import EACCES, EINVAL
from typing import TYPE_CHECKING, Any, Self, SupportsIndex, TypeAlias, cast

import attrs

from pagemapcompat import _kernel
from pagemapcompat.errors import AlignmentError, InvalidArgumentError, NotTrackableError

if TYPE_CHECKING:
    from typing import Protocol

    from typing_extensions import Buffer

    class Array(Protocol):
        """A numpy array: its stubs call it a Buffer only for Python 3.12 and newer."""

        @property
        def __array_interface__(self) -> dict[str, Any]:
            """How numpy says where its memory lies."""
            ...


_PAGE_SIZE = os.sysconf("SC_PAGESIZE")
PAGE_SHIFT = _PAGE_SIZE.bit_length() - 1
_MOST_PAGES = 1 << 47
"""More than any address space has, and few enough to be counted in bytes."""
USER_END = 1 << 63
"""The kernel's half of the address space begins here at the latest, on every 64-bit architecture."""

ALIGNED_HINT = (
    "memory from mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) is page aligned; "
    "for numpy use np.frombuffer(that mmap, dtype=...), of whole pages, or give the mmap itself"
)


def page_size() -> int:
    """The size of a base page of the running kernel, in bytes."""
    return _PAGE_SIZE


def whole_number(value: SupportsIndex, hint: str) -> int:
    """The integer that *value* is. A TypeError says what to give instead."""
    try:
        return operator.index(value)
    except TypeError as error:
        error.add_note(f"hint: {hint}")
        raise


def check_max_pages(max_pages: int | None) -> int:
    """What C takes for *max_pages*: 0 is no limit."""
    if max_pages is None:
        return 0
    count = whole_number(max_pages, f"max_pages={max_pages!r}: give a whole number of pages, or None for all")
    if count < 1:
        raise InvalidArgumentError(f"max_pages={count} asks for no page").with_hint("give at least 1, or None for all")
    return min(count, _MOST_PAGES)


def _address(value: SupportsIndex) -> int:
    return whole_number(value, f"{value!r} is no address; give whole numbers of bytes")


@attrs.frozen(order=True)
class AddressRange:
    """Addresses `start <= a < end` of a process, in bytes, in the user's half of the address space.

    Raises:
        InvalidArgumentError: It is negative, ends before it starts, or reaches into the kernel's half.
    """

    start: int = attrs.field(converter=_address, repr=hex)
    end: int = attrs.field(converter=_address, repr=hex)

    def __attrs_post_init__(self) -> None:
        if self.start < 0:
            raise InvalidArgumentError(f"start {self.start} is negative").with_hint("addresses count from 0")
        if self.end < self.start:
            raise InvalidArgumentError(f"end {self.end:#x} lies before start {self.start:#x}").with_hint(
                "AddressRange takes (start, end); use AddressRange.from_length(address, length) for a length"
            )
        if self.end > USER_END:
            raise InvalidArgumentError(f"end {self.end:#x} lies in the kernel's half of the address space").with_hint(
                "address + length must stay below 2**63; was a negative address taken for an unsigned one?"
            )

    @classmethod
    def from_length(cls, address: SupportsIndex, length: SupportsIndex) -> Self:
        """The *length* bytes from *address* on."""
        address, length = _address(address), _address(length)
        if length < 0:
            raise InvalidArgumentError(f"length {length} is negative").with_hint("give the number of bytes")
        return cls(address, address + length)

    @property
    def length(self) -> int:
        """In bytes."""
        return self.end - self.start

    @property
    def pages(self) -> int:
        """How many pages it touches."""
        return self.aligned_out().length >> PAGE_SHIFT

    @property
    def is_aligned(self) -> bool:
        """Whether both ends are page boundaries."""
        return not (self.start | self.end) & (_PAGE_SIZE - 1)

    def aligned_out(self) -> AddressRange:
        """The same, grown to page boundaries. Its pages may hold other objects too, whose writes then count."""
        return AddressRange(self.start & -_PAGE_SIZE, -(-self.end & -_PAGE_SIZE))


Memory: TypeAlias = "Buffer | Array | AddressRange | tuple[int, int]"
"""A buffer (mmap, numpy array, cffi or ctypes array), a range, or (address, length)."""


@attrs.define(eq=False)
class PinnedMemory:
    """Memory that stays where it is until released."""

    range: AddressRange
    """Page aligned."""
    length: int
    """In bytes, as the owner sees it: less than the range's when an mmap ends inside a page."""
    _pin: _kernel.Pin | None = None

    def release(self) -> None:
        """Let the buffer go. Idempotent."""
        if self._pin is not None:
            self._pin.release()


def pin(memory: Memory, *, writable: bool) -> PinnedMemory:
    """Find out where *memory* lies, and hold it there.

    Raises:
        AlignmentError: It does not start, or end, on a page boundary. An mmap may end inside its last page.

        InvalidArgumentError: It is negative, or wraps.

        NotTrackableError: A buffer is read-only (and *writable* is asked for) or not contiguous.

        TypeError: It is no memory at all.
    """
    if isinstance(memory, AddressRange):
        return PinnedMemory(_aligned(memory), memory.length)
    if isinstance(memory, tuple):
        if len(memory) != 2:  # noqa: PLR2004 - a pair
            raise InvalidArgumentError(f"{memory!r} is not (address, length)").with_hint("give two integers, in bytes")
        given = AddressRange.from_length(*memory)
        return PinnedMemory(_aligned(given), given.length)
    try:
        view = memoryview(cast("Buffer", memory))
    except TypeError as error:
        has_range = isinstance(getattr(memory, "range", None), AddressRange)
        wanted = "its range" if has_range else "a buffer (mmap, numpy array), an AddressRange, or (address, length)"
        error.add_note(f"hint: {type(memory).__name__} is no memory; give {wanted}")
        raise
    held = None
    try:
        _check_buffer(view, writable=writable)
        held = _kernel.Pin(view)
        given = AddressRange.from_length(held.address, view.nbytes)
        whole = given.aligned_out() if _ends_its_mapping(view, given) else given
        return PinnedMemory(_aligned(whole), given.length, held)
    except BaseException:
        if held is not None:
            held.release()
        view.release()
        raise


def _check_buffer(view: memoryview, *, writable: bool) -> None:
    name = type(view.obj).__name__
    if not view.c_contiguous:
        raise NotTrackableError.make(
            EINVAL, "track", f"the buffer of {name} is not contiguous", hint="track the array it is a slice of"
        )
    if writable and view.readonly:
        raise NotTrackableError.make(
            EACCES,
            "track",
            f"the buffer of {name} is read-only",
            hint="give the writable buffer that it is a view of, or map the memory writable; bytes never are",
        )


def _ends_its_mapping(view: memoryview, given: AddressRange) -> bool:
    """Whether the memory begins on a page and is the end of an mmap, the rest of whose last page is its own."""
    owner: Any = view.obj
    if not isinstance(owner, mmap.mmap) or given.start & (_PAGE_SIZE - 1):
        return False
    mapped = _kernel.Pin(memoryview(owner))
    try:
        return given.end == mapped.address + len(owner)
    finally:
        mapped.release()


def _aligned(given: AddressRange) -> AddressRange:
    if given.length and not given.is_aligned:
        error = AlignmentError(
            f"memory from {given.start:#x} to {given.end:#x} ({given.length} bytes) does not begin and end on page "
            f"boundaries ({_PAGE_SIZE} bytes)"
        )
        error.address, error.length = given.start, given.length
        raise error.with_hint(
            f"{ALIGNED_HINT}; or track {given.aligned_out()}, with its neighbours' writes, and keep the memory yourself"
        )
    return given
