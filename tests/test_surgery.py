"""Gradient surgery beside its papers' loops, and in a step beside autograd's gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import configure, make_store, make_trainer, masked_copy, no_masks, unpack_masks
from torch import Tensor

from harmodt.algorithms import surgery
from harmodt.algorithms.surgery import cagrad, graddrop, pcgrad
from harmodt.batch import Batch, Steps
from harmodt.checkpoint import Checkpoint
from harmodt.data.store import DataStore
from harmodt.draws import SURGERY, Draws
from harmodt.errors import UserError
from harmodt.settings import check
from harmodt.training.trainer import Trainer

Rows = list[list[float]]

SURGERIES = ["pcgrad", "cagrad", "graddrop"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("data") / "store")


def drawn(step: int = 0, seed: int = 0) -> Draws:
    return Draws(seed, SURGERY, step)


def plain_pcgrad(gradients: np.ndarray, draws: Draws) -> np.ndarray:
    """Algorithm 1 of PCGrad's paper, its sum divided by the number of tasks."""
    tasks, results = range(len(gradients)), []
    for task in tasks:
        words = draws.words(torch.arange(len(gradients)), task)[0].tolist()
        gradient = gradients[task].copy()
        for other in sorted(tasks, key=lambda j, words=words: words[j]):
            product = gradient @ gradients[other]
            if other != task and product < 0:
                gradient -= product / (gradients[other] @ gradients[other]) * gradients[other]
        results.append(gradient)
    return np.mean(results, axis=0)


def purities(gradients: np.ndarray) -> np.ndarray:
    """GradDrop's P of each weight; one half where there is no gradient."""
    absolute = np.abs(gradients).sum(0)
    total = gradients.sum(0)
    return 0.5 * (1 + np.divide(total, absolute, out=np.zeros_like(total), where=absolute > 0))


def uniforms(size: int, draws: Draws) -> np.ndarray:
    """GradDrop's U of each weight: the middles of 2^23 equal parts of (0, 1)."""
    words = draws.words(torch.arange(math.ceil(size / 4))).flatten()[:size].numpy()
    return (words // 2**9 + 0.5) / 2**23


def plain_graddrop(gradients: np.ndarray, draws: Draws, leak: float) -> np.ndarray:
    """Algorithm 1 of GradDrop's paper, its sum divided by the number of tasks."""
    tasks, size = gradients.shape
    result = np.zeros(size)
    for j, (p, u) in enumerate(zip(purities(gradients), uniforms(size, draws), strict=True)):
        for g in gradients[:, j]:
            mask = (p > u) * (g > 0) + (p < u) * (g < 0)
            result[j] += (leak + (1 - leak) * mask) * g / tasks
    return result


def worst(gradients: np.ndarray, direction: np.ndarray) -> float:
    return float((gradients @ direction).min())


@st.composite
def tasks(draw: st.DrawFn, sizes: tuple[int, int] = (1, 40)) -> np.ndarray:
    """The gradients of 2 to 6 tasks, float64, which conflict more or less and differ in length."""
    shape = draw(st.integers(2, 6)), draw(st.integers(*sizes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    common = draw(st.sampled_from([-0.3, 0.0, 0.5, 2.0])) * rng.normal(size=shape[1])
    return (rng.normal(size=shape) + common) * rng.uniform(0.2, 5.0, (shape[0], 1))


@settings(max_examples=40)
@given(tasks(), st.integers(0, 1000))
def test_pcgrad_is_its_papers_loop(gradients: np.ndarray, step: int) -> None:
    computed = pcgrad(torch.from_numpy(gradients), drawn(step)).numpy()
    expected = plain_pcgrad(gradients, drawn(step))
    np.testing.assert_allclose(computed, expected, rtol=0, atol=1e-9 * np.abs(gradients).max())


@settings(max_examples=40)
@given(tasks(), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 1.0]))
def test_graddrop_is_its_papers_loop(gradients: np.ndarray, step: int, leak: float) -> None:
    computed = graddrop(torch.from_numpy(gradients), drawn(step), leak).numpy()
    expected = plain_graddrop(gradients, drawn(step), leak)
    away = np.abs(purities(gradients) - uniforms(gradients.shape[1], drawn(step))) > 1e-9
    np.testing.assert_allclose(computed[away], expected[away], rtol=1e-9, atol=1e-12)


@settings(max_examples=40)
@given(tasks(sizes=(7, 40)), st.sampled_from([0.1, 0.4, 0.9]))
def test_cagrad_has_its_optimality_conditions(gradients: np.ndarray, c: float) -> None:
    """Those of Eq. 3: the way is as long as allowed, along gradients of the worst tasks alone."""
    computed = cagrad(torch.from_numpy(gradients), c).numpy()
    mean = gradients.mean(0)
    way = computed - mean
    assert np.linalg.norm(way) == pytest.approx(c * np.linalg.norm(mean), rel=1e-9)
    multiples, *_ = np.linalg.lstsq(gradients.T, way, rcond=None)
    shares = multiples / multiples.sum()
    np.testing.assert_allclose(gradients.T @ multiples, way, atol=1e-9)
    assert multiples.sum() > 0 and shares.min() > -1e-9
    lengths = np.linalg.norm(gradients, axis=1) * np.linalg.norm(computed)
    above = gradients @ computed - worst(gradients, computed)
    assert (above[shares > 1e-7] <= 1e-9 * lengths.max()).all()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [2, 3])
def test_cagrad_has_the_least_dual_objective_on_a_grid(count: int, seed: int) -> None:
    """Eq. 4: min over the simplex of g_w · ḡ + c ‖ḡ‖ ‖g_w‖ is what the worst task comes to."""
    gradients = np.random.default_rng(seed).normal(size=(count, 5))
    mean, steps = gradients.mean(0), 400
    first = np.arange(steps + 1) / steps
    grid = np.stack([a.ravel() for a in np.meshgrid(*[first] * (count - 1))], axis=1)
    grid = grid[grid.sum(1) <= 1]
    mixed = np.column_stack((grid, 1 - grid.sum(1))) @ gradients
    c = 0.4
    dual = mixed @ mean + c * np.linalg.norm(mean) * np.linalg.norm(mixed, axis=1)
    reached = worst(gradients, cagrad(torch.from_numpy(gradients), c).numpy())
    assert reached == pytest.approx(dual.min(), abs=1e-3)
    assert reached <= dual.min() + 1e-12


@settings(max_examples=50)
@given(
    st.lists(st.tuples(*[st.integers(-2, 2)] * 2), min_size=2, max_size=6),
    st.sampled_from([0.0, 0.1, 0.4, 0.9]),
)
@example([(-2, -2), (0, 2), (0, 1), (-1, -1)], 0.4)  # the fourth takes the first's place
def test_cagrad_of_tied_and_dependent_gradients_is_the_best_in_the_plane(
    rows: list[tuple[int, int]], c: float
) -> None:
    gradients = np.array(rows, dtype=float)
    mean = gradients.mean(0)
    length = c * np.linalg.norm(mean)
    computed = cagrad(torch.from_numpy(gradients), c).numpy()
    assert np.linalg.norm(computed - mean) <= length + 1e-9
    angles, lengths = np.meshgrid(np.arange(0, 2 * np.pi, 0.01), np.linspace(0, length, 30))
    ways = np.stack((np.cos(angles) * lengths, np.sin(angles) * lengths)).reshape(2, -1)
    best = (gradients @ (mean[:, None] + ways)).min(0).max()
    assert worst(gradients, computed) >= best - 1e-9


@pytest.mark.parametrize(
    ("name", "gradients", "expected"),
    [
        ("conflicting", [[1, 0], [-1, 1]], {"pcgrad": [0.25, 0.75], "cagrad": [0.25, 0.5]}),
        ("opposite", [[2, 1], [-2, -1]], {"pcgrad": [0, 0], "cagrad": [0, 0]}),
        ("aligned", [[1, 2], [2, 4]], {"pcgrad": [1.5, 3], "cagrad": [2.25, 4.5]}),
        ("orthogonal", [[2, 0], [0, 2]], {"pcgrad": [1, 1], "cagrad": [1.5, 1.5]}),
        ("zero", [[0, 0], [1, 3]], {"pcgrad": [0.5, 1.5], "cagrad": [0.5, 1.5]}),
        ("nothing", [[0, 0], [0, 0]], {"pcgrad": [0, 0], "cagrad": [0, 0]}),
    ],
)
def test_two_tasks_by_hand(name: str, gradients: Rows, expected: dict[str, list[float]]) -> None:
    values = torch.tensor(gradients, dtype=torch.float32)
    # Without conflict PCGrad is the mean to the last bit.
    assert pcgrad(values, drawn()).tolist() == expected["pcgrad"], name
    assert cagrad(values, 0.5).tolist() == pytest.approx(expected["cagrad"], abs=1e-6), name


@pytest.mark.parametrize("leak", [0.0, 0.25])
def test_graddrop_keeps_one_sign_as_often_as_it_is_pure(leak: float) -> None:
    size = 40_000
    gradients = torch.tensor([[3.0, 1.0, -1.0, 0.0], [-1.0, 2.0, -4.0, 5.0]])
    computed = graddrop(gradients.repeat_interleave(size, 1), drawn(), leak).view(4, size)
    dropped, mean = 1 - leak, gradients.mean(0)
    first = computed[0].tolist()
    assert set(first) == {3 / 2 - leak * 1 / 2, -1 / 2 + leak * 3 / 2}  # P = 3/4
    kept = np.mean([value > 0 for value in first]) if dropped else 1.0
    assert kept == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / size))
    for j in (1, 2, 3):  # of one sign, or none
        assert (computed[j] == mean[j]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", SURGERIES)
def test_what_is_not_finite_is_not_hidden(name: str, value: float) -> None:
    gradients = torch.ones(3, 8)
    gradients[1, 2] = value
    combined = surgery.combine(gradients, surgery.SurgerySettings(surgery=name), drawn())
    assert not combined.isfinite().all()


@pytest.mark.parametrize("name", ["pcgrad", "graddrop"])
def test_draws_follow_from_seed_and_step(name: str) -> None:
    gradients = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    gradients[1] = -gradients[0] + 0.1 * gradients[2]  # so that the order counts

    def of(step: int, seed: int) -> Tensor:
        chosen = surgery.SurgerySettings(surgery=name)
        return surgery.combine(gradients, chosen, drawn(step, seed))

    assert torch.equal(of(3, 7), of(3, 7))
    assert not torch.equal(of(3, 7), of(4, 7))
    assert not torch.equal(of(3, 7), of(3, 8))
    as_tensor = Draws(7, SURGERY, torch.tensor(3))  # as a step reads its number
    chosen = surgery.SurgerySettings(surgery=name)
    assert torch.equal(surgery.combine(gradients, chosen, as_tensor), of(3, 7))


def operated(
    name: str, gradients: np.ndarray, draws: Draws
) -> tuple[np.ndarray, np.ndarray | slice]:
    """What a surgery makes of gradients in float64, and where rounding could not change it."""
    if name == "pcgrad":
        return plain_pcgrad(gradients, draws), slice(None)
    if name == "cagrad":
        return cagrad(torch.from_numpy(gradients), 0.4).numpy(), slice(None)
    doubt = 1e-3 + 1e-7 / np.maximum(np.abs(gradients).sum(0), 1e-30)
    sure = np.abs(purities(gradients) - uniforms(gradients.shape[1], draws)) > doubt
    sure |= np.abs(gradients).max(0) < 1e-7
    return plain_graddrop(gradients, draws, 0.0), sure


def of_each_task(trainer: Trainer, batch: Batch, targets: Tensor) -> np.ndarray:
    """Each task's gradient of its own loss over all weights, [G, P], by autograd of a copy."""
    model, vector = trainer.learner.model, trainer.learner.vector
    everything = torch.full((vector.maskable_size // 32,), -1, dtype=torch.int32)
    rows = []
    for group, task in enumerate(batch.task_ids.tolist()):
        bits = trainer.learner.bank.bits[task] if hasattr(trainer.learner, "bank") else everything
        copy, masks = masked_copy(model, bits), unpack_masks(model, bits)
        only = slice(group, group + 1)
        steps = [None if p is None else Steps(*(x[only] for x in p)) for p in batch[1:3]]
        predicted = copy(Batch(batch.task_ids[only], *steps), no_masks(copy, 1))
        valid = batch.history.valid[only]
        (predicted - targets[only])[valid].square().mean().backward()
        row = torch.zeros(len(vector.weights), dtype=torch.float64)
        for name, parameter in copy.named_parameters():
            vector.slots[name].view(row).copy_(parameter.grad * masks.get(name, 1.0))
        rows.append(row.numpy())
    return np.stack(rows)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("algorithm", ["prompt-dt", "mtdt", "harmodt-f"])
@pytest.mark.parametrize("name", SURGERIES)
def test_a_step_operates_on_each_tasks_gradient_of_all_weights(
    store: DataStore, monkeypatch: pytest.MonkeyPatch, name: str, algorithm: str, fused: bool
) -> None:
    changes = {"sparsity": 0.5} if algorithm == "harmodt-f" else {}
    trainer = make_trainer(
        store,
        configure(algorithm, surgery=name, tasks_per_step=3, fused=fused, seed=5, **changes),
    )
    learner = trainer.learner
    usual = learner.feed.batch

    def opposed() -> tuple[Batch, Tensor]:
        batch, targets = usual()
        return batch, targets * 0.1 + torch.tensor([0.8, -0.8, 0.1])[:, None, None, None]

    monkeypatch.setattr(learner.feed, "batch", opposed)
    for step in (1, 2):  # the second finds the first's gradients where its own go
        learner.feed.load(step)
        gradients = of_each_task(trainer, *opposed())
        expected, sure = operated(name, gradients, drawn(step - 1, seed=5))
        norm = trainer.train_step().gradient_norm
        computed = learner.vector.gradient.double().numpy()
        assert norm.item() == pytest.approx(np.linalg.norm(computed), rel=1e-5)
        assert np.mean(sure if name == "graddrop" else True) > 0.8
        np.testing.assert_allclose(computed[sure], expected[sure], rtol=1e-3, atol=2e-6)
        mean = gradients.mean(0)
        assert np.linalg.norm(computed - mean) > 0.2 * np.linalg.norm(mean)


# Small: the interpreter takes a millisecond or more for each tile.
@pytest.mark.parametrize("changes", [{"algorithm": "mtdt"}, {"prompt_length": 1}])
def test_the_kernels_gradients_are_those_of_the_reference(
    store: DataStore, device: torch.device, changes: dict[str, object]
) -> None:
    sizes = {"layers": 1, "batch_per_task": 1, "context_length": 3, "max_timesteps": 20}
    reference, fused = (
        make_trainer(store, configure(fused=fused, surgery="pcgrad", **sizes, **changes), device)
        for fused in (False, True)
    )
    results = [trainer.train_step() for trainer in (fused, reference)]
    torch.testing.assert_close(*(result.losses for result in results), rtol=1e-4, atol=0.0)
    ours, theirs = (trainer.learner for trainer in (fused, reference))
    ours, theirs = (learner._masks.group_gradients for learner in (ours, theirs))
    assert (theirs.abs().amax(1) > 0.01).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        fused.learner.vector.gradient, reference.learner.vector.gradient, rtol=1e-3, atol=1e-6
    )


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", SURGERIES)
def test_surgery_is_in_float32_where_products_are_in_bf16(
    store: DataStore, name: str, fused: bool
) -> None:
    config = configure(surgery=name, tasks_per_step=3, fused=fused, precision="bf16")
    trainer = make_trainer(store, config)
    trainer.train_step()
    gradients = trainer.learner._masks.group_gradients.double().numpy()
    expected, sure = operated(name, gradients, drawn())
    computed = trainer.learner.vector.gradient
    assert computed.dtype == torch.float32
    largest = np.abs(gradients).max()
    np.testing.assert_allclose(computed.numpy()[sure], expected[sure], atol=1e-6 * largest)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("algorithm", ["mtdt", "harmodt-r"])
def test_a_leak_of_everything_is_training_without_surgery(
    store: DataStore, algorithm: str, fused: bool
) -> None:
    leaking, usual = (
        make_trainer(store, configure(algorithm, fused=fused, dropout=0.0, **changes))
        for changes in ({"surgery": "graddrop", "graddrop_leak": 1.0}, {})
    )
    for _ in range(4):
        results = [trainer.train_step() for trainer in (leaking, usual)]
        torch.testing.assert_close(*(result.gradient_norm for result in results))
    torch.testing.assert_close(
        leaking.learner.vector.weights, usual.learner.vector.weights, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("name", SURGERIES)
def test_a_run_that_goes_on_ends_as_without_a_pause(store: DataStore, name: str) -> None:
    def steps(trainer: Trainer, count: int) -> None:
        for _ in range(count):
            trainer.before_step()
            trainer.train_step()

    def begin() -> Trainer:
        return make_trainer(store, configure(surgery=name, tasks_per_step=3, dropout=0.1))

    whole, first, second = begin(), begin(), begin()
    steps(whole, 6)
    steps(first, 3)
    tensors = {key: tensor.clone() for key, tensor in first.learner.tensors().items()}
    second.load(Checkpoint(Path("checkpoint"), 3, tensors))
    steps(second, 3)
    for key, tensor in whole.learner.tensors().items():
        assert torch.equal(second.learner.tensors()[key], tensor), key


@pytest.mark.parametrize("name", SURGERIES)
def test_one_task_per_step_is_refused(store: DataStore, name: str) -> None:
    with pytest.raises(UserError, match=f"surgery {name} .* is 1: give --tasks-per-step 2 or more"):
        make_trainer(store, configure(surgery=name, tasks_per_step=1))
    make_trainer(store, configure(tasks_per_step=1))


@pytest.mark.parametrize(("name", "graphs"), [("pcgrad", 1), ("graddrop", 1), ("cagrad", 0)])
def test_what_reads_on_the_host_is_never_made_a_graph(
    store: DataStore, monkeypatch: pytest.MonkeyPatch, name: str, graphs: int
) -> None:
    asked: list[Callable[[], Tensor]] = []
    execution = "harmodt.devices.Execution.repeated"
    monkeypatch.setattr(execution, lambda self, function: asked.append(function) or function)
    make_trainer(store, configure(surgery=name)).train_step()
    assert len(asked) == graphs


@pytest.mark.parametrize(
    ("surgery", "changed", "reader"),
    [("none", "cagrad_c", "cagrad"), ("cagrad", "graddrop_leak", "graddrop")],
)
def test_a_setting_that_is_not_read_is_refused(surgery: str, changed: str, reader: str) -> None:
    check(configure("prompt-dt", surgery=reader, **{changed: 0.3}))
    with pytest.raises(UserError, match=f"only {reader} reads {changed}"):
        check(configure("prompt-dt", surgery=surgery, **{changed: 0.3}))
