# SPDX-License-Identifier: Apache-2.0
"""What quantisation may lose, as derived in docs/format.md, and what it must not."""

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

NORMAL_KEY_ERROR = 1 / 17
DENORMAL_KEY_ERROR = 2.0**-10
HALF_STEP = 0.5 + 46 * ROUNDING
STAGE_ERROR = 5.01 * ROUNDING
"""Of the norm of the numbers that a stage of the rotation mixes."""
UNDERFLOW = 2.0**-146

HUGE = float(np.float32(3e38))

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def decode_e4m3fn(code: int) -> float:
    """Sign, four bits of exponent with a bias of 7, three of mantissa; no infinities."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


FINITE_KEYS = np.array([decode_e4m3fn(code) for code in range(127)])


def nearest_key_code(x: float) -> int:
    """The finite code nearest to x, the even one of two that are as near."""
    distance = np.abs(FINITE_KEYS - min(abs(x), 448.0))
    nearest = [int(c) for c in np.flatnonzero(distance == distance.min())]
    code = nearest[0] if len(nearest) == 1 else next(c for c in nearest if c % 2 == 0)
    return code | (0x80 if math.copysign(1.0, x) < 0 else 0)


def keys_only(numbers: torch.Tensor) -> torch.Tensor:
    """Key codes of a flat tensor, quantised beside values of 0."""
    key = numbers.reshape(-1, 1, 1)
    return quantise(key, torch.zeros_like(key)).key_codes.flatten()


def values_only(rows: torch.Tensor) -> Quantised:
    """Rows [T, D] quantised as the values of one head, beside keys of 0."""
    value = rows[:, None]
    return quantise(torch.zeros_like(value), value)


def turned(rows: torch.Tensor) -> torch.Tensor:
    """What is quantised of rows of values, as float64."""
    return rotate(rows.to(torch.float32).clamp(-65504, 65504)).clamp(-65504, 65504).double()


def mixed_dims(head_size: int) -> int:
    """How many neighbouring dims a rotation mixes."""
    return 4 ** len(k8v4.rotation_strides(head_size))


def matrix(head_size: int) -> torch.Tensor:
    """The rotation as a matrix, from its definition as a product of stages and not by `rotate`."""
    stage = torch.full((4, 4), 0.5, dtype=torch.float64) - torch.eye(4, dtype=torch.float64)
    block = torch.ones(1, 1, dtype=torch.float64)
    for _ in k8v4.rotation_strides(head_size):
        block = torch.kron(block, stage)
    return torch.block_diag(*[block] * (head_size // len(block)))


float32s = st.integers(0, 2**32 - 1).map(
    lambda bits: float(np.array(bits, np.uint32).view(np.float32))
)
finite32s = float32s.filter(math.isfinite)


def test_all_256_key_codes_decode_as_the_definition_of_e4m3fn_says() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 256)
    zero = torch.zeros(1, 1, dtype=torch.float16)
    key, _ = dequantise(Quantised(codes, torch.zeros_like(codes), zero, zero))
    expected = torch.tensor([decode_e4m3fn(code) for code in range(256)], dtype=torch.float32)
    assert torch.equal(key.flatten().isnan(), expected.isnan())
    known = ~expected.isnan()
    assert int(known.sum()) == 254
    assert torch.equal(key.flatten()[known], expected[known])
    assert torch.equal(key.flatten()[known].signbit(), expected[known].signbit())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_key_code_survives_a_round_trip(dtype: torch.dtype) -> None:
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    numbers = torch.tensor([decode_e4m3fn(code) for code in codes]).to(dtype)
    assert keys_only(numbers).tolist() == codes


def test_ties_between_two_key_codes_go_to_the_even_one_and_their_neighbours_do_not() -> None:
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
def test_a_key_is_stored_as_the_nearest_code(numbers: list[float]) -> None:
    stored = keys_only(torch.tensor(numbers, dtype=torch.float32))
    assert stored.tolist() == [nearest_key_code(x) for x in numbers]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.floats(-HUGE, HUGE, width=32) | st.floats(-500, 500, width=32), min_size=1),
)
def test_the_error_of_a_key_is_within_the_derived_bound(
    dtype: torch.dtype, numbers: list[float]
) -> None:
    exact = torch.tensor(numbers, dtype=torch.float32).to(dtype).to(torch.float64)
    codes = keys_only(exact.to(dtype))
    back = torch.tensor([decode_e4m3fn(code) for code in codes.tolist()], dtype=torch.float64)
    size, error = exact.abs(), (back - exact).abs()
    normal, large = (size >= 2.0**-6) & (size <= 448), size > 448
    assert bool((error[normal] <= NORMAL_KEY_ERROR * size[normal]).all())
    assert bool((error[size < 2.0**-6] <= DENORMAL_KEY_ERROR).all())
    assert torch.equal(back[large], exact[large].sign() * 448)


def test_the_bounds_of_keys_are_reached_so_that_they_cannot_be_tighter() -> None:
    numbers = torch.tensor([17 / 16, 2.0**-10], dtype=torch.float32)
    back = [decode_e4m3fn(code) for code in keys_only(numbers).tolist()]
    assert back == [1.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_and_huge_keys_become_448_with_their_sign(dtype: torch.dtype) -> None:
    huge = 3e38 if dtype is not torch.float16 else 65504.0
    numbers = torch.tensor([math.inf, -math.inf, huge, -huge, 449.0, 464.0, 480.0]).to(dtype)
    assert keys_only(numbers).tolist() == [0x7E, 0xFE, 0x7E, 0xFE, 0x7E, 0x7E, 0x7E]


def rows_with_offset() -> st.SearchStrategy[torch.Tensor]:
    """Rows of 64 around an offset: the offset decides what fp16 rounding of the zero does."""
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
def test_the_error_of_a_rotated_value_is_half_a_step_and_the_step_is_as_derived(
    rows: torch.Tensor,
) -> None:
    quantised = values_only(rows)
    exact = turned(rows)
    step = quantised.scale.to(torch.float64)
    zero = quantised.zero.to(torch.float64)
    codes = quantised.value_codes[:, 0].to(torch.float64)
    assert bool((codes <= 15).all())
    assert bool(((exact - (codes * step + zero)).abs() <= HALF_STEP * step + UNDERFLOW).all())

    lo, hi = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    added_by_zero = torch.clamp(2.0**-10 * lo.abs(), min=2.0**-24)
    assert bool((zero <= lo).all())
    assert bool((lo - zero <= added_by_zero).all())
    widest = (hi - lo + added_by_zero) / 15 * (1 + 2.0**-10) * (1 + 3 * ROUNDING) + 2.0**-24
    assert bool((step <= widest).all())


@settings(max_examples=200, deadline=None)
@given(rows_with_offset(), st.sampled_from([64, 72, 80, 128, 192, 256, 512]))
def test_the_error_of_values_that_are_read_is_that_of_their_steps_and_of_two_rotations(
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
    # Of a longer block some rotated number may lie beyond 65504.
    assert bool((error <= bound)[size <= 65504].all())


@pytest.mark.parametrize("head_size", range(64, 257, 8))
def test_the_rotation_is_the_symmetric_orthogonal_matrix_of_equal_entries_and_rows_of_sum_1(
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
    # A head size has what it can: the next larger block would not divide it.
    assert head_size % dims == 0
    assert head_size % (4 * dims) != 0


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([64, 72, 96, 256, 512]), st.integers(0, 2**32 - 1))
def test_the_rotation_is_off_by_no_more_than_its_stages_may_be(head_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(8, head_size, generator=generator)
    rows *= 10 ** (8 * torch.rand(8, head_size, generator=generator) - 4)
    exact = rows.double() @ matrix(head_size)
    dims = mixed_dims(head_size)
    error = (rotate(rows).double() - exact).unflatten(-1, (-1, dims)).norm(dim=-1)
    size = rows.double().unflatten(-1, (-1, dims)).norm(dim=-1)
    assert bool((error <= len(k8v4.rotation_strides(head_size)) * STAGE_ERROR * size).all())


def test_a_large_value_is_spread_over_its_block_and_reaches_no_other() -> None:
    row = torch.zeros(1, 128)
    row[0, 70] = 800.0
    quantised = values_only(row)
    assert float(quantised.scale) <= 200 / 15 * (1 + 2.0**-10)
    _, back = dequantise(quantised)
    assert float((back.flatten() - row)[:, 70].abs()) < 1.0
    assert quantised.value_codes[0, 0, :64].unique().numel() == 1


@pytest.mark.parametrize("head_size", [64, 256])
def test_rotated_values_beyond_the_largest_half_are_clamped_to_it(head_size: int) -> None:
    largest = torch.zeros(1, head_size)
    largest[0, 3] = 1.0
    row = 65504.0 * rotate(largest).sign()
    quantised = values_only(row)
    assert turned(row).max() == 65504
    assert quantised.value_codes[0, 0].tolist() == [15 * (d == 3) for d in range(head_size)]
    assert bool(quantised.scale.isfinite())
    _, back = dequantise(quantised)
    assert bool(back.isfinite().all())


def neighbour(x: torch.Tensor, towards: float) -> torch.Tensor:
    return torch.from_numpy(np.nextafter(x.numpy(), np.float16(towards)))


@settings(max_examples=300, deadline=None)
@given(rows_with_offset())
def test_zero_and_scale_are_the_nearest_halves_on_the_outer_side(rows: torch.Tensor) -> None:
    quantised = values_only(rows)
    exact = turned(rows).to(torch.float32)
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
def test_a_value_in_the_middle_of_two_codes_goes_to_the_even_one(
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


@settings(max_examples=100, deadline=None)
@given(st.floats(-65504, 65504, width=32))
def test_any_other_constant_is_off_by_no_more_than_half_a_step_of_its_own(x: float) -> None:
    quantised = values_only(torch.full((1, 64), x))
    step = float(quantised.scale)
    assert step <= max(2.0**-10 * abs(x), 2.0**-24) / 15 * (1 + 2.0**-10) + 2.0**-24
    exact = quantised.value_codes.to(torch.float64) * step + float(quantised.zero)
    assert float((exact - x).abs().max()) <= HALF_STEP * step + UNDERFLOW


def test_a_spread_too_small_for_any_step_is_stored_as_its_zero_with_codes_0() -> None:
    quantised = values_only(torch.tensor([[0.0, 1e-45, 0.0, 1e-45]]))
    assert quantised.scale.view(torch.int16).tolist() == [[0]]
    assert quantised.value_codes.count_nonzero() == 0


def test_zeros_of_either_sign_are_stored_as_the_same_bits() -> None:
    rows = torch.tensor([[0.0] * 8, [-0.0] * 8, [0.0, -0.0] * 4])
    quantised = values_only(rows)
    assert quantised.zero.view(torch.int16).count_nonzero() == 0
    assert quantised.scale.view(torch.int16).count_nonzero() == 0


def test_infinite_values_become_the_largest_half_with_their_sign() -> None:
    quantised = values_only(torch.tensor([[math.inf, -math.inf, 0.0, 3e38, -3e38]]))
    _, back = dequantise(quantised)
    step = float(quantised.scale)
    assert float(quantised.zero) == -65504
    assert quantised.value_codes.flatten().tolist()[:2] == [15, 0]
    wanted = torch.tensor([65504.0, -65504.0, 0.0, 65504.0, -65504.0])
    assert float((back.flatten() - wanted).abs().max()) <= HALF_STEP * step + 65504 * ROUNDING


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["key", "value"])
def test_a_nan_makes_the_scale_of_its_token_and_head_nan_and_of_no_other(
    dtype: torch.dtype, where: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    key = torch.randn(5, 3, 64, generator=generator).to(dtype)
    value = torch.randn(5, 3, 64, generator=generator).to(dtype)
    clean = quantise(key, value)
    (key if where == "key" else value)[2, 1, 7] = math.nan
    quantised = quantise(key, value)
    nan = torch.zeros(5, 3, dtype=torch.bool)
    nan[2, 1] = True
    assert torch.equal(quantised.scale.isnan(), nan)
    assert quantised.scale.view(torch.int16)[2, 1] == 0x7E00
    assert quantised.zero[2, 1] == 0
    assert quantised.value_codes[2, 1].count_nonzero() == 0
    for found, expected in zip(quantised, clean, strict=True):
        assert torch.equal(found[~nan], expected[~nan])
    other_keys = torch.arange(64) != 7
    assert torch.equal(quantised.key_codes[2, 1][other_keys], clean.key_codes[2, 1][other_keys])
    _, back = dequantise(quantised)
    assert torch.equal(back.isnan(), nan[..., None].expand(5, 3, 64))


def test_inputs_of_any_strides_and_of_16_bits_are_quantised_as_their_float32_copies() -> None:
    generator = torch.Generator().manual_seed(4)
    for dtype in DTYPES:
        fused = torch.randn(64, 2, 3, 6, generator=generator).to(dtype)
        key, value = fused[:, 0].permute(2, 1, 0), fused[:, 1].permute(2, 1, 0)
        assert key.stride(2) != 1
        copies = quantise(key.float().contiguous(), value.float().contiguous())
        for found, expected in zip(quantise(key, value), copies, strict=True):
            assert torch.equal(found, expected)
