# SPDX-License-Identifier: Apache-2.0
"""Fill the prefix cache, then check how the coordinator explains a request's hit."""

from __future__ import annotations

from typing import Any

import pytest
import vllm

from testing.coordinator.contents import (
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
    """Explain a waiting request. For each group, `ends` has the tokens where cached blocks end."""
    request = request_of(layout, range(num_tokens))
    coordinator = coordinator_of(layout, FixedPointCoordinator)
    fill_at(coordinator.block_pool, request, *ends)
    return coordinator.explain(request)


@pytest.mark.parametrize(
    ("layout", "ends", "hit", "reach", "kinds"),
    [
        pytest.param(
            *(HYBRID, [every(64, 256), (64, 80)], 80, 256),
            {"full_attention": (256, 0), "mamba": (80, 176)},
            id="a missing state limits what attention could serve",
        ),
        pytest.param(
            layout_of(full(16), window(16, 17), mamba(16)),
            *([every(16, 160), (128, 64), (16, 64)], 64, 160),
            {"full_attention": (160, 0), "sliding_window": (128, 32), "mamba": (64, 64)},
            id="several kinds lose tokens",
        ),
        pytest.param(
            # One window alone could serve 128 tokens, the other 64, and both together 48.
            layout_of(full(16), window(16, 17), window(16, 33)),
            *([every(16, 160), (48, 96, 128), (16, 32, 48, 64)], 48, 160),
            {"full_attention": (160, 0), "sliding_window": (48, 112)},
            id="two windows are one kind that serves what both can",
        ),
        pytest.param(
            layout_of(full(16), full(16, 16), mamba(16), drafts=(1,)),
            *([every(16, 160)] * 3, 144, 160),
            {"full_attention": (160, 0), "full_attention_draft": (144, 16), "mamba": (160, 0)},
            id="groups with draft layers are a kind of their own",
        ),
        pytest.param(
            # No group is marked as a draft group, so vLLM treats all groups as draft groups.
            layout_of(full(16), mamba(16), drafts=()),
            *([(16,), ()], 0, 0),
            {"full_attention_draft": (0, 0), "mamba": (0, 0)},
            id="states have no draft layers",
        ),
        pytest.param(
            layout_of(window(16, 17), mamba(16)),
            *([(64, 160), (64, 96)], 64, 160),
            {"sliding_window": (160, 32), "mamba": (96, 64)},
            id="without full attention the reach is the maximum over all kinds",
        ),
    ],
)
def test_lost_tokens_are_attributed_to_the_kinds_that_lost_them(layout, ends, hit, reach, kinds):
    why = explained(layout, 300 if layout is HYBRID else 200, *ends)
    assert (why.hit_tokens, why.reach_tokens, why.lost_tokens) == (hit, reach, reach - hit)
    assert {kind.name: (kind.alone_tokens, kind.lost_tokens) for kind in why.kinds} == kinds
    assert all(kind.draft == kind.name.endswith("_draft") for kind in why.kinds)
    limited = max(kinds, key=lambda name: kinds[name][1]) if reach > hit else None
    assert why.limited_by == limited
    assert why.reason is (Reason.LIMITED if limited else Reason.NOT_CACHED)


@pytest.mark.parametrize(
    ("num_tokens", "ends", "text"),
    [
        (
            *(300, [every(64, 256), (64, 80)]),
            "80 of 300 prompt tokens: longest prefix of each kind alone: full_attention 256, mamba "
            "80; mamba lost 176; try the hybrid_kv setting coordinator=hybrid_aware",
        ),
        (300, [(64,), (64,)], "64 of 300 prompt tokens: nothing longer was cached"),
        (
            *(256, [every(64, 256), every(16, 256)]),
            "240 of 256 prompt tokens: a longer hit is impossible, because hits end at multiples "
            "of 16 tokens and before the last token",
        ),
        (
            *(16, [(), ()]),
            "0 of 16 prompt tokens: the prompt is shorter than the match unit, because hits end at "
            "multiples of 16 tokens and before the last token",
        ),
    ],
)
def test_an_explanation_is_one_sentence(num_tokens, ends, text):
    assert str(explained(HYBRID, num_tokens, *ends)) == f"request request would hit {text}"


MORE_MEMORY = "more memory for the KV cache (--gpu-memory-utilization, --kv-cache-memory-bytes)"


@pytest.mark.parametrize(
    ("strategy", "mode", "unit", "setting"),
    [
        ("fixed_point", "align", 64, "coordinator=hybrid_aware and prefix_match_unit=auto"),
        ("hybrid_aware", "align", 64, "prefix_match_unit=auto"),
        ("hybrid_aware", "align", 16, MORE_MEMORY),
        pytest.param(
            *("fixed_point", "all", 64, MORE_MEMORY),
            marks=pytest.mark.skipif(
                vllm.__version__.startswith("0.33"),
                reason="vLLM 0.33 caches states in mode align only",
            ),
        ),
    ],
)
def test_the_advice_names_only_settings_that_are_not_active(
    strategy, mode, unit, setting, coordinator_setting
):
    coordinator_setting(strategy)
    why = explained(layout_of(full(64), mamba(64, mode=mode), unit=unit), 300, every(64, 256), ())
    assert why.limited_by == "mamba"
    assert (why.setting or "").removeprefix("the hybrid_kv setting ") == setting


@pytest.mark.parametrize(
    ("layout", "setting"),
    [
        (layout_of(full(64), window(64, 65)), "a smaller --block-size"),
        (layout_of(full(64), mamba(64)), "the hybrid_kv setting prefix_match_unit=auto"),
    ],
)
def test_the_advice_for_a_short_prompt_is_a_smaller_unit(layout, setting):
    why = explained(layout, 64, (64,), (64,))
    assert (why.hit_tokens, why.reason, why.setting) == (0, Reason.TOO_SHORT, setting)


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
