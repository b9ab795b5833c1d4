"""A diffusion process: how noise is added to plans, and how plans are drawn out of noise.

Time counts the steps of noise, from 0. After time t a clean x is √ᾱ_t x + √(1 - ᾱ_t) ε with ε
standard normal (Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, Eq.
4). The schedule is MTDiff's, the discrete form of the variance preserving process with β from 0.1
to 10 over the unit interval (Song et al., "Score-Based Generative Modeling through Stochastic
Differential Equations", ICLR 2021): ᾱ_t = exp(-0.1 s - 4.95 s²) with s = (t + 1) / T.
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
        device: of what gets noise.
    """

    def __init__(self, steps: int, device: torch.device | str = "cpu"):
        self.steps = steps
        shares = torch.tensor([self._share(time) for time in range(steps)], dtype=torch.float64)
        self._signal = shares.sqrt().float().to(device)
        self._noise = (1 - shares).sqrt().float().to(device)

    def noised(self, clean: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """What plans have become at some times.

        Args:
            clean: the plans, [..., H, A].
            times: int64 [...].
            noise: standard normal, of the plans' shape.
        """
        signal, scale = (table[times][..., None, None] for table in (self._signal, self._noise))
        return signal * clean + scale * noise

    def times(self, count: int) -> list[int]:
        """`count` of the T times, falling from the last one in even strides."""
        return [self.steps * k // count - 1 for k in range(count, 0, -1)]

    def denoised(
        self,
        predict: Callable[[Tensor, int], Tensor],
        x: Tensor,
        times: list[int],
        draw: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Draw a plan out of noise.

        A step goes to an earlier time by Eq. 12 of Song, Meng and Ermon, "Denoising Diffusion
        Implicit Models", ICLR 2021: with σ = 0, or with η = 1 there, which over all times is DDPM.
        What is predicted of the clean plan is clipped to [-1, 1], and what is left of x is taken to
        be its noise.

        Args:
            predict: the noise in x at a time.
            x: standard normal; its dtype is computed in.
            times: falling; the last step goes from the last of them to the clean plan.
            draw: for DDPM, standard normal numbers of the shape of x, for each step anew; smaller
                ones for low-temperature sampling. None for DDIM.

        Returns:
            In [-1, 1], of the shape of x.
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
        """ᾱ at a time; before the first, 1."""
        first, last = _BETAS
        s = (time + 1) / self.steps
        return math.exp(-first * s - (last - first) / 2 * s**2)
