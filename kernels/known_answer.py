# SPDX-License-Identifier: Apache-2.0
"""A known-answer test of store and attention kernels, fast enough to run at every start.

It stores fixed tokens with the real store kernel, reads them with the real attention kernel, and
compares the result with the float32 reference. CPUs, GPUs and Triton's interpreter share this
module: the caller passes the two kernels.

The tokens are chosen so that a wrong kernel shows:

* A long request fills several pages, the last one partly, and is divided into several splits.
* Its first tokens are before the window. They are never stored and hold infinities, as do all
  other bytes that no request owns. Whole pages before the window become the null block.
* The tokens at both ends of the keys that a row sees have large weights.
* A second request ends with a NaN in one KV head, which must show in its last token only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_hybrid_kv.kernels import reference
from vllm_hybrid_kv.kernels.k8v4 import slot_bytes

HIDDEN = 40
"""Tokens before the first that any row of the long request sees, if there is a window."""

WINDOW = 520
"""Tokens of the window: with tiles of 64 keys enough for two splits of four tiles."""

SHORT = 37
"""Tokens of the second request before its new ones."""

FEW = 60
"""Tokens that are stored in a separate call; the hidden ones and some more."""

SOFT_CAP = 2.0

BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 5e-3, torch.float32: 5e-3}
"""Largest accepted `||out - reference|| / ||reference||` of a row. On CPUs 3e-3 and 2e-6 are usual
for bf16 and fp32. GPU kernels round queries and weights to fp16 for every dtype."""


@dataclass(frozen=True)
class Variant:
    """The properties that distinguish one pair of kernels from another."""

    head_size: int
    num_heads: int
    num_kv_heads: int
    page_size: int  # tokens
    dtype: torch.dtype  # of queries, keys, values and outputs
    window: bool = False
    soft_cap: bool = False
    sinks: torch.dtype | None = None

    def __str__(self) -> str:
        options = {
            "sliding window": self.window,
            "soft cap": self.soft_cap,
            "sinks": self.sinks is not None,
        }
        return ", ".join(
            [
                f"head size {self.head_size}",
                f"{self.num_heads} query heads on {self.num_kv_heads} KV heads",
                f"pages of {self.page_size} tokens",
                str(self.dtype).removeprefix("torch."),
                *(name for name, is_set in options.items() if is_set),
            ]
        )


class Call(NamedTuple):
    """The arguments of `paged_attention` for a batch of requests."""

    query: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    out: torch.Tensor
    scale: float
    window: int | None
    soft_cap: float
    sinks: torch.Tensor | None


Store = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Stores key, value [T, H, D] into a cache at slots [T], like `quantise_and_store`."""

Attend = Callable[[Call], None]
"""Attends and writes `Call.out`."""


class Result(NamedTuple):
    """The worst row of a call."""

    error: float  # largest relative error of a row; infinity if a NaN is missing or misplaced
    bound: float
    queries: int  # new tokens of the worst row's request

    @property
    def is_right(self) -> bool:
        return self.error <= self.bound


def measure(
    variant: Variant, queries: Sequence[int], store: Store, attend: Attend, device: torch.device
) -> Result:
    """Store and attend once, and return the worst error; see `require` for the arguments."""
    requests = _requests(variant, queries)
    page_size = variant.page_size
    pages = [-(-request.length // page_size) for request in requests]
    cache = torch.empty(
        (1 + sum(pages), variant.num_kv_heads, page_size, slot_bytes(variant.head_size)),
        dtype=torch.uint8, device=device,
    )  # fmt: skip
    cache.view(torch.int16).fill_(0x7C00)  # infinite scales and zeros
    # Blocks fall with the tokens of a request, so that no kernel may assume that they rise.
    table = torch.zeros((len(requests), max(pages)), dtype=torch.int32)
    slots, free = [], 1
    for row, request, count in zip(table, requests, pages, strict=True):
        row[:count] = torch.arange(free + count - 1, free - 1, -1, dtype=torch.int32)
        free += count
        token = torch.arange(request.length)
        slot = row[token // page_size].to(torch.int64) * page_size + token % page_size
        slots.append(slot.masked_fill(token < request.hidden, -1))
        row[: request.hidden // page_size] = 0
    key, value = (
        torch.cat([part[: request.length] for part, request in zip(parts, requests, strict=True)])
        for parts in zip(*(request.tokens for request in requests), strict=True)
    )
    key, value, slot = key.to(device), value.to(device), torch.cat(slots).to(device)
    # A kernel may treat few tokens and many differently.
    for part in (slice(0, FEW), slice(FEW, None)):
        store(key[part], value[part], cache, slot[part])
    query = torch.cat([request.query for request in requests]).to(device)
    out = torch.empty_like(query)
    starts = torch.tensor([0, *(len(request.query) for request in requests)]).cumsum(0)
    lengths = torch.tensor([request.length for request in requests], dtype=torch.int32)
    table, lengths, starts = (
        tensor.to(device) for tensor in (table, lengths, starts.to(torch.int32))
    )
    call = Call(query, cache, table, lengths, starts, out, **_options(variant))
    if call.sinks is not None:
        call = call._replace(sinks=call.sinks.to(device))
    attend(call)
    results = [
        Result(_error(part, request.expected), BOUNDS[variant.dtype], len(request.query))
        for part, request in zip(
            out.cpu().split([len(request.query) for request in requests]), requests, strict=True
        )
    ]
    return max(results, key=lambda result: result.error)


class WrongKernelError(RuntimeError):
    """A kernel's result is not the known answer."""


_passed: set[object] = set()


def require(
    path: str,
    variant: Variant,
    batches: Sequence[tuple[Sequence[int], Attend]],
    store: Store,
    device: torch.device,
) -> None:
    """Test a variant once in this process.

    Args:
        path: Name of the kernels, such as `cpu:amx`.
        variant: The kernels.
        batches: The attention kernel for each batch, after the batch's numbers of new tokens: each
            number makes a long and a short request.
        store: The store kernel.
        device: The kernels' device.

    Raises:
        WrongKernelError: An error is above the bound.
    """
    tested = (path, variant, device)
    if tested in _passed:
        return
    for queries, attend in batches:
        result = measure(variant, queries, store, attend, device)
        if not result.is_right:
            step = "decode" if result.queries == 1 else f"a step of {result.queries} new tokens"
            error = (
                "NaN in other places than the reference"
                if math.isinf(result.error)
                else f"a relative error of {result.error:.2g}"
            )
            raise WrongKernelError(
                f"the kernels {path} ({variant}) fail their known-answer test: {step} has {error}, "
                f"the bound is {result.bound:g}"
            )
    _passed.add(tested)


def forget() -> None:
    """Forget which variants passed, and the tokens."""
    _passed.clear()
    _normal.cache_clear()


def steps(group: int, rows: Sequence[int]) -> list[int]:
    """Return numbers of new tokens whose rows fill each class of rows, and exceed the last one.

    A request has `group` rows for each new token. `rows` are the most rows of each class, rising.
    """
    return sorted({max(1, most // group) for most in rows[:-1]} | {-(-rows[-1] // group)})


def _error(out: torch.Tensor, expected: torch.Tensor) -> float:
    out = out.to(torch.float32)
    if not torch.equal(out.isnan(), expected.isnan()):
        return math.inf
    difference = (out - expected).nan_to_num(0.0).norm(dim=-1)
    return float((difference / expected.nan_to_num(0.0).norm(dim=-1).clamp_min(1e-20)).max())


class _Request(NamedTuple):
    query: torch.Tensor  # [queries, Hq, D]
    tokens: tuple[torch.Tensor, torch.Tensor]  # key and value [at least length, H, D]
    length: int
    hidden: int  # tokens that are not stored
    expected: torch.Tensor  # float32 [queries, Hq, D]


def _options(variant: Variant) -> dict[str, Any]:
    heads, dtype = variant.num_heads, variant.sinks
    return {
        "scale": variant.head_size**-0.5,
        "window": WINDOW if variant.window else None,
        "soft_cap": SOFT_CAP if variant.soft_cap else 0.0,
        "sinks": None if dtype is None else torch.linspace(3.0, 8.0, heads).to(dtype),
    }


@functools.lru_cache(maxsize=8)
def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _requests(variant: Variant, queries: Sequence[int]) -> list[_Request]:
    """Return a long request and a short one for each number of new tokens."""
    heads, head_size, most = variant.num_kv_heads, variant.head_size, max(queries)
    hidden = HIDDEN if variant.window else 0
    context = HIDDEN + WINDOW - 1
    # Keys are normal, except at the ends of the keys that a row sees. A component that all queries
    # share gives those a hundred times the weight of others.
    query = (_normal(1, most, variant.num_heads, head_size) + 0.5).to(variant.dtype)
    key = _normal(2, context + most, heads, head_size).to(variant.dtype)
    key[[hidden, context // 2, *range(context, context + most)]] = 9.2 * head_size**-0.5
    value = (_normal(3, context + most, heads, head_size) + 0.3).to(variant.dtype)
    read_key, read_value = reference.dequantise(reference.quantise(key[hidden:], value[hidden:]))
    requests = []
    for count in queries:
        length = context + count
        expected = _attend(variant, query[:count], read_key, read_value, length - hidden)
        requests.append(_Request(query[:count], (key, value), length, hidden, expected))
        length = SHORT + count
        tokens = (key[:length].clone(), value[:length].clone())
        tokens[count % 2][-1, 0, -1] = math.nan
        short_key, short_value = reference.dequantise(reference.quantise(*tokens))
        # A token with a NaN key has NaN values; its scores must not affect other tokens.
        expected = _attend(variant, query[:count], short_key.nan_to_num(0.0), short_value, length)
        requests.append(_Request(query[:count], tokens, length, 0, expected))
    return requests


def _attend(
    variant: Variant, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int
) -> torch.Tensor:
    out, _ = reference.attend(query, key[:length], value[:length], **_options(variant))
    return out
