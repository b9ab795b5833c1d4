"""Gradient surgery: ways to combine the per-task gradients of a step, other than their mean.

The methods are PCGrad (Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, arXiv
2001.06782), CAGrad (Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS
2021, arXiv 2110.14048) and GradDrop (Chen et al., "Just Pick a Sign", NeurIPS 2020, arXiv
2010.06808).

All results have the scale of the mean of the tasks' gradients, so learning rate and clipping need
no change. The papers of PCGrad and GradDrop use the scale of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..draws import Draws
from ..errors import UserError
from ..settings import Share, ShareBelowOne

_COLUMNS = 1 << 16  # columns of the gradients that are converted to float64 at a time
_ROUNDING = 1e-9  # `worst_task_ascent` treats smaller relative numbers as rounding errors


@dataclass(frozen=True)
class SurgerySettings:
    """How a step combines its tasks' gradients."""

    surgery: Literal["none", "pcgrad", "cagrad", "graddrop"] = "none"
    """none: the mean of the tasks' gradients. Surgery combines the gradients of all weights and
    needs several tasks per step. CAGrad solves a small problem on the host, so its steps cannot be
    captured."""
    cagrad_c: ShareBelowOne = 0.4
    """CAGrad: the largest distance from the mean gradient, as a share of that gradient's norm."""
    graddrop_leak: Share = 0.0
    """GradDrop: the share of a dropped gradient that is kept; 1 gives the mean."""

    def check(self) -> None:
        """Refuse settings that the chosen surgery does not read.

        Raises:
            UserError: a setting of another surgery was changed.
        """
        for name, reader in (("cagrad_c", "cagrad"), ("graddrop_leak", "graddrop")):
            changed = getattr(self, name) != getattr(SurgerySettings, name)
            if changed and self.surgery != reader:
                raise UserError(
                    f"only {reader} reads {name}: leave it out, or choose --surgery {reader}"
                )


def combine(gradients: Tensor, settings: SurgerySettings, draws: Draws) -> Tensor:
    """The gradient of a step, float32 [P], from its per-task gradients, float32 [G, P].

    Args:
        gradients: the per-task gradients.
        settings: the surgery; not "none".
        draws: the random draws of the step.
    """
    if settings.surgery == "pcgrad":
        return pcgrad(gradients, draws)
    if settings.surgery == "cagrad":
        return cagrad(gradients, settings.cagrad_c)
    return graddrop(gradients, draws, settings.graddrop_leak)


def pcgrad(gradients: Tensor, draws: Draws) -> Tensor:
    """PCGrad (Algorithm 1): remove from each task's gradient its conflicts with the other tasks.

    For every other task j in a random order, if the product g_i · g_j is negative,
    g_i ← g_i − (g_i · g_j / ‖g_j‖²) g_j, where g_j is always the original gradient. The result is
    the mean of the changed g_i. If no two tasks conflict, it is the mean of the original gradients.

    Every g_i stays a linear combination of the original gradients. The code computes only the
    coefficients of this combination, from the products of the original gradients.

    Args:
        gradients: [G, P].
        draws: draws the order of the other tasks for each task.

    Returns:
        [P].
    """
    products = _products(gradients)
    tasks = torch.arange(len(products), device=products.device)
    words, *_ = draws.words(tasks, tasks[:, None])
    multiples = torch.eye(len(products), dtype=products.dtype, device=products.device)
    # Row i of `multiples` has the coefficients of g_i. `others` [G] has the next task j of each i.
    for others in words.argsort(stable=True, dim=1).T:
        product = (multiples * products[others]).sum(1)
        share = product / products[others, others]
        conflict = (product < 0) & (others != tasks)
        share = torch.where(conflict, share, 0.0)
        multiples.scatter_add_(1, others[:, None], -share[:, None])
    return _sum(multiples.sum(0), gradients) / len(gradients)


def cagrad(gradients: Tensor, c: float) -> Tensor:
    """CAGrad (Eq. 3): the direction near the mean gradient that helps the worst task most.

    d = argmax min_i g_i · d over ‖d − ḡ‖ ≤ c ‖ḡ‖, where ḡ is the mean gradient. The result is not
    divided by 1 + c: if all tasks agree, it is 1 + c times the mean. The CPU solves the problem
    exactly, in float64 (`worst_task_ascent`). If a gradient is not finite, the result is not
    finite.

    Args:
        gradients: [G, P].
        c: in [0, 1).

    Returns:
        [P].
    """
    products = _products(gradients).cpu().numpy()
    if not np.isfinite(products).all():
        return gradients.mean(0)
    multiples = 1 / len(gradients) + worst_task_ascent(products, c)
    return _sum(torch.from_numpy(multiples).to(gradients.device), gradients)


def worst_task_ascent(products: NDArray[np.float64], c: float) -> NDArray[np.float64]:
    """CAGrad's step u away from the mean gradient ḡ, as multiples v of the tasks' gradients.

    For a level t, u = Σ v_i g_i with v ≥ 0 is the shortest step after which every task reaches
    g_i · (ḡ + u) ≥ t. This function raises t from the worst task's level at ḡ until u is as long as
    allowed, or until no step reaches a higher level. The tasks that are exactly at level t are
    called held. By the optimality conditions v is linear in t while the held tasks stay the same,
    so a few small linear systems give v exactly. The paper's dual problem over the simplex (Eq. 4)
    has the solution w = v / Σ v, unless u is shorter than allowed. Then every dual solution has
    Σ w_i g_i = 0, which does not determine u.

    Args:
        products: [G, G], g_i · g_j.
        c: the largest length of u, in norms of the mean gradient.

    Returns:
        v, [G].
    """
    above = products.mean(1) - products.mean(1).min()  # the tasks' g_i · (ḡ + u) − t
    longest = c * c * products.mean()  # the largest ‖u‖²
    v, held = np.zeros(len(products)), np.zeros(len(products), dtype=bool)
    while True:
        rise = np.zeros_like(v)  # the growth of v while t rises by 1
        rise[held] = np.linalg.solve(products[held][:, held], np.ones(held.sum()))
        fall = 1 - products @ rise  # the decrease of `above` while t rises by 1
        # The rise of t until the v of a held task is 0 (loses), until a task reaches level t and is
        # held (joins), and until u has its largest length (left).
        loses = np.divide(v, -rise, out=np.full_like(v, np.inf), where=held & (rise < 0))
        meets = ~held & (fall > _ROUNDING)
        joins = np.divide(above, fall, out=np.full_like(v, np.inf), where=meets)
        # products @ rise is 1 for held tasks, and v is 0 for the others. So rise.sum() is the
        # squared norm of the direction Σ rise_i g_i, and v.sum() its product with u.
        left = _to_length(rise.sum(), v.sum(), longest - v @ products @ v)
        step = min(left, loses.min(), joins.min())
        v, above = v + step * rise, above - step * fall
        if step == left:
            return v
        if step == loses.min():
            _let_go(v, held, int(loses.argmin()))
        elif not _hold(products, v, held, int(joins.argmin())):
            return v


def _to_length(square: float, product: float, rest: float) -> float:
    """How far to go along a line until the squared norm of the point has grown by `rest`.

    Args:
        square: squared norm of the line's direction; it may be 0.
        product: product of the direction and the line's first point; it is not negative.
        rest: the growth.
    """
    if square == 0:
        return np.inf
    return (np.sqrt(product**2 + square * max(rest, 0.0)) - product) / square


def _let_go(v: NDArray[np.float64], held: NDArray[np.bool_], task: int) -> None:
    v[task], held[task] = 0.0, False


def _hold(
    products: NDArray[np.float64], v: NDArray[np.float64], held: NDArray[np.bool_], task: int
) -> bool:
    """Hold another task. If its gradient depends linearly on held ones, let one held task go.

    Returns:
        False if no task can be let go; then no step reaches a higher level.
    """
    made_of = np.zeros_like(v)  # coefficients of its projection on the held gradients
    made_of[held] = np.linalg.solve(products[held][:, held], products[held, task])
    rest = products[task, task] - made_of @ products[task]
    if rest <= _ROUNDING * products[task, task]:
        # Raise this task's v until the v of a held task is 0. The v of the held tasks change so
        # that u stays the same.
        gives = made_of > _ROUNDING
        if not gives.any():
            return False
        most = np.divide(v, made_of, out=np.full_like(v, np.inf), where=gives)
        other = int(most.argmin())
        v -= most[other] * made_of
        v[task] = most[other]
        _let_go(v, held, other)
    held[task] = True
    return True


def graddrop(gradients: Tensor, draws: Draws, leak: float) -> Tensor:
    """GradDrop (Algorithm 1): for each weight, keep only the gradients of one random sign.

    The purity is P = ½ (1 + Σ_i g_i / Σ_i |g_i|), and U is uniform in (0, 1). If P > U, the
    positive gradients are kept, otherwise the negative ones. A share `leak` of the dropped
    gradients is kept as well. The result is the mean over all tasks. The paper applies this to the
    gradients of a shared layer's outputs. This function applies it to the gradients of the weights,
    as later papers that compare gradient surgery do.

    Args:
        gradients: [G, P].
        draws: draws U for each weight.
        leak: ℓ in [0, 1], the same for all tasks.

    Returns:
        [P].
    """
    size = gradients.shape[1]
    words = draws.words(torch.arange(-(-size // 4), device=gradients.device)).flatten()[:size]
    threshold = ((words >> 8 | 1) - (1 << 23)) / (1 << 23)  # 2 U − 1: 24 bits, never 0 or ±1
    positive, negative = gradients.clamp(min=0).sum(0), gradients.clamp(max=0).sum(0)
    total, absolute = positive + negative, positive - negative
    kept = torch.where(total > threshold * absolute, positive, negative)
    return kept.lerp(total, leak) / len(gradients)


def _products(gradients: Tensor) -> Tensor:
    """The products of all pairs of gradients [G, P], float64 [G, G]."""
    products = gradients.new_zeros(len(gradients), len(gradients), dtype=torch.float64)
    for part in gradients.split(_COLUMNS, 1):
        part = part.double()
        products.addmm_(part, part.T)
    return products


def _sum(multiples: Tensor, gradients: Tensor) -> Tensor:
    """The sum of the multiples [G] of gradients [G, P]: [P]."""
    return torch.mv(gradients.T, multiples.to(gradients.dtype))
