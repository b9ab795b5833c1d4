"""Which implementation of the operations a program uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import attention
from .attention import reference as attention_reference
from .dropout_add import dropout_add
from .dropout_add import reference as dropout_reference
from .harmony_selection import Selection
from .harmony_selection import operation as harmony_operation
from .harmony_selection import reference as harmony_reference
from .masked_adamw import operation as adamw_operation
from .masked_adamw import reference as adamw_reference
from .masked_layer_norm import masked_layer_norm
from .masked_layer_norm import reference as norm_reference
from .masked_linear import operation as linear_operation
from .masked_linear import reference as linear_reference
from .native import library
from .registration import check_available, interpreted


@dataclass(frozen=True)
class Backend:
    """The operations of one implementation; all have the signatures of the reference.

    Attributes:
        name: "reference"; "triton"; "triton-interpreter" for the Triton kernels on a CPU; or "cpu-"
            and the instruction set of the CPU kernels.
        masked_layer_norm, dropout_add, attention: on a GPU those of the reference.
    """

    name: str
    masked_linear: Callable[..., Tensor]
    select_harmony: Callable[..., Selection]
    move_weights: Callable[[Tensor, Selection], None]
    masked_adamw: Callable[..., Tensor]
    masked_layer_norm: Callable[..., Tensor] = norm_reference.masked_layer_norm
    dropout_add: Callable[[Tensor, Tensor, float], Tensor] = dropout_reference.dropout_add
    attention: Callable[..., Tensor] = attention_reference.attention


REFERENCE = Backend(
    "reference",
    linear_reference.masked_linear,
    harmony_reference.select_harmony,
    harmony_reference.move_weights,
    adamw_reference.masked_adamw,
)
"""The definitions in plain PyTorch."""


def fused_backend(device: torch.device | str) -> Backend:
    """The fused kernels for a device.

    Raises:
        BackendUnavailable: there are none; the message says why and what to do.
    """
    device = torch.device(device)
    check_available(device)
    native = device.type == "cpu" and not interpreted()
    return Backend(
        _name(device),
        linear_operation.masked_linear,
        harmony_operation.select_harmony,
        harmony_operation.move_weights,
        adamw_operation.masked_adamw,
        masked_layer_norm if native else norm_reference.masked_layer_norm,
        dropout_add if native else dropout_reference.dropout_add,
        attention if native else attention_reference.attention,
    )


def _name(device: torch.device) -> str:
    if device.type != "cpu":
        return "triton"
    return "triton-interpreter" if interpreted() else f"cpu-{library.isa()}"
