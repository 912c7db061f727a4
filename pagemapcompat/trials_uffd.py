"""Trials: userfaultfd, and what write-protection through it does."""

from __future__ import annotations

import mmap
import os
from errno import EFAULT, ENOENT
from typing import TYPE_CHECKING

from pagemapcompat import _kernel
from pagemapcompat.abi import EntryFlag, Feature, UffdFeature
from pagemapcompat.laboratory import ABSENT, DENIED, Answer, Laboratory, State, Trial, check, yes
from pagemapcompat.memory import page_size
from pagemapcompat.userfaultfd import Way, open_hint, open_userfaultfd

if TYPE_CHECKING:
    from collections.abc import Mapping

_SINCE = {
    UffdFeature.MINOR_HUGETLBFS: "5.13",
    UffdFeature.MINOR_SHMEM: "5.14",
    UffdFeature.EXACT_ADDRESS: "5.18",
    UffdFeature.WP_HUGETLBFS_SHMEM: "5.19",
    UffdFeature.POISON: "6.6",
    UffdFeature.WP_ASYNC: "6.7",
    UffdFeature.MOVE: "6.8",
}
"""For hints; nothing is decided by it."""
_PTRACE = "CAP_SYS_PTRACE, in the initial user namespace"
_FULL_HINT = f"{_PTRACE}, read and write permission on /dev/userfaultfd, or sysctl vm.unprivileged_userfaultfd=1"
_FILLS = "read(2) into a protected page succeeds"
_FILLS_NOT = "read(2) into a protected page fails"


def _opens(way: Way) -> Trial:
    def answer(lab: Laboratory) -> Answer:
        fd, _, attempt = open_userfaultfd(way, UffdFeature(0))
        if fd < 0 and attempt.errno not in ABSENT | DENIED:
            raise OSError(attempt.errno, os.strerror(attempt.errno))
        if fd < 0:
            state: State = "denied" if attempt.errno in DENIED else "no"
            return state, attempt.errno, f"{attempt.call} fails", open_hint(attempt)
        os.close(fd)
        lab.way = lab.way or way
        return yes(f"{attempt.call} opens")

    return answer


def _offers(feature: UffdFeature) -> Trial:
    def answer(lab: Laboratory) -> Answer:
        if lab.way is None:
            _, number, _, hint = lab.answers[Feature.UFFD_USER_MODE_ONLY]
            # If one of them is there, and not for this process, nobody knows what it could do.
            absent = all(lab.answers[way.feature][0] == "no" for way in Way)
            return "no" if absent else "unknown", number, "no userfaultfd can be opened", hint
        fd, _, attempt = open_userfaultfd(lab.way, feature)
        if fd < 0 and attempt.errno in DENIED:
            return "denied", attempt.errno, f"UFFDIO_API refuses {feature.name}", _PTRACE
        if fd < 0 and attempt.errno not in ABSENT:
            raise OSError(attempt.errno, os.strerror(attempt.errno))
        if fd < 0:
            since = f"Linux {_SINCE[feature]} or newer" if feature in _SINCE else open_hint(attempt)
            return "no", attempt.errno, f"UFFDIO_API refuses {feature.name}", since
        os.close(fd)
        return yes(f"UFFDIO_API grants {feature.name}")

    return answer


def _uffd_wp(lab: Laboratory) -> Answer:
    answer = _offers(UffdFeature.PAGEFAULT_FLAG_WP)(lab)
    if answer[0] != "yes":
        return answer
    with lab.uffd(UffdFeature.PAGEFAULT_FLAG_WP) as uffd, lab.memory(page_size()) as (at, _):
        rc, _ = _kernel.uffd_register(uffd, at, at + page_size())
        if -rc in ABSENT:
            hint = "a kernel whose architecture has userfaultfd write-protection"
            return "no", -rc, "UFFDIO_REGISTER refuses write-protection of private anonymous memory", hint
        check(rc, "UFFDIO_REGISTER")
    return yes("private anonymous memory can be write-protected")


def _unpopulated(lab: Laboratory) -> Answer:
    answer = _offers(UffdFeature.WP_UNPOPULATED)(lab)
    if answer[0] != "yes" or not lab.has(Feature.PAGEMAP_UFFD_WP):
        return answer
    with (
        lab.uffd(UffdFeature.PAGEFAULT_FLAG_WP | UffdFeature.WP_UNPOPULATED) as uffd,
        lab.memory(page_size()) as (at, _),
    ):
        check(_kernel.uffd_register(uffd, at, at + page_size())[0], "UFFDIO_REGISTER")
        check(_kernel.uffd_writeprotect(uffd, at, at + page_size(), protect=True), "UFFDIO_WRITEPROTECT")
        if lab.word(at) & EntryFlag.UFFD_WP:
            return yes("an untouched page carries a mark")
    return "no", None, "an untouched page carries no mark, though UFFDIO_API grants WP_UNPOPULATED", "a newer kernel"


def _marks(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP, Feature.UFFD_WP)
    if missing:
        return missing
    with lab.uffd(UffdFeature.PAGEFAULT_FLAG_WP) as uffd, lab.memory(page_size()) as (at, view):
        view[0] = 1
        check(_kernel.uffd_register(uffd, at, at + page_size())[0], "UFFDIO_REGISTER")
        before = lab.word(at)
        check(_kernel.uffd_writeprotect(uffd, at, at + page_size(), protect=True), "UFFDIO_WRITEPROTECT")
        protected = lab.word(at)
        check(_kernel.uffd_writeprotect(uffd, at, at + page_size(), protect=False), "UFFDIO_WRITEPROTECT")
        # Both ways: Valve's kernels once used this bit for something of their own.
        if protected & EntryFlag.UFFD_WP and not (before | lab.word(at)) & EntryFlag.UFFD_WP:
            return yes("bit 57 of a pagemap word shows write-protection")
    return "no", None, "bit 57 of a pagemap word does not show write-protection", "Linux 5.14 or newer has it"


def _multi_vma(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.UFFD_WP)
    if missing:
        return missing
    size = page_size()
    with lab.uffd(UffdFeature.PAGEFAULT_FLAG_WP) as uffd, lab.memory(2 * size) as (at, _):
        # Advice that a mapping carries, so that the kernel has to split it; it changes nothing here.
        check(_kernel.madvise(at, at + size, mmap.MADV_DONTDUMP), "madvise")
        check(_kernel.uffd_register(uffd, at, at + 2 * size)[0], "UFFDIO_REGISTER")
        rc = _kernel.uffd_writeprotect(uffd, at, at + 2 * size, protect=True)
    if rc == -ENOENT:
        hint = "Linux 6.4 or newer (a1b92a3f1498); until then every mapping takes a call of its own"
        return "no", ENOENT, "UFFDIO_WRITEPROTECT refuses a range of two mappings", hint
    check(rc, "UFFDIO_WRITEPROTECT")
    return yes("UFFDIO_WRITEPROTECT takes a range of two mappings")


def _remap_clears(lab: Laboratory) -> Answer:
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
        check(_kernel.uffd_register(uffd, at, at + size)[0], "UFFDIO_REGISTER")
        check(_kernel.uffd_writeprotect(uffd, at, at + size, protect=True), "UFFDIO_WRITEPROTECT")
        # Leaves an empty mapping behind: a hole could be somebody else's memory by the time it is unmapped.
        check(_kernel.mremap_pages(at, elsewhere, size), "mremap")
        word = lab.word(elsewhere)
    if word & EntryFlag.UFFD_WP:
        hint = "Linux 6.13, 6.12.11 or newer; until then each collect asks for every mapping's registration"
        return "no", None, "a page keeps its mark when mremap takes its registration away", hint
    return yes("a page that mremap moves loses its mark with its registration")


def _fills(view: memoryview) -> bool:
    """Whether the kernel can store into *view*, which is protected."""
    source, end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.write(end, b"1")
        return os.readv(source, [view]) == 1
    except OSError as error:
        if error.errno != EFAULT:
            raise
        return False
    finally:
        os.close(source)
        os.close(end)


def _kernel_writes(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP, Feature.UFFD_WP)
    if missing:
        return missing
    # Somebody has to answer the fault, or the read would never end: a tracker, of which nobody else knows.
    assert lab.way is not None  # noqa: S101 - lacks() saw to it
    pagemap = os.dup(lab.pagemap)
    uffd, _, attempt = open_userfaultfd(lab.way, UffdFeature.PAGEFAULT_FLAG_WP)
    if uffd < 0:
        os.close(pagemap)
    check(-attempt.errno, str(attempt))
    rc, tracker, result = _kernel.tracker_create(uffd, pagemap, 0)
    check(rc, _kernel.operation(result))
    assert tracker is not None  # noqa: S101 - rc is 0
    try:
        with lab.memory(page_size()) as (at, view):
            view[0] = 1
            rc, handle, _ = _kernel.range_create(tracker, at, at + page_size())
            check(rc, "UFFDIO_REGISTER")
            assert handle is not None  # noqa: S101 - rc is 0
            filled = _fills(view)
            _kernel.range_close(handle)
    finally:
        _kernel.tracker_close(tracker)
    if filled:
        return yes(f"{_FILLS}, resolved by a thread")
    return "denied", EFAULT, f"{_FILLS_NOT}: faults are reported in user mode alone", _FULL_HINT


def _async_kernel_writes(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.UFFD_WP, Feature.UFFD_WP_ASYNC)
    if missing:
        return missing
    with lab.uffd(UffdFeature.WP_ASYNC) as uffd, lab.memory(page_size()) as (at, view):
        view[0] = 1
        check(_kernel.uffd_register(uffd, at, at + page_size())[0], "UFFDIO_REGISTER")
        check(_kernel.uffd_writeprotect(uffd, at, at + page_size(), protect=True), "UFFDIO_WRITEPROTECT")
        filled = _fills(view)
    return yes(f"{_FILLS}, resolved by the kernel") if filled else ("no", EFAULT, _FILLS_NOT, "a newer kernel")


UFFD_TRIALS: Mapping[Feature, Trial] = {
    **{way.feature: _opens(way) for way in Way},
    Feature.UFFD_WP: _uffd_wp,
    Feature.UFFD_WP_HUGETLBFS_SHMEM: _offers(UffdFeature.WP_HUGETLBFS_SHMEM),
    Feature.UFFD_WP_ASYNC: _offers(UffdFeature.WP_ASYNC),
    Feature.PAGEMAP_UFFD_WP: _marks,
    Feature.UFFD_WP_UNPOPULATED: _unpopulated,
    Feature.UFFD_WP_MULTI_VMA: _multi_vma,
    Feature.UFFD_WP_REMAP_CLEARS: _remap_clears,
    Feature.UFFD_WP_KERNEL_WRITES: _kernel_writes,
    Feature.UFFD_WP_ASYNC_KERNEL_WRITES: _async_kernel_writes,
    **{
        feature: _offers(UffdFeature[feature.name.removeprefix("UFFD_")])
        for feature in Feature
        if feature.name.removeprefix("UFFD_") in UffdFeature.__members__ and not feature.name.startswith("UFFD_WP")
    },
}

__all__ = ["UFFD_TRIALS"]
