from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import masked_copy, unpack_masks
from torch import Tensor

from harmodt.batch import Batch, Steps
from harmodt.config import SIZES, ModelConfig, TrainConfig
from harmodt.masks.bank import MaskBank
from harmodt.networks.decision_transformer import DecisionTransformer
from harmodt_kernels import pack_bits
from harmodt_kernels.attention.pytorch import attend
from harmodt_kernels.dropout_add.pytorch import dropout

TASKS = 3
CONFIG = ModelConfig(
    embed_dim=32, layers=2, heads=2, dropout=0.0, context_length=4, prompt_length=2,
    max_timesteps=20,
)  # fmt: skip
ODD = dataclasses.replace(CONFIG, embed_dim=24, heads=3)
MTDT = dataclasses.replace(CONFIG, prompt_length=0, task_embedding_dim=5)


def make_model(config: ModelConfig = CONFIG, seed: int = 0) -> DecisionTransformer:
    """A model whose weights are large enough for every input to matter."""
    torch.manual_seed(seed)
    model = DecisionTransformer(config, TASKS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.3)
    return model


def make_bank(model: DecisionTransformer) -> MaskBank:
    """Masks with zeros in every tensor; the initial ones leave short tensors dense."""
    maskable = model.vector.valid_bits()[: model.vector.maskable_size // 32]
    draws = torch.rand(
        TASKS, model.vector.maskable_size, generator=torch.Generator().manual_seed(0)
    )
    return MaskBank(pack_bits(draws < 0.6) & maskable, maskable)


def make_steps(groups: int, windows: int, length: int, padding: int = 0, seed: int = 0) -> Steps:
    """Random time steps, in every second window with some padding on the left."""
    generator = torch.Generator().manual_seed(seed)
    shape = (groups, windows, length)
    valid = torch.ones(shape, dtype=torch.bool)
    valid[:, 1::2, :padding] = False
    return Steps(
        returns_to_go=torch.rand(shape, generator=generator),
        observations=torch.randn(*shape, 39, generator=generator),
        actions=torch.rand(*shape, 4, generator=generator) * 2 - 1,
        timesteps=torch.randint(20, shape, generator=generator),
        valid=valid,
    )


def make_batch(
    task_ids: list[int], windows: int = 3, padding: int = 2, prompt: bool = True
) -> Batch:
    groups = len(task_ids)
    return Batch(
        torch.tensor(task_ids),
        make_steps(groups, windows, 2, seed=1) if prompt else None,
        make_steps(groups, windows, 4, padding, seed=2),
    )


def change(steps: Steps, where: Tensor, *names: str) -> Steps:
    """The steps with other random numbers in some fields where `where`, bool [G, B, L], is True."""
    other = make_steps(*steps.valid.shape, seed=99)
    names = names or ("returns_to_go", "observations", "actions", "timesteps")
    changed = {}
    for name in names:
        values = getattr(steps, name)
        at = where if values.ndim == 3 else where[..., None]
        changed[name] = torch.where(at, getattr(other, name), values)
    return dataclasses.replace(steps, **changed)


def groups_of(batch: Batch, groups: slice) -> Batch:
    def cut(steps: Steps) -> Steps:
        return Steps(*(getattr(steps, f.name)[groups] for f in dataclasses.fields(Steps)))

    prompt = cut(batch.prompt) if batch.prompt is not None else None
    return Batch(batch.task_ids[groups], prompt, cut(batch.history))


def reference(model: DecisionTransformer, batch: Batch) -> Tensor:
    """The dense model written again in float64, one window and one head at a time."""
    p = {name: value.detach().double() for name, value in model.named_parameters()}
    config = model.config
    d, heads = config.embed_dim, config.heads

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    def tokens(steps: Steps, g: int, b: int, name: str) -> list[Tensor]:
        result = []
        for step in range(steps.valid.shape[2]):
            observation = steps.observations[g, b, step].double()
            if config.task_embedding_dim:
                task = p["task_embedding.weight"][batch.task_ids[g]]
                observation = torch.cat((observation, task))
            time = p[f"{name}.timesteps.weight"][steps.timesteps[g, b, step]]
            rtg = steps.returns_to_go[g, b, step].double().view(1)
            result.append(linear(rtg, f"{name}.returns_to_go") + time)
            result.append(linear(observation, f"{name}.observations") + time)
            result.append(linear(steps.actions[g, b, step].double(), f"{name}.actions") + time)
        return result

    def window(g: int, b: int) -> Tensor:
        x = [norm(t, "history_norm") for t in tokens(batch.history, g, b, "history_embedding")]
        valid = batch.history.valid[g, b].tolist()
        if batch.prompt is not None:
            x = tokens(batch.prompt, g, b, "prompt_embedding") + x
            valid = batch.prompt.valid[g, b].tolist() + valid
        x = torch.stack(x)
        for layer in range(config.layers):
            name = f"blocks.{layer}"
            qkv = linear(norm(x, f"{name}.attention_norm"), f"{name}.qkv")
            attended = torch.zeros_like(x)
            for head in range(heads):
                size = d // heads
                at = slice(head * size, (head + 1) * size)
                q, k, v = (qkv[:, i * d : (i + 1) * d][:, at] for i in range(3))
                for query in range(len(x)):
                    keys = [j for j in range(query + 1) if valid[j // 3] or j == query]
                    weights = torch.softmax(k[keys] @ q[query] / math.sqrt(size), 0)
                    attended[query, at] = weights @ v[keys]
            x = x + linear(attended, f"{name}.attention_out")
            hidden = linear(norm(x, f"{name}.mlp_norm"), f"{name}.mlp_up").clamp(min=0)
            x = x + linear(hidden, f"{name}.mlp_down")
        observations = x[-3 * config.context_length + 1 :: 3]
        return torch.tanh(linear(norm(observations, "final_norm"), "action_head"))

    groups, windows = batch.history.valid.shape[:2]
    return torch.stack([torch.stack([window(g, b) for b in range(windows)]) for g in range(groups)])


@pytest.mark.parametrize(
    ("size", "published"),
    [("0.48M", 0.48), ("0.87M", 0.87), ("1.47M", 1.47), ("2.06M", 2.06), ("5.29M", 5.29)],
)
def test_parameter_counts_are_the_papers(size: str, published: float) -> None:
    model = DecisionTransformer(TrainConfig(size=size).model(), tasks=50)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert abs(parameters / 1e6 - published) < 0.02
    d, layers, _ = SIZES[size]
    # four matrices d x d for attention, two d x 4d for the MLP, biases, two LayerNorms
    assert model.vector.maskable_count() == layers * (12 * d * d + 13 * d) + 2 * d


@pytest.mark.parametrize("config", [CONFIG, ODD, MTDT], ids=["prompt", "odd", "mtdt"])
def test_forward_equals_a_loop(config: ModelConfig) -> None:
    model = make_model(config)
    batch = make_batch([2, 0], prompt=config.prompt_length > 0)
    predicted = model(batch, None)
    assert predicted.shape == (2, 3, 4, 4)
    torch.testing.assert_close(predicted.double(), reference(model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, ODD, MTDT], ids=["prompt", "odd", "mtdt"])
def test_masks_act_as_zeros_in_the_weights(config: ModelConfig) -> None:
    model = make_model(config)
    bank = make_bank(model)
    batch = make_batch([2, 0, 2], prompt=config.prompt_length > 0)
    predicted = model(batch, bank.for_tasks(batch.task_ids))
    dense = model(batch, None)
    for group, task in enumerate(batch.task_ids.tolist()):
        masked = masked_copy(model, bank.bits[task])
        alone = groups_of(batch, slice(group, group + 1))
        expected = reference(masked, alone)[0]
        torch.testing.assert_close(predicted[group].double(), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(predicted[group], dense[group], atol=1e-2)


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["prompt", "odd"])
def test_masked_gradients_are_those_of_a_masked_copy(config: ModelConfig) -> None:
    model = make_model(config)
    bank = make_bank(model)
    batch = make_batch([1])
    model.vector.gradient.zero_()
    model(batch, bank.for_tasks(batch.task_ids)).square().sum().backward()
    copy = masked_copy(model, bank.bits[1])
    copy(batch, None).square().sum().backward()
    masks = unpack_masks(model, bank.bits[1])
    for (name, ours), theirs in zip(model.named_parameters(), copy.parameters(), strict=True):
        mask = masks.get(name, torch.tensor(True))
        torch.testing.assert_close(ours.grad, theirs.grad * mask, rtol=1e-3, atol=1e-4)
        assert (ours.grad[~mask.expand_as(ours.grad)] == 0).all()


def test_masks_of_ones_are_no_masks() -> None:
    model = make_model()
    maskable = make_bank(model).maskable_bits
    bank = MaskBank(maskable.repeat(TASKS, 1), maskable)
    batch = make_batch([0, 1])
    torch.testing.assert_close(model(batch, bank.for_tasks(batch.task_ids)), model(batch, None))


def test_a_later_token_never_changes_an_earlier_prediction() -> None:
    model = make_model()
    batch = make_batch([0, 1], padding=0)
    masks = make_bank(model).for_tasks(batch.task_ids)
    before = model(batch, masks)
    for step in range(4):
        later = torch.arange(4).expand(2, 3, 4) > step
        history = change(batch.history, later)
        history = change(history, torch.arange(4).expand(2, 3, 4) == step, "actions")
        after = model(dataclasses.replace(batch, history=history), masks)
        torch.testing.assert_close(after[:, :, : step + 1], before[:, :, : step + 1])
        if step < 3:
            assert ((after - before)[:, :, step + 1].abs() > 1e-3).any(-1).all()


@pytest.mark.parametrize("name", ["returns_to_go", "observations", "actions", "timesteps"])
def test_every_earlier_input_counts(name: str) -> None:
    model = make_model()
    batch = make_batch([0, 1], padding=0)
    before = model(batch, None)
    first = torch.arange(4).expand(2, 3, 4) == 0
    history = change(batch.history, first, name)
    after = model(dataclasses.replace(batch, history=history), None)
    assert ((after - before)[:, :, 1:].abs() > 1e-4).any(-1).all()
    prompt = change(batch.prompt, torch.ones(2, 3, 2, dtype=torch.bool), name)
    after = model(dataclasses.replace(batch, prompt=prompt), None)
    assert ((after - before).abs() > 1e-4).any(-1).all()


def test_padding_is_not_seen() -> None:
    model = make_model()
    batch = make_batch([0, 1])
    valid = batch.history.valid
    assert not valid.all()
    history = change(batch.history, ~valid)
    before = model(batch, None)
    after = model(dataclasses.replace(batch, history=history), None)
    torch.testing.assert_close(after[valid], before[valid])


def test_padding_does_not_move_the_steps_after_it() -> None:
    """The first steps of a whole window and the last of a padded one are the same to the model."""
    model = make_model()
    batch = make_batch([0], windows=1, padding=0)
    shifted = {
        f.name: getattr(batch.history, f.name).roll(2, dims=2) for f in dataclasses.fields(Steps)
    }
    shifted["valid"] = torch.tensor([[[False, False, True, True]]])
    padded = model(dataclasses.replace(batch, history=Steps(**shifted)), None)
    torch.testing.assert_close(padded[:, :, 2:], model(batch, None)[:, :, :2])


@pytest.mark.parametrize("masked", [False, True])
def test_groups_do_not_depend_on_each_other(masked: bool) -> None:
    model = make_model()
    batch = make_batch([2, 0, 2])
    bank = make_bank(model)

    def predict(batch: Batch) -> Tensor:
        return model(batch, bank.for_tasks(batch.task_ids) if masked else None)

    together = predict(batch)
    for group in range(3):
        alone = predict(groups_of(batch, slice(group, group + 1)))
        torch.testing.assert_close(alone[0], together[group])


@pytest.mark.parametrize("config", [CONFIG, MTDT], ids=["prompt", "mtdt"])
def test_only_the_mtdt_variant_is_told_the_task(config: ModelConfig) -> None:
    model = make_model(config)
    batch = make_batch([0, 0], prompt=config.prompt_length > 0)
    other = dataclasses.replace(batch, task_ids=torch.tensor([0, 2]))
    difference = (model(other, None) - model(batch, None)).abs().amax((1, 2, 3))
    assert difference[0] == 0
    assert (difference[1] > 1e-3) == (config is MTDT)


@pytest.mark.parametrize("config", [CONFIG, ODD, MTDT], ids=["prompt", "odd", "mtdt"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
def test_act_is_the_last_step_of_forward(config: ModelConfig, masked: bool, padding: int) -> None:
    model = make_model(config)
    batch = make_batch([2, 0], padding=padding, prompt=config.prompt_length > 0)
    masks = make_bank(model).for_tasks(batch.task_ids) if masked else None
    cache, valid = None, None
    if batch.prompt is not None:
        cache = model.encode_prompt(batch.prompt, batch.task_ids, masks)
        valid = batch.prompt.valid
    action = model.act(batch.history, batch.task_ids, masks, cache, valid)
    assert action.shape == (2, 3, 4)
    torch.testing.assert_close(action, model(batch, masks)[:, :, -1])


def test_attention_equals_pytorchs() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 5, 2, 9, 8, generator=generator)
    allowed = (torch.rand(5, 1, 9, 9, generator=generator) < 0.5) | torch.eye(9, dtype=torch.bool)
    leaves = [leaf.requires_grad_() for leaf in (query, key, value)]
    ours = attend(*leaves, allowed, 0.0)
    theirs = F.scaled_dot_product_attention(*leaves, allowed)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(ours.shape, generator=generator)
    for our, their in zip(
        torch.autograd.grad(ours, leaves, weights),
        torch.autograd.grad(theirs, leaves, weights),
        strict=True,
    ):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(drop: float) -> None:
    torch.manual_seed(0)
    x = torch.full((1001, 401), 2.0, requires_grad=True)
    y = dropout(x, drop)
    kept = y != 0
    count = x.numel()
    error = 5 * math.sqrt(drop * (1 - drop) / count)
    assert abs(kept.double().mean() - (1 - drop)) < error
    assert y[kept].unique().numel() == 1
    assert y[kept][0].item() == pytest.approx(2.0 / (1 - drop), rel=1e-4)
    for lane in range(4):  # four elements share one random draw
        share = kept.flatten()[lane::4].double().mean()
        assert abs(share - (1 - drop)) < 2 * error
    together = (kept.flatten()[1:] & kept.flatten()[:-1]).double().mean()
    assert abs(together - (1 - drop) ** 2) < 2 * error
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y.detach() / 2.0)


def test_dropout_is_seeded_and_nothing_without_a_rate() -> None:
    x = torch.randn(7, 5)
    assert dropout(x, 0.0) is x
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("drop", [0.99999, 0.999999])
def test_dropout_next_to_one_stays_finite(drop: float) -> None:
    assert torch.isfinite(dropout(torch.ones(1000), drop)).all()


def test_dropout_acts_in_training_alone() -> None:
    config = dataclasses.replace(CONFIG, dropout=0.2)
    model = make_model(config)
    batch = make_batch([0, 1])
    without = make_model()(batch, None)
    torch.testing.assert_close(model.eval()(batch, None), without)
    model.train()
    assert not torch.allclose(model(batch, None), model(batch, None), atol=1e-3)


@pytest.mark.parametrize("where", ["attention", "residual"])
def test_dropout_reaches_attention_and_residual_branches(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def record(x: Tensor, drop: float) -> Tensor:
        shapes.append((tuple(x.shape), drop))
        return x

    for module in ("dropout_add.pytorch", "attention.pytorch"):
        monkeypatch.setattr(f"harmodt_kernels.{module}.dropout", record)
    make_model(dataclasses.replace(CONFIG, dropout=0.2))(make_batch([0, 1]), None)
    # The last block computes the outputs of the 4 observation tokens alone.
    whole, last, times = {
        "attention": ((6, 2, 18, 18), (6, 2, 4, 18), 1),
        "residual": ((2, 3 * 18, 32), (2, 3 * 4, 32), 2),
    }[where]
    assert shapes.count((whole, 0.2)) == (CONFIG.layers - 1) * times
    assert shapes.count((last, 0.2)) == times


@pytest.mark.filterwarnings("error")
def test_a_backward_pass_warns_of_nothing(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: torch.set_warn_always(False))
    torch.set_warn_always(True)  # some warnings are given once in a process
    model = make_model()
    batch = make_batch([0, 1])
    model(batch, make_bank(model).for_tasks(batch.task_ids)).sum().backward()
    assert model.vector.gradient.abs().sum() > 0


def test_the_same_seed_gives_the_same_weights() -> None:
    vectors = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        vectors.append(DecisionTransformer(CONFIG, TASKS).vector.weights)
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])


def test_weights_begin_as_in_gpt_2() -> None:
    torch.manual_seed(0)
    model = DecisionTransformer(dataclasses.replace(CONFIG, embed_dim=64), TASKS)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.3), name
