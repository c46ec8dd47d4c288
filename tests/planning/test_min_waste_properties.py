# SPDX-License-Identifier: Apache-2.0
"""Properties of `min_waste` for any mix of layers, compared with stock, lcm and all plans."""

import contextlib
from dataclasses import replace
from fractions import Fraction

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CircularBufferSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
)

from tests.planning import page_oracle
from tests.planning.layers import attention, mla, named, pages, state
from vllm_hybrid_kv.planning.lcm import unify_by_lcm
from vllm_hybrid_kv.planning.min_waste import TOLERANCE, unify_with_least_waste, waste
from vllm_hybrid_kv.planning.page_sizes import check_page_sizes

tolerances = st.sampled_from([Fraction(0), TOLERANCE, Fraction(1, 10), Fraction(1, 2)])
sequences = st.sampled_from([1, 40, 1_000, 8_192, 262_144])
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def padded(specs):
    """Layers that have padding before planning, as skipped layers do."""
    return st.builds(
        lambda spec, more: replace(spec, page_size_padded=spec.page_size_bytes + more),
        specs,
        st.integers(1, 100),
    )


def layers(block_sizes, slots, state_pages, kernel_blocks):
    """Specs of every kind that vLLM unifies page sizes of."""
    plain = st.builds(
        attention,
        block_size=block_sizes,
        slot=slots,
        kv_heads=st.integers(1, 3),
        dtype=st.sampled_from([torch.uint8, torch.bfloat16]),
        block_stride_alignment=st.sampled_from([None, None, *map(MultipleOf, kernel_blocks)]),
    )
    windowed = st.builds(
        attention,
        block_sizes,
        slots,
        cls=st.just(SlidingWindowSpec),
        sliding_window=st.sampled_from([3, 64]),
    )
    split = st.builds(
        attention,
        block_sizes,
        slots,
        block_stride_alignment=st.sampled_from([MultipleOf(size) for size in kernel_blocks]),
    )
    others = [
        split,
        st.builds(attention, block_sizes, slots, cls=st.just(FullAttentionSpec)),
        st.builds(attention, block_sizes, slots, cls=st.just(CrossAttentionSpec)),
        st.builds(attention, st.integers(1, 9), slots, cls=st.just(CircularBufferSpec)),
        st.builds(
            attention,
            block_sizes,
            slots,
            cls=st.just(ChunkedLocalAttentionSpec),
            attention_chunk_size=st.just(64),
        ),
    ]
    rows = [
        st.builds(mla, block_sizes, slots),
        st.builds(mla, block_sizes, slots, alignment=slots),
        st.builds(
            mla,
            block_sizes,
            slots,
            cls=st.just(SlidingWindowMLASpec),
            sliding_window=st.just(64),
            alignment=st.one_of(st.none(), slots),
        ),
    ]
    states = [
        st.builds(state, state_pages, block_sizes),
        st.builds(
            state, state_pages.map(lambda n: 4 * n), block_sizes, dtype=st.just(torch.float32)
        ),
    ]
    return st.one_of(plain, windowed, *others, *rows, *states, padded(plain), padded(states[0]))


def mixes(*arguments):
    """A few kinds of layers, some of them several times."""
    kind = st.tuples(layers(*arguments), st.integers(1, 5))
    return st.lists(kind, min_size=1, max_size=4).map(
        lambda kinds: named([spec for spec, count in kinds for _ in range(count)])
    )


real_mixes = mixes(
    st.integers(1, 32).map(lambda n: 16 * n),
    st.sampled_from([100, 196, 388, 512, 576, 1_024, 1_152]),
    st.integers(1, 1 << 22),
    [64, 128],
)
small_mixes = mixes(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 5), st.integers(1, 40), [2, 4])


def planned_by(rule, specs):
    """Return a rule's plan; None if it has none that a worker can read.

    vLLM's own rule fails an assertion if it scales a page that has padding.
    """
    try:
        plan = rule(dict(specs))
    except (NotImplementedError, AssertionError):
        return None
    return plan if page_oracle.plan_is_readable(specs, plan) else None


def assert_sound(specs, plan, longest):
    check_page_sizes(specs, plan, "min_waste")
    assert list(plan) == list(specs)
    assert page_oracle.plan_is_readable(specs, plan)
    for name, before in specs.items():
        after = plan[name]
        assert after.block_size % before.block_size == 0
        if page_oracle.is_state(before):
            assert after.block_size == before.block_size
        elif getattr(after, "page_size_padded", None) is None:
            scale = after.block_size // before.block_size
            assert after.page_size_bytes == scale * before.real_page_size_bytes
    assert waste(specs, plan, longest) == page_oracle.share_wasted(specs, plan, longest)


def chunks_are_whole_blocks(plan):
    return all(
        spec.attention_chunk_size % spec.block_size == 0
        for spec in plan.values()
        if isinstance(spec, ChunkedLocalAttentionSpec)
    )


@QUICK
@given(specs=real_mixes, longest=sequences, tolerance=tolerances)
def test_no_plan_of_stock_or_lcm_wastes_less(specs, longest, tolerance, stock):
    # Both may plan blocks that do not divide a chunk of local attention, which vLLM cannot run.
    others = [
        plan if plan is None or chunks_are_whole_blocks(plan) else None
        for plan in (planned_by(rule, specs) for rule in (stock, unify_by_lcm))
    ]
    try:
        plan = unify_with_least_waste(specs, longest, tolerance)
    except NotImplementedError:
        assert others == [None, None] or longest < 1_000
        return
    assert_sound(specs, plan, longest)
    for other in filter(None, others):
        assert waste(specs, plan, longest) <= page_oracle.share_wasted(specs, other, longest)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(specs=small_mixes, longest=st.sampled_from([1, 7, 40]), tolerance=tolerances)
def test_an_exhaustive_search_finds_no_better_plan(specs, longest, tolerance):
    by_lcm = None
    highest = page_oracle.highest_page(specs.values())
    assume(highest <= 200)
    with contextlib.suppress(NotImplementedError):
        by_lcm = page_oracle.share_wasted(specs, unify_by_lcm(specs), longest)
    found = page_oracle.exhaustive(list(specs.values()), longest, tolerance, by_lcm)
    try:
        plan = unify_with_least_waste(specs, longest, tolerance)
    except NotImplementedError:
        assert found is None
        return
    assert_sound(specs, plan, longest)
    (page,) = set(pages(plan).values())
    assert (page, waste(specs, plan, longest)) == found


@QUICK
@given(specs=real_mixes, longest=sequences)
def test_no_plan_of_stock_or_lcm_costs_less_with_match_units_weighed(specs, longest, stock):
    request = Fraction(3_200)
    others = [
        page_oracle.cost(specs, plan, request)
        for plan in (planned_by(rule, specs) for rule in (stock, unify_by_lcm))
        if plan is not None and chunks_are_whole_blocks(plan)
    ]
    try:
        plan = unify_with_least_waste(specs, longest, reference=request)
    except NotImplementedError:
        assert all(cost >= 1 for cost in others)
        return
    assert_sound(specs, plan, longest)
    cheap = [cost for cost in others if cost < 1]
    if cheap and longest >= request:
        assert page_oracle.cost(specs, plan, request) <= min(cheap)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(specs=small_mixes, request=st.sampled_from([Fraction(5, 2), Fraction(13, 2), Fraction(12)]))
def test_an_exhaustive_search_finds_no_cheaper_plan(specs, request):
    cheapest = page_oracle.cheapest(list(specs.values()), request)
    assume(cheapest is not None)
    plan = unify_with_least_waste(specs, 40, reference=request)
    assert_sound(specs, plan, 40)
    assert page_oracle.cost(specs, plan, request) == cheapest


@QUICK
@given(specs=real_mixes)
def test_planning_a_plan_again_wastes_no_more(specs):
    try:
        plan = unify_with_least_waste(specs)
    except NotImplementedError:
        return
    again = unify_with_least_waste(plan)
    assert pages(again) == pages(plan)
    assert page_oracle.share_wasted(plan, again, 1 << 20) <= page_oracle.share_wasted(
        specs, plan, 1 << 20
    )


@QUICK
@given(specs=real_mixes, shuffle=st.randoms())
def test_the_order_of_layers_does_not_matter(specs, shuffle):
    def plan(layers):
        try:
            return unify_with_least_waste(layers)
        except NotImplementedError:
            return None

    order = list(specs)
    shuffle.shuffle(order)
    assert plan({name: specs[name] for name in order}) == plan(specs)
