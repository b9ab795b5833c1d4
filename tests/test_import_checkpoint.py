"""A checkpoint of the authors' code becomes a run whose policy acts as their model does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_public_layout as public
import tiny
import torch
from authors_files import CONTEXT, HEADS, LAYERS, PROMPT, make_content

from harmodt import import_checkpoint as command
from harmodt import load_policy
from harmodt.data.store import DataStore
from harmodt.errors import UserError, run_command
from harmodt.import_checkpoint import ImportCheckpointConfig, import_checkpoint
from harmodt.settings import settings
from harmodt.training.run import SavedRun, resume

NAMES = tuple(task.replace("-v3", "-v2") for task in tiny.TASKS)
STEPS = 2 * CONTEXT


@pytest.fixture
def store(tmp_path: Path) -> DataStore:
    return tiny.make_store(tmp_path / "store")


def public_content(layers: int = LAYERS) -> dict[str, Any]:
    sizes = tiny.SPEC.observation_size, tiny.SPEC.action_size
    return make_content(NAMES, *sizes, layers)


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def config_of(tmp_path: Path, file: Path) -> ImportCheckpointConfig:
    return ImportCheckpointConfig(
        file=file,
        data=tmp_path / "store",
        output=tmp_path / "run",
        heads=HEADS,
        context_length=CONTEXT,
        prompt_length=PROMPT,
    )


def masked(content: dict[str, Any], masks: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The weights that their model computes with in a task."""
    return {
        name: (weight if "embed" in name or "predict" in name else weight * masks[name]).numpy()
        for name, weight in content["model"].items()
        if name in masks
    }


class Theirs:
    """Their model in one episode, conditioned on a store as their code is on its data; float64."""

    def __init__(self, weights: dict[str, np.ndarray], store: DataStore, task: str):
        data = store.task(task)
        self.weights = weights
        self.mean = data.observation_mean.astype(np.float64)
        self.deviation = np.maximum(data.observation_std.astype(np.float64), 1e-6)
        best, length = int(np.argmax(data.prompts.returns)), PROMPT
        begin, after = data.prompts.episode_starts[best : best + 2]
        first = begin + max(after - begin - length - 1, 0)
        last = slice(first, first + length)
        self.prompt = [
            data.prompts.returns_to_go[last] / 1000,
            self._normal(data.prompts.observations[last]),
            data.prompts.actions[last].clip(-1, 1),
            np.arange(first, first + length) - begin,
        ]
        self.target = float(data.best_return)
        self.steps: list[tuple[float, np.ndarray, np.ndarray, int]] = []

    def _normal(self, observations: np.ndarray) -> np.ndarray:
        return (observations - self.mean) / self.deviation

    def act(self, observation: np.ndarray) -> np.ndarray:
        """The action after an observation; `record` says which was taken."""
        empty = np.zeros(tiny.SPEC.action_size)
        step = (self.target / 1000, self._normal(observation), empty, len(self.steps))
        self.steps.append(step)
        history = [np.array(part) for part in zip(*self.steps[-CONTEXT:], strict=True)]
        return public.theirs(self.weights, self.prompt, history)[-1]

    def record(self, action: np.ndarray, reward: float) -> None:
        self.steps[-1] = (*self.steps[-1][:2], action, self.steps[-1][3])
        self.target -= reward


def difference(policy: Any, theirs: list[Theirs], task_ids: np.ndarray) -> float:
    """How far the policy's actions are from theirs at most, in episodes of these tasks."""
    rng = np.random.default_rng(0)
    policy.start(task_ids)
    worst, actions = 0.0, []
    for _ in range(STEPS):
        observations = rng.normal(task_ids[:, None], 1, (len(task_ids), 39)).astype(np.float32)
        observations[:, 5] = task_ids  # constant in the data
        chosen, rewards = policy.act(observations), rng.uniform(0, 10, len(task_ids))
        policy.record_rewards(rewards)
        for row, model in enumerate(theirs):
            expected = model.act(observations[row].astype(np.float64))
            model.record(chosen[row], rewards[row])
            worst = max(worst, float(np.abs(chosen[row] - expected).max()))
        actions.append(chosen)
    assert np.stack(actions).std() > 0.1
    return worst


def test_the_run_acts_as_their_model_does(tmp_path: Path, store: DataStore) -> None:
    content = public_content()
    import_checkpoint(config_of(tmp_path, write(tmp_path / "model_iter_7000", content)))
    policy = load_policy(tmp_path / "run", device="cpu")
    assert (policy.tasks, policy.step) == (tiny.TASKS, 7000)
    task_ids = np.array([0, 2, 1, 2])
    theirs = [
        Theirs(masked(content, content["env_masks"][NAMES[t]]), store, tiny.TASKS[t])
        for t in task_ids
    ]
    assert difference(policy, theirs, task_ids) <= 1e-6

    policy.use_voted_mask()
    every = content["env_masks"].values()
    voted = {n: (sum(masks[n] for masks in every) > 1.5).float() for n in next(iter(every))}
    theirs = [Theirs(masked(content, voted), store, tiny.TASKS[t]) for t in task_ids]
    assert difference(policy, theirs, task_ids) <= 1e-6


def test_a_run_says_what_it_is_of_and_can_be_opened_for_training(
    tmp_path: Path, store: DataStore
) -> None:
    content = public_content()
    for name, mask in content["env_masks"][NAMES[1]].items():
        if name.endswith("ln_f.bias"):
            mask.zero_()
    file = write(tmp_path / "weights.pt", content)
    config = replace(config_of(tmp_path, file), step=300, target_return=4500.0)
    import_checkpoint(config)
    saved = SavedRun.open(tmp_path / "run")
    counts = tuple(
        int(sum(mask.sum() for name, mask in masks.items() if "ln_f" in name or ".h." in name))
        for masks in content["env_masks"].values()
    )
    assert saved.directory.read().active_weights == counts
    assert len(set(counts)) > 1
    assert [task.target_return for task in saved.conditioning] == [4500.0] * 3
    for task in saved.conditioning:
        assert task.deviation[5] == np.float32(1e-6)  # of what is constant in the data
    assert saved.config.run.output == tmp_path / "run"
    assert saved.config.data.data == store.path
    assert resume(saved, saved.config).step == 300
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "conditioning.safetensors", "checkpoints"}


def test_tasks_are_those_of_the_masks_or_named_in_their_order(
    tmp_path: Path, store: DataStore
) -> None:
    content = public_content()
    content["env_masks"] = dict(zip("abc", content["env_masks"].values(), strict=True))
    config = config_of(tmp_path, write(tmp_path / "model_iter_5", content))
    with pytest.raises(UserError, match="no task 'a"):
        import_checkpoint(config)
    assert not config.output.exists()
    names = ("push", "drawer-open", "reach-v2")
    import_checkpoint(replace(config, tasks=names))
    policy = load_policy(config.output, device="cpu")
    assert policy.tasks == ("push-v3", "drawer-open-v3", "reach-v3")
    masks = list(content["env_masks"].values())
    theirs = [Theirs(masked(content, masks[t]), store, policy.tasks[t]) for t in range(3)]
    assert difference_of(policy, theirs) <= 1e-6


def difference_of(policy: Any, theirs: list[Theirs]) -> float:
    """Of all tasks, whose observations' centers are in another order than their ids."""
    centers = [float(model.mean[5]) for model in theirs]
    rng = np.random.default_rng(1)
    policy.start(np.arange(len(theirs)))
    observations = rng.normal(size=(len(theirs), 39)).astype(np.float32)
    observations[:, 5] = centers
    expected = [m.act(o.astype(np.float64)) for m, o in zip(theirs, observations, strict=True)]
    return float(np.abs(policy.act(observations) - np.stack(expected)).max())


def test_the_command_says_what_it_left_out(
    tmp_path: Path,
    store: DataStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(tmp_path / "model_iter_12", public_content())
    flags = ["--heads", "4", "--context-length", "5", "--prompt-length", "2"]
    arguments = [file, "--data", store.path, "--output", tmp_path / "run", *flags]
    monkeypatch.setattr(sys, "argv", ["import_checkpoint", *map(str, arguments)])
    run_command(command.main)
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "left out, because a policy does not use them: predict_state.weight, predict_r" in printed
    )
    assert "3 tasks written to" in printed
    assert load_policy(tmp_path / "run", device="cpu").step == 12
    with pytest.raises(SystemExit):
        run_command(command.main)
    assert "run is not empty" in capsys.readouterr().err


def test_what_fails_on_the_way_leaves_nothing(
    tmp_path: Path, store: DataStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, write(tmp_path / "model_iter_5", public_content()))

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(command, "save_checkpoint", fail)
        import_checkpoint(config)
    assert not config.output.exists()
    import_checkpoint(config)


@pytest.mark.parametrize("moves", range(5))
def test_a_kill_on_the_way_costs_nothing(
    tmp_path: Path, store: DataStore, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """As the checkpoint was made, or the parts of the run moved to where they belong."""
    config = config_of(tmp_path, write(tmp_path / "model_iter_5", public_content()))
    left = iter(range(moves))

    class Kill(BaseException):
        pass

    def move(*paths: Path) -> None:
        if next(left, None) is None:
            raise Kill
        os.replace(*paths)

    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(command.os, "rename", move)
        patch.setattr(command.shutil, "rmtree", lambda *_, **__: None)
        import_checkpoint(config)
        raise Kill
    if moves < 4:
        import_checkpoint(config)
    else:
        with pytest.raises(UserError, match="run is not empty"):
            import_checkpoint(config)
    names = {path.name for path in config.output.iterdir()}
    assert names == {"run.json", "conditioning.safetensors", "checkpoints"}
    assert load_policy(config.output, device="cpu").step == 5


def test_one_flipped_bit_is_damage(tmp_path: Path, store: DataStore) -> None:
    weight = public_content()["model"]["embed_ln.bias"].numpy().tobytes()
    file = write(tmp_path / "model_iter_5", public_content())
    content = bytearray(file.read_bytes())
    content[content.index(weight)] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="model_iter_5 is damaged"):
        import_checkpoint(config_of(tmp_path, file))


class Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def _weights(changes: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content | {"model": content["model"] | changes}


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: (
        content | {"model": {n: w for n, w in content["model"].items() if n != name}}
    )


def _mask(name: str, value: object) -> Callable[[dict[str, Any]], Any]:
    def change(content: dict[str, Any]) -> Any:
        content["env_masks"][NAMES[1]][name] = value
        return content

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content["model"], "has no 'model' with named entries"),
        (lambda content: [content], "has no 'model' with named entries"),
        (lambda content: {"model": content["model"]}, "has no 'env_masks' with named entries"),
        (lambda content: content | {"env_masks": {}}, "has no 'env_masks' with named entries"),
        (lambda content: content | {"env_masks": {"a": 1}}, "has no 'a' with named entries"),
        (lambda content: content | {"optimizer": Command()}, "runs no code from a file"),
        (_weights({"reach-v2_embed_state.weight": torch.zeros(1)}), "--special_embedding"),
        (_weights({"adapter.weight": torch.zeros(1)}), "has the weight 'adapter.weight'"),
        (_without("embed_timestep.weight"), "no tensor 'embed_timestep.weight'"),
        (_without("transformer.h.1.ln_2.bias"), "no tensor 'transformer.h.1.ln_2.bias'"),
        (_weights({"embed_return.bias": "text"}), "no tensor 'embed_return.bias'"),
        (_weights({"embed_ln.bias": torch.full((32,), torch.nan)}), "embed_ln.bias has numbers"),
        (
            _weights({"embed_state.weight": torch.zeros(32, 20)}),
            r"state.weight has the shape \[32, 20",
        ),
        (_mask("transformer.ln_f.bias", torch.full((32,), 0.5)), "numbers other than 0 and 1"),
        (_mask("transformer.ln_f.bias", torch.ones(31)), r"ln_f.bias has the shape \[31\] in our"),
        (_mask("transformer.ln_f.bias", None), "no tensor 'transformer.ln_f.bias'"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_nothing_is_written(
    tmp_path: Path,
    store: DataStore,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], Any],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, write(tmp_path / "model_iter_5", change(public_content())))
    with pytest.raises(UserError, match=f"model_iter_5.*{reason}"):
        import_checkpoint(config)
    assert not config.output.exists()
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"file": "missing"}, "missing is not a file"),
        ({"file": "short"}, "short is damaged, or holds objects other than tensors"),
        ({"file": "unnumbered"}, "unnumbered does not end in a number of training steps"),
        ({"data": "missing"}, "there is no store in"),
        ({"tasks": ("reach", "push")}, "masks for 3 tasks, reach-v2, .* 2 tasks are named"),
        ({"tasks": ("reach", "push", "sweep")}, "has no task 'sweep-v3'"),
        ({"heads": 3}, "embed_dim 32 is not a multiple of heads 3"),
        ({"prompt_length": 13}, "no prompt episode of at least 13 steps"),
        ({"output": "taken"}, "taken is not empty"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    tmp_path: Path, store: DataStore, changes: dict[str, Any], reason: str
) -> None:
    file = write(tmp_path / "model_iter_5", public_content())
    (tmp_path / "unnumbered").write_bytes(file.read_bytes())
    (tmp_path / "short").write_bytes(file.read_bytes()[:-100])
    (tmp_path / "taken" / "precious").mkdir(parents=True)
    for name in changes.keys() & {"file", "data", "output"}:
        changes = changes | {name: tmp_path / changes[name]}
    with pytest.raises(UserError, match=reason):
        import_checkpoint(replace(config_of(tmp_path, file), **changes))
    assert not (tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["precious"]


def test_heads_follow_from_the_number_of_blocks_where_the_paper_has_it(
    tmp_path: Path, store: DataStore
) -> None:
    config = config_of(tmp_path, write(tmp_path / "model_iter_5", public_content()))
    import_checkpoint(replace(config, heads=None))
    own = SavedRun.open(config.output).config.own
    assert dict(settings(own))["heads"] == 4  # as Table 3 has with 3 blocks
    file = write(tmp_path / "two_6", public_content(layers=2))
    with pytest.raises(
        UserError, match=r"two_6 has 2 blocks and does not say how many heads .* give --heads"
    ):
        import_checkpoint(replace(config, file=file, heads=None, output=tmp_path / "other"))
