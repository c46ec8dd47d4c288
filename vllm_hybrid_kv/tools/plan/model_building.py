# SPDX-License-Identifier: Apache-2.0
"""Build the layers of a model and its draft model without weights, as one of several ranks.

Large tensors are on PyTorch's meta device. Constructors read small tensors, such as slopes or
router limits, so tensors of up to `MOST_ELEMENTS` elements are on the CPU. An operator with both
kinds of tensors returns a meta tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from vllm.distributed import get_pp_group, get_tp_group, parallel_state

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MOST_ELEMENTS = 1 << 16
"""Elements of the largest tensor that is allocated. Larger tensors are weights."""

_META = torch.device("meta")
_CPU = torch.device("cpu")
_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}


@contextmanager
def without_weights() -> Iterator[None]:
    """Create tensors almost without memory, whatever device the code names."""
    with _MixedDevices(), _SmallTensors():
        yield


class _SmallTensors(TorchFunctionMode):
    """Chooses the device of a new tensor by its size."""

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
            args = tuple(arg for arg in map(_not_gpu, args) if arg is not None)
            kwargs = {name: _not_gpu(value) for name, value in kwargs.items()}
            kwargs = {name: value for name, value in kwargs.items() if value is not None}
            if len(args) == 1 and not kwargs:
                return args[0]
        elif func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        elif isinstance(kwargs.get("device"), str | torch.device):
            kwargs["device"] = _not_gpu(kwargs["device"]) or args[0].device
        return func(*args, **kwargs)


def _not_gpu(value: Any) -> Any:
    """Return None for a CUDA device, and any other value unchanged."""
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return None
    return None if isinstance(value, torch.device) and value.type == "cuda" else value


class _MixedDevices(TorchDispatchMode):
    """Allows operators to take meta and real tensors together."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
        if not any(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            # Every element of a missing weight reads as 1.
            return torch.ones((), dtype=args[0].dtype, device=_CPU).item()
        if func is torch.ops.aten._to_copy.default:
            return func(*args, **{**kwargs, "device": _META, "pin_memory": None})
        real = [tensor for tensor in tensors if not tensor.is_meta]
        if not real:
            return func(*args, **kwargs)
        if func._schema.is_mutable and args and any(args[0] is tensor for tensor in real):
            # The values to write are unknown, so do not write.
            return args[0]
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(_META), (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def as_one_rank_of(
    size: int, *, stages: int = 1, stage: int = 0, decode_context: int = 1
) -> Iterator[None]:
    """Build layers in this one process as one of `size` tensor parallel ranks of a pipeline stage.

    Building sends nothing between ranks, so patching the groups' sizes is enough. All ranks of
    a stage have the same KV cache. `decode_context` of these ranks share each context.
    """
    ranks, pipeline = get_tp_group(), get_pp_group()
    contexts = getattr(parallel_state, "_DCP", None)
    divided = contexts is not None and decode_context > 1
    with (
        patch.object(ranks, "world_size", size),
        # The expert-parallel group. vLLM creates it only if the first model has experts.
        patch.object(parallel_state, "_EP", ranks),
        patch.multiple(
            pipeline, world_size=stages, rank_in_group=stage, rank=stage, ranks=list(range(stages))
        ),
        patch.object(contexts, "world_size", decode_context) if divided else nullcontext(),
    ):
        yield


def build_draft(config: VllmConfig) -> None:
    """Build the draft model of a configuration, if it has one, as vLLM's proposer does.

    The draft's layers are added to those of the target model, which must be built before.
    """
    speculative = config.speculative_config
    if speculative is None or not (speculative.use_eagle() or speculative.uses_draft_model()):
        return
    from vllm.v1.spec_decode import draft_model, llm_base_proposer
    from vllm.v1.spec_decode.dflash import DFlashProposer
    from vllm.v1.spec_decode.eagle import EagleProposer

    if speculative.uses_draft_model():
        proposer_class = draft_model.DraftModelProposer
    else:
        proposer_class = DFlashProposer if speculative.use_dflash() else EagleProposer
    # The constructor allocates buffers on the device; building needs only the configuration.
    proposer: Any = object.__new__(proposer_class)
    proposer.vllm_config, proposer.speculative_config = config, speculative
    with (
        patch.object(draft_model, "get_model", _without_loading),
        patch.object(llm_base_proposer, "get_model", _without_loading),
    ):
        proposer._get_model()


def _without_loading(
    vllm_config: VllmConfig, model_config: Any = None, prefix: str = "", **_: Any
) -> Any:
    from vllm.model_executor.model_loader.utils import initialize_model

    return initialize_model(vllm_config, model_config=model_config, prefix=prefix)
