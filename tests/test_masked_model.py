"""Masks over any model, with the optimiser of its active weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harmodt_kernels import (
    PYTORCH,
    LayerMasks,
    MaskedAdamW,
    MaskedLinear,
    MaskedModel,
    NotFinite,
    pack_bits,
    unpack_bits,
)

pytestmark = pytest.mark.usefixtures("native")
SETTINGS = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.LayerNorm(40), nn.Linear(40, 3))


def bools(model: MaskedModel) -> dict[str, Tensor]:
    """The masks of each maskable parameter, bool [T, *shape]."""
    active = unpack_bits(model.bits, model.vector.maskable_size)
    return {
        name: slot.of_groups(active)
        for name, slot in model.vector.slots.items()
        if slot.end <= model.vector.maskable_size
    }


def test_the_example_of_the_guide_learns_ten_tasks() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text(encoding="utf-8")
    section = guide.partition("## Masks over any model")[2]
    (example,) = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    values: dict[str, Any] = {}
    exec(example, values)
    assert values["loss"].item() < 1  # the variance of the targets is about 8
    before = re.sub("density=0.5", "density=1.0", example)
    exec(before, values)
    assert values["loss"].item() > 3  # one network without masks cannot tell the tasks apart


@pytest.mark.parametrize("shape", [(5,), (2, 5), (3, 2, 5), (3, 2, 4, 5), (0, 5)])
def test_without_masks_a_masked_layer_is_a_linear_layer(shape: tuple[int, ...]) -> None:
    plain, masked = nn.Linear(5, 4), MaskedLinear(5, 4)
    masked.load_state_dict(plain.state_dict())
    assert masked.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(shape)
    torch.testing.assert_close(masked(x), plain(x))


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_a_layer_applies_the_masks_that_it_holds(shape: tuple[int, ...]) -> None:
    layer, x, ids = MaskedLinear(5, 4), torch.randn(shape), torch.tensor([2, 0])
    weight, bias = torch.rand(3, 4, 5) < 0.5, torch.rand(3, 4) < 0.5
    layer.masks = LayerMasks(pack_bits(weight), pack_bits(bias), ids)
    y = layer(x)
    for group, task in enumerate(ids):
        expected = nn.functional.linear(
            x[group], layer.weight * weight[task], layer.bias * bias[task]
        )
        torch.testing.assert_close(y[group], expected)
    with pytest.raises(ValueError, match=r"x has shape \[5\] and its masks are for 2 groups"):
        layer(x.flatten()[:5])


def test_masks_move_with_their_layer() -> None:
    layer = MaskedLinear(5, 4)
    bits = pack_bits(torch.ones(1, 4, 5, dtype=torch.bool))
    out = torch.zeros(1, 4, 5), torch.zeros(1, 4)
    layer.masks = LayerMasks(bits, bits[..., 0], torch.zeros(1, dtype=torch.int64), out)
    moved = layer.to("meta", torch.float64).masks
    assert moved is not None and moved.group_gradients is not None
    tensors = (*moved.bits, *moved.group_gradients)
    assert [t.device.type for t in tensors] == ["meta"] * 5
    assert [t.dtype for t in tensors] == [torch.int32] * 2 + [torch.int64] + [torch.float64] * 2


@pytest.mark.parametrize("backend", [None, PYTORCH])
def test_with_every_weight_active_it_is_pytorchs_adamw(backend) -> None:
    """Under a scheduler, and after the state went through a state dict."""
    plain, model = network(), MaskedModel(network(), 2, 1.0, backend=backend)
    optimizers = [torch.optim.AdamW(plain.parameters(), **SETTINGS), MaskedAdamW(model, **SETTINGS)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in optimizers]
    ids = torch.tensor([1, 0])
    for step in range(6):
        x = torch.randn(2, 7, 5)
        for forward, optimizer, scheduler in zip(
            (plain, lambda x: model(x, ids)), optimizers, schedulers, strict=True
        ):
            forward(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if step == 2:
            kept = optimizers[1].state_dict()
            optimizers[1] = MaskedAdamW(model)
            optimizers[1].load_state_dict(kept)
            schedulers[1].optimizer = optimizers[1]
    for (name, parameter), other in zip(
        plain.named_parameters(), model.model.parameters(), strict=True
    ):
        torch.testing.assert_close(other, parameter, msg=name)


def test_only_weights_that_a_task_of_the_step_uses_move() -> None:
    model = MaskedModel(network(), 4, 0.3)
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    optimizer, ids = MaskedAdamW(model, **SETTINGS), torch.tensor([3, 1])
    model(torch.randn(2, 7, 5), ids[:2]).square().sum().backward()
    with torch.no_grad():
        model(torch.randn(1, 7, 5), torch.tensor([0]))  # an evaluation does not count
    optimizer.step()
    active = bools(model)
    for name, masks in active.items():
        moved = model.model.get_parameter(name) != before[name]
        assert torch.equal(moved, masks[ids].any(0)), name
    assert len(model.tasks_of_step) == 0


def test_an_update_selects_by_each_tasks_gradients() -> None:
    model, x = MaskedModel(network(), 3, 0.4, seed=1), torch.randn(3, 7, 5)
    reference = MaskedModel(network(), 3, 0.4, seed=1, backend=PYTORCH)
    before = bools(model)
    share = {name: mask.flatten(1).sum(1) for name, mask in before.items()}
    assert share["0.weight"].tolist() == [80] * 3 and share["3.bias"].tolist() == [3] * 3
    gradients = []
    for task in range(3):
        weights = {name: p.detach().clone() for name, p in model.model.named_parameters()}
        leaves = {name: w.requires_grad_() for name, w in weights.items()}
        masked = {n: w * before[n][task] if n in before else w for n, w in leaves.items()}
        loss = torch.func.functional_call(network(), masked, (x[task],)).square().mean()
        gradients.append(torch.autograd.grad(loss, [leaves[name] for name in before]))
    losses, found = model._gradients(lambda ids: model.model(x).square().mean((1, 2)), model.bits)
    for task in range(3):
        for (name, slot), wanted in zip(
            ((n, model.vector.slots[n]) for n in before), gradients[task], strict=True
        ):
            torch.testing.assert_close(slot.of_groups(found)[task], wanted, msg=name)
    for either in (model, reference):
        selection = either.update(lambda ids, m=either: m.model(x).square().mean((1, 2)), count=9)
        assert selection.moved.tolist() == [9] * 3
    assert torch.equal(model.bits, reference.bits) and losses.shape == (3,)
    total = sum(mask.flatten(1).sum(1) for mask in before.values())
    after = sum(mask.flatten(1).sum(1) for mask in bools(model).values())
    assert torch.equal(total, after)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_masked_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear"):
        MaskedModel(nn.LayerNorm(4), 2, 0.5)
    with pytest.raises(ValueError, match=r"density is 0: it must be above 0"):
        MaskedModel(network(), 2, 0)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="two linear layers share a weight"):
        MaskedModel(tied, 2, 0.5)
    model = MaskedModel(network(), 2, 0.5)
    model.to("cpu")
    with pytest.raises(ValueError, match="move the model first"):
        model.double()
    bits = model.bits.clone()
    with pytest.raises(ValueError, match=r"the losses have shape \[\]: give one for each of 2"):
        model.update(lambda ids: model.model(torch.ones(2, 1, 5)).sum(), count=1)
    with pytest.raises(NotFinite, match="task 0: its masked gradient"):
        model.update(lambda ids: torch.nan * model.model(torch.ones(2, 1, 5)).sum((1, 2)), count=1)
    assert torch.equal(model.bits, bits)
    for setting in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"max_norm": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} (is|are) "):
            MaskedAdamW(model, **setting)
