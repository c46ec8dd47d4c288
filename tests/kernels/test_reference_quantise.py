# SPDX-License-Identifier: Apache-2.0
"""Quantisation errors stay within bounds derived on paper; special cases are exact.

A stage of radix 4 mixes four numbers, with norm n. Each result takes four rounded operations: two
sums of two numbers (together at most 2n), the sum of these sums (at most 2n), and a difference. For
four results, sums add 8n * 2^-24 to the norm of the error and the differences add 2n * 2^-24.
The results have norm 2n, so the relative error is 5 * 2^-24. A stage of radix 2 has one operation.
Multiplying by the unit rounds twice, because the unit itself is rounded.

Quantising multiplies a number by a factor and rounds. The factor is itself the product of two
rounded numbers. For values, adding the middle code rounds, too. A code is off by up to half a step.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.reference import (
    dequantise,
    quantise,
    rotate,
    rotation_sums,
    round_query,
)

ROUNDING = 2.0**-24
"""Largest relative error of one float32 operation."""

STAGE_ERROR = 5.01 * ROUNDING
"""Largest error of one stage of the rotation, relative to the norm of the numbers it mixes."""

UNDERFLOW = 2.0**-142
"""Float32 may round 1/127 of a smaller number to 0, so error bounds allow an error of this size."""

LEAST_SCALE = 2.0**-24

LEAST_QUERY = 2.0**-119
"""If no sum of a query (see `rotation_sums`) exceeds this, the query counts as zeros."""

DTYPES = [torch.bfloat16, torch.float16, torch.float32]

STEPS = {"key": 127.0, "value": 8.0}
LARGEST_CODE = {"key": 127.0, "value": 7.5}
LIMIT = {part: steps * 65504 for part, steps in STEPS.items()}
HALF_STEP = {"key": 0.5 + 127 * 5 * ROUNDING, "value": 0.5 + (8 * 5 + 16) * ROUNDING}

parts = pytest.mark.parametrize("part", STEPS)


def quantise_rows(rows: torch.Tensor, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows [T, D] as the keys or values of one head.

    Returns:
        Codes as multiples of the scale, float64 [T, D], and the scales, float16 [T, 1].
    """
    rows = rows[:, None]
    zeros = torch.zeros_like(rows)
    stored = quantise(rows, zeros) if part == "key" else quantise(zeros, rows)
    if part == "key":
        return stored.key_codes[:, 0].double(), stored.key_scale
    return stored.value_codes[:, 0].double() - 7.5, stored.value_scale


def read_back(rows: torch.Tensor, part: str) -> torch.Tensor:
    """Quantise rows [T, D] as keys or values, then dequantise them."""
    rows = rows[:, None]
    zeros = torch.zeros_like(rows)
    stored = quantise(rows, zeros) if part == "key" else quantise(zeros, rows)
    return dequantise(stored)[part == "value"][:, 0]


def rotated(rows: torch.Tensor, part: str) -> torch.Tensor:
    """Return rows after rotating and clamping, before rounding to codes, float64 [T, D]."""
    limit = LIMIT[part]
    sums = rotation_sums(rows.to(torch.float32).clamp(-limit, limit)).double()
    return (sums * k8v4.rotation_unit(rows.shape[-1])).clamp(-limit, limit)


def block_of(head_size: int) -> int:
    """Return how many neighbouring dims the rotation mixes: the power of 2 in the head size."""
    return head_size & -head_size


def rotation_error(head_size: int) -> float:
    """Bound the error of one rotation, relative to the norm of a row."""
    return len(k8v4.rotation_stages(head_size)) * STAGE_ERROR + 2.01 * ROUNDING


def matrix(head_size: int) -> torch.Tensor:
    """Build the matrix of the rotation from its definition, a Kronecker product of stages."""
    four = torch.full((4, 4), 0.5, dtype=torch.float64) - torch.eye(4, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    block = torch.ones(1, 1, dtype=torch.float64)
    while 4 * len(block) <= block_of(head_size):
        block = torch.kron(four, block)
    if len(block) < block_of(head_size):
        block = torch.kron(two, block)
    return torch.block_diag(*[block] * (head_size // len(block)))


finite32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rows_with_offset() -> st.SearchStrategy[torch.Tensor]:
    """A hypothesis strategy: 4 rows of 64 numbers around an offset, from subnormal to huge."""
    offsets = st.sampled_from([0.0, 1e-8, -3e-6, 0.1, -1.7, 1000.3, -999.7, 6e4, -65504.0])
    spreads = st.sampled_from([0.0, 1e-45, 1e-30, 1e-9, 6e-8, 1e-3, 1.0, 37.0, 1e4, 1e6, 3e38])
    seeds = st.integers(0, 2**32 - 1)

    def build(offset: float, spread: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
        unit = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (4, 64)))
        return (offset + spread * unit).to(torch.float32).to(dtype).nan_to_num(0.0)

    return st.builds(build, offsets, spreads, seeds, st.sampled_from(DTYPES))


any_rows = rows_with_offset() | st.lists(finite32s, min_size=8, max_size=8).map(
    lambda x: torch.tensor(x, dtype=torch.float32)[None]
)
head_sizes = st.sampled_from([64, 72, 80, 96, 128, 192, 256, 512])


def of_size(rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """Repeat or cut rows to a head size, and triple every seventh number."""
    rows = rows.float().repeat(1, 8)[:, :head_size]
    rows[:, ::7] *= 3
    return rows.clamp(-3e38, 3e38)


@parts
@settings(max_examples=300, deadline=None)
@given(any_rows)
def test_a_rotated_number_is_within_half_a_step(part: str, rows: torch.Tensor) -> None:
    codes, scale = quantise_rows(rows, part)
    step = scale.double()
    assert bool((codes.abs() <= LARGEST_CODE[part]).all())
    error = (rotated(rows, part) - codes * step).abs()
    assert bool((error <= HALF_STEP[part] * step + UNDERFLOW).all())


@parts
@settings(max_examples=300, deadline=None)
@given(any_rows)
def test_a_scale_is_the_smallest_fp16_number_that_spans_the_row(
    part: str, rows: torch.Tensor
) -> None:
    _, scale = quantise_rows(rows, part)
    wanted = rotated(rows, part).abs().amax(-1, keepdim=True) / STEPS[part]
    tolerance = 3 * ROUNDING * wanted + UNDERFLOW
    assert bool((scale.double() >= wanted - tolerance).all())
    smaller = torch.from_numpy(np.nextafter(scale.numpy(), np.float16(-math.inf))).double()
    assert bool((smaller < wanted + tolerance)[scale > 0].all())
    # Therefore a bound of half a step needs only the row's largest number, not the stored scale.
    half_step = 0.5 * (wanted * (1 + 2.0**-10) + LEAST_SCALE)
    assert bool((0.5 * scale.double() <= half_step + tolerance).all())


@parts
@settings(max_examples=200, deadline=None)
@given(rows_with_offset(), head_sizes)
def test_the_error_of_dequantised_rows_is_within_the_derived_bound(
    part: str, rows: torch.Tensor, head_size: int
) -> None:
    rows = of_size(rows, head_size)
    limit = LIMIT[part]
    dims = block_of(head_size)
    exact = rows.double().clamp(-limit, limit)
    blocks = exact.unflatten(-1, (-1, dims))
    size = blocks.norm(dim=-1)
    _, scale = quantise_rows(rows, part)
    error = (read_back(rows, part).double().unflatten(-1, (-1, dims)) - blocks).norm(dim=-1)
    rounding = rotation_error(head_size)
    within_steps = dims**0.5 * (HALF_STEP[part] * scale.double() + UNDERFLOW)
    bound = (1 + rounding) * within_steps + 2 * rounding * size
    # If the norm of a block exceeds the limit, its rotated numbers may be clamped.
    assert bool((error <= bound)[size <= limit].all())


@pytest.mark.parametrize("head_size", k8v4.HEAD_SIZES)
def test_the_rotation_is_symmetric_orthogonal_and_spreads_every_number_evenly(
    head_size: int,
) -> None:
    found = rotate(torch.eye(head_size))
    dims = block_of(head_size)
    exact = matrix(head_size)
    assert torch.equal(found, exact.float())
    assert torch.equal(exact, exact.T)
    torch.testing.assert_close(exact @ exact, torch.eye(head_size, dtype=torch.float64))
    entries = found.abs().unflatten(0, (-1, dims)).unflatten(2, (-1, dims))
    own = torch.arange(head_size // dims)
    assert bool((entries[own, :, own] == torch.tensor(dims**-0.5)).all())
    assert k8v4.rotation_unit(head_size) == dims**-0.5


@settings(max_examples=200, deadline=None)
@given(rows_with_offset(), st.sampled_from(k8v4.HEAD_SIZES))
def test_the_rotation_equals_its_matrix_and_is_its_own_inverse(
    rows: torch.Tensor, head_size: int
) -> None:
    rows = of_size(rows, head_size).clamp(-1e30, 1e30)
    exact = rows.double() @ matrix(head_size)
    size = rows.double().norm(dim=-1)
    once = rotate(rows)
    error = (once.double() - exact).norm(dim=-1)
    assert bool((error <= rotation_error(head_size) * size + UNDERFLOW).all())
    error = (rotate(once).double() - rows.double()).norm(dim=-1)
    assert bool((error <= 2.01 * rotation_error(head_size) * size + 2 * UNDERFLOW).all())


@parts
@pytest.mark.parametrize("head_size", [64, 72, 256, 512])
def test_rotated_numbers_beyond_the_largest_scale_are_clamped_to_it(
    part: str, head_size: int
) -> None:
    spike = torch.zeros(1, head_size)
    spike[0, 3] = 1.0
    row = LIMIT[part] * rotate(spike).sign()
    codes, scale = quantise_rows(row, part)
    assert float(scale) == 65504
    zero = 0.0 if part == "key" else 0.5  # halfway between codes 7 and 8, so the even one
    expected = [LARGEST_CODE[part] if d == 3 else zero for d in range(head_size)]
    assert codes[0].tolist() == expected
    assert bool(read_back(row, part).isfinite().all())


@parts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [64, 72, 128])
def test_infinite_numbers_are_stored_like_the_largest_ones(
    part: str, dtype: torch.dtype, head_size: int
) -> None:
    generator = torch.Generator().manual_seed(head_size)
    rows = torch.randn(5, head_size, generator=generator).to(dtype)
    rows[0, 3] = rows[1, 0] = rows[1, 9] = rows[2, :7] = rows[3] = math.inf
    rows[4] = math.inf
    rows[1, 9] = rows[4, ::2] = -math.inf
    limit = LIMIT[part]
    codes, scale = quantise_rows(rows, part)
    expected_codes, expected_scale = quantise_rows(rows.float().clamp(-limit, limit), part)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)
    assert bool(scale.isfinite().all())
    assert bool(read_back(rows, part).isfinite().all())
    assert bool((scale[2:].float() > 20_000).all())


@parts
@settings(max_examples=200, deadline=None)
@given(st.integers(-10, 5), st.integers(0, 253))
def test_a_number_between_two_codes_rounds_to_the_even_one(
    part: str, exponent: int, number: int
) -> None:
    most, last, scale = STEPS[part], LARGEST_CODE[part], 2.0**exponent
    code = number % int(2 * last) - last  # any code but the last
    wanted = torch.tensor([[most, code + 0.5, -most, code]]) * scale
    row = rotate(wanted)
    assert torch.equal(rotate(row), wanted)  # exact for multiples of half a step
    codes, stored_scale = quantise_rows(row, part)
    assert float(stored_scale) == scale
    stored = code + 7.5 if part == "value" else code  # an integer
    assert codes.flatten().tolist() == [last, code + stored % 2, -last, code]


@pytest.mark.parametrize("row", [[0.0, 0.0], [-0.0, -0.0], [0.0, -0.0]])
def test_zeros_are_stored_with_scale_0_and_read_as_zeros(row: list[float]) -> None:
    rows = torch.tensor([[row * 32]])
    stored = quantise(rows, rows)
    for scale in (stored.key_scale, stored.value_scale):
        assert scale.view(torch.int16).tolist() == [[0]]
    assert stored.key_codes.count_nonzero() == 0
    assert bool((stored.value_codes == 8).all())
    assert not any(numbers.any() for numbers in dequantise(stored))


@pytest.mark.parametrize("dtype", DTYPES)
@parts
def test_a_nan_gives_its_token_and_head_nan_scales_and_the_codes_of_zeros(
    dtype: torch.dtype, part: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    key = torch.randn(5, 3, 64, generator=generator).to(dtype)
    value = torch.randn(5, 3, 64, generator=generator).to(dtype)
    clean = quantise(key, value)
    (key if part == "key" else value)[2, 1, 7] = math.nan
    stored = quantise(key, value)
    nan = torch.zeros(5, 3, dtype=torch.bool)
    nan[2, 1] = True
    for scale in (stored.key_scale, stored.value_scale):
        assert torch.equal(scale.isnan(), nan)
        assert scale.view(torch.int16)[2, 1] == 0x7E00
    assert stored.key_codes[2, 1].count_nonzero() == 0
    assert bool((stored.value_codes[2, 1] == 8).all())
    for found, expected in zip(stored, clean, strict=True):
        assert torch.equal(found[~nan], expected[~nan])
    for numbers in dequantise(stored):
        assert torch.equal(numbers.isnan(), nan[..., None].expand(5, 3, 64))


def query_step(rows: torch.Tensor) -> torch.Tensor:
    """Return, for each query row, how large one step of its codes is, float64 [T, 1]."""
    sums = rotation_sums(rows.float()).double().abs().amax(-1, keepdim=True)
    return sums * k8v4.rotation_unit(rows.shape[-1]) / 127


@settings(max_examples=200, deadline=None)
@given(rows_with_offset(), head_sizes)
def test_a_rotated_query_has_at_most_127_steps_and_errors_of_half_a_step(
    rows: torch.Tensor, head_size: int
) -> None:
    query = of_size(rows, head_size).clamp(-1e15, 1e15)
    exact = query.double() @ matrix(head_size)
    found = round_query(query).double() @ matrix(head_size)
    step = query_step(query)
    slack = 2.01 * rotation_error(head_size) * query.double().norm(dim=-1, keepdim=True)
    error = (found - exact).abs()
    assert bool((error <= (0.5 + 127 * 4 * ROUNDING) * step + slack + LEAST_QUERY).all())
    codes = found / step.clamp_min(1e-300)
    is_large = step[:, 0] > 1e-30
    assert bool(((codes - codes.round()).abs() < 0.01)[is_large].all())
    assert bool((codes.abs().amax(-1).round() == 127)[is_large].all())


def test_a_query_with_a_nan_or_an_infinity_becomes_nan_and_zeros_stay_zeros() -> None:
    query = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    query[0, 3], query[1, 5], query[2] = math.nan, -math.inf, 0.0
    rounded = round_query(query)
    assert bool(rounded[:2].isnan().all())
    assert not rounded[2].any()
    assert bool(rounded[3].isfinite().all())
