"""Times an optimiser step of the paper's model (d = 128, dropout 0.1) with each path in turn.

    pytest bench/bench_train_step.py --benchmark-only

paths.py describes the paths. "dense" has no masks: it is the lower bound. "masked copies" has the
copies that a library's products need. On a CPU, two rows separate the two gains of "fused" over
"dense": "fused, computed anew" has the kernels without the recording, and "dense, recorded" has the
recording without the kernels. The compiled paths have a table of their own, because compiling takes
longer than measuring. A step is timed on the host until the device is done. It draws its batch, so
the time of sampling, which is measured too, is a share of it. On a GPU the step is also timed as a
CUDA graph: with cold caches, with warm caches, and with its batch. On a CPU
`share_of_floor` is the time of the masked linear layers' arithmetic, at the processor's measured
peak, as a share of the step.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from measuring import ON_GPU, measure, measure_in_turn, note_held, onednn_is_exact, timer
from paths import ANEW, COMPILED, PATHS, WITHOUT_MASKS, Graph, make_trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harmodt.data.store import DataStore
from harmodt.draws import TRAIN, Draws
from harmodt.training.trainer import Trainer
from harmodt_kernels.native import library

TASKS = (1, 5, 50)
PRECISIONS = ("bf16", "fp32")  # the time on a GPU may end before the second
SECONDS = 10.0
TIMED = [
    pytest.param("cold caches", marks=pytest.mark.benchmark(timer=timer)),
    pytest.param("warm caches", marks=pytest.mark.benchmark(timer=timer)),
    "with its batch",  # timed on the host
]
SMALL = {"embed_dim": 64, "layers": 2, "heads": 2, "dropout": 0.0, "embedding_dropout": 0.0}
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}  # relative to the change of the weights in three steps


class LinearArithmetic(TorchDispatchMode):
    """Adds up the floating-point operations of the masked linear layers' three products."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0].removeprefix("harmodt::")
        if name in ("masked_linear", "norm_linear"):
            x, weight = args[0], args[1 if name == "masked_linear" else 5]
            self.operations += 2 * x.numel() * len(weight)
        elif name == "masked_linear_input_gradient":
            dy, _, weight = args[:3]
            self.operations += 2 * dy.numel() * weight.shape[1]
        elif name == "masked_linear_weight_gradients":
            for dy, x in zip(args[0], args[2], strict=True):
                self.operations += 2 * dy.numel() * x.shape[-1]
        return func(*args, **(kwargs or {}))


def linear_operations(trainer: Trainer) -> int:
    """Floating-point operations of the masked linear layers in a step. Repeats the step."""
    with LinearArithmetic() as arithmetic:
        trainer.learner._compute()
    return arithmetic.operations


def peak(precision: str) -> float:
    """The peak of this machine now: the kernels' multiply-adds on registers, operations per s."""
    start = time.perf_counter()
    operations = library.library().harmodt_multiply_adds(
        100_000, precision == "bf16", library.threads()
    )
    return operations / (time.perf_counter() - start)


def note_graphs(benchmark: Any, trainers: Mapping[str, Trainer]) -> None:
    """Add the memory that recordings keep between calls to the memory that a call allocates.

    Args:
        trainers: by the names of the calls that were measured in turn, the benchmark's own first.
    """
    note_held(benchmark, {path: held_bytes(trainer) for path, trainer in trainers.items()})


def held_bytes(trainer: Trainer) -> int:
    """The memory of a trainer's recordings, and the buffers of its mask updates."""
    gradients = getattr(trainer.learner, "gradients", None)
    buffers = 0 if gradients is None else gradients.nbytes
    return trainer.setup.execution.memory.nbytes + buffers


def note_arithmetic(benchmark: Any, trainer: Trainer, precision: str) -> None:
    """Note the step's arithmetic at the machine's peak, its minimum. The benchmark has run."""
    peaks = statistics.median(peak(precision) for _ in range(20))
    floor = linear_operations(trainer) / peaks
    benchmark.extra_info["peak_flops"], benchmark.extra_info["floor_seconds"] = peaks, floor
    benchmark.extra_info["share_of_floor"] = floor / benchmark.stats.stats.median


@pytest.fixture(scope="module")
def check_agreement(store_mt50: DataStore) -> Callable[[str], None]:
    """Asserts, once per precision, that all paths train a small model to the same weights."""
    return functools.cache(functools.partial(_check_agreement, store_mt50))


def _check_agreement(store: DataStore, precision: str) -> None:
    changes = {p: _learned(store, p, precision) for p in PATHS if _is_timed(p, precision, 5)}
    for path in changes:
        change, expected = changes[path], changes["dense" if path in WITHOUT_MASKS else "reference"]
        error = (change - expected).norm() / expected.norm()
        assert error <= TOLERANCE[precision], f"{path}: relative error {error:.1e}"
    assert (changes["dense"] - changes["reference"]).norm() > 0.5 * changes["dense"].norm()


def _learned(store: DataStore, path: str, precision: str) -> Tensor:
    """The change of the weights in three steps of two tasks."""
    trainer = make_trainer(
        store,
        path,
        compiler="aot_eager",
        **SMALL,
        tasks_per_step=2,
        precision=precision,
        warmup_steps=0,
    )
    before = trainer.learner.vector.weights.clone()
    for _ in range(3):
        trainer.train_step()
    return trainer.learner.vector.weights - before


def _is_timed(path: str, precision: str, tasks: int) -> bool:
    if path in COMPILED and not ON_GPU:  # compiling takes a minute, and one size is enough
        return (precision, tasks) == ("fp32", 5)
    if path in (*ANEW, "dense, recorded"):  # the recording saves little of a step of 50 tasks
        return tasks < max(TASKS)
    return path != "dense, oneDNN" or precision == "bf16" or onednn_is_exact()


@pytest.mark.benchmark(group="training step, d = 128, dropout 0.1")
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("precision", PRECISIONS)
def bench_train_step(
    benchmark: Any,
    store_mt50: DataStore,
    check_agreement: Callable[[str], None],
    precision: str,
    tasks: int,
) -> None:
    check_agreement(precision)
    paths = [p for p in PATHS if p not in COMPILED and _is_timed(p, precision, tasks)]
    trainers = measure_steps(benchmark, store_mt50, paths, precision, tasks)
    if not ON_GPU and not benchmark.disabled:
        note_graphs(benchmark, trainers)
        note_arithmetic(benchmark, trainers["fused"], precision)


@pytest.mark.benchmark(group="training step through torch.compile, d = 128, dropout 0.1")
@pytest.mark.parametrize("tasks", TASKS if ON_GPU else [5])
@pytest.mark.parametrize("precision", PRECISIONS if ON_GPU else ["fp32"])
def bench_compiled_step(
    benchmark: Any,
    store_mt50: DataStore,
    check_agreement: Callable[[str], None],
    precision: str,
    tasks: int,
) -> None:
    check_agreement(precision)
    trainers = measure_steps(benchmark, store_mt50, ["fused", *COMPILED], precision, tasks)
    if not ON_GPU and not benchmark.disabled:
        note_graphs(benchmark, trainers)


def measure_steps(
    benchmark: Any, store: DataStore, paths: Sequence[str], precision: str, tasks: int
) -> dict[str, Trainer]:
    """Time the steps of paths in turn, "fused" first, and compare their losses."""
    settings = {"tasks_per_step": tasks, "precision": precision}
    if benchmark.disabled:
        settings |= {"batch_per_task": 1, "layers": 1, "compiler": "aot_eager"}
    trainers = {path: make_trainer(store, path, **settings) for path in paths}
    measure_in_turn(
        benchmark, {path: trainer.train_step for path, trainer in trainers.items()}, SECONDS
    )
    losses = {path: trainer.train_step().losses.mean() for path, trainer in trainers.items()}
    for path, loss in losses.items():  # each path draws other dropout
        assert abs(loss / losses["fused"] - 1) < 0.2, f"{path}: a loss of {loss}"
    return trainers


@pytest.fixture(scope="module")
def graph_of(store_mt50: DataStore) -> Callable[..., Graph]:
    """Makes the step of a path as a graph. Consecutive benchmarks of one case share the graph."""

    @functools.lru_cache(maxsize=1)
    def make(path: str, precision: str, tasks: int) -> Graph:
        trainer = make_trainer(store_mt50, path, tasks_per_step=tasks, precision=precision)
        return Graph(trainer)

    return make


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs are for GPUs")
@pytest.mark.parametrize("timed", TIMED)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tasks", TASKS)
def bench_graph(
    benchmark: Any,
    graph_of: Callable[..., Graph],
    tasks: int,
    precision: str,
    path: str,
    timed: str,
) -> None:
    graph = graph_of(path, precision, tasks)
    benchmark.group = "training step as a CUDA graph, d = 128, dropout 0.1"
    if timed == "with its batch":
        benchmark.pedantic(graph.step, rounds=100, warmup_rounds=5)
    else:
        measure(benchmark, graph.replay, cold=timed == "cold caches")
    benchmark.extra_info["peak_bytes"] = graph.memory


@pytest.mark.benchmark(group="drawing the batch of a step, 8 windows a task")
@pytest.mark.parametrize("tasks", TASKS)
def bench_sampling(benchmark: Any, store_mt50: DataStore, tasks: int) -> None:
    sample = make_trainer(store_mt50, "reference").learner.sampler.sample
    benchmark.pedantic(sample, args=(range(tasks), Draws(0, TRAIN, 0)), rounds=100, warmup_rounds=5)
