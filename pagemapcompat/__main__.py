"""The command line: `pagemapcompat` and `python -m pagemapcompat`."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version

from pagemapcompat import cli_probe, cli_scan, cli_selftest
from pagemapcompat.cli_streams import EXIT_INTERRUPTED, EXIT_UNTOLD, EXIT_USAGE, say
from pagemapcompat.errors import InvalidArgumentError, PagemapCompatError


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
    except (PagemapCompatError, OSError) as error:
        # A command that has statuses of its own for its errors has handled them.
        hint = getattr(error, "hint", None)
        say(f"pagemapcompat: {error}{f' (hint: {hint})' if hint else ''}\n")
        return EXIT_USAGE if isinstance(error, InvalidArgumentError) else EXIT_UNTOLD
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return status


if __name__ == "__main__":
    sys.exit(main())
