"""Defines the experiments that can be reproduced, and their budgets.

An experiment has a cell for each of its columns and variants. A cell has a run for each seed. To
add an experiment, add an entry to `EXPERIMENTS`; to add a budget, add one to `BUDGETS`. The paper's
results are in `paper.json`, under the names of experiment, variant and column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..config import SIZES

Composition = Literal["near-optimal", "sub-optimal"]


@dataclass(frozen=True)
class Times:
    """A value that depends on the budget: `factor` times the budget's value of `setting`."""

    factor: float
    setting: str


@dataclass(frozen=True)
class Column:
    """Tasks and data on which the variants are compared.

    Attributes:
        name: the name in tables.
        tasks: the set of tasks that the runs train on.
        composition: the composition of their data.
        settings: settings of every run whose algorithm has them.
        unseen: a set of unseen tasks that is evaluated in place of the training tasks.
    """

    name: str
    tasks: str
    composition: Composition = "near-optimal"
    settings: Mapping[str, Any] = field(default_factory=dict)
    unseen: str | None = None


@dataclass(frozen=True)
class Variant:
    """An algorithm, with its settings, that is compared with others.

    Attributes:
        name: the name in tables; the paper's name if it has one.
        algorithm: the name of the algorithm in `ALGORITHMS`.
        settings: the settings that differ from the budget's: values, or `Times` for a multiple.
        mask: the mask for unseen tasks; None for no mask.
    """

    name: str
    algorithm: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    mask: str | None = None


@dataclass(frozen=True)
class Experiment:
    """A table or figure.

    Attributes:
        title: a title of one line.
        columns: the tasks and data on which the variants are compared.
        variants: the algorithms that are compared.
        reference: the variant that the others are compared with, seed by seed.
        measure: "outcome" for success or return at the end of training, "harmony" for the averaged
            harmony score during training.
    """

    title: str
    columns: tuple[Column, ...]
    variants: tuple[Variant, ...]
    reference: str
    measure: Literal["outcome", "harmony"] = "outcome"


@dataclass(frozen=True)
class Budget:
    """The size of the data and the runs of an experiment.

    Attributes:
        title: a description of one line, which is printed below the table.
        preset: the preset on which the settings are based.
        seeds: the seeds of training.
        episodes: the number of episodes per task in the data, by composition. Sub-optimal data
            have half as many, because they are the first half of the near-optimal data.
        prompt_episodes: the number of prompt episodes per task, which are held out.
        steps: a function that returns the training steps of a run from its number of tasks.
        tasks_per_step: the largest number of tasks in a step.
        mask_updates: the number of mask updates in a run.
        settings: further settings that differ from the preset's, for algorithms that have them.
        unseen_episodes: the number of evaluation episodes per unseen task.
        episode_length: the steps of an episode in the data; None for the environments' length.
        tasks: the number of tasks to use of each set, from its first task on; None for all.
        final_episodes: the number of evaluation episodes per task at the end; None for as many as
            in the evaluations during training.
    """

    title: str
    preset: str
    seeds: tuple[int, ...]
    episodes: Mapping[str, int]
    prompt_episodes: int
    steps: Callable[[int], int]
    tasks_per_step: int
    mask_updates: int
    settings: Mapping[str, Any]
    unseen_episodes: int
    episode_length: int | None = None
    tasks: int | None = None
    final_episodes: int | None = None


BUDGETS: dict[str, Budget] = {
    "smoke": Budget(
        title="two tasks of each set, a tiny model, 8 steps: only tests that the program works",
        preset="quickstart",
        seeds=(0,),
        episodes={"near-optimal": 4, "sub-optimal": 2},
        prompt_episodes=1,
        episode_length=100,
        tasks=2,
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
            "log_every": 4,
            "checkpoint_every": 4,
            "evaluation_episodes": 2,
        },
        unseen_episodes=2,
    ),
    "small": Budget(
        title="the quickstart's recipe, 80 steps per task, at least 800 steps: hours on two cores",
        preset="quickstart",
        seeds=(0, 1),
        episodes={"near-optimal": 60, "sub-optimal": 30},
        prompt_episodes=6,
        steps=lambda tasks: max(800, 80 * tasks),
        tasks_per_step=8,
        mask_updates=8,
        settings={"evaluation_episodes": 20},
        unseen_episodes=20,
    ),
    "cores": Budget(
        title="the paper's settings and steps, on data that two cores collect in two hours",
        preset="paper",
        seeds=(0, 1),
        episodes={"near-optimal": 400, "sub-optimal": 200},
        prompt_episodes=10,
        steps=lambda tasks: 1_000_000,
        tasks_per_step=1,
        mask_updates=200,
        settings={"fused": True, "evaluate_every": 100_000, "evaluation_episodes": 5},
        unseen_episodes=20,
        final_episodes=20,
    ),
    "paper": Budget(
        title="the paper's settings (Table 6), a million steps and as many transitions per task",
        preset="paper",
        seeds=(0, 1, 2),
        episodes={"near-optimal": 2000, "sub-optimal": 1000},
        prompt_episodes=10,
        steps=lambda tasks: 1_000_000,
        tasks_per_step=1,
        mask_updates=200,
        settings={"evaluate_every": 250_000, "evaluation_episodes": 50},
        unseen_episodes=50,
    ),
}
"""Every budget by its name."""


def _sets(*names: str, **settings: Any) -> tuple[Column, ...]:
    """Return a column for each composition of some sets of Meta-World's tasks."""
    compositions: tuple[Composition, ...] = ("near-optimal", "sub-optimal")
    return tuple(
        Column(f"{name.upper()} {composition}", name, composition, settings)
        for name in names
        for composition in compositions
    )


def _walkers(name: str, return_scale: float) -> Column:
    settings = {"return_scale": return_scale, "evaluation_episodes": 0}
    return Column(name, f"{name.lower()}-train", "near-optimal", settings, f"{name.lower()}-unseen")


def _sweep(algorithm: str, setting: str, symbol: str, *values: Any) -> tuple[Variant, ...]:
    """Return a variant for each value of a setting."""
    shown = [f"× {v.factor:g}" if isinstance(v, Times) else f"= {v:g}" for v in values]
    return tuple(
        Variant(f"{symbol} {text}", algorithm, {setting: value})
        for text, value in zip(shown, values, strict=True)
    )


_F = Variant("HarmoDT-F", "harmodt-f")
_M = Variant("HarmoDT-M", "harmodt-m")
_R = Variant("HarmoDT-R", "harmodt-r")
_SOFT = Variant("Soft masks", "soco-dt")
_PROMPT_DT = Variant("Prompt-DT", "prompt-dt")
_MTDT = Variant("MTDT", "mtdt")
_WIDER_MTDT = Variant("MTDT", "mtdt", {"embed_dim": 136})  # 1.49 M parameters; others: 1.47 M
_ETA_MAX = _sweep("harmodt-f", "eta_max", "η_max", 10, 1000, 10_000)
_SPARSITY = _sweep("harmodt-f", "sparsity", "S", 0.1, 0.3, 0.5)
_BALANCE = _sweep("harmodt-f", "balance", "λ", 0.1, 1.0, 100.0)
_INTERVAL = _sweep(
    "harmodt-f", "mask_update_every", "t_m",
    *(Times(factor, "mask_update_every") for factor in (0.25, 4)),
)  # fmt: skip
_SURGERY = tuple(
    Variant(f"{title} + {surgery}", algorithm, {"surgery": surgery.lower()})
    for title, algorithm in (("Prompt-DT", "prompt-dt"), ("HarmoDT-F", "harmodt-f"))
    for surgery in ("PCGrad", "CAGrad", "GradDrop")
)
_INITIALISATION = tuple(
    Variant(f"{title}, {how}", algorithm, {"mask_initialisation": how})
    for title, algorithm in (("HarmoDT-F", "harmodt-f"), ("HarmoDT-R", "harmodt-r"))
    for how in ("uniform", "magnitude")
)
_EMBEDDING = {"task_embedding_dim": 16}
_ONE_MASK = Variant("HarmoDT-R, one mask for all", "harmodt-r", {"shared_mask": True})
# In the paper's Table 3, masks help this size most. Gradient surgery needs several tasks in a step.
_MT10_SMALLEST = _sets("mt10", size="0.48M", tasks_per_step=8)
_LONGER = {"steps": Times(10, "steps")}
# This model is small enough for two cores; the usual model of 5.32 M parameters takes hours.
_SMALL_MTDIFF = Variant(
    "MTDIFF-P, 1.15 M",
    "mtdiff-p",
    {
        **{"embed_dim": 128, "layers": 3, "horizon": 8, "prompt_length": 5, "batch_per_task": 16},
        **{"learning_rate": 1e-3, "sampling_steps": 5, "steps": Times(2.5, "steps")},
    },
)

EXPERIMENTS: dict[str, Experiment] = {
    "table1": Experiment(
        title="all offline methods on MT50",
        columns=_sets("mt50"),
        variants=(
            Variant("MTBC", "mtbc"),
            Variant("MTIQL", "mtiql"),
            Variant("MTDIFF-P", "mtdiff-p"),
            Variant("MTDIFF-P-ONEHOT", "mtdiff-p-onehot"),
            Variant("MTDT, 0.87 M", "mtdt", {"size": "0.87M"}),
            _WIDER_MTDT,
            Variant("Prompt-DT, 0.87 M", "prompt-dt", {"size": "0.87M"}),
            _PROMPT_DT,
            _R,
            _M,
            _F,
        ),
        reference="HarmoDT-F",
    ),
    "table2": Experiment(
        title="5, 30 and 50 tasks, near- and sub-optimal data",
        columns=_sets("mt5", "mt30", "mt50"),
        variants=(Variant("MTDIFF", "mtdiff-p-onehot"), _WIDER_MTDT, _PROMPT_DT, _R, _M, _F),
        reference="HarmoDT-F",
    ),
    "table3": Experiment(
        title="four sizes of the model on 30 and 50 tasks",
        columns=tuple(
            Column(f"{tasks.upper()}, {size[:-1]} M", tasks, settings={"size": size})
            for tasks in ("mt30", "mt50")
            for size in SIZES
            if size != "5.29M"  # only in the paper's Table 6
        ),
        variants=(_MTDT, _PROMPT_DT, _F),
        reference="HarmoDT-F",
    ),
    "table4": Experiment(
        title="unseen tasks of three families of walkers",
        columns=(
            _walkers("Cheetah-dir", 1000.0),
            _walkers("Cheetah-vel", 500.0),
            _walkers("Ant-dir", 500.0),
        ),
        variants=(
            _MTDT,
            _PROMPT_DT,
            Variant("HarmoDT-F", "harmodt-f", mask="voted"),
            Variant("HarmoDT-F, nearest mask", "harmodt-f", mask="nearest"),
        ),
        reference="HarmoDT-F",
    ),
    "figure2a": Experiment(
        title="how far the tasks' gradients agree over training, with and without random masks",
        columns=tuple(
            Column(name.upper(), name, settings={"harmony_every": Times(0.05, "steps")})
            for name in ("mt5", "mt50")
        ),
        variants=(_PROMPT_DT, _R),
        reference="Prompt-DT",
        measure="harmony",
    ),
    "figure2b": Experiment(
        title="random masks of several sparsities on MT50",
        columns=_sets("mt50")[:1],
        variants=(
            _PROMPT_DT,
            *_sweep("harmodt-r", "sparsity", "S", 0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
        ),
        reference="Prompt-DT",
    ),
    "figure4": Experiment(
        title="η_max, t_m, S and λ, one at a time, on MT50",
        columns=_sets("mt50")[:1],
        variants=(_F, *_ETA_MAX, *_INTERVAL, *_SPARSITY, *_BALANCE),
        reference="HarmoDT-F",
    ),
    "figure6": Experiment(
        title="S, η_max and λ, one at a time, on 30 and 50 tasks",
        columns=_sets("mt30", "mt50"),
        variants=(_F, *_SPARSITY, *_ETA_MAX, *_BALANCE),
        reference="HarmoDT-F",
    ),
    "surgery": Experiment(
        title="gradient surgery beside masks, and both together, on 10 and 50 tasks",
        columns=tuple(
            # Surgery needs several tasks in a step; the paper's settings have one.
            Column(f"{name.upper()} near-optimal", name, settings={"tasks_per_step": 8})
            for name in ("mt10", "mt50")
        ),
        variants=(_PROMPT_DT, *_SURGERY[:3], _F, *_SURGERY[3:]),
        reference="Prompt-DT",
    ),
    "initialisation": Experiment(
        title="two kinds of initial masks, and one random mask for all tasks, on MT50",
        columns=_sets("mt50"),
        variants=(
            _F,
            *_INITIALISATION[:2],
            _R,
            *_INITIALISATION[2:],
            _ONE_MASK,
        ),
        reference="HarmoDT-F",
    ),
    "methods": Experiment(
        title="every kind of method on 10 tasks, transformers of the smallest size",
        columns=_MT10_SMALLEST,
        variants=(
            Variant("MTBC", "mtbc"),
            Variant("MTIQL", "mtiql"),
            _SMALL_MTDIFF,
            _MTDT,
            _PROMPT_DT,
            _SURGERY[0],
            _ONE_MASK,
            _R,
            _M,
            _F,
        ),
        reference="HarmoDT-F",
    ),
    "controls": Experiment(
        title="what a mask adds beyond identifying the task, on 10 tasks at the smallest size",
        columns=_MT10_SMALLEST,
        variants=(
            _MTDT,
            _PROMPT_DT,
            Variant("Prompt-DT, embedding", "prompt-dt", _EMBEDDING),
            _ONE_MASK,
            _R,
            *_sweep("harmodt-r", "sparsity", "HarmoDT-R, S", 0.05, 0.5),
            Variant("HarmoDT-R, embedding", "harmodt-r", _EMBEDDING),
            _F,
            Variant("HarmoDT-F, embedding", "harmodt-f", _EMBEDDING),
        ),
        reference="HarmoDT-R",
    ),
    "gradients": Experiment(
        title="gradient surgery of three kinds, and masks, on 10 tasks at the smallest size",
        columns=_MT10_SMALLEST,
        variants=(_PROMPT_DT, *_SURGERY[:3], _R),
        reference="Prompt-DT",
    ),
    "movement": Experiment(
        title="mask updates that move more weights or none, on 10 tasks at the smallest size",
        columns=_MT10_SMALLEST,
        variants=(
            _R,
            _F,
            _INTERVAL[0],
            *_ETA_MAX[1:],
            Variant(
                "η_max = 10000, t_m × 0.25",
                "harmodt-f",
                {"eta_max": 10_000, "mask_update_every": Times(0.25, "mask_update_every")},
            ),
            Variant("HarmoDT-F, one mask at first", "harmodt-f", {"shared_mask": True}),
        ),
        reference="HarmoDT-R",
    ),
    "soft": Experiment(
        title="soft masks, learned hard masks and random masks, on 10 tasks at the smallest size",
        columns=_MT10_SMALLEST,
        variants=(_R, _F, _SOFT),
        reference="HarmoDT-F",
    ),
    "longer": Experiment(
        title="ten times as many steps and mask updates, on 10 tasks at the smallest size",
        columns=_MT10_SMALLEST[1:],
        variants=tuple(
            replace(variant, settings={**variant.settings, **_LONGER})
            for variant in (_PROMPT_DT, _ONE_MASK, _R, _F)
        ),
        reference="HarmoDT-R",
    ),
    "length": Experiment(
        title="as many steps as in the paper, on 50 tasks at the smallest size",
        columns=(
            Column("MT50 sub-optimal, 0.48 M", "mt50", "sub-optimal", {"size": "0.48M"}),
            Column("MT50 near-optimal, 0.48 M", "mt50", settings={"size": "0.48M"}),
        ),
        variants=(_F, _R, _PROMPT_DT, _MTDT),
        reference="HarmoDT-R",
    ),
    "pace": Experiment(
        title="ten times as many mask updates, as in the authors' code, on 50 tasks",
        columns=(Column("MT50 sub-optimal, 0.48 M", "mt50", "sub-optimal", {"size": "0.48M"}),),
        variants=(
            _R,
            _F,
            *_sweep("harmodt-f", "mask_update_every", "t_m", Times(0.1, "mask_update_every")),
        ),
        reference="HarmoDT-R",
    ),
    "fifty": Experiment(
        title="learned masks, random masks and no masks on 50 tasks, in an easy and a hard setting",
        columns=(
            Column("MT50 near-optimal, 1.47 M", "mt50"),
            Column("MT50 sub-optimal, 0.48 M", "mt50", "sub-optimal", {"size": "0.48M"}),
        ),
        variants=(_MTDT, _PROMPT_DT, _R, _F),
        reference="HarmoDT-F",
    ),
}
"""Every experiment by its name."""
