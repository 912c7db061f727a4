"""Probing: what is there, what is denied, what is switched off; by doing, and without a trace."""

from __future__ import annotations

import gc
import os
import platform
import threading
from errno import EACCES, EFAULT, ENOSYS, EPERM
from pathlib import Path
from typing import Any

import pytest
from agreement import check
from conftest import lacking, run_child

from pagemapcompat import (
    AccessError,
    DirtyTracker,
    Feature,
    InvalidArgumentError,
    KernelError,
    ProbeResult,
    UnsupportedError,
    probe,
)
from pagemapcompat.probe import BACKEND_NAMES

STATES = {"yes", "no", "denied", "disabled", "unknown"}


def test_every_feature_has_an_answer() -> None:
    """One of five, with a sentence; true for yes alone; with what to do for anything else."""
    report = probe(refresh=True)
    assert list(report) == list(Feature)
    assert len(report) == len(Feature)
    for feature, result in report.items():
        assert result.feature is feature
        assert result.state in STATES
        assert bool(result) == (result.state == "yes")
        assert result.detail
        assert (result.hint is None) == (result.state == "yes"), result
        assert feature.value in str(result)
        assert result.state in str(result)
        assert report.supports(feature) == bool(result)
        if result.state == "denied":
            assert result.errno in (EPERM, EACCES, EFAULT), result


@pytest.mark.parametrize("state", sorted(STATES))
def test_truth(state: Any) -> None:
    """Only yes is true."""
    assert bool(ProbeResult(Feature.PAGEMAP, state, None, "so it is", None)) == (state == "yes")


def test_plain_values() -> None:
    """as_dict holds nothing but names, numbers' names and text, for JSON."""
    report = probe()
    plain = report.as_dict()
    assert list(plain) == [feature.value for feature in Feature]
    for answer in plain.values():
        assert set(answer) == {"state", "errno", "detail", "hint"}
        assert all(value is None or isinstance(value, str) for value in answer.values())


def test_require() -> None:
    """Raises for the first that is not there, with its errno, sentence and hint."""
    report = probe()
    there = [feature for feature in Feature if report[feature]]
    report.require(*there)
    assert report.supports(*there)
    for feature in set(Feature) - set(there):
        kind = AccessError if report[feature].state == "denied" else UnsupportedError
        with pytest.raises(kind) as caught:
            report.require(*there, feature)
        assert feature.value in str(caught.value)
        assert caught.value.hint == report[feature].hint
        assert not report.supports(*there, feature)


# -- Switching off -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", list(Feature), ids=lambda feature: feature.value)
def test_each_can_be_disabled(feature: Feature, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so and is listed; whatever does not build on it is as before."""
    before = probe()
    monkeypatch.setenv("PAGEMAPCOMPAT_DISABLE", feature.value)
    report = probe()
    assert report.disabled == {feature.value}
    result = report[feature]
    assert (result.state, result.errno, bool(result)) == ("disabled", None, False)
    assert "PAGEMAPCOMPAT_DISABLE" in result.detail
    assert "PAGEMAPCOMPAT_DISABLE" in (result.hint or "")
    for other in set(Feature) - {feature}:
        assert report[other].state in (before[other].state, "unknown"), other
    with pytest.raises(UnsupportedError, match=feature.value):
        report.require(feature)
    monkeypatch.delenv("PAGEMAPCOMPAT_DISABLE")
    assert {f: r.state for f, r in probe().items()} == {f: r.state for f, r in before.items()}


def test_all_can_be_disabled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spaces and empty names between the commas mean nothing."""
    names = {feature.value for feature in Feature} | set(BACKEND_NAMES)
    monkeypatch.setenv("PAGEMAPCOMPAT_DISABLE", " , ".join(sorted(names)) + ",")
    report = probe()
    assert report.disabled == names
    assert {result.state for result in report.values()} == {"disabled"}


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_disabling_one_backend_leaves_the_other(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that old paths can be run on new kernels, and new ones alone."""
    working = []
    for name in BACKEND_NAMES:
        try:
            DirtyTracker(name).close()
        except KernelError as error:
            lacking(name, str(error), error.hint or "none")
        working.append(name)
    monkeypatch.setenv("PAGEMAPCOMPAT_DISABLE", backend)
    (other,) = set(working) - {backend}
    with DirtyTracker() as tracker:
        assert tracker.selection.chosen == other
    with pytest.raises(UnsupportedError, match=backend):
        DirtyTracker(backend)


# -- The cache ---------------------------------------------------------------------------------------------------


def test_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same report until it is refreshed or the environment changes; an old one keeps its answers."""
    first = probe()
    assert probe() is first
    second = probe(refresh=True)
    assert second is not first
    assert probe() is second
    monkeypatch.setenv("PAGEMAPCOMPAT_DISABLE", "pagemap")
    third = probe()
    assert third is not second
    assert probe() is third
    assert second[Feature.PAGEMAP].state != "disabled"
    monkeypatch.setenv("PAGEMAPCOMPAT_DISABLE", "nonsense")
    with pytest.raises(InvalidArgumentError, match="nonsense"):
        probe()
    monkeypatch.delenv("PAGEMAPCOMPAT_DISABLE")
    assert probe()[Feature.PAGEMAP].state == second[Feature.PAGEMAP].state


def test_a_forked_child_asks_again() -> None:
    """Its report is its own, even when another thread was probing at the moment of the fork."""
    run_child(
        """
        import os, threading
        from pagemapcompat import probe
        report = probe()
        stop = threading.Event()
        def busy():
            while not stop.is_set():
                probe(refresh=True)
        thread = threading.Thread(target=busy)
        thread.start()
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                fresh = probe()
                os._exit(0 if fresh is not report and probe() is fresh and len(fresh) == len(report) else 1)
            assert os.waitpid(pid, 0)[1] == 0
        stop.set()
        thread.join()
        report = probe()
        pid = os.fork()
        if pid == 0:
            os._exit(0 if probe() is not report else 1)
        assert os.waitpid(pid, 0)[1] == 0
        """,
        env={"PYTHONWARNINGS": "ignore::DeprecationWarning"},
    )


def test_leaves_no_trace() -> None:
    """No descriptor, no thread, and after twenty rounds no more mappings than after one."""

    def state() -> tuple[list[str], set[str], int]:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            mappings = len(maps.readlines())
        return sorted(os.listdir("/proc/self/fd")), set(os.listdir("/proc/self/task")), mappings

    probe(refresh=True)
    gc.collect()  # what earlier tests left to it would go meanwhile
    before = state()
    for _ in range(20):
        probe(refresh=True)
    after = state()
    assert after[0] == before[0]
    assert after[1] <= before[1]  # threads of earlier tests may still be ending
    assert after[2] <= before[2] + 2  # the allocator's own, now and then


def test_four_threads_at_once() -> None:
    """They all get the same answers, and leave no descriptor."""
    expected = probe(refresh=True)
    descriptors = sorted(os.listdir("/proc/self/fd"))
    start = threading.Barrier(4)
    seen: list[Any] = []

    def work() -> None:
        start.wait()
        seen.extend(probe(refresh=True) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 20
    assert len({id(report) for report in seen}) == 20
    assert all(dict(report) == dict(expected) for report in seen)
    assert sorted(os.listdir("/proc/self/fd")) == descriptors


# -- Little room ---------------------------------------------------------------------------------------------------


def test_with_few_descriptors_nothing_is_guessed() -> None:
    """What could not be tried is unknown, never "no"; nothing leaks; and once there is room, it is asked again."""
    run_child(
        """
        import errno, os, resource
        from pagemapcompat import DirtyTracker, KernelError, probe
        DirtyTracker().close()
        whole = {feature.value: result.state for feature, result in probe(refresh=True).items()}
        before = sorted(os.listdir("/proc/self/fd"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(before) - 1
        for room in range(8):
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + room, hard))
            found = {feature.value: result for feature, result in probe(refresh=True).items()}
            try:
                DirtyTracker().close()
            except KernelError as error:
                refused = error
            else:
                refused = None
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            # Not "unsupported", nor "denied", by which a program would give up for good.
            assert refused is None or (type(refused), refused.errno) == (KernelError, errno.EMFILE), (room, refused)
            for name, result in found.items():
                assert result.state in (whole[name], "unknown"), (room, name, result, whole[name])
                if result.state != whole[name] and result.errno is not None:
                    assert result.errno == errno.EMFILE, (room, name, result)
            assert sorted(os.listdir("/proc/self/fd")) == before, room
            assert {feature.value: result.state for feature, result in probe().items()} == whole, room
        """
    )


def test_interrupts_leave_nothing_behind() -> None:
    """A signal handler that raises wherever it strikes."""
    run_child(
        """
        import os, random, signal
        from pagemapcompat import probe
        class Struck(Exception):
            pass
        def strike(number, frame):
            raise Struck
        probe(refresh=True)
        before = sorted(os.listdir("/proc/self/fd"))
        signal.signal(signal.SIGALRM, strike)
        dice, struck = random.Random(6), 0
        for _ in range(150):
            try:
                signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-4, 5e-3))
                probe(refresh=True)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Struck:
                struck += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        while len(os.listdir("/proc/self/task")) > 1:
            os.sched_yield()
        assert sorted(os.listdir("/proc/self/fd")) == before
        assert struck
        """
    )


def test_a_fork_beside_a_round_inherits_nothing_of_it() -> None:
    """A child would keep its descriptors for ever: the fork waits."""
    run_child(
        """
        import os, threading
        from pagemapcompat import probe
        probe(refresh=True)
        before = sorted(os.listdir("/proc/self/fd"))
        stop = threading.Event()
        def busy():
            while not stop.is_set():
                probe(refresh=True)
        thread = threading.Thread(target=busy)
        thread.start()
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                os._exit(0 if sorted(os.listdir("/proc/self/fd")) == before else 1)
            assert os.waitpid(pid, 0)[1] == 0
        stop.set()
        thread.join()
        """,
        env={"PYTHONWARNINGS": "ignore::DeprecationWarning"},
    )


@pytest.mark.parametrize(
    "setting",
    [
        'libc.prctl(15, "prüf\\xff".encode("latin-1"), 0, 0, 0)  # PR_SET_NAME: any bytes',
        "libc.mlockall(2)  # MCL_FUTURE: every new page is populated and locked",
        "libc.mlockall(6)  # and MCL_ONFAULT",
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",
        "os.chdir('/proc/self')",
    ],
    ids=["name", "mlockall", "mlockall-onfault", "file-size", "folder"],
)
def test_odd_processes_get_the_same_answers(setting: str) -> None:
    """Names that are no text, locked memory, no files to be written: at worst an answer becomes unknown."""
    run_child(
        f"""
        import ctypes, os, resource, signal
        from pagemapcompat import probe
        libc = ctypes.CDLL(None)
        before = {{feature.value: result.state for feature, result in probe(refresh=True).items()}}
        {setting}
        after = {{feature.value: result.state for feature, result in probe(refresh=True).items()}}
        changed = {{name: state for name, state in after.items() if state != before[name]}}
        assert set(changed) <= {{"uffd-wp-memfd", "uffd-wp-shared-file"}}, changed
        assert set(changed.values()) <= {{"unknown"}}, changed
        """
    )


# -- Denied ------------------------------------------------------------------------------------------------------

NOBODY = """
import ctypes, errno, os, struct, sys
from conftest import *
from agreement import check
from pagemapcompat import *

libc_ = ctypes.CDLL(None, use_errno=True)

def nobody():
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)

def only_ptrace():
    "CAP_SYS_PTRACE, and nothing else that root has."
    assert libc_.prctl(8, 1, 0, 0, 0) == 0  # PR_SET_KEEPCAPS
    nobody()
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    caps = 1 << 19
    data = struct.pack("6I", caps, caps, 0, 0, 0, 0)
    assert libc_.capset(header, data) == 0, ctypes.get_errno()
    dumpable(True)

def dumpable(yes):
    assert libc_.prctl(4, int(yes), 0, 0, 0) == 0  # PR_SET_DUMPABLE

def refuse(number, error, with_flags=True):
    "A seccomp filter: system call *number* fails with *error*; or only when its first argument is even."
    class Filter(ctypes.Structure):
        _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]
    class Program(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Filter))]
    load, equal, test, ret = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_RET|K
    allow = Filter(ret, 0, 0, 0x7FFF0000)
    deny = Filter(ret, 0, 0, 0x00050000 | error)
    lines = [Filter(load, 0, 0, 0), Filter(equal, 0, 1 if with_flags else 3, number)]
    if not with_flags:
        lines += [Filter(load, 0, 0, 16), Filter(test, 1, 0, 1)]  # args[0], low half on a little-endian machine
    lines += [deny, allow]
    program = Program(len(lines), (Filter * len(lines))(*lines))
    assert libc_.prctl(38, 1, 0, 0, 0) == 0, ctypes.get_errno()  # PR_SET_NO_NEW_PRIVS
    if libc_.prctl(22, 2, ctypes.byref(program), 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        print("NO SECCOMP", errno.errorcode[ctypes.get_errno()])
        sys.exit(0)

def states():
    return {feature.value: (result.state, result.errno) for feature, result in probe(refresh=True).items()}
"""


def test_without_privileges_things_are_denied() -> None:
    """Not absent: what root may do here and nobody may not is denied, with the errno and a remedy."""
    printed = run_child(
        NOBODY
        + """
mighty = os.geteuid() == 0
before = states()
nobody()
dumpable(True)
after = states()
sysctl = "/proc/sys/vm/unprivileged_userfaultfd"
allowed = os.path.exists(sysctl) and open(sysctl).read().strip() == "1"
if not allowed and before["uffd-syscall"][0] != "no":
    assert after["uffd-syscall"] == ("denied", errno.EPERM), after
device = "/dev/userfaultfd"
if os.path.exists(device) and not os.access(device, os.R_OK | os.W_OK):
    assert after["uffd-device"] == ("denied", errno.EACCES), after
for name, (state, _) in before.items():
    if state == "yes":
        assert after[name][0] in ("yes", "denied", "unknown"), (name, after[name])
assert after["pagemap"] == ("yes", None), after
privileged = {"uffd-syscall", "uffd-device", "uffd-event-fork", "uffd-wp-kernel-writes", "pagemap-pfn"}
if before["uffd-user-mode-only"][0] == "yes":
    assert after["uffd-user-mode-only"] == ("yes", None)
    for feature in set(before) - privileged:
        assert after[feature] == before[feature], feature
check()
for result in probe().values():
    assert result.state == "yes" or result.hint, result

dumpable(False)
if not os.access("/proc/self/pagemap", os.R_OK):
    hidden = states()
    assert hidden["pagemap"] == ("denied", errno.EACCES), hidden
    assert "PR_SET_DUMPABLE" in probe()[Feature.PAGEMAP].hint
    assert "PR_SET_DUMPABLE" in probe()[Feature.PAGEMAP_SCAN].hint
    assert hidden["pagemap-scan"][0] == "unknown"
    check()
    dumpable(True)
    assert states() == after
print("mighty" if mighty else "humble")
"""
    )
    assert printed.strip() == ("mighty" if os.geteuid() == 0 else "humble")


USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
"""The number of the system call, arch/*/entry/syscalls and include/uapi/asm-generic/unistd.h."""


def userfaultfd_number() -> int:
    """Of the machine that this runs on."""
    machine = platform.machine()
    if machine not in USERFAULTFD:
        lacking("seccomp", f"the system call's number on {machine} is not known (ENOSYS)", "add it to the table")
    return USERFAULTFD[machine]


def under_a_filter(program: str, *arguments: int) -> None:
    """Run a child that calls refuse()."""
    printed = run_child(NOBODY + program, *map(str, arguments))
    if "NO SECCOMP" in printed:
        lacking("seccomp", printed.split()[-1], "a kernel with CONFIG_SECCOMP_FILTER, and a container that allows it")
    assert printed.strip() == "done"


@pytest.mark.parametrize("error", [EPERM, ENOSYS], ids=["EPERM", "ENOSYS"])
def test_a_container_that_refuses_userfaultfd(error: int) -> None:
    """Denied for EPERM, absent for ENOSYS; each tracker's error names the call and the errno, and leaves nothing."""
    under_a_filter(
        """
number, error = int(sys.argv[1]), int(sys.argv[2])
nobody()
dumpable(True)
device = os.access("/dev/userfaultfd", os.R_OK | os.W_OK)
before = states()
refuse(number, error)
after = states()
state = "denied" if error == errno.EPERM else "no"
assert after["uffd-syscall"] == after["uffd-user-mode-only"] == (state, error), after
descriptors, threads = sorted(os.listdir("/proc/self/fd")), set(os.listdir("/proc/self/task"))
if not device:
    absent = error == errno.ENOSYS and after["uffd-device"][0] == "no"
    assert after["uffd-wp-anonymous"][0] == ("no" if absent else "unknown"), after
    assert "seccomp" in probe()[Feature.UFFD_WP].hint
    for name in ("auto", "pagemap-scan", "uffd-wp"):
        try:
            DirtyTracker(name)
        except KernelError as caught:
            kind = AccessError if error == errno.EPERM else UnsupportedError
            assert isinstance(caught, kind), (name, repr(caught))
            assert "userfaultfd" in str(caught), caught
            assert errno.errorcode[error] in str(caught), (name, str(caught))
            assert caught.errno == error, (name, repr(caught))
            assert "seccomp" in caught.hint, caught.hint
        else:
            raise AssertionError(name)
        assert sorted(os.listdir("/proc/self/fd")) == descriptors
        assert set(os.listdir("/proc/self/task")) <= threads
check()
print("done")
""",
        userfaultfd_number(),
        error,
    )


def test_with_the_syscall_refused_the_device_is_used() -> None:
    """By both backends, whoever may open it; both say what was tried before."""
    if not os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        there = os.path.exists("/dev/userfaultfd")
        lacking("uffd-device", "EACCES" if there else "ENOENT", "run as root" if there else "Linux 6.1 or newer")
    under_a_filter(
        """
refuse(int(sys.argv[1]), errno.EPERM)
assert states()["uffd-device"] == ("yes", None)
check()
working = 0
for name in ("pagemap-scan", "uffd-wp"):
    try:
        tracker = DirtyTracker(name)
    except UnsupportedError:
        continue
    working += 1
    with tracker:
        assert tracker.selection.userfaultfd[-1] == "/dev/userfaultfd: ok", tracker.selection
        assert any("userfaultfd(" in tried and "EPERM" in tried for tried in tracker.selection.userfaultfd[:-1])
        assert Guarantee.KERNEL_WRITES in tracker.selection.guarantees
        memory = private(4)
        with tracker.track(memory) as ram:
            assert write(memory, 2) == pages_of(ram.collect())
assert working
print("done")
""",
        userfaultfd_number(),
    )


def test_with_one_capability_alone() -> None:
    """CAP_SYS_PTRACE opens the system call in full, and nothing else that root has."""
    if os.geteuid() != 0:
        lacking("root", "privileges cannot be given up that are not there (EPERM)", "run as root")
    printed = run_child(
        NOBODY
        + """
before = states()
only_ptrace()
after = states()
for name in ("uffd-syscall", "uffd-event-fork", "uffd-wp-kernel-writes", "pagemap"):
    assert after[name] == before[name], (name, after[name])
assert probe().limits.capabilities == ("CAP_SYS_PTRACE",)
assert after["pagemap-pfn"] == ("denied", errno.EPERM), after["pagemap-pfn"]
check()
print("done")
"""
    )
    assert printed.strip() == "done"


def test_private_files_are_tried_wherever_the_package_lies(tmp_path: Path) -> None:
    """With a file of it, of any size; where that is in memory, gone, or out of reach by now, with another."""
    small = tmp_path / "small"
    small.write_bytes(b"1")
    printed = run_child(
        NOBODY
        + """
import tempfile
from pagemapcompat import trials_kinds

def answered(path):
    trials_kinds.__file__ = path
    found = states()
    assert found["uffd-wp-private-file"] == found["uffd-wp-shared-file"], (path, found)

answered(sys.argv[1])
answered(sys.argv[1] + "-and-gone")
if os.access("/dev/shm", os.W_OK):
    with tempfile.NamedTemporaryFile(dir="/dev/shm", buffering=0) as file:
        file.write(bytes(1 << 16))
        answered(file.name)
os.chmod(os.path.dirname(sys.argv[1]), 0)
nobody()
dumpable(True)
answered(sys.argv[1])
check()
print("done")
""",
        str(small),
    )
    assert printed.strip() == "done"


@pytest.mark.kernel
def test_probe_says_what_the_library_does() -> None:
    """Whoever runs this: each answer is held against what the trackers and Pagemap then do."""
    states = check()
    assert sum(states.values()) == len(Feature)
    assert states["yes"]


def test_with_full_userfaultfds_refused_user_mode_is_used() -> None:
    """By uffd-wp, which then does not claim KERNEL_WRITES, and says why."""
    if not probe()[Feature.UFFD_USER_MODE_ONLY]:
        lacking("uffd-user-mode-only", str(probe()[Feature.UFFD_USER_MODE_ONLY]), "Linux 5.11 or newer")
    under_a_filter(
        """
nobody()
dumpable(True)
refuse(int(sys.argv[1]), errno.EPERM, with_flags=False)
if os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
    os.environ["PAGEMAPCOMPAT_DISABLE"] = "uffd-device"
assert states()["uffd-wp-kernel-writes"] == ("denied", errno.EFAULT)
check()
with DirtyTracker("uffd-wp") as tracker:
    assert "UFFD_USER_MODE_ONLY" in tracker.selection.userfaultfd[-1], tracker.selection
    assert tracker.selection.userfaultfd[0] == "userfaultfd(): EPERM", tracker.selection
    assert Guarantee.KERNEL_WRITES not in tracker.selection.guarantees
    memory = private(4)
    with tracker.track(memory) as ram:
        assert write(memory, 2) == pages_of(ram.collect())
try:
    DirtyTracker("uffd-wp", require=Guarantee.KERNEL_WRITES)
except UnsupportedError as error:
    assert "KERNEL_WRITES" in str(error) and "vm.unprivileged_userfaultfd" in error.hint, error
else:
    raise AssertionError
print("done")
""",
        userfaultfd_number(),
    )
