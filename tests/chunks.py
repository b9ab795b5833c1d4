"""Chunks of episodes as TD-MPC2's data come in, for tests."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

REACH, PUSH, CHEETAH_RUN = 65, 63, 3  # in TD-MPC2's list


def make_fields(tasks: list[int], seed: int = 0) -> dict[str, Any]:
    """The tensors of a chunk with an episode of each task; their returns grow."""
    rng = np.random.default_rng(seed)
    n = len(tasks)
    action, reward = rng.uniform(-1, 1, (n, 101, 6)), np.tile(np.arange(n)[:, None] + seed, 101)
    action[:, 0], reward = np.nan, np.where(np.arange(101), reward, np.nan)
    return {
        "obs": torch.tensor(rng.normal(size=(n, 101, 39)), dtype=torch.float32),
        "action": torch.tensor(action, dtype=torch.float32),
        "reward": torch.tensor(reward, dtype=torch.float32),
        "task": torch.tensor(tasks, dtype=torch.int32)[:, None].repeat(1, 101),
    }


def save(file: Path, fields: Any, version: str = "0.2") -> None:
    """Write what tensordict writes today, or what the classes of its early versions came to."""
    if version == "today":
        from tensordict import TensorDict

        torch.save(TensorDict(fields, batch_size=[len(fields["obs"]), 101], device="cpu"), file)
        return
    name = "tensordict._td" if version == "0.3" else "tensordict.tensordict"
    whole = type("TensorDict", (), {"__module__": name})()
    kind = type("_StringOnlyDict", (dict,), {"__module__": "tensordict.utils"})
    whole._tensordict = fields if version == "0.1" else kind(fields)
    whole._batch_size, whole._device = torch.Size([len(fields), 101]), torch.device("cpu")
    modules = {
        "tensordict": ModuleType("tensordict"),
        name: SimpleNamespace(TensorDict=type(whole)),
        "tensordict.utils": SimpleNamespace(_StringOnlyDict=kind),
    }
    with mock.patch.dict(sys.modules, modules):
        torch.save(whole, file)


def write_source(root: Path, chunks: dict[str, list[int]], version: str = "0.2") -> Path:
    """A folder of chunks: their names, and the tasks of the episodes in each."""
    root.mkdir()
    for seed, (name, tasks) in enumerate(chunks.items()):
        save(root / name, make_fields(tasks, seed), version)
    return root
