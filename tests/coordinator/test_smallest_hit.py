# SPDX-License-Identifier: Apache-2.0
"""Compare `smallest_hit` with the shortest repeated prompt that hits in vLLM's scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec

from testing.coordinator.contents import chunked, full, mamba, ring, window
from testing.coordinator.prompts import send
from tests.coordinator.soak.engine import configure, make_scheduler
from tests.coordinator.soak.plans import STRATEGIES, Plan
from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.coordinator.strategies import match_unit
from vllm_hybrid_kv.planning.capacity import hits_are_possible, smallest_hit

LONGEST = 1024


def plan_of(
    specs: Sequence[KVCacheSpec], strategy: str, drafts: Sequence[int] | None = None
) -> Plan:
    """Make a plan with one group per spec. `resolved` replaces its block sizes."""
    return Plan(
        strategy=strategy,
        groups=tuple(
            KVCacheGroupSpec([f"layer {i}"], spec, is_eagle_group=i in (drafts or ()))
            for i, spec in enumerate(specs)
        ),
        unit=1,
        block_size=min(spec.block_size for spec in specs if spec.prefix_cacheable),
        scheduler_block_size=1,
        num_blocks=600,
        max_model_len=LONGEST,
        max_num_seqs=4,
        budget=2048,
        drafting=None if drafts is None else "mtp",
        draft_tokens=0 if drafts is None else 1,
    )


def resolved(plan: Plan, unit_strategy: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, int]:
    """Let vLLM resolve a plan's block sizes. Returns the changed plan and its smallest hit."""
    monkeypatch.setenv("VLLM_HYBRID_KV_PREFIX_MATCH_UNIT", unit_strategy)
    plugin.register()
    config = configure(plan)
    sizes = resolve_kv_cache_block_sizes(plan.kv_cache_config, config)
    # This module may have imported vLLM's own function before the patch: apply the unit by hand.
    if unit_strategy == "auto" and (unit := match_unit(plan.kv_cache_config, 1)) is not None:
        config.cache_config.prefix_match_unit = unit
        sizes = resolve_kv_cache_block_sizes(plan.kv_cache_config, config)
    plan = replace(plan, scheduler_block_size=sizes[0], unit=sizes[1])
    return plan, smallest_hit(config, plan.kv_cache_config, *sizes)


def hits(plan: Plan, tokens: int) -> int:
    """Send a prompt twice. Returns how many tokens the second request hits."""
    scheduler = make_scheduler(plan)
    prompt = [index % 900 for index in range(tokens)]
    assert send(scheduler, "first", prompt, plan.unit) == 0
    return send(scheduler, "second", prompt, plan.unit)


def states(block: int, drafts: int = 0) -> KVCacheSpec:
    return replace(mamba(block), num_speculative_blocks=drafts)


SHAPES = {
    "full attention alone": ([full(16)], None),
    "full attention and a window": ([full(16), window(16, 40)], None),
    "blocks of two sizes": ([full(16), window(32, 40)], None),
    "full attention and chunks": ([full(16), chunked(16, 32)], None),
    "states and attention": ([states(256), full(256)], None),
    "states, two kinds of attention": ([states(192), full(192), full(192, 16)], None),
    "states and a window": ([states(128), full(128), window(64, 100)], None),
    "states and a ring": ([states(256), full(256), ring(4)], None),
    "drafts alone": ([full(16)], [0]),
    "drafts next to a window": ([full(16), window(16, 40)], [0]),
    "drafts with a window": ([full(16), window(16, 40)], [1]),
    "drafts without a marked group": ([full(16), window(16, 40)], []),
    "drafts next to states": ([states(256, 1), full(256), full(256, 16)], [2]),
    "drafts of another block": ([full(64), full(16, 16)], [1]),
}


@pytest.mark.parametrize("unit_strategy", ["stock", "auto"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_of_the_smallest_hit_hits_and_no_shorter_one(
    shape, strategy, unit_strategy, monkeypatch
):
    specs, drafts = SHAPES[shape]
    plan, smallest = resolved(plan_of(specs, strategy, drafts), unit_strategy, monkeypatch)
    assert hits(plan, smallest) > 0
    for tokens in {smallest - 1, smallest - 2, smallest // 2, plan.unit + 1, 2} - {0, 1}:
        if tokens < smallest:
            assert hits(plan, tokens) == 0, tokens


def test_a_match_unit_of_64_lowers_the_smallest_hit_to_65_tokens(monkeypatch):
    specs = [states(256), full(256)]
    _, whole = resolved(plan_of(specs, "stock"), "stock", monkeypatch)
    _, fine = resolved(plan_of(specs, "stock"), "auto", monkeypatch)
    assert (whole, fine) == (257, 65)


def test_no_hit_is_possible_if_the_prompt_leaves_no_room_for_an_answer(monkeypatch):
    plan = plan_of([states(256), full(256)], "stock")
    plan, smallest = resolved(plan, "stock", monkeypatch)
    assert hits_are_possible(configure(plan), smallest)
    assert hits_are_possible(configure(replace(plan, max_model_len=smallest + 1)), smallest)
    assert not hits_are_possible(configure(replace(plan, max_model_len=smallest)), smallest)
