# SPDX-License-Identifier: Apache-2.0
"""Run single prompts of a hybrid model in vLLM's real scheduler, without the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from testing.models import large_state_config

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.plan.engine import Engine, Model

ANSWER = 7

POLICY = {"coordinator": "hybrid_aware", "prefix_match_unit": "auto"}
STOCK = {"coordinator": "stock", "prefix_match_unit": "stock"}


def hybrid_model(folder: Path, max_num_batched_tokens: int) -> Model:
    """Write the configuration of a hybrid model to `folder`, and describe the model to vLLM."""
    from vllm_hybrid_kv.tools.plan.engine import Model

    large_state_config().save_pretrained(folder)
    return Model(
        {
            "model": str(folder),
            "block_size": 16,
            "kv_cache_dtype": "turboquant_k8v4",
            "gpu_memory_utilization": 0.1,
            "max_num_seqs": 16,
            "max_num_batched_tokens": max_num_batched_tokens,
        }
    )


def engine_of(model: Model, blocks: int, settings: dict[str, str]) -> Engine:
    """Plan an engine of `hybrid_model` with a pool of the given number of blocks."""
    (page,) = {spec.page_size_bytes for spec in model.specs.values()}
    attention = sum("self_attn" in name for name in model.specs)
    engine = model.engine(blocks * page * attention, settings)
    assert engine.kv_cache_config.num_blocks == blocks
    return engine


def send(
    scheduler: Scheduler, name: str, prompt: Sequence[int], hash_unit: int, **sampling: Any
) -> int:
    """Run a prompt, by default with a one-token answer, in an idle scheduler.

    Returns its hit in tokens.
    """
    # In vLLM 0.33, a block's hash also covers the tokens that draft layers look ahead.
    ahead = getattr(scheduler, "num_hash_lookahead_tokens", 0)
    more = {"num_hash_lookahead_tokens": ahead} if ahead else {}
    request = Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(**{"max_tokens": 1, "ignore_eos": True, **sampling}),
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
