# SPDX-License-Identifier: Apache-2.0
"""Attention of long prefills: dequantise keys and values once, and attend with FlashAttention.

`attend_kernel` decodes every key and value again for each row tile. That costs little if the memory
limits the speed, but long prefills are limited by computation. Here, a kernel dequantises up to
`PIECE_TOKENS` tokens into a workspace, FlashAttention attends to them, and the results of such
*pieces* are merged by their log-sum-exps. Pieces start at multiples of `PIECE_TOKENS`, so chunked
prefills have the same pieces as whole ones. A prefill's own tokens are read from the pages, too.

The results equal those of `attend_kernel` except for rounding:

* Queries are rounded to codes. A query becomes `fp16(code * q_scale)`, in the rotated space.
* A key becomes `fp16(code * key_scale * KEY_UNIT)`, and a value `fp16((code - 7.5) * value_scale *
  VALUE_UNIT)`, rotated as they are stored. The outputs are rotated back, after the merge.

Rounding to fp16 changes a number by at most 2^-11 of itself, which is at most an eighth of half a
step of the codes (`(1 / 254) / 8` of the largest number of a key). The units keep all numbers of
the format below fp16's maximum. Numbers too small for a normal fp16 number have an error of up to
2^-25 of a unit. That is less than half a step in a key with a rotated number of at least 2^-9, and
in a value with one of at least 2^-17. In smaller keys the error hardly changes a score: at most by
2^-17 of the sum of the query's magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_hybrid_kv.kernels import inputs, k8v4
from vllm_hybrid_kv.kernels.triton.convert import rounded
from vllm_hybrid_kv.kernels.triton.launching import launcher
from vllm_hybrid_kv.kernels.triton.rotation import rotated

PIECE_TOKENS = 8192
"""How many tokens the workspace holds."""

ROW_NUMBERS = 1 << 23
"""The largest size (tokens * heads * D) of the queries that attend together. Each such block of
queries dequantises its keys again. By arithmetic, not measured, that takes a twentieth of the time
of FlashAttention."""

KEY_UNIT = 2.0**-8
"""Dequantised keys are multiplied by this: the largest, 127 * 65504, becomes 32,496."""

VALUE_UNIT = 2.0**-4
"""Dequantised values are multiplied by this: the largest, 7.5 * 65504, becomes 30,705."""

NUMBERS_PER_PROGRAM = 4096

UNIT_FIELDS = tl.constexpr(7)
"""Numbers in a row of the table of units: request, first key, number of keys, row of the workspace
for the first key, first token in the pass, 1 + last token, position of the first token."""

_KEY_STEPS = tl.constexpr(float(k8v4.KEY_STEPS))
_KEY_UNIT = tl.constexpr(KEY_UNIT)
_VALUE_UNIT = tl.constexpr(VALUE_UNIT)
_MIDDLE_CODE = tl.constexpr(k8v4.MIDDLE_VALUE_CODE)
_LARGEST_HALF = tl.constexpr(65504.0)
_NO_POSITION = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["num_rows", "num_broken"])
def round_query_kernel(  # type: ignore[no-untyped-def]
    q_ptr, stride_q_tok, stride_q_head, out_ptr, broken_ptr, num_rows, num_broken,
    HEADS: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Write queries as fp16, rotated and rounded to codes, and empty the ranges of broken tokens.

    Args:
        q_ptr: [T, HEADS, D]; strides in elements, dims contiguous.
        out_ptr: fp16 [T, HEADS, D].
        broken_ptr: int32 [num_broken, 2]; see `dequantise_kernel`. At most `num_rows` ranges.
        num_rows: T * HEADS.
        DIMS: The smallest power of two >= D.
        ROWS: Rows of a program.
        UNIT: See `k8v4.rotation_unit`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(broken_ptr + 2 * row, _NO_POSITION, mask=row < num_broken)
    tl.store(broken_ptr + 2 * row + 1, -1, mask=row < num_broken)
    tok, head = (row // HEADS).to(tl.int64), row % HEADS
    offs_d = tl.arange(0, DIMS)
    mask = (row < num_rows)[:, None] & (offs_d < D)[None, :]
    q_ptrs = q_ptr + (tok * stride_q_tok + head * stride_q_head)[:, None] + offs_d[None, :]
    q = rotated(tl.load(q_ptrs, mask=mask, other=0.0).to(tl.float32), D)
    largest = tl.max(tl.abs(q), axis=1)
    steps = tl.full([ROWS], _KEY_STEPS, tl.float32)
    inverse = tl.math.div_rn(steps, tl.where(largest > 0, largest, 1.0))
    codes = rounded(q * inverse[:, None], _KEY_STEPS).to(tl.int8).to(tl.float32)
    # A row past fp16's maximum is shortened. The softmax of its scores is one-hot anyway.
    scale = tl.minimum(largest * UNIT, _LARGEST_HALF) / _KEY_STEPS
    # Zero times NaN or infinity is NaN, so either of them makes its whole row NaN.
    scale = scale + tl.sum(q * 0.0, axis=1)
    out_ptrs = out_ptr + (row.to(tl.int64) * D)[:, None] + offs_d[None, :]
    tl.store(out_ptrs, (codes * scale[:, None]).to(tl.float16), mask=mask)


@triton.jit(do_not_specialize=["stride_cache_block", "stride_block_table"])
def dequantise_kernel(  # type: ignore[no-untyped-def]
    cache_ptr, stride_cache_block, block_table_ptr, stride_block_table, units_ptr,
    k_ptr, v_ptr, broken_ptr,
    HEADS: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the keys and values of some units into a workspace, and note broken tokens.

    A token is *broken* if a scale is not finite. It becomes zeros, because FlashAttention
    multiplies the values of masked tokens by zero, and some versions lose a NaN score. Instead, its
    position widens the range of broken tokens.

    The grid is [tiles of the longest unit, units, HEADS].

    Args:
        cache_ptr: uint8 [blocks, HEADS, PAGE, slot]; `stride_cache_block` in bytes.
        units_ptr: int32 [units, UNIT_FIELDS].
        k_ptr, v_ptr: fp16 [rows, HEADS, D].
        broken_ptr: int32 [units, HEADS, 2], the first and the last position of broken tokens.
        DIMS: The smallest power of two >= D.
        BLOCK_N: Keys of a tile.
    """
    HEAD_BYTES: tl.constexpr = PAGE * (D + D // 2 + 4)
    KEY_BYTES: tl.constexpr = PAGE * D
    SCALE_OFFSET: tl.constexpr = KEY_BYTES + PAGE * (D // 2)
    unit, head = tl.program_id(1), tl.program_id(2)
    num_keys = tl.load(units_ptr + unit * UNIT_FIELDS + 2)
    first = tl.program_id(0) * BLOCK_N
    if first >= num_keys:
        return
    req_idx = tl.load(units_ptr + unit * UNIT_FIELDS).to(tl.int64)
    offs_n = first + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_keys
    key_pos = tl.load(units_ptr + unit * UNIT_FIELDS + 1) + offs_n
    table_ptrs = block_table_ptr + req_idx * stride_block_table + key_pos // PAGE
    block = tl.load(table_ptrs, mask=mask_n, other=0).to(tl.int64)
    base = tl.multiple_of(block * stride_cache_block, [16]) + head * HEAD_BYTES
    in_page = key_pos % PAGE

    scale_ptrs = (cache_ptr + base + SCALE_OFFSET).to(tl.pointer_type(tl.float16)) + in_page
    key_scale = tl.load(scale_ptrs, mask=mask_n, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptrs + PAGE, mask=mask_n, other=0.0).to(tl.float32)
    # A comparison with NaN is false.
    finite = (tl.abs(key_scale) <= _LARGEST_HALF) & (tl.abs(scale) <= _LARGEST_HALF)
    key_scale = tl.where(finite, key_scale, 0.0)
    scale = tl.where(finite, scale, 0.0)
    first_broken = tl.min(tl.where(finite, _NO_POSITION, key_pos), axis=0)
    if first_broken != _NO_POSITION:
        range_ptr = broken_ptr + 2 * (unit * HEADS + head)
        tl.atomic_min(range_ptr, first_broken)
        tl.atomic_max(range_ptr + 1, tl.max(tl.where(finite, -1, key_pos), axis=0))

    row = tl.load(units_ptr + unit * UNIT_FIELDS + 3) + offs_n
    row_start = ((row * HEADS + head).to(tl.int64) * D)[:, None]
    offs_d = tl.arange(0, DIMS)
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    code_ptrs = cache_ptr.to(tl.pointer_type(tl.int8)) + (base + in_page * D)[:, None]
    codes = tl.load(code_ptrs + offs_d[None, :], mask=mask, other=0).to(tl.float32)
    k = codes * (key_scale * _KEY_UNIT)[:, None]
    tl.store(k_ptr + row_start + offs_d[None, :], k.to(tl.float16), mask=mask)
    offs_pair = tl.arange(0, DIMS // 2)
    mask_pair = mask_n[:, None] & (offs_pair < D // 2)[None, :]
    pair_ptrs = cache_ptr + (base + KEY_BYTES + in_page * (D // 2))[:, None] + offs_pair[None, :]
    pairs = tl.load(pair_ptrs, mask=mask_pair, other=0).to(tl.int32)
    codes = tl.reshape(tl.join(pairs & 15, pairs >> 4), [BLOCK_N, DIMS]).to(tl.float32)
    v = (codes - _MIDDLE_CODE) * (scale * _VALUE_UNIT)[:, None]
    tl.store(v_ptr + row_start + offs_d[None, :], v.to(tl.float16), mask=mask)


@triton.jit(
    do_not_specialize=[
        "stride_lse_tok", "stride_lse_head", "stride_part_lse_head", "part_tokens", "window",
    ]
)  # fmt: skip
def merge_piece_kernel(  # type: ignore[no-untyped-def]
    out_ptr, stride_out_tok, stride_out_head,
    lse_ptr, stride_lse_tok, stride_lse_head,
    part_ptr, stride_part_tok, stride_part_head,
    part_lse_ptr, stride_part_lse_head,
    acc_ptr, acc_lse_ptr, sinks_ptr, broken_ptr, units_ptr, part_tokens, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Merge the result of a piece with those before it. After the last one, write the output.

        lse = log(exp(lse_a) + exp(lse_b)),  out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)

    The grid is [programs for the rows of the longest unit, units]. A row is one head of one token.

    Args:
        out_ptr: [T, HEADS, D], written with LAST; strides in elements, dims contiguous.
        lse_ptr: float32 [T, HEADS], natural logarithms, written with LAST and LSE.
        part_ptr: fp16 [part_tokens, HEADS, D], the result of the piece, rotated.
        part_lse_ptr: float32 [HEADS, part_tokens], tokens contiguous.
        acc_ptr, acc_lse_ptr: float32 [T, HEADS, D] and [T, HEADS], the result of the pieces before,
            read unless FIRST and written unless LAST.
        sinks_ptr: [HEADS], one logit for each head; counted with SINKS and LAST.
        broken_ptr: int32 [units, HEADS / GROUP, 2]; see `dequantise_kernel`. With a window, a row
            between two broken tokens counts as seeing one even if both are outside of its window.
        units_ptr: int32 [units, UNIT_FIELDS].
        part_tokens: How many tokens, from the first one on, see the piece.
    """
    unit = tl.program_id(1)
    first_tok = tl.load(units_ptr + unit * UNIT_FIELDS + 4)
    end_tok = tl.load(units_ptr + unit * UNIT_FIELDS + 5)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tok, head = first_tok + row // HEADS, row % HEADS
    mask_m = tok < end_tok
    offs_d = tl.arange(0, DIMS)
    mask_d = (offs_d < D)[None, :]
    in_part = mask_m & (tok < part_tokens)
    tok64 = tok.to(tl.int64)
    part_ptrs = part_ptr + (tok64 * stride_part_tok + head * stride_part_head)[:, None]
    acc = tl.load(part_ptrs + offs_d[None, :], mask=in_part[:, None] & mask_d, other=0.0)
    acc = acc.to(tl.float32)
    lse_ptrs = part_lse_ptr + head.to(tl.int64) * stride_part_lse_head + tok
    lse = tl.load(lse_ptrs, mask=in_part, other=-float("inf"))
    acc_row = tok64 * HEADS + head
    acc_ptrs = acc_ptr + (acc_row * D)[:, None] + offs_d[None, :]
    if not FIRST:
        before_lse = tl.load(acc_lse_ptr + acc_row, mask=mask_m, other=0.0)
        before = tl.load(acc_ptrs, mask=mask_m[:, None] & mask_d, other=0.0)
        m = tl.maximum(before_lse, lse)
        m = tl.where(m == -float("inf"), 0.0, m)
        before_weight, weight = tl.exp(before_lse - m), tl.exp(lse - m)
        # One weight is 1, unless neither piece has a finite lse: then the query is NaN.
        total = before_weight + weight
        acc = before * (before_weight / total)[:, None] + acc * (weight / total)[:, None]
        lse = m + tl.log(total)
    if not LAST:
        tl.store(acc_ptrs, acc, mask=mask_m[:, None] & mask_d)
        tl.store(acc_lse_ptr + acc_row, lse, mask=mask_m)
    else:
        factor = tl.full([ROWS], UNIT / _VALUE_UNIT, tl.float32)
        if SINKS:
            sink = tl.load(sinks_ptr + head, mask=mask_m, other=0.0).to(tl.float32)
            m = tl.maximum(lse, sink)
            with_sink = m + tl.log(tl.exp(lse - m) + tl.exp(sink - m))
            factor = factor * tl.exp(lse - with_sink)
            lse = with_sink
        pos = tl.load(units_ptr + unit * UNIT_FIELDS + 6) + row // HEADS
        range_ptrs = broken_ptr + 2 * (unit * (HEADS // GROUP) + head // GROUP)
        broken = tl.load(range_ptrs, mask=mask_m, other=_NO_POSITION) <= pos
        if WINDOW:
            broken = broken & (tl.load(range_ptrs + 1, mask=mask_m, other=-1) > pos - window)
        factor = tl.where(broken, float("nan"), factor)
        acc = rotated(acc, D) * factor[:, None]
        out_ptrs = out_ptr + (tok64 * stride_out_tok + head * stride_out_head)[:, None]
        tl.store(
            out_ptrs + offs_d[None, :], acc.to(out_ptr.dtype.element_ty),
            mask=mask_m[:, None] & mask_d,
        )  # fmt: skip
        if LSE:
            tl.store(lse_ptr + tok64 * stride_lse_tok + head * stride_lse_head, lse, mask=mask_m)


@dataclass(frozen=True)
class Prefill:
    """A request with many new tokens.

    Attributes:
        request: Its index in the batch.
        first_token: The index of its first new token in the batch.
        num_tokens: New tokens.
        length: All of its tokens, including the new ones.
    """

    request: int
    first_token: int
    num_tokens: int
    length: int


@dataclass(frozen=True)
class _Unit:
    """Some consecutive new tokens of a request, and some keys that they see.

    Positions are those in the request. `first_token` is an index in the batch.

    Attributes:
        request: The request's index in the batch.
        first_key, end_key: The keys. If they end with the tokens, the mask is causal.
        first_token, num_tokens: The tokens.
        position: Position of the first token.
        num_seeing: How many of the tokens, from the first one on, see some of the keys.
    """

    request: int
    first_key: int
    end_key: int
    first_token: int
    num_tokens: int
    position: int
    num_seeing: int

    @property
    def num_keys(self) -> int:
        return self.end_key - self.first_key

    def window_size(self, window: int | None) -> tuple[int, int]:
        """Return how far tokens see to the left and to the right, in FlashAttention's terms.

        FlashAttention aligns the last token that it gets with the last key.
        """
        if window is None:
            return -1, -1
        right = self.position + self.num_seeing - self.end_key
        return window - 1 - right, right


@dataclass(frozen=True)
class _Call:
    """One call of FlashAttention.

    Attributes:
        units: int32 [units, UNIT_FIELDS].
        cu_seqlens_q, cu_seqlens_k: int32 [units + 1], where each unit's tokens and keys start.
        num_tokens, num_keys, max_tokens, max_keys: Sums and maxima over the units.
        causal, window_size: As FlashAttention takes them.
    """

    units: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    num_tokens: int
    num_keys: int
    max_tokens: int
    max_keys: int
    causal: bool
    window_size: tuple[int, int]


@dataclass(frozen=True)
class _Pass:
    """Consecutive tokens of the batch and the calls that compute their outputs.

    Only a pass of one unit has more than one call.

    Attributes:
        tokens: The tokens.
        max_tokens: Largest number of tokens of a unit.
        calls: The first call serves all tokens.
    """

    tokens: slice
    max_tokens: int
    calls: tuple[_Call, ...]


@dataclass(frozen=True, eq=False)
class PrefillPlan:
    """How `prefill_attention` divides the long prefills of a batch; see `plan_prefill`.

    Attributes:
        made_for: Heads, head size, window.
        prefills: The prefills.
        passes: Executed one after another with the same workspace.
    """

    made_for: tuple[int, int, int | None]
    prefills: tuple[Prefill, ...]
    passes: tuple[_Pass, ...]


def rows_of_pass(num_heads: int, head_size: int) -> int:
    """Return how many query tokens attend together, a power of two."""
    return min(PIECE_TOKENS, 1 << (ROW_NUMBERS // (num_heads * head_size)).bit_length() - 1)


def _units(prefill: Prefill, window: int | None, rows: int, piece: int) -> Iterator[list[_Unit]]:
    """Yield the units of each block of query tokens. The first unit has the tokens' own keys.

    Blocks of tokens end at multiples of `rows`, which divides `piece`, so each block is inside one
    piece of keys. The mask of that piece is causal. Masks of earlier pieces have only the window.
    """
    offset = prefill.length - prefill.num_tokens
    start = offset
    while start < prefill.length:
        end = min(prefill.length, (start // rows + 1) * rows)
        first_visible = 0 if window is None else max(0, start - window + 1)
        own = start // piece
        units = []
        for number in range(own, first_visible // piece - 1, -1):
            end_key = end if number == own else (number + 1) * piece
            seeing = end if window is None else min(end, end_key + window - 1)
            units.append(
                _Unit(
                    prefill.request,
                    max(number * piece, first_visible),
                    end_key,
                    prefill.first_token + start - offset,
                    end - start,
                    start,
                    seeing - start,
                )
            )
        yield units
        start = end


def _groups(blocks: Iterable[list[_Unit]], rows: int, piece: int) -> Iterator[list[list[_Unit]]]:
    """Group consecutive blocks that have one unit each and fit the workspace together."""
    group: list[list[_Unit]] = []
    for block in blocks:
        together = [*group, block]
        last = group[-1][0] if group else block[0]
        fits = (
            sum(units[0].num_tokens for units in together) <= rows
            and sum(units[0].num_keys for units in together) <= piece
            and all(len(units) == 1 for units in together)
            and last.first_token + last.num_tokens == block[0].first_token
        )
        if group and not fits:
            yield group
            together = [block]
        group = together
    if group:
        yield group


def plan_prefill(
    prefills: Sequence[Prefill],
    num_heads: int,
    head_size: int,
    device: torch.device,
    *,
    window: int | None = None,
    rows: int | None = None,
    piece: int = PIECE_TOKENS,
) -> PrefillPlan:
    """Divide prefills into calls of FlashAttention that fit the workspace.

    One plan serves all layers of the same shape in a step. Planning copies one tensor to the
    device and does not wait for it.

    Args:
        prefills: In the order of the batch.
        num_heads: Hq.
        head_size: D.
        device: The device of the batch.
        window: As for `prefill_attention`.
        rows, piece: How many query tokens and keys the workspace holds, both powers of two, and
            `rows` not above `piece`; the usual numbers if None.
    """
    rows = min(rows or rows_of_pass(num_heads, head_size), piece)
    blocks = (block for one in prefills for block in _units(one, window, rows, piece))
    passes = list(_groups(blocks, rows, piece))
    numbers: list[int] = []
    places: list[list[tuple[list[_Unit], int]]] = []
    for group in passes:
        first = group[0][0].first_token
        place = []
        for units in zip(*group, strict=True):
            place.append((list(units), len(numbers)))
            starts = [0, *accumulate(unit.num_keys for unit in units)]
            for unit, row in zip(units, starts, strict=False):
                token = unit.first_token - first
                numbers += (unit.request, unit.first_key, unit.num_keys, row)
                numbers += (token, token + unit.num_tokens, unit.position)
            numbers += [0, *accumulate(unit.num_seeing for unit in units)]
            numbers += starts
        places.append(place)
    on_host = torch.tensor(numbers, dtype=torch.int32)
    if device.type == "cuda":
        on_host = on_host.pin_memory()
    table = on_host.to(device, non_blocking=True)

    def call(units: list[_Unit], start: int) -> _Call:
        count = len(units)
        end = start + count * UNIT_FIELDS.value
        return _Call(
            units=table[start:end].view(count, -1),
            cu_seqlens_q=table[end : end + count + 1],
            cu_seqlens_k=table[end + count + 1 : end + 2 * count + 2],
            num_tokens=sum(unit.num_seeing for unit in units),
            num_keys=sum(unit.num_keys for unit in units),
            max_tokens=max(unit.num_seeing for unit in units),
            max_keys=max(unit.num_keys for unit in units),
            causal=units[0].end_key == units[0].position + units[0].num_tokens,
            window_size=units[0].window_size(window),
        )

    return PrefillPlan(
        (num_heads, head_size, window),
        tuple(prefills),
        tuple(
            _Pass(
                slice(
                    group[0][0].first_token,
                    group[-1][0].first_token + group[-1][0].num_tokens,
                ),
                max(units[0].num_tokens for units in group),
                tuple(call(units, start) for units, start in place),
            )
            for group, place in zip(passes, places, strict=True)
        ),
    )


def prefill_workspace(
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    *,
    rows: int | None = None,
    piece: int = PIECE_TOKENS,
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Return shape and dtype of each tensor that `prefill_attention` needs as a workspace.

    Their sizes depend neither on the batch nor on the lengths of requests.
    """
    rows = min(rows or rows_of_pass(num_heads, head_size), piece)
    tokens, keys = (rows, num_heads, head_size), (piece, num_kv_heads, head_size)
    return (
        (tokens, torch.float16),  # queries
        (keys, torch.float16),
        (keys, torch.float16),  # values
        (tokens, torch.float16),  # FlashAttention's output
        (tokens, torch.float32),  # merged outputs
        (tokens[:2], torch.float32),  # their log-sum-exps
        ((rows, num_kv_heads, 2), torch.int32),  # ranges of broken tokens
    )


Flash = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""`flash_attn_varlen_func` of FlashAttention as vLLM extends it. It returns outputs [T, Hq, D] and
float32 log-sum-exps [Hq, T] in natural logarithms."""


def _check_lengths(
    plan: PrefillPlan, seq_lens: torch.Tensor, query_start_loc: torch.Tensor
) -> None:
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for one in plan.prefills:
        first, end = starts[one.request], starts[one.request + 1]
        found = Prefill(one.request, first, end - first, lengths[one.request])
        if found != one:
            raise inputs.attention_error(
                f"the prefill plan was made for {one}, the call has {found}"
            )


def prefill_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    out: torch.Tensor,
    *,
    plan: PrefillPlan,
    flash: Flash,
    workspace: Sequence[torch.Tensor],
    scale: float,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    debug: bool = False,
) -> None:
    """Attend from the planned prefills of a batch, which must be causal; see `reference.attend`.

    Rows of `out` and `lse` that belong to other requests are not written. A row that sees a token
    with a scale that is not finite becomes NaN, and its `lse` is undefined.

    Args:
        query, cache, block_table, seq_lens, query_start_loc, out, scale, causal, window, soft_cap,
            sinks, lse: As for `paged_attention`.
        plan: From `plan_prefill` for this batch.
        flash: FlashAttention.
        workspace: Tensors as `prefill_workspace` describes them, in use only during the call.
        debug: Also check the contents of the index tensors and the lengths of the plan, which waits
            for the device.

    Raises:
        ValueError: An argument is not as required.
    """
    inputs.check_attention(
        query, cache, block_table, seq_lens, query_start_loc, out,
        sinks=sinks, lse=lse, debug=debug,
    )  # fmt: skip
    _, num_heads, head_size = query.shape
    num_kv_heads, page_size = cache.shape[1], cache.shape[2]
    if (*plan.made_for, True) != (num_heads, head_size, window, causal):
        raise inputs.attention_error(
            f"the prefill plan was made for (heads, head size, window, causal) = "
            f"{(*plan.made_for, True)}, the call has {(num_heads, head_size, window, causal)}"
        )
    if debug:
        _check_lengths(plan, seq_lens, query_start_loc)
    rounded_query, key, value, part, acc, acc_lse, broken = workspace
    dims = triton.next_power_of_2(head_size)
    rows = NUMBERS_PER_PROGRAM // dims
    shared: dict[str, Any] = {"D": head_size, "DIMS": dims, "num_warps": 4}
    of_rows = {"HEADS": num_heads, "ROWS": rows, "UNIT": k8v4.rotation_unit(head_size)}
    # The kernel takes pointers even for sinks and an lse that it does not use.
    sinks_or_unused = acc_lse if sinks is None else sinks
    for one in plan.passes:
        q, o = query[one.tokens], out[one.tokens]
        lse_and_strides = (acc_lse, 0, 0)
        if lse is not None:
            lse_and_strides = (lse[one.tokens], *lse.stride())
        tokens, units = q.shape[0], one.calls[0].units.shape[0]
        launcher(round_query_kernel, (triton.cdiv(tokens * num_heads, rows),))(
            q, q.stride(0), q.stride(1), rounded_query, broken,
            tokens * num_heads, units * num_kv_heads,
            **of_rows, **shared,
        )  # fmt: skip
        for number, call in enumerate(one.calls):
            launcher(dequantise_kernel, (triton.cdiv(call.max_keys, rows), units, num_kv_heads))(
                cache, cache.stride(0), block_table, block_table.stride(0), call.units,
                key, value, broken,
                HEADS=num_kv_heads, PAGE=page_size, BLOCK_N=rows, **shared,
            )  # fmt: skip
            result, result_lse = flash(
                q=rounded_query[: call.num_tokens],
                k=key[: call.num_keys],
                v=value[: call.num_keys],
                max_seqlen_q=call.max_tokens,
                cu_seqlens_q=call.cu_seqlens_q,
                max_seqlen_k=call.max_keys,
                cu_seqlens_k=call.cu_seqlens_k,
                softmax_scale=scale / KEY_UNIT,
                causal=call.causal,
                window_size=[*call.window_size],
                softcap=soft_cap,
                return_softmax_lse=True,
                out=part[: call.num_tokens],
            )
            launcher(merge_piece_kernel, (triton.cdiv(one.max_tokens * num_heads, rows), units))(
                o, o.stride(0), o.stride(1), *lse_and_strides,
                result, result.stride(0), result.stride(1), result_lse, result_lse.stride(0),
                acc, acc_lse, sinks_or_unused, broken, call.units,
                call.num_tokens, 0 if window is None else window,
                GROUP=num_heads // num_kv_heads, FIRST=number == 0,
                LAST=number == len(one.calls) - 1, SINKS=sinks is not None, LSE=lse is not None,
                WINDOW=window is not None, **of_rows, **shared,
            )  # fmt: skip
