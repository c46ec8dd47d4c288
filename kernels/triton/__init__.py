# SPDX-License-Identifier: Apache-2.0
"""GPU kernels of k8v4 in Triton: quantise-and-store and paged attention. Torch in, torch out.

Importing this package is cheap; Triton is loaded on first use of a kernel. Pages have the layout
`LINEAR`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_hybrid_kv.kernels.triton.attention import paged_attention
    from vllm_hybrid_kv.kernels.triton.plan import (
        LaunchPlan,
        largest_scratch,
        plan_attention,
        planned_requests,
    )
    from vllm_hybrid_kv.kernels.triton.quantise import quantise_and_store
    from vllm_hybrid_kv.kernels.triton.tuning import MOST_ROWS

__all__ = [
    "MOST_ROWS",
    "LaunchPlan",
    "largest_scratch",
    "paged_attention",
    "plan_attention",
    "planned_requests",
    "quantise_and_store",
]

_MODULES = {
    "MOST_ROWS": "tuning",
    "LaunchPlan": "plan",
    "largest_scratch": "plan",
    "paged_attention": "attention",
    "plan_attention": "plan",
    "planned_requests": "plan",
    "quantise_and_store": "quantise",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
