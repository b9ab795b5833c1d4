from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
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
from harmodt_kernels.launch import precision_of
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
    for name in ("tf32", "tf32x3"):
        with pytest.raises(ValueError, match=f"{name} is a mode of GPUs: use fp32 or bf16 on a c"):
            PYTORCH.precision(name, "cpu")
    with pytest.raises(ValueError, match="precision 'fp16' is none of fp32, tf32x3, tf32, bf16"):
        PYTORCH.precision("fp16", "cpu")
    before = products(torch.device("cuda"))
    with PYTORCH.precision("tf32", "cuda"):
        assert products(torch.device("cuda")) == "tf32"
    assert products(torch.device("cuda")) == before


@pytest.mark.parametrize(
    ("name", "where"),
    [("fp32", "cpu"), ("fp32", "cuda"), ("tf32", "cuda"), ("tf32x3", "cuda"), ("bf16", "cpu")],
)
def test_pytorchs_older_switch_can_be_read(name, where) -> None:
    """torch.compile reads it; PyTorch raises if the newer switches say something else."""
    newer = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    backend = dataclasses.replace(PYTORCH, rounds_inside=True)
    for usual in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(usual)
        before = [switch.fp32_precision for switch in newer]
        with pytest.raises(KeyError), backend.precision(name, where):
            assert torch.get_float32_matmul_precision() in ("highest", "high", "medium")
            assert torch.backends.cuda.matmul.allow_tf32 in (False, True)
            found = newer[where == "cpu"].fp32_precision
            assert found == (name if name in ("tf32", "bf16") else "ieee")
            raise KeyError
        assert torch.get_float32_matmul_precision() == usual
        assert [switch.fp32_precision for switch in newer] == before
    torch.set_float32_matmul_precision("highest")
    for switch in newer:
        switch.fp32_precision = "none"


def test_float32_is_multiplied_as_the_innermost_context_says() -> None:
    assert precision_of(torch.float32) == "ieee"
    with PYTORCH.precision("tf32x3", "cuda"):
        assert precision_of(torch.float32) == "tf32x3"
        assert (precision_of(torch.float16), precision_of(torch.bfloat16)) == ("half", "half")
        with PYTORCH.precision("tf32", "cuda"):
            assert precision_of(torch.float32) == "tf32"
        with PYTORCH.precision("fp32", "cuda"):
            assert precision_of(torch.float32) == "ieee"
        with ThreadPoolExecutor(1) as pool:  # a backward pass on a GPU runs in another thread
            assert pool.submit(precision_of, torch.float32).result() == "tf32x3"
    assert precision_of(torch.float32) == "ieee"


def test_amds_gpus_multiply_float32_itself(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with PYTORCH.precision("tf32x3", "cuda"):
        assert precision_of(torch.float32) == "ieee"


def rounded_to_tf32(values: np.ndarray) -> np.ndarray:
    """The nearest number with 10 bits after the point, ties away from 0: PTX's cvt.rna.tf32."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def cut_to_tf32(values: np.ndarray) -> np.ndarray:
    """The matrix units ignore the last 13 bits of an operand."""
    return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def test_three_products_of_tf32_have_the_error_that_is_documented() -> None:
    """Triton 3.9 does the same: cvt.rna.tf32, a difference, three products (seen in PTX)."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=10**6).astype(np.float32) for _ in range(2))
    # operands whose rest after rounding is as large as it can be, and is cut as much as it can be
    a[:1000] = 1 + np.arange(1000, dtype=np.float32) / 1024 + np.float32(0xFFF / 2**23)
    b[:1000] = a[999::-1]
    large_a, large_b = rounded_to_tf32(a), rounded_to_tf32(b)
    small_a, small_b = cut_to_tf32(a - large_a), cut_to_tf32(b - large_b)

    def product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x.astype(np.float64) * y  # of two TF32 numbers: exact

    exact = product(a, b)
    three = product(small_a, large_b) + product(large_a, small_b) + product(large_a, large_b)
    one = product(cut_to_tf32(a), cut_to_tf32(b))
    worst = {key: abs(v / exact - 1).max() for key, v in {"three": three, "one": one}.items()}
    assert 2**-22 < worst["three"] <= 2**-19
    assert 2**-11 < worst["one"] <= 2**-9


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
