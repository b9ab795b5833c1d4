"""Reads pickles of plain containers, numbers, strings and NumPy arrays without running their code.

A pickle is a program that may call any function that can be imported. The virtual machine in this
file knows only the instructions that Python 3 writes for such data, in all pickle protocols. If an
instruction names a function of NumPy, the machine calls a function in this file instead, which
checks its arguments. The machine imports nothing, sets no attribute and knows no other name.

Reading a file takes little more memory than the file's size. Arrays share the bytes of the file.
The reader allocates no memory for a size that the file only declares. The number of instructions
has a limit.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from .arrays import reading

_LARGEST = 2**31  # most bytes of a file; a task with 1000 episodes of 200 steps takes 80 million
_INSTRUCTIONS = 2**22  # most instructions of a file; an episode takes about 200 of them

_NUMBERS = {"b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8"}


class Array:
    """A NumPy array in a pickle.

    Attributes:
        values: an array of booleans, integers or floats; None if the pickle gives no content.
    """

    def __init__(self, values: np.ndarray | None = None) -> None:
        self.values = values


def read_pickle(path: Path) -> Any:
    """Read the content of a pickle: arrays become `Array`, NumPy scalars become numbers.

    The whole file is read at once, so reading takes about twice its size in memory.

    Raises:
        UserError: the file is missing, damaged or larger than 2 GiB, or holds anything else.
    """
    with reading(path, "truncated or not a pickle: download it again or remove it"):
        try:
            size = path.stat().st_size
            if size > _LARGEST:
                raise _Refusal(f"has {size / 1e9:.1f} GB, which is too large to read: split it")
            return _Machine(size).run(path.read_bytes())
        except _Refusal as refusal:
            raise UserError(f"{path} {refusal}") from None


class _Refusal(Exception):
    """Says why an undamaged pickle is not read, and what to do."""


class _DType:
    """A dtype; `set_state` sets its byte order."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not isinstance(code, str):
            raise TypeError(type(code))
        if code not in _NUMBERS:
            raise _Refusal(
                f"holds an array of {code[:20]!r}, but only numbers can be read: write it again "
                "with arrays of a float, integer or bool dtype"
            )
        self.type = np.dtype(code)

    def set_state(self, state: Sequence[Any]) -> None:
        self.type = self.type.newbyteorder(state[1])


class _Machine:
    """Runs the instructions of one pickle.

    Args:
        size: the size of the file in bytes.
    """

    def __init__(self, size: int) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # for each mark, the stack below it
        self.memo: dict[int, Any] = {}
        self.names: dict[str, Any] = {
            "numpy ndarray": _NDARRAY,
            "numpy dtype": _DType,
            "_codecs encode": _Encoder(size),
            "__builtin__ bytes": bytes,
        }
        for core in ("numpy.core", "numpy._core"):  # the name before NumPy 2, and since
            self.names[f"{core}.multiarray _reconstruct"] = _reconstruct
            self.names[f"{core}.multiarray scalar"] = _scalar
            self.names[f"{core}.numeric _frombuffer"] = _from_buffer

    def run(self, content: bytes) -> Any:
        for number, (instruction, argument, _) in enumerate(pickletools.genops(content)):
            if number == _INSTRUCTIONS:
                raise _Refusal(
                    f"has more than {_INSTRUCTIONS:,} instructions: write it again with one array "
                    "for each key of an episode, or split it"
                )
            if instruction.name == "STOP":
                return self.stack.pop()
            if instruction.name not in _DO:
                raise _Refusal(
                    f"uses the instruction {instruction.name}: NumPy arrays and plain containers "
                    "do not need it, and a pickle can run code, so write the file again without it"
                )
            _DO[instruction.name](self, argument)
        raise AssertionError("genops ends at STOP")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        """Take the values that were pushed since the last mark."""
        taken, self.stack = self.stack, self.below.pop()
        return taken

    def mark(self, _: None) -> None:
        self.below.append(self.stack)
        self.stack = []

    def tuple_of(self, length: int) -> None:
        if len(self.stack) < length:
            raise ValueError("the stack is too short")
        self.stack[-length:] = [tuple(self.stack[-length:])]

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError(type(target))
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target, keys = self.stack[-1], values[::2]
        # To hash a key of another type could take unlimited time or recursion.
        if not isinstance(target, dict) or not all(isinstance(key, str) for key in keys):
            raise TypeError(type(target))
        target.update(zip(keys, values[1::2], strict=True))

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def name(self, name: str) -> None:
        if name not in self.names:
            raise _Refusal(
                f"names {name.replace(' ', '.')}: NumPy arrays and plain containers do not need "
                "it, and a pickle can run code, so write the file again without it"
            )
        self.push(self.names[name])

    def stack_name(self, _: None) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise TypeError(type(attribute))
        self.name(f"{module} {attribute}")

    def reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function is bytes and arguments:  # protocol 2 writes b"" as a call of bytes()
            raise TypeError(arguments)
        self.push(function(*arguments))

    def build(self, _: None) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Array):
            _, shape, dtype, fortran, content = state
            target.values = _as_array(content, dtype, shape, "F" if fortran else "C")
        elif isinstance(target, _DType):
            target.set_state(state)
        else:
            raise TypeError(type(target))


class _Encoder:
    """Makes bytes from text: protocols 0 to 2 write bytes as text.

    Args:
        size: the largest number of bytes in total. A pickle could otherwise encode one text again
            and again.
    """

    def __init__(self, size: int) -> None:
        self.left = size

    def __call__(self, text: str, encoding: str) -> bytes:
        self.left -= len(text)
        if encoding != "latin1" or self.left < 0:
            raise ValueError(encoding)
        return text.encode("latin-1")


_NDARRAY = object()
"""Stands for the name `numpy.ndarray`, which is the first argument of `_reconstruct`."""


def _reconstruct(kind: object, shape: object, code: object) -> Array:
    """Make an array whose content follows in the pickle."""
    if kind is not _NDARRAY:
        raise TypeError(kind)
    return Array()


def _from_buffer(content: bytes, dtype: _DType, shape: Sequence[int], order: str) -> Array:
    """Make an array; protocol 5 writes it as this call."""
    return Array(_as_array(content, dtype, shape, order))


def _scalar(dtype: _DType, content: bytes) -> bool | int | float:
    return _as_array(content, dtype, (), "C").item()


def _as_array(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """View bytes of the file as an array."""
    if not isinstance(content, bytes | bytearray) or not isinstance(dtype, _DType):
        raise TypeError(type(content))
    if len(shape) > 3 or not all(isinstance(size, int) and 0 <= size < 2**40 for size in shape):
        raise ValueError(shape)
    if len(content) != math.prod(shape) * dtype.type.itemsize or order not in ("C", "F"):
        raise ValueError(len(content))
    return np.frombuffer(content, dtype.type).reshape(shape, order=order)


_DO: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": _Machine.mark,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "DICT": lambda machine, _: _dictionary(machine),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"), _Machine.push),
    **dict.fromkeys(("FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE"), _Machine.push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES"), _Machine.push),
    **dict.fromkeys(("BINBYTES", "BINBYTES8", "BYTEARRAY8"), _Machine.push),
}
"""The machine's function for each instruction; it gets the machine and the argument."""


def _dictionary(machine: _Machine) -> None:
    values = machine.since_mark()
    machine.push({})
    machine.set_items(values)
