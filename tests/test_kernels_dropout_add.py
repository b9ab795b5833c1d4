from __future__ import annotations

import importlib

import pytest
import torch
from conftest import DEVICE

from harmodt_kernels import REFERENCE, fused_backend
from harmodt_kernels.dropout_add import dropout_add
from harmodt_kernels.native import library


@pytest.mark.parametrize("drop", [0.1, 0.75])
def test_a_share_is_dropped_and_the_rest_rescaled(backend, device, drop) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 20_011, device=device, requires_grad=True)
    branch = torch.ones(2, 3, 20_011, device=device, requires_grad=True)
    out = backend.dropout_add(x, branch, drop)
    added = out.detach() - x.detach()
    dropped = added.abs() < 0.5
    assert dropped.double().mean().item() == pytest.approx(drop, abs=0.005)
    torch.testing.assert_close(
        added, torch.where(dropped, 0.0, 1 / (1 - drop)), rtol=1e-5, atol=1e-5
    )
    rows = dropped.view(6, -1)
    assert len({tuple(row.tolist()) for row in rows}) == 6  # not the same in every row
    d_out = torch.randn_like(out)
    out.backward(d_out)
    torch.testing.assert_close(x.grad, d_out)
    torch.testing.assert_close(branch.grad, torch.where(dropped, 0.0, d_out / (1 - drop)))


def test_the_draw_follows_pytorchs_generator(backend, device) -> None:
    operands = torch.zeros(1000, device=device), torch.ones(1000, device=device)
    torch.manual_seed(1)
    first, second = (backend.dropout_add(*operands, 0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(backend.dropout_add(*operands, 0.5), first)
    assert not torch.equal(first, second)


def test_without_dropout_it_is_the_sum(backend, device) -> None:
    x, branch = torch.randn(2, 1000, device=device)
    assert torch.equal(backend.dropout_add(x, branch, 0.0), x + branch)


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_without_x_it_is_dropout_alone(backend, device, drop) -> None:
    branch = torch.randn(3, 500, device=device)
    found, expected = [], []
    for x, results in ((None, found), (torch.zeros_like(branch), expected)):
        torch.manual_seed(5)
        leaf = branch.clone().requires_grad_()
        out = backend.dropout_add(x, leaf, drop)
        out.backward(branch + 1)
        results += [out.detach(), leaf.grad]
    assert all(map(torch.equal, found, expected))


def test_views_are_read_in_their_order(device) -> None:
    x, branch = torch.randn(40, 30, device=device), torch.randn(30, 40, device=device)
    seed = torch.tensor(2, device=device)
    expected = dropout_add(x, branch.T.contiguous(), 0.5, seed)
    assert torch.equal(dropout_add(x, branch.T, 0.5, seed), expected)


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31 - 1])
def test_every_device_drops_what_the_definition_drops(seed) -> None:
    pytest.importorskip("triton")
    if library.why_missing() is not None:
        pytest.skip("the CPU kernels were not built")
    x, branch = torch.randn(2, 3, 1500, generator=torch.Generator().manual_seed(seed))
    expected = REFERENCE.dropout_add(x, branch, 0.3, torch.tensor(seed))
    dropped = expected == x
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.03)
    for kind, device in (("cpu", "cpu"), ("triton", DEVICE)):
        kernels = importlib.import_module(f"harmodt_kernels.dropout_add.{kind}")
        operands = x.to(device), branch.to(device), 0.3, torch.tensor([seed], device=device)
        computed = kernels.dropout_add(*operands, torch.float32).cpu()
        assert torch.equal(computed == x, dropped), kind
        torch.testing.assert_close(computed, expected, rtol=1e-6, atol=1e-6)


def test_the_gradient_drops_the_same(device) -> None:
    fused, dy = fused_backend(device), torch.randn(5, 700, device=device)
    for seed in (torch.tensor([5]), torch.tensor(6)):
        results = []
        for backend in (fused, REFERENCE):
            leaves = [t.requires_grad_() for t in torch.zeros(2, 5, 700, device=device)]
            backend.dropout_add(*leaves, 0.6, seed.to(device)).backward(dy)
            results.append([leaf.grad for leaf in leaves])
        torch.testing.assert_close(*results, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("of_branch", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_x", [None, torch.float32], ids=str)
def test_halves_are_rounded_once(backend, device, of_x, of_branch) -> None:
    if of_branch == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter rounds to bf16 wrongly")
    x, branch, dy = torch.randn(3, 2, 700, device=device)
    x, branch = x.to(of_x or of_branch).requires_grad_(), branch.to(of_branch).requires_grad_()
    results = []
    for exact in (True, False):
        leaves = (
            [t.detach().float().requires_grad_() for t in (x, branch)] if exact else (x, branch)
        )
        out = backend.dropout_add(*leaves, 0.25, torch.tensor(3, device=device))
        out.backward(dy.to(of_x or of_branch).to(out))
        results.append((out, leaves[0].grad, leaves[1].grad))
    for expected, computed, dtype in zip(*results, (x.dtype, x.dtype, of_branch), strict=True):
        assert computed.dtype == dtype and torch.equal(computed, expected.to(dtype))


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written(device) -> None:
    x, branch = torch.randn(2, 1027, device=device)
    assert fused_backend(device).dropout_add(x, branch, 0.5).isfinite().all()


def test_the_registered_operation_keeps_pytorchs_rules(device) -> None:
    x, branch = torch.randn(2, 3, 70, device=device)
    settings = 0.5, torch.tensor([7], device=device), torch.float32
    torch.library.opcheck(torch.ops.harmodt.dropout_add, (x, branch, *settings))
    torch.library.opcheck(torch.ops.harmodt.dropout_add, (None, branch.T, *settings))


def test_no_seeds_draw_is_a_shift_of_anothers(backend, device) -> None:
    """If seeds were only added to indices, the second draw would be the first, 2 elements on."""
    torch.manual_seed(0)  # `PYTORCH` draws from the generator, whatever the seed
    factor, shift = 0x9E3779B1, 2
    seeds = 5, (5 + shift * factor) % 2**32
    assert max(seeds) < 2**31
    first, second = (
        backend.dropout_add(None, ones, 0.5, torch.tensor(seed, device=device)) > 0
        for ones in [torch.ones(4000, device=device)]
        for seed in seeds
    )
    for by in (0, shift):
        assert 0.45 < (first[by:] == second[: 4000 - by]).float().mean() < 0.55


@pytest.mark.parametrize("drop", [-0.5, 1.0, float("nan")])
def test_a_probability_out_of_range_is_refused(backend, device, drop: float) -> None:
    ones = torch.ones(1, 4, 3, 1, 8, device=device)
    for call in (
        lambda: backend.dropout_add(None, ones, drop),
        lambda: backend.attention(ones, slice(None), drop),
    ):
        with pytest.raises(ValueError, match=r"drop is .*: the probability must be at least 0"):
            call()


@pytest.mark.usefixtures("native")
def test_operands_that_do_not_fit_are_named() -> None:
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(TypeError, match=f"branch is {dtype}"):
            dropout_add(torch.zeros(3), torch.zeros(3, dtype=dtype), 0.5)
    with pytest.raises(ValueError, match=r"x has shape \[3\]: with branch \[4\] .* \[4\]"):
        dropout_add(torch.zeros(3), torch.zeros(4), 0.5)
    for seed, error, message in (
        (
            torch.tensor(3, dtype=torch.int32),
            TypeError,
            "seed is torch.int32: it must be torch.int64",
        ),
        (torch.tensor([3, 4]), ValueError, r"seed has shape \[2\]: it must be \[1\]"),
        (
            torch.tensor(3, device="meta"),
            ValueError,
            "seed is on meta, and other operands are on cpu",
        ),
    ):
        with pytest.raises(error, match=message):
            dropout_add(torch.zeros(3), torch.zeros(3), 0.5, seed)
