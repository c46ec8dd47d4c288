# SPDX-License-Identifier: Apache-2.0
"""Stand in for captured CUDA graphs in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton.runtime.interpreter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_hybrid_kv.attention import kernel_factory


class CaptureError(AssertionError):
    """A captured operation is one that CUDA rejects, or uses memory of another graph."""


HOST_READS = ("tolist", "cpu", "numpy")
"""Tensor methods that read on the host without an operator. During a capture, CUDA rejects them."""

HOST_READ_OPERATORS = ("item", "local_scalar_dense", "is_nonzero", "nonzero", "equal", "unique2")

HOST_WRITES = ("tensor", "as_tensor", "from_numpy")
"""Functions of torch that copy from the host."""


class _HostAccess(TorchFunctionMode):
    """Rejects the functions `HOST_READS` and `HOST_WRITES`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in HOST_READS:
            raise CaptureError(f"Tensor.{name} reads on the host during a capture")
        if name in HOST_WRITES and func is getattr(torch, name):
            raise CaptureError(f"torch.{name} copies from the host during a capture")
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Launch:
    """A kernel launch.

    Attributes:
        kernel: The kernel's name.
        grid: Programs in each dimension.
        arguments: The value of each argument; of a tensor dtype, shape, strides and address. The
            address is None if the recording allocated the tensor.
        constants: Values of `tl.constexpr` arguments and launch options.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]

    def difference(self, other: Launch) -> str | None:
        """Say how another launch differs, or return None."""
        if self.kernel != other.kernel:
            return f"{self.kernel} instead of {other.kernel}"
        for name in ("grid", "constants"):
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others:
                return f"{self.kernel} has {name} {mine} instead of {others}"
        for index, (mine, others) in enumerate(zip(self.arguments, other.arguments, strict=True)):
            if mine != others:
                return f"{self.kernel} has argument {index} {mine} instead of {others}"
        return None


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass
class _Operation:
    function: Any
    args: Any
    kwargs: Any
    made: list[torch.Tensor] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Records tensor operations and kernel launches, and replays them on the same tensors.

    Like a CUDA graph, a replay does not repeat the Python code between the operations. While a
    recorder captures, host reads raise an error, and so do tensors that another capture allocated.

    Args:
        launch: Whether to launch the kernels while recording. If not, their results are undefined.
        capture: Whether to record as a captured graph. Otherwise the recorder only observes.
    """

    _of_captures: dict[int, Recorder] = {}  # noqa: RUF012 - shared by all recorders
    """The recorder of each storage that a capture allocated, by address. Recorders keep their
    tensors, so that no address is used twice."""

    def __init__(self, launch: bool = True, *, capture: bool = True) -> None:
        super().__init__()
        self._launches_kernels = launch
        self._captures = capture
        self.launches: list[tuple[Any, Any, Any]] = []
        self._operations: list[_Operation] = []
        self._executor = triton.runtime.interpreter.GridExecutor
        self._host_access = _HostAccess()
        self._inside = False
        self._made: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        if func.namespace == "vllm":
            raise NotImplementedError(f"{func} hides the operations of vLLM's Python code")
        if self._captures and func.overloadpacket.__name__.strip("_") in HOST_READ_OPERATORS:
            raise CaptureError(f"{func} reads on the host during a capture")
        self._refuse_tensors_of_other_captures(func, (args, kwargs))
        result = func(*args, **kwargs)
        old = {_address(tensor) for tensor in _tensors((args, kwargs))}
        made = [tensor for tensor in _tensors(result) if _address(tensor) not in old]
        if made and len(made) < len(_tensors(result)):
            raise NotImplementedError(f"{func} returns new tensors and arguments")
        for tensor in made:
            self._made[_address(tensor)] = tensor
            if self._captures:
                Recorder._of_captures[_address(tensor)] = self
        self._operations.append(_Operation(func, args, kwargs, made))
        return result

    def _refuse_tensors_of_other_captures(self, what: Any, arguments: Any) -> None:
        for tensor in _tensors(arguments) if self._captures else ():
            if Recorder._of_captures.get(_address(tensor), self) is not self:
                raise CaptureError(f"{what} uses a tensor that another capture allocated")

    def __enter__(self) -> Recorder:
        self._launch, self._capturing = self._executor.__call__, kernel_factory.is_capturing

        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            self._refuse_tensors_of_other_captures(executor.fn.__name__, (args, kwargs))
            self.launches.append((executor, args, kwargs))
            self._operations.append(_Operation(self._launch, (executor, *args), kwargs))
            if self._launches_kernels:
                self._inside = True
                self._launch(executor, *args, **kwargs)
                self._inside = False

        self._executor.__call__ = launch
        if self._captures:
            kernel_factory.is_capturing = lambda device: True
            self._host_access.__enter__()
        return super().__enter__()

    def __exit__(self, *failed: Any) -> None:
        super().__exit__(*failed)
        if self._captures:
            self._host_access.__exit__(*failed)
        self._executor.__call__, kernel_factory.is_capturing = self._launch, self._capturing

    def replay(self) -> None:
        """Repeat all operations.

        All memory that the recording allocated is overwritten first, because other graphs of the
        same pool may use it between two replays.
        """
        for tensor in self._made.values():
            tensor.untyped_storage().fill_(0xFF)
        for operation in self._operations:
            result = operation.function(*operation.args, **operation.kwargs)
            for made, repeated in zip(operation.made, _tensors(result), strict=False):
                made.copy_(repeated)

    def launched(self) -> list[Launch]:
        """Return all launches in a form that can be compared with those of another recording."""
        return [self._launched(*launch) for launch in self.launches]

    def _launched(self, executor: Any, args: Any, kwargs: Any) -> Launch:
        names = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        grid = executor.grid(names) if callable(executor.grid) else executor.grid
        return Launch(
            executor.fn.__name__,
            tuple(grid),
            tuple(map(self._described, args)),
            tuple(sorted((name, self._described(value)) for name, value in kwargs.items())),
        )

    def _described(self, argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor):
            return argument
        own = _address(argument) in self._made
        address = None if own else argument.data_ptr()
        return str(argument.dtype), tuple(argument.shape), argument.stride(), address


def differences(captured: Recorder, other: Recorder) -> list[str]:
    """Say how the launches of a capture differ from those of a run of the same code."""
    mine, others = captured.launched(), other.launched()
    if len(mine) != len(others):
        return [f"{len(mine)} launches instead of {len(others)}"]
    pairs = zip(mine, others, strict=True)
    return [found for one, two in pairs if (found := one.difference(two)) is not None]


def kernels_of(launches: list[Any]) -> set[Any]:
    """Return what a GPU would compile for launches: kernel names, constants, argument types."""
    return {
        (
            executor.fn.__name__,
            tuple(sorted(kwargs.items())),
            tuple(getattr(value, "dtype", type(value)) for value in args),
        )
        for executor, args, kwargs in launches
    }
