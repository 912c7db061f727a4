"""Why the kernel refused, where its errno says nothing of itself."""

from __future__ import annotations

from errno import EBADF, EBADMSG, EINVAL, EISDIR, ENOTTY, ESPIPE
from typing import NoReturn

from pagemapcompat.errors import AlignmentError, NotTrackableError
from pagemapcompat.mappings import Mapping, own_mappings
from pagemapcompat.memory import AddressRange, page_size

LOST_FILE = frozenset({EBADF, EBADMSG, EISDIR, ENOTTY, ESPIPE})
"""What calls on this library's own descriptors fail with once they are nobody's, or another file's, and else never."""


def raise_einval(operation: str, memory: AddressRange, backend: str) -> NoReturn:
    """Look at the mappings in *memory*, and raise what fits the first that *backend* cannot have."""
    found = own_mappings(memory)
    if not found:
        raise NotTrackableError.make(
            EINVAL, operation, f"nothing is mapped in {memory}", range=memory, hint="map it first, if only as PROT_NONE"
        )
    for mapping in found:
        huge, path = _huge_page_size(mapping), mapping.path
        if huge > page_size() and (memory.start % huge or memory.end % huge):
            error = AlignmentError(f"{memory} begins or ends inside a huge page of {mapping.range} ({huge} bytes)")
            error.address, error.length = memory.start, memory.length
            raise error.with_hint(f"in hugetlb memory track multiples of {huge} bytes")
        sharing = "shared" if mapping.is_shared else "private"
        if mapping.is_shared or path.startswith("/"):
            in_memory = path.startswith(("/dev/zero", "/memfd:", "/dev/shm/", "/SYSV", "/anon_hugepage"))  # noqa: S108
            hint = (
                "shared and hugetlb memory is tracked since Linux 5.19; until then "
                "flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS (plain mmap.mmap(-1, length) is shared)"
                if in_memory
                else f"{backend} does not track files; backend pagemap-scan does (Linux 6.7)"
            )
            if path.startswith("/SYSV"):
                # Seen on 7.3.4 in huge pages, unless the userfaultfd is asynchronous; a memfd's are taken there.
                hint += "; some newer kernels (7.3.4) refuse that of shmget(2): use memfd_create(2), or pagemap-scan"
            raise NotTrackableError.make(
                EINVAL,
                operation,
                f"the kernel refuses the {sharing} mapping {path} at {mapping.range}",
                range=mapping.range,
                hint=hint,
            )
    raise NotTrackableError.make(
        EINVAL,
        operation,
        f"the kernel refuses {memory}",
        range=memory,
        hint="special mappings ([vvar], device memory, MAP_DROPPABLE) cannot be tracked",
    )


def _huge_page_size(mapping: Mapping) -> int:
    """KernelPageSize of a mapping, in bytes, as /proc/self/smaps has it."""
    inside = False
    with open("/proc/self/smaps", encoding="utf-8", errors="replace", newline="\n") as smaps:
        for line in smaps:
            word = line.split(None, 1)[0]
            if "-" in word and not word.endswith(":"):
                inside = word == f"{mapping.start:08x}-{mapping.end:08x}"
            elif inside and word == "KernelPageSize:":
                return int(line.split()[1]) << 10
    return page_size()
