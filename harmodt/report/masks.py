"""How the masks of a run's tasks resemble each other, from their packed bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..masks.vector import ParameterVector


@dataclass(frozen=True)
class Masks:
    """The masks of T tasks over the weights of L parameters.

    Attributes:
        tasks: their names.
        parameters: names of the parameters that masks cover.
        sizes: int64 [L], weights of each parameter.
        active: int64 [T, L], active weights of each task and parameter.
        shared: int64 [T, T], weights that are active in both tasks.
    """

    tasks: tuple[str, ...]
    parameters: tuple[str, ...]
    sizes: np.ndarray
    active: np.ndarray
    shared: np.ndarray

    @classmethod
    def measure(cls, tasks: Sequence[str], vector: ParameterVector, bits: Tensor) -> Masks:
        """Measure masks, int32 [T, P_m / 32]; they are never unpacked."""
        maskable = vector.valid_bits()[None, : vector.maskable_size // 32]
        sizes, active = vector.count_by_parameter(maskable), vector.count_by_parameter(bits)
        return cls(
            tasks=tuple(tasks),
            parameters=tuple(sizes),
            sizes=np.array([int(size) for size in sizes.values()]),
            active=np.stack([count.numpy() for count in active.values()], 1),
            shared=count_shared(bits.cpu().numpy().view(np.uint32)),
        )

    def densities(self) -> dict[str, np.ndarray]:
        """Share of each layer's weights that is active in each task: float64 [T] by layer."""
        return {
            layer: self.active[:, own].sum(1) / self.sizes[own].sum()
            for layer, own in self._layers().items()
        }

    def layer_sizes(self) -> dict[str, int]:
        """Number of each layer's weights."""
        return {layer: int(self.sizes[own].sum()) for layer, own in self._layers().items()}

    def _layers(self) -> dict[str, list[int]]:
        """Each layer's parameters, by index."""
        layers: dict[str, list[int]] = {}
        for index, name in enumerate(self.parameters):
            layers.setdefault(name.rpartition(".")[0], []).append(index)
        return layers

    @property
    def overlap(self) -> np.ndarray:
        """Jaccard's index of each two masks, float64 [T, T]: shared weights among those of both."""
        counts = np.diag(self.shared)
        return self.shared / (counts[:, None] + counts - self.shared)

    @property
    def beyond_chance(self) -> np.ndarray:
        """How many standard deviations each two masks share more than by chance, float64 [T, T].

        By chance: a mask's active weights of a parameter are any of its weights, as those are that
        are drawn at the start. What two masks share is hypergeometric then; 0 where it is certain.
        """
        density = self.active / self.sizes
        spread = self.active * (1 - density)
        variance = (spread / np.maximum(self.sizes - 1, 1)) @ spread.T
        excess = self.shared - density @ self.active.T
        return np.divide(excess, np.sqrt(variance), where=variance > 0, out=0 * excess)

    def order(self) -> list[int]:
        """The tasks so that those whose masks overlap stand together.

        Average linkage of 1 − overlap; of the orders that its tree allows the one with the least
        distance between neighbours.
        """
        if len(self.tasks) < 3:
            return list(range(len(self.tasks)))
        from scipy.cluster.hierarchy import leaves_list, linkage  # an optional dependency

        upper = np.triu_indices(len(self.tasks), 1)
        distances = (1 - self.overlap)[upper]
        return leaves_list(linkage(distances, "average", optimal_ordering=True)).tolist()

    def places(self) -> tuple[np.ndarray, float]:
        """The masks in a plane, float64 [T, 2], and the share of their variance that it shows.

        Classical scaling of the Hamming distances, which is the projection of the masks as points
        of {0, 1}^P onto their first two principal components.
        """
        centred = self.shared - self.shared.mean(0)
        gram = centred - centred.mean(1, keepdims=True)
        values, vectors = np.linalg.eigh(gram)
        values = values.clip(0)
        places = np.zeros((len(gram), 2))
        kept = min(2, len(gram))
        places[:, :kept] = (vectors * np.sqrt(values))[:, : -kept - 1 : -1]
        largest = places[np.abs(places).argmax(0), [0, 1]]
        places *= np.where(largest < 0, -1, 1)  # an axis has no sense of its own
        return places, float(values[-kept:].sum() / max(values.sum(), 1e-300))


def count_shared(bits: np.ndarray) -> np.ndarray:
    """Bits that are set in both of each two rows, int64 [T, T]; bits: uint32 [T, W]."""
    shared = np.zeros((len(bits), len(bits)), np.int64)
    for row, mask in enumerate(bits):
        counts = np.bitwise_count(bits[row:] & mask).sum(1, dtype=np.int64)
        shared[row, row:] = shared[row:, row] = counts
    return shared
