# SPDX-License-Identifier: Apache-2.0
"""For any mix of layers, `min_waste` is no worse than stock, `lcm` or any other plan."""

import contextlib
from dataclasses import replace

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CircularBufferSpec,
    CrossAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
)

from tests.planning import page_oracle
from tests.planning.layers import attention, mla, named, pages, state
from tests.planning.page_oracle import share_wasted
from vllm_hybrid_kv.planning.lcm import unify_by_lcm
from vllm_hybrid_kv.planning.min_waste import TOLERANCE, unify_with_least_waste
from vllm_hybrid_kv.planning.page_sizes import check_page_sizes

tolerances = st.sampled_from([0.0, TOLERANCE, 0.1, 0.5])
sequences = st.sampled_from([1, 40, 1_000, 8_192, 262_144])
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def padded(specs):
    """A hypothesis strategy: layer specs that are padded already, like those of skipped layers."""
    return st.builds(
        lambda spec, more: replace(spec, page_size_padded=spec.page_size_bytes + more),
        specs,
        st.integers(1, 100),
    )


def layers(block_sizes, slots, state_pages, kernel_blocks):
    """A hypothesis strategy: layer specs of every kind whose page sizes vLLM unifies."""
    split = st.sampled_from([MultipleOf(size) for size in kernel_blocks])

    def some(make, *more, **fields):
        """Build specs with `make`, from fields that are values or strategies."""
        fields = {
            name: value if isinstance(value, st.SearchStrategy) else st.just(value)
            for name, value in fields.items()
        }
        return st.builds(make, *(more or (block_sizes, slots)), **fields)

    plain = some(
        attention,
        kv_heads=st.integers(1, 3),
        dtype=st.sampled_from([torch.uint8, torch.bfloat16]),
        block_stride_alignment=st.none() | split,
    )
    states = some(state, state_pages, block_sizes)
    four_bytes = state_pages.map(lambda n: 4 * n)
    return st.one_of(
        plain,
        padded(plain),
        states,
        padded(states),
        some(state, four_bytes, block_sizes, dtype=torch.float32),
        some(attention, block_stride_alignment=split),
        some(attention, cls=CrossAttentionSpec),
        some(attention, st.integers(1, 9), slots, cls=CircularBufferSpec),
        some(attention, cls=SlidingWindowSpec, sliding_window=st.sampled_from([3, 64])),
        some(
            attention, cls=ChunkedLocalAttentionSpec, attention_chunk_size=st.sampled_from([12, 64])
        ),
        some(mla),
        some(mla, alignment=slots),
        some(mla, cls=SlidingWindowMLASpec, sliding_window=64, alignment=st.none() | slots),
    )


def mixes(*arguments):
    """A hypothesis strategy: models with up to four kinds of layers, one to five of each kind."""
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


def plans_of_others(specs, stock):
    """Plan with stock and with `lcm`, and return only the plans that vLLM can run.

    Stock fails an assertion if it scales a padded page. Both rules may plan blocks that do not
    divide a chunk of local attention, which vLLM cannot run.
    """
    plans = []
    for rule in (stock, unify_by_lcm):
        with contextlib.suppress(NotImplementedError, AssertionError):
            plan = rule(dict(specs))
            if page_oracle.plan_is_readable(specs, plan) and chunks_are_whole_blocks(plan):
                plans.append(plan)
    return plans


def assert_sound(specs, plan):
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


def chunks_are_whole_blocks(plan):
    return all(
        spec.attention_chunk_size % spec.block_size == 0
        for spec in plan.values()
        if isinstance(spec, ChunkedLocalAttentionSpec)
    )


@QUICK
@given(specs=real_mixes, longest=sequences, tolerance=tolerances)
def test_no_plan_of_stock_or_lcm_wastes_less(specs, longest, tolerance, stock):
    others = plans_of_others(specs, stock)
    try:
        plan = unify_with_least_waste(specs, longest, tolerance)
    except NotImplementedError:
        assert others == [] or longest < 1_000
        return
    assert_sound(specs, plan)
    for other in others:
        assert share_wasted(specs, plan, longest) <= share_wasted(specs, other, longest)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(specs=small_mixes, longest=st.sampled_from([1, 7, 40]), tolerance=tolerances)
def test_an_exhaustive_search_finds_no_better_plan(specs, longest, tolerance):
    by_lcm = None
    highest = page_oracle.highest_page(specs.values())
    assume(highest <= 200)
    with contextlib.suppress(NotImplementedError):
        by_lcm = share_wasted(specs, unify_by_lcm(specs), longest)
    found = page_oracle.exhaustive(list(specs.values()), longest, tolerance, by_lcm)
    try:
        plan = unify_with_least_waste(specs, longest, tolerance)
    except NotImplementedError:
        assert found is None
        return
    assert_sound(specs, plan)
    (page,) = set(pages(plan).values())
    assert (page, share_wasted(specs, plan, longest)) == found


@QUICK
@given(specs=real_mixes, longest=sequences)
def test_no_plan_of_stock_or_lcm_costs_less_with_match_units_weighed(specs, longest, stock):
    request = 3_200
    others = [page_oracle.cost(specs, plan, request) for plan in plans_of_others(specs, stock)]
    try:
        plan = unify_with_least_waste(specs, longest, reference=request)
    except NotImplementedError:
        assert all(cost >= 1 for cost in others)
        return
    assert_sound(specs, plan)
    cheap = [cost for cost in others if cost < 1]
    if cheap and longest >= request:
        assert page_oracle.cost(specs, plan, request) <= min(cheap)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(specs=small_mixes, request=st.sampled_from([2.5, 6.5, 12.0]))
def test_an_exhaustive_search_finds_no_cheaper_plan(specs, request):
    cheapest = page_oracle.cheapest(list(specs.values()), request)
    assume(cheapest is not None)
    plan = unify_with_least_waste(specs, 40, reference=request)
    assert_sound(specs, plan)
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
    assert share_wasted(plan, again, 1 << 20) <= share_wasted(specs, plan, 1 << 20)


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
