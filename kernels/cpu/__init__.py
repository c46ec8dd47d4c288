# SPDX-License-Identifier: Apache-2.0
"""CPU kernels of k8v4: quantise-and-store and paged attention. Torch in, torch out.

Importing this package is cheap; numba is loaded with the first kernel that is asked for.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_hybrid_kv.kernels.cpu.attention import paged_attention
    from vllm_hybrid_kv.kernels.cpu.plan import Plan, plan_attention
    from vllm_hybrid_kv.kernels.cpu.quantise import quantise_and_store
    from vllm_hybrid_kv.kernels.cpu.warming import warm_up

__all__ = [
    "Plan",
    "paged_attention",
    "plan_attention",
    "quantise_and_store",
    "warm_up",
]

_HOMES = {
    "Plan": "plan",
    "paged_attention": "attention",
    "plan_attention": "plan",
    "quantise_and_store": "quantise",
    "warm_up": "warming",
}

if "numba" not in sys.modules:
    # Numba sizes its thread pool at import by the affinity of the importing thread: one thread
    # where an engine has pinned it. Left in the environment, because numba reads it again at
    # each compilation and a changed size is an error once the pool has started.
    os.environ.setdefault("NUMBA_NUM_THREADS", str(os.cpu_count() or 1))
    os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")


def __getattr__(name: str) -> Any:
    """Load the module of a kernel on first use."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
