"""The operations of HarmoDT on bit-packed masks.

This folder is installed as the package `harmodt_kernels`. Each operation has a folder:

- `reference.py` defines the operation in plain PyTorch.
- `pytorch.py`, where it exists, computes it faster in plain PyTorch.
- `operation.py` checks the operands and registers the fused operation with PyTorch.
- `triton.py` holds the kernels for GPUs.
- `cpu.py` calls the C++ code beside it.
- `module.py`, where it exists, is the layer (`torch.nn.Module`).

A `Backend` holds all operations of one implementation. The operations that this module exports are
the fused ones.
"""

from importlib.metadata import version

from .backend import PYTORCH, REFERENCE, Backend, fused_backend
from .bits import count_bits, pack_bits, unpack_bits, words_for
from .harmony_selection import (
    NotFinite,
    Selection,
    UpdateRefused,
    move_weights,
    select_harmony,
)
from .masked_adamw import MaskedAdamW, lr_and_corrections_at, masked_adamw
from .masked_layer_norm import MaskedLayerNorm
from .masked_linear import MaskedLinear, masked_linear
from .masked_model import MaskedModel
from .masks import NO_MASKS, LayerMasks
from .native.recording import CannotRecord, Recording, RecordingMemory
from .registration import BackendUnavailable
from .vector import ParameterVector

__version__ = version("harmodt")
"""The version of the distribution `harmodt`, to which this package belongs."""

__all__ = [
    "NO_MASKS",
    "PYTORCH",
    "REFERENCE",
    "Backend",
    "BackendUnavailable",
    "CannotRecord",
    "LayerMasks",
    "MaskedAdamW",
    "MaskedLayerNorm",
    "MaskedLinear",
    "MaskedModel",
    "NotFinite",
    "ParameterVector",
    "Recording",
    "RecordingMemory",
    "Selection",
    "UpdateRefused",
    "count_bits",
    "fused_backend",
    "lr_and_corrections_at",
    "masked_adamw",
    "masked_linear",
    "move_weights",
    "pack_bits",
    "select_harmony",
    "unpack_bits",
    "words_for",
]
