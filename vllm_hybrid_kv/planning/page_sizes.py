# SPDX-License-Identifier: Apache-2.0
"""What any strategy makes of page sizes: its check, and what it says where there is no plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_hybrid_kv.errors import HybridKVStrategyError


def describe_layers(layers: Mapping[str, KVCacheSpec], names: Iterable[str]) -> str:
    """Say what layers have for pages, those that are alike in one.

    Args:
        layers: The specs of all layers.
        names: The layers to describe.

    Returns:
        Their first name and how many more there are, class, bytes and tokens, joined by `; `.
    """
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
    """Check what a strategy made of the layers' specs, before vLLM plans with it.

    Args:
        before: What it was given.
        after: What it answered.
        who: The strategy, for the message.

    Raises:
        HybridKVStrategyError: A layer is missing or new, a block is smaller than it was, a page
            is smaller than what it held without padding, or two pages differ.
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
        if pages[name] < getattr(old, "real_page_size_bytes", old.page_size_bytes):
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
