"""Sizes of baselines beside the figures of the paper's Table 1, for 50 tasks of Meta-World."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny import SPEC
from torch import nn

from harmodt.algorithms import Learner, Setup, find, preset
from harmodt.data.inputs import TaskConditioning
from harmodt.data.store import Episodes
from harmodt.devices import Execution
from harmodt.settings import change


def setup_of(algorithm: str, **changes: Any) -> Setup:
    """Of 50 tasks, of which nothing but their number matters."""
    nothing = np.zeros(0, np.float32)
    task = TaskConditioning("task", nothing, nothing, Episodes(*[nothing] * 6), 0.0)
    config = change(preset("paper", algorithm), changes)
    return Setup(config, SPEC, (task,) * 50, Execution.choose("cpu", False, "fp32"))


def learner_of(algorithm: str, **changes: Any) -> Learner:
    return find(algorithm).learner(setup_of(algorithm, **changes))


def count(*networks: nn.Module) -> int:
    return sum(p.numel() for network in networks for p in network.parameters())


@pytest.mark.parametrize(
    "changes", [{}, {"task_conditioning": "multi-head", "hidden_size": 872}], ids=str
)
def test_mtbc_has_174_million(changes: dict[str, Any]) -> None:
    assert count(learner_of("mtbc", **changes).actor) == pytest.approx(1.74e6, rel=0.02)


def test_mtiql_has_174_million_without_the_targets() -> None:
    networks = learner_of("mtiql").networks
    assert list(networks) == ["policy", "value", "critics"] and len(networks["critics"]) == 2
    assert count(*networks.values()) == pytest.approx(1.74e6, rel=0.02)


def test_mtdt_has_147_million_where_it_is_8_wider() -> None:
    """Without a prompt's embedding it has fewer than Prompt-DT at the same width."""
    assert count(learner_of("prompt-dt").model) == pytest.approx(1.47e6, rel=0.02)
    assert count(learner_of("mtdt").model) == 1_327_524
    wider = learner_of("mtdt", embed_dim=136).model
    assert count(wider) == pytest.approx(1.47e6, rel=0.02)
    assert (wider.config.layers, wider.config.heads) == (6, 8)
