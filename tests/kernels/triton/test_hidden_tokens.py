# SPDX-License-Identifier: Apache-2.0
"""Tokens that a row may not see have no influence on it in Triton's kernels, run interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from testing.triton.attention import (
    HIDDEN_HALVES,
    Case,
    assert_close,
    attend,
    expected,
    fill_token,
    make,
    planned,
)
from testing.triton.processes import interpreted

NO_SCALES = (0x7E00, 0xFE01, 0x7C00, 0xFC00)
"""fp16 bits of scales that mark a token as broken: NaNs and infinities."""


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("plane", ["key", "value"])
@interpreted
def test_a_scale_that_is_not_finite_shows_in_the_rows_that_see_it_and_in_no_others(
    plane: str, split: bool
) -> None:
    for options in ({}, {"window": 6}):
        batch = make(
            Case(lengths=(180, 54), queries=(14, 14), num_heads=4, num_kv_heads=2, options=options)
        )
        plan = planned(batch, split=split, processors=1)
        wanted = expected(batch)
        # The 14 new tokens are at positions 166 to 179.
        seeing = range(11, 14) if not options else range(5, 11)
        token = 177 if not options else 171
        place = batch.scales(0, 1, plane)[token // 32].view(torch.int16)[token % 32]
        for bits in NO_SCALES:
            place.fill_(bits - 0x10000 if bits > 0x7FFF else bits)
            out, lse = attend(batch, plan)
            broken = torch.zeros(out.shape[:2], dtype=torch.bool)
            broken[seeing, 2:] = True
            assert torch.equal(out.isnan().all(-1), broken)
            assert torch.equal(out.isnan().any(-1), broken)
            assert_close((out[~broken], lse[~broken]), (wanted[0][~broken], wanted[1][~broken]))


@pytest.mark.parametrize("bits", NO_SCALES)
@pytest.mark.parametrize("plane", ["key", "value"])
@interpreted
def test_a_scale_before_the_window_that_is_not_finite_has_no_influence(
    plane: str, bits: int
) -> None:
    batch = make(Case(lengths=(150,), options={"window": 40}, num_kv_heads=2))
    plan = planned(batch)
    wanted = attend(batch, plan)
    for head in range(2):
        place = batch.scales(0, head, plane)[100 // 32].view(torch.int16)[100 % 32]
        place.fill_(bits - 0x10000 if bits > 0x7FFF else bits)
    out, lse = attend(batch, plan)
    assert torch.equal(out, wanted[0])
    assert torch.equal(lse, wanted[1])


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("queries", "options"), [(1, {"window": 40}), (3, {}), (9, {"window": 3})])
@interpreted
def test_the_bytes_of_a_token_that_no_row_sees_have_no_influence(
    queries: int, options: dict[str, Any], split: bool
) -> None:
    # If the kernel used a hidden token's scale of 65504, these small values would round to 0.
    case = Case(
        lengths=(150, 40), queries=(queries, 1), options=options, num_kv_heads=2,
        value_size=1e-5, dtype=torch.float32,
    )  # fmt: skip
    batch = make(case)
    plan = planned(batch, split=split, processors=4)
    wanted = expected(batch)
    hidden = [(0, token) for token in range(150, 160)] + [(1, token) for token in range(40, 64)]
    if (window := options.get("window")) is not None:
        hidden += [(0, token) for token in range(max(0, 150 - queries - window + 1))]
        hidden += [(1, token) for token in range(max(0, 40 - window))]
    got = []
    for half in HIDDEN_HALVES:
        for request, token in hidden:
            fill_token(batch, request, token, half)
        got.append(attend(batch, plan))
        assert_close(got[-1], wanted)
    for out, lse in got[1:]:
        assert torch.equal(out, got[0][0])
        assert torch.equal(lse, got[0][1])


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("options", [{}, {"window": 40}])
@interpreted
def test_a_token_hidden_from_some_rows_has_no_influence_on_them(
    options: dict[str, Any], split: bool
) -> None:
    # These values' scales are some 2^-24 of 65504, so fp16 can still express weights times scales.
    case = Case(
        lengths=(150,), queries=(3,), options=options, value_size=1e-2, dtype=torch.float32
    )  # fmt: skip
    batch = make(case)
    plan = planned(batch, split=split, processors=4)
    wanted_out, wanted_lse = expected(batch)
    for half in HIDDEN_HALVES:
        fill_token(batch, 0, 149, half)
        out, lse = attend(batch, plan)
        assert_close((out[:2], lse[:2]), (wanted_out[:2], wanted_lse[:2]))
        assert out[2].isnan().all() == (half & 0x7C00 == 0x7C00)
