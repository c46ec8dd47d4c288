# SPDX-License-Identifier: Apache-2.0
"""Prints how often vLLM's own coordinator agrees with brute force: `python -m` this module.

The cases are those of the test: random groups, any blocks of which may be evicted. How often real
traffic causes such states is a different question.
"""

from __future__ import annotations

import argparse
from collections import Counter

from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec
from vllm.version import __version__

from testing.coordinator.contents import Case, coordinator_of, fill, random_cases, request_of
from testing.coordinator.oracle import longest, serves, wrong_blocks

ANSWERS = ("the longest", "shorter", "not cached in every group", "wrong blocks", "stops")


def kind_of(case: Case, partial: bool) -> str:
    layout = case.layout
    kinds = [type(group.kv_cache_spec) for group in layout.groups]
    return ", ".join(
        (
            "partial hits" if partial else "whole blocks",
            "drafts" if layout.use_eagle else "no drafts",
            "chunked local" if ChunkedLocalAttentionSpec in kinds else "others",
        )
    )


def answer_of(coordinator: HybridKVCacheCoordinator, case: Case) -> str:
    """Compare one answer with brute force."""
    alignment = coordinator._cache_hit_alignment_tokens
    every = range(len(case.layout.groups))
    want = longest(case.layout, case.cached, alignment, case.limit, every)
    try:
        hits, length, _ = coordinator.find_longest_cache_hit(case.request.block_hashes, case.limit)
    except AssertionError:
        return "stops"
    if length > case.limit or not all(
        length % alignment == 0 and serves(case.layout, case.cached, alignment, group, length)
        for group in every
    ):
        return "not cached in every group"
    for group in every:
        ids = [block.block_id for block in hits[group]]
        if wrong_blocks(case.layout, case.cached, group, length, ids):
            return "wrong blocks"
    return "the longest" if length == want else "shorter"


def count(seed: int, layouts: int, contents: int) -> dict[str, Counter[str]]:
    """Return the number of answers of each kind, by kind of case."""
    counts: dict[str, Counter[str]] = {}
    for cases in random_cases(seed, layouts, contents):
        coordinator = coordinator_of(cases[0].layout, HybridKVCacheCoordinator)
        other = request_of(cases[0].layout, range(5000, 5024))
        for case in cases:
            coordinator.reset_prefix_cache()
            fill(coordinator.block_pool, case.request, case.cached, other)
            kind = kind_of(case, coordinator.enable_partial_hash_hits)
            counts.setdefault(kind, Counter())[answer_of(coordinator, case)] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--layouts", type=int, default=500)
    arguments = parser.parse_args()
    counts = count(arguments.seed, arguments.layouts, 20)
    print(f"vLLM {__version__}, {sum(map(Counter.total, counts.values()))} cases\n")
    print(f"| cases | {' | '.join(ANSWERS)} |\n|---|{'---|' * len(ANSWERS)}")
    for kind in sorted(counts):
        total = counts[kind].total()
        cells = (f"{100 * counts[kind][answer] / total:.1f} %" for answer in ANSWERS)
        print(f"| {kind} ({total}) | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
