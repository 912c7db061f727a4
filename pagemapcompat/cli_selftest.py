"""`pagemapcompat selftest`: every backend that works here, on a small memory."""

from __future__ import annotations

import argparse
import mmap

from pagemapcompat.cli_streams import EXIT_FAILED, EXIT_NONE_USABLE, EXIT_OK, put
from pagemapcompat.errors import AccessError, PagemapCompatError, UnsupportedError
from pagemapcompat.memory import page_size
from pagemapcompat.probe import BACKEND_NAMES
from pagemapcompat.tracker import DirtyTracker

PAGES = 64
_EPILOG = f"""\
exit status:
  {EXIT_OK}   all passed
  {EXIT_FAILED}   one failed
  {EXIT_NONE_USABLE}  none works here
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
    passed = failed = 0
    lines = []
    for name in BACKEND_NAMES:
        try:
            tracker = DirtyTracker(name)
        except (UnsupportedError, AccessError) as error:
            lines.append(f"{name}: not usable: {error}{f' (hint: {error.hint})' if error.hint else ''}\n")
            continue
        wrong = _check(tracker)
        failed += wrong is not None
        passed += wrong is None
        lines.append(f"{name}: {f'FAILED: {wrong}' if wrong else 'passed'}\n")
    written = put(lines, "pagemapcompat selftest")
    return EXIT_FAILED if failed else written if passed else EXIT_NONE_USABLE


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
