# SPDX-License-Identifier: Apache-2.0
"""Collect the numbers of a planned KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_cache_hit_alignment_tokens
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from vllm_hybrid_kv.planning.capacity import Capacity, capacity, smallest_hit
from vllm_hybrid_kv.planning.page_sizes import content_bytes
from vllm_hybrid_kv.planning.warnings import padding_share, startup_warnings
from vllm_hybrid_kv.settings import resolve
from vllm_hybrid_kv.tools.plan.engine import Engine, Model

_KINDS: dict[type[KVCacheSpec], str] = {
    MLAAttentionSpec: "MLA",
    ChunkedLocalAttentionSpec: "chunked local {0.attention_chunk_size:,}",
    SlidingWindowSpec: "sliding window {0.sliding_window:,}",
    FullAttentionSpec: "full attention",
}
"""The name of each kind of layer, by spec class. The first class that fits gives the name."""

_QUANTISED = {KVQuantMode.TURBOQUANT_K8V4: "k8v4", KVQuantMode.FP8_PER_TENSOR: "fp8"}


@dataclass(frozen=True)
class Pages:
    """Layers of one KV group with equal pages.

    Attributes:
        stage: The layers' pipeline stage, from 0.
        group: The group's index in its stage, from 0.
        layers: The layers' names.
        kind: The kind of the layers, such as full attention, sliding window or state.
        stores: The stored format: k8v4, fp8 or the names of PyTorch dtypes.
        block_tokens: Tokens of a block.
        page_bytes: Bytes of a layer's page in a block, padding included.
        padding_bytes: Unused bytes of the page.
    """

    stage: int
    group: int
    layers: tuple[str, ...]
    kind: str
    stores: str
    block_tokens: int
    page_bytes: int
    padding_bytes: int

    @property
    def padding(self) -> float:
        """The share of the page, from 0 to 1, that is padding."""
        return self.padding_bytes / self.page_bytes


@dataclass(frozen=True)
class Plan:
    """The KV cache of an engine.

    Attributes:
        kv_cache_dtype: The cache dtype.
        unify_page_sizes: The strategy that unified the page sizes.
        memory: Bytes of KV cache on each rank.
        pages: The pages of all groups.
        block_bytes: Bytes of one block of the pool: a page of every layer of a group.
        blocks: Blocks of the pool.
        pool_padding: The share of a full pool, from 0 to 1, that is padding of pages.
        capacity: The tokens and requests that fit.
        reported_tokens: The cache's size in tokens that vLLM logs and publishes.
        reported_concurrency: The concurrent requests of `max_model_len` that vLLM logs.
        prefix_caching: Whether prefix caching is on.
        scheduler_block_tokens: Chunks of prompts end at multiples of this number of tokens.
        match_tokens: Hits in the prefix cache end at multiples of this number of tokens.
        smallest_hit: Tokens of the shortest prompt that can hit the prefix cache.
        warnings: The warnings that a server would log at start-up.
    """

    kv_cache_dtype: str
    unify_page_sizes: str
    memory: int
    pages: tuple[Pages, ...]
    block_bytes: int
    blocks: int
    pool_padding: float
    capacity: Capacity
    reported_tokens: int
    reported_concurrency: float
    prefix_caching: bool
    scheduler_block_tokens: int
    match_tokens: int
    smallest_hit: int
    warnings: tuple[str, ...]

    @property
    def can_hit(self) -> bool:
        """Whether a prompt that fits into `max_model_len` can hit the prefix cache."""
        return self.prefix_caching and self.smallest_hit < self.capacity.max_model_len

    def tokens_in(self, memory: int) -> int | None:
        """Return how many tokens fit into `memory` bytes if all requests have `max_model_len`.

        Return None if no request of this length fits, so that vLLM would not start.
        """
        blocks = memory // self.block_bytes
        of_request = round(self.blocks / self.capacity.concurrency)
        return (
            int(blocks / of_request * self.capacity.max_model_len) if blocks > of_request else None
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name; sizes are in bytes or tokens."""
        fields = asdict(self)
        for pages, row in zip(self.pages, fields["pages"], strict=True):
            row["padding_percent"] = 100 * pages.padding
        return {**fields, "can_hit": self.can_hit}


def plan_of(model: Model, memory: int, settings: dict[str, Any]) -> Plan:
    """Plan the KV cache of a model; the arguments are those of `Model.engine`.

    Raises:
        ValueError: The memory is too small, or a strategy returned an invalid result.
    """
    engine = model.engine(memory, settings)
    model.check(engine)
    config, planned = engine.vllm_config, engine.kv_cache_config
    by_layer = engine.worker_kv_cache_config
    sizes = engine.scheduler_block_size, engine.hash_block_size
    chosen = resolve(config.additional_config)
    return Plan(
        kv_cache_dtype=config.cache_config.cache_dtype,
        unify_page_sizes=chosen.unify_page_sizes,
        memory=memory,
        pages=tuple(
            pages
            for stage, worker in enumerate(engine.stage_kv_cache_configs)
            for number, group in enumerate(worker.kv_cache_groups)
            for pages in _pages_of(stage, number, group)
        ),
        block_bytes=planned.kv_cache_tensors[0].size // planned.num_blocks,
        blocks=planned.num_blocks,
        pool_padding=padding_share(config, by_layer),
        capacity=capacity(config, planned),
        reported_tokens=config.cache_config.kv_cache_size_tokens,
        reported_concurrency=config.cache_config.kv_cache_max_concurrency,
        prefix_caching=bool(config.cache_config.enable_prefix_caching),
        scheduler_block_tokens=engine.scheduler_block_size,
        match_tokens=hit_alignment(engine),
        smallest_hit=smallest_hit(config, planned, *sizes),
        warnings=tuple(startup_warnings(config, by_layer, *sizes, chosen)),
    )


def hit_alignment(engine: Engine) -> int:
    """Return the match unit: hits in the prefix cache end at multiples of this number of tokens."""
    sizes = engine.scheduler_block_size, engine.hash_block_size
    return resolve_cache_hit_alignment_tokens(engine.kv_cache_config, engine.vllm_config, *sizes)


def _pages_of(stage: int, number: int, group: KVCacheGroupSpec) -> list[Pages]:
    """Describe the pages of one group, with one `Pages` for all layers that have equal pages."""
    by_layer = getattr(group.kv_cache_spec, "kv_cache_specs", None) or dict.fromkeys(
        group.layer_names, group.kv_cache_spec
    )
    equal: dict[KVCacheSpec, list[str]] = {}
    for name in group.layer_names:
        equal.setdefault(by_layer[name], []).append(name)
    return [
        Pages(
            stage=stage,
            group=number,
            layers=tuple(names),
            kind=layer_kind_of(spec),
            stores=_stores(spec),
            block_tokens=spec.block_size,
            page_bytes=spec.page_size_bytes,
            padding_bytes=spec.page_size_bytes - content_bytes(spec),
        )
        for spec, names in equal.items()
    ]


def layer_kind_of(spec: KVCacheSpec) -> str:
    """Name the kind of a layer, such as `sliding window 512`."""
    if isinstance(spec, MambaSpec):
        return f"state ({spec.mamba_type.name.removesuffix('_ATTN').lower().replace('_', ' ')})"
    for kind, name in _KINDS.items():
        if isinstance(spec, kind):
            return name.format(spec)
    return type(spec).__name__.removesuffix("Spec")


def _stores(spec: KVCacheSpec) -> str:
    if isinstance(spec, MambaSpec):
        return ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in spec.dtypes))
    if not isinstance(spec, AttentionSpec):
        return ""
    if spec.kv_quant_mode == KVQuantMode.NONE:
        return str(spec.dtype).removeprefix("torch.")
    return _QUANTISED.get(spec.kv_quant_mode, spec.kv_quant_mode.name.lower())


def merge_equal(pages: Sequence[Pages]) -> list[tuple[Pages, list[int]]]:
    """Merge pages that differ only in group and layer names; return each with its groups."""
    merged: dict[Pages, tuple[Pages, list[int]]] = {}
    for row in pages:
        key = replace(row, group=0, layers=("",) * len(row.layers))
        merged.setdefault(key, (row, []))[1].append(row.group)
    return list(merged.values())
