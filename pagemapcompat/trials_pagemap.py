"""Trials: the words of pagemap, its ioctl, and the calls beside them."""

from __future__ import annotations

import mmap
import os
from errno import EINVAL, EPERM
from typing import TYPE_CHECKING

from pagemapcompat import _kernel
from pagemapcompat.abi import PFN_MASK, EntryFlag, Feature, PageCategory, UffdFeature, category_feature
from pagemapcompat.laboratory import ABSENT, DENIED, HUGE, Answer, Laboratory, State, Trial, check, yes
from pagemapcompat.limits import NOT_DUMPABLE_HINT
from pagemapcompat.memory import page_size

if TYPE_CHECKING:
    from collections.abc import Mapping


def open_pagemap(lab: Laboratory) -> Answer:
    """Open it, for this trial and all that follow."""
    try:
        lab.pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in DENIED:
            return "denied", error.errno, "/proc/self/pagemap may not be opened", NOT_DUMPABLE_HINT
        if error.errno not in ABSENT:
            raise
        hint = "mount /proc; a kernel needs CONFIG_PROC_PAGE_MONITOR"
        return "no", error.errno, "/proc/self/pagemap cannot be opened", hint
    return yes("/proc/self/pagemap opens")


def _pfn(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP)
    if missing:
        return missing
    with lab.memory(page_size()) as (at, view):
        view[0] = 1
        if lab.word(at) & PFN_MASK:
            return yes("pagemap words show page frame numbers")
    return "denied", EPERM, "pagemap words show 0 for page frame numbers", "CAP_SYS_ADMIN, since Linux 4.2"


def _soft_dirty(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP)
    if missing:
        return missing
    with lab.memory(page_size()) as (at, view):
        view[0] = 1
        # A new mapping is soft-dirty as a whole; clearing it would be the whole process's.
        if lab.word(at) & EntryFlag.SOFT_DIRTY:
            return yes("bit 55 of a pagemap word shows soft-dirty")
    return "no", None, "bit 55 of a pagemap word is not set in new memory", "a kernel with CONFIG_MEM_SOFT_DIRTY"


def _soft_dirty_clears(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP_SOFT_DIRTY)
    if missing:
        return missing
    hint = "`pagemapcompat probe` tries it, in a process of its own"
    return "unknown", None, "clearing soft-dirty would clear it for the whole process", hint


def try_soft_dirty(lab: Laboratory) -> Answer:
    """Clear soft-dirty and store, twice round. Only for a process in which nobody else uses it.

    Accepted is not supported: without CONFIG_MEM_SOFT_DIRTY the clear succeeds, and bit 55 never appears.
    """
    with lab.memory(page_size()) as (at, view):
        for number in (1, 2):
            view[0] = number
            try:
                with open("/proc/self/clear_refs", "w", encoding="utf-8") as refs:
                    refs.write("4")
            except OSError as error:
                if error.errno not in ABSENT | DENIED:
                    raise
                state: State = "denied" if error.errno in DENIED else "no"
                hint = "prctl(PR_SET_DUMPABLE, 1), or a kernel with CONFIG_PROC_PAGE_MONITOR"
                return state, error.errno, "/proc/self/clear_refs cannot be written", hint
            clean = lab.word(at)
            view[0] = number + 2
            if clean & EntryFlag.SOFT_DIRTY or not lab.word(at) & EntryFlag.SOFT_DIRTY:
                return "no", None, "clearing soft-dirty has no effect", "a kernel with CONFIG_MEM_SOFT_DIRTY"
    return yes("clear_refs clears soft-dirty, and a store sets it again")


def _guard(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP, Feature.MADV_GUARD)
    if missing:
        return missing
    with lab.memory(page_size()) as (at, _):
        check(_kernel.madvise(at, at + page_size(), _kernel.MADV_GUARD_INSTALL), "madvise")
        if lab.word(at) & EntryFlag.GUARD:
            return yes("bit 58 of a pagemap word shows guard pages")
    return "no", None, "bit 58 of a pagemap word does not show guard pages", "Linux 6.15 or newer has it"


def _pagemap_scan(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP)
    if missing:
        return missing
    rc, _ = _kernel.pagemap_scan(lab.pagemap, 0, 0)
    if rc == 0:
        return yes("the ioctl answers")
    if -rc in DENIED:
        return "denied", -rc, "the ioctl is refused", "a seccomp profile that allows ioctl(2) on /proc/PID/pagemap"
    if -rc not in ABSENT:
        check(rc, "PAGEMAP_SCAN")
    return "no", -rc, "the ioctl is not there", "Linux 6.7 or newer, or a kernel that has it back-ported"


def _scan_written(lab: Laboratory, start: int, end: int) -> int:
    """How many bytes of [start, end) the ioctl calls written."""
    written = PageCategory.WRITTEN
    rc, regions = _kernel.pagemap_scan(lab.pagemap, start, end, all_of=written, report=written, vec_len=8)
    check(rc, "PAGEMAP_SCAN")
    return sum(stop - first for first, stop, _ in regions)


def _scan_answers(lab: Laboratory) -> tuple[int, int, int, int]:
    """How much of 4 MiB is called written: untouched, armed, with one page discarded, with 2 MiB discarded."""
    if lab.written is None:
        size = page_size()
        with lab.uffd(UffdFeature.WP_ASYNC) as uffd, lab.memory(2 * HUGE) as (at, view):
            end = at + 2 * HUGE
            check(_kernel.madvise(at, end, mmap.MADV_NOHUGEPAGE), "madvise")
            check(_kernel.uffd_register(uffd, at, end)[0], "UFFDIO_REGISTER")
            untouched = _scan_written(lab, at, end)
            view[0] = view[size] = 1
            check(_kernel.uffd_writeprotect(uffd, at, end, protect=True), "UFFDIO_WRITEPROTECT")
            armed = _scan_written(lab, at, end)
            check(_kernel.madvise(at, at + size, mmap.MADV_DONTNEED), "madvise")
            one = _scan_written(lab, at, end)
            check(_kernel.madvise(at, at + HUGE, mmap.MADV_DONTNEED), "madvise")
            lab.written = untouched, armed, one, _scan_written(lab, at, end)
    return lab.written


def _scan_discards(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP_SCAN, Feature.UFFD_WP_ASYNC)
    if missing:
        return missing
    _, armed, one, _ = _scan_answers(lab)
    if (armed, one) == (0, page_size()):
        return yes("a discarded page is called written")
    return "no", None, "a discarded page is called clean", "a newer kernel; the library asks twice until then"


def _scan_holes(lab: Laboratory) -> Answer:
    missing = lab.lacks(Feature.PAGEMAP_SCAN, Feature.UFFD_WP_ASYNC)
    if missing:
        return missing
    if _scan_answers(lab) == (2 * HUGE, 0, page_size(), HUGE):
        return yes("empty memory that carries no mark is called written")
    hint = "a kernel with 07b4377bdbe7; until then a second query finds what the first calls clean"
    return "no", None, "memory that was discarded, or never armed, is called clean", hint


def _knows(category: PageCategory) -> Trial:
    def answer(lab: Laboratory) -> Answer:
        missing = lab.lacks(Feature.PAGEMAP_SCAN)
        if missing:
            return missing
        rc, _ = _kernel.pagemap_scan(lab.pagemap, 0, 0, report=category)
        if rc == 0 and category is PageCategory.SOFT_DIRTY:
            # Accepted is not supported: a kernel without CONFIG_MEM_SOFT_DIRTY never sets it.
            missing = lab.lacks(Feature.PAGEMAP_SOFT_DIRTY)
        if missing:
            return missing
        if rc == 0:
            return yes(f"PAGEMAP_SCAN knows PAGE_IS_{category.name}")
        if rc != -EINVAL:
            check(rc, "PAGEMAP_SCAN")
        return "no", -rc, f"PAGEMAP_SCAN refuses PAGE_IS_{category.name}", "a newer kernel, or a query without it"

    return answer


def _procmap_query(_lab: Laboratory) -> Answer:
    fd = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        rc = _kernel.maps_query(fd)
    finally:
        os.close(fd)
    if rc > 0:
        return yes("mappings can be asked for one by one")
    if -rc in DENIED:
        return "denied", -rc, "the ioctl on /proc/self/maps is refused", "a seccomp profile that allows ioctl(2) on it"
    if -rc not in ABSENT:
        check(rc, "PROCMAP_QUERY")
    return "no", -rc, "the ioctl on /proc/self/maps is not there", "Linux 6.11 or newer; until then the text is read"


def _advises(advice: int, name: str, since: str) -> Trial:
    def answer(lab: Laboratory) -> Answer:
        with lab.memory(page_size()) as (at, _):
            rc = _kernel.madvise(at, at + page_size(), advice)
        if rc == 0:
            return yes(f"{name} is accepted")
        if -rc in DENIED:
            return "denied", -rc, f"{name} is refused", "a seccomp profile that allows madvise(2)"
        if -rc not in ABSENT:
            check(rc, name)
        return "no", -rc, f"{name} is refused", f"Linux {since} or newer"

    return answer


PAGEMAP_TRIALS: Mapping[Feature, Trial] = {
    Feature.PAGEMAP_SOFT_DIRTY: _soft_dirty,
    Feature.SOFT_DIRTY: _soft_dirty_clears,
    Feature.PAGEMAP_PFN: _pfn,
    Feature.PAGEMAP_SCAN: _pagemap_scan,
    Feature.PAGEMAP_SCAN_DISCARDS: _scan_discards,
    Feature.PAGEMAP_SCAN_HOLES: _scan_holes,
    **{category_feature(category): _knows(category) for category in PageCategory},
    Feature.PROCMAP_QUERY: _procmap_query,
    Feature.MADV_POPULATE_READ: _advises(_kernel.MADV_POPULATE_READ, "MADV_POPULATE_READ", "5.14"),
    Feature.MADV_GUARD: _advises(_kernel.MADV_GUARD_INSTALL, "MADV_GUARD_INSTALL", "6.13"),
    Feature.PAGEMAP_GUARD: _guard,
}

__all__ = ["PAGEMAP_TRIALS", "open_pagemap", "try_soft_dirty"]
