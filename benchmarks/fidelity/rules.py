# SPDX-License-Identifier: Apache-2.0
"""Define rules: functions that imitate a cache by quantising and dequantising keys and values.

They take and return float32 [..., D], where a row of D numbers belongs to one token and head. All
caches except e4m3 store keys in 8 bits, values in 4 bits, and four more bytes per token and head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_hybrid_kv.kernels import reference

Rows = Callable[[torch.Tensor], torch.Tensor]

_LAST_CODE = 15


def exact(x: torch.Tensor) -> torch.Tensor:
    return x


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to e4m3fn numbers, like a saturating fp8 cache with a scale of 1."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32)


def min_max(value: torch.Tensor) -> torch.Tensor:
    """Imitate vLLM's `_store_quantized_value`: compute codes, then round the scale to fp16."""
    lo, hi = value.amin(-1, keepdim=True), value.amax(-1, keepdim=True)
    scale = ((hi - lo) / _LAST_CODE).clamp_min(1e-8)
    codes = ((value - lo) / scale + 0.5).floor().clamp(0, _LAST_CODE)
    scale, lo = (x.to(torch.float16).to(torch.float32) for x in (scale, lo))
    return codes * scale + lo


def rotated_min_max(value: torch.Tensor) -> torch.Tensor:
    """Apply `min_max` to values rotated in blocks of the largest power of four that divides D."""
    block = 1
    while value.shape[-1] % (4 * block) == 0:
        block *= 4

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return reference.rotate(x.unflatten(-1, (-1, block))).flatten(-2)

    return rotate(min_max(rotate(value)))


def product_key(key: torch.Tensor) -> torch.Tensor:
    rows = key.reshape(-1, 1, key.shape[-1])
    return reference.dequantise(reference.quantise(rows, torch.zeros_like(rows)))[0].view_as(key)


def product_value(value: torch.Tensor) -> torch.Tensor:
    rows = value.reshape(-1, 1, value.shape[-1])
    stored = reference.dequantise(reference.quantise(torch.zeros_like(rows), rows))[1]
    return stored.view_as(value)


class Rule(NamedTuple):
    """Functions that round keys, values and queries as one cache and its kernels do."""

    key: Rows
    value: Rows
    query: Rows = exact


FP8, VLLM, FORMAT_1, FORMAT_2 = "e4m3", "vLLM's k8v4", "format 1", "format 2"

RULES = {
    FP8: Rule(e4m3, e4m3),
    VLLM: Rule(e4m3, min_max),
    FORMAT_1: Rule(e4m3, rotated_min_max),
    FORMAT_2: Rule(product_key, product_value, reference.round_query),
}
"""Format 2 is what this package stores. Format 1 is what it stored before."""

PARTS = {
    "keys in e4m3": Rule(e4m3, exact),
    "keys of format 2": Rule(product_key, exact),
    "keys and queries of format 2": Rule(product_key, exact, reference.round_query),
    "values of vLLM's k8v4": Rule(exact, min_max),
    "values of format 1": Rule(exact, rotated_min_max),
    "values of format 2": Rule(exact, product_value),
}
"""Rules that round only keys, only keys and queries, or only values."""
