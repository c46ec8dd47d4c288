# SPDX-License-Identifier: Apache-2.0
"""Quantisation errors stay within the bounds derived in docs/format.md; special cases are exact."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.reference import Quantised, dequantise, quantise, rotate

ROUNDING = 2.0**-24
"""Largest relative error of one float32 operation."""

HALF_STEP = 0.5 + 46 * ROUNDING
STAGE_ERROR = 5.01 * ROUNDING
"""Relative to the norm of the numbers that a stage of the rotation mixes."""
UNDERFLOW = 2.0**-146

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


FINITE_KEYS = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()


def nearest_key_code(x: float) -> int:
    """Return the finite code nearest to x, the even one of two at the same distance."""
    distance = np.abs(FINITE_KEYS - min(abs(x), 448.0))
    nearest = [int(c) for c in np.flatnonzero(distance == distance.min())]
    code = nearest[0] if len(nearest) == 1 else next(c for c in nearest if c % 2 == 0)
    return code | (0x80 if math.copysign(1.0, x) < 0 else 0)


def keys_only(numbers: torch.Tensor) -> torch.Tensor:
    """Return the key codes of a flat tensor."""
    key = numbers.reshape(-1, 1, 1)
    return quantise(key, torch.zeros_like(key)).key_codes.flatten()


def values_only(rows: torch.Tensor) -> Quantised:
    """Quantise rows [T, D] as the values of one head."""
    value = rows[:, None]
    return quantise(torch.zeros_like(value), value)


def rotated(rows: torch.Tensor) -> torch.Tensor:
    """Return the numbers that are quantised for rows of values, as float64."""
    return rotate(rows.to(torch.float32).clamp(-65504, 65504)).clamp(-65504, 65504).double()


def mixed_dims(head_size: int) -> int:
    """Return how many neighbouring dims the rotation mixes."""
    return 4 ** len(k8v4.rotation_strides(head_size))


def matrix(head_size: int) -> torch.Tensor:
    """Return the rotation as a matrix, built from its definition as a product of stages."""
    stage = torch.full((4, 4), 0.5, dtype=torch.float64) - torch.eye(4, dtype=torch.float64)
    block = torch.ones(1, 1, dtype=torch.float64)
    for _ in k8v4.rotation_strides(head_size):
        block = torch.kron(block, stage)
    return torch.block_diag(*[block] * (head_size // len(block)))


finite32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


def test_ties_between_two_key_codes_round_to_the_even_one() -> None:
    ties = (FINITE_KEYS[1:] + FINITE_KEYS[:-1]) / 2
    middle = torch.tensor(ties, dtype=torch.float32)
    assert torch.equal(middle.to(torch.float64), torch.tensor(ties))  # exact in float32
    lower = torch.arange(126)
    assert torch.equal(keys_only(middle).to(torch.int64), lower + lower % 2)
    below = torch.nextafter(middle, torch.zeros_like(middle))
    above = torch.nextafter(middle, torch.full_like(middle, 1e9))
    assert torch.equal(keys_only(below).to(torch.int64), lower)
    assert torch.equal(keys_only(above).to(torch.int64), lower + 1)
    assert torch.equal(keys_only(-middle), keys_only(middle) | 0x80)


@settings(max_examples=300, deadline=None)
@given(st.lists(finite32s, min_size=1, max_size=64))
def test_a_key_rounds_to_the_nearest_code(numbers: list[float]) -> None:
    stored = keys_only(torch.tensor(numbers, dtype=torch.float32))
    assert stored.tolist() == [nearest_key_code(x) for x in numbers]


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_and_huge_keys_become_448_with_their_sign(dtype: torch.dtype) -> None:
    huge = 3e38 if dtype is not torch.float16 else 65504.0
    numbers = torch.tensor([math.inf, -math.inf, huge, -huge, 449.0, 464.0, 480.0]).to(dtype)
    assert keys_only(numbers).tolist() == [0x7E, 0xFE, 0x7E, 0xFE, 0x7E, 0x7E, 0x7E]


def rows_with_offset() -> st.SearchStrategy[torch.Tensor]:
    """Return rows of 64 numbers around an offset, which decides how the zero rounds to fp16."""
    offsets = st.sampled_from([0.0, 1e-8, -3e-6, 0.1, -1.7, 1000.3, -999.7, 6e4, -65504.0])
    spreads = st.sampled_from([0.0, 1e-45, 1e-30, 1e-9, 6e-8, 1e-3, 1.0, 37.0, 1e4, 1e5, 3e38])
    seeds = st.integers(0, 2**32 - 1)

    def build(offset: float, spread: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
        unit = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (4, 64)))
        return (offset + spread * unit).to(torch.float32).to(dtype)

    return st.builds(build, offsets, spreads, seeds, st.sampled_from(DTYPES))


@settings(max_examples=300, deadline=None)
@given(
    rows_with_offset()
    | st.lists(finite32s, min_size=8, max_size=8).map(
        lambda x: torch.tensor(x, dtype=torch.float32)[None]
    )
)
def test_a_rotated_value_is_within_half_a_step(rows: torch.Tensor) -> None:
    quantised = values_only(rows)
    exact = rotated(rows)
    step = quantised.scale.to(torch.float64)
    zero = quantised.zero.to(torch.float64)
    codes = quantised.value_codes[:, 0].to(torch.float64)
    assert bool((codes <= 15).all())
    assert bool(((exact - (codes * step + zero)).abs() <= HALF_STEP * step + UNDERFLOW).all())


@settings(max_examples=200, deadline=None)
@given(rows_with_offset(), st.sampled_from([64, 72, 80, 128, 192, 256, 512]))
def test_the_error_of_dequantised_values_is_within_the_derived_bound(
    rows: torch.Tensor, head_size: int
) -> None:
    rows = rows.repeat(1, 4)[:, :head_size]
    rows[:, ::7] *= 3
    exact = rows.to(torch.float64).clamp(-65504, 65504)
    quantised = values_only(rows)
    _, back = dequantise(quantised)
    dims = mixed_dims(head_size)
    blocks = exact.unflatten(-1, (-1, dims))
    size = blocks.norm(dim=-1)
    error = (back[:, 0].to(torch.float64).unflatten(-1, (-1, dims)) - blocks).norm(dim=-1)
    rounding = 2 * len(k8v4.rotation_strides(head_size)) * STAGE_ERROR + 2 * ROUNDING
    within_steps = dims**0.5 * (HALF_STEP * quantised.scale.to(torch.float64) + UNDERFLOW)
    bound = (1 + rounding) * within_steps + rounding * size
    # In a block with a larger norm a rotated number may exceed 65504.
    assert bool((error <= bound)[size <= 65504].all())


@pytest.mark.parametrize("head_size", range(64, 257, 8))
def test_the_rotation_is_symmetric_orthogonal_and_spreads_every_number_evenly(
    head_size: int,
) -> None:
    found = rotate(torch.eye(head_size)).double()
    dims = mixed_dims(head_size)
    assert torch.equal(found, matrix(head_size))
    assert torch.equal(found, found.T)
    assert torch.equal(found @ found, torch.eye(head_size, dtype=torch.float64))
    assert torch.equal(found.sum(1), torch.ones(head_size, dtype=torch.float64))
    entries = found.abs().unflatten(0, (-1, dims)).unflatten(2, (-1, dims))
    own = torch.arange(head_size // dims)
    assert bool((entries[own, :, own] == dims**-0.5).all())
    # The next larger block would not divide the head size.
    assert head_size % dims == 0
    assert head_size % (4 * dims) != 0


@pytest.mark.parametrize("head_size", [64, 256])
def test_rotated_values_beyond_the_largest_half_are_clamped_to_it(head_size: int) -> None:
    largest = torch.zeros(1, head_size)
    largest[0, 3] = 1.0
    row = 65504.0 * rotate(largest).sign()
    quantised = values_only(row)
    assert rotated(row).max() == 65504
    assert quantised.value_codes[0, 0].tolist() == [15 * (d == 3) for d in range(head_size)]
    assert bool(quantised.scale.isfinite())
    _, back = dequantise(quantised)
    assert bool(back.isfinite().all())


def neighbour(x: torch.Tensor, towards: float) -> torch.Tensor:
    return torch.from_numpy(np.nextafter(x.numpy(), np.float16(towards)))


@settings(max_examples=300, deadline=None)
@given(rows_with_offset())
def test_zero_and_scale_round_outwards_to_the_nearest_fp16(rows: torch.Tensor) -> None:
    quantised = values_only(rows)
    exact = rotated(rows).to(torch.float32)
    lo, hi = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    zero, scale = quantised.zero, quantised.scale
    assert bool((zero.to(torch.float32) <= lo).all())
    assert bool((neighbour(zero, math.inf).to(torch.float32) > lo).all())
    wanted = (hi - zero.to(torch.float32)) / 15
    assert bool((scale.to(torch.float32) >= wanted).all())
    smaller = neighbour(scale, -math.inf).to(torch.float32)
    assert bool((smaller < wanted)[scale > 0].all())


@settings(max_examples=200, deadline=None)
@given(st.integers(-1000, 1000), st.integers(-10, 5), st.integers(0, 14))
def test_a_value_between_two_codes_rounds_to_the_even_one(
    steps_of_zero: int, exponent: int, code: int
) -> None:
    scale = 2.0**exponent
    zero = steps_of_zero * scale
    wanted = torch.tensor([[zero, zero + 15 * scale, zero + (code + 0.5) * scale, zero]])
    row = rotate(wanted)
    assert torch.equal(rotate(row), wanted)  # all of them multiples of half a step
    quantised = values_only(row)
    assert (float(quantised.scale), float(quantised.zero)) == (scale, zero)
    assert quantised.value_codes.flatten().tolist() == [0, 15, code + code % 2, 0]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 0x7BFF), st.booleans(), st.sampled_from([torch.float16, torch.float32]))
def test_a_constant_that_is_an_fp16_number_is_stored_exactly_with_scale_0(
    bits: int, negative: bool, dtype: torch.dtype
) -> None:
    number = np.array(bits, np.uint16).view(np.float16).astype(np.float32)
    rows = torch.full((1, 64), -float(number) if negative else float(number)).to(dtype)
    quantised = values_only(rows)
    assert quantised.scale.view(torch.int16).tolist() == [[0]]
    assert quantised.value_codes.count_nonzero() == 0
    _, back = dequantise(quantised)
    assert torch.equal(back[:, 0], rows.to(torch.float32))


@pytest.mark.parametrize("row", [[0.0, 1e-45], [0.0, 0.0], [-0.0, -0.0], [0.0, -0.0]])
def test_rows_with_less_spread_than_any_step_are_stored_as_zero_bits(row: list[float]) -> None:
    quantised = values_only(torch.tensor([row * 4]))
    assert quantised.zero.view(torch.int16).tolist() == [[0]]
    assert quantised.scale.view(torch.int16).tolist() == [[0]]
    assert quantised.value_codes.count_nonzero() == 0


def test_infinite_values_become_the_largest_half_with_their_sign() -> None:
    quantised = values_only(torch.tensor([[math.inf, -math.inf, 0.0, 3e38, -3e38]]))
    _, back = dequantise(quantised)
    step = float(quantised.scale)
    assert float(quantised.zero) == -65504
    assert quantised.value_codes.flatten().tolist()[:2] == [15, 0]
    wanted = torch.tensor([65504.0, -65504.0, 0.0, 65504.0, -65504.0])
    assert float((back.flatten() - wanted).abs().max()) <= HALF_STEP * step + 65504 * ROUNDING


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["key", "value"])
def test_a_nan_makes_the_scale_of_its_token_and_head_nan_only(
    dtype: torch.dtype, part: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    key = torch.randn(5, 3, 64, generator=generator).to(dtype)
    value = torch.randn(5, 3, 64, generator=generator).to(dtype)
    clean = quantise(key, value)
    (key if part == "key" else value)[2, 1, 7] = math.nan
    quantised = quantise(key, value)
    nan = torch.zeros(5, 3, dtype=torch.bool)
    nan[2, 1] = True
    assert torch.equal(quantised.scale.isnan(), nan)
    assert quantised.scale.view(torch.int16)[2, 1] == 0x7E00
    assert quantised.zero[2, 1] == 0
    assert quantised.value_codes[2, 1].count_nonzero() == 0
    for stored, expected in zip(quantised, clean, strict=True):
        assert torch.equal(stored[~nan], expected[~nan])
    other_keys = torch.arange(64) != 7
    assert torch.equal(quantised.key_codes[2, 1][other_keys], clean.key_codes[2, 1][other_keys])
    _, back = dequantise(quantised)
    assert torch.equal(back.isnan(), nan[..., None].expand(5, 3, 64))
