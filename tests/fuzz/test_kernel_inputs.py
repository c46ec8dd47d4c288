# SPDX-License-Identifier: Apache-2.0
"""Whatever tensors the CPU kernels are given: what they are asked for, or one message.

Caches and outputs stand between guards, and every byte that was not to be written is compared.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import paged_attention, quantise_and_store

HEAD_SIZE, HEADS, PAGE_SIZE, BLOCKS = 64, 2, 16, 3
SLOT = k8v4.slot_bytes(HEAD_SIZE)
REGION = PAGE_SIZE * SLOT
NUM_SLOTS = BLOCKS * PAGE_SIZE
GUARD = 4096

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ANY_DTYPE = st.sampled_from((*DTYPES, torch.float64, torch.int32, torch.int64, torch.uint8))


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes of a tensor with guards around it, and the tensor."""
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    memory = torch.randint(0, 256, (size + 2 * GUARD,), dtype=torch.uint8)
    return memory, memory[GUARD : GUARD + size].view(dtype).view(shape)


@st.composite
def changed(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, at times with another dtype, shape or strides."""
    kind = draw(st.sampled_from(("as it is",) * 4 + ("dtype", "fewer", "flat", "turned", "spread")))
    if kind == "dtype":
        return tensor.to(draw(ANY_DTYPE))
    if kind == "fewer":
        dim = draw(st.integers(0, tensor.dim() - 1))
        return tensor.narrow(dim, 0, draw(st.integers(0, tensor.shape[dim])))
    if kind == "flat":
        return tensor.reshape(-1)
    if kind == "turned" and tensor.dim() > 1:
        return tensor.transpose(-1, -2)
    if kind == "spread":
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    return tensor


def refusal(kernel: Any, *arguments: Any, **named: Any) -> str | None:
    """Call a kernel and return what it refuses with, if it does; nothing else may come of it."""
    try:
        kernel(*arguments, **named)
    except ValueError as error:
        return str(error)
    return None


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_store_writes_its_slots_or_nothing(data):
    tokens = data.draw(st.integers(0, 6), label="tokens")
    key, value = torch.randn(2, tokens, HEADS, HEAD_SIZE).to(data.draw(st.sampled_from(DTYPES)))
    slots = data.draw(
        st.lists(st.integers(-3, NUM_SLOTS + 1), min_size=tokens, max_size=tokens), label="slots"
    )
    slot_mapping = torch.tensor(slots, dtype=data.draw(st.sampled_from((torch.int64, torch.int32))))
    memory, cache = guarded((BLOCKS, HEADS, PAGE_SIZE, SLOT), torch.uint8)
    before = memory.clone()
    key, value, slot_mapping = (data.draw(changed(t)) for t in (key, value, slot_mapping))
    debug = data.draw(st.booleans(), label="debug")
    said = refusal(
        quantise_and_store, key, value, data.draw(changed(cache)), slot_mapping, debug=debug
    )
    written = {int(slot) for slot in slot_mapping.flatten() if slot >= 0}
    if said is not None:
        assert said.startswith(("quantise_and_store: ", "k8v4 stores "))
        assert torch.equal(memory, before)
        return
    assert max(written, default=0) < NUM_SLOTS
    if debug:
        named = [int(slot) for slot in slot_mapping if slot >= 0]
        assert len(named) == len(set(named))
    # The arrangement inside a block is the format's; a block that no slot is in stays as it was.
    touched = {slot // PAGE_SIZE for slot in written}
    for block in range(BLOCKS):
        if block not in touched:
            start = GUARD + block * HEADS * REGION
            end = start + HEADS * REGION
            assert torch.equal(memory[start:end], before[start:end])
    assert torch.equal(memory[:GUARD], before[:GUARD])
    assert torch.equal(memory[-GUARD:], before[-GUARD:])


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_attention_in_debug_mode_reads_what_is_there_or_refuses(data):
    requests = data.draw(st.integers(0, 3), label="requests")
    _, cache = guarded((BLOCKS, HEADS, PAGE_SIZE, SLOT), torch.uint8)
    cache.zero_()
    key = torch.randn(NUM_SLOTS, HEADS, HEAD_SIZE)
    quantise_and_store(key, key, cache, torch.arange(NUM_SLOTS))
    some = lambda low, high, count: torch.tensor(  # noqa: E731
        data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count)),
        dtype=torch.int32,
    )
    lengths = some(-1, 3 * PAGE_SIZE, requests)
    starts = torch.cat((torch.zeros(1, dtype=torch.int32), some(0, 3, requests).cumsum(0).int()))
    if data.draw(st.booleans(), label="bad offsets"):
        starts = some(-2, 9, requests + 1)
    table = some(-1, BLOCKS, 3 * requests).view(requests, 3)
    if data.draw(st.booleans(), label="good table"):
        table = table.clamp(0, BLOCKS - 1)
    tokens = data.draw(st.integers(0, 9), label="tokens")
    dtype = data.draw(st.sampled_from(DTYPES))
    query = torch.randn(tokens, 2 * HEADS, HEAD_SIZE).to(dtype)
    memory, out = guarded((tokens, 2 * HEADS, HEAD_SIZE), dtype)
    before = memory.clone()
    before_cache = cache.clone()
    query, table, lengths, starts = (data.draw(changed(t)) for t in (query, table, lengths, starts))
    said = refusal(
        paged_attention, query, cache, table, lengths, starts, out, scale=0.1, debug=True
    )
    assert torch.equal(cache, before_cache)
    assert torch.equal(memory[:GUARD], before[:GUARD])
    assert torch.equal(memory[-GUARD:], before[-GUARD:])
    if said is not None:
        assert said.startswith(("k8v4 attention: ", "k8v4 stores ")), said
        assert torch.equal(memory, before)
        return
    size = out[0].nbytes if tokens else 0
    end = GUARD + int(starts[-1]) * size
    # Rows behind the last request are padding.
    assert torch.equal(memory[end:], before[end:])
    assert not out[: int(starts[-1])].isnan().any()
