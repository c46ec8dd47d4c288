# SPDX-License-Identifier: Apache-2.0
"""A torch implementation of the FlashAttention function that long prefills call.

FlashAttention needs a GPU. Tests on a CPU pass this function to the code that calls it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    return_softmax_lse: bool,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend as FlashAttention 2 does; see its docstring in vLLM for the arguments.

    Like FlashAttention, it aligns the last query with the last key, takes negative window sizes
    for no limit, rounds weights to the dtype of the values, multiplies the values of masked keys
    by zero, and returns log-sum-exps of +inf and zeros for queries that see nothing.
    """
    assert q.dtype == k.dtype == v.dtype == out.dtype == torch.float16
    assert return_softmax_lse
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.is_contiguous()
    assert cu_seqlens_k.is_contiguous()
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert starts_q[0] == starts_k[0] == 0
    assert (starts_q[-1], starts_k[-1], len(v)) == (len(q), len(k), len(k))
    assert max(b - a for a, b in itertools.pairwise(starts_q)) == max_seqlen_q
    assert max(b - a for a, b in itertools.pairwise(starts_k)) == max_seqlen_k
    lse = torch.empty(q.shape[1], len(q))
    group = q.shape[1] // k.shape[1]
    left, right = window_size
    for (q0, q1), (k0, k1) in zip(
        itertools.pairwise(starts_q), itertools.pairwise(starts_k), strict=True
    ):
        keys = k[k0:k1].float().repeat_interleave(group, 1)
        values = v[k0:k1].float().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1].float(), keys) * softmax_scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        # How far each key is to the right of each query.
        distance = torch.arange(k1 - k0)[None] - torch.arange(q1 - q0)[:, None]
        distance = distance - ((k1 - k0) - (q1 - q0))
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal or right >= 0:
            hidden |= distance > (0 if causal else right)
        if left >= 0:
            hidden |= distance < -left
        scores = scores.masked_fill(hidden, -math.inf)
        largest = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - largest.masked_fill(largest == -math.inf, 0.0))
        total = weights.sum(-1, keepdim=True)
        sums = torch.einsum("hqk,khd->hqd", weights.half().float(), values)
        out[q0:q1] = torch.where(total == 0, 0.0, sums / total).transpose(0, 1).half()
        empty = (total == 0) | total.isnan()
        lse[:, q0:q1] = torch.where(empty, math.inf, largest + total.log())[..., 0]
    return out, lse
