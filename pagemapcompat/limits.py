"""The limits that decide what this process may do: settings, privileges and sizes, read and not tried."""

from __future__ import annotations

import resource
from pathlib import Path

import attrs

from pagemapcompat import _kernel
from pagemapcompat.memory import page_size

NOT_DUMPABLE_HINT = (
    "this process is not dumpable, as after dropping privileges: prctl(PR_SET_DUMPABLE, 1), then probe(refresh=True)"
)
"""What to do where this process may not open what is in /proc/self."""
_CAPABILITIES = {19: "CAP_SYS_PTRACE", 21: "CAP_SYS_ADMIN", 40: "CAP_CHECKPOINT_RESTORE"}
"""Those that matter here, by number (`include/uapi/linux/capability.h`)."""
_SECCOMP = ("off", "strict", "filter")
_SYS = Path("/sys/kernel/mm")
_EVERY_UID = ["0", "0", "4294967295"]
"""/proc/self/uid_map in the initial user namespace."""


@attrs.frozen(kw_only=True)
class Limits:
    """What surrounds this process. None: it cannot be read here.

    Attributes:
        page_size: In bytes.

        huge_page_sizes: Of hugetlb, in bytes, ascending.

        transparent_hugepage: always, madvise or never.

        unprivileged_userfaultfd: vm.unprivileged_userfaultfd: whether every process may have faults in kernel mode
            reported.

        capabilities: Of CAP_SYS_PTRACE, CAP_SYS_ADMIN and CAP_CHECKPOINT_RESTORE, those in effect.

        user_namespace: Whether capabilities are those of a user namespace, which count for nothing here.

        seccomp: off, strict or filter: a filter may refuse any system call.

        no_new_privs: Whether this process can gain no privileges (prctl(2)).

        dumpable: Whether /proc/self belongs to this process's user: without it, and without privileges, pagemap is
            denied.

        open_files: RLIMIT_NOFILE, None without limit: a tracker needs 4 or 5 descriptors.

        max_map_count: vm.max_map_count: protecting single pages can split mappings.

        real_time_limit: Whether others get a part of each CPU whatever a real-time thread does there:
            kernel.sched_rt_runtime_us, unless it is -1 (sched(7)). Where somebody made it all of sched_rt_period_us
            there is none before Linux 6.12; later that is usual, and the fair server gives others a share.
    """

    page_size: int
    huge_page_sizes: tuple[int, ...]
    transparent_hugepage: str | None
    unprivileged_userfaultfd: bool | None
    capabilities: tuple[str, ...] | None
    user_namespace: bool | None
    seccomp: str | None
    no_new_privs: bool | None
    dumpable: bool
    open_files: int | None
    max_map_count: int | None
    real_time_limit: bool | None


def read_limits() -> Limits:
    """Read them. Any thread may; changes nothing; well under a millisecond."""
    status = _status()
    effective = status.get("CapEff")
    seccomp = status.get("Seccomp")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    uids = _text(Path("/proc/self/uid_map"))
    real_time = _text(Path("/proc/sys/kernel/sched_rt_runtime_us"))
    enabled = _text(_SYS / "transparent_hugepage/enabled") or ""
    return Limits(
        page_size=page_size(),
        huge_page_sizes=_huge_page_sizes(),
        transparent_hugepage=enabled.partition("[")[2].partition("]")[0] or None,
        unprivileged_userfaultfd=_switch(_text(Path("/proc/sys/vm/unprivileged_userfaultfd"))),
        capabilities=_capabilities(int(effective, 16)) if effective else None,
        user_namespace=uids.split() != _EVERY_UID if uids else None,
        seccomp=_SECCOMP[int(seccomp)] if seccomp else None,
        no_new_privs=_switch(status.get("NoNewPrivs")),
        dumpable=_kernel.dumpable() == 1,
        open_files=None if files == resource.RLIM_INFINITY else files,
        max_map_count=_number(_text(Path("/proc/sys/vm/max_map_count"))),
        real_time_limit=real_time != "-1" if real_time else None,
    )


def _capabilities(bits: int) -> tuple[str, ...]:
    return tuple(name for number, name in _CAPABILITIES.items() if bits >> number & 1)


def _huge_page_sizes() -> tuple[int, ...]:
    try:
        names = [path.name for path in (_SYS / "hugepages").iterdir()]
    except OSError:
        return ()
    return tuple(sorted(int(name.removeprefix("hugepages-").removesuffix("kB")) << 10 for name in names))


def _text(path: Path) -> str | None:
    try:
        # The name of a process, in its status, is whatever bytes it likes.
        return path.read_bytes().decode(errors="replace").strip()
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    return int(text) if text else None


def _switch(text: str | None) -> bool | None:
    return None if not text else text != "0"


def _status() -> dict[str, str]:
    lines = (_text(Path("/proc/self/status")) or "").split("\n")
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


__all__ = ["NOT_DUMPABLE_HINT", "Limits", "read_limits"]
