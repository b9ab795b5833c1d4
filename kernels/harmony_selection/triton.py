"""Triton kernels of the harmony selection.

Every element of a task's maskable vector is a candidate on one side at most: an active weight for
leaving, by its harmony H, and an inactive one for entering, by -g·ĝ; on both sides the smallest are
chosen. Its key is one int64: the score in the high half, as an integer of the same order, and the
element's index in the low half, so that no two keys are equal and ties go to the lowest index.

The vector is cut into chunks. One read of the gradients gives the smallest score of each chunk and
side. The C smallest keys of a side lie in the C chunks with the smallest minima, so that only the
keys of these chunks are computed again and sorted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bits import BITS_PER_WORD
from ..launch import launch

# Bytes of keys that exist at a time. One task alone may need more: 17 for each of its weights at
# most, where one in 32 or more of them move.
WORKSPACE = 64 << 20

MOST_WORDS_PER_CHUNK = 32

# Of one program: mask words, tasks that share one read of the mean gradient, warps, indices.
WORDS = 32
TASKS = 8
NUM_WARPS = 4
INDICES = 128

# The integers of all finite scores lie between these two.
REFUSED = tl.constexpr(-(2**31))
NO_CANDIDATE = tl.constexpr(2**31 - 1)
NO_KEY = tl.constexpr(2**63 - 1)


@triton.jit
def harmony(masked, mean, weight, loss, balance, FISHER: tl.constexpr, PAPER: tl.constexpr):
    # Operation by operation as in the reference, because the last bit decides ties.
    agreement = masked * mean
    if not FISHER:
        score = tl.abs(weight)
    elif PAPER:
        ratio = masked * tl.div_rn(tl.cast(1.0, tl.float32), loss)
        score = ratio * ratio
    else:
        score = masked * masked
    return agreement + balance * score if PAPER else balance * agreement + score


@triton.jit
def ordered(score):
    """int32 in the order of the float32 scores; -0.0 equals 0.0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["tasks", "task_groups"])
def harmony_minima_kernel(
    mask_bits,  # int32 [tasks, words], mask_stride apart
    maskable_bits,  # int32 [words]
    weights,  # [32 words]
    masked_gradients,  # [tasks, 32 words], masked_stride apart
    dense_gradients,  # [tasks, 32 words], dense_stride apart
    mean_gradient,  # [32 words]
    losses,  # [tasks]
    mask_stride,
    masked_stride,
    dense_stride,
    words,
    balance,
    minima,  # int64 [tasks, 2, chunks]
    tasks,
    task_groups,
    chunks,
    FISHER: tl.constexpr,
    PAPER: tl.constexpr,
    CHUNK_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
    TASKS: tl.constexpr,
):
    """The smallest score of each chunk and side, in the high half; the low half is the chunk.

    It is REFUSED for the leaving weights of a chunk that holds NaN or infinity. A launch takes no
    structures: what a kernel needs is an argument each.
    """
    block, group = tl.program_id(0) // task_groups, tl.program_id(0) % task_groups
    word = block * WORDS + tl.arange(0, WORDS)
    inside = word < words
    place = tl.arange(0, 32)
    bit = 1 << place[None, :]
    # Beyond the end the last word is read again, as elements that are no candidates.
    element = tl.minimum(word, words - 1)[:, None] * 32 + place[None, :]  # [WORDS, 32]
    maskable = tl.load(maskable_bits + word, mask=inside, other=0)
    mean = tl.load(mean_gradient + element)
    # Padding has no score, but 0 times its NaN or infinity is found.
    mean = tl.where((maskable[:, None] & bit) != 0, mean, mean * 0.0)
    weight = mean if FISHER else tl.load(weights + element)
    balance = tl.cast(balance, tl.float32)
    CHUNKS: tl.constexpr = WORDS // CHUNK_WORDS
    chunk = block * CHUNKS + tl.arange(0, CHUNKS)
    side = tl.arange(0, 2)
    first = group * TASKS
    last = tl.minimum(first + TASKS, tasks)
    for task_index in tl.range(first, last, num_stages=3):  # reads two tasks ahead
        task = tl.cast(task_index, tl.int64)
        masked = tl.load(masked_gradients + task * masked_stride + element)
        dense = tl.load(dense_gradients + task * dense_stride + element)
        active_bits = tl.load(mask_bits + task * mask_stride + word, mask=inside, other=0)
        loss = tl.load(losses + task)
        active = (active_bits[:, None] & bit) != 0
        inactive = ((maskable & ~active_bits)[:, None] & bit) != 0
        score = harmony(masked, mean, weight, loss, balance, FISHER, PAPER)
        score = tl.where(active, score, -(dense * mean))
        largest = tl.maximum(tl.abs(masked), tl.abs(dense), tl.PropagateNan.ALL)
        finite = tl.maximum(largest, tl.abs(score), tl.PropagateNan.ALL) < float("inf")
        image = ordered(score)
        leaving = tl.where(finite, tl.where(active, image, NO_CANDIDATE), REFUSED)
        entering = tl.where(inactive, image, NO_CANDIDATE)
        leaving = tl.min(tl.reshape(leaving, [CHUNKS, CHUNK_WORDS * 32]), 1)
        entering = tl.min(tl.reshape(entering, [CHUNKS, CHUNK_WORDS * 32]), 1)
        usable = tl.abs(loss) < float("inf")
        if FISHER and PAPER:
            usable = usable & (loss > 0.0)
        leaving = tl.where(usable, leaving, REFUSED)
        smallest = tl.join(leaving, entering)  # [CHUNKS, 2]
        key = (smallest.to(tl.int64) << 32) | chunk[:, None]
        out = minima + task * 2 * chunks + chunk[:, None] + side[None, :] * chunks
        tl.store(out, key, mask=chunk[:, None] < chunks)


@triton.jit(do_not_specialize=["blocks", "chosen"])
def harmony_candidates_kernel(
    mask_bits,  # int32 [tasks, words], mask_stride apart
    maskable_bits,  # int32 [words]
    weights,  # [32 words]
    masked_gradients,  # [tasks, 32 words], masked_stride apart
    dense_gradients,  # [tasks, 32 words], dense_stride apart
    mean_gradient,  # [32 words]
    losses,  # [tasks]
    mask_stride,
    masked_stride,
    dense_stride,
    words,
    balance,
    minima,  # int64 [tasks, 2, chosen]
    candidates,  # int64 [tasks, 2, chosen, CHUNK_WORDS * 32]
    blocks,
    chosen,
    FISHER: tl.constexpr,
    PAPER: tl.constexpr,
    CHUNK_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The keys of all elements of the chosen chunks. Its arguments are those of the one above."""
    task, side = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    row = (tl.program_id(0) % blocks) * WORDS + tl.arange(0, WORDS)
    inside = row < chosen * CHUNK_WORDS
    minima += (task * 2 + side) * chosen
    chunk = tl.load(minima + row // CHUNK_WORDS, mask=inside, other=0).to(tl.int32)
    word = chunk * CHUNK_WORDS + row % CHUNK_WORDS
    present = inside & (word < words)
    # Beyond the end the last word is read again, as elements that are no candidates.
    word = tl.minimum(word, words - 1)
    place = tl.arange(0, 32)
    element = word[:, None] * 32 + place[None, :]  # [WORDS, 32]
    active_bits = tl.load(mask_bits + task * mask_stride + word)
    mean = tl.load(mean_gradient + element)
    if side == 0:
        masked = tl.load(masked_gradients + task * masked_stride + element)
        weight = mean if FISHER else tl.load(weights + element)
        balance = tl.cast(balance, tl.float32)
        score = harmony(masked, mean, weight, tl.load(losses + task), balance, FISHER, PAPER)
        eligible = active_bits
    else:
        score = -(tl.load(dense_gradients + task * dense_stride + element) * mean)
        eligible = tl.load(maskable_bits + word) & ~active_bits
    eligible = tl.where(present, eligible, 0)
    key = (ordered(score).to(tl.int64) << 32) | element
    key = tl.where((eligible[:, None] & (1 << place[None, :])) != 0, key, NO_KEY)
    candidates += (task * 2 + side) * chosen * (CHUNK_WORDS * 32)
    tl.store(candidates + row[:, None] * 32 + place[None, :], key, mask=inside[:, None])


@triton.jit(do_not_specialize=["blocks", "columns"])
def move_weights_kernel(
    mask_bits,  # int32 [tasks, words], mask_stride apart
    leaving,  # int64 [tasks, columns]
    entering,  # int64 [tasks, columns]
    blocks,
    columns,
    mask_stride,
    BLOCK: tl.constexpr,
):
    task = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask_bits += task * mask_stride
    for side in tl.static_range(2):
        indices = entering if side else leaving
        index = tl.load(indices + task * columns + column, mask=column < columns, other=-1)
        bit = 1 << (index % 32).to(tl.int32)
        # Every bit is flipped once, so that the order does not matter.
        tl.atomic_xor(mask_bits + index // 32, bit, mask=index >= 0, sem="relaxed")


def select_harmony(
    mask_bits: Tensor,
    maskable_bits: Tensor,
    weights: Tensor,
    masked_gradients: Tensor,
    dense_gradients: Tensor,
    mean_gradient: Tensor,
    losses: Tensor,
    count: int,
    balance: float,
    importance: str,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`harmodt::select_harmony`, whose arguments, one by one, are those of its schema."""
    tasks, size = len(mask_bits), weights.numel()
    columns = min(count, size)
    chunk_words = words_per_chunk(size, columns)
    chunks = triton.cdiv(size, chunk_words * BITS_PER_WORD)
    chosen = min(max(columns, 1), chunks)  # one even if nothing moves: it tells what is refused
    tasks_at_once = max(1, WORKSPACE // (16 * (chunks + chosen * chunk_words * BITS_PER_WORD)))
    leaving = mask_bits.new_empty(tasks, columns, dtype=torch.int64)
    entering = torch.empty_like(leaving)
    moved = mask_bits.new_empty(tasks, dtype=torch.int64)
    refused = mask_bits.new_empty(tasks, dtype=torch.bool)
    for first in range(0, tasks, tasks_at_once):
        part = slice(first, first + tasks_at_once)
        operands = {
            "mask_bits": mask_bits[part],
            "maskable_bits": maskable_bits,
            "weights": weights,
            "masked_gradients": masked_gradients[part],
            "dense_gradients": dense_gradients[part],
            "mean_gradient": mean_gradient,
            "losses": losses[part],
        }
        keys, refused[part] = smallest_keys(
            operands,
            columns,
            chunks,
            chosen,
            balance=balance,
            FISHER=importance == "fisher",
            PAPER=rule == "paper",
            CHUNK_WORDS=chunk_words,
        )
        moved[part] = (keys != NO_KEY.value).sum(2).amin(1)
        counted = torch.arange(columns, device=keys.device) < moved[part, None, None]
        leaving[part], entering[part] = torch.where(counted, keys & 0xFFFFFFFF, -1).unbind(1)
    return leaving, entering, moved, refused


def words_per_chunk(size: int, count: int) -> int:
    """Words of about sqrt(P / C) elements: the minima are then as many as the candidates."""
    elements = 2 ** round(math.log2(max(size, 1) / max(count, 1)) / 2)
    return min(max(elements // BITS_PER_WORD, 1), MOST_WORDS_PER_CHUNK)


def smallest_keys(
    operands: dict[str, Tensor],
    columns: int,
    chunks: int,
    chosen: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The smallest keys of both sides, int64 [T, 2, columns] in order, and who is refused [T]."""
    mask_bits = operands["mask_bits"]
    tasks, words = mask_bits.shape
    arguments = {
        **operands,
        "mask_stride": mask_bits.stride(0),
        "masked_stride": operands["masked_gradients"].stride(0),
        "dense_stride": operands["dense_gradients"].stride(0),
        "words": words,
        **options,
        "WORDS": WORDS,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }
    minima = mask_bits.new_empty(tasks, 2, chunks, dtype=torch.int64)
    task_groups = triton.cdiv(tasks, TASKS)
    launch(
        harmony_minima_kernel,
        # Programs that read the same part of the mean gradient run next to each other.
        (triton.cdiv(words, WORDS) * task_groups,),
        **arguments,
        minima=minima,
        tasks=tasks,
        task_groups=task_groups,
        chunks=chunks,
        TASKS=TASKS,
    )
    minima = minima.topk(chosen, largest=False).values
    refused = (minima[:, 0, :1] >> 32 == REFUSED.value).any(1)
    rows = chosen * options["CHUNK_WORDS"]
    candidates = mask_bits.new_empty(tasks, 2, rows * BITS_PER_WORD, dtype=torch.int64)
    blocks = triton.cdiv(rows, WORDS)
    launch(
        harmony_candidates_kernel,
        (tasks * blocks, 2),
        **arguments,
        minima=minima,
        candidates=candidates,
        blocks=blocks,
        chosen=chosen,
    )
    return candidates.topk(columns, largest=False).values, refused


def move_weights(mask_bits: Tensor, leaving: Tensor, entering: Tensor) -> None:
    tasks, columns = leaving.shape
    blocks = triton.cdiv(columns, INDICES)
    launch(
        move_weights_kernel,
        (tasks * blocks,),
        mask_bits=mask_bits,
        leaving=leaving,
        entering=entering,
        blocks=blocks,
        columns=columns,
        mask_stride=mask_bits.stride(0),
        BLOCK=INDICES,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
