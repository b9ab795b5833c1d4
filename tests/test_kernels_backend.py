from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from harmodt_kernels import REFERENCE, BackendUnavailable, fused_backend, registration
from harmodt_kernels.native import library


def test_importing_touches_neither_triton_nor_a_gpu() -> None:
    program = (
        "import sys, torch, harmodt_kernels\n"
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
    assert REFERENCE.name == "reference"


def test_without_the_library_it_says_how_to_get_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
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
