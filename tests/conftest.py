from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Without a GPU, Triton's interpreter runs the kernels; it reads this when a kernel is imported.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from harmodt_kernels import REFERENCE, Backend, fused_backend  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=2, help="how often the tests that kill a program do so"
    )


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--kills")


@pytest.fixture
def device() -> torch.device:
    """Where the fused kernels run: the GPU, or the CPU through Triton's interpreter."""
    return torch.device(DEVICE)


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> Backend:
    """Every implementation of the kernels in turn."""
    return REFERENCE if request.param == "reference" else fused_backend(device)


@pytest.fixture(autouse=True)
def _denormals_as_usual() -> Iterator[None]:
    """Undo what a command run inside a test sets for the whole process."""
    yield
    torch.set_flush_denormal(False)
