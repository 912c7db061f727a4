"""The userfaultfd: the ways to open one, and its handshake."""

from __future__ import annotations

import os
from enum import Enum
from errno import EACCES, EINVAL, EMFILE, ENFILE, ENODEV, ENOENT, ENOSYS, ENXIO, EPERM, errorcode

import attrs

from pagemapcompat import _kernel
from pagemapcompat.abi import Feature, UffdFeature


class Way(Enum):
    """A way to open a userfaultfd."""

    SYSCALL = Feature.UFFD_SYSCALL
    """userfaultfd(2). Faults in user and kernel mode. CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd=1."""
    DEVICE = Feature.UFFD_DEVICE
    """/dev/userfaultfd. Likewise; whoever may open the file. Since Linux 6.1."""
    USER_MODE_ONLY = Feature.UFFD_USER_MODE_ONLY
    """userfaultfd(UFFD_USER_MODE_ONLY). For everybody, since Linux 5.11; faults in user mode alone."""

    @property
    def feature(self) -> Feature:
        """The feature that says whether it is there."""
        return Feature(self.value)


_NUMBERS = {
    Way.SYSCALL: _kernel.UFFD_SYSCALL,
    Way.DEVICE: _kernel.UFFD_DEVICE,
    Way.USER_MODE_ONLY: _kernel.UFFD_USER_MODE_ONLY,
}
_CALLS = {
    Way.SYSCALL: "userfaultfd()",
    Way.DEVICE: "/dev/userfaultfd",
    Way.USER_MODE_ONLY: "userfaultfd(UFFD_USER_MODE_ONLY)",
}


@attrs.frozen
class Attempt:
    """One try to open a userfaultfd with certain features."""

    way: Way
    call: str
    """What was tried last."""
    errno: int
    """Of that, or 0."""

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.call}: {errorcode.get(self.errno, self.errno) if self.errno else 'ok'}"


def open_userfaultfd(way: Way, features: UffdFeature) -> tuple[int, UffdFeature, Attempt]:
    """Open one way, ask for *features*: (descriptor or -1, everything the kernel says it has, how it went).

    The answer is held against the request, since kernels before 6.10 accept bits that their configuration lacks and
    only leave them out of it (1723f04caacb).
    """
    fd = _kernel.uffd_open(_NUMBERS[way])
    if fd < 0:
        return -1, UffdFeature(0), Attempt(way, _CALLS[way], -fd)
    rc, granted = _kernel.uffd_handshake(fd, features)
    if rc == 0 and features & ~granted:
        rc = -EINVAL
    if rc:
        os.close(fd)
        missing = f"{_CALLS[way]}, UFFDIO_API{f' with {features.name or int(features)}' if features else ''}"
        return -1, UffdFeature(0), Attempt(way, missing, -rc)
    return fd, UffdFeature(granted), Attempt(way, _CALLS[way], 0)


def open_hint(attempt: Attempt) -> str:
    """What to change so that an attempt that failed would succeed."""
    number = attempt.errno
    if attempt.way is Way.DEVICE and number == EPERM:
        return "a container that is given the device /dev/userfaultfd (a cgroup refuses it)"
    if number == EPERM:
        return (
            "sysctl vm.unprivileged_userfaultfd=1, or CAP_SYS_PTRACE in the initial user namespace; in a container "
            "also a seccomp profile that allows userfaultfd"
        )
    if number == EACCES:
        return "read and write permission on /dev/userfaultfd (root's alone by default), e.g. by a udev rule"
    if number in (ENOENT, ENODEV, ENXIO):
        return "/dev/userfaultfd is there since Linux 6.1; a container must be given the device"
    if number == ENOSYS:
        return "a kernel with CONFIG_USERFAULTFD, or a seccomp profile that allows userfaultfd"
    if number == EINVAL and attempt.way is Way.USER_MODE_ONLY and "UFFDIO_API" not in attempt.call:
        return "Linux 5.11 has UFFD_USER_MODE_ONLY; before it, sysctl vm.unprivileged_userfaultfd=1"
    if number == EINVAL:
        return "a newer kernel, or one whose configuration has these features"
    return "see ulimit -n" if number in (EMFILE, ENFILE) else os.strerror(number)
