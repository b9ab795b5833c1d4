from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    configure,
    make_store,
    make_trainer,
    masked_copy,
    no_masks,
    peak_memory,
    unpack_masks,
)
from torch import Tensor

from harmodt.algorithms.harmodt import HarmoDTLearner
from harmodt.algorithms.sequence import SequenceLearner
from harmodt.batch import Batch, Steps
from harmodt.config import TrainConfig
from harmodt.data.store import DataStore
from harmodt.draws import Draws
from harmodt.environments.metaworld_names import TASK_SETS
from harmodt.errors import UserError
from harmodt.masks.gradients import GradientPass, TaskGradients, harmony_score
from harmodt.masks.update import MaskUpdate, weights_to_move
from harmodt.networks.decision_transformer import DecisionTransformer
from harmodt_kernels import PYTORCH, Backend, NotFinite, Selection, fused_backend, pack_bits
from harmodt_kernels.harmony_selection import count_signs
from harmodt_kernels.masked_linear import gradients as waiting


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("data") / "store")


def make_learner(
    store: DataStore,
    config: TrainConfig | None = None,
    select: Callable[..., Selection] = PYTORCH.select_harmony,
    mask_norms: bool = True,
) -> Any:
    """A learner with larger weights than at the start; the drawn masks leave LayerNorms dense."""
    config = config or configure(sparsity=0.3)
    backend = fused_backend("cpu") if config.run.fused else PYTORCH
    backend = dataclasses.replace(backend, select_harmony=select)
    learner = make_trainer(store, config, backend=backend).learner
    assert isinstance(learner, SequenceLearner)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    if mask_norms and hasattr(learner, "bank"):
        learner.bank.bits &= pack_bits(torch.rand(3, learner.vector.maskable_size) < 0.8)
    return learner


def update(learner: HarmoDTLearner, step: int = 0) -> MaskUpdate:
    return learner.updater.update(step, learner.draw_for(step))


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


def test_the_harmony_of_gradients_by_hand() -> None:
    gradients = torch.tensor([[1e-30, -2.0, 0.0, 4.0], [3.0, 1.0, 0.0, -4.0]])
    agreeing, differing = count_signs(gradients, gradients.mean(0))  # signs + - 0 0
    assert agreeing.tolist() == [2, 1]
    assert differing.tolist() == [0, 1]
    assert harmony_score(agreeing[:1], differing[:1]) == 1.0
    assert harmony_score(agreeing, differing) == (1 + 1 + 1 - 1) / 4
    assert harmony_score(0 * agreeing, 0 * differing) == 0.0
    many = torch.tensor([2**31 + 1])  # a float32 would round it
    assert harmony_score(many, many - 1) == 1 / (2**32 + 1)


@pytest.mark.parametrize("algorithm", ["harmodt-f", "harmodt-r", "prompt-dt"])
def test_the_logged_harmony_is_definition_3_2_of_one_family(
    store: DataStore, algorithm: str
) -> None:
    """In float64, of the masked gradients where there are masks and of the dense ones otherwise."""
    step = 8
    # Behind a LayerNorm whose weight alone is masked some gradients are 0 but for rounding.
    learner = make_learner(store, configure(algorithm, harmony_every=step), mask_norms=False)
    masks = learner.bank.bits.clone() if algorithm != "prompt-dt" else None
    draws = _record_draws(learner)
    logged = learner.before_step(step)["harmony"]
    full = torch.full((learner.vector.maskable_size // 32,), -1, dtype=torch.int32)
    families = {"dense": [full] * 3}
    if masks is not None:
        families["masked"] = list(masks)
    computed = {}
    for family, bits_of_tasks in families.items():
        gradients = np.stack(
            [
                _exact_gradient(learner.model, bits, *draws[task])
                for task, bits in enumerate(bits_of_tasks)
            ]
        )
        computed[family] = _definition_3_2(gradients)
    expected, doubt = computed.pop("dense" if algorithm == "prompt-dt" else "masked")
    assert doubt < 0.01
    assert logged == pytest.approx(expected, abs=doubt)
    for other, other_doubt in computed.values():
        assert abs(logged - other) > doubt + other_doubt


def _exact_gradient(
    model: DecisionTransformer, bits: Tensor, batch: Batch, targets: Tensor
) -> np.ndarray:
    """∇L(θ ⊙ M) ⊙ M over the maskable weights, float64, by a copy of the model in float64."""
    copy = masked_copy(model, bits).double()
    masks = unpack_masks(model, bits)
    exact = Batch(
        batch.task_ids,
        *(
            Steps(*(x.double() if x.is_floating_point() else x for x in part))
            for part in batch[1:3]
        ),
    )
    loss = _loss_by_hand(copy, exact, targets.double())
    parameters = dict(copy.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[name] for name in masks])
    parts = zip(gradients, masks.values(), strict=True)
    return np.concatenate([(gradient * mask).numpy().ravel() for gradient, mask in parts])


def _definition_3_2(gradients: np.ndarray) -> tuple[float, float]:
    """The score of gradients [T, P], and how far off float32's rounding may move it."""
    mean = gradients.mean(0)
    tasks, weights = np.nonzero(gradients * mean)
    g, m = gradients[tasks, weights], mean[weights]
    unsure = (abs(g) < 1e-5 * abs(gradients).max()) | (abs(m) < 1e-5 * abs(mean).max())
    return float(np.mean(g * m / (abs(g) * abs(m)))), float(2 * unsure.mean())


def test_the_averaged_harmony_of_one_task_and_of_nothing(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", TASK_SETS["mt30"][:1])
    learner = make_learner(store, configure(tasks_per_step=1), mask_norms=False)
    learner.bank.bits.copy_(learner.bank.maskable_bits)
    assert update(learner).harmony == 1.0  # the gradient agrees with itself
    for parameter in learner.model.action_head.parameters():
        torch.nn.init.zeros_(parameter)  # so that nothing before it has a gradient
    assert update(learner).harmony == 0.0


@pytest.mark.parametrize("algorithm", ["harmodt-f", "harmodt-r", "prompt-dt", "mtdt"])
def test_harmony_is_logged_when_asked_for_and_changes_nothing(
    store: DataStore, algorithm: str
) -> None:
    updates = algorithm == "harmodt-f"
    learner = make_learner(store, configure(algorithm))
    assert learner.before_step(6) == {}
    learner = make_learner(store, configure(algorithm, harmony_every=3))
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    assert learner.before_step(5) == {}
    first, again = learner.before_step(6), learner.before_step(6)
    assert first == again
    assert first.keys() == {"harmony"}
    assert 0 < abs(first["harmony"]) < 1
    assert learner.before_step(9) != first
    for name, tensor in learner.tensors().items():
        assert torch.equal(tensor, before[name])
    both = learner.before_step(12)  # mask_update_every is 4
    assert ("moved_weights" in both) == updates
    assert both.keys() == {"harmony"} or updates


def test_gradients_are_those_of_the_masked_and_of_the_dense_loss(store: DataStore) -> None:
    record = _Record()
    learner = make_learner(store, select=record)
    learner.vector.gradient.fill_(5.0)  # what an earlier step left does not count
    draws = _record_draws(learner)
    update(learner)
    (call,) = record.calls  # tasks_per_step is 2, but there is memory for all three
    masked, dense, losses = call.masked, call.dense, call.losses
    assert torch.equal(call.weights, learner.vector.weights[: learner.vector.maskable_size])
    torch.testing.assert_close(call.mean, masked.double().mean(0).float())
    for task in range(3):
        batch, targets = draws[task]
        copy = masked_copy(learner.model, learner.bank.bits[task])
        expected_loss = _loss_by_hand(copy, batch, targets)
        assert losses[task].item() == pytest.approx(expected_loss.item(), rel=1e-5)
        _check_gradient(masked[task], copy, expected_loss, learner.bank.bits[task])
        dense_copy = masked_copy(learner.model, torch.full_like(learner.bank.bits[task], -1))
        _check_gradient(dense[task], dense_copy, _loss_by_hand(dense_copy, batch, targets))
    assert call.options == {
        "count": 0, "balance": 10.0, "importance": "fisher", "rule": "paper",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "importance"), [("harmodt-f", "fisher"), ("harmodt-m", "magnitude")]
)
@pytest.mark.parametrize("rule", ["paper", "upstream-score"])
@pytest.mark.parametrize("balance", [0.0, 3.0])
def test_the_settings_choose_the_scores(
    store: DataStore, algorithm: str, importance: str, rule: str, balance: float
) -> None:
    """The weights that leave have the smallest harmony of the task's mask."""
    record = _Record()
    config = configure(algorithm, harmony_rule=rule, balance=balance, eta_min=2)
    learner = make_learner(store, config, record)
    before = learner.bank.bits.clone()
    assert update(learner).moved.tolist() == [2, 2, 2]
    task = 0
    for call in record.calls:
        assert call.options == {
            "count": 2, "balance": balance, "importance": importance, "rule": rule,
        }  # fmt: skip
        for masked, loss in zip(call.masked.double(), call.losses.double(), strict=True):
            agreement = masked * call.mean
            if importance == "magnitude":
                score = call.weights.double().abs()
            else:
                score = (masked / loss if rule == "paper" else masked).square()
            paper = rule == "paper"
            harmony = agreement + balance * score if paper else balance * agreement + score
            old, new = (_unpack(bits[task]) for bits in (before, learner.bank.bits))
            assert int((old & ~new).sum()) == 2
            worst = harmony[old & ~new].max()
            assert worst <= harmony[old & new].min() + 1e-6 * abs(harmony).max()
            task += 1
    assert task == 3


def test_an_update_moves_as_many_weights_as_the_schedule_says(store: DataStore) -> None:
    learner = make_learner(store)
    before, counts = learner.bank.bits.clone(), learner.bank.active_counts()
    weights = learner.vector.weights.clone()
    done = update(learner, 10)  # the middle of 20
    assert done.moved.tolist() == [40, 40, 40]
    assert -1.0 <= done.harmony <= 1.0
    assert torch.equal(learner.bank.active_counts(), counts)
    for task in range(3):
        old, new = (unpack_masks(learner.model, bits[task]) for bits in (before, learner.bank.bits))
        left = sum(int((old[name] & ~new[name]).sum()) for name in old)
        assert left == 40
    assert torch.equal(learner.vector.weights, weights)


def bytes_of_a_task(learner: HarmoDTLearner) -> tuple[int, int]:
    """Of its gradient, and of its pass as the update reckons: 4 windows of 3 × (3 + 6) tokens."""
    outputs = 2 * (32 + 3 * 32 + 32 + 32 + 4 * 32 + 32) + 32  # of two blocks, and a LayerNorm
    return 4 * learner.vector.maskable_size, 8 * 4 * 27 * outputs


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("fused", [False, True])
def test_memory_decides_how_the_gradients_are_computed_and_not_the_masks(
    store: DataStore, fused: bool
) -> None:
    gradient, of_pass = bytes_of_a_task(make_learner(store))
    everything = 3 * (2 * gradient + of_pass)  # passes of all, and both families' gradients
    plans = [  # bytes, tasks of each call, batches that are drawn
        (4e9, [3], 1),
        (everything, [3], 1),
        (everything - 1, [2, 1], 4),
        (5 * gradient + of_pass, [1, 1, 1], 6),  # the masked ones copied
        (5 * gradient + of_pass - 1, [1, 1, 1], 6),  # the masked ones twice
        (0, [1, 1, 1], 6),
    ]
    results = []
    for memory, tasks_of_calls, batches in plans:
        config = configure(mask_update_gb=(memory + 0.5) / 1e9, fused=fused)
        record = _Record(fused_backend("cpu") if fused else PYTORCH)
        learner = make_learner(store, config, record)
        before, draws = learner.bank.bits.clone(), _record_draws(learner)
        done = update(learner, 10)
        assert [len(call.losses) for call in record.calls] == tasks_of_calls
        assert draws.count == batches
        assert done.moved.tolist() == [40, 40, 40]
        assert not (learner.bank.bits == before).all(1).any()
        results.append((learner.bank.bits, done.harmony))
    for bits, harmony in results[1:]:
        assert torch.equal(bits, results[0][0])
        assert harmony == results[0][1]


@pytest.mark.usefixtures("native")
def test_gradients_that_wait_for_those_of_other_layers_are_there(
    store: DataStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where some may be left when the pass ends."""
    monkeypatch.setattr(waiting.WeightGradients.__init__, "__defaults__", (100,))
    found = []
    for kernels in ("cpu", "triton"):
        monkeypatch.setattr(waiting, "kernels_for", lambda _, kernels=kernels: kernels)
        learner = make_learner(store, configure(fused=True))
        compute = GradientPass(learner.vector, learner.losses_of_drawn, learner.masks_for)
        found.append(compute(learner.draw_for(0)([0, 1, 2]))[0])
    assert found[0].ne(0).any(0).sum() > 0.9 * learner.vector.maskable_count()
    assert torch.equal(*found)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("changes", "records"),
    [
        ({"tasks_per_step": 3}, True),
        ({"mask_update_gb": 0.0}, True),  # a task at a time
        ({}, False),  # all three at a time, and two in a step
    ],
    ids=["kept", "computed twice", "more tasks than a step has"],
)
@pytest.mark.parametrize("algorithm", ["harmodt-f", "soco-dt"])
def test_recorded_updates_come_to_the_same_bits(
    store: DataStore, algorithm: str, changes: dict[str, Any], records: bool
) -> None:
    found = []
    for graph in (True, False):
        config = configure(
            algorithm, fused=True, graph=graph, dropout=0.3, mask_update_every=2, **changes
        )
        trainer = make_trainer(store, config)
        logged = []
        for _ in range(8):
            logged.append(trainer.before_step())
            trainer.train_step()
        assert bool(trainer.learner.gradients.nbytes) == (graph and records)
        found.append((logged, trainer.learner.tensors()))
    (logged, tensors), (others_logged, others) = found
    assert logged == others_logged
    assert len([values for values in logged if values]) == 4
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def test_the_mean_gradient_is_the_same_however_the_tasks_are_parted(tmp_path: Path) -> None:
    learner = make_learner(make_store(tmp_path / "store", TASK_SETS["mt30"][:5]), mask_norms=False)
    compute = GradientPass(learner.vector, learner.losses_of_drawn, learner.masks_for)
    draw, task_ids = learner.draw_for(0), range(5)
    first, *others = (
        TaskGradients(compute, draw, [task_ids[i : i + n] for i in task_ids[::n]]).mean()
        for n in (1, 2, 5)
    )
    for other in others:
        assert torch.equal(other, first)


def test_with_dropout_too_an_update_can_be_done_again(store: DataStore) -> None:
    updates = []
    for _ in range(2):
        learner = make_learner(store, configure(dropout=0.3, mask_update_gb=0.0))
        updates.append((update(learner, 10).harmony, learner.bank.bits))
    assert updates[0][0] == updates[1][0]
    assert torch.equal(updates[0][1], updates[1][1])


def test_memory_does_not_grow_with_the_tasks_where_gradients_are_computed_twice(
    tmp_path: Path,
) -> None:
    peaks = {}
    for tasks in (3, 9):
        store = make_store(tmp_path / str(tasks), TASK_SETS["mt30"][:tasks])
        for gb in (4.0, 0.0):
            learner = make_trainer(store, configure(mask_update_gb=gb, batch_per_task=1)).learner
            if not peaks:
                update(learner)  # what is made once
            peaks[tasks, gb] = peak_memory(lambda learner=learner: update(learner))
    gradient = 4 * learner.vector.maskable_size  # of one task
    assert peaks[9, 4.0] - peaks[3, 4.0] > 5 * gradient
    assert peaks[9, 0.0] - peaks[3, 0.0] < 0.1 * gradient


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_update(store: DataStore, value: float) -> None:
    learner = make_learner(store)
    before = learner.bank.bits.clone()
    learner.model.history_embedding.returns_to_go.bias.data[0] = value
    with pytest.raises(NotFinite, match="NaN or infinity"):
        update(learner, 10)
    assert torch.equal(learner.bank.bits, before)


@pytest.mark.parametrize("gb", [4.0, 0.0])
@pytest.mark.parametrize("operand", [3, 4])
def test_a_nan_in_the_last_task_alone_leaves_all_masks_as_they_were(
    store: DataStore, gb: float, operand: int
) -> None:
    tasks = []

    def select_or_fail(*tensors: Tensor, **options: Any) -> Selection:
        tasks.append(len(tensors[-1]))
        if sum(tasks) == 3:
            tensors[operand][-1, 0] = float("nan")
        return PYTORCH.select_harmony(*tensors, **options)

    learner = make_learner(store, configure(mask_update_gb=gb), select_or_fail)
    before = learner.bank.bits.clone()
    name = ("masked", "dense")[operand - 3]
    with pytest.raises(NotFinite, match=f"task 2: its {name} gradient holds NaN"):
        update(learner, 10)
    assert tasks == ([3] if gb else [1, 1, 1])
    assert torch.equal(learner.bank.bits, before)


@pytest.mark.parametrize(
    ("operand", "value", "why"),
    [(3, 1e20, "its scores overflow"), (6, 0.0, "its loss is not above zero, and the Fisher")],
)
def test_finite_gradients_that_cannot_be_scored_stop_the_update_with_a_way_on(
    store: DataStore, operand: int, value: float, why: str
) -> None:
    def select_or_fail(*tensors: Tensor, **options: Any) -> Selection:
        tensors[operand][1] = value
        return PYTORCH.select_harmony(*tensors, **options)

    learner = make_learner(store, select=select_or_fail)
    before = learner.bank.bits.clone()
    with pytest.raises(UserError, match=f"after step 10 cannot score.*task 1: {why}") as error:
        update(learner, 10)
    assert "NaN" not in str(error.value)
    assert str(error.value).endswith(
        "begin a new run with --harmony-rule upstream-score, which does not divide by the loss, or "
        "with a smaller --balance"
    )
    assert torch.equal(learner.bank.bits, before)


@dataclass
class _Call:
    weights: Tensor
    masked: Tensor
    dense: Tensor
    mean: Tensor
    losses: Tensor
    options: dict[str, Any]


class _Record:
    """A harmony selection that keeps what it was given."""

    def __init__(self, backend: Backend = PYTORCH) -> None:
        self.backend = backend
        self.calls: list[_Call] = []

    def __call__(self, *tensors: Tensor, **options: Any) -> Selection:
        self.calls.append(_Call(*(tensor.clone() for tensor in tensors[2:]), options))
        return self.backend.select_harmony(*tensors, **options)


class _Draws(dict):
    """The batch and targets of each task by itself, and how many batches were drawn."""

    count = 0


def _record_draws(learner: SequenceLearner) -> _Draws:
    draws, sample = _Draws(), learner.sampler.sample

    def record(tasks: Any, of_step: Draws) -> tuple[Batch, Tensor]:
        batch, targets = sample(tasks, of_step)
        draws.count += 1
        for group, task in enumerate(tasks):
            only = slice(group, group + 1)
            steps = (Steps(*(value[only] for value in part)) for part in batch[1:3])
            draws[task] = Batch(batch.task_ids[only], *steps), targets[only]
        return batch, targets

    learner.sampler.sample = record
    return draws


def _loss_by_hand(model: DecisionTransformer, batch: Batch, targets: Tensor) -> Tensor:
    """Mean over valid steps of the mean over the four action components (Eq. 2)."""
    predicted = model(batch, no_masks(model, 1))[0]
    terms = [
        (predicted[window, step] - targets[0, window, step]).square().sum() / 4
        for window, step in batch.history.valid[0].nonzero().tolist()
    ]
    return torch.stack(terms).mean()


def _unpack(bits: Tensor) -> Tensor:
    flat = np.unpackbits(bits.numpy().view(np.uint8), bitorder="little")
    return torch.from_numpy(flat.astype(bool))


def _check_gradient(
    computed: Tensor, copy: DecisionTransformer, loss: Tensor, bits: Tensor | None = None
) -> None:
    """It is that of the copy, and 0 where the bits are."""
    copy.vector.gradient.zero_()
    loss.backward()
    expected = copy.vector.gradient[: len(computed)]
    if bits is not None:
        active = _unpack(bits)
        assert (computed[~active] == 0).all()
        expected = expected * active
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(computed, expected, rtol=1e-3, atol=1e-6)
