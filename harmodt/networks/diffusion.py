"""A diffusion process: it adds noise to plans, and it draws plans from noise.

Time counts the steps of noise, from 0. A clean x becomes √ᾱ_t x + √(1 - ᾱ_t) ε at time t, and ε is
standard normal (Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, Eq.
4). The schedule is that of MTDiff. It is the discrete form of the variance preserving process with
β from 0.1 to 10 over the unit interval (Song et al., "Score-Based Generative Modeling through
Stochastic Differential Equations", ICLR 2021): ᾱ_t = exp(-0.1 s - 4.95 s²) with s = (t + 1) / T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

_BETAS = (0.1, 10.0)


class Diffusion:
    """A process of T steps of noise.

    Args:
        steps: T.
        device: device of the plans that get noise.
    """

    def __init__(self, steps: int, device: torch.device | str = "cpu"):
        self.steps = steps
        shares = torch.tensor([self._share(time) for time in range(steps)], dtype=torch.float64)
        self._signal = shares.sqrt().float().to(device)
        self._noise = (1 - shares).sqrt().float().to(device)

    def noised(self, clean: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """Add noise to plans.

        Args:
            clean: the plans, [..., H, A].
            times: int64 [...], the time of each plan.
            noise: standard normal numbers of the plans' shape.
        """
        signal, scale = (table[times][..., None, None] for table in (self._signal, self._noise))
        return signal * clean + scale * noise

    def times(self, count: int) -> list[int]:
        """`count` of the T times, evenly spaced and falling from the last time."""
        return [self.steps * k // count - 1 for k in range(count, 0, -1)]

    def denoised(
        self,
        predict: Callable[[Tensor, int], Tensor],
        x: Tensor,
        times: list[int],
        draw: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Draw a plan from noise.

        Each step goes to an earlier time by Eq. 12 of Song, Meng and Ermon, "Denoising Diffusion
        Implicit Models", ICLR 2021. Without `draw`, its σ is 0 (DDIM). With `draw`, its η is 1;
        over all T times this is DDPM. Each step clips its prediction of the clean plan to
        [-1, 1] and takes the rest of x as the noise.

        Args:
            predict: predicts the noise in x at a time.
            x: standard normal numbers; all computations have their dtype.
            times: falling times. The last step goes from the last time to the clean plan.
            draw: for DDPM, draws standard normal numbers of the shape of x for each step; for
                low-temperature sampling they are smaller. None for DDIM.

        Returns:
            A plan in [-1, 1], of the shape of x.
        """
        for time, earlier in pairwise([*times, -1]):
            share, goal = self._share(time), self._share(earlier)
            signal, scale = math.sqrt(share), math.sqrt(1 - share)
            clean = ((x - scale * predict(x, time)) / signal).clamp(-1, 1)
            noise = (x - signal * clean) / scale
            variance = 0.0 if draw is None else (1 - goal) / (1 - share) * (1 - share / goal)
            x = math.sqrt(goal) * clean + math.sqrt(1 - goal - variance) * noise
            if draw is not None and earlier >= 0:
                x = x + math.sqrt(variance) * draw()
        return x

    def _share(self, time: int) -> float:
        """ᾱ at a time; it is 1 at time -1, before any noise."""
        first, last = _BETAS
        s = (time + 1) / self.steps
        return math.exp(-first * s - (last - first) / 2 * s**2)
