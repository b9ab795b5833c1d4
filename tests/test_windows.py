from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TASKS, configure, make_store, make_trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harmodt.batch import Batch, Steps, move
from harmodt.config import TrainConfig
from harmodt.data.inputs import Inputs, TaskConditioning
from harmodt.data.repeats import Repeats, find_repeats
from harmodt.data.store import DataStore, Episodes
from harmodt.data.trajectories import Trajectories
from harmodt.data.windows import WindowSampler
from harmodt.draws import MASKS, TRAIN, Draws, _key, philox


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    # One episode is longer than `max_timesteps` below, one hardly longer than a window.
    return make_store(tmp_path_factory.mktemp("data") / "store", lengths=(30, 8, 22))


def make_sampler(
    store: DataStore,
    config: TrainConfig,
    place: torch.device | None = None,
    device: torch.device | str = "cpu",
    repeats: Repeats | None = None,
) -> WindowSampler:
    data, own = [store.task(name) for name in store.tasks], config.own
    conditioning = [TaskConditioning.from_data(task, config) for task in data]
    inputs = Inputs(conditioning, config.data, own.model.max_timesteps, own.prompts(), place)
    episodes = Trajectories([task.train for task in data], place, repeats)
    return WindowSampler(episodes, inputs, own.model.context_length, device)


def sample(
    store: DataStore, tasks: tuple[int, ...] = (0, 1, 2), seed: int = 0, **changes: object
) -> tuple[Batch, Tensor]:
    sampler = make_sampler(store, configure(**changes))
    return sampler.sample(tasks, Draws(seed, TRAIN, 0))


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
    batch, targets = make_sampler(store, config).sample((2, 0), Draws(0, TRAIN, 0))
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


def test_a_start_is_the_square_of_a_uniform_number_in_integers(store: DataStore) -> None:
    sampler = make_sampler(store, configure(window_start_bias=2.0))
    words = Draws(0, TRAIN, 0).words(torch.arange(300)).flatten()
    episodes = torch.arange(len(words)) % 9  # of lengths 30, 8 and 22
    lengths = [(30, 8, 22)[episode % 3] for episode in episodes.tolist()]
    expected = [word**2 * n >> 64 for word, n in zip(words.tolist(), lengths, strict=True)]
    assert sampler._starts.draw(episodes, words).tolist() == expected
    ends = sampler._starts.draw(
        torch.tensor([0, 1, 2] * 2), torch.tensor([0, 2**32 - 1]).repeat_interleave(3)
    )
    assert ends.tolist() == [0, 0, 0, 29, 7, 21]


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
    batch, _ = make_sampler(store, config).sample((1, 2), Draws(0, TRAIN, 0))
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


def test_prompts_before_the_last_step_of_all_episodes_of_the_pool(store: DataStore) -> None:
    batch, _ = sample(
        store, (0,), batch_per_task=60, return_scale=1.0, prompt_position="end", prompt_pool=2
    )
    episodes = store.task(TASKS[0]).prompts
    best = np.argsort(-episodes.returns)[:2]
    found = {locate(episodes, value) for value in batch.prompt.returns_to_go[0, :, 0]}
    # The authors' code begins at max(T - K* - 1, 0).
    assert found == {(episode, max(episodes.lengths[episode] - 4, 0)) for episode in best}


def test_an_episode_shorter_than_a_window_is_padded(tmp_path: Path) -> None:
    """What is learned from it is what a context of its length learns from it."""
    short = make_store(tmp_path / "short", lengths=(5,))
    changes = {"action_dropout": 0.0, "context_length": 9}
    trainer = make_trainer(short, configure(**changes))
    tasks, draws = (0, 1, 2), Draws(3, TRAIN, 0)
    batch, targets = trainer.learner.sampler.sample(tasks, draws)
    valid = batch.history.valid
    assert int(valid.sum(2).max()) == 5 < valid.shape[2]
    masks = trainer.learner.masks_of(batch.task_ids)
    losses = trainer.learner.losses(batch, targets, masks)
    cut = batch._replace(history=Steps(*(part[:, :, :5] for part in batch.history)))
    expected = trainer.learner.losses(cut, targets[:, :, :5], masks)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    task = short.task(TASKS[1]).train
    for window, (row, present) in enumerate(zip(batch.history.timesteps[1], valid[1], strict=True)):
        begin = int(row[0])
        assert row[present].tolist() == list(range(begin, 5))
        np.testing.assert_array_equal(targets[1, window][present], task.actions[begin:].clip(-1, 1))


def test_the_mtdt_variant_has_no_prompt(store: DataStore) -> None:
    assert sample(store, algorithm="mtdt")[0].prompt is None


def test_a_draw_depends_on_seed_purpose_and_step_alone(store: DataStore) -> None:
    sampler = make_sampler(store, configure())
    first = sampler.sample((0, 1), Draws(4, TRAIN, 7))
    assert _equal(first, sampler.sample((0, 1), Draws(4, TRAIN, 7)))
    assert _equal(first, sampler.sample(torch.tensor([0, 1]), Draws(4, TRAIN, torch.tensor(7))))
    for other in (Draws(5, TRAIN, 7), Draws(4, MASKS, 7), Draws(4, TRAIN, 8)):
        assert not _equal(first, sampler.sample((0, 1), other))


def test_windows_do_not_depend_on_the_other_tasks_and_windows(store: DataStore) -> None:
    """So that several processes can share a step's tasks."""
    draws, sizes = Draws(0, TRAIN, 3), {"context_length": 7, "prompt_length": 2}
    sampler = make_sampler(store, configure(**sizes))
    together = sampler.sample((2, 0, 1), draws)
    for group, task in enumerate((2, 0, 1)):
        alone = sampler.sample((task,), draws)
        assert _equal(alone, _part(together, slice(group, group + 1)))
    more, _ = make_sampler(store, configure(**sizes, batch_per_task=9)).sample((2, 0, 1), draws)
    fewer, _ = together
    for ours, theirs in zip(
        (*fewer.history, *fewer.prompt), (*more.history, *more.prompt), strict=True
    ):
        assert torch.equal(ours, theirs[:, :4])
    shorter = make_sampler(store, configure(context_length=3)).sample((2, 0, 1), draws)[0]
    assert torch.equal(shorter.history.actions, fewer.history.actions[:, :, :3])


@pytest.mark.parametrize("changes", [{}, {"algorithm": "mtdt"}, {"prompt_position": "end"}])
def test_data_in_memory_give_the_same_batches_as_data_on_disk(
    store: DataStore, changes: dict[str, Any]
) -> None:
    config = configure(**changes)
    mapped, whole = (make_sampler(store, config, place) for place in (None, torch.device("cpu")))
    moved = make_sampler(store, config, None, "cpu:0")  # a device of another name
    repeats = find_repeats([store.task(name).train for name in store.tasks])
    compact = make_sampler(store, config, torch.device("cpu"), repeats=repeats)
    for arrays in mapped.episodes._arrays:  # nothing is copied before it is gathered
        assert all(isinstance(array.base, np.memmap) for array in arrays)
    assert whole.episodes._arrays == []
    for step in range(20):
        draws = Draws(0, TRAIN, step)
        expected = mapped.sample((2, 0), draws)
        assert _equal(whole.sample((2, 0), draws), expected)
        assert _equal(moved.sample((2, 0), draws), expected)
        assert _equal(compact.sample((2, 0), draws), expected)


class _Integers(TorchDispatchMode):
    """Refuses floating point and whatever lets the CPU wait for a device or the reverse."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            assert not isinstance(value, float), func
            if isinstance(value, Tensor):
                assert value.dtype in (torch.int64, torch.bool), func
                assert value.device.type == "meta", func
        return result


@pytest.mark.parametrize("position", ["random", "end"])
def test_draws_are_integer_arithmetic_on_the_device_alone(store: DataStore, position: str) -> None:
    """So that any two devices draw the same, without a copy between them.

    The device is one without numbers, on which a copy to the CPU fails.
    """
    sampler = make_sampler(store, configure(prompt_position=position))
    meta = torch.device("meta")
    expected = sampler.draw(torch.tensor([2, 0]), Draws(0, TRAIN, 0))
    for part in (
        sampler,
        sampler.episodes,
        sampler.inputs,
        sampler.inputs._prompts,
        sampler._starts,
    ):
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                setattr(part, name, value.to(meta))
    tasks = torch.tensor([2, 0]).to(meta)
    philox(torch.zeros(4, 1, dtype=torch.int64, device=meta), _key(0, TRAIN))  # its constants
    for step in (0, torch.tensor(0, device=meta)):
        with _Integers():
            drawn = sampler.draw(tasks, Draws(0, TRAIN, step))
        for ours, theirs in zip(tree_leaves(drawn), tree_leaves(expected), strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same(store: DataStore) -> None:
    gpu = torch.device("cuda")
    for data in (None, gpu):
        sampler = make_sampler(store, configure(), data, gpu)
        for step in range(20):
            draws = Draws(0, TRAIN, step)
            batch, targets = sampler.sample((2, 0), draws)
            assert targets.device.type == batch.task_ids.device.type == "cuda"
            expected = make_sampler(store, configure()).sample((2, 0), draws)
            assert _equal(_part((batch, targets), slice(None), "cpu"), expected)


def test_a_batch_is_moved_in_one_piece_as_it_is(store: DataStore) -> None:
    batch, targets = sample(store)
    tensors = [batch.task_ids, *batch.prompt, *batch.history, targets, torch.zeros(0)]
    tensors.append(batch.history.observations.transpose(0, 1))
    moved = move(tensors, torch.device("cpu"))
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved}) == 1
    for ours, theirs in zip(moved, tensors, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def _equal(a: tuple[Batch, Tensor], b: tuple[Batch, Tensor]) -> bool:
    return all(map(torch.equal, _tensors(a), _tensors(b)))


def _tensors(drawn: tuple[Batch, Tensor]) -> list[Tensor]:
    batch, targets = drawn
    return [batch.task_ids, *(batch.prompt or ()), *batch.history, targets]


def _part(drawn: tuple[Batch, Tensor], groups: slice, device: str = "cpu") -> tuple[Batch, Tensor]:
    task_ids, *steps, targets = (tensor[groups].to(device) for tensor in _tensors(drawn))
    return Batch(task_ids, Steps(*steps[:5]), Steps(*steps[5:])), targets
