# SPDX-License-Identifier: Apache-2.0
"""Models built without weights: large tensors on PyTorch's meta device, small ones for real.

Constructors look at small tensors, such as slopes or router limits, which a meta tensor cannot
answer. So tensors of up to `MOST_ELEMENTS` are made on the CPU. Where both kinds meet, the result
is a meta tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

MOST_ELEMENTS = 1 << 16
"""Of a tensor that is really allocated. Larger ones are weights."""

_META = torch.device("meta")
_CPU = torch.device("cpu")


@contextmanager
def without_weights() -> Iterator[None]:
    """Make tensors that are created meanwhile take next to no memory, on whatever device."""
    with ExitStack() as stack:
        stack.enter_context(_MixedDevices())
        stack.enter_context(_SmallTensors())
        yield


class _SmallTensors(TorchFunctionMode):
    """Chooses the device of new tensors by their size."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _device_constructors():
            kwargs.pop("pin_memory", None)
            if func in _FROM_DATA:
                return func(*args, **{**kwargs, "device": _CPU})
            made = func(*args, **{**kwargs, "device": _META})
            if made.numel() > MOST_ELEMENTS:
                return made
            kwargs.pop("generator", None)
            return func(*args, **{**kwargs, "device": _CPU})
        if func is torch.Tensor.to:
            args = tuple(_off_gpu(arg) for arg in args)
            kwargs = {name: _off_gpu(value) for name, value in kwargs.items()}
            args, kwargs = _without_nothing(args, kwargs)
            if len(args) == 1 and not kwargs:
                return args[0]
        elif func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        elif isinstance(kwargs.get("device"), str | torch.device):
            kwargs["device"] = _off_gpu(kwargs["device"]) or args[0].device
        return func(*args, **kwargs)


_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}


def _off_gpu(value: Any) -> Any:
    """Return None for a GPU, anything else unchanged."""
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return None
    return None if isinstance(value, torch.device) and value.type == "cuda" else value


def _without_nothing(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    kept = tuple(arg for arg in args if arg is not None)
    return kept, {name: value for name, value in kwargs.items() if value is not None}


class _MixedDevices(TorchDispatchMode):
    """Lets operators take meta and real tensors together."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
        meta = any(tensor.is_meta for tensor in tensors)
        if not meta:
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return _scalar(args[0])
        if func is torch.ops.aten._to_copy.default:
            return func(*args, **{**kwargs, "device": _META, "pin_memory": None})
        real = [tensor for tensor in tensors if not tensor.is_meta]
        if not real:
            return func(*args, **kwargs)
        if func._schema.is_mutable and args and args[0] in _Identity(real):
            # What would be written is not known.
            return args[0]
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(_META), (args, kwargs))
        return func(*args, **kwargs)


class _Identity(list):
    def __contains__(self, item: object) -> bool:
        return any(item is other for other in self)


def _scalar(tensor: torch.Tensor) -> Any:
    """Return what a weight that is not there is taken to hold."""
    return torch.ones((), dtype=tensor.dtype, device=_CPU).item()
