# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for k8v4: one quantises and stores tokens, the others compute paged attention.

Their arguments and results are torch tensors. Pages have the layout `LINEAR`.
"""

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
