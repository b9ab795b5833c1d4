from __future__ import annotations

import pytest
import torch

from harmodt.devices import find_device, prepare_cpu
from harmodt.errors import UserError


@pytest.mark.parametrize(
    "name",
    ["meta", "hpu", "privateuseone", "mtia", "xla", "vulkan", "mkldnn", "cuda:99", "gpu", ""],
)
@pytest.mark.filterwarnings("ignore:'mkldnn' is no longer used")
def test_a_device_that_cannot_compute_here_is_refused(name):
    with pytest.raises(UserError, match=f"there is no device '{name}': give auto or one of cpu"):
        find_device(name)


def test_the_devices_that_are_there_are_found():
    assert find_device("cpu").type == "cpu"
    assert find_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),  # PyTorch's own choice
        ({"HARMODT_CORES": "7"}, 7),
        ({"HARMODT_CORES": "7", "OMP_NUM_THREADS": "2"}, None),
    ],
)
def test_a_share_of_the_cores_limits_pytorchs_threads(monkeypatch, variables, expected):
    for name in ("HARMODT_CORES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("harmodt.devices.count_cores", lambda: int(variables["HARMODT_CORES"]))
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    prepare_cpu()
    assert chosen == ([] if expected is None else [expected])
