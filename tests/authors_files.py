"""What the HarmoDT authors' code saves, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

EMBED, LAYERS, HEADS = 32, 3, 4
OBSERVATION, ACTION, TIMES = 11, 3, 50
PROMPT, CONTEXT = 2, 5


def public_weights(
    observation: int = OBSERVATION, action: int = ACTION, layers: int = LAYERS
) -> dict[str, np.ndarray]:
    """Random weights of GPT-2's scale in the public layout, float32; LayerNorms vary about 1."""
    rng = np.random.default_rng(0)
    sizes = {"return": 1, "state": observation, "action": action}
    weights: dict[str, np.ndarray] = {}

    def add(name: str, shape: tuple[int, ...], center: float = 0.0, scale: float = 0.02) -> None:
        weights[name] = rng.normal(center, scale, shape).astype(np.float32)

    def add_norm(name: str) -> None:
        add(f"{name}.weight", (EMBED,), 1.0, 0.1)
        add(f"{name}.bias", (EMBED,))

    for prefix in ("", "prompt_"):
        for token, size in sizes.items():
            add(f"{prefix}embed_{token}.weight", (EMBED, size), scale=size**-0.5)
            add(f"{prefix}embed_{token}.bias", (EMBED,))
        add(f"{prefix}embed_timestep.weight", (TIMES, EMBED), scale=1.0)
    add_norm("embed_ln")
    for i in range(layers):
        block = f"transformer.h.{i}"
        add_norm(f"{block}.ln_1")
        add_norm(f"{block}.ln_2")
        for name, size_in, size_out in (
            ("attn.c_attn", EMBED, 3 * EMBED),
            ("attn.c_proj", EMBED, EMBED),
            ("mlp.c_fc", EMBED, 4 * EMBED),
            ("mlp.c_proj", 4 * EMBED, EMBED),
        ):
            add(f"{block}.{name}.weight", (size_in, size_out))
            add(f"{block}.{name}.bias", (size_out,))
    add_norm("transformer.ln_f")
    add("predict_action.0.weight", (action, EMBED), scale=EMBED**-0.5)
    add("predict_action.0.bias", (action,))
    return weights


def make_content(
    tasks: Sequence[str], observation: int, action: int, layers: int = LAYERS
) -> dict[str, Any]:
    """What their code saves: weights, masks of all of them, and what no policy needs."""
    weights = {
        name: torch.from_numpy(w) for name, w in public_weights(observation, action, layers).items()
    }
    d = EMBED
    for name, shape in {
        "predict_state.weight": (observation, d),
        "predict_return.bias": (1,),
        "prompt_predict_action.weight": (d, action),
        "transformer.wte.weight": (1, d),
    }.items():
        weights[name] = torch.ones(shape)
    generator = torch.Generator().manual_seed(3)

    def draw(shape: torch.Size) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) < 0.8).float()

    masks = {task: {name: draw(w.shape) for name, w in weights.items()} for task in tasks}
    causal = torch.ones(8, 8, dtype=torch.uint8).tril()[None, None]
    for block in range(layers):  # buffers: masks cover parameters alone
        weights[f"transformer.h.{block}.attn.bias"] = causal
        weights[f"transformer.h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
    return {"model": weights, "env_masks": masks}
