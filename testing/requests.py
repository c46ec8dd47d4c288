# SPDX-License-Identifier: Apache-2.0
"""Greedy requests to an engine of this process; the end-to-end tests send theirs this way too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Output:
    """What one request gave.

    Attributes:
        tokens: The generated token ids.
        logprobs: Their log-probabilities.
        margins: How far each is ahead of the second, in log-probability.
        prompt_logprobs: Of the prompt's tokens from the second on, if asked for.
        prompt_ranks: Of the same tokens; 1 for the likeliest.
        cached: Prompt tokens that came from the prefix cache.
    """

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]
    prompt_logprobs: list[float] | None = None
    prompt_ranks: list[int] | None = None
    cached: int = 0


def greedy(max_tokens: int, **more: Any) -> Any:
    """Return vLLM's parameters for so many of the likeliest tokens, whatever they are.

    Args:
        max_tokens: How many.
        more: Further parameters.
    """
    from vllm import SamplingParams

    # The second likeliest says how close the choice was.
    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=2,
        **more,
    )


def generate(
    llm: Any,
    prompts: list[list[int]],
    max_tokens: int,
    prompt_logprobs: bool = False,
    alone: bool = False,
    fresh: bool = False,
    seed: int | None = None,
) -> list[Output]:
    """Send greedy requests, or seeded ones.

    Args:
        llm: A `vllm.LLM`.
        prompts: Token ids.
        max_tokens: Tokens to generate, no fewer.
        prompt_logprobs: Ask for those of the prompt; vLLM then reads nothing from the prefix cache.
        alone: One after another, not all at once.
        fresh: Empty the prefix cache before each batch.
        seed: Sample at temperature 1 with this seed.

    Raises:
        RuntimeError: The prefix cache could not be emptied.
    """
    sampling = greedy(max_tokens, prompt_logprobs=0 if prompt_logprobs else None)
    if seed is not None:
        sampling.temperature, sampling.seed = 1.0, seed
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = []
    for batch in [[r] for r in requests] if alone else [requests]:
        if fresh and not llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied")
        outputs += llm.generate(batch, sampling, use_tqdm=False)
    return [read(output) for output in outputs]


def metrics(llm: Any) -> dict[str, float]:
    """Return vLLM's counters and gauges by name."""
    return {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}


def read(output: Any) -> Output:
    """Return what a finished request of `vllm.LLM` gave."""
    completion = output.outputs[0]
    logprobs, margins = [], []
    for token, candidates in zip(completion.token_ids, completion.logprobs, strict=True):
        values = sorted((c.logprob for c in candidates.values()), reverse=True)
        logprobs.append(candidates[token].logprob)
        margins.append(values[0] - values[1])
    prompt_logprobs = prompt_ranks = None
    if output.prompt_logprobs is not None:
        of_prompt = [
            candidates[token]
            for token, candidates in zip(
                output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
            )
        ]
        prompt_logprobs = [candidate.logprob for candidate in of_prompt]
        prompt_ranks = [candidate.rank for candidate in of_prompt]
    tokens = list(completion.token_ids)
    return Output(
        tokens, logprobs, margins, prompt_logprobs, prompt_ranks, output.num_cached_tokens or 0
    )
