from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest

from harmodt.environments import EnvironmentSpec, family, family_of
from harmodt.environments.locomotion import ANGLES, VELOCITIES, Locomotion
from harmodt.environments.locomotion.simulator import Walker
from harmodt.environments.simulation import Simulation
from harmodt.errors import UserError

TASKS = ("cheetah-dir-forward", "cheetah-dir-backward", "cheetah-vel-0.600", "ant-dir-4.002")
UNSEEN_VELOCITIES = ("0.225", "0.600", "1.200", "1.800", "2.025")  # 2, 7, 15, 23 and 26 of 40
ASSETS = Path(gymnasium.__file__).parent / "envs/mujoco/assets"


def make(task: str, start_seed: int = 0) -> Walker:
    walker = family_of([task]).make(task, start_seed)
    assert isinstance(walker, Walker)
    return walker


def draw_actions(task: str, steps: int, seed: int = 0) -> np.ndarray:
    shape = steps, family_of([task]).spec.action_size
    return np.random.default_rng(seed).uniform(-1.2, 1.2, shape).astype(np.float32)


def play(walker: Walker, first: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Observations and rewards of an episode, bit for bit."""
    rows = [np.append(first, [0, 0])]
    rows += [np.append(o, [r, walker.ended]) for o, r, _ in map(walker.step, actions)]
    return np.stack(rows)


# Against a simulation of the test's own


def copy_state(model: Any, data: Any) -> Any:
    """Another simulation in the same state, with what the solver starts from."""
    mine = mujoco.MjData(model)
    mine.qpos[:], mine.qvel[:] = data.qpos, data.qvel
    mine.qacc_warmstart[:] = data.qacc_warmstart
    return mine


def contact_cost(model: Any, data: Any) -> float:
    """Of the force and torque on every body about the centre of mass of all, from each contact."""
    wrenches = np.zeros((model.nbody, 6))
    for number, contact in enumerate(data.contact):
        local = np.zeros(6)
        mujoco.mj_contactForce(model, data, number, local)
        axes = contact.frame.reshape(3, 3)
        force, torque = local[:3] @ axes, local[3:] @ axes
        for geom, sign in ((contact.geom1, -1), (contact.geom2, 1)):
            body = model.geom_bodyid[geom]
            arm = contact.pos - data.subtree_com[model.body_rootid[body]]
            if body:  # the world feels nothing
                wrenches[body] += sign * np.append(torque + np.cross(arm, force), force)
    return 0.0005 * np.square(np.clip(wrenches, -1, 1)).sum()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_observations_and_rewards_are_those_of_the_definitions(task: str, seed: int) -> None:
    walker, kind = make(task), task.rpartition("-")[0]
    ant = kind == "ant-dir"
    model = mujoco.MjModel.from_xml_path(str(ASSETS / ("ant.xml" if ant else "half_cheetah.xml")))
    walker.reset_random(seed)
    contacts = 0.0
    for action in draw_actions(task, 120, seed):
        mine = copy_state(model, walker.data)
        before = mine.qpos.copy()
        clipped = np.clip(action.astype(np.float64), -1, 1)
        mine.ctrl[:] = clipped
        for _ in range(5):
            mujoco.mj_step(model, mine)
        cost = contact_cost(model, mine)
        observation, reward, solved = walker.step(action)
        assert not solved
        vx, vy = (walker.data.qpos[:2] - before[:2]) / (5 * 0.01)
        squares = float((clipped**2).sum())
        if ant:
            seen = [*mine.qpos[2:], *mine.qvel]
            expected = vx * math.cos(4.002) + vy * math.sin(4.002) - 0.5 * squares - cost + 1
            contacts += cost
        else:
            mujoco.mj_kinematics(model, mine)
            torso = mine.body("torso").xpos
            seen = [*mine.qpos[1:], *mine.qvel, *torso]
            goal = {TASKS[0]: vx, TASKS[1]: -vx, TASKS[2]: -abs(vx - 0.6)}[task]
            expected = goal - 0.05 * squares
        np.testing.assert_allclose(observation, seen, rtol=0, atol=1e-6)
        assert reward == pytest.approx(expected, rel=0, abs=1e-6)
        if walker.ended:
            break
    assert contacts > 0.01 or not ant


# Episodes


@pytest.mark.parametrize("task", TASKS)
def test_an_episode_does_not_depend_on_what_was_run_before(task: str) -> None:
    actions = draw_actions(task, 40)
    fresh = make(task, start_seed=3)
    from_goal = play(fresh, fresh.reset(4), actions)
    fresh = make(task)
    from_seed = play(fresh, fresh.reset_random(11), actions)
    used = make(task, start_seed=3)
    play(used, used.reset(9), draw_actions(task, 150, seed=1))
    for _ in range(2):
        np.testing.assert_array_equal(play(used, used.reset(4), actions), from_goal)
        np.testing.assert_array_equal(play(used, used.reset_random(11), actions), from_seed)


@pytest.mark.parametrize("task", TASKS)
def test_starts_differ_by_seed_and_number_and_lie_near_the_first_pose(task: str) -> None:
    walkers = [make(task, start_seed) for start_seed in (0, 1)]
    starts = [walker.reset(number) for walker in walkers for number in range(50)]
    assert len({tuple(start) for start in starts}) == 100
    starts = [walkers[0].reset_random(seed) for seed in range(50)]
    assert len({tuple(start) for start in starts}) == 50
    pose, walker = walkers[0].model.qpos0, walkers[0]
    noise = []
    for seed in range(50):
        walker.reset_random(seed)
        assert np.abs(walker.data.qpos - pose).max() <= 0.1
        noise.append(walker.data.qvel.copy())
    assert np.std(noise) == pytest.approx(0.1, rel=0.1)


def test_every_task_of_a_family_begins_in_the_same_states() -> None:
    tasks = "ant-dir-0.000", "ant-dir-1.000"
    np.testing.assert_array_equal(*(make(task, start_seed=2).reset(7) for task in tasks))


@pytest.mark.parametrize("task", TASKS)
def test_actions_are_clipped_and_must_be_finite(task: str) -> None:
    size = family_of([task]).spec.action_size
    walkers = [make(task), make(task)]
    for walker in walkers:
        walker.reset(0)
    wide = np.linspace(-3, 3, size)
    far, near = walkers[0].step(wide), walkers[1].step(wide.clip(-1, 1))
    np.testing.assert_array_equal(far[0], near[0])
    assert far[1] == near[1]
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match=rf"{task}: the action .* is not finite"):
            walkers[0].step(np.where(np.arange(size) == 1, bad, 0))
    after = [walker.step(np.zeros(size))[0] for walker in walkers]
    np.testing.assert_array_equal(*after)  # what was refused did nothing


@pytest.mark.parametrize("task", TASKS)
def test_an_episode_has_200_steps(task: str) -> None:
    walker, nothing = make(task), np.zeros(family_of([task]).spec.action_size)
    with pytest.raises(ValueError, match=f"{task}: the episode is over"):
        walker.step(nothing)
    for _ in range(2):
        walker.reset(0)
        for _ in range(200):
            walker.step(nothing)
        with pytest.raises(ValueError, match=f"{task}: the episode is over"):
            walker.step(nothing)


@pytest.mark.parametrize("height", [0.1, 1.2])
def test_an_ant_that_is_too_low_or_too_high_stands_still(height: float) -> None:
    ant = make("ant-dir-1.000")
    ant.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT  # the floor pushes it up
    ant.reset(0)
    actions = draw_actions("ant-dir-1.000", 200)
    ant.step(actions[0])
    assert not ant.ended
    ant.data.qpos[2] = height
    last, reward, _ = ant.step(actions[1])
    assert ant.ended and reward != 0 and not 0.2 <= last[0] <= 1
    for action in actions[2:]:
        observation, reward, solved = ant.step(action)
        assert ant.ended and reward == 0 and not solved
        np.testing.assert_array_equal(observation, last)
    with pytest.raises(ValueError, match="the episode is over"):
        ant.step(actions[0])
    ant.reset(0)
    assert not ant.ended
    assert ant.step(actions[0])[1] != 0


@pytest.mark.parametrize("height", [0.21, 0.99])
def test_an_ant_within_its_bounds_goes_on(height: float) -> None:
    ant = make("ant-dir-1.000")
    ant.reset(0)
    ant.data.qpos[2] = height
    assert not ant.fallen()


@pytest.mark.parametrize("task", TASKS)
def test_a_cheetah_falls_without_an_end_and_a_walker_can_be_filmed(task: str) -> None:
    walker = make(task)
    walker.reset(0)
    if "cheetah" in task:
        walker.data.qpos[1:3] = -0.5, math.pi
        walker.step(np.ones(6))
        assert not walker.ended
    scene = walker.scene
    assert scene.steps_per_second == 20
    assert mujoco.mj_name2id(scene.model, mujoco.mjtObj.mjOBJ_CAMERA, scene.camera) >= 0


# What an expert sees


@pytest.mark.parametrize("turn", [math.pi / 2, 1.0, 4.0])
def test_an_ant_in_a_turned_world_sees_the_same(turn: float) -> None:
    """And gets the same, but for contacts' forces: each is cut off along the world's axes."""
    ant, turned = make("ant-dir-0.700"), make("ant-dir-0.700")
    turned.goal = 0.7 + turn
    ant.reset_random(1)
    turned.reset_random(1)
    cos, sin = math.cos(turn), math.sin(turn)
    plane = np.array([[cos, -sin], [sin, cos]])
    for vector in (turned.data.qpos, turned.data.qvel):
        vector[:2] = plane @ vector[:2]
    quaternion = np.zeros(4)
    around_z = np.array([math.cos(turn / 2), 0, 0, math.sin(turn / 2)])
    mujoco.mju_mulQuat(quaternion, around_z, turned.data.qpos[3:7].copy())
    turned.data.qpos[3:7] = quaternion
    touched = 0
    for action in draw_actions("ant-dir-0.700", 20):
        rewards, features = [], []
        for walker in (ant, turned):
            observation, reward, _ = walker.step(action)
            goal = np.float64(walker.goal)
            quarter = math.isclose(turn, math.pi / 2)
            rewards.append(reward if quarter else walker.progress(walker.velocity, goal))
            features.append(walker.features(observation, goal))
        np.testing.assert_allclose(*features, rtol=0, atol=1e-9)
        assert rewards[0] == pytest.approx(rewards[1], rel=0, abs=1e-9)
        touched += bool(ant.data.cfrc_ext.any())
    assert touched > 2
    assert np.abs(turned.observe() - ant.observe()).max() > 0.1


@pytest.mark.parametrize("task", TASKS)
def test_features_are_of_many_observations_as_of_one(task: str) -> None:
    walker = make(task)
    observations = np.stack([walker.reset(number) for number in range(6)])
    before = observations.copy()
    goals = np.linspace(0, 3, 6)
    pairs = zip(observations, goals, strict=True)
    each = np.stack([walker.features(observation, np.float64(g)) for observation, g in pairs])
    np.testing.assert_array_equal(walker.features(observations, goals), each)
    np.testing.assert_array_equal(observations, before)
    if "cheetah" in task:
        np.testing.assert_array_equal(each, np.column_stack([observations[:, :17], goals]))


# Families


@pytest.mark.parametrize(
    ("name", "sizes", "tasks", "unseen"),
    [
        ("cheetah-dir", (20, 6), 2, {"cheetah-dir-forward", "cheetah-dir-backward"}),
        ("cheetah-vel", (20, 6), 40, {f"cheetah-vel-{v}" for v in UNSEEN_VELOCITIES}),
        ("ant-dir", (27, 8), 50, {f"ant-dir-{ANGLES[i]:.3f}" for i in (6, 17, 23, 30, 41)}),
    ],
)
def test_a_family_is_that_of_prompt_dt(
    name: str, sizes: tuple[int, int], tasks: int, unseen: set[str]
) -> None:
    found = family(name)
    assert isinstance(found, Locomotion)
    assert found.spec == EnvironmentSpec(name, *sizes, 200, success=False)
    assert pickle.loads(pickle.dumps(found)) == found
    everything = found.resolve_tasks([name])
    trained = found.resolve_tasks([f"{name}-train"])
    apart = found.resolve_tasks([f"{name}-unseen"])
    assert len(set(everything)) == tasks
    assert set(apart) == unseen
    if name == "cheetah-dir":  # both directions are trained on and met
        assert set(trained) == set(everything)
    else:
        assert sorted((*trained, *apart)) == sorted(everything)
    assert [found.goal_of(task) for task in everything] == list(found.task_goals)
    walker = found.make(everything[0])
    assert walker.reset(found.goals - 1).shape == (sizes[0],)
    assert walker.model.nu == sizes[1]
    assert walker.model.opt.timestep == 0.01


def test_goals_are_those_of_the_experiments() -> None:
    np.testing.assert_allclose(VELOCITIES, np.linspace(0.075, 3, 40), rtol=0, atol=1e-12)
    assert len(set(ANGLES)) == 50 and min(ANGLES) >= 0 and max(ANGLES) < 2 * math.pi


@pytest.mark.parametrize(
    ("names", "tasks"),
    [
        (["cheetah-vel-0.6"], ["cheetah-vel-0.600"]),
        (["cheetah-vel-0.6", "cheetah-vel-0.600", "cheetah-vel-3"], ["cheetah-vel-0.600", ""]),
        ([" Cheetah-Vel-0.65 "], ["cheetah-vel-0.650"]),
        (["ant-dir-0.70001"], ["ant-dir-0.70001"]),
        (["ant-dir-0"], ["ant-dir-0.000"]),
        (["ant-dir-0.00001"], ["ant-dir-0.00001"]),
        (["cheetah-dir-backward"], ["cheetah-dir-backward"]),
    ],
)
def test_any_goal_makes_a_task(names: list[str], tasks: list[str]) -> None:
    found = family_of(names)
    assert isinstance(found, Locomotion)
    resolved = found.resolve_tasks(names)
    assert list(resolved) == [task or "cheetah-vel-3.000" for task in tasks]
    assert found.resolve_tasks(resolved) == resolved
    goal = found.goal_of(resolved[0])
    assert goal == (-1.0 if "backward" in names[0] else float(names[0].rpartition("-")[2]))
    walker = found.make(resolved[0])
    assert isinstance(walker, Walker) and walker.goal == goal


@pytest.mark.parametrize(
    ("name", "tasks", "reason"),
    [
        ("cheetah-vel", [], "no task is named: name tasks, or the set cheetah-vel"),
        ("cheetah-vel", ["cheetah-vel-fast"], "no task 'cheetah-vel-fast': name cheetah-vel, chee"),
        ("cheetah-vel", ["cheetah-vel-nan"], "no task 'cheetah-vel-nan'"),
        ("cheetah-vel", ["cheetah-vel--1"], "or a goal such as cheetah-vel-0.075"),
        ("cheetah-vel", ["cheetah-vel-1e3"], "no task 'cheetah-vel-1e3'"),
        ("cheetah-vel", ["cheetah-vel-100"], "no task 'cheetah-vel-100'"),
        ("cheetah-vel", ["ant-dir-1.000"], "no task 'ant-dir-1.000'"),
        ("cheetah-dir", ["cheetah-dir-1"], "choose among .*cheetah-dir-forward, cheetah-dir-back"),
        ("ant-dir", ["ant-dir", "ant-dir-"], "no task 'ant-dir-'"),
    ],
)
def test_a_name_that_is_none_is_answered(name: str, tasks: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        family(name).resolve_tasks(tasks)


@pytest.mark.parametrize("name", ["cheetah-dir", "cheetah-vel", "ant-dir"])
def test_a_family_is_found_by_its_tasks(name: str) -> None:
    assert family_of([name]).spec.family == name
    assert family_of(family(name).resolve_tasks([f"{name}-unseen"])).spec.family == name


def test_tasks_of_two_families_have_none() -> None:
    with pytest.raises(UserError, match="no task 'reach-v3'"):
        family_of(["ant-dir-1.000", "reach-v3"])


def test_walkers_do_not_depend_on_the_number_of_workers() -> None:
    tasks = ["ant-dir-1.000", "ant-dir-1.000", "ant-dir-2.500"]
    actions = np.random.default_rng(0).uniform(-1, 1, (25, 3, 8))
    played = []
    for workers in (1, 2):
        with Simulation("ant-dir", tasks, goal_seed=5, workers=workers) as simulation:
            rows = [(simulation.reset(np.array([0, 1, 2])), np.zeros(3), np.zeros(3, bool))]
            rows += [simulation.step(action) for action in actions]
        played.append(rows)
    for of_one, of_two in zip(*played, strict=True):
        for one, two in zip(of_one, of_two, strict=True):
            np.testing.assert_array_equal(one, two)
    alone = make("ant-dir-2.500", start_seed=5)
    expected = play(alone, alone.reset(2), actions[:, 2])
    np.testing.assert_array_equal(np.stack([row[0][2] for row in played[0]]), expected[:, :-2])
    np.testing.assert_array_equal([row[1][2] for row in played[0]], expected[:, -2])
