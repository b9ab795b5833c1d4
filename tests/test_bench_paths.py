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


@pytest.fixture
def make_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes the trainer of a path on a CPU; plain PyTorch takes the place of the kernels."""
    import paths

    from harmodt_kernels import PYTORCH

    monkeypatch.setattr(paths, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(paths, "ON_GPU", False)
    monkeypatch.setattr(paths, "fused", lambda: PYTORCH)
    store = make_store(tmp_path / "store", lengths=(40, 40), prompt_lengths=(20,))
    small = {"embed_dim": 32, "layers": 2, "heads": 2, "dropout": 0.0, "embedding_dropout": 0.0}
    small |= {"tasks_per_step": 2, "warmup_steps": 0, "compiler": "aot_eager"}
    return lambda path, **more: paths.make_trainer(store, path, **(small | more))


def learned(trainer, steps: int) -> torch.Tensor:
    """The change of the weights in some steps."""
    before = trainer.learner.vector.weights.clone()
    for _ in range(steps):
        trainer.train_step()
    return trainer.learner.vector.weights - before


@pytest.mark.skipif(DEVICE != "cpu", reason="this is the way of a CPU")
@pytest.mark.parametrize("path", ["masked copies", "reference, compiled"])
def test_a_step_of_another_path_is_that_of_the_definition(make_step, path: str) -> None:
    """A weight that no task of the step uses stays; gradients do not reach it."""
    change, expected = learned(make_step(path), 2), learned(make_step("reference"), 2)
    assert (change - expected).norm() <= 1e-3 * expected.norm()
    assert torch.equal(change == 0, expected == 0)
    assert (learned(make_step("dense"), 2) - expected).norm() > 0.1 * expected.norm()


@pytest.mark.skipif(DEVICE != "cpu", reason="this is the way of a CPU")
def test_a_recorded_dense_step_is_one_computed_anew_with_new_dropout_in_each(make_step) -> None:
    settings = {"dropout": 0.3, "embedding_dropout": 0.3}
    replayed = make_step("dense, recorded", **settings)
    anew = make_step("dense, recorded", **settings, graph=False)
    assert torch.equal(learned(replayed, 4), learned(anew, 4))
    assert replayed.learner._step.recording.calls
    step = replayed.learner._step  # again on the same weights: only the seeds differ
    losses = []
    for number in (5, 6, 5):
        weights = replayed.learner.vector.weights.clone()
        replayed.learner.feed.extra[1].fill_(number)
        losses.append(step())
        replayed.learner.vector.weights.copy_(weights)
    assert torch.equal(losses[0], losses[2]) and not torch.equal(losses[0], losses[1])
    dense = learned(make_step("dense"), 2)
    without_dropout = learned(make_step("dense, recorded"), 2)
    assert (without_dropout - dense).norm() <= 1e-3 * dense.norm()


@pytest.mark.usefixtures("native")
def test_the_errors_of_every_operation_are_small_and_not_all_zero() -> None:
    import errors

    rows = errors.measure("fp32", rows=8)
    assert {row["operation"] for row in rows} == set(errors.operations(1))
    assert max(row["error"] for row in rows) < 1e-5 and max(row["pytorch"] for row in rows) < 1e-5
    assert sum(row["error"] > 1e-9 for row in rows) > len(rows) // 2
    assert all(row["operation"] in errors.table(rows) for row in rows)


@pytest.mark.usefixtures("native")
@pytest.mark.skipif(DEVICE != "cpu", reason="this is the way of a CPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_paths_of_a_layer_with_and_without_masks_agree_with_float64(dtype: str) -> None:
    import bench_masked_linear as bench

    problem = bench.Problem.random(getattr(torch, dtype), 32, "up", 3, 5)
    of_masks, of_none = problem.expected(True), problem.expected(False)
    paths = {*bench.paths_of(dtype), "fused, full masks", "fused, no masks"}
    assert ("dense, W cast once" in paths) == (dtype == "bfloat16")
    for path in sorted(paths - {"compiled"}):  # the benchmark runs it
        operands = problem.cast() if path == "dense, W cast once" else problem
        assert operands.weight.dtype == (torch.float32 if operands is problem else operands.x.dtype)
        actual = operands.forward_backward(bench.forward_of(path, operands, ""))
        for one, other in zip(actual, of_masks if path in bench.MASKED else of_none, strict=True):
            bench.assert_agree(one, other, bench.TOLERANCE[dtype])
    with pytest.raises(AssertionError):
        bench.assert_agree(of_masks[0], of_none[0], bench.TOLERANCE[dtype])


@pytest.mark.skipif(DEVICE != "cpu", reason="this is the way of a CPU")
def test_an_attention_that_pytorch_lacks_on_a_device_is_left_out_with_a_warning() -> None:
    import bench_operations as bench
    from torch.nn.attention import SDPBackend

    qkv = torch.randn(2, 5, 3, 2, 16)
    with pytest.warns(UserWarning, match="no cuDNN for torch.float32"):
        calls = bench.attentions(
            qkv, 0.0, {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        )
    assert calls.keys() == {"flash"}
    torch.testing.assert_close(calls["flash"](), bench.REFERENCE.attention(qkv, slice(None), 0.0))
    with pytest.raises(RuntimeError, match="permute"):
        bench.attentions(qkv[..., None], 0.0, {"flash": SDPBackend.FLASH_ATTENTION})
