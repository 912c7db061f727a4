"""The results of asking: regions of pages with their categories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from sys import getrefcount
from typing import TYPE_CHECKING, NoReturn, overload

import attrs

from pagemapcompat import _kernel
from pagemapcompat.abi import PageCategory
from pagemapcompat.errors import InvalidArgumentError
from pagemapcompat.memory import PAGE_SHIFT, AddressRange

if TYPE_CHECKING:
    from typing_extensions import Buffer

_categories: dict[int, PageCategory] = {}


def _category(bits: int) -> PageCategory:
    # Building an IntFlag costs ten times a look-up, and there are few different ones.
    try:
        return _categories[bits]
    except KeyError:
        return _categories.setdefault(bits, PageCategory(bits))


@attrs.frozen
class PageRegion:
    """A run of pages with equal categories, as the kernel's `struct page_region`.

    Attributes:
        start: The address of the first byte.

        end: The address behind the last one.

        categories: Of each of its pages.
    """

    start: int = attrs.field(repr=hex)
    end: int = attrs.field(repr=hex)
    categories: PageCategory

    @property
    def length(self) -> int:
        """In bytes."""
        return self.end - self.start

    @property
    def pages(self) -> int:
        """In pages."""
        return (self.end - self.start) >> PAGE_SHIFT


class ScanResult(Sequence[PageRegion]):
    """The regions that a scan returned: ascending, disjoint, neighbours with equal categories merged.

    A value: it does not change, and stays good when the tracker is closed. It holds the array that C filled (24 bytes a
    region) and makes Python objects only of what is asked for. Any thread may read it; but no finalizer of an object in
    the same reference cycle, when the collector may have freed the array already.

    Attributes:
        range: What was asked about.
    """

    __slots__ = ("_base", "_length", "_owner", "_result", "_words", "range")

    def __init__(
        self, result: _kernel.Result, asked: AddressRange, base: int, length: int, owner: object = None
    ) -> None:
        self._result = result
        self._owner = result if owner is None else owner  # of its regions
        self._base = base
        self._length = length
        self._words: memoryview | None = None  # which all views are views of; None: there is none
        self.range: AddressRange = asked

    @property
    def walk_end(self) -> int:
        """The address where the scan stopped."""
        return self._result.walk_end

    @property
    def pages(self) -> int:
        """How many pages are in the result."""
        return self._result.pages

    @property
    def complete(self) -> bool:
        """Whether the scan reached the end of what was asked about."""
        return self.walk_end >= self.range.end

    @property
    def resume_at(self) -> int | None:
        """The offset to pass as *start* to go on, or None when complete."""
        return None if self.complete else self.walk_end - self._base

    def __len__(self) -> int:
        """The number of regions."""
        return self._result.count

    @overload
    def __getitem__(self, index: int) -> PageRegion: ...
    @overload
    def __getitem__(self, index: slice) -> list[PageRegion]: ...
    def __getitem__(self, index: int | slice) -> PageRegion | list[PageRegion]:
        """One region, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        try:
            position = range(len(self))[index]
        except (IndexError, TypeError) as error:
            error.add_note(f"hint: this result has {len(self)} regions; give a whole number below that, or a slice")
            raise
        start, end, categories = self.as_u64()[3 * position : 3 * position + 3]
        return PageRegion(start, end, _category(categories))

    def __iter__(self) -> Iterator[PageRegion]:
        """Every region, in order."""
        for start, end, categories in _kernel.REGION.iter_unpack(self.as_u64()):
            yield PageRegion(start, end, _category(categories))

    def __eq__(self, other: object) -> bool:
        """Equal when the same was asked and answered."""
        if not isinstance(other, ScanResult):
            return NotImplemented
        return (self.range, self.walk_end, self.as_u64()) == (other.range, other.walk_end, other.as_u64())

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Callable[..., ScanResult], tuple[object, ...]]:
        """Pickle as the value it is."""
        words = self.as_u64().tobytes()
        return _restore, (words, self.walk_end, self.range, self._base, self._length)

    def __repr__(self) -> str:
        """For people."""
        state = "complete" if self.complete else f"resume_at={self.resume_at:#x}"
        return f"<ScanResult of {self.range}: {len(self)} regions, {self.pages} pages, {state}>"

    def spans(self) -> Iterator[tuple[int, int]]:
        """(lo, hi) offsets in bytes from the start of the tracked memory, of each region in turn.

        `memory[lo:hi]` is what was written in an mmap, `array.reshape(-1).view(np.uint8)[lo:hi]` in an array. Also for
        a sub-range. The last one is clipped where the memory ends inside a page.
        """
        return _kernel.spans(self._result, self._base, self._length)

    def page_indices(self) -> Iterator[int]:
        """The number of every page in the result, counted from the start of the tracked memory."""
        base = self._base
        return chain.from_iterable(
            range((start - base) >> PAGE_SHIFT, (end - base) >> PAGE_SHIFT)
            for start, end, _ in _kernel.REGION.iter_unpack(self.as_u64())
        )

    def fill_bitmap(self, out: Buffer) -> int:
        """Set bit i of *out*, least significant first, for each page i of the tracked memory in the result.

        Clears none. Returns the number of pages in the result.

        Raises:
            InvalidArgumentError: *out* is read-only, is of bools, or has less than a bit for each page of the tracked
                memory.
        """
        pages = _kernel.fill_bitmap(self._result, self._base, self._length, out)
        if pages < 0:
            self._refuse_bitmap(out)
        return pages

    def _refuse_bitmap(self, out: Buffer) -> NoReturn:
        needed = (-(-self._length >> PAGE_SHIFT) + 7) // 8
        try:
            view = memoryview(out)
        except TypeError as error:
            error.add_note(f"hint: give a bytearray({needed})")
            raise
        with view:
            if view.format == "?":
                raise InvalidArgumentError(f"{type(out).__name__} of bools is no bitmap").with_hint(
                    f"give np.zeros({needed}, np.uint8); np.unpackbits(it, bitorder='little') makes bools of it"
                )
            if view.readonly or not view.c_contiguous:
                raise InvalidArgumentError(f"{type(out).__name__} cannot be written as a bitmap").with_hint(
                    f"give a bytearray({needed})"
                )
            raise InvalidArgumentError(f"a bitmap of {view.nbytes} bytes is too short").with_hint(
                f"this memory needs {needed} bytes, one bit a page"
            )

    def as_u64(self) -> memoryview:
        """Start, end (addresses) and categories of each region in turn: read-only, 1-D, format "Q", no copy.

        `np.asarray(result.as_u64()).reshape(-1, 3)` copies nothing either. Less the `range.start` of what is tracked,
        addresses are offsets. The view keeps the array alive.
        """
        words = self._words
        if words is None:
            # The first time; from then on it costs no more than a view of a view, which is the caller's to release.
            words = self._words = _kernel.words(self._result, self._owner)
        return memoryview(words)

    def _is_viewed(self) -> bool:
        """Whether anybody has a view of it, if it has an owner of its own. Ask only while nobody else has that."""
        self._words = _SOME  # whatever comes in between; the view that was there is one too
        viewed = self._references() != _UNVIEWED
        if not viewed:
            self._words = None
        return viewed

    def _references(self) -> int:
        """To what keeps the regions, as this Python counts them."""
        return getrefcount(self._owner)


_SOME = memoryview(b"").cast("Q")
"""Stands for views that somebody else has."""
_UNVIEWED = 0
"""How many there are of one of which nobody has a view; 0: nobody knows."""


def _calibrate() -> None:
    """Find out, of one that has a view and one that has none. If neither 1 nor 2 tells them apart, it stays 0."""
    global _UNVIEWED  # noqa: PLW0603 - so that to ask costs no more than to look up a name
    for _UNVIEWED in (1, 2):
        viewed, released = (_answer_of(_kernel.region(0, 1)) for _ in range(2))
        released.as_u64()
        with viewed.as_u64():
            if viewed._is_viewed() and not released._is_viewed():  # noqa: SLF001 - made here
                return
    _UNVIEWED = 0


def _answer_of(words: bytes) -> ScanResult:
    result = _kernel.new_request(_kernel.CursorHandle())
    answer = ScanResult(result, AddressRange(0, 0), 0, 0, _kernel.own(result))
    _kernel.fill(result, words)
    return answer


_calibrate()


def _restore(words: bytes, walk_end: int, asked: AddressRange, base: int, length: int) -> ScanResult:
    return ScanResult(_kernel.restore_result(words, walk_end), asked, base, length)
