"""The policy: a decision transformer conditioned on a prompt, with per-task masked blocks.

A batch is a list of groups, one task each. Shapes in comments: G groups, B windows per group,
L time steps (K* of the prompt, K of the history), T = 3 L tokens, d embedding dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmodt_kernels import PYTORCH

from ..batch import Batch, Steps
from ..config import ModelConfig
from ..masks.bank import TaskMasks
from ..masks.vector import ParameterVector, Slot

PromptCache = list[tuple[Tensor, Tensor]]  # keys and values [G B, H, 3 K*, d / H] of every block


class MaskableLinear(nn.Linear):
    """A linear layer over [G, R, K] whose weights and biases are masked per group."""

    weight_slot: Slot
    bias_slot: Slot

    def forward(  # type: ignore[override]
        self, x: Tensor, masks: TaskMasks | None, relu: bool = False
    ) -> Tensor:
        if masks is None:
            y = F.linear(x, self.weight, self.bias)
            return F.relu_(y) if relu else y
        return masks.backend.masked_linear(
            x,
            self.weight,
            self.bias,
            self.weight_slot.bits(masks.bits),
            self.bias_slot.bits(masks.bits)[:, 0],
            masks.task_ids,
            relu=relu,
            group_gradients=self._of_groups(masks.group_gradients),
        )

    def _of_groups(self, gradients: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if gradients is None:
            return None
        return self.weight_slot.of_groups(gradients), self.bias_slot.of_groups(gradients)[:, 0]


class MaskableLayerNorm(nn.LayerNorm):
    """A LayerNorm over [G, R, d] whose gains and biases are masked per group."""

    weight_slot: Slot
    bias_slot: Slot

    def forward(self, x: Tensor, masks: TaskMasks | None) -> Tensor:  # type: ignore[override]
        if masks is None:
            return super().forward(x)
        slots = (self.weight_slot, self.bias_slot)
        of_groups = masks.group_gradients
        return masks.backend.masked_layer_norm(
            x,
            self.weight,
            self.bias,
            *(slot.bits(masks.bits)[:, 0] for slot in slots),
            masks.task_ids,
            epsilon=self.eps,
            group_gradients=of_groups
            if of_groups is None
            else tuple(slot.of_groups(of_groups)[:, 0] for slot in slots),
        )


class Block(nn.Module):
    """A pre-LayerNorm transformer block with a ReLU MLP, as in GPT-2."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        d = config.embed_dim
        self.attention_norm = MaskableLayerNorm(d)
        self.qkv = MaskableLinear(d, 3 * d)
        self.attention_out = MaskableLinear(d, d)
        self.mlp_norm = MaskableLayerNorm(d)
        self.mlp_up = MaskableLinear(d, 4 * d)
        self.mlp_down = MaskableLinear(4 * d, d)

    def forward(
        self,
        x: Tensor,
        valid: Tensor,
        masks: TaskMasks | None,
        past: tuple[Tensor, Tensor] | None = None,
        wanted: slice = slice(None),
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Transform tokens [G, B, T, d]; also return the keys and values of all of them.

        Args:
            valid: bool [G B, tokens of `past` and these], padding is not.
            past: keys and values of tokens before these.
            wanted: tokens whose outputs are returned; the others' are not computed.
        """
        groups, windows, length, d = x.shape
        qkv = self.qkv(self.attention_norm(x.flatten(1, 2), masks), masks)
        qkv = qkv.view(groups * windows, length, 3, self.heads, d // self.heads)
        rows = x[:, :, wanted].flatten(1, 2)  # [G, B T, d]
        drop = self.dropout if self.training else 0.0
        backend = PYTORCH if masks is None else masks.backend
        attended = backend.attention(qkv, valid, wanted, drop, past).reshape(rows.shape)
        rows = backend.dropout_add(rows, self.attention_out(attended, masks), drop)
        hidden = self.mlp_up(self.mlp_norm(rows, masks), masks, relu=True)
        rows = backend.dropout_add(rows, self.mlp_down(hidden, masks), drop)
        _, keys, values = qkv.permute(2, 0, 3, 1, 4)  # each [G B, H, T, d / H]
        return rows.view(groups, windows, -1, d), (keys, values)


class TokenEmbedding(nn.Module):
    """Return-to-go, observation and action of each time step, in that order, as tokens."""

    def __init__(self, config: ModelConfig, observation_size: int, action_size: int):
        super().__init__()
        d = config.embed_dim
        self.returns_to_go = nn.Linear(1, d)
        self.observations = nn.Linear(observation_size, d)
        self.actions = nn.Linear(action_size, d)
        self.timesteps = nn.Embedding(config.max_timesteps, d)

    def forward(self, steps: Steps) -> Tensor:
        """Embed time steps: [G, B, 3 L, d]."""
        tokens = torch.stack(
            (
                self.returns_to_go(steps.returns_to_go[..., None]),
                self.observations(steps.observations),
                self.actions(steps.actions),
            ),
            dim=3,
        )  # [G, B, L, 3, d]
        return (tokens + self.timesteps(steps.timesteps)[:, :, :, None]).flatten(2, 3)


class DecisionTransformer(nn.Module):
    """Prompt-DT with one binary mask per task over the blocks and the final LayerNorm.

    Follows Section 3 of the HarmoDT paper (arXiv 2405.18080). Embeddings and the action head are
    shared by all tasks and never masked.

    Args:
        config: sizes; `task_embedding_dim` > 0 gives the MTDT variant, in which a learned task
            embedding is concatenated to the observation.
        tasks: number of tasks N.
        device: where the parameters live; they are initialised on the CPU from torch's default
            generator, so that every device starts from the same values.
    """

    def __init__(self, config: ModelConfig, tasks: int, device: torch.device | str = "cpu"):
        super().__init__()
        self.config = config
        d = config.embed_dim
        observation_size = config.observation_size + config.task_embedding_dim
        if config.task_embedding_dim:
            self.task_embedding = nn.Embedding(tasks, config.task_embedding_dim)
        if config.prompt_length:
            self.prompt_embedding = TokenEmbedding(config, observation_size, config.action_size)
        self.history_embedding = TokenEmbedding(config, observation_size, config.action_size)
        self.history_norm = nn.LayerNorm(d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = MaskableLayerNorm(d)
        self.action_head = nn.Linear(d, config.action_size)
        self.apply(_initialise)
        self.vector = ParameterVector(self, is_maskable, torch.device(device))
        for name, module in self.named_modules():
            if isinstance(module, MaskableLinear | MaskableLayerNorm):
                module.weight_slot = self.vector.slots[f"{name}.weight"]
                module.bias_slot = self.vector.slots[f"{name}.bias"]

    def forward(self, batch: Batch, masks: TaskMasks | None) -> Tensor:
        """Predict the action of every history step from the tokens up to its observation.

        Args:
            batch: G groups of B windows.
            masks: the masks of the groups' tasks, or None for all weights (the dense model).

        Returns:
            float32 [G, B, K, 4], in (-1, 1).
        """
        x = self._embed_history(batch.history, batch.task_ids)
        valid = batch.history.valid
        if batch.prompt is not None:
            x = torch.cat((self._embed_prompt(batch.prompt, batch.task_ids), x), dim=2)
            valid = torch.cat((batch.prompt.valid, valid), dim=2)
        valid = _of_tokens(valid)
        observation_tokens = slice(3 * self.config.prompt_length + 1, None, 3)
        for block in self.blocks[:-1]:
            x, _ = block(x, valid, masks)
        x, _ = self.blocks[-1](x, valid, masks, wanted=observation_tokens)
        return self._actions(x, masks)

    def encode_prompt(
        self, prompt: Steps, task_ids: Tensor, masks: TaskMasks | None
    ) -> PromptCache:
        """Keys and values of the prompt's tokens, which no later token can change."""
        x = self._embed_prompt(prompt, task_ids)
        valid = _of_tokens(prompt.valid)
        cache = []
        for block in self.blocks:
            x, (keys, values) = block(x, valid, masks)
            cache.append((keys.contiguous(), values.contiguous()))
        return cache

    def act(
        self,
        history: Steps,
        task_ids: Tensor,
        masks: TaskMasks | None,
        prompt_cache: PromptCache | None = None,
        prompt_valid: Tensor | None = None,
    ) -> Tensor:
        """The action of the last history step, [G, B, 4]; the same as the last of `forward`."""
        # The last token is the last step's action, which is what is asked for.
        x = self._embed_history(history, task_ids)[:, :, :-1]
        valid = _of_tokens(history.valid)[:, :-1]
        if prompt_valid is not None:
            valid = torch.cat((_of_tokens(prompt_valid), valid), dim=1)
        for index, block in enumerate(self.blocks):
            past = prompt_cache[index] if prompt_cache is not None else None
            last = index == len(self.blocks) - 1
            x, _ = block(x, valid, masks, past, wanted=slice(-1, None) if last else slice(None))
        return self._actions(x, masks)[:, :, 0]

    def _embed_history(self, steps: Steps, task_ids: Tensor) -> Tensor:
        return self.history_norm(self.history_embedding(self._with_task(steps, task_ids)))

    def _embed_prompt(self, steps: Steps, task_ids: Tensor) -> Tensor:
        return self.prompt_embedding(self._with_task(steps, task_ids))

    def _with_task(self, steps: Steps, task_ids: Tensor) -> Steps:
        if not self.config.task_embedding_dim:
            return steps
        task = self.task_embedding(task_ids)[:, None, None]  # [G, 1, 1, e]
        task = task.expand(*steps.observations.shape[:3], -1)
        observations = torch.cat((steps.observations, task), dim=-1)
        return Steps(steps.returns_to_go, observations, steps.actions, steps.timesteps, steps.valid)

    def _actions(self, x: Tensor, masks: TaskMasks | None) -> Tensor:
        normalised = self.final_norm(x.flatten(1, 2), masks).view(x.shape)
        return torch.tanh(self.action_head(normalised))


def is_maskable(parameter_name: str) -> bool:
    """Whether masks cover a parameter: those of the blocks and of the final LayerNorm."""
    return parameter_name.startswith(("blocks.", "final_norm."))


def _of_tokens(valid: Tensor) -> Tensor:
    """The three tokens of each time step, valid bool [G, B, L]."""
    return valid.flatten(0, 1).repeat_interleave(3, dim=1)


def _initialise(module: nn.Module) -> None:
    # GPT-2's initialisation; LayerNorms keep their ones and zeros
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
