# SPDX-License-Identifier: Apache-2.0
"""Tile products of AMX: scores and outputs of up to 16 rows, or of 32, at a time.

The eight tile registers are named by number in the instructions themselves:

    few rows:  0-3 sums, 4 rows' operand, 5-7 operands of keys or values; 7 also the rows'
               second operand where upper and lower bytes of weights do not fit one
    32 rows:   0-3 sums (2 x 2), 4-5 rows' operands, 6-7 operands of keys or values
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from vllm_hybrid_kv.kernels.cpu.emit import I8, I16, I64, Emitter, procedure
from vllm_hybrid_kv.kernels.cpu.widen import LINE, OPERAND, TILE_RECORD

SUMS_STRIDE = 4 * LINE
"""Bytes of a row of sums of codes: 64 dims of int32."""

_VOID = ir.VoidType()


def _tile(e: Emitter, operation: str, number: int, *arguments: ir.Value) -> None:
    e.call(f"llvm.x86.{operation}", _VOID, I8(number), *arguments)


def _load(e: Emitter, number: int, address: ir.Value, stride: ir.Value) -> None:
    _tile(e, "tileloadd64", number, e.b.inttoptr(address, I8.as_pointer()), stride)


def _store(e: Emitter, number: int, address: ir.Value, stride: ir.Value) -> None:
    _tile(e, "tilestored64", number, e.b.inttoptr(address, I8.as_pointer()), stride)


def _multiply(e: Emitter, sums: int, left: int, right: int) -> None:
    _tile(e, "tdpbf16ps", sums, I8(left), I8(right))


@intrinsic
def configure(context: Any, memory: Any, rows: Any) -> Any:
    """Give the rows' tiles (0 to 4) `rows` lines and the others 16; 64 bytes of memory."""

    def emit(e: Emitter, memory: ir.Value, rows: ir.Value) -> None:
        for word in range(8):
            e.store(I64(0), e.at(memory, 8 * word))
        e.store(I8(1), memory)  # palette 1: eight tiles of 1 KB
        for number in range(8):
            e.store(I16(LINE), e.at(memory, 16 + 2 * number))
            lines = e.b.trunc(rows, I8) if number <= 4 else I8(16)
            e.store(lines, e.at(memory, 48 + number))
        e.call("llvm.x86.ldtilecfg", _VOID, e.b.inttoptr(memory, I8.as_pointer()))

    return procedure(emit, 2)


@intrinsic
def release(context: Any, unused: Any) -> Any:
    """Give the tile registers back, so that the system need not save them."""

    def emit(e: Emitter, unused: ir.Value) -> None:
        e.call("llvm.x86.tilerelease", _VOID)

    return procedure(emit, 1)


@intrinsic
def scores_few(
    context: Any,
    queries: Any,
    query_stride: Any,
    keys: Any,
    steps: Any,
    scores: Any,
    stride: Any,
    more: Any,
    ahead: Any,
    offset: Any,
) -> Any:
    """Write the configured rows' scores of 64 widened tokens; `steps` operands a tile of 16.

    Adds to what is there if `more`. Asks meanwhile for two lines a step of each of four key
    tiles, `offset` bytes into them; `ahead` is the address of the tiles' records.
    """

    def emit(
        e: Emitter,
        queries: ir.Value,
        query_stride: ir.Value,
        keys: ir.Value,
        steps: ir.Value,
        scores: ir.Value,
        stride: ir.Value,
        more: ir.Value,
        ahead: ir.Value,
        offset: ir.Value,
    ) -> None:
        with e.b.if_else(e.b.icmp_signed("!=", more, I64(0))) as (then, otherwise):
            with then:
                for tile in range(4):
                    _load(e, tile, e.at(scores, LINE * tile), stride)
            with otherwise:
                for tile in range(4):
                    _tile(e, "tilezero", tile)
        per_tile = e.b.mul(steps, I64(OPERAND))
        asked = [e.b.add(e.load(I64, e.at(ahead, TILE_RECORD * t)), offset) for t in range(4)]

        def step(i: ir.Value, _: Any) -> list[ir.Value]:
            _load(e, 4, e.at(queries, i, LINE), query_stride)
            for tile in range(4):
                operand = e.at(e.at(keys, i, OPERAND), e.b.mul(per_tile, I64(tile)), 1)
                right = 5 + tile % 3
                _load(e, right, operand, I64(LINE))
                _multiply(e, tile, 4, right)
                for line in range(2):
                    e.prefetch(e.at(e.at(asked[tile], i, 2 * LINE), LINE * line))
            return []

        e.loop(steps, [], step)
        for tile in range(4):
            _store(e, tile, e.at(scores, LINE * tile), stride)

    return procedure(emit, 9)


def _sums_of_codes(parts: int, stacked: bool) -> Any:
    """Return an intrinsic's answer; `parts` x 16 dims, both limbs in one tile if `stacked`."""

    def emit(
        e: Emitter,
        weights: ir.Value,
        stride: ir.Value,
        lower: ir.Value,
        codes: ir.Value,
        steps: ir.Value,
        sums: ir.Value,
        lower_sums: ir.Value,
    ) -> None:
        limbs = 1 if stacked else 2
        for tile in range(parts * limbs):
            _tile(e, "tilezero", tile)

        def step(i: ir.Value, _: Any) -> list[ir.Value]:
            upper = e.at(weights, i, LINE)
            _load(e, 4, upper, stride)
            if not stacked:
                _load(e, 7, e.b.add(upper, lower), stride)
            for part in range(parts):
                right = 5 + part % (3 if stacked else 2)
                _load(e, right, e.at(e.at(codes, i, 4 * OPERAND), OPERAND * part), I64(LINE))
                for limb in range(limbs):
                    left = (4, 7)[limb]
                    _tile(e, "tdpbuud", part + parts * limb, I8(left), I8(right))
            return []

        e.loop(steps, [], step)
        for part in range(parts):
            _store(e, part, e.at(sums, LINE * part), I64(SUMS_STRIDE))
            if not stacked:
                _store(e, parts + part, e.at(lower_sums, LINE * part), I64(SUMS_STRIDE))

    return procedure(emit, 7)


def _sums_of_codes_intrinsic(parts: int, stacked: bool) -> Any:
    @intrinsic
    def sums_of_codes(
        context: Any,
        weights: Any,
        stride: Any,
        lower: Any,
        codes: Any,
        steps: Any,
        sums: Any,
        lower_sums: Any,
    ) -> Any:
        """Multiply weights of two bytes with codes of `parts` x 16 dims, exactly, in int32.

        `weights` are rows of the upper bytes, 64 tokens a step, and the lower ones are `lower`
        bytes further: where `stacked`, as more rows of the same tile. `codes` are what
        `widen.split_values` writes. Sums are rows of 64 int32.
        """
        return _sums_of_codes(parts, stacked)

    return sums_of_codes


sums_of_codes_64 = _sums_of_codes_intrinsic(4, stacked=True)
sums_of_codes_32 = _sums_of_codes_intrinsic(2, stacked=True)
sums_of_codes_32_apart = _sums_of_codes_intrinsic(2, stacked=False)


def _two_by_two(
    e: Emitter,
    left: ir.Value,
    left_stride: ir.Value,
    right: ir.Value,
    right_apart: ir.Value,
    steps: ir.Value,
    step_bytes: ir.Value,
) -> None:
    """Add products of 32 rows with two operands at each step to tiles 0 to 3."""
    lower = e.b.add(left, e.b.mul(left_stride, I64(16)))

    def step(i: ir.Value, _: Any) -> list[ir.Value]:
        operand = e.b.add(right, e.b.mul(i, step_bytes))
        _load(e, 6, operand, I64(LINE))
        _load(e, 4, e.at(left, i, LINE), left_stride)
        _multiply(e, 0, 4, 6)
        _load(e, 7, e.b.add(operand, right_apart), I64(LINE))
        _multiply(e, 1, 4, 7)
        _load(e, 5, e.at(lower, i, LINE), left_stride)
        _multiply(e, 2, 5, 6)
        _multiply(e, 3, 5, 7)
        return []

    e.loop(steps, [], step)


@intrinsic
def scores_many(
    context: Any, queries: Any, query_stride: Any, keys: Any, steps: Any, scores: Any, stride: Any
) -> Any:
    """Write 32 rows' scores of 32 widened tokens; `steps` operands a tile of 16 tokens."""

    def emit(
        e: Emitter,
        queries: ir.Value,
        query_stride: ir.Value,
        keys: ir.Value,
        steps: ir.Value,
        scores: ir.Value,
        stride: ir.Value,
    ) -> None:
        for tile in range(4):
            _tile(e, "tilezero", tile)
        apart = e.b.mul(steps, I64(OPERAND))
        _two_by_two(e, queries, query_stride, keys, apart, steps, I64(OPERAND))
        lower = e.b.add(scores, e.b.mul(stride, I64(16)))
        for tile, place in enumerate((scores, e.at(scores, LINE), lower, e.at(lower, LINE))):
            _store(e, tile, place, stride)

    return procedure(emit, 6)


@intrinsic
def outputs_many(
    context: Any,
    weights: Any,
    weight_stride: Any,
    values: Any,
    steps: Any,
    step_bytes: Any,
    outputs: Any,
    stride: Any,
) -> Any:
    """Add 32 rows' weights times widened values to 32 dims of their outputs."""

    def emit(
        e: Emitter,
        weights: ir.Value,
        weight_stride: ir.Value,
        values: ir.Value,
        steps: ir.Value,
        step_bytes: ir.Value,
        outputs: ir.Value,
        stride: ir.Value,
    ) -> None:
        lower = e.b.add(outputs, e.b.mul(stride, I64(16)))
        places = (outputs, e.at(outputs, LINE), lower, e.at(lower, LINE))
        for tile, place in enumerate(places):
            _load(e, tile, place, stride)
        _two_by_two(e, weights, weight_stride, values, I64(OPERAND), steps, step_bytes)
        for tile, place in enumerate(places):
            _store(e, tile, place, stride)

    return procedure(emit, 7)
