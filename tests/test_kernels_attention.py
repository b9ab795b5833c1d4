from __future__ import annotations

import pytest
import torch
from conftest import IMPLEMENTATIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import attention_by_loops, attention_operands
from torch import Tensor

from harmodt_kernels import PYTORCH, REFERENCE, Backend, fused_backend
from harmodt_kernels.attention import attention, reference

SIZES = [
    (3, 75, 8, 16),
    (2, 75, 2, 32),
    (2, 7, 2, 20),
    (1, 1, 1, 5),
]  # sequences, tokens, heads, size


@pytest.mark.parametrize("queries", [slice(None), slice(1, None, 3), slice(-1, None)], ids=str)
@pytest.mark.parametrize("sizes", SIZES[1:3])
def test_output_and_gradient_equal_loops(backend, device, queries, sizes) -> None:
    qkv = attention_operands(*sizes).to(device)
    exact, leaf = qkv.double().requires_grad_(), qkv.requires_grad_()
    expected, computed = (
        attention_by_loops(exact, queries),
        backend.attention(leaf, queries, 0.0),
    )
    d_out = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(device)
    expected.backward(d_out.double())
    computed.backward(d_out)
    torch.testing.assert_close(computed.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:], indirect=True)
def test_equals_the_definition(backend, device) -> None:
    slow = backend.name == "triton-interpreter"

    @settings(max_examples=6 if slow else 30, deadline=None)
    @given(
        tokens=st.integers(1, 70),
        heads=st.integers(1, 3),
        size=st.integers(1, 40),
        first=st.integers(0, 5),
        step=st.integers(1, 4),
    )
    def check(tokens: int, heads: int, size: int, first: int, step: int) -> None:
        queries = slice(min(first, tokens - 1), None, step)
        qkv = attention_operands(2, tokens, heads, size).to(device)
        equals_the_definition(backend, qkv, queries)

    check()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:], indirect=True)
@pytest.mark.parametrize("part", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_infinity_are_not_hidden(backend, device, value, part) -> None:
    qkv = attention_operands(2, 20, 2, 16)
    qkv[1, 4, part, 1, 3] = value
    out = backend.attention(qkv.to(device), slice(None), 0.0)
    expected = reference.attention(qkv.double().to(device), slice(None), 0.0)
    spoiled = ~expected.isfinite()
    assert spoiled.any() and not out[spoiled].isfinite().any()
    assert out[0].isfinite().all()


def equals_the_definition(backend: Backend, qkv: Tensor, queries: slice, drop: float = 0.0) -> None:
    leaf, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    seed = torch.tensor([7], device=qkv.device)
    out = backend.attention(leaf, queries, drop, seed=seed)
    expected = reference.attention(exact, queries, drop, seed=seed)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    # An element may be a small difference of large terms: errors are those of the largest ones.
    error = (leaf.grad - exact.grad).abs().max()
    assert error <= 2e-5 * exact.grad.abs().max()


@pytest.mark.parametrize("queries", [slice(None), slice(1, None, 3), slice(-1, None)], ids=str)
def test_it_drops_what_the_definition_drops(device, queries) -> None:
    backend, qkv = fused_backend(device), attention_operands(2, 40, 3, 16).to(device)
    equals_the_definition(backend, qkv, queries, drop=0.3)
    past = tuple(torch.randn(2, 2, 3, 5, 16, generator=torch.Generator().manual_seed(0)).to(device))
    acting = queries, 0.3, past, torch.tensor(8, device=device)
    expected = reference.attention(qkv, *acting)
    torch.testing.assert_close(backend.attention(qkv, *acting), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [slice(None), slice(1, None, 3), slice(-1, None)], ids=str)
@pytest.mark.parametrize("sizes", [(3, 75, 2, 16), (2, 9, 3, 5)])
def test_past_tokens_are_seen_as_if_they_were_present(backend, device, queries, sizes) -> None:
    qkv = attention_operands(*sizes).to(device)
    before = sizes[1] // 3
    expected = attention_by_loops(qkv.double(), slice(None))[:, before:][:, queries]
    past = tuple(qkv[:, :before, part].transpose(1, 2) for part in (1, 2))
    computed = backend.attention(qkv[:, before:], queries, 0.0, past)
    torch.testing.assert_close(computed.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:], indirect=True)
def test_weights_far_apart_do_not_overflow(backend, device) -> None:
    qkv = attention_operands(2, 20, 1, 16).to(device)
    qkv *= 1000
    computed = backend.attention(qkv, slice(None), 0.0)
    torch.testing.assert_close(computed, reference.attention(qkv, slice(None), 0.0))


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_err_at_most_twice_as_much_as_pytorch(backend, device, dtype) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bf16 wrongly")
    qkv = attention_operands(2, 40, 2, 20).to(device, dtype)
    d_out = torch.randn(2, 40, 2, 20, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    results = []
    for of, kind in ((REFERENCE, torch.float64), (PYTORCH, dtype), (backend, dtype)):
        leaf = qkv.to(kind, copy=True).requires_grad_()
        out = of.attention(leaf, slice(None), 0.0)
        out.backward(d_out.to(kind))
        assert out.dtype == leaf.grad.dtype == kind
        results.append((out.detach().double(), leaf.grad.double()))
    for exact, dense, computed in zip(*results, strict=True):
        assert (computed - exact).abs().max() <= 2 * (dense - exact).abs().max()


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("size", [100, 128])
def test_long_heads(backend, device, size) -> None:
    qkv = attention_operands(1, 40, 1, size).to(device)
    equals_the_definition(backend, qkv, slice(1, None, 3))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("queries", [slice(None), slice(1, None, 3)], ids=str)
def test_every_output_is_written(device, queries) -> None:
    leaf = attention_operands(2, 37, 2, 20).to(device).requires_grad_()
    out = fused_backend(device).attention(leaf, queries, 0.1)
    out.sum().backward()
    assert out.isfinite().all() and leaf.grad.isfinite().all()


def test_results_repeat_bit_for_bit(backend, device) -> None:
    qkv, results = attention_operands(1, 40, 2, 16).to(device), []
    for _ in range(5):
        torch.manual_seed(3)  # plain PyTorch reads no seed
        leaf = qkv.clone().requires_grad_()
        out = backend.attention(leaf, slice(None), 0.1)
        out.sum().backward()
        results.append((out, leaf.grad))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_dropout_drops_its_share_and_rescales_the_rest(backend, device) -> None:
    tokens = 64
    qkv = torch.zeros(60, tokens, 3, 1, tokens)  # equal weights, which the values make visible
    qkv[:, :, 2, 0] = torch.eye(tokens)
    qkv = qkv.to(device)
    torch.manual_seed(0)
    weights = backend.attention(qkv, slice(-1, None), 0.25)[:, 0, 0] * tokens  # [60, keys]
    dropped = weights == 0
    assert dropped.double().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(weights[~dropped], torch.full_like(weights[~dropped], 1 / 0.75))
    assert len({tuple(row.tolist()) for row in dropped}) == 60
    assert not torch.equal(backend.attention(qkv, slice(-1, None), 0.25)[:, 0, 0] == 0, dropped)


def test_the_gradient_is_that_of_the_dropped_weights(backend, device) -> None:
    qkv = attention_operands(2, 12, 2, 16).to(device)
    direction = torch.randn(qkv.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return backend.attention(x, slice(None), 0.4).double().sin().sum()

    leaf = qkv.clone().requires_grad_()
    loss(leaf).backward()
    slope = (leaf.grad.double() * direction).sum()
    numeric = (loss(qkv + 1e-2 * direction) - loss(qkv - 1e-2 * direction)) / 2e-2
    assert slope.item() == pytest.approx(numeric.item(), rel=2e-2)


@pytest.mark.usefixtures("native")
def test_threads_do_not_change_the_result() -> None:
    qkv = attention_operands(*SIZES[0])
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = qkv.clone().requires_grad_()
        out = attention(leaf, slice(None), 0.0)
        out.sum().backward()
        results.append((out, leaf.grad))
    torch.set_num_threads(before)
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(gradient, results[0][1])


def test_the_registered_operations_keep_pytorchs_rules(device) -> None:
    qkv = attention_operands(1, 7, 1, 16).to(device)
    settings = (3, 0, 3, 0.3, torch.tensor([5], device=device))
    torch.library.opcheck(torch.ops.harmodt.attention, (qkv, None, None, *settings))
    past = qkv[:, :3, 1].transpose(1, 2).contiguous()
    torch.library.opcheck(torch.ops.harmodt.attention, (qkv[:, 3:], past, past, 1, 0, 3, 0.0, None))
    out, log_sums = torch.ops.harmodt.attention(qkv, None, None, *settings)
    torch.library.opcheck(
        torch.ops.harmodt.attention_gradient, (out, qkv, out, log_sums, *settings)
    )


@pytest.mark.usefixtures("native")
def test_operands_that_do_not_fit_are_named() -> None:
    qkv = attention_operands(2, 7, 2, 16)
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(TypeError, match=f"qkv is {dtype}"):
            attention(qkv.to(dtype), slice(None), 0.0)
    with pytest.raises(
        ValueError, match=r"qkv has shape \[2, 7, 2, 2, 16\]: it must be \[any, any, 3, any"
    ):
        attention(qkv[:, :, :2], slice(None), 0.0)
    past = torch.zeros(2, 2, 3, 16)
    with pytest.raises(TypeError, match=r"past\[0\] is torch.float16: it must be torch.float32"):
        attention(qkv, slice(None), 0.0, (past.half(), past.half()))
    with pytest.raises(ValueError, match=r"past\[1\] has shape \[2, 2, 3, 8\].* \[2, 2, 3, 16\]"):
        attention(qkv, slice(None), 0.0, (past, past[..., :8]))
    with pytest.raises(
        ValueError, match=r"past\[0\] has shape \[1, 2, 3, 16\]: with qkv \[2, 7, 3, 2, 16\]"
    ):
        attention(qkv, slice(None), 0.0, (past[:1], past[:1]))
    with pytest.raises(ValueError, match="no gradient"):
        attention(qkv.requires_grad_(), slice(None), 0.0, (past, past))
    with pytest.raises(ValueError, match="queries has the step -1: it must be at least 1"):
        attention(qkv, slice(None, None, -1), 0.0)
    with pytest.raises(TypeError, match=r"seed is torch.float32"):
        attention(qkv, slice(None), 0.1, seed=torch.zeros(1))
