# SPDX-License-Identifier: Apache-2.0
"""Ways to store a k8v4 cache wrongly, to prove that the end-to-end bounds would show them."""

from __future__ import annotations

from typing import Any

FAULTS = ("swapped nibbles", "scale of the neighbour", "stale page", "clipped keys")

_original: Any = None


def plant(fault: str | None) -> None:
    """Replace the cache update of the k8v4 backend by a wrong one, or put the right one back.

    Args:
        fault: One of `FAULTS`; None for the right one.
    """
    global _original
    from vllm_hybrid_kv.attention.backend import K8V4AttentionImpl

    if _original is None:
        _original = K8V4AttentionImpl.do_kv_cache_update
    if fault is None:
        K8V4AttentionImpl.do_kv_cache_update = _original
        return
    if fault not in FAULTS:
        raise ValueError(f"no fault {fault!r}; there are {', '.join(FAULTS)}")

    def update(
        self: Any, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any
    ) -> None:
        if fault == "clipped keys":
            # What a conversion by way of e4b15 does to large keys.
            key = key.clamp(-1.75, 1.75)
        _original(self, layer, key, value, kv_cache, slot_mapping)
        blocks = slot_mapping[slot_mapping >= 0].div(kv_cache.shape[2], rounding_mode="floor")
        blocks = blocks.unique()
        if fault == "stale page" and blocks.numel() > 3:
            kv_cache[blocks[1]] = kv_cache[blocks[2]]
        if fault in ("swapped nibbles", "scale of the neighbour"):
            _spoil(fault, kv_cache, blocks, key.shape[-1])

    K8V4AttentionImpl.do_kv_cache_update = update


def _spoil(fault: str, kv_cache: Any, blocks: Any, head_size: int) -> None:
    """Swap the nibbles of some pages' values, or give each token the scale of the one before."""
    from vllm_hybrid_kv.kernels import k8v4

    page = k8v4.PageFormat(head_size, kv_cache.shape[2], k8v4.cpu_layout(head_size))
    for block in blocks.tolist():
        for head in range(kv_cache.shape[1]):
            region = kv_cache[block, head].view(-1)
            if fault == "swapped nibbles":
                values = region[page.value_offset : page.scale_offset]
                values.copy_((values >> 4) | (values << 4))
            else:
                scales = region[page.scale_offset : page.zero_offset]
                scales.copy_(scales.clone().roll(2))
