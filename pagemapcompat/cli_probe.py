"""`pagemapcompat probe`: what this kernel lets this process do, and why not, for people and for programs."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import ExitStack, suppress
from errno import ESRCH, errorcode
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import attrs

from pagemapcompat import cli_formats, cli_scan
from pagemapcompat.abi import EntryFlag, Feature, Guarantee, PageCategory, category_feature
from pagemapcompat.cli_streams import (
    EXIT_ACCESS,
    EXIT_BROKEN_PIPE,
    EXIT_FAILED,
    EXIT_GONE,
    EXIT_INTERRUPTED,
    EXIT_KERNEL_THREAD,
    EXIT_OK,
    EXIT_UNTOLD,
    EXIT_USAGE,
    put,
    say,
)
from pagemapcompat.errors import (
    AccessError,
    InvalidArgumentError,
    KernelError,
    PagemapCompatError,
    TargetGoneError,
    UnsupportedError,
)
from pagemapcompat.laboratory import Laboratory
from pagemapcompat.mappings import parse
from pagemapcompat.memory import AddressRange, page_size
from pagemapcompat.pagemap import Pagemap, ScanQuery
from pagemapcompat.probe import BACKEND_NAMES, FeatureReport, ProbeResult, probe, try_feature
from pagemapcompat.tracker import DirtyTracker
from pagemapcompat.trials_pagemap import try_soft_dirty

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROGRAM = "pagemapcompat probe"
_EPILOG = f"""\
Data go to standard output, everything else to standard error.

exit status:
  {EXIT_OK}    told; with --require: all of it is there
  {EXIT_FAILED}    with --require: something is not there
  {EXIT_USAGE}    wrong usage
  {EXIT_UNTOLD}    it could not be found out, or not be written
  {EXIT_GONE}    with --pid: there is no such process, or it ended
  {EXIT_ACCESS}    with --pid: the process is not ours to read
  {EXIT_KERNEL_THREAD}    with --pid: it is a kernel thread, which has no memory
  {EXIT_INTERRUPTED}  interrupted (SIGINT)
  {EXIT_BROKEN_PIPE}  nobody reads the output any more (SIGPIPE)
"""
SCHEMA = 1
"""Of the JSON. Grows when a name changes its meaning or goes away; new names may come at any time."""
GROUPS = (
    ("PAGEMAP_SCAN", ("pagemap-scan", "category-")),
    ("/proc/PID/pagemap", ("pagemap", "soft-dirty")),
    ("write-protection", ("uffd-wp",)),
    ("userfaultfd", ("uffd-",)),
    ("other calls", ("",)),
)
"""Titles, and the beginnings of the names of what stands below them; the first that fits."""


@attrs.frozen
class Findings:
    """Everything that `probe` prints."""

    report: FeatureReport
    usable: dict[str, Guarantee]
    """What each backend that works guarantees, best backend first."""
    refused: dict[str, PagemapCompatError]
    """Why each other backend does not."""

    def as_dict(self) -> dict[str, Any]:
        """Of plain values, as `probe.schema.json` describes it."""
        best, limits = next(iter(self.usable), None), self.report.limits
        return {
            "schema": SCHEMA,
            "version": version("pagemapcompat"),
            "privileged": "CAP_SYS_PTRACE" in (limits.capabilities or ()) and not limits.user_namespace,
            "backend": best,
            "guarantees": _names(self.usable[best]) if best else [],
            "backends": {name: self._backend(name) for name in BACKEND_NAMES},
            "features": self.report.as_dict(),
            "limits": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in attrs.asdict(limits, recurse=False).items()
            },
        }

    def _backend(self, name: str) -> dict[str, Any]:
        if name in self.usable:
            usable = {"usable": True, "guarantees": _names(self.usable[name])}
            return {**usable, "errno": None, "reason": None, "hint": None}
        error = self.refused[name]
        number = error.errno if isinstance(error, OSError) else None
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return {
            "usable": False,
            "guarantees": [],
            "errno": errorcode.get(number) if number else None,
            "reason": reason.removeprefix(f"{name}: "),
            "hint": error.hint,
        }


def _names(guarantees: Guarantee) -> list[str]:
    return [str(guarantee.name) for guarantee in guarantees]


def find() -> Findings:
    """Probe, with what only a process of its own can try, and open each backend."""
    report = probe()
    if report.supports(Feature.PAGEMAP_SOFT_DIRTY) and Feature.SOFT_DIRTY.value not in report.disabled:
        report = report.with_result(_soft_dirty())
    usable: dict[str, Guarantee] = {}
    refused: dict[str, PagemapCompatError] = {}
    for name in BACKEND_NAMES:
        try:
            with DirtyTracker(name) as tracker:
                usable[name] = tracker.selection.guarantees
        except PagemapCompatError as error:
            refused[name] = error
    return Findings(report, usable, refused)


def _soft_dirty() -> ProbeResult:
    """Try it in a child: clearing is for all of a process, and a child's memory is its own."""
    with ExitStack() as stack:
        try:
            answer, told = os.pipe()
            stack.callback(os.close, answer)
            stack.callback(os.close, told)
            pid = os.fork()
        except OSError as error:
            hint = "raise ulimit -u and -n"
            return ProbeResult(Feature.SOFT_DIRTY, "unknown", error.errno, "no process could be made", hint)
        stack.pop_all()
    if pid == 0:
        status = 1
        try:
            os.close(answer)
            lab = Laboratory()
            try_feature(lab, Feature.PAGEMAP, frozenset())
            try_feature(lab, Feature.PAGEMAP_SOFT_DIRTY, frozenset())
            result = try_feature(lab, Feature.SOFT_DIRTY, frozenset(), try_soft_dirty)
            os.write(told, json.dumps([result.state, result.errno, result.detail, result.hint]).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(told)
    with os.fdopen(answer, "rb") as file:
        text = file.read()
    status = 0
    with suppress(ChildProcessError):  # who ignores SIGCHLD is told nothing of its children
        _, status = os.waitpid(pid, 0)
    if status or not text:
        detail = f"the process that tried it ended without an answer, with {os.waitstatus_to_exitcode(status)}"
        return ProbeResult(Feature.SOFT_DIRTY, "unknown", None, detail, "ask again, with more memory")
    state, number, detail, hint = json.loads(text)
    return ProbeResult(Feature.SOFT_DIRTY, state, number, detail, hint)


# -- Requirements ----------------------------------------------------------------------------------------------


def requirable() -> dict[str, list[str]]:
    """What --require takes, by kind."""
    return {
        "backends": list(BACKEND_NAMES),
        "guarantees": list(Guarantee.__members__),
        "features": [feature.value for feature in Feature],
    }


def unmet(findings: Findings, names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """What of *names* is not there: EXIT_FAILED or EXIT_UNTOLD, and a line that says why."""
    backends = [name for name in names if name in BACKEND_NAMES]
    wanted = Guarantee(0)
    for name in names:
        if name in Guarantee.__members__:
            wanted |= Guarantee[name]
        elif name in BACKEND_NAMES:
            if name not in findings.usable:
                refused = findings.refused[name]
                yield (
                    EXIT_UNTOLD if _is_untold(refused) else EXIT_FAILED,
                    f"{name}: {refused}; remedy: {refused.hint or 'none'}",
                )
        elif not (result := findings.report[Feature(name)]):
            answer = findings.report.as_dict()[name]
            yield (
                EXIT_UNTOLD if result.state == "unknown" else EXIT_FAILED,
                f"{name}: {result.state}, {_with_hint(answer, 'detail')}",
            )
    asked = backends or BACKEND_NAMES
    able = {name: given for name, given in findings.usable.items() if name in asked}
    if wanted and not any(wanted & ~given == Guarantee(0) for given in able.values()):
        untold = any(_is_untold(findings.refused[name]) for name in asked if name not in able)
        given = ", ".join(f"{name} gives {' '.join(_names(given))}" for name, given in able.items())
        given = given or ("none of them could be opened" if untold else "none of them works")
        yield (
            EXIT_UNTOLD if untold else EXIT_FAILED,
            f"{' '.join(_names(wanted))}: none of {', '.join(asked)} gives this; {given}",
        )


def _is_untold(refused: PagemapCompatError) -> bool:
    """Whether the backend might work all the same: what refuses it is no answer of the kernel's."""
    return not isinstance(refused, UnsupportedError | AccessError)


def _with_hint(answer: dict[str, Any], key: str) -> str:
    error = f" ({answer['errno']})" if answer["errno"] else ""
    return f"{answer[key]}{error}; remedy: {answer['hint'] or 'none'}"


# -- Another process -------------------------------------------------------------------------------------------


def readable(pid: int | Literal["self"]) -> dict[str, Any]:
    """What could be read of another process, of plain values.

    Raises:
        TargetGoneError: There is none.
    """
    answers: dict[str, dict[str, Any]] = {}
    for name in ("pagemap", "maps"):
        answers[name] = _opens(pid, name)
    if answers["pagemap"]["state"] == "yes":
        with Pagemap(pid) as pagemap:
            one = AddressRange(page_size(), 2 * page_size())
            for category in PageCategory:
                answers[category_feature(category).value] = _scans(pagemap, one, category)
            answers["pfn"] = _shows_pfn(pagemap)
    return {"schema": SCHEMA, "pid": cli_scan.pid_here(pid), "answers": answers}


def _answer(state: str, number: int | None = None, detail: str = "", hint: str | None = None) -> dict[str, Any]:
    return {"state": state, "errno": errorcode.get(number) if number else None, "detail": detail, "hint": hint}


def _opens(pid: int | str, name: str) -> dict[str, Any]:
    path = f"/proc/{pid}/{name}"
    try:
        with open(path, "rb", buffering=0) as file:
            held = file.read(8)  # a word of pagemap, and at least something of maps
    except (FileNotFoundError, ProcessLookupError):
        held = b""
    except OSError as error:
        hint = "CAP_SYS_PTRACE, or run as its user; a process that gave up privileges is root's to read"
        return _answer("denied", error.errno, f"{path} may not be read", hint)
    if not held:
        raise TargetGoneError.make(ESRCH, f"read {path}", f"there is no process {pid}, or it has no memory")
    return _answer("yes", None, f"{path} can be read")


def _scans(pagemap: Pagemap, where: AddressRange, category: PageCategory) -> dict[str, Any]:
    try:
        cli_scan.check_is_set(category)
        pagemap.scan(where, ScanQuery(all_of=category, report=category))
    except TargetGoneError:
        raise
    except KernelError as error:
        return _answer("no", error.errno, error.strerror or "", error.hint)
    return _answer("yes", None, f"PAGE_IS_{category.name} can be told")


def _shows_pfn(pagemap: Pagemap) -> dict[str, Any]:
    starts: list[int] = []
    with cli_scan.reading(pagemap.pid), suppress(AccessError), os.fdopen(pagemap.open_file("maps"), "rb") as maps:
        starts = [mapping.start for mapping in parse(maps) if mapping.path != "[vsyscall]"]
    for start in starts:
        for entry in pagemap.entries(AddressRange.from_length(start, page_size())):
            if entry.flags & EntryFlag.PRESENT:
                shown = entry.pfn is not None
                denied = _answer("denied", None, "page frame numbers are shown as 0", "CAP_SYS_ADMIN")
                return _answer("yes", None, "page frame numbers are shown") if shown else denied
    return _answer("unknown", None, "none of its mappings begins with a page in memory", "try again later")


# -- The command -----------------------------------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `probe`."""
    parser = subparsers.add_parser(
        "probe",
        help="what this kernel lets this process do, and why not",
        allow_abbrev=False,
        description="Try, in throw-away memory, what this kernel lets this process do. Nothing is changed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--format", choices=list(cli_formats.FORMATS), default="text", help="default: text")
    parser.add_argument(
        "--require", nargs="+", action="extend", metavar="NAME", help="fail without these (pagemap-scan is the backend)"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing: the exit status is the answer")
    parser.add_argument("--list", action="store_true", help="what can be required; nothing is tried")
    parser.add_argument("--pid", help='what could be read of another process, or of "self" (text and json)')
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Run it."""
    known, required = requirable(), arguments.require or []
    for name in required:
        if not any(name in names for names in known.values()):
            arguments.parser.error(f"nothing is named {name!r}: see `pagemapcompat probe --list`")
    if required and (arguments.list or arguments.pid is not None):
        arguments.parser.error("--require asks about this process: give it without --list and --pid")
    if arguments.list:
        names = dict.fromkeys(name for names in known.values() for name in names)
        return _put("".join(f"{name}\n" for name in names), arguments)
    if arguments.pid is not None:
        return _run_pid(arguments)
    findings = find()
    written = _put(cli_formats.FORMATS[arguments.format](findings.as_dict(), GROUPS), arguments)
    lacking = list(unmet(findings, required))
    for _, line in lacking:
        _complain(line, arguments)
    return min((status for status, _ in lacking), default=written)


def _run_pid(arguments: argparse.Namespace) -> int:
    if arguments.format not in cli_formats.PID_FORMATS:
        arguments.parser.error(f"--pid prints {' or '.join(cli_formats.PID_FORMATS)}, not {arguments.format}")
    try:
        pid = cli_scan.parse_pid(arguments.pid)
    except InvalidArgumentError as error:
        arguments.parser.error(f"--pid: {error}; {error.hint}")
    try:
        answers = readable(pid)
    except TargetGoneError as error:
        _complain(error.strerror or "", arguments)
        return EXIT_KERNEL_THREAD if cli_scan.is_kernel_thread(pid) else EXIT_GONE
    written = _put(cli_formats.PID_FORMATS[arguments.format](answers), arguments)
    return EXIT_ACCESS if answers["answers"]["pagemap"]["state"] == "denied" else written


def _put(text: str, arguments: argparse.Namespace) -> int:
    """Print, and return the exit status: what could not be written was not told."""
    if arguments.quiet:
        return EXIT_OK
    status = put([text], PROGRAM)
    return EXIT_UNTOLD if status == EXIT_FAILED else status


def _complain(line: str, arguments: argparse.Namespace) -> None:
    if not arguments.quiet:
        say(f"{PROGRAM}: {line}\n")


__all__ = ["add_parser", "find", "requirable", "unmet"]
