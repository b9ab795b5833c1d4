"""How many kernels a training step launches on a GPU, where they are what it waits for."""

from __future__ import annotations

import pytest
from count_launches import step_launches


@pytest.mark.parametrize(
    ("groups", "dropout", "precision", "most"),
    [
        *((1, 0.0, "fp32", 130), (5, 0.1, "fp32", 130), (50, 0.1, "fp32", 136)),
        *((1, 0.0, "bf16", 132), (50, 0.1, "bf16", 138)),
    ],
)
def test_a_step_launches_no_more_kernels_than_it_did(groups, dropout, precision, most) -> None:
    of_triton, of_pytorch = step_launches(groups, dropout, precision=precision)
    stationary = of_triton["stationary masked_linear_kernel"]
    # three layers of each block; the last block's attention ends in too few rows for one
    assert stationary == (17 if groups == 50 and precision == "bf16" else 0)
    assert of_triton["masked_linear_kernel"] == 25 - stationary
    assert of_triton["attention_kernel"] == 6
    assert of_triton.total() + of_pytorch.total() <= most
