"""Uses the whole public API, for mypy --strict. Never run: what it says is that these types fit."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, assert_type

from pagemapcompat import (
    AccessError,
    AddressRange,
    AlignmentError,
    AlreadyRegisteredError,
    BackendStatistics,
    ClosedError,
    ConcurrentWriteError,
    Cursor,
    DirtyTracker,
    DisagreementError,
    EntryFlag,
    FaultThreadError,
    Feature,
    FeatureReport,
    Guarantee,
    InvalidArgumentError,
    KernelError,
    Limits,
    MissingPackageError,
    NotTrackableError,
    NotTrackedError,
    PageCategory,
    Pagemap,
    PagemapCompatError,
    PagemapEntry,
    PageRegion,
    ProbeResult,
    RestoreError,
    ScanQuery,
    ScanResult,
    Selection,
    Snapshot,
    SnapshotFileError,
    TargetGoneError,
    TrackedRange,
    UnsupportedError,
    page_size,
    probe,
)
from pagemapcompat.writewatch import (
    WRITE_WATCH_FLAG_RESET,
    WRITE_WATCH_GRANULARITY,
    Win32Error,
    WriteWatch,
    WriteWatchAnswer,
    WrittenAddresses,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def memories(tracker: DirtyTracker) -> list[TrackedRange]:
    """Everything that is Memory."""
    area = mmap.mmap(-1, 16 * page_size())
    return [
        tracker.track(area),
        tracker.track(memoryview(area)[page_size() :]),
        tracker.track(bytearray(page_size())),
        tracker.track(array("Q", [0])),
        tracker.track(AddressRange.from_length(page_size(), 16 * page_size())),
        tracker.track((page_size(), 16 * page_size())),
    ]


def track(ram: TrackedRange) -> ScanResult:
    """The operations."""
    with ram as same:
        assert_type(same, TrackedRange)
    assert_type(ram.peek(), ScanResult)
    assert_type(ram.peek(0, page_size(), max_pages=1), ScanResult)
    ram.reset()
    ram.reset(0, None)
    ram.unprotect(start=0, stop=page_size())
    ram.rearm()
    with ram.cursor() as cursor:
        assert_type(cursor, Cursor)
        assert_type(cursor.collect(), ScanResult)
    assert_type(ram.range, AddressRange)
    assert_type(ram.guarantees, Guarantee)
    assert_type(ram.granularity, int)
    assert_type(len(ram), int)
    result = ram.collect(0, 4 * page_size(), max_pages=None)
    ram.close()
    return result


def read(result: ScanResult) -> int | None:
    """A result is a sequence of regions, and more."""
    regions: Sequence[PageRegion] = result
    first = regions[0]
    assert_type(result[1:], list[PageRegion])
    assert_type(first.start, int)
    assert_type(first.end, int)
    assert_type(first.length, int)
    assert_type(first.pages, int)
    assert_type(first.categories, PageCategory)
    spans: Iterator[tuple[int, int]] = result.spans()
    indices: Iterator[int] = result.page_indices()
    assert_type(result.fill_bitmap(bytearray(8)), int)
    assert_type(result.as_u64(), memoryview[int])
    assert_type((result.pages, result.walk_end, result.complete), tuple[int, int, bool])
    assert_type(result.range, AddressRange)
    assert_type(list(spans), list[tuple[int, int]])
    assert_type(sum(indices) + sum(region.pages for region in result), int)
    return result.resume_at


def look(pid: int) -> list[PagemapEntry]:
    """GET on any process."""
    query = ScanQuery(
        all_of=PageCategory.PRESENT | PageCategory.WRITTEN,
        any_of=PageCategory.FILE,
        inverted=PageCategory(0),
        report=PageCategory.HUGE,
    )
    proposed = ScanQuery.from_proposal(1, 0, 2, 15)
    with Pagemap(pid) as pagemap, Pagemap("self") as own, Pagemap():
        assert_type(pagemap.scan((page_size(), page_size()), query, max_pages=5), ScanResult)
        assert_type(own.scan(b"read-only", proposed), ScanResult)
        assert_type(own.fileno(), int)
        entries = list(pagemap.entries(AddressRange(0, page_size())))
    assert_type(entries[0].flags, EntryFlag)
    assert_type(entries[0].pfn, int | None)
    assert_type(entries[0].swap, tuple[int, int] | None)
    assert_type(PagemapEntry.decode(1 << 63), PagemapEntry)
    return entries


def ask() -> Mapping[Feature, ProbeResult]:
    """Probing."""
    report = probe(refresh=True)
    limits: Limits = report.limits
    sizes: tuple[int, ...] = (limits.page_size, *limits.huge_page_sizes)
    assert sizes
    assert_type(report, FeatureReport)
    result = report[Feature.PAGEMAP_SCAN]
    assert_type(result, ProbeResult)
    if result:
        assert_type(result.detail, str)
    assert_type(result.hint, str | None)
    assert_type(result.errno, int | None)
    assert_type(report.supports(Feature.PAGEMAP, Feature.UFFD_WP), bool)
    report.require(Feature.PAGEMAP)
    return report


def choose() -> tuple[Selection, BackendStatistics]:
    """Construction."""
    with DirtyTracker() as tracker, DirtyTracker("uffd-wp", Guarantee.EXACT | Guarantee.DISCARDS, "rearm"):
        selection = tracker.selection
        assert_type(selection.chosen, str)
        assert_type(selection.guarantees, Guarantee)
        assert_type(selection.rejected, Mapping[str, str])
        tracker.close()
        return selection, tracker.statistics()


def snapshots(ram: TrackedRange) -> Snapshot | None:
    """What memory was, and is again."""
    first = ram.snapshot()
    assert_type(first, Snapshot)
    assert_type(ram.restore(first, verify=True), ScanResult)
    assert_type(first.diff(ram.snapshot()), ScanResult)
    assert_type(first.read(0, page_size()), bytes)
    assert_type((first.missing(), first.held()), tuple[ScanResult, ScanResult])
    assert_type((first.pages, len(first), first.range), tuple[int, int, AddressRange])
    first.save("file", compression="zstd")
    assert_type(Snapshot.load(Path("file")), Snapshot)
    first.squash()
    first.drop()
    return first.parent


def watch_writes(ram: TrackedRange) -> int:
    """Windows' calls."""
    with WriteWatch(ram, base=16 * WRITE_WATCH_GRANULARITY) as watch, WriteWatch(ram):
        watch.commit(watch.base, watch.size, mmap.PROT_READ)
        watch.mark_written(watch.base, 100)
        written = watch.get(watch.base, None, count=5, reset=True)
        addresses: Sequence[int] = written
        assert_type(written, WrittenAddresses)
        assert_type((written[0], written[1:], written.complete), tuple[int, list[int], bool])
        assert_type(written.as_u64(), memoryview[int])
        assert_type(written.packed(4), bytes)
        watch.reset()
        watch.decommit(watch.base, watch.size)
        answer = watch.get_write_watch(WRITE_WATCH_FLAG_RESET, watch.base, watch.size, 0x5000, 8, None)
        assert_type(answer, WriteWatchAnswer)
        assert_type((answer.error, answer.addresses), tuple[Win32Error, WrittenAddresses])
        assert_type((answer.count, answer.granularity), tuple[int | None, int | None])
        return watch.reset_write_watch(watch.base, watch.size).status + len(addresses)


def fail(ram: TrackedRange) -> str | None:
    """Errors, and what they carry."""
    try:
        ram.collect()
    except NotTrackedError as error:
        assert_type(error.collected, ScanResult | None)
        assert_type(error.range, AddressRange | None)
        return error.hint
    except (AccessError, UnsupportedError, AlreadyRegisteredError, NotTrackableError, TargetGoneError) as error:
        os_error: OSError = error
        kernel_error: KernelError = error
        assert_type(kernel_error.operation, str)
        return os_error.strerror
    except AlignmentError as error:
        value_error: ValueError = error
        invalid: InvalidArgumentError = error
        assert_type((error.address, error.length), tuple[int, int])
        return f"{value_error} {invalid}"
    except RestoreError as error:
        assert_type(error.differing, ScanResult | None)
        return f"{isinstance(error, ConcurrentWriteError)}"
    except DisagreementError as error:
        assert_type(error.lost, ScanResult | None)
        return error.hint
    except (SnapshotFileError, MissingPackageError) as error:
        return str(error)
    except (ClosedError, FaultThreadError) as error:
        root: PagemapCompatError = error
        return root.hint
    return None
