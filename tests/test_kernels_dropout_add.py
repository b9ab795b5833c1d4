from __future__ import annotations

import pytest
import torch

from harmodt_kernels.dropout_add import dropout_add

IMPLEMENTATIONS = ["reference", "pytorch", "cpu"]


@pytest.mark.parametrize("drop", [0.1, 0.75])
def test_a_share_is_dropped_and_the_rest_rescaled(backend, drop) -> None:
    torch.manual_seed(0)
    x, branch = torch.randn(2, 3, 20_011, requires_grad=True), torch.ones(2, 3, 20_011)
    branch.requires_grad_()
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


def test_the_draw_follows_pytorchs_generator(backend) -> None:
    operands = torch.zeros(1000), torch.ones(1000)
    torch.manual_seed(1)
    first, second = (backend.dropout_add(*operands, 0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(backend.dropout_add(*operands, 0.5), first)
    assert not torch.equal(first, second)


def test_without_dropout_it_is_the_sum(backend) -> None:
    x, branch = torch.randn(2, 1000)
    assert torch.equal(backend.dropout_add(x, branch, 0.0), x + branch)


@pytest.mark.usefixtures("native")
def test_views_are_read_in_their_order() -> None:
    x, branch = torch.randn(40, 30), torch.randn(30, 40)
    torch.manual_seed(2)
    expected = dropout_add(x, branch.T.contiguous(), 0.5)
    torch.manual_seed(2)
    assert torch.equal(dropout_add(x, branch.T, 0.5), expected)


@pytest.mark.usefixtures("native")
def test_the_registered_operation_keeps_pytorchs_rules() -> None:
    x, branch = torch.randn(2, 3, 70)
    torch.library.opcheck(torch.ops.harmodt.dropout_add, (x, branch, 0.5, 7))
    torch.library.opcheck(torch.ops.harmodt.dropout_add, (None, branch.T, 0.5, 7))


@pytest.mark.usefixtures("native")
def test_operands_that_do_not_fit_are_named() -> None:
    with pytest.raises(TypeError, match=r"branch is torch\.float64"):
        dropout_add(torch.zeros(3), torch.zeros(3, dtype=torch.float64), 0.5)
    with pytest.raises(ValueError, match=r"x \[3\] and branch \[4\]"):
        dropout_add(torch.zeros(3), torch.zeros(4), 0.5)
