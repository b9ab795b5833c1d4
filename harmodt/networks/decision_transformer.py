"""The decision transformer. It is conditioned on a prompt, and each task can mask its blocks.

A batch consists of groups, and each group has one task. Shapes in comments: G groups, B windows per
group, L time steps (K* of the prompt, K of the history), T = 3 L tokens, R = B T rows, d embedding
dimension, H attention heads, N tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from harmodt_kernels import NO_MASKS, Backend, MaskedLayerNorm, MaskedLinear
from harmodt_kernels.vector import ParameterVector

from ..batch import Batch, Steps
from ..masks.bank import TaskMasks


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes and the initialisation of a decision transformer.

    Attributes:
        observation_size, action_size: components of an observation and of an action.
        embed_dim, layers, heads: d, number of blocks, number of attention heads of each block.
        max_timesteps: size of the time-step embedding.
        prompt_length: K*; 0 for a model without prompt.
        task_embedding_dim: size of a learned task embedding that is concatenated to each
            observation (MTDT); 0 for a model without it.
        dropout: probability of dropout in attention and residual branches.
        embedding_dropout: probability of dropout of the embedded tokens.
        initialisation: the initialisation of embeddings and head, as in `TransformerSettings`.
    """

    observation_size: int
    action_size: int
    embed_dim: int
    layers: int
    heads: int
    max_timesteps: int
    prompt_length: int = 0
    task_embedding_dim: int = 0
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    initialisation: Literal["gpt2", "pytorch"] = "gpt2"


DROPOUT_PLACES = 3  # dropouts in a block

PromptCache = list[tuple[Tensor, Tensor]]  # keys and values [G B, H, 3 K*, d / H] of every block


class Block(nn.Module):
    """A pre-LayerNorm transformer block with a ReLU MLP, as in GPT-2."""

    def __init__(self, config: TransformerConfig, backend: Backend):
        super().__init__()
        self.backend = backend
        self.heads = config.heads
        self.dropout = config.dropout
        d = config.embed_dim
        self.attention_norm = MaskedLayerNorm(d, backend=backend)
        self.qkv = MaskedLinear(d, 3 * d, backend=backend)
        self.attention_out = MaskedLinear(d, d, backend=backend)
        self.mlp_norm = MaskedLayerNorm(d, backend=backend)
        self.mlp_up = MaskedLinear(d, 4 * d, backend=backend)
        self.mlp_down = MaskedLinear(4 * d, d, backend=backend)

    def forward(
        self,
        x: Tensor,
        masks: TaskMasks,
        past: tuple[Tensor, Tensor] | None = None,
        wanted: slice = slice(None),
        seeds: Sequence[Tensor | None] = (None,) * DROPOUT_PLACES,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Transform tokens [G, B, T, d], and return their keys and values as well.

        Args:
            past: keys and values of earlier tokens.
            wanted: the tokens whose outputs are computed and returned.
            seeds: seeds of the dropouts in the attention and at the end of both residual branches.
        """
        groups, windows, length, d = x.shape
        qkv, rows = self._begin(x.flatten(1, 2), self.attention_norm, self.qkv, masks)
        qkv = qkv.view(groups * windows, length, 3, self.heads, d // self.heads)
        rows = rows.view(x.shape)[:, :, wanted].flatten(1, 2)  # [G, B T, d]
        drop = self.dropout if self.training else 0.0
        of_attention, *of_branches = seeds
        attended = self.backend.attention(qkv, wanted, drop, past, of_attention).reshape(rows.shape)
        rows = self._add(rows, self.attention_out, attended, masks, of_branches[0])
        hidden, rows = self._begin(rows, self.mlp_norm, self.mlp_up, masks, relu=True)
        rows = self._add(rows, self.mlp_down, hidden, masks, of_branches[1])
        _, keys, values = qkv.permute(2, 0, 3, 1, 4)  # each [G B, H, T, d / H]
        return rows.view(groups, windows, -1, d), (keys, values)

    def _begin(
        self,
        rows: Tensor,
        norm: MaskedLayerNorm,
        layer: MaskedLinear,
        masks: TaskMasks,
        relu: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Begin a residual branch. Return layer(norm(rows)) and the rows, both [G, R, ...].

        `_add` gets the returned rows, so that the LayerNorm's backward pass adds the gradients of
        both paths.
        """
        of_layer = masks.of(layer) or NO_MASKS
        return self.backend.norm_linear(
            rows,
            norm.weight,
            norm.bias,
            of_layer.operand_for(layer.weight),
            layer.bias,
            masks.of(norm) or NO_MASKS,
            of_layer,
            epsilon=norm.eps,
            relu=relu,
        )

    def _add(
        self,
        rows: Tensor,
        layer: MaskedLinear,
        x: Tensor,
        masks: TaskMasks,
        seed: Tensor | None,
    ) -> Tensor:
        """End a residual branch. Return rows + dropout(layer(x)), [G, R, d]."""
        of_layer = masks.of(layer) or NO_MASKS
        return self.backend.linear_residual(
            x,
            of_layer.operand_for(layer.weight),
            layer.bias,
            *of_layer.bits,
            rows,
            self.dropout if self.training else 0.0,
            seed=seed,
            group_gradients=of_layer.group_gradients,
            queue=of_layer.queue,
        )


class TokenEmbedding(nn.Module):
    """Embeds each time step as three tokens: return-to-go, observation and action."""

    def __init__(self, config: TransformerConfig, backend: Backend):
        super().__init__()
        self.backend = backend
        d = config.embed_dim
        self.returns_to_go = nn.Linear(1, d)
        self.observations = nn.Linear(config.observation_size + config.task_embedding_dim, d)
        self.actions = nn.Linear(config.action_size, d)
        self.timesteps = nn.Embedding(config.max_timesteps, d)

    def forward(self, steps: Steps, masks: TaskMasks) -> Tensor:
        """Embed time steps: [G, B, 3 L, d]."""
        gradients = masks.gradients_of(self)
        if gradients is None or len(gradients[0]) == 1:
            return self._embed(steps, gradients)
        tokens = []
        for group in range(len(gradients[0])):  # one call per group writes the group's gradients
            only = slice(group, group + 1)
            of_group = Steps(*(values[only] for values in steps))
            tokens.append(self._embed(of_group, [gradient[only] for gradient in gradients]))
        return torch.cat(tokens)

    def _embed(self, steps: Steps, gradients: list[Tensor] | None) -> Tensor:
        tokens = self.backend.token_embedding(
            (steps.returns_to_go[..., None], steps.observations, steps.actions),
            steps.timesteps,
            list(self.parameters()),
            gradients,
        )  # [G, B, L, 3, d]
        return tokens.flatten(2, 3)


class DecisionTransformer(nn.Module):
    """Prompt-DT whose blocks and final LayerNorm can be masked for each task.

    It follows Sections 2.2 and 3 of the HarmoDT paper (arXiv 2405.18080). All tasks share the
    embeddings and the action head, and no mask covers them.

    Args:
        config: sizes and initialisation.
        tasks: number of tasks N.
        backend: the operations of the blocks.
        device: the device of the parameters. They are drawn on the CPU from PyTorch's default
            generator, so that every device starts from the same values.
    """

    def __init__(
        self,
        config: TransformerConfig,
        tasks: int,
        backend: Backend,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.config = config
        self.backend = backend
        d = config.embed_dim
        if config.task_embedding_dim:
            self.task_embedding = nn.Embedding(tasks, config.task_embedding_dim)
        if config.prompt_length:
            self.prompt_embedding = TokenEmbedding(config, backend)
        self.history_embedding = TokenEmbedding(config, backend)
        self.history_norm = nn.LayerNorm(d)
        self.blocks = nn.ModuleList(Block(config, backend) for _ in range(config.layers))
        self.final_norm = MaskedLayerNorm(d, backend=backend)
        self.action_head = nn.Linear(d, config.action_size)
        for module in (self if config.initialisation == "gpt2" else self.blocks).modules():
            _initialise_as_gpt2(module)
        self.vector = ParameterVector(self, torch.device(device))

    @property
    def dropout_places(self) -> int:
        """Number of dropouts: one for the embedded tokens, and `DROPOUT_PLACES` in each block."""
        return 1 + DROPOUT_PLACES * len(self.blocks)

    def forward(self, batch: Batch, masks: TaskMasks, seeds: Tensor | None = None) -> Tensor:
        """Predict the action of every history step from the tokens up to its observation.

        Padding comes last, so no valid step reads it. Predictions at padding have no meaning.

        Args:
            batch: G groups of B windows.
            masks: the masks of the groups' tasks.
            seeds: int64 [dropout_places] in [0, 2^31), the seeds of dropout in training. If None,
                PyTorch's generator draws them. Plain PyTorch ignores the seeds and always draws
                dropout from its generator.

        Returns:
            float32 [G, B, K, A], in (-1, 1).
        """
        of_embeddings, *of_blocks = [None] * self.dropout_places if seeds is None else seeds
        tasks = self._embed_tasks(batch.task_ids, masks)
        x = self._embed_history(batch.history, tasks, masks)
        if batch.prompt is not None:
            x = torch.cat((self._embed_prompt(batch.prompt, tasks, masks), x), dim=2)
        if self.training and self.config.embedding_dropout:
            drop = self.config.embedding_dropout
            x = self.backend.dropout_add(None, x, drop, of_embeddings)
        # The observation is the second token of each time step.
        observation_tokens = slice(3 * self.config.prompt_length + 1, None, 3)
        for index, block in enumerate(self.blocks):
            last = index == len(self.blocks) - 1
            of_block = of_blocks[DROPOUT_PLACES * index :][:DROPOUT_PLACES]
            wanted = observation_tokens if last else slice(None)
            x, _ = block(x, masks, wanted=wanted, seeds=of_block)
        return self._actions(x, masks)

    def encode_prompt(self, prompt: Steps, task_ids: Tensor, masks: TaskMasks) -> PromptCache:
        """Compute keys and values of the prompt's tokens. Later tokens do not affect them."""
        x = self._embed_prompt(prompt, self._embed_tasks(task_ids, masks), masks)
        cache = []
        for block in self.blocks:
            x, (keys, values) = block(x, masks)
            cache.append((keys.contiguous(), values.contiguous()))
        return cache

    def act(
        self,
        history: Steps,
        task_ids: Tensor,
        masks: TaskMasks,
        prompt_cache: PromptCache | None = None,
        shortest: int = 1,
    ) -> Tensor:
        """Predict the action of each history's last valid step as `forward` does, [G, B, A].

        Args:
            history: any number of steps; in each window at least one step is valid.
            task_ids: int64 [G].
            masks: the masks of the groups' tasks.
            prompt_cache: keys and values of the groups' prompts, for a model with prompts.
            shortest: each history has at least this number of valid steps. The last block does not
                compute the outputs of earlier steps, because no history ends there.
        """
        # Leave out the last token: it is the action to be predicted.
        x = self._embed_history(history, self._embed_tasks(task_ids, masks), masks)[:, :, :-1]
        observation_tokens = slice(3 * (shortest - 1) + 1, None, 3)
        for index, block in enumerate(self.blocks):
            past = prompt_cache[index] if prompt_cache is not None else None
            last = index == len(self.blocks) - 1
            x, _ = block(x, masks, past, wanted=observation_tokens if last else slice(None))
        if x.shape[2] > 1:  # take each history's last valid step
            x = x.take_along_dim(history.valid.sum(2)[:, :, None, None] - shortest, dim=2)
        return self._actions(x, masks)[:, :, 0]

    def _embed_tasks(self, task_ids: Tensor, masks: TaskMasks) -> Tensor | None:
        """The learned embedding of each group's task, [G, e]; None for a model without it."""
        if not self.config.task_embedding_dim:
            return None
        rows = self.task_embedding(task_ids)
        buffers = masks.gradients_of(self.task_embedding)
        if buffers is None or not torch.is_grad_enabled():
            return rows
        (buffer,) = buffers  # [G, N, e] or [1, N, e]
        # The hook below writes the gradient of the rows, so autograd must not reach the embedding.
        rows = rows.detach().requires_grad_()
        tasks = torch.arange(len(self.task_embedding.weight), device=task_ids.device)
        own = (task_ids[:, None] == tasks)[..., None]  # [G, N, 1]

        def write(gradients: Tensor) -> None:
            # [G, N, e]: in a group's table, only the row of the group's task has a gradient
            tables = torch.where(own, gradients[:, None], 0.0)
            buffer.copy_(tables.sum_to_size(buffer.shape))

        rows.register_hook(write)
        return rows

    def _embed_history(self, steps: Steps, tasks: Tensor | None, masks: TaskMasks) -> Tensor:
        x = self.history_embedding(_beside(steps, tasks), masks)
        norm = self.history_norm
        normalised, _ = self.backend.masked_layer_norm(
            x.flatten(1, 2),
            *(norm.weight, norm.bias, None, None, None),
            epsilon=norm.eps,
            group_gradients=masks.gradients_of(norm),
        )
        return normalised.view(x.shape)

    def _embed_prompt(self, steps: Steps, tasks: Tensor | None, masks: TaskMasks) -> Tensor:
        # As in Prompt-DT's code, no LayerNorm follows.
        return self.prompt_embedding(_beside(steps, tasks), masks)

    def _actions(self, x: Tensor, masks: TaskMasks) -> Tensor:
        normalised, _ = self.final_norm(x.flatten(1, 2), masks.of(self.final_norm))
        head = self.action_head
        actions = self.backend.masked_linear(
            normalised,
            *(head.weight, head.bias, None, None, None),
            group_gradients=masks.gradients_of(head),
        )
        return torch.tanh(actions).float().view(*x.shape[:3], -1)


def _beside(steps: Steps, tasks: Tensor | None) -> Steps:
    """Append the task embedding of each group, [G, e], to the observations of its steps."""
    if tasks is None:
        return steps
    task = tasks[:, None, None].expand(*steps.observations.shape[:3], -1)
    return steps._replace(observations=torch.cat((steps.observations, task), dim=-1))


def _initialise_as_gpt2(module: nn.Module) -> None:
    """Draw weights with a deviation of 0.02; LayerNorms keep their ones and zeros."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
