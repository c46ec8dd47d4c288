# SPDX-License-Identifier: Apache-2.0
"""The models of the end-to-end tests, and how exactly their outputs can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from testing.engine_host import EngineHost, Output
from testing.output_comparison import Bounds, compare, is_decisive


@dataclass(frozen=True)
class Case:
    """A model and how exactly its outputs can be compared.

    Attributes:
        bounds: How far rounding may move log-probabilities.
        tokens: The number of tokens to generate for each prompt.
        candidates: The number of prompts from which a test selects.
        speculates: Whether vLLM can decode the model speculatively on CPUs.
    """

    model: str
    dtype: str
    bounds: Bounds
    tokens: int
    candidates: int
    speculates: bool = True

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype}"


# float32 rounds at 1e-7. If rounding moves a key or a value across the boundary between two codes,
# the stored number changes by a whole step. That always happens to a few of a prompt's 100,000
# numbers, and these change more numbers in later layers. Which numbers change depends on the order
# of sums, and therefore on the CPU.
# With AVX-512, float32 log-probabilities moved by up to 0.03 between batches, chunks and cached
# prompts, and by up to 0.16 with two processes or compilation. With AVX2 they moved by up to 0.078
# between batches.
# bfloat16 rounds logits of 8 to 16 to multiples of 1/16. Gated DeltaNet rounds its state to
# bfloat16 after each chunk. With chunks of 32 tokens and an unquantised cache, vLLM moves a
# prompt's log-probabilities by 0.095 on average, by over 0.34 in 1 of 100, and by up to 0.987.
CASES = [
    Case("llama", "float32", Bounds(0.03, 0.16), tokens=8, candidates=48),
    Case("gemma3", "float32", Bounds(0.03, 0.16), tokens=8, candidates=48),
    # vLLM's Gated DeltaNet for CPUs accepts bfloat16 only.
    Case("qwen3-next", "bfloat16", Bounds(0.4, 1.0), tokens=3, candidates=224, speculates=False),
]

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
"""A `speculative_config` of vLLM that takes drafts from the prompt."""

DIFFERENT = "^outputs differ: "
"""Matches the message of `assert_same`."""


def case_of(model: str) -> Case:
    return next(case for case in CASES if case.model == model)


def settings(model: Path, dtype: str, **more: Any) -> dict[str, Any]:
    """Return the arguments of an engine with a k8v4 cache, changed by `more`."""
    return {
        "model": str(model),
        "dtype": dtype,
        "kv_cache_dtype": "turboquant_k8v4",
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 2048,
        **more,
    }


def shortened(output: Output, tokens: int) -> Output:
    return replace(
        output,
        tokens=output.tokens[:tokens],
        logprobs=output.logprobs[:tokens],
        margins=output.margins[:tokens],
    )


def choose_prompts(
    host: EngineHost, case: Case, pool: list[list[int]], count: int, tokens: int
) -> list[list[int]]:
    """Choose prompts whose answers rounding cannot change.

    Half of the prompts are the longest ones, which read many pages. The other half has all lengths.
    """
    outputs = host.generate(pool, tokens, fresh=True)
    pairs = zip(pool, outputs, strict=True)
    found = [prompt for prompt, output in pairs if is_decisive(output, case.bounds)]
    assert len(found) >= count, f"{len(found)} of {len(pool)} prompts are decisive, not {count}"
    found.sort(key=len)
    long = found[len(found) - count // 2 :]
    rest = found[: len(found) - count // 2]
    step = len(rest) / (count - count // 2)
    return [rest[int(i * step)] for i in range(count - count // 2)] + long


def assert_same(
    outputs: Sequence[Output], expected: Sequence[Output], case: Case, decisive: int | None = None
) -> None:
    """Assert equal tokens, and log-probabilities that differ by no more than rounding.

    Args:
        outputs: The outputs to check.
        expected: The outputs of the reference.
        case: Its bounds say how far rounding may move log-probabilities.
        decisive: Compare each output only up to the first token that rounding could change, and
            require at least this many tokens in total. None compares all tokens.
    """
    found = compare(outputs, expected, case.bounds, whole=decisive is None)
    assert not found.different, f"outputs differ: {'; '.join(found.different[:3])}"
    assert found.tokens >= (decisive or 1)


def run_alone(host: EngineHost, prompts: list[list[int]], tokens: int) -> list[Output]:
    """Run each prompt by itself with an empty prefix cache."""
    return host.generate(prompts, tokens, alone=True, fresh=True)
