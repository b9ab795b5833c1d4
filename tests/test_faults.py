"""The table of faults.py: commands × what may happen to them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_nothing_is_lost_and_nothing_silently_wrong(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In a program of its own, which forks: this one has threads."""
    program = Path(__file__).with_name("faults.py")
    share = ["--full"] if request.config.getoption("--faults") == "full" else []
    command = [sys.executable, str(program), str(tmp_path / "faults"), *share]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("\n") == 5  # kinds of fault
