# SPDX-License-Identifier: Apache-2.0
"""Make vLLM's scheduler for a world's plan, without a model."""

from __future__ import annotations

import tempfile
from functools import cache
from typing import Any

from vllm.config import KVEventsConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.math_utils import round_up
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.structured_output import StructuredOutputManager

from testing.models import large_state_config, with_mtp_layer
from tests.coordinator.soak import connector
from tests.coordinator.soak.connector import SoakConnector
from tests.coordinator.soak.plans import Plan
from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.settings import resolve
from vllm_hybrid_kv.state import STATE


def make_scheduler(plan: Plan) -> Scheduler:
    """Make the scheduler that an engine with this plan would use."""
    config = configure(plan)
    make = AsyncScheduler if plan.lag else Scheduler
    return make(
        vllm_config=config,
        kv_cache_config=plan.kv_cache_config,
        structured_output_manager=StructuredOutputManager(config),
        block_size=plan.scheduler_block_size,
        hash_block_size=plan.unit,
        log_stats=True,
    )


@cache
def _folder() -> str:
    """Write the configuration of a hybrid model with an MTP layer. Returns its folder."""
    folder = tempfile.mkdtemp()
    with_mtp_layer(large_state_config()).save_pretrained(folder)
    return folder


def configure(plan: Plan) -> VllmConfig:
    """Make the configuration of an engine with this plan. Its model is never built."""
    plugin.register()
    more: dict[str, Any] = {}
    if plan.drafting is not None:
        own = {"prompt_lookup_max": 2} if plan.drafting == "ngram" else {}
        drafts = {"method": plan.drafting, "num_speculative_tokens": plan.draft_tokens}
        more["speculative_config"] = {**drafts, **own}
    if plan.connector == "offload":
        block_bytes = sum(spec.page_size_bytes for spec in plan.specs)
        more["kv_transfer_config"] = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                # vLLM rounds blocks up to a multiple of this number of bytes.
                "cpu_bytes_to_use": plan.host_blocks
                * round_up(block_bytes, CPUOffloadingSpec.BLOCK_SIZE_ALIGNMENT)
            },
        }
    elif plan.connector is not None:
        more["kv_transfer_config"] = {
            "kv_connector": SoakConnector.__name__,
            "kv_connector_module_path": connector.__name__,
            "kv_role": "kv_both",
            "kv_load_failure_policy": plan.load_failure_policy,
        }
    config = EngineArgs(
        model=_folder(),
        skip_tokenizer_init=True,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=2048,
        gpu_memory_utilization=0.1,
        enable_prefix_caching=True,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
        mamba_cache_mode="align" if plan.has_states else "none",
        additional_config={
            # Drafts are safe here, because only a real worker can corrupt states.
            "hybrid_kv": {"coordinator": plan.strategy, "allow_unsafe_drafts": True}
        },
        **more,
    ).create_engine_config()
    config.scheduler_config.max_num_batched_tokens = plan.budget
    config.scheduler_config.max_num_scheduled_tokens = plan.budget
    config.scheduler_config.long_prefill_token_threshold = plan.long_prefill
    config.scheduler_config.async_scheduling = plan.lag > 0
    config.scheduler_config.scheduler_reserve_full_isl = plan.reserve_full
    config.model_config.max_model_len = plan.max_model_len
    config.cache_config.block_size = plan.block_size
    if plan.connector == "offload":
        config.cache_config.prefix_match_unit = plan.unit
    config.cache_config.num_gpu_blocks = plan.num_blocks
    STATE.engine_config, STATE.engine_settings = config, resolve(config.additional_config)
    return config
