# SPDX-License-Identifier: Apache-2.0
"""A known-answer test of store and attention kernels, fast enough to run at every start.

It stores fixed tokens with the real store kernel, reads them with the real attention kernel, and
compares the result with the float32 reference. CPUs, GPUs and Triton's interpreter share this
module: the caller passes the two kernels.

The tokens are chosen so that a wrong kernel fails:

* A long request fills several pages, the last one partly, and is divided into several splits.
* Its first tokens are before the window and never stored. Their slots and all memory that no
  request owns have infinite scales. The block table has the null block for pages before the window.
* The first and last tokens that a row sees have large weights, so none of them can be missed.
* A second request ends with a NaN in one KV head. Only its last token may output NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_hybrid_kv.kernels import reference
from vllm_hybrid_kv.kernels.k8v4 import slot_bytes

HIDDEN = 40
"""How many tokens of the long request are before every row's window."""

WINDOW = 520
"""Window size in tokens: a little more than two splits of four tiles of 64 keys."""

SHORT = 37
"""Context length of the second request, without its new tokens."""

FEW = 60
"""Number of tokens in the first of two store calls: 20 more than `HIDDEN`."""

SOFT_CAP = 2.0

BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 5e-3, torch.float32: 5e-3}
"""Largest accepted `||out - reference|| / ||reference||` of a row. CPU kernels usually reach 3e-3
with bf16 and 2e-4 with fp32. GPU kernels round weights to fp16, whatever the dtype."""


@dataclass(frozen=True)
class Variant:
    """The shapes, dtype and options to test a pair of kernels with."""

    head_size: int
    num_heads: int
    num_kv_heads: int
    page_size: int  # tokens
    dtype: torch.dtype  # of queries, keys, values and outputs
    window: bool = False
    soft_cap: bool = False
    sinks: torch.dtype | None = None

    def __str__(self) -> str:
        options = (
            (self.window, "sliding window"),
            (self.soft_cap, "soft cap"),
            (self.sinks is not None, "sinks"),
        )
        return (
            f"head size {self.head_size}, {self.num_heads} query heads on {self.num_kv_heads} KV "
            f"heads, pages of {self.page_size} tokens, {str(self.dtype).removeprefix('torch.')}"
        ) + "".join(f", {name}" for is_set, name in options if is_set)


Store = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""A store kernel: writes key, value [T, H, D] into a cache at slots [T]."""

Call = Mapping[str, Any]
"""The arguments of `paged_attention` by name: all tensors, scale, window, soft_cap and sinks."""

Attend = Callable[[Call], None]
"""An attention kernel: reads the tensors of a `Call` and writes its `out`."""


class WrongKernelError(RuntimeError):
    """A kernel's result differs from the known answer."""


_passed: set[object] = set()


def require(
    path: str,
    variant: Variant,
    batches: Sequence[tuple[Sequence[int], Attend]],
    store: Store,
    device: torch.device,
    compile_first: Callable[[Callable[[], object]], None] | None = None,
) -> None:
    """Test kernels with a variant, unless they have passed in this process already.

    Args:
        path: Name of the kernels, such as `cpu:amx`.
        variant: The shapes, dtype and options.
        batches: For each batch, a list of numbers of new tokens, and the attention kernel to run.
            Each number adds one long and one short request to the batch.
        store: The store kernel.
        device: The kernels' device.
        compile_first: Gets a function that runs all batches. May compile their kernels.

    Raises:
        WrongKernelError: A row's error exceeds its bound, or a NaN is missing or misplaced.
    """
    tested = (path, variant, device)
    if tested in _passed:
        return
    bound = BOUNDS[variant.dtype]
    prepared = [(_requests(variant, queries), attend) for queries, attend in batches]
    if compile_first is not None:
        compile_first(lambda: [_run(variant, *batch, store, device) for batch in prepared])
    for requests, attend in prepared:
        outs = _run(variant, requests, attend, store, device)
        error, count = max(
            (_error(out, expected), len(out))
            for out, (*_, expected) in zip(outs, requests, strict=True)
        )
        if not error <= bound:
            step = "decode" if count == 1 else f"a step of {count} new tokens"
            found = (
                "NaN in other places than the reference"
                if math.isinf(error)
                else f"a relative error of {error:.2g}"
            )
            raise WrongKernelError(
                f"the kernels {path} ({variant}) fail their known-answer test: {step} has {found}, "
                f"the bound is {bound:g}"
            )
    _passed.add(tested)


def forget() -> None:
    """Forget which variants passed, and free the cached tokens."""
    _passed.clear()
    _normal.cache_clear()


def steps(group: int, rows: Sequence[int]) -> list[int]:
    """Choose numbers of new tokens so that the test uses every size of row block.

    `rows` are the sizes, ascending. A request has `group` rows (query heads) for each new token.
    """
    return sorted({max(1, most // group) for most in rows[:-1]} | {-(-rows[-1] // group)})


_Request = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]
"""Query [queries, Hq, D]; key and value [tokens, H, D]; the number of first tokens that are not
stored; and the expected output, float32 [queries, Hq, D]."""


def _run(
    variant: Variant,
    requests: Sequence[_Request],
    attend: Attend,
    store: Store,
    device: torch.device,
) -> Sequence[torch.Tensor]:
    """Run both kernels and return the output of each request, on the CPU."""
    queries, keys, values, hidden, _ = zip(*requests, strict=True)
    page_size = variant.page_size
    pages = [-(-len(key) // page_size) for key in keys]
    cache = torch.empty(
        (1 + sum(pages), variant.num_kv_heads, page_size, slot_bytes(variant.head_size)),
        dtype=torch.uint8, device=device,
    )  # fmt: skip
    cache.view(torch.int16).fill_(0x7C00)  # infinite scales
    # Block numbers descend, so a kernel that assumes ascending ones fails.
    blocks = torch.arange(sum(pages), 0, -1, dtype=torch.int32).split(pages)
    table = torch.zeros((len(requests), max(pages)), dtype=torch.int32)
    slots = []
    for row, owned, key, not_stored in zip(table, blocks, keys, hidden, strict=True):
        token = torch.arange(len(key))
        slot = owned[token // page_size].to(torch.int64) * page_size + token % page_size
        slots.append(slot.masked_fill(token < not_stored, -1))
        row[: len(owned)] = owned
        row[: not_stored // page_size] = 0
    stored = [torch.cat(parts).to(device) for parts in (keys, values, slots)]
    # A store kernel may have separate code for few tokens and for many.
    for part in (slice(0, FEW), slice(FEW, None)):
        key, value, slot = (tensor[part] for tensor in stored)
        store(key, value, cache, slot)
    query = torch.cat(queries).to(device)
    counts = [len(one) for one in queries]
    call = {
        "query": query,
        "cache": cache,
        "block_table": table.to(device),
        "seq_lens": torch.tensor([len(key) for key in keys]).to(device, torch.int32),
        "query_start_loc": torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32),
        "out": torch.empty_like(query),
        **_options(variant, device),
    }
    attend(call)
    return call["out"].cpu().split(counts)


def _error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative error of a row; infinity if a NaN is missing or misplaced."""
    out = out.to(torch.float32)
    if not torch.equal(out.isnan(), expected.isnan()):
        return math.inf
    difference = (out - expected).nan_to_num(0.0).norm(dim=-1)
    return float((difference / expected.nan_to_num(0.0).norm(dim=-1).clamp_min(1e-20)).max())


def _options(variant: Variant, device: torch.device | None = None) -> dict[str, Any]:
    heads, dtype = variant.num_heads, variant.sinks
    return {
        "scale": variant.head_size**-0.5,
        "window": WINDOW if variant.window else None,
        "soft_cap": SOFT_CAP if variant.soft_cap else 0.0,
        "sinks": None if dtype is None else torch.linspace(3.0, 8.0, heads).to(device, dtype),
    }


@functools.lru_cache(maxsize=8)
def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _requests(variant: Variant, queries: Sequence[int]) -> list[_Request]:
    """Return a long request and a short one for each number of new tokens."""
    heads, head_size, most = variant.num_kv_heads, variant.head_size, max(queries)
    hidden = HIDDEN if variant.window else 0
    context = HIDDEN + WINDOW - 1
    # Keys are random, but the first, middle and last keys that a row sees are constant. Because
    # queries have a mean of 0.5, constant keys get a hundred times the weight of random keys.
    query = (_normal(1, most, variant.num_heads, head_size) + 0.5).to(variant.dtype)
    key = _normal(2, context + most, heads, head_size).to(variant.dtype)
    key[[hidden, context // 2, *range(context, context + most)]] = 9.2 * head_size**-0.5
    value = (_normal(3, context + most, heads, head_size) + 0.3).to(variant.dtype)
    read_key, read_value = reference.dequantise(reference.quantise(key[hidden:], value[hidden:]))
    requests: list[_Request] = []
    for count in queries:
        new, length = query[:count], context + count
        read = read_key[: length - hidden], read_value[: length - hidden]
        rounded = reference.round_query(new)
        expected, _ = reference.attend(rounded, *read, **_options(variant))
        requests.append((new, key[:length], value[:length], hidden, expected))
        short = [tensor[: SHORT + count].clone() for tensor in (key, value)]
        short[count % 2][-1, 0, -1] = math.nan
        # The NaN token reaches the output through its value. Its key must not affect other tokens.
        read = reference.dequantise(reference.quantise(*short))
        keys = read[0].nan_to_num(0.0)
        expected, _ = reference.attend(rounded, keys, read[1], **_options(variant))
        requests.append((new, *short, 0, expected))
    return requests
