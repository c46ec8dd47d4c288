# SPDX-License-Identifier: Apache-2.0
"""Call kernels with random tensors: each call writes the right bytes, or raises one clear error.

Each cache and output lies between guard bytes, and all bytes are compared with the reference.
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
KINDS = ("dtype", "narrow", "flat", "transposed", "strided", "scalar", "meta", "more dims")

# Only generate examples, because shrinking takes minutes in the interpreter.
SETTINGS: dict[str, Any] = {"deadline": None, "database": None, "phases": [Phase.generate]}


@dataclass(frozen=True)
class Kernels:
    """The kernels of one kind of device.

    Attributes:
        store: `quantise_and_store`.
        attend: `paged_attention`.
        layout: The layout of their pages.
        refuses_slots: Whether slots past the end raise an error even without debug mode, instead
            of being ignored.
    """

    store: Callable[..., None]
    attend: Callable[..., None]
    layout: k8v4.Layout
    refuses_slots: bool


@dataclass(frozen=True)
class Change:
    """A random change that may make a tensor invalid for a kernel."""

    kind: str
    dtype: torch.dtype
    dim: int
    count: int

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor with its dtype, shape, strides or device changed."""
        dim = self.dim % tensor.dim()
        changes = {
            "dtype": lambda: tensor.to(self.dtype),
            "narrow": lambda: tensor.narrow(dim, 0, min(self.count, tensor.shape[dim])),
            "flat": lambda: tensor.reshape(-1),
            "transposed": lambda: tensor.transpose(-1, dim),
            "strided": lambda: tensor.repeat_interleave(2, dim=-1)[..., ::2],
            "scalar": lambda: tensor.flatten()[0] if tensor.numel() else tensor,
            "meta": lambda: tensor.to("meta"),
            "more dims": lambda: tensor[None],
        }
        return changes.get(self.kind, lambda: tensor)()


CHANGES = st.builds(
    Change,
    st.sampled_from(("unchanged",) * 3 * len(KINDS) + KINDS),
    ANY_DTYPE,
    st.integers(0, 3),
    st.integers(0, 4),
)


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate a tensor between guard bytes; return all the memory, and the tensor in it."""
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    memory = torch.randint(0, 256, (size + 2 * GUARD,), dtype=torch.uint8)
    return memory, inside(memory, shape, dtype)


def inside(memory: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """View the memory between the guard bytes as a tensor."""
    return memory[GUARD : len(memory) - GUARD].view(dtype).view(shape)


def refusal(kernel: Any, *arguments: Any, **named: Any) -> str | None:
    """Call a kernel; return the message if it raises ValueError. Other errors fail the test."""
    try:
        kernel(*arguments, **named)
    except ValueError as error:
        return str(error)
    return None


def check_stores(kernels: Kernels, examples: int) -> None:
    """Check that each store raises one clear error, or writes its slots as the reference does."""

    @settings(max_examples=examples, **SETTINGS)
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
        key, value = data.draw(CHANGES, label="key")(key), data.draw(CHANGES, label="value")(value)
        slot_mapping = data.draw(CHANGES, label="slots")(slot_mapping)
        change_cache = data.draw(CHANGES, label="cache")
        cache = change_cache(cache)
        # If all tensors are on the other device, `meta`, the kernel cannot run.
        assume(any(tensor.is_cpu for tensor in (key, value, slot_mapping, cache)))
        debug = data.draw(st.booleans(), label="debug")
        message = refusal(kernels.store, key, value, cache, slot_mapping, debug=debug)
        if message is not None:
            assert message.startswith(("quantise_and_store: ", "k8v4 stores ")), message
            assert torch.equal(memory, before)
            return
        num_slots = cache.shape[0] * PAGE_SIZE
        named = [slot for slot in slot_mapping.tolist() if slot >= 0]
        written = [slot for slot in named if slot < num_slots]
        if debug or kernels.refuses_slots:
            assert written == named
        if len(set(written)) < len(written):
            assert not debug
            # If two tokens have the same slot, either may be stored, so compare only other blocks.
            expected = before.clone()
            blocks = [slot // PAGE_SIZE for slot in written]
            actual = inside(memory, shape, torch.uint8)
            inside(expected, shape, torch.uint8)[blocks] = actual[blocks]
            assert torch.equal(memory, expected)
            return
        if not written:
            assert torch.equal(memory, before)
            return
        expected = before.clone()
        quantised = reference.quantise(key[: len(slot_mapping)], value[: len(slot_mapping)])
        past = slot_mapping >= num_slots
        reference.store(
            quantised,
            change_cache(inside(expected, shape, torch.uint8)),
            slot_mapping.masked_fill(past, -1).long(),
            kernels.layout,
        )
        if change_cache.kind != "strided":  # "strided" makes a copy
            assert torch.equal(memory, expected)

    check()


def check_attention_in_debug_mode(kernels: Kernels, examples: int) -> None:
    """Check that each call in debug mode raises an error, or is valid and writes only its rows."""

    @settings(max_examples=examples, **SETTINGS)
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
        arguments = [query, cache, table, lengths, starts, out]
        arguments = [data.draw(CHANGES)(argument) for argument in arguments]
        assume(any(tensor.is_cpu for tensor in arguments))
        sinks = data.draw(st.none() | CHANGES, label="sinks")
        lse = data.draw(st.none() | CHANGES, label="lse")
        message = refusal(
            kernels.attend,
            *arguments,
            scale=0.1,
            sinks=None if sinks is None else sinks(torch.zeros(2 * HEADS)),
            lse=None if lse is None else lse(torch.zeros(tokens, 2 * HEADS)),
            debug=True,
        )
        assert torch.equal(cache, before_cache)
        if message is not None:
            assert message.startswith(("k8v4 attention: ", "k8v4 stores ")), message
            assert torch.equal(memory, before)
            return
        _, cache, table, lengths, starts, out = arguments
        for request, length in enumerate(lengths.tolist()):
            named = table[request, : -(-length // PAGE_SIZE)].tolist()
            assert len(named) * PAGE_SIZE >= length
            assert set(named) <= set(range(len(cache)))
        if out.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr():
            # Rows after the last request are padding, which must not be written.
            end = GUARD + int(starts[-1]) * (out[0].nbytes if len(out) else 0)
            assert torch.equal(memory[:GUARD], before[:GUARD])
            assert torch.equal(memory[end:], before[end:])
        else:
            assert torch.equal(memory, before)
        assert not out[: int(starts[-1])].isnan().any()

    check()
