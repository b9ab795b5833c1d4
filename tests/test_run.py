"""Runs that are begun and taken up again: elsewhere, on parts of a store, and of other versions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from runs import begin, cut, final
from tiny import TASKS, make_store

from harmodt import devices, sealed, train
from harmodt.data.store import DataStore
from harmodt.errors import UserError
from harmodt.report.runs import read_runs
from harmodt.report.tables import all_settings
from harmodt.rundir import Part, RunDirectory
from harmodt_kernels import PYTORCH
from harmodt_kernels.native import library


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture
def run(store: DataStore, tmp_path: Path) -> RunDirectory:
    """A run that stands at step 8 of 12."""
    begin(store, tmp_path / "run")
    return RunDirectory(cut(tmp_path / "run", 8))


def resume(run: RunDirectory, *more: str) -> None:
    train.main(["--resume", str(run.path), *more])


def parts(run: RunDirectory) -> list[tuple[int, str, str]]:
    return [(part.step, part.device, part.backend) for part in run.read().parts]


def rewrite(run: RunDirectory, **values: object) -> None:
    """Write other values into run.json, and take out what is None."""
    content = json.loads(run.description.read_text()) | values
    content.pop("crc32", None)
    sealed.write(run.description, {k: v for k, v in content.items() if v is not None})


def on(step: int, device: str, backend: str) -> dict[str, object]:
    versions = {"python": "3.12.1", "torch": "2.0"}
    return dataclasses.asdict(Part(step, device, backend, versions))


# Where a run computes


def test_a_run_on_one_machine_has_one_part(store: DataStore, run: RunDirectory) -> None:
    content = run.description.read_bytes()
    resume(run)
    assert run.description.read_bytes() == content
    assert parts(run) == [(0, "cpu", "pytorch")]


def test_a_run_of_a_gpu_says_that_it_goes_on_on_a_cpu(run: RunDirectory, capsys) -> None:
    config = run.read().config
    config["run"]["device"] = "auto"
    rewrite(run, parts=[on(0, "cuda", "triton")], config=config)
    resume(run)
    versions = run.read().parts[1].versions
    line = "here on the run computes with device cpu in place of cuda, kernels pytorch in place of"
    out = capsys.readouterr().out
    assert line in out and f"torch {versions['torch']} in place of 2.0" in out
    assert parts(run) == [(0, "cuda", "triton"), (8, "cpu", "pytorch")]
    resume(run)
    assert parts(run) == [(0, "cuda", "triton"), (8, "cpu", "pytorch")]
    rewrite(run, parts=[on(0, "cuda", "triton")])
    resume(run)  # nothing is left to compute
    assert parts(run) == [(0, "cuda", "triton")]
    assert line not in capsys.readouterr().out


@pytest.mark.usefixtures("native")
def test_what_a_run_computes_on_may_change(run: RunDirectory, capsys) -> None:
    name = f"cpu-{library.isa()}"
    resume(run, "--fused", "--no-graph", "--device", "auto", "--mask-update-gb", "0")
    assert f"kernels {name} in place of pytorch: rounding" in capsys.readouterr().out
    assert parts(run) == [(0, "cpu", "pytorch"), (8, "cpu", name)]
    description = run.read()
    changed = {change["setting"]: (change["step"], change["to"]) for change in description.changes}
    assert changed == {
        "device": (8, "auto"),
        "fused": (8, True),
        "graph": (8, False),
        "mask_update_gb": (8, 0.0),
    }
    assert description.config["run"]["fused"] is True
    assert torch.isfinite(final(run.path)["model.action_head.weight"]).all()


@pytest.mark.usefixtures("native")
def test_without_built_kernels_the_advice_works_as_typed(
    store: DataStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(store, tmp_path / "run", "--fused")
    run = RunDirectory(cut(tmp_path / "run", 8))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(library, "PATH", tmp_path / "libharmodt.so")
    with pytest.raises(UserError, match=r"CPU kernels were not built.*--no-fused selects plain"):
        resume(run)
    assert len(parts(run)) == 1
    resume(run, "--no-fused")
    assert parts(run)[1:] == [(8, "cpu", "pytorch")]


def test_another_instruction_set_is_recorded(
    store: DataStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    kernels = [dataclasses.replace(PYTORCH, name=name) for name in ("cpu-one", "cpu-other")]
    monkeypatch.setattr(devices, "fused_backend", lambda device: kernels[0])
    begin(store, tmp_path / "run", "--fused", "--no-graph", "--dropout", "0")
    run = RunDirectory(cut(tmp_path / "run", 4))
    monkeypatch.setattr(devices, "fused_backend", lambda device: kernels[1])
    resume(run)
    assert "kernels cpu-other in place of cpu-one" in capsys.readouterr().out
    assert parts(run) == [(0, "cpu", "cpu-one"), (4, "cpu", "cpu-other")]


def test_steps_that_are_done_again_belong_to_where_they_are_done_again(run: RunDirectory) -> None:
    first = dataclasses.asdict(run.read().parts[0])
    rewrite(run, parts=[first, on(8, "cuda", "triton")])
    resume(run)
    assert parts(run) == [(0, "cpu", "pytorch")]
    rewrite(run, parts=[on(0, "cuda", "triton")])
    cut(run.path, 0)
    resume(run)
    assert parts(run) == [(0, "cpu", "pytorch")]


def test_a_run_of_an_earlier_version_has_the_part_that_it_names(run: RunDirectory) -> None:
    versions = {"python": "3.12.1", "torch": "2.0"}
    rewrite(run, parts=None, device="cuda", backend="triton", versions=versions)
    assert run.read().parts == (Part(0, "cuda", "triton", versions),)
    resume(run)
    assert parts(run) == [(0, "cuda", "triton"), (8, "cpu", "pytorch")]


def test_a_report_shows_where_each_part_ran(run: RunDirectory) -> None:
    rewrite(run, parts=[on(0, "cuda", "triton"), on(8, "cpu", "triton")])
    table, _ = all_settings(read_runs([run.path]))
    assert "<td>cuda, cpu after step 8</td>" in table
    assert "<td>triton</td>" in table and "<td>2.0</td>" in table


def test_a_precision_that_only_gpus_have_can_be_left_on_a_cpu(run: RunDirectory) -> None:
    config = run.read().config
    config["run"]["precision"] = "tf32"
    rewrite(run, config=config)
    with pytest.raises(UserError, match="tf32 is a mode of GPUs: use fp32 or bf16 on a CPU"):
        resume(run)
    resume(run, "--precision", "fp32")
    (change,) = run.read().changes
    assert change == {"step": 8, "setting": "precision", "from": "tf32", "to": "fp32"}


# Data


def damage(store: Path, task: str) -> None:
    path = store / task / "rewards.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_only_the_tasks_that_are_trained_on_are_read(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    damage(store.path, TASKS[1])
    tasks = ("--tasks", TASKS[0], TASKS[2])
    begin(store, tmp_path / "run", *tasks)
    run = RunDirectory(cut(tmp_path / "run", 8))
    resume(run)
    damage(store.path, TASKS[2])
    with pytest.raises(UserError, match=f"{TASKS[2]}/rewards.npy is damaged .its checksum fails"):
        resume(run)
    with pytest.raises(UserError, match=f"{TASKS[2]}/rewards.npy is damaged .its checksum fails"):
        begin(store, tmp_path / "other", *tasks)
    assert not (tmp_path / "other").exists()
