# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel stores exactly the bits of `reference.quantise` and `reference.store`."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.cpu import quantise as module
from vllm_hybrid_kv.kernels.cpu import quantise_and_store

HEAD_SIZES = k8v4.HEAD_SIZES
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
UNTOUCHED = 0xA5


class Pages:
    """A cache with `padding` bytes after each block and 64 bytes of other memory at both ends."""

    def __init__(
        self, blocks: int, heads: int, page_size: int, head_size: int, padding: int = 0
    ) -> None:
        shape = (blocks, heads, page_size, k8v4.slot_bytes(head_size))
        block_bytes = math.prod(shape[1:])
        size = 64 + blocks * (block_bytes + padding) + 64
        self.memory = torch.full((size,), UNTOUCHED, dtype=torch.uint8)
        stride = (block_bytes + padding, page_size * shape[3], shape[3], 1)
        self.cache = self.memory[64:].as_strided(shape, stride, 64)


def store_reference(
    key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
) -> None:
    key, value = key[: len(slots)], value[: len(slots)]
    reference.store(reference.quantise(key, value), cache, slots, k8v4.Layout.CPU_TILED)


def equals_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    page_size: int = 16,
    padding: int = 0,
    blocks: int | None = None,
) -> bool:
    """Store with both the kernel and the reference. Returns whether all memory is equal."""
    _, heads, head_size = key.shape
    if blocks is None:
        blocks = int(slots.max()) // page_size + 1
    stored, expected = (Pages(blocks, heads, page_size, head_size, padding) for _ in range(2))
    store_reference(key, value, expected.cache, slots)
    quantise_and_store(key, value, stored.cache, slots)
    return torch.equal(stored.memory, expected.memory)


def random_rows(
    count: int, heads: int, head_size: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, count, heads, head_size, generator=generator)
    return (key * 3).to(dtype), value.to(dtype)


def with_holes(count: int, slots: int) -> torch.Tensor:
    found = torch.arange(count)
    found[::7] = -1
    found[-1] = -(2**40)
    return found


def like_prefills(count: int, slots: int) -> torch.Tensor:
    """Make runs of 4 to 11 slots at scattered places, like those of several prompts."""
    starts = torch.randperm(slots // 12, generator=torch.Generator())
    runs = [torch.arange(int(s) * 12, int(s) * 12 + 4 + i % 8) for i, s in enumerate(starts)]
    return torch.cat(runs)[:count]


PATTERNS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "consecutive": lambda count, slots: torch.arange(count),
    "not aligned to tiles": lambda count, slots: torch.arange(3, count + 3),
    "backwards": lambda count, slots: torch.arange(count + 3, 3, -1),
    "shuffled": lambda count, slots: torch.randperm(
        slots, generator=torch.Generator().manual_seed(5)
    )[:count],
    "with holes": with_holes,
    "like prefills": like_prefills,
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("page_size", [16, 112])
def test_every_page_size_and_order_of_slots_equals_the_reference(
    pattern: str, head_size: int, page_size: int
) -> None:
    blocks = max(2, -(-150 // page_size))
    for i, dtype in enumerate(DTYPES):
        key, value = random_rows(61, 3, head_size, dtype, seed=i)
        slots = PATTERNS[pattern](61, blocks * page_size)
        assert equals_reference(key, value, slots, page_size, 40 * i + i, blocks)


SPECIAL = [0.0, math.inf, math.nan, 3e38, 1e-45, 1e-40, 65504.0, 65519.0, 65520.0, 1e5]
SPECIAL += [k8v4.KEY_MAX, k8v4.VALUE_MAX, 2.0**18, 2.0**-14, 2.0**-24, 2.0**-25, 6.1e-5]
SPECIAL += [127 * 2.0**-24, 8 * 2.0**-24, 0.1, 1000.3]

Random = np.random.Generator


def rotated(numbers: np.ndarray) -> np.ndarray:
    """Return the row that the kernel rotates to `numbers`: the rotation is its own inverse."""
    return reference.rotate(torch.from_numpy(numbers.astype(np.float32))).numpy()


def neighbours(row: np.ndarray, random: Random) -> np.ndarray:
    """Replace some numbers (or none) by the float32 just below or above."""
    bits = random.integers(-1, 2, row.size) * random.integers(0, 2)
    return (row.astype(np.float32).view(np.int32) + bits.astype(np.int32)).view(np.float32)


def any_bits(size: int, random: Random) -> np.ndarray:
    return random.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)


def half_steps_of_keys(size: int, random: Random) -> np.ndarray:
    steps = random.integers(-254, 255, size) / 2
    steps[random.integers(size)] = 127
    return neighbours(rotated(steps * 2.0 ** random.integers(-24, 16)), random)


def half_steps_of_values(size: int, random: Random) -> np.ndarray:
    steps = random.integers(-15, 16, size) / 2
    steps[random.integers(size)] = random.choice([-8, 8])
    return neighbours(rotated(steps * 2.0 ** random.integers(-24, 16)), random)


def spikes_at_fp16_scales(size: int, random: Random) -> np.ndarray:
    """Make a row that rotates to a single spike, whose scale is an fp16 number or close to it."""
    scale = random.integers(0, 0x7C00, dtype=np.uint16).view(np.float16)
    spike = np.zeros(size)
    spike[random.integers(size)] = float(scale) * random.choice([127, -127, 8, -8])
    return neighbours(rotated(spike), random)


def large_numbers(size: int, random: Random) -> np.ndarray:
    """Make a row of numbers near a limit: one for clamping, or the largest that can be stored."""
    limit = random.choice([2.0**18, k8v4.KEY_MAX, k8v4.VALUE_MAX])
    limit *= random.choice([1.0, size**-0.5, 1 / 16])
    return limit * random.choice([-1, 1], size) * (1 + random.choice([0, 1e-6, 0.1]))


def special_numbers(size: int, random: Random) -> np.ndarray:
    numbers = random.choice(SPECIAL, random.choice([1, size]))
    return np.resize(numbers * random.choice([-1, 1], numbers.size), size)


def denormals(size: int, random: Random) -> np.ndarray:
    bits = random.integers(0, 2**24, size, dtype=np.uint32)
    bits |= random.integers(0, 2, size, dtype=np.uint32) << 31
    return bits.view(np.float32)


def offset_and_spread(size: int, random: Random) -> np.ndarray:
    spread = 10.0 ** random.integers(-9, 6)
    offset = random.normal() * 10.0 ** random.integers(-9, 5)
    return offset + spread * random.normal(size=size)


ROWS = [
    any_bits, half_steps_of_keys, half_steps_of_values, spikes_at_fp16_scales, large_numbers,
    special_numbers, denormals, offset_and_spread,
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(HEAD_SIZES),
    st.sampled_from(DTYPES),
    st.lists(st.sampled_from(ROWS), min_size=1, max_size=9),
    st.integers(0, 20),
    st.integers(0, 2**32 - 1),
)
def test_the_hardest_numbers_equal_the_reference(
    head_size: int, dtype: torch.dtype, rows: list, first_slot: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        numbers = np.stack([[row(head_size, random) for row in rows] for _ in range(2)])
        key, value = torch.from_numpy(numbers.astype(np.float32)).to(dtype)[:, :, None]
    assert equals_reference(key, value, torch.arange(first_slot, first_slot + len(rows)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_numbers_equal_the_reference(dtype: torch.dtype) -> None:
    every = torch.arange(65536).to(torch.int16).view(dtype)
    rows = every.reshape(-1, 1, 128)
    assert equals_reference(rows, rows, torch.arange(len(rows)), page_size=512)
    spikes = torch.zeros(65536, 1, 64, dtype=dtype)
    spikes[:, 0, 5] = every
    assert equals_reference(spikes, spikes, torch.arange(65536), 512)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [64, 72, 256])
def test_keys_and_values_with_any_strides_equal_the_reference(
    dtype: torch.dtype, head_size: int
) -> None:
    tokens, heads = 21, 2
    width = heads * head_size
    generator = torch.Generator().manual_seed(2)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    fused = numbers(tokens, 5 * width)
    views = [
        [fused[:, i * width : (i + 1) * width].view(tokens, heads, head_size) for i in (3, 4)],
        numbers(2, heads, head_size, tokens).permute(0, 3, 1, 2),
        numbers(2, heads, tokens, head_size).transpose(2, 1),
        numbers(2, tokens, 1, head_size).expand(2, tokens, heads, head_size),
    ]
    for key, value in views:
        for pair in ((key, value), (key.contiguous(), value), (key, value.contiguous())):
            assert equals_reference(*pair, torch.arange(tokens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [64, 72, 80, 112, 512])
def test_memory_around_a_row_has_no_effect(dtype: torch.dtype, head_size: int) -> None:
    between = torch.full((2, 21, 2, head_size + 32), math.nan, dtype=dtype)
    between[..., 16 : 16 + head_size] = torch.stack(random_rows(21, 2, head_size, dtype))
    assert equals_reference(*between[..., 16 : 16 + head_size], torch.arange(1, 22))


def test_slots_may_be_32_bit_and_strided() -> None:
    key, value = random_rows(20, 2, 96, torch.bfloat16)
    slots = torch.arange(20) + 5
    assert equals_reference(key, value, slots.to(torch.int32))
    assert equals_reference(key, value, slots.repeat_interleave(3)[::3])


@pytest.mark.parametrize("head_size", [72, 128])
def test_several_threads_store_the_same_bits_as_one(
    head_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, value = random_rows(700, 3, head_size, torch.bfloat16)
    for serial_rows in (10**9, 0):
        monkeypatch.setattr(module, "SERIAL_ROWS", serial_rows)
        for pattern in PATTERNS.values():
            slots = pattern(700, 1600)
            assert equals_reference(key, value, slots, padding=6, blocks=100)


def test_slots_more_than_two_gigabytes_into_the_cache_are_written() -> None:
    head_size, heads, page_size, stride = 64, 2, 16, 2**30 + 4096
    slot_bytes = k8v4.slot_bytes(head_size)
    memory = torch.empty(4 * stride, dtype=torch.uint8)  # only written pages are allocated
    cache = memory.as_strided(
        (4, heads, page_size, slot_bytes), (stride, page_size * slot_bytes, slot_bytes, 1)
    )
    cache.fill_(UNTOUCHED)
    key, value = random_rows(14, heads, head_size, torch.bfloat16)
    slots = torch.cat([torch.arange(3 * page_size + 5, 4 * page_size), torch.tensor([2, 37, -1])])
    expected = Pages(4, heads, page_size, head_size)
    store_reference(key, value, expected.cache, slots)
    quantise_and_store(key, value, cache, slots)
    assert torch.equal(cache, expected.cache)
