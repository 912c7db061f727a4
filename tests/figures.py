"""Figures of a run, added up by tests and by the processes that they fork, and shown by pytest in the end."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping

_FILE = os.memfd_create("figures")


def add(section: str, numbers: Mapping[str, int]) -> None:
    """To the sums of a section."""
    os.write(_FILE, f"{json.dumps([section, dict(numbers)])}\n".encode())  # one write, at the end, whoever writes


def sums() -> dict[str, Counter[str]]:
    """By section, and by name."""
    found: dict[str, Counter[str]] = {}
    for line in os.pread(_FILE, os.fstat(_FILE).st_size, 0).decode().splitlines():
        section, numbers = json.loads(line)
        found.setdefault(section, Counter()).update(numbers)
    return found


def lines() -> Iterator[str]:
    """For people."""
    for section, numbers in sorted(sums().items()):
        yield f"{section}: {', '.join(f'{number} {name}' for name, number in numbers.items())}"
