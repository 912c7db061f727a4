"""What write watch does to this process's own memory: its protection, its content, its empty pages."""

from __future__ import annotations

import mmap
import os
from errno import EACCES, EINVAL, ENOMEM

from pagemapcompat import _kernel
from pagemapcompat.errors import InvalidArgumentError, KernelError
from pagemapcompat.mappings import Mapping, own_mappings
from pagemapcompat.memory import AddressRange, page_size, whole_number

PROT_NONE = 0
_CHUNK = 1 << 20
_READINGS = 100
_HINTS = {
    ("mprotect", EACCES): "the file is open for reading alone",
    ("mprotect", ENOMEM): "part of it is not mapped, or /proc/sys/vm/max_map_count is reached",
    ("/proc/self/maps", ENOMEM): "part of it is not mapped, or mappings change all the time: let them rest",
    ("madvise", EINVAL): "locked memory cannot be discarded (munlock it), nor hugetlb memory before Linux 5.18",
}


def _check(rc: int, operation: str, memory: AddressRange, detail: str = "") -> None:
    if rc:
        hint = _HINTS.get((operation, -rc))
        raise KernelError.make(-rc, operation, detail + os.strerror(-rc), range=memory, hint=hint)


def mapped_throughout(memory: AddressRange) -> list[Mapping]:
    """Those of memory that is mapped throughout.

    Since 6.17 the text is made without the lock of the mappings. Beside mprotect(2) it may leave one out.
    """
    for _ in range(_READINGS):
        found, end = own_mappings(memory), memory.start
        for mapping in found:
            if mapping.start <= end:
                end = max(end, mapping.end)
        if end >= memory.end:
            break
    else:
        _check(-ENOMEM, "/proc/self/maps", memory)
    return found


def checked_protection(value: int) -> int:
    """What mprotect(2) may be asked for."""
    # Machines have protections of their own, so that which there are is the kernel's to say.
    hint = "or together mmap.PROT_READ, PROT_WRITE and PROT_EXEC; or give 0"
    protection = whole_number(value, f"protection={value!r}: {hint}")
    if not 0 <= protection < 1 << 31:
        raise InvalidArgumentError(f"protection={protection:#x} is none of mprotect(2)").with_hint(hint)
    return protection


def protect(memory: AddressRange, protection: int) -> None:
    """mprotect(2)."""
    rc = _kernel.mprotect(memory.start, memory.end, protection)
    _check(rc, "mprotect", memory, f"protection={protection:#x}: ")


def discard(memory: AddressRange, *, shared: bool) -> None:
    """Let the content go of memory that is barred: of *shared* memory for all who map it."""
    advice = mmap.MADV_REMOVE if shared else mmap.MADV_DONTNEED
    rc = _kernel.madvise(memory.start, memory.end, advice)
    if shared and rc == -EACCES:
        # madvise_remove() used to ask that it be writable now (VM_WRITE), not that it may ever be (VM_MAYWRITE).
        protect(memory, mmap.PROT_WRITE)
        rc = _kernel.madvise(memory.start, memory.end, advice)
        protect(memory, PROT_NONE)
    _check(rc, "madvise", memory)


def populate(memory: AddressRange) -> None:
    """Read every page, whatever its protection, which gives empty ones the zero page.

    Not by loads: a mprotect in another thread would turn one into a SIGSEGV.
    """
    buffer = memoryview(bytearray(min(_CHUNK, memory.length)))
    at = memory.start
    with open("/proc/self/mem", "rb", buffering=0) as own:
        while at < memory.end:
            try:
                at += os.preadv(own.fileno(), [buffer[: memory.end - at]], at)
            except OSError:
                at += page_size()  # unmapped meanwhile, or a guard page
