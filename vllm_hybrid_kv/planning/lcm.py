# SPDX-License-Identifier: Apache-2.0
"""The strategy `lcm`: the rule of vLLM's #40128, in integers.

Let p_i be the page sizes of the layers whose pages grow with the block size, and P the largest page
of all layers. The common size is the smallest multiple of lcm(p_i < P) that is not below P. Blocks
grow by a whole factor. The largest pages and states are padded if they cannot grow.

For example, 16 tokens of attention need 12,416 bytes, a state needs 12,648,448 bytes. The state is
padded to 1019 * 12,416 = 12,651,904 bytes (0.03 % padding). The block becomes 1019 * 16 = 16,304
tokens, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, MambaSpec, MLAAttentionSpec

from vllm_hybrid_kv.hooks import hookimpl
from vllm_hybrid_kv.planning.page_sizes import describe_layers


class LeastCommonMultiple:
    @hookimpl
    def hybrid_kv_unify_page_sizes(
        self, kv_cache_spec: dict[str, KVCacheSpec]
    ) -> dict[str, KVCacheSpec]:
        return unify_by_lcm(kv_cache_spec)


def lcm_page_size(specs: Collection[KVCacheSpec]) -> int:
    """Return the page size in bytes that `lcm` aims at. Some layers may not support it."""
    scalable = {s.page_size_bytes for s in specs if not isinstance(s, MambaSpec)}
    largest = max(spec.page_size_bytes for spec in specs)
    unit = math.lcm(*(page for page in scalable if page < largest))
    return -(-largest // unit) * unit


def unify_by_lcm(kv_cache_spec: Mapping[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """Give the pages of all layers the size `lcm_page_size`, and return specs in the same order.

    Raises:
        NotImplementedError: A page can be neither scaled nor padded to the common size. vLLM then
            tries to allocate sliding-window layers like full attention.
    """
    target = lcm_page_size(kv_cache_spec.values())
    planned = {name: with_page_size(spec, target) for name, spec in kv_cache_spec.items()}
    unified = {name: spec for name, spec in planned.items() if spec is not None}
    if stiff := [name for name in planned if name not in unified]:
        raise NotImplementedError(
            f"lcm: {describe_layers(kv_cache_spec, stiff)}, which can be neither scaled nor padded "
            f"to the {target:,} bytes that the other layers' pages divide; set "
            "unify_page_sizes=min_waste, which tries other sizes, or another --block-size"
        )
    return unified


def with_page_size(spec: KVCacheSpec, target: int) -> KVCacheSpec | None:
    """Return a spec with a page of `target` bytes: scaled if that is exact, otherwise padded.

    Return None if the page can be neither scaled nor padded to the target.
    """
    page = spec.page_size_bytes
    if page == target:
        return spec
    changes: dict[str, Any] = {"page_size_padded": target}
    if target % page == 0 and not isinstance(spec, MambaSpec):
        if getattr(spec, "page_size_padded", None) is None:
            changes = {}
        changes["block_size"] = spec.block_size * (target // page)
    elif not isinstance(spec, (AttentionSpec, MambaSpec)) or isinstance(spec, MLAAttentionSpec):
        return None
    changed = replace(spec, **changes)
    return changed if changed.page_size_bytes == target else None
