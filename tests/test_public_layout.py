"""The model is the public authors' one under other names.

Their checkpoint has `embed_*` and `prompt_embed_*` for history and prompt, `transformer.h.<i>` as
in GPT-2, whose Conv1D weights are [in, out], and `predict_action.0` before the tanh. They pad a
history on the left and keep attention from the padding by a mask.
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from authors_files import (
    ACTION,
    CONTEXT,
    EMBED,
    HEADS,
    LAYERS,
    OBSERVATION,
    PROMPT,
    TIMES,
    public_weights,
)

from harmodt.batch import Batch, Steps
from harmodt.networks.decision_transformer import DecisionTransformer, TransformerConfig
from harmodt_kernels import PYTORCH, REFERENCE, Backend

SHARED = {
    "history_norm": "embed_ln",
    "final_norm": "transformer.ln_f",
    "action_head": "predict_action.0",
} | {
    f"{ours}_embedding.{our_token}": f"{theirs}embed_{their_token}"
    for ours, theirs in (("history", ""), ("prompt", "prompt_"))
    for our_token, their_token in (
        ("returns_to_go", "return"),
        ("observations", "state"),
        ("actions", "action"),
        ("timesteps", "timestep"),
    )
}
"""Our name of each module outside the blocks, and theirs."""

OF_BLOCK = {
    "attention_norm": "ln_1",
    "qkv": "attn.c_attn",
    "attention_out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp_up": "mlp.c_fc",
    "mlp_down": "mlp.c_proj",
}

NAMES = SHARED | {
    f"blocks.{i}.{ours}": f"transformer.h.{i}.{theirs}"
    for i in range(LAYERS)
    for ours, theirs in OF_BLOCK.items()
}


def convert(weights: dict[str, np.ndarray], backend: Backend) -> DecisionTransformer:
    """Our model of weights in the public layout."""
    config = TransformerConfig(
        OBSERVATION, ACTION, EMBED, LAYERS, HEADS, max_timesteps=TIMES, prompt_length=PROMPT
    )
    model = tiny.make_model(config, tasks=1, backend=backend)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module, kind = name.rsplit(".", 1)
            theirs = torch.from_numpy(weights[f"{NAMES[module]}.{kind}"])
            parameter.copy_(theirs.T if ".c_" in NAMES[module] and kind == "weight" else theirs)
    return model


def random_steps(rng: np.random.Generator, windows: int, length: int, padded: bool) -> Steps:
    shape = (1, windows, length)
    valid = np.ones(shape, bool)
    if padded:
        for window in range(windows):
            valid[0, window, length - window % length :] = False
    arrays = (
        rng.uniform(0, 2, shape).astype(np.float32),
        rng.normal(size=(*shape, OBSERVATION)).astype(np.float32),
        rng.uniform(-1, 1, (*shape, ACTION)).astype(np.float32),
        rng.integers(TIMES, size=shape),
        valid,
    )
    return Steps(*map(torch.from_numpy, arrays))


def padded_as_theirs(history: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns, states, actions and times of a window as they pad them; bool [K], what is valid."""
    missing = CONTEXT - len(history[0])
    padding = (0, 0, -10, 0)
    arrays = [
        np.concatenate((np.full((missing, *part.shape[1:]), value, part.dtype), part))
        for part, value in zip(history, padding, strict=True)
    ]
    return arrays, np.arange(CONTEXT) >= missing


def theirs(
    weights: dict[str, np.ndarray], prompt: list[np.ndarray], history: list[np.ndarray]
) -> np.ndarray:
    """The public model on one window in float64 NumPy: actions of its steps, [steps, A]."""
    history, valid = padded_as_theirs(history)
    unmasked = np.repeat(np.append(np.ones(PROMPT, bool), valid), 3)
    w = {name: value.astype(np.float64) for name, value in weights.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def conv1d(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def tokens(prefix: str, steps: list[np.ndarray]) -> np.ndarray:
        returns, states, actions, times = steps
        time = w[f"{prefix}embed_timestep.weight"][times]
        embedded = [
            linear(values.astype(np.float64), f"{prefix}embed_{name}") + time
            for name, values in (("return", returns[:, None]), ("state", states),
                                 ("action", actions))
        ]  # fmt: skip
        return np.stack(embedded, axis=1).reshape(-1, EMBED)

    x = np.concatenate((tokens("prompt_", prompt), norm(tokens("", history), "embed_ln")))
    size, size_of_head = len(x), EMBED // HEADS
    for i in range(LAYERS):
        block = f"transformer.h.{i}"
        qkv = conv1d(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        query, key, value = (
            part.reshape(size, HEADS, size_of_head).transpose(1, 0, 2)
            for part in np.split(qkv, 3, axis=1)
        )
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(size_of_head)
        scores = np.where(np.tri(size, dtype=bool), scores, -1e4) + np.where(unmasked, 0, -1e4)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        merged = (shares @ value).transpose(1, 0, 2).reshape(size, EMBED)
        x = x + conv1d(merged, f"{block}.attn.c_proj")
        hidden = np.maximum(conv1d(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"), 0)
        x = x + conv1d(hidden, f"{block}.mlp.c_proj")
    x = norm(x, "transformer.ln_f").reshape(-1, 3, EMBED)
    return np.tanh(linear(x[PROMPT:, 1], "predict_action.0"))[valid]


def test_every_parameter_has_one_public_name() -> None:
    model = convert(public_weights(), REFERENCE)
    names = [
        f"{NAMES[module]}.{kind}"
        for module, kind in (name.rsplit(".", 1) for name, _ in model.named_parameters())
    ]
    assert sorted(names) == sorted(public_weights())


@pytest.mark.parametrize("backend", [REFERENCE, PYTORCH], ids=lambda backend: backend.name)
def test_converted_weights_give_the_public_models_actions(backend: Backend) -> None:
    weights, rng, windows = public_weights(), np.random.default_rng(1), 7
    model = convert(weights, backend)
    prompt = random_steps(rng, windows, PROMPT, padded=False)
    history = random_steps(rng, windows, CONTEXT, padded=True)
    masks = tiny.no_masks(model, 1)
    computed = model(Batch(torch.zeros(1, dtype=torch.int64), prompt, history), masks)
    differences, actions = [], []
    for window in range(windows):
        valid = history.valid[0, window].numpy()
        of_prompt = [part[0, window].numpy() for part in prompt[:4]]
        of_history = [part[0, window].numpy()[valid] for part in history[:4]]
        expected = theirs(weights, of_prompt, of_history)
        differences.append(computed[0, window].detach().numpy()[valid] - expected)
        actions.append(expected)
    assert {len(each) for each in actions} == {1, 2, 3, 4, 5}
    assert np.concatenate(actions).std() > 0.1
    assert np.abs(np.concatenate(differences)).max() <= 7e-7
