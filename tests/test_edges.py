"""Corners where two rules meet, each of which once went wrong."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from children import Crew, Mirror, in_child, preloaded
from conftest import (
    HUGE,
    HUGE_PAGES,
    PAGE,
    PRIVATE,
    SANITIZED,
    Flavour,
    flavours,
    lacking,
    libc,
    need,
    need_shared,
    pages_of,
    part,
    private,
    rounds,
    run_child,
    write,
)

from pagemapcompat import (
    AddressRange,
    AlignmentError,
    DirtyTracker,
    Feature,
    KernelError,
    NotTrackableError,
    NotTrackedError,
    TrackedRange,
    _kernel,
    probe,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kernel

UFFDIO_REGISTER, REGISTER_MISSING = 0xC020AA00, 1


def test_limited_collects_of_shared_memory_lose_nothing(flavour: Flavour) -> None:
    """A limit must not turn the scan into one that protects pages it has not reported."""
    need_shared()
    memory = mmap.mmap(-1, 128 * PAGE)

    def check() -> None:
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            mirror, crew = Mirror(ram, memory), Crew()

            # A fault that the kernel resolves is cheap, one that a thread resolves is not, least of all emulated.
            last = rounds(80 if flavour.backend == "pagemap-scan" else 40)

            def fill() -> None:
                for round_ in range(1, last):
                    for page in range(128):
                        libc.fill(ram.range.start + page * PAGE, 1, round_)

            crew.add(fill)
            at: int | None = 0
            while crew.working:
                result = ram.collect(at or 0, max_pages=25)
                mirror.merge(result)
                at = result.resume_at
            crew.join()
            mirror.finish()

    in_child(check)


def test_memory_of_the_library_is_never_in_a_hole_of_tracked_memory(flavour: Flavour) -> None:
    """Where the kernel would put a mapping into such a hole, a rearm would protect what must never fault."""
    if SANITIZED:
        pytest.skip("AddressSanitizer puts memory of its own into the hole; remedy: run it without")

    def anonymous(memory: AddressRange) -> set[int]:
        with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
            starts = {int(line.split("-")[0], 16) for line in maps}
        return {start for start in starts if memory.start <= start < memory.end}

    def check() -> None:
        # Room for Python's own objects, which would else map an arena some time.
        kept_open = [bytes(256) for _ in range(1 << 14)][::128]
        with flavour.tracker(on_untracked="rearm") as tracker:
            small = libc.mmap(PAGE)
            memory = AddressRange.from_length(libc.mmap(4096 * PAGE), 4096 * PAGE)
            hole = AddressRange(memory.start + PAGE, memory.end - PAGE)
            # The kernel takes the highest gap that is large enough: let the hole be that.
            kept = []
            while not kept or kept[-1] > memory.start:
                kept.append(libc.mmap(PAGE, flags=(PRIVATE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)[len(kept) % 2]))
            libc.munmap(hole.start, hole.length)
            first = libc.mmap(PAGE)
            assert hole.start <= first < hole.end, "the kernel puts mappings elsewhere"
            libc.munmap(first, PAGE)
            ram = tracker.track(memory)  # whose hole would hold what is needed to track it
            assert anonymous(hole) == set()
            other = tracker.track((small, PAGE))
            with ram.cursor():
                ram.snapshot()
                assert anonymous(hole) == set()
                mine = libc.mmap(PAGE)
                libc.fill(mine)
                assert pages_of(ram.collect()) == {(mine - memory.start) // PAGE}
            other.close()
            ram.collect()
        assert kept_open

    in_child(check)


def nameless() -> list[tuple[int, int]]:
    """Where private memory is that anybody may write, and that is nobody's stack or heap."""
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        lines = [words for words in map(str.split, maps) if words[1] == "rw-p" and len(words) == 5]
    return [(int(start, 16), int(end, 16)) for start, end in (words[0].split("-") for words in lines)]


def test_memory_of_the_library_is_never_tracked(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """No page of what it keeps of a range, or of a reader: a fault there would wait for itself."""
    if SANITIZED:
        pytest.skip("AddressSanitizer maps memory of its own meanwhile; remedy: run it without")
    memory = area(1 << 21, libc.PROT_NONE, PRIVATE | libc.MAP_NORESERVE)
    bits = (1 << 21) // 8  # bytes, for one bit a page

    def new_since(before: list[tuple[int, int]]) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for start, end in nameless():
            old = [border for one in before if start <= one[0] < end for border in one]
            borders = [start, *old, end]
            found += zip(borders[::2], borders[1::2], strict=True)
        return [(start, end) for start, end in found if end - start >= bits]

    def check() -> None:
        # Room for Python's own objects, which would else map an arena some time.
        kept_open = [bytes(256) for _ in range(1 << 14)][::128]
        with flavour.tracker() as tracker:
            before = nameless()
            ram = tracker.track(memory)
            of_range = new_since(before)
            before = nameless()
            reader = ram.cursor()
            of_reader = new_since(before)
            for found, arrays in ((of_range, 2), (of_reader, 1)):
                assert sum(end - start for start, end in found) >= arrays * bits
                for at in (at for start, end in found for at in range(start + bits // 8, end, bits // 4)):
                    with pytest.raises(NotTrackableError, match="own memory"):
                        tracker.track((at, PAGE))
            reader.close()
        assert kept_open

    in_child(check)


@pytest.mark.parametrize("policy", ["raise", "rearm"])
def test_memory_that_another_userfaultfd_took(flavour: Flavour, area: Callable[..., AddressRange], policy: str) -> None:
    """Mapped anew and registered elsewhere: every call ends, and none calls the memory clean or tracked."""
    memory = area(16)

    def check() -> None:
        with flavour.tracker(on_untracked=policy) as tracker:
            ram = tracker.track(memory)
            libc.mmap(4 * PAGE, address=memory.start + 4 * PAGE)
            fd = _kernel.uffd_open(_kernel.UFFD_SYSCALL)
            fd = fd if fd >= 0 else _kernel.uffd_open(_kernel.UFFD_USER_MODE_ONLY)
            assert _kernel.uffd_handshake(fd, 0)[0] == 0
            libc.fill(memory.start + 4 * PAGE, 4 * PAGE)
            fcntl.ioctl(fd, UFFDIO_REGISTER, struct.pack("4Q", memory.start + 4 * PAGE, 4 * PAGE, REGISTER_MISSING, 0))
            if probe().supports(Feature.PAGEMAP_UFFD_WP):  # without marks nobody can tell whose registration it is
                assert pages_of(ram.peek()) >= {4, 5, 6, 7}
            for call in (ram.collect, ram.reset):
                with pytest.raises((NotTrackedError, OSError)):
                    call()
            os.close(fd)

    in_child(check)


@pytest.mark.parametrize("flavour", flavours("pagemap-scan"), indirect=True)
def test_a_limited_peek_of_a_file(flavour: Flavour) -> None:
    """peek raises for no kind of memory that can be tracked."""
    with tempfile.NamedTemporaryFile(dir=Path(__file__).parent) as file:
        file.truncate(16 * PAGE)
        with mmap.mmap(file.fileno(), 16 * PAGE) as memory, flavour.tracker() as tracker, tracker.track(memory) as ram:
            write(memory, 3, 9)
            assert set(ram.peek(max_pages=1).page_indices()) == {3}
            assert set(ram.collect(max_pages=1).page_indices()) == {3}
            assert pages_of(ram.collect()) == {9}


def test_huge_pages_before_a_hole(
    flavour: Flavour,
    pool: None,
    area: Callable[..., AddressRange],
) -> None:
    """An odd end behind huge pages, and small pages behind the hole, are no business of theirs."""
    need_shared()
    room = area(4 * HUGE_PAGES, libc.PROT_NONE)
    start = room.start
    libc.munmap(start, 4 * HUGE)
    libc.mmap(2 * HUGE, 3, PRIVATE | libc.MAP_HUGETLB, address=start)
    libc.mmap(PAGE, address=start + 3 * HUGE + 5 * PAGE)
    with flavour.tracker() as tracker:
        ram = tracker.track(AddressRange(start, start + 3 * HUGE + 6 * PAGE))
        libc.fill(start + HUGE)
        libc.fill(start + 3 * HUGE + 5 * PAGE)
        assert pages_of(ram.collect()) == {*range(HUGE_PAGES, 2 * HUGE_PAGES), 3 * HUGE_PAGES + 5}
        # A small page in the place of a huge one; the other stays what it is.
        libc.munmap(start, HUGE)
        libc.mmap(PAGE, address=start)
        libc.fill(start)
        with pytest.raises(NotTrackedError):
            ram.collect()
        ram.rearm()
        assert pages_of(ram.collect()) == {0}
        libc.fill(start + HUGE)
        assert pages_of(ram.collect()) == set(range(HUGE_PAGES, 2 * HUGE_PAGES))
        ram.close()
    libc.munmap(start, 4 * HUGE)
    libc.mmap(4 * HUGE, libc.PROT_NONE, address=start)


def test_offsets_at_an_odd_end(tracker: DirtyTracker) -> None:
    """The end of memory that ends inside a page is a valid start and stop: nothing lies behind it."""
    memory = mmap.mmap(-1, PAGE + 904, flags=PRIVATE)
    ram = tracker.track(memory)
    for result in (ram.collect(len(memory)), ram.peek(len(memory), len(memory))):
        assert (len(result), result.complete) == (0, True)
    ram.reset(len(memory))
    ram.unprotect(len(memory), len(memory))
    write(memory, 1)
    assert list(ram.collect(PAGE, len(memory)).spans()) == [(PAGE, PAGE + 904)]


@pytest.mark.parametrize("limit", [1 << 52, 1 << 64, 1 << 200])
def test_limits_beyond_any_memory(tracker: DirtyTracker, limit: int) -> None:
    """Are no limit."""
    memory = private(8)
    ram = tracker.track(memory)
    wrote = write(memory, 1, 5)
    assert pages_of(ram.peek(max_pages=limit)) == wrote
    assert pages_of(ram.collect(max_pages=limit)) == wrote


def test_private_dev_zero_is_anonymous(flavour: Flavour) -> None:
    """It has an inode, and empty pages like any private memory."""
    fd = os.open("/dev/zero", os.O_RDWR)
    with mmap.mmap(fd, 16 * PAGE, flags=mmap.MAP_PRIVATE) as memory, flavour.tracker() as tracker:
        os.close(fd)
        with tracker.track(memory) as ram:
            assert pages_of(ram.collect()) == set()
            wrote = write(memory, 3, 7)
            assert pages_of(ram.collect()) == wrote
            assert pages_of(ram.collect()) == set()


def test_a_range_keeps_its_tracker(flavour: Flavour) -> None:
    """Whoever holds only the range goes on tracking."""
    memory = private(8)
    ram = flavour.tracker().track(memory)
    wrote = write(memory, 2)
    assert pages_of(ram.collect()) == wrote
    ram._keep.close()


def test_guard_pages_that_were_mapped_anew(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """They are no longer tracked, though they are what they were when they were last reported."""
    memory = area(16)
    hole = AddressRange.from_length(memory.start + 4 * PAGE, 2 * PAGE)
    try:
        libc.madvise(hole.start, hole.length, libc.GUARD_INSTALL)
    except OSError:
        lacking("madv-guard", "this kernel has no guard pages (EINVAL)", "Linux 6.13 or newer")
    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        ram.collect()
        libc.mmap(hole.length, address=hole.start)
        libc.madvise(hole.start, hole.length, libc.GUARD_INSTALL)
        assert pages_of(ram.peek()) == {4, 5}
        with pytest.raises(NotTrackedError) as caught:
            ram.collect()
        assert caught.value.range == hole
        ram.rearm()
        assert pages_of(ram.collect()) == {4, 5}
        assert pages_of(ram.collect()) == set()


def test_a_reset_that_fails_leaves_alone_what_lies_behind(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """An empty page that was reported while it could not be read, and now can be, is not populated and not written."""
    with flavour.tracker() as tracker:
        memory = area(8)
        ram = tracker.track(memory)
        for page in (4, 6):
            libc.mprotect(memory.start + page * PAGE, PAGE, libc.PROT_NONE)
            libc.madvise(memory.start + page * PAGE, PAGE, mmap.MADV_DONTNEED)
        ram.collect()
        libc.mmap(PAGE, address=memory.start + 2 * PAGE)
        for page in (4, 6):
            libc.mprotect(memory.start + page * PAGE, PAGE, libc.PROT_READ | libc.PROT_WRITE)
        with pytest.raises(NotTrackedError):
            ram.reset()
        assert pages_of(ram.peek(3 * PAGE)) == set()
        libc.fill(memory.start + 6 * PAGE)
        assert pages_of(ram.collect(3 * PAGE)) == {6}


def populated(tracker: DirtyTracker, memory: AddressRange) -> TrackedRange:
    """Memory that is tracked, and full, with nothing written to it since."""
    ram = tracker.track(memory)
    libc.fill(memory.start, memory.length)
    ram.reset()
    return ram


def test_an_unprotect_that_comes_upon_untracked_memory(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """It may have let the pages before it go, so those count as written."""
    with flavour.tracker() as tracker:
        ram = populated(tracker, area(8))
        libc.mmap(PAGE, address=ram.range.start + 4 * PAGE)
        with pytest.raises(NotTrackedError) as caught:
            ram.unprotect()
        assert caught.value.range == part(ram, 4, 1)
        assert pages_of(ram.peek(0, 4 * PAGE)) == {0, 1, 2, 3}
        assert pages_of(ram.collect(0, 4 * PAGE)) == {0, 1, 2, 3}


def test_what_was_unprotected_before_it_was_mapped_anew(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """The error hands over what comes before it, and what comes after it is the next call's."""
    with flavour.tracker() as tracker:
        ram = populated(tracker, area(8))
        ram.unprotect()
        libc.mmap(PAGE, address=ram.range.start + 4 * PAGE)
        with pytest.raises(NotTrackedError) as caught:
            ram.collect()
        assert caught.value.collected is not None
        assert set(caught.value.collected.page_indices()) == {0, 1, 2, 3}
        ram.rearm()
        assert pages_of(ram.collect()) == {4, 5, 6, 7}


@pytest.mark.parametrize("ask", ["peek", "collect", "limit"])
def test_an_error_hands_over_nothing_of_an_earlier_answer(
    flavour: Flavour, area: Callable[..., AddressRange], ask: str
) -> None:
    """However many runs that had: untracked memory that comes first leaves nothing to hand over."""
    with flavour.tracker() as tracker:
        memory = area(32)
        ram = tracker.track(memory)
        for page in range(1, 32, 2):
            libc.fill(memory.start + page * PAGE)
        if ask == "peek":
            ram.peek()
        elif ask == "limit":
            ram.collect(max_pages=3)
        ram.collect()
        libc.mmap(PAGE, address=memory.start)
        with pytest.raises(NotTrackedError) as caught:
            ram.collect()
        assert caught.value.range == part(ram, 0, 1)
        assert caught.value.collected is not None
        assert (caught.value.collected.pages, caught.value.collected.walk_end) == (0, memory.start)


CHUNK = 4 << 10
"""So many pages are looked at in one go, with pages of 4 KiB and small ones."""


@pytest.mark.parametrize("untracked", [None, -4, -1, 0, 3])
@pytest.mark.parametrize("behind", [0, 4])
def test_runs_that_go_on_in_the_next_chunk(
    flavour: Flavour, area: Callable[..., AddressRange], untracked: int | None, behind: int
) -> None:
    """They are protected as others are: what is written again is found, and a page that is not tracked where it is."""
    memory = area(3 * CHUNK)
    seams = CHUNK, 2 * CHUNK
    wrote = {seam + offset for seam in seams for offset in range(-4, behind)}

    def fill() -> None:
        for page in sorted(wrote):
            libc.fill(memory.start + page * PAGE)

    with flavour.tracker() as tracker:
        ram = tracker.track(memory)
        for seam in seams if untracked is not None else ():
            hole = seam + untracked  # type: ignore[operator]
            fill()
            libc.mmap(PAGE, address=memory.start + hole * PAGE)
            with pytest.raises(NotTrackedError) as caught:
                ram.collect()
            assert caught.value.range == AddressRange.from_length(memory.start + hole * PAGE, PAGE)
            assert caught.value.collected is not None
            assert set(caught.value.collected.page_indices()) == {page for page in wrote if page < hole}
            ram.rearm()
            assert pages_of(ram.collect()) == {page for page in wrote if page > hole} | {hole}
        for _ in range(2):
            fill()
            assert pages_of(ram.peek()) == wrote
            assert pages_of(ram.collect()) == wrote
            assert pages_of(ram.collect()) == set()


def test_untracked_memory_within_a_run_and_a_limit(flavour: Flavour, area: Callable[..., AddressRange]) -> None:
    """What comes before it is handed over, and what comes after it stays written."""
    with flavour.tracker() as tracker:
        memory = area(3 * CHUNK)
        ram = tracker.track(memory)
        libc.fill(memory.start, 64 * PAGE)
        libc.mmap(PAGE, address=memory.start + 10 * PAGE)
        with pytest.raises(NotTrackedError) as caught:
            ram.collect(max_pages=20)
        assert caught.value.range == part(ram, 10, 1)
        assert caught.value.collected is not None
        assert set(caught.value.collected.page_indices()) == set(range(10))
        assert caught.value.collected.walk_end == memory.start + 10 * PAGE
        ram.rearm()
        assert pages_of(ram.collect()) == set(range(10, 64))


def test_a_guard_page_behind_a_run_that_cannot_be_protected(
    flavour: Flavour, area: Callable[..., AddressRange]
) -> None:
    """What is remembered of one chunk is not looked for in the one before it."""
    memory = area(3 * CHUNK)
    if not probe().supports(Feature.MADV_GUARD):
        lacking("guards", "no guard pages (EINVAL)", "Linux 6.13")

    def check() -> None:
        with flavour.tracker() as tracker:
            ram = tracker.track(memory)
            libc.fill(memory.start + (CHUNK - 3) * PAGE)
            for page in (CHUNK - 2, CHUNK - 1):
                libc.mmap(PAGE, address=memory.start + page * PAGE)
                libc.fill(memory.start + page * PAGE)
            libc.madvise(memory.start + (CHUNK + 100) * PAGE, PAGE, libc.GUARD_INSTALL)
            with pytest.raises(NotTrackedError) as caught:
                ram.collect()
            assert caught.value.collected is not None
            assert set(caught.value.collected.page_indices()) == {CHUNK - 3}
            ram.rearm()
            assert pages_of(ram.collect()) == {CHUNK - 2, CHUNK - 1, CHUNK + 100}

    in_child(check)


MOVED_AWAY = """
#define _GNU_SOURCE
#include <errno.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

char *moved;

int ioctl(int fd, unsigned long request, ...)
{
	va_list rest;
	va_start(rest, request);
	void *argument = va_arg(rest, void *);
	va_end(rest);
	if (moved && request == UFFDIO_WRITEPROTECT) {
		char *page = moved;
		size_t size = sysconf(_SC_PAGESIZE);
		moved = NULL;
		if (mremap(page, size, size, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL) == MAP_FAILED)
			return -1;
		*page = 7;
	}
	return syscall(SYS_ioctl, fd, request, argument);
}
"""
"""Before the next call that protects anything, *moved* is taken away from where it is, and that is stored to."""


@pytest.mark.anywhere
@pytest.mark.parametrize("flavour", flavours("uffd-wp"), indirect=True, ids=lambda flavour: flavour.name)
def test_a_page_that_is_taken_away_and_written_during_a_collect(flavour: Flavour, tmp_path: Path) -> None:
    """It is in that collect or the next. Nothing protects it unseen, however many others are protected beside it."""
    assert flavour.backend == "uffd-wp"
    need_shared()
    program = """
        import ctypes, mmap
        from conftest import PAGE, libc, pages_of, write
        from pagemapcompat import AddressRange, DirtyTracker
        place = libc.mmap(4096 * PAGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        memory = AddressRange.from_length(place, 4096 * PAGE)
        libc.fill(place, memory.length)
        with DirtyTracker("uffd-wp") as tracker, tracker.track(memory) as ram:
            for page in range(0, 4096, 2):
                libc.fill(place + page * PAGE, 1, 2)
            ctypes.c_void_p.in_dll(ctypes.CDLL(None), "moved").value = place + 101 * PAGE
            found = pages_of(ram.collect())
            assert ctypes.string_at(place + 101 * PAGE, 1) == bytes([7])
            found |= pages_of(ram.collect())
            assert found == {*range(0, 4096, 2), 101}, found ^ {*range(0, 4096, 2), 101}
            assert pages_of(ram.collect()) == set()
        """
    run_child(program, env=preloaded(MOVED_AWAY, tmp_path))


def test_huge_pages_that_come_to_a_range_of_small_ones(
    flavour: Flavour, pool: None, area: Callable[..., AddressRange]
) -> None:
    """Offsets are multiples of theirs from then on: a call that cuts one would find nothing, whatever was written."""
    need_shared()
    memory = area(4 * HUGE_PAGES)
    with flavour.tracker(on_untracked="rearm") as tracker:
        ram = tracker.track(memory)
        reader = ram.cursor()
        assert ram.granularity == reader.granularity == PAGE
        libc.mmap(HUGE, flags=PRIVATE | libc.MAP_HUGETLB, address=memory.start + HUGE)
        ram.collect()
        reader.collect()
        assert ram.granularity == reader.granularity == HUGE
        libc.fill(memory.start + HUGE + 5 * PAGE, 1)
        for call in (ram.peek, ram.collect, ram.reset, reader.collect):
            with pytest.raises(AlignmentError, match=f"multiple of {HUGE}"):
                call(HUGE, HUGE + 16 * PAGE)
        # Who asked before it came goes by what was there.
        old = AddressRange.from_length(memory.start + HUGE, 16 * PAGE)
        for flags in (0, _kernel.ENGAGE):
            with pytest.raises(KernelError, match="UFFDIO_WRITEPROTECT"):
                ram._backend.scan(ram._attached, old, 0, flags)
        assert pages_of(ram.collect(HUGE, 2 * HUGE)) == set(range(HUGE_PAGES, 2 * HUGE_PAGES))
        assert pages_of(reader.collect()) == set(range(HUGE_PAGES, 2 * HUGE_PAGES))


COMES_LATE = """
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

char *barred;

ssize_t pread(int fd, void *buffer, size_t size, off_t offset)
{
	ssize_t got = syscall(SYS_pread64, fd, buffer, size, offset);
	if (barred && got < 0) {
		char *page = barred;
		int error = errno;
		barred = NULL;
		if (!madvise(page, sysconf(_SC_PAGESIZE), 103)) /* MADV_GUARD_REMOVE */
			*page = 7;
		errno = error;
	}
	return got;
}
"""
"""As soon as the guard page *barred* could not be read it is one no more, and written."""


@pytest.mark.anywhere
def test_a_page_that_comes_when_it_could_not_be_read(flavour: Flavour, tmp_path: Path) -> None:
    """It is there, so a snapshot reads it, or a later one: none fails over it."""
    need(Feature.MADV_GUARD)
    program = f"""
        import ctypes, mmap
        from conftest import PAGE, libc, private
        from pagemapcompat import AddressRange, DirtyTracker
        memory = private(4)
        memory[:] = b"x" * len(memory)
        with DirtyTracker({flavour.backend!r}) as tracker, tracker.track(memory) as ram:
            libc.madvise(ram.range.start + PAGE, PAGE, 102)  # MADV_GUARD_INSTALL
            page = ctypes.c_void_p.in_dll(ctypes.CDLL(None), "barred")
            page.value = ram.range.start + PAGE
            taken = ram.snapshot()
            assert not page.value, "it was never tried"
            assert taken.read(PAGE, PAGE + 1) == bytes([7]), taken.missing()
            assert ram.snapshot().read() == memory[:]
        """
    run_child(program, env=preloaded(COMES_LATE, tmp_path))
