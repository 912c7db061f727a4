"""What this kernel lets this process do: found out by trying, in throw-away memory, never by version."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from errno import EOPNOTSUPP, errorcode

import attrs

from pagemapcompat.abi import Feature
from pagemapcompat.errors import AccessError, InvalidArgumentError, UnsupportedError
from pagemapcompat.limits import Limits, read_limits
from pagemapcompat.trials import TRIALS, Answer, Laboratory, State, Trial

BACKEND_NAMES = ("pagemap-scan", "uffd-wp")
"""Best first."""

_DISABLE = "PAGEMAPCOMPAT_DISABLE"


@attrs.frozen
class ProbeResult:
    """What trying one feature came to. True in a boolean context only for "yes"."""

    feature: Feature
    state: State
    """`no`: not there. `denied`: there, not for this process. `disabled`: by PAGEMAPCOMPAT_DISABLE. `unknown`:
    something that it needs could not be had."""
    errno: int | None
    detail: str
    """One sentence."""
    hint: str | None
    """What to change; None for "yes"."""

    def __bool__(self) -> bool:
        """Whether it is there for use."""
        return self.state == "yes"

    def __str__(self) -> str:
        """One line for people."""
        error = f" ({errorcode.get(self.errno, self.errno)})" if self.errno else ""
        return f"{self.feature.value}: {self.state}{error}, {self.detail}"


class FeatureReport(Mapping[Feature, ProbeResult]):
    """The answers. A value; look-ups ask the kernel nothing."""

    def __init__(self, results: Mapping[Feature, ProbeResult], disabled: frozenset[str], limits: Limits) -> None:
        self._results = dict(results)
        self.disabled = disabled
        """The names in PAGEMAPCOMPAT_DISABLE."""
        self.limits = limits

    def __getitem__(self, feature: Feature) -> ProbeResult:
        """One answer."""
        return self._results[feature]

    def __iter__(self) -> Iterator[Feature]:
        """Every feature."""
        return iter(self._results)

    def __len__(self) -> int:
        """How many were probed."""
        return len(self._results)

    def supports(self, *features: Feature) -> bool:
        """Whether all of them are there for use."""
        return all(self._results[feature] for feature in features)

    def require(self, *features: Feature) -> None:
        """Raise for the first that is not there.

        Raises:
            AccessError: It is denied.

            UnsupportedError: It is not there, disabled, or unknown.
        """
        for feature in features:
            result = self._results[feature]
            if not result:
                kind = AccessError if result.state == "denied" else UnsupportedError
                raise kind.make(result.errno or EOPNOTSUPP, feature.value, result.detail, hint=result.hint)

    def with_result(self, result: ProbeResult) -> FeatureReport:
        """The same report but for one answer."""
        return FeatureReport({**self._results, result.feature: result}, self.disabled, self.limits)

    def as_dict(self) -> dict[str, dict[str, object]]:
        """By feature name, of plain values."""
        return {
            feature.value: {
                "state": result.state,
                "errno": errorcode.get(result.errno) if result.errno else None,
                "detail": result.detail,
                "hint": result.hint,
            }
            for feature, result in self._results.items()
        }


def try_feature(lab: Laboratory, feature: Feature, disabled: frozenset[str], trial: Trial | None = None) -> ProbeResult:
    """One answer, by the feature's own trial or another one."""
    if feature.value in disabled:
        answer: Answer = "disabled", None, f"{_DISABLE} names it", f"unset {_DISABLE}"
    else:
        try:
            answer = (trial or TRIALS[feature])(lab)
        except OSError as error:
            hint = "raise the limit it ran into and try again"
            answer = "unknown", error.errno, f"trying failed: {error.strerror}", hint
    lab.answers[feature] = answer
    return ProbeResult(feature, *answer)


def _disabled() -> frozenset[str]:
    names = frozenset(name.strip() for name in os.environ.get(_DISABLE, "").split(",")) - {""}
    known = {feature.value for feature in Feature} | set(BACKEND_NAMES)
    for name in sorted(names - known):
        raise InvalidArgumentError(f"{_DISABLE} names {name!r}, which is no feature and no backend").with_hint(
            f"it takes {', '.join(sorted(known))}, separated by commas"
        )
    return names


_cache: tuple[int, frozenset[str], FeatureReport] | None = None
_lock = threading.RLock()


def probe(*, refresh: bool = False) -> FeatureReport:
    """What this kernel lets this process do. By doing; a few milliseconds the first time, then cached.

    It makes no signal or child, touches no tracker, and leaves no descriptor, thread or mapping behind. Any thread may
    call it. What is cached is forgotten after a fork and when PAGEMAPCOMPAT_DISABLE changes.

    Args:
        refresh: Ask again, e.g. after giving up privileges.

    Raises:
        InvalidArgumentError: PAGEMAPCOMPAT_DISABLE has a name that is neither a feature nor a backend.
    """
    global _cache  # noqa: PLW0603
    disabled = _disabled()
    with _lock:
        if not refresh and _cache and _cache[:2] == (os.getpid(), disabled):
            return _cache[2]
        lab = Laboratory()
        try:
            results = {feature: try_feature(lab, feature, disabled) for feature in TRIALS}
        finally:
            lab.close()
        report = FeatureReport({feature: results[feature] for feature in Feature}, disabled, read_limits())
        _cache = os.getpid(), disabled, report
        return report


def _renew_lock() -> None:
    global _lock  # noqa: PLW0603
    _lock = threading.RLock()  # its holder, if it had one, does not exist in this process


os.register_at_fork(after_in_child=_renew_lock)

__all__ = ["BACKEND_NAMES", "FeatureReport", "ProbeResult", "State", "probe", "try_feature"]
