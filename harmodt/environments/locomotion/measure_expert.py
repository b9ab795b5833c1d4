"""Measure the expert of a family of walkers on the family's standard goals.

python -m harmodt.environments.locomotion.measure_expert cheetah-vel
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from rich.table import Table

from ...errors import run_command
from ...progress import PlainConsole
from ...settings import Count, check, parse_arguments
from . import Locomotion, walkers
from .expert import Expert, load_expert
from .simulator import EPISODE_LENGTH


@dataclass(frozen=True)
class MeasureExpertConfig:
    """Measure the expert of a family of walkers on the family's standard goals."""

    family: Annotated[str, tyro.conf.Positional]
    """cheetah-dir, cheetah-vel or ant-dir."""
    episodes: Count = 10
    """Episodes for each goal."""


def expert_returns(family: Locomotion, expert: Expert, episodes: int) -> np.ndarray:
    """Returns of an expert on the family's standard goals, float64 [tasks, episodes]."""
    returns = np.zeros((len(family.task_goals), episodes))
    for number, goal in enumerate(family.task_goals):
        walker = family.make(family.task_of(goal))
        for episode in range(episodes):
            observation = walker.reset(episode)
            for _ in range(EPISODE_LENGTH):
                action = expert(family.walker.features(observation, np.float64(goal)))
                observation, reward, _ = walker.step(action)
                returns[number, episode] += reward
    return returns


def main() -> None:
    config: MeasureExpertConfig = parse_arguments(
        MeasureExpertConfig, prog="python -m harmodt.environments.locomotion.measure_expert"
    )
    check(config)
    family = walkers(config.family)
    returns = expert_returns(family, load_expert(config.family), config.episodes)
    table = Table(title=f"Return of the expert over {config.episodes} episodes", show_footer=True)
    table.add_column("task", "all")
    for heading, of in (("worst", np.min), ("mean", np.mean), ("best", np.max)):
        table.add_column(heading, f"{of(returns):.1f}", justify="right")
    for goal, row in zip(family.task_goals, returns, strict=True):
        table.add_row(
            family.task_of(goal), *(f"{value:.1f}" for value in (row.min(), row.mean(), row.max()))
        )
    PlainConsole().print(table)


if __name__ == "__main__":
    run_command(main)
