"""The CPU kernels for every instruction set of this machine, and the library around them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from problems import (
    ADAMW,
    LayerNormProblem,
    LinearProblem,
    attention_by_loops,
    attention_operands,
    largest_error,
)

from harmodt_kernels import (
    REFERENCE,
    Backend,
    BackendUnavailable,
    fused_backend,
    lr_and_corrections_at,
)
from harmodt_kernels.native import library

CPU = torch.device("cpu")


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("sizes", [(5, 63, 60, 97), (2, 7, 257, 130), (1, 1, 1, 1)])
def test_masked_linear(cpu: Backend, sizes, relu) -> None:
    problem = LinearProblem.random(*sizes)
    for of_groups in (False, True):
        computed = problem.computed(cpu, CPU, torch.float32, relu=relu, of_groups=of_groups)
        problem.check(computed, 2e-4, relu)


@pytest.fixture
def bf16_products() -> Iterator[None]:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_bf16_products_by_pytorchs_switch(cpu: Backend, bf16_products: None) -> None:
    """Operands are rounded to bf16; tensors and sums stay in float32."""
    problem = LinearProblem.random(3, 63, 61, 40)
    rounded = LinearProblem.random(3, 63, 61, 40).rounded(torch.bfloat16)
    rounded.bias, exact = problem.bias, problem.expected()
    computed = problem.computed(cpu, CPU, torch.float32)
    bias = computed.pop("bias")  # of no product
    rounded.check(computed, 1e-3)
    assert largest_error(bias, exact["bias"]) < 1e-3
    assert largest_error(computed["y"], exact["y"]) > 1e-3


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("products", ["float32", "bf16"])
def test_more_rows_than_are_packed_at_a_time(cpu: Backend, relu, products, request) -> None:
    if products == "bf16":
        request.getfixturevalue("bf16_products")
    problem = LinearProblem.random(2, 1500, 33, 70).rounded(torch.bfloat16)
    for of_groups in (False, True):
        computed = problem.computed(cpu, CPU, torch.float32, relu=relu, of_groups=of_groups)
        problem.check(computed, 1e-3, relu)


@pytest.mark.parametrize("sizes", [(2, 30, 3000, 140), (2, 30, 140, 3000)])
def test_panels_that_do_not_stay_in_a_cache_together(cpu: Backend, sizes) -> None:
    problem = LinearProblem.random(*sizes)
    problem.check(problem.computed(cpu, CPU, torch.float32), 1e-3)


@pytest.mark.parametrize("sizes", [(3, 40, 2, 16), (2, 9, 3, 21)])
def test_attention(cpu: Backend, sizes) -> None:
    qkv = attention_operands(*sizes)
    queries = slice(1, None, 3)
    exact, leaf = qkv.double().requires_grad_(), qkv.requires_grad_()
    expected = attention_by_loops(exact, queries)
    computed = cpu.attention(leaf, queries, 0.0)
    expected.square().sum().backward()
    computed.square().sum().backward()
    torch.testing.assert_close(computed.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_what_a_threads_memory_held_before_is_not_attended_to(cpu: Backend) -> None:
    qkv, longer = attention_operands(2, 9, 3, 21), attention_operands(2, 40, 3, 21)
    results = []
    for _ in range(2):
        leaf = qkv.clone().requires_grad_()
        computed = cpu.attention(leaf, slice(None), 0.0)
        computed.square().sum().backward()
        results.append((computed.detach(), leaf.grad))
        nothing = torch.full_like(longer, torch.nan).requires_grad_()
        cpu.attention(nothing, slice(None), 0.0).sum().backward()
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("of_groups", [False, True])
def test_masked_layer_norm(cpu: Backend, of_groups) -> None:
    problem = LayerNormProblem.random(3, 130, 39)
    problem.check(problem.computed(cpu, CPU, of_groups), of_groups)


def test_dropout_draws_the_same_with_every_instruction_set(cpu: Backend) -> None:
    operands = torch.zeros(2, 1, 37), torch.ones(2, 1, 37)
    qkv = attention_operands(2, 37, 2, 16)
    torch.manual_seed(3)
    sums, attended = cpu.dropout_add(*operands, 0.5), cpu.attention(qkv, slice(None), 0.5)
    here = library.isa()
    assert library.library().harmodt_use_isa(b"portable")
    torch.manual_seed(3)
    assert torch.equal(cpu.dropout_add(*operands, 0.5), sums)
    torch.testing.assert_close(cpu.attention(qkv, slice(None), 0.5), attended)
    assert library.library().harmodt_use_isa(here.encode())


@pytest.mark.parametrize("task", [-1, 3])
@pytest.mark.usefixtures("native")
def test_a_task_without_a_mask_is_refused(task) -> None:
    backend, ids = fused_backend("cpu"), torch.tensor([0, task])
    x, bits = torch.zeros(2, 5, 32), torch.zeros(3, 1, dtype=torch.int32)
    message = f"task_ids holds {task}, but there are masks for 3 tasks only"
    with pytest.raises(IndexError, match=message):
        backend.masked_linear(x, torch.zeros(4, 32), None, bits[:, None].expand(3, 4, 1), None, ids)
    with pytest.raises(IndexError, match=message):
        backend.masked_layer_norm(x, torch.zeros(32), torch.zeros(32), bits, bits, ids)
    with pytest.raises(IndexError, match=message):
        backend.masked_adamw(*torch.zeros(4, 40), bits, ids, torch.zeros(3), **ADAMW)


def test_selection_and_adamw(cpu: Backend) -> None:
    torch.manual_seed(0)
    tasks, size = 3, 32 * 3000
    bits = torch.randint(-(2**31), 2**31, (tasks, size // 32), dtype=torch.int32)
    dense = torch.randn(tasks, size).round(decimals=2)  # with many ties
    operands = (
        bits, torch.full_like(bits[0], -1), torch.randn(size), dense, dense.roll(1, 1),
        dense.mean(0), torch.rand(tasks) + 0.1,
    )  # fmt: skip
    for importance in ("fisher", "magnitude"):
        results = []
        for backend in (cpu, REFERENCE):
            changed = bits.clone()
            selection = backend.select_harmony(
                *operands, count=700, balance=3.0, importance=importance
            )
            backend.move_weights(changed, selection)
            results.append(changed)
        assert torch.equal(*results)
    first, second = (torch.randn(2, size) for _ in range(2))
    states = []
    for backend in (cpu, REFERENCE):
        weights, gradient = first.clone()
        m, v = second.clone().unbind()
        v = v.abs()
        task = torch.tensor([0])
        rates = torch.tensor(lr_and_corrections_at(3, 0.01, ADAMW["betas"]))
        backend.masked_adamw(weights, gradient, m, v, bits, task, rates, max_norm=1.0, **ADAMW)
        states.append((weights, m, v))
    for computed, expected in zip(*states, strict=True):
        torch.testing.assert_close(computed, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(("groups", "rows"), [(2, 100), (1, 600)])  # one: threads split its rows
@pytest.mark.parametrize("products", ["float32", "bf16"])
def test_results_do_not_depend_on_the_number_of_threads(
    cpu: Backend, products, groups, rows, request
) -> None:
    if products == "bf16":
        request.getfixturevalue("bf16_products")
    problem = LinearProblem.random(groups, rows, 60, 70)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(problem.computed(cpu, CPU, torch.float32))
    torch.set_num_threads(before)
    for other in results[1:]:
        for name, values in other.items():
            assert torch.equal(values, results[0][name]), name


@pytest.mark.parametrize("bf16", [0, 1])
def test_multiply_adds_are_counted_over_repeats_and_threads(cpu: Backend, bf16: int) -> None:
    count = library.library().harmodt_multiply_adds
    assert count(1, bf16, 1) % 64 == 0 < count(1, bf16, 1)
    assert count(7, bf16, 3) == 21 * count(1, bf16, 1)


def test_one_openmp_runtime_is_shared_with_pytorch() -> None:
    program = (
        "import torch\n"
        "from harmodt_kernels import fused_backend\n"
        "torch.ones(1000, 1000) @ torch.ones(1000, 1000)\n"
        "fused_backend('cpu')\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(*sorted({m for m in maps if 'libgomp' in m or 'libomp' in m or 'libiomp' in m}))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    python = [sys.executable, "-c", program]
    result = subprocess.run(python, env=environment, capture_output=True, text=True, check=True)
    assert len(result.stdout.split()) == 1, result.stdout


@pytest.mark.usefixtures("native")
def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("HARMODT_ISA", "sse5")
    with pytest.raises(BackendUnavailable, match="HARMODT_ISA is 'sse5'"):
        fused_backend("cpu")


@pytest.mark.usefixtures("native")
def test_the_variable_holds_the_kernels_to_less(monkeypatch) -> None:
    best = fused_backend("cpu").name
    monkeypatch.setenv("HARMODT_ISA", "portable")
    assert fused_backend("cpu").name == "cpu-portable"
    library.library().harmodt_use_isa(best.removeprefix("cpu-").encode())


@pytest.mark.usefixtures("native")
def test_where_linux_refuses_matrix_units_others_are_used() -> None:
    """It does so where a thread's stack for signals is too small to save them."""
    if fused_backend(CPU).name != "cpu-amx":
        pytest.skip("this machine has no amx")
    program = (
        "import ctypes, struct, sys\n"
        "stack = ctypes.create_string_buffer(1 << 16)\n"
        "size_and_place = struct.pack('PiP', ctypes.addressof(stack), 0, 6000)\n"
        "assert ctypes.CDLL(None).sigaltstack(size_and_place, None) == 0\n"
        "library = ctypes.CDLL(sys.argv[1])\n"
        "library.harmodt_isa.restype = ctypes.c_char_p\n"
        "print(library.harmodt_isa().decode(), library.harmodt_use_isa(b'amx'))\n"
    )
    python = [sys.executable, "-c", program, str(library.PATH)]
    result = subprocess.run(python, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["avx512bf16", "0"]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("size", [0, 40, 5000, -1])
def test_a_library_that_was_cut_short_is_refused(size: int, tmp_path, monkeypatch) -> None:
    path = tmp_path / "libharmodt.so"
    path.write_bytes(library.PATH.read_bytes()[:size])
    monkeypatch.setattr(library, "PATH", path)
    with pytest.raises(
        BackendUnavailable, match=r"libharmodt\.so cannot be used .*install harmodt"
    ):
        fused_backend("cpu")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", list(library._STRUCTURES))
def test_structures_of_other_sizes_are_refused(name: str, tmp_path, monkeypatch) -> None:
    class Longer(library._STRUCTURES[name]):
        _fields_ = [("more", ctypes.c_int64)]  # noqa: RUF012 (ctypes reads a list)

    path = tmp_path / "libharmodt.so"
    path.write_bytes(library.PATH.read_bytes())
    monkeypatch.setattr(library, "PATH", path)
    monkeypatch.setitem(library._STRUCTURES, name, Longer)
    with pytest.raises(
        BackendUnavailable, match=rf"its {name} has \d+ bytes where this version of harmodt has"
    ):
        fused_backend("cpu")


@pytest.mark.usefixtures("native")
def test_a_library_of_other_sources_is_refused(tmp_path, monkeypatch) -> None:
    path = tmp_path / "libharmodt.so"
    path.write_bytes(library.PATH.read_bytes())
    monkeypatch.setattr(library, "PATH", path)
    monkeypatch.setitem(library._FUNCTIONS, "harmodt_no_such_function", (None, []))
    with pytest.raises(
        BackendUnavailable, match=r"harmodt_no_such_function.*install harmodt again"
    ):
        fused_backend("cpu")
