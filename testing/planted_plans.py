# SPDX-License-Identifier: Apache-2.0
"""Plans of the KV cache that do not fit the layers, planted to prove that start-up stops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

DTYPE = "shared layer with another dtype"
HEAD_SIZE = "group read with another head size"

_originals: list[tuple[Any, str, Any]] = []


def plant(fault: str | None) -> None:
    """Spoil the plans of the engines that start in this process.

    Args:
        fault: `DTYPE`: layers that share pages choose their own dtype, as in vLLM. `HEAD_SIZE`: the
            first group of k8v4 pages is for heads of twice the size. None: plans are right again.
    """
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)
    if fault == DTYPE:
        from vllm_hybrid_kv.patches import layers

        _replace(layers, "_follow_target", lambda original: lambda arguments: None)
    elif fault == HEAD_SIZE:
        from vllm.v1.executor.abstract import Executor

        _replace(Executor, "initialize_from_config", _with_wider_heads)
    elif fault is not None:
        raise ValueError(f"no fault {fault!r}")


def _with_wider_heads(original: Any) -> Any:
    def initialize_from_config(self: Any, plans: list[Any]) -> Any:
        group = next(
            group
            for group in plans[0].kv_cache_groups
            if group.kv_cache_spec.kv_quant_mode.is_turboquant
        )
        spec = group.kv_cache_spec
        group.kv_cache_spec = replace(spec, head_size=2 * spec.head_size)
        return original(self, plans)

    return initialize_from_config


def _replace(owner: Any, name: str, make: Any) -> None:
    original = getattr(owner, name)
    _originals.append((owner, name, original))
    setattr(owner, name, make(original))
