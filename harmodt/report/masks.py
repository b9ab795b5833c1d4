"""Computes from packed bits how similar the masks of a run's tasks are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from harmodt_kernels.vector import ParameterVector


@dataclass(frozen=True)
class Masks:
    """The masks of T tasks over the weights of L parameters.

    Attributes:
        tasks: the names of the tasks.
        parameters: the names of the parameters that masks cover.
        sizes: int64 [L], the number of weights of each parameter.
        active: int64 [T, L], the number of active weights of each task and parameter.
        shared: int64 [T, T], the number of weights that are active in both tasks.
    """

    tasks: tuple[str, ...]
    parameters: tuple[str, ...]
    sizes: np.ndarray
    active: np.ndarray
    shared: np.ndarray

    @classmethod
    def measure(cls, tasks: Sequence[str], vector: ParameterVector, bits: Tensor) -> Masks:
        """Measure masks without unpacking them.

        Args:
            tasks: the names of the tasks.
            vector: the layout of the parameters.
            bits: the packed masks, int32 [T, P_m / 32].
        """
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
        """Return the share of active weights in each task, float64 [T], by layer."""
        return {
            layer: self.active[:, own].sum(1) / self.sizes[own].sum()
            for layer, own in self._layers().items()
        }

    def layer_sizes(self) -> dict[str, int]:
        """Return the number of weights by layer."""
        return {layer: int(self.sizes[own].sum()) for layer, own in self._layers().items()}

    def _layers(self) -> dict[str, list[int]]:
        """Return the indices of the parameters by layer."""
        layers: dict[str, list[int]] = {}
        for index, name in enumerate(self.parameters):
            layers.setdefault(name.rpartition(".")[0], []).append(index)
        return layers

    @property
    def overlap(self) -> np.ndarray:
        """Jaccard's index of each pair of masks, float64 [T, T].

        It is the number of weights active in both masks over the number active in at least one.
        """
        counts = np.diag(self.shared)
        return self.shared / (counts[:, None] + counts - self.shared)

    @property
    def beyond_chance(self) -> np.ndarray:
        """The overlap beyond chance of each pair of masks, in standard deviations, float64 [T, T].

        Chance means that a mask's active weights are drawn at random within each parameter, as they
        are at the start of training. The number of shared weights is then hypergeometric. An entry
        is 0 where chance leaves only one possible number.
        """
        density = self.active / self.sizes
        spread = self.active * (1 - density)
        variance = (spread / np.maximum(self.sizes - 1, 1)) @ spread.T
        excess = self.shared - density @ self.active.T
        return np.divide(excess, np.sqrt(variance), where=variance > 0, out=0 * excess)

    def order(self) -> list[int]:
        """Return an order of the tasks in which tasks with similar masks are neighbours.

        The tasks are clustered by average linkage of 1 − overlap. Of the orders that the tree
        allows, this is the one with the smallest distances between neighbours.
        """
        if len(self.tasks) < 3:
            return list(range(len(self.tasks)))
        from scipy.cluster.hierarchy import leaves_list, linkage  # an optional dependency

        upper = np.triu_indices(len(self.tasks), 1)
        distances = (1 - self.overlap)[upper]
        return leaves_list(linkage(distances, "average", optimal_ordering=True)).tolist()

    def places(self) -> tuple[np.ndarray, float]:
        """Return positions of the masks in a plane, float64 [T, 2], and the explained variance.

        The explained variance is the share of the masks' variance that the plane shows. The
        positions come from classical scaling of the Hamming distances. This is the projection of
        the masks, as points of {0, 1}^P, onto their first two principal components.
        """
        centred = self.shared - self.shared.mean(0)
        gram = centred - centred.mean(1, keepdims=True)
        values, vectors = np.linalg.eigh(gram)
        values = values.clip(0)
        places = np.zeros((len(gram), 2))
        kept = min(2, len(gram))
        places[:, :kept] = (vectors * np.sqrt(values))[:, : -kept - 1 : -1]
        largest = places[np.abs(places).argmax(0), [0, 1]]
        places *= np.where(largest < 0, -1, 1)  # the sign of an axis is arbitrary; this fixes it
        return places, float(values[-kept:].sum() / max(values.sum(), 1e-300))


def count_shared(bits: np.ndarray) -> np.ndarray:
    """Count the bits that both rows of each pair have set, int64 [T, T].

    Args:
        bits: uint32 [T, W].
    """
    shared = np.zeros((len(bits), len(bits)), np.int64)
    for row, mask in enumerate(bits):
        counts = np.bitwise_count(bits[row:] & mask).sum(1, dtype=np.int64)
        shared[row, row:] = shared[row:, row] = counts
    return shared
