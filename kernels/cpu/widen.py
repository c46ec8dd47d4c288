# SPDX-License-Identifier: Apache-2.0
"""Widen k8v4 tiles to bf16 operands of dot and tile products (AVX-512 VBMI).

An operand of 16 pairs is 16 lines of 64 bytes: line = pair of neighbours along the sum, 16
columns, the pair's two bf16 side by side. Keys: pairs of dims, columns are tokens. Values: pairs
of tokens, columns are dims.

* A key's bf16 comes from a table of its 7 lower bits, once for the upper byte and once for the
  lower. Shifting the code into place would be wrong for keys below 2^-6, which are denormals of
  e4m3: the products flush bf16 denormals to zero.
* A value's code c becomes c - `MIDDLE_CODE`, from a table as well. Weights rounded to bf16
  multiply these; the middle is added with exact weights, through the tokens' zeros. That halves
  what rounding the weights costs.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu.emit import (
    I8,
    I16,
    I32,
    I64,
    Emitter,
    constant,
    every,
    procedure,
    vector,
)

OPERAND = 1024
"""Bytes of an operand of 16 pairs and 16 columns."""

MIDDLE_CODE = (k8v4.VALUE_LEVELS - 1) / 2
"""What widened values are smaller by than their codes."""

LINE = 64

TILE_RECORD = 32
"""Bytes of a tile's addresses: keys, values, scales, zeros; see `drive.tile_addresses`."""

_HALVES = [16 * lane + i for lane in range(4) for i in range(8)]
_INTERLEAVE_LOW = [place for i in _HALVES for place in (i, 64 + i)]
_INTERLEAVE_HIGH = [place for i in _HALVES for place in (8 + i, 72 + i)]


def _bfloat16(number: float) -> int:
    """Return the upper 16 bits of a number's float32."""
    return int.from_bytes(struct.pack("<f", number), "little") >> 16


def _bfloat16_of_code(code: int) -> int:
    """Return the bf16 of a positive e4m3fn code; finite for the NaN's."""
    exponent, mantissa = code >> 3, code & 7
    if exponent:
        return _bfloat16(math.ldexp(1 + mantissa / 8, exponent - 7))
    return _bfloat16(math.ldexp(mantissa / 8, -6))


_TABLE = [_bfloat16_of_code(code) for code in range(128)]
_LOWER_BYTES = [bits & 255 for bits in _TABLE]
_UPPER_BYTES = [bits >> 8 for bits in _TABLE]

# Twice, because the look-up takes five bits, the fifth of them the next code's.
_VALUES = 2 * [_bfloat16(code - MIDDLE_CODE) for code in range(k8v4.VALUE_LEVELS)]


def key_pairs(e: Emitter, line: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Widen a line of keys, <64 x i8>, to the two lines of its dim pairs."""

    def look_up(table: list[int]) -> ir.Value:
        low, high = constant(I8, table[:64]), constant(I8, table[64:])
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        return e.call(name, vector(I8, 64), low, line, high)

    lower = look_up(_LOWER_BYTES)
    sign = e.b.and_(line, every(I8, 0x80, 64))
    upper = e.b.or_(look_up(_UPPER_BYTES), sign)
    first = e.b.shuffle_vector(lower, upper, constant(I32, _INTERLEAVE_LOW))
    return first, e.b.shuffle_vector(lower, upper, constant(I32, _INTERLEAVE_HIGH))


def value_pairs(e: Emitter, line: ir.Value) -> list[ir.Value]:
    """Widen a quad of values, <32 x i16>: tokens 0, 1 of low dims, of high; 2, 3 likewise."""
    widened = []
    for nibble in range(4):
        codes = e.b.lshr(line, every(I16, 4 * nibble, 32)) if nibble else line
        name = "llvm.x86.avx512.permvar.hi.512"
        widened.append(e.call(name, vector(I16, 32), constant(I16, _VALUES), codes))
    return widened


def _widen_keys(asked: int) -> Any:
    """Return an intrinsic's answer; a pass takes four lines and asks for `asked`."""

    def emit(e: Emitter, tile: ir.Value, to: ir.Value, dims: ir.Value, ahead: ir.Value) -> None:
        def line(i: ir.Value, _: Any) -> list[ir.Value]:
            # Four lines a pass: less than that waits for the loop.
            for part in range(4):
                place = e.at(e.at(tile, i, 4 * LINE), LINE * part)
                target = e.at(e.at(to, i, 8 * LINE), 2 * LINE * part)
                if part < asked:
                    e.prefetch(e.at(e.at(ahead, i, asked * LINE), LINE * part))
                first, second = key_pairs(e, e.load(vector(I8, 64), place))
                e.store(first, target)
                e.store(second, e.at(target, LINE))
            return []

        e.loop(e.b.ashr(dims, I64(4)), [], line)

    return procedure(emit, 4)


@intrinsic
def widen_keys(context: Any, tile: Any, to: Any, dims: Any, ahead: Any) -> Any:
    """Widen a key tile to its dims / 32 operands, and ask for the tile at `ahead`."""
    return _widen_keys(4)


@intrinsic
def widen_keys_ask_half(context: Any, tile: Any, to: Any, dims: Any, ahead: Any) -> Any:
    """Widen a key tile as `widen_keys` does, and ask for half a tile's lines at `ahead`."""
    return _widen_keys(2)


@intrinsic
def widen_values(context: Any, tile: Any, to: Any, dims: Any, upper_lines: Any, ahead: Any) -> Any:
    """Widen a value tile to 8 lines of each of dims / 16 operands, and ask for `ahead`.

    Two tiles make an operand's 16 pairs of tokens; `upper_lines` is 0 for the first, 1 for the
    second.
    """

    def emit(
        e: Emitter,
        tile: ir.Value,
        to: ir.Value,
        dims: ir.Value,
        upper_lines: ir.Value,
        ahead: ir.Value,
    ) -> None:
        to = e.at(to, upper_lines, 8 * LINE)

        def chunk(i: ir.Value, _: Any) -> list[ir.Value]:
            low = e.at(to, i, 2 * OPERAND)
            for quad in range(4):
                place = e.at(e.at(tile, i, 4 * LINE), LINE * quad)
                e.prefetch(e.at(e.at(ahead, i, 4 * LINE), LINE * quad))
                widened = value_pairs(e, e.load(vector(I16, 32), place))
                for pair in range(2):
                    for half in range(2):
                        offset = OPERAND * half + LINE * (2 * quad + pair)
                        e.store(widened[2 * pair + half], e.at(low, offset))
            return []

        e.loop(e.b.ashr(dims, I64(5)), [], chunk)

    return procedure(emit, 5)


def _split_values(chunks: int) -> Any:
    """Return an intrinsic's answer for `chunks` x 32 dims; see `split_values_64`."""

    def emit(
        e: Emitter,
        records: ir.Value,
        tiles: ir.Value,
        offset: ir.Value,
        to: ir.Value,
        ahead: ir.Value,
        offset_ahead: ir.Value,
    ) -> None:
        def of_value(records: ir.Value, i: ir.Value, offset: ir.Value) -> ir.Value:
            return e.b.add(e.load(I64, e.at(e.at(records, i, TILE_RECORD), 8)), offset)

        def tile(i: ir.Value, _: Any) -> list[ir.Value]:
            base = of_value(records, i, offset)
            soon = of_value(ahead, i, offset_ahead)
            of_step = e.at(to, e.b.ashr(i, I64(2)), 4 * OPERAND)
            target = e.at(of_step, e.b.and_(i, I64(3)), 4 * LINE)
            nibble = every(I8, 15, 64)
            for chunk in range(chunks):
                for quad in range(4):
                    line = 4 * chunk + quad
                    if line % 2:
                        e.prefetch(e.at(soon, LINE * (line // 2)))
                    codes = e.load(vector(I16, 32), e.at(base, LINE * line))
                    high = e.b.bitcast(e.b.lshr(codes, every(I16, 4, 32)), vector(I8, 64))
                    place = e.at(target, 2 * OPERAND * chunk + LINE * quad)
                    low = e.b.bitcast(codes, vector(I8, 64))
                    e.store(e.b.and_(low, nibble), place)
                    e.store(e.b.and_(high, nibble), e.at(place, OPERAND))
            return []

        e.loop(tiles, [], tile)

    return procedure(emit, 6)


@intrinsic
def split_values_64(
    context: Any, records: Any, tiles: Any, offset: Any, to: Any, ahead: Any, offset_ahead: Any
) -> Any:
    """Split the value codes of 64 dims into bytes: operands of 64 tokens x 16 dims, four a step.

    An operand's line is a quad of tokens, in the order of `k8v4.QUAD_BYTE_OF_TOKEN`; columns
    are dims. `records` is the address of the tiles' records, `offset` where the dims begin in a
    tile. Asks for half as many lines of the tiles of `ahead`, from `offset_ahead` on.
    """
    return _split_values(2)


@intrinsic
def split_values_32(
    context: Any, records: Any, tiles: Any, offset: Any, to: Any, ahead: Any, offset_ahead: Any
) -> Any:
    """Do as `split_values_64` for 32 dims."""
    return _split_values(1)
