"""The masked linear layer as a module."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..bits import pack_bits
from .operation import masked_linear

if TYPE_CHECKING:
    from ..backend import Backend


class MaskedLinear(nn.Module):
    """Linear layer with one binary mask per task over its weights and biases.

    The rows of a batch come in groups of one task each, and a weight that is inactive in a task
    counts as zero there and gets no gradient from it. All weights are active at first. Parameters
    are initialised as those of `torch.nn.Linear`.

    Args:
        in_features, out_features: sizes K and N.
        tasks: number of masks T.
        bias: whether there is a bias, which is masked too.
        backend: `REFERENCE` for plain PyTorch, or None for the fused kernels of the device that
            the input is on.
        device, dtype: of the parameters.

    Attributes:
        weight: parameter [N, K].
        bias: parameter [N], or None.
        weight_bits: int32 buffer [T, N, ceil(K / 32)].
        bias_bits: int32 buffer [T, ceil(N / 32)], or None.
    """

    bias: nn.Parameter | None
    weight_bits: Tensor
    bias_bits: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tasks: int,
        *,
        bias: bool = True,
        backend: Backend | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.tasks = in_features, out_features, tasks
        self.backend = backend
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype)
        )
        ones = torch.ones(out_features, in_features, dtype=torch.bool, device=device)
        self.register_buffer("weight_bits", pack_bits(ones).repeat(tasks, 1, 1))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
            self.register_buffer("bias_bits", pack_bits(ones[:, 0]).repeat(tasks, 1))
        else:
            self.register_parameter("bias", None)
            self.register_buffer("bias_bits", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as `torch.nn.Linear` does; the masks stay."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = self.in_features**-0.5 if self.in_features else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    def set_mask(self, task: int, weight_mask: Tensor, bias_mask: Tensor | None = None) -> None:
        """Replace a task's mask.

        Args:
            task: its index.
            weight_mask: bool [N, K], true where the weight is active.
            bias_mask: bool [N]; None leaves the mask of the bias as it is.

        Raises:
            IndexError: there is no such task.
            ValueError: a mask has another shape or type, or there is no bias to mask.
        """
        if not 0 <= task < self.tasks:
            raise IndexError(f"task {task} of a layer with {self.tasks} tasks")
        _check_mask("weight_mask", weight_mask, self.weight)
        if bias_mask is not None:
            if self.bias is None or self.bias_bits is None:
                raise ValueError("bias_mask was given to a layer without a bias")
            _check_mask("bias_mask", bias_mask, self.bias)
            self.bias_bits[task].copy_(pack_bits(bias_mask))
        self.weight_bits[task].copy_(pack_bits(weight_mask))

    def forward(self, x: Tensor, task_ids: Tensor) -> Tensor:
        """Apply the layer under the mask of each group's task.

        Args:
            x: [G, R, K].
            task_ids: int64 [G], below T; ids may repeat.

        Returns:
            [G, R, N].

        Raises:
            BackendUnavailable: there are no fused kernels for the device.
        """
        apply = masked_linear if self.backend is None else self.backend.masked_linear
        return apply(x, self.weight, self.bias, self.weight_bits, self.bias_bits, task_ids)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"tasks={self.tasks}, bias={self.bias is not None}"
        )


def _check_mask(name: str, mask: Tensor, parameter: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise ValueError(
            f"{name} is {mask.dtype} {list(mask.shape)}: it must be bool {list(parameter.shape)}"
        )
