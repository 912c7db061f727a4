"""`pagemapcompat scan`: GET on a process from the command line, summed up by mapping or region by region."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from errno import EOPNOTSUPP, ESRCH
from functools import cache, reduce
from importlib import import_module
from operator import or_
from time import monotonic
from typing import IO, TYPE_CHECKING, Any, Literal

import attrs

from pagemapcompat.abi import Feature, PageCategory, category_feature
from pagemapcompat.cli_streams import (
    EXIT_ACCESS,
    EXIT_BROKEN_PIPE,
    EXIT_FAILED,
    EXIT_GONE,
    EXIT_INTERRUPTED,
    EXIT_KERNEL_THREAD,
    EXIT_OK,
    EXIT_UNSUPPORTED,
    EXIT_USAGE,
    put,
    say,
)
from pagemapcompat.errors import InvalidArgumentError, PagemapCompatError, TargetGoneError, UnsupportedError
from pagemapcompat.mappings import Mapping, parse
from pagemapcompat.memory import PAGE_SHIFT, USER_END, AddressRange, page_size
from pagemapcompat.pagemap import Pagemap, ScanQuery
from pagemapcompat.probe import probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from pagemapcompat.results import ScanResult

PROGRAM = "pagemapcompat scan"
SCHEMA = 1

_EPILOG = f"""\
categories: {", ".join(str(category.name).lower() for category in PageCategory)}

Sizes count pages of the category; "?" (null in JSON, empty in CSV) is what cannot be told here; JSON lists it in
"unknown". "written" counts pages of tracked memory alone and is "-" (null, empty) where there are none: of other
memory nobody knows. --regions, --only and --not take the kernel's word for it, which calls memory written that is not
tracked; name wpallowed too. "swapped" counts what the kernel calls so, and that are empty pages which are
write-protected, too.

exit status:
  {EXIT_OK}    all went well
  {EXIT_FAILED}    another failure, such as writing the output
  {EXIT_USAGE}    wrong usage
  {EXIT_GONE}    there is no such process, or it ended
  {EXIT_ACCESS}    the process is not ours to read
  {EXIT_KERNEL_THREAD}    it is a kernel thread, which has no memory
  {EXIT_UNSUPPORTED}    this kernel cannot tell a category of --only or --not
  {EXIT_INTERRUPTED}  interrupted (SIGINT)
  {EXIT_BROKEN_PIPE}  nobody reads the output any more (SIGPIPE)
"""

_KERNEL_THREAD = 0x00200000
"""PF_KTHREAD (include/linux/sched.h) in the flags of /proc/PID/stat."""
_CHUNK = page_size() << 20
"""What one scan takes: some 10 ms of work, so that progress shows and an interrupt is heard."""
_PATIENCE = 1.0
"""Seconds without any progress shown."""

_COLUMNS = {
    "present": PageCategory.PRESENT,
    "swapped": PageCategory.SWAPPED,
    "file": PageCategory.FILE,
    "huge": PageCategory.HUGE,
    "guard": PageCategory.GUARD,
    "written": PageCategory.WRITTEN | PageCategory.WPALLOWED,
}
"""What the summary counts: pages with all categories of a column."""
_COUNTED = reduce(or_, _COLUMNS.values())
_EVERYTHING = reduce(or_, PageCategory)
_MAPPING_FIELDS = ("start", "end", "permissions", "size", *_COLUMNS, "path")
_REGION_FIELDS = ("start", "end", "pages", "categories")

_Region = tuple[int, int, int]
"""start, end, categories: plain numbers, for there may be millions."""


class _KernelThreadError(PagemapCompatError):
    """A kernel thread has no memory."""


@attrs.frozen
class _Request:
    """What the command line asks for."""

    pid: int | Literal["self"]
    range: AddressRange
    only: PageCategory
    without: PageCategory

    @property
    def mentioned(self) -> PageCategory:
        """What the kernel must be able to tell."""
        return self.only | self.without

    def query(self, report: PageCategory) -> ScanQuery:
        """The query for it."""
        return ScanQuery(all_of=self.mentioned, inverted=self.without, report=report)


@attrs.frozen
class _Report:
    """What was found."""

    pid: int
    source: Literal["PAGEMAP_SCAN", "pagemap words"]
    told: PageCategory
    """The categories that can be told of this process."""
    mappings: list[Mapping]
    results: list[ScanResult]

    @property
    def unknown(self) -> tuple[str, ...]:
        """The names of the others."""
        return _names(_EVERYTHING & ~self.told)

    def regions(self) -> Iterator[_Region]:
        """Every region, in order, those put together that meet where one scan ended and the next began."""
        start = end = categories = 0
        for result in self.results:
            words = result.as_u64()
            for next_start, next_end, next_categories in zip(words[::3], words[1::3], words[2::3], strict=True):
                if next_start == end and next_categories == categories:
                    end = next_end
                    continue
                if end:
                    yield start, end, categories
                start, end, categories = next_start, next_end, next_categories
        if end:
            yield start, end, categories

    def counts(self) -> list[Counter[int]]:
        """The bytes of each mapping, by the categories that their pages have."""
        counts: list[Counter[int]] = [Counter() for _ in self.mappings]
        first = 0
        for start, end, categories in self.regions():
            while first < len(self.mappings) and self.mappings[first].end <= start:
                first += 1
            # A region may lie in many mappings, or since they were read in none.
            for index in range(first, len(self.mappings)):
                mapping = self.mappings[index]
                if mapping.start >= end:
                    break
                counts[index][categories] += min(end, mapping.end) - max(start, mapping.start)
        return counts

    def sizes(self, counted: Counter[int]) -> dict[str, int | None]:
        """The bytes of each column, or None for what is not known."""
        return {name: self._size(counted, wanted) for name, wanted in _COLUMNS.items()}

    def _size(self, counted: Counter[int], wanted: PageCategory) -> int | None:
        tracked = any(categories & PageCategory.WPALLOWED for categories in counted)
        if wanted & ~self.told or (wanted & PageCategory.WPALLOWED and not tracked):
            return None
        return sum(size for categories, size in counted.items() if categories & wanted == wanted)


# -- The command line ------------------------------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `scan`, whose `run` takes the parsed arguments and returns the exit status."""
    parser = subparsers.add_parser(
        "scan",
        help="what is known of the pages of a process",
        description="Show what the kernel knows of the pages of a process. Changes nothing in it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pid", metavar="PID", help='a process id, or "self"')
    parser.add_argument(
        "range", metavar="START-END", nargs="?", help="only these addresses, in hexadecimal, as in /proc/PID/maps"
    )
    parser.add_argument("--regions", action="store_true", help="a row a run of equal pages, not a row a mapping")
    for option, into, which in ("--only", "only", "all"), ("--not", "without", "none"):
        parser.add_argument(
            option,
            dest=into,
            metavar="CATEGORY[,...]",
            action="append",
            default=[],
            help=f"count only pages that have {which} of these categories",
        )
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Scan, and print. Returns the exit status, after one line on standard error if it is not 0."""
    try:
        request = _request(arguments)
        report = _look(request, _EVERYTHING if arguments.regions else _COUNTED)
        if arguments.regions and report.unknown and arguments.format != "json":
            say(f"{PROGRAM}: cannot be told here, and is in no row: {', '.join(report.unknown)}\n")
        render = {"table": _table, "json": _json, "csv": _csv}[arguments.format]
        return put(render(report, regions=arguments.regions), PROGRAM)
    except (PagemapCompatError, OSError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _request(arguments: argparse.Namespace) -> _Request:
    only, without = _categories("--only", arguments.only), _categories("--not", arguments.without)
    if only & without:
        raise InvalidArgumentError(f"--only and --not both name {', '.join(_names(only & without))}").with_hint(
            "no page can be both"
        )
    return _Request(parse_pid(arguments.pid), _range(arguments.range), only, without)


def parse_pid(text: str) -> int | Literal["self"]:
    """Which one the command line means, as `Pagemap` takes it."""
    if text == "self":
        return "self"
    if not re.fullmatch("[0-9]{1,10}", text) or not int(text):
        raise InvalidArgumentError(f"{text!r} is not a process id").with_hint('give a positive number, or "self"')
    return int(text)


def pid_here(pid: int | Literal["self"]) -> int:
    """Its pid in this process's pid namespace."""
    return os.getpid() if pid == "self" else pid


def _range(text: str | None) -> AddressRange:
    if text is None:
        return AddressRange(0, USER_END)
    found = re.fullmatch("(?:0x)?([0-9a-f]{1,16})-(?:0x)?([0-9a-f]{1,16})", text, re.IGNORECASE)
    if not found:
        raise InvalidArgumentError(f"START-END: {text!r} is no range of addresses").with_hint(
            "give hexadecimal addresses as in /proc/PID/maps, 7f12a000-7f12b000"
        )
    # The kernel's half is in /proc/PID/maps ([vsyscall]), and has nothing to say.
    start, end = (min(int(address, 16), USER_END) for address in found.groups())
    if start > end:
        raise InvalidArgumentError(f"START-END: {text} ends before it starts").with_hint("give the lower address first")
    if (start | end) % page_size():
        inside, outside = start - start % page_size(), end + -end % page_size()
        raise InvalidArgumentError(f"START-END: {text} does not begin and end on page boundaries").with_hint(
            f"give {_addresses(inside, outside)}"
        )
    return AddressRange(start, end)


def _categories(option: str, texts: list[str]) -> PageCategory:
    known = {str(category.name).lower(): category for category in PageCategory}
    chosen = PageCategory(0)
    for name in ",".join(texts).split(",") if texts else ():
        if name.replace("-", "_") not in known:
            raise InvalidArgumentError(f"{option}: {name!r} is no category").with_hint(f"known are {', '.join(known)}")
        chosen |= known[name.replace("-", "_")]
    return chosen


# -- Looking ---------------------------------------------------------------------------------------------------


def _look(request: _Request, wanted: PageCategory) -> _Report:
    pid = request.pid
    _check_process(pid)
    # The mappings are read after pagemap was opened and before the first question. Up to Linux 6.15 the pagemap of a
    # process that has just ended opens too, and PAGEMAP_SCAN on it is a NULL dereference in the kernel (65c66047259f).
    with Pagemap(pid) as pagemap, reading(pid), os.fdopen(pagemap.open_file("maps"), "rb") as maps:
        mappings = list(_mappings(maps, request.range))
        _check_memory(pid, maps)
        told = _told(pagemap, request.mentioned)
        query = request.query(wanted & told)
        results = list(_scan(pagemap, mappings, query))
        _check_memory(pid, maps)
    by_ioctl = probe().supports(Feature.PAGEMAP_SCAN)
    return _Report(pid_here(pid), "PAGEMAP_SCAN" if by_ioctl else "pagemap words", told, mappings, results)


@contextmanager
def reading(pid: int | str) -> Iterator[None]:
    """Reads files in /proc/PID, which go away with the process."""
    try:
        yield
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetGoneError.make(ESRCH, f"/proc/{pid}", "there is no such process (any more)") from error


def is_kernel_thread(pid: int | str) -> bool:
    """Whether it is one; not, where that cannot be read."""
    with suppress(OSError):
        return bool(_stat(pid)[1] & _KERNEL_THREAD)
    return False


def _stat(pid: int | str) -> tuple[bytes, int]:
    """State and flags."""
    with open(f"/proc/{pid}/stat", "rb") as stat:
        # The name, in parentheses, may have spaces and parentheses in it.
        state, *fields = stat.read().rpartition(b")")[2].split()
    return state, int(fields[5])


def _check_process(pid: int | str) -> None:
    # Where /proc hides what belongs to others, Pagemap says why.
    with suppress(PermissionError), reading(pid):
        state, flags = _stat(pid)
        if flags & _KERNEL_THREAD:
            raise _KernelThreadError(f"{pid} is a kernel thread").with_hint("it has no memory of its own")
        if state in (b"Z", b"X"):
            raise TargetGoneError.make(ESRCH, f"/proc/{pid}", "the process ended, and its parent has yet to notice")


def _check_memory(pid: int | str, maps: IO[bytes]) -> None:
    """The memory that *maps* was opened on is still somebody's: its process neither ended nor called exec."""
    if not os.pread(maps.fileno(), 1, 0):
        raise TargetGoneError.make(ESRCH, f"/proc/{pid}/maps", "the process ended, or runs another program now")


def _mappings(maps: IO[bytes], asked: AddressRange) -> Iterator[Mapping]:
    """Cut to what was asked about."""
    for mapping in parse(maps):
        start, end = max(mapping.start, asked.start), min(mapping.end, asked.end)
        if start < end:
            yield attrs.evolve(mapping, start=start, end=end)


def _told(pagemap: Pagemap, mentioned: PageCategory) -> PageCategory:
    """Every category that can be told of this process, found out by asking.

    Raises:
        UnsupportedError: One of *mentioned* is not among them.
    """
    told = PageCategory(0)
    for category in PageCategory:
        try:
            check_is_set(category)
            pagemap.scan(AddressRange(0, page_size()), ScanQuery(report=category))
            told |= category
        except UnsupportedError:
            if category in mentioned:
                raise
    return told


def check_is_set(category: PageCategory) -> None:
    """Refuse what this kernel never sets, which the ioctl takes: SOFT_DIRTY without CONFIG_MEM_SOFT_DIRTY."""
    result = probe()[category_feature(category)]
    if probe().supports(Feature.PAGEMAP_SCAN) and result.state == "no":
        raise UnsupportedError.make(
            EOPNOTSUPP, "PAGEMAP_SCAN", f"this kernel never says {category.name}: {result.detail}", hint=result.hint
        )


def _scan(pagemap: Pagemap, mappings: list[Mapping], query: ScanQuery) -> Iterator[ScanResult]:
    total, done = sum(mapping.length for mapping in mappings), 0
    with _progress() as show:
        for chunk, mapped in _chunks(mappings):
            yield pagemap.scan(chunk, query)
            done += mapped
            show(done / total)


def _chunks(mappings: list[Mapping]) -> Iterator[tuple[AddressRange, int]]:
    """The mapped memory in chunks of about one size, and how much of each is mapped.

    One chunk may hold thousands of mappings, so that each costs no call, and one mapping may be in many.
    """
    start, room = 0, _CHUNK
    for mapping in mappings:
        at = mapping.start
        if room == _CHUNK:
            start = at
        while mapping.end - at >= room:
            at += room
            yield AddressRange(start, at), _CHUNK
            start, room = at, _CHUNK
        room -= mapping.end - at
    if room < _CHUNK:
        yield AddressRange(start, mappings[-1].end), _CHUNK - room


# -- Output ----------------------------------------------------------------------------------------------------


def _table(report: _Report, *, regions: bool) -> Iterator[str]:
    return _region_table(report) if regions else _mapping_table(report)


def _mapping_table(report: _Report) -> Iterator[str]:
    counts = report.counts()
    rows = [["ADDRESS", "PERM", "SIZE", *(name.upper() for name in _COLUMNS), "PATH"]]
    for mapping, counted in zip(report.mappings, counts, strict=True):
        address = _addresses(mapping.start, mapping.end)
        rows.append([address, mapping.permissions, *_cells(report, mapping.length, counted), _visible(mapping.path)])
    total: Counter[int] = Counter()
    for counted in counts:
        total.update(counted)
    rows.append(["total", "", *_cells(report, sum(mapping.length for mapping in report.mappings), total), ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, second, *numbers, last in rows:
        aligned = "  ".join(cell.rjust(width) for cell, width in zip(numbers, widths[2:-1], strict=True))
        yield f"{first:<{widths[0]}}  {second:<{widths[1]}}  {aligned}  {last}".rstrip() + "\n"


def _cells(report: _Report, length: int, counted: Counter[int]) -> list[str]:
    cells = [_human(length)]
    for name, size in report.sizes(counted).items():
        unknown = "?" if _COLUMNS[name] & ~report.told else "-"
        cells.append(unknown if size is None else _human(size))
    return cells


def _region_table(report: _Report) -> Iterator[str]:
    # Widths are not taken from the rows: there may be millions.
    end = max((mapping.end for mapping in report.mappings), default=0)
    width = len(_addresses(end, end))
    yield f"{'ADDRESS':<{width}}  {'PAGES':>11}  CATEGORIES\n"
    for start, stop, categories in report.regions():
        names = " ".join(_names(categories)) or "-"
        yield f"{_addresses(start, stop):<{width}}  {(stop - start) >> PAGE_SHIFT:>11}  {names}\n"


def _json(report: _Report, *, regions: bool) -> Iterator[str]:
    head = {"schema": SCHEMA, "pid": report.pid, "source": report.source, "unknown": report.unknown}
    # A row a line, as they come: a list of millions is never built.
    yield f"{json.dumps(head)[:-1]}, {json.dumps('regions' if regions else 'mappings')}: ["
    comma = ""
    for record in _records(report, regions=regions):
        yield f"{comma}\n{json.dumps(record)}"
        comma = ","
    yield "\n]}\n"


class _Echo:
    """Hands what csv writes back to the caller, as a line."""

    def write(self, text: str) -> str:
        return text.removesuffix(csv.excel.lineterminator) + "\n"


def _csv(report: _Report, *, regions: bool) -> Iterator[str]:
    # Up to Python 3.12 csv quotes what ends its own lines alone, so that is "\r\n", which _Echo makes a newline.
    writer: Any = csv.writer(_Echo())
    yield writer.writerow(_REGION_FIELDS if regions else _MAPPING_FIELDS)
    for record in _records(report, regions=regions):
        yield writer.writerow(" ".join(value) if isinstance(value, tuple) else value for value in record.values())


def _records(report: _Report, *, regions: bool) -> Iterator[dict[str, object]]:
    """The rows for programs."""
    if regions:
        for start, end, categories in report.regions():
            values = f"{start:08x}", f"{end:08x}", (end - start) >> PAGE_SHIFT, _names(categories)
            yield dict(zip(_REGION_FIELDS, values, strict=True))
        return
    for mapping, counted in zip(report.mappings, report.counts(), strict=True):
        yield {
            "start": f"{mapping.start:08x}",
            "end": f"{mapping.end:08x}",
            "permissions": mapping.permissions,
            "size": mapping.length,
            **report.sizes(counted),
            "path": mapping.path,
        }


def _addresses(start: int, end: int) -> str:
    """As in /proc/PID/maps."""
    return f"{start:08x}-{end:08x}"


@cache
def _names(categories: int) -> tuple[str, ...]:
    return tuple(str(category.name).lower() for category in PageCategory if category & categories)


def _human(size: int) -> str:
    """Exact, in the largest unit that can say it."""
    for unit, shift in ("GiB", 30), ("MiB", 20), ("KiB", 10):
        if size and not size & ((1 << shift) - 1):
            return f"{size >> shift} {unit}"
    return str(size)


def _visible(path: str) -> str:
    """Whoever names a file must not write to this terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


# -- Failures and progress ---------------------------------------------------------------------------------------


def _fail(error: PagemapCompatError | OSError) -> int:
    """Say it in one line, and return the exit status."""
    text = error.strerror if isinstance(error, OSError) else str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {text}"
    hint = getattr(error, "hint", None)
    say(f"{PROGRAM}: {text}; {hint}\n" if hint else f"{PROGRAM}: {text}\n")
    statuses: tuple[tuple[type[Exception], int], ...] = (
        (InvalidArgumentError, EXIT_USAGE),
        (_KernelThreadError, EXIT_KERNEL_THREAD),
        (TargetGoneError, EXIT_GONE),
        (UnsupportedError, EXIT_UNSUPPORTED),
        (PermissionError, EXIT_ACCESS),
    )
    return next((status for kind, status in statuses if isinstance(error, kind)), EXIT_FAILED)


@contextmanager
def _progress() -> Iterator[Callable[[float], None]]:
    """What is to be called with the fraction that is done. A terminal shows it, if it takes long."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    due = monotonic() + _PATIENCE
    with ExitStack() as stack:
        bar: Callable[[float], None] | None = None

        def show(fraction: float) -> None:
            nonlocal bar
            if terminal and monotonic() >= due:
                bar = bar or stack.enter_context(_bar())
                bar(fraction)

        yield show


def _bar() -> AbstractContextManager[Callable[[float], None]]:
    try:
        return _rich_bar(import_module("rich.console"), import_module("rich.progress"))
    except ImportError:
        return _plain_bar()


@contextmanager
def _rich_bar(console: Any, progress: Any) -> Iterator[Callable[[float], None]]:  # noqa: ANN401 - may not be there
    with progress.Progress(console=console.Console(stderr=True), transient=True) as bar:
        task = bar.add_task(PROGRAM, total=1.0)
        yield lambda fraction: bar.update(task, completed=fraction)


@contextmanager
def _plain_bar() -> Iterator[Callable[[float], None]]:
    try:
        yield lambda fraction: say(f"\r{PROGRAM}: {fraction:4.0%}")
    finally:
        say(f"\r{' ' * len(f'{PROGRAM}: 100%')}\r")
