# SPDX-License-Identifier: Apache-2.0
"""Divide a batch's attention among the programs of a launch, on the GPU itself.

A *row* is one query head of one new token; the rows of a request that share a KV head are
numbered `token * group + head of the group`. A *row tile* is up to `block_m` rows of one request
and KV head, and has the key tiles that they see.

All key tiles of all row tiles form one list, which is cut into pieces of equal length, one for each
program (stream-K). A piece may begin and end inside a row tile, whose parts are then merged. So all
programs of a batch take the same time, whatever its lengths, and there are never more of them than
fit the GPU at once: a second wave of a few programs would take as long as the first.

A kernel writes two tables, of row tiles and of programs, from the lengths on the device. So nothing
waits for the GPU, and a captured graph can replay with other lengths. The number of programs
follows from the shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_hybrid_kv.kernels.triton.launching import launcher
from vllm_hybrid_kv.kernels.triton.tuning import MOST_ROWS, Tiling, capability_of, tiling_for

INTERPRETED_PROCESSORS = 4
"""The number of multiprocessors assumed without a GPU."""

MIN_TILES_CAPACITY = 128
"""Smallest number of row tiles that the planning kernel has room for. The number is rounded up to
a power of two, and each power compiles another kernel."""

TABLE_ROWS = 256
"""How many rows of a table the planning kernel writes at a time."""

PIECE_FIELDS = tl.constexpr(4)
"""Numbers in a program's row of its table: first row tile, 1 + last row tile, first position in the
list, 1 + last position."""

ROW_TILE_FIELDS = tl.constexpr(5)
"""Numbers in a row tile's row of its table: request (-1 for none), first row, position of its first
key tile in the list, first program that works on it, last program."""

ROW_TILE_COST = tl.constexpr(2)
"""Empty positions in the list before each row tile. They stand for the time, in key tiles, in which
a program loads and rotates its queries and writes its outputs."""


@triton.jit
def key_range(  # type: ignore[no-untyped-def]
    seq_len, query_len, first_row, window,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Return the first key that some row of a row tile sees, and 1 + the last.

    The last `query_len` of `seq_len` tokens are new; `first_row` is below `query_len * GROUP`.
    """
    last_row = tl.minimum(first_row + BLOCK_M, query_len * GROUP) - 1
    first_pos = seq_len - query_len + first_row // GROUP
    last_pos = seq_len - query_len + last_row // GROUP
    start = first_pos * 0
    end = seq_len
    if CAUSAL:
        end = tl.minimum(end, last_pos + 1)
    if WINDOW:
        start = tl.maximum(first_pos - window + 1, 0)
        end = tl.minimum(end, last_pos + window)
    return start, tl.maximum(end, 0)


@triton.jit
def key_tiles(  # type: ignore[no-untyped-def]
    seq_len, query_len, first_row, window,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Return the first tile of keys that a row tile sees, and 1 + the last; see `key_range`."""
    start, end = key_range(
        seq_len, query_len, first_row, window, GROUP, BLOCK_M, CAUSAL, WINDOW
    )  # fmt: skip
    start = start // BLOCK_N
    return start, tl.maximum(start, (end + BLOCK_N - 1) // BLOCK_N)


@triton.jit
def _last_at_most(  # type: ignore[no-untyped-def]
    table_ptr, group, count, steps, target, BLOCK_M: tl.constexpr = 1
):
    """For each element of `target`, find the last i < count with `table[i] <= target`.

    With BLOCK_M the table is `query_start_loc`, and `target` is compared with the first row tile of
    request i instead: `table[i] * group // BLOCK_M + i`. It leaves room for partial last tiles.
    """
    low, high = target * 0, target * 0 + count
    for _ in range(steps):
        middle = (low + high) // 2
        entry = tl.load(table_ptr + middle)
        if BLOCK_M > 1:
            entry = entry * group // BLOCK_M + middle
        at_most = entry <= target
        low, high = tl.where(at_most, middle, low), tl.where(at_most, high, middle)
    return low


@triton.jit
def _row_tiles(  # type: ignore[no-untyped-def]
    tile, num_tiles, query_start_loc_ptr, seq_lens_ptr, num_reqs, steps, window,
    min_query_len, max_query_len, tiles_per_req,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DECODES: tl.constexpr,
):  # fmt: skip
    """Return each row tile's request (-1 if it has no rows), first row and number of key tiles.

    The other arguments are those of `plan_kernel`.
    """
    if DECODES:
        req_idx = tile // tiles_per_req
        first_row = tile % tiles_per_req * BLOCK_M
    else:
        req_idx = _last_at_most(query_start_loc_ptr, GROUP, num_reqs, steps, tile, BLOCK_M)
    mask = tile < num_tiles
    q_start = tl.load(query_start_loc_ptr + req_idx, mask=mask, other=0)
    query_len = tl.load(query_start_loc_ptr + req_idx + 1, mask=mask, other=0) - q_start
    seq_len = tl.load(seq_lens_ptr + req_idx, mask=mask, other=0)
    if not DECODES:
        first_row = (tile - (q_start * GROUP // BLOCK_M + req_idx)) * BLOCK_M
    mask = mask & (query_len >= min_query_len) & (query_len <= max_query_len)
    mask = mask & (first_row < query_len * GROUP)
    first_tile, end_tile = key_tiles(
        seq_len, query_len, first_row, window, GROUP, BLOCK_M, BLOCK_N, CAUSAL, WINDOW
    )
    num_key_tiles = tl.where(mask, end_tile - first_tile, 0)
    return tl.where(mask, req_idx, -1), first_row, num_key_tiles


@triton.jit
def _write(table_ptr, row, num_rows, fields, FIELDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write rows of a table, except those from `num_rows` on."""
    for field in tl.static_range(FIELDS):
        tl.store(table_ptr + row * FIELDS + field, fields[field], mask=row < num_rows)


# Specialising these on 1 and on multiples of 16 would compile more kernels at run time.
@triton.jit(
    do_not_specialize=[
        "num_reqs", "num_tiles", "num_programs", "steps", "tile_steps", "window",
        "min_query_len", "max_query_len", "tiles_per_req",
    ]
)  # fmt: skip
def plan_kernel(  # type: ignore[no-untyped-def]
    query_start_loc_ptr, seq_lens_ptr, pieces_ptr, row_tiles_ptr, positions_ptr,
    num_reqs, num_tiles, num_programs, steps, tile_steps, window,
    min_query_len, max_query_len, tiles_per_req,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DECODES: tl.constexpr,
    SPLIT: tl.constexpr, MIN_TILES: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the tables of row tiles and of programs.

    Without SPLIT there is one program for each row tile. With SPLIT, program p of P takes positions
    `p N // P` to `(p + 1) N // P` of the list of N. P is the number of pieces of MIN_TILES key
    tiles, or the number of row tiles if that is larger, and at most `num_programs`.

    Args:
        query_start_loc_ptr: int32 [num_reqs + 1].
        seq_lens_ptr: int32 [num_reqs].
        pieces_ptr: int32 [num_programs, PIECE_FIELDS], written.
        row_tiles_ptr: int32 [num_tiles, ROW_TILE_FIELDS], written.
        positions_ptr: int32 [TILES], scratch: the position of each row tile.
        steps: Bisection steps that find a request.
        tile_steps: Bisection steps that find a row tile.
        min_query_len, max_query_len: The launch serves the requests with such numbers of new
            tokens. Other requests have no row tiles.
        tiles_per_req: With DECODES, row tile `i` belongs to request `i // tiles_per_req`. Otherwise
            row tiles are numbered by tokens, with one more for each request.
        TILES: A power of two >= `num_tiles`. Used only with SPLIT, with a grid of one program.
        ROWS: Rows of a table that are written at a time.
    """
    if SPLIT:
        tile = tl.arange(0, TILES)
        req_idx, first_row, num_key_tiles = _row_tiles(
            tile, num_tiles, query_start_loc_ptr, seq_lens_ptr, num_reqs, steps, window,
            min_query_len, max_query_len, tiles_per_req,
            GROUP, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, DECODES,
        )  # fmt: skip
        exists = req_idx >= 0
        # A row tile that sees nothing has an output too.
        size = tl.where(exists, ROW_TILE_COST + tl.maximum(num_key_tiles, 1), 0)
        end = tl.cumsum(size, axis=0)
        tl.store(positions_ptr + tile, end - size)
        total = tl.maximum(tl.sum(size, axis=0), 1).to(tl.int64)
        least = ROW_TILE_COST + MIN_TILES
        wanted = ((total + least - 1) // least).to(tl.int32)
        wanted = tl.maximum(wanted, tl.sum(exists.to(tl.int32), axis=0))
        programs = tl.minimum(wanted, num_programs)
        # Position x belongs to the last program p with `p total // programs <= x`.
        first_key_tile = end - size + ROW_TILE_COST
        first_program = ((first_key_tile + 1).to(tl.int64) * programs - 1) // total
        last_program = (end.to(tl.int64) * programs - 1) // total
        row_tile_fields = (
            req_idx, first_row, first_key_tile,
            first_program.to(tl.int32), last_program.to(tl.int32),
        )  # fmt: skip
        _write(row_tiles_ptr, tile, num_tiles, row_tile_fields, ROW_TILE_FIELDS)
        # The loop reads positions that other threads of this program have written.
        tl.debug_barrier()
        for start in range(0, num_programs, ROWS):
            program = start + tl.arange(0, ROWS)
            first_pos = (program.to(tl.int64) * total // programs).to(tl.int32)
            end_pos = ((program + 1).to(tl.int64) * total // programs).to(tl.int32)
            # Row tiles can share a position. Then only the last of them has rows, and it is the one
            # that the search finds.
            first_tile = _last_at_most(positions_ptr, 0, num_tiles, tile_steps, first_pos)
            last_pos = end_pos - 1 - ROW_TILE_COST
            end_tile = _last_at_most(positions_ptr, 0, num_tiles, tile_steps, last_pos) + 1
            works = (program < programs) & (last_pos >= 0)
            piece_fields = (first_tile, tl.where(works, end_tile, first_tile), first_pos, end_pos)
            _write(pieces_ptr, program, num_programs, piece_fields, PIECE_FIELDS)
    else:
        tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        req_idx, first_row, _ = _row_tiles(
            tile, num_tiles, query_start_loc_ptr, seq_lens_ptr, num_reqs, steps, window,
            min_query_len, max_query_len, tiles_per_req,
            GROUP, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, DECODES,
        )  # fmt: skip
        zeros = tile * 0
        _write(
            row_tiles_ptr, tile, num_tiles, (req_idx, first_row, zeros, tile, tile),
            ROW_TILE_FIELDS,
        )  # fmt: skip
        end_tile = tl.where(req_idx >= 0, tile + 1, tile)
        # A position after the last key tile of any row tile. The kernel adds a tile number to it.
        everything = zeros + 0x3FFFFFFF
        _write(pieces_ptr, tile, num_tiles, (tile, end_tile, zeros, everything), PIECE_FIELDS)


@dataclass(frozen=True, eq=False)
class LaunchPlan:
    """How the programs of `paged_attention` divide a batch among them.

    Attributes:
        made_for: Requests, query tokens, heads, KV heads, head size, causal, window.
        tiling: The tile sizes of a program.
        pieces: int32 [programs, PIECE_FIELDS].
        row_tiles: int32 [row tiles, ROW_TILE_FIELDS].
        merged_rows: How many rows of each partial result may have to be merged.
        partial_out: float32 [2 programs, H, rows, D], scratch. `rows` is 0 without splits and
            `tiling.block_m` with splits, because any other number would compile another kernel.
            Program p writes part `2 p` of the row tile that it continues, and part `2 p + 1` of
            the row tile that it begins and another program continues.
        partial_lse: float32 [2 programs, H, rows], scratch, base 2.
    """

    made_for: tuple[int, int, int, int, int, bool, int | None]
    tiling: Tiling
    pieces: torch.Tensor
    row_tiles: torch.Tensor
    merged_rows: int
    partial_out: torch.Tensor
    partial_lse: torch.Tensor


def processors_of(device: torch.device) -> int:
    """Count a GPU's multiprocessors or compute units; a CPU has `INTERPRETED_PROCESSORS`."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _programs_wanted(tiling: Tiling, num_kv_heads: int, processors: int) -> int:
    """Return how many programs of each KV head the multiprocessors run at once."""
    return max(1, tiling.programs_per_processor * processors // num_kv_heads)


def largest_scratch(num_kv_heads: int, head_size: int, device: torch.device) -> int:
    """Return how many float32 numbers of scratch memory are enough for every plan.

    A program leaves at most two partial results.
    """
    processors, capability = processors_of(device), capability_of(device)
    tilings = [tiling_for(rows, head_size, capability) for rows in MOST_ROWS]
    rows = max(
        _programs_wanted(tiling, num_kv_heads, processors) * tiling.block_m for tiling in tilings
    )
    return 2 * rows * num_kv_heads * (head_size + 1)


def plan_attention(
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    *,
    max_query_len: int,
    min_query_len: int = 0,
    decodes: bool = False,
    causal: bool = True,
    window: int | None = None,
    split: bool | None = None,
    processors: int | None = None,
    tiling: Tiling | None = None,
    scratch: torch.Tensor | None = None,
) -> LaunchPlan:
    """Plan a batch on its device; one plan serves all layers of the same shape in a step.

    Args:
        seq_lens, query_start_loc, causal, window: As for `paged_attention`.
        num_tokens: T, query tokens including padding.
        num_heads: Hq.
        num_kv_heads: H.
        head_size: D.
        max_query_len, min_query_len: The launch serves the requests whose numbers of new tokens are
            in this range, wherever they are in the batch. It does not write rows of others.
        decodes: Whether these requests have few new tokens. Then their keys are always split,
            because lengths may be ragged, and the plan's size does not depend on other requests.
        split: Whether programs may share the keys of a row; chosen from the shapes if None.
        processors: How many multiprocessors to keep busy; all of the device if None.
        tiling: The tile sizes of a program; chosen from the shapes if None.
        scratch: float32 [`largest_scratch`] for partial results, in use only during each call of
            `paged_attention`; allocated if None.

    Raises:
        ValueError: `scratch` is too small.
    """
    requests, device = seq_lens.shape[0], seq_lens.device
    group = num_heads // num_kv_heads
    rows = max_query_len * group
    if tiling is None:
        tiling = tiling_for(rows, head_size, capability_of(device))
    if processors is None:
        processors = processors_of(device)
    tiles_per_req = triton.cdiv(rows, tiling.block_m)
    decodes = decodes or tiles_per_req == 1
    if decodes:
        num_tiles = requests * tiles_per_req
    else:
        num_tiles = num_tokens * group // tiling.block_m + requests
    programs = _programs_wanted(tiling, num_kv_heads, processors)
    if split is None:
        busy = num_tiles * num_kv_heads >= 2 * tiling.programs_per_processor * processors
        split = decodes or not busy
    if not split:
        programs = num_tiles
    partial_rows = tiling.block_m if split else 0
    shape = (2 * programs, num_kv_heads, partial_rows)
    sizes = (math.prod(shape) * head_size, math.prod(shape))
    if scratch is None:
        scratch = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    elif scratch.numel() < sum(sizes):
        raise ValueError(
            f"k8v4 attention: scratch memory for partial results has {scratch.numel()} "
            f"numbers, {sum(sizes)} are needed; allocate largest_scratch(...) numbers"
        )
    partial_out, partial_lse = scratch[: sum(sizes)].split(sizes)
    plan = LaunchPlan(
        (requests, num_tokens, num_heads, num_kv_heads, head_size, causal, window),
        tiling,
        torch.empty((programs, PIECE_FIELDS.value), dtype=torch.int32, device=device),
        torch.empty((num_tiles, ROW_TILE_FIELDS.value), dtype=torch.int32, device=device),
        min(partial_rows, rows),
        partial_out.view(*shape, head_size),
        partial_lse.view(shape),
    )
    if num_tiles == 0 or requests == 0:
        return plan
    tiles = max(MIN_TILES_CAPACITY, triton.next_power_of_2(num_tiles)) if split else 0
    positions = torch.empty(tiles, dtype=torch.int32, device=device)
    launcher(plan_kernel, (1 if split else triton.cdiv(num_tiles, TABLE_ROWS),))(
        query_start_loc, seq_lens, plan.pieces, plan.row_tiles, positions,
        requests, num_tiles, programs,
        requests.bit_length(), num_tiles.bit_length(), 0 if window is None else window,
        min_query_len, max_query_len, tiles_per_req,
        GROUP=group, BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n,
        CAUSAL=causal, WINDOW=window is not None, DECODES=decodes,
        SPLIT=split, MIN_TILES=tiling.min_split_tiles, TILES=tiles, ROWS=TABLE_ROWS,
        num_warps=4,
    )  # fmt: skip
    return plan


def warm_up_plans(
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    device: torch.device,
    *,
    max_requests: int,
    decode_query_len: int,
    window: int | None,
) -> None:
    """Compile every planning kernel that an engine may need.

    The kernels with SPLIT differ in the number of row tiles for which they have room.
    """
    group = num_heads // num_kv_heads

    def plan(requests: int, tokens: int, max_query_len: int, *, decodes: bool) -> LaunchPlan:
        starts = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        return plan_attention(
            starts[1:], starts, tokens, num_heads, num_kv_heads, head_size,
            max_query_len=max_query_len, decodes=decodes, window=window,
        )  # fmt: skip

    def capacities(most: int) -> Iterator[int]:
        capacity = MIN_TILES_CAPACITY
        while capacity < most:
            yield capacity
            capacity *= 2
        yield most

    one = plan(1, decode_query_len, decode_query_len, decodes=True)
    for tiles in capacities(max_requests * len(one.row_tiles)):
        plan(max(1, tiles // len(one.row_tiles)), 1, decode_query_len, decodes=True)
    tiling = tiling_for(MOST_ROWS[-1], head_size, capability_of(device))
    most = 2 * tiling.programs_per_processor * processors_of(device) // num_kv_heads
    for tiles in capacities(most):
        tokens = tiles * tiling.block_m // group
        plan(1, tokens, max(tokens, MOST_ROWS[-1]), decodes=False)
