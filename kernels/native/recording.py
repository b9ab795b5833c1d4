"""Records the operations of a computation on a CPU and replays them without Python's work.

Python, PyTorch's dispatcher and autograd choose operations, check operands and allocate tensors.
This work has the same outcome in each training step, so a replay leaves it out.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..registration import kernel
from .library import noting

_REFUSED = {
    torch.Tag.data_dependent_output,  # Python reads a value
    torch.Tag.dynamic_output_shape,  # sizes depend on values
    torch.Tag.nondeterministic_seeded,  # PyTorch's generators draw
}

# These functions of PyTorch give Python a tensor's values or its address.
_READERS = {
    *(Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__),
    *(Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__complex__),
    *(Tensor.__index__, Tensor.__repr__, Tensor.__format__, Tensor.__reduce_ex__),
    *(Tensor.apply_, Tensor.map_, Tensor.map2_),  # they call a function of Python for each value
    *(Tensor.data_ptr, Tensor.storage, Tensor.untyped_storage),
}
_CONSTRUCTORS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, Tensor.new}
_SPLITS = {torch.tensor_split, Tensor.tensor_split}
_BACKWARD = {Tensor.backward, torch.autograd.backward, torch.autograd.grad}

_PRODUCTS = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


class CannotRecord(RuntimeError):
    """The computation contains an operation that a replay cannot repeat."""


class Recording:
    """Runs a function once, records its operations, and replays them.

    A replay runs no Python of the function. So the function must read its inputs from tensors whose
    addresses never change. The recording keeps their memory.
    A replay also skips the checks of operands, but the C library checks ids each time.
    Tensors that the function allocates lie in the recording's memory. When a tensor is freed, a
    later one can take its block.

    Args:
        function: computes a tensor from tensors on the CPU.
        memory: memory that several recordings share, if they take turns: replaying one overwrites
            the results of the others. None gives the recording memory of its own.

    Attributes:
        result: the tensor that the function returned. Each replay writes the new result into it.

    Raises:
        CannotRecord: the function reads a tensor's values or its address, or draws from PyTorch's
            generators.
    """

    def __init__(self, function: Callable[[], Tensor], memory: RecordingMemory | None = None):
        self.calls: list[functools.partial[Any]] = []
        self._memory = memory or RecordingMemory()
        self._kept: dict[int, UntypedStorage] = {}  # what calls of the C library read, by address
        self._precision: str | None = None  # precision of the PyTorch products recorded last
        with _RefusingReads(), _Noticing(self), noting(self._note_call, self._keep):
            self.result = function()

    def replay(self) -> None:
        """Run the recorded operations on the inputs' current values, into the same tensors.

        Raises:
            IndexError: a task id or a timestep is out of range. The result is then incomplete.
        """
        before = _PRODUCTS.fp32_precision
        try:
            with torch.inference_mode():
                for call in self.calls:
                    call()
        finally:
            _multiply_in(before)

    @property
    def nbytes(self) -> int:
        """Bytes of the recording's memory."""
        return self._memory.nbytes

    def check(self, func: Any, args: Any) -> None:
        """Raise CannotRecord if a replay cannot repeat an operation of PyTorch."""
        refused = not _REFUSED.isdisjoint(func.tags)
        if func._opname.startswith("index"):  # only a bool index gives a result of varying size
            refused = any(tensor.dtype == torch.bool for tensor in _tensors(args[1:2]))
        if refused:
            raise CannotRecord(f"a recording cannot replay {func.name()}")

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Record an operation of PyTorch. Returns its result, copied to the recording's memory."""
        inputs = {_address(tensor) for tensor in _tensors((args, kwargs))}

        def moved(tensor: Tensor) -> Tensor:
            return tensor if _address(tensor) in inputs else self._memory.copy(tensor)

        result = tree_map_only(Tensor, moved, result)
        new = [None if _address(tensor) in inputs else tensor for tensor in _tensors(result)]
        # Only operations that write must run again: a replay reuses views and empty tensors.
        changes = func._schema.is_mutable or new.count(None) < len(new)
        if changes and "empty" not in func._opname:
            self._note_precision()
            self.calls.append(_replay_call(func, *self.operands(new, args, kwargs)))
        return result

    def operands(self, *arguments: Any) -> Any:
        """A call's arguments, in which no tensor keeps a block of the recording from reuse."""
        return tree_map_only(Tensor, self._memory.without_ownership, arguments)

    def _note_precision(self) -> None:
        """Record a change of PyTorch's switch for products. Our kernels get it as an operand."""
        if self._precision != _PRODUCTS.fp32_precision:
            self._precision = _PRODUCTS.fp32_precision
            self.calls.append(functools.partial(_multiply_in, self._precision))

    def _keep(self, operand: Tensor) -> None:
        """Keep the storage of an operand of the C library, because its calls hold addresses only.

        The recording's own blocks stay anyway. They are left out, so that they are used again.
        """
        if operand not in self._memory:
            self._kept[_address(operand)] = operand.untyped_storage()

    def _note_call(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self.calls.append(functools.partial(function, *arguments))


class _Noticing(TorchDispatchMode):
    """Reports PyTorch's operations to a recording. An operation of this package reports the PyTorch
    operations inside it."""

    def __init__(self, recording: Recording):
        super().__init__()
        self._recording = recording

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, because True would import PyTorch's compiler, which takes 150 MB."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # the function does not see what an operation reads
            return self._notice(func, args, kwargs or {})

    def _notice(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.namespace == "harmodt":
            with self:
                return kernel(func._opname)(*args, **kwargs)
        with self:  # a composite operation is recorded as the operations that it consists of
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        self._recording.check(func, args)
        return self._recording.note(func, args, kwargs, func(*args, **kwargs))


class _RefusingReads(TorchFunctionMode):
    """Refuses to read values in Python. PyTorch's dispatcher does not see most of these reads."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _reads(func, args, kwargs):
            raise CannotRecord(f"a recording cannot replay {func.__name__}")
        if func not in _BACKWARD:
            return func(*args, **kwargs)
        with self:  # a backward pass calls the Python of hooks and of autograd functions
            return _without_modes(func)(*args, **kwargs)


class RecordingMemory:
    """Memory for tensors. A tensor's block is free for reuse when the tensor is freed."""

    def __init__(self) -> None:
        self._blocks: dict[int, Tensor] = {}  # uint8, by address
        self._free: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(map(len, self._blocks.values()))

    def copy(self, tensor: Tensor) -> Tensor:
        """Copy a tensor into this memory. When the copy's storage is freed, so is its block."""
        block = self._block(max(tensor.untyped_storage().nbytes(), 1))
        lent = block.numpy()[:]  # only the copy's storage refers to this array
        weakref.finalize(lent, _give_back, weakref.ref(self), block).atexit = False
        return _view(tensor, torch.from_numpy(lent)).copy_(tensor)

    def give_back(self, block: Tensor) -> None:
        with torch._C.DisableTorchFunction():  # the recorded function may be what frees a tensor
            self._free[block.data_ptr()] = block

    def __contains__(self, tensor: Tensor) -> bool:
        return _address(tensor) in self._blocks

    def without_ownership(self, tensor: Tensor) -> Tensor:
        """A tensor on the same memory that does not keep the tensor's block from reuse.

        If the tensor is not in this memory, return the tensor itself.
        """
        block = self._blocks.get(_address(tensor))
        return tensor if block is None else _view(tensor, block)

    def _block(self, size: int) -> Tensor:
        fitting = [block for block in self._free.values() if size <= len(block) <= 2 * size]
        if fitting:
            return self._free.pop(min(fitting, key=len).data_ptr())
        block = torch.empty(size, dtype=torch.uint8)
        self._blocks[block.data_ptr()] = block
        return block


def _give_back(memory: weakref.ref[RecordingMemory], block: Tensor) -> None:
    """Give back a block if the memory still exists: a lent block does not keep the memory alive."""
    if (there := memory()) is not None:
        there.give_back(block)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _reads(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of a function of PyTorch gives Python a tensor's values or its address."""
    given = [*args, *kwargs.values()]
    if func in _CONSTRUCTORS:  # they read tensors that are in a list
        return any(_tensors(x) for x in given if not isinstance(x, Tensor))
    if func in _SPLITS:  # they read places from a second tensor
        return len(_tensors(given)) > 1
    return func in _READERS


def _without_modes(func: FunctionType) -> FunctionType:
    """A copy of a function of PyTorch that does not ask modes to replace it."""
    names = {name: _never for name in func.__globals__ if name.startswith("has_torch_function")}
    copy = FunctionType(func.__code__, func.__globals__ | names, None, func.__defaults__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _never(*_: Any) -> bool:
    return False


def _address(tensor: Tensor) -> int:
    """The address of a tensor's storage."""
    return tensor.untyped_storage().data_ptr()


def _view(like: Tensor, memory: Tensor) -> Tensor:
    """A tensor in `memory` with the dtype, shape and strides of `like`."""
    found = torch.empty(0, dtype=like.dtype)
    storage = memory.untyped_storage()
    return found.set_(storage, like.storage_offset(), like.shape, like.stride())


def _multiply_in(precision: str) -> None:
    _PRODUCTS.fp32_precision = precision


def _replay_call(
    func: Any, new: list[Tensor | None], args: Any, kwargs: Any
) -> functools.partial[Any]:
    """The call that replays an operation.

    Args:
        new: for each tensor that the operation returned: the tensor if the operation allocated it,
            None if it is one of the inputs. The replay writes its results into these tensors.
    """
    if func is torch.ops.aten.clone.default and new[0] is not None:  # clone's out form copies twice
        return functools.partial(torch.ops.aten.copy_.default, new[0], args[0])
    out_form = _out_form(func)
    if out_form is None:
        return functools.partial(_compute_and_copy, func, new, args, kwargs)
    options = {name: value for name, value in kwargs.items() if name not in _OPTIONS}
    return functools.partial(out_form, *args, **options, out=new[0])


@functools.cache
def _out_form(func: Any) -> Any:
    """The overload of an operation that writes its result to a tensor `out`, or None."""
    arguments = _arguments(func)
    for overload in func.overloadpacket.overloads():
        form = getattr(func.overloadpacket, overload)
        if _arguments(form) == [*arguments, ("out", "Tensor")]:
            return form
    return None


_OPTIONS = ("dtype", "layout", "device", "pin_memory")  # an `out` form takes them from `out`


def _arguments(func: Any) -> list[tuple[str, str]]:
    """Names and types of an operation's arguments, except the arguments in `_OPTIONS`."""
    arguments = func._schema.arguments
    return [(a.name, str(a.type)) for a in arguments if a.name not in _OPTIONS]


def _compute_and_copy(func: Any, outputs: list[Tensor | None], args: Any, kwargs: Any) -> None:
    for output, computed in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
        if output is not None:
            output.copy_(computed)
