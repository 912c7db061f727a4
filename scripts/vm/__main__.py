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
import os
import shlex
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def boot_all(
    kernels: list[report.Kernel], options: list[str]
) -> tuple[dict[str, tuple[report.Kernel, qemu.Guest]], list[str]]:
    """Boot them, as many at once as there are CPUs. Guests by name, and the kernels that could not be had."""
    say("Looking for kernels ...")
    source = archive.Archive()
    images = {kernel.name: source.kernel(kernel.package) for kernel in kernels}
    for complaint in source.complaints:
        say(f"    {complaint}")
    unserved = [name for name, image in images.items() if image is None]
    if len(unserved) == len(kernels):
        raise machine.MachineError("no kernel could be had at all; is there a network?")
    say("Packing Python, the wheel and the tests ...")
    guests = {}
    logs = machine.CACHE / "logs"
    logs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        scratch = Path(temporary)
        base = initramfs.base(scratch)

        def run(kernel: report.Kernel, image: archive.Image) -> qemu.Guest:
            say(f"{kernel.name}: booting {image.package}{'' if image.served else ', WHICH NO SUITE SERVES ANY MORE'}")
            settings = json.dumps(kernel.settings(options)).encode()
            guest = qemu.boot(image.vmlinuz, base + initramfs.addition(image.ramdisk, settings), scratch / kernel.name)
            (logs / f"{kernel.name}.console").write_text(guest.console)
            (logs / f"{kernel.name}.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in guest.events))
            halves = [report.Half.of(guest, who) for who in report.USERS]
            state = "FAILED" if report.judge(kernel, guest) else "passed"
            ran = ", ".join(f"{len(half.tests)} tests as {half.who} in {half.cpu} CPU seconds" for half in halves)
            say(f"{kernel.name}: {state}, {ran}; see {logs / kernel.name}.console")
            return guest

        running = {
            kernel.name: (kernel, pool.submit(run, kernel, image))
            for kernel in kernels
            if (image := images[kernel.name]) is not None
        }
        for name, (kernel, guest) in running.items():
            guests[name] = kernel, guest.result()
    return guests, unserved


def main() -> int:
    """Run the matrix."""
    kernels = {
        entry["name"]: report.Kernel(**entry) for entry in tomllib.loads(KERNELS.read_text(encoding="utf-8"))["kernel"]
    }
    chosen = arguments(list(kernels))
    try:
        machine.check()
        wanted = [kernels[name] for name in chosen.kernel or kernels]
        guests, unserved = boot_all(wanted, shlex.split(chosen.pytest))
    except machine.MachineError as error:
        print(f"vm_matrix: {error}", file=sys.stderr)
        return 2
    table = report.matrix(guests, unserved)
    say(f"\n{table}")
    failures = [(name, wrong) for name, pair in guests.items() for wrong in report.judge(*pair)]
    for name, (_, guest) in guests.items():
        for complaint in report.kernel_complaints(guest):
            say(f"\n{name}: the kernel itself complained: {complaint}")
    for name, wrong in failures:
        say(f"\nFAILED {name}: {wrong}")
    if failures:
        return 1
    if not chosen.kernel and len(guests) < ENOUGH:
        print(f"vm_matrix: only {len(guests)} kernels can be had; see tests/kernels.toml", file=sys.stderr)
        return 2
    document = README.read_text(encoding="utf-8")
    renewed = report.put_into(document, table)
    if chosen.write:
        README.write_text(renewed, encoding="utf-8")
    elif not chosen.kernel and not chosen.pytest and renewed != document:
        say("\nREADME.md shows another matrix: scripts/vm_matrix --write renews it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
