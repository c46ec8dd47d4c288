# SPDX-License-Identifier: Apache-2.0
"""Stand in for captured CUDA graphs in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton.runtime.interpreter
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_hybrid_kv.attention import kernel_factory


class Recorder(TorchDispatchMode):
    """Replays tensor operations and kernel launches on the same tensors, as a captured graph does.

    Like a graph, it does not repeat the Python code between the operations.

    Args:
        launch: Whether to launch the kernels while recording. If not, their results are undefined.
    """

    def __init__(self, launch: bool = True) -> None:
        super().__init__()
        self._launches_kernels = launch
        self.launches: list[tuple[Any, Any, Any]] = []
        self._operations: list[Callable[[], None]] = []
        self._executor = triton.runtime.interpreter.GridExecutor
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._inside and isinstance(result, torch.Tensor):
            made = not any(
                alias.alias_info is not None for alias in func._schema.returns
            )  # a new tensor, neither a view nor an argument

            def again() -> None:
                repeated = func(*args, **kwargs)
                if made:
                    result.copy_(repeated)

            self._operations.append(again)
        return result

    def __enter__(self) -> Recorder:
        self._launch, self._capturing = self._executor.__call__, kernel_factory.is_capturing

        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.launches.append((executor, args, kwargs))
            self._operations.append(lambda: self._launch(executor, *args, **kwargs))
            if self._launches_kernels:
                self._inside = True
                self._launch(executor, *args, **kwargs)
                self._inside = False

        self._executor.__call__ = launch
        kernel_factory.is_capturing = lambda device: True
        return super().__enter__()

    def __exit__(self, *failed: Any) -> None:
        super().__exit__(*failed)
        self._executor.__call__, kernel_factory.is_capturing = self._launch, self._capturing

    def replay(self) -> None:
        for operation in self._operations:
            operation()


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
