"""A store of random numbers and a model of a few thousand weights, for tests without simulation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from harmodt.algorithms import Setup, preset
from harmodt.config import TrainConfig
from harmodt.data.inputs import TaskConditioning
from harmodt.data.store import MANIFEST, DataStore, Episode
from harmodt.data.writer import StoreWriter
from harmodt.devices import Execution
from harmodt.environments import METAWORLD, family
from harmodt.files import json_checksum
from harmodt.masks.bank import TaskMasks
from harmodt.networks.decision_transformer import DecisionTransformer, TransformerConfig
from harmodt.rundir import RunDirectory
from harmodt.settings import change, settings
from harmodt.training.trainer import Trainer
from harmodt_kernels import REFERENCE, Backend

SPEC = family(METAWORLD).spec
TASKS = ("reach-v3", "push-v3", "drawer-open-v3")

CONFIG = {
    "device": "cpu",
    "fused": False,
    "embed_dim": 32,
    "layers": 2,
    "heads": 2,
    "context_length": 6,
    "prompt_length": 3,
    "max_timesteps": 50,
    "steps": 20,
    "tasks_per_step": 2,
    "batch_per_task": 4,
    "warmup_steps": 4,
    "final_learning_rate": 0.3,
    "mask_update_every": 4,
    "eta_max": 40,
    "action_dropout": 0.5,
    "log_every": 2,
    "checkpoint_every": 4,
    "evaluation_episodes": 0,
}


def configure(algorithm: str = "harmodt-f", **changes: object) -> TrainConfig:
    """The tiny run's settings with some changes."""
    config = change(preset("quickstart", algorithm), {**CONFIG, **changes})
    unknown = changes.keys() - dict(settings(config)).keys()
    assert not unknown, f"{algorithm} has no {unknown}"
    return config


def make_episode(rng: np.random.Generator, length: int, center: float = 0.0) -> Episode:
    """A random episode; observation 5 is constant and some actions lie outside [-1, 1]."""
    observations = rng.normal(center, 1.0, (length, SPEC.observation_size)).astype(np.float32)
    observations[:, 5] = center
    actions = rng.uniform(-1.2, 1.2, (length, SPEC.action_size)).astype(np.float32)
    rewards = rng.uniform(0, 10, length).astype(np.float32)
    return Episode(observations, actions, rewards, success=1, terminated=0)


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


def as_version_2(store: DataStore) -> DataStore:
    """The store as the version of the format wrote it that did not know how episodes ended."""
    manifest = json.loads((store.path / MANIFEST).read_text())
    del manifest["crc32"]
    manifest["version"] = 2
    for task, content in manifest["tasks"].items():
        for name in ("terminated", "prompts/terminated"):
            del content["files"][name]
            (store.path / task / f"{name}.npy").unlink()
    manifest["crc32"] = json_checksum(manifest)
    (store.path / MANIFEST).write_text(json.dumps(manifest))
    return DataStore.open(store.path)


def make_setup(
    store: DataStore,
    config: TrainConfig | None = None,
    device: torch.device | str = "cpu",
    backend: Backend | None = None,
) -> Setup:
    """The setup of a run over all tasks of a store, on the config's kernels or a backend's."""
    config = config or configure()
    run = config.run
    execution = Execution.choose(str(device), run.fused, run.precision, run.graph)
    if backend is not None:
        execution = dataclasses.replace(execution, backend=backend)
    conditioning = tuple(TaskConditioning.from_data(store.task(n), config) for n in store.tasks)
    return Setup(config, store.environment, conditioning, execution)


def make_trainer(
    store: DataStore,
    config: TrainConfig | None = None,
    device: torch.device | str = "cpu",
    backend: Backend | None = None,
) -> Trainer:
    """A trainer over all tasks of a store; its directory is beside that and is not made."""
    setup = make_setup(store, config, device, backend)
    data = [store.task(name) for name in store.tasks]
    return Trainer(setup, data, RunDirectory(store.path.with_name("run-of-trainer")))


def make_model(
    config: TransformerConfig, tasks: int = 3, backend: Backend = REFERENCE
) -> DecisionTransformer:
    """A model of the definitions."""
    return DecisionTransformer(config, tasks, backend)


def no_masks(model: DecisionTransformer, groups: int) -> TaskMasks:
    """Of a batch that is computed with all weights."""
    return TaskMasks(model.vector, None, torch.zeros(groups, dtype=torch.int64))


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
    copy = make_model(model.config, tasks)
    masks = unpack_masks(model, bits)
    with torch.no_grad():
        for (name, theirs), ours in zip(copy.named_parameters(), model.parameters(), strict=True):
            theirs.copy_(ours * masks[name] if name in masks else ours)
    return copy
