# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity in the keys or values of a request do not reach other requests."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import isa, paged_attention, quantise_and_store

HEAD_SIZE, HEADS, PAGE_SIZE = 64, 2, 16
NUMBERS = (math.nan, -math.nan, math.inf, -math.inf)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Return the lengths of requests and their numbers of new tokens."""
    lengths = draw(st.lists(st.integers(1, 90), min_size=2, max_size=4))
    return lengths, [draw(st.integers(1, length)) for length in lengths]


def attend(
    key: torch.Tensor, value: torch.Tensor, lengths: list[int], new: list[int], path: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store all tokens of the requests and return the cache and the outputs of the new tokens."""
    pages = [-(-length // PAGE_SIZE) for length in lengths]
    # Consecutive pages, so that requests are neighbours in memory.
    cache = torch.zeros(sum(pages), HEADS, PAGE_SIZE, k8v4.slot_bytes(HEAD_SIZE), dtype=torch.uint8)
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    slots, first = [], 0
    for request, (count, length) in enumerate(zip(pages, lengths, strict=True)):
        table[request, :count] = torch.arange(first, first + count)
        slots.append(torch.arange(length) + first * PAGE_SIZE)
        first += count
    quantise_and_store(key, value, cache, torch.cat(slots))
    starts = torch.tensor([0, *new]).cumsum(0).int()
    query = torch.sin(torch.arange(int(starts[-1]) * 4 * HEAD_SIZE)).view(-1, 4, HEAD_SIZE)
    query = query.to(key.dtype)
    out = torch.empty_like(query)
    sizes = torch.tensor(lengths).int()
    paged_attention(query, cache, table, sizes, starts, out, scale=0.2, isa=path, debug=True)
    return cache, out


@settings(max_examples=150, deadline=None)
@given(
    batch=batches(),
    number=st.sampled_from(NUMBERS),
    in_key=st.booleans(),
    dtype=st.sampled_from((torch.bfloat16, torch.float32)),
    path=st.sampled_from(isa.available()),
    data=st.data(),
)
def test_a_nan_or_infinity_changes_only_its_request(batch, number, in_key, dtype, path, data):
    lengths, new = batch
    marked = data.draw(st.integers(0, len(lengths) - 1), label="request")
    token = data.draw(st.integers(0, lengths[marked] - 1), label="token")
    head = data.draw(st.integers(0, HEADS - 1), label="head")
    key, value = torch.randn(2, sum(lengths), HEADS, HEAD_SIZE).to(dtype)
    cache, out = attend(key, value, lengths, new, path)
    key_after, value_after = key.clone(), value.clone()
    row = sum(lengths[:marked]) + token
    (key_after if in_key else value_after)[row, head, 5] = number
    cache_after, out_after = attend(key_after, value_after, lengths, new, path)

    first = sum(-(-length // PAGE_SIZE) for length in lengths[:marked])
    pages = slice(first, first - (-lengths[marked] // PAGE_SIZE))
    changed = (cache != cache_after).flatten(1).any(1)
    assert changed[pages].any()
    changed[pages] = False
    assert not changed.any()

    # Rows of the request that see the token, in the query heads that read its head.
    sees = torch.zeros(out.shape[:2], dtype=torch.bool)
    begin, end = sum(new[:marked]), sum(new[: marked + 1])
    position = torch.arange(lengths[marked] - new[marked], lengths[marked])
    sees[begin:end, 2 * head : 2 * head + 2] = (position >= token)[:, None]
    assert torch.equal(out[~sees], out_after[~sees])
    assert torch.equal(out_after.isnan().any(-1), sees & math.isnan(number))
    if sees.any() and not in_key:
        assert not torch.equal(out[sees], out_after[sees])
