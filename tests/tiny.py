"""A store of random numbers and a model of a few thousand weights, for tests without simulation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from harmodt.config import TrainConfig
from harmodt.data.inputs import TaskConditioning
from harmodt.data.store import DataStore, Episode
from harmodt.data.writer import StoreWriter
from harmodt.environments import METAWORLD, family
from harmodt.networks.decision_transformer import DecisionTransformer
from harmodt.training.trainer import Trainer

SPEC = family(METAWORLD).spec
TASKS = ("reach-v3", "push-v3", "drawer-open-v3")

CONFIG = TrainConfig(
    fused=False,
    embed_dim=32,
    layers=2,
    heads=2,
    context_length=6,
    prompt_length=3,
    max_timesteps=50,
    steps=20,
    tasks_per_step=2,
    batch_per_task=4,
    warmup_steps=4,
    final_learning_rate=1.0,
    mask_update_every=4,
    eta_max=40,
    action_dropout=0.5,
    log_every=2,
    checkpoint_every=4,
    evaluation_episodes=0,
)


def configure(**changes: object) -> TrainConfig:
    """The tiny run's settings with some changes."""
    return dataclasses.replace(CONFIG, **changes)


def make_episode(rng: np.random.Generator, length: int, center: float = 0.0) -> Episode:
    """A random episode; observation 5 is constant and some actions lie outside [-1, 1]."""
    observations = rng.normal(center, 1.0, (length, SPEC.observation_size)).astype(np.float32)
    observations[:, 5] = center
    actions = rng.uniform(-1.2, 1.2, (length, SPEC.action_size)).astype(np.float32)
    rewards = rng.uniform(0, 10, length).astype(np.float32)
    return Episode(observations, actions, rewards, success=1)


def make_store(
    path: Path,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = (30, 24, 27),
    prompt_lengths: Sequence[int] = (12, 9, 7),
    seed: int = 0,
) -> DataStore:
    """Write a store whose tasks differ in their observations' center: 0, 1, 2 and so on."""
    rng = np.random.default_rng(seed)
    writer = StoreWriter(path, {"source": "random"}, SPEC)
    for index, name in enumerate(tasks):
        with writer.task(name) as task:
            for length in lengths:
                task.add(make_episode(rng, length, index))
            for length in prompt_lengths:
                task.add_prompt(make_episode(rng, length, index))
    return writer.finish(tasks)


def make_trainer(
    store: DataStore, config: TrainConfig = CONFIG, device: torch.device | str = "cpu"
) -> Trainer:
    """A trainer over all tasks of a store."""
    data = [store.task(name) for name in store.tasks]
    conditioning = [TaskConditioning.from_data(task, config) for task in data]
    return Trainer(config, data, conditioning, torch.device(device))


def peak_memory(function: Callable[[], object]) -> int:
    """Most bytes that PyTorch had allocated on the CPU at once during a call, beyond before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def unpack_masks(model: DecisionTransformer, bits: Tensor) -> dict[str, Tensor]:
    """One task's packed mask, int32 [P_m / 32], as a bool tensor for each maskable parameter."""
    flat = np.unpackbits(bits.numpy().view(np.uint8), bitorder="little").astype(bool)
    masks, offset = {}, 0
    for name, parameter in model.named_parameters():
        if name.startswith(("blocks.", "final_norm.")):
            *rows, columns = parameter.shape
            stride = -(-columns // 32) * 32
            size = int(np.prod(rows, dtype=int)) * stride
            part = flat[offset : offset + size].reshape(*rows, stride)[..., :columns]
            masks[name] = torch.from_numpy(part.copy())
            offset += size
    assert offset == len(flat)
    return masks


def masked_copy(model: DecisionTransformer, bits: Tensor) -> DecisionTransformer:
    """Another model whose weights are those of `model` times one task's mask."""
    tasks = model.task_embedding.num_embeddings if model.config.task_embedding_dim else 1
    copy = DecisionTransformer(model.config, tasks)
    masks = unpack_masks(model, bits)
    with torch.no_grad():
        for (name, theirs), ours in zip(copy.named_parameters(), model.parameters(), strict=True):
            theirs.copy_(ours * masks[name] if name in masks else ours)
    return copy
