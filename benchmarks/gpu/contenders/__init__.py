# SPDX-License-Identifier: Apache-2.0
"""The kernels that are measured, each launched as its own backend launches it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch

from benchmarks.gpu.environment import Unavailable
from benchmarks.gpu.measure import Call
from benchmarks.gpu.shapes import PAGE, Shape

FILLED_AT_A_TIME = 65536
"""Tokens whose keys and values are random; larger caches repeat them."""


class Batch:
    """The tensors of all contenders of a measurement.

    Attributes:
        shape: Requests, lengths and heads.
        dtype: bf16 of queries, keys and values; fp16 if Triton interprets.
        query: [batch * queries, Hq, D].
        block_table: int32 [batch, pages]; pages scattered over the cache, as after a while of
            serving. The width is a multiple of 16, so that all shapes use the same kernels.
        seq_lens: int32 [batch].
        starts: int32 [batch + 1], offsets of the requests in `query`.
        pages: Pages of a cache.
        scale: Factor of the scores.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        # Triton's interpreter multiplies the bits of bf16 numbers as if they were integers.
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
        generator = torch.Generator(device).manual_seed(0)

        def random(tokens: int, heads: int) -> torch.Tensor:
            dims = (tokens, heads, shape.heads.size)
            return torch.randn(dims, generator=generator, device=device).to(self.dtype)

        drawn = min(shape.tokens, FILLED_AT_A_TIME)
        self._key, self._value = (random(drawn, shape.heads.kv) for _ in "kv")
        self.query = random(shape.batch * shape.queries, shape.heads.query)
        self.pages = shape.batch * shape.pages
        order = torch.randperm(self.pages, generator=generator, device=device)
        self.block_table = torch.zeros(
            (shape.batch, -(-shape.pages // 16) * 16), dtype=torch.int32, device=device
        )
        self.block_table[:, : shape.pages] = order.view(shape.batch, shape.pages)
        self.seq_lens = torch.full((shape.batch,), shape.length, dtype=torch.int32, device=device)
        self.starts = torch.arange(
            0, shape.batch * shape.queries + 1, shape.queries, dtype=torch.int32, device=device
        )
        self.scale = shape.heads.size**-0.5

    def stored(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield keys and values [n, H, D] and slots int64 [n] of all tokens, in pieces."""
        for start in range(0, self.shape.tokens, FILLED_AT_A_TIME):
            stop = min(start + FILLED_AT_A_TIME, self.shape.tokens)
            token = torch.arange(start, stop, device=self.device)
            request, position = token // self.shape.length, token % self.shape.length
            block = self.block_table[request, position // PAGE].to(torch.int64)
            slots = block * PAGE + position % PAGE
            yield self._key[: stop - start], self._value[: stop - start], slots

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same keys and values as [batch, length, H, D], without pages."""
        dims = (self.shape.batch, self.shape.length, self.shape.heads.kv, self.shape.heads.size)
        token = torch.arange(self.shape.tokens, device=self.device) % FILLED_AT_A_TIME
        return self._key[token].view(dims), self._value[token].view(dims)

    def new(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the new tokens, [batch * queries, H, D]."""
        key, value = (x[:, -self.shape.queries :].flatten(0, 1) for x in self.dense())
        return key.contiguous(), value.contiguous()

    def packed_caches(self, dtype: torch.dtype, layers: int) -> list[tuple[torch.Tensor, ...]]:
        """Return filled K and V caches [blocks, PAGE, H, D], halves of one tensor as in vLLM."""
        heads = self.shape.heads
        dims = (self.pages * PAGE, heads.kv, 2 * heads.size)
        cache = torch.zeros(dims, dtype=dtype, device=self.device)
        # The bits are written, because torch cannot index fp8 numbers.
        bits = torch.uint8 if dtype.itemsize == 1 else dtype
        for key, value, slots in self.stored():
            cache.view(bits)[slots] = torch.cat([key, value], dim=-1).to(dtype).view(bits)
        paged = cache.view(self.pages, PAGE, heads.kv, 2 * heads.size)
        return [copy.split(heads.size, dim=-1) for copy in copies(paged, layers)]


class Contender(ABC):
    """A kernel with the caches of several layers.

    Attributes:
        name: As in tables.
        stored: The format of the cache: k8v4, bf16 or fp8.
        note: Conditions under which it ran, for the report.
    """

    name: ClassVar[str]
    stored: ClassVar[str]
    note: str = ""

    @abstractmethod
    def __init__(self, batch: Batch, layers: int) -> None:
        """Make and fill the caches of some layers.

        Raises:
            Unavailable: It cannot run here.
        """

    @abstractmethod
    def attend(self, layer: int) -> torch.Tensor:
        """Attend with a layer's cache and return [batch * queries, Hq, D]."""

    @property
    def once_a_step(self) -> Call | None:
        """The work that an engine does once in a step for all layers, if any."""
        return None


def copies(first: torch.Tensor, layers: int) -> list[torch.Tensor]:
    """Return a filled cache, and equal ones for the other layers."""
    return [first, *(first.clone() for _ in range(layers - 1))]


def require_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("there is no GPU")
