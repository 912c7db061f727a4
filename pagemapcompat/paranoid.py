"""The backends again, with a copy of the memory beside each reader: an answer that leaves out a page raises."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Final, NoReturn

from pagemapcompat import _kernel
from pagemapcompat.backends import Attached, Backend, PagemapScanBackend, UffdWpBackend
from pagemapcompat.errors import ClosedError, DisagreementError, KernelError, PagemapCompatError
from pagemapcompat.memory import PAGE_SHIFT, USER_END, AddressRange, page_size
from pagemapcompat.results import ScanResult

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pagemapcompat.probe import FeatureReport

NAME: Final = "paranoid"
_ROUNDS = 3
"""How often a page must be found lost. Once is not enough: it may have been unmapped between two looks."""


class _Shadow:
    """What memory held when its pages were last handed to one reader."""

    __slots__ = ("image", "lock", "turns")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.turns = 0
        self.image: _kernel.ImageHandle | None = None
        """None: nothing is known. The next turn begins anew."""


class _Turn:
    """One call of a reader. It has the image until it ends; one that an error or an interrupt ends leaves none."""

    __slots__ = ("image", "number", "on", "shadow")

    def __init__(self, on: Attached, shadow: _Shadow) -> None:
        self.on = on
        self.shadow = shadow
        self.image, shadow.image = shadow.image, None
        self.number = shadow.turns = shadow.turns + 1

    @property
    def is_disturbed(self) -> bool:
        """Whether a signal handler or a finalizer called the same reader meanwhile."""
        return self.shadow.turns != self.number

    def end(self) -> None:
        """Put the image back."""
        self.shadow.image = None if self.is_disturbed else self.image


class ParanoidBackend(Backend):
    """A backend each of whose answers is compared with the memory.

    What a reader gets is copied after it was protected again. All that it asks about is compared with the copy, and
    only then peeked at: whoever stored to a page that differs did so before, so it must be in that answer. A page that
    is not was lost, and raises DisagreementError. Writers may run at any moment.

    The calls of one reader are made one after the other, also those of several threads: what one of them takes is
    in no other's peek. One by a signal handler, in the middle of another, leaves that uncompared.

    Memory is read through the kernel, as by snapshots: shared memory and files are populated by it.
    """

    def __init__(self, report: FeatureReport) -> None:
        self._shadows: weakref.WeakKeyDictionary[Attached, _Shadow] = weakref.WeakKeyDictionary()
        super().__init__(report)

    @property
    def label(self) -> str:
        """The real one's name, too."""
        return f"{NAME}: {self.name}"

    # -- Readers ------------------------------------------------------------------------------------------------

    def attach(self, memory: AddressRange, length: int, *, rearm: bool) -> Attached:
        """Register and protect *memory*, then copy it."""
        attached = super().attach(memory, length, rearm=rearm)
        try:
            turn = _Turn(attached, self._shadow(attached))
            self._follow(turn, _kernel.new_result())
            turn.end()
        except BaseException:
            self.detach(attached)
            raise
        return attached

    def detach(self, attached: Attached) -> None:
        """Unregister, and free the copies of all its readers."""
        for reader in list(self._shadows):
            if reader.handle is attached.handle:
                self._shadows.pop(reader, None)
        super().detach(attached)

    def detach_cursor(self, attached: Attached) -> None:
        """Note pages for this reader no longer, and free its copy."""
        self._shadows.pop(attached, None)
        super().detach_cursor(attached)

    def close(self) -> None:
        """Close the real one, and free all copies."""
        self._shadows.clear()
        super().close()

    def _shadow(self, on: Attached) -> _Shadow:
        if self.is_inherited:
            self.check()  # its lock may be held by a thread that does not exist here
        return self._shadows.setdefault(on, _Shadow())

    # -- The operations -----------------------------------------------------------------------------------------

    def scan(self, on: Attached, asked: AddressRange, max_pages: int, flags: int) -> ScanResult:
        """GET or ENGAGE_WP + GET, compared."""
        scan = self._get_and_engage_wp if flags else self._get
        return scan(on, asked, max_pages, flags)

    def _get(self, on: Attached, asked: AddressRange, max_pages: int, flags: int) -> ScanResult:
        shadow = self._shadow(on)
        with shadow.lock:
            turn = _Turn(on, shadow)
            try:
                differing = self._differing(turn, asked)
                answer = super().scan(on, asked, max_pages, flags)
                differing = _without(differing, [(answer.walk_end, asked.end, 0)])
                self._judge(turn, _without(differing, _kernel.triples(answer._result)))  # noqa: SLF001 - its friend
            finally:
                turn.end()
        return answer

    def written(self, on: Attached) -> _kernel.Result:
        """GET of all of it, compared."""
        shadow = self._shadow(on)
        with shadow.lock:
            turn = _Turn(on, shadow)
            try:
                differing = self._differing(turn, on.range)
                result = super().written(on)
                self._judge(turn, _without(differing, _kernel.triples(result)))
            finally:
                turn.end()
        return result

    def _get_and_engage_wp(self, on: Attached, asked: AddressRange, max_pages: int, flags: int) -> ScanResult:
        """What an error had taken is compared too."""
        shadow = self._shadow(on)
        answer: ScanResult | None = None
        try:
            with shadow.lock:
                turn = _Turn(on, shadow)
                try:
                    answer = super().scan(on, asked, max_pages, flags)
                except KernelError as error:
                    answer = error.collected
                    if answer is not None:
                        self._compare(turn, asked, answer)
                    raise
                self._compare(turn, asked, answer)
        except PagemapCompatError as error:
            if error.collected is None:
                error.collected = answer
            elif answer is not None and error.collected is not answer:  # that of a signal handler, which collected too
                _kernel.owe(on.cursor.c, answer._result)  # noqa: SLF001 - its friend
            raise
        except BaseException:
            if answer is not None:
                _kernel.owe(on.cursor.c, answer._result)  # noqa: SLF001 - its friend
            raise
        return answer

    def _compare(self, turn: _Turn, asked: AddressRange, answer: ScanResult) -> None:
        self._agree(turn, answer._result, AddressRange(asked.start, answer.walk_end))  # noqa: SLF001 - its friend
        turn.end()

    def take(self, on: Attached, pages: _kernel.Result) -> None:
        """ENGAGE_WP + GET of all of it, compared."""
        shadow = self._shadow(on)
        with shadow.lock:
            turn = _Turn(on, shadow)
            super().take(on, pages)
            self._agree(turn, pages, on.range)
            turn.end()

    def engage_wp(self, on: Attached, asked: AddressRange) -> None:
        """ENGAGE_WP && !GET. What was reset is copied anew."""
        shadow = self._shadow(on)
        with shadow.lock:
            turn = _Turn(on, shadow)
            super().engage_wp(on, asked)
            self._follow(turn, _pages(asked))
            turn.end()

    # -- The comparison -----------------------------------------------------------------------------------------

    def _follow(self, turn: _Turn, pages: _kernel.Result) -> None:
        """Copy *pages* into the image, or all into a new one."""
        image, turn.image = turn.image, None  # a capture that fails leaves nothing to rely on
        if image is None:
            image, pages = self._new_image(turn), _pages(turn.on.range)
        super().capture(turn.on, image, pages)
        turn.image = image

    def _differing(self, turn: _Turn, asked: AddressRange) -> _kernel.Result:
        if turn.image is None:
            self._follow(turn, _kernel.new_result())
        return self._unlike(turn, _pages(asked))

    def _unlike(self, turn: _Turn, pages: _kernel.Result) -> _kernel.Result:
        """Which of *pages* are not what the image holds."""
        return super().differing(turn.on, turn.image, pages) if turn.image else _kernel.new_result()

    def _agree(self, turn: _Turn, taken: _kernel.Result, asked: AddressRange) -> None:
        """Copy what was taken, which is protected again, and compare all that was *asked*."""
        try:
            self._follow(turn, taken)
            self._judge(turn, self._unlike(turn, _pages(asked)))
        except ClosedError:
            return  # by another thread; nobody knows what was written since

    def _judge(self, turn: _Turn, suspects: _kernel.Result) -> None:
        """Raise if any of these pages, which differed, is in no answer that is given now."""
        for _ in range(_ROUNDS):
            if not suspects.count:
                return
            suspects = _without(suspects, _kernel.triples(super().written(turn.on)))
            # One that was unmapped, or made a guard page, was not written.
            gone = _kernel.image_list(self._now(turn, suspects), turn.on.range.start, _kernel.LIST_MISSING)
            suspects = _without(self._unlike(turn, suspects), _kernel.triples(gone))
        if suspects.count and turn.image and not turn.is_disturbed:
            self._complain(turn, turn.image, suspects)

    def _complain(self, turn: _Turn, image: _kernel.ImageHandle, lost: _kernel.Result) -> NoReturn:
        where = turn.on.range
        start, _, _ = next(_kernel.triples(lost))
        page = (start - where.start) >> PAGE_SHIFT
        was = _kernel.image_read(image, page, 1)
        now = _kernel.image_read(self._now(turn, _pages(AddressRange(start, start + page_size()))), page, 1)
        at = next((i for i, (old, new) in enumerate(zip(was, now, strict=True)) if old != new), None)
        change = "it changed back" if at is None else f"byte {at} of it was {was[at]:#04x} and is {now[at]:#04x}"
        lost.walk_end = where.end
        raise DisagreementError.of(ScanResult(lost, where, where.start, turn.on.length), change, self.label)

    def _now(self, turn: _Turn, pages: _kernel.Result) -> _kernel.ImageHandle:
        image = self._new_image(turn)
        super().capture(turn.on, image, pages)
        return image

    def _new_image(self, turn: _Turn) -> _kernel.ImageHandle:
        return _kernel.image_create(turn.on.range.length // page_size())


def _pages(asked: AddressRange) -> _kernel.Result:
    return _kernel.result_of(asked.start, asked.end) if asked.length else _kernel.new_result()


def _without(pages: _kernel.Result, others: Iterable[tuple[int, int, int]]) -> _kernel.Result:
    """The pages that are in none of *others*, which ascend."""
    left = bytearray()
    end = 0
    blocked = iter([*others, (USER_END, USER_END, 0)])
    block, block_end, _ = next(blocked)
    for start, end, categories in _kernel.triples(pages):
        at = start
        while at < end:
            while block_end <= at:
                block, block_end, _ = next(blocked)
            if at < block:
                left += _kernel.REGION.pack(at, min(end, block), categories)
            at = max(at, min(end, block_end))
    return _kernel.restore_result(bytes(left), end)


class ParanoidPagemapScanBackend(ParanoidBackend, PagemapScanBackend):
    """`pagemap-scan`, compared."""


class ParanoidUffdWpBackend(ParanoidBackend, UffdWpBackend):
    """`uffd-wp`, compared."""


PARANOID_BACKENDS: Final[tuple[type[Backend], ...]] = (ParanoidPagemapScanBackend, ParanoidUffdWpBackend)
"""In the order of BACKENDS."""
