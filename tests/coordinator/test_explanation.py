# SPDX-License-Identifier: Apache-2.0
"""Explanations of hits in given cache contents."""

from __future__ import annotations

from typing import Any

import pytest

from testing.coordinator.contents import (
    chunked,
    coordinator_of,
    every,
    fill,
    fill_at,
    full,
    layout_of,
    mamba,
    random_cases,
    request_of,
    window,
)
from testing.coordinator.oracle import Layout, longest
from vllm_hybrid_kv.coordinator.explanation import Reason
from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator

HYBRID = layout_of(full(64), mamba(64), unit=16)


@pytest.fixture(autouse=True)
def _settings(coordinator_setting):
    coordinator_setting("fixed_point")


def explained(layout: Layout, num_tokens: int, *ends: Any) -> Any:
    """Explain a waiting request, for whose groups the blocks that end at `ends` are cached."""
    request = request_of(layout, range(num_tokens))
    coordinator = coordinator_of(layout, FixedPointCoordinator)
    fill_at(coordinator.block_pool, request, *ends)
    return coordinator.explain(request)


def test_a_missing_state_limits_what_attention_could_serve():
    why = explained(HYBRID, 300, every(64, 256), (64, 80))
    assert (why.prompt_tokens, why.hit_tokens, why.reach_tokens) == (300, 80, 256)
    assert [(kind.name, kind.alone_tokens, kind.lost_tokens) for kind in why.kinds] == [
        ("full_attention", 256, 0),
        ("mamba", 80, 176),
    ]
    assert (why.reason, why.limited_by, why.lost_tokens) == (Reason.LIMITED, "mamba", 176)
    assert str(why) == (
        "request request would hit 80 of 300 prompt tokens: longest prefix of each kind alone: "
        "full_attention 256, mamba 80; mamba lost 176; try the hybrid_kv setting "
        "coordinator=hybrid_aware"
    )


@pytest.mark.parametrize(
    ("attention", "states", "alone", "hit"),
    [((64,), (64, 192), [64, 192], 64), ((), (), [0, 0], 0)],
)
def test_a_hit_of_everything_that_attention_has_cached_is_limited_by_no_kind(
    attention, states, alone, hit
):
    why = explained(HYBRID, 300, attention, states)
    assert [kind.alone_tokens for kind in why.kinds] == alone
    assert (why.hit_tokens, why.reach_tokens, why.lost_tokens) == (hit, hit, 0)
    assert (why.reason, why.limited_by, why.setting) == (Reason.NOT_CACHED, None, None)
    assert str(why).endswith(f"would hit {hit} of 300 prompt tokens: nothing longer was cached")


def test_a_hit_up_to_the_last_token_is_limited_by_no_kind():
    why = explained(HYBRID, 256, every(64, 256), every(16, 256))
    assert (why.hit_tokens, why.reason, why.limited_by) == (240, Reason.LAST_TOKEN, None)
    assert "multiples of 16 tokens and before the last token" in str(why)


def test_the_explanation_of_a_prompt_shorter_than_a_block_names_the_match_unit():
    why = explained(layout_of(full(64), mamba(64)), 64, (64,), (64,))
    assert (why.hit_tokens, why.reason, why.unit_tokens) == (0, Reason.TOO_SHORT, 64)
    assert why.setting == "the hybrid_kv setting prefix_match_unit=auto"
    assert "hits end at multiples of 64 tokens" in str(why)


def test_lost_tokens_are_attributed_to_the_kinds_that_lost_them():
    layout = layout_of(full(16), window(16, 17), mamba(16))
    why = explained(layout, 200, every(16, 160), (128, 64), (16, 64))
    lost = {kind.name: kind.lost_tokens for kind in why.kinds}
    assert (why.hit_tokens, lost) == (64, {"full_attention": 0, "sliding_window": 32, "mamba": 64})
    assert why.limited_by == "mamba"


def test_two_windows_are_one_kind_that_serves_what_both_can():
    layout = layout_of(full(16), window(16, 17), window(16, 33))
    why = explained(layout, 200, every(16, 160), (48, 96, 128), (16, 32, 48, 64))
    (windows,) = [kind for kind in why.kinds if kind.name == "sliding_window"]
    # One could serve 128 tokens and the other 64, both together 48.
    assert (windows.alone_tokens, why.hit_tokens, windows.lost_tokens) == (48, 48, 112)


def test_groups_with_draft_layers_are_a_kind_of_their_own():
    layout = layout_of(full(16), full(16, 16), mamba(16), drafts=(1,))
    why = explained(layout, 200, every(16, 160), every(16, 160), every(16, 160))
    assert [(kind.name, kind.draft) for kind in why.kinds] == [
        ("full_attention", False),
        ("full_attention_draft", True),
        ("mamba", False),
    ]
    assert (why.hit_tokens, why.limited_by, why.lost_tokens) == (144, "full_attention_draft", 16)


def test_states_have_no_draft_layers_even_if_vllm_marks_all_groups():
    why = explained(layout_of(full(16), mamba(16), drafts=()), 200, (16,), ())
    assert [kind.name for kind in why.kinds] == ["full_attention_draft", "mamba"]


def test_without_full_attention_the_reach_is_the_maximum_over_all_kinds():
    why = explained(layout_of(window(16, 17), mamba(16)), 200, (64, 160), (64, 96))
    assert [kind.alone_tokens for kind in why.kinds] == [160, 96]
    assert (why.hit_tokens, why.reach_tokens, why.lost_tokens) == (64, 160, 96)


def test_the_advice_for_chunked_local_attention_is_more_memory():
    # After 144 tokens the chunk starts at 128, and none of its blocks is cached.
    why = explained(layout_of(full(16), chunked(16, 64)), 200, every(16, 144), ())
    assert why.limited_by == "chunked_local_attention"
    assert "memory" in (why.setting or "")


MORE_MEMORY = "more memory for the KV cache (--gpu-memory-utilization, --kv-cache-memory-bytes)"


@pytest.mark.parametrize(
    ("strategy", "mode", "unit", "setting"),
    [
        ("fixed_point", "align", 64, "coordinator=hybrid_aware and prefix_match_unit=auto"),
        ("hybrid_aware", "align", 64, "prefix_match_unit=auto"),
        ("hybrid_aware", "align", 16, MORE_MEMORY),
        ("fixed_point", "all", 64, MORE_MEMORY),
    ],
)
def test_the_advice_names_only_settings_that_are_not_active(
    strategy, mode, unit, setting, coordinator_setting
):
    coordinator_setting(strategy)
    why = explained(layout_of(full(64), mamba(64, mode=mode), unit=unit), 300, every(64, 256), ())
    assert why.limited_by == "mamba"
    assert (why.setting or "").removeprefix("the hybrid_kv setting ") == setting


def test_the_advice_for_a_short_prompt_without_states_is_a_smaller_block():
    why = explained(layout_of(full(64), window(64, 65)), 60, (), ())
    assert (why.reason, why.setting) == (Reason.TOO_SHORT, "a smaller --block-size")


@pytest.mark.parametrize("seed", range(3))
def test_explanations_agree_with_brute_force(seed):
    limited = 0
    for cases in random_cases(9000 + seed, 30, 10):
        layout = cases[0].layout
        coordinator = coordinator_of(layout, FixedPointCoordinator)
        alignment = coordinator._cache_hit_alignment_tokens
        for case in cases:
            assert coordinator.reset_prefix_cache()
            fill(coordinator.block_pool, case.request, case.cached)
            why = coordinator.explain(case.request)
            limit = case.request.num_tokens - 1

            def serve(groups, case=case, alignment=alignment, limit=limit):
                return longest(case.layout, case.cached, alignment, limit, groups)

            assert why.hit_tokens == serve(range(len(layout.groups))), case.what
            for kind, hit in zip(coordinator.observer.kinds, why.kinds, strict=True):
                groups = [
                    group
                    for index in kind.groups
                    for group in coordinator.attention_groups[index].group_ids
                ]
                assert hit.alone_tokens == serve(groups), case.what
            assert all(kind.lost_tokens >= 0 for kind in why.kinds)
            assert why.hit_tokens + why.lost_tokens == why.reach_tokens, case.what
            limited += why.limited_by is not None
    assert limited > 20
