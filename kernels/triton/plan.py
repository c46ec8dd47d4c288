# SPDX-License-Identifier: Apache-2.0
"""How a batch's attention is divided among a GPU's programs, decided on the GPU.

A *row* is one query head of one new token; the rows of a request that share a KV head are
numbered `token * group + head of the group`. A program takes up to `block_m` rows of one request
and KV head, called a row tile, and one *split* of the keys that they see. What program p does
stands in row p of a table that a kernel writes from the lengths on the device: nothing waits for
the GPU, and a captured graph replays with lengths that have changed. How many programs there are
is decided by shapes alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_hybrid_kv.kernels.triton.tuning import MOST_ROWS, Tiling, capability_of, tiling_for

INTERPRETED_PROCESSORS = 4
"""What stands for the number of multiprocessors where there is no GPU."""

FEWEST_TILES = 128
"""Row tiles that the planning kernel has room for at least. Its room is a power of two, and every
other one is another kernel to compile."""

ITEMS_AT_A_TIME = 256
"""Rows of the table of programs that are written at a time."""

ITEM_FIELDS = 5
"""Numbers of a program's row of the table: request (-1 for none), first row, split, splits, and
where its partial result goes if there are several splits."""

_FIELDS = tl.constexpr(ITEM_FIELDS)


@triton.jit
def key_range(  # type: ignore[no-untyped-def]
    length, queries, first_row, window,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Return the first key that some row of a row tile sees and the one behind the last.

    Args:
        length: Tokens of the request.
        queries: New tokens of the request, its last ones.
        first_row: First row of the tile, below `queries * GROUP`.
        window: With WINDOW, a row at p sees keys in (p - window, p + window) only.
    """
    last_row = tl.minimum(first_row + BLOCK_M, queries * GROUP) - 1
    first_position = length - queries + first_row // GROUP
    last_position = length - queries + last_row // GROUP
    begin = first_position * 0
    end = length
    if CAUSAL:
        end = tl.minimum(end, last_position + 1)
    if WINDOW:
        begin = tl.maximum(first_position - window + 1, 0)
        end = tl.minimum(end, last_position + window)
    return begin, tl.maximum(end, 0)


@triton.jit
def key_tiles(  # type: ignore[no-untyped-def]
    length, queries, first_row, window,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Return the first tile of keys that a row tile sees and the one behind the last.

    Takes the arguments of `key_range`.
    """
    begin, end = key_range(length, queries, first_row, window, GROUP, BLOCK_M, CAUSAL, WINDOW)
    begin = begin // BLOCK_N
    end = (end + BLOCK_N - 1) // BLOCK_N
    return begin, tl.maximum(begin, end)


@triton.jit
def _last_not_above(table, rows, count, steps, wanted, BLOCK_M: tl.constexpr = 1):  # type: ignore[no-untyped-def]
    """Return for each number the last i < count with `table[i]` not above it.

    With BLOCK_M the table counts tokens of `rows` rows each, and the first row tile of request i,
    `table[i] * rows // BLOCK_M + i`, is compared: room for every request's rows and a rest.
    """
    low, high = wanted * 0, wanted * 0 + count
    for _ in range(steps):
        middle = (low + high) // 2
        entry = tl.load(table + middle)
        if BLOCK_M > 1:
            entry = entry * rows // BLOCK_M + middle
        found = entry <= wanted
        low, high = tl.where(found, middle, low), tl.where(found, high, middle)
    return low


@triton.jit
def _row_tiles(  # type: ignore[no-untyped-def]
    tile, num_tiles, query_start_loc, seq_lens, requests, steps, window,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Return request (-1 for none), first row and number of key tiles of each row tile."""
    if ONE_TILE:
        request = tile
    else:
        request = _last_not_above(query_start_loc, GROUP, requests, steps, tile, BLOCK_M)
    here = tile < num_tiles
    begin = tl.load(query_start_loc + request, mask=here, other=0)
    queries = tl.load(query_start_loc + request + 1, mask=here, other=0) - begin
    length = tl.load(seq_lens + request, mask=here, other=0)
    if ONE_TILE:
        first_row = tile * 0
    else:
        first_row = (tile - (begin * GROUP // BLOCK_M + request)) * BLOCK_M
    here = here & (first_row < queries * GROUP)
    first_key, last_key = key_tiles(
        length, queries, first_row, window, GROUP, BLOCK_M, BLOCK_N, CAUSAL, WINDOW
    )
    keys = tl.where(here, last_key - first_key, 0)
    return tl.where(here, request, -1), first_row, keys


@triton.jit
def _splits_of(keys, total, target, MIN_TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the programs of row tiles that see `keys` of all `total` (int64) tiles of keys."""
    wanted = ((keys.to(tl.int64) * target + total - 1) // total).to(tl.int32)
    return tl.maximum(tl.minimum(wanted, (keys + MIN_TILES - 1) // MIN_TILES), 1)


@triton.jit
def _write_items(items, item, num_items, request, first_row, split, splits, part):  # type: ignore[no-untyped-def]
    row = items + item * _FIELDS
    here = item < num_items
    tl.store(row, request, mask=here)
    tl.store(row + 1, first_row, mask=here)
    tl.store(row + 2, split, mask=here)
    tl.store(row + 3, splits, mask=here)
    tl.store(row + 4, part, mask=here)


# A launch would compile anew where one of these turned 1 or a multiple of 16.
@triton.jit(
    do_not_specialize=[
        "requests", "num_tiles", "num_items", "target", "steps", "tile_steps", "window",
    ]
)  # fmt: skip
def plan_kernel(  # type: ignore[no-untyped-def]
    query_start_loc, seq_lens, items, tiles_start,
    requests, num_tiles, num_items, target, steps, tile_steps, window,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ONE_TILE: tl.constexpr,
    SPLIT: tl.constexpr, MIN_TILES: tl.constexpr,
    TILES: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Write the table of programs.

    Without SPLIT there is one program for each row tile. With it, a row tile with `n` of all `N`
    key tiles gets `ceil(target n / N)` programs, no fewer than one and no more than
    `ceil(n / MIN_TILES)`: equal work for equal programs, and never more than `target` and one for
    each row tile in all. A row tile of several splits has `n / N > 1 / target`, so that these
    splits, which alone leave partial results, are fewer than `2 target`.

    Args:
        query_start_loc: int32 [requests + 1].
        seq_lens: int32 [requests].
        items: int32 [num_items, ITEM_FIELDS], written.
        tiles_start: int32 [2, TILES], scratch; the first program of each row tile, and its first
            partial result.
        steps: Halvings that find a request among all.
        tile_steps: Halvings that find a row tile among all.
        ONE_TILE: Every request has one row tile at most.
        TILES: With SPLIT the power of two not below `num_tiles`, and a grid of one program.
        ITEMS: Rows that are written at a time.
    """
    if SPLIT:
        tile = tl.arange(0, TILES)
        request, first_row, keys = _row_tiles(
            tile, num_tiles, query_start_loc, seq_lens, requests, steps, window,
            GROUP, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, ONE_TILE,
        )  # fmt: skip
        total = tl.maximum(tl.sum(keys, axis=0), 1).to(tl.int64)
        splits = tl.where(request >= 0, _splits_of(keys, total, target, MIN_TILES), 0)
        behind = tl.cumsum(splits, axis=0)
        tl.store(tiles_start + tile, behind - splits)
        parts = tl.where(splits > 1, splits, 0)
        tl.store(tiles_start + TILES + tile, tl.cumsum(parts, axis=0) - parts)
        programs = tl.sum(splits, axis=0)
        # What other threads of this program have written is read below.
        tl.debug_barrier()
        for start in range(0, num_items, ITEMS):
            item = start + tl.arange(0, ITEMS)
            # Row tiles without rows have no program and start where the next one does, so that
            # the last of those that start there is meant.
            mine = _last_not_above(tiles_start, 0, num_tiles, tile_steps, item)
            its_request, its_row, its_keys = _row_tiles(
                mine, num_tiles, query_start_loc, seq_lens, requests, steps, window,
                GROUP, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, ONE_TILE,
            )  # fmt: skip
            split = item - tl.load(tiles_start + mine)
            _write_items(
                items, item, num_items, tl.where(item < programs, its_request, -1), its_row,
                split, _splits_of(its_keys, total, target, MIN_TILES),
                tl.load(tiles_start + TILES + mine) + split,
            )  # fmt: skip
    else:
        item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
        request, first_row, _ = _row_tiles(
            item, num_tiles, query_start_loc, seq_lens, requests, steps, window,
            GROUP, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, ONE_TILE,
        )  # fmt: skip
        none = item * 0
        _write_items(items, item, num_items, request, first_row, none, none + 1, none)


@dataclass(frozen=True, eq=False)
class Plan:
    """How the programs of `paged_attention` divide a batch among them.

    Attributes:
        made_for: Requests, query tokens, heads, KV heads, head size, causal, window.
        tiling: The size of a program.
        items: int32 [programs, ITEM_FIELDS].
        partial_rows: Rows that a partial result has room for; 0 without splits. It follows from
            the tiling alone, for another number is another kernel to compile.
        merged_rows: Rows of them that are used at most.
        partial_out: float32 [parts, H, partial_rows, D], scratch; empty without splits.
        partial_lse: float32 [parts, H, partial_rows], likewise; base 2.
    """

    made_for: tuple[int, int, int, int, int, bool, int | None]
    tiling: Tiling
    items: torch.Tensor
    partial_rows: int
    merged_rows: int
    partial_out: torch.Tensor
    partial_lse: torch.Tensor


def processors_of(device: torch.device) -> int:
    """Return the number of streaming multiprocessors or compute units of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _programs_wanted(tiling: Tiling, num_kv_heads: int, processors: int) -> int:
    """Return how many programs of each KV head keep the multiprocessors busy."""
    return triton.cdiv(tiling.programs_per_processor * processors, num_kv_heads)


def largest_scratch(num_kv_heads: int, head_size: int, device: torch.device) -> int:
    """Return how many float32 numbers the scratch memory of any plan takes at most.

    Splits that leave partial results are fewer than twice the programs that keep the device busy,
    whatever the batch and its lengths; see `plan_kernel`.

    Args:
        num_kv_heads: H.
        head_size: D.
        device: Where the kernels run.
    """
    processors, capability = processors_of(device), capability_of(device)
    tilings = [tiling_for(most, head_size, capability) for most in MOST_ROWS]
    rows = max(
        2 * _programs_wanted(tiling, num_kv_heads, processors) * tiling.block_m
        for tiling in tilings
    )
    return rows * num_kv_heads * (head_size + 1)


def planned_requests(max_requests: int) -> list[int]:
    """Return numbers of requests of which each has a planning kernel of its own in decoding.

    Args:
        max_requests: Requests at most.
    """
    found, room = [max_requests], FEWEST_TILES
    while room < max_requests:
        found.append(room)
        room *= 2
    return found


def plan_attention(
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    *,
    max_query_len: int,
    causal: bool = True,
    window: int | None = None,
    split: bool | None = None,
    processors: int | None = None,
    tiling: Tiling | None = None,
    scratch: torch.Tensor | None = None,
    into: Plan | None = None,
) -> Plan:
    """Plan a batch on its device; one plan serves all layers of the same shape in a step.

    Args:
        seq_lens: int32 [B], tokens of each request including its new ones.
        query_start_loc: int32 [B + 1].
        num_tokens: T, query tokens including padding.
        num_heads: Hq.
        num_kv_heads: H.
        head_size: D.
        max_query_len: New tokens of a request at most.
        causal: As for `paged_attention`.
        window: As for `paged_attention`.
        split: Whether keys of one row are divided among programs; decided by the shapes if None.
        processors: Multiprocessors to keep busy; those of the device if None.
        tiling: The size of a program; from the shapes if None.
        scratch: float32 [`largest_scratch`] for partial results, in use during each call of
            `paged_attention` only; allocated if None.
        into: A plan of the same shapes whose tensors are written again, as a captured graph
            needs it.

    Raises:
        ValueError: `into` was made for other shapes, or `scratch` is too small.
    """
    requests = seq_lens.shape[0]
    group = num_heads // num_kv_heads
    rows = max_query_len * group
    if tiling is None:
        tiling = tiling_for(rows, head_size, capability_of(seq_lens.device))
    if processors is None:
        processors = processors_of(seq_lens.device)
    one_tile = rows <= tiling.block_m
    num_tiles = requests if one_tile else num_tokens * group // tiling.block_m + requests
    target = _programs_wanted(tiling, num_kv_heads, processors)
    if split is None:
        # Decode batches are divided whatever their size, for their lengths may be ragged.
        split = (
            one_tile or num_tiles * num_kv_heads < 2 * tiling.programs_per_processor * processors
        )
    num_items = num_tiles + target if split else num_tiles
    made_for = (requests, num_tokens, num_heads, num_kv_heads, head_size, causal, window)
    partial_rows = tiling.block_m if split else 0
    merged_rows = min(partial_rows, rows)
    if into is None:
        shape = (min(num_items, 2 * target), num_kv_heads, partial_rows)
        sizes = [math.prod(shape) * head_size, math.prod(shape)]
        if scratch is None:
            scratch = torch.empty(sum(sizes), dtype=torch.float32, device=seq_lens.device)
        elif scratch.numel() < sum(sizes):
            raise ValueError(
                f"k8v4 attention: partial results take {sum(sizes)} numbers of scratch "
                f"memory, {scratch.numel()} are given"
            )
        partial_out, partial_lse, _ = scratch.split([*sizes, scratch.numel() - sum(sizes)])
        into = Plan(
            made_for,
            tiling,
            torch.empty((num_items, ITEM_FIELDS), dtype=torch.int32, device=seq_lens.device),
            partial_rows,
            merged_rows,
            partial_out.view(*shape, head_size),
            partial_lse.view(shape),
        )
    elif (
        into.made_for != made_for
        or into.tiling != tiling
        or into.items.shape[0] != num_items
        or (into.partial_rows, into.merged_rows) != (partial_rows, merged_rows)
    ):
        raise ValueError(
            f"k8v4 attention: the plan to write again was made for (requests, query "
            f"tokens, heads, KV heads, head size, causal, window) = {into.made_for}, "
            f"not for {made_for}, or for another number of tokens a request"
        )
    if num_items == 0 or requests == 0:
        return into
    tiles = max(FEWEST_TILES, triton.next_power_of_2(num_tiles))
    starts = torch.empty(2 * tiles if split else 0, dtype=torch.int32, device=seq_lens.device)
    plan_kernel[(1 if split else triton.cdiv(num_items, ITEMS_AT_A_TIME),)](
        query_start_loc, seq_lens, into.items, starts,
        requests, num_tiles, num_items, target,
        requests.bit_length(), num_tiles.bit_length(), 0 if window is None else window,
        GROUP=group, BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n,
        CAUSAL=causal, WINDOW=window is not None, ONE_TILE=one_tile,
        SPLIT=split, MIN_TILES=tiling.min_split_tiles,
        TILES=tiles if split else 0, ITEMS=ITEMS_AT_A_TIME,
        num_warps=4,
    )  # fmt: skip
    return into
