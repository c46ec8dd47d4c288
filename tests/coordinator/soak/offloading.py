# SPDX-License-Identifier: Apache-2.0
"""Copies the contents of the simulated worker's blocks to host memory and back."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.outputs import KVConnectorOutput

from tests.coordinator.soak.worker import Worker


class Copies(OffloadingWorker):
    """Makes each copy at a random time after it was submitted.

    A store reads its blocks, and a load writes them, when the copy ends. Until then, the blocks of
    a load hold nothing.
    """

    def __init__(self, worker: Worker, draw: random.Random, tally: Counter[str]) -> None:
        self._worker, self._draw, self._tally = worker, draw, tally
        self._host: dict[int, tuple[int, list[int | None]]] = {}
        self._waiting: dict[int, tuple[bool, list[int], list[int]]] = {}
        self._done: list[int] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self._waiting[job_id] = (True, list(src_spec.block_ids), list(dst_spec.block_ids))
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, **_: Any) -> bool:
        self._waiting[job_id] = (False, list(dst_spec.block_ids), list(src_spec.block_ids))
        for block in dst_spec.block_ids:
            self._worker.blocks[block] = (-1, [])
        return True

    def get_finished(self) -> list[TransferResult]:
        self._copy([job_id for job_id in self._waiting if self._draw.random() < 0.4])
        done, self._done = self._done, []
        return [TransferResult(job_id, success=True) for job_id in done]

    def wait(self, job_ids: set[int]) -> None:
        waiting = job_ids & self._waiting.keys()
        self._tally["copies that a step waited for"] += len(waiting)
        self._copy(waiting)

    def _copy(self, job_ids: Iterable[int]) -> None:
        for job_id in job_ids:
            is_store, blocks, chunks = self._waiting.pop(job_id)
            self._tally["stores" if is_store else "loads"] += 1
            for block, chunk in zip(blocks, chunks, strict=True):
                if is_store:
                    owner, slots = self._worker.blocks[block]
                    self._host[chunk] = (owner, list(slots))
                else:
                    owner, slots = self._host[chunk]
                    self._worker.blocks[block] = (owner, list(slots))
                    self._worker.versions[block] += 1
            self._done.append(job_id)


class OffloadingWorkerSide:
    """vLLM's worker side of OffloadingConnector, called as vLLM's model runner calls it."""

    def __init__(self, config: VllmConfig, kv_cache_config: KVCacheConfig, copies: Copies) -> None:
        self._connector: Any = KVConnectorFactory.create_connector(
            config, KVConnectorRole.WORKER, kv_cache_config
        )
        self._connector.connector_worker.worker = copies

    def before(self, output: SchedulerOutput) -> None:
        """Make the copies that the step must not overtake."""
        self._connector.handle_preemptions(output.kv_connector_metadata)
        self._connector.bind_connector_metadata(output.kv_connector_metadata)

    def after(self, output: SchedulerOutput) -> KVConnectorOutput:
        """Start the step's copies, and report those that have ended."""
        self._connector.start_load_kv(None)
        self._connector.wait_for_save()
        sent, received = self._connector.get_finished(output.finished_req_ids)
        report = KVConnectorOutput(
            finished_sending=sent or None,
            finished_recving=received or None,
            kv_connector_worker_meta=self._connector.build_connector_worker_meta(),
        )
        self._connector.clear_connector_metadata()
        return report
