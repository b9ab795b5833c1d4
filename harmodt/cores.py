"""The number of cores that this process may use, and the share that a child process gets."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path, PurePosixPath

from .errors import UserError

SHARE = "HARMODT_CORES"
"""The environment variable that limits the cores of a process and of its children."""

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""The environment variables that set how many threads numerical libraries start."""

_PROCESS = Path("/proc/self")


def count_cores() -> int:
    """Count the cores that this process may use, 1 or more.

    The result is the smallest of three numbers: the cores that the process may run on (its
    affinity), the CPU quota of its container (rounded up), and `HARMODT_CORES`.

    Raises:
        UserError: `HARMODT_CORES` is not a whole number of 1 or more.
    """
    if hasattr(os, "sched_getaffinity"):
        there = len(os.sched_getaffinity(0))
    else:
        there = os.cpu_count() or 1
    given = os.environ.get(SHARE, "")
    if given and not (given.isascii() and given.isdigit() and int(given)):
        raise UserError(
            f"the environment variable {SHARE} is {given!r}: set it to a whole number of 1 or "
            "more, or unset it"
        )
    return int(min(there, _quota(_PROCESS), int(given or there)))


def share(cores: int) -> dict[str, str]:
    """The environment variables for a child process that may use `cores` cores."""
    return dict.fromkeys((SHARE, *THREADS), str(cores))


def _quota(process: Path) -> float:
    """The number of cores that a process's CPU quota allows, rounded up; infinite without a quota.

    The quota of a control group also limits all groups in it, so the smallest quota counts.

    Args:
        process: the folder of the process in /proc.
    """
    try:
        groups = (process / "cgroup").read_text(errors="surrogateescape").splitlines()
        mounts = (process / "mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return math.inf  # this system has no control groups
    # The path of the process's group for each controller; version 2 has one group, under "".
    paths: dict[str, str] = {}
    for line in groups:
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    quotas: list[float] = []
    for line in mounts:
        before, _, after = line.partition(" - ")
        root, point = map(_unescaped, before.split()[3:5])
        kind, _, options = after.rstrip().split(" ")[:3]  # a mount's source may be empty
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if controller in paths and (kind == "cgroup2" or "cpu" in options.split(",")):
            quotas += map(_quota_of, _folders(paths[controller], root, Path(point)))
    return min(quotas, default=math.inf)


def _folders(path: str, root: str, point: Path) -> list[Path]:
    """The folders of a control group and of the groups that contain it.

    Args:
        path: the group's path in the hierarchy of groups.
        root: the path of the group that is mounted, in the same hierarchy.
        point: the folder where the group `root` is mounted.
    """
    try:
        inside = PurePosixPath(path).relative_to(root).parts
    except ValueError:
        inside = ()
    if ".." in inside:  # the group lies outside `root`, and the mount shows only `root`
        inside = ()
    return [point.joinpath(*inside[:depth]) for depth in range(len(inside) + 1)]


def _quota_of(folder: Path) -> float:
    """The quota of one control group, in cores, rounded up; infinite without a quota."""
    text = _read(folder / "cpu.max")  # version 2; the files below are version 1
    text = text or _read(folder / "cpu.cfs_quota_us") + _read(folder / "cpu.cfs_period_us")
    limit = re.fullmatch(r"([1-9]\d*)\s+([1-9]\d*)\s*", text)  # else "max" or -1: no quota
    return -(-int(limit[1]) // int(limit[2])) if limit else math.inf


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _unescaped(path: str) -> str:
    """Decode a path of mountinfo, which writes a space as \\040."""
    return re.sub(r"\\(\d{3})", lambda digits: chr(int(digits[1], 8)), path)
