"""The first masks: how many weights of each tensor are active, and which ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harmodt_kernels import pack_bits
from harmodt_kernels.vector import ParameterVector, Slot

from ..config import MaskInitialisation
from ..errors import UserError


def first_masks(
    vector: ParameterVector,
    sparsities: Sequence[float],
    seed: int,
    initialisation: MaskInitialisation = "erk",
    shared: bool = False,
) -> Tensor:
    """The first masks of all tasks, int32 [T, P_m / 32] on the CPU.

    The number of active weights depends on the sparsity, but not on the initialisation.

    Args:
        vector: the model's parameters. "magnitude" reads their values; the other initialisations
            read only their shapes.
        sparsities: S of each task, the share of inactive weights, in [0, 1).
        seed: seed of the masks; a task's mask also depends on the task's index.
        initialisation: erk: masks are drawn at the ERK densities (Appendix C of the paper).
            uniform: all vectors (biases and LayerNorms) are active, and the same share of each
            matrix is drawn. RigL (arXiv 1911.11134) also keeps vectors active, and for most
            sparsities ERK does so too. magnitude: all vectors are active, and the weights with the
            largest |θ| among all matrices; of equal weights, the first ones. Tasks of equal
            sparsity have the same mask.
        shared: whether all tasks get the mask of the first task.

    Raises:
        UserError: a sparsity is outside [0, 1), or the vectors have more weights than may be
            active.
    """
    counted = erk_counts if initialisation == "erk" else uniform_counts
    counts = [counted(vector.maskable_slots, sparsity) for sparsity in sparsities]
    if initialisation == "magnitude":
        return _largest(vector, [sum(of_task) for of_task in counts])
    return torch.stack(
        [draw_mask(vector, c, seed, 0 if shared else task) for task, c in enumerate(counts)]
    )


def erk_counts(slots: Sequence[Slot], sparsity: float) -> list[int]:
    """The rounded number of active weights of each tensor at the ERK densities.

    Raises:
        UserError: the sparsity is outside [0, 1).
    """
    densities = erk_densities([(slot.rows, slot.columns) for slot in slots], sparsity)
    return [
        round(density * (slot.rows * slot.columns))
        for slot, density in zip(slots, densities, strict=True)
    ]


def erk_densities(shapes: Sequence[tuple[int, int]], sparsity: float) -> list[float]:
    """Erdős–Rényi-Kernel densities whose overall density is 1 − sparsity (Appendix C).

    A tensor of shape (rows, columns) gets the density ε (rows + columns) / (rows columns). A vector
    of n elements gets ε n / n = ε. Tensors whose density would be above 1 become dense, and ε is
    computed again for the other tensors.

    Raises:
        UserError: the sparsity is outside [0, 1).
    """
    if not 0.0 <= sparsity < 1.0:
        raise UserError(f"sparsity is {sparsity}: give the share of inactive weights, in [0, 1)")
    sizes = [rows * columns for rows, columns in shapes]
    scores = [(rows + columns) / (rows * columns) if rows > 1 else 1.0 for rows, columns in shapes]
    dense: set[int] = set()
    while True:
        wanted = (1.0 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        rest = [i for i in range(len(sizes)) if i not in dense]
        epsilon = wanted / sum(scores[i] * sizes[i] for i in rest) if rest else 0.0
        passing = {i for i in rest if epsilon * scores[i] > 1.0}
        if not passing:
            return [1.0 if i in dense else epsilon * scores[i] for i in range(len(sizes))]
        dense |= passing


def uniform_counts(slots: Sequence[Slot], sparsity: float) -> list[int]:
    """The number of active weights of each tensor: all of a vector, the same share of each matrix.

    The total is that of ERK. The number for each matrix is rounded down. The matrices with the
    largest remainders (of equal remainders, the first ones) then get one more weight each.

    Raises:
        UserError: the sparsity is outside [0, 1), or the vectors have more weights than may be
            active.
    """
    counts = [slot.rows * slot.columns for slot in slots]
    matrices = [i for i, slot in enumerate(slots) if len(slot.shape) == 2]
    whole = sum(counts[i] for i in matrices)
    kept = sum(erk_counts(slots, sparsity)) - (sum(counts) - whole)
    if kept < 0:
        raise UserError(
            f"sparsity is {sparsity}, but uniform and magnitude masks keep all biases and "
            f"LayerNorms, which are {1 - whole / sum(counts):.1%} of the maskable weights: lower "
            "the sparsity, or use --mask-initialisation erk"
        )
    remainders = {i: counts[i] * kept % whole for i in matrices}
    for i in matrices:
        counts[i] = counts[i] * kept // whole
    left = kept - sum(counts[i] for i in matrices)
    for i in sorted(matrices, key=lambda i: -remainders[i])[:left]:
        counts[i] += 1
    return counts


def draw_mask(vector: ParameterVector, counts: Sequence[int], *seed: int) -> Tensor:
    """Draw a random mask, int32 [P_m / 32] on the CPU.

    Args:
        counts: number of active weights in each of the vector's `maskable_slots`.
        seed: one or several numbers.
    """
    mask = torch.zeros(vector.maskable_size, dtype=torch.bool)
    for slot, count in zip(vector.maskable_slots, counts, strict=True):
        size = slot.rows * slot.columns
        generator = torch.Generator().manual_seed(_mix(*seed, slot.offset))
        chosen = torch.zeros(size, dtype=torch.bool)
        chosen[torch.randperm(size, generator=generator)[:count]] = True
        slot.view(mask).copy_(chosen.view(slot.shape))
    return pack_bits(mask)


def sparsities_by_loss(losses: Tensor, low: float, high: float) -> list[float]:
    """S of each task by the rank of its loss: `low` for the highest loss, `high` for the lowest.

    The other sparsities are evenly spaced, so the mean sparsity is the mean of `low` and `high`. Of
    equal losses, the first one counts as the lowest. A single task gets the mean. This rule is not
    in the paper, which only says that one sparsity for all tasks is a limitation.

    Args:
        losses: [T].
        low, high: the lowest and the highest sparsity.
    """
    # The second argsort turns the order of the losses into their ranks.
    ranks = losses.argsort(stable=True).argsort().tolist()
    last = len(ranks) - 1
    return [high - (high - low) * (rank / last if last else 0.5) for rank in ranks]


def _largest(vector: ParameterVector, counts: Sequence[int]) -> Tensor:
    """Masks with all vectors and the weights with the largest |θ|, int32 [T, P_m / 32].

    Args:
        counts: number of active weights of each mask.
    """
    magnitudes = vector.weights[: vector.maskable_size].abs().cpu()
    places = torch.arange(vector.maskable_size)
    for slot in vector.maskable_slots:
        if len(slot.shape) == 1:
            slot.view(magnitudes).fill_(torch.inf)  # so that the order begins with all vectors
    elements = torch.cat([slot.view(places).flatten() for slot in vector.maskable_slots])
    order = elements[magnitudes[elements].sort(descending=True, stable=True).indices]
    masks = torch.empty(len(counts), vector.maskable_size // 32, dtype=torch.int32)
    for row, count in zip(masks, counts, strict=True):
        chosen = torch.zeros(vector.maskable_size, dtype=torch.bool)
        chosen[order[:count]] = True
        row.copy_(pack_bits(chosen))
    return masks


def _mix(*numbers: int) -> int:
    """Combine several numbers into one seed."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63)
    return seed
