"""Whatever is asked wrongly: one error of the tree, naming what was wrong and what to do, and nothing changed."""

from __future__ import annotations

import copy
import ctypes
import errno
import mmap
import os
import pickle
import subprocess
import time
from contextlib import contextmanager
from errno import ENOENT
from typing import TYPE_CHECKING, Any

import pytest
from conftest import (
    CHILD_SECONDS,
    FLAVOURS,
    PAGE,
    Flavour,
    KeepingTracker,
    area,
    lacking,
    libc,
    pages_of,
    private,
    run_child,
    write,
)

from pagemapcompat import (
    AccessError,
    AddressRange,
    AlignmentError,
    AlreadyRegisteredError,
    ClosedError,
    DirtyTracker,
    EntryFlag,
    FaultThreadError,
    Feature,
    Guarantee,
    InvalidArgumentError,
    KernelError,
    NotTrackableError,
    NotTrackedError,
    PageCategory,
    Pagemap,
    PagemapCompatError,
    PagemapEntry,
    ScanQuery,
    Snapshot,
    TargetGoneError,
    TrackedRange,
    UnsupportedError,
    _kernel,
    probe,
    registrations,
)
from pagemapcompat.registrations import registered
from pagemapcompat.writewatch import WriteWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["area"]

PRESENT = ScanQuery(report=PageCategory.PRESENT)
BACKENDS = pytest.mark.parametrize(
    "flavour", [flavour for flavour in FLAVOURS if flavour.name == flavour.backend], indirect=True, ids=lambda f: f.name
)


def descriptors() -> dict[str, str]:
    """Every descriptor of this process, and what it is of."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # the one that listed them
            continue
    return found


def threads() -> set[str]:
    """Every thread of this process."""
    return set(os.listdir("/proc/self/task"))


def no_new_thread_since(before: set[str]) -> bool:
    """Whether there is none. One that was joined is listed until the kernel has buried it, which it will."""
    patience = time.monotonic() + CHILD_SECONDS
    while threads() - before:
        if time.monotonic() > patience:
            return False
        os.sched_yield()
    return True


def survives_pickling(error: BaseException) -> None:
    """Check that another process would get the same."""
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.args == error.args
    for name in ("errno", "strerror", "operation", "range", "hint", "address", "length", "__notes__"):
        assert getattr(copy, name, None) == getattr(error, name, None), name


class Bystander:
    """A tracker of other memory, which nothing may disturb."""

    def __init__(self, tracker: DirtyTracker) -> None:
        self.tracker = tracker
        self.memory = private(4)
        self.ram = tracker.track(self.memory)

    @contextmanager
    def refused(self, kind: type[PagemapCompatError], *named: str) -> Iterator[None]:
        """Run what must raise exactly *kind*, with *named* in its message, a hint, and no trace of it left."""
        before, running = (descriptors(), registered()), threads()
        with pytest.raises(PagemapCompatError) as caught:
            yield
        error = caught.value
        assert type(error) is kind, repr(error)
        for text in named:
            assert text in str(error)
        assert error.hint
        assert f"hint: {error.hint}" in error.__notes__
        assert isinstance(error, OSError) == isinstance(error, KernelError)
        if isinstance(error, KernelError):
            assert error.errno
            assert error.operation
            assert error.operation in str(error)
        survives_pickling(error)
        assert (descriptors(), registered()) == before
        assert no_new_thread_since(running)
        wrote = write(self.memory, 1, 3)
        assert pages_of(self.ram.collect()) == wrote
        assert pages_of(self.ram.collect()) == set()


@pytest.fixture
def bystander(flavour: Flavour) -> Iterator[Bystander]:
    """Of the flavour under test."""
    with flavour.tracker() as tracker:
        yield Bystander(tracker)


def address_of(memory: mmap.mmap) -> int:
    """Where it begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


# -- Ranges ------------------------------------------------------------------------------------------------------

NEVER_RIGHT: list[tuple[Any, type[PagemapCompatError], str]] = [
    ((-PAGE, PAGE), InvalidArgumentError, f"{-PAGE}"),
    ((-1, PAGE), InvalidArgumentError, "-1"),
    ((16 * PAGE, -PAGE), InvalidArgumentError, f"{-PAGE}"),
    (((1 << 64) - PAGE, 2 * PAGE), InvalidArgumentError, f"{(1 << 64) + PAGE:#x}"),
    (((1 << 64) - PAGE, PAGE), InvalidArgumentError, f"{1 << 64:#x}"),
    ((PAGE, (1 << 64) - PAGE), InvalidArgumentError, f"{1 << 64:#x}"),
    ((1 << 63, PAGE), InvalidArgumentError, f"{(1 << 63) + PAGE:#x}"),
    ((0xFFFF_8000_0000_0000, PAGE), InvalidArgumentError, f"{0xFFFF_8000_0000_0000 + PAGE:#x}"),
    ((1 << 70, PAGE), InvalidArgumentError, f"{(1 << 70) + PAGE:#x}"),
    ((PAGE, PAGE, PAGE), InvalidArgumentError, f"{PAGE}, {PAGE}, {PAGE}"),
    ((), InvalidArgumentError, "()"),
    ((16 * PAGE + 1, PAGE), AlignmentError, f"{16 * PAGE + 1:#x}"),
    ((16 * PAGE, PAGE - 1), AlignmentError, f"{17 * PAGE - 1:#x}"),
    ((1, 1), AlignmentError, "0x1"),
]


@BACKENDS
@pytest.mark.parametrize(("memory", "kind", "named"), NEVER_RIGHT, ids=lambda case: str(case))
def test_ranges_that_are_never_right(
    bystander: Bystander, memory: Any, kind: type[PagemapCompatError], named: str
) -> None:
    """Negative, wrapping, in the kernel's half, no pair, unaligned: neither tracked nor scanned."""
    with bystander.refused(kind, named):
        bystander.tracker.track(memory)
    with Pagemap() as pagemap:
        with bystander.refused(kind, named):
            pagemap.scan(memory, PRESENT)
        with bystander.refused(kind, named):
            pagemap.entries(memory)


@pytest.mark.parametrize(("start", "end"), [(-1, 1), (2, 1), (0, (1 << 63) + 1), (1 << 63, 1 << 64)])
def test_address_ranges_that_are_never_right(start: int, end: int) -> None:
    """An AddressRange refuses them when it is made."""
    with pytest.raises(InvalidArgumentError) as caught:
        AddressRange(start, end)
    assert caught.value.hint
    survives_pickling(caught.value)


@BACKENDS
def test_empty_memory(bystander: Bystander) -> None:
    """There is nothing to track in it, however it is spelt."""
    memory = private(2)
    start = address_of(memory)
    for empty in ((start, 0), AddressRange(start, start), memoryview(memory)[:0], bytearray()):
        with bystander.refused(InvalidArgumentError, "is empty"):
            bystander.tracker.track(empty)


def test_addresses_that_no_process_has(flavour: Flavour, bystander: Bystander) -> None:
    """Below the kernel's half, above where mappings can be: nothing is mapped there."""
    at = 1 << 62
    with bystander.refused(NotTrackableError, f"{at:#x}"):
        bystander.tracker.track((at, PAGE))
    with Pagemap() as pagemap, bystander.refused(InvalidArgumentError, f"{at:#x}"):
        pagemap.scan((at, PAGE), PRESENT)
    assert flavour.backend == bystander.tracker.selection.chosen


OFFSETS: list[tuple[Any, Any, type[PagemapCompatError], str]] = [
    (1, None, AlignmentError, "start=1"),
    (0, PAGE + 1, AlignmentError, f"stop={PAGE + 1}"),
    (-PAGE, None, InvalidArgumentError, f"start={-PAGE}"),
    (0, -PAGE, InvalidArgumentError, f"stop={-PAGE}"),
    (5 * PAGE, None, InvalidArgumentError, f"start={5 * PAGE}"),
    (0, 5 * PAGE, InvalidArgumentError, f"stop={5 * PAGE}"),
    (0, 1 << 64, InvalidArgumentError, f"stop={1 << 64}"),
    (2 * PAGE, PAGE, InvalidArgumentError, f"stop={PAGE}"),
]
OPERATIONS: list[Callable[..., Any]] = [
    TrackedRange.peek,
    TrackedRange.collect,
    TrackedRange.reset,
    TrackedRange.unprotect,
    TrackedRange.rearm,
]


@BACKENDS
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda function: function.__name__)
def test_offsets(bystander: Bystander, operation: Callable[..., Any]) -> None:
    """Unaligned, negative, beyond the end, backwards, an address: every operation refuses, and nothing is taken."""
    memory = private(4)
    ram = bystander.tracker.track(memory)
    wrote = write(memory, 0, 2)
    for start, stop, kind, named in OFFSETS:
        with bystander.refused(kind, named):
            operation(ram, start, stop)
    assert pages_of(ram.collect()) == wrote
    with bystander.refused(InvalidArgumentError, f"start={ram.range.start}"):
        operation(ram, ram.range.start)
    assert pages_of(ram.collect()) == set()


@BACKENDS
def test_wrong_types(bystander: Bystander) -> None:
    """A TypeError that says what to give, and nothing is taken or forgotten."""
    memory = private(4)
    ram = bystander.tracker.track(memory)
    watch, pagemap = WriteWatch(ram), Pagemap()
    wrote = write(memory, 0, 2)
    calls: list[tuple[Callable[[], Any], str]] = [
        *((lambda operation=operation: operation(ram, "0"), "start='0'") for operation in OPERATIONS),
        *((lambda operation=operation: operation(ram, 0, 1.0), "stop=1.0") for operation in OPERATIONS),
        (lambda: ram.peek(max_pages=1.5), "max_pages=1.5"),  # type: ignore[arg-type]
        (lambda: ram.peek().fill_bitmap([0]), "bytearray(1)"),  # type: ignore[arg-type]
        (lambda: ram.restore(b"memory"), "TrackedRange.snapshot()"),  # type: ignore[arg-type]
        (lambda: bystander.tracker.track(ram), "its range"),  # type: ignore[arg-type]
        (lambda: bystander.tracker.track("memory"), "AddressRange"),  # type: ignore[arg-type]
        (lambda: WriteWatch(memory), "DirtyTracker.track()"),  # type: ignore[arg-type]
        (lambda: DirtyTracker(require="EXACT"), "Guarantee.EXACT"),  # type: ignore[arg-type]
        (lambda: pagemap.scan(memory, None), "ScanQuery"),  # type: ignore[arg-type]
        (lambda: ScanQuery(report="present"), "PageCategory.PRESENT"),  # type: ignore[arg-type]
        (lambda: ScanQuery.from_proposal(1, "2", 0, 1), "anyof='2': it knows WRITTEN 1"),  # type: ignore[arg-type]
        (lambda: Snapshot.load("nowhere", max_bytes="5"), "max_bytes='5'"),  # type: ignore[arg-type]
        (lambda: watch.commit(watch.base, PAGE, "rw"), "protection='rw'"),  # type: ignore[arg-type]
        (lambda: watch.get("all"), "base='all'"),  # type: ignore[arg-type]
        (lambda: WriteWatch(ram, base=1.0), "base=1.0"),  # type: ignore[arg-type]
        (lambda: ram.snapshot().read("0"), "start='0'"),  # type: ignore[arg-type]
        (lambda: AddressRange("0", PAGE), "'0' is no address"),  # type: ignore[arg-type]
        (lambda: bystander.tracker.track((0, 4.0)), "4.0 is no address"),  # type: ignore[arg-type]
        (lambda: ScanQuery(report=EntryFlag.PRESENT), "PageCategory.PRESENT"),  # type: ignore[arg-type]
        (lambda: PagemapEntry.decode("0"), "'0': give a word"),  # type: ignore[arg-type]
        (lambda: ram.peek()["0"], "2 regions"),  # type: ignore[call-overload]
    ]
    for call, wanted in calls:
        with pytest.raises(TypeError) as caught:
            call()
        (note,) = caught.value.__notes__
        assert note.startswith("hint: ")
        assert wanted in note
    with pytest.raises(IndexError) as beyond:
        ram.peek()[2]
    assert "2 regions" in beyond.value.__notes__[0]
    with pytest.raises(KeyError) as missing:
        probe().require("pagemap-scan")  # type: ignore[arg-type]
    assert "Feature('pagemap-scan')" in missing.value.__notes__[0]
    pagemap.close()
    assert pages_of(ram.collect()) == wrote
    with pytest.raises(TypeError):
        ram.collect(max_pages=8 / 2)  # type: ignore[arg-type]
    assert pages_of(ram.collect()) == set(), "the answer before came once more"


@BACKENDS
def test_copies(bystander: Bystander) -> None:
    """There are none, whose end would close the original."""
    ram = bystander.ram
    for original in (ram, ram.cursor(), bystander.tracker, Pagemap(), ram.snapshot(), WriteWatch(ram)):
        for make in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="copied"):
                make(original)
    wrote = write(bystander.memory, 1)
    assert pages_of(bystander.ram.collect()) == wrote


def test_files_of_a_process() -> None:
    """Only what is in its directory; what is not there is not the end of the process."""
    with Pagemap() as pagemap:
        for name in ("", "/etc/passwd", "..", "../1/maps", "task/../../1/maps"):
            with pytest.raises(InvalidArgumentError, match=repr(name)):
                pagemap.open_file(name)
        with pytest.raises(KernelError, match="no such file") as caught:
            pagemap.open_file("nothing")
        assert caught.value.errno == ENOENT
        assert not isinstance(caught.value, TargetGoneError)
        os.close(pagemap.open_file(f"task/{os.getpid()}/stat"))


@pytest.mark.parametrize("word", [-1, 1 << 64])
def test_words_of_other_sizes(word: int) -> None:
    """A word that was read as a signed one is not decoded into flags that nobody set."""
    with pytest.raises(InvalidArgumentError, match="64 bits"):
        PagemapEntry.decode(word)


@BACKENDS
@pytest.mark.parametrize("limit", [0, -1, -(1 << 64)])
def test_max_pages(bystander: Bystander, limit: int) -> None:
    """No page at all is asked for by mistake; nothing is taken."""
    memory = private(4)
    ram = bystander.tracker.track(memory)
    wrote = write(memory, 0, 2)
    with bystander.refused(InvalidArgumentError, f"max_pages={limit}"):
        ram.peek(max_pages=limit)
    with bystander.refused(InvalidArgumentError, f"max_pages={limit}"):
        ram.collect(max_pages=limit)
    with Pagemap() as pagemap, bystander.refused(InvalidArgumentError, f"max_pages={limit}"):
        pagemap.scan(memory, PRESENT, max_pages=limit)
    assert pages_of(ram.collect()) == wrote


@BACKENDS
def test_bitmaps(bystander: Bystander) -> None:
    """One that is too short or cannot be written stays as it is."""
    memory = private(9)
    ram = bystander.tracker.track(memory)
    write(memory, *range(9))
    result = ram.collect()
    short = bytearray(1)
    with bystander.refused(InvalidArgumentError, "1 bytes"):
        result.fill_bitmap(short)
    assert short == b"\0"
    with bystander.refused(InvalidArgumentError, "bytes"):
        result.fill_bitmap(bytes(2))
    out = bytearray(2)
    assert result.fill_bitmap(out) == 9
    assert out == b"\xff\x01"


# -- Memory that cannot be tracked -------------------------------------------------------------------------------


def mapping(name: str) -> AddressRange:
    """The mapping of this name in /proc/self/maps."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            if line.rstrip().endswith(name):
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                return AddressRange(start, end)
    lacking("vvar", f"no mapping {name} here (ENOENT)", "an architecture that has it")
    raise AssertionError


def test_nothing_mapped(bystander: Bystander) -> None:
    """A hole and nothing else."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mappings = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    # Far from where the kernel puts mappings by itself: within 39 bits, or beyond the shadow of a sanitizer.
    hole = next(
        AddressRange.from_length(at, 8 * PAGE)
        for at in (1 << 37, 1 << 46)
        if not any(start < at + 8 * PAGE and at < end for start, end in mappings if end < 1 << 63)
    )
    with bystander.refused(NotTrackableError, str(hole), "nothing is mapped"):
        bystander.tracker.track(hole)


def test_special_mappings(bystander: Bystander) -> None:
    """The kernel's own data pages cannot be written, let alone tracked."""
    memory = mapping("[vvar]")
    with bystander.refused(NotTrackableError, str(memory)):
        bystander.tracker.track(memory)


def test_droppable_memory(bystander: Bystander, area: Callable[..., AddressRange]) -> None:
    """MAP_DROPPABLE memory changes by itself."""
    try:
        memory = area(4, flags=mmap.MAP_ANONYMOUS | 0x08)
    except OSError as error:
        lacking("map-droppable", f"refused ({errno.errorcode.get(error.errno or 0)})", "Linux 6.11 or newer")
    with bystander.refused(NotTrackableError, str(memory)):
        bystander.tracker.track(memory)


@pytest.mark.parametrize("flavour", FLAVOURS, ids=lambda flavour: flavour.name)
def test_the_callers_own_stack(flavour: Flavour) -> None:
    """Refused before anything is protected, for the first thread and for others; the tracker works on."""
    run_child(
        """
        import ctypes, sys, threading
        from conftest import *
        from pagemapcompat import *
        from pagemapcompat.registrations import registered

        flavour = next(flavour for flavour in FLAVOURS if flavour.name == sys.argv[1])
        try:
            tracker = flavour.tracker()
        except KernelError:
            sys.exit(0)  # the fixture of other tests says so
        memory = private(4)
        ram = tracker.track(memory)

        def refuse(stack):
            try:
                tracker.track(stack)
            except NotTrackableError as error:
                assert "stack" in str(error) and f"{stack.start:#x}" in str(error), error
                assert error.hint and error.errno
            else:
                raise AssertionError(stack)

        def own():
            # pthread_getattr_np: where the C library put this thread's stack.
            c = ctypes.CDLL(None)
            c.pthread_self.restype = ctypes.c_ulong
            attributes = ctypes.create_string_buffer(256)
            assert c.pthread_getattr_np(ctypes.c_ulong(c.pthread_self()), attributes) == 0
            start, size = ctypes.c_size_t(), ctypes.c_size_t()
            assert c.pthread_attr_getstack(attributes, ctypes.byref(start), ctypes.byref(size)) == 0
            return AddressRange.from_length(start.value, size.value).aligned_out()

        for line in open("/proc/self/maps"):
            if "[stack]" in line:
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                refuse(AddressRange(start, end))
                refuse(AddressRange(end - (end - start) // PAGE // 2 * PAGE, end))
        failures = []
        threading.excepthook = failures.append
        thread = threading.Thread(target=lambda: refuse(own()))
        thread.start()
        thread.join()
        assert not failures, failures
        assert registered() == [(ram.range.start, ram.range.end)]
        assert pages_of(ram.collect()) == set()
        assert write(memory, 2) == pages_of(ram.collect())
        tracker.close()
        """,
        flavour.name,
        env={"PAGEMAPCOMPAT_DISABLE": ",".join(flavour.disabled)},
    )


# -- Tracked already ---------------------------------------------------------------------------------------------


def test_tracked_already(flavour: Flavour, bystander: Bystander) -> None:
    """By this tracker or another, whole or in part; its neighbours are free, and so is all of it once it is closed."""
    memory = private(8)
    view = memoryview(memory)
    ram = bystander.tracker.track(view[2 * PAGE : 6 * PAGE])
    named = f"{ram.range.start:#x}"
    with flavour.tracker() as other:
        for tracker in (bystander.tracker, other):
            for lo, hi in ((2, 6), (0, 8), (5, 7), (0, 3), (3, 4)):
                with bystander.refused(AlreadyRegisteredError, named), view[lo * PAGE : hi * PAGE] as part:
                    tracker.track(part)
        before, behind = other.track(view[: 2 * PAGE]), bystander.tracker.track(view[6 * PAGE :])
        write(memory, *range(8))
        assert [len(one.collect()) for one in (before, ram, behind)] == [1, 1, 1]
        for one in (before, ram, behind):
            one.close()
        again = other.track(memory)
        wrote = write(memory, 4)
        assert pages_of(again.collect()) == wrote


def foreign_userfaultfd() -> int:
    """A userfaultfd that this library does not know of."""
    last = 0
    for way in (_kernel.UFFD_USER_MODE_ONLY, _kernel.UFFD_SYSCALL, _kernel.UFFD_DEVICE):
        fd = _kernel.uffd_open(way)
        if fd >= 0:
            rc, _ = _kernel.uffd_handshake(fd, 1)
            assert rc == 0
            return fd
        last = -fd
    lacking("uffd-syscall", errno.errorcode[last], "sysctl vm.unprivileged_userfaultfd=1")
    raise AssertionError


def test_tracked_while_it_is_looked_up(bystander: Bystander, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a finalizer, which may run in the midst of that: one of the two has it."""
    memory, look = private(4), registrations._held

    def look_and_track() -> list[registrations.Claim]:
        found = look()
        monkeypatch.undo()
        with pytest.raises(AlreadyRegisteredError):
            bystander.tracker.track(memory)
        return found

    monkeypatch.setattr(registrations, "_held", look_and_track)
    ram = bystander.tracker.track(memory)
    wrote = write(memory, 2)
    assert pages_of(ram.collect()) == wrote


def test_registered_by_somebody_else(
    bystander: Bystander,
    area: Callable[..., AddressRange],
) -> None:
    """Memory with a userfaultfd of its own stays with it; what of the range was free stays free."""
    memory = area(8)
    uffd = foreign_userfaultfd()
    try:
        assert _kernel.uffd_register(uffd, memory.start + 4 * PAGE, memory.start + 6 * PAGE)[0] == 0
        with bystander.refused(AlreadyRegisteredError, str(memory)):
            bystander.tracker.track(memory)
        assert _kernel.uffd_register(uffd, memory.start, memory.end)[0] == 0
        with bystander.refused(AlreadyRegisteredError, str(memory)):
            bystander.tracker.track(memory)
        assert _kernel.uffd_unregister(uffd, memory.start, memory.end) == 0
    finally:
        os.close(uffd)
    ram = bystander.tracker.track(memory)
    libc.fill(memory.start + 5 * PAGE)
    assert pages_of(ram.collect()) == {5}


# -- Closed ------------------------------------------------------------------------------------------------------


def test_closed_ranges(bystander: Bystander) -> None:
    """Every operation says so; closing again does not."""
    ram = bystander.tracker.track(private(4))
    ram.close()
    for operation in OPERATIONS:
        with bystander.refused(ClosedError, "closed"):
            operation(ram)
    ram.close()
    assert "closed" in repr(ram)


def test_closed_trackers(flavour: Flavour, bystander: Bystander) -> None:
    """The same of a tracker, and of everything it tracked."""
    tracker = flavour.tracker()
    ram = tracker.track(private(4))
    tracker.close()
    for operation in OPERATIONS:
        with bystander.refused(ClosedError, "closed"):
            operation(ram)
    with bystander.refused(ClosedError, "closed"):
        tracker.track(private(4))
    with bystander.refused(ClosedError, "closed"):
        tracker.statistics()
    tracker.close()
    ram.close()
    assert "closed" in repr(tracker)


@BACKENDS
def test_closed_pagemaps(bystander: Bystander) -> None:
    """An iterator that was begun before stops too."""
    memory = private(4)
    pagemap = Pagemap()
    entries = pagemap.entries(memory)
    pagemap.close()
    pagemap.close()
    for call in (
        lambda: pagemap.scan(memory, PRESENT),
        lambda: pagemap.entries(memory),
        pagemap.fileno,
        lambda: [*entries],
    ):
        with bystander.refused(ClosedError, "self is closed"):
            call()


# -- Backends ----------------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("name", ["", "AUTO", "soft-dirty", "pagemap_scan", "uffd-wp,pagemap-scan", None])
def test_unknown_backends(bystander: Bystander, name: Any) -> None:
    """The names that there are, are in the hint."""
    with bystander.refused(InvalidArgumentError, repr(name)):
        DirtyTracker(name)
    with pytest.raises(InvalidArgumentError) as caught:
        DirtyTracker(name)
    assert all(known in (caught.value.hint or "") for known in ("auto", "pagemap-scan", "uffd-wp"))


@BACKENDS
@pytest.mark.parametrize("policy", ["", "skip", "RAISE", None, True])
def test_unknown_policies(bystander: Bystander, policy: Any) -> None:
    """Likewise."""
    with bystander.refused(InvalidArgumentError, f"on_untracked={policy!r}"):
        DirtyTracker(on_untracked=policy)


@BACKENDS
def test_requirements_that_nothing_fulfils(bystander: Bystander, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named, with the backend that lacks it."""
    with bystander.refused(UnsupportedError, "uffd-wp", "NO_HELPER_THREAD"):
        DirtyTracker("uffd-wp", require=Guarantee.NO_HELPER_THREAD | Guarantee.EXACT)
    monkeypatch.setenv("PAGEMAPCOMPAT_DISABLE", "pagemap-scan")
    with bystander.refused(UnsupportedError, "pagemap-scan", "PAGEMAPCOMPAT_DISABLE", "uffd-wp", "NO_HELPER_THREAD"):
        DirtyTracker(require=Guarantee.NO_HELPER_THREAD)
    monkeypatch.setenv("PAGEMAPCOMPAT_DISABLE", "uffd-syscall,uffd-device")
    if probe()[Feature.UFFD_USER_MODE_ONLY]:
        with bystander.refused(UnsupportedError, "KERNEL_WRITES"):
            DirtyTracker("uffd-wp", require=Guarantee.KERNEL_WRITES)


@BACKENDS
def test_both_backends_disabled(bystander: Bystander, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are named, with the variable that did it; open trackers go on."""
    monkeypatch.setenv("PAGEMAPCOMPAT_DISABLE", "pagemap-scan, uffd-wp")
    with bystander.refused(UnsupportedError, "pagemap-scan", "uffd-wp", "PAGEMAPCOMPAT_DISABLE"):
        DirtyTracker()
    for name in ("pagemap-scan", "uffd-wp"):
        with bystander.refused(UnsupportedError, name, "PAGEMAPCOMPAT_DISABLE"):
            DirtyTracker(name)


@BACKENDS
def test_every_way_to_a_userfaultfd_disabled(bystander: Bystander, monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise."""
    ways = (Feature.UFFD_SYSCALL, Feature.UFFD_DEVICE, Feature.UFFD_USER_MODE_ONLY)
    monkeypatch.setenv("PAGEMAPCOMPAT_DISABLE", ",".join(way.value for way in ways))
    for name in ("auto", "pagemap-scan", "uffd-wp"):
        with bystander.refused(UnsupportedError, "userfaultfd"):
            DirtyTracker(name)


@BACKENDS
@pytest.mark.parametrize("name", ["nonsense", "pagemap-scan,uffd", "PAGEMAP-SCAN"])
def test_unknown_names_are_not_disabled_silently(
    bystander: Bystander, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A typing error would otherwise test nothing."""
    monkeypatch.setenv("PAGEMAPCOMPAT_DISABLE", name)
    for call in (DirtyTracker, probe, Pagemap):
        with bystander.refused(InvalidArgumentError, "PAGEMAPCOMPAT_DISABLE", repr(name.rsplit(",", maxsplit=1)[-1])):
            call()
    monkeypatch.setenv("PAGEMAPCOMPAT_DISABLE", " , ,")
    assert probe()


# -- Processes ---------------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("pid", [0, -1, -(1 << 40), "", "1", "self/../1", None, True, 1.0])
def test_what_is_no_pid(bystander: Bystander, pid: Any) -> None:
    """Only positive numbers and "self" are."""
    with bystander.refused(InvalidArgumentError, repr(pid)):
        Pagemap(pid)


@BACKENDS
def test_processes_that_are_gone(bystander: Bystander) -> None:
    """At once, or while their pagemap is open: it never answers for whoever has the pid next."""
    query = ScanQuery(all_of=PageCategory.PRESENT, report=PageCategory.PRESENT)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
        pagemap = Pagemap(child.pid)
        memory = mapping("[stack]")
        entries = pagemap.entries(memory)
    with pagemap:
        for call in (lambda: next(entries), lambda: pagemap.scan(memory, query), lambda: next(pagemap.entries(memory))):
            with bystander.refused(TargetGoneError, str(child.pid)):
                call()
    for gone in (child.pid, 1 << 40):
        with bystander.refused(TargetGoneError, str(gone)):
            Pagemap(gone)


DROP = """
import ctypes, os, sys
from conftest import *
from pagemapcompat import *
from pagemapcompat import _kernel

def drop():
    "Become nobody, as a server does: not dumpable any more."
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)

def dumpable(yes):
    assert ctypes.CDLL(None).prctl(4, int(yes), 0, 0, 0) == 0  # PR_SET_DUMPABLE
"""


def test_processes_that_are_not_ours() -> None:
    """Nobody may not read the first process; the errno, the pid and what is needed are said."""
    run_child(
        DROP
        + """
drop()
dumpable(True)
before = sorted(os.listdir("/proc/self/fd"))
try:
    Pagemap(1).close()
except AccessError as error:
    assert isinstance(error, PermissionError) and error.errno in (1, 13), error
    assert "/proc/1/pagemap" in str(error) and "CAP_SYS_PTRACE" in error.hint, error
    assert sorted(os.listdir("/proc/self/fd")) == before
else:
    assert os.stat("/proc/1").st_uid == os.getuid(), "read the memory of pid 1"
"""
    )


def test_a_process_that_gave_up_its_privileges() -> None:
    """It may not read itself; AccessError says which call and how to allow it; then it works."""
    run_child(
        DROP
        + """
probe()
drop()
dumpable(False)
before = sorted(os.listdir("/proc/self/fd"))
for call in (Pagemap, DirtyTracker, lambda: DirtyTracker("uffd-wp"), lambda: DirtyTracker("pagemap-scan")):
    for refresh in (False, True):
        probe(refresh=refresh)
        try:
            call()
        except AccessError as error:
            assert error.errno == 13, error
            assert "/proc/self/pagemap" in str(error) and "PR_SET_DUMPABLE" in error.hint, error
        else:
            raise AssertionError(call)
        assert sorted(os.listdir("/proc/self/fd")) == before
        while len(os.listdir("/proc/self/task")) > 1:
            os.sched_yield()  # a joined thread is listed until the kernel has buried it
dumpable(True)
probe(refresh=True)
Pagemap().close()
"""
    )


@pytest.mark.parametrize("disabled", ["", "pagemap-scan"])
def test_categories_that_do_not_exist(disabled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit of a newer kernel is refused by name, by the ioctl and by pagemap words alike."""
    monkeypatch.setenv("PAGEMAPCOMPAT_DISABLE", disabled)
    bit = 1 << 40
    memory = private(2)
    with KeepingTracker() as tracker, Pagemap() as pagemap:
        bystander = Bystander(tracker)
        for mask in ("all_of", "any_of", "inverted", "report"):
            with bystander.refused(UnsupportedError, str(bit)):
                pagemap.scan(memory, ScanQuery(**{mask: PageCategory(bit | PageCategory.PRESENT)}))


# -- The errors themselves ---------------------------------------------------------------------------------------


def test_error_tree() -> None:
    """Each is caught by what a program would expect."""
    assert issubclass(KernelError, OSError)
    assert issubclass(AccessError, PermissionError)
    for kind in (InvalidArgumentError, AlignmentError, ClosedError):
        assert issubclass(kind, ValueError)
    assert issubclass(FaultThreadError, RuntimeError)
    for kind in (
        AccessError,
        UnsupportedError,
        AlreadyRegisteredError,
        NotTrackableError,
        NotTrackedError,
        TargetGoneError,
    ):
        assert issubclass(kind, KernelError)
        made = kind.make(errno.EPERM, "a call", "a reason", range=AddressRange(1, 2), hint="a remedy")
        assert type(made) is kind
        assert (made.errno, made.operation, made.range, made.hint) == (
            errno.EPERM,
            "a call",
            AddressRange(1, 2),
            "a remedy",
        )
        survives_pickling(made)


def test_errors_with_collected_pages_pickle(area: Callable[..., AddressRange]) -> None:
    """Also the one that hands over what was collected: another process gets everything but, at worst, those pages."""
    memory = area(8)
    with KeepingTracker() as tracker:
        ram = tracker.track(memory)
        libc.fill(memory.start)
        libc.mmap(PAGE, address=memory.start + 4 * PAGE)
        with pytest.raises(NotTrackedError) as caught:
            ram.collect()
        assert caught.value.collected is not None
        survives_pickling(caught.value)
        assert pickle.loads(pickle.dumps(caught.value)).collected in (caught.value.collected, None)  # noqa: S301
