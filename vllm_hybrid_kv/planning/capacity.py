# SPDX-License-Identifier: Apache-2.0
"""Computes how many tokens a pool of KV blocks holds, and which prompts are too short to hit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import (
    eagle_proof_margin,
    generate_scheduler_kv_cache_config,
    resolve_cache_hit_alignment_tokens,
    resolve_dcp_kv_block_size,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    UniformTypeKVCacheSpecs,
    iter_layer_specs,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_hybrid_kv.errors import HybridKVStrategyError
from vllm_hybrid_kv.hooks import hookimpl

SHORT_REQUEST = 512
"""Tokens of a short request. The log also says how many requests of this length fit."""


class GrowingGroups:
    """The strategy `growing`: counts the groups that need more blocks as a sequence gets longer.

    This is the rule of vLLM's #40384 and #40417. Full attention and its subclasses grow. Mamba
    grows only in cache mode `all`, which keeps a state per block. Bounded kinds, such as sliding
    windows, do not grow. If no group in device memory grows, all groups count. No request reaches
    the resulting capacity, because it also holds blocks of the bounded groups: see `Capacity`.
    """

    @hookimpl
    def hybrid_kv_token_capacity_groups(
        self, kv_cache_config: KVCacheConfig
    ) -> list[KVCacheGroupSpec]:
        groups = list(kv_cache_config.kv_cache_groups)
        growing = [
            group for group in groups if any(map(_grows, iter_layer_specs(group.kv_cache_spec)))
        ]
        return groups if all(group.host_resident for group in growing) else growing


def token_capacity_kv_cache_groups(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> list[KVCacheGroupSpec]:
    """Return the groups that `GrowingGroups` counts. The signature is that of vLLM's #40384."""
    del vllm_config
    return GrowingGroups().hybrid_kv_token_capacity_groups(kv_cache_config)


def addressable_slots(group: KVCacheGroupSpec, kv_cache_config: KVCacheConfig) -> int:
    """Return how many entries a buffer must have to be indexed by a group's slots (#37118).

    A slot is block * block_size + offset, and a group may hold any block of the pool.
    """
    host_blocks = kv_cache_config.hisparse_host_num_blocks or 0
    num_blocks = host_blocks if group.host_resident else kv_cache_config.num_blocks
    return num_blocks * int(group.kv_cache_spec.block_size)


def _grows(spec: KVCacheSpec) -> bool:
    if isinstance(spec, MambaSpec):
        return bool(spec.mamba_cache_mode == "all")
    return isinstance(spec, FullAttentionSpec)


@dataclass(frozen=True)
class Capacity:
    """How many requests a pool of KV blocks holds at once if no two requests share a prefix.

    All groups draw blocks from one pool of N blocks, and one of these is the null block. A request
    of n tokens holds at most r(n) blocks (`blocks_per_request`), so:

        max_len_requests = floor((N - 1) / r(max_model_len))
        short_requests   = floor((N - 1) / r(short_request))

    `--max-num-seqs` may allow fewer.

    Attributes:
        num_blocks: N, the blocks of the pool, including the null block.
        max_model_len: Tokens of the longest request.
        max_len_requests: Requests of `max_model_len` that the scheduler can always run at once.
        concurrency: N / r(max_model_len), vLLM's "Maximum concurrency".
        max_len_tokens: floor(concurrency * max_model_len), the KV cache size that vLLM reports.
        short_request: Tokens of a short request: `SHORT_REQUEST`, at most `max_model_len`.
        short_requests: Short requests that the scheduler can always run at once.
    """

    num_blocks: int
    max_model_len: int
    max_len_requests: int
    concurrency: float
    max_len_tokens: int
    short_request: int
    short_requests: int

    def describe(self, reported_tokens: int) -> list[str]:
        """Describe the capacity in lines for the log. vLLM's KV cache size is `reported_tokens`."""
        # Truncate, because 1.999 requests are not 2.
        concurrency = math.floor(100 * self.concurrency) / 100
        short_tokens = self.short_requests * self.short_request
        lines = [
            f"KV cache of {self.num_blocks:,} blocks: {self.max_len_tokens:,} tokens in requests "
            f"of max_model_len ({self.max_model_len:,} tokens), {concurrency:,.2f} of them at "
            f"once; {self.max_len_requests:,} whole requests always fit next to vLLM's null block",
            f"Short requests ({self.short_request:,} tokens): {self.short_requests:,} always fit "
            f"at once, {short_tokens:,} tokens",
        ]
        if reported_tokens != self.max_len_tokens:
            lines.append(
                f"The KV cache size that vLLM logs and exports, {reported_tokens:,} tokens, counts "
                "only the KV groups that the setting token_capacity_groups selects"
            )
        return lines


def capacity(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Capacity:
    """Compute the capacity of a plan's pool. The plan can be a worker's or the scheduler's."""
    max_model_len = vllm_config.model_config.max_model_len
    short = min(SHORT_REQUEST, max_model_len)
    concurrency = kv_cache_utils.get_max_concurrency_for_kv_cache_config(
        vllm_config, kv_cache_config
    )
    return Capacity(
        num_blocks=kv_cache_config.num_blocks,
        max_model_len=max_model_len,
        max_len_requests=_requests_at_once(vllm_config, kv_cache_config, max_model_len),
        concurrency=concurrency,
        max_len_tokens=int(concurrency * max_model_len),
        short_request=short,
        short_requests=_requests_at_once(vllm_config, kv_cache_config, short),
    )


def blocks_per_request(vllm_config: VllmConfig, spec: KVCacheSpec, tokens: int) -> int:
    """Return how many blocks of one group a request holds at once, at most.

    A request holds the blocks that its tokens (prompt and answer) span, plus speculative states,
    but no more than vLLM reserves for the group's kind. At `max_model_len` this is vLLM's own
    count, with two exceptions. Mamba in cache mode `all` counts one state per block, because vLLM
    allocates these states. Chunked local attention counts one more block, as windows do.
    """
    return max(_blocks_of_layer(vllm_config, layer, tokens) for layer in iter_layer_specs(spec))


def _blocks_of_layer(vllm_config: VllmConfig, spec: KVCacheSpec, tokens: int) -> int:
    most = -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
    if isinstance(spec, CrossAttentionSpec):
        # Cross attention holds the encoder's tokens, whatever the request's length.
        return most
    dcp = vllm_config.parallel_config.decode_context_parallel_size
    spanned = -(-tokens // resolve_dcp_kv_block_size(spec, dcp))
    if isinstance(spec, ChunkedLocalAttentionSpec):
        # With blocks of 32 tokens, 17 computed and 16 new tokens take two blocks. vLLM's count
        # treats the tokens of the chunk and those in flight as if they shared one block.
        most += 1
    if isinstance(spec, MambaSpec):
        spanned += spec.num_speculative_blocks
        if spec.mamba_cache_mode == "all":
            return spanned
    return min(spanned, most)


def _requests_at_once(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, tokens: int) -> int:
    """Return how many requests of this many tokens fit into each pool besides its null block."""
    blocks = {False: 0, True: 0}
    for group in kv_cache_config.kv_cache_groups:
        blocks[group.host_resident] += blocks_per_request(vllm_config, group.kv_cache_spec, tokens)
    pools = {False: kv_cache_config.num_blocks, True: kv_cache_config.hisparse_host_num_blocks or 1}
    return min(((pools[host] - 1) // held for host, held in blocks.items() if held), default=0)


def check_capacity_groups(
    kv_cache_config: KVCacheConfig, chosen: Sequence[KVCacheGroupSpec], who: str
) -> None:
    """Check a strategy's choice of groups.

    Raises:
        HybridKVStrategyError: A group is not in the plan or chosen twice, or none is on the device.
    """
    if not isinstance(chosen, Sequence):
        raise HybridKVStrategyError(f"{who} must return a list of KV groups, got {chosen!r}")
    groups = {id(group) for group in kv_cache_config.kv_cache_groups}
    ids = [id(group) for group in chosen]
    if not groups.issuperset(ids) or len(set(ids)) < len(ids):
        raise HybridKVStrategyError(
            f"{who} must choose among the plan's {len(groups)} KV groups, each at most once, got "
            f"{list(chosen)}"
        )
    if all(group.host_resident for group in chosen):
        raise HybridKVStrategyError(
            f"{who} must choose a KV group in device memory, got {len(ids)} of {len(groups)} KV "
            "groups, none in device memory"
        )


def smallest_hit(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    scheduler_block_size: int,
    hash_block_size: int,
) -> int:
    """Return the length in tokens of the shortest prompt that hits when it is sent again.

    A hit ends at a multiple of the alignment A: the match unit if vLLM can end hits inside blocks,
    otherwise the scheduler's block. A prompt's last token is always computed, because its logits
    are needed. Without draft layers, the result is therefore A + 1. Draft layers (EAGLE, MTP)
    shorten hits, because their last entry before a boundary depends on the next token:

    * vLLM 0.32, and 0.33 with a KV connector: a hit needs M more cached tokens, which are then
      dropped. M is one block of the draft layers, or one match unit if hits end inside blocks. The
      result is A + M. With one KV group it is A + M + 1, because M then excludes the last token.
    * vLLM 0.33: hashes cover L tokens after their block, and the result is A + L.

    Both block sizes are in tokens and come from `resolve_kv_cache_block_sizes`. The plan is a
    worker's or the scheduler's.
    """
    if any(
        isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs)
        for group in kv_cache_config.kv_cache_groups
    ):
        # Convert a worker's plan, because vLLM has managers only for specs of a scheduler's plan.
        kv_cache_config = generate_scheduler_kv_cache_config([kv_cache_config])
    alignment = resolve_cache_hit_alignment_tokens(
        kv_cache_config, vllm_config, scheduler_block_size, hash_block_size
    )
    if lookahead := getattr(vllm_config, "num_hash_lookahead_tokens", 0):
        return alignment + int(lookahead)
    margin = _draft_margin(vllm_config, kv_cache_config, alignment, hash_block_size)
    if len(kv_cache_config.kv_cache_groups) <= 1:
        return alignment + margin + 1
    return alignment + max(margin, 1)


def _draft_margin(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, alignment: int, hash_block_size: int
) -> int:
    """Return how many cached tokens draft layers need after a hit; 0 without draft layers."""
    speculative = vllm_config.speculative_config
    drops = speculative is not None and speculative.use_eagle_block_drop()
    if not drops and hasattr(vllm_config, "num_hash_lookahead_tokens"):
        # In vLLM 0.33, draft groups drop tokens only if `use_eagle_block_drop` returns True.
        return 0
    # If no group is marked, vLLM treats all groups as draft groups.
    all_draft = drops and not any(group.is_eagle_group for group in kv_cache_config.kv_cache_groups)
    dcp = vllm_config.parallel_config.decode_context_parallel_size
    margins = [0]
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        drafts = group.is_eagle_group or all_draft
        if drafts and spec.prefix_cacheable and not isinstance(spec, MambaSpec):
            manager = KVCacheSpecRegistry.get_manager_class(spec, group.role)
            fine = alignment == hash_block_size and manager.supports_fine_grained_hash_lookup
            block = resolve_dcp_kv_block_size(spec, dcp)
            margins.append(eagle_proof_margin(block, hash_block_size, fine))
    return max(margins)


def hits_are_possible(vllm_config: VllmConfig, smallest: int) -> bool:
    """Return whether the shortest prompt that can hit, plus one token, fits `max_model_len`."""
    return smallest < int(vllm_config.model_config.max_model_len)
