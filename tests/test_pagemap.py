"""Pagemap: GET on this process and on others, by the ioctl and by words; and what results give."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import pickle
import random
import signal
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from children import Crew, in_child, plain
from conftest import PAGE, Flavour, disable, lacking, libc, need, pages_of, private, write

from pagemapcompat import (
    AccessError,
    AddressRange,
    ClosedError,
    DirtyTracker,
    EntryFlag,
    Feature,
    InvalidArgumentError,
    PageCategory,
    Pagemap,
    ScanQuery,
    ScanResult,
    TargetGoneError,
    UnsupportedError,
    _kernel,
    probe,
)
from pagemapcompat.abi import UffdFeature
from pagemapcompat.userfaultfd import Way, open_userfaultfd

pytestmark = pytest.mark.kernel

C = PageCategory
TELLABLE = C.FILE | C.PRESENT | C.SWAPPED
PRESENT = ScanQuery(all_of=C.PRESENT, report=TELLABLE)
CLONE3 = 435  # on every architecture


@pytest.fixture(params=["ioctl", "words"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where answers come from."""
    if request.param == "words":
        disable(monkeypatch, "pagemap-scan")
    elif not (answer := probe()[Feature.PAGEMAP_SCAN]):
        lacking("pagemap-scan", answer.detail, answer.hint or "none")
    return str(request.param)


@pytest.fixture
def pagemap(source: str) -> Iterator[Pagemap]:
    """This process's own."""
    with Pagemap() as opened:
        yield opened


def indices(result: ScanResult, base: int) -> set[int]:
    """Pages, counted from *base*."""
    return {page - base // PAGE for region in result for page in range(region.start // PAGE, region.end // PAGE)}


def test_presence(pagemap: Pagemap) -> None:
    """Touched pages are present, the others are not, and read-only memory may be asked about."""
    memory = private(32)
    write(memory, 3, 4, 20)
    assert pages_of(pagemap.scan(memory, PRESENT)) == {3, 4, 20}
    assert [region.categories for region in pagemap.scan(memory, PRESENT)] == [C.PRESENT, C.PRESENT]
    inverted = ScanQuery(inverted=C.PRESENT, all_of=C.PRESENT)
    assert pages_of(pagemap.scan(memory, inverted)) == set(range(32)) - {3, 4, 20}
    with mmap.mmap(-1, PAGE, prot=mmap.PROT_READ) as read_only:
        assert pages_of(pagemap.scan(read_only, ScanQuery())) == {0}


def test_both_sources_agree(area: Callable[..., AddressRange], monkeypatch: pytest.MonkeyPatch) -> None:
    """On every query of categories that words can tell, over holes, limits and sub-ranges."""
    answer = probe()[Feature.PAGEMAP_SCAN]
    if not answer:
        lacking("pagemap-scan", answer.detail, answer.hint or "none")
    dice = random.Random(2)
    memory = area(200)
    for page in dice.sample(range(200), 70):
        libc.fill(memory.start + page * PAGE)
    libc.munmap(memory.start + 50 * PAGE, 20 * PAGE)
    shared = mmap.mmap(-1, 16 * PAGE)
    write(shared, 1, 5)
    with Pagemap() as by_ioctl:
        disable(monkeypatch, "pagemap-scan")
        with Pagemap() as by_words:
            for _ in range(200):
                query = ScanQuery(
                    all_of=C(dice.choice([0, 0, 4, 8, 16, 12])),
                    any_of=C(dice.choice([0, 0, 8, 20])),
                    inverted=C(dice.choice([0, 0, 8, 16, 28])),
                    report=C(dice.choice([0, 8, 12, 28])),
                )
                lo, hi = sorted(dice.sample(range(201), 2))
                limit = dice.choice([None, 1, 7, 1000])
                asked = AddressRange(memory.start + lo * PAGE, memory.start + hi * PAGE)
                one, two = (opened.scan(asked, query, max_pages=limit) for opened in (by_ioctl, by_words))
                assert list(one) == list(two), query
                assert one.pages == two.pages
                assert one.complete == two.complete
            everything = ScanQuery(report=TELLABLE)
            assert list(by_ioctl.scan(shared, everything)) == list(by_words.scan(shared, everything))
    libc.mmap(20 * PAGE, address=memory.start + 50 * PAGE)


def test_limits_resume(pagemap: Pagemap) -> None:
    """A scan in steps finds what one scan finds."""
    memory = private(64)
    wrote = write(memory, *range(0, 64, 3))
    base = pagemap.scan(memory, PRESENT).range.start
    found: set[int] = set()
    at: int | None = 0
    while at is not None:
        rest = AddressRange(base + at, base + 64 * PAGE)
        result = pagemap.scan(rest, PRESENT, max_pages=5)
        assert result.pages <= 5
        found |= indices(result, base)
        at = None if result.complete else result.walk_end - base
    assert found == wrote


def test_entries_agree_with_scan(pagemap: Pagemap) -> None:
    """One word a page, decoded."""
    memory = private(20_000)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    write(memory, 0, 9_000, 19_999)
    entries = list(pagemap.entries(memory))
    assert len(entries) == 20_000
    assert [i for i, entry in enumerate(entries) if entry.flags & EntryFlag.PRESENT] == [0, 9_000, 19_999]


def test_the_proposals_masks(pagemap: Pagemap) -> None:
    """PRESENT without FILE, as the proposal wrote it; a contradiction matches nothing; empty answers are left out."""
    memory = private(16)
    wrote = write(memory, 2, 3, 9)
    present, file = 4, 2
    result = pagemap.scan(memory, ScanQuery.from_proposal(present, 0, file, present))
    assert pages_of(result) == wrote
    assert all(region.categories == C.PRESENT for region in result)
    assert pages_of(pagemap.scan(memory, ScanQuery.from_proposal(present, 0, present, present))) == set()
    assert pages_of(pagemap.scan(memory, ScanQuery.from_proposal(0, 0, file, present))) == wrote
    limited = pagemap.scan(memory, ScanQuery.from_proposal(0, 0, 0, present), max_pages=2)
    assert (limited.pages, limited.complete) == (2, False)
    assert indices(limited, limited.range.start) == {2, 3}
    assert limited.resume_at == 9 * PAGE


def test_our_own_registrations(flavour: Flavour) -> None:
    """WPALLOWED and WRITTEN of tracked memory, from either source, where they can be told."""
    memory = private(16)
    with flavour.tracker() as tracker, Pagemap() as pagemap:
        ram = tracker.track(memory)
        wrote = write(memory, 1, 7)
        if flavour.backend == "uffd-wp" and probe().supports(Feature.PAGEMAP_SCAN):
            return  # the ioctl answers, and says WPALLOWED only of asynchronous registrations
        assert pages_of(pagemap.scan(memory, ScanQuery(all_of=C.WPALLOWED))) == set(range(16))
        if probe().supports(Feature.PAGEMAP_SCAN) or probe().supports(Feature.PAGEMAP_UFFD_WP):
            assert pages_of(pagemap.scan(memory, ScanQuery(all_of=C.WRITTEN | C.PRESENT))) == wrote
        else:
            with pytest.raises(UnsupportedError, match="WRITTEN"):
                pagemap.scan(memory, ScanQuery(all_of=C.WRITTEN))
        ram.close()


def test_wpallowed_by_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the ioctl WPALLOWED is what this library registered."""
    disable(monkeypatch, "pagemap-scan")
    memory, other = private(8), private(8)
    with DirtyTracker() as tracker, Pagemap() as pagemap, tracker.track(memory):
        assert pages_of(pagemap.scan(memory, ScanQuery(all_of=C.WPALLOWED))) == set(range(8))
        assert pages_of(pagemap.scan(other, ScanQuery(all_of=C.WPALLOWED))) == set()


def test_words_refuse_what_they_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, instead of guessing."""
    disable(monkeypatch, "pagemap-scan")
    memory = private(4)
    with Pagemap() as pagemap:
        for category in (C.HUGE, C.PFNZERO):
            with pytest.raises(UnsupportedError, match=str(category.name)):
                pagemap.scan(memory, ScanQuery(all_of=category))
    hidden = {"pagemap-uffd-wp": C.WRITTEN, "pagemap-soft-dirty": C.SOFT_DIRTY, "pagemap-guard": C.GUARD}
    for feature, category in hidden.items():
        disable(monkeypatch, "pagemap-scan", feature)
        with Pagemap() as pagemap, pytest.raises(UnsupportedError, match=str(category.name)):
            pagemap.scan(memory, ScanQuery(all_of=category))


def test_guard_and_soft_dirty_pages(source: str, area: Callable[..., AddressRange]) -> None:
    """Told where the kernel can, by either source; new memory is soft-dirty as a whole."""
    memory = area(8)
    libc.fill(memory.start, 8 * PAGE)
    with Pagemap() as pagemap:
        if probe().supports(Feature.PAGEMAP_SOFT_DIRTY):
            assert indices(pagemap.scan(memory, ScanQuery(all_of=C.SOFT_DIRTY)), memory.start) == set(range(8))
        elif source == "words":
            with pytest.raises(UnsupportedError, match="SOFT_DIRTY"):
                pagemap.scan(memory, ScanQuery(all_of=C.SOFT_DIRTY))
        if probe().supports(Feature.PAGEMAP_GUARD):
            libc.madvise(memory.start + 2 * PAGE, 2 * PAGE, libc.GUARD_INSTALL)
            assert indices(pagemap.scan(memory, ScanQuery(all_of=C.GUARD)), memory.start) == {2, 3}


def test_an_unknown_category_is_named() -> None:
    """The kernel refuses it, and the error says which bit of the four masks it was."""
    answer = probe()[Feature.PAGEMAP_SCAN]
    if not answer:
        lacking("pagemap-scan", answer.detail, answer.hint or "none")
    with Pagemap() as pagemap, pytest.raises(UnsupportedError, match=str(1 << 40)):
        pagemap.scan(private(1), ScanQuery(report=C(1 << 40)))


def test_categories_newer_than_our_names(area: Callable[..., AddressRange]) -> None:
    """What the kernel knows and we do not passes through, alone and beside what we know; what it refuses is named."""
    answer = probe()[Feature.PAGEMAP_SCAN]
    if not answer:
        lacking("pagemap-scan", answer.detail, answer.hint or "none")
    memory, found = area(4), C(0)
    libc.fill(memory.start, 4 * PAGE)
    named = C(sum(C))
    with Pagemap() as pagemap:
        for bit in range(named.bit_length(), 64):
            new = C(1 << bit)
            try:
                regions = list(pagemap.scan(memory, ScanQuery(all_of=C.PRESENT, report=C.PRESENT | new)))
            except UnsupportedError as error:
                assert str(1 << bit) in str(error)
                continue
            found |= new
            assert [region.categories & C.PRESENT for region in regions] == [C.PRESENT] * len(regions)
            assert all(
                type(region.categories) is C and not region.categories & ~(C.PRESENT | new) for region in regions
            )
            with_it = pagemap.scan(memory, ScanQuery(all_of=new, report=new))
            without = pagemap.scan(memory, ScanQuery(all_of=new, inverted=new, report=C.PRESENT))
            assert with_it.pages + without.pages == 4
            assert with_it.pages == 0 or with_it[0].categories == new
    if not found:
        lacking("unnamed-category", "every category of this kernel has a name", "Linux 7.3 or newer")


@pytest.mark.parametrize("way", Way, ids=lambda way: way.feature.value)
def test_features_newer_than_our_names(way: Way) -> None:
    """A handshake hands on every bit that the kernel sets, whatever it was asked for."""
    need(way.feature)
    offers = []
    for asked in (UffdFeature(0), UffdFeature.PAGEFAULT_FLAG_WP):
        fd, offered, attempt = open_userfaultfd(way, asked)
        assert fd >= 0, attempt
        os.close(fd)
        assert type(offered) is UffdFeature
        offers.append(offered)
    assert offers[0] == offers[1]
    if not int(offers[0]) & ~sum(UffdFeature):
        lacking("unnamed-uffd-feature", "every feature of this kernel has a name", "Linux 7.3 or newer")


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[str], AddressRange]]:
    """Another process, and 16 pages of it of which 4 and 5 are in use."""
    code = (
        "import mmap, sys, ctypes\n"
        "page = mmap.PAGESIZE\n"
        "m = mmap.mmap(-1, 16 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "m[4 * page] = m[5 * page] = 1\n"
        "print(ctypes.addressof(ctypes.c_char.from_buffer(m)), flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout is not None
        yield child, AddressRange.from_length(int(child.stdout.readline()), 16 * PAGE)


def test_another_process(source: str, other: tuple[subprocess.Popen[str], AddressRange]) -> None:
    """What is present there; and once it has gone, nothing of whoever comes after it."""
    child, memory = other
    with Pagemap(child.pid) as pagemap:
        assert indices(pagemap.scan(memory, PRESENT), memory.start) == {4, 5}
        if source == "words":
            for category in (C.WRITTEN, C.WPALLOWED):
                with pytest.raises(UnsupportedError, match=str(category.name)):
                    pagemap.scan(memory, ScanQuery(all_of=category))
        assert child.stdin is not None
        child.stdin.close()
        # A process that nobody has waited for still has a folder in /proc, and its maps are empty.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        for reap in (lambda: None, child.wait):
            reap()
            with pytest.raises(TargetGoneError):
                list(pagemap.entries(memory))
            with pytest.raises(TargetGoneError):
                pagemap.scan(memory, PRESENT)


def test_two_threads_ask_one(source: str) -> None:
    """The mappings are more than are read at once; each of the answers has all of them."""

    def check() -> None:
        memory = area_of(1024)
        for page in range(0, 1024, 2):
            libc.mprotect(memory.start + page * PAGE, PAGE, libc.PROT_READ)
        crew = Crew()
        with Pagemap() as pagemap:

            def ask() -> None:
                for _ in range(20):
                    assert indices(pagemap.scan(memory, PRESENT), memory.start) == set(range(1, 1024, 2))

            for _ in range(2):
                crew.add(ask)
            crew.join()

    def area_of(pages: int) -> AddressRange:
        start = libc.mmap(pages * PAGE)
        libc.madvise(start, pages * PAGE, mmap.MADV_NOHUGEPAGE)
        for page in range(1, pages, 2):
            libc.fill(start + page * PAGE)
        return AddressRange.from_length(start, pages * PAGE)

    in_child(check)


def test_a_process_that_runs_another_program(source: str) -> None:
    """What was asked about is gone with the old one."""
    code = "import os; os.write(1, b'\\n'); os.read(0, 3); os.execvp('cat', ['cat'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, bufsize=0) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        with Pagemap(child.pid) as pagemap:
            mapped = Path(f"/proc/{child.pid}/maps").read_text(encoding="utf-8").split(maxsplit=1)[0]
            memory = AddressRange(*(int(address, 16) for address in mapped.split("-")))
            assert pagemap.scan(memory, PRESENT).pages
            child.stdin.write(b"go\nanswer\n")
            assert child.stdout.readline().endswith(b"answer\n")
            with pytest.raises(TargetGoneError):
                pagemap.scan(memory, PRESENT)


def test_our_own_in_a_forked_child(source: str) -> None:
    """It is the parent's, and says so; one that was made by a pid goes on with that process."""

    def check(own: Pagemap, parent: Pagemap) -> None:
        write(memory, 1, 2)
        with pytest.raises(ClosedError, match=f"process {os.getppid()}, which process {os.getpid()} was forked from"):
            own.scan(memory, PRESENT)
        assert pages_of(parent.scan(memory, PRESENT)) == {0}
        with Pagemap() as new:
            assert pages_of(new.scan(memory, PRESENT)) == {0, 1, 2}

    memory = private(4)
    write(memory, 0)
    with Pagemap() as own, Pagemap(os.getpid()) as parent:
        in_child(check, own, parent)
        assert pages_of(own.scan(memory, PRESENT)) == {0}


def test_from_a_pidfd(source: str, other: tuple[subprocess.Popen[str], AddressRange]) -> None:
    """As from its pid while it lives, and never once it has ended."""
    child, memory = other
    pidfd = os.pidfd_open(child.pid)
    with Pagemap.from_pidfd(pidfd) as pagemap:
        assert pagemap.pid == child.pid
        assert indices(pagemap.scan(memory, PRESENT), memory.start) == {4, 5}
    child.kill()
    child.wait()
    with pytest.raises(TargetGoneError):
        Pagemap.from_pidfd(pidfd)
    os.close(pidfd)
    with pytest.raises(InvalidArgumentError, match=f"{pidfd} is no pidfd"):
        Pagemap.from_pidfd(pidfd)
    with open(os.devnull, "rb") as null, pytest.raises(InvalidArgumentError, match="is no pidfd"):
        Pagemap.from_pidfd(null.fileno())


def test_a_pid_used_again(source: str) -> None:
    """What was opened on a process says nothing of the next one with its pid."""

    def check() -> None:
        first = waiting()
        pidfd = os.pidfd_open(first)
        pagemap = Pagemap(first)
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        assert waiting(first) == first
        for call in (
            lambda: pagemap.open_file("maps"),
            lambda: list(pagemap.entries(memory)),
            lambda: Pagemap.from_pidfd(pidfd),
        ):
            with pytest.raises(TargetGoneError):
                call()
        with Pagemap(first) as another:
            assert list(another.scan(memory, PRESENT))

    memory = private(4)
    write(memory, *range(4))
    if not may_choose_pids():
        lacking("chosen-pids", "clone3() with a chosen pid is refused", "CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE")
    in_child(check)


def waiting(pid: int = 0) -> int:
    """A forked child that waits to be killed; with a pid of our choice, or -errno where it may not be chosen."""
    wanted = array("i", [pid])
    # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size
    arguments = array("Q", [0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, wanted.buffer_info()[0], 1] if pid else [0] * 10)
    arguments[4] = signal.SIGCHLD
    address, count = arguments.buffer_info()
    made = int(plain.syscall(CLONE3, ctypes.c_void_p(address), ctypes.c_size_t(8 * count)))
    if made == 0:
        while True:
            signal.pause()
    return made if made > 0 else -ctypes.get_errno()


def may_choose_pids() -> bool:
    """Whether clone3() takes a pid, by asking for one that is taken (EEXIST)."""
    return waiting(os.getpid()) == -errno.EEXIST


def test_a_process_without_memory(source: str) -> None:
    """A zombie is gone already; asking for its pages must not be left to the kernel, which some broke over."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises((TargetGoneError, AccessError), match=str(child.pid)):
            Pagemap(child.pid)  # without privileges it is denied already


def test_bitmap_and_friends(tracker: DirtyTracker) -> None:
    """spans, page_indices, fill_bitmap, as_u64, indexing and iteration tell the same."""
    dice = random.Random(3)
    memory = private(777)
    ram = tracker.track(memory)
    wrote = write(memory, *dice.sample(range(777), 300))
    result = ram.collect(3 * PAGE, 700 * PAGE)
    wanted = sorted(page for page in wrote if 3 <= page < 700)
    bits = bytearray((777 + 7) // 8)
    bits[97] |= 0x80  # beyond the last page: stays as it was
    assert result.fill_bitmap(bits) == len(wanted) == result.pages
    assert [i for i in range(777) if bits[i // 8] >> i % 8 & 1] == wanted
    assert bits[97] & 0x80
    assert list(result.page_indices()) == wanted
    assert [page for lo, hi in result.spans() for page in range(lo // PAGE, hi // PAGE)] == wanted
    words = result.as_u64()
    assert (words.format, words.ndim, len(words), words.readonly) == ("Q", 1, 3 * len(result), True)
    assert list(result) == [result[i] for i in range(len(result))] == result[:]
    assert result[-1] == list(result)[-1]
    assert result[0].pages * PAGE == result[0].length
    with pytest.raises(IndexError):
        result[len(result)]
    for bad in (bytearray(10), bytes(200)):
        with pytest.raises(InvalidArgumentError, match="bitmap"):
            result.fill_bitmap(bad)
    assert "regions" in repr(result)
    assert result == pickle.loads(pickle.dumps(result))  # noqa: S301 - our own
    assert result != ram.peek()


def test_letting_go_of_a_result_runs_no_python(tracker: DirtyTracker) -> None:
    """An interrupt that strikes in a destructor is swallowed: Ctrl-C would be printed, and do nothing."""
    memory = private(8)
    ram = tracker.track(memory)
    write(memory, 1, 5)
    result = ram.collect()
    words: memoryview | None = result.as_u64()
    called: list[str] = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
    words = result = None
    sys.setprofile(None)
    assert words is result is None
    assert called == []


def test_a_closed_pagemap(pagemap: Pagemap) -> None:
    """Says so; closing twice is fine."""
    pagemap.close()
    pagemap.close()
    for call in (
        pagemap.fileno,
        lambda: pagemap.open_file("maps"),
        lambda: pagemap.scan(private(1), PRESENT),
        lambda: list(pagemap.entries(private(1))),
    ):
        with pytest.raises(ClosedError):
            call()


def test_the_descriptor_is_the_kernels(pagemap: Pagemap) -> None:
    """A Pagemap is a file."""
    assert os.readlink(f"/proc/self/fd/{pagemap.fileno()}").endswith("/pagemap")


def test_closing_under_a_running_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gets the number of its descriptor before the answer is there."""
    memory = private(8)
    memory[:] = b"x" * len(memory)
    pagemap, query = Pagemap(), _kernel.query
    number = pagemap.fileno()

    def close_and_open(fd: int, *arguments: Any, **options: Any) -> Any:
        pagemap.close()
        others = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
        try:
            assert fd not in others
            return query(fd, *arguments, **options)
        finally:
            for other in others:
                os.close(other)

    monkeypatch.setattr(_kernel, "query", close_and_open)
    assert pagemap.scan(memory, ScanQuery(all_of=PageCategory.PRESENT)).pages == 8
    with pytest.raises(ClosedError):
        pagemap.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_addresses_that_no_process_has() -> None:
    """The process is still there."""
    with Pagemap() as pagemap, pytest.raises(InvalidArgumentError, match="0x4000000000000000"):
        list(pagemap.entries((1 << 62, PAGE)))
