# SPDX-License-Identifier: Apache-2.0
"""Calls of the kernels with whatever tensors: what they are asked for, or one message.

The same for every device. Caches and outputs stand between guards, and every byte of the memory is
compared with what the reference leaves there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.kernels import k8v4, reference

HEAD_SIZE, HEADS, PAGE_SIZE, BLOCKS = 64, 2, 16, 3
SLOT = k8v4.slot_bytes(HEAD_SIZE)
NUM_SLOTS = BLOCKS * PAGE_SIZE
GUARD = 4096

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ANY_DTYPE = st.sampled_from((*DTYPES, torch.float64, torch.int32, torch.int64, torch.uint8))
KINDS = ("dtype", "fewer", "flat", "turned", "spread", "one number", "elsewhere", "more dims")

# Made smaller an example takes minutes in the interpreter.
HOW: dict[str, Any] = {"deadline": None, "database": None, "phases": [Phase.generate]}


@dataclass(frozen=True)
class Kernels:
    """The kernels of one kind of device.

    Attributes:
        store: `quantise_and_store`.
        attend: `paged_attention`.
        layout: Of their pages.
        refuses_slots: Whether slots past the end are refused without debug mode as well, and are
            not passed over.
    """

    store: Callable[..., None]
    attend: Callable[..., None]
    layout: k8v4.Layout
    refuses_slots: bool


@dataclass(frozen=True)
class Change:
    """A way to be another tensor than the one that is asked for."""

    kind: str
    dtype: torch.dtype
    dim: int
    count: int

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor with another dtype, shape, strides or place."""
        if self.kind == "dtype":
            return tensor.to(self.dtype)
        if self.kind == "fewer":
            dim = self.dim % tensor.dim()
            return tensor.narrow(dim, 0, min(self.count, tensor.shape[dim]))
        if self.kind == "flat":
            return tensor.reshape(-1)
        if self.kind == "turned" and tensor.dim() > 1:
            return tensor.transpose(-1, -2)
        if self.kind == "spread":
            return tensor.repeat_interleave(2, dim=-1)[..., ::2]
        if self.kind == "one number" and tensor.numel():
            return tensor.flatten()[0]
        if self.kind == "elsewhere":
            return tensor.to("meta")
        if self.kind == "more dims":
            return tensor[None]
        return tensor


CHANGES = st.builds(
    Change,
    st.sampled_from(("as it is",) * 3 * len(KINDS) + KINDS),
    ANY_DTYPE,
    st.integers(0, 3),
    st.integers(0, 4),
)


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes of a tensor with guards around it, and the tensor."""
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    memory = torch.randint(0, 256, (size + 2 * GUARD,), dtype=torch.uint8)
    return memory, inside(memory, shape, dtype)


def inside(memory: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return what stands between the guards."""
    return memory[GUARD : len(memory) - GUARD].view(dtype).view(shape)


def refusal(kernel: Any, *arguments: Any, **named: Any) -> str | None:
    """Call a kernel and return what it refuses with, if it does; nothing else may come of it."""
    try:
        kernel(*arguments, **named)
    except ValueError as error:
        return str(error)
    return None


def check_stores(kernels: Kernels, examples: int) -> None:
    """Check that a store writes its slots as the reference does and nothing else, or refuses."""

    @settings(max_examples=examples, **HOW)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        tokens = data.draw(st.integers(0, 6), label="tokens")
        key, value = torch.randn(2, tokens, HEADS, HEAD_SIZE).to(data.draw(st.sampled_from(DTYPES)))
        slots = data.draw(
            st.lists(st.integers(-3, NUM_SLOTS + 1), min_size=tokens, max_size=tokens),
            label="slots",
        )
        slot_mapping = torch.tensor(
            slots, dtype=data.draw(st.sampled_from((torch.int64, torch.int32)))
        )
        shape = (BLOCKS, HEADS, PAGE_SIZE, SLOT)
        memory, cache = guarded(shape, torch.uint8)
        before = memory.clone()
        change_key, change_value, change_slots, change_cache = (
            data.draw(CHANGES, label=name) for name in ("key", "value", "slots", "cache")
        )
        key, value, slot_mapping = change_key(key), change_value(value), change_slots(slot_mapping)
        cache = change_cache(cache)
        # What is all elsewhere is a call on another device.
        assume(any(tensor.is_cpu for tensor in (key, value, slot_mapping, cache)))
        debug = data.draw(st.booleans(), label="debug")
        said = refusal(kernels.store, key, value, cache, slot_mapping, debug=debug)
        if said is not None:
            assert said.startswith(("quantise_and_store: ", "k8v4 stores ")), said
            assert torch.equal(memory, before)
            return
        there = cache.shape[0] * PAGE_SIZE
        named = [slot for slot in slot_mapping.tolist() if slot >= 0]
        written = [slot for slot in named if slot < there]
        if debug or kernels.refuses_slots:
            assert written == named
        if len(set(written)) < len(written):
            assert not debug
            # Which of two tokens is stored is not defined, and so not compared.
            expected = before.clone()
            blocks, now = inside(expected, shape, torch.uint8), inside(memory, shape, torch.uint8)
            for block in {slot // PAGE_SIZE for slot in written}:
                blocks[block] = now[block]
            assert torch.equal(memory, expected)
            return
        if not written:
            assert torch.equal(memory, before)
            return
        expected = before.clone()
        quantised = reference.quantise(key[: len(slot_mapping)], value[: len(slot_mapping)])
        past = slot_mapping >= there
        reference.store(
            quantised,
            change_cache(inside(expected, shape, torch.uint8)),
            slot_mapping.masked_fill(past, -1).long(),
            kernels.layout,
        )
        if change_cache.kind != "spread":  # which is a copy
            assert torch.equal(memory, expected)

    check()


def check_attention_in_debug_mode(kernels: Kernels, examples: int) -> None:
    """Check that attention in debug mode reads what is there and writes its rows, or refuses."""

    @settings(max_examples=examples, **HOW)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        def numbers(low: int, high: int, count: int) -> torch.Tensor:
            drawn = data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
            return torch.tensor(drawn, dtype=torch.int32)

        requests = data.draw(st.integers(0, 3), label="requests")
        _, cache = guarded((BLOCKS, HEADS, PAGE_SIZE, SLOT), torch.uint8)
        cache.zero_()
        key = torch.randn(NUM_SLOTS, HEADS, HEAD_SIZE)
        kernels.store(key, key, cache, torch.arange(NUM_SLOTS))
        lengths = numbers(-1, 3 * PAGE_SIZE, requests)
        starts = torch.cat((numbers(0, 0, 1), numbers(0, 3, requests).cumsum(0).int()))
        if data.draw(st.integers(0, 3), label="bad offsets") == 0:
            starts = numbers(-2, 9, requests + 1)
        table = numbers(-1, BLOCKS, 3 * requests).view(requests, 3)
        if data.draw(st.booleans(), label="good table"):
            table = table.clamp(0, BLOCKS - 1)
        tokens = data.draw(st.integers(0, 9), label="tokens")
        dtype = data.draw(st.sampled_from(DTYPES))
        query = torch.randn(tokens, 2 * HEADS, HEAD_SIZE).to(dtype)
        memory, out = guarded((tokens, 2 * HEADS, HEAD_SIZE), dtype)
        before, before_cache = memory.clone(), cache.clone()
        given_ = [query, cache, table, lengths, starts, out]
        for place in range(len(given_)):
            given_[place] = data.draw(CHANGES)(given_[place])
        assume(any(tensor.is_cpu for tensor in given_))
        sinks = data.draw(st.none() | CHANGES, label="sinks")
        lse = data.draw(st.none() | CHANGES, label="lse")
        said = refusal(
            kernels.attend,
            *given_,
            scale=0.1,
            sinks=None if sinks is None else sinks(torch.zeros(2 * HEADS)),
            lse=None if lse is None else lse(torch.zeros(tokens, 2 * HEADS)),
            debug=True,
        )
        assert torch.equal(cache, before_cache)
        if said is not None:
            assert said.startswith(("k8v4 attention: ", "k8v4 stores ")), said
            assert torch.equal(memory, before)
            return
        _, cache, table, lengths, starts, out = given_
        for request, length in enumerate(lengths.tolist()):
            named = table[request, : -(-length // PAGE_SIZE)].tolist()
            assert len(named) * PAGE_SIZE >= length
            assert set(named) <= set(range(len(cache)))
        if out.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr():
            # Rows behind the last request are padding.
            end = GUARD + int(starts[-1]) * (out[0].nbytes if len(out) else 0)
            assert torch.equal(memory[:GUARD], before[:GUARD])
            assert torch.equal(memory[end:], before[end:])
        else:
            assert torch.equal(memory, before)
        assert not out[: int(starts[-1])].isnan().any()

    check()
