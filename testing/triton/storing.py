# SPDX-License-Identifier: Apache-2.0
"""Store with the kernel and with the reference; run where Triton interprets."""

from __future__ import annotations

import math
from typing import Any

import torch

from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.k8v4 import Layout
from vllm_hybrid_kv.kernels.triton import quantise_and_store

UNTOUCHED = 0xA5


class Pages:
    """A cache whose blocks stand `padding` bytes apart, in memory that goes on at both ends."""

    def __init__(
        self, blocks: int, heads: int, page_size: int, head_size: int, padding: int = 0
    ) -> None:
        shape = (blocks, heads, page_size, k8v4.slot_bytes(head_size))
        block_bytes = math.prod(shape[1:])
        size = 64 + blocks * (block_bytes + padding) + 64
        self.memory = torch.full((size,), UNTOUCHED, dtype=torch.uint8)
        self.cache = self.memory.as_strided(
            shape, (block_bytes + padding, page_size * shape[3], shape[3], 1), 64
        )


def differing_bytes(
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    page_size: int = 16,
    padding: int = 0,
    blocks: int | None = None,
    **options: Any,
) -> int:
    """Number of bytes of the whole memory in which kernel and reference differ."""
    _, heads, head_size = key.shape
    if blocks is None:
        blocks = int(slots.max()) // page_size + 1 if len(slots) else 1
    found, expected = (Pages(max(1, blocks), heads, page_size, head_size, padding) for _ in "ab")
    count = len(slots)
    quantised = reference.quantise(key[:count], value[:count])
    reference.store(quantised, expected.cache, slots, Layout.LINEAR)
    quantise_and_store(key, value, found.cache, slots, **options)
    return int((found.memory != expected.memory).sum())


def random_rows(
    count: int, heads: int, head_size: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of every size from 1e-6 to 1e5, a third of them far from zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, count, heads, head_size, generator=generator)
    sizes = torch.logspace(-6, 5, count)[torch.randperm(count, generator=generator)]
    rows *= sizes[:, None, None]
    rows[:, ::3] += 7 * sizes[::3, None, None]
    key, value = rows.to(dtype)
    return key, value


def all_sixteen_bit_numbers(dtype: torch.dtype, head_size: int) -> int:
    """Differing bytes where each number of a 16-bit dtype is a key and a value of some row.

    But for bf16's denormals as values: Triton's interpreter widens 254 of them to other numbers.
    """
    numbers = torch.arange(65536).to(torch.int16).view(dtype)
    numbers = numbers[: 65536 // (8 * head_size) * 8 * head_size]
    # In order, where neighbours span little; shuffled, where most rows hold a NaN or an infinity.
    mixed = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))]
    count = 0
    for rows in (numbers, mixed):
        key = rows.view(-1, 8, head_size)
        value = key.flip(0)
        if dtype is torch.bfloat16:
            value = value.masked_fill(value.abs() < torch.finfo(dtype).smallest_normal, 0.0)
        count += differing_bytes(key, value, torch.arange(len(key)))
    return count


def around_every_key_code() -> int:
    """Differing bytes for float32 keys at, just below and just above every rounding boundary."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    points = torch.cat([codes, middles])
    near = torch.cat(
        [points, *(torch.nextafter(points, torch.tensor(s * math.inf)) for s in (1, -1))]
    )
    keys = torch.cat([near, -near, torch.tensor([1e30, -1e30, 448.1, -464.0, 1e-40])])
    keys = torch.cat([keys, torch.zeros(-len(keys) % 64)]).view(-1, 1, 64)
    return differing_bytes(keys, keys, torch.arange(len(keys)))


def past_two_gigabytes() -> bool:
    head_size, heads, page_size, stride = 64, 2, 16, 2**30 + 4096
    slot = k8v4.slot_bytes(head_size)
    # Only the pages of memory that are written exist.
    memory = torch.empty(4 * stride, dtype=torch.uint8)
    cache = memory.as_strided((4, heads, page_size, slot), (stride, page_size * slot, slot, 1))
    cache.fill_(UNTOUCHED)
    key, value = random_rows(14, heads, head_size, torch.bfloat16)
    slots = torch.cat([torch.arange(3 * page_size + 5, 4 * page_size), torch.tensor([2, 37, -1])])
    expected = Pages(4, heads, page_size, head_size)
    reference.store(reference.quantise(key, value), expected.cache, slots, Layout.LINEAR)
    quantise_and_store(key, value, cache, slots)
    return torch.equal(cache, expected.cache)


def strided(dtype: torch.dtype, head_size: int) -> list[int]:
    """Differing bytes for heads of a fused projection, turned rows and one shared head."""
    tokens, heads = 21, 2
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(tokens, 7 * heads * head_size, generator=generator).to(dtype)
    parts = fused.view(tokens, 7, heads, head_size)
    turned = torch.randn(2, heads, head_size, tokens, generator=generator).to(dtype)
    shared = torch.randn(2, tokens, 1, head_size, generator=generator).to(dtype)
    pairs = [
        (parts[:, 3], parts[:, 4]),
        tuple(turned.permute(0, 3, 1, 2)),
        tuple(shared.expand(2, tokens, heads, head_size)),
        (parts[:, 3].contiguous(), parts[:, 6]),
    ]
    slots = torch.arange(tokens).repeat_interleave(2)[::2]
    return [differing_bytes(key, value, slots) for key, value in pairs]


def refusal(changed: dict[str, Any]) -> str:
    """The message with which a call is refused; it has written nothing."""
    rows = torch.ones(5, 2, 64, dtype=torch.bfloat16)
    arguments = {
        "key": rows,
        "value": rows,
        "cache": torch.zeros(3, 2, 16, 100, dtype=torch.uint8),
        "slot_mapping": torch.arange(5),
    } | changed
    try:
        quantise_and_store(**arguments)
    except ValueError as error:
        assert not arguments["cache"].any()
        return str(error)
    return "not refused"
