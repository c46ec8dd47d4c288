# SPDX-License-Identifier: Apache-2.0
"""Keeps requests from copying what a step only writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.request import Request


class StepWrites:
    """The attention blocks that the step being scheduled writes to, and from which token on.

    A block is entered in the hash map when its tokens are scheduled, and another request may hit it
    in the same step, for it reads what was written before it in that step. Not so where the hit
    ends inside the block: that is copied before the step, when what the step writes is not in it
    yet. vLLM has such requests wait for the next step if it is a state that they hit, which a hit
    of the same prefix mostly does; but the state may be an older one of a prefix whose attention
    has been given up and computed again.

    A request that decodes writes to its last block at every step, for as long as it runs. What it
    wrote there before, the prefix that others share with it among it, can be copied at any time.
    """

    def __init__(self, managers: dict[int, SingleTypeKVCacheManager]) -> None:
        """Begin a step.

        Args:
            managers: Those of the groups whose blocks can be hit in part, but for states.
        """
        self._managers = managers
        # The first token that the step writes, by block.
        self._written: dict[int, int] = {}

    def clear(self) -> None:
        """Begin a step."""
        self._written.clear()

    def add(self, request: Request, num_computed_tokens: int) -> None:
        """Note the blocks of a request that a step writes.

        Args:
            request: As it is before the step.
            num_computed_tokens: Its tokens that are computed when the step is.
        """
        for manager in self._managers.values():
            table = manager.req_to_blocks[request.request_id]
            first = request.num_computed_tokens // manager.block_size
            last = -(-num_computed_tokens // manager.block_size)
            for block in table[first:last]:
                self._written[block.block_id] = request.num_computed_tokens

    def meet(self, hits: tuple[Sequence[KVCacheBlock], ...], tokens: int) -> bool:
        """Whether a part of a block that is hit is only being written.

        Args:
            hits: The blocks by group.
            tokens: The length of the hit.
        """
        for group, manager in self._managers.items():
            hit = hits[group]
            if not hit or tokens % manager.block_size == 0:
                continue
            written = self._written.get(hit[-1].block_id)
            if written is not None and written < tokens:
                return True
        return False
