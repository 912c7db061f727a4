"""`pagemapcompat selftest`: every backend that works here, on a small memory."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from pagemapcompat.cli_streams import put
from pagemapcompat.errors import AccessError, PagemapCompatError, UnsupportedError
from pagemapcompat.memory import page_size
from pagemapcompat.probe import BACKEND_NAMES
from pagemapcompat.tracker import DirtyTracker

if TYPE_CHECKING:
    import argparse

FAILED, NONE_USABLE = 1, 77
PAGES = 64


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `selftest`."""
    parser = subparsers.add_parser(
        "selftest",
        help="write to a small memory and see whether each backend reports just that",
        description="Runs every backend that works here on a small memory: a line each.",
        epilog="Exits with 0 when all passed, 1 when one failed, 77 when none works here.",
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
    return FAILED if failed else written if passed else NONE_USABLE


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
