"""PyTorch devices that a person names."""

from __future__ import annotations

import torch

from .errors import UserError


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UserError: it is no device's name, or this machine has no such device.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(
            f"device {name!r} is not there: this machine has {', '.join(there)}"
        ) from None
    return device
