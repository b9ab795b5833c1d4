from __future__ import annotations

import errno
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harmodt import collect as collect_module
from harmodt import environments, files
from harmodt.collect import CollectConfig, collect, exploration, main
from harmodt.data.store import UNKNOWN, DataStore
from harmodt.environments.metaworld import MetaWorld
from harmodt.errors import UserError, run_command

OPTIONS = ["--tasks", "reach", "drawer-close", "--episodes", "22", "--prompt-episodes", "3"]
OPTIONS += ["--episode-length", "40", "--seed", "5"]


def _contents(path: Path) -> dict[str, bytes]:
    found = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


def _command(output: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "harmodt.collect", "--output", str(output), *OPTIONS, *options]


def _config(output: Path) -> CollectConfig:
    """The settings of `_command`."""
    tasks = ("reach", "drawer-close")
    return CollectConfig(output, tasks, 22, 3, seed=5, episode_length=40, workers=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection by one worker that nothing disturbed."""
    path = tmp_path_factory.mktemp("collect") / "whole"
    subprocess.run(_command(path, "--workers", "1"), check=True, capture_output=True)
    return path


def test_the_store_holds_what_was_asked_for(whole: Path) -> None:
    store = DataStore.open(whole)
    store.verify()
    assert store.tasks == ("reach-v3", "drawer-close-v3")
    assert {file.name for file in whole.iterdir()} == {"manifest.json", *store.tasks}
    for name in store.tasks:
        task = store.task(name)
        assert task.train.lengths.tolist() == [40] * 22
        assert task.prompts.lengths.tolist() == [40] * 3
        assert np.abs(task.train.actions).max() <= 1
        goals = task.train.observations[task.train.episode_starts[:-1], 36:]
        prompt_goals = task.prompts.observations[task.prompts.episode_starts[:-1], 36:]
        assert len(np.unique(np.concatenate([goals, prompt_goals]), axis=0)) == 25
        for episode in task.train.observations.reshape(22, 40, 39):
            np.testing.assert_array_equal(episode[1:, 18:36], episode[:-1, :18])
            assert (episode[:, 36:] == episode[0, 36:]).all()
    actions = store.task("reach-v3").train.actions.reshape(22, 40, 4)
    # The gripper of this expert holds still: what is left of it is the exploration.
    assert actions[:2, :, 3].std() > 0.3
    assert actions[12, :, 3].std() == pytest.approx(0.25 * (1 - 12 / 21), rel=0.4)
    assert actions[-1, :, 3].std() == 0
    assert store.task("reach-v3").prompts.actions[:, 3].std() == 0


def test_the_workers_do_not_change_a_byte_and_the_seed_does(whole: Path, tmp_path: Path) -> None:
    config = _config(tmp_path / "two")
    collect(config, progress=False)
    assert _contents(tmp_path / "two") == _contents(whole)
    other = replace(config, output=tmp_path / "other", tasks=("reach",), episodes=1, seed=6)
    observations = collect(other, progress=False).task("reach-v3").train.observations
    first = DataStore.open(whole).task("reach-v3").train.observations[:40]
    assert not np.array_equal(observations, first)


def test_exploration_falls_as_in_a_replay_buffer() -> None:
    near = CollectConfig(Path(), episodes=101)
    assert exploration(near, 0, 101) == (0.25, 0.8)
    assert exploration(near, 25, 101) == pytest.approx((0.1875, 0.4))
    assert exploration(near, 50, 101) == pytest.approx((0.125, 0.0))
    assert exploration(near, 75, 101) == pytest.approx((0.0625, 0.0))
    assert exploration(near, 100, 101) == (0.0, 0.0)
    assert exploration(near, 0, 1) == (0.25, 0.8)


def test_actions_are_the_experts_with_what_the_episodes_key_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every action of every episode, computed again from seed, task, kind and number."""
    monkeypatch.setitem(environments.FAMILIES, "toy", "toy_family:Toy")
    train, prompts, steps = 6, 3, 7
    path = tmp_path / "toy"
    config = CollectConfig(path, ("both",), train, prompts, "sub-optimal", seed=5, family="toy")
    store = collect(config, progress=False)
    for task, expert in (("slow", 0.5), ("quick", 1.0)):
        for is_prompt, count in ((False, train), (True, prompts)):
            episodes = store.task(task).prompts if is_prompt else store.task(task).train
            for number, actions in enumerate(episodes.actions.reshape(count, steps, 2)):
                key = [5, zlib.crc32(task.encode()), int(is_prompt), number]
                draws = np.random.default_rng(key)
                draws.integers(2**31)  # where the episode begins
                noise = draws.standard_normal((steps, 2))
                coins, uniform = draws.random(steps), draws.uniform(-1, 1, (steps, 2))
                done = number / (2 * count - 1)
                chosen = np.where((coins < 0.8 * (1 - 2 * done))[:, None], uniform, [expert, 0])
                expected = np.clip(chosen + 0.25 * (1 - done) * noise, -1, 1)
                np.testing.assert_allclose(actions, expected, rtol=1e-6, atol=1e-7)


def test_sub_optimal_data_are_the_first_half_of_near_optimal_data(tmp_path: Path) -> None:
    near = CollectConfig(
        tmp_path / "near", ("reach",), 6, 0, episode_length=20, random_end=0.9, workers=1
    )
    sub = replace(near, output=tmp_path / "sub", episodes=3, composition="sub-optimal")
    whole, half = (collect(c, progress=False).task("reach-v3").train for c in (near, sub))
    np.testing.assert_array_equal(whole.actions[:60], half.actions)
    np.testing.assert_array_equal(whole.observations[:60], half.observations)


def test_sub_optimal_prompts_are_explored_like_sub_optimal_data(tmp_path: Path) -> None:
    config = CollectConfig(tmp_path / "sub", ("reach",), 2, 3, "sub-optimal", episode_length=30)
    prompts = collect(config, progress=False).task("reach-v3").prompts
    # The gripper of this expert holds still: what is left of it is the exploration.
    gripper = prompts.actions.reshape(3, 30, 4)[:, :, 3]
    # Prompt 2 of 3 is episode 2 of a schedule of 6: 60 % of the noise, and a fifth of 80 % random.
    # A uniform number in [-1, 1] has the variance 1/3.
    for prompt, noise, share in ((0, 0.25, 0.8), (2, 0.15, 0.16)):
        expected = np.hypot(noise, (share / 3) ** 0.5)
        assert gripper[prompt].std() == pytest.approx(expected, rel=0.35)

    expert = replace(config, output=tmp_path / "expert", prompt_source="expert")
    explored, plain = (DataStore.open(config.output), collect(expert, progress=False))
    assert plain.task("reach-v3").prompts.actions[:, 3].std() == 0
    train = [store.task("reach-v3").train.actions for store in (explored, plain)]
    np.testing.assert_array_equal(*train)


def test_prompts_of_near_optimal_data_are_the_experts_unless_this_is_asked(tmp_path: Path) -> None:
    config = CollectConfig(tmp_path / "near", ("reach",), 1, 2, episode_length=10, workers=1)
    store = collect(config, progress=False)
    assert store.provenance["collect"]["prompt_source"] == "expert"
    assert store.task("reach-v3").prompts.actions[:, 3].std() == 0
    asked = replace(config, output=tmp_path / "asked", prompt_source="composition")
    explored = collect(asked, progress=False).task("reach-v3").prompts.actions.reshape(2, 10, 4)
    assert explored[0, :, 3].std() > 0.2 and explored[1, :, 3].std() == 0  # of a schedule of two


def test_the_store_says_what_it_was_recorded_in(whole: Path) -> None:
    assert DataStore.open(whole).environment == MetaWorld.spec


def test_another_family_is_collected_without_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(environments.FAMILIES, "toy", "toy_family:Toy")
    config = CollectConfig(
        tmp_path / "toy", ("both",), 3, 1, noise_start=0, random_start=0, family="toy"
    )
    store = collect(config, progress=False)
    store.verify()
    assert store.tasks == ("slow", "quick")
    assert store.environment.to_json() == {
        "family": "toy",
        "observation_size": 3,
        "action_size": 2,
        "episode_length": 7,
        "success": False,
        "reward_version": None,
    }
    for name, way in (("slow", 0.25), ("quick", 2.0)):
        train = store.task(name).train
        assert train.observations.shape == (21, 3) and train.actions.shape == (21, 2)
        assert train.returns.tolist() == [7 * way] * 3
        assert train.successes.tolist() == [UNKNOWN] * 3
        assert store.task(name).prompts.successes.tolist() == [UNKNOWN]


def test_a_family_without_an_expert_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(environments.FAMILIES, "mute", "toy_family:Mute")
    with pytest.raises(UserError, match="no expert for slow"):
        collect(CollectConfig(tmp_path / "x", ("slow",), family="mute"), progress=False)
    assert not (tmp_path / "x").exists()


SCRIPT = """
from pathlib import Path
import harmodt.train
from harmodt import environments
from harmodt.collect import CollectConfig, collect
with open("ran", "a") as file:
    file.write("once")
environments.FAMILIES["toy"] = "toy_family:FAMILY"
def main():
    config = CollectConfig(Path("store"), ("both",), 12, 1, family="toy", workers=2)
    store = collect(config, progress=False)
    store.verify()
    print(*store.tasks)
"""


def run_script(folder: Path, words: list[str], family: str, ending: str) -> tuple[str, str]:
    """Run SCRIPT with its family and ending from a file or from standard input; what it prints."""
    script = SCRIPT.replace("FAMILY", family) + ending
    (folder / "script.py").write_text(script)
    result = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        input=script,
        capture_output=True,
        text=True,
    )
    return result.stdout, result.stderr


@pytest.mark.parametrize("words", [["script.py"], ["-"]], ids=["no main guard", "standard input"])
def test_a_script_collects_and_its_workers_do_not_run_it(tmp_path: Path, words: list[str]) -> None:
    assert run_script(tmp_path, words, "Toy", "main()\n") == ("slow quick\n", "")
    assert (tmp_path / "ran").read_text() == "once"


def test_a_worker_imports_neither_pytorch_nor_the_callers_main_module(tmp_path: Path) -> None:
    """The script has a main guard, and imports PyTorch with `harmodt.train`."""
    ending = """
if __name__ == "__main__":
    import sys
    from harmodt.errors import UserError
    assert "torch" in sys.modules
    try:
        main()
    except UserError as modules_of_worker:
        print(modules_of_worker)
"""
    printed, errors = run_script(tmp_path, ["script.py"], "Modules", ending)
    modules = {*printed.split()}
    assert not errors and {"harmodt.collect", "toy_family"} <= modules
    assert not modules & {"torch", "harmodt.train"}
    assert (tmp_path / "ran").read_text() == "once"


def test_a_killed_worker_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(environments.FAMILIES, "killed", "toy_family:Killed")
    with pytest.raises(UserError) as death:
        collect(CollectConfig(tmp_path / "x", ("slow",), family="killed"), progress=False)
    assert str(death.value) == (
        "a worker was killed by signal 9: if the machine ran out of memory, use fewer --workers; "
        "else give the same command again"
    )


def test_a_finished_store_is_opened_as_it_is(whole: Path) -> None:
    times = {file: file.stat().st_mtime_ns for file in whole.rglob("*")}
    subprocess.run(_command(whole), check=True, capture_output=True)
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*")} == times
    result = subprocess.run(_command(whole, "--seed", "6"), capture_output=True, text=True)
    assert result.returncode == 2
    assert "already holds a store with seed = 5 instead of 6" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tasks": ("reech",)}, "no task 'reech': did you mean 'reach-v3'"),
        ({"episodes": 0}, "episodes is 0"),
        ({"prompt_episodes": -1}, "prompt_episodes is -1"),
        ({"episode_length": 501}, "episode_length is 501"),
        ({"seed": -1}, "seed is -1"),
        ({"noise_start": float("nan")}, "noise_start is nan"),
        ({"random_start": 1.5}, "random_start is 1.5"),
        ({"random_end": 0.0}, "random_end is 0.0"),
        ({"workers": 0}, "workers is 0"),
        ({"family": "atari"}, "no environment family 'atari'"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        collect(replace(CollectConfig(tmp_path / "x"), **changes))  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_a_full_disk_is_reported_and_the_collection_goes_on_later(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["collect", *_command(tmp_path / "full")[3:]])

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        # The workers write all the parts; the parent cannot write the first task.
        patch.setattr(files.os, "rename", fail)
        with pytest.raises(SystemExit) as stop:
            run_command(main)
    assert stop.value.code == 2
    with pytest.raises(ChildProcessError):  # no worker is left
        os.waitpid(-1, os.WNOHANG)
    assert "error: the disk is full" in capsys.readouterr().err
    with pytest.raises(UserError, match="unfinished"):
        DataStore.open(tmp_path / "full")
    run_command(main)
    assert _contents(tmp_path / "full") == _contents(whole)


def test_a_part_that_is_not_whole_or_is_another_is_no_part(tmp_path: Path) -> None:
    config = replace(_config(tmp_path), episode_length=2)
    part, other = collect_module._parts(config, "reach-v3")[:2]
    for each in (part, other):
        each.path(tmp_path).parent.mkdir(parents=True, exist_ok=True)
        collect_module._collect_part(config, MetaWorld(), each)
    content = part.path(tmp_path).read_bytes()
    assert collect_module._read_part(config, part) is not None
    for damaged in (b"", content[:-1], content[:400] + b"?" + content[401:], b"[" + content):
        part.path(tmp_path).write_bytes(damaged)
        assert collect_module._read_part(config, part) is None
    part.path(tmp_path).write_bytes(other.path(tmp_path).read_bytes())
    assert collect_module._read_part(config, part) is None


def test_an_episode_that_ends_early_is_cut_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(environments.FAMILIES, "falling", "toy_family:Falling")
    config = CollectConfig(
        tmp_path / "x", ("both",), 12, 1, noise_start=0, random_start=0, family="falling"
    )
    store = collect(config, progress=False)
    store.verify()
    slow, quick = (store.task(name).train for name in ("slow", "quick"))
    # Each begins at 0 to 3 and moves by 0.25 or by 2 a step, until it is beyond 3 or after 7 steps.
    for train, way in ((slow, 0.25), (quick, 2.0)):
        begins = train.observations[train.episode_starts[:-1], 0]
        expected = np.minimum(7, np.floor((3 - begins) / way) + 1)
        assert train.lengths.tolist() == expected.tolist()
        np.testing.assert_array_equal(train.returns, expected * way)
        # A point beyond 3 has fallen, if only with its last step; others were cut by the clock.
        fell = begins + expected * way > 3
        assert train.terminated.tolist() == fell.tolist()
    assert len(set(slow.lengths)) > 1 and quick.lengths.max() < 7
    config = replace(config, output=tmp_path / "y", tasks=("slow",), episode_length=5)
    slow = collect(config, progress=False).task("slow").train
    begins = slow.observations[slow.episode_starts[:-1], 0]
    assert 2 in begins  # it falls with the fifth step, which is the last one
    assert slow.terminated.tolist() == (begins >= 2).tolist()


def test_the_family_is_that_of_the_tasks(tmp_path: Path) -> None:
    config = CollectConfig(tmp_path / "x", ("cheetah-vel-unseen",), 1, 1)
    store = collect(config, progress=False)
    assert store.environment.family == "cheetah-vel" and len(store.tasks) == 5
    assert store.provenance["collect"]["family"] == "cheetah-vel"
    with pytest.raises(UserError, match="there is no task 'cheetah-vel-x'"):
        collect(CollectConfig(tmp_path / "y", ("cheetah-vel", "cheetah-vel-x")), progress=False)
