from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import configure, make_store, make_trainer, masked_copy, peak_memory, unpack_masks
from torch import Tensor

from harmodt.batch import Batch, Steps
from harmodt.environments.metaworld_names import TASK_SETS
from harmodt.masks.update import weights_to_move
from harmodt.networks.decision_transformer import DecisionTransformer
from harmodt.training.trainer import Trainer
from harmodt_kernels import Selection, pack_bits


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    trainer = make_trainer(make_store(tmp_path / "store"), configure(sparsity=0.3))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    # the drawn masks cover no LayerNorm; these do
    trainer.masks.bits &= pack_bits(torch.rand(3, trainer.vector.maskable_size) < 0.8)
    return trainer


@pytest.mark.parametrize(
    ("step", "expected"),
    # 100 (1 - cos φ) / 2 at φ = 0, 60, 90, 120, 180, 300 and 360 degrees
    [(0, 0), (200, 25), (300, 50), (400, 75), (600, 100), (1000, 25), (1200, 0)],
)
def test_the_schedule_rises_to_its_maximum_in_the_middle(step: int, expected: int) -> None:
    assert weights_to_move(step, 1200, 0, 100) == expected
    assert weights_to_move(step, 1200, 7, 107) == expected + 7


def test_the_schedule_rounds_up() -> None:
    assert weights_to_move(1, 6, 0, 10) == 3  # 2.5
    assert weights_to_move(1, 1_000_000, 0, 100) == 1  # 1e-9
    assert weights_to_move(50, 1000, 0, 100) == 3  # 2.447


@settings(deadline=None)
@given(
    steps=st.integers(1, 10**6),
    share=st.floats(0, 1),
    bounds=st.tuples(st.integers(0, 1000), st.integers(0, 1000)),
)
def test_the_schedule_is_the_next_integer_of_its_formula(steps, share, bounds) -> None:
    step, (low, high) = round(share * steps), sorted(bounds)
    moved = weights_to_move(step, steps, low, high)
    # another form of the same wave: (1 - cos 2x) / 2 = sin² x
    exact = low + (high - low) * math.sin(math.pi * step / steps) ** 2
    assert low <= moved <= high
    assert exact - 1e-8 <= moved < exact + 1 + 1e-8


def test_the_averaged_harmony_is_the_mean_of_signs(trainer: Trainer) -> None:
    calls = _record_selection(trainer)
    harmony = trainer.update_masks().harmony
    mean = calls[0].mean
    terms = []
    for gradient in torch.cat([call.dense for call in calls]):
        for g, m in zip(gradient.tolist(), mean.tolist(), strict=True):
            if g != 0 and m != 0:
                terms.append(g * m / (abs(g) * abs(m)))
    assert len(terms) > 1000
    assert harmony == pytest.approx(np.mean(terms), abs=1e-9)


def test_the_averaged_harmony_of_one_task_and_of_nothing(trainer: Trainer) -> None:
    trainer.masks.bits = trainer.masks.maskable_bits[None].clone()  # one task with all weights
    assert trainer.update_masks().harmony == 1.0  # the gradient agrees with itself
    for parameter in trainer.model.action_head.parameters():
        torch.nn.init.zeros_(parameter)  # so that nothing before it has a gradient
    assert trainer.update_masks().harmony == 0.0


def test_gradients_are_those_of_the_masked_and_of_the_dense_loss(trainer: Trainer) -> None:
    calls = _record_selection(trainer)
    trainer.vector.gradient.fill_(5.0)  # what an earlier step left does not count
    draws = _record_draws(trainer)
    trainer.update_masks()
    assert [len(call.losses) for call in calls] == [2, 1]  # tasks_per_step is 2
    masked, dense, losses = (
        torch.cat([getattr(call, name) for call in calls]) for name in ("masked", "dense", "losses")
    )
    assert torch.equal(calls[0].weights, trainer.vector.weights[: trainer.vector.maskable_size])
    torch.testing.assert_close(calls[0].mean, masked.double().mean(0).float())
    for task in range(3):
        batch, targets = draws[task]
        copy = masked_copy(trainer.model, trainer.masks.bits[task])
        expected_loss = _loss_by_hand(copy, batch, targets)
        assert losses[task].item() == pytest.approx(expected_loss.item(), rel=1e-5)
        _check_gradient(trainer, masked[task], copy, expected_loss, task)
        dense_copy = masked_copy(trainer.model, torch.full_like(trainer.masks.bits[task], -1))
        _check_gradient(
            trainer, dense[task], dense_copy, _loss_by_hand(dense_copy, batch, targets), None
        )
    assert calls[0].options == {
        "count": 0, "balance": 10.0, "importance": "fisher", "rule": "paper",
    }  # fmt: skip
    assert (trainer.vector.gradient == 0).all()


@pytest.mark.parametrize(
    ("algorithm", "importance"), [("harmodt-f", "fisher"), ("harmodt-m", "magnitude")]
)
@pytest.mark.parametrize("rule", ["paper", "upstream-score"])
def test_the_settings_choose_the_scores(
    trainer: Trainer, algorithm: str, importance: str, rule: str
) -> None:
    trainer.config = configure(algorithm=algorithm, harmony_rule=rule, balance=3.0, eta_min=2)
    calls = _record_selection(trainer)
    trainer.update_masks()
    for call in calls:
        assert call.options == {
            "count": 2, "balance": 3.0, "importance": importance, "rule": rule,
        }  # fmt: skip


def test_an_update_moves_as_many_weights_as_the_schedule_says(trainer: Trainer) -> None:
    before = trainer.masks.bits.clone()
    counts = trainer.masks.active_counts()
    trainer.step = 10  # the middle of 20
    weights = trainer.vector.weights.clone()
    update = trainer.update_masks()
    assert update.moved.tolist() == [40, 40, 40]
    assert -1.0 <= update.harmony <= 1.0
    assert torch.equal(trainer.masks.active_counts(), counts)
    for task in range(3):
        old, new = (
            unpack_masks(trainer.model, bits[task]) for bits in (before, trainer.masks.bits)
        )
        left = sum(int((old[name] & ~new[name]).sum()) for name in old)
        assert left == 40
    assert torch.equal(trainer.vector.weights, weights)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_computing_gradients_twice_gives_the_same_masks(tmp_path: Path, dropout: float) -> None:
    store = make_store(tmp_path / "store")
    kept, twice = (
        make_trainer(store, configure(dropout=dropout, mask_update_gb=gb)) for gb in (4.0, 0.0)
    )
    updates, passes = [], []
    for trainer in (kept, twice):
        trainer.step = 10
        draws = _record_draws(trainer)
        updates.append(trainer.update_masks())
        passes.append(draws.count)
    assert passes == [4, 6]  # two parts: masked and dense, or masked, masked again and dense
    assert torch.equal(kept.masks.bits, twice.masks.bits)
    assert updates[0].moved.tolist() == updates[1].moved.tolist() == [40, 40, 40]
    assert updates[0].harmony == updates[1].harmony


def test_memory_does_not_grow_with_the_tasks_where_gradients_are_computed_twice(
    tmp_path: Path,
) -> None:
    peaks = {}
    for tasks in (4, 12):
        store = make_store(tmp_path / str(tasks), TASK_SETS["mt30"][:tasks])
        for gb in (4.0, 0.0):
            trainer = make_trainer(store, configure(mask_update_gb=gb, eta_max=10))
            trainer.update_masks()
            peaks[tasks, gb] = peak_memory(trainer.update_masks)
    gradients = 2 * 4 * trainer.vector.maskable_size  # of one task
    assert peaks[12, 4.0] - peaks[4, 4.0] > 7 * gradients
    assert peaks[12, 0.0] - peaks[4, 0.0] < 0.1 * gradients


def test_a_gradient_that_is_nan_stops_the_update(trainer: Trainer) -> None:
    before = trainer.masks.bits.clone()
    trainer.model.action_head.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        trainer.update_masks()
    assert torch.equal(trainer.masks.bits, before)


@pytest.mark.parametrize("gb", [4.0, 0.0])
def test_a_nan_in_the_last_task_alone_leaves_all_masks_as_they_were(
    trainer: Trainer, gb: float
) -> None:
    trainer.config = configure(mask_update_gb=gb)
    trainer.step = 10
    before = trainer.masks.bits.clone()
    select = trainer.backend.select_harmony
    calls = []

    def select_or_fail(*tensors: Tensor, **options: Any) -> Selection:
        calls.append(len(tensors[-1]))
        if len(calls) == 2:
            tensors[4][0, 0] = float("nan")  # in a dense gradient
        return select(*tensors, **options)

    _replace_selection(trainer, select_or_fail)
    with pytest.raises(ValueError, match="dense gradients"):
        trainer.update_masks()
    assert calls == [2, 1]
    assert torch.equal(trainer.masks.bits, before)


@dataclass
class _Call:
    weights: Tensor
    masked: Tensor
    dense: Tensor
    mean: Tensor
    losses: Tensor
    options: dict[str, Any]


def _record_selection(trainer: Trainer) -> list[_Call]:
    calls: list[_Call] = []
    select = trainer.masks.backend.select_harmony

    def record(*tensors: Tensor, **options: Any) -> Selection:
        calls.append(_Call(*(tensor.clone() for tensor in tensors[2:]), options))
        return select(*tensors, **options)

    _replace_selection(trainer, record)
    return calls


def _replace_selection(trainer: Trainer, function: Any) -> None:
    trainer.masks.backend = dataclasses.replace(trainer.masks.backend, select_harmony=function)


class _Draws(dict):
    """The batch and targets of each task by itself, and how many batches were drawn."""

    count = 0


def _record_draws(trainer: Trainer) -> _Draws:
    draws, sample = _Draws(), trainer.sampler.sample

    def record(tasks: Any, rng: np.random.Generator) -> tuple[Batch, Tensor]:
        batch, targets = sample(tasks, rng)
        draws.count += 1
        for group, task in enumerate(tasks):
            only = slice(group, group + 1)
            steps = (
                Steps(*(value[only] for value in vars(part).values()))
                for part in (batch.prompt, batch.history)
            )
            draws[task] = Batch(batch.task_ids[only], *steps), targets[only]
        return batch, targets

    trainer.sampler.sample = record
    return draws


def _loss_by_hand(model: DecisionTransformer, batch: Batch, targets: Tensor) -> Tensor:
    """Mean over valid steps of the mean over the four action components (Eq. 2)."""
    predicted = model(batch, None)[0]
    terms = [
        (predicted[window, step] - targets[0, window, step]).square().sum() / 4
        for window, step in batch.history.valid[0].nonzero().tolist()
    ]
    return torch.stack(terms).mean()


def _check_gradient(
    trainer: Trainer, computed: Tensor, copy: DecisionTransformer, loss: Tensor, task: int | None
) -> None:
    copy.vector.gradient.zero_()
    loss.backward()
    expected = copy.vector.gradient[: len(computed)]
    if task is not None:
        bits = trainer.masks.bits[task].numpy().view(np.uint8)
        active = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))
        assert (computed[~active] == 0).all()
        expected = expected * active
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(computed, expected, rtol=1e-3, atol=1e-6)
