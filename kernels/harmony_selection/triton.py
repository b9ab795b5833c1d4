"""Triton kernels of the harmony selection.

There are two sides. An active weight is a candidate to leave, with its harmony H as score. An
inactive weight is a candidate to enter, with -g·ĝ as score. On both sides the candidates with the
smallest scores are selected. The key of a score is an int32 with the same order. Candidates are
compared by key, then by index: no two are equal, and ties go to the lowest index.

The vector is cut into chunks. One read of the gradients gives the smallest key (the minimum) of
each chunk and side. The C smallest candidates of a side lie in the C chunks with the smallest
minima. So the keys of only these chunks are computed again. The chunks, then the candidates, are
selected without a sort. Four histograms find the largest selected key, one byte after another. A
pass in the order of indices then collects all smaller keys and the first of the equal ones.
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
from .reference import REFUSALS

# Bytes of keys that exist at a time. A single task may need more: up to 9 bytes per weight, if at
# least one weight in 32 moves.
WORKSPACE = 64 << 20

MOST_WORDS_PER_CHUNK = 32

# The size of a program: mask words, tasks (which share a read of the mean gradient), warps, and
# indices of weights to move.
WORDS = 32
TASKS = 8
NUM_WARPS = 4
INDICES = 128
# The size of a program that selects the smallest values of a row: values at a time, and warps.
VALUES = 2048
VALUES_WARPS = 16

# The keys of all finite scores lie between these. REFUSAL + i is the key of refusal i.
REFUSAL = tl.constexpr(-(2**31))
NO_CANDIDATE = tl.constexpr(2**31 - 1)

MASKED, DENSE, LOSS, ZERO_LOSS, MEAN, SCORE = (tl.constexpr(i + 1) for i in range(len(REFUSALS)))


@triton.jit
def harmony(masked, mean, weight, loss, balance, FISHER: tl.constexpr, PAPER: tl.constexpr):
    # The same operations as in reference.py, because the last bit decides ties.
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
    """The int32 keys of float32 scores, with the same order. -0.0 and 0.0 have one key."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    # As integers, negative floats have the reverse order, unless all bits but the sign are flipped.
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
    minima,  # int32 [tasks, 2, chunks]
    signs,  # int32 [tasks, blocks, 2]
    tasks,
    task_groups,
    chunks,
    blocks,
    FISHER: tl.constexpr,
    PAPER: tl.constexpr,
    CHUNK_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
    TASKS: tl.constexpr,
):
    """Computes the smallest key of each chunk and side, and counts agreeing and differing signs.

    A refusal is stored as the minimum of the leaving side, where it is below all keys of scores.
    """
    block, group = tl.program_id(0) // task_groups, tl.program_id(0) % task_groups
    word = block * WORDS + tl.arange(0, WORDS)
    inside = word < words
    bit_index = tl.arange(0, 32)
    bit = 1 << bit_index[None, :]
    # Words beyond the end read the last word again. Their elements are not candidates.
    element = tl.minimum(word, words - 1)[:, None] * 32 + bit_index[None, :]  # [WORDS, 32]
    maskable = tl.load(maskable_bits + word, mask=inside, other=0)
    mean = tl.load(mean_gradient + element)
    # The mean of padding becomes 0, so padding has no score and no sign. A mean that is not finite
    # becomes NaN, so that it still refuses the task.
    mean = tl.where((maskable[:, None] & bit) != 0, mean, mean * 0.0)
    weight = mean if FISHER else tl.load(weights + element)
    balance = tl.cast(balance, tl.float32)
    CHUNKS: tl.constexpr = WORDS // CHUNK_WORDS
    chunk = block * CHUNKS + tl.arange(0, CHUNKS)
    # The refusal of a task whose score is not finite. The mean gradient may be the cause.
    worst = tl.where(tl.abs(mean) < float("inf"), SCORE, MEAN)
    worst = REFUSAL + tl.min(tl.reshape(worst, [CHUNKS, CHUNK_WORDS * 32]), 1)
    side = tl.arange(0, 2)
    first = group * TASKS
    last = tl.minimum(first + TASKS, tasks)
    for task_index in tl.range(first, last, num_stages=3):  # loads run two tasks ahead
        task = tl.cast(task_index, tl.int64)
        masked = tl.load(masked_gradients + task * masked_stride + element)
        dense = tl.load(dense_gradients + task * dense_stride + element)
        active_bits = tl.load(mask_bits + task * mask_stride + word, mask=inside, other=0)
        loss = tl.load(losses + task)
        active = (active_bits[:, None] & bit) != 0
        inactive = ((maskable & ~active_bits)[:, None] & bit) != 0
        score = harmony(masked, mean, weight, loss, balance, FISHER, PAPER)
        score = tl.where(active, score, -(dense * mean))
        key = ordered(score)
        leaving = tl.where(active, key, NO_CANDIDATE)
        leaving = tl.where(tl.abs(score) < float("inf"), leaving, REFUSAL + SCORE)
        leaving = tl.where(tl.abs(dense) < float("inf"), leaving, REFUSAL + DENSE)
        leaving = tl.where(tl.abs(masked) < float("inf"), leaving, REFUSAL + MASKED)
        entering = tl.where(inactive, key, NO_CANDIDATE)
        leaving = tl.min(tl.reshape(leaving, [CHUNKS, CHUNK_WORDS * 32]), 1)
        entering = tl.min(tl.reshape(entering, [CHUNKS, CHUNK_WORDS * 32]), 1)
        leaving = tl.where(leaving == REFUSAL + SCORE, worst, leaving)
        if FISHER and PAPER:
            leaving = tl.where(loss > 0.0, leaving, tl.minimum(leaving, REFUSAL + ZERO_LOSS))
        finite = tl.abs(loss) < float("inf")
        leaving = tl.where(finite, leaving, tl.minimum(leaving, REFUSAL + LOSS))
        smallest = tl.join(leaving, entering)  # [CHUNKS, 2]
        out = minima + task * 2 * chunks + chunk[:, None] + side[None, :] * chunks
        tl.store(out, smallest, mask=chunk[:, None] < chunks)
        # The low half of an int32 counts agreeing signs, the high half differing signs. Both counts
        # are below 2^16. Signs are compared, because a product could underflow.
        counted = (masked != 0.0) & (mean != 0.0)
        sign = tl.where((masked > 0.0) == (mean > 0.0), 1, 1 << 16)
        numbers = tl.sum(tl.sum(tl.where(counted, sign, 0), 1), 0)
        numbers = tl.where(side == 0, numbers & 0xFFFF, numbers >> 16)
        tl.store(signs + (task * blocks + block) * 2 + side, numbers)


@triton.jit(do_not_specialize=["blocks", "chosen"])
def harmony_keys_kernel(
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
    chosen_chunks,  # int32 [tasks, 2, chosen]
    keys,  # int32 [tasks, 2, chosen, CHUNK_WORDS * 32]
    blocks,
    chosen,
    FISHER: tl.constexpr,
    PAPER: tl.constexpr,
    CHUNK_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Computes the keys of all elements of the chosen chunks."""
    task, side = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    row = (tl.program_id(0) % blocks) * WORDS + tl.arange(0, WORDS)
    inside = row < chosen * CHUNK_WORDS
    chosen_chunks += (task * 2 + side) * chosen
    chunk = tl.load(chosen_chunks + row // CHUNK_WORDS, mask=inside, other=0)
    word = chunk * CHUNK_WORDS + row % CHUNK_WORDS
    present = inside & (word < words)
    # Words beyond the end read the last word again, and are not eligible.
    word = tl.minimum(word, words - 1)
    bit_index = tl.arange(0, 32)
    element = word[:, None] * 32 + bit_index[None, :]  # [WORDS, 32]
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
    key = tl.where(
        (eligible[:, None] & (1 << bit_index[None, :])) != 0, ordered(score), NO_CANDIDATE
    )
    keys += (task * 2 + side) * chosen * (CHUNK_WORDS * 32)
    tl.store(keys + row[:, None] * 32 + bit_index[None, :], key, mask=inside[:, None])


@triton.jit
def rising(values, index, size):
    """values[index] of int32 values [size], as uint32 with the same order."""
    value = tl.load(values + index, mask=index < size, other=NO_CANDIDATE)
    return value.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def largest_taken(values, size, wanted, VALUES: tl.constexpr):
    """Find the largest of the `wanted` smallest int32 values [size], as an ordered uint32.

    Also return how many values equal to it are among the `wanted` smallest.
    """
    largest = tl.full([], 0, tl.uint32)
    bin = tl.arange(0, 256)
    # Each pass finds the next byte of `largest` among the values that begin with the bytes found so
    # far. Then `wanted` no longer counts the values with a smaller byte.
    for digit in range(4):
        shift = 24 - 8 * digit
        counts = tl.zeros([256], tl.int32)
        for first in range(0, size, VALUES):
            index = first + tl.arange(0, VALUES)
            value = rising(values, index, size) >> shift
            alike = (index < size) & ((value >> 8) == ((largest >> shift) >> 8))
            counts += tl.histogram((value & 255).to(tl.int32), 256, mask=alike)
        chosen = tl.sum((tl.cumsum(counts, 0) < wanted).to(tl.int32), 0)
        wanted -= tl.sum(tl.where(bin < chosen, counts, 0), 0)
        largest |= chosen.to(tl.uint32) << shift
    return largest, wanted


@triton.jit
def store_smallest(values, size, wanted, chunks, out, CHUNK: tl.constexpr, VALUES: tl.constexpr):
    """Store the indices of the `wanted` smallest int32 values [size], in rising order of the index.

    Ties go to the lowest index. If the values belong to chosen chunks (CHUNK > 1), the elements'
    indices in the whole vector are stored.
    """
    largest, ties = largest_taken(values, size, wanted, VALUES)
    # The number of smaller values, and of equal ones, in the blocks before this one.
    below = tl.full([], 0, tl.int32)
    equal = tl.full([], 0, tl.int32)
    for first in range(0, size, VALUES):
        index = first + tl.arange(0, VALUES)
        value = rising(values, index, size)
        is_below = value < largest
        is_equal = (index < size) & (value == largest)
        # The low half of an int32 counts smaller values, the high half equal values. A block has
        # fewer than 2^16 values.
        kind = tl.where(is_below, 1, tl.where(is_equal, 1 << 16, 0))
        numbers = tl.cumsum(kind, 0) - kind
        equals = equal + (numbers >> 16)
        column = below + (numbers & 0xFFFF) + tl.minimum(equals, ties)
        taken = is_below | (is_equal & (equals < ties))
        element = index
        if CHUNK > 1:
            chunk = tl.load(chunks + index // CHUNK, mask=taken, other=0)
            element = chunk * CHUNK + index % CHUNK
        tl.store(out + column, element, mask=taken)
        numbers = tl.sum(kind, 0)
        below += numbers & 0xFFFF
        equal += numbers >> 16


@triton.jit(do_not_specialize=["size", "chosen"])
def harmony_chunks_kernel(
    minima,  # int32 [rows, size]
    chosen_chunks,  # int32 [rows, chosen]
    size,
    chosen,
    VALUES: tl.constexpr,
):
    """Selects the chunks with the smallest minima."""
    row = tl.program_id(0).to(tl.int64)
    out = chosen_chunks + row * chosen
    store_smallest(minima + row * size, size, chosen, chosen_chunks, out, 1, VALUES)


@triton.jit
def candidates(keys, size, VALUES: tl.constexpr):
    """The number of candidates among keys [size]."""
    number = tl.zeros([VALUES], tl.int32)
    for first in range(0, size, VALUES):
        index = first + tl.arange(0, VALUES)
        key = tl.load(keys + index, mask=index < size, other=NO_CANDIDATE)
        number += (key != NO_CANDIDATE).to(tl.int32)
    return tl.sum(number, 0)


@triton.jit(do_not_specialize=["chunks", "chosen", "blocks", "columns"])
def harmony_elements_kernel(
    keys,  # int32 [tasks, 2, chosen, CHUNK]
    chosen_chunks,  # int32 [tasks, 2, chosen]
    minima,  # int32 [tasks, 2, chunks]
    signs,  # int32 [tasks, blocks, 2]
    leaving,  # int64 [tasks, columns]
    entering,  # int64 [tasks, columns]
    counts,  # int64 [tasks, 3]: moved, signs that agree, signs that differ
    refused,  # uint8 [tasks]
    chunks,
    chosen,
    blocks,
    columns,
    CHUNK: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Selects the elements with the smallest keys, and writes a task's counts and refusal."""
    task, side = (tl.program_id(0) // 2).to(tl.int64), tl.program_id(0) % 2
    size = chosen * CHUNK
    keys += task * 2 * size
    moved = tl.minimum(candidates(keys, size, VALUES), candidates(keys + size, size, VALUES))
    moved = tl.minimum(moved, columns)
    out = leaving if side == 0 else entering
    out += task * columns
    chosen_chunks += task * 2 * chosen
    side_chunks = chosen_chunks + side * chosen
    store_smallest(keys + side * size, size, moved, side_chunks, out, CHUNK, VALUES)
    for first in range(0, columns, VALUES):
        column = first + tl.arange(0, VALUES)
        tl.store(out + column, -1, mask=(column >= moved) & (column < columns))
    total = tl.zeros([VALUES], tl.int64)
    for first in range(0, blocks, VALUES):
        block = first + tl.arange(0, VALUES)
        total += tl.load(signs + (task * blocks + block) * 2 + side, mask=block < blocks, other=0)
    tl.store(counts + task * 3 + 1 + side, tl.sum(total, 0))
    if side == 0:
        tl.store(counts + task * 3, moved)
        least = tl.full([VALUES], NO_CANDIDATE, tl.int32)
        for first in range(0, chosen, VALUES):
            index = first + tl.arange(0, VALUES)
            chunk = tl.load(chosen_chunks + index, mask=index < chosen, other=0)
            minimum = tl.load(minima + task * 2 * chunks + chunk)
            least = tl.minimum(least, minimum)
        reason = tl.min(least, 0) ^ REFUSAL  # a subtraction would overflow
        tl.store(refused + task, tl.where((reason > 0) & (reason <= SCORE), reason, 0))


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
        # Every bit is flipped at most once, so the order does not matter.
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
    """Computes `harmodt::select_harmony`, with the arguments of its schema."""
    tasks, size = len(mask_bits), weights.numel()
    columns = min(count, size)
    chunk_words = words_per_chunk(size, columns)
    chunks = triton.cdiv(size, chunk_words * BITS_PER_WORD)
    chosen = min(max(columns, 1), chunks)  # one chunk even if nothing moves: it holds a refusal
    tasks_at_once = max(1, WORKSPACE // (8 * (chunks + chosen * chunk_words * BITS_PER_WORD)))
    leaving = mask_bits.new_empty(tasks, columns, dtype=torch.int64)
    entering = torch.empty_like(leaving)
    counts = mask_bits.new_empty(tasks, 3, dtype=torch.int64)
    refused = mask_bits.new_empty(tasks, dtype=torch.uint8)
    for first in range(0, tasks, tasks_at_once):
        some = slice(first, first + tasks_at_once)
        operands = {
            "mask_bits": mask_bits[some],
            "maskable_bits": maskable_bits,
            "weights": weights,
            "masked_gradients": masked_gradients[some],
            "dense_gradients": dense_gradients[some],
            "mean_gradient": mean_gradient,
            "losses": losses[some],
        }
        results = {
            "leaving": leaving[some],
            "entering": entering[some],
            "counts": counts[some],
            "refused": refused[some],
        }
        select_some(
            operands,
            results,
            chunks,
            chosen,
            balance=balance,
            FISHER=importance == "fisher",
            PAPER=rule == "paper",
            CHUNK_WORDS=chunk_words,
        )
    return leaving, entering, counts, refused


def words_per_chunk(size: int, count: int) -> int:
    """The words of a chunk. About sqrt(P / C) elements give as many minima as recomputed keys."""
    elements = 2 ** round(math.log2(max(size, 1) / max(count, 1)) / 2)
    return min(max(elements // BITS_PER_WORD, 1), MOST_WORDS_PER_CHUNK)


def operands_of_launch(operands: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    """The launch arguments that both kernels that read gradients need."""
    return {
        **operands,
        "mask_stride": operands["mask_bits"].stride(0),
        "masked_stride": operands["masked_gradients"].stride(0),
        "dense_stride": operands["dense_gradients"].stride(0),
        "words": operands["mask_bits"].shape[1],
        **options,
        "WORDS": WORDS,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }


def select_some(
    operands: dict[str, Tensor],
    results: dict[str, Tensor],
    chunks: int,
    chosen: int,
    **options: Any,
) -> None:
    """Select for as many tasks as the workspace holds, and write to `results`."""
    mask_bits, chunk_words = operands["mask_bits"], options["CHUNK_WORDS"]
    tasks, words = mask_bits.shape
    arguments = operands_of_launch(operands, **options)
    blocks, task_groups = triton.cdiv(words, WORDS), triton.cdiv(tasks, TASKS)
    minima = mask_bits.new_empty(tasks, 2, chunks)
    signs = mask_bits.new_empty(tasks, blocks, 2)
    launch(
        harmony_minima_kernel,
        # Programs that read the same block of the mean gradient have consecutive numbers.
        (blocks * task_groups,),
        **arguments,
        minima=minima,
        signs=signs,
        tasks=tasks,
        task_groups=task_groups,
        chunks=chunks,
        blocks=blocks,
        TASKS=TASKS,
    )
    chosen_chunks = smallest_chunks(minima, chosen)
    rows = chosen * chunk_words
    keys = mask_bits.new_empty(tasks, 2, rows * BITS_PER_WORD)
    key_blocks = triton.cdiv(rows, WORDS)
    launch(
        harmony_keys_kernel,
        (tasks * key_blocks, 2),
        **arguments,
        chosen_chunks=chosen_chunks,
        keys=keys,
        blocks=key_blocks,
        chosen=chosen,
    )
    launch(
        harmony_elements_kernel,
        (2 * tasks,),
        keys=keys,
        chosen_chunks=chosen_chunks,
        minima=minima,
        signs=signs,
        **results,
        chunks=chunks,
        chosen=chosen,
        blocks=blocks,
        columns=results["leaving"].shape[1],
        CHUNK=chunk_words * BITS_PER_WORD,
        VALUES=VALUES,
        num_warps=VALUES_WARPS,
        enable_fp_fusion=False,
    )


def smallest_chunks(minima: Tensor, chosen: int) -> Tensor:
    """The indices of the `chosen` smallest minima in each row of int32 [T, 2, chunks].

    They are in rising order, int32 [T, 2, chosen]. Ties go to the lowest index.
    """
    tasks, sides, chunks = minima.shape
    chosen_chunks = minima.new_empty(tasks, sides, chosen)
    launch(
        harmony_chunks_kernel,
        (tasks * sides,),
        minima=minima,
        chosen_chunks=chosen_chunks,
        size=chunks,
        chosen=chosen,
        VALUES=VALUES,
        num_warps=VALUES_WARPS,
        enable_fp_fusion=False,
    )
    return chosen_chunks


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
