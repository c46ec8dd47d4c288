# SPDX-License-Identifier: Apache-2.0
"""Our kernels on the device against `kernels.reference` on the CPU.

A check is a function of this module with its arguments, which returns what it found and raises
`Wrong` otherwise; `matrix` lists them. Several processes share the checks, because most of their
time is compiling.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.gpu.environment import device_for_kernels
from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.k8v4 import Layout
from vllm_hybrid_kv.kernels.triton import paged_attention, plan_attention, quantise_and_store
from vllm_hybrid_kv.kernels.triton.convert import (
    KeyWords,
    ValueWords,
    has_native_e4m3,
    is_nvidia,
)
from vllm_hybrid_kv.kernels.triton.plan import Plan

TOLERANCE = {
    torch.float32: 2e-3,  # queries and weights rounded to fp16's 11 bits: 2^-12 each
    torch.float16: 2e-3,  # likewise, and outputs
    torch.bfloat16: 6e-3,  # outputs rounded to 8 bits: 2^-9, and room for cancellation
}
"""Largest ||out - reference|| / ||reference|| over the dims of one row."""

LSE_TOLERANCE = 2e-3
"""Largest |lse - reference|: queries rounded to fp16, on scores of size one."""

TWIN_TOLERANCE = 1e-3
"""Largest distance of one way of widening codes from another: both give the same numbers, and
differ in the order of sums only."""

UNTOUCHED = 0xA5


class Wrong(Exception):
    """What a check found."""


class NotHere(Exception):
    """Why a check cannot be made on this device."""


@dataclass(frozen=True)
class Case:
    """A batch: shapes, lengths and options of one call."""

    head_size: int = 128
    heads: int = 8
    kv_heads: int = 2
    page_size: int = 16
    lengths: tuple[int, ...] = (700, 1, 0, 37, 64)
    queries: tuple[int, ...] = (1, 1, 1, 1, 1)
    dtype: torch.dtype = torch.bfloat16
    value_size: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Inputs:
    """The tensors of a call, on the device, and the reference's cache and queries on the CPU."""

    query: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    starts: torch.Tensor
    options: dict[str, Any]
    max_query_len: int

    def to(self, device: torch.device) -> Inputs:
        """Return the same on another device."""
        options = {k: v.to(device) if hasattr(v, "to") else v for k, v in self.options.items()}
        names = ("query", "cache", "block_table", "seq_lens", "starts")
        return replace(
            self, options=options, **{name: getattr(self, name).to(device) for name in names}
        )


def inputs(case: Case, seed: int = 0) -> Inputs:
    """Make requests in shuffled pages; bytes that belong to no token are 0xFF, a NaN."""
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-length // case.page_size) for length in case.lengths]
    slot = k8v4.slot_bytes(case.head_size)
    shape = (sum(pages) + 2, case.kv_heads, case.page_size, slot)
    cache = torch.full(shape, 0xFF, dtype=torch.uint8)
    order = torch.randperm(shape[0], generator=generator)
    table = torch.full((len(pages), max(pages) + 1), 10**8, dtype=torch.int32)
    first = 0
    for request, (count, length) in enumerate(zip(pages, case.lengths, strict=True)):
        mine = order[first : first + count]
        first += count
        table[request, :count] = mine
        dims = (2, length, case.kv_heads, case.head_size)
        key, value = torch.randn(dims, generator=generator)
        value = (value + torch.randn(dims[1:3], generator=generator)[..., None]) * case.value_size
        position = torch.arange(length)
        slots = mine[position // case.page_size] * case.page_size + position % case.page_size
        reference.store(reference.quantise(key, value), cache, slots, Layout.LINEAR)
    query = torch.randn(sum(case.queries), case.heads, case.head_size, generator=generator)
    return Inputs(
        query.to(case.dtype),
        cache,
        table,
        torch.tensor(case.lengths, dtype=torch.int32),
        torch.tensor([0, *case.queries]).cumsum(0).to(torch.int32),
        {"scale": case.head_size**-0.5, **case.options},
        max(case.queries),
    )


Outputs = tuple[torch.Tensor, torch.Tensor]


def planned(x: Inputs, into: Plan | None = None, split: bool | None = None) -> Plan:
    """Plan a batch, or write a plan again."""
    return plan_attention(
        x.seq_lens,
        x.starts,
        x.query.shape[0],
        x.query.shape[1],
        x.cache.shape[1],
        x.query.shape[2],
        max_query_len=x.max_query_len,
        causal=x.options.get("causal", True),
        window=x.options.get("window"),
        split=split,
        into=into,
    )


def attend(x: Inputs, plan: Plan | None = None, **more: Any) -> Outputs:
    """Run our kernels; rows that they do not write hold 7."""
    out = torch.full_like(x.query, 7.0)
    lse = torch.full(x.query.shape[:2], 7.0, device=x.query.device)
    paged_attention(
        x.query, x.cache, x.block_table, x.seq_lens, x.starts, out,
        lse=lse, plan=plan, max_query_len=x.max_query_len, **x.options, **more,
    )  # fmt: skip
    return out, lse


def expected(x: Inputs) -> Outputs:
    """Run the reference, on the CPU; a request without tokens gives 0, and its sinks' weight."""
    out = torch.zeros(x.query.shape)
    lse = torch.full(x.query.shape[:2], -math.inf)
    for request, length in enumerate(x.seq_lens.tolist()):
        rows = slice(*x.starts[request : request + 2].tolist())
        if length == 0:
            lse[rows] = x.options.get("sinks", torch.tensor(-math.inf)).float()
            continue
        out[rows], lse[rows] = reference.paged_attention(
            x.query[rows],
            x.cache,
            x.block_table[request : request + 1],
            x.seq_lens[request : request + 1],
            torch.tensor([0, rows.stop - rows.start]),
            Layout.LINEAR,
            **x.options,
        )
    return out, lse


def largest_error(got: Outputs, wanted: Outputs) -> tuple[float, float]:
    """Return the largest relative error of a row, and the largest error of a log-sum-exp.

    Raises:
        Wrong: A NaN is where there should be none, or the other way round.
    """
    out, lse = (x.cpu().float() for x in got)
    wanted_out, wanted_lse = (x.cpu().float() for x in wanted)
    if not torch.equal(out.isnan(), wanted_out.isnan()):
        raise Wrong("NaNs are not where the reference has them")
    # The log-sum-exp of a row that sees a NaN is not defined.
    defined = ~wanted_out.isnan().any(-1)
    out, wanted_out = out.nan_to_num(0.0), wanted_out.nan_to_num(0.0)
    error = (out - wanted_out).norm(dim=-1) / wanted_out.norm(dim=-1).clamp_min(1e-20)
    same = lse == wanted_lse  # both -inf
    difference = (lse - wanted_lse).abs().masked_fill(same | ~defined, 0.0)
    relative = difference / (1 + wanted_lse.abs()).masked_fill(same, 1.0)
    return float(error.max()), float(relative.max())


def judged(got: Outputs, wanted: Outputs, tolerance: float) -> str:
    """Return how far outputs are from what is wanted.

    Raises:
        Wrong: Further than the tolerance.
    """
    error, lse_error = largest_error(got, wanted)
    found = f"out {error:.1e}, lse {lse_error:.1e}"
    if not (error <= tolerance and lse_error <= LSE_TOLERANCE):
        raise Wrong(f"{found}; {tolerance:.0e} and {LSE_TOLERANCE:.0e} are allowed")
    return found


def attention_is_as_defined(device: torch.device, case: Case, split: bool | None = None) -> str:
    """Attend with the kernels and with the reference."""
    on_cpu = inputs(case)
    x = on_cpu.to(device)
    plan = None if split is None else planned(x, split=split)
    return judged(attend(x, plan), expected(on_cpu), TOLERANCE[case.dtype])


def a_nan_shows_where_it_is_seen(device: torch.device, case: Case) -> str:
    """Give one token a NaN scale; the reference says which rows it shows in."""
    on_cpu = inputs(case)
    page_format = k8v4.PageFormat(case.head_size, case.page_size, Layout.LINEAR)
    position = case.lengths[0] - case.queries[0] // 2 - 1
    block = int(on_cpu.block_table[0, position // case.page_size])
    at = page_format.scale_offset + 2 * (position % case.page_size)
    region = on_cpu.cache[block, case.kv_heads - 1].view(-1)
    region[at : at + 2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)
    wanted = expected(on_cpu)
    if not bool(wanted[0].isnan().any()):
        raise Wrong("the reference shows no NaN")
    return judged(attend(on_cpu.to(device)), wanted, TOLERANCE[case.dtype])


def a_way_is_like_its_twin(
    device: torch.device, case: Case, keys: KeyWords, values: ValueWords
) -> str:
    """Widen codes one way and by integer arithmetic in Triton."""
    if (keys, values) != (KeyWords.PORTABLE, ValueWords.PORTABLE) and not is_nvidia(device):
        raise NotHere("PTX is NVIDIA's")
    if keys is KeyWords.NATIVE_PTX and not has_native_e4m3(device):
        raise NotHere("the GPU does not convert e4m3fn itself")
    on_cpu = inputs(case)
    x = on_cpu.to(device)
    got = attend(x, key_words=keys, value_words=values)
    judged(got, expected(on_cpu), TOLERANCE[case.dtype])
    twin = attend(x, key_words=KeyWords.PORTABLE, value_words=ValueWords.PORTABLE)
    return judged(got, twin, TWIN_TOLERANCE)


def a_graph_follows_the_lengths(device: torch.device, queries: int) -> str:
    """Capture plan and attention together; replay with lengths that have changed."""
    if device.type != "cuda":
        raise NotHere("CUDA graphs need a GPU")
    first = Case(lengths=(900, 64, 64, 64), queries=(queries,) * 4)
    x = inputs(first).to(device)
    # Room for the longest request of all.
    longest = inputs(Case(lengths=(2000, 1900, 1800, 1700), queries=(queries,) * 4), seed=1)
    x.cache, x.block_table = longest.cache.to(device), longest.block_table.to(device)
    plan = planned(x)
    out, lse = attend(x, plan)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        planned(x, into=plan)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        planned(x, into=plan)
        paged_attention(
            x.query, x.cache, x.block_table, x.seq_lens, x.starts, out,
            lse=lse, plan=plan, **x.options,
        )  # fmt: skip
    errors = []
    for lengths in ((900, 64, 64, 64), (2000, 8, 1800, 17), (8, 8, 8, 1700), (2000, 1900, 1800, 8)):
        x.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(7.0)
        graph.replay()
        wanted = expected(x.to(torch.device("cpu")))
        errors.append(judged((out, lse), wanted, TOLERANCE[first.dtype]))
    return "; ".join(errors)


def stored_bits_are_the_references(
    device: torch.device, head_size: int, dtype: torch.dtype, native: bool | None, rows: str
) -> str:
    """Compare every byte of a cache, with slots skipped and blocks apart.

    Args:
        device: Where.
        head_size: D.
        dtype: Of keys and values.
        native: As for `quantise_and_store`.
        rows: A name of `ROWS`.
    """
    if native and not has_native_e4m3(device):
        raise NotHere("the GPU does not convert e4m3fn itself")
    key, value = ROWS[rows](head_size, dtype)
    count, heads, _ = key.shape
    page_size, padding = 16, 64
    slots = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0))[:count]
    slots[::7] = -1
    blocks, block_bytes = -(-2 * count // page_size), heads * page_size * k8v4.slot_bytes(head_size)
    wanted = torch.full((blocks * (block_bytes + padding),), UNTOUCHED, dtype=torch.uint8)
    found = wanted.to(device)

    def pages(memory: torch.Tensor) -> torch.Tensor:
        slot = k8v4.slot_bytes(head_size)
        strides = (block_bytes + padding, page_size * slot, slot, 1)
        return memory.as_strided((blocks, heads, page_size, slot), strides)

    reference.store(reference.quantise(key, value), pages(wanted), slots, Layout.LINEAR)
    # As a fused projection hands them over: heads of one tensor, not contiguous.
    fused = torch.cat([key, value], dim=1).to(device)
    quantise_and_store(
        fused[:, :heads], fused[:, heads:], pages(found), slots.to(device), native=native
    )
    different = int((found.cpu() != wanted).sum())
    if different:
        raise Wrong(f"{different} of {len(wanted)} bytes differ")
    return f"{len(wanted)} bytes equal"


def _sizes(head_size: int, dtype: torch.dtype) -> Outputs:
    """Rows of every size from 1e-6 to 1e5, a third of them far from zero."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, 300, 3, head_size, generator=generator)
    sizes = torch.logspace(-6, 5, 300)[torch.randperm(300, generator=generator)]
    both = both * sizes[:, None, None]
    both[:, ::3] += 7 * sizes[::3, None, None]
    key, value = both.to(dtype)
    return key, value


def _all_numbers(head_size: int, dtype: torch.dtype) -> Outputs:
    """Every number of a 16-bit dtype, NaNs and infinities among them, in order and shuffled."""
    numbers = torch.arange(65536).to(torch.int16).view(dtype)
    numbers = numbers[: 65536 // (4 * head_size) * 4 * head_size]
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    key = torch.cat([numbers, numbers[order]]).view(-1, 4, head_size)
    return key, key.flip(0)


def _special(head_size: int, dtype: torch.dtype) -> Outputs:
    """One NaN or infinity a row, constant rows, zeros of both signs."""
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 14, 2, head_size, generator=generator)
    for row, number in enumerate((math.nan, -math.nan, math.inf, -math.inf)):
        key[row, 0, 5] = number
        value[4 + row, 1, head_size - 1] = number
    for row, number in enumerate((0.0, -0.0, 65504.0, 1e9, 0.1, 1e-9)):
        key[8 + row], value[8 + row] = number, number
    return key.to(dtype), value.to(dtype)


ROWS: dict[str, Callable[[int, torch.dtype], Outputs]] = {
    "of all sizes": _sizes,
    "of all 16-bit numbers": _all_numbers,
    "with NaN and infinity": _special,
}


@dataclass(frozen=True)
class Check:
    """A function of this module, its arguments, and its name for people."""

    name: str
    function: Callable[..., str]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """What became of a check.

    Attributes:
        name: The check's.
        outcome: passed, failed, or not here.
        detail: How far off, or why.
        seconds: Time that it took, compiling included.
    """

    name: str
    outcome: str
    detail: str
    seconds: float


def run(check: Check) -> Finding:
    """Make a check in this process."""
    start = time.monotonic()
    try:
        outcome, detail = "passed", check.function(device_for_kernels(), **check.arguments)
    except NotHere as reason:
        outcome, detail = "not here", str(reason)
    # A kernel that does not compile or launch is a failure like a wrong number.
    except Exception as error:
        outcome, detail = "failed", f"{type(error).__name__}: {str(error)[:500]}"
    return Finding(check.name, outcome, detail, time.monotonic() - start)
