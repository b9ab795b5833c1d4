"""Process-wide settings without which PyTorch is several times slower on a CPU."""

from __future__ import annotations

import ctypes

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)


def prepare_cpu() -> None:
    """Set up this process for training or acting on a CPU; call it before any computation.

    Denormal numbers are flushed to zero: a softmax with widely spread scores is full of them, and
    products with them take ten times as long. Freed memory is kept: a tensor of a few MB would
    otherwise be a fresh mapping each time, whose page faults cost more than computing it.
    """
    torch.set_flush_denormal(True)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc: there is no such switch
    mallopt(_MMAP_THRESHOLD, 1 << 30)
    mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
