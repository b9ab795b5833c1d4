from __future__ import annotations

import zlib
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model, no_masks, unpack_masks

from harmodt.errors import UserError
from harmodt.masks.bank import MaskBank, TaskMasks, vote
from harmodt.masks.initialisation import (
    erk_counts,
    erk_densities,
    sparsities_by_loss,
    uniform_counts,
)
from harmodt.networks.decision_transformer import DecisionTransformer, TransformerConfig
from harmodt_kernels import REFERENCE, MaskedLinear, pack_bits
from harmodt_kernels.vector import ParameterVector

SHAPES = st.lists(
    st.tuples(st.integers(2, 300), st.integers(1, 300))
    | st.tuples(st.just(1), st.integers(1, 300)),
    min_size=1,
    max_size=12,
)


def make_transformer(dimension: int = 32, heads: int = 2, layers: int = 2) -> DecisionTransformer:
    config = TransformerConfig(
        39, 4, embed_dim=dimension, layers=layers, heads=heads, max_timesteps=20, prompt_length=2
    )
    return make_model(config, tasks=1)


def draw_bank(vector: Any, sparsities: list[float], *how: Any, **more: Any) -> MaskBank:
    bank = MaskBank.empty(vector, len(sparsities))
    bank.draw(sparsities, *how, **more)
    return bank


def make_bank(tasks: int, sparsity: float = 0.2, seed: int = 0, dimension: int = 32) -> MaskBank:
    return draw_bank(make_transformer(dimension).vector, [sparsity] * tasks, seed)


def unpack(bits: torch.Tensor) -> np.ndarray:
    return np.unpackbits(bits.numpy().view(np.uint8), axis=-1, bitorder="little").astype(bool)


def bank_of(masks: np.ndarray) -> MaskBank:
    """Masks of a single layer of as many weights."""
    layer = MaskedLinear(masks.shape[1], 1, bias=False)
    vector = ParameterVector(layer, torch.device("cpu"))
    return MaskBank(vector, pack_bits(torch.from_numpy(masks)))


@settings(deadline=None)
@given(shapes=SHAPES, sparsity=st.floats(0, 0.999))
def test_erk_densities_solve_for_the_overall_density(shapes, sparsity) -> None:
    densities = np.array(erk_densities(shapes, sparsity))
    sizes = np.array([rows * columns for rows, columns in shapes])
    scores = np.array(
        [(rows + columns) / (rows * columns) if rows > 1 else 1.0 for rows, columns in shapes]
    )
    assert (densities * sizes).sum() == pytest.approx((1 - sparsity) * sizes.sum(), rel=1e-9)
    low, high = 0.0, 1e6
    for _ in range(200):  # the count of active weights grows with ε
        epsilon = (low + high) / 2
        count = (np.minimum(epsilon * scores, 1) * sizes).sum()
        low, high = (low, epsilon) if count > (1 - sparsity) * sizes.sum() else (epsilon, high)
    np.testing.assert_allclose(densities, np.minimum(low * scores, 1), rtol=1e-6)


def test_erk_densities_of_a_layer_by_hand() -> None:
    # 2/10 per weight of the matrix and 1 for each of the vector's: ε = 0.5
    assert erk_densities([(10, 10), (1, 10)], 1 - 15 / 110) == pytest.approx([0.1, 0.5])
    # the vector would get 2, becomes dense, and the matrix takes the rest
    assert erk_densities([(10, 10), (1, 10)], 0.5) == pytest.approx([0.45, 1.0])


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(UserError, match=r"sparsity is .*\[0, 1\)"):
        make_bank(2, sparsity)


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(("dimension", "heads"), [(32, 2), (24, 3)])
def test_every_mask_has_the_erk_count_in_every_tensor(sparsity, dimension, heads) -> None:
    model = make_transformer(dimension, heads)
    bank = draw_bank(model.vector, [sparsity] * 3, seed=5)
    parameters = dict(model.named_parameters())
    names = [name for name in parameters if name.startswith(("blocks.", "final_norm."))]
    shapes = [tuple(parameters[name].shape) for name in names]
    densities = erk_densities([s if len(s) == 2 else (1, *s) for s in shapes], sparsity)
    for bits in bank.bits:
        masks = unpack_masks(model, bits)
        assert list(masks) == names
        counts = [int(mask.sum()) for mask in masks.values()]
        assert counts == [
            round(density * mask.numel())
            for density, mask in zip(densities, masks.values(), strict=True)
        ]
        share = sum(counts) / model.vector.maskable_count()
        assert share == pytest.approx(1 - sparsity, abs=1e-3)
    assert not (bank.bits & ~bank.maskable_bits).any()
    assert bank.active_counts().tolist() == [sum(counts)] * 3


@pytest.mark.parametrize(
    ("sizes", "tasks", "sparsity", "seed", "drawn"),
    [
        ((32, 2, 2), 3, 0.2, 0, 0xF0B329E0),
        ((24, 3, 2), 2, 0.9, 7, 0x924B737D),
        ((128, 8, 6), 2, 0.2, 0, 0x08244D2D),
    ],
)
def test_a_draw_is_that_of_every_version(sizes, tasks, sparsity, seed, drawn) -> None:
    """Runs of one seed compare across versions as long as their masks are the same."""
    bank = draw_bank(make_transformer(*sizes).vector, [sparsity] * tasks, seed)
    assert zlib.crc32(bank.bits.numpy().tobytes()) == drawn


def parts(model: DecisionTransformer, bits: torch.Tensor) -> tuple[dict, dict]:
    """A mask's matrices and its vectors, by name."""
    masks = unpack_masks(model, bits)
    matrices = {name: mask for name, mask in masks.items() if mask.dim() == 2}
    return matrices, {name: mask for name, mask in masks.items() if mask.dim() == 1}


@settings(max_examples=25, deadline=None)
@given(
    sparsity=st.floats(0, 0.95),
    dimension=st.sampled_from([24, 32]),
    seed=st.integers(0, 2**32),
)
def test_uniform_masks_have_one_density_in_all_matrices(sparsity, dimension, seed) -> None:
    model = make_transformer(dimension)
    initialise = partial(draw_bank, model.vector, [sparsity] * 2, seed)
    bank, erk = initialise("uniform"), initialise("erk")
    assert torch.equal(bank.active_counts(), erk.active_counts())
    for bits in bank.bits:
        matrices, vectors = parts(model, bits)
        assert all(mask.all() for mask in vectors.values())
        counts = {name: int(mask.sum()) for name, mask in matrices.items()}
        whole = sum(mask.numel() for mask in matrices.values())
        for name, mask in matrices.items():  # a share of the whole, up or down to an integer
            assert abs(counts[name] - Fraction(mask.numel() * sum(counts.values()), whole)) < 1
    assert torch.equal(initialise("uniform").bits, bank.bits)
    if sparsity > 0.01:
        assert not torch.equal(*bank.bits)
    assert not (bank.bits & ~bank.maskable_bits).any()


def test_what_a_uniform_share_leaves_goes_to_the_largest_remainders() -> None:
    layer = torch.nn.ModuleList(MaskedLinear(n, m, bias=False) for n, m in ((1, 3), (2, 3), (2, 2)))
    slots = ParameterVector(layer, torch.device("cpu")).maskable_slots
    assert sum(erk_counts(slots, 7 / 13)) == 6
    assert uniform_counts(slots, 7 / 13) == [1, 3, 2]  # of 1.38, 2.77 and 1.85


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sparsities=st.lists(st.floats(0, 0.95), min_size=1, max_size=3),
    dimension=st.sampled_from([24, 32]),
    digits=st.sampled_from([2, 9]),  # of 0.02 deviation: many ties, or hardly one
)
def test_masks_by_magnitude_are_a_sort(seed, sparsities, dimension, digits) -> None:
    model = make_transformer(dimension)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        drawn = 0.02 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(drawn.round(decimals=digits))
    bank = draw_bank(model.vector, sparsities, seed, "magnitude")
    erk = draw_bank(model.vector, sparsities, seed)
    assert torch.equal(bank.active_counts(), erk.active_counts())
    parameters = dict(model.named_parameters())
    for bits in bank.bits:
        matrices, vectors = parts(model, bits)
        assert all(mask.all() for mask in vectors.values())
        theta = np.concatenate([parameters[n].detach().double().flatten() for n in matrices])
        kept = np.concatenate([mask.numpy().ravel() for mask in matrices.values()])
        best = sorted(range(len(theta)), key=lambda i: (-abs(theta[i]), i))[: kept.sum()]
        assert np.flatnonzero(kept).tolist() == sorted(best)
    assert not (bank.bits & ~bank.maskable_bits).any()


@pytest.mark.parametrize("initialisation", ["uniform", "magnitude"])
def test_where_vectors_alone_are_too_many_the_share_is_named(initialisation: str) -> None:
    vector = make_transformer().vector  # 3.5 % of its maskable weights are in vectors
    draw_bank(vector, [0.96], 0, initialisation)
    with pytest.raises(
        UserError, match=r"sparsity is 0\.97, but uniform .* are 3\.5% of the maskable"
    ):
        draw_bank(vector, [0.5, 0.97], 0, initialisation)


@pytest.mark.parametrize("initialisation", ["erk", "uniform"])
def test_a_shared_mask_is_the_first_tasks(initialisation: str) -> None:
    vector = make_transformer().vector
    initialise = partial(draw_bank, vector, [0.3] * 3, 5, initialisation)
    assert torch.equal(initialise(shared=True).bits, initialise().bits[:1].expand(3, -1))


def test_every_task_has_the_count_of_its_own_sparsity() -> None:
    model, sparsities = make_transformer(), [0.0, 0.9, 0.2, 0.5]
    for initialisation in ("erk", "uniform", "magnitude"):
        bank = draw_bank(model.vector, sparsities, 3, initialisation)
        for task, sparsity in enumerate(sparsities):
            same = draw_bank(model.vector, [sparsity] * 4, 3, initialisation)
            assert torch.equal(bank.bits[task], same.bits[task])


@settings(deadline=None)
@given(
    losses=st.lists(st.integers(0, 4).map(float), min_size=1, max_size=12),
    bounds=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
)
def test_the_sparsity_falls_evenly_with_the_rank_of_the_loss(losses, bounds) -> None:
    low, high = sorted(bounds)
    found = sparsities_by_loss(torch.tensor(losses), low, high)
    assert np.mean(found) == pytest.approx((low + high) / 2)
    order = sorted(range(len(losses)), key=lambda i: (losses[i], i))
    expected = np.linspace(high, low, len(losses)) if len(losses) > 1 else [(low + high) / 2]
    np.testing.assert_allclose([found[i] for i in order], expected, atol=1e-12)
    assert all(0 <= sparsity < 1 for sparsity in found)


def test_tasks_are_drawn_independently_and_evenly() -> None:
    tasks, model = 200, make_transformer()
    bank = draw_bank(model.vector, [0.5] * tasks, seed=0)
    slot = model.vector.slots["blocks.1.mlp_up.weight"]
    masks = np.stack(
        [unpack_masks(model, bits)["blocks.1.mlp_up.weight"].numpy().ravel() for bits in bank.bits]
    )
    density = masks[0].mean()
    assert slot.rows * slot.columns == masks.shape[1]
    votes = masks.sum(0)
    variance = tasks * density * (1 - density)
    assert votes.var() == pytest.approx(variance, rel=0.1)
    assert abs(votes - tasks * density).max() < 5 * variance**0.5
    pairs = (masks[:-1] & masks[1:]).mean()
    assert pairs == pytest.approx(density**2, rel=0.01)
    # nor do two tensors of one task go together
    other = np.stack(
        [unpack_masks(model, bits)["blocks.0.mlp_up.weight"].numpy().ravel() for bits in bank.bits]
    )
    assert (masks & other).mean() == pytest.approx(density**2, rel=0.01)


def test_a_draw_depends_on_the_seed_and_the_task_alone() -> None:
    bank = make_bank(3, seed=1)
    assert torch.equal(make_bank(3, seed=1).bits, bank.bits)
    assert torch.equal(make_bank(2, seed=1).bits, bank.bits[:2])
    for other in (0, 2):
        assert not (make_bank(3, seed=other).bits == bank.bits).all(1).any()
    torch.manual_seed(8)
    assert torch.equal(make_bank(3, seed=1).bits, bank.bits)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    tasks=st.integers(1, 12) | st.just(100),
    threshold=st.integers(0, 99),
)
def test_a_vote_is_a_count_above_the_threshold(seed: int, tasks: int, threshold: int) -> None:
    masks = np.random.default_rng(seed).random((tasks, 96)) < threshold / 100
    expected = masks.sum(0) * 100 > threshold * tasks
    voted = vote(bank_of(masks).bits, threshold / 100)
    np.testing.assert_array_equal(unpack(voted), expected)


def test_half_of_the_tasks_do_not_pass_the_default_vote() -> None:
    masks = np.arange(64)[None] >= 10 * np.arange(4)[:, None]
    voted = vote(bank_of(masks).bits)
    assert np.flatnonzero(unpack(voted)).tolist() == list(range(20, 64))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sparsity=st.sampled_from([0.0, 0.05, 0.2, 0.9]),
    dimension=st.sampled_from([24, 32]),
    counts=st.lists(st.sampled_from([0, 1, 50, 10**6]), min_size=1, max_size=4),
    importance=st.sampled_from(["fisher", "magnitude"]),
)
def test_updates_keep_counts_and_padding(seed, sparsity, dimension, counts, importance) -> None:
    model = make_transformer(dimension)
    bank = draw_bank(model.vector, [sparsity] * 3, seed)
    before = bank.active_counts()
    generator = torch.Generator().manual_seed(seed)
    size = model.vector.maskable_size
    for count in counts:
        dense = torch.randn(3, size, generator=generator).round(decimals=1)
        masked = dense * torch.from_numpy(unpack(bank.bits))
        selection = REFERENCE.select_harmony(
            bank.bits,
            bank.maskable_bits,
            model.vector.weights[:size],
            masked,
            dense,
            masked.mean(0),
            torch.rand(3, generator=generator) + 0.1,
            count=count,
            balance=10.0,
            importance=importance,
        )
        REFERENCE.move_weights(bank.bits, selection)
        assert torch.equal(bank.active_counts(), before)
        assert not (bank.bits & ~bank.maskable_bits).any()


def test_masks_are_stored_as_bits_alone() -> None:
    model = make_transformer(128, 8, layers=6)  # the paper's
    per_task = draw_bank(model.vector, [0.2], 0).bits.nbytes
    assert model.vector.maskable_count() > 1.18e6
    assert 1000 * per_task <= 160e6


def test_without_bits_every_layer_is_dense() -> None:
    model = make_transformer()
    layer = model.blocks[0].qkv
    assert no_masks(model, 3).of(layer) is None
    gradients = torch.zeros(3, model.vector.maskable_size)
    masks = TaskMasks(model.vector, None, torch.tensor([0, 2, 1]), gradients).of(layer)
    assert masks.weight_bits is masks.bias_bits is None
    weight, bias = masks.group_gradients
    assert (weight.shape, bias.shape) == ((3, 96, 32), (3, 96))
    for part in (weight, bias):
        part.fill_(1.0)  # they are views, each of its own elements
    assert int(gradients.sum()) == 3 * (96 * 32 + 96)


def test_each_layer_gets_its_part_of_the_masks() -> None:
    model = make_transformer(24, 3)
    bank = draw_bank(model.vector, [0.5] * 2, seed=1)
    masks = bank.for_tasks(torch.tensor([1, 1, 0]))
    unpacked = [unpack_masks(model, bits) for bits in bank.bits]
    names = {module: name for name, module in model.named_modules()}
    assert len(model.vector.layers) == 2 * 6 + 1
    for layer in model.vector.layers:
        part = masks.of(layer)
        assert part.task_ids.tolist() == [1, 1, 0]
        assert part.group_gradients is None
        for kind, bits in (("weight", part.weight_bits), ("bias", part.bias_bits)):
            expected = torch.stack([task[f"{names[layer]}.{kind}"] for task in unpacked])
            found = unpack(bits.contiguous())[..., : expected.shape[-1]]
            np.testing.assert_array_equal(found, expected.numpy())
