# SPDX-License-Identifier: Apache-2.0
"""Run the kernels that are measured. Each is launched as its own backend launches it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any, ClassVar

import torch

from benchmarks.gpu.environment import Unavailable
from benchmarks.gpu.shapes import PAGE, Shape, token_bytes
from vllm_hybrid_kv.kernels.triton import (
    LaunchPlan,
    paged_attention,
    plan_attention,
    quantise_and_store,
)
from vllm_hybrid_kv.kernels.triton.tuning import Tiling

FILLED_AT_A_TIME = 65536
"""Keys and values are drawn for this many tokens. Larger caches repeat them."""


class Batch:
    """The tensors of one measurement, which all contenders share.

    Attributes:
        shape: Requests, lengths and heads.
        dtype: The dtype of queries, keys and values: bf16, or fp16 if Triton interprets.
        query: [new tokens, Hq, D].
        block_table: int32 [batch, pages]; pages scattered over the cache, as after a while of
            serving. The width is a multiple of 16, so that all shapes use the same kernels.
        seq_lens: int32 [batch].
        starts, key_starts: int32 [batch + 1], offsets of the requests in `query` and in all tokens.
        pages: Pages of a cache.
        scale: Factor of the scores.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        # Triton's interpreter multiplies the bits of bf16 numbers as if they were integers.
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
        generator = torch.Generator(device).manual_seed(0)
        drawn = min(shape.tokens, FILLED_AT_A_TIME)
        self._key, self._value, self.query = (
            torch.randn(rows, heads, shape.heads.size, generator=generator, device=device).to(
                self.dtype
            )
            for rows, heads in (
                (drawn, shape.heads.kv),
                (drawn, shape.heads.kv),
                (sum(shape.new), shape.heads.query),
            )
        )
        self.pages = sum(shape.pages)
        order = torch.randperm(self.pages, generator=generator, device=device)
        width = -(-max(shape.pages) // 16) * 16
        self.block_table = torch.zeros((shape.batch, width), dtype=torch.int32, device=device)
        for row, own in zip(self.block_table, order.split(shape.pages), strict=True):
            row[: len(own)] = own
        self.seq_lens = torch.tensor(shape.lengths, dtype=torch.int32, device=device)
        self.starts, self.key_starts = (
            torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
            for counts in (shape.new, shape.lengths)
        )
        self.scale = shape.heads.size**-0.5

    def stored(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield keys and values [n, H, D] and slots int64 [n] of all tokens, in pieces."""
        for start in range(0, self.shape.tokens, FILLED_AT_A_TIME):
            stop = min(start + FILLED_AT_A_TIME, self.shape.tokens)
            token = torch.arange(start, stop, device=self.device)
            request = torch.searchsorted(self.key_starts[1:], token, right=True)
            position = token - self.key_starts[request]
            block = self.block_table[request, position // PAGE].to(torch.int64)
            slots = block * PAGE + position % PAGE
            yield self._key[: stop - start], self._value[: stop - start], slots

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same keys and values as [tokens, H, D], without pages."""
        token = torch.arange(self.shape.tokens, device=self.device) % FILLED_AT_A_TIME
        return self._key[token], self._value[token]

    def new(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the new tokens, [new tokens, H, D]."""
        ends = accumulate(self.shape.lengths)
        counts = zip(ends, self.shape.new, strict=True)
        token = torch.cat([torch.arange(end - count, end) for end, count in counts])
        token = token.to(self.device) % FILLED_AT_A_TIME
        return self._key[token], self._value[token]

    def packed_caches(self, dtype: torch.dtype, layers: int) -> list[tuple[torch.Tensor, ...]]:
        """Return filled K and V caches [blocks, PAGE, H, D], halves of one tensor as in vLLM."""
        heads = self.shape.heads
        dims = (self.pages * PAGE, heads.kv, 2 * heads.size)
        cache = torch.zeros(dims, dtype=dtype, device=self.device)
        # Write the bits, because torch cannot index fp8 tensors.
        bits = torch.uint8 if dtype.itemsize == 1 else dtype
        for key, value, slots in self.stored():
            cache.view(bits)[slots] = torch.cat([key, value], dim=-1).to(dtype).view(bits)
        paged = cache.view(self.pages, PAGE, heads.kv, 2 * heads.size)
        return [copy.split(heads.size, dim=-1) for copy in copies(paged, layers)]


class Contender:
    """A kernel with the caches of several layers.

    Attributes:
        name: The name in tables.
        stored: The format of the cache: k8v4, bf16 or fp8.
        note: Conditions under which the kernel ran, for the report.
    """

    name: ClassVar[str]
    stored: ClassVar[str]
    note: str = ""

    def __init__(self, batch: Batch, layers: int) -> None:
        """Make and fill the caches of some layers.

        Raises:
            Unavailable: The kernel cannot run here.
        """
        self.batch = batch

    def attend(self, layer: int) -> torch.Tensor:
        """Run attention with a layer's cache. Returns [new tokens, Hq, D]."""
        raise NotImplementedError


def copies(first: torch.Tensor, layers: int) -> list[torch.Tensor]:
    """Return a filled cache, and equal ones for the other layers."""
    return [first, *(first.clone() for _ in range(layers - 1))]


def require_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("there is no GPU")


class Ours(Contender):
    """This project's kernels. The batch is planned once per step, on the device."""

    name = "ours"
    stored = "k8v4"

    def __init__(self, batch: Batch, layers: int) -> None:
        super().__init__(batch, layers)
        first = self.empty_cache(batch)
        for key, value, slots in batch.stored():
            quantise_and_store(key, value, first, slots)
        self.caches = copies(first, layers)
        self._plan = self.plan()
        self._out = torch.empty_like(batch.query)

    @staticmethod
    def empty_cache(batch: Batch) -> torch.Tensor:
        heads = batch.shape.heads
        dims = (batch.pages, heads.kv, PAGE, token_bytes("k8v4", heads.size))
        return torch.zeros(dims, dtype=torch.uint8, device=batch.device)

    def plan(self, tiling: Tiling | None = None) -> LaunchPlan:
        """Plan the batch with a tiling; None chooses the tile sizes for this device."""
        batch, heads = self.batch, self.batch.shape.heads
        return plan_attention(
            batch.seq_lens, batch.starts, batch.query.shape[0], heads.query, heads.kv, heads.size,
            max_query_len=batch.shape.most_new, tiling=tiling,
        )  # fmt: skip

    def attend(self, layer: int, plan: LaunchPlan | None = None) -> torch.Tensor:
        batch = self.batch
        paged_attention(
            batch.query, self.caches[layer], batch.block_table, batch.seq_lens, batch.starts,
            self._out, scale=batch.scale, plan=plan or self._plan,
        )  # fmt: skip
        return self._out


class OursOneToken(Ours):
    """Our kernels with one new token per request, to compare with several."""

    name = "ours, one token"

    def __init__(self, batch: Batch, layers: int) -> None:
        one = replace(batch.shape, new=(1,) * batch.shape.batch)
        super().__init__(Batch(one, batch.device), layers)


class OursDecodes(Ours):
    """Our kernels for the decodes of a mixed batch alone."""

    name = "ours, decodes alone"
    decodes: ClassVar[bool] = True

    def __init__(self, batch: Batch, layers: int) -> None:
        super().__init__(Batch(batch.shape.part(decodes=self.decodes), batch.device), layers)


class OursPrefills(OursDecodes):
    """Our kernels for the prefills of a mixed batch alone."""

    name = "ours, prefills alone"
    decodes = False


class TorchFlash(Contender):
    """torch's own FlashAttention 2, on raw keys and values without pages."""

    name = "torch's FlashAttention 2 bf16"
    stored = "bf16"

    def __init__(self, batch: Batch, layers: int) -> None:
        require_gpu(batch.device)
        super().__init__(batch, layers)
        self._caches = [copies(x, layers) for x in batch.dense()]
        # torch splits the keys of few queries only in batches of requests of equal length.
        self._batched = not batch.shape.ragged
        self.note = "raw K and V, no pages" + ("" if self._batched else "; keys are not split")

    def attend(self, layer: int) -> torch.Tensor:
        batch, shape = self.batch, self.batch.shape
        query, key, value = batch.query, *(caches[layer] for caches in self._caches)
        starts: tuple[Any, Any] = (batch.starts, batch.key_starts)
        if self._batched:
            query, key, value = (x.unflatten(0, (shape.batch, -1)) for x in (query, key, value))
            starts = None, None
        # The causal mask is aligned to the last key, because new tokens come last.
        out: torch.Tensor = torch.ops.aten._flash_attention_forward(
            query, key, value, *starts, shape.most_new, shape.longest, 0.0, True, False,
            scale=batch.scale,
        )[0]  # fmt: skip
        return out.flatten(0, 1) if self._batched else out
