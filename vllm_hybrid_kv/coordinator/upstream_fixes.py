# SPDX-License-Identifier: Apache-2.0
"""Work-arounds for faults of vLLM 0.32 and 0.33 that corrupt cached prefixes.

| work-around | fault | upstream |
|---|---|---|
| `PassedBlocks` | blocks are cached as states that were never written into them | #54076 |
| `StepWrites` | a block is copied in the step that writes it, before it is written | none known |
| `copy_whole_blocks` | part of a block is not copied if layers share its memory | none known |
| `check_drafts` | draft tokens corrupt cached states | #47194, #53912, #53919, #43559 |

Numbers are issues of vllm-project/vllm.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.v1.core.single_type_kv_cache_manager import MambaManager

from vllm_hybrid_kv.errors import HybridKVSettingsError

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.request import Request


class PassedBlocks:
    """Keeps vLLM from caching a state block if a chunk starts inside it and ends after it.

    A state is written where a chunk ends. If a chunk starts inside a state block and ends after it,
    the block keeps the state that the chunk started with. vLLM 0.32 and 0.33 cache it as the state
    at the block's end, and every request that shares that prefix resumes from a wrong state. Such
    chunks occur in two ways:

    - The scheduler aligns chunks to the smallest block of all groups. Any chunk that starts inside
      a longer state block passes its end (vllm-project/vllm#54076).
    - A kernel, such as Mamba 2's, exports the state at a prompt's end from within the last chunk.
      vLLM lets that chunk start inside a block, where a hit ended, and run to the prompt's end.

    The kernel exports the state into the last block but one. If hits end only at every few blocks,
    the exported state may precede that block's end. When the request reaches the next position
    where a hit can end, vLLM caches the exported state again, as the state at the block's end.
    """

    def __init__(self, managers: Iterable[SingleTypeKVCacheManager]) -> None:
        """Among the managers of all groups, select those that cache states."""
        self._managers = [
            manager
            for manager in managers
            if isinstance(manager, MambaManager) and manager.mamba_cache_mode == "align"
        ]
        # By request id, the number of tokens after which the request resumed. vLLM stores this
        # number in the request only after the first step.
        self._resumed: dict[str, int] = {}
        # For each request: the passed blocks, as index of the manager and block table column.
        self._passed: defaultdict[str, set[tuple[int, int]]] = defaultdict(set)

    def resume(self, request_id: str, num_computed_tokens: int) -> None:
        """Record how many tokens a request has from the cache and from a KV connector."""
        self._resumed[request_id] = num_computed_tokens

    def forget(self, request_id: str) -> None:
        self._resumed.pop(request_id, None)
        self._passed.pop(request_id, None)

    @contextmanager
    def hidden(self, request: Request, num_computed_tokens: int) -> Iterator[None]:
        """Replace the request's passed blocks by null blocks while vLLM caches its blocks.

        vLLM never caches a null block. Blocks that earlier steps passed are replaced too, because a
        prompt's end may be in one of them. `request` does not yet include the step, but
        `num_computed_tokens` does.
        """
        request_id = request.request_id
        passed = self._passed[request_id]
        start = max(request.num_computed_tokens, self._resumed.get(request_id, 0))
        # Ignore decoding: there, the worker copies the state at a block's end into the block.
        if start < max(request.num_prompt_tokens, request.num_tokens - 1):
            for index, manager in enumerate(self._managers):
                column, inside = divmod(start, manager.block_size)
                if inside and num_computed_tokens > (column + 1) * manager.block_size:
                    passed.add((index, column))
        hidden = []
        for index, column in passed:
            table = self._managers[index].req_to_blocks[request_id]
            hidden.append((table, column, table[column]))
            table[column] = self._managers[index]._null_block
        try:
            yield
        finally:
            for table, column, block in hidden:
                table[column] = block
        # vLLM has cached the exported states under their prefixes, and must not do so again.
        for manager in self._managers:
            if manager.has_prefill_checkpoint_blocks and request_id in manager._checkpoints:
                _, column = manager._checkpoints[request_id]
                cached = manager.num_cached_block.get(request_id, 0)
                manager.num_cached_block[request_id] = max(cached, column + 1)


class StepWrites:
    """Tracks the attention blocks that the current step writes, and the first token of each write.

    vLLM enters a block into the hash map when its tokens are scheduled, so another request may hit
    it in the same step. A whole block is read after it is written. But if a hit ends inside the
    block, the block is copied before the step, when the new tokens are not yet in it. vLLM
    postpones such a request only if the same step computes the state that it hits. If the state is
    older, vLLM schedules the request, although the step may recompute evicted attention blocks.

    A decoding request writes its last block in every step. The tokens that it wrote there in
    earlier steps can be copied at any time.
    """

    def __init__(self, managers: Sequence[SingleTypeKVCacheManager]) -> None:
        """Select the attention groups whose blocks can be hit in part."""
        self._managers = {
            group: manager
            for group, manager in enumerate(managers)
            if manager.supports_fine_grained_hash_lookup and not isinstance(manager, MambaManager)
        }
        self.first_written: dict[int, int] = {}
        """By block id, the first token that the current step writes. Cleared at each step."""

    def add(self, request: Request, num_computed_tokens: int) -> None:
        """Track the blocks that a step writes. `num_computed_tokens` includes the step."""
        for manager in self._managers.values():
            table = manager.req_to_blocks[request.request_id]
            first = request.num_computed_tokens // manager.block_size
            last = -(-num_computed_tokens // manager.block_size)
            for block in table[first:last]:
                self.first_written[block.block_id] = request.num_computed_tokens

    def overlap(self, hits: tuple[Sequence[KVCacheBlock], ...], tokens: int) -> bool:
        """Whether a hit ends inside a block and includes tokens that the step writes there."""
        return any(
            hits[group]
            and tokens % manager.block_size
            and self.first_written.get(hits[group][-1].block_id, tokens) < tokens
            for group, manager in self._managers.items()
        )


def views_to_copy(kv_caches: Iterable[torch.Tensor], num_blocks: int) -> list[list[torch.Tensor]]:
    """Choose the views of the KV cache that vLLM must copy, so that it copies whole blocks.

    Layers of different KV groups share memory: a block holds pages of attention or a state. vLLM's
    `copy_kv_cache_blocks_inplace` treats views that start at one address as equal and copies only
    the first. If the first view is that of a state, which may be shorter than a page, the rest of
    an attention block is not copied.

    Args:
        kv_caches: The views of all layers, each [num_blocks x kernel blocks per block, ...].
        num_blocks: Blocks of the pool.

    Returns:
        The views for each call of vLLM's function, with at most one view per address. Equal views
        occur once. If a view covers all of its memory, later views of that memory are omitted.
    """
    rounds: list[list[torch.Tensor]] = []
    seen: dict[tuple[torch.device, int], list[tuple[Any, ...]]] = {}
    whole: set[tuple[torch.device, int]] = set()
    for cache in kv_caches:
        views = seen.setdefault((cache.device, cache.data_ptr()), [])
        view = (cache.shape, cache.stride(), cache.dtype)
        storage = cache.untyped_storage()
        memory = (cache.device, storage.data_ptr())
        if view in views or memory in whole:
            continue
        if len(views) == len(rounds):
            rounds.append([])
        rounds[len(views)].append(cache)
        views.append(view)
        per_block = cache.shape[0] // num_blocks * cache.stride(0) * cache.element_size()
        if storage.nbytes() == num_blocks * per_block:
            whole.add(memory)
    return rounds


def copy_whole_blocks(
    original: Callable[..., None],
    kv_caches: Iterable[torch.Tensor],
    num_blocks: int,
    kv_cache_block_copies: Sequence[Any],
) -> None:
    """Copy whole blocks with `original`, vLLM's `copy_kv_cache_blocks_inplace`."""
    if kv_cache_block_copies:
        for views in views_to_copy(kv_caches, num_blocks):
            original(views, num_blocks, kv_cache_block_copies)


ALLOWED_BY = "allow_unsafe_drafts"
"""The setting that lets an engine start even if drafts can corrupt its cached states."""

TEXT_METHODS = ("ngram", "suffix")
"""Speculative methods that copy drafts from earlier text. vLLM schedules them synchronously."""

EXPORTING_LAYER = "MambaMixer2"
"""vLLM's Mamba 2 layer, whose kernel exports the state at a prompt's end within the last chunk."""


def check_drafts(vllm_config: VllmConfig) -> None:
    """Reject an engine whose draft tokens can corrupt the states in its prefix cache.

    Drafts of a model (MTP, EAGLE and others) can corrupt any cached state: see the open issues
    vllm-project/vllm#47194 and #53912. One known cause in vLLM 0.32 and 0.33: with asynchronous
    scheduling, model runner V1 may use another request's count of accepted drafts (#53919).
    Drafts copied from the text corrupt states only if the kernel exports states, as Mamba 2's does:
    the worker then writes the exported state into a block that the scheduler has moved.

    Raises:
        HybridKVSettingsError: The engine has such drafts and caches states.
    """
    speculative, cache = vllm_config.speculative_config, vllm_config.cache_config
    model = vllm_config.model_config
    if (
        speculative is None
        or not vllm_config.num_speculative_tokens
        or not cache.enable_prefix_caching
        or cache.mamba_cache_mode != "align"
        or not (model.is_hybrid or model.has_inner_state)
    ):
        return
    if speculative.method in TEXT_METHODS and not _exports_states(model):
        return
    raise HybridKVSettingsError(
        f"{model.model} ({model.architecture}) caches states, and speculative decoding "
        f"({speculative.method!r}, {vllm_config.num_speculative_tokens} tokens) can corrupt them. "
        "Later requests that share the prefix then get wrong answers without an error: "
        "vllm-project/vllm#43559 measured about 20 % lower accuracy, and #47194 and #53912 are "
        "open. Pass --no-enable-prefix-caching, or drop --speculative-config, or accept the risk "
        f"with {ALLOWED_BY}=true in --additional-config 'hybrid_kv'"
    )


def _exports_states(model: ModelConfig) -> bool:
    """Return whether a model's source file mentions `EXPORTING_LAYER`. It is not imported."""
    from vllm.model_executor.models.registry import ModelRegistry

    for architecture in model.architectures:
        module = getattr(ModelRegistry.models.get(architecture), "module_name", None)
        # If another plugin registered the model class, its module is unknown: assume the worst.
        spec = importlib.util.find_spec(module) if module else None
        if (
            spec is None
            or spec.origin is None
            or EXPORTING_LAYER in Path(spec.origin).read_text(encoding="utf-8")
        ):
            return True
    return False
