"""`pagemapcompat scan`: what it says of real processes, against what these really did; and how it ends."""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from children import in_child
from conftest import CHILD_SECONDS, PAGE, disable, lacking

from pagemapcompat import Feature, PageCategory, cli_scan, probe

COLUMNS = ("present", "swapped", "file", "huge", "guard", "written")

NOTE = "(pagemapcompat scan: cannot be told here, .+\n)?"
"""What it may say beside a table or CSV of regions."""

TARGET = """
import ctypes, json, mmap, sys
from pagemapcompat import DirtyTracker, KernelError

PAGE, PRIVATE = mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
facts = {}

def make(name, pages, fd=-1, flags=PRIVATE):
    memory = mmap.mmap(fd, pages * PAGE, flags=flags)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    facts[name] = [start, start + pages * PAGE]
    return memory

def write(memory, *pages):
    for page in pages:
        memory[page * PAGE] = 1

with open("/proc/self/comm", "w") as comm:
    comm.write("a) Z 1 (b")
anonymous = make("anonymous", 16)
write(anonymous, 4, 5, 9)
with open(sys.argv[1], "r+b") as file:
    shared = make("file", 8, file.fileno(), mmap.MAP_SHARED)
    file.truncate(2 * PAGE)
write(shared, 0, 1)
guarded = make("guarded", 8)
write(guarded, *range(8))
try:
    guarded.madvise(102, 2 * PAGE, 3 * PAGE)
except OSError:
    del facts["guarded"]
tracked = make("tracked", 16)
try:
    ram = DirtyTracker("pagemap-scan").track(tracked)
    write(tracked, 3, 7)
except KernelError:
    del facts["tracked"]
print(json.dumps(facts), flush=True)
sys.stdin.read()
"""
"""Goes by a name made to be misread in /proc/PID/stat. Its file has two pages: of more, kernels map some unasked."""

SPARSE = """
import ctypes, mmap, os, sys
memory = mmap.mmap(-1, 8 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.readline()
os.execv(sys.executable, [sys.executable, "-c", "import sys; sys.stdin.read()"])
"""
"""8 TiB without a page: minutes of work for whoever reads words."""

MANY = """
import ctypes, mmap, sys
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 10_000 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
mprotect = ctypes.CDLL(None, use_errno=True).mprotect
mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
for at in range(0, 10_000, 2):
    memory[at * page] = 1
    assert mprotect(start + at * page, page, mmap.PROT_READ) == 0, ctypes.get_errno()
print(start, flush=True)
sys.stdin.read()
"""

RESTLESS = """
import mmap, threading

def churn():
    while True:
        mmap.mmap(-1, 64 * mmap.PAGESIZE).close()

threading.Thread(target=churn, daemon=True).start()
print(flush=True)
input()
"""


def command(*arguments: str) -> list[str]:
    """The command line that runs `pagemapcompat scan`."""
    return [sys.executable, "-m", "pagemapcompat", "scan", *arguments]


def scan(*arguments: object, status: int = cli_scan.EXIT_OK) -> str:
    """What it prints; or, where it is to fail, the one line that says why."""
    done = subprocess.run(
        command(*map(str, arguments)), capture_output=True, text=True, timeout=CHILD_SECONDS, check=False
    )
    assert done.returncode == status, done.stderr
    if status == cli_scan.EXIT_OK:
        assert re.fullmatch(NOTE, done.stderr), done.stderr
        return done.stdout
    assert done.stdout == ""
    assert re.fullmatch(r"pagemapcompat scan: .+\n", done.stderr), done.stderr
    return done.stderr


def by_json(*arguments: object) -> dict[str, Any]:
    """Its JSON."""
    report: dict[str, Any] = json.loads(scan(*arguments, "--format=json"))
    return report


def by_csv(*arguments: object) -> list[dict[str, str]]:
    """The rows of its CSV."""
    return list(csv.DictReader(io.StringIO(scan(*arguments, "--format=csv"), newline="")))


def by_table(*arguments: object) -> list[list[str]]:
    """The rows of its table, header and total included."""
    return [re.split(r"\s{2,}", line) for line in scan(*arguments).splitlines()]


def size_of(text: str) -> int:
    """The bytes that a cell of a table says."""
    number, _, unit = text.partition(" ")
    return int(number) << {"": 0, "KiB": 10, "MiB": 20, "GiB": 30}[unit]


@contextlib.contextmanager
def process(code: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """Another process, and what it says when it is ready. It ends when it is let go."""
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            ready, _, _ = select.select([child.stdout], [], [], CHILD_SECONDS)
            said = child.stdout.readline() if ready else ""
            assert said, "the child did not get ready"
            yield child, json.loads(said) if said.strip() else None
        finally:
            child.kill()


class Target:
    """A process, and where its memory lies."""

    def __init__(self, pid: int, path: str, facts: dict[str, tuple[int, int]]) -> None:
        self.pid = pid
        self.path = path
        self._facts = facts

    def range(self, name: str, first: int = 0, count: int | None = None) -> str:
        """Some pages of it, as the command line takes them."""
        if name not in self._facts:
            lacking(
                f"scan-{name}", "the process could not have such memory", "a kernel with PAGEMAP_SCAN and MADV_GUARD"
            )
        start, end = self._facts[name]
        at = start + first * PAGE
        return f"{at:08x}-{end if count is None else at + count * PAGE:08x}"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """One process for all tests that only look."""
    directory = tmp_path_factory.mktemp("scan")
    name = os.fsencode(directory) + b"/a (b)  c\n\x1b[31m\xff"
    Path(os.fsdecode(name)).write_bytes(bytes(8 * PAGE))
    with process(TARGET, os.fsdecode(name)) as (child, facts):
        yield Target(child.pid, f"{directory}/a (b)  c\\012\x1b[31m\\xff", facts)


@pytest.fixture(params=["ioctl", "words"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where answers come from, as the JSON calls it."""
    return use(request.param, monkeypatch)


def use(which: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have answers from the ioctl, or a skip, or from words."""
    if which == "words":
        disable(monkeypatch, "pagemap-scan")
        return "pagemap words"
    answer = probe()[Feature.PAGEMAP_SCAN]
    if not answer:
        lacking("pagemap-scan", answer.detail, answer.hint or "none")
    return "PAGEMAP_SCAN"


@pytest.fixture
def ioctl(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what it alone can tell."""
    use("ioctl", monkeypatch)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what they cannot tell."""
    use("words", monkeypatch)


# -- What it says ----------------------------------------------------------------------------------------------


def test_another_process(source: str, target: Target) -> None:
    """Of 16 pages three are in use; the report says whom it asked, and how."""
    report = by_json(target.pid, target.range("anonymous"))
    assert (report["schema"], report["pid"], report["source"]) == (1, target.pid, source)
    (row,) = report["mappings"]
    assert f"{row['start']}-{row['end']}" == target.range("anonymous")
    assert (row["permissions"], row["path"]) == ("rw-p", "")
    assert [row[name] for name in ("size", "present", "swapped", "file")] == [16 * PAGE, 3 * PAGE, 0, 0]


def test_regions(source: str, target: Target) -> None:
    """A row a run of equal pages, in all three formats; together they are the memory that was asked about."""
    asked = (target.pid, target.range("anonymous"), "--regions")
    report = by_json(*asked)
    assert (report["pid"], report["source"]) == (target.pid, source)
    rows = report["regions"]
    assert [(row["pages"], "present" in row["categories"]) for row in rows] == [
        (4, False), (2, True), (3, False), (1, True), (6, False)
    ]  # fmt: skip
    ends = [row["end"] for row in rows]
    assert [row["start"] for row in rows] + ends[-1:] == [target.range("anonymous").split("-")[0], *ends]
    if source == "PAGEMAP_SCAN":
        texts = [[row["start"], row["end"], str(row["pages"]), " ".join(row["categories"])] for row in rows]
        assert [list(row.values()) for row in by_csv(*asked)] == texts
        assert by_table(*asked)[1:] == [[f"{a}-{b}", pages, names or "-"] for a, b, pages, names in texts]


def test_a_row_for_every_mapping(source: str, target: Target) -> None:
    """As /proc/PID/maps has them, [vsyscall] excepted, and each with what is in it."""
    lines = Path(f"/proc/{target.pid}/maps").read_text("utf-8", errors="backslashreplace").splitlines()
    wanted = [line.split(maxsplit=5) for line in lines if not line.endswith("[vsyscall]")]
    rows = by_json(target.pid)["mappings"]
    assert [[f"{row['start']}-{row['end']}", row["permissions"], row["path"]] for row in rows] == [
        [fields[0], fields[1], fields[5] if len(fields) > 5 else ""] for fields in wanted
    ]
    assert all(0 <= row["present"] <= row["size"] for row in rows)
    assert sum(row["present"] for row in rows) > PAGE


def test_the_three_formats_agree(source: str, target: Target) -> None:
    """Bytes in JSON and CSV, the same in KiB and more in the table, which adds them up."""
    rows = by_json(target.pid)["mappings"]
    assert [list(row.values()) for row in by_csv(target.pid)] == [
        ["" if value is None else str(value) for value in row.values()] for row in rows
    ]
    header, *table, total = by_table(target.pid)
    assert header == ["ADDRESS", "PERM", "SIZE", *(name.upper() for name in COLUMNS), "PATH"]
    for row, cells in zip(rows, table, strict=True):
        assert cells[:2] == [f"{row['start']}-{row['end']}", row["permissions"]]
        for name, cell in zip(("size", *COLUMNS), cells[2:], strict=False):
            assert cell in ("?", "-") if row[name] is None else size_of(cell) == row[name]
    assert total[0] == "total"
    for name, cell in zip(("size", *COLUMNS), total[1:], strict=True):
        known = [row[name] for row in rows if row[name] is not None]
        assert size_of(cell) == sum(known) if known else cell in ("?", "-")


def test_files(source: str, target: Target) -> None:
    """Pages of a file are told from anonymous ones; its name is said as it is, but cannot write to a terminal."""
    asked = (target.pid, target.range("file"))
    (row,) = by_json(*asked)["mappings"]
    assert (row["permissions"], row["path"]) == ("rw-s", target.path)
    assert [row[name] for name in ("size", "present", "file")] == [8 * PAGE, 2 * PAGE, 2 * PAGE]
    assert by_csv(*asked)[0]["path"] == target.path
    assert scan(*asked).splitlines()[1].endswith(target.path.replace("\x1b", r"\x1b"))


def test_a_name_with_a_carriage_return(tmp_path: Path) -> None:
    """Ends no row."""
    path = tmp_path / "a\rb"
    path.write_bytes(bytes(PAGE))
    code = "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); print(flush=True); input()"
    with process(code, str(path)) as (child, _):
        printed = subprocess.run(command(str(child.pid), "--format=csv"), stdout=subprocess.PIPE, check=True).stdout
        rows = list(csv.DictReader(io.StringIO(printed.decode(), newline="")))
        assert [row["path"] for row in rows] == [row["path"] for row in by_json(child.pid)["mappings"]]
        assert str(path) in [row["path"] for row in rows]


def test_itself_where_proc_is_of_another_pid_namespace() -> None:
    """It has another pid there than it thinks; "self" is itself."""
    unshared = ["unshare", "--pid", "--fork"]
    try:
        subprocess.run([*unshared, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        lacking("pid-namespace", f"unshare --pid: {error}", "run as root, with unshare (util-linux)")
    for arguments in (command("self"), [*command()[:-1], "probe", "--pid", "self"]):
        program = [*unshared, *arguments, "--format=json"]
        done = subprocess.run(program, capture_output=True, timeout=CHILD_SECONDS, check=True)
        report = json.loads(done.stdout)
        assert report["pid"] == 1
        if "mappings" in report:
            assert os.path.realpath(sys.executable) in {row["path"] for row in report["mappings"]}


def test_written_pages_of_tracked_memory(ioctl: None, target: Target) -> None:
    """They are counted where the memory is tracked; of other memory nobody knows, and it says so."""
    (row,) = by_json(target.pid, target.range("tracked"))["mappings"]
    assert (row["present"], row["written"]) == (2 * PAGE, 2 * PAGE)
    only = by_json(target.pid, target.range("tracked"), "--regions", "--only=written,wpallowed")
    start = int(target.range("tracked").split("-")[0], 16)
    assert [((int(row["start"], 16) - start) // PAGE, row["pages"]) for row in only["regions"]] == [(3, 1), (7, 1)]
    (row,) = by_json(target.pid, target.range("anonymous"))["mappings"]
    assert row["written"] is None
    assert by_table(target.pid, target.range("anonymous"))[1][8] == "-"


def test_guard_pages(source: str, target: Target) -> None:
    """Three of eight, and they are not present any more."""
    report = by_json(target.pid, target.range("guarded"))
    if "guard" in report["unknown"]:
        pytest.skip("this kernel cannot tell guard pages here; remedy: Linux 6.16 or newer")
    (row,) = report["mappings"]
    assert (row["present"], row["guard"]) == (5 * PAGE, 3 * PAGE)


def test_what_words_cannot_tell(words: None, target: Target) -> None:
    """Is named, and is "?", null and nothing, never 0."""
    asked = (target.pid, target.range("anonymous"))
    report = by_json(*asked)
    assert {"written", "wpallowed", "huge", "pfnzero"} <= set(report["unknown"])
    assert not {"present", "swapped", "file"} & set(report["unknown"])
    (row,), (texts,) = report["mappings"], by_csv(*asked)
    _, cells, total = by_table(*asked)
    for name in ("huge", "written"):
        at = 3 + COLUMNS.index(name)
        assert (row[name], texts[name], cells[at], total[at - 1]) == (None, "", "?", "?")
    done = subprocess.run(
        command(*map(str, asked), "--regions"), capture_output=True, text=True, timeout=CHILD_SECONDS, check=True
    )
    assert re.fullmatch("pagemapcompat scan: cannot be told here, .*huge.*\n", done.stderr)


def test_nothing_is_unknown_here_that_the_kernel_tells(ioctl: None, target: Target) -> None:
    """By the ioctl huge pages are told, and written ones."""
    assert not {"huge", "written", "wpallowed", "pfnzero"} & set(by_json(target.pid)["unknown"])


def test_part_of_a_mapping(source: str, target: Target) -> None:
    """Only what was asked about is counted, however its addresses are written."""
    asked = target.range("anonymous", 5, 8)
    start, end = asked.split("-")
    for text in (asked, f"0x{start}-0x{end}", f"{start.upper()}-0X{end}"):
        (row,) = by_json(target.pid, text)["mappings"]
        assert [row[name] for name in ("start", "end", "size", "present")] == [start, end, 8 * PAGE, 2 * PAGE]


def test_nothing_mapped_there(source: str, target: Target) -> None:
    """An empty answer, also where the kernel lives."""
    for text in ("0-0", f"0-{PAGE:x}", "ffffffffff600000-ffffffffff601000"):
        assert by_json(target.pid, text)["mappings"] == []
        assert by_csv(target.pid, text, "--regions") == []
    assert by_table(target.pid, "0-0")[1][:2] == ["total", "0"]


def test_only_and_not(source: str, target: Target) -> None:
    """Pages count that have all of the ones and none of the others."""

    def pages(*options: str) -> list[int]:
        rows = by_json(target.pid, target.range("file"), "--regions", *options)["regions"]
        return [row["pages"] for row in rows]

    def present(name: str, *options: str) -> int:
        (row,) = by_json(target.pid, target.range(name), *options)["mappings"]
        return int(row["present"]) // PAGE

    assert pages("--only=present,file") == pages("--only=present", "--only=file") == [2]
    assert pages("--only=present", "--not=file") == []
    assert pages("--not=present") == [6]
    assert (present("file", "--not=file"), present("anonymous", "--not=file,swapped")) == (0, 3)


def test_names_of_categories(ioctl: None, target: Target) -> None:
    """All of PageCategory, and soft-dirty also as the kernel spells it."""
    unknown = by_json(target.pid, "0-0")["unknown"]
    known = ",".join({str(category.name).lower() for category in PageCategory} - set(unknown))
    scan(target.pid, "0-0", "--only", known)
    scan(target.pid, "0-0", "--not", known.replace("_", "-"))


def test_itself(source: str) -> None:
    """`self` is whoever looks."""
    report = by_json("self")
    assert report["source"] == source
    assert any("python" in row["path"] and row["present"] for row in report["mappings"])
    assert any(row["path"] == "[stack]" and row["present"] for row in report["mappings"])


def test_ten_thousand_mappings(source: str) -> None:
    """Each has its row and its own page."""
    with process(MANY) as (child, start):
        rows = by_json(child.pid, f"{start:x}-{start + 10_000 * PAGE:x}")["mappings"]
    assert [row["permissions"] for row in rows] == ["r--p", "rw-p"] * 5_000
    assert [row["present"] for row in rows] == [PAGE, 0] * 5_000


def test_sparse_memory(ioctl: None) -> None:
    """Terabytes of nothing are no work, and fill pieces that make one region."""
    with sparse() as (child, asked):
        (row,) = by_json(child.pid, asked)["mappings"]
        assert (row["size"], row["present"]) == (8 << 40, 0)
        assert by_table(child.pid, asked)[1][2] == f"{8 << 10} GiB"
        assert len(by_json(child.pid, asked, "--regions")["regions"]) == 1


def test_mappings_that_come_and_go(source: str) -> None:
    """Are no error."""
    with process(RESTLESS) as (child, _):
        for _ in range(2):
            scan(child.pid)
            scan(child.pid, "--regions")


# -- How it ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x"], "'x' is not a process id"),
        (["0"], "'0' is not a process id"),
        (["-1"], "'-1' is not a process id"),
        (["self", "1000"], "'1000' is no range"),
        (["self", "1000-xyz"], "'1000-xyz' is no range"),
        (["self", f"{2 * PAGE:x}-{PAGE:x}"], "ends before it starts"),
        (["self", f"{PAGE + 1:x}-{2 * PAGE + 1:x}"], f"give {PAGE:08x}-{3 * PAGE:08x}"),
        (["self", "--only=present,read"], "'read' is no category; known are .*present.*soft_dirty"),
        (["self", "--not="], "'' is no category"),
        (["self", "--only=file", "--not=present,file"], "--only and --not both name file"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str) -> None:
    """Is said in one line, with what to give instead."""
    assert re.search(said, scan(*arguments, status=cli_scan.EXIT_USAGE))


def test_what_argparse_finds() -> None:
    """Ends with the same status."""
    for arguments in ([], ["self", "--format=xml"], ["self", "0-0", "more"]):
        done = subprocess.run(command(*arguments), capture_output=True, timeout=CHILD_SECONDS, check=False)
        assert (done.returncode, done.stdout) == (cli_scan.EXIT_USAGE, b"")


def test_a_wrong_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is wrong usage too."""
    disable(monkeypatch, "no-such-feature")
    assert "no-such-feature" in scan("self", status=cli_scan.EXIT_USAGE)


def test_help_names_the_exit_statuses() -> None:
    """Every one of them, and the categories."""
    text = scan("--help")
    statuses = [value for name, value in vars(cli_scan).items() if name.startswith("EXIT_")]
    assert len(set(statuses)) == len(statuses)
    assert all(re.search(rf"^  {status} ", text, re.MULTILINE) for status in statuses)
    assert all(str(category.name).lower() in text for category in PageCategory)


@pytest.mark.parametrize("option", ["--only", "--not"])
def test_what_cannot_be_told_is_not_guessed(words: None, target: Target, option: str) -> None:
    """Asking for it fails by name, and says where it can be told."""
    said = scan(target.pid, option, "present,huge", status=cli_scan.EXIT_UNSUPPORTED)
    assert "HUGE" in said
    assert "pagemap-scan" in said


def test_a_process_that_is_not_there(source: str) -> None:
    """Neither before its parent has noticed that it ended, nor after that."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert "ended" in scan(child.pid, status=cli_scan.EXIT_GONE)
    assert "no such process" in scan(child.pid, status=cli_scan.EXIT_GONE)


def test_a_number_too_high() -> None:
    """Is no process."""
    assert "no such process" in scan(1 << 32, status=cli_scan.EXIT_GONE)


def test_a_kernel_thread(source: str) -> None:
    """Has no memory."""
    try:
        visible = b"(kthreadd)" in Path("/proc/2/stat").read_bytes()
    except OSError:
        visible = False
    if not visible:
        lacking("kernel-thread", "2 is none here", "run where kernel threads are seen: no pid namespace, no hidepid")
    assert "kernel thread" in scan(2, status=cli_scan.EXIT_KERNEL_THREAD)


@pytest.mark.kernel
def test_somebody_elses_process(capfd: pytest.CaptureFixture[str], source: str) -> None:
    """Nobody may not read root's memory, and is told what it takes."""
    if os.geteuid() and os.stat("/proc/1").st_uid == os.geteuid():
        lacking("foreign-process", "process 1 is ours", "run as root, or where process 1 belongs to somebody else")

    def as_nobody() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        parser = argparse.ArgumentParser()
        cli_scan.add_parser(parser.add_subparsers())
        arguments = parser.parse_args(["scan", "1"])
        assert arguments.run(arguments) == cli_scan.EXIT_ACCESS

    in_child(as_nobody)
    output, error = capfd.readouterr()
    assert output == ""
    assert re.fullmatch("pagemapcompat scan: .*Permission denied.*CAP_SYS_PTRACE is needed\n", error)


def test_nobody_reads_it(target: Target) -> None:
    """A closed pipe ends it without a word."""
    for options in ([], ["--regions", "--format=csv"]):
        read, written = os.pipe()
        os.close(read)
        done = subprocess.run(
            command(str(target.pid), *options), stdout=written, stderr=-1, text=True, timeout=CHILD_SECONDS, check=False
        )
        os.close(written)
        assert done.returncode == cli_scan.EXIT_BROKEN_PIPE
        assert re.fullmatch(NOTE, done.stderr), done.stderr


def test_nowhere_to_write(target: Target) -> None:
    """A full disk is one line."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command(str(target.pid)), stdout=full, stderr=-1, text=True, timeout=CHILD_SECONDS, check=False
        )
    assert done.returncode == cli_scan.EXIT_FAILED
    assert re.fullmatch("pagemapcompat scan: standard output: .+\n", done.stderr)


# -- Long scans ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sparse() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process with very much memory, and where it lies."""
    if Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2":
        lacking("sparse-memory", "memory cannot be overcommitted", "sysctl vm.overcommit_memory=0")
    with process(SPARSE) as (child, start):
        yield child, f"{start:x}-{start + (8 << 40):x}"


class OnTerminal:
    """A scan whose standard error is a terminal, and what it shows there."""

    def __init__(self, *arguments: object) -> None:
        self._terminal, given = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            command(*map(str, arguments)),
            stdout=subprocess.DEVNULL,
            stderr=given,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
            preexec_fn=hear_interrupts,  # noqa: PLW1509 - no threads here
        )
        os.close(given)

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._terminal], [], [], max(0.0, seconds))
        assert ready, f"it hangs, having shown {self.shown!r}"
        try:
            piece = os.read(self._terminal, 1 << 16)
        except OSError:  # EIO: the other end is closed
            piece = b""
        self.shown += piece.decode()
        return bool(piece)

    def wait_for(self, text: str) -> None:
        """Until it shows that."""
        deadline = time.monotonic() + CHILD_SECONDS
        while text not in self.shown:
            assert self._read(deadline - time.monotonic()), self.shown

    def finish(self) -> int:
        """Until it ends."""
        deadline = time.monotonic() + CHILD_SECONDS
        while self._read(deadline - time.monotonic()):
            pass
        os.close(self._terminal)
        return self.process.wait(CHILD_SECONDS)


def hear_interrupts() -> None:
    """Whoever starts the tests in the background has them ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def without_rich(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python processes of this test cannot import it, installed or not."""
    (directory / "rich.py").write_text("raise ImportError", encoding="ascii")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]))


CLEARED = {"plain": "\r" + " " * len("pagemapcompat scan: 100%") + "\r", "rich": "\x1b[2K"}


@pytest.mark.parametrize(("bar", "how"), [("plain", "exec"), ("plain", "kill"), ("rich", "kill")])
def test_a_process_that_ends_meanwhile(
    words: None, bar: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal shows how far a long scan is; when there is no memory any more that is cleared, and said."""
    if bar == "plain":
        without_rich(tmp_path, monkeypatch)
    elif importlib.util.find_spec("rich") is None:
        lacking("rich", "it is not installed", "pip install rich")
    with sparse() as (child, asked):
        looking = OnTerminal(child.pid, asked)
        looking.wait_for("%")
        if how == "kill":
            child.kill()
        else:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        assert looking.finish() == cli_scan.EXIT_GONE
    cleared, _, last = looking.shown.rpartition(CLEARED[bar])
    assert "pagemapcompat scan" in cleared
    assert re.search("pagemapcompat scan: [^%]+ended[^%]*\r\n$", last)


def test_no_progress_on_a_pipe(words: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes, while a terminal beside it shows some; an interrupt ends both without a word."""
    without_rich(tmp_path, monkeypatch)
    with sparse() as (child, asked):
        piped = subprocess.Popen(
            command(str(child.pid), asked),
            stdout=-1,
            stderr=-1,
            preexec_fn=hear_interrupts,  # noqa: PLW1509 - no threads
        )
        looking = OnTerminal(child.pid, asked)
        looking.wait_for("%")
        for one in (piped, looking.process):
            one.send_signal(signal.SIGINT)
        assert piped.communicate(timeout=CHILD_SECONDS) == (b"", b"")
        assert piped.returncode == looking.finish() == cli_scan.EXIT_INTERRUPTED
    assert looking.shown.endswith(CLEARED["plain"])
