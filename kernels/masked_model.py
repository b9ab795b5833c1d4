"""A mask for every task over the linear layers of any model, and how the masks are learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .backend import PYTORCH, Backend, fused_backend
from .bits import BITS_PER_WORD, pack_bits
from .harmony_selection import HarmonyRule, Importance, Selection
from .masked_linear import MaskedLinear
from .masks import LayerMasks
from .registration import BackendUnavailable
from .vector import ParameterVector

Losses = Callable[[Tensor], Tensor]


class MaskedModel(nn.Module):
    """A model whose `nn.Linear` layers have a binary mask for each task (HarmoDT).

    It replaces the linear layers of `model` by `MaskedLinear`, with the same parameters, and makes
    all parameters of the model views of one vector. Every bias is active, and the same share of
    each weight matrix is drawn. `docs/kernels.md` has an example.

    Create it after the model is on its device, and before the optimiser (`MaskedAdamW`).

    Args:
        model: any module on one device, in float32, that is called with x of shape [G, ..., K] and
            whose linear layers get the groups in the first dimension.
        tasks: T.
        density: the share of active weights, in (0, 1].
        seed: the seed of the masks.
        backend: the implementation of the operations. None selects the fused kernels, or `PYTORCH`
            where the device has none.

    Attributes:
        model: the model.
        vector: its parameters. Masks cover the first P_m elements.
        bits: int32 [T, P_m / 32], the masks.
        tasks_of_step: int64, the tasks of all calls with gradients since the optimiser's last step.

    Raises:
        ValueError: the model has no linear layer, two of them share a weight, or the density is out
            of range.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: int,
        density: float,
        *,
        seed: int = 0,
        backend: Backend | None = None,
    ):
        super().__init__()
        if not 0 < density <= 1:
            raise ValueError(f"density is {density}: it must be above 0 and at most 1")
        device = next(model.parameters()).device
        self.backend = backend or _best_backend(device)
        self.model = _with_masked_layers(model, self.backend)
        self.vector = ParameterVector(self.model, device)
        weights = [layer.weight for layer in self.vector.layers]
        if not weights:
            raise ValueError("the model has no torch.nn.Linear: there is nothing to mask")
        if len(set(map(id, weights))) < len(weights):
            raise ValueError("two linear layers share a weight: their gradients would mix")
        self._forget_gradients()
        bits = _drawn(self.vector, tasks, density, seed)
        self.register_buffer("bits", bits.to(device))
        self.bits: Tensor
        self.tasks_of_step = torch.zeros(0, dtype=torch.int64, device=device)

    def forward(self, x: Tensor, task_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the model under the masks of the groups' tasks.

        Args:
            x: [G, ..., K].
            task_ids: int64 [G], the task of each group.
            args, kwargs: passed on to the model.
        """
        self._set_masks(self.bits, task_ids, None)
        if torch.is_grad_enabled():
            self.tasks_of_step = torch.cat([self.tasks_of_step, task_ids])
        return self.model(x, *args, **kwargs)

    def update(
        self,
        losses_of: Losses,
        *,
        count: int,
        balance: float = 10.0,
        importance: Importance = "fisher",
        rule: HarmonyRule = "paper",
    ) -> Selection:
        """Move `count` weights of every task's mask (Algorithm 2 of the HarmoDT paper).

        Memory: two gradients per task. The parameters' own gradients are None afterwards.

        Args:
            losses_of: calls the model under `self.model` with one group for each of the given
                tasks, int64 [T], and returns the losses [T].
            count, balance, importance, rule: as in `select_harmony`.

        Returns:
            The selection, which has been applied to `bits`.

        Raises:
            UpdateRefused: a loss or a gradient is not finite. No mask was changed.
            ValueError: `losses_of` does not return one loss for each task.
        """
        losses, masked = self._gradients(losses_of, self.bits)
        _, dense = self._gradients(losses_of, None)
        size = self.vector.maskable_size
        selection = self.backend.select_harmony(
            self.bits,
            self.vector.valid_bits()[: size // BITS_PER_WORD],
            self.vector.weights[:size],
            masked,
            dense,
            masked.mean(0),
            losses,
            count=count,
            balance=balance,
            importance=importance,
            rule=rule,
        )
        self.backend.move_weights(self.bits, selection)
        self._set_masks(self.bits, self.tasks_of_step, None)  # let go of the buffers
        return selection

    def gradient(self) -> Tensor:
        """The gradients of all parameters as one vector [P], 0 for a parameter without one."""
        for name, parameter in self.model.named_parameters():
            gradient = self.vector.slots[name].view(self.vector.gradient)
            if parameter.grad is None:
                gradient.zero_()
            else:
                gradient.copy_(parameter.grad)
        return self.vector.gradient

    def _gradients(self, losses_of: Losses, bits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each task's loss, [T], and its gradient with respect to the maskable weights, [T, P_m].

        Args:
            bits: the masks; None for the gradients of the dense model.
        """
        tasks, weights = len(self.bits), self.vector.weights
        out = weights.new_zeros(tasks, self.vector.maskable_size)
        ids = torch.arange(tasks, device=weights.device)
        self._set_masks(bits, ids, out)
        losses = losses_of(ids)
        if losses.shape != (tasks,):
            raise ValueError(
                f"the losses have shape {list(losses.shape)}: give one for each of {tasks} tasks"
            )
        losses.sum().backward()
        self._forget_gradients()
        return losses.detach(), out

    def _forget_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedModel:
        """Refuse to move the parameters, which would no longer be views of one vector."""
        weights = self.vector.weights
        if fn(weights).data_ptr() != weights.data_ptr():
            raise ValueError("move the model first (.to), and make its MaskedModel then")
        return self

    def _set_masks(self, bits: Tensor | None, task_ids: Tensor, out: Tensor | None) -> None:
        """Give every masked layer its bits and its views of the buffer for gradients."""
        for layer, (weight, bias) in self.vector.layers.items():
            assert isinstance(layer, MaskedLinear)
            weight_bits = bias_bits = buffers = None
            if bits is not None:
                weight_bits = weight.bits(bits)
                bias_bits = None if bias is None else bias.bits(bits)
            if out is not None:
                buffers = weight.of_groups(out), None if bias is None else bias.of_groups(out)
            layer.masks = LayerMasks(weight_bits, bias_bits, task_ids, buffers)


def _best_backend(device: torch.device) -> Backend:
    try:
        return fused_backend(device)
    except BackendUnavailable:
        return PYTORCH


def _with_masked_layers(model: nn.Module, backend: Backend) -> nn.Module:
    """The model with a `MaskedLinear` in place of every `nn.Linear`; parameters stay the same."""
    if type(model) is nn.Linear:
        layer = MaskedLinear(
            model.in_features, model.out_features, bias=False, backend=backend, device="meta"
        )
        layer.weight, layer.bias = model.weight, model.bias
        return layer.train(model.training)
    for name, child in model.named_children():
        setattr(model, name, _with_masked_layers(child, backend))
    return model


def _drawn(vector: ParameterVector, tasks: int, density: float, seed: int) -> Tensor:
    """Random masks of every task, int32 [T, P_m / 32] on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.zeros(tasks, vector.maskable_size, dtype=torch.bool)
    for weight, bias in vector.layers.values():
        if bias is not None:
            bias.of_groups(active).fill_(True)
        size = weight.rows * weight.columns
        order = torch.rand(tasks, size, generator=generator).argsort(1)
        drawn = order < round(density * size)
        weight.of_groups(active).copy_(drawn.view(tasks, *weight.shape))
    return pack_bits(active)
