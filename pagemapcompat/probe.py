"""What this kernel lets this process do: found out by trying, in throw-away memory, never by version."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from errno import EACCES, EINVAL, ENOENT, ENOTTY, EOPNOTSUPP, EPERM, errorcode
from struct import unpack
from typing import Literal

import attrs

from pagemapcompat import _kernel
from pagemapcompat.abi import EntryFlag, Feature, PageCategory, UffdFeature
from pagemapcompat.errors import AccessError, InvalidArgumentError, UnsupportedError
from pagemapcompat.memory import PAGE_SHIFT, page_size
from pagemapcompat.userfaultfd import Way, open_hint, open_userfaultfd

State = Literal["yes", "no", "denied", "disabled", "unknown"]

BACKEND_NAMES = ("pagemap-scan", "uffd-wp")
"""Best first."""

_DISABLE = "PAGEMAPCOMPAT_DISABLE"
_HUGE = page_size() * (page_size() // 8)
"""What one page table of the lowest level maps."""


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

    def __init__(self, results: Mapping[Feature, ProbeResult], disabled: frozenset[str]) -> None:
        self._results = dict(results)
        self.disabled = disabled
        """The names in PAGEMAPCOMPAT_DISABLE."""

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


_Answer = tuple[State, int | None, str, str | None]


def _yes(detail: str) -> _Answer:
    return "yes", None, detail, None


class _Laboratory:
    """Throw-away memory and descriptors for one round of probing. Nothing in it outlives the round."""

    def __init__(self) -> None:
        self.pagemap = -1
        self.answers: dict[Feature, _Answer] = {}
        self.offered = UffdFeature(0)
        self.way: Way | None = None

    def word(self, address: int) -> int:
        """The pagemap word of the page at *address*."""
        (value,) = unpack("=Q", os.pread(self.pagemap, 8, (address >> PAGE_SHIFT) * 8))
        return int(value)

    def has(self, feature: Feature) -> bool:
        """Whether an earlier answer was yes."""
        return self.answers[feature][0] == "yes"

    def lacks(self, *features: Feature) -> _Answer | None:
        """The answer "unknown" for whatever builds on something that is not there."""
        for feature in features:
            if not self.has(feature):
                return "unknown", None, f"it needs {feature.value}", self.answers[feature][3]
        return None

    @contextmanager
    def memory(self, length: int) -> Iterator[tuple[int, memoryview]]:
        """*length* bytes of empty private anonymous memory that begin on a 2 MiB boundary: (address, view)."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        with mmap.mmap(-1, length + _HUGE, flags=flags) as area, memoryview(area) as whole:
            held = _kernel.Pin(whole)
            skip = -held.address % _HUGE
            with whole[skip : skip + length] as view:
                try:
                    yield held.address + skip, view
                finally:
                    held.release()

    @contextmanager
    def uffd(self, features: UffdFeature) -> Iterator[int]:
        """A userfaultfd with *features*. Nothing ever writes to what it protects: nobody would answer."""
        assert self.way is not None  # noqa: S101 - lacks() saw to it
        fd, _, attempt = open_userfaultfd(self.way, features)
        if fd < 0:
            raise OSError(attempt.errno, str(attempt))
        try:
            yield fd
        finally:
            os.close(fd)


def _check(rc: int, call: str) -> int:
    if rc < 0:
        raise OSError(-rc, call)
    return rc


def _pagemap(lab: _Laboratory) -> _Answer:
    try:
        lab.pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (EACCES, EPERM):
            hint = "this process is not dumpable, as after dropping privileges: prctl(PR_SET_DUMPABLE, 1)"
            return "denied", error.errno, "/proc/self/pagemap may not be opened", hint
        hint = "mount /proc; a kernel needs CONFIG_PROC_PAGE_MONITOR"
        return "no", error.errno, "/proc/self/pagemap cannot be opened", hint
    return _yes("/proc/self/pagemap opens")


def _opens(way: Way) -> Callable[[_Laboratory], _Answer]:
    def answer(lab: _Laboratory) -> _Answer:
        fd, offered, attempt = open_userfaultfd(way, UffdFeature(0))
        if fd < 0:
            state: State = "denied" if attempt.errno in (EPERM, EACCES) else "no"
            return state, attempt.errno, f"{attempt.call} fails", open_hint(attempt)
        os.close(fd)
        lab.offered |= offered
        lab.way = lab.way or way
        return _yes(f"{attempt.call} opens")

    return answer


def _offers(feature: UffdFeature) -> Callable[[_Laboratory], _Answer]:
    def answer(lab: _Laboratory) -> _Answer:
        if lab.way is None:
            return "unknown", None, "no userfaultfd can be opened", lab.answers[Feature.UFFD_USER_MODE_ONLY][3]
        fd, _, attempt = open_userfaultfd(lab.way, feature)
        if fd < 0:
            return "no", attempt.errno, f"UFFDIO_API refuses {feature.name}", open_hint(attempt)
        os.close(fd)
        return _yes(f"UFFDIO_API grants {feature.name}")

    return answer


def _uffd_wp(lab: _Laboratory) -> _Answer:
    answer = _offers(UffdFeature.PAGEFAULT_FLAG_WP)(lab)
    if answer[0] != "yes":
        return answer
    with lab.uffd(UffdFeature.PAGEFAULT_FLAG_WP) as uffd, lab.memory(page_size()) as (at, _):
        rc, _ = _kernel.uffd_register(uffd, at, at + page_size())
        if rc:
            hint = "a kernel whose architecture has userfaultfd write-protection"
            return "no", -rc, "UFFDIO_REGISTER refuses write-protection of private anonymous memory", hint
    return _yes("private anonymous memory can be write-protected")


def _marks(lab: _Laboratory) -> _Answer:
    missing = lab.lacks(Feature.PAGEMAP, Feature.UFFD_WP)
    if missing:
        return missing
    with lab.uffd(UffdFeature.PAGEFAULT_FLAG_WP) as uffd, lab.memory(page_size()) as (at, view):
        view[0] = 1
        _check(_kernel.uffd_register(uffd, at, at + page_size())[0], "UFFDIO_REGISTER")
        before = lab.word(at)
        _check(_kernel.uffd_writeprotect(uffd, at, at + page_size(), protect=True), "UFFDIO_WRITEPROTECT")
        protected = lab.word(at)
        _check(_kernel.uffd_writeprotect(uffd, at, at + page_size(), protect=False), "UFFDIO_WRITEPROTECT")
        # Both ways: Valve's kernels once used this bit for something of their own.
        if protected & EntryFlag.UFFD_WP and not (before | lab.word(at)) & EntryFlag.UFFD_WP:
            return _yes("bit 57 of a pagemap word shows write-protection")
    return "no", None, "bit 57 of a pagemap word does not show write-protection", "Linux 5.14 or newer has it"


def _soft_dirty(lab: _Laboratory) -> _Answer:
    missing = lab.lacks(Feature.PAGEMAP)
    if missing:
        return missing
    with lab.memory(page_size()) as (at, view):
        view[0] = 1
        # A new mapping is soft-dirty as a whole; clearing it would be the whole process's.
        if lab.word(at) & EntryFlag.SOFT_DIRTY:
            return _yes("bit 55 of a pagemap word shows soft-dirty")
    return "no", None, "bit 55 of a pagemap word is not set in new memory", "a kernel with CONFIG_MEM_SOFT_DIRTY"


def _guard(lab: _Laboratory) -> _Answer:
    missing = lab.lacks(Feature.PAGEMAP, Feature.MADV_GUARD)
    if missing:
        return missing
    with lab.memory(page_size()) as (at, _):
        _check(_kernel.madvise(at, at + page_size(), _kernel.MADV_GUARD_INSTALL), "madvise")
        if lab.word(at) & EntryFlag.GUARD:
            return _yes("bit 58 of a pagemap word shows guard pages")
    return "no", None, "bit 58 of a pagemap word does not show guard pages", "Linux 6.15 or newer has it"


def _multi_vma(lab: _Laboratory) -> _Answer:
    missing = lab.lacks(Feature.UFFD_WP)
    if missing:
        return missing
    size = page_size()
    with lab.uffd(UffdFeature.PAGEFAULT_FLAG_WP) as uffd, lab.memory(2 * size) as (at, _):
        # Advice that a mapping carries, so that the kernel has to split it; it changes nothing here.
        _check(_kernel.madvise(at, at + size, mmap.MADV_DONTDUMP), "madvise")
        _check(_kernel.uffd_register(uffd, at, at + 2 * size)[0], "UFFDIO_REGISTER")
        rc = _kernel.uffd_writeprotect(uffd, at, at + 2 * size, protect=True)
    if rc == -ENOENT:
        hint = "Linux 6.4 or newer (a1b92a3f1498); until then every mapping takes a call of its own"
        return "no", ENOENT, "UFFDIO_WRITEPROTECT refuses a range of two mappings", hint
    _check(rc, "UFFDIO_WRITEPROTECT")
    return _yes("UFFDIO_WRITEPROTECT takes a range of two mappings")


def _remap_clears(lab: _Laboratory) -> _Answer:
    missing = lab.lacks(Feature.PAGEMAP_UFFD_WP)
    if missing:
        return missing
    size = page_size()
    with (
        lab.uffd(UffdFeature.PAGEFAULT_FLAG_WP) as uffd,
        lab.memory(size) as (at, view),
        lab.memory(size) as (elsewhere, _),
    ):
        view[0] = 1
        _check(_kernel.uffd_register(uffd, at, at + size)[0], "UFFDIO_REGISTER")
        _check(_kernel.uffd_writeprotect(uffd, at, at + size, protect=True), "UFFDIO_WRITEPROTECT")
        # Leaves an empty mapping behind: a hole could be somebody else's memory by the time it is unmapped.
        _check(_kernel.mremap_pages(at, elsewhere, size), "mremap")
        word = lab.word(elsewhere)
    if word & EntryFlag.UFFD_WP:
        hint = "Linux 6.13, 6.12.11 or newer; until then each collect asks for every mapping's registration"
        return "no", None, "a page keeps its mark when mremap takes its registration away", hint
    return _yes("a page that mremap moves loses its mark with its registration")


def _pagemap_scan(lab: _Laboratory) -> _Answer:
    missing = lab.lacks(Feature.PAGEMAP)
    if missing:
        return missing
    rc, _ = _kernel.pagemap_scan(lab.pagemap, 0, 0)
    if rc == 0:
        return _yes("the ioctl answers")
    if rc in (-EPERM, -EACCES):
        return "denied", -rc, "the ioctl is refused", "a seccomp profile that allows ioctl(2) on /proc/PID/pagemap"
    return "no", -rc, "the ioctl is not there", "Linux 6.7 or newer, or a kernel that has it back-ported"


def _scan_written(lab: _Laboratory, start: int, end: int) -> int:
    """How many bytes of [start, end) the ioctl calls written."""
    written = PageCategory.WRITTEN
    rc, regions = _kernel.pagemap_scan(lab.pagemap, start, end, all_of=written, report=written, vec_len=8)
    _check(rc, "PAGEMAP_SCAN")
    return sum(stop - first for first, stop, _ in regions)


def _scan_holes(lab: _Laboratory) -> _Answer:
    missing = lab.lacks(Feature.PAGEMAP_SCAN, Feature.UFFD_WP_ASYNC)
    if missing:
        return missing
    size = page_size()
    with lab.uffd(UffdFeature.WP_ASYNC) as uffd, lab.memory(2 * _HUGE) as (at, view):
        end = at + 2 * _HUGE
        _check(_kernel.madvise(at, end, mmap.MADV_NOHUGEPAGE), "madvise")
        _check(_kernel.uffd_register(uffd, at, end)[0], "UFFDIO_REGISTER")
        untouched = _scan_written(lab, at, end)
        view[0] = view[size] = 1
        _check(_kernel.uffd_writeprotect(uffd, at, end, protect=True), "UFFDIO_WRITEPROTECT")
        armed = _scan_written(lab, at, end)
        _check(_kernel.madvise(at, at + size, mmap.MADV_DONTNEED), "madvise")
        one = _scan_written(lab, at, end)
        _check(_kernel.madvise(at, at + _HUGE, mmap.MADV_DONTNEED), "madvise")
        table = _scan_written(lab, at, end)
    if (untouched, armed, one, table) == (2 * _HUGE, 0, size, _HUGE):
        return _yes("empty memory that carries no mark is called written")
    hint = "a kernel with 07b4377bdbe7; until then a second query finds what the first calls clean"
    return "no", None, "memory that was discarded, or never armed, is called clean", hint


def _procmap_query(_lab: _Laboratory) -> _Answer:
    fd = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        rc = _kernel.maps_query(fd)
    finally:
        os.close(fd)
    if rc > 0:
        return _yes("mappings can be asked for one by one")
    state: State = "no" if rc in (-ENOTTY, -EINVAL) else "denied"
    return state, -rc, "the ioctl on /proc/self/maps is not there", "Linux 6.11 or newer; until then the text is read"


def _advises(advice: int, name: str, since: str) -> Callable[[_Laboratory], _Answer]:
    def answer(lab: _Laboratory) -> _Answer:
        with lab.memory(page_size()) as (at, _):
            rc = _kernel.madvise(at, at + page_size(), advice)
        if rc == 0:
            return _yes(f"{name} is accepted")
        return "no", -rc, f"{name} is refused", f"Linux {since} or newer"

    return answer


_TRIALS: Mapping[Feature, Callable[[_Laboratory], _Answer]] = {
    Feature.PAGEMAP: _pagemap,
    Feature.UFFD_SYSCALL: _opens(Way.SYSCALL),
    Feature.UFFD_DEVICE: _opens(Way.DEVICE),
    Feature.UFFD_USER_MODE_ONLY: _opens(Way.USER_MODE_ONLY),
    Feature.UFFD_WP: _uffd_wp,
    Feature.UFFD_WP_HUGETLBFS_SHMEM: _offers(UffdFeature.WP_HUGETLBFS_SHMEM),
    Feature.UFFD_WP_UNPOPULATED: _offers(UffdFeature.WP_UNPOPULATED),
    Feature.UFFD_WP_ASYNC: _offers(UffdFeature.WP_ASYNC),
    Feature.PAGEMAP_UFFD_WP: _marks,
    Feature.UFFD_WP_MULTI_VMA: _multi_vma,
    Feature.UFFD_WP_REMAP_CLEARS: _remap_clears,
    Feature.PAGEMAP_SCAN: _pagemap_scan,
    Feature.PAGEMAP_SCAN_HOLES: _scan_holes,
    Feature.PROCMAP_QUERY: _procmap_query,
    Feature.MADV_POPULATE_READ: _advises(_kernel.MADV_POPULATE_READ, "MADV_POPULATE_READ", "5.14"),
    Feature.MADV_GUARD: _advises(_kernel.MADV_GUARD_INSTALL, "MADV_GUARD_INSTALL", "6.13"),
    Feature.PAGEMAP_SOFT_DIRTY: _soft_dirty,
    Feature.PAGEMAP_GUARD: _guard,
}


def _try(lab: _Laboratory, feature: Feature, disabled: frozenset[str]) -> ProbeResult:
    if feature.value in disabled:
        answer: _Answer = "disabled", None, f"{_DISABLE} names it", f"unset {_DISABLE}"
    else:
        try:
            answer = _TRIALS[feature](lab)
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

    It makes no thread, signal or child, touches no tracker, and leaves no descriptor or mapping behind. Any thread may
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
        lab = _Laboratory()
        try:
            results = {feature: _try(lab, feature, disabled) for feature in _TRIALS}
        finally:
            if lab.pagemap >= 0:
                os.close(lab.pagemap)
        report = FeatureReport({feature: results[feature] for feature in Feature}, disabled)
        _cache = os.getpid(), disabled, report
        return report


def _renew_lock() -> None:
    global _lock  # noqa: PLW0603
    _lock = threading.RLock()  # its holder, if it had one, does not exist in this process


os.register_at_fork(after_in_child=_renew_lock)

__all__ = ["BACKEND_NAMES", "FeatureReport", "ProbeResult", "State", "probe"]
