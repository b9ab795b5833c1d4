"""What the kernels are measured beside: masked copies, paths of a step, results in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE
from tiny import make_store

from harmodt_kernels import pack_bits

sys.path.append(str(Path(__file__).parents[1] / "bench"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("words", [1, 33])
def test_copies_and_their_gradients_on_a_gpu(words: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from copies_triton import add_masked, masked_copies

    torch.manual_seed(words)
    mask = torch.rand(3, 32 * words) < 0.7
    weights = torch.randn(32 * words + 5)  # of which masks cover the first
    weights[:32][~mask[:, :32].any(0)] = torch.nan
    bits = pack_bits(mask).to(DEVICE)
    copies = masked_copies(weights.to(DEVICE), bits, dtype)
    expected = torch.where(mask, weights[: 32 * words], 0.0).to(dtype)
    assert torch.equal(copies.cpu(), expected)
    gradients, total = torch.randn(3, 32 * words).to(dtype), torch.randn(32 * words + 5)
    expected = total.double()
    expected[: 32 * words] += torch.where(mask, gradients, 0.0).double().sum(0)
    actual = total.to(DEVICE)
    add_masked(actual, gradients.to(DEVICE), bits)
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=2e-6)
    assert torch.equal(actual[32 * words :].cpu(), total[32 * words :])


@pytest.mark.skipif(DEVICE != "cpu", reason="this is the way of a CPU")
def test_a_step_on_masked_copies_is_that_of_the_definition(tmp_path, monkeypatch) -> None:
    """A weight that no task of the step uses stays; gradients do not reach it."""
    import paths

    from harmodt_kernels import PYTORCH

    monkeypatch.setattr(paths, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(paths, "ON_GPU", False)
    monkeypatch.setattr(paths, "fused", lambda: PYTORCH)
    store = make_store(tmp_path / "store", lengths=(40, 40), prompt_lengths=(20,))
    small = {"embed_dim": 32, "layers": 2, "heads": 2, "dropout": 0.0, "embedding_dropout": 0.0}
    trainers = {
        path: paths.make_trainer(store, path, **small, tasks_per_step=2, warmup_steps=0)
        for path in ("masked copies", "reference", "dense")
    }
    before = trainers["reference"].learner.vector.weights.clone()
    changes = {}
    for path, trainer in trainers.items():
        for _ in range(2):
            trainer.train_step()
        changes[path] = trainer.learner.vector.weights - before
    expected = changes["reference"]
    assert (changes["masked copies"] - expected).norm() <= 1e-3 * expected.norm()
    assert torch.equal(changes["masked copies"] == 0, expected == 0)
    assert (changes["dense"] - expected).norm() > 0.1 * expected.norm()


@pytest.mark.usefixtures("native")
def test_the_errors_of_every_operation_are_small_and_not_all_zero() -> None:
    import errors

    rows = errors.measure("fp32", rows=8)
    assert {row["operation"] for row in rows} == set(errors.operations(1))
    assert max(row["error"] for row in rows) < 1e-5 and max(row["pytorch"] for row in rows) < 1e-5
    assert sum(row["error"] > 1e-9 for row in rows) > len(rows) // 2
    assert all(row["operation"] in errors.table(rows) for row in rows)
