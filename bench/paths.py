"""Makes a `Trainer` for each path. A path is a way to compute the same training step.

The paths:

    fused                  the kernels
    fused, computed anew   on a CPU, the same without a recording: Python calls every kernel
    masked copies          one pass makes W ⊙ M of all layers for the tasks of the step, PyTorch's
                           batched products multiply with these copies, and one pass masks and sums
                           the gradients. All other operations are those of "fused"
    reference              masks in plain PyTorch: --no-fused
    reference, compiled    masks in plain PyTorch through torch.compile, which also compiles AdamW
    dense                  Prompt-DT: the same model without masks, in PyTorch
    dense, recorded        on a CPU, the same, but recorded and replayed as "fused" is
    dense, oneDNN          on a CPU, "dense" with oneDNN's products, which are faster on AMD's
                           processors
    compiled               "dense" through torch.compile, with PyTorch's fused AdamW

On a CPU, the trainers of "fused", "masked copies" and "dense, recorded" replay a recorded step. A
recording cannot replay draws of PyTorch's generator. So "dense, recorded" draws its dropout with an
operation that first seeds the generator with the seed of the dropout.

"masked copies" and the compiled paths also use oneDNN's products if these keep float32 operands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
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
from harmodt_kernels import PYTORCH, REFERENCE, Backend, MaskedLinear, pack_bits, unpack_bits
from harmodt_kernels.bits import BITS_PER_WORD
from harmodt_kernels.dropout_add.pytorch import dropout_mask
from harmodt_kernels.norm_linear.reference import norm_then_linear

ANEW = () if ON_GPU else ("fused, computed anew",)
FUSED = ("fused", *ANEW, "masked copies")
DENSE = ("dense",) if ON_GPU else ("dense", "dense, recorded", "dense, oneDNN")
COMPILED = ("reference, compiled", "compiled")
PATHS = (*FUSED, "reference", *DENSE, *COMPILED)
WITHOUT_MASKS = (*DENSE, "compiled")
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
    on_kernels = path in FUSED
    kernels = fused() if on_kernels else None
    config = preset("paper", "prompt-dt" if path in WITHOUT_MASKS else "harmodt-f")
    config = change(config, {**STEP, "fused": on_kernels, "graph": not ON_GPU, **settings})
    if path in ANEW:
        config = change(config, {"graph": False})
    if path == "masked copies":
        assert kernels is not None
        copies = MaskedCopies(kernels)
        trainer = tiny.make_trainer(store, config, DEVICE, copies.backend)
        copies.bank = trainer.learner.bank
    elif path == "dense, recorded":
        trainer = tiny.make_trainer(store, config, DEVICE, for_recording())
    elif path == "dense, oneDNN":
        # PyTorch selects oneDNN for this precision, whether or not oneDNN rounds operands
        config = change(config, {"precision": "bf16"})
        backend = dataclasses.replace(PYTORCH, rounds_inside=True)
        trainer = tiny.make_trainer(store, config, DEVICE, backend)
    elif path in COMPILED:
        backend = for_compiler(path == "reference, compiled", compiler)
        config = change(config, {"precision": "bf16"} if backend.rounds_inside else {})
        trainer = tiny.make_trainer(store, config, DEVICE, backend)
        compile_model(trainer, compiler)
    else:
        trainer = tiny.make_trainer(store, config, DEVICE)
    return trainer


def compile_model(trainer: Trainer, compiler: str) -> None:
    """Compile the model of a trainer: the whole model on a GPU, and each block on a CPU."""
    torch.compiler.reset()  # else other models count as recompilations, and those are limited
    learner = trainer.learner
    # The compiler takes no hooks: autograd adds the gradients, as in an ordinary program.
    learner._masks = TaskMasks(learner.vector, learner.mask_bits, learner.feed.task_ids)
    for layer in learner.vector.layers:
        learner._masks.of(layer)  # keeps the layer's masks, which the compiler only reads
    learner.clear_gradients = learner.vector.gradient.zero_
    learner.backward = lambda losses: losses.mean().backward()
    for module in [learner.model] if ON_GPU else learner.model.blocks:
        module.compile(backend=compiler, dynamic=False, fullgraph=True)


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


def for_recording() -> Backend:
    """PyTorch's operations without masks, which a CPU can record."""
    # with this name, a CPU records the step as it records the kernels'
    return dataclasses.replace(_with_dropout(_dropout, PYTORCH.masked_linear), name="cpu-pytorch")


def for_compiler(masked: bool, compiler: str) -> Backend:
    """Operations that torch.compile compiles whole, and an optimiser.

    Args:
        masked: whether there are masks. AdamW with masks is compiled too. Without masks it is
            PyTorch's fused AdamW.
        compiler: torch.compile's backend.
    """

    def dropout(x: Tensor, drop: float, seed: Tensor | None) -> Tensor:
        return _dropout(x, drop, None)  # the generator's own draws: the compiler needs no seed

    rounds_inside = not ON_GPU and onednn_is_exact()
    if not masked:
        backend = _with_dropout(dropout, PYTORCH.masked_linear)
        return dataclasses.replace(
            backend, masked_adamw=LibraryAdamW(), rounds_inside=rounds_inside
        )
    return dataclasses.replace(
        _with_dropout(dropout, _masked_linear),
        masked_layer_norm=_masked_layer_norm,
        norm_linear=partial(norm_then_linear, _masked_layer_norm, _masked_linear),
        masked_adamw=torch.compile(
            REFERENCE.masked_adamw, backend=compiler, dynamic=False, fullgraph=True
        ),
        rounds_inside=rounds_inside,
    )


def _with_dropout(dropout: Callable[..., Tensor], linear: Callable[..., Tensor]) -> Backend:
    """PyTorch's operations with a form of dropout and of the masked linear layer."""

    def dropout_add(
        x: Tensor | None, branch: Tensor, drop: float, seed: Tensor | None = None
    ) -> Tensor:
        dropped = dropout(branch, drop, seed)
        return dropped if x is None else x + dropped

    def linear_residual(x: Tensor, *layer: Any, seed: Tensor | None, **more: Any) -> Tensor:
        *layer, residual, drop = layer
        return dropout_add(residual, linear(x, *layer, **more), drop, seed)

    return dataclasses.replace(
        PYTORCH,
        masked_linear=linear,
        linear_residual=linear_residual,
        dropout_add=dropout_add,
        attention=PYTORCH.attention if ON_GPU else partial(_attention, dropout),
    )


def _masked(values: Tensor, bits: Tensor, task_ids: Tensor) -> Tensor:
    """Masked copies of a weight or bias [..., K] for the groups' tasks, [G, ..., K].

    The compiler fuses the unpacking of bits with what reads the copy.
    """
    shifts = torch.arange(BITS_PER_WORD, dtype=torch.int32, device=bits.device)
    mask = ((bits[task_ids][..., None] >> shifts) & 1).flatten(-2)[..., : values.shape[-1]]
    return torch.where(mask.bool(), values, 0.0)


def _masked_linear(
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
    """A masked linear layer for the compiler, which derives the backward pass."""
    if weight_bits is None or bias_bits is None:  # the head has no masks
        return PYTORCH.masked_linear(x, weight, bias, None, None, None, relu=relu, **more)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    copies = _masked(weight, weight_bits, task_ids).to(x.dtype)
    biases = _masked(bias, bias_bits, task_ids).to(x.dtype)
    y = torch.baddbmm(biases[:, None], x, copies.mT)
    return y.relu() if relu else y


def _masked_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_bits: Tensor | None,
    bias_bits: Tensor | None,
    task_ids: Tensor,
    *,
    epsilon: float = 1e-5,
    dtype: torch.dtype | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """A masked LayerNorm for the compiler."""
    if weight_bits is None or bias_bits is None:
        operands = x, weight, bias, None, None, None
        return PYTORCH.masked_layer_norm(*operands, epsilon=epsilon, dtype=dtype, **more)
    gain, shift = (
        _masked(values, bits, task_ids)[:, None]
        for values, bits in ((weight, weight_bits), (bias, bias_bits))
    )
    y = F.layer_norm(x, x.shape[-1:], eps=epsilon) * gain + shift
    return y if dtype is None else y.to(dtype), x


def _attention(
    dropout: Callable[..., Tensor],
    qkv: Tensor,
    queries: slice,
    drop: float,
    past: None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """The attention of plain PyTorch over whole sequences on a CPU, with a form of dropout."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    tokens = qkv.shape[1]
    later = query.new_full((tokens, tokens), -math.inf).triu(1)[queries]
    scores = (query[:, :, queries] * query.shape[-1] ** -0.5) @ key.mT
    weights = scores.add_(later).softmax(-1)
    return (dropout(weights, drop, seed) @ value).transpose(1, 2)


def _dropout(x: Tensor, drop: float, seed: Tensor | None) -> Tensor:
    """Dropout with fast random numbers on a CPU: the compiler's own are many times slower.

    Args:
        seed: int64 [], with which PyTorch's generator is seeded first; or None.
    """
    if ON_GPU or not drop:
        return F.dropout(x, drop)
    return x * _kept(x, drop, seed).to(x.dtype) / (1 - drop)


@torch.library.custom_op("harmodt_bench::kept", mutates_args=())
def _kept(x: Tensor, drop: float, seed: Tensor | None) -> Tensor:
    """The elements that dropout keeps, drawn as for the path "dense"."""
    if seed is not None:
        torch.default_generator.manual_seed(int(seed))
    return dropout_mask(x.shape, drop)


@_kept.register_fake
def _(x: Tensor, drop: float, seed: Tensor | None) -> Tensor:
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
