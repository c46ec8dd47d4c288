# SPDX-License-Identifier: Apache-2.0
"""The check of any strategy's page sizes, and how messages describe layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_hybrid_kv.errors import HybridKVStrategyError


def describe_layers(layers: Mapping[str, KVCacheSpec], names: Iterable[str]) -> str:
    """Describe the pages of some layers: class, bytes and tokens, equal layers together."""
    alike: dict[tuple[str, int, int], list[str]] = {}
    for name in names:
        spec = layers[name]
        key = (type(spec).__name__, spec.page_size_bytes, spec.block_size)
        alike.setdefault(key, []).append(name)
    return "; ".join(
        f"layer {first}{f' and {len(more)} more' if more else ''} "
        f"({kind}) has a page of {page:,} bytes for {tokens:,} tokens"
        for (kind, page, tokens), (first, *more) in alike.items()
    )


def check_page_sizes(
    before: Mapping[str, KVCacheSpec], after: Mapping[str, KVCacheSpec], who: str
) -> None:
    """Check the specs that the strategy `who` returned before vLLM plans with them.

    Raises:
        HybridKVStrategyError: A layer is missing or new, a block is smaller than before, a page
            is smaller than its content, or two pages differ.
    """
    if not isinstance(after, Mapping):
        raise HybridKVStrategyError(f"{who} must return a dict of specs, got {after!r}")
    if missing := [name for name in before if name not in after]:
        raise HybridKVStrategyError(f"{who} left out layer {', '.join(missing)}")
    if extra := [name for name in after if name not in before]:
        raise HybridKVStrategyError(f"{who} added layer {', '.join(map(str, extra))}")
    pages = {}
    for name, old in before.items():
        pages[name] = _checked_page(name, old, after[name], who)
    if len(set(pages.values())) > 1:
        (usual, _), *_ = Counter(pages.values()).most_common()
        same = next(name for name, page in pages.items() if page == usual)
        other = next(name for name, page in pages.items() if page != usual)
        raise HybridKVStrategyError(
            f"{who} must make all pages equal: layer {other} has {pages[other]:,} bytes, "
            f"layer {same} has {usual:,} bytes"
        )


def _checked_page(name: str, old: KVCacheSpec, new: object, who: str) -> int:
    if not isinstance(new, KVCacheSpec):
        raise HybridKVStrategyError(f"{who} gave layer {name} {new!r}, which is not a KVCacheSpec")
    try:
        page: int = new.page_size_bytes
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
    if page < getattr(old, "real_page_size_bytes", old.page_size_bytes):
        raise HybridKVStrategyError(
            f"{who} shrank the page of layer {name} from {old.page_size_bytes:,} to {page:,} bytes"
        )
    return page
