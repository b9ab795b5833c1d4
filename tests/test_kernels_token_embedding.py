from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from harmodt_kernels import Backend, fused_backend
from harmodt_kernels.token_embedding import token_embedding


@dataclass
class Problem:
    """Operands: some inputs are wider than others, and steps share their time."""

    inputs: list[Tensor]
    timesteps: Tensor
    parameters: list[Tensor]
    d_tokens: Tensor

    @classmethod
    def random(cls, shape: tuple[int, ...], widths: tuple[int, int, int], size: int) -> Problem:
        generator = torch.Generator().manual_seed(size)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        parameters = [part for width in widths for part in (draw(size, width), draw(size))]
        return cls(
            [draw(*shape, width) for width in widths],
            torch.randint(7, shape, generator=generator) * 5,
            [*parameters, draw(40, size)],
            draw(*shape, 3, size),
        )

    def computed(
        self, backend: Backend, device: torch.device, in_place: bool = False
    ) -> list[Tensor]:
        """The tokens, the gradients of the inputs and those of the parameters."""
        inputs, parameters = (
            [t.clone().to(device).requires_grad_() for t in tensors]
            for tensors in (self.inputs, self.parameters)
        )
        outs = [torch.full_like(p, torch.nan)[None] for p in parameters] if in_place else None
        tokens = backend.token_embedding(inputs, self.timesteps.to(device), parameters, outs)
        tokens.backward(self.d_tokens.to(device))
        of_parameters = [p.grad for p in parameters]
        if outs is not None:
            assert of_parameters == [None] * 7
            of_parameters = [out[0] for out in outs]
        return [tokens.detach(), *(x.grad for x in inputs), *of_parameters]

    def expected(self) -> list[Tensor]:
        """In float64, a step at a time."""
        size, steps = self.d_tokens.shape[-1], self.timesteps.numel()
        *layers, table = (p.double() for p in self.parameters)
        inputs = [x.double().view(steps, x.shape[-1]) for x in self.inputs]
        d_tokens = self.d_tokens.double().view(steps, 3, size)
        tokens = torch.zeros_like(d_tokens)
        d_inputs, d_parameters = (
            [torch.zeros_like(t) for t in tensors] for tensors in (inputs, [*layers, table])
        )
        for step, time in enumerate(self.timesteps.flatten().tolist()):
            for kind in range(3):
                weight, bias = layers[2 * kind : 2 * kind + 2]
                x, d = inputs[kind][step], d_tokens[step, kind]
                tokens[step, kind] = weight @ x + bias + table[time]
                d_inputs[kind][step] = d @ weight
                d_parameters[2 * kind] += d[:, None] * x
                d_parameters[2 * kind + 1] += d
                d_parameters[-1][time] += d
        d_inputs = [d.view(x.shape) for d, x in zip(d_inputs, self.inputs, strict=True)]
        return [tokens.view(self.d_tokens.shape), *d_inputs, *d_parameters]

    def check(self, computed: list[Tensor]) -> None:
        for values, expected in zip(computed, self.expected(), strict=True):
            torch.testing.assert_close(values.double().cpu(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "sizes", [((2, 3, 12), (1, 39, 4), 128), ((70,), (1, 70, 33), 24), ((0, 2), (1, 3, 4), 8)]
)
def test_equals_the_formulas(backend, device, sizes, in_place) -> None:
    problem = Problem.random(*sizes)
    problem.check(problem.computed(backend, device, in_place))


@pytest.mark.parametrize("rows_used", [1, 3, 40], ids=str)
def test_many_steps_of_few_timesteps(monkeypatch, implementation, device, rows_used) -> None:
    if implementation == "triton":  # several parts, sums of parts and ranges of timesteps
        kernels = importlib.import_module("harmodt_kernels.token_embedding.triton")
        for name, value in (("BLOCKS_OF_PART", 1), ("PARTS", 2), ("TIMESTEPS", 64)):
            monkeypatch.setattr(kernels, name, value)
    problem = Problem.random((260,), (1, 16, 4), 5)
    problem.timesteps %= rows_used
    computed = problem.computed(fused_backend(device), device)
    for values, expected in zip(computed, problem.expected(), strict=True):
        error = (values.double().cpu() - expected).abs().max()
        assert error <= 1e-5 * max(1.0, expected.abs().max())
    again = problem.computed(fused_backend(device), device)
    assert all(map(torch.equal, again, computed))


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
def test_the_lists_of_steps_do_not_overlap(monkeypatch, device) -> None:
    kernels = importlib.import_module("harmodt_kernels.token_embedding.triton")
    problem, lists = Problem.random((260,), (1, 3, 4), 40), []
    launch = kernels.launch

    def noted(*args: object, **arguments: object) -> None:
        lists.append(arguments.get("order"))
        launch(*args, **arguments)

    monkeypatch.setattr(kernels, "launch", noted)
    monkeypatch.setattr(kernels, "TIMESTEPS", 64)
    problem.computed(fused_backend(device), device)
    block_of = problem.timesteps // kernels.GRADIENT_TILE[2]
    expected = torch.sort(block_of, stable=True).indices
    assert len(lists[-1]) == 2  # two tiles of token elements
    assert all(torch.equal(order.long().cpu(), expected) for order in lists[-1])


def test_the_gradient_can_be_computed_twice(device) -> None:
    problem = Problem.random((2, 3), (1, 39, 4), 40)
    parameters = [p.clone().to(device).requires_grad_() for p in problem.parameters]
    inputs = [x.to(device) for x in problem.inputs]
    tokens = fused_backend(device).token_embedding(inputs, problem.timesteps.to(device), parameters)
    d_tokens = problem.d_tokens.to(device)
    first, second = (
        torch.autograd.grad(tokens, parameters, d_tokens, retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_the_gradient_of_many_tasks_has_few_serial_iterations() -> None:
    # 50 tasks with 8 windows each; a window has 20 steps, and its prompt 5
    kernels = pytest.importorskip("harmodt_kernels.token_embedding.triton")
    block_s, _, rows = kernels.GRADIENT_TILE
    generator = np.random.default_rng(0)
    serial, blocks = 0, 0
    for length in (20, 5):
        starts = generator.integers(-length + 1, 500 - length, 50 * 8)
        times = np.maximum(starts[:, None] + np.arange(length), 0).ravel()  # padded steps: time 0
        steps, widths = times.size, (1, 39, 4)
        plan = kernels.gradient_plan(steps, widths, 1000)
        of_part = -(-steps // (block_s * plan.parts))
        sums = -(-(max(widths) + 1) // rows) * -(-plan.parts // kernels.PARTS)
        most = np.bincount(times // rows).max()
        of_table = 2 * -(-steps // kernels.TIMESTEPS) + -(-most // block_s)
        serial += max(of_part + sums, of_table)
        blocks += -(-steps // block_s)
        assert plan.parts * block_s * of_part >= steps
    assert blocks == 157  # the iterations of programs that go through all steps
    assert serial <= 30


def test_results_repeat_bit_for_bit(backend, device) -> None:
    problem = Problem.random((3, 40), (1, 39, 4), 40)
    first, *others = (problem.computed(backend, device) for _ in range(5))
    assert all(map(torch.equal, other, first) for other in others)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written(device) -> None:
    problem = Problem.random((3, 5), (1, 39, 4), 40)
    problem.check(problem.computed(fused_backend(device), device))


def test_products_stay_in_float32_under_autocast(device) -> None:
    problem = Problem.random((3, 5), (1, 39, 4), 40)
    with torch.autocast(device.type, torch.bfloat16):
        problem.check(problem.computed(fused_backend(device), device))


def test_the_registered_operations_keep_pytorchs_rules(device) -> None:
    problem = Problem.random((2, 3), (1, 39, 4), 40)
    inputs, parameters = (
        [t.to(device) for t in tensors] for tensors in (problem.inputs, problem.parameters)
    )
    timesteps, outs = problem.timesteps.to(device), [torch.zeros_like(p)[None] for p in parameters]
    ops = torch.ops.harmodt
    torch.library.opcheck(ops.token_embedding, (inputs, timesteps, parameters))
    _, arrivals = ops.token_embedding(inputs, timesteps, parameters)
    d_tokens = problem.d_tokens.to(device)
    torch.library.opcheck(
        ops.token_embedding_gradient, (d_tokens, inputs, timesteps, arrivals, outs)
    )


@pytest.mark.parametrize("time", [-1, 40])
@pytest.mark.parametrize("step", [0, 5])
def test_a_time_without_a_row_is_refused(cpu: Backend, time: int, step: int) -> None:
    problem = Problem.random((2, 3), (1, 39, 4), 40)
    problem.timesteps.view(-1)[step] = time
    with pytest.raises(IndexError, match=f"timesteps holds {time}, but the table has 40 rows"):
        cpu.token_embedding(problem.inputs, problem.timesteps, problem.parameters)


@pytest.mark.parametrize("sizes", [((2, 3, 61), (1, 39, 4), 136), ((300,), (2, 7, 5), 9)])
def test_results_do_not_depend_on_the_number_of_threads(cpu: Backend, sizes) -> None:
    problem = Problem.random(*sizes)  # more steps than are summed up at a time
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(problem.computed(cpu, torch.device("cpu"), in_place=True))
    finally:
        torch.set_num_threads(before)
    problem.check(results[0])
    for tokens, _, _, _, *of_parameters in results[1:]:  # PyTorch multiplies those of inputs
        assert torch.equal(tokens, results[0][0])
        assert all(map(torch.equal, of_parameters, results[0][4:]))


def test_compiles_to_one_graph(device) -> None:
    problem = Problem.random((2, 3), (1, 39, 4), 40)
    backend = fused_backend(device)
    compiled = torch.compile(backend.token_embedding, fullgraph=True, backend="aot_eager")
    problem.check(problem.computed(replace(backend, token_embedding=compiled), device))


def test_operands_that_do_not_fit_are_named(device) -> None:
    problem = Problem.random((2, 3), (1, 39, 4), 40)
    problem.timesteps = problem.timesteps.to(device)
    inputs, parameters = (
        [t.to(device) for t in tensors] for tensors in (problem.inputs, problem.parameters)
    )

    def embed(change: int, other: Tensor) -> None:
        changed = [*parameters[:change], other, *parameters[change + 1 :]]
        token_embedding(inputs, problem.timesteps, changed)

    with pytest.raises(TypeError, match=r"parameters\[0\] is torch\.float64"):
        embed(0, parameters[0].double())
    with pytest.raises(ValueError, match=r"parameters\[3\] has shape \[39\]: it must be \[40\]"):
        embed(3, parameters[3][1:])
    with pytest.raises(ValueError, match=r"parameters\[2\] has strides"):
        embed(2, parameters[2].T.contiguous().T)
    with pytest.raises(ValueError, match="there are 2 inputs"):
        token_embedding(inputs[:2], problem.timesteps, parameters)
    with pytest.raises(TypeError, match=r"timesteps is torch\.int32"):
        token_embedding(inputs, problem.timesteps.int(), parameters)


def test_tokens_are_float32_whatever_the_default_is(device) -> None:
    problem = Problem.random((2, 3), (1, 39, 4), 40)
    torch.set_default_dtype(torch.float64)
    try:
        problem.check(problem.computed(fused_backend(device), device))
    finally:
        torch.set_default_dtype(torch.float32)
