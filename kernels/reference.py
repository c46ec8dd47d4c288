# SPDX-License-Identifier: Apache-2.0
"""The float32 definition of k8v4: quantise, dequantise, store, load, attend. Plain torch, slow.

Every kernel stores the same bits as `quantise` and `store`. Attention equals `paged_attention` up
to the rounding of its own sums.

The values of one token and head are clamped to +-65504, rotated, and clamped again. lo and hi are
their extremes after that:

    zero  = lo rounded down to fp16
    scale = (hi - zero) / 15 rounded up to fp16
    code  = round_half_even((v - zero) * (1 / scale)), clamped to 0..15; 0 if scale is 0

Outward rounding makes [zero, zero + 15 scale] cover every rotated value, so that no error exceeds
half a step, however large the offset; rounding to nearest would cut off the ends.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat


class Quantised(NamedTuple):
    """Keys and values of T tokens and H KV heads after quantisation, before any layout."""

    key_codes: torch.Tensor  # uint8 [T, H, D], e4m3fn bit patterns
    value_codes: torch.Tensor  # uint8 [T, H, D], 0 to 15, of the rotated values
    scale: torch.Tensor  # float16 [T, H]
    zero: torch.Tensor  # float16 [T, H]


def half_rounded_down(x: torch.Tensor) -> torch.Tensor:
    """Round float32 within fp16's finite range to the largest fp16 that is not above it."""
    half = x.to(torch.float16)
    with np.errstate(over="ignore"):  # below -65504, which `where` never selects
        lower = torch.from_numpy(np.nextafter(half.numpy(), np.float16(-np.inf)))
    return torch.where(half.to(torch.float32) > x, lower, half)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate float32 [..., D] among the dims of a head; the rotation is its own inverse.

    For each stride s of `k8v4.rotation_strides(D)` in turn, and each four numbers s apart:

        x_k <- ((x_0 + x_1) + (x_2 + x_3)) - 2 x_k

    The result is divided by 2 for each stride. As a matrix it is symmetric and orthogonal with
    entries of one magnitude, so that it spreads one large number over all; its rows add up to 1.
    """
    strides = k8v4.rotation_strides(x.shape[-1])
    for stride in strides:
        four = x.unflatten(-1, (-1, 4, stride))
        a, b, c, d = four.unbind(-2)
        x = (((a + b) + (c + d)).unsqueeze(-2) - 2.0 * four).flatten(-3)
    return x * 2.0 ** -len(strides)


def quantise(key: torch.Tensor, value: torch.Tensor) -> Quantised:
    """Quantise keys to e4m3fn and values to 4 bits with a scale and a zero per token and head.

    A NaN in a token's key or value of one head gives that token and head a NaN scale, a zero
    of 0 and value codes of 0, so that every query that attends to the token shows it.

    Keys and values are [T, H, D] of any floating dtype and strides.
    """
    k, v = key.to(torch.float32), value.to(torch.float32)
    key_codes = k.clamp(-k8v4.KEY_MAX, k8v4.KEY_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    nan = k.isnan().any(-1) | v.isnan().any(-1)
    v = v.clamp(-k8v4.VALUE_MAX, k8v4.VALUE_MAX).masked_fill(nan[..., None], 0.0)
    # Clamped again, because rotated numbers near the limit may exceed it.
    v = rotate(v).clamp(-k8v4.VALUE_MAX, k8v4.VALUE_MAX)
    zero = half_rounded_down(v.amin(-1))
    span = v.amax(-1) - zero.to(torch.float32)
    scale = -half_rounded_down(-(span / (k8v4.VALUE_LEVELS - 1)))
    step = scale.to(torch.float32)
    inverse = torch.where(step > 0, 1.0 / step, torch.zeros_like(step))
    steps = (v - zero.to(torch.float32)[..., None]) * inverse[..., None]
    codes = steps.round().clamp(0, k8v4.VALUE_LEVELS - 1).to(torch.uint8)
    # The bits of a zero scale are always 0; -0.0 would only tell how it was rounded.
    scale_bits = scale.view(torch.int16).masked_fill(step == 0, 0)
    scale_bits = scale_bits.masked_fill(nan, k8v4.NAN_SCALE_BITS)
    zero_bits = zero.view(torch.int16).masked_fill(zero == 0, 0)
    return Quantised(
        key_codes, codes, scale_bits.view(torch.float16), zero_bits.view(torch.float16)
    )


def dequantise(quantised: Quantised) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values as float32 [T, H, D]; the codes 0x7F and 0xFF are NaN keys."""
    key = quantised.key_codes.view(torch.float8_e4m3fn).to(torch.float32)
    scale = quantised.scale.to(torch.float32)[..., None]
    zero = quantised.zero.to(torch.float32)[..., None]
    return key, rotate(quantised.value_codes.to(torch.float32) * scale + zero)


@functools.lru_cache(maxsize=64)
def _positions(page_format: PageFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the byte of each key, and the byte and the shift of each value, [N, D]."""
    tokens, dims = range(page_format.page_size), range(page_format.head_size)
    key = torch.tensor([[page_format.key_byte(t, d) for d in dims] for t in tokens])
    value = torch.tensor([[page_format.value_byte(t, d) for d in dims] for t in tokens])
    return key, value[..., 0], value[..., 1].to(torch.uint8)


def store(
    quantised: Quantised, cache: torch.Tensor, slot_mapping: torch.Tensor, layout: Layout
) -> None:
    """Write quantised tokens into pages; a token whose slot is negative is not written.

    Args:
        quantised: T tokens of H KV heads.
        cache: uint8 [num_blocks, H, N, slot_bytes(D)]; the last two dims contiguous.
        slot_mapping: int64 [T], block * N + token within the block.
        layout: The arrangement of the pages.
    """
    _, num_heads, head_size = quantised.key_codes.shape
    page_format = PageFormat(head_size, cache.shape[2], layout)
    key, value, shift = _positions(page_format)
    kept = slot_mapping >= 0
    slots = slot_mapping[kept].to(torch.int64)
    t = slots % page_format.page_size
    block = (slots // page_format.page_size)[:, None, None]
    head = torch.arange(num_heads)[None, :, None]
    regions = cache.view(cache.shape[0], num_heads, -1)
    regions[block, head, key[t][:, None]] = quantised.key_codes[kept]
    # The same dims of every token are in low nibbles, in the order of their partners.
    low = shift[0] == 0
    codes = quantised.value_codes[kept]
    pairs = codes[..., low] | codes[..., ~low] << 4
    regions[block, head, value[t][:, None, low]] = pairs
    for offset, numbers in (
        (page_format.scale_offset, quantised.scale),
        (page_format.zero_offset, quantised.zero),
    ):
        two_bytes = (offset + 2 * t)[:, None, None] + torch.arange(2)
        regions[block, head, two_bytes] = numbers[kept].unsqueeze(-1).view(torch.uint8)


def load(cache: torch.Tensor, head_size: int, layout: Layout) -> Quantised:
    """Return the `num_blocks * N` tokens of uint8 pages [num_blocks, H, N, slot_bytes(D)]."""
    page_size, regions = cache.shape[2], cache.flatten(2)
    page_format = PageFormat(head_size, page_size, layout)
    key, value, shift = _positions(page_format)
    planes = [regions[..., key], (regions[..., value] >> shift) & 15]
    for offset in (page_format.scale_offset, page_format.zero_offset):
        plane = regions[..., offset : offset + 2 * page_size].contiguous()
        planes.append(plane.view(torch.float16))
    return Quantised(*(plane.transpose(1, 2).flatten(0, 1) for plane in planes))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with the last Q of L tokens of one sequence to all L, in float32.

        s = scale * q k, capped as soft_cap * tanh(s / soft_cap)
        lse = log(sum exp(s) over visible keys + exp(sink)),  out = sum exp(s - lse) v

    Args:
        query: [Q, Hq, D]; query i has position L - Q + i.
        key: float32 [L, H, D] with Hq a multiple of H.
        value: float32 [L, H, D].
        scale: Factor of the scores.
        causal: A query sees no key after its own position.
        window: A query at p sees keys in (p - window, p + window) only.
        soft_cap: 0 for none.
        sinks: float [Hq], a logit per head that the sum includes and that has no value.

    Returns:
        out float32 [Q, Hq, D] and lse float32 [Q, Hq]; 0 and -inf if nothing is visible.
    """
    num_queries, num_heads, head_size = query.shape
    length, num_kv_heads, _ = key.shape
    group = num_heads // num_kv_heads
    q = query.to(torch.float32).view(num_queries, num_kv_heads, group, head_size)
    scores = torch.einsum("qhgd,khd->hgqk", q, key) * scale
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    position = torch.arange(length - num_queries, length)[:, None]
    keys = torch.arange(length)[None]
    visible = torch.ones(num_queries, length, dtype=torch.bool)
    if causal:
        visible &= keys <= position
    if window is not None:
        visible &= (keys > position - window) & (keys < position + window)
    scores = scores.masked_fill(~visible, -math.inf)
    logits = scores
    if sinks is not None:
        column = sinks.to(torch.float32).view(num_kv_heads, group, 1, 1)
        logits = torch.cat([scores, column.expand(-1, -1, num_queries, 1)], -1)
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    # A masked key must not reach the output even if its value is NaN.
    safe = torch.where(visible.any(0)[:, None, None], value, torch.zeros_like(value))
    out = torch.einsum("hgqk,khd->qhgd", weights, safe.nan_to_num(0.0, 0.0, 0.0))
    nan_key = safe.isnan().any(-1).to(torch.float32)  # [L, H]
    hit = torch.einsum("qk,kh->qh", visible.to(torch.float32), nan_key) > 0
    out = out.masked_fill(hit[..., None, None], math.nan)
    return (
        out.reshape(num_queries, num_heads, head_size),
        lse.permute(2, 0, 1).reshape(num_queries, num_heads),
    )


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    layout: Layout,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to paged k8v4 tokens for a batch of requests.

    Args:
        query: [T, Hq, D], the requests' new tokens one after another.
        cache: uint8 [num_blocks, H, N, slot_bytes(D)].
        block_table: int32 [B, max blocks].
        seq_lens: int32 [B], tokens of each request including its new ones.
        query_start_loc: int32 [B + 1], offsets of the requests in `query`.
        layout: The arrangement of the pages.
        options: The keyword arguments of `attend`.

    Returns:
        out float32 [T, Hq, D] and lse float32 [T, Hq].
    """
    out = torch.zeros(query.shape, dtype=torch.float32)
    lse = torch.full(query.shape[:2], -math.inf)
    page_size = cache.shape[2]
    for i, length in enumerate(seq_lens.tolist()):
        first, last = int(query_start_loc[i]), int(query_start_loc[i + 1])
        if last <= first:
            continue
        blocks = block_table[i, : -(-length // page_size)].to(torch.int64)
        key, value = dequantise(load(cache[blocks], query.shape[2], layout))
        # A NaN scale marks NaN keys too; their codes must not affect the scores of others.
        out[first:last], lse[first:last] = attend(
            query[first:last], key[:length].nan_to_num(0.0), value[:length], **options
        )
    return out, lse
