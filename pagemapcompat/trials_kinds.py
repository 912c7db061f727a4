"""Trials: which kinds of memory can be registered for write-protection."""

from __future__ import annotations

import mmap
import os
import resource
from contextlib import AbstractContextManager, ExitStack, contextmanager
from errno import EFBIG, EINVAL, EMFILE, ENFILE, ENOENT, ENOMEM
from pathlib import Path
from typing import TYPE_CHECKING

from pagemapcompat import _kernel
from pagemapcompat.abi import Feature, UffdFeature
from pagemapcompat.laboratory import PRIVATE, Answer, Laboratory, Trial, check, mapping, yes
from pagemapcompat.memory import page_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


@contextmanager
def _shared() -> Iterator[int]:
    with mapping(page_size(), mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as (at, _):
        yield at


@contextmanager
def _memfd() -> Iterator[int]:
    fd = os.memfd_create("pagemapcompat")
    try:
        _check_file_size()
        os.ftruncate(fd, page_size())
        with mapping(page_size(), mmap.MAP_SHARED, fd) as (at, _):
            yield at
    finally:
        os.close(fd)


@contextmanager
def _hugetlb() -> Iterator[int]:
    # No page is taken from the reserve, which may well be empty.
    flags = PRIVATE | _kernel.MAP_HUGETLB
    with mapping(huge_page_size(), flags) as (at, _):
        yield at


def huge_page_size() -> int:
    """What MAP_HUGETLB gives, in bytes; 0 where there is none. Source: proc_meminfo(5)."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("Hugepagesize:"):
            return int(line.split()[1]) << 10
    return 0


@contextmanager
def _private_file() -> Iterator[int]:
    # Any file on a disk will do, for nothing is written to it: this one, unless it lies elsewhere, or came out of reach
    # after the import, because privileges were given up or the root was changed.
    with ExitStack() as stack:
        try:
            fd = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            _check_on_disk(fd)
        except (PermissionError, FileNotFoundError, _NowhereError):
            fd = stack.enter_context(_scratch_file())
        # That is a page, also where a page is more than the file.
        at, _ = stack.enter_context(mapping(1, mmap.MAP_PRIVATE, fd))
        yield at


@contextmanager
def _shared_file() -> Iterator[int]:
    with _scratch_file() as fd, mapping(page_size(), mmap.MAP_SHARED, fd) as (at, _):
        yield at


_LACKING = {EMFILE, ENFILE, ENOMEM}
"""What says nothing of a folder, and everything else does."""


class _NowhereError(OSError):
    """There is no place to try in."""


@contextmanager
def _scratch_file() -> Iterator[int]:
    """A page of a file on a disk that no folder lists."""
    fd = _unlisted_file()
    try:
        _check_file_size()
        os.ftruncate(fd, page_size())
        yield fd
    finally:
        os.close(fd)


def _unlisted_file() -> int:
    reason: OSError = _NowhereError(ENOENT, "neither /var/tmp nor TMPDIR is a folder on a disk that takes O_TMPFILE")
    for folder in ("/var/tmp", os.environ.get("TMPDIR", "/tmp")):  # noqa: S108 - no name is ever in it
        try:
            fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
            try:
                _check_on_disk(fd)
            except OSError:
                os.close(fd)
                raise
        except OSError as error:
            if error.errno in _LACKING:
                reason = error
        else:
            return fd
    raise reason


def _check_on_disk(fd: int) -> None:
    """The pages of a tmpfs are shared memory, and no file's."""
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    # By newlines alone: of what else ends a line for Python nothing is escaped (fs/proc_namespace.c: mangle).
    for line in Path("/proc/self/mountinfo").read_bytes().decode(errors="replace").rstrip("\n").split("\n"):
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == number and rest.split()[0] in {"tmpfs", "devtmpfs", "hugetlbfs"}:
            raise _NowhereError(ENOENT, "the file is in memory, and not on a disk")


def _check_file_size() -> None:
    """A file that grows beyond RLIMIT_FSIZE is a SIGXFSZ."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and limit < page_size():
        raise OSError(EFBIG, "RLIMIT_FSIZE is below a page")


def _registers(
    make: Callable[[], AbstractContextManager[int]],
    what: str,
    needed: Feature,
    hint: str,
    *,
    huge: bool = False,
    where: str = "",
) -> Trial:
    """Whether memory of a kind can be registered. *needed*: what makes it so, where somebody disabled it."""

    def answer(lab: Laboratory) -> Answer:
        missing = lab.lacks(Feature.UFFD_WP)
        if not missing and lab.answers[needed][0] == "disabled":
            missing = lab.lacks(needed)
        if missing:
            return missing
        features = UffdFeature.PAGEFAULT_FLAG_WP
        for feature, bit in _KIND_FEATURES.items():
            features |= bit if lab.has(feature) else UffdFeature(0)
        size = huge_page_size() if huge else page_size()
        if not size:
            return "no", None, "this kernel has no huge pages", "a kernel with CONFIG_HUGETLBFS"
        try:
            with lab.uffd(features) as uffd, make() as at:
                rc, _ = _kernel.uffd_register(uffd, at, at + size)
        except _NowhereError as error:
            return "unknown", error.errno, f"{error.strerror}", "TMPDIR=/a/folder/on/a/disk"
        if rc == -EINVAL:
            return "no", EINVAL, f"UFFDIO_REGISTER refuses {what}", hint
        check(rc, "UFFDIO_REGISTER")
        return yes(f"{what} can be write-protected{where}")

    return answer


_KIND_FEATURES = {
    Feature.UFFD_WP_HUGETLBFS_SHMEM: UffdFeature.WP_HUGETLBFS_SHMEM,
    Feature.UFFD_WP_ASYNC: UffdFeature.WP_ASYNC,
}
_SHARED_HINT = "Linux 5.19 or newer; until then map it MAP_PRIVATE | MAP_ANONYMOUS"
_ASYNC_ALONE = ", asynchronously: by backend pagemap-scan alone"
_FILE_HINT = "Linux 6.7 or newer, whose WP_ASYNC takes files; until then map it MAP_PRIVATE | MAP_ANONYMOUS"

KIND_TRIALS: Mapping[Feature, Trial] = {
    Feature.UFFD_WP_SHARED: _registers(
        _shared, "shared anonymous memory", Feature.UFFD_WP_HUGETLBFS_SHMEM, _SHARED_HINT
    ),
    Feature.UFFD_WP_MEMFD: _registers(_memfd, "memfd memory", Feature.UFFD_WP_HUGETLBFS_SHMEM, _SHARED_HINT),
    Feature.UFFD_WP_HUGETLB: _registers(
        _hugetlb, "hugetlb memory", Feature.UFFD_WP_HUGETLBFS_SHMEM, _SHARED_HINT, huge=True
    ),
    Feature.UFFD_WP_PRIVATE_FILE: _registers(
        _private_file, "a private file mapping", Feature.UFFD_WP_ASYNC, _FILE_HINT, where=_ASYNC_ALONE
    ),
    Feature.UFFD_WP_SHARED_FILE: _registers(
        _shared_file, "a shared file mapping", Feature.UFFD_WP_ASYNC, _FILE_HINT, where=_ASYNC_ALONE
    ),
}

__all__ = ["KIND_TRIALS", "huge_page_size"]
