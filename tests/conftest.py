from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=2, help="how often the tests that kill a program do so"
    )


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--kills")


@pytest.fixture(autouse=True)
def _denormals_as_usual() -> Iterator[None]:
    """Undo what a command run inside a test sets for the whole process."""
    yield
    torch.set_flush_denormal(False)
