"""Training and acting on the fused kernels, beside the same on the reference path."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import configure, make_setup, make_store, make_trainer
from torch import Tensor

from harmodt import load_policy, train
from harmodt.data.store import DataStore
from harmodt.devices import Execution
from harmodt.errors import UserError
from harmodt.rundir import RunDirectory
from harmodt.training.trainer import Trainer
from harmodt_kernels import (
    PYTORCH,
    REFERENCE,
    Backend,
    RecordingMemory,
    count_bits,
    fused_backend,
)
from harmodt_kernels.native import library


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("data") / "store")


def losses(trainer: Trainer, steps: int) -> Tensor:
    """Of some steps with the mask updates that are due."""
    rows = []
    for _ in range(steps):
        trainer.before_step()
        rows.append(trainer.train_step().losses)
    return torch.stack(rows)


# Small even for these tests: the interpreter takes a millisecond or more for each tile.
SIZES = {"layers": 1, "batch_per_task": 2, "context_length": 4, "prompt_length": 2}


@pytest.mark.parametrize(
    "algorithm", ["harmodt-f", pytest.param("harmodt-m", marks=pytest.mark.full)]
)
def test_training_follows_the_reference(store: DataStore, device, algorithm: str) -> None:
    settings = {"algorithm": algorithm, "eta_min": 20, **SIZES}
    reference, fused = (
        make_trainer(store, configure(fused=fused, **settings), device) for fused in (False, True)
    )
    assert reference.setup.execution.backend.name == "pytorch"
    assert fused.setup.execution.backend.name == fused_backend(device).name != "pytorch"
    # Biases of zero would tie, and rounding alone would decide which of them leave.
    noise = torch.randn(reference.learner.vector.weights.shape, device=device) * 0.05
    for trainer in (reference, fused):
        trainer.learner.vector.weights += noise
    before = reference.learner.bank.bits.clone()
    torch.testing.assert_close(losses(fused, 2), losses(reference, 2), rtol=1e-4, atol=0.0)
    weights, expected = fused.learner.vector.weights, reference.learner.vector.weights
    assert ((weights - expected).norm() / expected.norm()).item() < 1e-4
    moved = count_bits(reference.learner.bank.bits ^ before)
    assert (moved == 40).all()  # 20 out and 20 in
    # Rounding may decide between two weights of nearly the same harmony.
    assert (count_bits(fused.learner.bank.bits ^ reference.learner.bank.bits) <= moved // 20).all()


@dataclasses.dataclass(frozen=True)
class Halves(Execution):
    """In float16, which the interpreter rounds rightly, with a copy of the weights or without."""

    copy: bool = True

    @property
    def rounded_to(self) -> torch.dtype | None:
        return torch.float16 if self.copy else None

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.float16, cache_enabled=False)


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        pytest.param("harmodt-f", {"dropout": 0.1}, marks=pytest.mark.full),
        ("harmodt-r", {"dropout": 0.1, "tasks_per_step": 2, "surgery": "cagrad"}),
        pytest.param("soco-dt", {"dropout": 0.1}, marks=pytest.mark.full),
        ("prompt-dt", {}),
    ],
)
def test_steps_from_rounded_weights_come_to_the_same_bits(store, device, algorithm, more) -> None:
    config, results = configure(algorithm, fused=True, **SIZES, **more), []
    for copy in (True, False):
        setup = make_setup(store, config, device)
        execution = Halves(
            device, setup.execution.backend, graph=False, copy=copy, memory=RecordingMemory()
        )
        setup = dataclasses.replace(setup, execution=execution)
        data = [store.task(name) for name in store.tasks]
        trainer = Trainer(setup, data, RunDirectory(store.path.with_name("run")))
        results.append(
            [losses(trainer, 2), *(t.clone() for t in trainer.learner.tensors().values())]
        )
        bf16_copy, vector = trainer.learner.optimisers["model"].bf16_copy, trainer.learner.vector
        assert (bf16_copy is not None) == copy
        if copy:
            assert torch.equal(bf16_copy, vector.weights[: vector.maskable_size].half())
            bf16_copy.fill_(torch.nan)  # products read the copy
            assert trainer.train_step().losses.isnan().all()
    assert all(map(torch.equal, *results))


def test_the_weights_of_a_step_in_bf16_are_rounded_where_products_read_them_so(
    store: DataStore, device
) -> None:
    for precision in ("fp32", "bf16"):
        trainer = make_trainer(store, configure(fused=True, precision=precision, **SIZES), device)
        learner, weights = trainer.learner, trainer.learner.vector.weights
        for brings in (torch.zeros_like, torch.randn_like):  # of a checkpoint, at any time
            new = brings(weights)
            copy_to = partial(lambda vector, change, _: vector.add_(change), weights, new)
            trainer.load(SimpleNamespace(step=0, copy_to=copy_to))
            bf16_copy = learner._masks.of(learner.model.blocks[0].qkv).bf16_copy
            if precision == "fp32" or learner.execution.backend.rounds_inside:
                assert bf16_copy is None
            else:
                assert torch.equal(bf16_copy, learner.model.blocks[0].qkv.weight.bfloat16())


@pytest.mark.parametrize(
    ("algorithm", "surgery"),
    [
        *(("harmodt-f", "pcgrad"), ("soco-dt", "none"), ("prompt-dt", "none"), ("mtdt", "none")),
        pytest.param("harmodt-f", "none", marks=pytest.mark.full),
        pytest.param("soco-dt", "pcgrad", marks=pytest.mark.full),
        pytest.param("prompt-dt", "pcgrad", marks=pytest.mark.full),
        pytest.param("mtdt", "pcgrad", marks=pytest.mark.full),
    ],
)
def test_a_step_leaves_nothing_of_the_gradient_before(
    store: DataStore, device, algorithm: str, surgery: str
) -> None:
    sizes = {"tasks_per_step": 2, "surgery": surgery, "graph": False, **SIZES}
    if algorithm == "mtdt":
        del sizes["prompt_length"]
    results = []
    for before in (0.0, torch.nan):
        trainer = make_trainer(store, configure(algorithm, fused=True, **sizes), device)
        vector = trainer.learner.vector
        for slot in vector.slots.values():  # what lies between them is 0 and stays so
            slot.view(vector.gradient).fill_(before)
        trainer.train_step()
        results.append(vector.gradient.clone())
    assert torch.equal(*results) and results[0].any()


@pytest.mark.parametrize("implementation", ["cpu"], indirect=True)
def test_a_hundred_steps_on_a_cpu_follow_the_reference(store: DataStore, device) -> None:
    settings = {"steps": 100, "mask_update_every": 50, "learning_rate": 1e-3, "heads": 1}
    reference, fused = (
        losses(make_trainer(store, configure(fused=fused, **settings), device), 100)
        for fused in (False, True)
    )
    assert (reference[-10:].mean() / reference[:10].mean()).item() < 0.9  # it has learned
    torch.testing.assert_close(fused, reference, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["prompt-dt", "mtdt"])
def test_an_algorithm_without_masks_goes_through_the_kernels(
    store: DataStore, device, algorithm: str
) -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "prompt_length"}
    config = configure(algorithm, fused=True, graph=False, **sizes)
    counted, calls = counting(fused_backend(device))
    fused, definition = (
        make_trainer(store, config, device, backend) for backend in (counted, REFERENCE)
    )
    torch.testing.assert_close(losses(fused, 2), losses(definition, 2), rtol=1e-4, atol=0.0)
    # A block's residual branches begin with a LayerNorm and a linear layer and end with another.
    # There are a LayerNorm before and one after the blocks, and the head.
    embeddings = 2 if config.own.prompts() else 1
    assert calls == {
        "token_embedding": 2 * embeddings, "masked_linear": 2, "norm_linear": 2 * 2,
        "linear_residual": 2 * 2, "masked_layer_norm": 2 * 2, "attention": 2, "masked_adamw": 2,
    }  # fmt: skip


def counting(backend: Backend) -> tuple[Backend, Counter[str]]:
    """A backend that counts the calls of its operations."""
    calls: Counter[str] = Counter()

    def count(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **settings: Any) -> Any:
            calls[name] += 1
            return operation(*arguments, **settings)

        return counted

    operations = {name: count(name, getattr(backend, name)) for name in backend.implementations}
    return dataclasses.replace(backend, **operations), calls


def test_acting_equals_the_reference(store: DataStore, device) -> None:
    config = configure(fused=True, **SIZES)
    policies = [
        make_trainer(store, config, device, backend).learner.policy(0)
        for backend in (None, PYTORCH)
    ]
    assert [policy.backend for policy in policies] == [fused_backend(device).name, "pytorch"]
    rng = np.random.default_rng(0)
    for policy in policies:
        policy.start(np.array([0, 2, 1, 2]))
    for _ in range(2):
        observations = rng.normal(size=(4, 39)).astype(np.float32)
        fused, reference = (policy.act(observations) for policy in policies)
        np.testing.assert_allclose(fused, reference, rtol=1e-4, atol=1e-6)
        assert np.abs(reference).max() > 1e-3
        for policy in policies:
            policy.record_rewards(np.zeros(4))


def test_a_run_records_its_kernels(store: DataStore, device, tmp_path: Path, capsys) -> None:
    flags = "--embed-dim 32 --layers 1 --heads 2 --context-length 4 --prompt-length 2 --steps 1"
    train.main(
        [
            *("--data", str(store.path), "--output", str(tmp_path / "run"), "--fused"),
            *("--device", str(device), "--tasks-per-step", "1", "--evaluation-episodes", "0"),
            *("--algorithm", "harmodt-r"),  # whose masks the interpreter need not update
            *flags.split(),
        ]
    )
    description = json.loads((tmp_path / "run" / "run.json").read_text())
    backend = fused_backend(device)
    assert [part["backend"] for part in description["parts"]] == [backend.name]
    assert f"{backend.name} kernels" in capsys.readouterr().out
    # A policy acts as it was trained unless it is told otherwise.
    assert load_policy(tmp_path / "run").backend == backend.name
    assert load_policy(tmp_path / "run", fused=False).backend == "pytorch"
    assert load_policy(tmp_path / "run", precision="bf16").precision == "bf16"


def test_a_device_without_kernels_is_refused(store: DataStore, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(library, "PATH", tmp_path / "libharmodt.so")
    with pytest.raises(UserError, match=r"--fused: the CPU kernels were not built.*--no-fused"):
        make_trainer(store, configure(fused=True))
