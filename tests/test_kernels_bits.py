from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from harmodt_kernels import count_bits, pack_bits, unpack_bits, words_for

MASKS = arrays(bool, array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=100))


@settings(deadline=None)
@given(mask=MASKS)
def test_packing_is_undone_by_unpacking(mask: np.ndarray) -> None:
    words = pack_bits(torch.from_numpy(mask))
    assert words.dtype == torch.int32
    assert words.shape == (*mask.shape[:-1], words_for(mask.shape[-1]))
    unpacked = unpack_bits(words, mask.shape[-1])
    assert unpacked.dtype == torch.bool
    np.testing.assert_array_equal(unpacked.numpy(), mask)


@settings(deadline=None)
@given(mask=MASKS)
def test_bits_are_little_endian_and_their_padding_is_zero(mask: np.ndarray) -> None:
    words = pack_bits(torch.from_numpy(mask)).numpy()
    by_numpy = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    size = mask.shape[-1]
    np.testing.assert_array_equal(by_numpy[..., :size], mask)
    assert not by_numpy[..., size:].any()


@settings(deadline=None)
@given(mask=MASKS)
def test_count_bits_counts_the_set_bits(mask: np.ndarray) -> None:
    counts = count_bits(pack_bits(torch.from_numpy(mask)))
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts.numpy(), mask.sum(-1))


@settings(deadline=None)
@given(words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4))
def test_unpacking_is_undone_by_packing(words: list[int]) -> None:
    packed = torch.tensor(words, dtype=torch.int32)
    assert torch.equal(pack_bits(unpack_bits(packed, 32 * len(words))), packed)


@pytest.mark.parametrize(("bit", "word"), [(0, 1), (1, 2), (30, 2**30), (31, -(2**31))])
def test_bit_j_of_a_word_is_element_j(bit: int, word: int) -> None:
    mask = torch.zeros(64, dtype=torch.bool)
    mask[32 + bit] = True
    assert pack_bits(mask).tolist() == [0, word]


def test_a_part_of_a_larger_tensor_is_unpacked_and_counted() -> None:
    mask = torch.rand(4, 6, 96, generator=torch.Generator().manual_seed(0)) < 0.3
    words = pack_bits(mask)[:, 1::2, ::2]
    part = torch.cat((mask[:, 1::2, :32], mask[:, 1::2, 64:]), dim=-1)
    assert torch.equal(unpack_bits(words, 64), part)
    assert torch.equal(count_bits(words), part.sum(-1))


@pytest.mark.parametrize(("size", "words"), [(1, 1), (31, 1), (32, 1), (33, 2), (39, 2), (128, 4)])
def test_words_for(size: int, words: int) -> None:
    assert words_for(size) == words
