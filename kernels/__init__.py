"""The operations of HarmoDT on bit-packed masks.

Installed as the package `harmodt_kernels`. Each operation has a folder, in which `reference.py` is
its definition in plain PyTorch.
"""

from .bits import count_bits, pack_bits, unpack_bits, words_for
from .harmony_selection import select_harmony
from .masked_adamw import clip_gradient, masked_adamw
from .masked_linear import masked_linear

__all__ = [
    "clip_gradient",
    "count_bits",
    "masked_adamw",
    "masked_linear",
    "pack_bits",
    "select_harmony",
    "unpack_bits",
    "words_for",
]
