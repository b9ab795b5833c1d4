"""How soft masks are updated, and a model that is trained and acts under them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import TASKS, configure, make_store, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from harmodt.algorithms.soco_dt import SoCoDTLearner
from harmodt.config import SoftMaskSettings
from harmodt.data.store import DataStore
from harmodt.errors import UserError
from harmodt.masks.bank import MaskBank, TaskMasks, voted_masks
from harmodt.masks.gradients import UpdateGradients
from harmodt.masks.soft import fence_factor, retained_levels, upper_fence
from harmodt_kernels import NotFinite, pack_bits, unpack_bits
from harmodt_kernels.bits import BITS_PER_WORD


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("data") / "store")


def make_learner(store: DataStore, **changes: object) -> SoCoDTLearner:
    """A learner with larger weights than at the start, at the step of the lowest threshold."""
    config = configure("soco-dt", fence_peak=0.5, **changes)
    learner = make_trainer(store, config).learner
    assert isinstance(learner, SoCoDTLearner)
    torch.manual_seed(0)
    learner.vector.weights += torch.randn(learner.vector.weights.shape) * 0.1
    return learner


def levels_of(bank: MaskBank) -> torch.Tensor:
    """int64 [T, P_m]."""
    planes = unpack_bits(bank.bits, bank.vector.maskable_size)
    return planes.view(bank.levels, bank.tasks, -1).long().sum(0)


def test_the_threshold_falls_to_its_lowest_and_rises_again() -> None:
    settings = SoftMaskSettings(fence_min=1.0, fence_max=5.0, fence_peak=0.2)
    factors = [fence_factor(step, 100, settings) for step in (0, 5, 10, 20, 40, 60, 100)]
    # 3 + 2 cos φ at 0, 45, 90 and 180 degrees falling, then at 135, 90 and 0
    away = 2 * math.cos(math.pi / 4)
    assert factors == pytest.approx([5, 3 + away, 3, 1, 3 - away, 3, 5])


@given(scores=st.lists(st.integers(-50, 50), min_size=1), factor=st.sampled_from([0.0, 0.5, 2.0]))
def test_a_fence_lies_above_the_third_quartile(scores: list[int], factor: float) -> None:
    first, third = np.quantile(scores, [0.25, 0.75], method="inverted_cdf")
    expected = max(third + factor * (third - first), 0)
    assert upper_fence(torch.tensor(scores, dtype=torch.float32), factor) == expected


def test_without_scores_nothing_is_above_the_fence() -> None:
    assert upper_fence(torch.zeros(0), 1.5) == math.inf


@given(count=st.integers(0, 40), levels=st.integers(2, 5), seed=st.integers(0, 9))
def test_what_a_weight_keeps_follows_from_the_rank_of_its_importance(
    count: int, levels: int, seed: int
) -> None:
    importance = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).float()
    kept = retained_levels(importance, levels)
    by_rank = kept[importance.argsort()].long()
    assert (by_rank.diff() >= 0).all()
    assert not count or by_rank[0] == 0
    sizes = torch.bincount(by_rank, minlength=levels + 1)
    assert len(sizes) == levels + 1
    if count > levels:
        assert sizes.max() - sizes.min() <= 1


def moved_by_hand(
    levels: np.ndarray, masked: np.ndarray, dense: np.ndarray, mean: np.ndarray, factor: float
) -> np.ndarray:
    """A task's levels 0, 1 or 2 of n weights after an update, weight by weight in float64."""

    def fence(scores: list[float]) -> float:
        if not scores:
            return math.inf
        scores, n = sorted(scores), len(scores)
        first, third = scores[-(-n // 4) - 1], scores[-(-3 * n // 4) - 1]
        return max(third + factor * (third - first), 0)

    weights = range(len(levels))
    conflict = {j: -masked[j] * mean[j] for j in weights if levels[j] > 0}
    harmony = {j: dense[j] * mean[j] for j in weights if levels[j] < 2}
    of_conflict, of_harmony = (fence(list(scores.values())) for scores in (conflict, harmony))
    conflicting = {j for j in conflict if conflict[j] > of_conflict}
    least = sorted(masked[j] ** 2 for j in conflicting)
    after = levels.copy()
    for j in conflicting:
        below = [max(len(least) * part // 3, 1) - 1 for part in (1, 2)]
        after[j] = min(levels[j], sum(masked[j] ** 2 > least[place] for place in below))
    for j in harmony:
        if j not in conflicting and harmony[j] > of_harmony:
            after[j] += 1
    return after


def prescribed(values: torch.Tensor) -> SimpleNamespace:
    """The gradients [T, P_m] of all tasks as `TaskGradients` gives them, the last by itself."""
    chunks = [range(len(values) - 1), range(len(values) - 1, len(values))]
    return SimpleNamespace(
        chunks=chunks,
        of=lambda chunk: (values[chunks[chunk].start : chunks[chunk].stop], None),
        mean=lambda: values.mean(0),
    )


class HostCopies(TorchDispatchMode):
    """Counts the operations for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name()
        by_bool = name in ("aten::index.Tensor", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        if by_bool or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            self.names.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("tasks", [TASKS[:2], TASKS])
def test_the_host_waits_for_each_chunk_and_not_for_each_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: tuple[str, ...]
) -> None:
    learner = make_learner(make_store(tmp_path / "store", tasks), fence_min=0.5, fence_max=1.0)
    shape = len(tasks), learner.vector.maskable_size
    gradients = prescribed(torch.randn(shape)), prescribed(torch.randn(shape))
    monkeypatch.setattr(learner.gradients, "on", lambda _: gradients)
    copies = HostCopies()
    for name in ("tolist", "cpu", "numpy"):  # PyTorch does not dispatch these on a CPU
        original = getattr(torch.Tensor, name)

        def counted(tensor, *arguments, name=name, original=original):
            if copies in watching:
                copies.names.append(name)
            return original(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    watching = [copies]
    with copies:
        learner.updater.update(10, learner.draw_for(10))
    watching.clear()
    # The sizes, each of two chunks, the outcome; the last two read what is on the host already.
    assert copies.names == ["tolist"] * 3 + ["cpu", "tolist", "aten::_local_scalar_dense"]


@pytest.mark.parametrize("step", [0, 7, 10, 16])
def test_an_update_lowers_where_tasks_conflict_and_raises_where_they_agree(
    store: DataStore, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    learner = make_learner(store, fence_min=0.5, fence_max=1.0)
    bank, size = learner.bank, learner.vector.maskable_size
    draw = torch.Generator().manual_seed(step)
    valid = unpack_bits(bank.maskable_bits, size)
    before = torch.randint(3, (3, size), generator=draw) * valid
    for level in range(2):
        bank.bits[3 * level :][:3] = pack_bits(before > level)
    # Numbers whose products and mean of three are exact.
    masked, dense = (3.0 * torch.randint(-20, 21, (3, size), generator=draw) for _ in range(2))
    masked, dense = masked * (before > 0), dense * valid
    gradients = prescribed(masked), prescribed(dense)
    monkeypatch.setattr(learner.gradients, "on", lambda _: gradients)
    done = learner.updater.update(step, learner.draw_for(step))
    after, mean = levels_of(bank).numpy(), masked.mean(0).double().numpy()
    factor = fence_factor(step, 20, learner.settings.masks)
    places = valid.nonzero()[:, 0].numpy()
    for task in range(3):
        rows = (values[task].double().numpy()[places] for values in (masked, dense))
        expected = moved_by_hand(before[task].numpy()[places], *rows, mean[places], factor)
        np.testing.assert_array_equal(after[task][places], expected)
        assert (done.lowered[task], done.raised[task]) == (
            (expected < before[task].numpy()[places]).sum(),
            (expected > before[task].numpy()[places]).sum(),
        )
    assert not after[:, ~valid.numpy()].any()
    assert done.lowered.min() > 0 and done.raised.min() > 0
    signs = np.sign(masked.numpy() * mean)
    assert done.harmony == pytest.approx(signs.sum() / np.abs(signs).sum())


def test_gradients_are_those_of_the_scaled_weights(store: DataStore) -> None:
    """Each task's and a step's sum, through all layers, against weights times the masks' values."""
    learner = make_learner(store)
    assert learner.updater.update(10, learner.draw_for(10)).lowered.min() > 0
    values = levels_of(learner.bank) / 2
    assert all((values[0] == level).any() for level in (0.0, 0.5, 1.0))
    vector, drawn = learner.vector, learner.draw_for(3)([0, 1, 2])
    size, ids = vector.maskable_size, torch.arange(3)
    found = torch.zeros(3, size)
    losses_found = learner.losses_of_drawn(drawn, learner.masks_for(ids, found))
    losses_found.sum().backward()
    summed = torch.zeros(1, size)
    learner.losses_of_drawn(drawn, learner.masks_for(ids, summed)).sum().backward()
    torch.testing.assert_close(summed[0], found.sum(0), rtol=1e-4, atol=1e-6)
    weights = vector.weights[:size].clone()
    scaled = torch.zeros(3, size)
    for task in range(3):
        # The batch of all three, of which only this task's group is asked for.
        vector.weights[:size] = weights * values[task]
        scaled.zero_()
        loss = learner.losses_of_drawn(drawn, TaskMasks(vector, None, ids, scaled))[task]
        loss.backward()
        assert losses_found[task].item() == pytest.approx(loss.item(), rel=1e-5)
        expected = scaled[task] * values[task]
        assert (found[task] - expected).norm() < 1e-4 * expected.norm()
        vector.weights[:size] = weights


def test_memory_decides_how_an_update_is_computed_and_not_the_masks(store: DataStore) -> None:
    results = []
    for gb in (4.0, 0.0):
        learner = make_learner(store, mask_update_gb=gb)
        before = learner.bank.bits.clone()
        learner.updater.update(10, learner.draw_for(10))
        assert not torch.equal(learner.bank.bits, before)
        results.append(learner.bank.bits)
    different = (results[0] ^ results[1]) != 0
    assert different.float().mean() < 0.001  # rounding may decide at a fence


def test_passes_under_soft_masks_count_for_each_level(store: DataStore) -> None:
    learner = make_learner(store)
    gradient = 4 * learner.vector.maskable_size
    outputs = 2 * (32 + 3 * 32 + 32 + 32 + 4 * 32 + 32) + 32  # of two blocks, and a LayerNorm
    everything = 6 * gradient + 3 * 2 * 8 * 10 * outputs  # the kept gradients, passes of 10 rows
    given = learner.bank, learner.losses_of_drawn
    chunks = [
        [len(chunk) for chunk in UpdateGradients(*given, memory, 10).chunks]
        for memory in (everything, everything - 1)
    ]
    assert chunks == [[3], [2, 1]]


@pytest.mark.parametrize("family", ["masked", "dense"])
def test_a_gradient_that_is_not_finite_leaves_all_masks_as_they_were(
    store: DataStore, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    learner = make_learner(store)
    values = torch.randn(2, 3, learner.vector.maskable_size)
    values[int(family == "dense"), 2, 5] = torch.nan
    monkeypatch.setattr(learner.gradients, "on", lambda _: tuple(map(prescribed, values)))
    before = learner.bank.bits.clone()
    with pytest.raises(NotFinite, match=f"task 2: its {family} gradient holds NaN"):
        learner.updater.update(10, learner.draw_for(10))
    assert torch.equal(learner.bank.bits, before)


def test_masks_begin_as_bits_and_what_changes_is_logged(store: DataStore) -> None:
    learner = make_learner(store, sparsity=0.4)
    bits = make_trainer(store, configure("harmodt-r", sparsity=0.4)).learner.bank.bits
    assert torch.equal(learner.bank.bits, bits.repeat(2, 1))
    assert learner.before_step(3) == {}
    logged = learner.before_step(8)
    assert logged["moved_weights"] > 0 and -1 < logged["harmony"] < 1
    active = levels_of(learner.bank) > 0
    for task, row in zip(store.tasks, active, strict=True):
        share = 1 - float(row.sum()) / learner.vector.maskable_count()
        assert logged[f"sparsity/{task}"] == pytest.approx(share)
    flips = sum(int((mask ^ old).sum()) for mask, old in zip(active, unpack_bits(
        bits, learner.vector.maskable_size), strict=True))  # fmt: skip
    assert sum(v for k, v in logged.items() if k.startswith("changed/")) == flips > 0
    described = learner.describe()
    assert "active_weights" not in described
    assert described["mask_bytes"] == 2 * bits.nbytes


def test_soft_masks_are_voted_level_by_level() -> None:
    levels = torch.tensor([[2, 1, 0, 2], [2, 1, 1, 0], [0, 1, 0, 1]])  # of three tasks
    padded = torch.nn.functional.pad(levels, (0, BITS_PER_WORD - 4))
    bits = torch.cat([pack_bits(padded > level) for level in range(2)])
    voted = unpack_bits(voted_masks(bits, 0.5, levels=2, tasks=5), 4).view(2, 5, 4).long().sum(0)
    assert voted.tolist() == [[2, 1, 0, 1]] * 5


def test_a_lowest_threshold_above_the_highest_is_refused() -> None:
    with pytest.raises(UserError, match=r"fence_min 4\.0 is above fence_max 3\.0: lower it"):
        SoftMaskSettings(fence_min=4.0).check()
