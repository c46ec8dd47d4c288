# SPDX-License-Identifier: Apache-2.0
"""A KV connector that tells the scheduler what it could load. `World` performs the loads."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass
class Load:
    """A load of the tokens from `start` to `end` into a request's blocks (`tables`, by group).

    States are loaded as they are after `end` tokens. If `is_async`, other requests do not wait.
    """

    request: Request
    tables: tuple[list[int], ...]
    start: int
    end: int
    is_async: bool


@dataclass
class Transfer:
    """An asynchronous load or, if `load` is None, a store that reads an ended request's blocks.

    The connector reports the end of the transfer after `steps` more steps.
    """

    request: Request
    steps: int
    load: Load | None = None
    fails: bool = False


class SoakConnector(KVConnectorBase_V1, SupportsHMA):
    """Offers tokens of some requests, and holds the blocks of some ended requests for a while.

    With several KV groups, vLLM requires that a store offers whole blocks. The last token of a
    prompt is not offered: vLLM must compute it, and cannot revert a state by one token.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.offers: dict[str, tuple[int, bool]] = {}
        self.started: list[Load] = []
        self.loading: set[str] = set()
        self.kept_after_end: list[str] = []
        self.alignment = 1
        self.draw = random.Random(0)
        self.diverges = False
        self._asked: dict[str, int] = {}

    @property
    def supports_divergent_local_hybrid_hits(self) -> bool:
        return self.diverges

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if request.request_id not in self.offers:
            return 0, False
        if self.draw.random() < 0.1:
            # Pretend that the store needs more time to answer.
            return None, False
        tokens, is_async = self.offers[request.request_id]
        tokens = min(tokens, request.num_tokens - 1) // self.alignment * self.alignment
        if tokens <= num_computed_tokens:
            return 0, False
        self._asked[request.request_id] = num_computed_tokens
        return tokens - num_computed_tokens, is_async

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        if num_external_tokens == 0:
            return
        start = self._asked.pop(request.request_id)
        _, is_async = self.offers[request.request_id]
        if is_async:
            self.loading.add(request.request_id)
        self.started.append(
            Load(request, blocks.get_block_ids(), start, start + num_external_tokens, is_async)
        )

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        # While a request loads, vLLM itself holds the request's blocks until the load ends.
        loading = request.request_id in self.loading
        if loading or not any(map(any, block_ids)) or self.draw.random() < 0.8:
            return False, None
        self.kept_after_end.append(request.request_id)
        return True, None

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        # The metadata stays empty, because the world calls the connector directly.
        return KVConnectorMetadata()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        raise NotImplementedError("there is no worker")

    wait_for_layer_load = save_kv_layer = wait_for_save = start_load_kv
