# SPDX-License-Identifier: Apache-2.0
"""The strategy `lcm`: the rule of vLLM's #40128."""

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
    """The strategy `lcm`: scale blocks exactly, and pad only the largest page, and only so far."""

    @hookimpl
    def hybrid_kv_unify_page_sizes(
        self, kv_cache_spec: dict[str, KVCacheSpec]
    ) -> dict[str, KVCacheSpec]:
        """See `unify_by_lcm`."""
        return unify_by_lcm(kv_cache_spec)


def lcm_page_size(specs: Collection[KVCacheSpec]) -> int:
    """Return the page size that the rule aims at, in bytes, whether or not all layers can have it.

    With the page sizes p_i of the layers whose page grows with the block size, and the largest
    page P: the smallest multiple of lcm(p_i < P) that is not below P.
    """
    scalable = {s.page_size_bytes for s in specs if not isinstance(s, MambaSpec)}
    largest = max(spec.page_size_bytes for spec in specs)
    unit = math.lcm(*(page for page in scalable if page < largest))
    return -(-largest // unit) * unit


def unify_by_lcm(kv_cache_spec: Mapping[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """Pad the largest page to a multiple of all smaller ones and scale the smaller blocks to it.

    The rule of vLLM's #40128, in integers. With the page sizes p_i of the layers whose page grows
    with the block size, and the largest page P, the new size is that of `lcm_page_size`. The cases:

    * every p_i divides P: the new size is P, nothing is padded and every block is full;
    * otherwise the layers with the largest page are padded (or scaled, should the new size be a
      multiple of P). They must be states (Mamba) or attention that is not MLA, for only their
      pages can be padded;
    * a smaller state is padded as well, for a state does not grow with its block.

    Worked example: attention of 12,416 bytes for 16 tokens beside a state of 12,648,448. The
    state is padded to 1019 * 12,416 = 12,651,904 bytes (0.03 %) and the block becomes
    1019 * 16 = 16,304 tokens, all of it used. vLLM's own rule pads the attention page, 99.9 %.

    Args:
        kv_cache_spec: The spec of every layer by name. Page sizes are in bytes, block sizes in
            tokens.

    Returns:
        New specs of equal `page_size_bytes`, in the same order.

    Raises:
        NotImplementedError: A page can be neither scaled nor padded to the new size. vLLM then
            tries to allocate every layer in full.
    """
    pages = {name: spec.page_size_bytes for name, spec in kv_cache_spec.items()}
    if len(set(pages.values())) <= 1:
        return dict(kv_cache_spec)
    target = lcm_page_size(kv_cache_spec.values())
    unified = {}
    refused = []
    for name, spec in kv_cache_spec.items():
        changed = with_page_size(spec, target)
        if changed is None:
            refused.append(name)
        else:
            unified[name] = changed
    if refused:
        raise NotImplementedError(
            f"lcm: {describe_layers(kv_cache_spec, refused)}, which can be neither scaled nor "
            f"padded to the {target:,} bytes that the other layers' pages divide; choose "
            "unify_page_sizes=min_waste, which looks for other sizes, or another --block-size"
        )
    padded = Counter(
        pages[name]
        for name, spec in unified.items()
        if getattr(spec, "page_size_padded", None) == target
        and spec.block_size == kv_cache_spec[name].block_size
        and pages[name] != target
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
    """Return a spec with a page of `target` bytes as the rule makes it.

    Args:
        spec: A layer's.
        target: The common page size, in bytes.

    Returns:
        The spec scaled if that is exact, else padded, or None where neither can be.
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
            # A padded page keeps its size whatever its block, so its padding scales along.
            changed = replace(changed, page_size_padded=padding * ratio)
    elif isinstance(spec, MambaSpec) or (
        isinstance(spec, AttentionSpec) and not isinstance(spec, MLAAttentionSpec)
    ):
        changed = replace(spec, page_size_padded=target)
    if changed is None or changed.page_size_bytes != target:
        return None
    return changed
