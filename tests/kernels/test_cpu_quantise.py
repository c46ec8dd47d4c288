# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel stores the bits that `reference.quantise` and `reference.store` do, no others."""

import math
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.cpu import quantise as module
from vllm_hybrid_kv.kernels.cpu import quantise_and_store

HEAD_SIZES = [64, 72, 80, 96, 112, 128, 160, 192, 256, 512]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
UNTOUCHED = 0xA5


class Pages:
    """A cache whose blocks stand `padding` bytes apart, in memory that goes on at both ends."""

    def __init__(
        self, blocks: int, heads: int, page_size: int, head_size: int, padding: int = 0
    ) -> None:
        self.head_size = head_size
        self.page_size = page_size
        shape = (blocks, heads, page_size, k8v4.slot_bytes(head_size))
        block_bytes = math.prod(shape[1:])
        self.memory = torch.full((64 + blocks * (block_bytes + padding) + 64,), UNTOUCHED).to(
            torch.uint8
        )
        self.cache = self.memory[64:].as_strided(
            shape, (block_bytes + padding, page_size * shape[3], shape[3], 1), 64
        )

    def slots(self) -> int:
        return self.cache.shape[0] * self.page_size


def stored_like_the_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    page_size: int = 16,
    padding: int = 0,
    blocks: int | None = None,
) -> bool:
    """Store with the kernel and with the reference; whether all of the memory is the same."""
    _, heads, head_size = key.shape
    if blocks is None:
        blocks = max(1, -(-(int(slots.max()) + 1) // page_size)) if len(slots) else 1
    found, expected = (Pages(blocks, heads, page_size, head_size, padding) for _ in range(2))
    count = len(slots)
    reference.store(
        reference.quantise(key[:count], value[:count]),
        expected.cache,
        slots,
        k8v4.cpu_layout(head_size),
    )
    quantise_and_store(key, value, found.cache, slots)
    return torch.equal(found.memory, expected.memory)


def random_rows(
    count: int, heads: int, head_size: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, count, heads, head_size, generator=generator)
    return (key * 3).to(dtype), value.to(dtype)


def consecutive(count: int, slots: int) -> torch.Tensor:
    return torch.arange(count)


def off_the_tile(count: int, slots: int) -> torch.Tensor:
    return torch.arange(3, count + 3)


def backwards(count: int, slots: int) -> torch.Tensor:
    return torch.arange(count + 3, 3, -1)


def shuffled(count: int, slots: int) -> torch.Tensor:
    return torch.randperm(slots, generator=torch.Generator().manual_seed(5))[:count]


def with_holes(count: int, slots: int) -> torch.Tensor:
    found = torch.arange(count)
    found[::7] = -1
    found[-1] = -(2**40)
    return found


def runs_of_different_blocks(count: int, slots: int) -> torch.Tensor:
    """Like a batch of prefills: runs of 4 to 11 tokens in blocks that do not follow each other."""
    starts = torch.randperm(slots // 12, generator=torch.Generator().manual_seed(6))
    runs = [torch.arange(int(s) * 12, int(s) * 12 + 4 + i % 8) for i, s in enumerate(starts)]
    return torch.cat(runs)[:count]


PATTERNS: list[Callable[[int, int], torch.Tensor]] = [
    consecutive,
    off_the_tile,
    backwards,
    shuffled,
    with_holes,
    runs_of_different_blocks,
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.__name__)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("page_size", [16, 112])
def test_stores_the_bits_of_the_reference_in_every_page_and_order_of_slots(
    pattern: Callable[[int, int], torch.Tensor], head_size: int, page_size: int
) -> None:
    blocks = max(2, -(-150 // page_size))
    for i, dtype in enumerate(DTYPES):
        key, value = random_rows(61, 3, head_size, dtype, seed=i)
        slots = pattern(61, blocks * page_size)
        assert stored_like_the_reference(key, value, slots, page_size, 40 * i + i, blocks)


@pytest.mark.parametrize(("head_size", "page_size"), [(64, 2768), (72, 1056), (256, 528)])
def test_stores_the_bits_of_the_reference_in_large_pages(head_size: int, page_size: int) -> None:
    key, value = random_rows(40, 2, head_size, torch.bfloat16)
    slots = torch.cat([torch.arange(page_size - 20, page_size + 10), torch.arange(10)])
    assert stored_like_the_reference(key, value, slots, page_size)


TIES = [(2.0**e) * (1 + (2 * m + 1) / 16) for e in range(-6, 9) for m in range(8)]
TIES += [(2 * m + 1) * 2.0**-10 for m in range(8)]
SPECIAL = [0.0, math.inf, math.nan, 448.0, 449.0, 464.0, 480.0, 3e38, 1e-45, 1e-40, 65504.0]
SPECIAL += [65519.0, 65520.0, 1e5, 2.0**-14, 2.0**-24, 2.0**-25, 6.1e-5]


def adversarial_row(kind: str, head_size: int, random: np.random.Generator) -> np.ndarray:
    if kind == "any bits":
        bits = random.integers(0, 2**32, head_size, dtype=np.uint32)
        return bits.view(np.float32)
    if kind == "any finite bits":
        bits = random.integers(0, 2**32, head_size, dtype=np.uint32)
        row = bits.view(np.float32)
        return np.where(np.isfinite(row), row, np.float32(1))
    if kind == "ties of keys":
        row = random.choice(TIES, head_size).astype(np.float32)
        nudge = random.integers(-1, 2, head_size).astype(np.int32)
        return (row.view(np.int32) + nudge).view(np.float32) * random.choice([-1, 1], head_size)
    if kind == "half steps of values":
        exponent = random.integers(-18, 9)
        steps = random.integers(0, 31, head_size) / 2
        steps[0], steps[1] = 0, 15
        zero = float(random.integers(-300, 300))
        row = ((zero + steps) * 2.0**exponent).astype(np.float32)
        nudge = random.integers(-1, 2, head_size) * random.integers(0, 2)
        return (row.view(np.int32) + nudge.astype(np.int32)).view(np.float32)
    if kind == "special":
        return (random.choice(SPECIAL, head_size) * random.choice([-1, 1], head_size)).astype(
            np.float32
        )
    if kind == "constant":
        number = random.choice([*SPECIAL, *TIES, 0.1, 1000.3])
        return np.full(head_size, number * random.choice([-1, 1]), np.float32)
    if kind == "denormals":
        bits = random.integers(0, 2**24, head_size, dtype=np.uint32)
        bits |= random.integers(0, 2, head_size, dtype=np.uint32) << 31
        return bits.view(np.float32)
    spread = 10.0 ** random.integers(-9, 6)
    offset = random.normal() * 10.0 ** random.integers(-9, 5)
    return (offset + spread * random.normal(size=head_size)).astype(np.float32)


KINDS = [
    "any bits",
    "any finite bits",
    "ties of keys",
    "half steps of values",
    "special",
    "constant",
    "denormals",
    "offset and spread",
]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(HEAD_SIZES),
    st.sampled_from(DTYPES),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=9),
    st.integers(0, 20),
    st.integers(0, 2**32 - 1),
)
def test_stores_the_bits_of_the_reference_for_the_hardest_numbers(
    head_size: int, dtype: torch.dtype, kinds: list[str], first_slot: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    shape = (len(kinds), 1, head_size)
    with np.errstate(all="ignore"):
        rows = [
            np.stack([adversarial_row(kind, head_size, random) for kind in kinds]) for _ in range(2)
        ]
    key, value = (torch.from_numpy(x.astype(np.float32)).to(dtype).reshape(shape) for x in rows)
    slots = torch.arange(first_slot, first_slot + len(kinds))
    assert stored_like_the_reference(key, value, slots)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stores_the_bits_of_the_reference_for_all_16_bit_numbers(dtype: torch.dtype) -> None:
    every = torch.arange(65536).to(torch.int16).view(dtype)
    key = every.reshape(-1, 1, 128)
    # Beside each number its own constant rows and rows of its neighbours.
    value = every.reshape(-1, 1, 128)
    assert stored_like_the_reference(key, value, torch.arange(len(key)), page_size=512)
    constant = every[:, None, None].expand(-1, 1, 64)[::7]
    assert stored_like_the_reference(constant, constant, torch.arange(len(constant)), 512)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [64, 72, 256])
def test_views_of_a_fused_tensor_and_of_any_other_strides_are_read_right(
    dtype: torch.dtype, head_size: int
) -> None:
    tokens, heads = 21, 2
    width = heads * head_size
    generator = torch.Generator().manual_seed(2)
    fused = torch.randn(tokens, 5 * width, generator=generator).to(dtype)
    key, value = (
        fused[:, i * width : (i + 1) * width].view(tokens, heads, head_size) for i in (3, 4)
    )
    slots = torch.arange(tokens)
    assert stored_like_the_reference(key, value, slots)
    turned = torch.randn(2, heads, head_size, tokens, generator=generator).to(dtype)
    key, value = turned.permute(0, 3, 1, 2)
    assert key.stride(2) != 1
    assert stored_like_the_reference(key, value, slots)
    heads_first = torch.randn(2, heads, tokens, head_size, generator=generator).to(dtype)
    key, value = heads_first.transpose(1, 2)
    assert stored_like_the_reference(key, value, slots)
    assert stored_like_the_reference(key.contiguous(), value, slots)
    assert stored_like_the_reference(key, value.contiguous(), slots)
    one_head = torch.randn(2, tokens, 1, head_size, generator=generator).to(dtype)
    key, value = one_head.expand(2, tokens, heads, head_size)
    assert stored_like_the_reference(key, value, slots)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_what_stands_beside_a_row_in_memory_does_not_change_what_is_stored_of_it(
    dtype: torch.dtype, head_size: int
) -> None:
    key, value = random_rows(21, 2, head_size, dtype)
    between = torch.full((2, 21, 2, head_size + 32), math.nan, dtype=dtype)
    between[..., 16 : 16 + head_size] = torch.stack((key, value))
    apart_key, apart_value = between[..., 16 : 16 + head_size]
    slots = torch.arange(1, 22)
    assert stored_like_the_reference(apart_key, apart_value, slots)


def test_tokens_after_the_end_of_the_slot_mapping_are_padding() -> None:
    key, value = random_rows(40, 2, 64, torch.bfloat16)
    key[19:], value[19:] = math.nan, math.nan
    assert stored_like_the_reference(key, value, torch.arange(19))


@pytest.mark.parametrize("count", [0, 6])
def test_no_token_or_only_negative_slots_leave_every_byte_as_it_was(count: int) -> None:
    pages = Pages(2, 2, 16, 64, padding=3)
    key, value = random_rows(6, 2, 64, torch.float32)
    quantise_and_store(key, value, pages.cache, torch.full((count,), -1))
    assert bool((pages.memory == UNTOUCHED).all())


def test_no_token_at_all_is_stored_as_nothing() -> None:
    pages = Pages(2, 2, 16, 64)
    empty = torch.empty(0, 2, 64, dtype=torch.bfloat16)
    quantise_and_store(empty, empty, pages.cache, torch.empty(0, dtype=torch.int64))
    assert bool((pages.memory == UNTOUCHED).all())


def test_slots_of_32_bits_and_slots_that_are_not_contiguous_are_read_right() -> None:
    key, value = random_rows(20, 2, 96, torch.bfloat16)
    expected, narrow, strided = (Pages(2, 2, 16, 96) for _ in range(3))
    slots = torch.arange(20) + 5
    quantise_and_store(key, value, expected.cache, slots)
    quantise_and_store(key, value, narrow.cache, slots.to(torch.int32))
    quantise_and_store(key, value, strided.cache, slots.repeat_interleave(3)[::3])
    assert torch.equal(narrow.memory, expected.memory)
    assert torch.equal(strided.memory, expected.memory)


@pytest.mark.parametrize("head_size", [72, 128])
def test_several_threads_store_what_one_does(
    head_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, value = random_rows(700, 3, head_size, torch.bfloat16)
    for pattern in PATTERNS:
        slots = pattern(700, 1600)
        alone, together = (Pages(100, 3, 16, head_size, padding=6) for _ in range(2))
        monkeypatch.setattr(module, "SERIAL_ROWS", 10**9)
        quantise_and_store(key, value, alone.cache, slots)
        monkeypatch.setattr(module, "SERIAL_ROWS", 0)
        quantise_and_store(key, value, together.cache, slots)
        assert torch.equal(together.memory, alone.memory)
    assert stored_like_the_reference(key, value, slots)


def test_offsets_past_2_to_the_31_bytes_are_reached() -> None:
    head_size, heads, page_size, stride = 64, 2, 16, 2**30 + 4096
    slot_bytes = k8v4.slot_bytes(head_size)
    # Only the pages of memory that are written exist.
    memory = torch.empty(4 * stride, dtype=torch.uint8)
    cache = memory.as_strided(
        (4, heads, page_size, slot_bytes), (stride, page_size * slot_bytes, slot_bytes, 1)
    )
    cache.fill_(UNTOUCHED)
    key, value = random_rows(14, heads, head_size, torch.bfloat16)
    slots = torch.cat([torch.arange(3 * page_size + 5, 4 * page_size), torch.tensor([2, 37, -1])])
    expected = Pages(4, heads, page_size, head_size)
    reference.store(
        reference.quantise(key, value), expected.cache, slots, k8v4.cpu_layout(head_size)
    )
    quantise_and_store(key, value, cache, slots)
    assert torch.equal(cache, expected.cache)


OLD_CPU = """
import torch
from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.cpu import quantise_and_store
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    numbers = torch.arange(65536).to(torch.int16)
    numbers = numbers.to(torch.int32) << 16 if dtype is torch.float32 else numbers
    random = torch.randn(2**14, generator=torch.Generator().manual_seed(0)).to(dtype)
    for rows in (numbers.view(dtype), random):
        for head_size in (72, 128):
            key = rows[: len(rows) // (2 * head_size) * 2 * head_size].view(-1, 2, head_size)
            slots = torch.arange(len(key)) + 3
            layout = k8v4.cpu_layout(head_size)
            shape = (32, 2, 16, k8v4.slot_bytes(head_size))
            found, expected = torch.zeros(2, *shape, dtype=torch.uint8)
            for rows_at_hand, slots_at_hand in zip(key.split(100), slots.split(100)):
                quantised = reference.quantise(rows_at_hand, rows_at_hand)
                reference.store(quantised, expected, slots_at_hand, layout)
                quantise_and_store(rows_at_hand, rows_at_hand, found, slots_at_hand)
            assert torch.equal(found, expected), (dtype, head_size)
print("the same")
"""


def test_a_cpu_with_none_of_the_newer_instructions_stores_the_same_bits() -> None:
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    result = subprocess.run(
        [sys.executable, "-c", OLD_CPU], env=environment, capture_output=True, text=True
    )
    assert result.stdout == "the same\n", result.stderr
