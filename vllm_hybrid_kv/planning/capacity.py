# SPDX-License-Identifier: Apache-2.0
"""How many tokens a pool of KV blocks holds, and which KV groups the reported number counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import resolve_dcp_kv_block_size
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    iter_layer_specs,
)

from vllm_hybrid_kv.errors import HybridKVStrategyError
from vllm_hybrid_kv.hooks import hookimpl

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SHORT_REQUEST = 512
"""Tokens of the short request that capacities are also reported for."""


class GrowingGroups:
    """The strategy `growing`: the groups that need more blocks the longer a sequence gets.

    The rule of vLLM's #40384 and #40417. Full attention and its subclasses grow. Mamba grows only
    in cache mode `all`, which keeps a state per block. Sliding windows, chunked local attention
    and every other bounded kind do not grow. If no group in device memory grows, all groups count.

    The resulting capacity is that of sequences as long as the pool allows, without the few blocks
    that a request holds of the bounded groups. No request reaches it: see `Capacity`.
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
    """Return the groups that `GrowingGroups` counts, with the signature of vLLM's #40384."""
    del vllm_config
    return GrowingGroups().hybrid_kv_token_capacity_groups(kv_cache_config)


def addressable_slots(group: KVCacheGroupSpec, kv_cache_config: KVCacheConfig) -> int:
    """Return the number of entries of a buffer that a group's slot mapping indexes (#37118).

    A slot is block * block_size + offset, and a group may hold any block of the pool, so no
    capacity in tokens is enough.
    """
    num_blocks = kv_cache_config.num_blocks
    if group.host_resident:
        num_blocks = kv_cache_config.hisparse_host_num_blocks or 0
    return num_blocks * int(group.kv_cache_spec.block_size)


def _grows(spec: KVCacheSpec) -> bool:
    if isinstance(spec, MambaSpec):
        return bool(spec.mamba_cache_mode == "all")
    return isinstance(spec, FullAttentionSpec)


@dataclass(frozen=True)
class Capacity:
    """How many requests a pool of KV blocks holds at once. No two requests share a prefix.

    All groups draw blocks from one pool. With N blocks, one of which is the null block, and at
    most r(n) blocks held by a request of n tokens (`blocks_per_request`):

        max_len_requests = floor((N - 1) / r(max_model_len))
        short_requests   = floor((N - 1) / r(short_request))

    `--max-num-seqs` may allow fewer.

    Attributes:
        num_blocks: N, the blocks of the pool, including the null block.
        max_model_len: Tokens of the longest request.
        max_len_requests: Requests of `max_model_len` that the scheduler can always run at once.
        concurrency: The same with a fraction of a request and with the null block: vLLM's
            "Maximum concurrency".
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

    def describe(self, reported_tokens: int | None = None) -> list[str]:
        """Return the lines for the log, one per number.

        Args:
            reported_tokens: The KV cache size in tokens that vLLM logs; None for the default.
        """
        # Truncated, because 1.999 requests are not 2.
        concurrency = math.floor(100 * self.concurrency) / 100
        short_tokens = self.short_requests * self.short_request
        lines = [
            f"KV cache of {self.num_blocks:,} blocks: {self.max_len_tokens:,} tokens in requests "
            f"of max_model_len ({self.max_model_len:,} tokens), {concurrency:,.2f} of them at "
            f"once; {self.max_len_requests:,} whole requests always fit next to vLLM's null block",
            f"Short requests ({self.short_request:,} tokens): {self.short_requests:,} always fit "
            f"at once, {short_tokens:,} tokens",
        ]
        if reported_tokens not in (None, self.max_len_tokens):
            lines.append(
                f"The KV cache size that vLLM logs and exports, {reported_tokens:,} tokens, counts "
                "only the KV groups that the setting token_capacity_groups selects"
            )
        return lines


def capacity(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Capacity:
    """Return what the pool of a plan holds. All displayed capacities come from here.

    Args:
        vllm_config: The engine's configuration: `max_model_len`, the tokens in flight, context
            parallelism and the cache mode of states.
        kv_cache_config: The plan of a worker or of the scheduler, with its number of blocks.
    """
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
    """Return the most blocks of one group that a request holds at once.

    These are the blocks that its tokens span, at most what vLLM reserves for a request of the
    group's kind: a window's blocks and those of the tokens in flight, or the states that a request
    keeps. Speculative states are added. At `max_model_len` this is vLLM's own count, with two
    exceptions. Mamba in cache mode `all` counts one state per block, which is what is allocated.
    Chunked local attention counts one more block, as windows do, because its tokens may start
    inside a block. `tokens` counts prompt and answer together.
    """
    dcp = vllm_config.parallel_config.decode_context_parallel_size
    return max(
        _blocks_of_layer(vllm_config, layer, tokens, dcp) for layer in iter_layer_specs(spec)
    )


def _blocks_of_layer(vllm_config: VllmConfig, spec: KVCacheSpec, tokens: int, dcp: int) -> int:
    most = -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
    if isinstance(spec, CrossAttentionSpec):
        # It holds the encoder's tokens, whatever the request's length.
        return most
    spanned = -(-tokens // resolve_dcp_kv_block_size(spec, dcp))
    if isinstance(spec, ChunkedLocalAttentionSpec):
        # With blocks of 32, 17 computed tokens and 16 new ones hold two blocks. vLLM reserves
        # for the chunk and the tokens in flight as if they shared one.
        most += 1
    if isinstance(spec, MambaSpec):
        spanned += spec.num_speculative_blocks
        if spec.mamba_cache_mode == "all":
            return spanned
    return min(spanned, most)


def _requests_at_once(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, tokens: int) -> int:
    """Return how many requests of `tokens` tokens always fit next to each pool's null block."""
    device = host = 0
    for group in kv_cache_config.kv_cache_groups:
        blocks = blocks_per_request(vllm_config, group.kv_cache_spec, tokens)
        if group.host_resident:
            host += blocks
        else:
            device += blocks
    limits = [(kv_cache_config.num_blocks - 1) // device] if device else []
    if host:
        limits.append(((kv_cache_config.hisparse_host_num_blocks or 1) - 1) // host)
    return min(limits, default=0)


def check_capacity_groups(
    kv_cache_config: KVCacheConfig, chosen: Sequence[KVCacheGroupSpec], who: str
) -> None:
    """Check a strategy's choice of groups.

    Raises:
        HybridKVStrategyError: A group is not part of the plan or is chosen twice, or none is in
            device memory.
    """
    if not isinstance(chosen, Sequence):
        raise HybridKVStrategyError(f"{who} must return a list of KV groups, got {chosen!r}")
    groups = kv_cache_config.kv_cache_groups
    for index, group in enumerate(chosen):
        if not any(group is planned for planned in groups):
            raise HybridKVStrategyError(
                f"{who} chose a KV group that is not one of the plan's {len(groups)}: {group!r}"
            )
        if any(group is other for other in chosen[:index]):
            raise HybridKVStrategyError(
                f"{who} chose the KV group of layer {group.layer_names[0]} twice"
            )
    if all(group.host_resident for group in chosen):
        raise HybridKVStrategyError(
            f"{who} chose {len(chosen)} of {len(groups)} KV groups, none of them in device memory"
        )
