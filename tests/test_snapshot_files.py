"""Snapshots go into files whole or not at all, and come back as they were."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import re
import resource
import stat
import sys
import tracemalloc
from contextlib import nullcontext
from errno import EFBIG
from pathlib import Path

import pytest
from children import Crew, in_child
from conftest import PAGE, PRIVATE, Flavour, lacking, libc, part, private, run_child, write
from filed import AT, HELD, MISSING, RUN, Compression, assert_equal, by_hand, made, page, refuse, zstandard

from pagemapcompat import (
    AddressRange,
    ClosedError,
    DirtyTracker,
    Feature,
    InvalidArgumentError,
    KernelError,
    MissingPackageError,
    Snapshot,
    SnapshotFileError,
    _kernel,
    probe,
)

kernel = pytest.mark.kernel


@pytest.fixture(params=[None, "zstd"], ids=["plain", "zstd"])
def compression(request: pytest.FixtureRequest) -> Compression:
    """Both ways to write a file."""
    if request.param:
        zstandard()
    return request.param  # type: ignore[no-any-return]


# -- What comes back -------------------------------------------------------------------------------------------


@kernel
def test_memory_comes_back_from_a_file(tracker: DirtyTracker, tmp_path: Path) -> None:
    """All of it, whatever the memory was at the time, and whatever it has become."""
    pages = 300
    memory = private(pages)
    ram = tracker.track(memory)
    dice = random.Random(3)
    saved = []
    for number in range(3):
        for at in dice.sample(range(pages), 40):
            memory[at * PAGE : (at + 1) * PAGE] = page(at + number)
        snapshot = ram.snapshot()
        snapshot.save(tmp_path / f"{number}")
        saved.append((snapshot, memory[:]))
    for number in (1, 0, 2):
        write(memory, *dice.sample(range(pages), 20))
        snapshot, content = saved[number]
        loaded = Snapshot.load(tmp_path / f"{number}")
        assert_equal(loaded, snapshot)
        assert loaded.parent is None
        assert loaded.pages == loaded.held().pages
        ram.restore(loaded, verify=True)
        assert memory[:] == content
        assert not ram.snapshot().diff(loaded).pages


@kernel
def test_guard_pages_and_holes_come_back_missing(flavour: Flavour, area, tmp_path: Path) -> None:
    """And a restore leaves them alone."""
    place = area(24)
    with flavour.tracker() as tracker:
        ram = tracker.track(place)
        for number in (0, 5, 23):
            libc.fill(place.start + number * PAGE, PAGE, 7)
        hole = part(ram, 8, 4)
        libc.munmap(hole.start, hole.length)
        missing = {8, 9, 10, 11}
        if probe()[Feature.MADV_GUARD]:
            guard = part(ram, 15, 1)
            libc.madvise(guard.start, guard.length, libc.GUARD_INSTALL)
            missing.add(15)
        snapshot = ram.snapshot()
        snapshot.save(tmp_path / "file")
        loaded = Snapshot.load(tmp_path / "file")
        assert_equal(loaded, snapshot)
        assert set(loaded.missing().page_indices()) == missing
        assert set(loaded.held().page_indices()) == {0, 5, 23}
        libc.fill(place.start + 5 * PAGE, PAGE, 8)
        assert ram.restore(loaded).pages == 1
        assert not ram.snapshot().diff(snapshot).pages


@kernel
def test_memory_that_ends_inside_a_page(tracker: DirtyTracker, tmp_path: Path) -> None:
    """Has its own length again."""
    length = 3 * PAGE + 100
    memory = mmap.mmap(-1, length, flags=PRIVATE)
    memory[length - 1] = 9
    ram = tracker.track(memory)
    ram.snapshot().save(tmp_path / "file")
    loaded = Snapshot.load(tmp_path / "file")
    assert len(loaded) == length
    assert loaded.range == ram.range
    assert loaded.read() == memory[:]
    memory[length - 1] = 8
    ram.restore(loaded)
    assert memory[length - 1] == 9


@kernel
def test_memory_of_another_length_is_left_alone(tracker: DirtyTracker, tmp_path: Path) -> None:
    """Longer or shorter, by a byte or by pages."""
    memory = private(4)
    ram = tracker.track(memory)
    write(memory, 2)
    before = memory[:]
    for length in (3 * PAGE, 4 * PAGE - 1, 5 * PAGE):
        made(-(-length // PAGE), range(3), length=length).save(tmp_path / "file")
        with pytest.raises(InvalidArgumentError, match=f"{length} bytes"):
            ram.restore(Snapshot.load(tmp_path / "file"))
    assert memory[:] == before


def test_another_process_restores_it(tmp_path: Path, compression: Compression) -> None:
    """Which has nothing from this one but the file."""
    try:
        DirtyTracker().close()
    except KernelError as error:
        lacking("DirtyTracker", f"no backend works here: {error}", error.hint or "none")
    snapshot = made(40, (3, 4, 5, 39))
    snapshot.save(tmp_path / "file", compression=compression)
    said = run_child(
        """
        import hashlib, mmap, sys
        from pagemapcompat import DirtyTracker, Snapshot
        loaded = Snapshot.load(sys.argv[1])
        memory = mmap.mmap(-1, len(loaded), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[:] = bytes([7]) * len(memory)
        with DirtyTracker() as tracker, tracker.track(memory) as ram:
            ram.restore(loaded, verify=True)
        print(hashlib.sha256(memory).hexdigest())
        """,
        str(tmp_path / "file"),
    )
    assert said.strip() == hashlib.sha256(snapshot.read()).hexdigest()


@pytest.mark.parametrize(
    "snapshot",
    [
        made(0),
        made(1),
        made(1, [0], length=1),
        made(9, missing=[(0, 9)]),
        made(9, [0, 1, 2, 6, 8], [(3, 3), (7, 1)]),
        made(1500, [*range(500, 800), 511], [(100, 3), (1024, 400)], 1500 * PAGE - 1),
        made((64 << 30) // PAGE, [0, 77, 1 << 20, (64 << 30) // PAGE - 1], [(3 << 18, 5 << 18)]),
    ],
    ids=["nothing", "zero", "byte", "missing", "mixed", "runs", "64 GiB"],
)
def test_round_trip(snapshot: Snapshot, tmp_path: Path, compression: Compression) -> None:
    """Of whatever shape. What is not there takes no room."""
    snapshot.save(tmp_path / "file", compression=compression)
    assert_equal(Snapshot.load(tmp_path / "file"), snapshot)
    runs = len(snapshot.held()) + len(snapshot.missing())
    assert (tmp_path / "file").stat().st_size <= snapshot.held().pages * PAGE + runs * RUN.size + 256


def test_the_file_is_what_the_documentation_says(tmp_path: Path) -> None:
    """Byte by byte, so that others can read and write it."""
    snapshot = made(8, [1, 2, 7], [(3, 2)], 8 * PAGE - 5)
    data = by_hand(
        [(1, 2, HELD), (3, 2, MISSING), (7, 1, HELD)], page(1) + page(2) + page(7), length=8 * PAGE - 5, flags=0
    )
    snapshot.save(tmp_path / "saved")
    assert (tmp_path / "saved").read_bytes() == data
    (tmp_path / "made").write_bytes(data)
    assert_equal(Snapshot.load(tmp_path / "made"), snapshot)


def test_zstd_may_come_in_several_frames(tmp_path: Path) -> None:
    """As the documentation says, whoever wrote them."""
    compress = zstandard().ZstdCompressor(level=9).compress
    content = compress(page(1)[:100]) + compress(page(1)[100:]) + compress(b"")
    (tmp_path / "file").write_bytes(by_hand([(1, 1, HELD)], content, flags=1))
    assert_equal(Snapshot.load(tmp_path / "file"), made(8, [1]))


def test_a_zstd_frame_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    """Wherever that is, whether it held as much as is announced or more, and though the checksum is right."""
    pieces = zstandard().ZstdCompressor(write_checksum=True).compressobj()
    flush = zstandard().COMPRESSOBJ_FLUSH_BLOCK
    frame = b"".join(pieces.compress(page(n)[:64] * (PAGE // 64)) + pieces.flush(flush) for n in (1, 2, 3))
    for size in range(1, len(frame) + 1):  # the last block is still to come
        for announced in (1, 2, 3):
            (tmp_path / "file").write_bytes(by_hand([(1, announced, HELD)], frame[:size], flags=1))
            refuse(tmp_path / "file")
    whole = frame + pieces.flush()
    for announced in (1, 2, 3, 4):
        (tmp_path / "file").write_bytes(by_hand([(1, announced, HELD)], whole, flags=1))
        with pytest.raises(SnapshotFileError) if announced != 3 else nullcontext():
            Snapshot.load(tmp_path / "file")


def test_a_file_holds_what_is_shared_with_others(tmp_path: Path, compression: Compression) -> None:
    """It needs no parent, and the parent may be gone."""
    base = made(20, range(10), [(15, 2)])
    image = _kernel.image_next(base.image)
    _kernel.image_load(image, 4, page(99))
    child = Snapshot(image, base.range, len(base), base)
    assert child.pages == 1
    base.drop()
    child.save(tmp_path / "file", compression=compression)
    loaded = Snapshot.load(tmp_path / "file")
    assert_equal(loaded, child)
    assert loaded.parent is None
    with pytest.raises(ClosedError):
        base.save(tmp_path / "other")
    assert os.listdir(tmp_path) == ["file"]


def test_compressed_is_smaller(tmp_path: Path) -> None:
    """Where there is anything to compress."""
    zstandard()
    image = _kernel.image_create(64)
    _kernel.image_load(image, 0, b"framebuffer " * (64 * PAGE // 12) + bytes(64 * PAGE % 12))
    snapshot = Snapshot(image, AddressRange.from_length(AT, 64 * PAGE), 64 * PAGE)
    sizes = []
    for compression in (None, "zstd"):
        snapshot.save(tmp_path / "file", compression=compression)
        sizes.append((tmp_path / "file").stat().st_size)
        assert_equal(Snapshot.load(tmp_path / "file"), snapshot)
    assert sizes[1] < sizes[0] // 50


def test_memory_is_never_held_twice(tmp_path: Path, compression: Compression) -> None:
    """Neither to save nor to load: pages come and go in pieces."""
    pages = (32 << 20) // PAGE
    image = _kernel.image_create(pages)
    _kernel.image_load(image, 0, b"\1" * (pages * PAGE))
    snapshot = Snapshot(image, AddressRange.from_length(AT, pages * PAGE), pages * PAGE)
    tracemalloc.start()
    try:
        snapshot.save(tmp_path / "file", compression=compression)
        Snapshot.load(tmp_path / "file")  # its pages are the C core's, which this does not count
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < pages * PAGE // 4


# -- All or nothing --------------------------------------------------------------------------------------------


def with_little_room(folder: Path, compression: Compression) -> None:
    """Save twice on a disk that is full too soon: beside nothing, and over an old file."""
    old = made(8, [1])
    old.save(folder / "old")
    before = (folder / "old").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * PAGE, resource.RLIM_INFINITY))
    big = made(256, range(256))
    for name in ("old", "new"):
        with pytest.raises(OSError) as caught:  # noqa: PT011 - its errno follows
            big.save(folder / name, compression=compression)
        assert (caught.value.errno, caught.value.filename) == (EFBIG, str(folder / name))
    assert os.listdir(folder) == ["old"]
    assert (folder / "old").read_bytes() == before
    assert_equal(Snapshot.load(folder / "old"), old)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, compression: Compression) -> None:
    """And no other."""
    in_child(with_little_room, tmp_path, compression)


class Interrupt:
    """A KeyboardInterrupt at one of the calls into C, or returns from them."""

    def __init__(self, due: int) -> None:
        self.due = due

    def __call__(self, _frame: object, event: str, _argument: object) -> None:
        """What sys.setprofile wants."""
        self.due -= event in {"c_call", "c_return"}
        if self.due == 0:
            self.due = -1
            raise KeyboardInterrupt


def interrupted_everywhere(folder: Path, compression: Compression) -> None:
    """Save over and over, each time interrupted one call later, until it gets through."""
    old, new = made(8, [1]), made(8, [2, 3])
    contents = []
    for snapshot in (old, new):
        snapshot.save(folder / "file", compression=compression)
        contents.append((folder / "file").read_bytes())
    kept = due = 0
    while True:
        due += 1
        (folder / "file").write_bytes(contents[0])
        interrupt = Interrupt(due)
        try:
            sys.setprofile(interrupt)
            new.save(folder / "file", compression=compression)
            sys.setprofile(None)
        except KeyboardInterrupt:
            sys.setprofile(None)
        content = (folder / "file").read_bytes()
        assert content in contents, due
        assert os.listdir(folder) == ["file"], due
        kept += content == contents[0]
        if interrupt.due > 0:
            break
    assert content == contents[1]
    assert kept > 20


def test_an_interrupt_leaves_the_old_file_or_the_new_one(tmp_path: Path, compression: Compression) -> None:
    """Wherever it comes."""
    in_child(interrupted_everywhere, tmp_path, compression)


def test_no_place_to_save_to(tmp_path: Path) -> None:
    """Errors of the system stay what they are, and nothing is left behind."""
    snapshot = made(8, [1])
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path, error in (
        (tmp_path / "folder", IsADirectoryError),
        (tmp_path / "nowhere" / "file", FileNotFoundError),
        (tmp_path / "file" / "file", NotADirectoryError),
    ):
        with pytest.raises(error) as caught:
            snapshot.save(path)
        assert (caught.value.filename, caught.value.filename2) == (str(path), None)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == []


def test_arguments_come_first(tmp_path: Path) -> None:
    """Nothing is written for a compression that is not known, nor of memory that no file can hold."""
    for compression in ("gzip", ["zstd"]):
        with pytest.raises(InvalidArgumentError, match=re.escape(repr(compression))) as caught:
            made(1).save(tmp_path / "file", compression=compression)  # type: ignore[arg-type]
        assert caught.value.hint
    with pytest.raises(InvalidArgumentError, match="too long") as caught:
        made((1 << 47) // PAGE).save(tmp_path / "file")
    assert caught.value.hint
    made((1 << 47) // PAGE, [5], length=(1 << 47) - 1).save(tmp_path / "longest")
    assert Snapshot.load(tmp_path / "longest").held().pages == 1
    assert os.listdir(tmp_path) == ["longest"]


def test_zstandard_is_asked_for_only_when_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, plain files are written and read, and the error says what to install."""
    snapshot = made(8, [1])
    (tmp_path / "compressed").write_bytes(by_hand([(1, 1, HELD)], b"whatever", flags=1))
    monkeypatch.setitem(sys.modules, "zstandard", None)  # as where it is not installed
    snapshot.save(tmp_path / "plain")
    assert_equal(Snapshot.load(tmp_path / "plain"), snapshot)
    before = (tmp_path / "plain").read_bytes()
    for use in (
        lambda: snapshot.save(tmp_path / "plain", compression="zstd"),
        lambda: Snapshot.load(tmp_path / "compressed"),
    ):
        with pytest.raises(MissingPackageError) as caught:
            use()
        assert isinstance(caught.value, ImportError)
        assert caught.value.name == "zstandard"
        assert "pagemapcompat[zstd]" in str(caught.value.hint)
    assert (tmp_path / "plain").read_bytes() == before


def under_umasks(folder: Path) -> None:
    """Save under several, the last one over a file of another mode."""
    for mask in (0o027, 0o077, 0o000):
        os.umask(mask)
        made(1).save(folder / "file")
        assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o666 & ~mask
    os.umask(0o022)


def test_the_mode_is_a_new_files(tmp_path: Path) -> None:
    """By the umask, whatever the old file's was."""
    in_child(under_umasks, tmp_path)


def test_paths_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """str, PathLike, in this folder, with bytes that are no text, as long as names may be; a link is replaced."""
    snapshot = made(8, [1])
    monkeypatch.chdir(tmp_path)
    for path in ("here", Path("below", "here"), tmp_path / "n\udcffme", str(tmp_path / ("n" * 255))):
        Path("below").mkdir(exist_ok=True)
        snapshot.save(path)
        assert_equal(Snapshot.load(path), snapshot)
    Path("link").symlink_to("here")
    before = Path("here").read_bytes()
    made(8, [2]).save("link")
    assert not Path("link").is_symlink()
    assert Path("here").read_bytes() == before
    assert_equal(Snapshot.load("link"), made(8, [2]))


def test_readers_and_writers_at_once(tmp_path: Path) -> None:
    """Whoever loads while others save gets one of the snapshots, whole."""
    both = [made(64, range(32)), made(64, range(16, 48))]
    both[0].save(tmp_path / "file")
    crew = Crew()
    for snapshot in both:
        crew.add(lambda snapshot=snapshot: [snapshot.save(tmp_path / "file") for _ in range(10)])
    while crew.working:
        loaded = Snapshot.load(tmp_path / "file")
        assert any(not loaded.diff(snapshot).pages for snapshot in both)
    crew.join()
    assert os.listdir(tmp_path) == ["file"]


def test_nothing_stays_open(tmp_path: Path, compression: Compression) -> None:
    """Neither after success nor after failure."""
    snapshot = made(8, [1])
    before = os.listdir("/proc/self/fd")
    snapshot.save(tmp_path / "file", compression=compression)
    Snapshot.load(tmp_path / "file")
    os.truncate(tmp_path / "file", 100)
    refuse(tmp_path / "file")
    with pytest.raises(IsADirectoryError):
        snapshot.save(tmp_path, compression=compression)
    assert os.listdir("/proc/self/fd") == before
