"""Loads the C library of the CPU kernels; `harmodt.h` describes its functions."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def file_name(platform: str) -> str:
    """The name that CMake gives to the library, on a platform of `sys.platform`."""
    return "libharmodt.dylib" if platform == "darwin" else "libharmodt.so"


PATH = Path(__file__).with_name(file_name(sys.platform))

ISA_VARIABLE = "HARMODT_ISA"
"""Environment variable that names the instruction set of the kernels. It is read when the kernels
are loaded."""


class LinearShape(Structure):
    """`harmodt_linear_shape`."""

    _fields_ = [
        *((name, c_int64) for name in ("groups", "rows", "inputs", "outputs", "weight_stride")),
        ("tasks", c_int64),
        ("weight_bits", c_void_p),
        ("weight_bits_task_stride", c_int64),
        ("weight_bits_row_stride", c_int64),
        ("bias_bits", c_void_p),
        ("bias_bits_task_stride", c_int64),
        ("task_ids", c_void_p),
        ("bf16", c_int),
    ]


class WeightGradient(Structure):
    """`harmodt_weight_gradient`."""

    _fields_ = [
        ("per_group", c_int),
        ("weight", c_void_p),
        ("weight_group_stride", c_int64),
        ("weight_row_stride", c_int64),
        ("bias", c_void_p),
        ("bias_group_stride", c_int64),
    ]


class SelectionOperands(Structure):
    """`harmodt_selection_operands`."""

    _fields_ = [
        ("tasks", c_int64),
        ("words", c_int64),
        ("mask_bits", c_void_p),
        ("mask_stride", c_int64),
        ("maskable_bits", c_void_p),
        ("weights", c_void_p),
        ("masked_gradients", c_void_p),
        ("masked_stride", c_int64),
        ("dense_gradients", c_void_p),
        ("dense_stride", c_int64),
        ("mean_gradient", c_void_p),
        ("losses", c_void_p),
        ("count", c_int64),
        ("balance", c_float),
        ("fisher", c_int),
        ("paper", c_int),
    ]


class AdamWOperands(Structure):
    """`harmodt_adamw_operands`."""

    _fields_ = [
        ("size", c_int64),
        *((name, c_void_p) for name in ("weights", "gradient", "first_moment", "second_moment")),
        ("mask_words", c_int64),
        ("mask_bits", c_void_p),
        ("mask_stride", c_int64),
        ("tasks", c_int64),
        ("groups", c_int64),
        ("task_ids", c_void_p),
        ("norm", c_void_p),
        *((name, c_float) for name in ("max_norm", "first_rate", "second_rate")),
        *((name, c_float) for name in ("epsilon", "weight_decay")),
        ("lr_and_corrections", c_void_p),
    ]


class AttentionShape(Structure):
    """`harmodt_attention_shape`."""

    _fields_ = [
        *((name, c_int64) for name in ("sequences", "tokens", "heads", "head_size")),
        *((name, c_int64) for name in ("queries", "first_query", "query_step", "past")),
        ("past_keys", c_void_p),
        ("past_values", c_void_p),
        ("dropout", c_float),
        ("seed", c_void_p),
    ]


class LayerNormShape(Structure):
    """`harmodt_layer_norm_shape`."""

    _fields_ = [
        *((name, c_int64) for name in ("groups", "rows", "size")),
        ("tasks", c_int64),
        ("weight_bits", c_void_p),
        ("weight_bits_task_stride", c_int64),
        ("bias_bits", c_void_p),
        ("bias_bits_task_stride", c_int64),
        ("task_ids", c_void_p),
        ("epsilon", c_float),
    ]


class EmbeddingShape(Structure):
    """`harmodt_embedding_shape`."""

    _fields_ = [
        *((name, c_int64) for name in ("steps", "size", "rows")),
        ("timesteps", c_void_p),
        ("x", c_void_p * 3),
        ("inputs", c_int64 * 3),
    ]


_STRUCTURES: dict[str, type[Structure]] = {
    "harmodt_linear_shape": LinearShape,
    "harmodt_weight_gradient": WeightGradient,
    "harmodt_selection_operands": SelectionOperands,
    "harmodt_adamw_operands": AdamWOperands,
    "harmodt_attention_shape": AttentionShape,
    "harmodt_layer_norm_shape": LayerNormShape,
    "harmodt_embedding_shape": EmbeddingShape,
}


def _check_ids(beyond: int, function: Any, arguments: tuple[Any, ...]) -> None:
    """Raise IndexError if a function of the library found an id out of range.

    ctypes calls this after each call, so also when a recording replays the call.

    Args:
        beyond: what the function returned: -1, or the place of the first id that is out of range.
        arguments: the function's arguments. The first is the structure that holds the ids.
    """
    if beyond < 0:
        return
    operands = arguments[0]._obj
    name = "timesteps" if isinstance(operands, EmbeddingShape) else "task_ids"
    held = ctypes.cast(getattr(operands, name), POINTER(c_int64))[beyond]
    if name == "timesteps":
        raise IndexError(f"timesteps holds {held}, but the table has {operands.rows} rows")
    raise IndexError(f"task_ids holds {held}, but there are masks for {operands.tasks} tasks only")


def _check_memory(enough: int, function: Any, arguments: tuple[Any, ...]) -> None:
    """Raise MemoryError if a function of the library returned 0."""
    if not enough:
        raise MemoryError(f"{function.__name__}: there is not enough memory")


_P, _THREADS = c_void_p, c_int
_IDS, _MEMORY = "ids", "memory"  # results that ctypes gives to the functions of `_CHECKS`
_DROPOUT = c_float, c_void_p  # probability and seed
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "harmodt_size_of": (c_int64, [c_char_p]),
    "harmodt_isa": (c_char_p, []),
    "harmodt_use_isa": (c_int, [c_char_p]),
    "harmodt_masked_linear": (
        _IDS,
        [POINTER(LinearShape), _P, _P, _P, c_int, _P, *_DROPOUT, _P, _THREADS],
    ),
    "harmodt_masked_linear_input_gradient": (
        _IDS,
        [POINTER(LinearShape), _P, _P, *_DROPOUT, _P, _P, _THREADS],
    ),
    "harmodt_masked_linear_weight_gradient": (
        _IDS,
        [POINTER(LinearShape), _P, _P, *_DROPOUT, *(_P, _P, _P), POINTER(WeightGradient), _THREADS],
    ),
    "harmodt_norm_linear": (
        _IDS,
        [
            POINTER(LinearShape),
            POINTER(LayerNormShape),
            *(_P, _P, _P, _P, _P, c_int, _P, _P, _P),
            _THREADS,
        ],
    ),
    "harmodt_masked_layer_norm": (_IDS, [POINTER(LayerNormShape), _P, _P, _P, _P, _P, _THREADS]),
    "harmodt_masked_layer_norm_gradient": (
        _IDS,
        [POINTER(LayerNormShape), _P, _P, _P, _P, _P, _P, POINTER(WeightGradient), _THREADS],
    ),
    "harmodt_attention": (None, [POINTER(AttentionShape), _P, _P, _P, _THREADS]),
    "harmodt_attention_gradient": (
        None,
        [POINTER(AttentionShape), _P, _P, _P, _P, _P, _THREADS],
    ),
    "harmodt_dropout_add": (None, [c_int64, _P, _P, _P, *_DROPOUT, _THREADS]),
    "harmodt_token_embedding": (
        _IDS,
        [POINTER(EmbeddingShape), POINTER(_P), _P, _THREADS],
    ),
    "harmodt_token_embedding_gradient": (
        _IDS,
        [POINTER(EmbeddingShape), _P, POINTER(_P), _THREADS],
    ),
    "harmodt_select_harmony": (_MEMORY, [POINTER(SelectionOperands), _P, _P, _P, _P, _THREADS]),
    "harmodt_move_weights": (None, [_P, c_int64, _P, c_int64, c_int64]),
    "harmodt_masked_adamw": (_IDS, [POINTER(AdamWOperands), _THREADS]),
    "harmodt_multiply_adds": (c_int64, [c_int64, c_int, _THREADS]),
}

_CHECKS: dict[str, tuple[Any, Any]] = {
    _IDS: (c_int64, _check_ids),
    _MEMORY: (c_int, _check_memory),
}


def why_missing() -> str | None:
    """Why the library cannot be used, or None if it can."""
    return _why_missing(PATH, os.environ.get(ISA_VARIABLE))


@functools.cache  # every call of an operation asks
def _why_missing(path: Path, wanted: str | None) -> str | None:
    if not path.exists():
        return (
            "the CPU kernels were not built when harmodt was installed: install GCC (g++) and "
            "install harmodt again (pip install -v shows why a build fails)"
        )
    try:
        loaded = _load(path)
    except (OSError, AttributeError) as error:
        return f"the CPU kernels in {path} cannot be used ({error}): install harmodt again"
    if wanted and not loaded.harmodt_use_isa(wanted.encode()):
        return f"{ISA_VARIABLE} is {wanted!r}, which this machine does not have"
    return None


def library() -> Any:
    """The loaded library. Inside `noting`, a wrapper that reports each call."""
    loaded, note = _load(PATH), getattr(_NOTING, "call", None)
    return loaded if note is None else _Noted(loaded, note)


NoteCall = Callable[[Any, tuple[Any, ...]], None]
NoteOperand = Callable[[Tensor], None]
_NOTING = threading.local()


@contextlib.contextmanager
def noting(call: NoteCall, operand: NoteOperand) -> Iterator[None]:
    """Report this thread's calls of the library.

    Args:
        call: is called after each call, with the function and its arguments.
        operand: is called with each tensor whose address a call gets.
    """
    _NOTING.call, _NOTING.operand = call, operand
    try:
        yield
    finally:
        del _NOTING.call, _NOTING.operand


class _Noted:
    def __init__(self, loaded: ctypes.CDLL, note: NoteCall):
        self._loaded, self._note = loaded, note

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._loaded, name)

        def call(*arguments: Any) -> Any:
            returned = function(*arguments)
            self._note(function, arguments)
            return returned

        return call


def isa() -> str:
    """The instruction set in use."""
    return library().harmodt_isa().decode()


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    """Load a library and compare its functions and structures with the declarations here.

    Raises:
        OSError: the file is truncated, or a structure has another size.
        AttributeError: the library lacks a function.
    """
    _check_whole(path)
    # PyTorch is imported above, so the library uses the OpenMP that PyTorch has loaded.
    loaded = ctypes.CDLL(str(path))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        if result in _CHECKS:
            function.restype, function.errcheck = _CHECKS[result]
        else:
            function.restype = result
    for name, structure in _STRUCTURES.items():
        built, here = loaded.harmodt_size_of(name.encode()), ctypes.sizeof(structure)
        if built != here:
            raise OSError(f"its {name} has {built} bytes where this version of harmodt has {here}")
    return loaded


def _check_whole(path: Path) -> None:
    """Raise OSError if the file is truncated: loading it would kill the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if not header.startswith(b"\x7fELF\x02\x01"):
        return  # the file is not a little-endian 64-bit ELF: the loader reports that
    # Linkers write the table of sections last: read its start, and its entries' size and number.
    _, start, _, _, _, _, size, number, _ = struct.unpack_from("<QQIHHHHHH", header.ljust(64), 32)
    if path.stat().st_size < start + size * number:
        raise OSError("the end of the file is missing")


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's first element. Inside `noting`, it reports the tensor."""
    if tensor is None:
        return None
    if (note := getattr(_NOTING, "operand", None)) is not None:
        note(tensor)
    return tensor.data_ptr()


_PROCESS = os.getpid()


def threads() -> int:
    """The number of threads that PyTorch uses; 1 in a forked child.

    OpenMP would wait there for threads that exist only in the parent.
    """
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1
