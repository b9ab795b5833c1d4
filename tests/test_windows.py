from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TASKS, configure, make_store
from torch import Tensor

from harmodt.batch import Batch, Steps
from harmodt.config import TrainConfig
from harmodt.data.inputs import Inputs, TaskConditioning
from harmodt.data.store import DataStore, Episodes
from harmodt.data.windows import WindowSampler
from harmodt.errors import UserError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    # One episode is longer than `max_timesteps` below, one hardly longer than a window.
    return make_store(tmp_path_factory.mktemp("data") / "store", lengths=(30, 8, 22))


def make_sampler(store: DataStore, config: TrainConfig) -> WindowSampler:
    data, own = [store.task(name) for name in store.tasks], config.own
    conditioning = [TaskConditioning.from_data(task, config) for task in data]
    inputs = Inputs(conditioning, config.data, own.model.max_timesteps, own.prompts())
    return WindowSampler(data, inputs, own.model.context_length)


def sample(
    store: DataStore, tasks: tuple[int, ...] = (0, 1, 2), seed: int = 0, **changes: object
) -> tuple[Batch, Tensor]:
    sampler = make_sampler(store, configure(**changes))
    return sampler.sample(tasks, np.random.default_rng(seed))


def locate(episodes: Episodes, return_to_go: float) -> tuple[int, int]:
    """Episode and step that have a return-to-go, which random rewards make unique."""
    (step,) = np.flatnonzero(episodes.returns_to_go == np.float32(return_to_go))
    episode = int(np.searchsorted(episodes.episode_starts, step, "right")) - 1
    return episode, int(step - episodes.episode_starts[episode])


def step_by_hand(
    store: DataStore, task: int, episodes: Episodes, episode: int, time: int, config: TrainConfig
) -> dict[str, Any]:
    data = store.task(TASKS[task])
    at = episodes.episode_starts[episode] + time
    end = episodes.episode_starts[episode + 1]
    observation = []
    for i in range(39):
        scale = max(float(data.observation_std[i]), config.data.deviation_floor)
        observation.append(
            (float(episodes.observations[at, i]) - float(data.observation_mean[i])) / scale
        )
    return {
        "returns_to_go": sum(map(float, episodes.rewards[at:end])) / config.data.return_scale,
        "observations": observation,
        "actions": [min(max(float(a), -1.0), 1.0) for a in episodes.actions[at]],
        "timesteps": min(time, config.own.model.max_timesteps - 1),
    }


def check_step(steps: Steps, index: tuple[int, int, int], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        computed = getattr(steps, name)[index].numpy()
        np.testing.assert_allclose(computed, value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_windows_equal_a_loop_over_the_arrays(store: DataStore) -> None:
    config = configure(
        batch_per_task=60, action_dropout=0.0, max_timesteps=25, return_scale=1.0,
        window_start_bias=1.0,
    )  # fmt: skip
    batch, targets = make_sampler(store, config).sample((2, 0), np.random.default_rng(0))
    assert batch.task_ids.tolist() == [2, 0]
    assert batch.task_ids.dtype == batch.history.timesteps.dtype == torch.int64
    history = batch.history
    assert history.observations.shape == (2, 60, 6, 39)
    assert history.observations.dtype == history.actions.dtype == torch.float32
    assert history.returns_to_go.dtype == torch.float32
    seen = set()
    for group, task in enumerate((2, 0)):
        episodes = store.task(TASKS[task]).train
        for window in range(60):
            valid = history.valid[group, window].tolist()
            steps = sum(valid)
            assert valid == [True] * steps + [False] * (6 - steps)
            episode, start = locate(episodes, history.returns_to_go[group, window, 0])
            assert steps == min(6, episodes.lengths[episode] - start)
            for step in range(6):  # the last one is repeated
                time = start + min(step, steps - 1)
                expected = step_by_hand(store, task, episodes, episode, time, config)
                check_step(history, (group, window, step), expected)
                np.testing.assert_allclose(
                    targets[group, window, step], expected["actions"], rtol=1e-6
                )
            seen.add((episode, steps < 6))
    assert {episode for episode, _ in seen} == {0, 1, 2}
    assert (0, True) in seen
    assert (0, False) in seen


def test_the_scale_of_returns(store: DataStore) -> None:
    plain, _ = sample(store, return_scale=1.0)
    scaled, _ = sample(store, return_scale=500.0)
    torch.testing.assert_close(plain.history.returns_to_go / 500, scaled.history.returns_to_go)
    torch.testing.assert_close(plain.prompt.returns_to_go / 500, scaled.prompt.returns_to_go)


def test_a_dimension_that_hardly_varies_is_divided_by_the_floor(store: DataStore) -> None:
    batch, _ = sample(store)
    assert (batch.history.observations[..., 5] == 0).all()
    floor, _ = sample(store, deviation_floor=50.0)
    assert floor.history.observations.abs().max() < 0.2
    other = batch.history.observations[..., 6:]
    assert other[batch.history.valid].std().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("bias", [0.5, 1.0, 2.0])
def test_windows_start_at_a_power_of_a_uniform_number(tmp_path: Path, bias: float) -> None:
    length, count = 40, 20_000
    store = make_store(tmp_path / "store", tasks=TASKS[:1], lengths=(length,))
    batch, _ = sample(store, (0,), context_length=2, batch_per_task=count, window_start_bias=bias)
    counts = np.bincount(batch.history.timesteps[0, :, 0].numpy(), minlength=length)
    # u^bias < x  <=>  u < x^(1 / bias)
    edges = (np.arange(length + 1) / length) ** (1 / bias)
    expected = count * np.diff(edges)
    assert len(counts) == length
    # 39 degrees of freedom: one in a million is above 96
    assert ((counts - expected) ** 2 / expected).sum() < 96


def test_episodes_are_drawn_in_proportion_to_their_length(store: DataStore) -> None:
    count = 3000
    batch, _ = sample(store, (1,), batch_per_task=count, return_scale=1.0, prompt_length=1)
    episodes = store.task(TASKS[1]).train
    returns_to_go = batch.history.returns_to_go[0, :, 0]
    drawn = np.bincount([locate(episodes, value)[0] for value in returns_to_go], minlength=3)
    for number, length in zip(drawn, (30, 8, 22), strict=True):
        share = length / 60
        assert abs(number - count * share) < 5 * (count * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
def test_action_dropout_hides_whole_actions_of_the_history(store: DataStore, drop: float) -> None:
    batch, targets = sample(store, batch_per_task=300, action_dropout=drop)
    hidden = (batch.history.actions == 0).all(-1)
    shown = batch.history.actions[~hidden]
    assert torch.equal(shown, targets[~hidden])
    share = hidden.double().mean().item()
    assert abs(share - drop) <= 5 * (drop * (1 - drop) / hidden.numel()) ** 0.5
    assert (targets != 0).any(-1).all()
    assert (batch.prompt.actions != 0).any(-1).all()
    without, _ = sample(store, batch_per_task=300, action_dropout=0.0)
    for name in ("returns_to_go", "observations", "timesteps", "valid"):
        assert torch.equal(getattr(batch.history, name), getattr(without.history, name))


def test_prompts_come_from_the_prompt_episodes(store: DataStore) -> None:
    config = configure(batch_per_task=100, return_scale=1.0)
    batch, _ = make_sampler(store, config).sample((1, 2), np.random.default_rng(0))
    assert batch.prompt.valid.shape == (2, 100, 3)
    assert batch.prompt.valid.all()
    for group, task in enumerate((1, 2)):
        episodes = store.task(TASKS[task]).prompts
        seen = set()
        for window in range(100):
            episode, start = locate(episodes, batch.prompt.returns_to_go[group, window, 0])
            assert start + 3 <= episodes.lengths[episode]
            for step in range(3):
                expected = step_by_hand(store, task, episodes, episode, start + step, config)
                check_step(batch.prompt, (group, window, step), expected)
            seen.add((episode, start))
        assert {episode for episode, _ in seen} == {0, 1, 2}
        # every place of an episode, its last one too
        assert {start for episode, start in seen if episode == 2} == {0, 1, 2, 3, 4}


def test_prompts_at_the_end_of_all_episodes_of_the_pool(store: DataStore) -> None:
    batch, _ = sample(
        store, (0,), batch_per_task=60, return_scale=1.0, prompt_position="end", prompt_pool=2
    )
    episodes = store.task(TASKS[0]).prompts
    best = np.argsort(-episodes.returns)[:2]
    found = {locate(episodes, value) for value in batch.prompt.returns_to_go[0, :, 0]}
    assert found == {(episode, episodes.lengths[episode] - 3) for episode in best}


def test_an_episode_shorter_than_a_window_is_named(store: DataStore) -> None:
    make_sampler(store, configure(context_length=8))
    with pytest.raises(UserError, match=r"task reach-v3: episode 1 has 8 steps.* 9.*lower it"):
        make_sampler(store, configure(context_length=9))


def test_the_mtdt_variant_has_no_prompt(store: DataStore) -> None:
    assert sample(store, algorithm="mtdt")[0].prompt is None


def test_a_draw_depends_on_the_generator_alone(store: DataStore) -> None:
    sampler = make_sampler(store, configure())
    first = sampler.sample((0, 1), np.random.default_rng(4))
    other = sampler.sample((0, 1), np.random.default_rng(5))
    again = sampler.sample((0, 1), np.random.default_rng(4))
    assert _equal(first, again)
    assert not _equal(first, other)


def _equal(a: tuple[Batch, Tensor], b: tuple[Batch, Tensor]) -> bool:
    ours, theirs = ((*pair[0].history, *pair[0].prompt, pair[1]) for pair in (a, b))
    return all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
