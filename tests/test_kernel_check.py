"""The check of new kernels at the start of a run, by kernels that are right and broken ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same, begin, cut
from tiny import configure, make_setup, make_store
from torch import Tensor

from harmodt import devices, train
from harmodt.data.store import DataStore
from harmodt.errors import UserError
from harmodt.training import kernel_check
from harmodt.training.kernel_check import check_kernels, check_new_kernels, has_new_kernels
from harmodt_kernels import PYTORCH, Backend


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("data") / "store")


def check(store: DataStore, backend: Backend | None = None, **settings: Any) -> None:
    setup = make_setup(store, configure(**settings), backend=backend)
    check_kernels(setup, [store.task(name) for name in store.tasks])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_kernels_of_a_cpu_pass(store: DataStore, precision: str) -> None:
    check(store, fused=True, precision=precision, dropout=0.1, embedding_dropout=0.1)


def wrong_output(*operands: Any, **options: Any) -> Tensor:
    return PYTORCH.masked_linear(*operands, **options) * 1.01


def wrong_gradient(*operands: Any, **options: Any) -> Tensor:
    output = PYTORCH.masked_linear(*operands, **options)
    return output + 0.1 * (output - output.detach())


def no_step(weights: Tensor, *operands: Any, **options: Any) -> Tensor:
    before = weights.clone()
    norm = PYTORCH.masked_adamw(weights, *operands, **options)
    weights.copy_(before)
    return norm


BROKEN = {
    "output": ({"masked_linear": wrong_output}, "(loss|gradient norm) of .* in step 1"),
    "gradient": ({"masked_linear": wrong_gradient}, "gradient norm of .* in step 1"),
    "optimiser": ({"masked_adamw": no_step}, "loss of .* in step 2"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernels_are_refused(store: DataStore, name: str) -> None:
    operations, where = BROKEN[name]
    check(store, PYTORCH)
    broken = dataclasses.replace(PYTORCH, name="broken", **operations)
    message = rf"the broken kernels on cpu compute a {where} \(fp32\), where plain.*--no-fused"
    with pytest.raises(UserError, match=message):
        check(store, broken)


def test_a_run_whose_losses_are_nan_either_way_is_not_laid_to_the_kernels(
    store: DataStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = torch.full((6, 3), torch.nan)
    monkeypatch.setattr(kernel_check, "_first_steps", lambda setup, data: results.clone())
    check(store, PYTORCH)


def test_kernels_are_new_on_gpus(store: DataStore) -> None:
    for fused in (False, True):
        setup = make_setup(store, configure(fused=fused), backend=PYTORCH)
        assert not has_new_kernels(setup)
        on_gpu = dataclasses.replace(setup.execution, device=torch.device("cuda:1"))
        assert has_new_kernels(dataclasses.replace(setup, execution=on_gpu)) == fused


@pytest.fixture
def everything_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, for the kernels of a CPU."""
    for module in (kernel_check, train):
        monkeypatch.setattr(module, "has_new_kernels", lambda setup: setup.config.run.fused)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)


def test_the_memory_of_the_check_is_not_counted(
    store: DataStore, monkeypatch: pytest.MonkeyPatch, everything_is_new: None
) -> None:
    done: list[object] = []
    monkeypatch.setattr(kernel_check, "check_kernels", lambda setup, data: done.append("check"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", done.append)
    for fused, expected in ((False, []), (True, ["check", torch.device("cpu")])):
        check_new_kernels(make_setup(store, configure(fused=fused), backend=PYTORCH), [])
        assert done == expected


@pytest.mark.usefixtures("native")
def test_a_run_on_new_kernels_says_so_and_ends_as_without_the_check(
    store: DataStore, tmp_path: Path, capsys, request
) -> None:
    begin(store, tmp_path / "unchecked", "--fused")
    line = "the kernels for GPUs are new: the first steps agreed with plain PyTorch; to compare a"
    assert line not in capsys.readouterr().out
    request.getfixturevalue("everything_is_new")
    begin(store, tmp_path / "checked", "--fused")
    assert line in capsys.readouterr().out
    assert_same(tmp_path / "unchecked", tmp_path / "checked")


def test_a_run_on_broken_kernels_does_not_begin(
    store: DataStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything_is_new: None
) -> None:
    broken = dataclasses.replace(PYTORCH, name="broken", masked_adamw=no_step)
    monkeypatch.setattr(devices, "fused_backend", lambda device: broken)
    with pytest.raises(UserError, match="train with --no-fused, and please report it"):
        begin(store, tmp_path / "run", "--fused")
    assert not (tmp_path / "run").exists()
    begin(store, tmp_path / "run")
    with pytest.raises(UserError, match="train with --no-fused"):  # nor does one go on there
        train.main(["--resume", str(cut(tmp_path / "run", 4)), "--fused"])
    train.main(["--resume", str(tmp_path / "run"), "--no-fused"])
