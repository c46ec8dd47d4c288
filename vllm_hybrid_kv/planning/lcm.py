# SPDX-License-Identifier: Apache-2.0
"""The strategy `lcm`: the rule of vLLM's #40128, in integers.

Blocks are scaled exactly; pages are padded only if they cannot be scaled. With the page sizes p_i
of the layers whose page grows with the block size, and the largest page P, the common size is the
smallest multiple of lcm(p_i < P) that is not below P. The cases:

* every p_i divides P: the common size is P, nothing is padded and every block is full;
* otherwise the layers with the largest page are padded, or scaled if the common size is a multiple
  of P. They must be states (Mamba) or attention other than MLA: only their pages can be padded;
* a smaller state is padded, because a state does not grow with its block.

Example: attention with 12,416 bytes for 16 tokens and a state of 12,648,448 bytes. The state is
padded to 1019 * 12,416 = 12,651,904 bytes (0.03 %). The block becomes 1019 * 16 = 16,304 tokens,
without padding. vLLM's own rule pads the attention page by 99.9 %.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, MambaSpec, MLAAttentionSpec

from vllm_hybrid_kv.hooks import hookimpl
from vllm_hybrid_kv.planning.page_sizes import describe_layers

logger = init_logger("vllm.hybrid_kv.planning")


class LeastCommonMultiple:
    """The strategy `lcm`."""

    @hookimpl
    def hybrid_kv_unify_page_sizes(
        self, kv_cache_spec: dict[str, KVCacheSpec]
    ) -> dict[str, KVCacheSpec]:
        return unify_by_lcm(kv_cache_spec)


def lcm_page_size(specs: Collection[KVCacheSpec]) -> int:
    """Return the page size that the rule aims at, in bytes; not every layer may support it."""
    scalable = {s.page_size_bytes for s in specs if not isinstance(s, MambaSpec)}
    largest = max(spec.page_size_bytes for spec in specs)
    unit = math.lcm(*(page for page in scalable if page < largest))
    return -(-largest // unit) * unit


def unify_by_lcm(kv_cache_spec: Mapping[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """Return specs of equal `page_size_bytes`, in the same order.

    Args:
        kv_cache_spec: The spec of every layer by name. Page sizes are in bytes, block sizes in
            tokens.

    Raises:
        NotImplementedError: A page can be neither scaled nor padded to the common size. vLLM then
            tries to allocate every layer in full.
    """
    if len({spec.page_size_bytes for spec in kv_cache_spec.values()}) <= 1:
        return dict(kv_cache_spec)
    target = lcm_page_size(kv_cache_spec.values())
    unified: dict[str, KVCacheSpec] = {}
    stiff: list[str] = []
    padded: Counter[int] = Counter()
    for name, before in kv_cache_spec.items():
        after = with_page_size(before, target)
        if after is None:
            stiff.append(name)
            continue
        unified[name] = after
        if after is not before and after.block_size == before.block_size:
            padded[before.page_size_bytes] += 1
    if stiff:
        raise NotImplementedError(
            f"lcm: {describe_layers(kv_cache_spec, stiff)}, which can be neither scaled nor padded "
            f"to the {target:,} bytes that the other layers' pages divide; set "
            "unify_page_sizes=min_waste, which tries other sizes, or another --block-size"
        )
    for page, layers in sorted(padded.items()):
        logger.info(
            "lcm: pages of %d layers padded from %s to %s bytes (%.2f %%)",
            layers,
            f"{page:,}",
            f"{target:,}",
            100 * (target - page) / page,
        )
    return unified


def with_page_size(spec: KVCacheSpec, target: int) -> KVCacheSpec | None:
    """Return a spec with a page of `target` bytes: scaled if that is exact, otherwise padded.

    Args:
        spec: A layer's spec.
        target: The common page size, in bytes.

    Returns:
        The spec, or None if its page can be neither scaled nor padded to the target.
    """
    page = spec.page_size_bytes
    if page == target:
        return spec
    changed = None
    padding = getattr(spec, "page_size_padded", None)
    if target % page == 0 and not isinstance(spec, MambaSpec):
        ratio = target // page
        changed = replace(spec, block_size=spec.block_size * ratio)
        if padding is not None:
            # A padded page has one size for any block, so its padding is scaled, too.
            changed = replace(changed, page_size_padded=padding * ratio)
    elif isinstance(spec, MambaSpec) or (
        isinstance(spec, AttentionSpec) and not isinstance(spec, MLAAttentionSpec)
    ):
        changed = replace(spec, page_size_padded=target)
    if changed is None or changed.page_size_bytes != target:
        return None
    return changed
