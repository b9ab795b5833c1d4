"""The experts of the walkers: one network per family, for all goals of the family.

`train_expert.py` trained them. Here they act, and need only NumPy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load

from ...errors import UserError
from ...files import read_bytes

WEIGHTS = Path(__file__).parent / "weights"
"""The folder of the files FAMILY.safetensors: weight and bias of every layer, float32, in order."""


@dataclass(frozen=True)
class Expert:
    """A perceptron with ReLU between its layers and tanh after the last layer."""

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Actions, float32 [..., A], for features [..., F]."""
        x = np.asarray(features, np.float32)
        for weight, bias in self.layers[:-1]:
            x = np.maximum(x @ weight.T + bias, 0)
        weight, bias = self.layers[-1]
        return np.tanh(x @ weight.T + bias)

    @classmethod
    def read(cls, content: bytes) -> Expert:
        """Read an expert from the bytes of a safetensors file."""
        arrays = load(content)
        numbers = range(len(arrays) // 2)
        return cls(tuple((arrays[f"{i}.weight"], arrays[f"{i}.bias"]) for i in numbers))


@functools.lru_cache(maxsize=8)
def load_expert(family: str) -> Expert:
    """Return the expert of a family.

    Raises:
        UserError: the family has no expert yet.
    """
    path = WEIGHTS / f"{family}.safetensors"
    if not path.is_file():
        raise UserError(
            f"{family} has no expert: train one with `python -m "
            f"harmodt.environments.locomotion.train_expert {family}`"
        )
    return Expert.read(read_bytes(path))
