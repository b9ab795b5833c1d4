from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from harmodt.algorithms import ALGORITHMS, config_from_json, preset
from harmodt.algorithms.sequence import SequenceSettings
from harmodt.config import PRESETS, SIZES, TransformerSettings
from harmodt.errors import UserError
from harmodt.settings import change, check, settings, to_json


def values(name: str, algorithm: str = "harmodt-f") -> dict[str, object]:
    """Every setting of a preset by its name."""
    return dict(settings(preset(name, algorithm)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", PRESETS)
def test_settings_survive_json(algorithm: str, name: str) -> None:
    config = preset(name, algorithm)
    changes = {
        "data": Path("some/store"), "tasks": ("reach-v3", "mt5"), "output": Path("runs/a"),
        "target_return": 12.5, "layers": 2, "sparsity_by_loss": (0.1, 0.3),
    }  # fmt: skip
    for each in (config, change(config, changes)):
        check(each)
        assert config_from_json(json.loads(json.dumps(to_json(each))), "run.json") == each


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("run", "seed"), "0", r"run\.json is damaged \(Expected `int`, got `str`.*seed"),
        (("run", "seed"), -1, "damaged .*>= 0"),
        (("own", "masks", "sparsity"), 1.5, "damaged .*sparsity"),
        (("own", "masks", "harmony_rule"), "mine", "damaged .*harmony_rule"),
        (("own", "masks", "sparsty"), 0.2, r"missing or unknown entries \(masks\.sparsty\)"),
        (("data",), [], "damaged .*data"),
        (("algorithm",), "harmodt-x", "no algorithm 'harmodt-x': did you mean harmodt"),
    ],
)
def test_damaged_settings_are_named(path: tuple[str, ...], value: object, message: str) -> None:
    content = json.loads(json.dumps(to_json(preset("quickstart", "harmodt-f"))))
    group = content
    for key in path[:-1]:
        group = group[key]
    group[path[-1]] = value
    with pytest.raises(UserError, match=message):
        config_from_json(content, "run.json")


def test_a_missing_setting_is_named() -> None:
    content = to_json(preset("quickstart", "mtdt"))
    del content["optimisation"]["steps"]
    with pytest.raises(UserError, match=r"missing.*optimisation\.steps"):
        config_from_json(content, "run.json")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_names_of_settings_are_unique(algorithm: str) -> None:
    """On a command line each is a flag."""
    names = Counter(name for name, _ in settings(preset("quickstart", algorithm)))
    assert [name for name, count in names.items() if count > 1] == []


def test_presets_change_settings_that_there_are() -> None:
    known = {name for algorithm in ALGORITHMS for name in values("quickstart", algorithm)}
    for changes in PRESETS.values():
        assert changes.keys() <= known


def test_the_paper_preset_is_table_6() -> None:
    expected = {
        "context_length": 20, "prompt_length": 5, "dropout": 0.1, "steps": 10**6,
        "mask_update_every": 5000, "learning_rate": 1e-4, "sparsity": 0.2, "balance": 10.0,
        "eta_min": 0, "eta_max": 100, "unseen_threshold": 0.5, "harmony_rule": "paper",
        "weight_decay": 1e-4, "gradient_clip": 0.25, "warmup_steps": 10_000, "betas": (0.9, 0.999),
        "adam_epsilon": 1e-8, "action_dropout": 0.0, "window_start_bias": 1.0,
        "return_scale": 1000.0, "evaluation_episodes": 50, "batch_per_task": 8,
        # what the paper is silent about is as in the authors' code
        "initialisation": "pytorch", "embedding_dropout": 0.1, "prompt_position": "end",
    }  # fmt: skip
    paper = values("paper")
    assert {name: paper[name] for name in expected} == expected
    assert SIZES[paper["size"]][0] == 128
    assert SIZES[values("paper-256")["size"]][0] == 256
    assert values("paper-256") | {"size": "1.47M"} == paper


def test_the_quickstart_alone_is_fused_by_default() -> None:
    assert [name for name in PRESETS if values(name)["fused"]] == ["quickstart"]


def test_the_quickstart_updates_its_masks_at_least_five_times() -> None:
    quickstart = values("quickstart")
    assert (quickstart["steps"] - 1) // quickstart["mask_update_every"] >= 5


@pytest.mark.parametrize("size", SIZES)
def test_sizes_give_the_models_shape(size: str) -> None:
    model = TransformerSettings(size=size)
    assert model.shape == SIZES[size]
    check(model)


def test_parts_of_a_size_can_be_replaced() -> None:
    assert TransformerSettings(embed_dim=64, layers=2, heads=4).shape == (64, 2, 4)
    assert TransformerSettings(layers=2).shape == (128, 2, 8)


def test_mtdt_has_a_task_embedding_in_place_of_the_prompt() -> None:
    own = preset("quickstart", "mtdt").own
    assert isinstance(own, SequenceSettings)
    assert (own.prompts(), own.task_embedding_dim) == (None, 16)
    own = preset("quickstart", "prompt-dt").own
    assert (own.prompts().prompt_length, own.task_embedding_dim) == (5, 0)
    check(change(own, {"task_embedding_dim": 16}))  # beside the prompt


@pytest.mark.parametrize(
    ("algorithm", "masked", "updates", "prompted"),
    [
        ("harmodt-f", True, True, True),
        ("harmodt-m", True, True, True),
        ("harmodt-r", True, False, True),
        ("prompt-dt", False, False, True),
        ("mtdt", False, False, False),
    ],
)
def test_an_algorithm_has_its_own_settings(
    algorithm: str, masked: bool, updates: bool, prompted: bool
) -> None:
    names = values("quickstart", algorithm).keys()
    found = ("sparsity" in names, "eta_max" in names, "prompt_length" in names)
    assert found == (masked, updates, prompted)


def test_zero_is_not_above_zero_where_denormal_numbers_are_flushed() -> None:
    config = change(preset("quickstart", "harmodt-f"), {"learning_rate": 0.0})
    try:
        torch.set_flush_denormal(True)
        with pytest.raises(UserError, match=r"learning_rate is 0\.0: give a number above 0"):
            check(config)
        with pytest.raises(UserError, match=r"damaged .*learning_rate"):
            config_from_json(json.loads(json.dumps(to_json(config))), "run.json")
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity is 1.0: give a share in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"unseen_threshold": 1.0}, "unseen_threshold is 1.0"),
        ({"action_dropout": 1.1}, r"action_dropout is 1.1: give a share in \[0, 1\]"),
        ({"final_learning_rate": -0.1}, "final_learning_rate is -0.1"),
        ({"embed_dim": 30, "heads": 4}, "embed_dim 30 is not a multiple of heads 4"),
        ({"eta_min": 5, "eta_max": 4}, "eta_min 5 is above eta_max 4"),
        ({"eta_min": -1}, "eta_min is -1: give 0 or more"),
        ({"prompt_length": 0}, "prompt_length is 0: give 1 to 65536"),
        ({"prompt_length": -1}, "prompt_length is -1"),
        ({"task_embedding_dim": 0}, "task_embedding_dim is 0"),
        ({"task_embedding_dim": -2}, "task_embedding_dim is -2"),
        ({"steps": 0}, "steps is 0: give 1 to 99999999"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0: give a number above 0"),
        ({"betas": (0.9, 1.0)}, r"betas is 1.0: give a share in \[0, 1\)"),
        ({"tasks_per_step": 0}, "tasks_per_step is 0"),
        ({"batch_per_task": 0}, "batch_per_task is 0"),
        ({"context_length": 0}, "context_length is 0"),
        ({"max_timesteps": 0}, "max_timesteps is 0"),
        ({"embed_dim": -8, "heads": 2}, "embed_dim is -8"),
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"layers": -1}, "layers is -1"),
        ({"heads": -2}, "heads is -2"),
        ({"layers": 2**31}, "layers is 2147483648: give 1 to 1000"),
        ({"context_length": 2**31}, "context_length is 2147483648: give 1 to 65536"),
        ({"window_start_bias": 0.0}, "window_start_bias is 0.0"),
        ({"return_scale": 0.0}, "return_scale is 0.0"),
        ({"deviation_floor": 0.0}, "deviation_floor is 0.0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"gradient_clip": 0.0}, "gradient_clip is 0.0"),
        ({"mask_update_every": 0}, "mask_update_every is 0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"log_every": 0}, "log_every is 0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"weight_decay": -1e-3}, "weight_decay is -0.001"),
        ({"balance": float("nan")}, "balance is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"evaluation_episodes": -1}, "evaluation_episodes is -1"),
        ({"target_return": float("nan")}, "target_return is nan: give a finite number"),
        ({"deviation_floor": float("inf")}, "deviation_floor is inf: give a number above 0"),
        ({"steps": 2.5}, "steps is 2.5: give 1 to 99999999"),
        ({"precision": "fp8"}, "precision is fp8: give bf16 or fp32 or tf32 or tf32x3"),
        (
            {"sparsity_by_loss": (0.1, 0.2, 0.3)},
            "sparsity_by_loss is .0.1, 0.2, 0.3.: give 2 values, each a share",
        ),
        ({"tasks": "mt5"}, "tasks is mt5: give several values, each a text"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, object], message: str) -> None:
    algorithm = "mtdt" if "task_embedding_dim" in changes else "harmodt-f"
    config = preset("quickstart", algorithm)
    assert changes.keys() <= dict(settings(config)).keys()
    with pytest.raises(UserError, match=message):
        check(change(config, changes))
