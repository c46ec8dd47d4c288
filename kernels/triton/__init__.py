# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for k8v4: one quantises and stores tokens, the others compute paged attention.

Their arguments and results are torch tensors. Pages have the layout `LINEAR`.
"""

from vllm_hybrid_kv.kernels.triton.attention import paged_attention
from vllm_hybrid_kv.kernels.triton.launching import compile_in_threads
from vllm_hybrid_kv.kernels.triton.plan import (
    LaunchPlan,
    largest_scratch,
    plan_attention,
    warm_up_plans,
)
from vllm_hybrid_kv.kernels.triton.prefill import (
    Flash,
    Prefill,
    PrefillPlan,
    plan_prefill,
    prefill_attention,
    prefill_workspace,
)
from vllm_hybrid_kv.kernels.triton.quantise import quantise_and_store
from vllm_hybrid_kv.kernels.triton.tuning import MOST_ROWS

__all__ = [
    "MOST_ROWS",
    "Flash",
    "LaunchPlan",
    "Prefill",
    "PrefillPlan",
    "compile_in_threads",
    "largest_scratch",
    "paged_attention",
    "plan_attention",
    "plan_prefill",
    "prefill_attention",
    "prefill_workspace",
    "quantise_and_store",
    "warm_up_plans",
]
