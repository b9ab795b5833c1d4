"""Makes a `Trainer` for each path. A path is a way to compute the same training step.

The paths:

    fused           the kernels
    masked copies   one pass makes W ⊙ M of all layers for the tasks of the step, PyTorch's batched
                    products multiply with these copies, and one pass masks and sums the gradients.
                    All other operations are those of "fused"
    reference       masks in plain PyTorch: --no-fused
    dense           Prompt-DT: the same model without masks, in PyTorch
    dense, oneDNN   on a CPU, the same with oneDNN's products, which are faster on AMD's processors
    compiled        "dense" through torch.compile, with PyTorch's fused AdamW

"masked copies" and "compiled" also use oneDNN's products if these keep float32 operands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measuring import DEVICE, ON_GPU, fused, onednn, onednn_is_exact, tiny
from torch import Tensor, nn

from harmodt import graph
from harmodt.algorithms import preset
from harmodt.data.store import DataStore
from harmodt.masks.bank import MaskBank, TaskMasks
from harmodt.settings import change
from harmodt.training.trainer import Trainer
from harmodt_kernels import PYTORCH, Backend, MaskedLinear, pack_bits, unpack_bits
from harmodt_kernels.dropout_add.pytorch import dropout_mask
from harmodt_kernels.norm_linear.reference import norm_then_linear

DENSE = ("dense", "compiled") if ON_GPU else ("dense", "dense, oneDNN", "compiled")
PATHS = ("fused", "masked copies", "reference", *DENSE)
STEP = {"tasks_per_step": 5, "batch_per_task": 8}


def make_trainer(
    store: DataStore, path: str, *, compiler: str = "inductor", **settings: Any
) -> Trainer:
    """A trainer for a path. Skips the benchmark if the path's fused kernels are missing.

    On a CPU, the trainer records its steps, as a run does. On a GPU, it captures them only if
    `graph` is set, because steps are timed with and without a graph.

    Args:
        compiler: torch.compile's backend, for the path "compiled".
    """
    on_kernels = path in ("fused", "masked copies")
    kernels = fused() if on_kernels else None
    config = preset("paper", "prompt-dt" if path in DENSE else "harmodt-f")
    config = change(config, {**STEP, "fused": on_kernels, "graph": not ON_GPU, **settings})
    if path == "masked copies":
        assert kernels is not None
        copies = MaskedCopies(kernels)
        trainer = tiny.make_trainer(store, config, DEVICE, copies.backend)
        copies.bank = trainer.learner.bank
    elif path == "dense, oneDNN":
        # PyTorch selects oneDNN for this precision, whether or not oneDNN rounds operands
        config = change(config, {"precision": "bf16"})
        backend = dataclasses.replace(PYTORCH, rounds_inside=True)
        trainer = tiny.make_trainer(store, config, DEVICE, backend)
    elif path == "compiled":
        backend = for_compiler()
        config = change(config, {"precision": "bf16"} if backend.rounds_inside else {})
        trainer = tiny.make_trainer(store, config, DEVICE, backend)
        torch.compiler.reset()  # else other models count as recompilations, and those are limited
        model, vector = trainer.learner.model, trainer.learner.vector
        # The compiler takes no hooks: autograd adds the gradients, as in an ordinary program.
        trainer.learner._masks = TaskMasks(vector, None, trainer.learner.feed.task_ids)
        trainer.learner.clear_gradients = vector.gradient.zero_
        trainer.learner.backward = lambda losses: losses.mean().backward()
        for module in [model] if ON_GPU else model.blocks:
            module.compile(backend=compiler, dynamic=False, fullgraph=True)
    else:
        trainer = tiny.make_trainer(store, config, DEVICE)
    return trainer


class Graph:
    """A trainer's step as one CUDA graph, for any path.

    Attributes:
        memory: bytes of the graph's own pool.
    """

    def __init__(self, trainer: Trainer):
        self._learner, self._step = trainer.learner, 1
        self._learner.feed.load(1)
        self._graph = graph.CudaGraph(self._learner._compute, graph.CudaMemory(DEVICE))
        for _ in range(graph.WARM_UP):
            self._graph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        self._graph()  # this call captures the step
        self.memory = torch.cuda.memory_reserved() - before

    def replay(self) -> None:
        """Replay the step on the batch that is loaded."""
        self._graph()

    def step(self) -> None:
        """Load the next step's inputs, then replay the step."""
        self._step += 1
        self._learner.feed.load(self._step)
        self._graph()
        torch.cuda.synchronize()


class MaskedCopies:
    """Masked linear layers for a training step that makes its copies W ⊙ M once, [G, P_m].

    A layer's weight is a view of the model's vector. Its copies are the same view of the vector's
    copies. The gradients overwrite the copies, which nothing reads any more.

    Args:
        kernels: computes all other operations.

    Attributes:
        bank: the model's masks. Set it when the model exists.
    """

    def __init__(self, kernels: Backend):
        self.bank: MaskBank
        self._kernels = kernels
        self._copies: Tensor | None = None  # exist from the first layer to the optimiser
        onednn_is_exact()  # computed and cached before a step is recorded

    @property
    def backend(self) -> Backend:
        """The operations of a training step. They do not work for mask updates."""
        return dataclasses.replace(
            self._kernels,
            # with this name, a CPU records the step as it records the kernels'
            name="masked copies" if ON_GPU else f"{self._kernels.name}, masked copies",
            masked_linear=self._masked_linear,
            norm_linear=partial(
                norm_then_linear, self._kernels.masked_layer_norm, self._masked_linear
            ),
            linear_residual=self._linear_residual,
            masked_adamw=self._masked_adamw,
        )

    def _masked_linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        weight_bits: Tensor | None,
        bias_bits: Tensor | None,
        task_ids: Tensor,
        *,
        relu: bool = False,
        **more: Any,
    ) -> Tensor:
        if weight_bits is None:  # the head has no masks
            layer = x, weight, bias, None, None, None
            return self._kernels.masked_linear(*layer, relu=relu, **more)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self._copies is None:
            self.bank.vector.gradient.zero_()  # these layers' gradients are added at the end
            self._mask = self._mask_of(task_ids)
            self._copies = _copy(self.bank.vector.weights, self._mask, x.dtype)
        return _Product.apply(x, self._copies_of(weight), self._copies_of(bias), relu)

    def _linear_residual(
        self, x: Tensor, *layer_and_masks: Any, seed: Tensor | None = None, **_: Any
    ) -> Tensor:
        *layer_and_masks, residual, drop = layer_and_masks
        branch = self._masked_linear(x, *layer_and_masks)
        return self._kernels.dropout_add(residual, branch, drop, seed)

    def _masked_adamw(self, weights: Tensor, gradient: Tensor, *rest: Any, **more: Any) -> Tensor:
        assert self._copies is not None
        _add(gradient, self._copies, self._mask)
        self._copies = None
        return self._kernels.masked_adamw(weights, gradient, *rest, **more)

    def _copies_of(self, parameter: Tensor) -> Tensor:
        assert self._copies is not None
        groups, size = self._copies.shape
        return self._copies.as_strided(
            (groups, *parameter.shape), (size, *parameter.stride()), parameter.storage_offset()
        )

    def _mask_of(self, task_ids: Tensor) -> Tensor:
        """The linear layers' masks. They are unpacked on a CPU, which uses them twice."""
        bits = self.bank.bits[task_ids] & self._linear_bits
        return bits if ON_GPU else unpack_bits(bits, self.bank.vector.maskable_size)

    @functools.cached_property
    def _linear_bits(self) -> Tensor:
        vector = self.bank.vector
        is_linear = torch.zeros(vector.maskable_size, dtype=torch.bool)
        for layer, slots in vector.layers.items():
            for slot in slots if isinstance(layer, MaskedLinear) else ():
                if slot is not None:
                    slot.view(is_linear).fill_(True)
        return pack_bits(is_linear).to(DEVICE)


def _copy(weights: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The first weights of a vector with each mask, [G, P_m] in `dtype`."""
    if ON_GPU:
        import copies_triton

        return copies_triton.masked_copies(weights, mask, dtype)
    copies = weights.new_empty(mask.shape, dtype=dtype)
    weights, zero = weights[: mask.shape[1]], weights.new_zeros(())
    for copy, row in zip(copies, mask, strict=True):
        torch.where(row, weights, zero, out=copy)
    return copies


def _add(total: Tensor, gradients: Tensor, mask: Tensor) -> None:
    """Add gradients [G, P_m], each with its mask, to the first elements of a vector."""
    if ON_GPU:
        import copies_triton

        return copies_triton.add_masked(total, gradients, mask)
    for gradient, row in zip(gradients, mask, strict=True):
        total[: len(row)] += torch.where(row, gradient, 0.0)
    return None


class _Product(torch.autograd.Function):
    """A layer's batched products. The backward pass overwrites weight and bias with gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        with _fastest_products():
            y = torch.baddbmm(bias[:, None], x, weight.mT)
        y = y.relu_() if relu else y
        ctx.save_for_backward(x, y if relu else None)
        ctx.weight, ctx.bias = weight, bias  # save_for_backward does not allow overwriting
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        dy = dy if y is None else dy.masked_fill(y <= 0, 0.0)
        with _fastest_products():
            dx = dy @ ctx.weight
            torch.bmm(dy.mT, x, out=ctx.weight)
        torch.sum(dy, 1, out=ctx.bias)
        return dx, None, None, None


def _fastest_products() -> contextlib.AbstractContextManager[None]:
    return onednn() if not ON_GPU and onednn_is_exact() else contextlib.nullcontext()


def for_compiler() -> Backend:
    """Operations without masks, which torch.compile compiles whole, and PyTorch's optimiser."""

    def dropout_add(
        x: Tensor | None, branch: Tensor, drop: float, seed: Tensor | None = None
    ) -> Tensor:
        dropped = _dropout(branch, drop)
        return dropped if x is None else x + dropped

    def linear_residual(x: Tensor, *layer: Any, seed: Tensor | None, **more: Any) -> Tensor:
        *layer, residual, drop = layer
        return dropout_add(residual, PYTORCH.masked_linear(x, *layer, **more), drop)

    return dataclasses.replace(
        PYTORCH,
        linear_residual=linear_residual,
        dropout_add=dropout_add,
        attention=PYTORCH.attention if ON_GPU else _attention,
        masked_adamw=LibraryAdamW(),
        rounds_inside=not ON_GPU and onednn_is_exact(),
    )


def _attention(
    qkv: Tensor, queries: slice, drop: float, past: None = None, seed: Tensor | None = None
) -> Tensor:
    """Attention over whole sequences on a CPU. The compiler fuses all that is between products."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    tokens = qkv.shape[1]
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)[queries]
    scores = (query[:, :, queries] * query.shape[-1] ** -0.5) @ key.mT
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    return (_dropout(weights, drop) @ value).transpose(1, 2)


def _dropout(x: Tensor, drop: float) -> Tensor:
    """Dropout with fast random numbers on a CPU: the compiler's own are many times slower."""
    if ON_GPU or not drop:
        return F.dropout(x, drop)
    return x * _kept(x, drop).to(x.dtype) / (1 - drop)


@torch.library.custom_op("harmodt_bench::kept", mutates_args=())
def _kept(x: Tensor, drop: float) -> Tensor:
    """The elements that dropout keeps, drawn as for the path "dense"."""
    return dropout_mask(x.shape, drop)


@_kept.register_fake
def _(x: Tensor, drop: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bool)


class LibraryAdamW:
    """`clip_grad_norm_` and `torch.optim.AdamW(fused=True)`, with the masked AdamW's arguments.

    The model's parameters are one vector here too, which is the fastest case for an optimiser.
    """

    def __init__(self) -> None:
        self._optimiser: torch.optim.AdamW | None = None

    def __call__(
        self,
        weights: Tensor,
        gradient: Tensor,
        *rest: Tensor,
        betas: tuple[float, float],
        epsilon: float,
        weight_decay: float,
        max_norm: float = math.inf,
        bf16_copy: None = None,
    ) -> Tensor:
        assert bf16_copy is None
        learning_rate = rest[-1][0]  # the bias corrections follow
        if self._optimiser is None:
            self._vector = nn.Parameter(weights)
            self._vector.grad = gradient
            self._optimiser = torch.optim.AdamW(
                [self._vector],
                betas=betas,
                eps=epsilon,
                weight_decay=weight_decay,
                fused=True,
                capturable=ON_GPU,
            )
        self._optimiser.param_groups[0]["lr"] = learning_rate if ON_GPU else float(learning_rate)
        norm = nn.utils.clip_grad_norm_([self._vector], max_norm)
        self._optimiser.step()
        return norm
