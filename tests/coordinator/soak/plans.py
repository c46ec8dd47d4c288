# SPDX-License-Identifier: Apache-2.0
"""Make random models and caches for the worlds of the soak."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from vllm.utils.math_utils import round_up
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from testing.coordinator.contents import chunked, full, mamba, window

STRATEGIES = ("stock", "fixed_point", "hybrid_aware")


@dataclass(frozen=True)
class Plan:
    """The model, cache and engine of a world.

    Attributes:
        unit: Tokens per hash.
        block_size: vLLM's `cache_config.block_size`, to which chunks with states are aligned. The
            engine core sets it to the smallest block of all groups.
        scheduler_block_size: The least common multiple of the groups' block sizes.
        budget: Maximum tokens per step.
        long_prefill: Maximum tokens of a request's chunk, 0 for no limit.
        lag: How many steps the scheduler runs ahead of the known outputs, 0 if synchronous.
        drafting: `None`, `ngram`, or `mtp`.
        connector: How a KV connector loads: `async`, `sync` or `both`; or `offload`, for vLLM's
            OffloadingConnector. `None` if there is none.
        host_blocks: Blocks of host memory for OffloadingConnector.
        load_failure_policy: vLLM's `kv_load_failure_policy`.
        vocabulary: The number of different tokens. If small, unrelated requests share prefixes.
        reserve_full: vLLM's `scheduler_reserve_full_isl`.
        retention: vLLM's `prefix_cache_retention_interval`, in tokens between cached windows and
            states. With 0, only those at the ends of prompts are cached. With None, all are cached.
    """

    strategy: str
    groups: tuple[KVCacheGroupSpec, ...]
    unit: int
    block_size: int
    scheduler_block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    budget: int
    long_prefill: int = 0
    lag: int = 0
    drafting: str | None = None
    draft_tokens: int = 0
    connector: str | None = None
    host_blocks: int = 0
    load_failure_policy: str = "fail"
    vocabulary: int = 1000
    reserve_full: bool = True
    retention: int | None = None

    @property
    def specs(self) -> list[KVCacheSpec]:
        return [group.kv_cache_spec for group in self.groups]

    @property
    def kv_cache_config(self) -> KVCacheConfig:
        return KVCacheConfig(
            self.num_blocks,
            [],
            list(self.groups),
            prefix_cache_retention_interval=self.retention,
        )

    @property
    def has_states(self) -> bool:
        return any(isinstance(spec, MambaSpec) for spec in self.specs)

    @property
    def may_diverge(self) -> bool:
        """Whether groups may hit different lengths before a load.

        With windows or draft layers, different lengths make `truncate_computed_blocks` fail.
        """
        kinds = {type(spec) for spec in self.specs}
        return kinds == {MambaSpec, FullAttentionSpec} and self.drafting != "mtp"

    def with_retention(self, rng: random.Random) -> Plan:
        """Return the plan, with a random retention interval if it has windows or states."""
        if not any(isinstance(spec, SlidingWindowSpec | MambaSpec) for spec in self.specs):
            return self
        block = self.scheduler_block_size
        return replace(self, retention=rng.choice((None, None, 0, block, 3 * block)))

    def with_smaller_attention(self, rng: random.Random) -> Plan:
        """Return the plan, sometimes with attention blocks that are shorter than state blocks.

        The scheduler then ends chunks inside state blocks, and vLLM's own coordinator caches wrong
        states (`upstream_fixes.PassedBlocks`). Worlds with the strategy `stock` are left unchanged.
        """
        states = [spec.block_size for spec in self.specs if isinstance(spec, MambaSpec)]
        if not states or self.strategy == "stock" or rng.random() < 0.5:
            return self
        sizes = {self.unit, 3 * self.unit, states[0] // 2 // self.unit * self.unit} - {0}
        groups = tuple(
            replace(group, kv_cache_spec=replace(spec, block_size=rng.choice(sorted(sizes))))
            if _is_full(spec := group.kv_cache_spec)
            else group
            for group in self.groups
        )
        blocks = [group.kv_cache_spec.block_size for group in groups]
        common = math.lcm(*blocks)
        smaller = replace(
            self,
            groups=groups,
            block_size=min(blocks),
            scheduler_block_size=common,
            max_model_len=max(self.max_model_len, 6 * common),
            budget=max(self.budget, common),
        )
        tokens = smaller.max_model_len + self.draft_tokens
        num_blocks = _num_blocks(rng, smaller.specs, tokens, smaller.budget * (self.lag + 1))
        return replace(smaller, num_blocks=num_blocks)

    def with_checkpoints(self, rng: random.Random) -> Plan:
        """Return the plan, sometimes with states that backends export in mid-chunk, as for Mamba 2.

        Plans that would hit faults of vLLM are left unchanged. If hits may end inside a block,
        vLLM's coordinator caches wrong states (`upstream_fixes.PassedBlocks`). With draft tokens,
        vLLM's worker may overwrite the state that a request continues with. With draft layers and
        hits at multiples of several blocks, vLLM mistakes the exported state for a later one.
        """
        whole = self.unit == self.block_size == self.scheduler_block_size
        if self.drafting is not None or (self.strategy == "stock" and not whole):
            return self
        if rng.random() < 0.6:
            return self
        alignment = rng.choice((1, self.unit, 2 * self.unit))
        kept = {"num_prefill_checkpoint_blocks": 1, "prefill_checkpoint_alignment": alignment}
        groups = tuple(
            replace(group, kv_cache_spec=replace(spec, **kept))
            if isinstance(spec := group.kv_cache_spec, MambaSpec)
            else group
            for group in self.groups
        )
        states = sum(isinstance(spec, MambaSpec) for spec in self.specs)
        return replace(self, groups=groups, num_blocks=self.num_blocks + states)


def random_plan(rng: random.Random, strategy: str | None = None) -> Plan:
    """Draw a model and a cache that vLLM supports, and a strategy unless one is given."""
    strategy = strategy or rng.choice(STRATEGIES)
    style = rng.choice(
        ["states"] * 6 + ["attention"] * (1 if strategy == "hybrid_aware" else 3) + ["one group"]
    )
    drafting = rng.choice([None, None, None, "ngram", "mtp"])
    draft_tokens = rng.choice((1, 2, 3)) if drafting else 0
    if style == "states":
        specs, unit = _states(rng, strategy, draft_tokens)
    elif style == "attention":
        specs, unit = _attention(rng, strategy, drafting)
    else:
        unit = rng.choice((2, 4, 8))
        specs = [full(unit)]
    drafted = _drafted(rng, specs) if drafting == "mtp" else set()
    groups = tuple(
        KVCacheGroupSpec([f"layer {i}"], spec, is_eagle_group=i in drafted)
        for i, spec in enumerate(specs)
    )
    scheduler_block_size = math.lcm(*(spec.block_size for spec in specs))
    max_model_len = max(rng.choice((48, 64, 96)), 6 * scheduler_block_size)
    budget = rng.choice((scheduler_block_size, 24, 64))
    budget = max(budget, scheduler_block_size, 2 * draft_tokens + 2)
    lag = rng.choice((0, 0, 1))
    # If a step loads states and continues from them, vLLM counts one block too few, and fails if no
    # other block is free. So models with states never load synchronously.
    connectors = (None, None, "async", "async", *(() if style == "states" else ("both", "sync")))
    connector = rng.choice(connectors)
    return Plan(
        strategy=strategy,
        groups=groups,
        unit=unit,
        block_size=min(spec.block_size for spec in specs),
        scheduler_block_size=scheduler_block_size,
        num_blocks=_num_blocks(rng, specs, max_model_len + draft_tokens, budget * (lag + 1)),
        max_model_len=max_model_len,
        max_num_seqs=rng.choice((2, 4, 8)),
        budget=budget,
        # vLLM fails on a chunk that is too small for a token and its drafts.
        long_prefill=rng.choice((0, 0, max(scheduler_block_size, draft_tokens + 1))),
        lag=lag,
        drafting=drafting,
        draft_tokens=draft_tokens,
        connector=connector,
        load_failure_policy=rng.choice(("recompute", "fail")),
        vocabulary=rng.choice((2, 1000)),
        reserve_full=rng.random() < 0.8,
    )


def offloading_plan(rng: random.Random) -> Plan:
    """Draw a plan for OffloadingConnector, in which checkpoints may end inside blocks."""
    unit = rng.choice((2, 4))
    size = unit * rng.choice((2, 4))
    specs = [mamba(size)] * rng.choice((1, 2)) + [full(size)] * rng.choice((1, 1, 2))
    rng.shuffle(specs)
    lag = rng.choice((0, 0, 1))
    budget = rng.choice((size, 24, 64))
    max_model_len = max(rng.choice((48, 64, 96)), 6 * size)
    return Plan(
        strategy="hybrid_aware",
        groups=tuple(KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)),
        unit=unit,
        block_size=size,
        scheduler_block_size=size,
        num_blocks=_num_blocks(rng, specs, max_model_len, budget * (lag + 1)),
        max_model_len=max_model_len,
        max_num_seqs=rng.choice((2, 4, 8)),
        budget=budget,
        lag=lag,
        connector="offload",
        host_blocks=rng.choice((8, 40, 400)),
        vocabulary=rng.choice((2, 1000)),
    )


def _states(rng: random.Random, strategy: str, draft_tokens: int) -> tuple[list[KVCacheSpec], int]:
    """Draw the layers of a model with states, and the hash unit.

    All state blocks have vLLM's `mamba_block_size`. If hits end inside a block, vLLM supports
    windows only with blocks of one hash unit, and chunked local attention only if its blocks equal
    the hits' alignment. With `stock`, no block is smaller than a state block, for the reason in
    `with_smaller_attention`.
    """
    unit = rng.choice((2, 4))
    size = unit * rng.choice((1, 2, 4))
    # A step of a request may pass the end of at most one block.
    while size <= draft_tokens:
        size *= 2
    state = replace(mamba(size), num_speculative_blocks=draft_tokens)
    specs: list[KVCacheSpec] = [state]
    if rng.random() < 0.3:
        specs.append(
            rng.choice((state, replace(mamba(size, 6), num_speculative_blocks=draft_tokens)))
        )
    for _ in range(rng.choice((1, 1, 2))):
        # If attention and states have different block sizes, hits end at multiples of both.
        specs.append(full(rng.choice((size, size, 2 * size)), rng.choice((8, 16))))
    if rng.random() < 0.4:
        specs.append(window(rng.choice((unit, size)), rng.randint(2, 6 * unit)))
    if rng.random() < 0.1:
        # Keep windows and states only, without full attention.
        specs = [spec for spec in specs if not _is_full(spec)]
        specs.append(window(unit, rng.randint(2, 6 * unit)))
    rng.shuffle(specs)
    if strategy == "stock":
        specs = [replace(spec, block_size=max(spec.block_size, size)) for spec in specs]
    return specs, unit


def _is_full(spec: KVCacheSpec) -> bool:
    return not isinstance(spec, (MambaSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec))


def _attention(
    rng: random.Random, strategy: str, drafting: str | None
) -> tuple[list[KVCacheSpec], int]:
    """Draw the layers of a model with several kinds of attention, and the hash unit."""
    unit = rng.choice((2, 4))
    with_chunks = drafting != "mtp" and rng.random() < 0.4
    # vLLM's own lookup asserts that blocks of chunked local attention equal the alignment.
    sizes = (1,) if with_chunks and strategy == "stock" else (1, 1, 2)
    specs: list[KVCacheSpec] = []
    for _ in range(rng.randint(1, 3)):
        size = unit * rng.choice(sizes)
        kinds = ["full", "window", "window", *(["chunked"] * with_chunks)]
        kind = rng.choice(kinds)
        if kind == "full":
            specs.append(full(size))
        elif kind == "window":
            specs.append(window(size, rng.randint(2, 8 * unit)))
        else:
            chunk = rng.randint(2, 8 * unit)
            # vLLM's hits are too long if a chunk starts inside a block: see the xfails of
            # `test_fixed_point.py`.
            specs.append(chunked(size, round_up(chunk, size) if strategy == "stock" else chunk))
    specs.append(full(unit * rng.choice(sizes), 16))
    if rng.random() < 0.2:
        specs[-1] = window(unit, rng.randint(2, 8 * unit))
    return specs, math.gcd(*(spec.block_size for spec in specs))


def _drafted(rng: random.Random, specs: list[KVCacheSpec]) -> set[int]:
    """Choose one or two groups for draft layers, which have neither states nor chunks."""
    possible = [
        i
        for i, spec in enumerate(specs)
        if not isinstance(spec, (MambaSpec, ChunkedLocalAttentionSpec))
    ]
    return {rng.choice(possible), rng.choice(possible)}


def _num_blocks(rng: random.Random, specs: list[KVCacheSpec], max_len: int, in_flight: int) -> int:
    """Draw the number of blocks in the pool, enough for the longest request."""
    needed = sum(_blocks(spec, max_len, in_flight) for spec in specs)
    return 2 + int(needed * rng.choice((1.05, 1.3, 2.0)))


def _blocks(spec: KVCacheSpec, max_len: int, in_flight: int) -> int:
    """Return how many blocks of a group the longest request may hold."""
    if isinstance(spec, MambaSpec):
        return 4 + spec.num_speculative_blocks
    reach = max_len
    if isinstance(spec, SlidingWindowSpec):
        reach = min(reach, spec.sliding_window + in_flight)
    elif isinstance(spec, ChunkedLocalAttentionSpec):
        reach = min(reach, spec.attention_chunk_size + in_flight)
    return -(-reach // spec.block_size) + 2
