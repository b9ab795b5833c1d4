"""What a GPU repeats as one CUDA graph computes, when it is repeated, what comes next."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from replay import NotForGraphs, Recording
from tiny import configure, make_store, make_trainer
from torch import Tensor

from harmodt.data.store import DataStore
from harmodt.devices import Execution
from harmodt.policies.decision import DecisionPolicy
from harmodt.training.trainer import Trainer

# Small: the interpreter takes a millisecond or more for each tile.
SIZES = {"batch_per_task": 1, "context_length": 3, "prompt_length": 1, "layers": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("data") / "store")


class Repeated:
    """A function that is computed once, and then repeated as it was recorded."""

    def __init__(self, function: Callable[[], Tensor]):
        self._function = function
        self._recording: Recording | None = None

    def __call__(self) -> Tensor:
        if self._recording is None:
            self._recording = Recording()
            with self._recording:
                self._result = self._function()
        else:
            self._recording.repeat()
        return self._result.clone()


def steps(trainer: Trainer, count: int) -> list[Tensor]:
    """Some steps, with the mask updates that are due: their losses and norms."""
    results = []
    for _ in range(count):
        trainer.before_step()
        result = trainer.train_step()
        results.append(torch.cat((result.losses, result.gradient_norm[None])))
    return results


@pytest.mark.parametrize(
    ("implementation", "changes"),
    [
        ("triton", {}),
        ("triton", {"algorithm": "prompt-dt"}),
        ("cpu", {}),
        ("cpu", {"surgery": "pcgrad"}),
        ("cpu", {"algorithm": "prompt-dt", "surgery": "graddrop"}),
    ],
    indirect=["implementation"],
)
def test_a_recorded_step_repeats_as_the_next_steps(store: DataStore, device, changes) -> None:
    settings = SIZES | {"dropout": 0.2, "embedding_dropout": 0.1, "data_device": "same"} | changes
    usual, repeated = (make_trainer(store, configure(fused=True, **settings)) for _ in range(2))
    for trainer in (usual, repeated):
        steps(trainer, 1)
    repeated.learner._step = Repeated(repeated.learner._compute)
    expected = steps(usual, 4)  # and a mask update before the last
    assert all(map(torch.equal, steps(repeated, 4), expected))
    assert not torch.equal(expected[-1], expected[-2])
    for name, tensor in usual.tensors().items():
        assert torch.equal(tensor, repeated.tensors()[name]), name


@pytest.mark.usefixtures("native")
def test_recorded_actions_repeat_as_the_next_actions(
    store: DataStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_trainer(store, configure(fused=True, action_dropout=0.0, **SIZES)).learner
    usual = play(learner.policy(0))
    monkeypatch.setattr(Execution, "captures", True)
    monkeypatch.setattr(Execution, "repeated", lambda self, function: Repeated(function))
    torch.testing.assert_close(play(learner.policy(0)), usual)


def play(policy: DecisionPolicy) -> Tensor:
    """Actions of two tasks' episodes, some of which begin again in the middle."""
    rng = np.random.default_rng(0)
    policy.start(np.array([0, 2, 2]), seed=1)
    actions = []
    for time in range(8):
        if time == 3:
            policy.restart(np.array([False, True, False]))
        actions.append(policy.act(rng.normal(size=(3, 39))))
        policy.record_rewards(rng.random(3))
    return torch.from_numpy(np.stack(actions))


@pytest.mark.parametrize(
    "broken",
    [
        lambda x: x * float(x.sum()),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x[x > 0].sum(),
        lambda x: x.nonzero(),
        lambda x: x * torch.rand(()).item(),
    ],
    ids=["value", "number", "selection", "places", "random number"],
)
def test_what_a_graph_cannot_hold_is_refused(broken: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotForGraphs), Recording():
        broken(torch.ones(3))


def test_a_number_that_changes_is_found_out() -> None:
    x, count = torch.ones(3), [0]

    def computed() -> Tensor:
        count[0] += 1
        return x * count[0]

    repeated = Repeated(computed)
    assert repeated().tolist() == [1, 1, 1]
    x.fill_(5)
    assert repeated().tolist() == [5, 5, 5]  # where 10 is right


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("surgery", ["none", "pcgrad", "graddrop"])
@pytest.mark.parametrize("algorithm", ["harmodt-f", "prompt-dt"])
def test_a_cuda_graph_computes_the_same_steps(
    store: DataStore, algorithm: str, surgery: str
) -> None:
    settings = SIZES | {"dropout": 0.2, "surgery": surgery}
    settings |= {"mask_update_every": 3} if algorithm == "harmodt-f" else {}
    usual, captured = (
        make_trainer(store, configure(algorithm, fused=True, cuda_graph=graph, **settings), "cuda")
        for graph in (False, True)
    )
    for expected, result in zip(steps(usual, 12), steps(captured, 12), strict=True):
        assert torch.equal(expected, result)
