"""Measures time on the device, peak memory and agreement for the kernels' benchmarks.

On a GPU, two CUDA events around a call time it, as in `triton.testing.do_bench`. Before the call,
the caches are emptied, and the device spins for a while, so that Python's launches do not add to
the time. So this is the time of the kernels only; the training step's benchmark includes the time
of launches. The events are the timer of pytest-benchmark, so its statistics work for both kinds of
device.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from harmodt.data.store import DataStore
from harmodt.environments import METAWORLD, family
from harmodt_kernels import Backend, BackendUnavailable, fused_backend

# Benchmarks share the tests' random data, models and measure of memory.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
import tiny

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
MOST_ROUNDS = 100 if ON_GPU else 30
SECONDS = 0.5  # per benchmark, or longer if three rounds take longer
CACHE_BYTES = 1 << 28  # more than any GPU's L2 cache
NO_KERNEL = ("Memcpy", "Memset", "Context", "Event", "Stream")  # profiler events, not kernels
SPIN_CYCLES = 4_000_000  # about 2 ms


class Instant:
    """A point in the GPU's stream of work; the difference of two is in seconds."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: Instant) -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


timer = Instant if ON_GPU else time.perf_counter


def measure(benchmark: Any, call: Callable[[], object], *, cold: bool = True) -> None:
    """Time a call and note its peak memory. The caller has checked the call's results.

    Args:
        cold: whether a GPU's caches are emptied before each call.
    """
    call()  # the first call compiles
    benchmark.extra_info["peak_bytes"] = peak_bytes(call)
    prepare = functools.partial(_prepare, cold)
    rounds = 1 if benchmark.disabled else round(SECONDS / _seconds(call))
    benchmark.pedantic(
        call, setup=prepare, rounds=min(max(rounds, 3), MOST_ROUNDS), warmup_rounds=1
    )


def measure_in_turn(
    benchmark: Any,
    calls: Mapping[str, Callable[[], object]],
    seconds: float = 3.0,
    *,
    on_device: bool = False,
) -> None:
    """Time calls in turn, round after round.

    The speed of a shared machine changes from second to second. Ratios of calls that are made in
    turn are reliable even if times are not. The first call is the benchmark's own. For the others,
    the benchmark's extra_info gets their medians and peak memory under "beside".

    Args:
        calls: the calls by name. The caller has checked their results.
        seconds: the time for all rounds, or longer if three rounds take longer.
        on_device: whether to measure the time on the device, without the host's launches, as
            `measure` does. The benchmark's timer must then be `timer`. Otherwise it is the time on
            the host until the device is done.
    """
    first, *others = calls.values() if on_device else map(finished, calls.values())
    seconds_of = _seconds if on_device else _host_seconds
    if benchmark.disabled:
        for call in others:
            call()
        benchmark.pedantic(first)
        return
    notes = [_notes(finished(call)) for call in (first, *others)]
    once = sum(seconds_of(call) for call in (first, *others))
    rounds = min(max(round(seconds / once), 3), MOST_ROUNDS)
    times: list[list[float]] = [[] for _ in others]

    def run_others() -> None:
        for call, values in zip(others, times, strict=True):
            values.append(seconds_of(call))
        if on_device:
            _prepare()

    benchmark.pedantic(first, setup=run_others, rounds=rounds)
    benchmark.extra_info.update(notes[0])
    benchmark.extra_info["beside"] = {
        name: {"median": statistics.median(values), **call_notes}
        for name, values, call_notes in zip([*calls][1:], times, notes[1:], strict=True)
    }


def _notes(call: Callable[[], object]) -> dict[str, int]:
    """A call's peak memory and, on a GPU, the number of kernels that it launches."""
    for _ in range(1 if ON_GPU else 2):  # the first call compiles; a CPU records the second step
        call()
    notes = {"peak_bytes": peak_bytes(call)}
    if ON_GPU:
        kernels, _ = profiled(call)
        notes["launches"] = sum(count for count, _ in kernels.values())
    return notes


def note_held(benchmark: Any, held: Mapping[str, int]) -> None:
    """Add the memory that stays between calls to the memory that a call allocates.

    Args:
        held: bytes by the name of a call, in the order of the calls that were measured in turn.
    """
    first, *others = held.items()
    benchmark.extra_info["peak_bytes"] += first[1]
    for name, size in others:
        benchmark.extra_info["beside"][name]["peak_bytes"] += size


def profiled(call: Callable[[], object]) -> tuple[dict[str, tuple[int, float]], Counter[str]]:
    """Profile a call with torch.profiler.

    Args:
        call: returns when the device is done.

    Returns:
        The number and the seconds of each kernel on a GPU, or of PyTorch's operations on a CPU, by
        name. And the number of the host's calls by name, including CUDA's functions.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if ON_GPU else [])
    with profile(activities=activities) as profiler:
        call()
    by_host = {event.key: event for event in profiler.key_averages()}
    host_calls = Counter({name: event.count for name, event in by_host.items()})
    if not ON_GPU:
        return {n: (e.count, e.self_cpu_time_total / 1e6) for n, e in by_host.items()}, host_calls
    kernels: dict[str, tuple[int, float]] = {}
    for event in profiler.profiler.kineto_results.events():
        name = event.name()
        on_device = event.device_type() == DeviceType.CUDA and not event.is_user_annotation()
        if on_device and not name.startswith(NO_KERNEL):
            count, seconds = kernels.get(name, (0, 0.0))
            kernels[name] = count + 1, seconds + event.duration_ns() / 1e9
    return kernels, host_calls


def finished(call: Callable[[], object]) -> Callable[[], object]:
    """The call, followed on a GPU by a wait until the device is done."""
    if not ON_GPU:
        return call

    def run() -> object:
        result = call()
        torch.cuda.synchronize()
        return result

    return run


def inside(context: Callable[[], Any], call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, each time inside a new context."""

    def run() -> Any:
        with context():
            return call()

    return run


def peak_bytes(call: Callable[[], object]) -> int:
    """The peak of the memory that a call adds, including its results."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    return tiny.peak_memory(call)


def note_floor(benchmark: Any, floor_bytes: int) -> None:
    """Note the minimum of bytes that the operation must move, and its time's share of the call."""
    benchmark.extra_info["floor_bytes"] = floor_bytes
    if not benchmark.disabled:
        floor = floor_bytes / read_bandwidth()
        benchmark.extra_info["share_of_floor"] = floor / benchmark.stats.stats.median


@functools.cache
def read_bandwidth() -> float:
    """Bytes per second at which the device sums a large vector."""
    values = torch.ones(1 << (28 if ON_GPU else 25), device=DEVICE)
    return values.nbytes / min(_seconds(values.sum) for _ in range(10))


def fused() -> Backend:
    """The fused kernels. Without them, the benchmark is skipped with the reason."""
    try:
        backend = fused_backend(DEVICE)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    if backend.name == "triton-interpreter":
        pytest.skip("benchmarks do not measure Triton's interpreter")
    return backend


@contextlib.contextmanager
def onednn() -> Iterator[None]:
    """On a CPU, use oneDNN's products, as torch.set_float32_matmul_precision("medium") does."""
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's products keep operands in float32 on this machine."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 256, generator=generator) for _ in range(2))
    exact = x.double() @ weight.double().T
    with onednn():
        error = (F.linear(x, weight) - exact).abs().max() / exact.abs().max()
    return error.item() < 1e-5  # about 1e-3 when rounded to bf16


def random_store(path: Path, episodes: int, tasks: str = "mt5") -> DataStore:
    """A store of a set of tasks whose episodes hold random numbers."""
    metaworld = family(METAWORLD)
    length = metaworld.spec.episode_length
    return tiny.make_store(path, metaworld.task_sets[tasks], [length] * episodes, [length])


def random_masks(*shape: int) -> Tensor:
    """int32 masks with 13 of 16 bits set on average: fast, and close to the paper's 4/5."""
    a, b, c, d = (
        torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32, device=DEVICE)
        for _ in range(4)
    )
    return a | b | (c & d)


def assert_agree(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert that ‖actual − expected‖ is at most `tolerance` times ‖expected‖."""
    assert actual.shape == expected.shape
    error = torch.linalg.vector_norm(actual.double() - expected.double())
    norm = torch.linalg.vector_norm(expected.double())
    assert error <= tolerance * norm, f"relative error {error / norm:.1e}"


def _host_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds(call: Callable[[], object]) -> float:
    _prepare()
    start = timer()
    call()
    return timer() - start


def _prepare(cold: bool = True) -> None:
    """Before a timed call on a GPU: empty its caches, and let it spin while Python launches."""
    if ON_GPU and cold:
        torch.empty(CACHE_BYTES, dtype=torch.uint8, device=DEVICE).zero_()
    if ON_GPU:
        torch.cuda._sleep(SPIN_CYCLES)
