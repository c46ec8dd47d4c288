# SPDX-License-Identifier: Apache-2.0
"""Checks the page sizes that strategies return, and describes layers in messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, MambaSpec

from vllm_hybrid_kv.errors import HybridKVStrategyError


def content_bytes(spec: KVCacheSpec) -> int:
    """Return how many bytes of a page hold tokens or a state; the rest is padding."""
    if isinstance(spec, (AttentionSpec, MambaSpec)):
        return int(spec.real_page_size_bytes)
    return int(spec.page_size_bytes)


def describe_layers(layers: Mapping[str, KVCacheSpec], names: Iterable[str]) -> str:
    """Describe the pages of some layers by class, bytes and tokens. Equal layers are merged."""
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
    """Check the specs that the strategy `who` returned, because vLLM will plan with them.

    Raises:
        HybridKVStrategyError: Layers are missing or new, blocks or pages shrink, or pages differ.
    """
    if not isinstance(after, Mapping):
        raise HybridKVStrategyError(f"{who} must return a dict of specs, got {after!r}")
    if differing := before.keys() ^ after.keys():
        names = ", ".join(sorted(map(str, differing)))
        raise HybridKVStrategyError(
            f"{who} must return specs of exactly the model's layers: {names} is missing or is not "
            "a layer of the model"
        )
    pages = {name: _checked_page(name, old, after[name], who) for name, old in before.items()}
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
        raise HybridKVStrategyError(
            f"{who} must return a KVCacheSpec for layer {name}, got {new!r}"
        )
    try:
        page: int = new.page_size_bytes
    except AssertionError:
        # The `page_size_padded` is less than the bytes of the tokens.
        page = 0
    if new.block_size < old.block_size or page < content_bytes(old):
        size = page or getattr(new, "page_size_padded", 0)
        raise HybridKVStrategyError(
            f"{who} must not shrink layer {name}: its page has {content_bytes(old):,} bytes for "
            f"{old.block_size} tokens, got {size:,} bytes for {new.block_size} tokens"
        )
    return page
