from __future__ import annotations

import dataclasses
import math

import pytest
import tiny
import torch
from tiny import masked_copy, no_masks, unpack_masks
from torch import Tensor

from harmodt.batch import Batch, Steps
from harmodt.config import TransformerSettings
from harmodt.masks.bank import MaskBank
from harmodt.networks.decision_transformer import DecisionTransformer, TransformerConfig
from harmodt_kernels import PYTORCH, REFERENCE, Backend, pack_bits
from harmodt_kernels.dropout_add.pytorch import dropout

TASKS, CONTEXT = 3, 4
CONFIG = TransformerConfig(
    observation_size=39, action_size=4, embed_dim=32, layers=2, heads=2, max_timesteps=20,
    prompt_length=2,
)  # fmt: skip
ODD = dataclasses.replace(CONFIG, embed_dim=24, heads=3)
MTDT = dataclasses.replace(CONFIG, prompt_length=0, task_embedding_dim=5)


def make_model(
    config: TransformerConfig = CONFIG, seed: int = 0, backend: Backend = REFERENCE
) -> DecisionTransformer:
    """A model whose weights are large enough for every input to matter."""
    torch.manual_seed(seed)
    model = tiny.make_model(config, TASKS, backend)
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
    return MaskBank(model.vector, pack_bits(draws < 0.6) & maskable)


def dense(model: DecisionTransformer, batch: Batch) -> Tensor:
    """What the model predicts with all weights."""
    return model(batch, no_masks(model, len(batch.task_ids)))


def make_steps(groups: int, windows: int, length: int, padding: int = 0, seed: int = 0) -> Steps:
    """Random time steps, in every second window with some padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (groups, windows, length)
    valid = torch.ones(shape, dtype=torch.bool)
    valid[:, 1::2, length - padding :] = False
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
    return steps._replace(**changed)


def groups_of(batch: Batch, groups: slice) -> Batch:
    def cut(steps: Steps) -> Steps:
        return Steps(*(part[groups] for part in steps))

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
        if batch.prompt is not None:
            x = tokens(batch.prompt, g, b, "prompt_embedding") + x
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
                    weights = torch.softmax(k[: query + 1] @ q[query] / math.sqrt(size), 0)
                    attended[query, at] = weights @ v[: query + 1]
            x = x + linear(attended, f"{name}.attention_out")
            hidden = linear(norm(x, f"{name}.mlp_norm"), f"{name}.mlp_up").clamp(min=0)
            x = x + linear(hidden, f"{name}.mlp_down")
        observations = x[-3 * CONTEXT + 1 :: 3]
        return torch.tanh(linear(norm(observations, "final_norm"), "action_head"))

    groups, windows = batch.history.valid.shape[:2]
    return torch.stack([torch.stack([window(g, b) for b in range(windows)]) for g in range(groups)])


@pytest.mark.parametrize(
    ("size", "published"),
    [("0.48M", 0.48), ("0.87M", 0.87), ("1.47M", 1.47), ("2.06M", 2.06), ("5.29M", 5.29)],
)
def test_parameter_counts_are_the_papers(size: str, published: float) -> None:
    d, layers, heads = TransformerSettings(size=size).shape
    config = TransformerConfig(39, 4, d, layers, heads, max_timesteps=1000, prompt_length=5)
    model = tiny.make_model(config, tasks=50)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert abs(parameters / 1e6 - published) < 0.02
    # four matrices d x d for attention, two d x 4d for the MLP, biases, two LayerNorms
    assert model.vector.maskable_count() == layers * (12 * d * d + 13 * d) + 2 * d


@pytest.mark.parametrize("backend", [REFERENCE, PYTORCH], ids=lambda backend: backend.name)
@pytest.mark.parametrize("config", [CONFIG, ODD, MTDT], ids=["prompt", "odd", "mtdt"])
def test_forward_equals_a_loop(config: TransformerConfig, backend: Backend) -> None:
    model = make_model(config, backend=backend)
    batch = make_batch([2, 0], prompt=config.prompt_length > 0)
    predicted = dense(model, batch)
    assert predicted.shape == (2, 3, 4, 4)
    torch.testing.assert_close(predicted.double(), reference(model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, ODD, MTDT], ids=["prompt", "odd", "mtdt"])
def test_masks_act_as_zeros_in_the_weights(config: TransformerConfig) -> None:
    model = make_model(config)
    bank = make_bank(model)
    batch = make_batch([2, 0, 2], prompt=config.prompt_length > 0)
    predicted = model(batch, bank.for_tasks(batch.task_ids))
    all_weights = dense(model, batch)
    for group, task in enumerate(batch.task_ids.tolist()):
        masked = masked_copy(model, bank.bits[task])
        alone = groups_of(batch, slice(group, group + 1))
        expected = reference(masked, alone)[0]
        torch.testing.assert_close(predicted[group].double(), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(predicted[group], all_weights[group], atol=1e-2)


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["prompt", "odd"])
def test_masked_gradients_are_those_of_a_masked_copy(config: TransformerConfig) -> None:
    model = make_model(config)
    bank = make_bank(model)
    batch = make_batch([1])
    model.vector.gradient.zero_()
    model(batch, bank.for_tasks(batch.task_ids)).square().sum().backward()
    copy = masked_copy(model, bank.bits[1])
    dense(copy, batch).square().sum().backward()
    masks = unpack_masks(model, bank.bits[1])
    for (name, ours), theirs in zip(model.named_parameters(), copy.parameters(), strict=True):
        mask = masks.get(name, torch.tensor(True))
        torch.testing.assert_close(ours.grad, theirs.grad * mask, rtol=1e-3, atol=1e-4)
        assert (ours.grad[~mask.expand_as(ours.grad)] == 0).all()


@pytest.mark.parametrize("backend", [REFERENCE, PYTORCH], ids=lambda backend: backend.name)
@pytest.mark.parametrize("config", [CONFIG, MTDT], ids=["prompt", "mtdt"])
def test_gradients_are_written_into_the_vector(config: TransformerConfig, backend: Backend) -> None:
    model = make_model(config, backend=backend)
    bank, gradient = make_bank(model), model.vector.gradient
    batch = make_batch([0, 2], prompt=config.prompt_length > 0)
    model(batch, bank.for_tasks(batch.task_ids)).square().sum().backward()
    by_autograd = gradient.clone()
    gradient.zero_()
    for name, parameter in model.named_parameters():
        if name != "task_embedding.weight":  # which autograd adds to what is there
            parameter.grad.fill_(torch.nan)
    model(batch, bank.for_tasks(batch.task_ids, gradient[None])).square().sum().backward()
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-4, atol=1e-4)


def test_gradients_of_maskable_weights_leave_the_others_to_autograd() -> None:
    model = make_model()
    batch = make_batch([0, 2])
    of_groups = torch.zeros(2, model.vector.maskable_size)
    masks = make_bank(model).for_tasks(batch.task_ids, of_groups)
    assert masks.gradients_of(model.action_head) is None
    model.vector.gradient.zero_()
    model(batch, masks).square().sum().backward()
    for name, parameter in model.named_parameters():
        masked = name.startswith(("blocks.", "final_norm."))
        assert (parameter.grad.abs().sum() > 0) != masked, name
    assert of_groups.abs().sum(1).min() > 0


def test_masks_of_ones_are_no_masks() -> None:
    model = make_model()
    bank = MaskBank(model.vector, make_bank(model).maskable_bits.repeat(TASKS, 1))
    batch = make_batch([0, 1])
    torch.testing.assert_close(model(batch, bank.for_tasks(batch.task_ids)), dense(model, batch))


def test_a_later_token_never_changes_an_earlier_prediction() -> None:
    model = make_model()
    batch = make_batch([0, 1], padding=0)
    masks = make_bank(model).for_tasks(batch.task_ids)
    before = model(batch, masks)
    for step in range(4):
        later = torch.arange(4).expand(2, 3, 4) > step
        history = change(batch.history, later)
        history = change(history, torch.arange(4).expand(2, 3, 4) == step, "actions")
        after = model(batch._replace(history=history), masks)
        torch.testing.assert_close(after[:, :, : step + 1], before[:, :, : step + 1])
        if step < 3:
            assert ((after - before)[:, :, step + 1].abs() > 1e-3).any(-1).all()


@pytest.mark.parametrize("name", ["returns_to_go", "observations", "actions", "timesteps"])
def test_every_earlier_input_counts(name: str) -> None:
    model = make_model()
    batch = make_batch([0, 1], padding=0)
    before = dense(model, batch)
    first = torch.arange(4).expand(2, 3, 4) == 0
    history = change(batch.history, first, name)
    after = dense(model, batch._replace(history=history))
    assert ((after - before)[:, :, 1:].abs() > 1e-4).any(-1).all()
    prompt = change(batch.prompt, torch.ones(2, 3, 2, dtype=torch.bool), name)
    after = dense(model, batch._replace(prompt=prompt))
    assert ((after - before).abs() > 1e-4).any(-1).all()


def test_padding_is_not_seen() -> None:
    model = make_model()
    batch = make_batch([0, 1])
    valid = batch.history.valid
    assert not valid.all()
    history = change(batch.history, ~valid)
    before = dense(model, batch)
    after = dense(model, batch._replace(history=history))
    torch.testing.assert_close(after[valid], before[valid])


@pytest.mark.parametrize("masked", [False, True])
def test_groups_do_not_depend_on_each_other(masked: bool) -> None:
    model = make_model()
    batch = make_batch([2, 0, 2])
    bank = make_bank(model)

    def predict(batch: Batch) -> Tensor:
        return model(batch, bank.for_tasks(batch.task_ids)) if masked else dense(model, batch)

    together = predict(batch)
    for group in range(3):
        alone = predict(groups_of(batch, slice(group, group + 1)))
        torch.testing.assert_close(alone[0], together[group])


@pytest.mark.parametrize("config", [CONFIG, MTDT], ids=["prompt", "mtdt"])
def test_only_the_mtdt_variant_is_told_the_task(config: TransformerConfig) -> None:
    model = make_model(config)
    batch = make_batch([0, 0], prompt=config.prompt_length > 0)
    other = batch._replace(task_ids=torch.tensor([0, 2]))
    difference = (dense(model, other) - dense(model, batch)).abs().amax((1, 2, 3))
    assert difference[0] == 0
    assert (difference[1] > 1e-3) == (config is MTDT)


@pytest.mark.parametrize("config", [CONFIG, ODD, MTDT], ids=["prompt", "odd", "mtdt"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("padding", "shortest"), [(0, 4), (3, 1), (1, 2), (1, 3)])
def test_act_is_the_last_valid_step_of_forward(
    config: TransformerConfig, masked: bool, padding: int, shortest: int
) -> None:
    model = make_model(config)
    batch = make_batch([2, 0], padding=padding, prompt=config.prompt_length > 0)
    bank = make_bank(model)
    masks = bank.for_tasks(batch.task_ids) if masked else no_masks(model, 2)
    cache = None
    if batch.prompt is not None:
        cache = model.encode_prompt(batch.prompt, batch.task_ids, masks)
    action = model.act(batch.history, batch.task_ids, masks, cache, shortest)
    assert action.shape == (2, 3, 4)
    predicted = model(batch, masks)
    for window, last in enumerate((3, 3 - padding, 3)):
        torch.testing.assert_close(action[:, window], predicted[:, window, last])


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
    without = dense(make_model(), batch)
    torch.testing.assert_close(dense(model.eval(), batch), without)
    model.train()
    assert not torch.allclose(dense(model, batch), dense(model, batch), atol=1e-3)


def test_dropout_reaches_attention_and_residual_branches() -> None:
    calls = []

    def attention(
        qkv: Tensor, queries: slice, drop: float, past: None, seed: Tensor | None
    ) -> Tensor:
        out = REFERENCE.attention(qkv, queries, 0.0, past)
        calls.append(("attention", out.shape[1], drop, seed))
        return out

    def linear_residual(
        *operands: Tensor | None, seed: Tensor | None, group_gradients: None, queue: None
    ) -> Tensor:
        *layer, residual, drop = operands
        calls.append(("residual", residual.shape[1], drop, seed))
        return REFERENCE.linear_residual(*layer, residual, 0.0)

    backend = dataclasses.replace(REFERENCE, attention=attention, linear_residual=linear_residual)
    model = make_model(dataclasses.replace(CONFIG, dropout=0.2), backend=backend)
    batch = make_batch([0, 1])
    assert model.dropout_places == 7
    model(batch, no_masks(model, 2), torch.arange(7))  # 0 is the embeddings' seed
    # The last block computes the outputs of the 4 observation tokens of 3 windows alone.
    assert calls == [
        ("attention", 18, 0.2, 1), ("residual", 3 * 18, 0.2, 2), ("residual", 3 * 18, 0.2, 3),
        ("attention", 4, 0.2, 4), ("residual", 3 * 4, 0.2, 5), ("residual", 3 * 4, 0.2, 6),
    ]  # fmt: skip
    dense(model, batch)
    assert [call[2:] for call in calls[6:]] == [(0.2, None)] * 6
    dense(model.eval(), batch)
    assert {call[2] for call in calls[12:]} == {0.0}


def test_embedding_dropout_drops_entries_of_prompt_and_history_tokens_in_training() -> None:
    model = make_model(dataclasses.replace(CONFIG, embedding_dropout=0.25))
    seen = []

    def see(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach())

    model.blocks[0].register_forward_pre_hook(see)
    batch = make_batch([0, 1], windows=40)
    dense(model.eval(), batch)
    (whole,) = seen  # [G, B, 6 + 12, d]
    torch.manual_seed(0)
    dense(model.train(), batch)
    kept = seen[1] != 0
    torch.testing.assert_close(seen[1][kept], whole[kept] / 0.75)
    for tokens in (kept[:, :, :6], kept[:, :, 6:]):
        error = 5 * math.sqrt(0.25 * 0.75 / tokens.numel())
        assert abs(tokens.double().mean().item() - 0.75) < error
    assert not kept.all(-1).any(-1).any(-1).any()  # entries, not whole tokens
    model.encode_prompt(batch.prompt, batch.task_ids, no_masks(model, 2))
    assert torch.equal(seen[2], whole[:, :, :6])


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
        vectors.append(tiny.make_model(CONFIG, TASKS).vector.weights)
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])


def check_as_gpt_2(parameters: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.3), name


def test_weights_begin_as_in_gpt_2() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(MTDT, prompt_length=2, embed_dim=64, task_embedding_dim=16)
    check_as_gpt_2(dict(tiny.make_model(config, 20).named_parameters()))


def test_embeddings_and_head_begin_as_in_pytorch_where_that_is_asked_for() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(MTDT, prompt_length=2, embed_dim=64, initialisation="pytorch")
    model = tiny.make_model(config, 20)
    parameters = dict(model.named_parameters())
    blocks = {name for name in parameters if name.startswith("blocks.")}
    check_as_gpt_2({name: parameters.pop(name) for name in blocks})
    for name in [name for name in parameters if "norm" in name]:
        assert (parameters.pop(name) == (1 if name.endswith("weight") else 0)).all(), name
    embeddings = {
        "task_embedding.weight", "prompt_embedding.timesteps.weight",
        "history_embedding.timesteps.weight",
    }  # fmt: skip
    for name in embeddings:  # N(0, 1)
        assert parameters.pop(name).std().item() == pytest.approx(1.0, rel=0.15), name
    inputs = {"returns_to_go": 1, "observations": 39 + 5, "actions": 4, "action_head": 64}
    assert len(parameters) == 2 * (2 * 3 + 1)
    for name, parameter in parameters.items():  # uniform up to 1 / sqrt(number of inputs)
        bound = inputs[name.split(".")[-2]] ** -0.5
        assert 0.6 * bound < parameter.abs().max().item() <= bound, name
        if parameter.numel() > 10:
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.25), name
