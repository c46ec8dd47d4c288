# SPDX-License-Identifier: Apache-2.0
"""Prompts for the end-to-end tests, and how their outputs are compared."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from testing.engine_host import EngineHost
from testing.models import BOS_TOKEN_ID
from testing.requests import Output
from testing.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE


@dataclass(frozen=True)
class Case:
    """A model and how exactly its outputs can be compared.

    Attributes:
        model: Name of the model in `testing.models.CONFIGS`.
        dtype: Of its weights and activations.
        rounding: How far rounding alone may move a log-probability, but for one in twenty.
        tokens: Tokens to generate.
        candidates: Prompts to choose from; see `decisive`.
        compare_greedily: Whether the greedy tests run it.
        speculates: Whether vLLM can decode it speculatively on CPUs.
        farthest: How far rounding alone may move any log-probability; `rounding` if None.
    """

    model: str
    dtype: str
    rounding: float
    tokens: int
    candidates: int
    compare_greedily: bool = False
    speculates: bool = True
    farthest: float | None = None

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype}"


# `rounding`: float32 rounds at 1e-7, but where that takes a key or a value across a step of its
# code, the stored number moves by a whole step; of some 100,000 in a prompt a few always do, and
# move more of them in the layers above. Which ones, the order of sums decides, and so the CPU: with
# AVX-512 no log-probability of float32 moved by more than 0.03 between batches, chunks and cached
# prompts, and by 0.16 with two processes or compiled; with AVX2 by 0.078 between batches.
# bfloat16 rounds logits of 8 to 16 to multiples of 1/16. With Gated DeltaNet a prompt's chunks,
# each rounded to bfloat16, make its state: cut into 32s in place of one piece, vLLM with an
# unquantised cache moves the log-probabilities of a prompt by 0.095 on average, by more than 0.34
# in one of 100, and by up to 0.987.
CASES = [
    Case(
        "llama",
        "float32",
        rounding=0.03,
        tokens=8,
        candidates=48,
        compare_greedily=True,
        farthest=0.16,
    ),
    Case(
        "gemma3",
        "float32",
        rounding=0.03,
        tokens=8,
        candidates=48,
        compare_greedily=True,
        farthest=0.16,
    ),
    Case("llama", "bfloat16", rounding=0.15, tokens=4, candidates=96),
    Case("gemma3", "bfloat16", rounding=0.15, tokens=4, candidates=96),
    # vLLM's Gated DeltaNet for CPUs takes bfloat16 only.
    Case(
        "qwen3-next",
        "bfloat16",
        rounding=0.4,
        tokens=3,
        candidates=224,
        compare_greedily=True,
        speculates=False,
        farthest=1.0,
    ),
]

CONCURRENT = 20
"""Requests that run at the same time."""

DIFFERENT = r"^prompt \d+: (other tokens|log-probabilities)"
"""What `assert_same` says of outputs that are not the same."""


def settings(model: Path, case: Case, **more: Any) -> dict[str, Any]:
    """Return the arguments of an engine with a k8v4 cache, which `more` may change."""
    return {
        "model": str(model),
        "dtype": case.dtype,
        "kv_cache_dtype": "turboquant_k8v4",
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 2048,
        **more,
    }


def random_prompt(length: int, seed: int) -> list[int]:
    """Return a prompt of random tokens."""
    draw = random.Random(seed)
    tokens = [draw.randrange(len(SPECIAL_TOKENS), VOCAB_SIZE) for _ in range(length - 1)]
    return [BOS_TOKEN_ID, *tokens]


def mixed_prompts(count: int, longest: int = 800) -> list[list[int]]:
    """Return prompts of 2 to `longest` tokens, lengths spread evenly on a logarithmic scale."""
    draw = random.Random(0)
    lengths = [round(2 * (longest / 2) ** draw.random()) for _ in range(count)]
    return [random_prompt(length, seed) for seed, length in enumerate(lengths)]


def decisive(outputs: Sequence[Output], case: Case) -> list[int]:
    """Return the indices of the outputs of which no greedy choice was close.

    Two ways to compute the same thing differ by rounding, and where the two best tokens are
    closer than that, either is right. Equality is asked of outputs where every token was ahead
    of the second by more than twice the rounding of one.
    """
    return [i for i, o in enumerate(outputs) if min(o.margins) > 2 * case.rounding]


def shortened(output: Output, tokens: int) -> Output:
    """Return the beginning of an output."""
    return replace(
        output,
        tokens=output.tokens[:tokens],
        logprobs=output.logprobs[:tokens],
        margins=output.margins[:tokens],
    )


def choose_prompts(
    host: EngineHost, case: Case, pool: list[list[int]], count: int, tokens: int
) -> list[list[int]]:
    """Return prompts of a pool whose outputs on the running engine are decisive.

    Half of them are the longest, so that many pages are read; the others of all lengths.
    """
    found = [pool[i] for i in decisive(host.generate(pool, tokens, fresh=True), case)]
    assert len(found) >= count, f"{len(found)} of {len(pool)} prompts are decisive, not {count}"
    found.sort(key=len)
    long = found[len(found) - count // 2 :]
    rest = found[: len(found) - count // 2]
    step = len(rest) / (count - count // 2)
    return [rest[int(i * step)] for i in range(count - count // 2)] + long


def assert_same(outputs: Sequence[Output], expected: Sequence[Output], case: Case) -> None:
    """Assert equal tokens, and log-probabilities that differ by no more than rounding."""
    assert len(outputs) == len(expected)
    farthest = case.rounding if case.farthest is None else case.farthest
    differences: list[float] = []
    for i, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        assert output.tokens == wanted.tokens, f"prompt {i}: other tokens, {wanted.margins=}"
        apart = [abs(a - b) for a, b in zip(output.logprobs, wanted.logprobs, strict=True)]
        assert max(apart) <= farthest, f"prompt {i}: log-probabilities {max(apart):.4f} apart"
        differences += apart
        far = sum(difference > case.rounding for difference in differences)
        # The first may be the one in twenty.
        assert far <= max(1, len(differences) / 20), f"prompt {i}: log-probabilities {far=}"
    print(f"{case}: {len(outputs)} outputs, {max(differences):.2g} apart of {case.rounding}")


def run_alone(host: EngineHost, prompts: list[list[int]], tokens: int) -> list[Output]:
    """Run each prompt by itself with an empty prefix cache."""
    return host.generate(prompts, tokens, alone=True, fresh=True)
