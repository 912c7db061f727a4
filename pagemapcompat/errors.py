"""The exception tree. What an errno means is decided where the call is made, never here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pagemapcompat.memory import AddressRange
    from pagemapcompat.results import ScanResult


class PagemapCompatError(Exception):
    """The root of everything this library raises on purpose.

    Attributes:
        hint: What to change, or None. Also a note on the exception, so that tracebacks show it.

        collected: On an error that `TrackedRange.collect` raises, the pages it had already taken and
            protected again. They are delivered by this: no later collect returns them.
    """

    hint: str | None = None
    collected: ScanResult | None = None

    def with_hint(self, hint: str | None) -> Self:
        """Attach *hint* and return the exception."""
        if hint:
            self.hint = hint
            self.add_note(f"hint: {hint}")
        return self


class InvalidArgumentError(PagemapCompatError, ValueError):
    """An argument that can never be right, whatever the kernel."""


class AlignmentError(InvalidArgumentError):
    """Memory or an offset that does not lie on page boundaries (huge page boundaries in hugetlb memory).

    Attributes:
        address: Where it starts, in bytes.

        length: In bytes.
    """

    address: int = 0
    length: int = 0


class ClosedError(PagemapCompatError, ValueError):
    """The object was closed, or belongs to the process that this one was forked from."""


class FaultThreadError(PagemapCompatError, RuntimeError):
    """The fault thread of backend `uffd-wp` ended. Writers went on, untracked: what they wrote is not known."""


class RestoreError(PagemapCompatError, RuntimeError):
    """Memory is not what the snapshot holds, though a restore wrote it back, and no write that is reported explains it.

    Attributes:
        differing: The pages that differ.
    """

    differing: ScanResult | None = None
    _hint = (
        "something wrote without being seen: another mapping of the same memory, or a device with pages pinned before "
        "they were tracked"
    )

    @classmethod
    def of(cls, differing: ScanResult) -> Self:
        """Say which pages."""
        first, last = next(differing.spans())
        count = "1 page differs" if differing.pages == 1 else f"{differing.pages} pages differ"
        error = cls(f"{count} from the snapshot, the first in bytes {first} to {last}")
        error.differing = differing
        return error.with_hint(cls._hint)


class ConcurrentWriteError(RestoreError):
    """Somebody wrote while a snapshot was being restored. The next restore finds these pages."""

    _hint = "stop the writers, then restore again"


class DisagreementError(PagemapCompatError, RuntimeError):
    """Backend "paranoid" found pages that changed and were not reported.

    Attributes:
        lost: Those pages.
    """

    lost: ScanResult | None = None

    @classmethod
    def of(cls, lost: ScanResult, change: str, backend: str) -> Self:
        """Say which pages, and what *change* the first of them shows."""
        error = cls(
            f"{lost.pages} pages changed and were not reported; the first is at {lost[0].start:#x}, and {change} "
            f"(backend {backend})"
        )
        error.lost = lost
        return error.with_hint(
            "nobody sees a write through another mapping or descriptor of the same memory, by a device into pages "
            "pinned before they were tracked, a hole punched in a file, or without DISCARDS a discard; if it was none "
            "of these, report this message, how the memory was mapped, and what `pagemapcompat probe` and uname(1) say"
        )


class MissingPackageError(PagemapCompatError, ImportError):
    """An optional package is not installed. The hint names the extra that brings it."""


class SnapshotFileError(PagemapCompatError, ValueError):
    """A file is no snapshot, is of another version or kind of machine, or was truncated or altered."""


class KernelError(PagemapCompatError, OSError):
    """A system call failed.

    Attributes:
        errno: As the kernel gave it.

        operation: The call, e.g. "UFFDIO_REGISTER".

        range: The memory it was about, or None.
    """

    operation: str = ""
    range: AddressRange | None = None

    @classmethod
    def make(
        cls,
        errno: int,
        operation: str,
        detail: str,
        *,
        range: AddressRange | None = None,  # noqa: A002 - as the attribute
        hint: str | None = None,
    ) -> Self:
        """Build the exception. OSError's own constructor stays as it is, so that pickling works."""
        error = cls(errno, f"{operation}: {detail}")
        error.operation = operation
        error.range = range
        return error.with_hint(hint)


class AccessError(KernelError, PermissionError):
    """The kernel could, but this process may not."""


class UnsupportedError(KernelError):
    """The kernel, or what can be known on it, lacks what was asked for."""


class AlreadyRegisteredError(KernelError):
    """Part of the memory is tracked already, or belongs to another userfaultfd (EBUSY)."""


class NotTrackableError(KernelError):
    """This memory cannot be tracked."""


class NotTrackedError(KernelError):
    """Part of the memory has lost its registration, or never had one (ENOENT).

    `range` is the first such stretch. Everything before it was done; nothing behind it was touched.
    """


class TargetGoneError(KernelError):
    """The process whose memory was asked for is gone (ESRCH)."""
