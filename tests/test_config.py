from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from harmodt.config import PRESETS, SIZES, TrainConfig
from harmodt.errors import UserError


def test_settings_survive_json() -> None:
    config = TrainConfig(
        data=Path("some/store"),
        tasks=("reach-v3", "mt5"),
        output=Path("runs/a"),
        algorithm="harmodt-m",
        target_return=12.5,
        layers=2,
    )
    for each in (config, *PRESETS.values()):
        assert TrainConfig.from_json(json.loads(json.dumps(each.to_json()))) == each


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_work(name: str) -> None:
    PRESETS[name].check()


def test_the_paper_preset_is_table_6() -> None:
    paper = PRESETS["paper"]
    assert (paper.context_length, paper.prompt_length, paper.dropout) == (20, 5, 0.1)
    assert (paper.steps, paper.mask_update_every, paper.learning_rate) == (10**6, 5000, 1e-4)
    assert (paper.sparsity, paper.balance, paper.eta_min, paper.eta_max) == (0.2, 10.0, 0, 100)
    assert (paper.unseen_threshold, paper.harmony_rule) == (0.5, "paper")
    assert (paper.weight_decay, paper.gradient_clip, paper.warmup_steps) == (1e-4, 0.25, 10_000)
    assert (paper.action_dropout, paper.window_start_bias) == (0.0, 1.0)
    assert (paper.return_scale, paper.evaluation_episodes, paper.batch_per_task) == (1000.0, 50, 8)
    assert paper.model().embed_dim == 128
    assert PRESETS["paper-256"].model().embed_dim == 256
    assert dataclasses.replace(PRESETS["paper-256"], size="1.47M") == paper


def test_the_quickstart_alone_is_fused_by_default() -> None:
    assert [name for name, preset in PRESETS.items() if preset.fused] == ["quickstart"]


def test_the_quickstart_updates_its_masks_at_least_five_times() -> None:
    quickstart = PRESETS["quickstart"]
    assert (quickstart.steps - 1) // quickstart.mask_update_every >= 5


@pytest.mark.parametrize("size", SIZES)
def test_sizes_give_the_models_shape(size: str) -> None:
    model = TrainConfig(size=size).model()
    assert (model.embed_dim, model.layers, model.heads) == SIZES[size]
    assert model.embed_dim % model.heads == 0


def test_parts_of_a_size_can_be_replaced() -> None:
    model = TrainConfig(size="1.47M", embed_dim=64, layers=2, heads=4, dropout=0.3).model()
    assert (model.embed_dim, model.layers, model.heads, model.dropout) == (64, 2, 4, 0.3)
    assert (model.prompt_length, model.task_embedding_dim) == (5, 0)


def test_mtdt_has_a_task_embedding_in_place_of_the_prompt() -> None:
    model = TrainConfig(algorithm="mtdt").model()
    assert (model.prompt_length, model.task_embedding_dim) == (0, 16)
    TrainConfig(algorithm="mtdt", prompt_length=0).check()


@pytest.mark.parametrize(
    ("algorithm", "masked", "updates"),
    [
        ("harmodt-f", True, True),
        ("harmodt-m", True, True),
        ("harmodt-r", True, False),
        ("prompt-dt", False, False),
        ("mtdt", False, False),
    ],
)
def test_algorithms(algorithm: str, masked: bool, updates: bool) -> None:
    config = TrainConfig(algorithm=algorithm)
    assert (config.masked, config.updates_masks) == (masked, updates)


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
        ({"prompt_length": 0}, "prompt_length is 0, but harmodt-f reads a prompt"),
        ({"prompt_length": -1}, "prompt_length is -1"),
        ({"algorithm": "mtdt", "task_embedding_dim": 0}, "task_embedding_dim is 0"),
        ({"algorithm": "mtdt", "task_embedding_dim": -2}, "task_embedding_dim is -2"),
        ({"steps": 0}, "steps is 0: give a number above 0"),
        ({"tasks_per_step": 0}, "tasks_per_step is 0"),
        ({"batch_per_task": 0}, "batch_per_task is 0"),
        ({"context_length": 0}, "context_length is 0"),
        ({"max_timesteps": 0}, "max_timesteps is 0"),
        ({"embed_dim": -8, "heads": 2}, "embed_dim is -8"),
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"layers": -1}, "layers is -1"),
        ({"heads": -2}, "heads is -2"),
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
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**changes).check()
