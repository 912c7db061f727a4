"""The text of /proc/PID/maps, for reports, errors and write watch. The C core has a reader of its own (vmas.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from pagemapcompat.memory import AddressRange

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@attrs.frozen
class Mapping:
    """A line of it.

    Attributes:
        start: The address of the first byte.

        end: The address behind the last one.

        permissions: Four letters, as in "rw-p".

        path: The file, or a name in brackets, or "". What is no UTF-8 is shown by backslashes.
    """

    start: int
    end: int
    permissions: str
    path: str

    @property
    def length(self) -> int:
        """In bytes."""
        return self.end - self.start

    @property
    def range(self) -> AddressRange:
        """Where it is, if in the user's half of the address space."""
        return AddressRange(self.start, self.end)

    @property
    def is_shared(self) -> bool:
        """Whether others see what is written to it."""
        return self.permissions.endswith("s")


def parse(maps: Iterable[bytes]) -> Iterator[Mapping]:
    """Every line, in order: by address. A path may have spaces, and anything but a newline (fs/proc/task_mmu.c)."""
    for line in maps:
        addresses, permissions, _, _, _, *path = line.rstrip(b"\n").split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split(b"-"))
        yield Mapping(start, end, permissions.decode(), b"".join(path).decode(errors="backslashreplace"))


def own_mappings(memory: AddressRange) -> list[Mapping]:
    """Those of this process that touch *memory*, whole."""
    found = []
    with open("/proc/self/maps", "rb") as maps:
        for mapping in parse(maps):
            if mapping.start >= memory.end:
                break
            if mapping.end > memory.start:
                found.append(mapping)
    return found
