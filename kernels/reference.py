# SPDX-License-Identifier: Apache-2.0
"""The float32 definition of k8v4: quantise, dequantise, store, load, attend. Plain torch, slow.

Every store kernel writes the same bits as `quantise` and `store`. An attention kernel may differ
from `paged_attention` only by the rounding of its sums.

The key and the value of one token and head are rotated. Let raw be `rotation_sums` of either, and
u = `k8v4.rotation_unit(D)`. Each operation rounds to float32:

    key_scale   = max |raw| * u / 127, rounded up to fp16
    key code    = round_half_even(raw * (1 / key_scale * u)), clamped to -127..127
    value_scale = max |raw| * u / 8, rounded up to fp16
    value code  = round_half_even(raw * (1 / value_scale * u) + 7.5), clamped to 0..15

The inverse of a scale of 0 counts as 0. Because scales are rounded up, every rotated number is in
the range of the codes, and its error is at most half a step.

Attention multiplies integers. A query row is rotated and rounded to codes with q_scale =
max |raw| * u / 127 in float32. A score is the exact integer product of the query's and the key's
codes, times key_scale and q_scale. `round_query` returns the query that its codes stand for.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat

_LEAST_QUERY = 2.0**-119
"""A rotated query row counts as zeros if none of its magnitudes exceeds this, because the inverse
of the largest one would overflow."""


class Quantised(NamedTuple):
    """Keys and values of T tokens and H KV heads after quantisation, before any layout."""

    key_codes: torch.Tensor  # int8 [T, H, D], of the rotated keys
    value_codes: torch.Tensor  # uint8 [T, H, D], 0 to 15, of the rotated values
    key_scale: torch.Tensor  # float16 [T, H]
    value_scale: torch.Tensor  # float16 [T, H]


def half_rounded_up(x: torch.Tensor) -> torch.Tensor:
    """Round float32 from 0 to 65504 to the smallest fp16 that is not below it."""
    half = x.to(torch.float16)
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.to(torch.float32) < x, above, half)


def rotation_sums(x: torch.Tensor) -> torch.Tensor:
    """Rotate float32 [..., D] without the final product with `k8v4.rotation_unit(D)`.

    Each stage of `k8v4.rotation_stages(D)` combines the numbers that are a stride apart:

        radix 4: x_k <- ((x_0 + x_1) + (x_2 + x_3)) - 2 x_k
        radix 2: x_0, x_1 <- x_0 + x_1, x_0 - x_1
    """
    for radix, stride in k8v4.rotation_stages(x.shape[-1]):
        run = x.unflatten(-1, (-1, radix, stride))
        if radix == 4:
            a, b, c, d = run.unbind(-2)
            run = ((a + b) + (c + d)).unsqueeze(-2) - 2.0 * run
        else:
            a, b = run.unbind(-2)
            run = torch.stack((a + b, a - b), -2)
        x = run.flatten(-3)
    return x


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate the last dim of float32 [..., D]. To rotate back, rotate again.

    The rotation's matrix is symmetric and orthogonal. Inside a block, all its entries have the same
    magnitude, so it spreads one large number evenly over the block.
    """
    return rotation_sums(x) * k8v4.rotation_unit(x.shape[-1])


def _scaled(
    x: torch.Tensor, limit: float, steps: float, nan: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate rows. Returns the rotated numbers divided by their scales, and the fp16 scales."""
    unit = torch.tensor(k8v4.rotation_unit(x.shape[-1]))
    x = x.clamp(-limit, limit).masked_fill(nan[..., None], 0.0)
    # Clamp again, because the rotation can push numbers near the limit past it.
    raw = rotation_sums(x).clamp(-limit / unit, limit / unit)
    largest = raw.abs().amax(-1) * unit
    scale = half_rounded_up((largest / steps).clamp(max=k8v4.SCALE_MAX))
    inverse = torch.where(scale > 0, 1.0 / scale.to(torch.float32), 0.0)
    scale_bits = scale.view(torch.int16).masked_fill(nan, k8v4.NAN_SCALE_BITS)
    return raw * (inverse * unit)[..., None], scale_bits.view(torch.float16)


def quantise(key: torch.Tensor, value: torch.Tensor) -> Quantised:
    """Quantise keys to 8 bits and values to 4 bits, each with a scale per token and head.

    If a token's key or value has a NaN in one head, both get NaN scales and the codes of zeros, so
    every query that attends to the token outputs NaN.

    Keys and values are [T, H, D] of any floating dtype and strides.
    """
    k, v = key.to(torch.float32), value.to(torch.float32)
    nan = k.isnan().any(-1) | v.isnan().any(-1)
    k, key_scale = _scaled(k, k8v4.KEY_MAX, k8v4.KEY_STEPS, nan)
    v, value_scale = _scaled(v, k8v4.VALUE_MAX, k8v4.VALUE_STEPS, nan)
    key_codes = k.round().clamp(-k8v4.KEY_STEPS, k8v4.KEY_STEPS).to(torch.int8)
    value_codes = (v + k8v4.MIDDLE_VALUE_CODE).round().clamp(0, k8v4.VALUE_LEVELS - 1)
    return Quantised(key_codes, value_codes.to(torch.uint8), key_scale, value_scale)


def dequantise(quantised: Quantised) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values as float32 [T, H, D]. Where a scale is NaN, all dims are NaN."""
    key_scale, value_scale = (
        scale.to(torch.float32)[..., None] for scale in (quantised.key_scale, quantised.value_scale)
    )
    value = quantised.value_codes.to(torch.float32) - k8v4.MIDDLE_VALUE_CODE
    return rotate(quantised.key_codes.to(torch.float32) * key_scale), rotate(value * value_scale)


def round_query(query: torch.Tensor) -> torch.Tensor:
    """Return queries [..., D] as float32, rounded as the kernels round them.

    Each row is rotated, rounded to 127 steps of its largest magnitude, and rotated back. A row with
    a NaN or an infinity becomes NaN.
    """
    raw = rotation_sums(query.to(torch.float32))
    largest = raw.abs().amax(-1, keepdim=True)
    # Not `127 / largest`, which torch computes as 127 times the reciprocal.
    steps = torch.full_like(largest, k8v4.KEY_STEPS)
    inverse = torch.where(largest > _LEAST_QUERY, steps / largest, 0.0)
    codes = (raw * inverse).round()
    scale = largest * k8v4.rotation_unit(query.shape[-1]) / k8v4.KEY_STEPS
    return rotate(codes * scale)


@functools.lru_cache(maxsize=64)
def _positions(page_format: PageFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tensors [N, D]: each key's byte, each value's byte, and its nibble's shift."""
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
    keys = quantised.key_codes[kept].view(torch.uint8) ^ page_format.key_sign_flip
    regions[block, head, key[t][:, None]] = keys
    # Every token has the same dims in low nibbles. The i-th dim of the low nibbles shares a byte
    # with the i-th dim of the high nibbles.
    low = shift[0] == 0
    codes = quantised.value_codes[kept]
    pairs = codes[..., low] | codes[..., ~low] << 4
    regions[block, head, value[t][:, None, low]] = pairs
    for offset, numbers in (
        (page_format.key_scale_offset, quantised.key_scale),
        (page_format.value_scale_offset, quantised.value_scale),
    ):
        two_bytes = (offset + 2 * t)[:, None, None] + torch.arange(2)
        regions[block, head, two_bytes] = numbers[kept].unsqueeze(-1).view(torch.uint8)


def load(cache: torch.Tensor, head_size: int, layout: Layout) -> Quantised:
    """Read all `num_blocks * N` tokens of uint8 pages [num_blocks, H, N, slot_bytes(D)]."""
    page_size, regions = cache.shape[2], cache.flatten(2)
    page_format = PageFormat(head_size, page_size, layout)
    key, value, shift = _positions(page_format)
    keys = (regions[..., key] ^ page_format.key_sign_flip).view(torch.int8)
    planes = [keys, (regions[..., value] >> shift) & 15]
    for offset in (page_format.key_scale_offset, page_format.value_scale_offset):
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
    """Attend from the last Q of a sequence's L tokens to all L of them, in float32.

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
        sinks: float [Hq], one logit per head. It counts in the softmax's sum but has no value.

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
    integer_query: bool = True,
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
        integer_query: Round queries as the kernels do; see `round_query`.
        options: The keyword arguments of `attend`.

    Returns:
        out float32 [T, Hq, D] and lse float32 [T, Hq].
    """
    out = torch.zeros(query.shape, dtype=torch.float32)
    lse = torch.full(query.shape[:2], -math.inf)
    page_size = cache.shape[2]
    query = round_query(query) if integer_query else query.to(torch.float32)
    for i, length in enumerate(seq_lens.tolist()):
        first, last = int(query_start_loc[i]), int(query_start_loc[i + 1])
        if last <= first:
            continue
        blocks = block_table[i, : -(-length // page_size)].to(torch.int64)
        key, value = dequantise(load(cache[blocks], query.shape[2], layout))
        # A NaN key makes the output NaN, like a NaN value. Other tokens' scores stay finite.
        key, value = key[:length], value[:length].masked_fill(key[:length].isnan(), math.nan)
        out[first:last], lse[first:last] = attend(
            query[first:last], key.nan_to_num(0.0), value, **options
        )
    return out, lse
