from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmodt import cores
from harmodt.cores import SHARE, count_cores, share
from harmodt.errors import UserError


@pytest.fixture(autouse=True)
def _sixteen_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine of 16 cores without a quota and without a share."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(cores, "_PROCESS", tmp_path)
    monkeypatch.delenv(SHARE, raising=False)


def container(folder: Path, groups: str, mounts: str, quotas: dict[str, str]) -> None:
    """Write what /proc/self and /sys/fs/cgroup hold in a container.

    Args:
        folder: stands for /proc/self; the mounts are in its folder `sys`.
        groups: the content of /proc/self/cgroup.
        mounts: lines of /proc/self/mountinfo, in which SYS stands for the folder `sys`.
        quotas: files below that folder.
    """
    (folder / "cgroup").write_text(groups)
    (folder / "mountinfo").write_text(mounts.replace("SYS", str(folder / "sys")))
    for name, content in quotas.items():
        file = folder / "sys" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


V2 = "29 23 0:26 / SYS rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / SYS rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 ROOT SYS/cpu,cpuacct rw,relatime master:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:31 / SYS/cpuset rw,relatime - cgroup cgroup rw,cpuset\n"
)
V1_GROUPS = "5:cpuset:/other\n4:cpu,cpuacct:{}\n1:name=systemd:/other\n0::/other\n"


@pytest.mark.parametrize(
    ("groups", "mounts", "quotas", "expected"),
    [
        ("0::/\n", V2, {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", V2, {"cpu.max": "150000 100000\n"}, 2),  # a part of a core counts as one
        ("0::/\n", V2, {"cpu.max": "1000 100000\n"}, 1),
        ("0::/\n", V2, {"cpu.max": "max 100000\n"}, 16),
        ("0::/\n", V2, {"cpu.max": "6400000 100000\n"}, 16),  # more than there are
        ("0::/\n", V2, {}, 16),  # the root of all groups has no such file
        ("0::/a/b\n", V2, {"cpu.max": "max 9", "a/cpu.max": "3 1", "a/b/cpu.max": "8 1"}, 3),
        ("0::/a/b\n", V2, {"a/cpu.max": "8 1", "a/b/cpu.max": "3 1", "a/b/c/cpu.max": "1 1"}, 3),
        ("0::/../x\n", V2, {"cpu.max": "5 1", "../x/cpu.max": "1 1"}, 5),
        ("0::/\n", "28 23 0:25 / /mnt rw - tmpfs  rw\n" + V2, {"cpu.max": "2 1"}, 2),  # no source
        ("0::/a b\n", V2.replace("SYS", r"SYS/x\040y"), {"x y/a b/cpu.max": "4 1"}, 4),
        (
            V1_GROUPS.format("/docker/1"),  # the container sees its own group alone
            V1.replace("ROOT", "/docker/1"),
            {"cpu,cpuacct/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            4,
        ),
        (
            V1_GROUPS.format("/a"),
            V1.replace("ROOT", "/"),
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/a/cpu.cfs_quota_us": "300000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
                "cpuset/other/cpu.cfs_quota_us": "100000\n",  # of another hierarchy
                "cpuset/other/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
)
def test_a_containers_quota_limits_the_cores(
    tmp_path: Path, groups: str, mounts: str, quotas: dict[str, str], expected: int
) -> None:
    container(tmp_path, groups, mounts, quotas)
    assert count_cores() == expected


@given(st.lists(st.none() | st.tuples(st.integers(1, 40), st.integers(1, 9)), max_size=5))
def test_the_least_quota_of_all_groups_above_counts(
    tmp_path_factory: pytest.TempPathFactory, limits: list[tuple[int, int] | None]
) -> None:
    folder = tmp_path_factory.mktemp("process")
    names = [f"g{depth}" for depth in range(len(limits))]
    files = {
        "/".join([*names[: depth + 1], "cpu.max"]): f"{limit[0]} {limit[1]}" if limit else "max 1"
        for depth, limit in enumerate(limits)
    }
    container(folder, f"0::/{'/'.join(names)}\n", V2, files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cores, "_PROCESS", folder)
        found = count_cores()
    allowed = [quota / period for quota, period in filter(None, limits)]
    assert found == math.ceil(min([16, *allowed]))


def test_affinity_quota_and_share_all_limit_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert count_cores() == 16
    monkeypatch.setenv(SHARE, "9")
    assert count_cores() == 9
    container(tmp_path, "0::/\n", V2, {"cpu.max": "8 1"})
    assert count_cores() == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    assert count_cores() == 2


def test_a_share_limits_the_threads_of_every_library() -> None:
    names = {"HARMODT_CORES", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}
    assert share(3) == dict.fromkeys(names, "3")


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "all", "²"])
def test_a_share_that_is_no_number_of_cores_is_named(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv(SHARE, given)
    with pytest.raises(UserError, match=r"HARMODT_CORES is .*: set it to a whole number of 1 or"):
        count_cores()
