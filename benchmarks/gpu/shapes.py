# SPDX-License-Identifier: Apache-2.0
"""What is measured, in which order, and how many bytes it reads. Arithmetic only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vllm_hybrid_kv.kernels import k8v4

PAGE = 16
"""Tokens of a page, for every contender: vLLM's default on GPUs."""

GOAL_LENGTH = 32768
"""Tokens of a request in the goals of decode."""

SECTIONS = ("bandwidth", "decode", "verify", "chunked", "prefill", "store")


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads and dims of a head."""

    query: int
    kv: int
    size: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query // self.kv

    def __str__(self) -> str:
        return f"{self.query}/{self.kv} x {self.size}"


@dataclass(frozen=True)
class Shape:
    """A batch of requests of one length.

    Attributes:
        heads: The heads.
        batch: Requests.
        length: Tokens of a request, including its new ones.
        queries: New tokens of a request.
    """

    heads: Heads
    batch: int
    length: int
    queries: int = 1

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return self.batch * self.length

    @property
    def pages(self) -> int:
        """Pages of a request."""
        return -(-self.length // PAGE)

    def cache_bytes(self, stored: str) -> int:
        """Return the bytes of one layer's cache in a format."""
        tokens = self.batch * self.pages * PAGE
        return tokens * self.heads.kv * token_bytes(stored, self.heads.size)

    def read_bytes(self, stored: str) -> int:
        """Return the bytes of the cache that attention has to read once."""
        return self.tokens * self.heads.kv * token_bytes(stored, self.heads.size)

    @property
    def stored_bytes(self) -> int:
        """The bytes that storing all tokens reads, in bf16, and writes, in k8v4."""
        return self.read_bytes("bf16") + self.read_bytes("k8v4")

    @property
    def flops(self) -> int:
        """Operations of causal attention: two products of two operations a number."""
        context = self.length - self.queries
        pairs = self.queries * context + self.queries * (self.queries + 1) // 2
        return 4 * self.batch * self.heads.query * self.heads.size * pairs

    def __str__(self) -> str:
        return f"{self.heads}, batch {self.batch}, {self.length} tokens, {self.queries} new"

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers, for JSON."""
        return asdict(self) | {"heads": str(self.heads)}


def token_bytes(stored: str, head_size: int) -> int:
    """Return the bytes of a token of one KV head in the format k8v4, bf16 or fp8."""
    sizes = {"k8v4": k8v4.slot_bytes(head_size), "bf16": 4 * head_size, "fp8": 2 * head_size}
    return sizes[stored]


def layers_needed(cache_bytes: int, l2_bytes: int) -> int:
    """Return how many layers to measure in turn, so that none is still in the L2 cache.

    Args:
        cache_bytes: Bytes of one layer's cache.
        l2_bytes: Bytes of the L2 cache.
    """
    return max(1, min(256, -(-2 * l2_bytes // cache_bytes)))


@dataclass(frozen=True)
class Job:
    """One measurement: a section and a shape.

    Attributes:
        section: One of `SECTIONS`.
        shape: The batch; None for the bandwidth of the device. For `store` its `tokens` are new.
        rank: Jobs of a lower rank come first. Rank 0 decides a goal.
    """

    section: str
    shape: Shape | None
    rank: int

    def __str__(self) -> str:
        return f"{self.section}, {self.shape}"


@dataclass(frozen=True)
class Preset:
    """How much is measured."""

    heads: tuple[Heads, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    verified: tuple[tuple[int, int], ...]
    verified_tokens: int
    chunk: int
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    stored: tuple[int, ...]
    copied_bytes: int
    seconds: float
    """Time of the rounds of one measurement, see `alternating`."""


HEADS = (Heads(32, 8, 128), Heads(16, 2, 256), Heads(24, 4, 256), Heads(64, 8, 128))

FULL = Preset(
    heads=HEADS,
    batches=(8, 1, 32, 128),
    lengths=(32768, 8192, 131072, 1024),
    verified=((8, 32768), (1, 32768), (32, 8192)),
    verified_tokens=4,
    chunk=2048,
    contexts=(32768, 8192),
    prompts=(8192, 32768),
    stored=(8192, 512, 1),
    copied_bytes=2 << 30,
    seconds=0.6,
)
QUICK = Preset(
    heads=HEADS[:2],
    batches=(8, 1),
    lengths=(32768, 8192),
    verified=((8, 32768),),
    verified_tokens=4,
    chunk=2048,
    contexts=(8192,),
    prompts=(8192,),
    stored=(8192,),
    copied_bytes=1 << 30,
    seconds=0.4,
)
# Stock has another code path for more than 128 new tokens.
SMALLEST = Preset(
    heads=(Heads(2, 1, 64),),
    batches=(1,),
    lengths=(20,),
    verified=((1, 20),),
    verified_tokens=2,
    chunk=129,
    contexts=(16,),
    prompts=(24,),
    stored=(8,),
    copied_bytes=1 << 16,
    seconds=0.0,
)


def jobs(preset: Preset, only: str | None = None) -> list[Job]:
    """Return what a preset measures, the most important first.

    The bandwidth comes first because it is the limit of all else, then the shapes that decide a
    goal, then the rest of decode in the order of the preset's lengths.

    Args:
        preset: How much.
        only: The one section that is wanted; the bandwidth is always measured.
    """
    found = [Job("bandwidth", None, 0)]
    for length in preset.lengths:
        for batch in preset.batches:
            for heads in preset.heads:
                # Large batches at the goals' length decide a goal too, but take longer.
                rank = 2 if length != GOAL_LENGTH else 0 if batch <= 8 else 1
                found.append(Job("decode", Shape(heads, batch, length), rank))
    for place, heads in enumerate(preset.heads):
        # Every section measures two shapes of heads before any measures the others.
        rank = 0 if place < 2 else 1
        for batch, length in preset.verified:
            found.append(Job("verify", Shape(heads, batch, length, preset.verified_tokens), rank))
        for context in preset.contexts:
            shape = Shape(heads, 1, context + preset.chunk, preset.chunk)
            found.append(Job("chunked", shape, rank))
        for length in preset.prompts:
            found.append(Job("prefill", Shape(heads, 1, length, length), rank + 1))
        for tokens in preset.stored:
            found.append(Job("store", Shape(heads, 1, tokens, tokens), rank))
    wanted = [job for job in found if only in (None, job.section) or job.section == "bandwidth"]
    return sorted(wanted, key=lambda job: job.rank)
