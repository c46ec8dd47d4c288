# SPDX-License-Identifier: Apache-2.0
"""Define what is measured, in which order, and how many bytes it reads. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_hybrid_kv.kernels import k8v4

PAGE = 16
"""Tokens of a page, for every contender: vLLM's default on GPUs."""

LONG = 32768
"""Tokens of a request in the goals of decode."""

SECTIONS = {
    "decode": "Decode: one new token a request",
    "verify": "Verification of several tokens",
    "mixed": "Decodes and a chunk of a prompt in one batch",
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


def _range(numbers: tuple[int, ...]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class Shape:
    """A batch of requests.

    Attributes:
        heads: The heads.
        lengths: Tokens of each request, including its new ones.
        new: New tokens of each request. Decodes come first, as in vLLM.
    """

    heads: Heads
    lengths: tuple[int, ...]
    new: tuple[int, ...]

    @classmethod
    def equal(cls, heads: Heads, batch: int, length: int, new: int = 1) -> Shape:
        return cls(heads, (length,) * batch, (new,) * batch)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def most_new(self) -> int:
        return max(self.new)

    @property
    def ragged(self) -> bool:
        """Whether requests have different lengths or different numbers of new tokens."""
        return len({*self.lengths}) > 1 or len({*self.new}) > 1

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return sum(self.lengths)

    @property
    def pages(self) -> list[int]:
        """Pages of each request."""
        return [-(-length // PAGE) for length in self.lengths]

    def part(self, *, decodes: bool) -> Shape:
        """Return the requests with one new token, or the others."""
        pairs = zip(self.lengths, self.new, strict=True)
        lengths, new = zip(*(pair for pair in pairs if (pair[1] == 1) == decodes), strict=True)
        return Shape(self.heads, lengths, new)

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
        pairs = sum(
            new * (length - new) + new * (new + 1) // 2
            for length, new in zip(self.lengths, self.new, strict=True)
        )
        return 4 * self.heads.query * self.heads.size * pairs

    def __str__(self) -> str:
        lengths, new = _range(self.lengths), _range(self.new)
        return f"{self.heads}, batch {self.batch}, {lengths} tokens, {new} new"

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON and tables contain."""
        return {
            "heads": str(self.heads), "batch": self.batch, "longest": self.longest,
            "tokens": _range(self.lengths), "new": _range(self.new), "ragged": self.ragged,
        }  # fmt: skip


def token_bytes(stored: str, head_size: int) -> int:
    """Return how many bytes a token of one KV head takes in the format k8v4, bf16 or fp8."""
    sizes = {"k8v4": k8v4.slot_bytes(head_size), "bf16": 4 * head_size, "fp8": 2 * head_size}
    return sizes[stored]


def layers_needed(cache_bytes: int, l2_bytes: int) -> int:
    """Return how many caches to measure in turn, so that none is still in the L2 cache."""
    return max(1, min(256, -(-2 * l2_bytes // cache_bytes)))


def decode_lengths(batch: int, *, ragged: bool) -> tuple[int, ...]:
    """Return the tokens of each request: all equal, or from 64k down to 1k in equal ratios."""
    if not ragged:
        return (LONG,) * batch
    return tuple(int(2 * LONG * 64 ** (-i / (batch - 1))) for i in range(batch))


class Job(NamedTuple):
    """One measurement: a section and a shape. For `store`, all tokens of the shape are new."""

    section: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.section}, {self.shape}"


class Part(NamedTuple):
    """A part of a run, which writes a file of its own.

    Attributes:
        title: For the report.
        seconds: The time limit, which starts after the kernels have been compiled.
        jobs: The measurements, the most important first; empty for checks.
    """

    title: str
    seconds: float
    jobs: tuple[Job, ...]


HEADS = (Heads(32, 8, 128), Heads(16, 2, 256))
OTHER_HEADS = (Heads(24, 4, 256), Heads(64, 8, 128))
CHUNK = 2048


def _decode(heads: Heads, batch: int, *, ragged: bool) -> Job:
    return Job("decode", Shape(heads, decode_lengths(batch, ragged=ragged), (1,) * batch))


def _decodes_and_chunk(heads: Heads, decodes: tuple[int, ...], context: int, chunk: int) -> Job:
    lengths, new = (*decodes, context + chunk), (*(1 for _ in decodes), chunk)
    return Job("mixed", Shape(heads, lengths, new))


def _equal(section: str, batch: int, length: int, new: int, heads: tuple[Heads, ...]) -> list[Job]:
    return [Job(section, Shape.equal(of, batch, length, new)) for of in heads]


CHECKS = "known-answers"

PARTS = {
    CHECKS: Part("Known answers, compared with the reference", 120, ()),
    "decode": Part("Decode", 240, tuple(
        _decode(of, batch, ragged=ragged)
        for batch in (8, 32, 16) for ragged in (False, True) for of in HEADS
    )),
    "mixed": Part("Mixed batches, verification, chunked prefill", 180, (
        # One long request next to short ones: a plan that follows the longest query is slow.
        *(_decodes_and_chunk(of, (4 * LONG, *[2048] * 6), 8192, CHUNK) for of in HEADS),
        *_equal("verify", 8, LONG, 4, HEADS),
        *_equal("chunked", 1, LONG + CHUNK, CHUNK, HEADS),
        *(_decodes_and_chunk(of, (8192,) * 16, 8192, 512) for of in HEADS),
        *(Job("verify", Shape(of, decode_lengths(8, ragged=True), (4,) * 8)) for of in HEADS),
        *_equal("chunked", 1, 8192 + CHUNK, CHUNK, HEADS),
    )),
    "more": Part("Other batches, whole prompts, store", 240, (
        *_equal("decode", 1, LONG, 1, HEADS),
        *_equal("store", 1, 8192, 8192, HEADS),
        *_equal("prefill", 1, 8192, 8192, HEADS),
        *_equal("decode", 8, LONG, 1, OTHER_HEADS),
        *_equal("decode", 64, 8192, 1, HEADS),
        *_equal("decode", 8, 4 * LONG, 1, HEADS),
        *_equal("decode", 128, 1024, 1, HEADS),
        *_equal("prefill", 1, LONG, LONG, HEADS),
        *_equal("store", 1, 1, 1, HEADS),
    )),
}  # fmt: skip
"""The parts of a run by name, in their order."""

DEFAULT_PARTS = (CHECKS, "decode", "mixed")

_TINY = Heads(2, 1, 64)
REHEARSED = {
    CHECKS: (),
    "decode": (Job("decode", Shape(_TINY, (40, 9), (1, 1))),),
    "mixed": (
        Job("mixed", Shape(_TINY, (20, 24), (1, 8))),
        Job("verify", Shape.equal(_TINY, 1, 20, 2)),
        # vLLM's k8v4 has another code path for more than 128 new tokens.
        Job("chunked", Shape.equal(Heads(1, 1, 64), 1, 145, 129)),
    ),
    "more": (
        Job("prefill", Shape.equal(_TINY, 1, 24, 24)), Job("store", Shape.equal(_TINY, 1, 8, 8)),
    ),
}  # fmt: skip
"""The jobs of a rehearsal in Triton's interpreter."""
