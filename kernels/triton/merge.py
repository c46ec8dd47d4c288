# SPDX-License-Identifier: Apache-2.0
"""The kernel that puts the splits of a row's keys together."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_hybrid_kv.kernels.triton.plan import ITEM_FIELDS

_FIELDS = tl.constexpr(ITEM_FIELDS)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["lse_token", "lse_head"])
def merge_kernel(  # type: ignore[no-untyped-def]
    out, out_token, out_head,
    lse, lse_token, lse_head,
    query_start_loc, items, sinks, partial_out, partial_lse,
    GROUP: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, PARTIAL_ROWS: tl.constexpr,
    PARTS: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Put the splits of one row together, and the sink.

    The grid is [programs of the plan, KV heads, rows of a row tile at most]; one works for each
    row of a row tile of several splits, the others have nothing to do.

        lse = log2(sum 2^lse_i + 2^sink),  out = sum out_i 2^(lse_i - lse)

    Args:
        PARTS: Splits that are read at a time.
    """
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    m = tl.program_id(2)
    request = tl.load(items + program * _FIELDS)
    if request < 0:
        return
    row = tl.load(items + program * _FIELDS + 1) + m
    split = tl.load(items + program * _FIELDS + 2)
    splits = tl.load(items + program * _FIELDS + 3)
    first_token = tl.load(query_start_loc + request)
    queries = tl.load(query_start_loc + request + 1) - first_token
    if (split > 0) | (splits == 1) | (row >= queries * GROUP):
        return
    first_part = tl.load(items + program * _FIELDS + 4)
    token = (first_token + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    top = -float("inf")
    total = 0.0
    if SINKS:
        top = tl.load(sinks + head) * _LOG2_E
        total = tl.where(top == -float("inf"), 0.0, 1.0)
    dim = tl.arange(0, DIMS)
    result = tl.zeros([DIMS], tl.float32)
    for start in range(0, splits, PARTS):
        i = start + tl.arange(0, PARTS)
        part = ((first_part + i).to(tl.int64) * kv_heads + kv_head) * PARTIAL_ROWS + m
        part_lse = tl.load(partial_lse + part, mask=i < splits, other=-float("inf"))
        values = tl.load(
            partial_out + (part * D)[:, None] + dim[None, :],
            mask=(i < splits)[:, None] & (dim < D)[None, :], other=0.0,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(part_lse, axis=0))
        # A split in which the row sees nothing has -inf and zeros.
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        weight = tl.exp2(part_lse - base)
        total = total * shrink + tl.sum(weight, axis=0)
        result = result * shrink + tl.sum(values * weight[:, None], axis=0)
        top = new_top
    result = result * tl.where(total == 0.0, 0.0, 1.0 / total)
    out_at = out + token * out_token + head * out_head + dim
    tl.store(out_at, result.to(out.dtype.element_ty), mask=dim < D)
    if LSE:
        tl.store(lse + token * lse_token + head * lse_head, (top + tl.log2(total)) * _LN_2)
