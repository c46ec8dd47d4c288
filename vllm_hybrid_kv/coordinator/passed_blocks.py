# SPDX-License-Identifier: Apache-2.0
"""Keeps blocks from being cached under prefixes whose states nobody wrote into them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.v1.core.single_type_kv_cache_manager import MambaManager

if TYPE_CHECKING:
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.request import Request


class PassedBlocks:
    """The blocks of states that a chunk of a prompt begins in and goes beyond.

    Chunks end where blocks do, so that a state is written at every block's end. But where a kernel
    exports the state at a prompt's end from within the last chunk, as Mamba 2's does, vLLM lets
    that chunk begin inside a block, where a hit ends, and run to the prompt's end. In that block
    is still the state that the chunk began with. vLLM's own coordinator, in 0.32 and 0.33, caches
    it as the state at the block's end, and whoever shares the tokens up to there gets a wrong one.

    The state that is exported goes into the last block but one. Where hits fall on multiples of
    more than a block, it may be an earlier one than that at the block's end, and vLLM caches it as
    that one too when it comes to the next multiple.
    """

    def __init__(self, managers: Iterable[SingleTypeKVCacheManager]) -> None:
        """Prepare.

        Args:
            managers: Those of all groups.
        """
        self._managers = [
            manager
            for manager in managers
            if isinstance(manager, MambaManager)
            and manager.kv_cache_spec.num_prefill_checkpoint_blocks
        ]
        # Tokens that requests resumed after. vLLM tells the request itself after its first step.
        self._resumed: dict[str, int] = {}

    def resume(self, request_id: str, num_computed_tokens: int) -> None:
        """Note where a request resumes.

        Args:
            request_id: Its id.
            num_computed_tokens: Its tokens that were hit or are loaded.
        """
        if self._managers:
            self._resumed[request_id] = num_computed_tokens

    def forget(self, request_id: str) -> None:
        """Forget a request."""
        self._resumed.pop(request_id, None)

    def keep_out(self, request: Request, num_computed_tokens: int) -> None:
        """Count a block that is passed as cached, so that it will not be. Before blocks are cached.

        Args:
            request: As it is before the step.
            num_computed_tokens: Its tokens that are computed when the step is.
        """
        if not self._managers:
            return
        start = max(request.num_computed_tokens, self._resumed.get(request.request_id, 0))
        if start >= max(request.num_prompt_tokens, request.num_tokens - 1):
            # When draft tokens reach beyond a block's end the state at its end is put there.
            return
        for manager in self._managers:
            column = start // manager.block_size
            end = (column + 1) * manager.block_size
            if start % manager.block_size and num_computed_tokens > end:
                self._count(manager, request, column)

    def settle(self, request: Request) -> None:
        """Count a block with an exported state as cached. After blocks are cached.

        By then it is, under what it holds: vLLM caches it as a whole one first, if it has come to
        its end, and tells a KV connector of what has become of it.

        Args:
            request: As it is before the step.
        """
        for manager in self._managers:
            exported = manager._checkpoints.get(request.request_id)
            if exported is not None:
                self._count(manager, request, exported[1])

    @staticmethod
    def _count(manager: MambaManager, request: Request, column: int) -> None:
        cached = manager.num_cached_block.get(request.request_id, 0)
        manager.num_cached_block[request.request_id] = max(cached, column + 1)
