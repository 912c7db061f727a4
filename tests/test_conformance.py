"""The kernel's own checks of PAGEMAP_SCAN (tools/testing/selftests/mm/pagemap_ioctl.c), put to this library.

A docstring begins with the numbers that the selftest prints for the checks its test stands for; 36 to 83 are the names
of the kinds of memory. The last test sees that none of 1 to 119 is missing. GET is `peek`, and `Pagemap.scan` by the
ioctl and by words; GET and WP is `collect`; WP alone is `reset`.

The library has no vector that could be missing or too short: a result has room for every region. A vector of N regions
of one page each is `max_pages=N` here. Nor are there flags, or masks for what `collect` protects.

Where kernels disagree the rule is ours: a page is written unless it is known to be unchanged. `track` starts clean, so
nothing is armed after it. What cannot be tracked or told is refused, and that is a check like any other.
"""

from __future__ import annotations

import ctypes
import fcntl
import inspect
import mmap
import os
import random
import re
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from errno import EINVAL, EOPNOTSUPP
from pathlib import Path

import attrs
import pytest
from children import Crew, in_child
from conftest import HUGE, HUGE_PAGES, PAGE, PRIVATE, Flavour, disable, lacking, libc, pages_of, part, private, write
from test_kinds import MFD_HUGETLB, hugetlb_refused

from pagemapcompat import (
    AddressRange,
    AlignmentError,
    DirtyTracker,
    Feature,
    NotTrackableError,
    PageCategory,
    Pagemap,
    ScanQuery,
    ScanResult,
    TrackedRange,
    UnsupportedError,
    probe,
)
from pagemapcompat.abi import UffdFeature
from pagemapcompat.userfaultfd import Way, open_userfaultfd

UFFDIO_REGISTER, REGISTER_WP = 0xC020AA00, 2
C = PageCategory
ALL = C.WPALLOWED | C.WRITTEN | C.FILE | C.PRESENT | C.SWAPPED | C.PFNZERO | C.HUGE
UNKNOWN = C(1 << 62)
Area = Callable[..., AddressRange]
PAGES = pytest.mark.parametrize("pages", [pytest.param(100, marks=pytest.mark.kernel), 1_000])
HUGE_COUNT = pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.kernel), 10])
"""The selftest has the larger ones. In an emulated kernel the fault thread takes milliseconds for a page."""


@attrs.frozen
class Source:
    """A Pagemap that asks the ioctl, or one that reads words."""

    pagemap: Pagemap
    by_ioctl: bool

    @property
    def tells(self) -> PageCategory:
        """The categories, of those asked for here, that it can tell on this kernel or this imitation of one."""
        if self.by_ioctl:
            return C(sum(one for one in C if probe().supports(Feature[f"CATEGORY_{one.name}"])))
        shown = {C.WRITTEN: Feature.PAGEMAP_UFFD_WP, C.GUARD: Feature.PAGEMAP_GUARD}
        hidden = {C.HUGE, C.PFNZERO, *(one for one, feature in shown.items() if not probe().supports(feature))}
        return C(sum(one for one in C if one not in hidden))

    def scan(self, memory: AddressRange | mmap.mmap, limit: int | None = None, **masks: C) -> ScanResult | None:
        """Ask. What it cannot tell it must refuse, and is asked without; None where nothing is left to select by."""
        query = ScanQuery(**masks)
        if query.mentioned & ~self.tells:
            with pytest.raises(UnsupportedError) as caught:
                self.pagemap.scan(memory, query, max_pages=limit)
            assert caught.value.errno == (EINVAL if self.by_ioctl else EOPNOTSUPP)
            told = {name: mask & self.tells for name, mask in masks.items()}
            if any(masks.get(name) and not told[name] for name in ("all_of", "any_of")):
                return None
            query = ScanQuery(**told)
        return self.pagemap.scan(memory, query, max_pages=limit)


class Sources(list[Source]):
    """Each way of asking that this kernel has."""

    def scans(self, memory: AddressRange | mmap.mmap, limit: int | None = None, **masks: C) -> list[ScanResult]:
        """The answers of all that can tell. The others refuse."""
        found = (source.scan(memory, limit, **masks) for source in self)
        return [result for result in found if result is not None]


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sources]:
    """The ioctl, where it is, and words, for this process's own memory."""
    found = Sources()
    if probe().supports(Feature.PAGEMAP_SCAN):
        found.append(Source(Pagemap(), by_ioctl=True))
    with monkeypatch.context() as patch:
        disable(patch, "pagemap-scan")
        found.append(Source(Pagemap(), by_ioctl=False))
    yield found
    for source in found:
        source.pagemap.close()


def runs(result: ScanResult) -> list[tuple[int, int]]:
    """Each region of a complete result: its first page, and the one behind its last."""
    assert result.complete
    return [(lo // PAGE, -(-hi // PAGE)) for lo, hi in result.spans()]


# -- Arguments, patterns, limits ----------------------------------------------------------------------------------


@PAGES
def test_a_range_of_no_length(tracker: DirtyTracker, sources: Sources, pages: int) -> None:
    """1, 20-22. It is valid for every operation, has no region, and its walk ends where it starts."""
    ram = tracker.track(private(pages))
    libc.fill(ram.range.start, ram.range.length)
    for at in (0, pages // 2 * PAGE, pages * PAGE):
        empty = AddressRange.from_length(ram.range.start + at, 0)
        for result in (ram.peek(at, at), ram.collect(at, at), *sources.scans(empty, all_of=ALL, report=ALL)):
            assert (len(result), result.walk_end, result.complete) == (0, empty.start, True)
        ram.reset(at, at)
    assert runs(ram.collect()) == [(0, pages)]


@pytest.mark.kernel
def test_mistakes_that_cannot_be_made() -> None:
    """2-6. No vector can be missing or have no room, and there is no place for flags, wrong ones or right ones."""
    names = lambda function: list(inspect.signature(function).parameters)[1:]  # noqa: E731
    assert names(TrackedRange.peek) == names(TrackedRange.collect) == ["start", "stop", "max_pages"]
    assert names(TrackedRange.reset) == ["start", "stop"]
    assert names(Pagemap.scan) == ["memory", "query", "max_pages"]
    assert list(inspect.signature(ScanQuery).parameters) == ["all_of", "any_of", "inverted", "report"]


@pytest.mark.kernel
def test_masks(tracker: DirtyTracker, sources: Sources) -> None:
    """7-11. Masks may be empty or inverted as a whole; an unknown category in any of them is refused by its number."""
    memory = tracker.track(private(1_000)).range
    for result in sources.scans(memory, report=C.WRITTEN):
        assert runs(result) == [(0, 1_000)]
        assert result[0].categories == C(0)
    for result in sources.scans(memory, all_of=C.WRITTEN, any_of=C.WRITTEN):
        assert runs(result) == []
    for source in sources:
        for masks in (
            {"all_of": C.PRESENT, "report": UNKNOWN},
            {"all_of": C.PRESENT | UNKNOWN, "any_of": C.PRESENT, "report": C.PRESENT},
            {"any_of": C.PRESENT | UNKNOWN},
            {"inverted": C.PRESENT | UNKNOWN},
        ):
            with pytest.raises(UnsupportedError, match=str(int(UNKNOWN))) as caught:
                source.pagemap.scan(memory, ScanQuery(**masks))
            assert caught.value.errno == (EINVAL if source.by_ioctl else EOPNOTSUPP)
    for result in sources.scans(memory, inverted=ALL, report=C.WRITTEN):
        assert runs(result) == [(0, 1_000)]


@PAGES
def test_every_second_page(tracker: DirtyTracker, sources: Sources, pages: int) -> None:
    """12-15. Each of them is a region, taken at once or in parts, with the last page beside them or not."""
    memory = private(pages)
    ram = tracker.track(memory)
    assert pages_of(ram.collect()) == set()
    wrote = write(memory, *range(0, pages, 2))
    regions = [(page, page + 1) for page in sorted(wrote)]
    for result in (ram.peek(), *sources.scans(ram.range, all_of=C.WRITTEN, report=C.WRITTEN)):
        assert runs(result) == regions

    assert set(ram.collect(max_pages=pages // 2 - 2).page_indices()) == set(range(0, pages - 4, 2))
    assert runs(ram.peek()) == regions[-2:]
    assert runs(ram.collect()) == regions[-2:]

    wrote = write(memory, *range(0, pages, 2), pages - 1)
    first = ram.collect(max_pages=pages // 2)
    assert set(first.page_indices()) == wrote - {pages - 1}  # the last two are one region, of which half fits
    assert not first.complete
    assert runs(ram.collect()) == [(pages - 1, pages)]


@PAGES
def test_two_pages_of_many(tracker: DirtyTracker, pages: int) -> None:
    """16. Taking the second and third page leaves the first, and all behind them."""
    ram = tracker.track(private(pages))
    libc.fill(ram.range.start, ram.range.length, 255)
    assert runs(ram.collect(PAGE, 3 * PAGE, max_pages=2)) == [(1, 3)]
    assert runs(ram.peek()) == [(0, 1), (3, pages)]


@PAGES
def test_two_ranges(tracker: DirtyTracker, pages: int) -> None:
    """17. Protecting one anew leaves the other as it is."""
    one, other = tracker.track(private(pages)), tracker.track(private(pages))
    for ram in (one, other):
        libc.fill(ram.range.start, ram.range.length)
    one.reset()
    assert runs(other.peek()) == [(0, pages)]
    assert runs(one.peek()) == []


@PAGES
def test_three_limited_calls(tracker: DirtyTracker, pages: int) -> None:
    """18. Of a fifth of the pages each, they add up to the half that was written."""
    pages += pages // 20
    memory = private(pages)
    ram = tracker.track(memory)
    wrote = write(memory, *range(0, pages, 2))
    fifth = pages // 5
    found = [set(ram.collect(max_pages=fifth).page_indices()) for _ in range(3)]
    assert [len(some) for some in found] == [fifth, fifth, len(wrote) - 2 * fifth]
    assert set().union(*found) == wrote


@pytest.mark.parametrize(
    ("pages", "rounds"),
    [pytest.param(200, 2, marks=pytest.mark.kernel, id="small"), pytest.param(10_000, 5, id="large")],
)
def test_random_pages_in_steps(tracker: DirtyTracker, pages: int, rounds: int) -> None:
    """19. Half of the pages, by chance, collected fifty at a time from where the last walk ended: each of them, once.

    The selftest has 100 rounds; five, each of them compared page by page, are what a second allows.
    """
    memory, dice = private(pages), random.Random(19)
    ram = tracker.track(memory)
    for _ in range(rounds):
        wrote = write(memory, *(page for page in range(pages) if dice.randrange(2)))
        found: list[int] = []
        at: int | None = 0
        while at is not None:
            result = ram.collect(at, max_pages=50)
            found += result.page_indices()
            at = result.resume_at
        assert found == sorted(wrote)


@PAGES
def test_where_a_walk_ends(tracker: DirtyTracker, sources: Sources, pages: int) -> None:
    """23-35. At the end, or at the first written page beyond the limit: of pages all written, and of every second."""
    memory = private(pages)
    ram = tracker.track(memory)
    half = pages // 2

    def check(number: int, limit: int | None, end: int, written: int) -> None:
        scans = sources.scans(ram.range, limit, all_of=C.WRITTEN, report=C.WRITTEN)
        for result in (ram.peek(max_pages=limit), *scans):
            assert result.walk_end == ram.range.start + end * PAGE, number
            assert result.complete == (end == pages), number
            assert result.pages == min(limit or written, written), number
            assert len(result) == (1 if written == pages else result.pages), number

    libc.fill(ram.range.start, ram.range.length, 0)
    dense = ((None, pages), (None, pages), (pages, pages), (half, half), (1, 1), ((1 << 64) - 1, pages))
    for number, (limit, end) in enumerate(dense, 23):
        check(number, limit, end, pages)
    ram.reset()
    write(memory, *range(0, pages, 2))
    sparse = ((None, pages), (1, 2), (1, 2), (half, pages), (pages, pages), (half, pages), (1, 2))
    for number, (limit, end) in enumerate(sparse, 29):
        check(number, limit, end, half)


# -- Kinds of memory ----------------------------------------------------------------------------------------------


def transparent(area: Area, huge_pages: int = 1) -> AddressRange:
    """Transparent huge pages, written."""
    memory = area(huge_pages * HUGE_PAGES)
    try:
        libc.madvise(memory.start, memory.length, mmap.MADV_HUGEPAGE)
    except OSError as error:
        lacking("thp", f"MADV_HUGEPAGE: {error.strerror}", "a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
    libc.fill(memory.start, memory.length)
    need_huge(memory)
    return memory


def need_huge(memory: AddressRange) -> None:
    """Skip where the kernel had no huge page to give."""
    inside, got = False, 0
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        if re.match(r"[0-9a-f]+-", line):
            inside = int(line.partition("-")[0], 16) == memory.start
        elif inside and line.startswith("AnonHugePages:"):
            got = int(line.split()[1]) << 10
    if got < memory.length:
        lacking(
            "thp",
            f"{got >> 20} of {memory.length >> 20} MiB came in huge pages",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, or more free memory",
        )


def sysv_hugetlb(area: Area) -> AddressRange:
    """A huge page from shmget(2), which is gone with its mapping."""
    ipc_rmid, shm_hugetlb, shm_remap = 0, 0o4000, 0o40000
    memory = area(HUGE_PAGES, libc.PROT_NONE)
    lib = ctypes.CDLL(None, use_errno=True)
    lib.shmget.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_int)
    lib.shmat.argtypes, lib.shmat.restype = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int), ctypes.c_void_p
    key = lib.shmget(0, HUGE, shm_hugetlb | 0o600)
    if key < 0:
        error = os.strerror(ctypes.get_errno())
        lacking("sysv-hugetlb", f"shmget: {error}", "root, or this group's number in sysctl vm.hugetlb_shm_group")
    at = lib.shmat(key, memory.start, shm_remap)
    lib.shmctl(key, ipc_rmid, None)
    assert at == memory.start
    return memory


def memfd_hugetlb(area: Area) -> AddressRange:
    """A huge page of a memfd."""
    fd = os.memfd_create("huge", MFD_HUGETLB)
    os.ftruncate(fd, HUGE)
    memory = area(HUGE_PAGES, 3, mmap.MAP_SHARED, fd)
    os.close(fd)
    return memory


def private_file(area: Area) -> AddressRange:
    """A file on the disk, written all over."""
    with tempfile.TemporaryFile(dir=Path(__file__).parent) as file:
        file.write(b"c" * 10 * PAGE)
        file.flush()
        return area(10, 3, mmap.MAP_PRIVATE, file.fileno())


def private_memfd(area: Area) -> AddressRange:
    """A memfd, written all over."""
    fd = os.memfd_create("file")
    os.write(fd, b"c" * 10 * PAGE)
    memory = area(10, 3, mmap.MAP_PRIVATE, fd)
    os.close(fd)
    return memory


def registers(memory: AddressRange) -> bool:
    """Whether the kernel takes it for a userfaultfd that is not asynchronous: System V's on 6.18, not on 7.3.4."""
    way = next(way for way in Way if probe().supports(way.feature))
    fd, _, attempt = open_userfaultfd(way, UffdFeature.PAGEFAULT_FLAG_WP | UffdFeature.WP_HUGETLBFS_SHMEM)
    assert fd >= 0, attempt
    try:
        fcntl.ioctl(fd, UFFDIO_REGISTER, struct.pack("4Q", memory.start, memory.length, REGISTER_WP, 0))
    except OSError as error:
        assert error.errno == EINVAL
        return False
    finally:
        os.close(fd)
    return True


@attrs.frozen
class Kind:
    """A kind of memory, by the numbers of the six checks that it has in the selftest."""

    name: str
    map: Callable[[Area], AddressRange]
    anonymous: bool = False
    """Private, and of pages that every userfaultfd takes."""
    hugetlb: bool = False

    def refused(self, flavour: Flavour, memory: AddressRange) -> bool:
        """Whether an engine must say that it cannot track this."""
        if self.map is private_file:
            return flavour.backend == "uffd-wp"
        if not self.anonymous and hugetlb_refused(flavour):
            return True
        return self.map is sysv_hugetlb and flavour.backend == "uffd-wp" and not registers(memory)


KINDS = (
    Kind("36-41-ten-pages", lambda area: area(10), anonymous=True),
    Kind("42-47-5120-pages", lambda area: area(5_120), anonymous=True),
    Kind("48-53-thp", transparent, anonymous=True),
    Kind("54-59-sysv-hugetlb", sysv_hugetlb, hugetlb=True),
    Kind("60-65-private-hugetlb", lambda area: area(HUGE_PAGES, 3, PRIVATE | libc.MAP_HUGETLB), hugetlb=True),
    Kind("66-71-memfd-hugetlb", memfd_hugetlb, hugetlb=True),
    Kind("72-77-private-file", private_file),
    Kind("78-83-private-memfd", private_memfd),
)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, id=kind.name, marks=() if "5120" in kind.name else pytest.mark.kernel) for kind in KINDS],
)
def test_each_kind_of_memory(
    flavour: Flavour, kind: Kind, sources: Sources, area: Area, request: pytest.FixtureRequest
) -> None:
    """Six checks: new, all written, all but two, taken, one page, two pages alone. Huge pages answer as a whole."""
    if kind.hugetlb:
        request.getfixturevalue("pool")
    memory = kind.map(area)
    start, pages = memory.start, memory.pages
    with flavour.tracker() as tracker:
        if kind.refused(flavour, memory):
            with pytest.raises(NotTrackableError) as caught:
                tracker.track(memory)
            assert (caught.value.errno, caught.value.operation) == (EINVAL, "UFFDIO_REGISTER")
            assert caught.value.hint
            assert ("memfd_create" in caught.value.hint) == (kind.map is sysv_hugetlb)
            return
        ram = tracker.track(memory)
        unit = ram.granularity // PAGE
        assert unit == (HUGE_PAGES if kind.hugetlb else 1)

        # First: nothing is written yet.
        assert runs(ram.collect(max_pages=pages - 2)) == []
        # Second: all is.
        libc.fill(start, memory.length, 255)
        assert runs(ram.peek()) == [(0, pages)]
        # Third: all but the first and the last page.
        ram.collect()
        libc.fill(start + PAGE, memory.length - 2 * PAGE, 0)
        assert runs(ram.collect()) == ([(0, pages)] if kind.hugetlb else [(1, pages - 1)])
        # Fourth: that was all.
        assert runs(ram.peek()) == []
        # Fifth: one page in the middle.
        middle = pages // 2
        ram.collect()
        libc.fill(start + middle * PAGE)
        assert runs(ram.peek()) == ([(0, pages)] if kind.hugetlb else [(middle, middle + 1)])
        # Sixth: two, of which alone is asked; of a part of a huge page only `Pagemap` answers.
        ram.collect()
        libc.fill(start + middle * PAGE, 2 * PAGE)
        two = part(ram, middle, 2)
        if kind.hugetlb:
            with pytest.raises(AlignmentError):
                ram.peek(middle * PAGE, (middle + 2) * PAGE)
        else:
            assert runs(ram.peek(middle * PAGE, (middle + 2) * PAGE)) == [(middle, middle + 2)]
        for result in sources.scans(two, all_of=C.WRITTEN, report=C.WRITTEN | C.HUGE):
            assert (result.range, runs(result)) == (two, [(0, 2)])


@HUGE_COUNT
def test_transparent_huge_pages_as_a_whole(tracker: DirtyTracker, sources: Sources, area: Area, count: int) -> None:
    """84-86. Protected they say nothing; written anew they are one region, with no category but WRITTEN."""
    memory = transparent(area, count)
    ram = tracker.track(memory)
    assert runs(ram.collect()) == []
    for result in (ram.peek(), *sources.scans(memory, all_of=C.WRITTEN, report=C.WRITTEN)):
        assert runs(result) == []
    libc.fill(memory.start, memory.length, 255)
    (region,) = ram.collect()
    assert (region.start, region.end, region.categories) == (memory.start, memory.end, C.WRITTEN)


@HUGE_COUNT
def test_one_page_of_a_transparent_huge_page(tracker: DirtyTracker, area: Area, count: int) -> None:
    """87. It is the only one that was written."""
    memory = transparent(area, count)
    ram = tracker.track(memory)
    middle = memory.pages // 2
    libc.fill(memory.start + middle * PAGE)
    assert runs(ram.peek()) == [(middle, middle + 1)]


@pytest.mark.parametrize(
    ("half", "count"),
    [("reset", 10), ("limit", 10), ("second", 10), pytest.param("limit", 1, marks=pytest.mark.kernel)],
)
def test_half_of_the_transparent_huge_pages(tracker: DirtyTracker, area: Area, half: str, count: int) -> None:
    """88-90. Protecting the first half, by reset or by a limit, leaves the second; taking the second the first."""
    memory = transparent(area, count)
    ram = tracker.track(memory)
    pages, middle = memory.pages, memory.pages // 2
    libc.fill(memory.start, memory.length)
    match half:
        case "reset":
            ram.reset(0, middle * PAGE)
            assert runs(ram.peek()) == [(middle, pages)]
        case "limit":
            assert set(ram.collect(max_pages=middle).page_indices()) == set(range(middle))
            assert runs(ram.peek()) == [(middle, pages)]
        case "second":
            assert runs(ram.collect(middle * PAGE, max_pages=middle)) == [(middle, pages)]
            assert runs(ram.peek()) == [(0, middle)]


@HUGE_COUNT
def test_half_of_one_transparent_huge_page(tracker: DirtyTracker, area: Area, count: int) -> None:
    """91-92. A limit inside of it is kept to the page, and the rest remains as one region."""
    memory = transparent(area, count)
    ram = tracker.track(memory)
    half = HUGE_PAGES // 2
    libc.fill(memory.start, memory.length, 255)
    result = ram.collect(max_pages=half)
    assert list(result.spans()) == [(0, half * PAGE)]
    assert result.resume_at == half * PAGE
    assert runs(ram.peek()) == [(half, memory.pages)]


# -- Rounds, protections, threads ---------------------------------------------------------------------------------


@pytest.mark.kernel
def test_a_page_from_malloc(tracker: DirtyTracker) -> None:
    """93. A hundred times: clean once it is protected, written once it is."""
    lib = ctypes.CDLL(None)
    lib.aligned_alloc.argtypes, lib.aligned_alloc.restype = (ctypes.c_size_t, ctypes.c_size_t), ctypes.c_void_p
    lib.free.argtypes = (ctypes.c_void_p,)
    at = lib.aligned_alloc(PAGE, PAGE)
    with tracker.track((at, PAGE)) as ram:
        for _ in range(100):
            assert runs(ram.peek()) == []
            ram.reset()
            libc.fill(at)
            assert runs(ram.peek()) == [(0, 1)]
            ram.reset()
    lib.free(at)


@pytest.mark.kernel
def test_protections_and_a_page_mapped_anew(tracker: DirtyTracker, area: Area) -> None:
    """94-97. Two pages are written, or are not, whatever mprotect does between, and with one of them replaced."""
    at = area(2).start
    ram = tracker.track(AddressRange.from_length(at, 2 * PAGE))
    libc.fill(at, 2 * PAGE, 1)
    assert runs(ram.peek()) == [(0, 2)]
    ram.reset()
    assert runs(ram.peek()) == []

    libc.mmap(PAGE, address=at + PAGE)
    ram.rearm(PAGE)
    ram.reset(PAGE)
    libc.mprotect(at, PAGE, libc.PROT_NONE)
    libc.mprotect(at, 2 * PAGE, libc.PROT_READ)
    libc.mprotect(at, 2 * PAGE, libc.PROT_READ | libc.PROT_WRITE)
    assert runs(ram.peek()) == []
    libc.fill(at, 2 * PAGE, 2)
    libc.mprotect(at, PAGE, libc.PROT_NONE)
    libc.mprotect(at, PAGE, libc.PROT_READ)
    libc.mprotect(at, PAGE, libc.PROT_READ | libc.PROT_WRITE)
    assert runs(ram.peek()) == [(0, 2)]

    ram.reset()
    libc.fill(at, 2 * PAGE, 3)
    assert runs(ram.peek()) == [(0, 2)]


@pytest.mark.parametrize(
    "few", [pytest.param(True, marks=pytest.mark.kernel, id="few"), pytest.param(False, id="many")]
)
def test_threads_that_race_with_collect(flavour: Flavour, *, few: bool) -> None:
    """98-100. Six threads write eight pages each while collect runs: it and the next one report all 48, and no other.

    Some may be reported twice. Three threads store in C, and three with the GIL held. The selftest's 1,000 rounds are
    for the kernel's own engine; where each page is a fault for a thread, a fifth of them is what two seconds allow.
    """
    threads, apart, each = 6, 32, 8
    rounds = 20 if few else 1_000 if flavour.backend == "pagemap-scan" else 200

    def check() -> None:
        sys.setswitchinterval(1e-5)
        memory = private(threads * apart)
        touched = {thread * apart + page for thread in range(threads) for page in range(each)}
        start, end = threading.Barrier(threads + 1), threading.Barrier(threads + 1)

        def work(first: int, store: Callable[[int, int], object]) -> None:
            for number in range(rounds):
                start.wait()
                store(first, number)
                end.wait()

        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            libc.fill(ram.range.start, ram.range.length, 0)
            assert runs(ram.collect()) == [(0, threads * apart)]
            assert runs(ram.collect()) == []
            crew = Crew()
            for thread in range(threads):
                in_c = lambda first, number: libc.fill(  # noqa: E731
                    ram.range.start + first * PAGE, each * PAGE, number % 256
                )
                in_python = lambda first, _: write(memory, *range(first, first + each))  # noqa: E731
                crew.add(work, thread * apart, in_python if thread % 2 else in_c)
            for number in range(rounds):
                start.wait()
                during = pages_of(ram.collect())
                end.wait()
                after = pages_of(ram.collect())
                assert during | after == touched, number
            crew.join()
            assert runs(ram.collect()) == []

    in_child(check)


# -- Categories ---------------------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_masks_together(tracker: DirtyTracker, sources: Sources) -> None:
    """101-105. Every category may be asked for at once, in each mask. `collect` has no mask to be wrong."""
    ram = tracker.track(private(10))
    for masks, matched in (
        ({"all_of": ALL}, []),
        ({"any_of": ALL}, [(0, 10)]),
        ({"inverted": ALL}, [(0, 10)]),
        ({"all_of": ALL, "any_of": ALL}, []),
    ):
        for result in sources.scans(ram.range, report=ALL, **masks):
            assert runs(result) == matched, masks
    assert runs(ram.collect()) == []


@pytest.mark.kernel
def test_written_pages_are_present(tracker: DirtyTracker, sources: Sources) -> None:
    """106-111. Each mask finds them WRITTEN and PRESENT, inverted it finds none; they are collected as WRITTEN."""
    ram = tracker.track(private(10))
    libc.fill(ram.range.start, ram.range.length, 0)
    both = C.WRITTEN | C.PRESENT
    for source in sources:
        for masks in ({"any_of": ALL}, {"all_of": both}, {"all_of": C.WRITTEN, "any_of": C.PRESENT}):
            result = source.scan(ram.range, report=ALL, **masks)
            if result is None:
                assert C.WRITTEN not in source.tells
                continue
            assert runs(result) == [(0, 10)]
            assert result[0].categories & both == both & source.tells
    for masks in (
        {"all_of": ALL},
        {"any_of": C.FILE | C.SWAPPED},
        {"all_of": C.WRITTEN, "inverted": C.WRITTEN},
        {"all_of": C.PRESENT, "inverted": C.PRESENT},
    ):
        for result in sources.scans(ram.range, report=ALL, **masks):
            assert runs(result) == [], masks
    for result in (*sources.scans(ram.range, any_of=ALL, report=C.WRITTEN), ram.collect()):
        assert runs(result) == [(0, 10)]
    assert runs(ram.peek()) == []


@pytest.mark.kernel
def test_a_read_only_file(sources: Sources) -> None:
    """112. Every page of a private mapping is FILE, tracked or not."""
    named = ALL & ~C.WRITTEN
    with open(__file__, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as memory:
        assert memory[:] == file.read()
        for result in sources.scans(memory, any_of=named, report=named):
            assert pages_of(result) == set(range(-(-len(memory) // PAGE)))
            assert all(region.categories & C.FILE for region in result)


@pytest.mark.kernel
def test_a_private_file_that_is_written(flavour: Flavour, sources: Sources) -> None:
    """113. Every page is WRITTEN, and msync changes nothing. `uffd-wp` cannot track it, and says so."""
    somewhere = C.PRESENT | C.SWAPPED | C.FILE
    with tempfile.TemporaryFile(dir=Path(__file__).parent) as file:
        file.write(b"c" * 10 * PAGE)
        file.flush()
        with mmap.mmap(file.fileno(), 10 * PAGE, mmap.MAP_PRIVATE) as memory, flavour.tracker() as tracker:
            if flavour.backend == "uffd-wp":
                with pytest.raises(NotTrackableError, match="private"):
                    tracker.track(memory)
                return
            with tracker.track(memory) as ram:
                memory[:] = b"z" * 10 * PAGE
                memory.flush()
                for result in (ram.peek(), *sources.scans(memory, all_of=C.WRITTEN, any_of=somewhere, report=ALL)):
                    assert runs(result) == [(0, 10)]
                    assert result[0].categories & C.WRITTEN


@pytest.mark.kernel
def test_unmapped_memory(sources: Sources, area: Area) -> None:
    """114. Asking about it is no error, and finds nothing."""
    memory = area(64)
    libc.munmap(memory.start, memory.length)
    for masks in ({"all_of": ALL & ~C.WRITTEN}, {"any_of": ALL}, {}):
        for result in sources.scans(memory, report=ALL, **masks):
            assert runs(result) == []
            assert result.walk_end == memory.end


@pytest.mark.kernel
def test_sixteen_pages_of_no_access(tracker: DirtyTracker, area: Area) -> None:
    """115. Opened in eight ways once they are registered: an inner part is protected, then all; none is written."""
    memory = area(16, libc.PROT_NONE)
    ram = tracker.track(memory)
    read, both = libc.PROT_READ, libc.PROT_READ | libc.PROT_WRITE
    for number, protection in enumerate((both, read, both, read, both, libc.PROT_NONE, both, read)):
        libc.mprotect(memory.start + 2 * number * PAGE, 2 * PAGE, protection)
    ram.reset(PAGE, 13 * PAGE)
    ram.reset()
    assert runs(ram.collect(max_pages=14)) == []
    assert runs(ram.peek()) == []
    libc.fill(memory.start + 9 * PAGE)
    assert runs(ram.collect()) == [(9, 10)]


@pytest.mark.kernel
def test_the_zero_page(sources: Sources) -> None:
    """116. Pages that were only read are PFNZERO; words, which do not tell it, refuse."""
    with mmap.mmap(-1, 10 * PAGE, PRIVATE, mmap.PROT_READ) as memory:
        assert not any(memory[page * PAGE] for page in range(10))
        for result in sources.scans(memory, all_of=C.PFNZERO, report=C.PFNZERO):
            assert runs(result) == [(0, 10)]


@pytest.mark.kernel
def test_the_huge_zero_page(sources: Sources, area: Area) -> None:
    """117. Likewise, where the kernel says so."""
    memory = area(HUGE_PAGES)
    try:
        libc.madvise(memory.start, memory.length, mmap.MADV_HUGEPAGE)
    except OSError as error:
        lacking("thp", f"MADV_HUGEPAGE: {error.strerror}", "a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
    assert ctypes.string_at(memory.start, 1) == b"\0"
    for result in sources.scans(memory, all_of=C.HUGE, report=ALL):
        if not result.pages:
            lacking("huge-zero-page", "none came", "echo 1 > /sys/kernel/mm/transparent_hugepage/use_zero_page")
        assert runs(result) == [(0, HUGE_PAGES)]
        assert result[0].categories & C.PRESENT
        if not result[0].categories & C.PFNZERO:
            lacking("huge-zero-page", "the kernel does not call it PFNZERO", "Linux 6.16 or newer")
    for result in sources.scans(memory, all_of=C.PFNZERO, report=C.PFNZERO):
        assert runs(result) == [(0, HUGE_PAGES)]


# -- Discards and guard pages -------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("huge", [False, True], ids=["118", "119"])
def test_discarded_pages(tracker: DirtyTracker, sources: Sources, area: Area, *, huge: bool) -> None:
    """118-119. They are written: ten empty entries of a page table, and 2 MiB without one.

    The kernel's own answer is that too, where its empty memory counts as written; and with masks that take its fast
    path, and with others.
    """
    memory = transparent(area) if huge else area(20)
    libc.fill(memory.start, memory.length)
    ram = tracker.track(memory)
    assert runs(ram.peek()) == []
    pages = HUGE_PAGES if huge else 10
    libc.madvise(memory.start, pages * PAGE, mmap.MADV_DONTNEED)
    assert runs(ram.peek()) == [(0, pages)]
    if probe().supports(Feature.PAGEMAP_SCAN_HOLES):
        for report in (C.WRITTEN, C.WRITTEN | C.PRESENT):
            for result in sources.scans(memory, all_of=C.WRITTEN, report=report):
                assert runs(result) == [(0, pages)]
    assert runs(ram.collect()) == [(0, pages)]
    assert runs(ram.peek()) == []


@pytest.mark.kernel
def test_guard_pages(sources: Sources, area: Area) -> None:
    """Of guard-regions.c: every second page of ten is a region of its own, with no category but GUARD."""
    memory = area(10)
    libc.fill(memory.start, memory.length)
    try:
        for page in range(0, 10, 2):
            libc.madvise(memory.start + page * PAGE, PAGE, libc.GUARD_INSTALL)
    except OSError:
        lacking("madv-guard", "this kernel has no guard pages (EINVAL)", "Linux 6.13 or newer")
    for result in sources.scans(memory, all_of=C.GUARD, report=C.GUARD):
        assert runs(result) == [(page, page + 1) for page in range(0, 10, 2)]
        assert [region.categories for region in result] == [C.GUARD] * 5
        assert result.walk_end == memory.end


def test_no_check_is_missing() -> None:
    """Each number that the selftest prints, 1 to 119, is named once in this file."""
    texts = [kind.name for kind in KINDS]
    texts += [function.__doc__ for name, function in globals().items() if name.startswith("test_")]
    found: list[int] = []
    for text in texts:
        numbers = re.match(r"(\d+(-\d+)?(, )?)*(?=[.-])", text)
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", numbers[0] if numbers else ""):
            found += range(int(first), int(last or first) + 1)
    assert sorted(found) == list(range(1, 120))
