"""Boots Debian's own kernels and runs the tests marked `kernel` in each, as root and as an unprivileged user.

Nothing is installed and no root is needed: kernels are downloaded with apt into ~/.cache/pagemapcompat, checked against
the archive's signatures, unpacked, and booted by qemu in software emulation. It takes qemu-system-x86, busybox-static
and the .venv that scripts/test makes; half an hour on two CPUs.

Exits with 0 when every kernel that can still be had passed, 1 when the library failed on one, 2 when this machine could
not run the matrix. PAGEMAPCOMPAT_SKIP_VM=1 skips it, PAGEMAPCOMPAT_VM_SECONDS (600) is how long a guest may be silent.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs

from vm import archive, initramfs, machine, qemu, report

ENOUGH = 3
"""Kernels that must still be served, of all."""
KERNELS = machine.ROOT / "tests/kernels.toml"
README = machine.ROOT / "README.md"


def say(text: str) -> None:
    """Tell how far it is."""
    sys.stdout.write(f"{text}\n")  # in one piece, whatever thread it comes from
    sys.stdout.flush()


def arguments(names: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "scripts/vm_matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernel", nargs="*", help=f"{', '.join(names)} (default: all)")
    parser.add_argument("--write", action="store_true", help="put the matrix into README.md if all kernels passed")
    parser.add_argument("--pytest", default="", metavar="OPTIONS", help="options for pytest inside, e.g. '-k collect'")
    chosen = parser.parse_args()
    for name in chosen.kernel:
        if name not in names:
            parser.error(f"no kernel {name!r} in {KERNELS.name}; it has {', '.join(names)}")
    if chosen.write and (chosen.kernel or chosen.pytest):
        parser.error("--write takes all kernels and all tests")
    return chosen


@attrs.define
class Outcome:
    """What came of all kernels."""

    guests: dict[str, tuple[report.Kernel, qemu.Guest]] = attrs.field(factory=dict)
    unserved: list[str] = attrs.field(factory=list)
    """No suite has them any more."""
    notes: dict[str, str] = attrs.field(factory=dict)
    """On where a kernel came from."""
    machine: list[str] = attrs.field(factory=list)
    """What this machine could not do."""


def find(kernels: list[report.Kernel], outcome: Outcome) -> dict[str, archive.Image]:
    """The images to boot, by name."""
    say("Looking for kernels ...")
    source = archive.Archive()
    images = {}
    for kernel in kernels:
        try:
            image = source.kernel(kernel.package)
        except machine.MachineError as error:
            outcome.machine.append(f"{kernel.name} could not be had: {error}")
            continue
        if image is None:
            outcome.unserved.append(kernel.name)
            continue
        images[kernel.name] = image
        if image.note:
            outcome.notes[kernel.name] = f"{image.note}; it was kept by an earlier run"
    return images


def boot_all(kernels: list[report.Kernel], options: list[str]) -> Outcome:
    """Boot them, several at once. A guest that this machine could not run leaves the others alone."""
    outcome = Outcome()
    images = find(kernels, outcome)
    if not images:
        return outcome
    say("Packing Python, the wheel and the tests ...")
    logs = machine.CACHE / "logs"
    logs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        base = initramfs.base(scratch)

        def run(kernel: report.Kernel, image: archive.Image) -> qemu.Guest:
            say(f"{kernel.name}: booting {image.package}{f' ({image.note.upper()})' if image.note else ''}")
            settings = json.dumps(kernel.settings(options)).encode()
            guest = qemu.boot(image.vmlinuz, base + initramfs.addition(image.ramdisk, settings), scratch / kernel.name)
            (logs / f"{kernel.name}.console").write_text(guest.console)
            (logs / f"{kernel.name}.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in guest.events))
            halves = [report.Half.of(guest, who) for who in report.USERS]
            state = "FAILED" if report.judge(kernel, guest) else "passed"
            ran = ", ".join(f"{len(half.tests)} tests as {half.who} in {half.cpu} CPU seconds" for half in halves)
            say(f"{kernel.name}: {state}, {ran}; see {logs / kernel.name}.console")
            return guest

        pool = ThreadPoolExecutor(machine.guests_at_once())
        try:
            started = [
                (kernel, pool.submit(run, kernel, images[kernel.name])) for kernel in kernels if kernel.name in images
            ]
            for kernel, guest in started:
                try:
                    outcome.guests[kernel.name] = kernel, guest.result()
                except (machine.MachineError, OSError) as error:
                    outcome.machine.append(f"{kernel.name} could not be run: {error}")
        finally:
            pool.shutdown(cancel_futures=True)
    return outcome


def tell(outcome: Outcome) -> list[str]:
    """Print the matrix and what the kernels complained of. Returns what failed."""
    say(f"\n{report.matrix(outcome.guests, outcome.unserved, outcome.notes)}")
    failures = [f"{name}: {wrong}" for name, pair in outcome.guests.items() for wrong in report.judge(*pair)]
    for name, (_, guest) in outcome.guests.items():
        for complaint in report.kernel_complaints(guest):
            say(f"\n{name}: the kernel itself complained: {complaint}")
    for failure in failures:
        say(f"\nFAILED {failure}")
    for text in outcome.machine:
        print(f"vm_matrix: {text}", file=sys.stderr)
    return failures


def main() -> int:
    """Run the matrix."""
    kernels = {
        entry["name"]: report.Kernel(**entry) for entry in tomllib.loads(KERNELS.read_text(encoding="utf-8"))["kernel"]
    }
    chosen = arguments(list(kernels))
    document = README.read_text(encoding="utf-8")
    report.put_into(document, "")  # fails now, and not in the end
    try:
        machine.check()
        qemu.silence()
        outcome = boot_all([kernels[name] for name in chosen.kernel or kernels], shlex.split(chosen.pytest))
    except (machine.MachineError, OSError, subprocess.SubprocessError) as error:
        print(f"vm_matrix: {error}", file=sys.stderr)
        return 2
    if tell(outcome):
        return 1
    if outcome.machine:
        return 2
    if not chosen.kernel and len(outcome.guests) < ENOUGH:
        print(f"vm_matrix: only {len(outcome.guests)} kernels can be had; see tests/kernels.toml", file=sys.stderr)
        return 2
    renewed = report.put_into(document, report.matrix(outcome.guests, outcome.unserved, outcome.notes))
    if chosen.write:
        README.write_text(renewed, encoding="utf-8")
    elif not chosen.kernel and not chosen.pytest and renewed != document:
        say("\nREADME.md shows another matrix: scripts/vm_matrix --write renews it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
