# SPDX-License-Identifier: Apache-2.0
"""Requests that a KV connector hands from one engine to another, and what their pages hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from testing import requests
from testing.requests import Output

Pages = list[dict[str, list[bytes]]]
"""What blocks hold, in every worker: by layer, the bytes of each block of its KV group."""


@dataclass(frozen=True)
class Handed:
    """A request that came from another engine, or is about to go to one.

    Attributes:
        output: What it gave.
        params: What the connector says for the engine that goes on.
        blocks: Blocks that held it at last, by KV group.
        arrived: What they held when they had come from another engine, before any step; None
            where they came within a step, or not at all.
    """

    output: Output
    params: dict[str, Any] | None
    blocks: tuple[list[int], ...]
    arrived: Pages | None


def hand_over(
    llm: Any,
    prompts: Sequence[list[int]],
    max_tokens: int,
    params: Sequence[dict[str, Any] | None],
) -> list[Handed]:
    """Send greedy requests one after another.

    Args:
        llm: A `vllm.LLM` whose engine is in this process.
        prompts: Token ids.
        max_tokens: Tokens to generate, no fewer.
        params: What each request brings for the KV connector.
    """
    return [
        _hand_over(llm, prompt, max_tokens, given)
        for prompt, given in zip(prompts, params, strict=True)
    ]


def _hand_over(
    llm: Any, prompt: list[int], max_tokens: int, params: dict[str, Any] | None
) -> Handed:
    sampling = requests.greedy(
        max_tokens, extra_args={"kv_transfer_params": params} if params else None
    )
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    manager = scheduler.kv_cache_manager
    engine.add_request("handed over", {"prompt_token_ids": prompt}, sampling)
    blocks: tuple[list[int], ...] = ()
    arrived, finished = None, None
    while engine.has_unfinished_requests():
        for request in scheduler.finished_recving_kv_req_ids:
            # Before a step computes with them and writes behind them.
            arrived = pages(llm, manager.get_block_ids(request))
        for request in scheduler.running:
            blocks = manager.get_block_ids(request.request_id)
        for output in engine.step():
            finished = output if output.finished else finished
    assert finished is not None
    return Handed(requests.read(finished), finished.kv_transfer_params, blocks, arrived)


def pages(llm: Any, blocks: tuple[list[int], ...]) -> Pages:
    """Return what blocks hold.

    Args:
        llm: A `vllm.LLM` with the worker extension of `faults`.
        blocks: Their ids, by KV group.
    """
    held: Pages = llm.collective_rpc("read_pages", args=(blocks,))
    return held
