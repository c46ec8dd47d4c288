# SPDX-License-Identifier: Apache-2.0
"""Pages of one size for layers of different kinds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, MambaSpec, MLAAttentionSpec

from vllm_hybrid_kv.errors import HybridKVStrategyError
from vllm_hybrid_kv.hooks import hookimpl

logger = init_logger("vllm.hybrid_kv.planning")


class LeastCommonMultiple:
    """The strategy `lcm`: scale blocks exactly, and pad only the largest page, and only so far."""

    @hookimpl
    def hybrid_kv_unify_page_sizes(
        self, kv_cache_spec: dict[str, KVCacheSpec]
    ) -> dict[str, KVCacheSpec]:
        """See `unify_by_lcm`."""
        return unify_by_lcm(kv_cache_spec)


def unify_by_lcm(kv_cache_spec: Mapping[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """Pad the largest page to a multiple of all smaller ones and scale the smaller blocks to it.

    The rule of vLLM's #40128. With the page sizes p_i of the layers whose page grows with the
    block size, and the largest page P, the new size is the smallest multiple of lcm(p_i) that is
    not below P. The cases:

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
    largest = max(pages.values())
    unit = math.lcm(
        *(
            pages[name]
            for name, spec in kv_cache_spec.items()
            if pages[name] < largest and not isinstance(spec, MambaSpec)
        )
    )
    target = -(-largest // unit) * unit
    unified = {name: _with_page_size(name, spec, target) for name, spec in kv_cache_spec.items()}
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


def _with_page_size(name: str, spec: KVCacheSpec, target: int) -> KVCacheSpec:
    """Return a layer's spec with a page of `target` bytes, scaled if possible, else padded."""
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
        raise NotImplementedError(
            f"layer {name}: its page of {page:,} bytes ({type(spec).__name__}, "
            f"{spec.block_size} tokens) can be neither scaled nor padded to {target:,} bytes"
        )
    return changed


def check_page_sizes(
    before: Mapping[str, KVCacheSpec], after: Mapping[str, KVCacheSpec], who: str
) -> None:
    """Check what a strategy made of the layers' specs, before vLLM plans with it.

    Args:
        before: What it was given.
        after: What it answered.
        who: The strategy, for the message.

    Raises:
        HybridKVStrategyError: A layer is missing or new, a page or block is smaller than it was,
            or two pages differ.
    """
    if not isinstance(after, Mapping):
        raise HybridKVStrategyError(f"{who} must answer with a dict of specs, got {after!r}")
    if missing := [name for name in before if name not in after]:
        raise HybridKVStrategyError(f"{who} left out layer {', '.join(missing)}")
    if extra := [name for name in after if name not in before]:
        raise HybridKVStrategyError(f"{who} added layer {', '.join(map(str, extra))}")
    pages = {}
    for name, old in before.items():
        new = after[name]
        if not isinstance(new, KVCacheSpec):
            raise HybridKVStrategyError(
                f"{who} gave layer {name} {new!r}, which is not a KVCacheSpec"
            )
        try:
            pages[name] = new.page_size_bytes
        except AssertionError as error:
            raise HybridKVStrategyError(
                f"{who} padded the page of layer {name} to "
                f"{getattr(new, 'page_size_padded', 0):,} bytes, less than its tokens need"
            ) from error
        if new.block_size < old.block_size:
            raise HybridKVStrategyError(
                f"{who} shrank the block of layer {name} from {old.block_size} to "
                f"{new.block_size} tokens"
            )
        if pages[name] < old.page_size_bytes:
            raise HybridKVStrategyError(
                f"{who} shrank the page of layer {name} from {old.page_size_bytes:,} to "
                f"{pages[name]:,} bytes"
            )
    if len(set(pages.values())) > 1:
        (usual, _), *_ = Counter(pages.values()).most_common()
        same = next(name for name, page in pages.items() if page == usual)
        other = next(name for name, page in pages.items() if page != usual)
        raise HybridKVStrategyError(
            f"{who} must make all pages equal: layer {other} has {pages[other]:,} bytes, "
            f"layer {same} has {usual:,} bytes"
        )
