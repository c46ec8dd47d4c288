# SPDX-License-Identifier: Apache-2.0
"""CPU kernels of k8v4: quantise-and-store and paged attention. Torch in, torch out.

Importing this package is cheap; the first use of a kernel loads numba. Its modules:

    isa.py            the instruction sets, and which of them this CPU can run
    attention.py      `paged_attention`: checks, workspace, choice of the instruction set
    plan.py           `plan_attention`: divides a batch into work items
    work_item.py      the steps of a work item except its products: pages, weights, merging
    attend_*.py       the kernel of each instruction set
    products.py       integer dot products with AVX-512 VNNI or plain vectors
    softmax.py        the online softmax of a row, and its weights as integers
    quantise.py       `quantise_and_store`: rows to codes, four tokens at a time
    encode.py         codes and scales, and where they go in a page; the codes of queries
    rotation.py       the rotation of a row, for storing and for attention
    row_ops.py        loads, stores and sums of rows in scratch memory
    llvm.py           emits LLVM code
    inline.py         makes LLVM code callable from numba code; loads and stores by address
    records.py        records that Python fills and kernels read; a thread's scratch memory
    threads.py        numba's thread pool
    compile_cache.py  compiled kernels on disk
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_hybrid_kv.kernels.cpu.attention import paged_attention
    from vllm_hybrid_kv.kernels.cpu.plan import Plan, plan_attention
    from vllm_hybrid_kv.kernels.cpu.quantise import quantise_and_store

__all__ = ["Plan", "paged_attention", "plan_attention", "quantise_and_store"]

_MODULES = {
    "Plan": "plan",
    "paged_attention": "attention",
    "plan_attention": "plan",
    "quantise_and_store": "quantise",
}

if "numba" not in sys.modules:
    # Numba sizes its thread pool at import by the affinity of the importing thread, so a pinned
    # thread would get a pool of one. NUMBA_NUM_THREADS stays set, because numba reads it again at
    # each compilation and raises an error if it has changed after the pool started.
    os.environ.setdefault("NUMBA_NUM_THREADS", str(os.cpu_count() or 1))
    os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
