# SPDX-License-Identifier: Apache-2.0
"""Rules to store values and keys, as functions that return the stored values dequantised.

Input and output are rows (token, head) of D values, float32 [..., D]. Every rule except `fp8`
uses 4 bits a value and an fp16 scale and zero for the row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch

from vllm_hybrid_kv.kernels import reference

Rule = Callable[[torch.Tensor], torch.Tensor]

_LAST_CODE = 15
_SHRUNK = (0.0, 0.05, 0.1, 0.15, 0.2)
"""Parts of the range that a rule may cut off at each end."""


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """Return the nearest e4m3fn numbers, as an fp8 cache with a scale of 1 stores them."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32)


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float16).to(torch.float32)


def _ends(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return value.amin(-1, keepdim=True), value.amax(-1, keepdim=True)


def stock(value: torch.Tensor) -> torch.Tensor:
    """Store as vLLM's `_store_quantized_value`: codes from float32 scale and zero, kept as fp16."""
    lo, hi = _ends(value)
    scale = ((hi - lo) / _LAST_CODE).clamp_min(1e-8)
    codes = ((value - lo) / scale + 0.5).floor().clamp(0, _LAST_CODE)
    return codes * _half(scale) + _half(lo)


def _between(value: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return values dequantised with an fp16 scale and zero."""
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    return ((value - zero) * inverse).round().clamp(0, _LAST_CODE) * scale + zero


def covering(part: float) -> Rule:
    """Return the rule whose range ends `part` of a step beyond the first and the last code.

    0 is min-max. 1/2 is cells of one width, with every value at most half a step from a code.
    Scale and zero are rounded outwards.
    """

    def rule(value: torch.Tensor) -> torch.Tensor:
        lo, hi = _ends(value)
        inside = part / (_LAST_CODE + 2 * part)
        zero = reference.half_rounded_down(lo + (hi - lo) * inside).to(torch.float32)
        scale = -reference.half_rounded_down(-((hi - zero) / (_LAST_CODE + part)))
        return _between(value, zero, scale.to(torch.float32))

    return rule


def _best(value: torch.Tensor, candidates: Iterable[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Return for each row the `stored` of the candidate (judged, stored) with the least error."""
    least = torch.full((*value.shape[:-1], 1), torch.inf)
    found = torch.empty_like(value)
    for judged, stored in candidates:
        error = (judged - value).square().sum(-1, keepdim=True)
        better = error < least
        least, found = torch.where(better, error, least), torch.where(better, stored, found)
    return found


def shrunk(*, rounding: bool, ends: Iterable[tuple[float, float]] | None = None) -> Rule:
    """Return the rule that cuts off the ends so that the squared error is least.

    Args:
        rounding: Whether the choice sees scale and zero rounded to fp16.
        ends: Parts of the range to cut off below and above; all pairs of `_SHRUNK` if None.
    """
    pairs = list(ends or itertools.product(_SHRUNK, _SHRUNK))

    def rule(value: torch.Tensor) -> torch.Tensor:
        lo, hi = _ends(value)

        def candidates() -> Iterable[tuple[torch.Tensor, ...]]:
            for below, above in pairs:
                zero, scale = lo + below * (hi - lo), (hi - lo) * (1 - below - above) / _LAST_CODE
                stored = _between(value, _half(zero), _half(scale))
                yield (stored if rounding else _between(value, zero, scale)), stored

        return _best(value, candidates())

    return rule


def refitted(times: int) -> Rule:
    """Return the rule that refits scale and zero to the codes by least squares, several times.

    The best step is stored.
    """

    def rule(value: torch.Tensor) -> torch.Tensor:
        lo, hi = _ends(value)
        zero, scale = lo, (hi - lo) / _LAST_CODE

        def candidates() -> Iterable[tuple[torch.Tensor, ...]]:
            nonlocal zero, scale
            for _ in range(times + 1):
                half_zero, half_scale = _half(zero), _half(scale)
                stored = _between(value, half_zero, half_scale)
                yield stored, stored
                inverse = torch.where(half_scale > 0, 1.0 / half_scale, 0.0)
                codes = ((value - half_zero) * inverse).round().clamp(0, _LAST_CODE)
                code, mean = codes.mean(-1, keepdim=True), value.mean(-1, keepdim=True)
                spread = (codes - code).square().sum(-1, keepdim=True).clamp_min(1e-12)
                scale = ((codes - code) * (value - mean)).sum(-1, keepdim=True) / spread
                zero = mean - scale * code

        return _best(value, candidates())

    return rule


def within_deviations(count: float) -> Rule:
    """Return the rule whose range is the mean +- `count` standard deviations."""

    def rule(value: torch.Tensor) -> torch.Tensor:
        lo, hi = _ends(value)
        mean = value.mean(-1, keepdim=True)
        reach = count * (value - mean).square().mean(-1, keepdim=True).sqrt()
        lo, hi = torch.maximum(lo, mean - reach), torch.minimum(hi, mean + reach)
        return _between(value, _half(lo), _half((hi - lo) / _LAST_CODE))

    return rule


def rotated(rule: Rule) -> Rule:
    """Return a rule for values rotated by `reference.rotate`."""
    return lambda value: reference.rotate(rule(reference.rotate(value)))


def hadamard(rule: Rule) -> Rule:
    """Return a rule for values rotated by Sylvester's Hadamard matrix.

    Its size is the largest power of two that divides D.
    """

    def rotate(x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-1] & -x.shape[-1]
        step = 1
        while step < size:
            first, second = x.unflatten(-1, (-1, 2, step)).unbind(-2)
            x = torch.stack([first + second, first - second], -2).flatten(-3)
            step *= 2
        return x / size**0.5

    return lambda value: rotate(rule(rotate(value)))


def chosen(value: torch.Tensor) -> torch.Tensor:
    """Store and dequantise as the kernels do."""
    tokens = value.reshape(-1, 1, value.shape[-1])
    _, back = reference.dequantise(reference.quantise(torch.zeros_like(tokens), tokens))
    return back.view_as(value)


FP8, STOCK, OURS, EXACT = "fp8", "stock", "k8v4", "exact"

VALUE_RULES: dict[str, Rule] = {
    FP8: e4m3,
    STOCK: stock,
    "min-max, rounded outwards": covering(0.0),
    "cells": covering(0.5),
    "shrunk, either end": shrunk(rounding=True),
    "shrunk, chosen before rounding": shrunk(rounding=False),
    "shrunk, both ends alike": shrunk(rounding=True, ends=[(part, part) for part in _SHRUNK]),
    "refitted once": refitted(1),
    "refitted three times": refitted(3),
    "mean +- 3 deviations": within_deviations(3.0),
    OURS: chosen,
    "Hadamard, min-max": hadamard(covering(0.0)),
    "rotated, cells": rotated(covering(0.5)),
    "rotated, shrunk": rotated(shrunk(rounding=True)),
    "rotated, refitted once": rotated(refitted(1)),
}
"""`k8v4` is what the kernels store: rotated, min-max, rounded outwards."""


def exact(value: torch.Tensor) -> torch.Tensor:
    """Store without error: the remaining error of attention is that of the keys."""
    return value


MAIN_RULES: dict[str, Rule] = {STOCK: stock, OURS: chosen, EXACT: exact}
"""The rules that are measured on many samples."""


def head_scaled(key: torch.Tensor) -> torch.Tensor:
    """Store e4m3 keys [L, H, D] times a power of two of their head, which queries undo.

    The largest key of the head is then in the upper half of e4m3's range.
    """
    largest = key.abs().amax((0, 2), keepdim=True)
    power = torch.exp2(torch.floor(torch.log2(448.0 / largest)))
    return e4m3(key * power) / power


KEY_RULES: dict[str, Rule] = {"e4m3": e4m3, "e4m3 with a scale of the head": head_scaled}
