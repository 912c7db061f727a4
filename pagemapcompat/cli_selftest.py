"""`pagemapcompat selftest`: every backend that works here, on a small memory."""

from __future__ import annotations

import argparse
import mmap

from pagemapcompat.cli_streams import (
    EXIT_BROKEN_PIPE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NONE_USABLE,
    EXIT_OK,
    EXIT_UNTOLD,
    put,
)
from pagemapcompat.errors import AccessError, KernelError, PagemapCompatError, UnsupportedError
from pagemapcompat.memory import page_size
from pagemapcompat.probe import BACKEND_NAMES
from pagemapcompat.tracker import DirtyTracker

PAGES = 64
_EPILOG = f"""\
exit status:
  {EXIT_OK}    all passed
  {EXIT_FAILED}    one failed
  {EXIT_UNTOLD}    it could not be found out whether one works, or not be written
  {EXIT_NONE_USABLE}   none works here
  {EXIT_INTERRUPTED}  interrupted (SIGINT)
  {EXIT_BROKEN_PIPE}  nobody reads the output any more (SIGPIPE)
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `selftest`."""
    parser = subparsers.add_parser(
        "selftest",
        help="write to a small memory and see whether each backend reports just that",
        description="Run every backend that works here on a small memory: a line each.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)


def run(_arguments: argparse.Namespace) -> int:
    """Run it."""
    passed = failed = untold = 0
    lines = []
    for name in BACKEND_NAMES:
        try:
            tracker = DirtyTracker(name)
        except (UnsupportedError, AccessError) as error:
            lines.append(f"{name}: not usable: {_with_hint(error)}\n")
            continue
        except KernelError as error:
            untold += 1
            lines.append(f"{name}: not told: {_with_hint(error)}\n")
            continue
        wrong = _check(tracker)
        failed += wrong is not None
        passed += wrong is None
        lines.append(f"{name}: {f'FAILED: {wrong}' if wrong else 'passed'}\n")
    written = put(lines, "pagemapcompat selftest")
    if failed:
        return EXIT_FAILED
    if untold or written == EXIT_FAILED:
        return EXIT_UNTOLD
    return written if passed else EXIT_NONE_USABLE


def _with_hint(error: PagemapCompatError) -> str:
    return f"{error} (hint: {error.hint})" if error.hint else str(error)


def _check(tracker: DirtyTracker) -> str | None:
    """What went wrong, or None."""
    rounds = [set(range(0, PAGES, 3)), {0, PAGES - 1}, set(), set(range(PAGES))]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        with tracker, mmap.mmap(-1, PAGES * page_size(), flags=flags) as memory, tracker.track(memory) as ram:
            for wrote in rounds:
                for page in wrote:
                    memory[page * page_size()] += 1
                for call in (ram.peek, ram.collect):
                    told = set(call().page_indices())
                    if told != wrote:
                        return f"{call.__name__} lost {sorted(wrote - told)} and made up {sorted(told - wrote)}"
            memory[0] += 1
            ram.reset()
            if ram.collect().pages:
                return "reset left pages that were written before it"
    except (PagemapCompatError, OSError) as error:
        return str(error)
    return None
