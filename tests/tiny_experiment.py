"""An experiment of seconds on the toy family: `harmodt.reproduce toy --budget toy`."""

from __future__ import annotations

import os
from pathlib import Path

from harmodt.environments import FAMILIES
from harmodt.reproduce.experiments import BUDGETS, EXPERIMENTS, Budget, Column, Experiment, Variant

TOY = Experiment(
    title="two policies on points",
    columns=(Column("Points", "both"),),
    variants=(Variant("Prompt-DT", "prompt-dt"), Variant("HarmoDT-F", "harmodt-f")),
    reference="Prompt-DT",
)
BUDGET = Budget(
    title="a few steps of points on a line",
    preset="quickstart",
    seeds=(0, 1),
    episodes={"near-optimal": 4, "sub-optimal": 2},
    prompt_episodes=1,
    steps=lambda tasks: 8,
    tasks_per_step=2,
    mask_updates=2,
    settings={
        "embed_dim": 32,
        "layers": 1,
        "heads": 2,
        "context_length": 4,
        "prompt_length": 2,
        "batch_per_task": 2,
        "fused": False,
        "log_every": 2,
        "checkpoint_every": 3,
        "evaluation_episodes": 2,
    },
    unseen_episodes=2,
)


def register() -> None:
    """Make family, experiment and budget known here."""
    FAMILIES["toy"] = "toy_family:Toy"
    EXPERIMENTS["toy"], BUDGETS["toy"] = TOY, BUDGET


def children() -> dict[str, str]:
    """The environment of interpreters that know them too."""
    tests = Path(__file__).parent
    path = [str(tests / "children"), str(tests), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
