# SPDX-License-Identifier: Apache-2.0
"""The reported concurrent requests are those that vLLM's scheduler runs at once."""

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from testing.shapes import SHAPES
from vllm_hybrid_kv.planning.capacity import capacity
from vllm_hybrid_kv.tools.plan.engine import Model
from vllm_hybrid_kv.tools.plan.model_description import described

GIB = 1 << 30
MAX_MODEL_LEN = 32768


@pytest.fixture(scope="module", params=["auto", "fp8", "turboquant_k8v4"])
def qwen(request):
    """Qwen3.6 with room for more sequences than its pool has blocks."""
    with described(SHAPES["qwen3.6-35b-a3b"]) as description:
        yield Model(
            {
                "model": description.folder,
                "kv_cache_dtype": request.param,
                "max_model_len": MAX_MODEL_LEN,
                "max_num_seqs": 256,
                "max_num_batched_tokens": 8192,
                "enable_prefix_caching": False,
                "async_scheduling": False,
            }
        )


def most_at_once(engine, tokens: int, requests: int) -> int:
    """Send requests of `tokens` tokens and return how many hold all of their tokens at once."""
    scheduler = engine.scheduler
    for number in range(requests):
        scheduler.add_request(
            Request(
                request_id=str(number),
                prompt_token_ids=[1] * (tokens - 1),
                sampling_params=SamplingParams(max_tokens=2, ignore_eos=True),
                pooling_params=None,
            )
        )
    while True:
        output = scheduler.schedule()
        if not output.num_scheduled_tokens:
            return len(scheduler.running)
        # No request gets its last token, so none finishes and frees its blocks.
        for request in scheduler.running:
            assert request.num_computed_tokens <= tokens
        ids = list(output.num_scheduled_tokens)
        scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={name: index for index, name in enumerate(ids)},
                sampled_token_ids=[[] for _ in ids],
            ),
        )


@pytest.mark.parametrize("tokens", [512, MAX_MODEL_LEN])
def test_the_scheduler_runs_the_reported_number_of_requests(qwen, tokens):
    engine = qwen.engine(2 * GIB, {})
    held = capacity(engine.vllm_config, engine.kv_cache_config)
    reported = held.short_requests if tokens == 512 else held.max_len_requests
    assert most_at_once(engine, tokens, reported + 3) == reported
    assert int(held.concurrency) == held.max_len_requests
