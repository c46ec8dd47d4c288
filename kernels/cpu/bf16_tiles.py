# SPDX-License-Identifier: Apache-2.0
"""Widen k8v4 tiles to bf16 operands, and the loop over chunks that the bf16 paths share.

An operand of 16 pairs is 16 lines of 64 bytes: line = pair of neighbours along the sum, 16
columns, the pair's two bf16 next to each other. Keys: pairs of dims, columns are tokens. Values:
pairs of tokens, columns are dims.

* A key's bf16 comes from a table indexed by its 7 lower bits, once for the upper byte and once for
  the lower (AVX-512 VBMI). Shifting the code into place would be wrong for keys below 2^-6, which
  are denormals of e4m3: the products flush bf16 denormals to zero.
* A value's code c becomes c - `MIDDLE_VALUE_CODE`, from a table too. Weights rounded to bf16
  multiply these; the middle is added with exact weights, through the tokens' zeros. That halves the
  error from rounding the weights.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from llvmlite import ir

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import memory, records, work_item
from vllm_hybrid_kv.kernels.cpu.inline import Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import I8, I16, LINE, Emitter, constant, filled, vector

OPERAND = 1024
"""Bytes of an operand of 16 pairs and 16 columns."""

TILES = records.CHUNK // records.TILE
"""Most tiles of a chunk."""

_HALVES = [16 * lane + i for lane in range(4) for i in range(8)]
_INTERLEAVE_LOW = [place for i in _HALVES for place in (i, 64 + i)]
_INTERLEAVE_HIGH = [place for i in _HALVES for place in (8 + i, 72 + i)]


def _bfloat16(number: float) -> int:
    """Return the upper 16 bits of a number's float32."""
    return int.from_bytes(struct.pack("<f", number), "little") >> 16


def _bfloat16_of_key_code(code: int) -> int:
    """Return the bf16 of a positive e4m3fn code; finite for the NaN's."""
    exponent, mantissa = code >> 3, code & 7
    if exponent:
        return _bfloat16(math.ldexp(1 + mantissa / 8, exponent - 7))
    return _bfloat16(math.ldexp(mantissa / 8, -6))


_KEY_TABLE = [_bfloat16_of_key_code(code) for code in range(128)]
_LOWER_BYTES = [bits & 255 for bits in _KEY_TABLE]
_UPPER_BYTES = [bits >> 8 for bits in _KEY_TABLE]

# Twice, because the look-up takes five bits, of which the fifth belongs to the next code.
_VALUE_TABLE = 2 * [_bfloat16(code - k8v4.MIDDLE_VALUE_CODE) for code in range(k8v4.VALUE_LEVELS)]


def key_pairs(e: Emitter, line: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Widen a line of keys, <64 x i8>, to the two lines of its dim pairs."""

    def look_up(table: list[int]) -> ir.Value:
        low, high = constant(I8, table[:64]), constant(I8, table[64:])
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        return e.call(name, vector(I8, 64), low, line, high)

    lower = look_up(_LOWER_BYTES)
    sign = e.b.and_(line, filled(I8, 0x80, 64))
    upper = e.b.or_(look_up(_UPPER_BYTES), sign)
    first = e.shuffle(lower, upper, _INTERLEAVE_LOW)
    return first, e.shuffle(lower, upper, _INTERLEAVE_HIGH)


def value_pairs(e: Emitter, line: ir.Value) -> list[ir.Value]:
    """Widen a quad of values, <32 x i16>: tokens 0, 1 of low dims, of high; then tokens 2, 3."""
    widened = []
    for nibble in range(4):
        codes = e.b.lshr(line, filled(I16, 4 * nibble, 32)) if nibble else line
        name = "llvm.x86.avx512.permvar.hi.512"
        widened.append(e.call(name, vector(I16, 32), constant(I16, _VALUE_TABLE), codes))
    return widened


@inline_llvm
def widen_key_tile(
    e: Emitter, prefetched: int, tile: Int64, to: Int64, dims: Int64, ahead: Int64
) -> None:
    """Widen a key tile to its dims / 32 operands; prefetch `prefetched` of 4 lines at `ahead`."""

    def four_lines(i: ir.Value, _: list[ir.Value]) -> None:
        # Fewer lines a pass would wait for the loop.
        for line in range(4):
            place = e.at(e.at(tile, i, 4 * LINE), LINE * line)
            target = e.at(e.at(to, i, 8 * LINE), 2 * LINE * line)
            if line < prefetched:
                e.prefetch(e.at(e.at(ahead, i, prefetched * LINE), LINE * line))
            first, second = key_pairs(e, e.load_line(8, place))
            e.store(first, target)
            e.store(second, e.at(target, LINE))

    e.loop(e.shift_right(dims, 4), [], four_lines)


@inline_llvm
def widen_value_tile(
    e: Emitter, tile: Int64, to: Int64, dims: Int64, upper_lines: Int64, ahead: Int64
) -> None:
    """Widen a value tile to 8 lines of each of dims / 16 operands, and prefetch `ahead`.

    Two tiles make an operand's 16 pairs of tokens; `upper_lines` is 0 for the first, 1 for the
    second.
    """
    to = e.at(to, upper_lines, 8 * LINE)

    def chunk(i: ir.Value, _: list[ir.Value]) -> None:
        low = e.at(to, i, 2 * OPERAND)
        for quad in range(4):
            place = e.at(e.at(tile, i, 4 * LINE), LINE * quad)
            e.prefetch(e.at(e.at(ahead, i, 4 * LINE), LINE * quad))
            widened = value_pairs(e, e.load_line(16, place))
            for pair in range(2):
                for half in range(2):
                    offset = OPERAND * half + LINE * (2 * quad + pair)
                    e.store(widened[2 * pair + half], e.at(low, offset))

    e.loop(e.shift_right(dims, 5), [], chunk)


@work_item.inner
def widen_keys(call, scratch, tiles, ahead, first, last):  # type: ignore[no-untyped-def]
    """Widen a chunk's key tiles `first` to `last - 1`, always to the same memory."""
    for i in range(first, last):
        to = scratch + records.KEYS_AT + (i - first) * (call.dims // 32) * OPERAND
        widen_key_tile(4, tiles[i].keys, to, call.dims, ahead[i].keys)


@work_item.inner
def widen_values(call, scratch, tiles, ahead, count):  # type: ignore[no-untyped-def]
    """Widen a chunk's values. If the number of tiles is odd, widen the last one twice.

    The weights of the missing tile are zeros, but zero times uninitialised memory may be NaN.
    """
    for i in range((count + 1) // 2 * 2):
        to = scratch + records.VALUES_AT + i // 2 * (call.dims // 16) * OPERAND
        widen_value_tile(tiles[i].values, to, call.dims, i % 2, ahead[i].values)


@work_item.inner
def _find_next_tiles(call, item, head, first_ahead, last, chunk, ahead):  # type: ignore[no-untyped-def]
    """Find the tiles to prefetch during a chunk: those from token `first_ahead` on.

    During the item's last chunk, take the thread's next item and find the tiles of its first chunk.

    Returns:
        How many tiles there are, and the index of the next item, -1 if none was taken.
    """
    count = work_item.tiles_of_chunk(first_ahead, last, chunk)
    if count > 0:
        work_item.find_tiles(call, item, head, first_ahead, count, ahead)
        return count, np.int64(-1)
    index = memory.fetch_add(call.counters)
    return work_item.find_first_tiles(call, index, chunk, ahead), index


@work_item.inner
def _repeat_tiles(tiles, ahead, count_ahead, count):  # type: ignore[no-untyped-def]
    """Give every tile of a chunk a valid tile to prefetch, and make the number of tiles even.

    If the next chunk has fewer tiles than this one, this chunk's are prefetched again. If it has
    more, the addresses of those stay unchanged.
    """
    for i in range(count_ahead, count):
        ahead[i] = tiles[i]
    if count % 2:
        # Products take tiles in pairs; the weights of a missing one are zeros.
        tiles[count] = tiles[count - 1]
        if count_ahead <= count:
            ahead[count] = tiles[count]


def chunk_loop(
    most_few_rows: int, chunk_of_few: int, prepare: Any, attend_few: Any, attend_many: Any
) -> Any:
    """Return a function that attends for one item, chunk by chunk, with bf16 products.

    Args:
        most_few_rows: Most rows of a request that `attend_few` computes.
        chunk_of_few: Tokens of its chunks; `attend_many` has chunks of `records.CHUNK`.
        prepare: Called as `prepare(item, few, scratch)` before the first chunk.
        attend_few: Adds a chunk of tokens from `first` on to the rows' sums:
            `attend_few(call, item, scratch, state, first, tiles, ahead, count)`, where `tiles` and
            `ahead` are `TILE_ADDRESSES` of the chunk and of the next one.
        attend_many: Does the same for more rows.
    """

    @work_item.inner
    def attend(call, index, scratch):  # type: ignore[no-untyped-def]
        """Attend for the item at an index, and return the index of the next one.

        The next item is taken when the last chunk begins, to prefetch its first chunk.
        """
        number, head = divmod(index, call.num_kv_heads)
        item = work_item.item_at(call, number)
        index_ahead = np.int64(-1)
        state = np.empty(records.ROW_BLOCK, records.ROW_STATE)
        tiles = np.zeros(TILES, records.TILE_ADDRESSES)
        ahead = np.zeros(TILES, records.TILE_ADDRESSES)
        work_item.begin(call, item, head, scratch, state, 2 * call.dims, widen=False)
        # By all rows of the request: the rest in its last item is computed like the others.
        few = item.query_length * call.group <= most_few_rows
        chunk = np.int64(chunk_of_few if few else records.CHUNK)
        prepare(item, few, scratch)
        first, last = work_item.keys_of_item(call, item)
        count = work_item.tiles_of_chunk(first, last, chunk)
        work_item.find_tiles(call, item, head, first, count, tiles)
        while first < last:
            first_ahead = work_item.next_chunk(first, chunk)
            count_ahead, index_ahead = _find_next_tiles(
                call, item, head, first_ahead, last, chunk, ahead
            )
            _repeat_tiles(tiles, ahead, count_ahead, count)
            work_item.load_scales(scratch, tiles, count, k8v4.MIDDLE_VALUE_CODE)
            if few:
                attend_few(call, item, scratch, state, first, tiles, ahead, count)
            else:
                attend_many(call, item, scratch, state, first, tiles, ahead, count)
            tiles, ahead = ahead, tiles
            count = count_ahead
            first = first_ahead
        work_item.finish(call, item, head, scratch, state)
        return memory.fetch_add(call.counters) if index_ahead < 0 else index_ahead

    return attend
