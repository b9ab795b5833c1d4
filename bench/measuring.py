"""How the benchmarks of the kernels measure: time on the device, peak memory, agreement.

On a GPU a call is timed by two CUDA events around it, as `triton.testing.do_bench` does: after the
caches were emptied, and behind a spin that hides how long Python takes to launch. That is the time
of the kernels alone; what launching them costs shows in the training step's benchmark. The events
are the timer of pytest-benchmark, whose statistics then hold for both kinds of device.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harmodt_kernels import Backend, BackendUnavailable, fused_backend

# Benchmarks share the tests' random data, models and measure of memory.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
import tiny

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
MOST_ROUNDS = 100 if ON_GPU else 30
SECONDS = 0.5  # per benchmark, if that is enough for three rounds
CACHE_BYTES = 1 << 28  # more than any GPU's L2 cache
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


def measure(benchmark: Any, call: Callable[[], object]) -> None:
    """Time a call whose results were found right, and note the peak of its memory."""
    call()  # compiles what is compiled at the first call
    benchmark.extra_info["peak_bytes"] = peak_bytes(call)
    rounds = 1 if benchmark.disabled else round(SECONDS / _seconds(call))
    benchmark.pedantic(
        call, setup=_prepare, rounds=min(max(rounds, 3), MOST_ROUNDS), warmup_rounds=1
    )


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that a call holds beyond what there was before it, its results included."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    return tiny.peak_memory(call)


def note_floor(benchmark: Any, floor_bytes: int) -> None:
    """Note the fewest bytes the operation must move, and how near the timed call came to that."""
    benchmark.extra_info["floor_bytes"] = floor_bytes
    if not benchmark.disabled:
        floor = floor_bytes / read_bandwidth()
        benchmark.extra_info["share_of_floor"] = floor / benchmark.stats.stats.median


@functools.cache
def read_bandwidth() -> float:
    """Bytes per second at which the device sums up a large vector."""
    values = torch.ones(1 << (28 if ON_GPU else 25), device=DEVICE)
    return values.nbytes / min(_seconds(values.sum) for _ in range(10))


def fused() -> Backend:
    """The fused kernels; where there are none, the benchmark is skipped and says why."""
    try:
        backend = fused_backend(DEVICE)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    if backend.name == "triton-interpreter":
        pytest.skip("Triton's interpreter is not what a benchmark measures")
    return backend


def random_masks(*shape: int) -> Tensor:
    """int32 masks with 13 of 16 bits set on average: near the paper's four fifths, and quick."""
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


def _seconds(call: Callable[[], object]) -> float:
    _prepare()
    start = timer()
    call()
    return timer() - start


def _prepare() -> None:
    """Before each timed call on a GPU: empty its caches, and let Python run ahead of it."""
    if ON_GPU:
        torch.empty(CACHE_BYTES, dtype=torch.uint8, device=DEVICE).zero_()
        torch.cuda._sleep(SPIN_CYCLES)
