"""Runs inside a guest: says what the library finds there, runs the tests marked `kernel`, and tells every outcome.

    python guest.py SETTINGS root|nobody

One line of JSON an event goes to the second serial port; what pytest prints goes to the console.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import struct
import sys
from errno import errorcode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import io
    from collections.abc import Generator

NOBODY = 65534
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 4, 22, 38, 2
PAGEMAP_SCAN, PROCMAP_QUERY = 0xC0606610, 0xC0686611
SYS_ioctl, ENOTTY = 16, 25
BACKENDS = ("pagemap-scan", "uffd-wp")


def refuse_ioctls() -> None:
    """Answer ENOTTY to PAGEMAP_SCAN and PROCMAP_QUERY, as kernels do that have neither."""
    load, equal, answer = 0x20, 0x15, 0x06
    number, request = 0, 24  # offsets in struct seccomp_data: the call, and the low half of its second argument
    program = [
        (load, 0, 0, number),
        (equal, 0, 4, SYS_ioctl),
        (load, 0, 0, request),
        (equal, 1, 0, PAGEMAP_SCAN),
        (equal, 0, 1, PROCMAP_QUERY),
        (answer, 0, 0, 0x00050000 | ENOTTY),
        (answer, 0, 0, 0x7FFF0000),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_, 0, 0)):
        if libc.prctl(*call):
            raise OSError(ctypes.get_errno(), "prctl")


def become_nobody() -> None:
    """Give up every privilege, and stay as readable to itself as a process that nobody started."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


class Results:
    """A plugin of pytest that tells each outcome as it is known, so that a guest that dies leaves what came before."""

    def __init__(self, out: io.FileIO, who: str) -> None:
        self._out = out
        self._who = who

    def tell(self, **event: object) -> None:
        """One event."""
        self._out.write(f"{json.dumps({'who': self._who, **event})}\n".encode())  # at once: the other user tells too

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """How many outcomes there will be."""
        self.tell(collected=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """What runs when a guest hangs."""
        self.tell(starts=nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """An outcome: of the call, and of a set-up or tear-down that did not pass."""
        report = yield
        if call.when == "call" or report.outcome != "passed":
            parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
            backend = next((value.backend for value in parameters if hasattr(value, "backend")), None)
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self.tell(
                test=item.nodeid,
                backend=backend,
                outcome=report.outcome,
                seconds=round(report.duration, 1),
                why=why.removeprefix("Skipped: "),
            )
        return report


def findings() -> dict[str, Any]:
    """What the library says of this kernel."""
    # Only once the privileges are what they shall be.
    import pagemapcompat  # noqa: PLC0415
    from pagemapcompat.cli_probe import find  # noqa: PLC0415

    backends: dict[str, Any] = {}
    for name in BACKENDS:
        try:
            with pagemapcompat.DirtyTracker(name) as tracker:
                backends[name] = sorted(str(guarantee.name) for guarantee in tracker.selection.guarantees)
        except pagemapcompat.KernelError as error:
            backends[name] = f"{errorcode.get(error.errno or 0, error.errno)}: {error.strerror}"
    features = {name: answer["state"] for name, answer in find().report.as_dict().items()}
    # Debian's names say less than the release they were built from: "5.10.0-46-cloud-amd64" is 5.10.262.
    built_from = re.search(r"Debian (\d[\d.]*\d)", os.uname().version)
    return {"release": built_from[1] if built_from else os.uname().release, "features": features, "backends": backends}


def main() -> int:
    """Run one of the two users' halves."""
    settings, who = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    os.environ["PAGEMAPCOMPAT_DISABLE"] = ",".join(settings["disable"])
    os.environ["PAGEMAPCOMPAT_TEST_SECONDS"] = "300"
    os.environ["PAGEMAPCOMPAT_TEST_ROUNDS"] = "0.4"
    os.environ["PAGEMAPCOMPAT_TEST_EXPECT"] = ",".join(settings["expect"][who])
    with open("/dev/ttyS1", "wb", buffering=0) as out:
        if settings["refuse_ioctls"]:
            refuse_ioctls()
        if who == "nobody":
            become_nobody()
        results = Results(out, who)
        results.tell(**findings())
        options = ["-q", "-p", "no:cacheprovider", "--tb=short", "--color=no", "-o", "faulthandler_timeout=300"]
        options += ["-m", "kernel and not (imitated or anywhere)", *settings["pytest"]]
        status = pytest.main([*options, "tests"], [results])
        mine, children = os.times()[:2], os.times()[2:4]
        results.tell(status=int(status), cpu=round(sum(mine) + sum(children)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
