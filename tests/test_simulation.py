from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmodt import environments
from harmodt.environments import METAWORLD
from harmodt.environments.metaworld import MetaWorldEnvironment
from harmodt.environments.simulation import Simulation, _share_out
from harmodt.errors import describe
from harmodt.workers import WorkerError

TASKS = ["reach-v3", "reach-v3", "drawer-close-v3", "reach-v3"]
GOALS = np.array([4, 0, 9, 4])
GOAL_SEED = 3


def play_alone(row: int, actions: np.ndarray) -> list[tuple]:
    environment = MetaWorldEnvironment(TASKS[row], GOAL_SEED)
    first = environment.reset(int(GOALS[row]))
    return [(first, 0.0, False)] + [environment.step(action[row]) for action in actions]


PARTS = [None, [range(1), range(1, 4)], [range(2), range(2, 4)]]


@pytest.mark.parametrize(
    ("workers", "parts"), [(1, None), (3, None), (9, None), (2, PARTS[1]), (3, PARTS[2])]
)
def test_every_row_is_the_environment_on_its_own(workers, parts):
    actions = np.random.default_rng(0).uniform(-1.5, 1.5, (12, len(TASKS), 4))
    with Simulation(METAWORLD, TASKS, GOAL_SEED, workers, parts=parts) as simulation:
        simulation.reset(GOALS[::-1])
        for action in actions:
            simulation.step(-action)
        played = [(simulation.reset(GOALS), np.zeros(4), np.zeros(4, bool))]
        played += [simulation.step(action) for action in actions]
    observations, rewards, successes = (np.stack(part) for part in zip(*played, strict=True))
    assert observations.shape == (13, 4, 39) and observations.dtype == np.float64
    assert rewards.dtype == np.float64 and successes.dtype == bool
    for row in range(len(TASKS)):
        alone = play_alone(row, actions)
        np.testing.assert_array_equal(observations[:, row], [step[0] for step in alone])
        np.testing.assert_array_equal(rewards[:, row], [step[1] for step in alone])
        np.testing.assert_array_equal(successes[:, row], [step[2] for step in alone])


def test_a_part_begins_its_next_step_before_the_other_part_ends_its_own(monkeypatch):
    monkeypatch.setitem(environments.FAMILIES, "toy", "toy_family:Toy")
    tasks, parts = ["slow", "quick", "slow"], [range(1), range(1, 3)]
    moves = np.array([[1, 0], [-0.5, 0], [4, 0]])
    with Simulation("toy", tasks, goal_seed=9, workers=2, parts=parts) as simulation:
        simulation.reset(np.array([0, 1, 3]))
        simulation.begin_step(moves[:1], 0)
        simulation.begin_step(moves[1:], 1)
        first, paid, _ = simulation.finish_step(0)
        simulation.begin_step(moves[:1], 0)
        second, more, solved = simulation.finish_step(1)
        again, _, _ = simulation.finish_step(0)
    np.testing.assert_array_equal(first, [[0.5, 9, 1]])
    np.testing.assert_array_equal(again, [[1, 9, 2]])
    np.testing.assert_array_equal(second, [[0, 9, 1], [3.5, 9, 1]])
    assert paid.tolist() == [0.5] and more.tolist() == [-1, 0.5] and solved.shape == (2,)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3), workers=st.integers(1, 6))
def test_workers_share_the_rows_of_each_part_and_of_all_parts_equally(sizes, workers):
    ends = np.cumsum([0, *sizes]).tolist()
    parts = [range(*pair) for pair in pairwise(ends)]
    shares = [_share_out(part, workers) for part in parts]
    for part, own in zip(parts, shares, strict=True):
        assert np.concatenate([*own.values()]).tolist() == [*part]
        counts = [len(own.get(worker, ())) for worker in range(workers)]
        assert max(counts) - min(counts) <= 1
    totals = [sum(len(own.get(worker, ())) for own in shares) for worker in range(workers)]
    assert max(totals) - min(totals) <= 1


def test_another_family_is_simulated(monkeypatch):
    monkeypatch.setitem(environments.FAMILIES, "toy", "toy_family:Toy")
    spec = environments.family("toy").spec
    with Simulation(spec, ["slow", "quick", "quick"], goal_seed=9, workers=2) as simulation:
        first = simulation.reset(np.array([0, 1, 3]))
        observations, rewards, successes = simulation.step(np.array([[1, 0], [-0.5, 0], [4, 0]]))
    np.testing.assert_array_equal(first, [[0, 9, 0], [1, 9, 0], [3, 9, 0]])
    np.testing.assert_array_equal(observations, [[0.5, 9, 1], [0, 9, 1], [5, 9, 1]])
    np.testing.assert_array_equal(rewards, [0.5, -1, 2])
    assert not successes.any()


def test_an_exception_in_a_worker_is_reported_with_its_tasks():
    with Simulation(METAWORLD, TASKS, GOAL_SEED, 2) as simulation:
        processes = [worker.process for worker in simulation._workers]
        simulation.reset(GOALS)
        actions = np.zeros((4, 4))
        actions[2] = np.nan
        with pytest.raises(WorkerError, match=r"drawer-close-v3, reach-v3[^$]*not finite"):
            simulation.step(actions)
    assert [process.returncode for process in processes] == [0, 0]


def test_a_failure_to_build_an_environment_is_reported():
    with pytest.raises(WorkerError, match="no-such-task-v3"):
        Simulation(METAWORLD, ["no-such-task-v3"], GOAL_SEED)


def test_what_a_worker_is_refused_is_refused_here(monkeypatch):
    monkeypatch.setitem(environments.FAMILIES, "full", "toy_family:Full")
    with pytest.raises(OSError, match=r"No space left on device: 'film\.mp4'") as refused:
        Simulation("full", ["slow"], 0)
    assert describe(refused.value).startswith("film.mp4: the disk is full")


@pytest.mark.parametrize("options", [[], ["-P"]])
def test_workers_look_for_modules_where_their_parent_does(tmp_path, options):
    """A folder's name has a colon; and under -P, nothing comes from the current directory."""
    if options and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no -P")
    here = tmp_path / "a:b"
    here.mkdir()
    trap = "open('trapped', 'w')"
    for name in ("sys", "harmodt", "numpy", "multiprocessing"):
        (here / f"{name}.py").write_text(trap if options else "")
    program = (
        "import sys\n"
        "sys.path = [path for path in sys.path if path]\n"
        f"sys.path += {[*sys.path, str(here)]!r}\n"
        "from harmodt import environments, errors\n"
        "from harmodt.environments.simulation import Simulation\n"
        "environments.FAMILIES['lost'] = 'toy_family:Lost'\n"
        "try: Simulation('lost', ['slow'], 0)\n"
        "except errors.UserError as error: print(sys.path, error, sep='\\n')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *options, "-c", program]
    result = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    ours, theirs = result.stdout.splitlines()
    assert ours == theirs and "a:b" in theirs
    assert not (here / "trapped").exists()


@pytest.mark.parametrize("wait", [False, True])
def test_a_killed_worker_is_reported_at_once(wait):
    with Simulation(METAWORLD, TASKS, GOAL_SEED, 2) as simulation:
        simulation.reset(GOALS)
        simulation._workers[1].process.kill()
        if wait:
            simulation._workers[1].process.wait()
        began = time.monotonic()
        match = r"worker \(drawer-close-v3, reach-v3\) was killed by signal 9"
        with pytest.raises(WorkerError, match=match) as death:
            for _ in range(2):
                simulation.step(np.zeros((4, 4)))
    assert describe(death.value) == str(death.value)  # a sentence, not an error of the program
    assert time.monotonic() - began < 5


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the workers' fate from /proc")
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_when_the_parent_dies(death):
    program = (
        "import time\n"
        "from harmodt.environments.simulation import Simulation\n"
        "simulation = Simulation('metaworld', ['reach-v3'] * 2, 0, 2)\n"
        "print(*[worker.process.pid for worker in simulation._workers], flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(map(runs, workers))
    parent.send_signal(death)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, workers))


def runs(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # a zombie waits for init alone
