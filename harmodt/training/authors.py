"""Reads checkpoints that the HarmoDT authors' code saved, as the tensors of a run.

A checkpoint is one file. `torch.save` wrote it from a dict with two entries. `model` is a state
dict. `env_masks` has, for each task, a dict with a mask for every parameter, 1 where the weight is
active. Embeddings and heads have masks too. The authors' forward pass does not apply these masks;
they only stop some weights from changing during training. A policy therefore needs none of them.
The blocks are GPT-2's blocks, whose Conv1D layers store weights as [in, out].
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmodt_kernels import pack_bits
from harmodt_kernels.vector import ParameterVector

from ..errors import UserError, raise_refusal

_SHARED = {
    "history_norm": "embed_ln",
    "final_norm": "transformer.ln_f",
    "action_head": "predict_action.0",
    "returns_to_go": "embed_return",
    "observations": "embed_state",
    "actions": "embed_action",
    "timesteps": "embed_timestep",
}
"""For each module outside the blocks, its name in the authors' code. The keys are our names without
the prefix `prompt_embedding.` or `history_embedding.`."""

_BLOCK_LAYERS = {
    "attention_norm": "ln_1",
    "qkv": "attn.c_attn",
    "attention_out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp_up": "mlp.c_fc",
    "mlp_down": "mlp.c_proj",
}

_UNUSED = re.compile(
    r"(predict_state|predict_return|prompt_predict_action|transformer\.wte)\..+"
    r"|transformer\.h\.[0-9]+\.attn\.(masked_)?bias"
)
"""Weights that a policy does not use: the predictions of states and returns, GPT-2's word
embedding, and the causal masks."""

_TASK_EMBEDDING = re.compile(r".+(?<!prompt)_(embed|predict)_(state|action)\..+")
"""Weights that belong to one task, such as `reach-v2_embed_state.weight`."""


@dataclass(frozen=True)
class AuthorsCheckpoint:
    """The content of a file that the authors' code saved. Parameters have the authors' names.

    Attributes:
        path: the file.
        weights: the weights, by the parameter's name.
        masks: the masks of each task, by the task's name and then by the parameter's name.
    """

    path: Path
    weights: Mapping[str, Tensor]
    masks: Mapping[str, Mapping[str, Tensor]]

    @classmethod
    def read(cls, path: Path) -> AuthorsCheckpoint:
        """Read a file. No code in the file is run.

        Raises:
            UserError: the file is missing or damaged, or the authors' code did not save it.
        """
        if not path.is_file():
            raise UserError(
                f"{path} is not a file: give the file model_iter_<n> that the authors' code saved"
            )
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not verify its checksums
                if changed := archive.testzip():
                    raise ValueError(changed)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # PyTorch raises many kinds of exceptions for damage
            raise_refusal(error, path)
            raise UserError(
                f"{path} is damaged, or holds objects other than tensors and plain containers, and "
                "HarmoDT runs no code from a file: copy it again, or save only {'model': "
                "model.state_dict(), 'env_masks': env_masks}"
            ) from error
        weights, masks = (_entry(path, content, key) for key in ("model", "env_masks"))
        for task in masks:
            _entry(path, masks, task)
        return cls(path, weights, masks)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Embedding dimension, number of blocks, number of time steps in their embedding.

        Raises:
            UserError: the file lacks a weight that shows these sizes, or it has separate embeddings
                for each task.
        """
        for name in self.weights:
            if _TASK_EMBEDDING.fullmatch(name):
                raise UserError(
                    f"{self.path} has embeddings for each task ({name}), made with "
                    "--special_embedding: give a model whose tasks share one embedding"
                )
        times = self._take(self.weights, "embed_timestep.weight")
        blocks = {name.split(".")[2] for name in self.weights if name.startswith("transformer.h.")}
        if times.dim() != 2 or not blocks:
            raise UserError(f"{self.path} holds no decision transformer: give another file")
        return times.shape[1], len(blocks), times.shape[0]

    def tensors(self, vector: ParameterVector) -> dict[str, Tensor]:
        """Return weights and masks under the names that a run's checkpoint uses.

        Row i of the masks belongs to task id i.

        Args:
            vector: the parameters of the model that takes the weights.

        Raises:
            UserError: a tensor is missing, unknown or has a wrong shape, or a mask holds numbers
                other than 0 and 1.
        """
        theirs = {name: _name(name) for name in vector.slots}
        unknown = self.weights.keys() - set(theirs.values()) - set(self.unused)
        if unknown:
            raise UserError(
                f"{self.path} has the weight {min(unknown)!r}, which the authors' public code does "
                "not have: give a checkpoint that this code saved"
            )
        tensors = {
            f"model.{ours}": self._in_our_layout(self.weights, name, vector.slots[ours].shape)
            for ours, name in theirs.items()
        }
        rows = [self._mask(masks, theirs, vector) for masks in self.masks.values()]
        return tensors | {"masks": torch.stack(rows)}

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the weights that a policy does not use."""
        return tuple(name for name in self.weights if _UNUSED.fullmatch(name))

    def _mask(
        self, masks: Mapping[str, Tensor], theirs: Mapping[str, str], vector: ParameterVector
    ) -> Tensor:
        """Return the packed mask of one task, int32 [P_m / 32]."""
        whole = torch.zeros(vector.maskable_size, dtype=torch.bool)
        for ours, slot in vector.slots.items():
            if slot.end > vector.maskable_size:
                continue  # embeddings and heads
            mask = self._in_our_layout(masks, theirs[ours], slot.shape)
            if not bool(((mask == 0) | (mask == 1)).all()):
                raise UserError(
                    f"{self.path}: the mask of {theirs[ours]} holds numbers other than 0 and 1: "
                    "the file is damaged, or a mask update of the authors' code moved more weights "
                    "than were active or inactive"
                )
            slot.view(whole).copy_(mask == 1)
        return pack_bits(whole)

    def _in_our_layout(self, tensors: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
        tensor = self._take(tensors, name).float()
        if ".c_" in name and name.endswith(".weight"):  # a Conv1D layer
            tensor = tensor.T
        if tensor.shape != shape:
            raise UserError(
                f"{self.path}: {name} has the shape {list(tensor.shape)} in our layout, but "
                f"{list(shape)} is needed: give a store of the environments in which the "
                "checkpoint was trained"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{self.path}: {name} has numbers that are NaN or infinite: copy the "
                "file again, or give an earlier checkpoint"
            )
        return tensor

    def _take(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        if not isinstance(tensors.get(name), Tensor):
            raise UserError(
                f"{self.path} has no tensor {name!r}, which the authors' public code has: give a "
                "checkpoint that this code saved"
            )
        return tensors[name]


def _entry(path: Path, content: Any, key: str) -> Mapping[str, Any]:
    """Return the dict under a key of `content`; the keys of that dict must be strings."""
    found = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(found, Mapping) or not found or not all(isinstance(k, str) for k in found):
        raise UserError(
            f"{path} has no {key!r} with named entries: give a file that the HarmoDT authors' code "
            "saved, with 'model' and 'env_masks'"
        )
    return found


def _name(ours: str) -> str:
    """Return the authors' name of a parameter of our model."""
    module, _, kind = ours.rpartition(".")
    group, *rest = module.split(".")
    if group == "blocks":
        index, layer = rest
        return f"transformer.h.{index}.{_BLOCK_LAYERS[layer]}.{kind}"
    prefix = "prompt_" if group == "prompt_embedding" else ""
    return f"{prefix}{_SHARED[rest[0] if rest else group]}.{kind}"
