# SPDX-License-Identifier: Apache-2.0
"""Run the long-prefill path with a torch implementation of FlashAttention."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from testing.kernels import paged_batch
from testing.kernels.paged_batch import Outputs
from testing.triton.attention import TOLERANCE, UNWRITTEN, Batch
from testing.triton.flash_attention import flash_attn_varlen_func
from vllm_hybrid_kv.kernels import reference
from vllm_hybrid_kv.kernels.k8v4 import Layout
from vllm_hybrid_kv.kernels.triton.prefill import (
    Flash,
    Prefill,
    plan_prefill,
    prefill_attention,
    prefill_workspace,
)

_ROUNDING = 2.0**-11
"""Largest relative error of rounding a number to fp16."""


def prefills(batch: Batch) -> list[Prefill]:
    """Return all requests of a batch that have new tokens."""
    spans = itertools.pairwise(batch.query_start_loc.tolist())
    return [
        Prefill(request, first, end - first, length)
        for request, ((first, end), length) in enumerate(
            zip(spans, batch.seq_lens.tolist(), strict=True)
        )
        if end > first
    ]


def workspace(batch: Batch, rows: int, piece: int) -> list[torch.Tensor]:
    """Allocate a workspace full of the largest numbers that fit, or of NaN."""
    _, num_heads, head_size = batch.query.shape
    shapes = prefill_workspace(num_heads, batch.cache.shape[1], head_size, rows=rows, piece=piece)
    return [
        torch.full(shape, math.nan if dtype.is_floating_point else 5, dtype=dtype)
        for shape, dtype in shapes
    ]


def attend(
    batch: Batch,
    *,
    rows: int = 64,
    piece: int = 64,
    only: list[Prefill] | None = None,
    flash: Flash = flash_attn_varlen_func,
) -> Outputs:
    """Attend from the prefills `only`, or from all requests, into tensors full of `UNWRITTEN`."""
    tokens, num_heads, head_size = batch.query.shape
    options: dict[str, Any] = dict(batch.options)
    out = torch.full_like(batch.query, UNWRITTEN)
    lse = torch.full((tokens, num_heads), UNWRITTEN)
    plan = plan_prefill(
        prefills(batch) if only is None else only,
        num_heads, head_size, batch.query.device,
        window=options.get("window"), rows=rows, piece=piece,
    )  # fmt: skip
    prefill_attention(
        *batch.inputs, out,
        plan=plan, flash=flash, workspace=workspace(batch, rows, piece), lse=lse, **options,
    )  # fmt: skip
    return out, lse


def visible_flash(**arguments: Any) -> Outputs:
    """Attend with torch, and return tensors that `PTXDevice` takes for written.

    It takes those of `torch.empty` for written only by kernels.
    """
    out, lse = flash_attn_varlen_func(**arguments)
    return out, lse.clone()


def score_rounding(batch: Batch) -> float:
    """Return how far the rounding of queries and keys to fp16 can move a score.

    A product of a query's and a key's number moves by at most twice `_ROUNDING`, so a score by
    that share of the sum of the products' magnitudes. Soft caps make scores move less.
    """
    group = batch.query.shape[1] // batch.cache.shape[1]
    query = reference.rotate(reference.round_query(batch.query)).abs()
    most = 0.0
    for one in prefills(batch):
        blocks = batch.block_table[one.request, : -(-one.length // batch.cache.shape[2])].long()
        stored = reference.load(batch.cache[blocks], batch.query.shape[2], Layout.LINEAR)
        keys = stored.key_codes.abs().float() * stored.key_scale.float()[..., None]
        keys = keys[: one.length].nan_to_num(0.0, 0.0).repeat_interleave(group, 1)
        rows = query[one.first_token : one.first_token + one.num_tokens]
        most = max(most, float(torch.einsum("qhd,khd->hqk", rows, keys).max()))
    return 2.0 * _ROUNDING * most * batch.options["scale"]


def assert_close(batch: Batch, got: Outputs, wanted: Outputs) -> str:
    """Assert that outputs differ no more than rounding queries, keys and values to fp16 explains.

    Log-sum-exps move at most as far as the scores. Each weight's change moves the output by the
    change times the distance of the weight's value from the output. The changes are independent, so
    in these batches outputs move by less than an eighth of the largest change of a score. Rounding
    values and the outputs of pieces adds twice the error of rounding to fp16.
    """
    change = score_rounding(batch)
    tolerance = {dtype: own + change / 8 + 2 * _ROUNDING for dtype, own in TOLERANCE.items()}
    return paged_batch.assert_close(got, wanted, tolerance, change + 1e-5, 1e-5)
