"""Where the episodes of a run lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from harmodt.data import trajectories
from harmodt.data.store import Episodes, TaskData
from harmodt.data.trajectories import open_trajectories
from harmodt.errors import UserError


def make_episodes(lengths: list[int]) -> Episodes:
    """Episodes of these lengths: seven observed numbers, two of an action."""
    steps = sum(lengths)
    return Episodes(
        observations=np.zeros((steps, 7), np.float32),
        actions=np.zeros((steps, 2), np.float32),
        rewards=np.ones(steps, np.float32),
        returns_to_go=np.arange(steps, 0, -1, dtype=np.float32),
        episode_starts=np.cumsum([0, *lengths]),
        successes=np.ones(len(lengths), np.int8),
    )


@pytest.mark.parametrize(
    ("setting", "device", "free", "copied_to"),
    [
        ("auto", "cpu", 0, None),
        ("same", "cpu", 0, "cpu"),
        ("auto", "cuda", 2.0, "cuda"),
        ("auto", "cuda", 1.99, None),
        ("cpu", "cuda", 100.0, None),
        ("same", "cuda", 1.0, "cuda"),
        ("same", "cuda", 0.99, UserError),
    ],
)
def test_data_are_copied_to_a_gpu_that_has_room_for_them(
    monkeypatch: pytest.MonkeyPatch, setting: Any, device: str, free: float, copied_to: Any
) -> None:
    tasks = [make_episodes([200, 300]) for _ in range(2)]
    data = [TaskData("a", task, task, np.zeros(7), np.ones(7), 0.0, 0.0) for task in tasks]
    size = 4 * 1000 * (7 + 2 + 1)  # ten numbers a step
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (round(free * size), 0))
    opened = []
    monkeypatch.setattr(trajectories, "Trajectories", lambda *given: opened.append(given))
    if copied_to is UserError:
        with pytest.raises(UserError, match=r"the data take .* with --data-device cpu"):
            open_trajectories(setting, data, torch.device(device))
        return
    open_trajectories(setting, data, torch.device(device))
    assert opened == [(tasks, torch.device(copied_to) if copied_to else None)]
