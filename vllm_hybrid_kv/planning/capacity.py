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


class GrowingGroups:
    """The strategy `growing`: the groups whose memory grows with the sequence."""

    @hookimpl
    def hybrid_kv_token_capacity_groups(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> list[KVCacheGroupSpec]:
        """See `token_capacity_kv_cache_groups`."""
        return token_capacity_kv_cache_groups(vllm_config, kv_cache_config)


def token_capacity_kv_cache_groups(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> list[KVCacheGroupSpec]:
    """Return the groups that need more blocks the longer a sequence gets.

    The rule of vLLM's #40384 and #40417, and its signature. Full attention and its subclasses
    grow; Mamba grows only in cache mode `all`, which keeps a state per block; a sliding window,
    chunked local attention and everything else whose memory is bounded do not. Where no group in
    device memory grows, all groups are returned.

    The capacity that follows is that of sequences as long as the pool allows, without the few
    blocks that a request holds of the bounded groups. No request reaches it: see `Capacity`.

    Args:
        vllm_config: The engine's configuration. Every layer's spec carries its own cache mode, so
            that nothing of it is needed; upstream's signature has it.
        kv_cache_config: The plan.

    Returns:
        Groups of the plan, in its order.
    """
    del vllm_config
    growing = [
        group
        for group in kv_cache_config.kv_cache_groups
        if any(_grows(spec) for spec in iter_layer_specs(group.kv_cache_spec))
    ]
    if all(group.host_resident for group in growing):
        return list(kv_cache_config.kv_cache_groups)
    return growing


def _grows(spec: KVCacheSpec) -> bool:
    if isinstance(spec, MambaSpec):
        return bool(spec.mamba_cache_mode == "all")
    return isinstance(spec, FullAttentionSpec)


SHORT_REQUEST = 512
"""Tokens of the short request that capacities are also reported for."""


@dataclass(frozen=True)
class Capacity:
    """How many requests a pool of KV blocks holds at once. No two requests share a prefix.

    All groups draw blocks from one pool. With N blocks, one of which is the null block, and r(n)
    blocks that a request of n tokens holds at most (`blocks_per_request`):

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

    @property
    def short_tokens(self) -> int:
        """Return the tokens that the short requests have."""
        return self.short_requests * self.short_request

    def describe(self, reported_tokens: int | None = None) -> list[str]:
        """Return the lines for the log, each about one number.

        Args:
            reported_tokens: The KV cache size in tokens that vLLM logs; None for the default.
        """
        # Truncated, because 1.999 requests are not 2.
        concurrency = math.floor(100 * self.concurrency) / 100
        lines = [
            f"KV cache of {self.num_blocks:,} blocks: {self.max_len_tokens:,} tokens in requests "
            f"of max_model_len ({self.max_model_len:,} tokens), {concurrency:,.2f} of them at "
            f"once; {self.max_len_requests:,} whole ones always fit next to vLLM's null block",
            f"Short requests ({self.short_request:,} tokens): {self.short_requests:,} always fit "
            f"at once, {self.short_tokens:,} tokens",
        ]
        if reported_tokens not in (None, self.max_len_tokens):
            lines.append(
                f"The KV cache size that vLLM logs and exports, {reported_tokens:,} tokens, counts "
                "only the KV groups that the setting token_capacity_groups selects"
            )
        return lines


def capacity(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Capacity:
    """Return what the pool of a plan holds. Every capacity that is shown comes from here.

    Args:
        vllm_config: The engine's configuration: `max_model_len`, the tokens in flight, context
            parallelism and the cache mode of states.
        kv_cache_config: The plan, with its number of blocks; a worker's or the scheduler's.
    """
    max_model_len = vllm_config.model_config.max_model_len
    short = min(SHORT_REQUEST, max_model_len)
    concurrency = kv_cache_utils.get_max_concurrency_for_kv_cache_config(
        vllm_config, kv_cache_config
    )
    return Capacity(
        num_blocks=kv_cache_config.num_blocks,
        max_model_len=max_model_len,
        max_len_requests=requests_at_once(vllm_config, kv_cache_config, max_model_len),
        concurrency=concurrency,
        max_len_tokens=int(concurrency * max_model_len),
        short_request=short,
        short_requests=requests_at_once(vllm_config, kv_cache_config, short),
    )


def blocks_per_request(vllm_config: VllmConfig, spec: KVCacheSpec, tokens: int) -> int:
    """Return the most blocks of one group that a request of `tokens` tokens holds at once.

    The blocks that its tokens span, but no more than vLLM reserves at most for a request of the
    group's kind: a window's blocks and those of the tokens in flight, or the states that a request
    keeps. Speculative states come on top. At `max_model_len` this is vLLM's own count, with two
    exceptions. Mamba in cache mode `all` counts a state per block, as is allocated. Chunked local
    attention counts one block more, as windows do: its tokens need not begin where a block does.

    Args:
        vllm_config: The engine's configuration.
        spec: The group's.
        tokens: Tokens of the request, prompt and answer together.
    """
    dcp = vllm_config.parallel_config.decode_context_parallel_size
    return max(
        _blocks_of_layer(vllm_config, layer, tokens, dcp) for layer in iter_layer_specs(spec)
    )


def _blocks_of_layer(vllm_config: VllmConfig, spec: KVCacheSpec, tokens: int, dcp: int) -> int:
    most = -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
    if isinstance(spec, CrossAttentionSpec):
        # The encoder's tokens, however many the request has of its own.
        return most
    spanned = -(-tokens // resolve_dcp_kv_block_size(spec, dcp))
    if isinstance(spec, ChunkedLocalAttentionSpec):
        # Of 17 tokens computed and 16 to come, with blocks of 32, both blocks are held, though
        # vLLM reserves for the chunk and the tokens in flight as if they lay in one.
        most += 1
    if isinstance(spec, MambaSpec):
        spanned += spec.num_speculative_blocks
        if spec.mamba_cache_mode == "all":
            return spanned
    return min(spanned, most)


def requests_at_once(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, tokens: int) -> int:
    """Return how many requests of `tokens` tokens always fit next to each pool's null block.

    Args:
        vllm_config: The engine's configuration.
        kv_cache_config: The plan.
        tokens: Tokens of a request, prompt and answer together.
    """
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


def addressable_slots(group: KVCacheGroupSpec, kv_cache_config: KVCacheConfig) -> int:
    """Return the slots that a group's slot mapping can name on one rank.

    The length of a buffer that is indexed by slot, such as that of routed experts (vLLM's #37118).
    A slot is block * block_size + offset, and blocks of a group may be any of the pool, so that
    the groups' slots overlap in number and none of the capacities is enough.
    """
    num_blocks = kv_cache_config.num_blocks
    if group.host_resident:
        num_blocks = kv_cache_config.hisparse_host_num_blocks or 0
    return num_blocks * int(group.kv_cache_spec.block_size)


def check_capacity_groups(
    kv_cache_config: KVCacheConfig, chosen: Sequence[KVCacheGroupSpec], who: str
) -> None:
    """Check a strategy's choice of groups.

    Raises:
        HybridKVStrategyError: A group is not the plan's or is there twice, or none is in device
            memory, so that there is nothing to count.
    """
    if not isinstance(chosen, Sequence):
        raise HybridKVStrategyError(f"{who} must answer with a list of KV groups, got {chosen!r}")
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
