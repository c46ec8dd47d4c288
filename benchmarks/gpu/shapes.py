# SPDX-License-Identifier: Apache-2.0
"""Define what is measured, in which order, and how many bytes it reads. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_hybrid_kv.kernels import k8v4

PAGE = 16
"""Tokens of a page, for every contender: vLLM's default on GPUs."""

GOAL_LENGTH = 32768
"""Tokens of a request in the goals of decode."""

SECTIONS = {
    "decode": "Decode: one new token a request",
    "verify": "Verification of several tokens",
    "chunked": "Chunked prefill over cached context",
    "prefill": "Whole prompts",
    "store": "Quantise and store",
}
"""Titles by section."""


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads and dims of a head."""

    query: int
    kv: int
    size: int

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

    def read_bytes(self, stored: str) -> int:
        """Return the bytes of the cache that attention has to read once."""
        return self.tokens * self.heads.kv * token_bytes(stored, self.heads.size)

    @property
    def stored_bytes(self) -> int:
        """How many bytes storing all tokens reads (bf16) and writes (k8v4), in total."""
        return self.read_bytes("bf16") + self.read_bytes("k8v4")

    @property
    def flops(self) -> int:
        """Operations of causal attention: two products, each a multiply and an add per number."""
        context = self.length - self.queries
        pairs = self.queries * context + self.queries * (self.queries + 1) // 2
        return 4 * self.batch * self.heads.query * self.heads.size * pairs

    def __str__(self) -> str:
        return f"{self.heads}, batch {self.batch}, {self.length} tokens, {self.queries} new"

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers, for JSON."""
        return asdict(self) | {"heads": str(self.heads)}


def token_bytes(stored: str, head_size: int) -> int:
    """Return how many bytes a token of one KV head takes in the format k8v4, bf16 or fp8."""
    sizes = {"k8v4": k8v4.slot_bytes(head_size), "bf16": 4 * head_size, "fp8": 2 * head_size}
    return sizes[stored]


def layers_needed(cache_bytes: int, l2_bytes: int) -> int:
    """Return how many caches to measure in turn, so that none is still in the L2 cache."""
    return max(1, min(256, -(-2 * l2_bytes // cache_bytes)))


@dataclass(frozen=True)
class Job:
    """One measurement: a section and a shape.

    Attributes:
        section: One of `SECTIONS`.
        shape: The batch. For `store`, all its tokens are new.
        rank: Jobs of a lower rank come first. Rank 0 decides a goal.
    """

    section: str
    shape: Shape
    rank: int

    def __str__(self) -> str:
        return f"{self.section}, {self.shape}"


def jobs(
    heads: Sequence[Heads],
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    verified: Sequence[tuple[int, int]],
    contexts: Sequence[int],
    prompts: Sequence[int],
    stored: Sequence[int],
    verified_tokens: int = 4,
    chunk: int = 2048,
) -> list[Job]:
    """Return the measurements, the most important first.

    The shapes that decide a goal come first, then the rest of decode in the order of `lengths`.

    Args:
        heads: Shapes of heads for every section.
        batches, lengths: For decode, which measures every combination.
        verified: Pairs of batch and length for verification.
        contexts: Tokens before each chunk.
        prompts: Tokens of whole prompts.
        stored: Numbers of tokens to store.
        verified_tokens: New tokens of each verification.
        chunk: New tokens of each chunk.
    """

    # Large batches at the goals' length decide a goal too, but take longer.
    found = [
        Job("decode", Shape(of, batch, length), 2 if length != GOAL_LENGTH else int(batch > 8))
        for length in lengths
        for batch in batches
        for of in heads
    ]
    for place, of in enumerate(heads):
        # Every section measures two shapes of heads before any section measures more.
        rank = int(place >= 2)
        for batch, length in verified:
            found.append(Job("verify", Shape(of, batch, length, verified_tokens), rank))
        for context in contexts:
            found.append(Job("chunked", Shape(of, 1, context + chunk, chunk), rank))
        for length in prompts:
            found.append(Job("prefill", Shape(of, 1, length, length), rank + 1))
        for tokens in stored:
            found.append(Job("store", Shape(of, 1, tokens, tokens), rank))
    return sorted(found, key=lambda job: job.rank)


HEADS = (Heads(32, 8, 128), Heads(16, 2, 256), Heads(24, 4, 256), Heads(64, 8, 128))

FULL = jobs(
    HEADS,
    batches=(8, 1, 32, 128),
    lengths=(32768, 8192, 131072, 1024),
    verified=((8, 32768), (1, 32768), (32, 8192)),
    contexts=(32768, 8192),
    prompts=(8192, 32768),
    stored=(8192, 512, 1),
)
QUICK = jobs(
    HEADS[:2],
    batches=(8, 1),
    lengths=(32768, 8192),
    verified=((8, 32768),),
    contexts=(8192,),
    prompts=(8192,),
    stored=(8192,),
)
# For the interpreter. vLLM's k8v4 has another code path for more than 128 new tokens.
SMALLEST = jobs(
    (Heads(2, 1, 64),),
    batches=(1,),
    lengths=(20,),
    verified=((1, 20),),
    contexts=(16,),
    prompts=(24,),
    stored=(8,),
    verified_tokens=2,
    chunk=129,
)
