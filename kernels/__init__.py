"""The operations of HarmoDT on bit-packed masks.

Installed as the package `harmodt_kernels`. Each operation has a folder: `reference.py` is its
definition in plain PyTorch, `pytorch.py` a quicker way in PyTorch where there is one,
`operation.py` the fused operation as PyTorch sees it, `triton.py` its kernels for GPUs, `cpu.py`
its way to the C++ loops beside it, and `module.py` the layer. A `Backend` holds all operations of
one implementation; the functions named here are the fused ones.
"""

from .backend import PYTORCH, REFERENCE, Backend, fused_backend
from .bits import count_bits, pack_bits, unpack_bits, words_for
from .harmony_selection import (
    NotFinite,
    Selection,
    UpdateRefused,
    move_weights,
    select_harmony,
)
from .masked_adamw import masked_adamw, rates_of_step
from .masked_layer_norm import MaskedLayerNorm
from .masked_linear import MaskedLinear, masked_linear
from .masks import NO_MASKS, LayerMasks
from .native.recording import CannotRecord, Recording, RecordingMemory
from .registration import BackendUnavailable

__all__ = [
    "NO_MASKS",
    "PYTORCH",
    "REFERENCE",
    "Backend",
    "BackendUnavailable",
    "CannotRecord",
    "LayerMasks",
    "MaskedLayerNorm",
    "MaskedLinear",
    "NotFinite",
    "Recording",
    "RecordingMemory",
    "Selection",
    "UpdateRefused",
    "count_bits",
    "fused_backend",
    "masked_adamw",
    "masked_linear",
    "move_weights",
    "pack_bits",
    "rates_of_step",
    "select_harmony",
    "unpack_bits",
    "words_for",
]
