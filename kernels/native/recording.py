"""A computation on a CPU, recorded as the calls that it makes, which are then all that is made.

Between them Python, PyTorch's dispatcher and autograd choose operations, check them and make
tensors: for a step that is the same each time, once is enough.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..registration import kernel
from .library import noting

_REFUSED = {
    torch.Tag.data_dependent_output,  # Python reads a value
    torch.Tag.dynamic_output_shape,  # sizes depend on values
    torch.Tag.nondeterministic_seeded,  # PyTorch's generators draw
}

_PRODUCTS = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


class CannotRecord(RuntimeError):
    """The computation does what cannot be repeated from a record."""


class Recording:
    """A function's computation: done once, as it is recorded, and then repeated.

    What Python reads and computes is not repeated, so the function must read its inputs from
    tensors that stay where they are. Nor is anything checked again that Python checked: task ids
    must stay those of tasks that there are. Tensors that it makes lie in memory of the recording,
    where each takes the place of one that was gone before.

    Args:
        function: computes a tensor from tensors on the CPU.
        memory: of other recordings too, if they take turns: repeating one loses what another has
            computed. None: its own.

    Attributes:
        result: what the function returned; where it is written again.

    Raises:
        CannotRecord: the function reads a tensor's value, or draws from PyTorch's generators.
    """

    def __init__(self, function: Callable[[], Tensor], memory: RecordingMemory | None = None):
        self.calls: list[functools.partial[Any]] = []
        self._memory = memory or RecordingMemory()
        self._precision: str | None = None  # of the products of PyTorch that were noted last
        with _Noticing(self), noting(self._note_call):
            self.result = function()

    def repeat(self) -> None:
        """Compute everything again, from what the inputs are now, into the same places.

        Raises:
            RuntimeError: a call of the library ended otherwise than when it was recorded.
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
        """The size of its memory."""
        return self._memory.nbytes

    def check(self, func: Any, args: Any) -> None:
        """Raise CannotRecord if an operation of PyTorch cannot be repeated."""
        refused = not _REFUSED.isdisjoint(func.tags)
        if func._opname.startswith("index"):  # by numbers, sizes are always the same
            refused = any(tensor.dtype == torch.bool for tensor in _tensors(args[1:2]))
        if refused:
            raise CannotRecord(f"{func.name()} cannot be repeated")

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Note an operation of PyTorch and its result; returns that as it lies in our memory."""
        given = {_place(tensor) for tensor in _tensors((args, kwargs))}

        def moved(tensor: Tensor) -> Tensor:
            return tensor if _place(tensor) in given else self._memory.copy(tensor)

        result = tree_map_only(Tensor, moved, result)
        made = [None if _place(tensor) in given else tensor for tensor in _tensors(result)]
        changes = func._schema.is_mutable or made.count(None) < len(made)
        if changes and "empty" not in func._opname:
            self._note_precision()
            self.calls.append(_repetition(func, *self.operands(made, args, kwargs)))
        return result

    def operands(self, *given: Any) -> Any:
        """What a call is given, tensors of ours as they may be kept: without their memory."""
        return tree_map_only(Tensor, self._memory.kept, given)

    def _note_precision(self) -> None:
        """Note PyTorch's switch for products where it changes; our kernels are told by operands."""
        if self._precision != _PRODUCTS.fp32_precision:
            self._precision = _PRODUCTS.fp32_precision
            self.calls.append(functools.partial(_multiply_in, self._precision))

    def _note_call(self, function: Any, arguments: tuple[Any, ...], returned: Any) -> None:
        call = functools.partial(function, *arguments)
        if returned is not None:
            call = functools.partial(_returning, returned, function, *arguments)
        self.calls.append(call)


class _Noticing(TorchDispatchMode):
    """Tells a recording what PyTorch computes; of an operation of ours, what it is made of."""

    def __init__(self, recording: Recording):
        super().__init__()
        self._recording = recording

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: that would import the whole compiler, which takes 150 MB."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "harmodt":
            with self:
                return kernel(func._opname)(*args, **kwargs)
        with self:  # what is made of other operations is noted as those
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        self._recording.check(func, args)
        return self._recording.note(func, args, kwargs, func(*args, **kwargs))


class RecordingMemory:
    """Memory for tensors, which is free again once they are gone."""

    def __init__(self) -> None:
        self._blocks: dict[int, Tensor] = {}  # uint8, by address
        self._free: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(map(len, self._blocks.values()))

    def copy(self, tensor: Tensor) -> Tensor:
        """A tensor's copy here. Its block is free again when its storage is gone."""
        block = self._block(max(tensor.untyped_storage().nbytes(), 1))
        lent = block.numpy()[:]
        weakref.finalize(lent, _give_back, weakref.ref(self), block).atexit = False
        return _view(tensor, torch.from_numpy(lent)).copy_(tensor)

    def give_back(self, block: Tensor) -> None:
        self._free[block.data_ptr()] = block

    def kept(self, tensor: Tensor) -> Tensor:
        """The tensor, or if it lies here, one in its place that does not keep the block."""
        block = self._blocks.get(_place(tensor))
        return tensor if block is None else _view(tensor, block)

    def _block(self, size: int) -> Tensor:
        fitting = [block for block in self._free.values() if size <= len(block) <= 2 * size]
        if fitting:
            return self._free.pop(min(fitting, key=len).data_ptr())
        block = torch.empty(size, dtype=torch.uint8)
        self._blocks[block.data_ptr()] = block
        return block


def _give_back(memory: weakref.ref[RecordingMemory], block: Tensor) -> None:
    """Give back a block, unless its memory is gone: what is lent does not keep the rest."""
    if (there := memory()) is not None:
        there.give_back(block)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _view(like: Tensor, memory: Tensor) -> Tensor:
    """A tensor of the type, shape and strides of another, in some memory."""
    found = torch.empty(0, dtype=like.dtype)
    storage = memory.untyped_storage()
    return found.set_(storage, like.storage_offset(), like.shape, like.stride())


def _multiply_in(precision: str) -> None:
    _PRODUCTS.fp32_precision = precision


def _repetition(
    func: Any, made: list[Tensor | None], args: Any, kwargs: Any
) -> functools.partial[Any]:
    """A call that computes an operation again.

    Args:
        made: of the tensors that it returned, those that it made, in which the new values go.
    """
    if func is torch.ops.aten.clone.default and made[0] is not None:  # its other form copies twice
        return functools.partial(torch.ops.aten.copy_.default, made[0], args[0])
    form = _writing_form(func)
    if form is None:
        return functools.partial(_again, func, made, args, kwargs)
    options = {name: value for name, value in kwargs.items() if name not in _OPTIONS}
    return functools.partial(form, *args, **options, out=made[0])


@functools.cache
def _writing_form(func: Any) -> Any:
    """The form of an operation that writes its result to a tensor `out`, if there is one."""
    arguments = _arguments(func)
    for overload in func.overloadpacket.overloads():
        form = getattr(func.overloadpacket, overload)
        if _arguments(form) == [*arguments, ("out", "Tensor")]:
            return form
    return None


_OPTIONS = ("dtype", "layout", "device", "pin_memory")  # which `out` has


def _arguments(func: Any) -> list[tuple[str, str]]:
    """Names and types of an operation's arguments."""
    arguments = func._schema.arguments
    return [(a.name, str(a.type)) for a in arguments if a.name not in _OPTIONS]


def _again(func: Any, made: list[Tensor | None], args: Any, kwargs: Any) -> None:
    for old, new in zip(made, _tensors(func(*args, **kwargs)), strict=True):
        if old is not None:
            old.copy_(new)


def _returning(expected: Any, function: Any, *arguments: Any) -> None:
    """Call a function that returns what it returned before."""
    returned = function(*arguments)
    if returned != expected:
        raise RuntimeError(f"{function.__name__} returned {returned}, and {expected} before")
