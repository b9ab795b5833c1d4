"""Pickles of episodes as Prompt-DT's data come in, for tests."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

SIZES = {"cheetah_dir": (20, 6), "cheetah_vel": (20, 6), "ant_dir": (27, 8)}
GOALS = {
    "cheetah_dir": [{"direction": 1}, {"direction": -1}],
    "cheetah_vel": [{"velocity": v} for v in np.linspace(0.075, 3, 40)],
    "ant_dir": [{"goal": angle} for angle in np.random.default_rng(5).uniform(0, 6.28, 50)],
}


def make_episode(environment: str, seed: int, length: int = 25) -> dict[str, np.ndarray]:
    """An episode in the public layout, float64."""
    rng, (observation, action) = np.random.default_rng(seed), SIZES[environment]
    return {
        "observations": rng.normal(size=(length, observation)),
        "next_observations": rng.normal(size=(length, observation)),
        "actions": rng.uniform(-1, 1, (length, action)),
        "rewards": rng.normal(seed, 0.1, (length, 1) if seed % 2 else length),
        "terminals": np.zeros(length, bool),
    }


def dump(path: Path, content: object, protocol: int = pickle.DEFAULT_PROTOCOL) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def write_source(
    root: Path,
    environment: str = "cheetah_vel",
    numbers: tuple[int, ...] = (0, 1),
    length: int = 25,
) -> Path:
    """The folders data and config; three episodes and two prompts a task, seeded by its number."""
    for number in numbers:
        seeds = [10 * number + seed for seed in range(5)]
        episodes = [make_episode(environment, seed, length) for seed in seeds]
        data = root / "data" / environment
        dump(data / f"{environment}-{number}-expert.pkl", episodes[:3], number % 6)
        dump(data / f"{environment}-{number}-prompt-expert.pkl", episodes[3:])
        goal = root / "config" / environment / f"config_{environment}_task{number}.pkl"
        dump(goal, [GOALS[environment][number]])
    return root / "data" / environment
