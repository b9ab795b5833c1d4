"""What is recorded as a graph computes, when it is repeated, what comes next."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from replay import GraphRecording
from tiny import configure, make_store, make_trainer
from torch import Tensor

from harmodt.algorithms import preset
from harmodt.data.store import DataStore
from harmodt.devices import Execution
from harmodt.graph import WARM_UP, CudaGraph, CudaMemory, Graph
from harmodt.policies.decision import DecisionPolicy
from harmodt.settings import settings as all_settings
from harmodt.training.trainer import Trainer
from harmodt_kernels import PYTORCH, CannotRecord

# Small: the interpreter takes a millisecond or more for each tile.
SIZES = {"batch_per_task": 1, "context_length": 3, "prompt_length": 1, "layers": 1}

TRITON = replace(PYTORCH, name="triton")  # graphs ask for the name alone


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return make_store(tmp_path_factory.mktemp("data") / "store")


class CudaCalls:
    """The calls of `torch.cuda` that capture graphs, without a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.captures: list[tuple[object, object]] = []  # pool and stream of each
        for name, fake in (
            ("Stream", lambda device: SimpleNamespace(wait_stream=lambda other: None)),
            ("current_stream", lambda device: SimpleNamespace(wait_stream=lambda other: None)),
            ("stream", lambda stream: contextlib.nullcontext()),
            ("graph_pool_handle", lambda: (0, next(self._handles))),
            ("CUDAGraph", lambda: SimpleNamespace(replay=lambda: None)),
            ("graph", self._graph),
        ):
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
        self._handles = itertools.count(1)

    def _graph(
        self, graph: object, pool: object = None, stream: object = None
    ) -> contextlib.nullcontext[None]:
        self.captures.append((pool, stream))
        return contextlib.nullcontext()


def test_graphs_of_one_execution_share_one_memory_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = CudaCalls(monkeypatch)
    first, second = (
        Execution(torch.device("cuda", 0), TRITON, memory=CudaMemory(torch.device("cuda", 0)))
        for _ in range(2)
    )
    for execution in (first, replace(first, precision="bf16"), second):
        graph = execution.repeated(lambda: torch.ones(2))
        assert isinstance(graph, CudaGraph)
        for _ in range(WARM_UP + 2):
            assert graph().tolist() == [1, 1]
    (pool, stream), same, (other_pool, other_stream) = calls.captures  # one each
    assert same == (pool, stream)
    assert other_pool != pool and other_stream is not stream


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_second_graph_needs_no_more_memory() -> None:
    execution = Execution.choose("cuda", fused=True, precision="fp32")
    x, reserved = torch.ones(1 << 24, device=execution.device), []
    for factor in (2.0, 3.0):
        graph = execution.repeated(lambda factor=factor: (x * factor).sum())
        for _ in range(WARM_UP + 1):
            result = graph()
        assert result.item() == factor * x.numel()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] - reserved[0] < x.nbytes


class Repeated:
    """A function that is computed once, and then repeated as a CUDA graph would."""

    def __init__(self, function: Callable[[], Tensor]):
        self._function = function
        self._recording: GraphRecording | None = None
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        if self._recording is None:
            self._recording = GraphRecording(self._function)
        else:
            self._recording.replay()
        return self._recording.result.clone()


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
        pytest.param("triton", {}, marks=pytest.mark.full),
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
    for name, tensor in usual.learner.tensors().items():
        assert torch.equal(tensor, repeated.learner.tensors()[name]), name


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("shortest", [1, SIZES["context_length"]], ids=["padded", "full"])
def test_recorded_actions_repeat_as_the_next_actions(
    store: DataStore, monkeypatch: pytest.MonkeyPatch, shortest: int
) -> None:
    usual, recorded = (
        make_trainer(store, configure(fused=True, action_dropout=0.0, graph=graph, **SIZES))
        for graph in (False, True)
    )
    monkeypatch.setattr(DecisionPolicy, "_shortest_in_graph", shortest)
    made: list[Repeated] = []

    def repeated(execution: Execution, function: Callable[[], Tensor]) -> Repeated:
        made.append(Repeated(function))
        return made[-1]

    monkeypatch.setattr(Execution, "repeated", repeated)
    actions = play(recorded.learner.policy(0))
    # Full are the histories at the third step, and at the sixth after one began again.
    assert made[0].calls == (8 if shortest == 1 else 4)
    torch.testing.assert_close(actions, play(usual.learner.policy(0)))


@pytest.mark.usefixtures("native")
def test_steps_go_on_after_acting_as_if_there_had_been_none(store: DataStore) -> None:
    plain, acting = (
        make_trainer(store, configure(fused=True, dropout=0.2, **SIZES)) for _ in range(2)
    )
    assert all(map(torch.equal, steps(plain, 3), steps(acting, 3)))
    actions = play(acting.learner.policy(3))  # full histories are recorded, too
    acting.learner.resume_training()
    assert all(map(torch.equal, steps(plain, 3), steps(acting, 3)))
    assert not torch.equal(play(acting.learner.policy(6)), actions)


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
    x = torch.ones(3)
    with pytest.raises(CannotRecord):
        GraphRecording(lambda: broken(x))


def test_a_number_that_changes_is_found_out() -> None:
    x, count = torch.ones(3), [0]

    def computed() -> Tensor:
        count[0] += 1
        return x * count[0]

    repeated = Repeated(computed)
    assert repeated().tolist() == [1, 1, 1]
    x.fill_(5)
    assert repeated().tolist() == [5, 5, 5]  # where 10 is right


@pytest.mark.parametrize(
    "place",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ),
    ],
)
@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("harmodt-f", {"dropout": 0.2, "mask_update_every": 3}),
        ("harmodt-f", {"dropout": 0.2, "mask_update_every": 3, "precision": "bf16"}),
        ("harmodt-f", {"dropout": 0.2, "mask_update_every": 3, "surgery": "pcgrad"}),
        ("harmodt-f", {"dropout": 0.2, "mask_update_every": 3, "surgery": "graddrop"}),
        ("harmodt-f", {"surgery": "pcgrad", "data_device": "same"}),
        ("soco-dt", {"dropout": 0.2, "mask_update_every": 3}),
        ("prompt-dt", {"embedding_dropout": 0.1, "data_device": "same"}),
        ("prompt-dt", {"dropout": 0.2}),
        ("prompt-dt", {"dropout": 0.2, "surgery": "pcgrad"}),
        ("prompt-dt", {"dropout": 0.2, "surgery": "graddrop"}),
        ("prompt-dt", {"surgery": "cagrad"}),  # computed as usual
        ("mtdt", {}),
        ("mtbc", {}),
        ("mtbc", {"precision": "bf16"}),  # whose products are PyTorch's
        ("mtiql", {}),
    ],
)
def test_a_graph_computes_the_same_steps(
    store: DataStore, native, place: str, algorithm: str, changes: dict[str, object]
) -> None:
    algorithm_has = dict(all_settings(preset("quickstart", algorithm)))
    settings = {name: value for name, value in SIZES.items() if name in algorithm_has}
    usual, recorded = (
        make_trainer(
            store, configure(algorithm, fused=True, graph=graph, **settings, **changes), place
        )
        for graph in (False, True)
    )
    assert isinstance(recorded.learner._step, Graph) == (changes.get("surgery") != "cagrad")
    for expected, result in zip(steps(usual, 12), steps(recorded, 12), strict=True):
        assert torch.equal(expected, result)
    for name, tensor in usual.learner.tensors().items():
        assert torch.equal(tensor, recorded.learner.tensors()[name]), name
