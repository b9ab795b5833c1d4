"""Measures the time and the memory of opening a store of 5 M steps.

pytest bench/bench_store.py --benchmark-only
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from measuring import random_store

from harmodt.data.store import DataStore
from harmodt.environments import METAWORLD, family

STEPS = 5_000_000

OPEN_ALL = """
import re, sys
from pathlib import Path
from harmodt.data.store import DataStore

def peak():  # this process's peak in KB; getrusage would include the parent's
    return re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]

before = peak()
store = DataStore.open(Path(sys.argv[1]))
tasks = [store.task(name) for name in store.tasks]
print(peak(), before)
"""


@pytest.mark.benchmark(group="open a store of 5 M steps")
def bench_open(benchmark, tmp_path: Path) -> None:
    metaworld = family(METAWORLD)
    episodes = STEPS // metaworld.spec.episode_length // len(metaworld.task_sets["mt5"])
    if benchmark.disabled:
        episodes = 2
    path = random_store(tmp_path / "store", episodes).path

    def open_all() -> None:
        store = DataStore.open(path)
        for name in store.tasks:
            store.task(name)

    benchmark.pedantic(open_all, rounds=5)
    command = [sys.executable, "-c", OPEN_ALL, str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after, before = map(int, output.split())
    benchmark.extra_info["resident_mb"] = after >> 10
    benchmark.extra_info["of_which_opening_mb"] = (after - before) >> 10
    new = (after - before) >> 10
    print(f"\nresident memory after opening: {after >> 10} MB; opening took {new} MB of it")
