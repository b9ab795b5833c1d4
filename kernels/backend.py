"""Selects an implementation of the operations and the precision of its matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .attention import operation as attention_operation
from .attention import pytorch as attention_pytorch
from .attention import reference as attention_reference
from .dropout_add import operation as dropout_operation
from .dropout_add import pytorch as dropout_pytorch
from .dropout_add import reference as dropout_reference
from .harmony_selection import Selection
from .harmony_selection import operation as harmony_operation
from .harmony_selection import reference as harmony_reference
from .launch import float32_in_three_products
from .linear_residual import operation as residual_operation
from .linear_residual import pytorch as residual_pytorch
from .linear_residual import reference as residual_reference
from .masked_adamw import operation as adamw_operation
from .masked_adamw import reference as adamw_reference
from .masked_layer_norm import operation as norm_operation
from .masked_layer_norm import pytorch as norm_pytorch
from .masked_layer_norm import reference as norm_reference
from .masked_linear import operation as linear_operation
from .masked_linear import pytorch as linear_pytorch
from .masked_linear import reference as linear_reference
from .native import library
from .norm_linear import operation as norm_linear_operation
from .norm_linear import pytorch as norm_linear_pytorch
from .norm_linear import reference as norm_linear_reference
from .registration import check_available, kernels_for
from .token_embedding import operation as embedding_operation
from .token_embedding import reference as embedding_reference

Precision = Literal["fp32", "tf32x3", "tf32", "bf16"]

# The names that `torch.set_float32_matmul_precision` gives to the settings of `fp32_precision`.
_OLDER_NAMES = {"ieee": "highest", "tf32": "high", "bf16": "medium"}


@dataclass(frozen=True)
class Backend:
    """The operations of one implementation. Each has the signature of its `reference.py`.

    Attributes:
        name: "reference"; "pytorch"; "triton"; "triton-interpreter" for the Triton kernels on a
            CPU; or "cpu-" and the instruction set of the CPU kernels.
        implementations: the name of the implementation of each operation.
        rounds_inside: whether the kernels round the operands of products to bf16 themselves when
            PyTorch's switch for CPUs asks for bf16. Then no tensor has to be converted.
    """

    name: str
    masked_linear: Callable[..., Tensor]
    linear_residual: Callable[..., Tensor]
    masked_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    norm_linear: Callable[..., tuple[Tensor, Tensor]]
    attention: Callable[..., Tensor]
    dropout_add: Callable[..., Tensor]
    token_embedding: Callable[..., Tensor]
    select_harmony: Callable[..., Selection]
    move_weights: Callable[[Tensor, Selection], None]
    masked_adamw: Callable[..., Tensor]
    implementations: Mapping[str, str] = field(hash=False)
    rounds_inside: bool

    def precision(
        self, name: Precision, device: torch.device | str
    ) -> contextlib.AbstractContextManager[None]:
        """A context that sets the precision of matrix products, in backward passes too.

        On exit it restores the previous precision.

        The error of a product of two float32 numbers, relative to the product, is at most 2⁻²⁴ in
        "fp32", 2⁻¹⁹ in "tf32x3" and 2⁻⁹ in "tf32". All three add the products in float32.

        Args:
            name: "fp32"; "tf32x3" or "tf32", which only GPUs have; or "bf16". "fp32" uses no matrix
                units on NVIDIA's GPUs. "tf32x3" does: Triton's kernels split each operand into two
                TF32 numbers and add three of the four products of these. PyTorch's own products
                stay in float32 then. On AMD's GPUs, whose matrix units multiply float32, "tf32x3"
                is "fp32". For "bf16" the kernels round the operands themselves if the backend can
                (`rounds_inside`); otherwise PyTorch's autocast converts them.
            device: the device of the matrices.

        Raises:
            ValueError: the precision is unknown, or only GPUs have it and the device is none.
        """
        device = torch.device(device)
        if name not in get_args(Precision):
            raise ValueError(f"precision {name!r} is none of {', '.join(get_args(Precision))}")
        if name in ("tf32x3", "tf32") and device.type != "cuda":
            raise ValueError(f"{name} is a mode of GPUs: use fp32 or bf16 on a {device.type}")
        return self._computing(name, device)

    @contextlib.contextmanager
    def _computing(self, name: Precision, device: torch.device) -> Iterator[None]:
        by_switch = name == "tf32" or (name == "bf16" and self.rounds_inside)
        autocast = name == "bf16" and not self.rounds_inside
        in_three = name == "tf32x3" and torch.version.hip is None
        with (
            _float32_products(name if by_switch else "ieee"),
            float32_in_three_products(in_three),
            # Autocast's cache would keep the bf16 weights of the first step for all later steps.
            torch.autocast(device.type, torch.bfloat16, autocast, cache_enabled=False),
        ):
            yield


@contextlib.contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    """A context that sets PyTorch's switches for products of float32, the older one as well.

    If only the newer switches said "tf32" or "bf16", PyTorch would raise when it reads the older
    one. torch.compile reads it.
    """
    switches = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"  # now the older switch can be read
    older = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(_OLDER_NAMES[precision])  # it sets the newer ones too
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for switch, usual in zip(switches, before, strict=True):
            switch.fp32_precision = usual


class _Operation(NamedTuple):
    """An operation's definition, its fastest form in plain PyTorch, and its fused form."""

    reference: Callable[..., Any]
    pytorch: Callable[..., Any]
    fused: Callable[..., Any]


_OPERATIONS = {
    "masked_linear": _Operation(
        linear_reference.masked_linear,
        linear_pytorch.masked_linear,
        linear_operation.masked_linear,
    ),
    "linear_residual": _Operation(
        residual_reference.linear_residual,
        residual_pytorch.linear_residual,
        residual_operation.linear_residual,
    ),
    "masked_layer_norm": _Operation(
        norm_reference.masked_layer_norm,
        norm_pytorch.masked_layer_norm,
        norm_operation.masked_layer_norm,
    ),
    "norm_linear": _Operation(
        norm_linear_reference.norm_linear,
        norm_linear_pytorch.norm_linear,
        norm_linear_operation.norm_linear,
    ),
    "attention": _Operation(
        attention_reference.attention,
        attention_pytorch.attention,
        attention_operation.attention,
    ),
    "dropout_add": _Operation(
        dropout_reference.dropout_add,
        dropout_pytorch.dropout_add,
        dropout_operation.dropout_add,
    ),
    "token_embedding": _Operation(
        embedding_reference.token_embedding,
        embedding_reference.token_embedding,
        embedding_operation.token_embedding,
    ),
    "select_harmony": _Operation(
        harmony_reference.select_harmony,
        harmony_reference.select_harmony,
        harmony_operation.select_harmony,
    ),
    "move_weights": _Operation(
        harmony_reference.move_weights,
        harmony_reference.move_weights,
        harmony_operation.move_weights,
    ),
    "masked_adamw": _Operation(
        adamw_reference.masked_adamw,
        adamw_reference.masked_adamw,
        adamw_operation.masked_adamw,
    ),
}

REFERENCE = Backend(
    "reference",
    **{name: operation.reference for name, operation in _OPERATIONS.items()},
    implementations=dict.fromkeys(_OPERATIONS, "reference"),
    rounds_inside=False,
)
"""The definitions. Each is a few lines of PyTorch."""

PYTORCH = Backend(
    "pytorch",
    **{name: operation.pytorch for name, operation in _OPERATIONS.items()},
    implementations=dict.fromkeys(_OPERATIONS, "pytorch"),
    rounds_inside=False,
)
"""The fastest implementation in plain PyTorch. It runs on any device."""


def fused_backend(device: torch.device | str) -> Backend:
    """The fused kernels for a device.

    Raises:
        BackendUnavailable: the device has no fused kernels. The message says why and what to do.
    """
    device = torch.device(device)
    check_available(device)
    name = _name(device)
    return Backend(
        name,
        **{operation: functions.fused for operation, functions in _OPERATIONS.items()},
        implementations=dict.fromkeys(_OPERATIONS, name),
        rounds_inside=kernels_for(device) == "cpu",
    )


def _name(device: torch.device) -> str:
    if kernels_for(device) == "cpu":
        return f"cpu-{library.isa()}"
    return "triton-interpreter" if device.type == "cpu" else "triton"
