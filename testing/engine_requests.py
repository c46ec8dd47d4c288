# SPDX-License-Identifier: Apache-2.0
"""Sends requests to an engine in this process, also through a KV connector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Pages = list[dict[str, list[bytes]]]
"""For each worker: by layer, the bytes of each requested block of the layer's KV group."""


@dataclass(frozen=True)
class Output:
    """The output of one request.

    Attributes:
        tokens: The generated token ids.
        logprobs: The log-probability of each token.
        margins: At each token, the log-probability of the likeliest candidate minus that of the
            second.
        prompt_logprobs: The log-probabilities of the prompt's tokens from the second on; None if
            not requested.
        prompt_ranks: The ranks of the tokens of `prompt_logprobs`; 1 is the likeliest.
        cached: Prompt tokens that came from the prefix cache.
    """

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]
    prompt_logprobs: list[float] | None = None
    prompt_ranks: list[int] | None = None
    cached: int = 0


@dataclass(frozen=True)
class HandedOver:
    """A finished request of an engine with a KV connector.

    Attributes:
        output: The output in this engine.
        params: The connector's parameters for the engine that continues the request.
        blocks: The blocks that the request held last, by KV group.
        arrived: The contents of the blocks after another engine sent them and before a step used
            them. None if they arrived within a step, or not at all.
    """

    output: Output
    params: dict[str, Any] | None
    blocks: tuple[list[int], ...]
    arrived: Pages | None


def greedy(max_tokens: int, **more: Any) -> Any:
    """Return vLLM's parameters for exactly `max_tokens` greedy tokens, with `more` added."""
    from vllm import SamplingParams

    # Two log-probabilities, because the second shows how close the choice was.
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
    """Send greedy or seeded requests.

    Args:
        prompts: Token ids.
        max_tokens: The number of tokens to generate.
        prompt_logprobs: Return the prompts' log-probabilities; vLLM then reads nothing from the
            prefix cache.
        alone: Send one request after another instead of all at once.
        fresh: Reset the prefix cache before each batch.
        seed: Sample at temperature 1 with this seed.

    Raises:
        RuntimeError: The prefix cache could not be reset.
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


def hand_over(
    llm: Any,
    prompts: Sequence[list[int]],
    max_tokens: int,
    params: Sequence[dict[str, Any] | None],
) -> list[HandedOver]:
    """Send greedy requests one after another, each with its parameters for the KV connector.

    Args:
        llm: A `vllm.LLM` whose engine runs in this process.
        prompts: Token ids.
        max_tokens: The number of tokens to generate.
        params: The connector's parameters of each request.
    """
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    manager = scheduler.kv_cache_manager
    handed = []
    for prompt, given in zip(prompts, params, strict=True):
        extra = {"kv_transfer_params": given} if given else None
        sampling = greedy(max_tokens, extra_args=extra)
        engine.add_request("handed over", {"prompt_token_ids": prompt}, sampling)
        blocks: tuple[list[int], ...] = ()
        arrived, finished = None, None
        while engine.has_unfinished_requests():
            for request in scheduler.finished_recving_kv_req_ids:
                # Read the blocks before a step appends to them.
                arrived = pages(llm, manager.get_block_ids(request))
            for request in scheduler.running:
                blocks = manager.get_block_ids(request.request_id)
            for output in engine.step():
                finished = output if output.finished else finished
        assert finished is not None
        handed.append(HandedOver(read(finished), finished.kv_transfer_params, blocks, arrived))
    return handed


def pages(llm: Any, blocks: tuple[list[int], ...]) -> Pages:
    """Return the contents of blocks, given by KV group, in each worker."""
    return llm.collective_rpc("read_pages", args=(blocks,))


def metrics(llm: Any) -> dict[str, float]:
    """Return vLLM's counters and gauges by name."""
    return {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}


def read(output: Any) -> Output:
    """Return the output of a finished `vllm.RequestOutput`."""
    completion = output.outputs[0]
    logprobs, margins = [], []
    for token, candidates in zip(completion.token_ids, completion.logprobs, strict=True):
        values = sorted((c.logprob for c in candidates.values()), reverse=True)
        logprobs.append(candidates[token].logprob)
        margins.append(values[0] - values[1])
    prompt_logprobs = prompt_ranks = None
    if output.prompt_logprobs is not None:
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        of_prompt = [candidates[token] for token, candidates in pairs]
        prompt_logprobs = [candidate.logprob for candidate in of_prompt]
        prompt_ranks = [candidate.rank for candidate in of_prompt]
    tokens = list(completion.token_ids)
    return Output(
        tokens, logprobs, margins, prompt_logprobs, prompt_ranks, output.num_cached_tokens or 0
    )
