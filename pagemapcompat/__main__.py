"""The command line: `pagemapcompat` and `python -m pagemapcompat`."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import version

from pagemapcompat import cli_probe, cli_scan, cli_selftest
from pagemapcompat.errors import PagemapCompatError


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return its exit status."""
    parser = argparse.ArgumentParser("pagemapcompat", description="Which pages of this memory were written?")
    parser.add_argument("--version", action="version", version=f"pagemapcompat {version('pagemapcompat')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (cli_probe, cli_scan, cli_selftest):
        command.add_parser(commands)
    chosen = parser.parse_args(arguments)
    try:
        status: int = chosen.run(chosen)
        if sys.stdout is not None:
            sys.stdout.flush()
    except PagemapCompatError as error:
        sys.stderr.write(f"pagemapcompat: {error}{f' (hint: {error.hint})' if error.hint else ''}\n")
        return 2
    except BrokenPipeError:
        # Whoever read has seen enough; what is left in the buffer must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return cli_scan.EXIT_BROKEN_PIPE
    return status


if __name__ == "__main__":
    sys.exit(main())
