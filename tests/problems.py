"""Operands of the operations with their results by independent computations, for several tests."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harmodt_kernels import Backend, pack_bits, words_for

TASKS = 3

ADAMW = {"betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.1}
LEARNING_RATE = 0.01


@dataclass
class LinearProblem:
    """Random operands in float64; the groups' tasks repeat where there are more than tasks."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    weight_mask: np.ndarray
    bias_mask: np.ndarray
    task_ids: np.ndarray
    output_gradient: np.ndarray
    masked: bool = True

    @classmethod
    def random(cls, groups: int, rows: int, inputs: int, outputs: int) -> LinearProblem:
        rng = np.random.default_rng([groups, rows, inputs, outputs])
        return cls(
            x=rng.normal(size=(groups, rows, inputs)),
            weight=rng.normal(size=(outputs, inputs)),
            bias=rng.normal(size=outputs),
            weight_mask=rng.random((TASKS, outputs, inputs)) < 0.7,
            bias_mask=rng.random((TASKS, outputs)) < 0.7,
            task_ids=rng.permutation(np.arange(groups) % TASKS),
            output_gradient=rng.normal(size=(groups, rows, outputs)),
        )

    def without_masks(self) -> LinearProblem:
        """The same with every weight active, and no masks among the operands."""
        self.weight_mask[:] = self.bias_mask[:] = True
        self.masked = False
        return self

    def rounded(self, dtype: torch.dtype) -> LinearProblem:
        """The same with operands that are exact in a lower precision."""
        for name in ("x", "weight", "bias", "output_gradient"):
            values = torch.from_numpy(getattr(self, name)).to(dtype).double().numpy()
            setattr(self, name, values)
        return self

    @property
    def bits(self) -> tuple[Tensor, Tensor]:
        """The packed masks of weights and biases."""
        masks = torch.from_numpy(self.weight_mask), torch.from_numpy(self.bias_mask)
        return pack_bits(masks[0]), pack_bits(masks[1])

    def expected(
        self, relu: bool = False, passed: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Output and gradients in float64, group by group, and the gradients of single groups.

        Args:
            passed: bool, shape of the output: where the ReLU let it pass, by default where the
                output is above 0. Next to 0 the output in another precision may lie on the other
                side, and its gradients are then other ones.
        """
        result = {
            "y": np.zeros_like(self.output_gradient),
            "x": np.zeros_like(self.x),
            "weight_of_groups": np.zeros((len(self.x), *self.weight.shape)),
            "bias_of_groups": np.zeros((len(self.x), *self.bias.shape)),
        }
        for g, task in enumerate(self.task_ids):
            weight = np.where(self.weight_mask[task], self.weight, 0.0)
            y = self.x[g] @ weight.T + np.where(self.bias_mask[task], self.bias, 0.0)
            dy = self.output_gradient[g]
            if relu:
                dy = dy * (y > 0 if passed is None else passed[g])
                y = np.maximum(y, 0.0)
            result["y"][g] = y
            result["x"][g] = dy @ weight
            result["weight_of_groups"][g] = (dy.T @ self.x[g]) * self.weight_mask[task]
            result["bias_of_groups"][g] = dy.sum(0) * self.bias_mask[task]
        sums = {name: result[f"{name}_of_groups"].sum(0) for name in ("weight", "bias")}
        return result | sums

    def check(self, computed: dict[str, Tensor], error: float, relu: bool = False) -> None:
        """Assert that results are the expected ones, and gradients those of the computed output."""
        passed = computed["y"].cpu().numpy() > 0 if relu else None
        expected = self.expected(relu, passed)
        for name, values in computed.items():
            np.testing.assert_allclose(
                values.double().cpu().numpy(), expected[name], error, error, err_msg=name
            )

    def computed(
        self,
        backend: Backend,
        device: torch.device,
        dtype: torch.dtype,
        *,
        weight_dtype: torch.dtype | None = None,
        bias: bool = True,
        relu: bool = False,
        autocast: bool = False,
        of_groups: bool = False,
        in_place: bool = False,
    ) -> dict[str, Tensor]:
        """The same by a backend, on views such as the model's: all rows padded to whole words.

        Each keyword is a choice that some test makes by itself: the gradients of weight and bias of
        each group (`of_groups`) or their sums (`in_place`) are written where the layer is told to.
        """
        weight_dtype = weight_dtype or dtype
        x = torch.from_numpy(self.x).to(device, dtype).requires_grad_()
        flat = padded(torch.from_numpy(self.weight).to(device, weight_dtype)).requires_grad_()
        weight = flat[:, : self.weight.shape[1]]
        b = torch.from_numpy(self.bias).to(device, weight_dtype).requires_grad_()
        weight_bits, bias_bits = (in_longer_rows(bits.to(device)) for bits in self.bits)
        task_ids = torch.from_numpy(self.task_ids).to(device)
        masks = (weight_bits, bias_bits if bias else None, task_ids)
        groups, outputs, inputs = len(self.x), *self.weight.shape
        rows = groups if of_groups else 1
        vectors = torch.full((rows, outputs, words_for(inputs) * 32 + 64), torch.nan)
        weight_out = vectors.to(device, weight_dtype)[..., :inputs]
        bias_out = torch.full((rows, outputs), torch.nan, device=device, dtype=weight_dtype)
        out = (weight_out, bias_out if bias else None) if of_groups or in_place else None
        casting = torch.autocast(device.type, torch.bfloat16)
        with casting if autocast else contextlib.nullcontext():
            y = backend.masked_linear(
                x,
                weight,
                b if bias else None,
                *(masks if self.masked else (None, None, None)),
                relu=relu,
                group_gradients=out,
            )
        y.backward(torch.from_numpy(self.output_gradient).to(device, y.dtype))
        if of_groups:
            assert flat.grad is None and b.grad is None
            return {
                "y": y.detach(),
                "x": x.grad,
                "weight_of_groups": weight_out,
                "bias_of_groups": bias_out,
            }
        if in_place:
            assert flat.grad is None and b.grad is None
            return {"y": y.detach(), "x": x.grad, "weight": weight_out[0], "bias": bias_out[0]}
        weight_gradient = flat.grad[:, :inputs]
        return {"y": y.detach(), "x": x.grad, "weight": weight_gradient, "bias": b.grad}


def padded(weight: Tensor) -> Tensor:
    """Rows of whole words, with NaN after the weights."""
    inputs = weight.shape[1]
    return F.pad(weight, (0, words_for(inputs) * 32 - inputs), value=torch.nan)


def in_longer_rows(bits: Tensor) -> Tensor:
    """The bits of each task as a slice of a longer row of set bits."""
    rows = F.pad(bits.flatten(1), (5, 7), value=-1)
    return rows[:, 5:-7].unflatten(1, bits.shape[1:])


def largest_error(computed: Tensor, expected: np.ndarray) -> float:
    return float(np.abs(computed.double().cpu().numpy() - expected).max())


def small_variances(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of mean 0 in the directions of those of x, and their variances, float64 [rows].

    Args:
        x: float64 [..., rows, size].
    """
    variances = torch.tensor([0, 1e-9, 1e-7, 1e-6, 3e-6, 1e-5]).double()
    variances = variances.repeat(-(-x.shape[-2] // len(variances)))[: x.shape[-2]]
    centred = x - x.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).sqrt()
    return centred / spread * variances[:, None].sqrt(), variances


@dataclass
class LayerNormProblem:
    """Operands, two tasks more than groups; x has a gradient of its own beside that of y."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    weight_mask: Tensor
    bias_mask: Tensor
    task_ids: Tensor
    dy: Tensor
    d_residual: Tensor
    masked: bool = True
    epsilon: float = 1e-5

    @classmethod
    def random(cls, groups: int, rows: int, size: int) -> LayerNormProblem:
        generator = torch.Generator().manual_seed(size)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        masks = (torch.rand(groups + 2, size, generator=generator) < 0.7 for _ in range(2))
        ids = torch.randint(groups + 2, (groups,), generator=generator)
        # Rows of two elements too are spread out: nearly equal ones lose digits in any arithmetic.
        x = draw(groups, rows, size).clamp(-2, 2) + 1 + 6 * (torch.arange(size) % 2)
        gradients = draw(groups, rows, size), draw(groups, rows, size)
        return cls(x, draw(size), draw(size), *masks, ids, *gradients)

    def with_small_variances(self) -> LayerNormProblem:
        """The same with rows of variance 0 to 1e-5, where what is added to it decides."""
        x, variances = small_variances(self.x.double())
        self.x = x.float()
        found = self.x.double().var(-1, correction=0)
        torch.testing.assert_close(found, variances.expand_as(found), rtol=1e-5, atol=1e-15)
        return self

    @property
    def masks(self) -> tuple[Tensor, Tensor, Tensor]:
        """The operands that are masks."""
        return pack_bits(self.weight_mask), pack_bits(self.bias_mask), self.task_ids

    def without_masks(self) -> LayerNormProblem:
        """The same with every weight active, and no masks among the operands."""
        self.weight_mask[:] = self.bias_mask[:] = True
        self.masked = False
        return self

    def computed(
        self,
        backend: Backend,
        device: torch.device,
        of_groups: bool,
        dtype: torch.dtype = torch.float32,
        in_place: bool = False,
    ) -> dict[str, Tensor]:
        """The output and the gradients; of weight and bias those of each group, or summed.

        Sums are written to where the layer is told to (`in_place`), or left to autograd.
        """
        x = self.x.to(device, dtype)
        leaves = [
            t.clone().requires_grad_() for t in (x, self.weight.to(device), self.bias.to(device))
        ]
        groups, _, size = self.x.shape
        out = torch.full((2, groups if of_groups else 1, size), torch.nan, device=device)
        masks = [t.to(device) for t in self.masks] if self.masked else (None, None, None)
        y, residual = backend.masked_layer_norm(
            *leaves,
            *masks,
            epsilon=self.epsilon,
            group_gradients=tuple(out) if of_groups or in_place else None,
        )
        torch.autograd.backward((y, residual), (self.dy.to(y), self.d_residual.to(residual)))
        d_weight, d_bias = leaves[1].grad, leaves[2].grad
        if of_groups or in_place:
            assert d_weight is None and d_bias is None
            d_weight, d_bias = out if of_groups else out[:, 0]
        return {"y": y.detach(), "x": leaves[0].grad, "weight": d_weight, "bias": d_bias}

    def expected(self, of_groups: bool) -> dict[str, Tensor]:
        """By the formulas, in float64."""
        x, dy = self.x.double(), self.dy.double()
        gain_mask, bias_mask = (m[self.task_ids] for m in (self.weight_mask, self.bias_mask))
        gain = torch.where(gain_mask, self.weight.double(), 0.0)[:, None]
        bias = torch.where(bias_mask, self.bias.double(), 0.0)[:, None]
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        v = centred / deviation
        d = dy * gain
        dx = d - d.mean(-1, keepdim=True) - v * (d * v).mean(-1, keepdim=True)
        d_weight, d_bias = (dy * v).sum(1) * gain_mask, dy.sum(1) * bias_mask
        if not of_groups:
            d_weight, d_bias = d_weight.sum(0), d_bias.sum(0)
        dx = dx / deviation + self.d_residual
        return {"y": v * gain + bias, "x": dx, "weight": d_weight, "bias": d_bias}

    def check(self, computed: dict[str, Tensor], of_groups: bool) -> None:
        for name, expected in self.expected(of_groups).items():
            torch.testing.assert_close(
                computed[name].double().cpu(),
                expected,
                rtol=2e-5,
                atol=2e-4,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def attention_operands(sequences: int, tokens: int, heads: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(sequences, tokens, 3, heads, size, generator=generator) * 2


def attention_by_loops(qkv: Tensor, queries: slice) -> Tensor:
    """In float64, a softmax for each query over the keys up to its own."""
    sequences, tokens, _, heads, size = qkv.shape
    rows = []
    for b in range(sequences):
        for i in range(tokens)[queries]:
            for h in range(heads):
                q, k, v = qkv[b, i, 0, h], qkv[b, : i + 1, 1, h], qkv[b, : i + 1, 2, h]
                rows.append(torch.softmax(k @ q / math.sqrt(size), 0) @ v)
    return torch.stack(rows).view(sequences, -1, heads, size)
