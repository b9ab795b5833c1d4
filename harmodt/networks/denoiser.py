"""The Transformer of MTDiff, which predicts the noise in a plan of actions.

It is the planner of He et al., "Diffusion Model is an Effective Planner and Data Synthesizer for
Multi-Task Reinforcement Learning", NeurIPS 2023 (arXiv 2305.18459). The paper states the input
tokens and says that the network is a GPT-2. The rest follows the authors' code: the widths of the
embeddings, the places where the embeddings of time and return are multiplied and added, and causal
attention. The network has 5.32 M parameters with d = 256, 4 blocks, 20 prompt steps and 32 planned
actions.

Shapes: N plans, H actions of a plan, h observations before it, d embedding dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from harmodt_kernels.vector import ParameterVector

BEFORE = 2
"""Number of tokens before the task's tokens: one for the diffusion's time, one for the return."""


@dataclass(frozen=True)
class DenoiserConfig:
    """Sizes of a denoiser.

    Attributes:
        observation_size, action_size: components of an observation and of an action.
        task_size, task_length: components of a task token, and number of task tokens.
        context_length: h, number of observations that a plan depends on; the present one is last.
        horizon: H, largest number of actions of a plan.
        embed_dim, layers, heads: d, number of blocks, number of attention heads of each block.
        dropout: probability of dropout in attention and in both layers of an MLP.
    """

    observation_size: int
    action_size: int
    task_size: int
    task_length: int
    context_length: int
    horizon: int
    embed_dim: int
    layers: int
    heads: int
    dropout: float = 0.0


class Situation(NamedTuple):
    """The inputs that plans are conditioned on.

    Attributes:
        returns_to_go: float32 [N], scaled, the return to reach from the present on.
        task: float32 [N, task_length, task_size], a prompt's steps or a one-hot vector of the task.
        observations: float32 [N, h, O], normalised, the present one last.
    """

    returns_to_go: Tensor
    task: Tensor
    observations: Tensor


class Denoiser(nn.Module):
    """Predicts the noise in plans.

    The tokens are the diffusion's time, the return, the task, the observations and the plan's
    actions, in that order. Each token reads the tokens before it. The prediction for an action
    therefore depends on no later action, and the first actions of a plan can be drawn without the
    later ones.

    Args:
        config: sizes of the denoiser.
        device: device of the parameters; they are initialised on the CPU from PyTorch's default
            generator.
    """

    def __init__(self, config: DenoiserConfig, device: torch.device | str = "cpu"):
        super().__init__()
        self.config = config
        d = config.embed_dim
        before = BEFORE + config.task_length + config.context_length
        self.time_embedding = _mlp(d, 2 * d, d)
        self.return_embedding = _mlp(1, d, 2 * d, d)
        self.task_embedding = _mlp(config.task_size, 2 * d, 4 * d, d)
        self.observation_embedding = _mlp(config.observation_size, 2 * d, 4 * d, d)
        self.action_embedding = nn.Linear(config.action_size, d)
        self.positions = nn.Parameter(torch.zeros(before + config.horizon, d))
        self.embedding_norm = nn.LayerNorm(d)
        block = nn.TransformerEncoderLayer(
            d,
            config.heads,
            4 * d,
            config.dropout,
            nn.functional.mish,
            batch_first=True,
            norm_first=True,
        )
        final_norm = nn.LayerNorm(d)
        self.blocks = nn.TransformerEncoder(
            block, config.layers, final_norm, enable_nested_tensor=False
        )
        self.noise_head = nn.Linear(d, config.action_size)
        self._causal = nn.Transformer.generate_square_subsequent_mask(
            len(self.positions), torch.device(device)
        )
        _initialise_as_gpt2(self.blocks)
        self.vector = ParameterVector(self, torch.device(device))

    def forward(
        self, plans: Tensor, times: Tensor, situation: Situation, conditioned: Tensor
    ) -> Tensor:
        """Predict the noise in plans.

        Args:
            plans: float32 [N, H or fewer, A], with noise.
            times: int64 [N], time steps of the diffusion.
            situation: the inputs that the plans are conditioned on.
            conditioned: bool [N], whether a plan is conditioned on the return. If not, the return's
                embedding is 0.

        Returns:
            float32, of the plans' shape.
        """
        return self.predict(plans, times, self.embed(situation, conditioned))

    def embed(self, situation: Situation, conditioned: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the inputs that do not depend on the diffusion's time, for `predict`.

        Args:
            situation: the inputs that the plans are conditioned on.
            conditioned: bool [N], as in `forward`.

        Returns:
            The return's embedding [N, 1, d], and all tokens between the time and the plan
            [N, 1 + task_length + h, d].
        """
        returns = self.return_embedding(situation.returns_to_go[:, None, None])
        returns = returns * conditioned[:, None, None]
        task = self.task_embedding(situation.task)
        return returns, torch.cat(
            (returns, task, self.observation_embedding(situation.observations)), dim=1
        )

    def predict(self, plans: Tensor, times: Tensor, embedded: tuple[Tensor, Tensor]) -> Tensor:
        """Predict the noise in plans as `forward` does, from the result of `embed`."""
        returns, context = embedded
        time = self.time_embedding(_waves(times, self.config.embed_dim))[:, None]
        x = torch.cat((time, context, self.action_embedding(plans)), dim=1)
        x = self.embedding_norm(time * x + returns + self.positions[: x.shape[1]])
        causal = self._causal[: x.shape[1], : x.shape[1]].to(x.dtype)
        x = self.blocks(x, mask=causal, is_causal=True)
        return self.noise_head(x[:, -plans.shape[1] :]).float()


def _mlp(*widths: int) -> nn.Sequential:
    """Linear layers with Mish between them."""
    layers = [layer for pair in pairwise(widths) for layer in (nn.Mish(), nn.Linear(*pair))]
    return nn.Sequential(*layers[1:])


def _waves(times: Tensor, size: int) -> Tensor:
    """Sines and cosines of times [N] at wavelengths from 2 π to 20000 π: [N, size]."""
    exponents = torch.arange(size // 2, device=times.device) / max(size // 2 - 1, 1)
    angles = times[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _initialise_as_gpt2(blocks: nn.Module) -> None:
    """Draw weights with a deviation of 0.02; LayerNorms keep their ones and zeros."""
    for name, parameter in blocks.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
