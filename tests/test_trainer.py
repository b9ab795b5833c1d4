from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import configure, make_store, make_trainer, masked_copy, no_masks, unpack_masks
from torch import Tensor

from harmodt.algorithms.optimiser import learning_rate
from harmodt.batch import Batch, Steps
from harmodt.checkpoint import Checkpoint
from harmodt.data.store import DataStore
from harmodt.draws import TRAIN, Draws
from harmodt.errors import UserError
from harmodt.training.trainer import Trainer

ALGORITHMS = ["harmodt-f", "harmodt-m", "harmodt-r", "soco-dt", "prompt-dt", "mtdt"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("data") / "store")


def train(trainer: Trainer, steps: int) -> list[Tensor]:
    """Some steps with the mask updates that are due; the losses of each step."""
    losses = []
    for _ in range(steps):
        trainer.before_step()
        losses.append(trainer.train_step().losses)
    return losses


def saved(trainer: Trainer) -> Checkpoint:
    tensors = {name: tensor.clone() for name, tensor in trainer.learner.tensors().items()}
    return Checkpoint(Path("checkpoint"), trainer.step, tensors)


def equal(a: Trainer, b: Trainer) -> bool:
    ours, theirs = a.learner.tensors(), b.learner.tensors()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def windows(trainer: Trainer, tasks: list[int], seed: int = 0) -> tuple[Batch, Tensor]:
    return trainer.learner.sampler.sample(tasks, Draws(seed, TRAIN, 0))


def test_the_loss_is_the_mean_over_valid_steps_and_components(store: DataStore) -> None:
    trainer = make_trainer(store, configure(batch_per_task=12))
    batch, targets = windows(trainer, [2, 0])
    masks = trainer.learner.bank.for_tasks(batch.task_ids)
    losses = trainer.learner.losses_under(masks, batch, targets)
    predicted = trainer.learner.model(batch, masks)
    assert losses.shape == (2,)
    assert not batch.history.valid.all()
    for group in range(2):
        errors = []
        for window, step in batch.history.valid[group].nonzero().tolist():
            for component in range(4):
                at = (group, window, step, component)
                errors.append((predicted[at].item() - targets[at].item()) ** 2)
        assert losses[group].item() == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.parametrize("embedding", [0, 5])
def test_the_gradient_is_the_mean_of_the_masked_gradients(
    store: DataStore, monkeypatch: pytest.MonkeyPatch, embedding: int
) -> None:
    config = configure(
        tasks_per_step=3, gradient_clip=1e9, sparsity=0.5, task_embedding_dim=embedding
    )
    trainer = make_trainer(store, config)
    # The step before had the tasks in another order: their masks are not to stay.
    monkeypatch.setattr(trainer.learner.feed, "batch", lambda: windows(trainer, [2, 0, 1]))
    trainer.train_step()
    draw = batch, targets = windows(trainer, [0, 1, 2])
    monkeypatch.setattr(trainer.learner.feed, "batch", lambda: draw)
    expected = {name: torch.zeros_like(p) for name, p in trainer.learner.model.named_parameters()}
    for task in range(3):
        copy = masked_copy(trainer.learner.model, trainer.learner.bank.bits[task])
        masks = unpack_masks(trainer.learner.model, trainer.learner.bank.bits[task])
        group = slice(task, task + 1)
        steps = [Steps(*(value[group] for value in part)) for part in (batch.prompt, batch.history)]
        predicted = copy(Batch(batch.task_ids[group], *steps), no_masks(copy, 1))
        valid = batch.history.valid[group]
        (predicted - targets[group])[valid].square().mean().backward()
        for name, parameter in copy.named_parameters():
            expected[name] += parameter.grad * masks.get(name, 1.0) / 3
    result = trainer.train_step()
    assert list(result.task_ids) == [0, 1, 2]
    for name, parameter in trainer.learner.model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    assert result.gradient_norm.item() == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("sparsity", [0.2, 0.8])
def test_weights_that_no_task_of_the_step_uses_stay_as_they_were(
    store: DataStore, sparsity: float
) -> None:
    trainer = make_trainer(store, configure(sparsity=sparsity, algorithm="harmodt-r"))
    train(trainer, 3)  # moments that would move something
    for _ in range(3):
        before = saved(trainer).tensors
        tasks = trainer.train_step().task_ids
        assert len(tasks) == 2
        used = [
            unpack_masks(trainer.learner.model, trainer.learner.bank.bits[task]) for task in tasks
        ]
        for name, weights in trainer.learner.model.named_parameters():
            moved = (weights != before[f"model.{name}"]).flatten()
            if name in used[0]:
                active = (used[0][name] | used[1][name]).flatten()
                assert not moved[~active].any(), name
                moved = moved[active]
            # LayerNorm gains and the like have some weights whose step is below a rounding
            if "timesteps" not in name:
                assert moved.double().mean() > 0.7, name
    idle = ~_as_bools(trainer, torch.bitwise_or(*trainer.learner.bank.bits[:2]))
    idle &= ~_as_bools(trainer, trainer.learner.bank.bits[2])
    size = trainer.learner.vector.maskable_size
    for moment in trainer.learner.optimisers["model"].tensors().values():
        assert (moment[:size][idle] == 0).all()
        assert (moment[:size][~idle] != 0).double().mean() > 0.7


def _as_bools(trainer: Trainer, bits: Tensor) -> Tensor:
    flat = np.unpackbits(bits.numpy().view(np.uint8), bitorder="little")
    return torch.from_numpy(flat.astype(bool))


@pytest.mark.parametrize("algorithm", ["prompt-dt", "mtdt"])
@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_without_masks_a_step_is_pytorchs_adamw(
    store: DataStore, monkeypatch: pytest.MonkeyPatch, algorithm: str, clip: float
) -> None:
    config = configure(
        algorithm=algorithm, gradient_clip=clip, weight_decay=0.1, steps=8, final_learning_rate=0.2
    )
    trainer, other = make_trainer(store, config), make_trainer(store, config)
    parameters = list(other.learner.model.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
    draws = [windows(trainer, [0, 2], seed) for seed in range(6)]
    monkeypatch.setattr(trainer.learner.feed, "batch", lambda: draws[trainer.step - 1])
    for step, (batch, targets) in enumerate(draws, 1):
        other.learner.vector.gradient.zero_()
        masks = other.learner.masks_for(batch.task_ids)
        other.learner.losses_under(masks, batch, targets).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        fallen = 0.2 + 0.8 * (1 + math.cos(math.pi * step / 8)) / 2
        optimizer.param_groups[0]["lr"] = 1e-3 * min(step / 4, 1.0) * fallen
        optimizer.step()
        result = trainer.train_step()
        torch.testing.assert_close(result.gradient_norm, norm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        trainer.learner.vector.weights, other.learner.vector.weights, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_lowers_the_loss(store: DataStore, algorithm: str) -> None:
    trainer = make_trainer(
        store, configure(algorithm=algorithm, tasks_per_step=3, learning_rate=3e-3, steps=60)
    )
    losses = torch.stack(train(trainer, 60)).mean(1)
    assert losses[-10:].mean() < 0.9 * losses[:10].mean()


def test_the_same_seed_gives_the_same_weights(store: DataStore) -> None:
    config = configure(dropout=0.1)
    first, second = make_trainer(store, config), make_trainer(store, config)
    train(first, 6)
    torch.manual_seed(12345)  # nothing outside of the run counts
    train(second, 6)
    assert equal(first, second)
    other = make_trainer(store, configure(dropout=0.1, seed=1))
    train(other, 6)
    assert not equal(first, other)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("fused", [False, True])  # by the CPU's kernels, in steps that are recorded
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("pause", [4, 6])  # masks move at 4 and at 8
def test_a_run_that_goes_on_ends_as_without_a_pause(
    store: DataStore, algorithm: str, pause: int, fused: bool
) -> None:
    config = configure(dropout=0.1, algorithm=algorithm, fused=fused)
    whole = make_trainer(store, config)
    train(whole, 10)
    first = make_trainer(store, config)
    train(first, pause)
    checkpoint = saved(first)
    train(first, 2)  # what was done after the checkpoint is lost
    second = make_trainer(store, config)
    second.load(checkpoint)
    assert second.step == pause
    train(second, 10 - pause)
    assert equal(whole, second)
    assert whole.step == second.step == 10


def test_a_checkpoint_of_another_size_is_refused(store: DataStore) -> None:
    checkpoint = saved(make_trainer(store, configure(layers=1)))
    with pytest.raises(UserError, match=r"is of another model size: model\.blocks\.1"):
        make_trainer(store).load(checkpoint)
    checkpoint = saved(make_trainer(store, configure(embed_dim=64)))
    with pytest.raises(UserError, match=r"should be \[.*32.*has it as \[.*64"):
        make_trainer(store).load(checkpoint)


def test_round_robin_takes_each_task_in_turn(store: DataStore) -> None:
    trainer = make_trainer(store, configure(task_sampling="round-robin"))
    assert [list(trainer.train_step().task_ids) for _ in range(4)] == [
        [0, 1],
        [2, 0],
        [1, 2],
        [0, 1],
    ]


@pytest.mark.parametrize(
    ("algorithm", "due"), [("harmodt-f", [0, 4, 8]), ("harmodt-m", [0, 4, 8]), ("harmodt-r", [])]
)
def test_masks_are_updated_at_the_start_and_then_at_every_interval(
    store: DataStore, algorithm: str, due: list[int]
) -> None:
    trainer = make_trainer(store, configure(algorithm=algorithm))
    steps = []
    for trainer.step in range(10):
        before = trainer.learner.bank.bits.clone()
        logged = trainer.before_step()
        if logged:
            steps.append(trainer.step)
        moved = not torch.equal(before, trainer.learner.bank.bits)
        assert moved == (logged.get("moved_weights", 0) > 0)
    assert steps == due


@pytest.mark.parametrize(
    ("algorithm", "logged"),
    [("harmodt-f", [0, 3, 4, 6, 8, 9]), ("harmodt-r", [0, 3, 6, 9]), ("prompt-dt", [0, 3, 6, 9])],
)
def test_harmony_is_logged_when_asked_for(
    store: DataStore, algorithm: str, logged: list[int]
) -> None:
    """Figure 2(a) compares it between models with and without masks."""
    trainer = make_trainer(store, configure(algorithm=algorithm, harmony_every=3))
    scores = {}
    before = {name: tensor.clone() for name, tensor in trainer.learner.tensors().items()}
    for trainer.step in range(10):
        values = trainer.before_step()
        if values:
            scores[trainer.step] = values["harmony"]
    assert list(scores) == logged
    assert all(0 < abs(score) < 1 for score in scores.values())
    for name, tensor in trainer.learner.tensors().items():  # it measures and changes nothing
        assert torch.equal(tensor, before[name]) or name == "masks"


def test_masks_move_in_training(store: DataStore) -> None:
    trainer = make_trainer(store)
    before, counts = trainer.learner.bank.bits.clone(), trainer.learner.bank.active_counts()
    train(trainer, 10)
    assert (trainer.learner.bank.bits != before).any(1).all()
    assert torch.equal(trainer.learner.bank.active_counts(), counts)
    padding = ~_as_bools(trainer, trainer.learner.vector.valid_bits())
    assert (trainer.learner.vector.weights[padding] == 0).all()


def test_the_learning_rate_warms_up_and_falls() -> None:
    config = configure(steps=100, learning_rate=2.0, warmup_steps=10, final_learning_rate=0.1)
    assert learning_rate(5, config.optimisation) == pytest.approx(
        2.0 * 0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi / 20)) / 2)
    )
    assert learning_rate(50, config.optimisation) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert learning_rate(100, config.optimisation) == pytest.approx(0.2)
    constant = configure(steps=100, learning_rate=2.0, warmup_steps=0, final_learning_rate=1.0)
    assert [learning_rate(step, constant.optimisation) for step in (1, 50, 100)] == [2.0, 2.0, 2.0]


def test_bf16_keeps_weights_in_fp32_and_the_loss_close(store: DataStore) -> None:
    full, half = make_trainer(store), make_trainer(store, configure(precision="bf16"))
    losses = torch.stack(train(full, 6)), torch.stack(train(half, 6))
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.0)
    assert not torch.equal(*losses)
    assert half.learner.vector.weights.dtype == half.learner.vector.gradient.dtype == torch.float32


def test_a_dense_sparsity_of_zero_is_training_without_masks(store: DataStore) -> None:
    masked = make_trainer(store, configure(sparsity=0.0))
    dense = make_trainer(store, configure(algorithm="prompt-dt"))
    train(masked, 5)
    train(dense, 5)
    torch.testing.assert_close(
        masked.learner.vector.weights, dense.learner.vector.weights, rtol=1e-3, atol=1e-5
    )


def test_settings_that_do_not_fit_the_data_are_refused(store: DataStore) -> None:
    maskable = make_trainer(store).learner.vector.maskable_count()
    make_trainer(store, configure(eta_max=maskable))
    with pytest.raises(UserError, match=f"eta_max is {maskable + 1}, .* only {maskable} maskable"):
        make_trainer(store, configure(eta_max=maskable + 1))
    with pytest.raises(UserError, match="tasks_per_step is 4, but there are only 3 tasks"):
        make_trainer(store, configure(tasks_per_step=4))
