"""What this kernel lets this process do: found out by trying, in throw-away memory, never by version."""

from __future__ import annotations

import _thread
import os
import threading
from collections.abc import Iterator, Mapping
from errno import EACCES, EAGAIN, EFBIG, EMFILE, ENFILE, ENOMEM, EOPNOTSUPP, EPERM, errorcode

import attrs

from pagemapcompat.abi import Feature
from pagemapcompat.errors import AccessError, InvalidArgumentError, KernelError, UnsupportedError
from pagemapcompat.laboratory import Answer, Laboratory, State, Trial
from pagemapcompat.limits import Limits, read_limits
from pagemapcompat.trials import TRIALS

BACKEND_NAMES = ("pagemap-scan", "uffd-wp")
"""Best first."""

_DISABLE = "PAGEMAPCOMPAT_DISABLE"
_HINTS = {
    EMFILE: "raise ulimit -n and ask again",
    ENFILE: "raise sysctl fs.file-max and ask again",
    ENOMEM: "raise ulimit -v, or give it more memory, and ask again",
    EAGAIN: "raise ulimit -u and ask again",
    EFBIG: "raise ulimit -f, and ask again by probe(refresh=True)",
    EPERM: "a seccomp profile that allows the call",
    EACCES: "a seccomp profile, or a security module, that allows the call",
}
_OTHER_HINT = "see the errno; /proc must be mounted"
_FLEETING = {EMFILE, ENFILE, ENOMEM, EAGAIN}
"""What may be otherwise a moment later: answers that came from it are not kept."""


@attrs.frozen
class ProbeResult:
    """What trying one feature came to. True in a boolean context only for "yes".

    Attributes:
        feature: Which.

        state: `no`: not there. `denied`: there, not for this process. `disabled`: by PAGEMAPCOMPAT_DISABLE. `unknown`:
            something that it needs could not be had.

        errno: What the call failed with, or None.

        detail: One sentence.

        hint: What to change; None for "yes".
    """

    feature: Feature
    state: State
    errno: int | None
    detail: str
    hint: str | None

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
        try:
            return self._results[feature]
        except KeyError as error:
            error.add_note("hint: ask for a Feature: Feature.PAGEMAP_SCAN, or Feature('pagemap-scan') by its name")
            raise

    def __iter__(self) -> Iterator[Feature]:
        """Every feature."""
        return iter(self._results)

    def __len__(self) -> int:
        """How many were probed."""
        return len(self._results)

    def supports(self, *features: Feature) -> bool:
        """Whether all of them are there for use."""
        return all(self[feature] for feature in features)

    def require(self, *features: Feature) -> None:
        """Raise for the first that is not there.

        Raises:
            AccessError: It is denied.

            UnsupportedError: It is not there, disabled, or unknown because something else is.

            KernelError: It is unknown for lack of descriptors or memory.
        """
        for feature in features:
            result = self[feature]
            if not result:
                kind: type[KernelError] = AccessError if result.state == "denied" else UnsupportedError
                if result.errno in _FLEETING:
                    kind = KernelError
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
            denied = error.errno in (EPERM, EACCES)
            hint = _HINTS.get(error.errno or 0, _OTHER_HINT)
            answer = "denied" if denied else "unknown", error.errno, f"trying failed: {error.strerror}", hint
        except MemoryError:
            answer = "unknown", ENOMEM, "trying failed for lack of memory", _HINTS[ENOMEM]
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


def _round(disabled: frozenset[str]) -> FeatureReport:
    lab = Laboratory()
    try:
        results = {feature: try_feature(lab, feature, disabled) for feature in TRIALS}
    finally:
        lab.close()
    return FeatureReport({feature: results[feature] for feature in Feature}, disabled, read_limits())


def _round_apart(disabled: frozenset[str]) -> FeatureReport:
    """A round in a thread of its own: signal handlers, which may raise anywhere, run in the main thread alone."""
    outcome: list[FeatureReport | BaseException] = []
    thread: list[int] = []
    running = _thread.allocate_lock()

    def work() -> None:
        thread.append(_thread.get_native_id())
        try:
            outcome.append(_round(disabled))
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            outcome.append(error)
        finally:
            running.release()

    running.acquire()
    try:
        # Not a threading.Thread, whose start() leaves a broken thread behind when it is interrupted.
        _thread.start_new_thread(work, ())
    except RuntimeError:  # no more threads, or the interpreter is ending
        return _round(disabled)
    running.acquire()
    # Whoever forks next must find this process with the threads it had.
    while os.path.exists(f"/proc/self/task/{thread[0]}"):  # noqa: PTH110 - in a hurry
        os.sched_yield()
    report = outcome[0]
    if isinstance(report, BaseException):
        raise report
    return report


_cache: tuple[frozenset[str], FeatureReport] | None = None
_lock = threading.RLock()


def probe(*, refresh: bool = False) -> FeatureReport:
    """What this kernel lets this process do. By doing; a few milliseconds the first time, then cached.

    It makes no signal or child, touches no tracker, and leaves no descriptor, thread or mapping behind. Any thread may
    call it; a fork waits until it is done. What is cached is forgotten after a fork and when PAGEMAPCOMPAT_DISABLE
    changes, and nothing is kept that a lack of descriptors or memory brought about.

    Args:
        refresh: Ask again, e.g. after giving up privileges.

    Raises:
        InvalidArgumentError: PAGEMAPCOMPAT_DISABLE has a name that is neither a feature nor a backend.
    """
    global _cache  # noqa: PLW0603
    disabled = _disabled()
    with _lock:
        if not refresh and _cache and _cache[0] == disabled:
            return _cache[1]
        report = _round_apart(disabled)
        fleeting = any(result.errno in _FLEETING for result in report.values())
        _cache = None if fleeting else (disabled, report)
        return report


def _forget() -> None:
    global _cache, _lock  # noqa: PLW0603
    _lock = threading.RLock()  # its holder is the thread that forked, under another name now
    _cache = None


def _wait() -> None:
    _lock.acquire()


def _go_on() -> None:
    _lock.release()


# A child that is forked in the middle of a round would keep its descriptors for ever.
os.register_at_fork(before=_wait, after_in_parent=_go_on, after_in_child=_forget)

__all__ = ["BACKEND_NAMES", "FeatureReport", "ProbeResult", "State", "probe", "try_feature"]
