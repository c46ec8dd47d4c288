# SPDX-License-Identifier: Apache-2.0
"""Sends prompts to vLLM's real scheduler, one at a time and without a model."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

ANSWER = 7


def send(scheduler: Scheduler, name: str, prompt: Sequence[int], hash_unit: int) -> int:
    """Run a prompt and an answer of one token, and return its hit in tokens.

    Args:
        scheduler: An idle scheduler.
        name: The request's id.
        prompt: Token ids.
        hash_unit: Tokens per hash.
    """
    # In vLLM 0.33, hashes cover the lookahead of draft layers.
    ahead = getattr(scheduler, "num_hash_lookahead_tokens", 0)
    more = {"num_hash_lookahead_tokens": ahead} if ahead else {}
    request = Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(max_tokens=1, ignore_eos=True),
        pooling_params=None,
        block_hasher=get_request_block_hasher(hash_unit, sha256, **more),
    )
    scheduler.add_request(request)
    hit = None
    while scheduler.requests:
        step = scheduler.schedule()
        for new in step.scheduled_new_reqs:
            hit = new.num_computed_tokens
        names = list(step.num_scheduled_tokens)
        assert names, f"{name} of {len(prompt)} tokens is not scheduled"
        ended = request.num_computed_tokens >= len(prompt)
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index=dict.fromkeys(names, 0),
            sampled_token_ids=[[ANSWER] if ended else []],
        )
        scheduler.update_from_output(step, result)
    assert hit is not None
    return hit
