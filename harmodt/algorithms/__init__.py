"""The table of algorithms. To add one, write a file in this folder and add a row."""

from __future__ import annotations

import dataclasses
import difflib
from functools import partial
from typing import Any

from .. import settings
from ..config import PRESETS, TrainConfig
from ..errors import UserError
from . import harmodt, mlp, mtbc, mtdiff, mtiql, sequence, soco_dt
from .learner import Algorithm, Learner, Setup, StepResult

__all__ = [
    "ALGORITHMS", "Algorithm", "Learner", "Setup", "StepResult", "config_from_json", "find",
    "preset",
]  # fmt: skip

ALGORITHMS: dict[str, Algorithm] = {
    "harmodt-f": Algorithm(
        harmodt.HarmoDTSettings, partial(harmodt.HarmoDTLearner, importance="fisher")
    ),
    "harmodt-m": Algorithm(
        harmodt.HarmoDTSettings, partial(harmodt.HarmoDTLearner, importance="magnitude")
    ),
    "harmodt-r": Algorithm(harmodt.RandomMaskSettings, harmodt.RandomMaskLearner),
    "soco-dt": Algorithm(soco_dt.SoCoDTSettings, soco_dt.SoCoDTLearner),
    "prompt-dt": Algorithm(sequence.PromptDTSettings, sequence.SequenceLearner),
    "mtdt": Algorithm(sequence.MTDTSettings, sequence.SequenceLearner),
    "mtbc": Algorithm(
        mtbc.MTBCSettings,
        mtbc.MTBCLearner,
        mlp.DEFAULTS,
        unread=("action_dropout", "return_scale", "target_return"),
    ),
    "mtiql": Algorithm(
        mtiql.MTIQLSettings,
        mtiql.MTIQLLearner,
        mlp.DEFAULTS,
        unread=("action_dropout", "target_return"),
    ),
    "mtdiff-p": Algorithm(mtdiff.PromptedMTDiffSettings, mtdiff.MTDiffLearner),
    "mtdiff-p-onehot": Algorithm(mtdiff.MTDiffSettings, mtdiff.MTDiffLearner),
}
"""Every algorithm by its name."""


def find(name: str) -> Algorithm:
    """Return the algorithm with this name.

    Raises:
        UserError: there is no such algorithm.
    """
    if name not in ALGORITHMS:
        nearest = difflib.get_close_matches(name, ALGORITHMS, n=1, cutoff=0)[0]
        raise UserError(
            f"there is no algorithm {name!r}: did you mean {nearest}? The algorithms are "
            f"{', '.join(ALGORITHMS)}"
        )
    return ALGORITHMS[name]


def preset(name: str, algorithm: str) -> TrainConfig:
    """Return a preset's settings for an algorithm. They override the algorithm's defaults.

    Raises:
        UserError: there is no such preset or algorithm.
    """
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: choose from {', '.join(PRESETS)}")
    row = find(algorithm)
    defaults = TrainConfig(algorithm=algorithm, own=row.settings())
    return settings.change(defaults, {**row.defaults, **PRESETS[name]})


def config_from_json(values: Any, where: str) -> TrainConfig:
    """Make the settings of any algorithm from the values that `settings.to_json` returned.

    Args:
        values: the JSON values.
        where: the place that the values come from, for the error.

    Raises:
        UserError: a setting is missing or unknown, has a wrong type, or is out of its bounds.
    """
    values = values if isinstance(values, dict) else {}
    name = values.get("algorithm")
    own = settings.from_json(find(str(name)).settings, values.get("own"), where)
    rest = settings.from_json(TrainConfig, {**values, "own": {}}, where)
    return dataclasses.replace(rest, own=own)
