from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tiny import SPEC, TASKS, configure, make_episode, make_store

from harmodt.data.inputs import (
    PROMPT_EPISODES,
    TaskConditioning,
    load_conditioning,
    save_conditioning,
)
from harmodt.data.store import TaskData
from harmodt.data.writer import StoreWriter
from harmodt.errors import UserError


def task_data(path: Path, prompt_lengths: tuple[int, ...] = (12, 9, 7)) -> TaskData:
    return make_store(path, prompt_lengths=prompt_lengths).task(TASKS[1])


def test_normalising_floors_the_deviation(tmp_path: Path) -> None:
    data = task_data(tmp_path / "store")
    assert data.observation_std[5] == 0
    conditioning = TaskConditioning.from_data(data, configure(deviation_floor=0.01))
    assert conditioning.name == TASKS[1]
    observations = np.tile(data.observation_mean, (2, 1))
    observations[1] += 0.005
    normal = conditioning.normalise(observations)
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal[0], 0, atol=1e-6)
    assert normal[1, 5] == pytest.approx(0.5, rel=1e-4)
    assert normal[1, 6] == pytest.approx(0.005 / data.observation_std[6], rel=1e-2)


def test_prompts_are_the_best_episodes(tmp_path: Path) -> None:
    lengths = (3, 8, 14, 5, 6, 2, 9, 4)
    returns = (4.0, 9.0, 1.0, 7.0, 2.0, 20.0, 8.0, 5.0)  # the highest is too short
    writer = StoreWriter(tmp_path / "store", {}, SPEC)
    rng = np.random.default_rng(0)
    with writer.task("reach-v3") as task:
        task.add(make_episode(rng, 20))
        for length, total in zip(lengths, returns, strict=True):
            rewards = np.full(length, total / length, np.float32)
            task.add_prompt(make_episode(rng, length)._replace(rewards=rewards))
    data = writer.finish(["reach-v3"]).task("reach-v3")
    prompts = TaskConditioning.from_data(data, configure(prompt_length=3)).prompts
    assert len(prompts) == PROMPT_EPISODES == 5
    assert prompts.lengths.tolist() == [8, 9, 5, 4, 3]
    np.testing.assert_allclose(prompts.returns, [9, 8, 7, 5, 4], rtol=1e-5)
    for new, old in enumerate((1, 6, 3, 7, 0)):
        ours, theirs = prompts.episode_starts[new], data.prompts.episode_starts[old]
        for name in ("observations", "actions", "rewards", "returns_to_go"):
            np.testing.assert_array_equal(
                getattr(prompts, name)[ours : ours + lengths[old]],
                getattr(data.prompts, name)[theirs : theirs + lengths[old]],
            )


@pytest.mark.parametrize("prompt_lengths", [(), (3, 4)])
def test_a_task_without_a_prompt_that_is_long_enough_is_named(
    tmp_path: Path, prompt_lengths: tuple[int, ...]
) -> None:
    data = task_data(tmp_path / "store", prompt_lengths)
    with pytest.raises(UserError, match="task push-v3 has no prompt episode of at least 5 steps"):
        TaskConditioning.from_data(data, configure(prompt_length=5))


@pytest.mark.parametrize("prompt_lengths", [(), (2,)])
def test_without_a_prompt_in_the_model_none_is_needed(
    tmp_path: Path, prompt_lengths: tuple[int, ...]
) -> None:
    data = task_data(tmp_path / "store", prompt_lengths)
    conditioning = TaskConditioning.from_data(data, configure(algorithm="mtdt"))
    save_conditioning(tmp_path / "conditioning.safetensors", [conditioning])


def test_the_target_is_the_best_return_or_the_one_given(tmp_path: Path) -> None:
    data = task_data(tmp_path / "store")
    best = max(
        data.train.rewards[start:stop].sum() for start, stop in pairwise(data.train.episode_starts)
    )
    assert TaskConditioning.from_data(data, configure()).target_return == pytest.approx(best)
    assert TaskConditioning.from_data(data, configure(target_return=7.5)).target_return == 7.5
    assert TaskConditioning.from_data(data, configure(target_return=0.0)).target_return == 0.0


def test_drawn_prompts_are_consecutive_steps_of_one_episode(tmp_path: Path) -> None:
    conditioning = TaskConditioning.from_data(task_data(tmp_path / "store"), configure())
    starts = conditioning.prompts.episode_starts
    indices = conditioning.draw_prompts(np.random.default_rng(0), 500, 3)
    assert indices.shape == (500, 3)
    np.testing.assert_array_equal(np.diff(indices), 1)
    episodes = np.searchsorted(starts, indices, "right") - 1
    assert (episodes == episodes[:, :1]).all()
    expected = {s for a, b in pairwise(starts) for s in range(a, b - 2)}
    assert set(indices[:, 0].tolist()) == expected
    whole = conditioning.draw_prompts(np.random.default_rng(0), 50, 7)
    assert whole.max() == starts[-1] - 1


def test_it_is_saved_and_loaded_whatever_the_order(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    tasks = [TaskConditioning.from_data(store.task(name), configure()) for name in TASKS]
    save_conditioning(tmp_path / "conditioning.safetensors", tasks)
    loaded = load_conditioning(tmp_path / "conditioning.safetensors", TASKS[::-1])
    for ours, theirs in zip(tasks[::-1], loaded, strict=True):
        assert ours.name == theirs.name
        assert ours.target_return == theirs.target_return
        for name in ("mean", "deviation"):
            _check_equal(getattr(ours, name), getattr(theirs, name))
        for name in (
            "observations", "actions", "rewards", "returns_to_go", "episode_starts", "successes",
        ):  # fmt: skip
            _check_equal(getattr(ours.prompts, name), getattr(theirs.prompts, name))


def _check_equal(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype
