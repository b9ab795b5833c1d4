from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from problems import LinearProblem

from harmodt_kernels import (
    PYTORCH,
    REFERENCE,
    Backend,
    BackendUnavailable,
    fused_backend,
    registration,
)
from harmodt_kernels.native import library


def test_importing_touches_neither_triton_nor_a_gpu() -> None:
    program = (
        "import sys, torch\n"
        "def query(*_): raise AssertionError('a GPU was asked for')\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = query\n"
        "import harmodt_kernels\n"
        "assert 'triton' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_kernels_are_named(device, implementation) -> None:
    name = fused_backend(device).name
    if implementation == "cpu":
        assert name == f"cpu-{library.isa()}"
    else:
        assert name == ("triton" if device.type == "cuda" else "triton-interpreter")
    assert (REFERENCE.name, PYTORCH.name) == ("reference", "pytorch")


def test_what_runs_is_recorded_for_each_operation(device, implementation) -> None:
    backend = fused_backend(device)
    fields = {field.name for field in dataclasses.fields(Backend)}
    assert set(backend.implementations) == fields - {"name", "implementations", "rounds_inside"}
    assert set(backend.implementations.values()) == {backend.name}
    assert set(REFERENCE.implementations.values()) == {"reference"}
    assert set(PYTORCH.implementations.values()) == {"pytorch"}


def test_a_backend_can_be_copied_with_the_model_that_holds_it(backend) -> None:
    assert copy.deepcopy(backend) == backend
    assert hash(backend) == hash(copy.deepcopy(backend))


def products(device: torch.device) -> str:
    """PyTorch's switch for the products of float32 on a device."""
    of = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return of.matmul.fp32_precision


def test_precision_is_that_of_a_context(backend, device) -> None:
    problem = LinearProblem.random(3, 20, 61, 40)
    before = products(device)
    exact, errors = problem.expected(), {}
    names = ["fp32", "bf16"] if backend.name != "triton-interpreter" else ["fp32"]
    for name in names:
        with backend.precision(name, device):
            computed = problem.computed(backend, device, torch.float32)
            assert torch.is_autocast_enabled(device.type) == (
                name == "bf16" and not backend.rounds_inside
            )
        assert products(device) == before and not torch.is_autocast_enabled(device.type)
        errors[name] = {
            key: abs(values.double().cpu().numpy() - exact[key]).max()
            for key, values in computed.items()
        }
    assert max(errors["fp32"].values()) < 1e-4
    if "bf16" in errors:
        for key in ("y", "x", "weight"):
            assert 1e-3 < errors["bf16"][key] < 1.0, key


def test_precision_is_as_before_after_an_error_and_inside_another(backend, device) -> None:
    before = products(device)
    with pytest.raises(KeyError), backend.precision("bf16", device):
        with backend.precision("fp32", device):
            assert products(device) == "ieee"
            assert not torch.is_autocast_enabled(device.type)
        assert torch.is_autocast_enabled(device.type) != (products(device) == "bf16")
        raise KeyError
    assert products(device) == before
    assert not torch.is_autocast_enabled(device.type)


def test_bf16_rounds_the_weights_as_they_are_now() -> None:
    layer, x = torch.nn.Linear(8, 8), torch.ones(1, 8)
    with PYTORCH.precision("bf16", "cpu"):
        before = layer(x)
        with torch.no_grad():
            layer.weight.add_(1.0)
        torch.testing.assert_close(layer(x), before + 8, rtol=0.05, atol=0.05)


def test_a_precision_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="tf32 is a mode of GPUs: use fp32 or bf16 on a cpu"):
        PYTORCH.precision("tf32", "cpu")
    with pytest.raises(ValueError, match="precision 'fp16' is none of fp32, tf32, bf16"):
        PYTORCH.precision("fp16", "cpu")
    before = products(torch.device("cuda"))
    with PYTORCH.precision("tf32", "cuda"):
        assert products(torch.device("cuda")) == "tf32"
    assert products(torch.device("cuda")) == before


@pytest.mark.usefixtures("native")
def test_without_the_library_it_says_how_to_get_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(library, "PATH", tmp_path / "libharmodt.so")
    with pytest.raises(BackendUnavailable, match="install GCC"):
        fused_backend("cpu")
    operands = (torch.zeros(1, 1, 32), torch.zeros(1, 32), None)
    bits = torch.zeros(1, 1, 1, dtype=torch.int32)
    with pytest.raises(BackendUnavailable, match="install GCC"):
        torch.ops.harmodt.masked_linear(
            *operands, bits, None, torch.zeros(1, dtype=torch.int64), False
        )


def test_what_is_missing_on_a_gpu_is_said(monkeypatch) -> None:
    with pytest.raises(BackendUnavailable, match="meta devices"):
        fused_backend("meta")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An old GPU")
    with pytest.raises(BackendUnavailable, match=r"An old GPU has compute capability 7\.5"):
        fused_backend("cuda")
    monkeypatch.setattr(registration.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="need Triton, which is not installed"):
        fused_backend("cuda")
