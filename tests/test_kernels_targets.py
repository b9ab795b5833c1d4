"""What every kernel compiles to, for GPUs that need not be there."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

# Bytes of shared memory that a block can have on every NVIDIA GPU since compute capability 8.0
# (CUDA's programming guide, technical specifications), and on AMD's: tiles are the same everywhere.
SHARED_MEMORY = {
    **dict.fromkeys(("sm_80", "sm_90", "sm_100"), 99 << 10),
    "gfx942": 64 << 10,
}
# Each target takes a minute or more; --full compiles for all of these. For sm_86, sm_89 and sm_120,
# Triton compiles alike, with smaller tiles: compile_for_targets.py compiles for them by itself.
USUAL = ("sm_90",)
TARGETS = [pytest.param(t, marks=[pytest.mark.full] * (t not in USUAL)) for t in SHARED_MEMORY]
NVIDIA = [target for target in SHARED_MEMORY if target.startswith("sm_")]

Compiled = dict[str, Any]


@pytest.fixture(scope="module")
def compilation(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The kernels, what they were compiled to, and the failures."""
    tool = Path(__file__).with_name("compile_for_targets.py")
    table = tool.parents[1] / "build" / "kernels.json"
    table.unlink(missing_ok=True)
    # Compile for the targets of the chosen tests only.
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    named = {call.params.get("target") for call in chosen if call is not None}
    targets = [target for target in SHARED_MEMORY if target in named] or USUAL
    subprocess.run([sys.executable, str(tool), "--targets", *targets], check=False)
    return json.loads(table.read_text(encoding="utf-8"))


@pytest.fixture
def compiled(compilation: dict[str, Any]) -> list[Compiled]:
    return compilation["compiled"]


def labels(compiled: Iterator[Compiled]) -> list[str]:
    names = ("target", "kernel", "precision", "use", "options")
    return [" | ".join(kernel[name] for name in names) for kernel in compiled]


def test_everything_compiles(compilation: dict[str, Any]) -> None:
    assert compilation["failures"] == []


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_is_left_out(compilation: dict[str, Any], target: str) -> None:
    done = {c["kernel"] for c in compilation["compiled"] if c["target"] == target}
    assert done == set(compilation["kernels"])
    assert len(done) >= 5


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_suffices(compiled: list[Compiled], target: str) -> None:
    mine = (c for c in compiled if c["target"] == target)
    assert labels(c for c in mine if c["shared"] > SHARED_MEMORY[target]) == []


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(compiled: list[Compiled], target: str) -> None:
    # AMD's scalar registers, which come second, spill to vector registers: that costs little
    # Rows of 39 elements, which no model has, are not aligned: Triton 3.6 spills 16 bytes for them.
    mine = (c for c in compiled if c["target"] == target and "39 to" not in c["use"])
    assert labels(c for c in mine if c["spills"][0]) == []


@pytest.mark.parametrize("target", TARGETS)
def test_matrix_units_multiply(compiled: list[Compiled], target: str) -> None:
    # NVIDIA's have no float32
    products = [
        c
        for c in compiled
        if c["target"] == target
        and c["dot"]
        and not (target in NVIDIA and c["precision"] == "fp32")
    ]
    assert products
    assert labels(c for c in products if c["instructions"]["matrix"] == 0) == []


# Most instructions of PTX per product in a loop that does not mask W again, which takes 70 of them
# beside wgmma and tcgen05, and a tenth beside mma.sync, whose products are smaller. By kernel and
# what is in the loop; forward, a ReLU stands for a LayerNorm as well.
STATIONARY_LOOPS = {
    ("masked_linear_kernel", "RELU"): (165, 21),
    ("masked_linear_kernel", "HAS_RESIDUAL"): (50, 7),
    ("masked_linear_kernel", "HAS_RESIDUAL", "DROPOUT"): (110, 14),
    ("masked_linear_input_gradient_kernel",): (45, 7),
    ("masked_linear_input_gradient_kernel", "RELU"): (60, 15),
    ("masked_linear_input_gradient_kernel", "DROPOUT"): (170, 22),
}
# In Triton 3.7 and 3.8 LLVM packs what dropout keeps into words and unpacks it: a fifth more.
MORE_IN_DROPOUT = 1.2 if triton.__version__.startswith(("3.7.", "3.8.")) else 1.0


@pytest.mark.parametrize("target", TARGETS[:-1])
def test_a_stationary_weight_is_not_masked_again_for_each_product(
    compiled: list[Compiled], target: str
) -> None:
    found = set()
    for c in compiled:
        if c["target"] == target and "STATIONARY=True" in c["options"]:
            parts = ("HAS_RESIDUAL", "RELU", "DROPOUT")
            kind = (c["kernel"], *(part for part in parts if f"{part}=True" in c["options"]))
            most = STATIONARY_LOOPS[kind][0 if target in ("sm_90", "sm_100") else 1]
            most *= MORE_IN_DROPOUT if "DROPOUT" in kind else 1.0
            assert c["loop"] <= most, labels([c])
            found.add(kind)
    assert found == set(STATIONARY_LOOPS)


def test_float32_products_are_not_rounded_to_tf32(compiled: list[Compiled]) -> None:
    products = [
        c for c in compiled if c["target"] in NVIDIA and c["dot"] and c["precision"] == "fp32"
    ]
    assert products
    instructions = ((c, c["instructions"]) for c in products)
    assert labels(c for c, count in instructions if count["matrix"] or not count["fma"]) == []


def test_scores_are_rounded_after_each_operation(compiled: list[Compiled]) -> None:
    # a fused multiply-add would change the last bit, which decides ties
    scores = [c for c in compiled if c["target"] in NVIDIA and c["kernel"].startswith("harmony_")]
    assert scores
    assert labels(c for c in scores if c["instructions"]["fma"]) == []


def varied_launches() -> tuple[list[str], list[dict[str, str]]]:
    """Launch kernels with varied rows, groups and dropout; in a process without the interpreter.

    Returns:
        The name of each compilation's kernel, and the failures.
    """
    import compile_for_targets as tool  # it needs Triton without the interpreter

    def cases() -> Iterator[Any]:
        for sequences, tokens, drop in ((1, 1, 0.5), (8, 75, 0.1), (16, 64, 0.25)):
            yield tool.Case("varied", partial(attend, sequences, tokens, drop))
        for steps in ((1, 1, 1), (1, 8, 5), (2, 64, 20)):
            yield tool.token_embedding_case(steps, 39, 128)
        for tasks in (1, 5, 16):
            yield tool.Case("varied", partial(step_of, tasks))

    def attend(sequences: int, tokens: int, drop: float) -> None:
        qkv = torch.empty(sequences, tokens, 3, 2, 16, requires_grad=True)
        out = tool.attention(qkv, slice(tokens // 2, None, 1 + tokens % 2), drop)
        out.backward(torch.empty_like(out))

    def step_of(tasks: int) -> None:
        bits, ids = torch.zeros(50, 32, dtype=torch.int32), torch.zeros(tasks, dtype=torch.int64)
        rates = {"betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 1e-4, "max_norm": 0.25}
        tool.masked_adamw(*torch.zeros(4, 1024), bits, ids, torch.zeros(3), **rates)

    tool.CASES = {"varied": cases}
    result = tool.compile_operation("varied", "sm_80", everything=True)
    return [compiled.kernel for compiled in result.compiled], result.failures


def test_rows_groups_and_dropout_do_not_compile_a_kernel_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        kernels, failures = pool.submit(varied_launches).result()
    assert failures == []
    names = ("attention", "attention_gradient", "masked_adamw")
    names += ("token_embedding", "token_embedding_gradient")
    assert Counter(kernels) == dict.fromkeys([f"{name}_kernel" for name in names], 1)


@pytest.mark.parametrize("target", ["sm_90"])
def test_warps_share_the_products_of_attention(compiled: list[Compiled], target: str) -> None:
    # Triton gives each warp 16 rows of a tile. More warps would compute the same products again.
    # A product of 16-bit operands has 16 * 8 * 16 multiplications.
    size = 16
    found = 0
    for c in compiled:
        options = dict(option.split("=") for option in c["options"].split(", "))
        few = c["kernel"] == "attention_kernel" and options["BLOCK_D"] == str(size)
        if c["target"] == target and c["precision"].startswith("bf16") and few:
            products = 2 * int(options["BLOCK_Q"]) * int(options["BLOCK_K"]) * size
            computed = c["instructions"]["matrix"] * int(options["num_warps"])
            assert computed * 16 * 8 * 16 == products, labels([c])
            found += 1
    assert found
