"""What all commands share: exit statuses, and standard streams, any of which may be closed, full, or read no more."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from errno import EBADF
from io import TextIOWrapper
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNTOLD = 3
EXIT_GONE = 4
EXIT_ACCESS = 5
EXIT_KERNEL_THREAD = 6
EXIT_UNSUPPORTED = 7
EXIT_NONE_USABLE = 77
"""By which automake's tests say that they were skipped."""
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def put(lines: Iterable[str], program: str) -> int:
    """Write *lines* to standard output, and return the exit status: EXIT_OK, EXIT_BROKEN_PIPE or EXIT_FAILED."""
    try:
        if sys.stdout is None:
            raise OSError(EBADF, os.strerror(EBADF))  # noqa: TRY301 - as writing to it would
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout.writelines(lines)
        sys.stdout.flush()
    except OSError as error:
        _forget_output()
        if isinstance(error, BrokenPipeError):
            return EXIT_BROKEN_PIPE
        say(f"{program}: standard output: {error.strerror}\n")
        return EXIT_FAILED
    return EXIT_OK


def _forget_output() -> None:
    """What is left in the buffer goes nowhere, or the interpreter would fail over it once more at its end."""
    if sys.stdout is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def say(text: str) -> None:
    """To standard error, if anybody is there."""
    with suppress(OSError):
        if sys.stderr is not None:
            sys.stderr.write(text)
            sys.stderr.flush()
