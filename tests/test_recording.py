"""A computation that is recorded and then repeated computes what it would have computed anew."""

from __future__ import annotations

import functools
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmodt_kernels import CannotRecord, Recording, RecordingMemory, fused_backend

STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "out of place": lambda x, y: x * 2 + y,
    "in place": lambda x, y: x.clone().mul_(y).add_(1),
    "of a view": lambda x, y: x.t().contiguous() - y[0],
    "into a view": lambda x, y: _first_row_replaced(x, y),
    "several results": lambda x, y: x.sort(dim=1).values - y.max(dim=0).values,
    "a result that may be the operand": lambda x, y: x.to(torch.float32) + y.contiguous(),
    "of another type": lambda x, y: (x > y).to(torch.float64).float(),
    "made of nothing": lambda x, y: torch.full_like(x, 3.0) + torch.zeros(4) + torch.eye(4) * y,
    "by numbers": lambda x, y: x[y.argsort(dim=1)[0]],
    "strided": lambda x, y: torch.empty_like(x.t()).copy_(y).t() + x,
    "backwards": lambda x, y: _gradient(x, y),
    "composed of others": lambda x, y: _flattened(x, y),
}


def _first_row_replaced(x: Tensor, y: Tensor) -> Tensor:
    copy = x.clone()
    copy[0] = y[1]
    return copy


def _flattened(x: Tensor, y: Tensor) -> Tensor:
    with torch.inference_mode():  # where PyTorch leaves its composed operations whole
        return torch.cat((x[:, :2].flatten(), y.t().reshape(-1)[:8])).unflatten(0, (4, 4))


class _ReadingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * gradient.tolist()[0]


def _gradient_by_a_function(x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    _ReadingBackward.apply(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def _gradient_by_a_hook(x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    doubled = leaf * 2
    doubled.register_hook(lambda gradient: gradient * gradient.numpy()[0])
    return torch.autograd.grad(doubled.sum(), leaf)[0]


def _gradient(x: Tensor, y: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad((leaf.tanh() @ y).square().sum(), leaf)
    return gradient


@given(names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6), seed=st.integers(0))
def test_a_recording_repeats_on_other_inputs(names: list[str], seed: int) -> None:
    inputs = torch.empty(2, 4, 4)

    def computed() -> Tensor:
        x, y = inputs
        for name in names:
            x, y = STEPS[name](x, y), x.tanh()
        return x + y

    generator = torch.Generator().manual_seed(seed % 2**31)
    recording = None
    for _ in range(3):
        inputs.copy_(torch.randn(inputs.shape, generator=generator))
        if recording is None:
            recording = Recording(computed)
        else:
            recording.replay()
        assert torch.equal(recording.result, computed())


def test_what_is_changed_outside_is_changed_again() -> None:
    total, x = torch.zeros(3), torch.ones(3)
    recording = Recording(lambda: total.add_(x))
    x.fill_(5)
    recording.replay()
    assert recording.result is total
    assert total.tolist() == [6, 6, 6]


def test_memory_is_used_again_once_a_tensor_is_gone() -> None:
    x = torch.ones(1000)

    def chain() -> Tensor:
        y = x
        for _ in range(50):
            y = y + 1
        return y

    recording = Recording(chain)
    assert recording.nbytes == 2 * x.nbytes
    x.zero_()
    recording.replay()
    assert recording.result.unique().tolist() == [50]

    def all_kept() -> Tensor:
        return torch.stack([x + i for i in range(10)])

    assert Recording(all_kept).nbytes == 20 * x.nbytes


def test_recordings_that_take_turns_share_memory() -> None:
    x, memory = torch.ones(1000), RecordingMemory()

    def chain(length: int) -> Tensor:
        y = x
        for _ in range(length):
            y = y * 2 + 1
        return y

    first, second = (Recording(functools.partial(chain, n), memory) for n in (3, 5))
    assert memory.nbytes == 4 * x.nbytes  # one result, and what a chain has at once
    for value, of_first, of_second in ((0, 7, 31), (1, 15, 63)):
        x.fill_(value)
        first.replay()
        assert first.result.unique().tolist() == [of_first]
        second.replay()
        assert second.result.unique().tolist() == [of_second]


def test_memory_goes_with_the_recording_but_for_what_is_in_use() -> None:
    def computed() -> Tensor:
        made = [torch.ones(100 * size).sum() for size in range(1, 9)]  # blocks that fit no other
        return torch.stack(made) * 3

    recording = Recording(computed)
    blocks = [weakref.ref(block) for block in recording._memory._blocks.values()]
    result = recording.result
    del recording
    gc.collect()
    (left,) = [block() for block in blocks if block() is not None]
    assert left.data_ptr() == result.data_ptr()
    assert result.tolist() == [300 * size for size in range(1, 9)]


def test_what_others_keep_of_it_stays_as_it_is() -> None:
    kept: list[Tensor] = []

    def computed() -> Tensor:
        if not kept:  # as a cache does
            kept.append(torch.arange(4.0) * 2)
        return kept[0] + 1

    recording = Recording(computed)
    for _ in range(2):
        assert kept[0].tolist() == [0, 2, 4, 6]
        assert recording.result.tolist() == [1, 3, 5, 7]
        recording.replay()


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda x: x * float(x.sum()), id="value"),
        pytest.param(lambda x: x.nonzero(), id="places"),
        pytest.param(lambda x: x[x > 0], id="truths"),
        pytest.param(lambda x: x.unique(), id="sizes"),
        pytest.param(lambda x: x + torch.rand(3), id="random"),
        pytest.param(lambda x: torch.nn.functional.dropout(x, 0.5), id="dropout"),
        pytest.param(lambda x: x.clone().normal_(), id="in place"),
        pytest.param(lambda x: x if torch.equal(x, x) else x + 1, id="comparison"),
        pytest.param(lambda x: x + x.tolist()[0], id="tolist"),
        pytest.param(lambda x: x + x.numpy()[0], id="numpy"),
        pytest.param(lambda x: x + np.asarray(x)[0], id="asarray"),
        pytest.param(lambda x: x + np.float32(x[0]), id="numpy's number"),
        pytest.param(lambda x: x + np.from_dlpack(x)[0], id="dlpack"),
        pytest.param(lambda x: x + x.storage()[0], id="storage"),
        pytest.param(lambda x: x + bytes(x.untyped_storage())[0], id="bytes"),
        pytest.param(lambda x: x + len(pickle.dumps(x)), id="pickle"),
        pytest.param(lambda x: x + len(repr(x)), id="repr"),
        pytest.param(lambda x: x + len(f"{x}"), id="format"),
        pytest.param(lambda x: x + float(x[0]), id="float"),
        pytest.param(lambda x: x if bool(x[0]) else -x, id="bool"),
        pytest.param(lambda x: x + len(range(x.long()[0])), id="range"),
        pytest.param(lambda x: x.clone().apply_(lambda value: value + 1), id="apply"),
        pytest.param(lambda x: x.clone().map_(x, lambda a, b: a + b), id="map"),
        pytest.param(lambda x: torch.tensor([x[0], x[1]]), id="list"),
        pytest.param(lambda x: torch.as_tensor(data=[[x[0]]]), id="nested list"),
        pytest.param(lambda x: x.new_tensor([x[0], x[1]]), id="new tensor"),
        pytest.param(lambda x: torch.Tensor([x[0], x[1]]), id="old constructor"),
        pytest.param(lambda x: x.tensor_split(x[:1].long())[0].clone(), id="split"),
        pytest.param(lambda x: x + x.data_ptr(), id="address"),
        pytest.param(_gradient_by_a_function, id="backward"),
        pytest.param(_gradient_by_a_hook, id="hook"),
    ],
)
def test_what_cannot_be_repeated_is_refused(broken: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CannotRecord, match="a recording cannot replay"):
        Recording(lambda: broken(torch.ones(3)))


def test_an_operation_reads_anew_in_each_replay() -> None:
    library = torch.library.Library("reading", "DEF")
    library.define("scaled(Tensor x) -> Tensor")
    library.impl("scaled", lambda x: x * x.tolist()[0] + float(x.numpy()[1]), "CPU")
    x = torch.tensor([2.0, 3.0])
    recording = Recording(lambda: torch.ops.reading.scaled(x))
    x.copy_(torch.tensor([5.0, 7.0]))
    recording.replay()
    assert recording.result.tolist() == [32, 42]


def test_others_may_read_while_a_thread_records() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x = torch.ones(3)
    with ThreadPoolExecutor(1) as thread:
        read = []

        def computed() -> Tensor:
            read.append(thread.submit(x.tolist).result())
            return x + 1

        Recording(computed)
    assert read == [[1, 1, 1]]
    assert x.numpy().sum() == 3  # and this thread, afterwards


def test_products_are_repeated_in_their_precision() -> None:
    x, products = torch.randn(2, 64, 64), torch.backends.mkldnn.matmul
    before = products.fp32_precision

    def computed() -> Tensor:
        total = torch.zeros(64, 64)
        for precision in ("bf16", "ieee", "bf16"):
            products.fp32_precision = precision
            total = 2 * total + x[0] @ x[1]
        products.fp32_precision = before
        return total

    recording = Recording(computed)
    x.copy_(torch.randn(x.shape))
    recording.replay()
    assert products.fp32_precision == before
    assert torch.equal(recording.result, computed())


@pytest.mark.usefixtures("native")
def test_a_replay_refuses_a_timestep_without_a_row() -> None:
    backend = fused_backend("cpu")
    rows, parameters = torch.zeros(1, 1, 2, dtype=torch.int64), []
    for inputs in (1, 2, 3):
        parameters += [torch.ones(4, inputs), torch.ones(4)]
    parameters.append(torch.ones(5, 4))
    inputs = tuple(torch.ones(1, 1, 2, size) for size in (1, 2, 3))
    recording = Recording(lambda: backend.token_embedding(inputs, rows, parameters))
    rows[0, 0, 1] = 4
    recording.replay()
    rows[0, 0, 1] = 5  # the table has rows 0 to 4
    with pytest.raises(IndexError, match="timesteps holds 5, but the table has 5 rows"):
        recording.replay()


@pytest.mark.usefixtures("native")
def test_a_replay_refuses_a_task_without_a_mask() -> None:
    backend, ids = fused_backend("cpu"), torch.tensor([0, 2])
    x, weight = torch.ones(2, 3, 32), torch.ones(4, 32)
    bits = torch.full((3, 4, 1), -1, dtype=torch.int32)
    recording = Recording(lambda: backend.masked_linear(x, weight, None, bits, None, ids))
    recording.replay()
    for task in (-1, 3):
        ids[0] = task
        with pytest.raises(IndexError, match=f"task_ids holds {task}, but there are masks for 3"):
            recording.replay()


@pytest.mark.usefixtures("native")
def test_operands_of_kernels_live_as_long_as_the_recording() -> None:
    arrays = [
        np.ones((1, 2, 32), np.float32),  # x
        np.ones((4, 32), np.float32),  # weight
        np.ones(4, np.float32),  # bias
        np.full((1, 4, 1), -1, np.int32),  # weight_bits
        np.full((1, 1), -1, np.int32),  # bias_bits
        np.zeros(1, np.int64),  # task_ids
    ]
    owners = [weakref.ref(array) for array in arrays]
    operands = [torch.from_numpy(array) for array in arrays]
    layer = fused_backend("cpu").masked_linear
    recording = Recording(functools.partial(layer, *operands))
    operands[1].data = torch.zeros(4, 32)  # the tensor leaves its memory, which loses its owner
    del arrays, operands
    gc.collect()
    assert all(owner() is not None for owner in owners)
    recording.result.zero_()
    recording.replay()
    assert recording.result.unique().tolist() == [33]
    del recording
    gc.collect()
    assert not any(owner() is not None for owner in owners)


@pytest.mark.usefixtures("native")
def test_memory_of_kernels_operands_is_used_again() -> None:
    x, seed, add = torch.ones(1000), torch.tensor(3), fused_backend("cpu").dropout_add

    def chain() -> Tensor:
        y = x
        for _ in range(50):
            y = add(y, x, 0.5, seed)
        return y

    recording = Recording(chain)
    assert recording.nbytes == 2 * x.nbytes
    x.fill_(2)
    recording.replay()
    assert torch.equal(recording.result, chain())


@pytest.mark.usefixtures("native")
def test_calls_of_other_threads_are_not_recorded() -> None:
    from concurrent.futures import ThreadPoolExecutor

    add, x = fused_backend("cpu").dropout_add, torch.ones(8)
    seed = torch.tensor(3)
    with ThreadPoolExecutor(1) as thread:

        def computed() -> Tensor:
            thread.submit(add, x, x, 0.5, seed).result()
            return add(x, x, 0.5, seed)

        assert len(Recording(computed).calls) == 1


@pytest.mark.usefixtures("native")
def test_recorded_dropout_draws_anew() -> None:
    add, x, seed = fused_backend("cpu").dropout_add, torch.ones(64), torch.tensor(3)
    recording = Recording(lambda: add(torch.zeros(64), x, 0.5, seed))
    first = recording.result.clone()
    seed.fill_(4)
    recording.replay()
    assert not torch.equal(recording.result, first)
    assert torch.equal(recording.result, add(torch.zeros(64), x, 0.5, seed))
