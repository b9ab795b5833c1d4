from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import configure, make_store, make_trainer, masked_copy, unpack_masks
from torch import Tensor

from harmodt import mask_update
from harmodt.mask_update import averaged_harmony, weights_to_move
from harmodt.model import Batch, DecisionTransformer
from harmodt.trainer import Trainer


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    trainer = make_trainer(make_store(tmp_path / "store"), configure(sparsity=0.3))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
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


def test_the_averaged_harmony_is_the_mean_of_signs() -> None:
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(4, 50)) * (rng.random((4, 50)) < 0.7)
    mean = rng.normal(size=50) * (rng.random(50) < 0.7)
    terms = []
    for gradient in gradients:
        for g, m in zip(gradient, mean, strict=True):
            if g != 0 and m != 0:
                terms.append(g * m / (abs(g) * abs(m)))
    computed = averaged_harmony(torch.from_numpy(gradients), torch.from_numpy(mean))
    assert computed == pytest.approx(np.mean(terms))


def test_the_averaged_harmony_at_its_ends() -> None:
    mean = torch.tensor([1e-30, -2.0, 0.0])
    assert averaged_harmony(torch.tensor([[1e-30, -1.0, 5.0]]), mean) == 1.0
    assert averaged_harmony(torch.tensor([[-1.0, 1e-30, 5.0]]), mean) == -1.0
    assert averaged_harmony(torch.tensor([[0.0, 0.0, 5.0]]), mean) == 0.0


def test_gradients_are_those_of_the_masked_and_of_the_dense_loss(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = [trainer.sampler.sample([task], np.random.default_rng(task)) for task in range(3)]
    calls = _record_selection(monkeypatch)
    trainer.vector.gradient.fill_(5.0)  # what an earlier step left does not count
    _update(trainer, draws)
    ((_, _, weights, masked, dense, losses), options) = calls[0]
    assert torch.equal(weights, trainer.vector.weights[: trainer.vector.maskable_size])
    for task, (batch, targets) in enumerate(draws):
        copy = masked_copy(trainer.model, trainer.masks.bits[task])
        expected_loss = _loss_by_hand(copy, batch, targets)
        assert losses[task].item() == pytest.approx(expected_loss.item(), rel=1e-5)
        _check_gradient(trainer, masked[task], copy, expected_loss, task)
        dense_copy = masked_copy(trainer.model, torch.full_like(trainer.masks.bits[task], -1))
        _check_gradient(
            trainer, dense[task], dense_copy, _loss_by_hand(dense_copy, batch, targets), None
        )
    assert options == {
        "count": 40, "balance": 10.0, "importance": "fisher", "rule": "paper",
    }  # fmt: skip
    assert (trainer.vector.gradient == 0).all()


@pytest.mark.parametrize(
    ("algorithm", "importance"), [("harmodt-f", "fisher"), ("harmodt-m", "magnitude")]
)
@pytest.mark.parametrize("rule", ["paper", "upstream"])
def test_the_settings_choose_the_scores(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, algorithm: str, importance: str, rule: str
) -> None:
    trainer.config = configure(algorithm=algorithm, harmony_rule=rule, balance=3.0, eta_min=2)
    calls = _record_selection(monkeypatch)
    draws = [trainer.sampler.sample([task], np.random.default_rng(task)) for task in range(3)]
    _update(trainer, draws, step=0)
    assert calls[0][1] == {"count": 2, "balance": 3.0, "importance": importance, "rule": rule}


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


def test_the_harmony_is_that_of_dense_gradients_with_the_mean_of_masked_ones(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _record_selection(monkeypatch)
    draws = [trainer.sampler.sample([task], np.random.default_rng(task)) for task in range(3)]
    harmony = _update(trainer, draws).harmony
    _, _, _, masked, dense, _ = calls[0][0]
    products = dense.double() * masked.double().mean(0)
    assert harmony == pytest.approx(products[products != 0].sign().mean().item(), abs=1e-6)


def test_a_gradient_that_is_nan_stops_the_update(trainer: Trainer) -> None:
    before = trainer.masks.bits.clone()
    trainer.model.action_head.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        trainer.update_masks()
    assert torch.equal(trainer.masks.bits, before)


def _update(trainer: Trainer, draws: list[Any], step: int = 10) -> mask_update.MaskUpdate:
    return mask_update.update_masks(
        step, trainer.config, trainer.masks, trainer.vector, trainer.losses, draws
    )


def _record_selection(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls = []

    def record(*tensors: Tensor, **options: Any) -> Tensor:
        calls.append((tensors, options))
        return torch.zeros(len(tensors[0]), dtype=torch.int64)

    monkeypatch.setattr(mask_update, "select_harmony", record)
    return calls


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
