"""One guest, from boot to power-off, a hang or a panic."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from typing import TYPE_CHECKING, Any

import attrs

from vm.machine import GUEST_CPUS, GUEST_MEMORY, MachineError

if TYPE_CHECKING:
    from pathlib import Path

LOOK_SECONDS = 1.0
COMMAND = (
    *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
    # By name: /dev/kvm may open and hang all the same.
    *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", f"{GUEST_CPUS}", "-m", f"{GUEST_MEMORY >> 20}M"),
)
APPEND = (
    "console=ttyS0 panic=-1 quiet random.trust_cpu=on mitigations=off rootfstype=ramfs"
    " tsc=reliable clocksource=tsc"  # which costs no call to read; the kernel trusts no emulated one by itself
)


def silence() -> float:
    """How long a guest may tell of no test, in seconds. Emulated, on a slow and shared machine, one may take minutes.

    Raises:
        MachineError: PAGEMAPCOMPAT_VM_SECONDS is no number.
    """
    text = os.environ.get("PAGEMAPCOMPAT_VM_SECONDS", "600")
    try:
        return float(text)
    except ValueError as error:
        raise MachineError(f"PAGEMAPCOMPAT_VM_SECONDS={text!r} is no number of seconds") from error


@attrs.frozen
class Guest:
    """What a guest left behind."""

    console: str
    events: list[dict[str, Any]]
    hung: bool

    @property
    def over(self) -> bool:
        """Whether it came to its end by itself."""
        return bool(self.events) and "over" in self.events[-1]


def boot(vmlinuz: Path, initrd: bytes, scratch: Path) -> Guest:
    """Run one guest to its end. Blocks for minutes; threads may boot several at once.

    Raises:
        MachineError: qemu could not run it.
    """
    scratch.mkdir()
    (scratch / "initrd").write_bytes(initrd)
    console, results, errors = scratch / "console", scratch / "results", scratch / "errors"
    console.touch()
    results.touch()
    command = [*COMMAND, "-serial", f"file:{console}", "-serial", f"file:{results}"]
    command += ["-kernel", str(vmlinuz), "-initrd", str(scratch / "initrd"), "-append", APPEND]
    with errors.open("wb") as said, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said) as vm:
        try:
            hung = _wait(vm, results)
        finally:
            vm.kill()
    (scratch / "initrd").unlink()
    if vm.returncode and not hung:
        raise MachineError(f"qemu ended with {vm.returncode}: {errors.read_text(errors='replace').strip()}")
    return Guest(console.read_text(errors="replace").replace("\r", ""), list(_events(results)), hung)


def _wait(vm: subprocess.Popen[bytes], results: Path) -> bool:
    """Wait for its end. True if it told nothing for too long; a kernel in trouble may fill its console for ever."""
    size, since, limit = -1, time.monotonic(), silence()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            vm.wait(LOOK_SECONDS)
            return False
        now = results.stat().st_size
        if now != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since > limit:
            return True


def _events(results: Path) -> list[dict[str, Any]]:
    events = []
    for line in results.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last one of a guest that died
            events.append(json.loads(line))
    return events
