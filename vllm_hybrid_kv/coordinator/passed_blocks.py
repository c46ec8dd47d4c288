# SPDX-License-Identifier: Apache-2.0
"""Prevents the caching of blocks as states that were never written into them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.v1.core.single_type_kv_cache_manager import MambaManager

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.request import Request


class PassedBlocks:
    """Tracks state blocks that a prompt's chunk starts inside and runs past.

    A state is written where a chunk ends. If a chunk starts inside a state block and ends beyond
    it, the block keeps the state that the chunk started with. vLLM 0.32 and 0.33 cache it as the
    state at the block's end, and every request that shares the tokens up to there resumes from a
    wrong state. There are two ways to such a chunk:

    - The scheduler aligns chunks to `cache_config.block_size`, which is the smallest block of all
      groups. A state block that is longer is passed by any chunk that starts inside it
      (vllm-project/vllm#54076).
    - A kernel exports the state at a prompt's end from within the last chunk, as Mamba 2's does.
      vLLM lets that chunk start inside a block, where a hit ended, and run to the prompt's end.

    The exported state goes into the last block but one. If hits end at multiples of more than a
    block, it may be an earlier state than the one at that block's end. vLLM then caches it as the
    later one, too, at the next multiple.
    """

    def __init__(self, managers: Iterable[SingleTypeKVCacheManager]) -> None:
        """Select the managers of cached states.

        Args:
            managers: The managers of all groups.
        """
        self._managers = [
            manager
            for manager in managers
            if isinstance(manager, MambaManager) and manager.mamba_cache_mode == "align"
        ]
        self._exporting = [
            manager for manager in self._managers if manager.has_prefill_checkpoint_blocks
        ]
        # Tokens that requests resumed after. vLLM updates the request itself after its first step.
        self._resumed: dict[str, int] = {}
        # Managers and columns of the blocks that requests have passed and still hold.
        self._passed: dict[str, list[tuple[MambaManager, int]]] = {}
        self._hidden: list[tuple[list[KVCacheBlock], int, KVCacheBlock]] = []

    def resume(self, request_id: str, num_computed_tokens: int) -> None:
        """Record where a request resumes.

        Args:
            request_id: Its id.
            num_computed_tokens: Its tokens that were cache hits or are loaded.
        """
        if self._managers:
            self._resumed[request_id] = num_computed_tokens

    def forget(self, request_id: str) -> None:
        """Forget a request."""
        self._resumed.pop(request_id, None)
        self._passed.pop(request_id, None)

    def hide(self, request: Request, num_computed_tokens: int) -> None:
        """Show null blocks to vLLM in place of the blocks that the request's chunks have passed.

        vLLM caches no null block, neither as a whole block nor as the end of a prompt, which it
        may take a block for that was passed steps ago. Call it before blocks are cached.

        Args:
            request: The request before the step.
            num_computed_tokens: Its tokens that are computed after the step.
        """
        if not self._managers:
            return
        request_id = request.request_id
        passed = self._passed.get(request_id, [])
        start = max(request.num_computed_tokens, self._resumed.get(request_id, 0))
        # In decoding, the worker copies the state at a block's end into that block.
        if start < max(request.num_prompt_tokens, request.num_tokens - 1):
            for manager in self._managers:
                column = start // manager.block_size
                end = (column + 1) * manager.block_size
                if start % manager.block_size and num_computed_tokens > end:
                    passed.append((manager, column))
        if not passed:
            return
        self._passed[request_id] = []
        for manager, column in passed:
            table = manager.req_to_blocks[request_id]
            if not table[column].is_null:
                self._passed[request_id].append((manager, column))
                self._hidden.append((table, column, table[column]))
                table[column] = manager._null_block

    def restore(self, request: Request) -> None:
        """Undo `hide`, and mark the block with an exported state as cached.

        Call it after blocks are cached: by then vLLM has cached the exported state under its
        prefix, and has told a KV connector.

        Args:
            request: The request before the step.
        """
        for table, column, block in self._hidden:
            table[column] = block
        self._hidden.clear()
        for manager in self._exporting:
            exported = manager._checkpoints.get(request.request_id)
            if exported is not None:
                cached = manager.num_cached_block.get(request.request_id, 0)
                manager.num_cached_block[request.request_id] = max(cached, exported[1] + 1)
