# SPDX-License-Identifier: Apache-2.0
"""The strategy `min_waste`: pages of one size with as little padding as there can be.

`docs/planning.md` says what every kind of layer can do, what counts as waste, and why no plan of
`stock` or `lcm` wastes less.
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
from vllm_hybrid_kv.planning.page_search import PageSearch, weighed_page
from vllm_hybrid_kv.planning.page_sizes import describe_layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.hybrid_kv.planning")

LONGEST_SEQUENCE = 1 << 20
"""Tokens of the longest sequence there is, where vLLM plans without a configuration."""

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
        """See `unify_with_least_waste`."""
        return unify_with_least_waste(
            kv_cache_spec,
            longest_sequence(vllm_config),
            reference=_reference_request(vllm_config, kv_cache_spec),
        )


def _reference_request(
    vllm_config: VllmConfig | None, kv_cache_spec: Mapping[str, KVCacheSpec]
) -> Fraction | None:
    """Return what match units are compared with, None if blocks do not decide where hits end."""
    if vllm_config is None or not hits_end_at_blocks(vllm_config, kv_cache_spec):
        return None
    tokens = min(longest_sequence(vllm_config), REFERENCE_REQUEST)
    # A block of all devices together is that many times as long.
    return Fraction(tokens, vllm_config.parallel_config.decode_context_parallel_size)


def hits_end_at_blocks(vllm_config: VllmConfig, kv_cache_spec: Mapping[str, KVCacheSpec]) -> bool:
    """Whether prefix-cache hits end at multiples of the least common multiple of all blocks.

    In models with states vLLM ends hits inside blocks (`partial_hash_hits_enabled`).
    """
    if not vllm_config.cache_config.enable_prefix_caching:
        return False
    return not any(isinstance(spec, MambaSpec) for spec in kv_cache_spec.values())


def longest_sequence(vllm_config: VllmConfig | None) -> int:
    """Return `max_model_len`, or `LONGEST_SEQUENCE` where there is no configuration of a model."""
    model = None if vllm_config is None else vllm_config.model_config
    return LONGEST_SEQUENCE if model is None else int(model.max_model_len)


def unify_with_least_waste(
    kv_cache_spec: Mapping[str, KVCacheSpec],
    longest: int = LONGEST_SEQUENCE,
    tolerance: Fraction = TOLERANCE,
    reference: Fraction | None = None,
) -> dict[str, KVCacheSpec]:
    """Give all layers pages of the size that leaves the smallest share of the pool as padding.

    With a reference request, choose the page and blocks with the lowest cost instead: the share of
    its pages that the request leaves as padding, plus `match_unit / (2 * reference)`, where the
    match unit is the least common multiple of all blocks.

    Without one, of the page sizes from what the largest page holds, without padding, up to the one
    that `lcm` aims at: the one with the smallest `waste`; of equals the smallest, which has the
    shortest blocks. Shares up to `tolerance` count as equal where they are not above what `lcm`
    leaves. Where no size up to that one suits all layers, the next larger one that does.

    Args:
        kv_cache_spec: The spec of every layer by name. Page sizes are in bytes, block sizes in
            tokens.
        longest: Tokens of the longest sequence there is. Blocks of layers that can be padded get
            no longer than it takes to hold one.
        tolerance: The share of the pool that is not worth longer blocks; with 0 the plan is the
            one with the fewest wasted bytes to the last.
        reference: Tokens of the request that match units are compared with; None if prefix-cache
            hits do not end at multiples of the blocks.

    Returns:
        New specs of equal `page_size_bytes`, in the same order. Layers that need no change keep
        their spec.

    Raises:
        NotImplementedError: No size suits all layers, up to the one where every block holds the
            longest sequence. vLLM then tries to allocate every layer in full.
    """
    if not kv_cache_spec:
        return {}
    # One of a kind stands for all: models have hundreds of layers and a handful of kinds.
    number_of: dict[Hashable, int] = {}
    numbers = {
        name: number_of.setdefault(_key(spec), len(number_of))
        for name, spec in kv_cache_spec.items()
    }
    count = Counter(numbers.values())
    first = {number: kv_cache_spec[name] for name, number in reversed(numbers.items())}
    kinds = [(layer_kind(first[number], longest), count[number]) for number in range(len(count))]
    page = None
    of_what = "of the pool is padding"
    if reference is not None and (weighed := weighed_page(kinds, reference)) is not None:
        page, unit = weighed
        kinds = [(kind.within(unit), layers) for kind, layers in kinds]
        of_what = (
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
            f"min_waste: {describe_layers(kv_cache_spec, stiff)}. These pages can only be scaled "
            f"as a whole, the largest page of all layers holds {search.least:,} bytes, and no "
            f"size from there to {search.reach:,} bytes, where a block holds the {longest:,} "
            "tokens of max_model_len, is a multiple of all of them. Give these layers equal pages "
            "(one --kv-cache-dtype, a draft model of the same shape) or change --block-size"
        )
    planned = [kind.with_page(page.size) for kind, _ in kinds]
    if any(after is not kind.spec for after, (kind, _) in zip(planned, kinds, strict=True)):
        logger.info(
            "min_waste: pages of %s bytes, %.2f %% %s",
            f"{page.size:,}",
            100 * page.waste,
            of_what,
        )
        for after, (kind, layers) in zip(planned, kinds, strict=True):
            _log_padding(layers, kind, after)
    return {name: planned[number] for name, number in numbers.items()}


def waste(
    before: Mapping[str, KVCacheSpec],
    after: Mapping[str, KVCacheSpec],
    longest: int = LONGEST_SEQUENCE,
) -> Fraction:
    """Return the share of the pool that a plan leaves as padding, whatever strategy made it.

    The sum over all layers of the bytes of their page that can hold neither tokens nor a state,
    divided by the sum of their pages. The tokens of a block beyond the longest sequence count as
    padding.

    Args:
        before: The specs before planning.
        after: The plan, with pages of one size.
        longest: Tokens of the longest sequence there is.
    """
    used = sum(layer_kind(spec, longest).used_in(after[name]) for name, spec in before.items())
    return 1 - Fraction(used, sum(spec.page_size_bytes for spec in after.values()))


def _waste_by_lcm(kinds: Sequence[tuple[LayerKind, int]], page: int) -> Fraction | None:
    """Return the share that `lcm` leaves with its page, or None where it has no plan."""
    used = 0
    for kind, layers in kinds:
        planned = with_page_size(kind.spec, page)
        if planned is None:
            return None
        used += layers * kind.used_in(planned)
    return 1 - Fraction(used, page * sum(layers for _, layers in kinds))


def _key(spec: KVCacheSpec) -> Hashable:
    """Return what makes specs one, marks included that vLLM does not compare (`is_draft`)."""
    cls: Any = type(spec)
    return spec, *(getattr(spec, name) for name in _not_compared(cls))


@cache
def _not_compared(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls) if not field.compare)


def _log_padding(layers: int, kind: LayerKind, planned: KVCacheSpec) -> None:
    page, used = planned.page_size_bytes, kind.used_in(planned)
    if used < page:
        logger.info(
            "min_waste: %d layers (%s, blocks of %s tokens) use %s bytes of a page, %.2f %% of it "
            "is padding",
            layers,
            type(planned).__name__,
            f"{planned.block_size:,}",
            f"{used:,}",
            100 * (page - used) / page,
        )
