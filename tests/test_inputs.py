from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny import SPEC, TASKS, configure, make_episode, make_store, make_trainer

from harmodt.batch import Steps
from harmodt.config import TrainConfig
from harmodt.data.inputs import Inputs, TaskConditioning, load_conditioning, save_conditioning
from harmodt.data.store import DataStore, Episode, Episodes, TaskData
from harmodt.data.trajectories import Trajectories
from harmodt.data.windows import WindowSampler
from harmodt.draws import TRAIN, Draws
from harmodt.errors import UserError
from harmodt.files import checksum
from harmodt.policies.decision import DecisionPolicy


def task_data(path: Path, prompt_lengths: tuple[int, ...] = (12, 9, 7)) -> TaskData:
    return make_store(path, prompt_lengths=prompt_lengths).task(TASKS[1])


def join_episodes(episodes: Sequence[Episode]) -> Episodes:
    """Episodes as a store has them, but in memory."""
    rewards = [np.asarray(episode.rewards, np.float64) for episode in episodes]
    returns_to_go = [values[::-1].cumsum()[::-1] for values in rewards]
    return Episodes(
        observations=np.concatenate([episode.observations for episode in episodes]),
        actions=np.concatenate([episode.actions for episode in episodes]),
        rewards=np.concatenate(rewards).astype(np.float32),
        returns_to_go=np.concatenate(returns_to_go).astype(np.float32),
        episode_starts=np.cumsum([0, *map(len, rewards)]),
        successes=np.array([episode.success for episode in episodes], np.int8),
    )


def make_inputs(data: TaskData, **changes: object) -> tuple[Inputs, TaskConditioning]:
    """Inputs of one task with unscaled returns, and what they know of the task."""
    config: TrainConfig = configure(**{"return_scale": 1.0, **changes})
    conditioning = TaskConditioning.from_data(data, config)
    max_timesteps = config.own.model.max_timesteps
    return Inputs([conditioning], config.data, max_timesteps, config.own.prompts()), conditioning


def draw(inputs: Inputs, count: int, acting: bool = False) -> Steps:
    """Prompts [1, count, K*] of the first task."""
    task_ids, words = torch.tensor([0]), Draws(0, TRAIN, 0).words(torch.arange(count)[None])
    return inputs.prompts(task_ids, *inputs.draw_prompts(task_ids, *words[:2], acting))


def places(prompts: Steps, episodes: Episodes) -> tuple[np.ndarray, np.ndarray]:
    """Episode and first step [n] of prompts, which are checked to be consecutive steps of one."""
    prompts = Steps(*(part[0].numpy() for part in prompts))
    order = np.argsort(episodes.returns_to_go)  # random rewards make each one unique
    found = np.searchsorted(episodes.returns_to_go[order], prompts.returns_to_go)
    indices = order[found]
    np.testing.assert_array_equal(episodes.returns_to_go[indices], prompts.returns_to_go)
    np.testing.assert_array_equal(np.diff(indices), 1)
    episode = np.searchsorted(episodes.episode_starts, indices, "right") - 1
    assert (episode == episode[:, :1]).all()
    np.testing.assert_array_equal(prompts.timesteps, indices - episodes.episode_starts[episode])
    assert prompts.valid.all()
    return episode[:, 0], prompts.timesteps[:, 0]


def test_steps_are_normalised_scaled_clipped_and_counted(tmp_path: Path) -> None:
    data = task_data(tmp_path / "store")
    assert data.observation_std[5] == 0
    inputs, conditioning = make_inputs(
        data, deviation_floor=0.01, return_scale=500.0, max_timesteps=30
    )
    assert conditioning.name == TASKS[1]
    observations = np.tile(data.observation_mean.astype(np.float64), (2, 1))
    observations[1] += 0.005
    steps = inputs.steps(
        torch.tensor([0, 0]),
        returns_to_go=torch.tensor([1000.0, -5.0], dtype=torch.float64),
        observations=torch.from_numpy(observations),
        actions=torch.tensor([[-1.5, -1, 0.25, 7]] * 2),
        timesteps=torch.tensor([29, 31]),
        valid=torch.tensor([True, False]),
    )
    np.testing.assert_allclose(steps.observations[0], 0, atol=1e-6)
    assert steps.observations[1, 5].item() == pytest.approx(0.5, rel=1e-4)
    assert steps.observations[1, 6].item() == pytest.approx(
        0.005 / data.observation_std[6], rel=1e-2
    )
    np.testing.assert_allclose(steps.returns_to_go, [2.0, -0.01], rtol=1e-6)
    assert steps.actions.tolist() == [[-1, -1, 0.25, 1]] * 2
    assert steps.timesteps.tolist() == [29, 29]
    assert steps.valid.tolist() == [True, False]
    for name in ("observations", "returns_to_go", "actions"):
        assert getattr(steps, name).dtype == torch.float32


def test_a_task_is_normalised_by_its_own_data(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")  # its tasks' observations are around 0, 1 and 2
    config = configure()
    data = [store.task(name) for name in TASKS]
    tasks = [TaskConditioning.from_data(task, config) for task in data]
    inputs = Inputs(tasks, config.data, 50)
    stored = Trajectories([task.train for task in data])
    for task in range(3):
        length = len(data[task].train.observations)
        first, times = torch.tensor([[3 * task]]), torch.arange(length)[None, None]
        valid = torch.ones(1, 1, length, dtype=torch.bool)
        steps = inputs.of_episodes(stored, torch.tensor([task]), first, times, valid)
        observations = steps.observations[0, 0].numpy()
        np.testing.assert_allclose(observations.mean(0), 0, atol=1e-5)
        spread = np.delete(observations.std(0), 5)
        np.testing.assert_allclose(spread, 1, rtol=1e-5)


def play(
    policy: DecisionPolicy, observations: np.ndarray, rewards: np.ndarray
) -> tuple[list[Steps], np.ndarray]:
    """The histories that the model was given, and the actions [steps, rows, 4]."""
    histories, actions, original = [], [], policy.model.act

    def act(history: Steps, *arguments: Any) -> torch.Tensor:
        histories.append(history)
        return original(history, *arguments)

    policy.model.act = act
    for observation, reward in zip(observations, rewards, strict=True):
        actions.append(policy.act(observation))
        policy.record_rewards(reward)
    return histories, np.stack(actions)


def check_same(observed: Steps, stored: Steps, row: int) -> None:
    """They are equal bit for bit; the last action was not chosen yet."""
    for name, ours, theirs in zip(Steps._fields, observed, stored, strict=True):
        at = slice(None, -1) if name == "actions" else slice(None)
        np.testing.assert_array_equal(ours[row, 0].numpy()[at], theirs[at], err_msg=name)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("data") / "store")


def test_an_observed_step_is_the_same_input_as_a_stored_one(store: DataStore) -> None:
    length, tasks = 15, np.array([0, 2])
    config = configure(action_dropout=0.0, max_timesteps=9, batch_per_task=200)
    trainer = make_trainer(store, config)
    policy = trainer.learner.policy(0)
    rng = np.random.default_rng(0)
    observations = rng.normal(1, 2, (length, 2, 39))  # float64, as environments give them
    rewards = rng.integers(1, 80, (length, 2)) / 8  # their sums are exact
    policy.start(tasks, target_returns=rewards.sum(0))
    histories, actions = play(policy, observations, rewards)
    played = [
        join_episodes([Episode(observations[:, r].astype(np.float32), actions[:, r],
                               rewards[:, r].astype(np.float32), 1)])
        for r in range(2)
    ]  # fmt: skip
    inputs, context = trainer.learner.inputs(), config.own.model.context_length
    trajectories, first = Trajectories([played[0]] * 2 + [played[1]]), torch.tensor([[0], [2]])
    for time, history in enumerate(histories):
        times = torch.arange(max(time - context + 1, 0), time + 1).expand(2, 1, -1)
        valid = torch.ones(times.shape, dtype=torch.bool)
        stored = inputs.of_episodes(trajectories, torch.from_numpy(tasks), first, times, valid)
        for row in range(2):
            check_same(history, Steps(*(part[row, 0] for part in stored)), row)

    data = [store.task(name) for name in store.tasks]
    for row in range(2):
        data[tasks[row]] = dataclasses.replace(data[tasks[row]], train=played[row])
    sampler = WindowSampler(Trajectories([task.train for task in data]), inputs, context)
    batch, _ = sampler.sample(tasks.tolist(), Draws(0, TRAIN, 0))
    scale = config.data.return_scale
    for row in range(2):
        ends = {float(history.returns_to_go[row, 0, -1] * scale): history for history in histories}
        windows = [Steps(*(part[row, w] for part in batch.history)) for w in range(200)]
        whole = [window for window in windows if window.valid.all()]
        found = {float(window.returns_to_go[-1] * np.float32(scale)) for window in whole}
        assert len(found) == length - context + 1
        for window in whole:
            check_same(ends[float(window.returns_to_go[-1] * np.float32(scale))], window, row)


@pytest.mark.parametrize("pool", [1, 3, 5])
def test_prompts_are_the_best_episodes(tmp_path: Path, pool: int) -> None:
    lengths = (3, 8, 14, 5, 6, 2, 9, 4)
    returns = (4.0, 9.0, 1.0, 7.0, 2.0, 20.0, 8.0, 5.0)  # the highest is too short
    rng = np.random.default_rng(0)
    episodes = []
    for length, total in zip(lengths, returns, strict=True):
        episode = make_episode(rng, length)
        rewards = episode.rewards * (total / episode.rewards.sum())
        episodes.append(episode._replace(rewards=rewards))
    data = task_data(tmp_path / "store")
    data = dataclasses.replace(data, prompts=join_episodes(episodes))
    inputs, conditioning = make_inputs(data, prompt_length=3, prompt_pool=pool)
    prompts = conditioning.prompts
    assert len(prompts) == pool
    assert prompts.lengths.tolist() == [8, 9, 5, 4, 3][:pool]
    np.testing.assert_allclose(prompts.returns, [9, 8, 7, 5, 4][:pool], rtol=1e-5)
    for new, old in enumerate((1, 6, 3, 7, 0)[:pool]):
        ours, theirs = prompts.episode_starts[new], data.prompts.episode_starts[old]
        for name in ("observations", "actions", "rewards", "returns_to_go"):
            np.testing.assert_array_equal(
                getattr(prompts, name)[ours : ours + lengths[old]],
                getattr(data.prompts, name)[theirs : theirs + lengths[old]],
            )
    drawn, _ = places(draw(inputs, 300), prompts)
    assert set(drawn.tolist()) == set(range(pool))


def test_a_pool_larger_than_what_there_is_takes_all(tmp_path: Path) -> None:
    _, conditioning = make_inputs(task_data(tmp_path / "store"), prompt_pool=100)
    assert sorted(conditioning.prompts.lengths.tolist()) == [7, 9, 12]


@pytest.mark.parametrize(
    ("prompt_lengths", "remedy"),
    [((), "train with --algorithm mtdt"), ((3, 4), "lower --prompt-len")],
)
def test_a_task_without_a_prompt_that_is_long_enough_is_named(
    tmp_path: Path, prompt_lengths: tuple[int, ...], remedy: str
) -> None:
    data = task_data(tmp_path / "store", prompt_lengths)
    named = f"task push-v3 has no prompt episode of at least 5 steps: .* or {remedy}"
    with pytest.raises(UserError, match=named):
        TaskConditioning.from_data(data, configure(prompt_length=5))


@pytest.mark.parametrize("prompt_lengths", [(), (2,)])
def test_without_a_prompt_in_the_model_none_is_needed(
    tmp_path: Path, prompt_lengths: tuple[int, ...]
) -> None:
    data = task_data(tmp_path / "store", prompt_lengths)
    conditioning = TaskConditioning.from_data(data, configure(algorithm="mtdt"))
    path = tmp_path / "conditioning.safetensors"
    checksum = save_conditioning(path, [conditioning], "a")
    (loaded,) = load_conditioning(path, [TASKS[1]], SPEC, checksum)
    assert len(conditioning.prompts) == len(loaded.prompts) == 0


def test_the_target_is_the_best_return_or_the_one_given(tmp_path: Path) -> None:
    data = task_data(tmp_path / "store")
    best = max(
        data.train.rewards[start:stop].sum() for start, stop in pairwise(data.train.episode_starts)
    )
    assert TaskConditioning.from_data(data, configure()).target_return == pytest.approx(best)
    assert TaskConditioning.from_data(data, configure(target_return=7.5)).target_return == 7.5
    assert TaskConditioning.from_data(data, configure(target_return=0.0)).target_return == 0.0


@pytest.mark.parametrize("acting", [False, True])
def test_a_random_prompt_is_any_steps_of_one_episode(tmp_path: Path, acting: bool) -> None:
    inputs, conditioning = make_inputs(task_data(tmp_path / "store"), prompt_length=3)
    drawn = draw(inputs, 500, acting)
    assert drawn.valid.shape == (1, 500, 3)
    found = set(zip(*map(np.ndarray.tolist, places(drawn, conditioning.prompts)), strict=True))
    lengths = conditioning.prompts.lengths
    assert found == {(e, start) for e in range(3) for start in range(lengths[e] - 2)}


def test_a_prompt_at_the_end_leaves_out_the_last_step_and_is_the_best_episode_when_acting(
    tmp_path: Path,
) -> None:
    inputs, conditioning = make_inputs(
        task_data(tmp_path / "store"), prompt_length=3, prompt_position="end"
    )
    lengths = conditioning.prompts.lengths
    episodes, starts = places(draw(inputs, 100), conditioning.prompts)
    assert set(episodes.tolist()) == {0, 1, 2}
    # The authors' code begins at max(T - K* - 1, 0).
    np.testing.assert_array_equal(starts, np.maximum(lengths[episodes] - 3 - 1, 0))
    episodes, starts = places(draw(inputs, 100, acting=True), conditioning.prompts)
    assert conditioning.prompts.returns[0] == conditioning.prompts.returns.max()
    assert set(episodes.tolist()) == {0}
    assert set(starts.tolist()) == {lengths[0] - 4}


@pytest.mark.parametrize("position", ["random", "end"])
def test_a_prompt_can_be_a_whole_episode(tmp_path: Path, position: str) -> None:
    data = task_data(tmp_path / "store", prompt_lengths=(7,))
    inputs, conditioning = make_inputs(data, prompt_length=7, prompt_position=position)
    assert set(places(draw(inputs, 20), conditioning.prompts)[1].tolist()) == {0}


def test_a_policy_asks_for_prompts_of_evaluation(store: DataStore) -> None:
    config = configure(prompt_position="end")
    policy = make_trainer(store, config).learner.policy(0)
    encoded = []
    encode = policy.model.encode_prompt

    def record(prompt: Steps, *arguments: Any) -> Any:
        encoded.append(prompt)
        return encode(prompt, *arguments)

    policy.model.encode_prompt = record
    policy.start(np.repeat([0, 1, 2], 8))
    best = [TaskConditioning.from_data(store.task(name), config).prompts for name in TASKS]
    for task, episodes in enumerate(best):
        rows = encoded[0].returns_to_go[task].numpy() * config.data.return_scale
        end = episodes.lengths[0] - 1  # the authors' code leaves out the last step
        np.testing.assert_allclose(
            rows, np.tile(episodes.returns_to_go[end - 3 : end], (8, 1)), rtol=1e-6
        )


def test_actions_are_hidden_whole(tmp_path: Path) -> None:
    inputs, _ = make_inputs(task_data(tmp_path / "store"), action_dropout=0.3)
    actions, words = torch.full((3, 4), 0.5), torch.tensor([2**32 - 1, 0, 2**31])
    seen = inputs.hide(actions, inputs.hidden(words))
    assert seen.tolist() == [[0.5] * 4, [0] * 4, [0.5] * 4]
    assert (actions == 0.5).all()


def test_it_is_saved_and_loaded_whatever_the_order(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    tasks = [TaskConditioning.from_data(store.task(name), configure()) for name in TASKS]
    checksum = save_conditioning(tmp_path / "conditioning", tasks, "a")
    loaded = load_conditioning(tmp_path / "conditioning", TASKS[::-1], SPEC, checksum)
    for ours, theirs in zip(tasks[::-1], loaded, strict=True):
        assert ours.name == theirs.name
        assert ours.target_return == theirs.target_return
        for name in ("mean", "deviation"):
            _check_equal(getattr(ours, name), getattr(theirs, name))
        for field in dataclasses.fields(Episodes):
            _check_equal(getattr(ours.prompts, field.name), getattr(theirs.prompts, field.name))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("target_return", np.array([np.nan]), "target_return contains NaN"),
        ("mean", np.zeros(38, np.float32), "mean is float32 \\[38\\]"),
        ("mean", np.zeros(39), "mean is float64"),
        ("deviation", np.zeros(39, np.float32), "deviation is not positive"),
        ("prompts/rewards", np.zeros(3, np.float32), "rewards is float32 \\[3\\]"),
        ("prompts/episode_starts", np.array([0, 5, 4]), "does not begin with 0 and rise"),
        ("prompts/episode_starts", np.array([], np.int64), "does not begin with 0 and rise"),
        ("prompts/actions", None, "prompts/actions"),
    ],
)
def test_conditioning_that_cannot_be_is_refused(
    tmp_path: Path, name: str, value: np.ndarray | None, message: str
) -> None:
    """Even where the checksum is that of the file."""
    store = make_store(tmp_path / "store")
    path = tmp_path / "conditioning.safetensors"
    save_conditioning(path, [TaskConditioning.from_data(store.task(TASKS[0]), configure())], "a")
    arrays = load_file(path)
    if value is None:
        del arrays[f"{TASKS[0]}/{name}"]
    else:
        arrays[f"{TASKS[0]}/{name}"] = value
    save_file(arrays, path)
    with pytest.raises(UserError, match=rf"safetensors is damaged \(.*{message}"):
        load_conditioning(path, [TASKS[0]], SPEC, checksum(path.read_bytes()))


def _check_equal(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype
