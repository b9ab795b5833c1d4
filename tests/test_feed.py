"""Which tasks a step is on, and how what it reads comes to its place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import configure, make_store, make_trainer
from torch import Tensor

from harmodt.batch import Layout, move, tensors_of
from harmodt.config import DataSettings
from harmodt.data import feed as feed_module
from harmodt.data.feed import Feed
from harmodt.data.order import TaskOrder
from harmodt.data.store import DataStore
from harmodt.draws import TASKS, TRAIN, Draws
from harmodt.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("data") / "store")


def order(tasks: int, seed: int = 0, **settings: Any) -> TaskOrder:
    return TaskOrder(DataSettings(**settings), tasks, seed)


def test_round_robin_takes_each_task_in_turn() -> None:
    tasks = order(3, tasks_per_step=2, task_sampling="round-robin")
    assert tasks.of(range(1, 5)).tolist() == [[0, 1], [2, 0], [1, 2], [0, 1]]
    assert tasks.of(range(3, 4)).tolist() == [[1, 2]]


def test_random_tasks_are_even_and_without_replacement() -> None:
    rows = order(3, tasks_per_step=2).of(range(1, 601))
    assert (rows[:, 0] < rows[:, 1]).all()
    counts = np.bincount(rows.flatten(), minlength=3)
    assert np.abs(counts - 400).max() < 5 * (600 * 2 / 9) ** 0.5


def test_the_tasks_of_a_step_are_those_of_the_smallest_words() -> None:
    tasks = order(3, seed=5, tasks_per_step=2)
    for step in (1, 64, 65, 201):
        words = Draws(5, TASKS, step - 1).words(torch.arange(3))[0].tolist()
        expected = sorted(sorted(range(3), key=words.__getitem__)[:2])
        assert tasks.of(range(step, step + 1)).tolist() == [expected]
        assert tasks.of(range(max(step - 9, 1), step + 9))[min(step - 1, 9)].tolist() == expected


def test_all_tasks_of_a_step_come_in_order() -> None:
    assert order(3, tasks_per_step=3).of(range(4, 6)).tolist() == [[0, 1, 2]] * 2
    with pytest.raises(UserError, match="tasks_per_step is 3, but there are only 2 tasks"):
        order(2, tasks_per_step=3)


def make_feed(store: DataStore, **changes: Any) -> Feed:
    return make_trainer(store, configure("harmodt-r", **changes)).learner.feed


def read(feed: Feed, step: int) -> tuple[list[int], list[Tensor]]:
    tasks = feed.load(step)
    return tasks, [tensor.clone() for tensor in (*feed.extra, *tensors_of(*feed.batch()))]


@pytest.mark.parametrize("late", [True, False], ids=["by the step", "by a thread"])
def test_a_step_reads_what_is_drawn_for_it_alone(
    store: DataStore, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    if not late:  # as if the data were not on the model's device
        monkeypatch.setattr(feed_module, "step_gathers", lambda sampler: False)
    feed = make_feed(store)
    for step in (1, 2, 3, 70, 64, 65, 1):  # in turn, ahead and back
        tasks, (rates, seeds, number, *batch) = read(feed, step)
        expected = feed._sampler.sample(tasks, Draws(0, TRAIN, step - 1))
        assert tasks == feed._order.of(range(step, step + 1))[0].tolist() == batch[0].tolist()
        for ours, theirs in zip(batch, tensors_of(*expected), strict=True):
            assert torch.equal(ours, theirs)
        (alone,), (seeds_alone,), _ = feed._extra_inputs(range(step, step + 1))
        assert torch.equal(rates, alone) and torch.equal(seeds, seeds_alone)
        assert number == step - 1


def test_everything_is_read_at_one_place(store: DataStore) -> None:
    feed = make_feed(store)
    feed.load(1)
    places = [t.data_ptr() for t in (feed.task_ids, *feed.extra, *feed._windows)]
    first = [tensor.clone() for tensor in feed.extra]
    feed.load(2)
    assert places == [t.data_ptr() for t in (feed.task_ids, *feed.extra, *feed._windows)]
    assert not any(map(torch.equal, first, feed.extra))


def test_many_windows_are_drawn_for_fewer_steps_at_once(store: DataStore) -> None:
    assert make_feed(store)._steps_at_once == 64
    large = make_feed(store, batch_per_task=4000)
    assert large._steps_at_once == 2
    assert torch.equal(read(large, 3)[1][3], torch.tensor(large.load(3)))


def test_tensors_come_out_of_bytes_as_they_went_in() -> None:
    tensors = [
        torch.tensor([True, False, True]),
        torch.arange(5),
        torch.zeros(0),
        torch.rand(2, 3),
        torch.tensor(7.0),
    ]
    layout = Layout(tensors)
    assert layout.size == 16 + 48 + 0 + 32 + 16
    for moved in (move(tensors, CPU), layout.views(layout.pack(tensors, CPU))):
        for ours, theirs in zip(moved, tensors, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
