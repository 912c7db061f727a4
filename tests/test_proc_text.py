"""What /proc says of names that others chose: a carriage return or a form feed in one ends no line."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from children import in_child, plain
from conftest import PAGE, Flavour, flavours, use_flavour

from pagemapcompat import AddressRange, NotTrackableError, probe
from pagemapcompat.__main__ import main
from pagemapcompat.limits import read_limits
from pagemapcompat.mappings import own_mappings

NAMES = ["q\rz", "a\rb", "\r", "\x0b\x0c\x1c", "\x85\u2028", "a\nb", " ", "\\", "7f0000000000-7f0000001000 rw-p"]


@pytest.fixture(params=flavours("uffd-wp"))
def uffd_wp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Flavour:
    """The backend that refuses files."""
    return use_flavour(request.param, monkeypatch)


def mapped(folder: Path, name: str) -> mmap.mmap:
    """A file of that name, shared."""
    with open(folder / name, "w+b") as file:
        file.truncate(PAGE)
        return mmap.mmap(file.fileno(), PAGE)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_refused_file_of_any_name(uffd_wp: Flavour, name: str, tmp_path: Path) -> None:
    """It is named in the error, whatever its name is, and so is what is behind it in /proc/self/maps."""
    with mapped(tmp_path, name) as memory, uffd_wp.tracker() as tracker:
        with pytest.raises(NotTrackableError, match="shared mapping") as caught:
            tracker.track(memory)
        assert str(tmp_path) in str(caught.value)
        assert len(own_mappings(AddressRange(0, 1 << 47))) >= 10


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_another_process_that_maps_it(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Looking at a process is no way for it to end the one who looks."""
    (tmp_path / name).write_bytes(bytes(PAGE))
    holder = """
        import mmap, sys
        with open(sys.argv[1], "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        print(flush=True)
        sys.stdin.read()
        """.replace("\n        ", "\n")
    command = [sys.executable, "-c", holder, tmp_path / name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        for words in (["probe", "--pid"], ["scan"]):
            assert main([*words, str(process.pid)]) in {0, 5}
        process.stdin.close()
    assert str(process.pid) in capsys.readouterr().out


@pytest.mark.parametrize("name", [b"a\rSeccomp: 9", b"\x0cCapEff:\tzz", b"\x0bNoNewPrivs:\r", b"\xff\xfe\n"])
def test_limits_of_a_process_of_any_name(name: bytes) -> None:
    """/proc/self/status begins with the name."""
    before = read_limits()

    def check() -> None:
        plain.prctl(15, name)  # PR_SET_NAME
        assert read_limits() == before

    in_child(check)


@pytest.mark.parametrize("name", ["\r", "a\x0cb", "\u2028"], ids=ascii)
def test_a_mount_point_of_any_name(name: str, tmp_path: Path) -> None:
    """/proc/self/mountinfo names them all; probe() goes by what they are. The mount ends with a child."""
    if os.geteuid():
        pytest.skip("only root may mount; remedy: run it as root")
    folder = tmp_path / name
    folder.mkdir()
    expected = {feature: result.state for feature, result in probe().items()}

    def check() -> None:
        assert plain.unshare(0x20000) == 0  # CLONE_NEWNS
        assert plain.mount(None, b"/", None, 0x44000, None) == 0  # MS_REC | MS_PRIVATE
        assert plain.mount(b"none", os.fsencode(folder), b"tmpfs", 0, None) == 0
        assert {feature: result.state for feature, result in probe(refresh=True).items()} == expected

    in_child(check)
