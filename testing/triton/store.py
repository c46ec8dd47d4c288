# SPDX-License-Identifier: Apache-2.0
"""Make rows to store, and count the bytes in which the kernel and the reference differ."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.k8v4 import Layout
from vllm_hybrid_kv.kernels.triton import quantise_and_store

UNWRITTEN = 0xA5
"""The byte that fills memory before a call."""

Rows = tuple[torch.Tensor, torch.Tensor]
"""Keys and values [tokens, heads, D]."""


def pages(
    blocks: int, heads: int, page_size: int, head_size: int, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory and a cache in it, with `padding` bytes between blocks and 64 at each end."""
    slot = k8v4.slot_bytes(head_size)
    stride = heads * page_size * slot + padding
    memory = torch.full((64 + blocks * stride + 64,), UNWRITTEN, dtype=torch.uint8)
    strides = (stride, page_size * slot, slot, 1)
    return memory, memory.as_strided((blocks, heads, page_size, slot), strides, 64)


def differing_bytes(
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    page_size: int = 16,
    padding: int = 0,
) -> int:
    """Store rows with kernel and reference; count differing bytes, also around the pages."""
    count, (_, heads, head_size) = len(slots), key.shape
    blocks = max(1, int(slots.max()) // page_size + 1) if count else 1
    expected, cache = pages(blocks, heads, page_size, head_size, padding)
    found = expected.to(key.device, copy=True)
    quantise_and_store(
        key, value, found.as_strided(cache.shape, cache.stride(), 64), slots.to(key.device)
    )
    quantised = reference.quantise(key[:count].cpu(), value[:count].cpu())
    reference.store(quantised, cache, slots, Layout.LINEAR)
    return int((found.cpu() != expected).sum())


def random_rows(count: int, heads: int, head_size: int, dtype: torch.dtype) -> Rows:
    """Return random rows of sizes from 1e-6 to 1e5, a third of which are shifted away from zero."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, count, heads, head_size, generator=generator)
    sizes = torch.logspace(-6, 5, count)[torch.randperm(count, generator=generator)]
    rows *= sizes[:, None, None]
    rows[:, ::3] += 7 * sizes[::3, None, None]
    key, value = rows.to(dtype)
    return key, value


def rows_of_all_numbers(head_size: int, dtype: torch.dtype) -> Rows:
    """Return rows that hold every number of a 16-bit dtype, first in order and then shuffled.

    In order, the numbers of a row are close. Shuffled, most rows hold a NaN or an infinity.
    """
    numbers = torch.arange(65536).to(torch.int16).view(dtype)
    numbers = numbers[: 65536 // (8 * head_size) * 8 * head_size]
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    ordered, shuffled = (x.view(-1, 8, head_size) for x in (numbers, numbers[order]))
    return torch.cat([ordered, shuffled]), torch.cat([ordered.flip(0), shuffled.flip(0)])


def special_rows(head_size: int, dtype: torch.dtype) -> Rows:
    """Return rows with a NaN or an infinity, constant rows, huge rows, and zeros of both signs.

    The huge rows exceed what a scale can hold, some of them only after the rotation.
    """
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 22, 2, head_size, generator=generator)
    for row, number in enumerate((math.nan, -math.nan, math.inf, -math.inf)):
        key[row, 0, 5] = number
        value[4 + row, 1, head_size - 1] = number
    for row, number in enumerate((0.0, -0.0, 1.0, -3.5, 1e-9, -1e-9, 65504.0, 1e9, 0.1)):
        key[8 + row], value[8 + row] = number, number
    key[17], value[17] = 0.0, 0.0
    key[17, :, ::2], value[17, :, ::2] = -0.0, -0.0
    key[18], value[18] = 3e38 * key[18].sign(), 3e38 * value[18].sign()
    key[19], value[19] = 3e38, -3e38
    key[20], value[20] = k8v4.KEY_MAX * 0.9, k8v4.VALUE_MAX * 0.9
    key[21], value[21] = math.inf, -math.inf
    return key.to(dtype), value.to(dtype)


ROWS: dict[str, Callable[[int, torch.dtype], Rows]] = {
    "of all sizes": lambda head_size, dtype: random_rows(300, 3, head_size, dtype),
    "of all 16-bit numbers": rows_of_all_numbers,
    "with NaN and infinity": special_rows,
}
"""Functions that make rows of a head size and a dtype, by the name of the rows."""
