# SPDX-License-Identifier: Apache-2.0
"""The strategy `min_waste`: pages of one size with the least padding.

`docs/planning.md` describes what each kind of layer can do and what counts as waste, and proves
that no plan of `stock` or `lcm` wastes less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

from vllm_hybrid_kv.hooks import hookimpl
from vllm_hybrid_kv.planning.lcm import lcm_page_size, with_page_size
from vllm_hybrid_kv.planning.page_kinds import LayerKind, layer_kind
from vllm_hybrid_kv.planning.page_search import PageSearch, cheapest_page
from vllm_hybrid_kv.planning.page_sizes import describe_layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.hybrid_kv.planning")

LONGEST_SEQUENCE = 1 << 20
"""Tokens of the longest sequence if vLLM plans without a configuration."""

TOLERANCE = Fraction(1, 100)
"""The share of the pool that is not worth longer blocks. A block that is `n` tokens longer costs
every request `n / 2` tokens more on average, in its last block, and lets fewer prefixes match."""

REFERENCE_REQUEST = 3_200
"""Tokens of the request for which padding and match units are weighed. `docs/planning.md` has the
source."""


class MinWaste:
    """The strategy `min_waste`."""

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
) -> Fraction | None:
    """Return the tokens to weigh match units for; None if blocks do not decide where hits end."""
    if vllm_config is None or not vllm_config.cache_config.enable_prefix_caching:
        return None
    # In models with states vLLM ends hits inside blocks (`partial_hash_hits_enabled`).
    if any(isinstance(spec, MambaSpec) for spec in kv_cache_spec.values()):
        return None
    tokens = min(longest_sequence(vllm_config), REFERENCE_REQUEST)
    # All ranks together have a block that is as many times as long.
    return Fraction(tokens, vllm_config.parallel_config.decode_context_parallel_size)


def unify_with_least_waste(
    kv_cache_spec: Mapping[str, KVCacheSpec],
    longest: int = LONGEST_SEQUENCE,
    tolerance: Fraction = TOLERANCE,
    reference: Fraction | None = None,
) -> dict[str, KVCacheSpec]:
    """Return specs with pages of the size that leaves the least padding.

    Without a reference request, the choice is among the sizes from the largest page (without
    padding) to the one that `lcm` aims at. The size with the smallest `waste` wins; of equal ones
    the smallest, which has the shortest blocks. Shares up to `tolerance` count as equal if `lcm`
    leaves no less. If no size in that range suits all layers, the next larger one that does wins.

    With a reference request, the page and blocks with the lowest cost win. The cost is the share of
    the request's pages that is padding, plus `match_unit / (2 * reference)`; the match unit is the
    least common multiple of all blocks.

    Args:
        kv_cache_spec: The spec of every layer by name. Page sizes are in bytes, block sizes in
            tokens.
        longest: Tokens of the longest sequence. Blocks of layers that can be padded are no longer
            than it needs.
        tolerance: The share of the pool that is not worth longer blocks. 0 gives the plan with the
            fewest wasted bytes.
        reference: Tokens of the request that match units are weighed for; None if prefix-cache
            hits do not end at multiples of the blocks.

    Returns:
        Specs of equal `page_size_bytes`, in the same order. Layers that need no change keep their
        spec.

    Raises:
        NotImplementedError: No size suits all layers, up to the one whose blocks all hold the
            longest sequence. vLLM then tries to allocate every layer in full.
    """
    if not kv_cache_spec:
        return {}
    # One layer of a kind represents all: models have hundreds of layers and a handful of kinds.
    number_of: dict[Hashable, int] = {}
    numbers = {
        name: number_of.setdefault(_key(spec), len(number_of))
        for name, spec in kv_cache_spec.items()
    }
    count = Counter(numbers.values())
    first = {number: kv_cache_spec[name] for name, number in reversed(numbers.items())}
    kinds = [(layer_kind(first[number], longest), count[number]) for number in range(len(count))]
    page = None
    padded = "of the pool is padding"
    if reference is not None and (cheapest := cheapest_page(kinds, reference)) is not None:
        page, unit = cheapest
        kinds = [(kind.within(unit), layers) for kind, layers in kinds]
        padded = (
            f"of a request of {float(reference):,.0f} tokens is padding, prefix-cache hits end at "
            f"multiples of {unit:,} tokens"
        )
    if page is None:
        search = PageSearch(kinds)
        highest = lcm_page_size([kind.spec for kind, _ in kinds])
        by_lcm = _waste_by_lcm(kinds, highest)
        enough = tolerance if by_lcm is None else min(tolerance, by_lcm)
        page = search.best(highest, enough, at_highest=by_lcm is not None)
    if page is None:
        stiff = [name for name, number in numbers.items() if not kinds[number][0].elastic]
        raise NotImplementedError(
            f"min_waste: no page size suits all layers: {describe_layers(kv_cache_spec, stiff)}. "
            f"These pages can only be scaled by whole blocks, and no size from {search.least:,} "
            f"bytes (the largest page) to {search.reach:,} bytes (a block of max_model_len, "
            f"{longest:,} tokens) is a multiple of all of them. Use one --kv-cache-dtype for all "
            "layers, a draft model of the same shape, or another --block-size"
        )
    planned = [kind.with_page(page.size) for kind, _ in kinds]
    if any(after is not kind.spec for after, (kind, _) in zip(planned, kinds, strict=True)):
        share = 100 * page.waste
        logger.info("min_waste: pages of %s bytes, %.2f %% %s", f"{page.size:,}", share, padded)
        for after, (kind, layers) in zip(planned, kinds, strict=True):
            _log_padding(layers, kind, after)
    return {name: planned[number] for name, number in numbers.items()}


def waste(
    before: Mapping[str, KVCacheSpec],
    after: Mapping[str, KVCacheSpec],
    longest: int = LONGEST_SEQUENCE,
) -> Fraction:
    """Return the share of the pool that any strategy's plan leaves as padding.

    Sum the bytes of every layer's page that can hold neither tokens nor a state, and divide by the
    sum of the pages. The tokens of a block beyond the longest sequence count as padding.

    Args:
        before: The specs before planning.
        after: The plan, with pages of one size.
        longest: Tokens of the longest sequence.
    """
    used = sum(layer_kind(spec, longest).used_in(after[name]) for name, spec in before.items())
    return 1 - Fraction(used, sum(spec.page_size_bytes for spec in after.values()))


def _waste_by_lcm(kinds: Sequence[tuple[LayerKind, int]], page: int) -> Fraction | None:
    """Return the share that `lcm` wastes with its page, or None if it has no plan."""
    used = 0
    for kind, layers in kinds:
        planned = with_page_size(kind.spec, page)
        if planned is None:
            return None
        used += layers * kind.used_in(planned)
    return 1 - Fraction(used, page * sum(layers for _, layers in kinds))


def _key(spec: KVCacheSpec) -> Hashable:
    """Return a key of equal specs, including the marks that vLLM does not compare (`is_draft`)."""
    cls: Any = type(spec)
    return spec, *(getattr(spec, name) for name in _not_compared(cls))


@cache
def _not_compared(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls) if not field.compare)


def _log_padding(layers: int, kind: LayerKind, planned: KVCacheSpec) -> None:
    page, used = planned.page_size_bytes, kind.used_in(planned)
    if used < page:
        logger.info(
            "min_waste: %d layers (%s, blocks of %s tokens) use %s bytes of each page, %.2f %% of "
            "it is padding",
            layers,
            type(planned).__name__,
            f"{planned.block_size:,}",
            f"{used:,}",
            100 * (page - used) / page,
        )
