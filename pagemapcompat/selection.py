"""Choosing a backend, and keeping why."""

from __future__ import annotations

from errno import EOPNOTSUPP
from types import MappingProxyType
from typing import TYPE_CHECKING

import attrs

from pagemapcompat.abi import Guarantee
from pagemapcompat.backends import BACKENDS, Backend
from pagemapcompat.errors import AccessError, InvalidArgumentError, KernelError, UnsupportedError
from pagemapcompat.paranoid import NAME as PARANOID
from pagemapcompat.paranoid import PARANOID_BACKENDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pagemapcompat.probe import FeatureReport


def _read_only(reasons: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType(dict(reasons))


@attrs.frozen(kw_only=True)
class Selection:
    """Which backend was chosen, and why no better one.

    Attributes:
        chosen: Its name; "paranoid: pagemap-scan" of one that is checked.

        guarantees: For private anonymous memory; `TrackedRange.guarantees` speaks of one mapping.

        rejected: By name: the reason, with the errno and what to change.

        userfaultfd: Every way of opening a userfaultfd that was tried, with its errno; the last one is in use.
    """

    chosen: str
    guarantees: Guarantee
    rejected: Mapping[str, str] = attrs.field(converter=_read_only)
    userfaultfd: tuple[str, ...]

    def __str__(self) -> str:
        """A few lines for people."""
        lines = [f"{self.chosen} ({', '.join(g.name or '' for g in self.guarantees)})", *self.userfaultfd]
        lines += [f"not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


def open_backend(name: str, require: Guarantee, report: FeatureReport) -> tuple[Backend, Selection]:
    """Open the backend *name*, or with "auto" the best one that works and gives *require*.

    "paranoid" is "auto", checked.

    Raises:
        InvalidArgumentError: There is no such backend.

        TypeError: *require* is no Guarantee.

        AccessError, UnsupportedError: None works, or none gives *require*. The message has every reason.

        KernelError: Whether one works could not be found out, for lack of descriptors or memory.
    """
    if not isinstance(require, Guarantee):
        error = TypeError(f"require={require!r} is no Guarantee")
        error.add_note("hint: give Guarantee.EXACT, or several joined by |")
        raise error
    names = ["auto", *(backend.name for backend in BACKENDS), PARANOID]
    if name not in names:
        raise InvalidArgumentError(f"there is no backend {name!r}").with_hint(f"choose one of {', '.join(names)}")
    rejected: dict[str, str] = {}
    failures: list[KernelError] = []
    for kind in PARANOID_BACKENDS if name == PARANOID else BACKENDS:
        if name not in ("auto", PARANOID, kind.name):
            continue
        try:
            backend = kind(report)
        except KernelError as error:
            failures.append(error)
            reason = (error.strerror or "").removeprefix(f"{kind.name}: ")
            rejected[kind.name] = reason + (f" (hint: {error.hint})" if error.hint else "")
            continue
        missing = require & ~backend.guarantees
        if not missing:
            used = tuple(map(str, backend.attempts))
            return backend, Selection(
                chosen=backend.label, guarantees=backend.guarantees, rejected=rejected, userfaultfd=used
            )
        hint = (
            "CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1" if missing & Guarantee.KERNEL_WRITES else "require less"
        )
        backend.close()
        short = UnsupportedError.make(EOPNOTSUPP, kind.name, f"does not guarantee {missing.name}", hint=hint)
        failures.append(short)
        rejected[kind.name] = f"does not guarantee {missing.name} (hint: {hint})"
    if len(failures) == 1:
        raise failures[0]
    # What could not be found out may work for whoever asks again.
    untold = next((failure for failure in failures if not isinstance(failure, AccessError | UnsupportedError)), None)
    denied = next((failure for failure in failures if isinstance(failure, AccessError)), None)
    first = untold or denied or failures[0]
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in rejected.items())
    raise type(first).make(
        first.errno or EOPNOTSUPP, "DirtyTracker", f"no backend works here: {reasons}", hint=first.hint
    )
