# SPDX-License-Identifier: Apache-2.0
"""Search exhaustively for the best plan of page sizes, to check the planner on small cases.

The search tries every page size that a worker can read. It shares no arithmetic with the planner.
"""

import math
from dataclasses import replace
from fractions import Fraction

from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    CircularBufferSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
)


def is_state(spec: KVCacheSpec) -> bool:
    return isinstance(spec, (MambaSpec, CircularBufferSpec))


def readable(before: KVCacheSpec, after: KVCacheSpec) -> bool:
    """Return whether the worker can view a layer's planned pages and the kernels can read them."""
    page, real = after.page_size_bytes, after.real_page_size_bytes
    scale, rest = divmod(after.block_size, before.block_size)
    if rest or scale < 1:
        return False
    if is_state(before):
        return scale == 1
    if page == real:
        return True
    alignment = getattr(before, "alignment", None)
    if isinstance(before, MLAAttentionSpec) or alignment is not None:
        own = alignment is not None and page % alignment == 0 and page - real < alignment
        return own or page == scale * before.page_size_bytes
    kernel_blocks = before.block_stride_alignment
    if isinstance(kernel_blocks, MultipleOf):
        return scale == 1 and after.block_size <= kernel_blocks.base
    return True


def granularity(specs) -> int:
    sizes = [dtype.itemsize for spec in specs for dtype in getattr(spec, "dtypes", ())]
    sizes += [spec.dtype.itemsize for spec in specs if isinstance(spec, AttentionSpec)]
    return math.lcm(*sizes)


def plan_is_readable(before, after) -> bool:
    return all(
        readable(spec, after[name]) and after[name].page_size_bytes % granularity([spec]) == 0
        for name, spec in before.items()
    )


def used(before: KVCacheSpec, after: KVCacheSpec, longest: int) -> Fraction:
    """Count the bytes of a page that tokens of the longest sequence (or a state) can fill."""
    if is_state(before):
        return Fraction(before.real_page_size_bytes)
    per_token = Fraction(before.real_page_size_bytes, before.block_size)
    most = -(-longest // before.block_size) * before.block_size
    return per_token * min(after.block_size, most)


def share_wasted(before, after, longest: int = 1 << 20) -> Fraction:
    """Return the share of the pool that a plan leaves as padding, from 0 to 1."""
    total = sum(spec.page_size_bytes for spec in after.values())
    return 1 - sum(used(spec, after[name], longest) for name, spec in before.items()) / total


def plans_of(spec: KVCacheSpec, page: int):
    """Yield every spec that gives a layer pages of `page` bytes, shortest block first."""
    for scale in range(1, page // spec.real_page_size_bytes + 1):
        # If the blocks divide a chunk of local attention, the scaled blocks must divide it too.
        chunk = getattr(spec, "attention_chunk_size", None) or 0
        if not chunk % spec.block_size and chunk % (scale * spec.block_size):
            continue
        for padding in (None, page):
            try:
                after = replace(spec, block_size=scale * spec.block_size, page_size_padded=padding)
                if after.page_size_bytes == page and readable(spec, after):
                    yield after
            except AssertionError:
                continue


def best_for(spec: KVCacheSpec, page: int, longest: int) -> Fraction | None:
    """Return how many bytes of a page a layer can use; None if it cannot have that page."""
    return max((used(spec, after, longest) for after in plans_of(spec, page)), default=None)


def longest_block(spec: KVCacheSpec, page: int, match_unit: int) -> KVCacheSpec | None:
    """Return the spec with this page and the longest block that divides `match_unit`, or None."""
    plans = (plan for plan in plans_of(spec, page) if match_unit % plan.block_size == 0)
    return max(plans, key=lambda plan: plan.block_size, default=None)


def highest_page(specs) -> int:
    """Round the largest page up to a common multiple of smaller attention pages, as `lcm` does."""
    largest = max(spec.page_size_bytes for spec in specs)
    sizes = [spec.page_size_bytes for spec in specs if not isinstance(spec, MambaSpec)]
    smaller = [size for size in sizes if size < largest]
    page = largest
    while any(page % one for one in smaller):
        page += 1
    return page


def least_page(spec) -> int:
    aligned = getattr(spec, "alignment", None) is not None
    return spec.page_size_bytes if aligned else spec.real_page_size_bytes


def exhaustive(specs, longest: int, tolerance: float, by_lcm: Fraction | None):
    """Return the page and the share wasted that `min_waste` must find, or None if it must fail.

    Candidates are all pages up to the size that `lcm` aims at. If none wastes at most `tolerance`,
    the candidate with the least waste wins. If no candidate suits all layers, larger pages are
    tried until a block holds the longest sequence; the first to fit wins.

    Args:
        specs: The layers' specs.
        longest: Tokens of the longest sequence.
        tolerance: The first candidate that wastes at most this share wins.
        by_lcm: The share that `lcm` wastes; None if `lcm` finds no plan.
    """

    def plan(page):
        parts = [best_for(spec, page, longest) for spec in specs]
        if page % granularity(specs) or None in parts:
            return None
        return 1 - sum(parts) / (page * len(specs))

    largest = max(spec.real_page_size_bytes for spec in specs)
    # A page must be a multiple of the size of every layer's dtype.
    lowest = -(-largest // granularity(specs)) * granularity(specs)
    highest = max(highest_page(specs), lowest)
    reach = max(least_page(s) * (1 if is_state(s) else -(-longest // s.block_size)) for s in specs)
    reach = max(reach, lowest, highest if by_lcm is not None else 0)
    plans = ((w, page) for page in range(largest, reach + 1) if (w := plan(page)) is not None)
    first = next(plans, None)
    if first is None:
        return None
    if first[1] > highest:
        return first[::-1]
    enough = tolerance if by_lcm is None else min(tolerance, by_lcm)
    if (at_present := plan(max(spec.page_size_bytes for spec in specs))) is not None:
        enough = min(enough, at_present)
    choice = [first]
    choice += ((w, p) for p in range(first[1] + 1, highest + 1) if (w := plan(p)) is not None)
    for wasted, page in choice:
        if wasted <= enough:
            return page, wasted
    return min(choice)[::-1]


def match_unit_of(plan) -> int:
    """Return the match unit: hits end at its multiples, unless states use cache mode `align`."""
    return math.lcm(*(spec.block_size for spec in plan.values()))


def held(spec, request: Fraction) -> Fraction:
    """Count the tokens of a request that a layer holds. A state counts as one block."""
    if is_state(spec):
        return Fraction(spec.block_size)
    bounds = [getattr(spec, "sliding_window", None), getattr(spec, "attention_chunk_size", None)]
    return min([request, *map(Fraction, filter(None, bounds))])


def cost(before, after, request: float) -> Fraction:
    """Add the share of padding in a request's pages to the share of tokens that a hit loses."""
    request = Fraction(request)
    held_bytes = taken = Fraction(0)
    for name, spec in before.items():
        tokens = held(spec, request)
        held_bytes += tokens * spec.real_page_size_bytes / spec.block_size
        taken += after[name].page_size_bytes * max(1, tokens / after[name].block_size)
    return 1 - held_bytes / taken + match_unit_of(after) / (2 * request)


def cheapest(specs, request: float) -> Fraction | None:
    """Return the lowest cost of any plan; None if no plan costs less than 1."""
    layers = dict(enumerate(specs))
    present = match_unit_of(layers)
    lowest = max(spec.real_page_size_bytes for spec in specs)
    found = []
    for unit in range(present, math.ceil(2 * request), present):
        highest = max(least_page(s) * (1 if is_state(s) else unit // s.block_size) for s in specs)
        for page in range(lowest, max(highest, lowest + granularity(specs)) + 1):
            plan = {name: longest_block(spec, page, unit) for name, spec in layers.items()}
            if page % granularity(specs) == 0 and None not in plan.values():
                found.append(cost(layers, plan, request))
    return min((one for one in found if one < 1), default=None)
