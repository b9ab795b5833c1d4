"""Binary masks, packed into 32-bit words: one bit per weight, least significant bit first.

A mask over K weights takes ceil(K / 32) int32 words. The bits beyond K are padding and stay 0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BITS_PER_WORD = 32


def words_for(size: int) -> int:
    """Number of 32-bit words that hold `size` bits."""
    return -(-size // BITS_PER_WORD)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask along its last dimension.

    Args:
        mask: bool [..., K].

    Returns:
        int32 [..., ceil(K / 32)]; bit j of word w is mask[..., 32 w + j], padding bits are 0.
    """
    padding = words_for(mask.shape[-1]) * BITS_PER_WORD - mask.shape[-1]
    padded = torch.nn.functional.pad(mask, (0, padding))
    bits = padded.unflatten(-1, (-1, BITS_PER_WORD)).to(torch.int64)
    words = (bits << torch.arange(BITS_PER_WORD, device=mask.device)).sum(-1)
    return words.to(torch.int32)


def unpack_bits(words: Tensor, size: int) -> Tensor:
    """Unpack the first `size` bits of the last dimension: int32 [..., W] to bool [..., size]."""
    return _unpack(words, size, torch.uint8, 1).view(torch.bool)


def all_ones(words: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Unpack each bit to an integer whose bits are all 1 or all 0, [..., size].

    A bitwise AND of this integer with a floating-point number of the same width keeps the number
    or makes it 0, also if the number is NaN or infinite.

    Args:
        words: int32 [..., W].
        dtype: the integer type.
    """
    return _unpack(words, size, dtype, -1)


def _unpack(words: Tensor, size: int, dtype: torch.dtype, one: int) -> Tensor:
    """The first `size` bits of the last dimension, each as 0 or `one`."""
    if words.device.type != "cpu":
        shifts = torch.arange(BITS_PER_WORD, dtype=torch.int32, device=words.device)
        bits = ((words[..., None] >> shifts) & 1).mul_(one).to(dtype)
        return bits.flatten(-2)[..., :size]
    # On a CPU, it is faster to look up the 8 bits of each byte in a table.
    table = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).mul_(one).to(dtype)
    as_bytes = words.contiguous().view(torch.uint8)
    bits = table.index_select(0, as_bytes.flatten().int())
    return bits.view(*words.shape[:-1], words.shape[-1] * BITS_PER_WORD)[..., :size]


def count_bits(words: Tensor) -> Tensor:
    """Number of set bits along the last dimension: int32 [..., W] to int64 [...]."""
    counts = np.bitwise_count(words.cpu().numpy().view(np.uint32)).sum(-1, dtype=np.int64)
    return torch.as_tensor(counts)
