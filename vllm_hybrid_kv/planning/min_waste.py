# SPDX-License-Identifier: Apache-2.0
"""The strategy `min_waste`: pages of one size with the least padding. See `docs/planning.md`."""

from __future__ import annotations

from collections.abc import Mapping

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

from vllm_hybrid_kv.hooks import hookimpl
from vllm_hybrid_kv.planning.lcm import lcm_page_size, with_page_size
from vllm_hybrid_kv.planning.page_kinds import layer_kind
from vllm_hybrid_kv.planning.page_search import Kinds, PageSearch, cheapest_page
from vllm_hybrid_kv.planning.page_sizes import describe_layers

logger = init_logger("vllm.hybrid_kv.planning")

LONGEST_SEQUENCE = 1 << 20
"""Tokens of the longest sequence if vLLM plans without a configuration."""

TOLERANCE = 0.01
"""Longer blocks are chosen only if they save at least this share of the pool. If blocks are `n`
tokens longer, a request wastes `n / 2` more tokens of its last block, and its hits are shorter."""

REFERENCE_REQUEST = 3_200
"""The cost of a page size is computed for a request of this many tokens. `docs/planning.md` gives
the source of the number."""


class MinWaste:
    @hookimpl
    def hybrid_kv_unify_page_sizes(
        self, vllm_config: VllmConfig | None, kv_cache_spec: dict[str, KVCacheSpec]
    ) -> dict[str, KVCacheSpec]:
        return unify_with_least_waste(
            kv_cache_spec,
            longest_sequence(vllm_config),
            reference=_reference_request(vllm_config, kv_cache_spec),
        )


def longest_sequence(vllm_config: VllmConfig | None) -> int:
    """Return `max_model_len`, or `LONGEST_SEQUENCE` if no model is configured."""
    model = None if vllm_config is None else vllm_config.model_config
    return LONGEST_SEQUENCE if model is None else int(model.max_model_len)


def _reference_request(
    vllm_config: VllmConfig | None, kv_cache_spec: Mapping[str, KVCacheSpec]
) -> float | None:
    """Return the tokens of the reference request, or None if hits do not end at whole blocks."""
    if vllm_config is None or not vllm_config.cache_config.enable_prefix_caching:
        return None
    # In models with states vLLM ends hits inside blocks (`partial_hash_hits_enabled`).
    if any(isinstance(spec, MambaSpec) for spec in kv_cache_spec.values()):
        return None
    tokens = min(longest_sequence(vllm_config), REFERENCE_REQUEST)
    # Count the tokens of one rank: decode context parallelism divides a request among all ranks.
    return tokens / vllm_config.parallel_config.decode_context_parallel_size


def unify_with_least_waste(
    kv_cache_spec: Mapping[str, KVCacheSpec],
    longest: int = LONGEST_SEQUENCE,
    tolerance: float = TOLERANCE,
    reference: float | None = None,
) -> dict[str, KVCacheSpec]:
    """Give the pages of all layers the size that leaves the least padding. Keep the specs' order.

    Without a reference request, the candidates range from the largest page (without padding) to the
    size that `lcm` aims at. If some have at most `tolerance` padding and at most that of `lcm`, the
    smallest of them wins. Otherwise, the candidate with the least padding wins. If no candidate
    suits all layers, the next larger size that suits them wins. With a reference request, the size
    with the lowest cost wins (see `cheapest_page`).

    Args:
        kv_cache_spec: The spec of every layer by name.
        longest: Tokens of the longest sequence. Blocks of layers that can be padded are no longer
            than this sequence needs.
        tolerance: Saving less than this share of the pool is not worth longer blocks.
        reference: Tokens of the reference request, or None if prefix-cache hits do not end at
            multiples of the blocks.

    Raises:
        NotImplementedError: No size suits all layers, up to the size at which every block holds
            the longest sequence. vLLM then tries to allocate windows like full attention.
    """
    # One layer represents its kind, because models have hundreds of layers but few kinds.
    # Layers with equal specs may differ in marks that vLLM does not compare (`is_draft`).
    names_of: dict[tuple[object, ...], list[str]] = {}
    for name, spec in kv_cache_spec.items():
        names_of.setdefault((type(spec), *vars(spec).values()), []).append(name)
    kinds = [
        (layer_kind(kv_cache_spec[names[0]], longest), len(names)) for names in names_of.values()
    ]
    page = None
    padded = "of the pool is padding"
    if reference is not None and (cheapest := cheapest_page(kinds, reference)) is not None:
        page, unit = cheapest
        kinds = [(kind.within(unit), layers) for kind, layers in kinds]
        padded = (
            f"of a request of {reference:,.0f} tokens is padding, prefix-cache hits end at "
            f"multiples of {unit:,} tokens"
        )
    if page is None:
        search = PageSearch(kinds)
        highest = lcm_page_size([kind.spec for kind, _ in kinds])
        by_lcm = _filled_by_lcm(kinds, highest)
        page = search.best(highest, max(1 - tolerance, by_lcm or 0.0), by_lcm is not None)
    if page is None:
        stiff = [
            name
            for (kind, _), names in zip(kinds, names_of.values(), strict=True)
            if not kind.elastic
            for name in names
        ]
        raise NotImplementedError(
            f"min_waste: no page size suits all layers: {describe_layers(kv_cache_spec, stiff)}. "
            f"These pages can only be scaled by whole blocks, and no size from {search.least:,} "
            f"bytes (the largest page) to {search.reach:,} bytes (a block of max_model_len, "
            f"{longest:,} tokens) is a multiple of all of them. Use one --kv-cache-dtype for all "
            "layers, a draft model of the same shape, or another --block-size"
        )
    planned = dict(kv_cache_spec)
    for (kind, _), names in zip(kinds, names_of.values(), strict=True):
        planned.update(dict.fromkeys(names, kind.with_page(page.size)))
    if planned != kv_cache_spec:
        share = 100 * (1 - page.filled)
        logger.info("min_waste: pages of %s bytes, %.2f %% %s", f"{page.size:,}", share, padded)
    return planned


def _filled_by_lcm(kinds: Kinds, page: int) -> float | None:
    """Return the share of the pool that `lcm` fills, or None if its page cannot suit all layers."""
    used = 0
    for kind, layers in kinds:
        planned = with_page_size(kind.spec, page)
        if planned is None:
            return None
        used += layers * kind.used_in(planned)
    return used / (page * sum(layers for _, layers in kinds))
