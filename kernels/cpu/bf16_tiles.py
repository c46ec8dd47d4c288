# SPDX-License-Identifier: Apache-2.0
"""Widen k8v4 tiles to bf16 operands.

An operand of 16 pairs is 16 lines of 64 bytes: line = pair of neighbours along the sum, 16
columns, the pair's two bf16 next to each other. Keys: pairs of dims, columns are tokens. Values:
pairs of tokens, columns are dims.

* A key's bf16 comes from a table of its 7 lower bits (AVX-512 VBMI). Shifting the code into place
  would be wrong for denormals of e4m3, because the products flush bf16 denormals to zero.
* A value's code c becomes c - `MIDDLE_VALUE_CODE`, from a table too. Weights rounded to bf16
  multiply these; the middle is added with exact weights, through the tokens' zeros. That halves the
  error from rounding the weights.
"""

from __future__ import annotations

import torch
from llvmlite import ir

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import records, work_item
from vllm_hybrid_kv.kernels.cpu.inline import Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import I8, I16, LINE, Emitter, constant, filled, vector

OPERAND = 1024
"""Bytes of an operand of 16 pairs and 16 columns."""

_HALVES = [16 * lane + i for lane in range(4) for i in range(8)]
_INTERLEAVE_LOW = [place for i in _HALVES for place in (i, 64 + i)]
_INTERLEAVE_HIGH = [place for i in _HALVES for place in (8 + i, 72 + i)]

_KEYS = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).bfloat16()
_KEY_BYTES = _KEYS.nan_to_num(480.0).view(torch.uint8).view(128, 2)
_LOWER_BYTES, _UPPER_BYTES = _KEY_BYTES.T.tolist()

_VALUES = (torch.arange(k8v4.VALUE_LEVELS) - k8v4.MIDDLE_VALUE_CODE).bfloat16()
# Twice, because the look-up takes five bits, of which the fifth belongs to the next code.
_VALUE_TABLE = 2 * _VALUES.view(torch.int16).tolist()


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
    kind, table = vector(I16, 32), constant(I16, _VALUE_TABLE)
    shifted = [line, *(e.b.lshr(line, filled(I16, bits, 32)) for bits in (4, 8, 12))]
    return [e.call("llvm.x86.avx512.permvar.hi.512", kind, table, codes) for codes in shifted]


@inline_llvm
def widen_key_tile(
    e: Emitter, prefetched: int, tile: Int64, to: Int64, dims: Int64, ahead: Int64
) -> None:
    """Widen a key tile to its dims / 32 operands; prefetch `prefetched` of 4 lines at `ahead`."""
    # Fewer lines a pass would wait for the loop.
    with e.each(e.shift_right(dims, 4)) as i:
        for line in range(4):
            target = e.at(e.at(to, i, 8 * LINE), 2 * LINE * line)
            if line < prefetched:
                e.prefetch(e.at(e.at(ahead, i, prefetched * LINE), LINE * line))
            place = e.at(e.at(tile, i, 4 * LINE), LINE * line)
            first, second = key_pairs(e, e.load_line(8, place))
            e.store(first, target)
            e.store(second, e.at(target, LINE))


@inline_llvm
def _widen_value_tile(
    e: Emitter, tile: Int64, to: Int64, dims: Int64, upper_lines: Int64, ahead: Int64
) -> None:
    """Widen a value tile to the first or upper 8 lines of dims / 16 operands; prefetch `ahead`."""
    to = e.at(to, upper_lines, 8 * LINE)
    with e.each(e.shift_right(dims, 5)) as i:
        for quad in range(4):
            e.prefetch(e.at(e.at(ahead, i, 4 * LINE), LINE * quad))
            place = e.at(e.at(tile, i, 4 * LINE), LINE * quad)
            for n, widened in enumerate(value_pairs(e, e.load_line(16, place))):
                pair, half = divmod(n, 2)
                offset = OPERAND * half + LINE * (2 * quad + pair)
                e.store(widened, e.at(e.at(to, i, 2 * OPERAND), offset))


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
        _widen_value_tile(tiles[i].values, to, call.dims, i % 2, ahead[i].values)
