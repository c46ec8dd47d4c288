# SPDX-License-Identifier: Apache-2.0
"""The worker's part of vLLM's OffloadingConnector, with copies that only take virtual time.

The scheduler decides what is copied between the KV cache and host memory. vLLM's own worker code
orders the copies. Here, no bytes move: a copy ends when its time has passed on a virtual clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_offload.base import (
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.outputs import KVConnectorOutput

from vllm_hybrid_kv.tools.plan.engine import Engine

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.replay.scheduler import Tally


@dataclass
class Clock:
    """Virtual time, in seconds since the start of the replay."""

    now: float = 0.0

    def advance_to(self, time: float) -> None:
        self.now = max(self.now, time)


@dataclass
class Link:
    """One direction between device and host, which makes one copy after the other.

    Attributes:
        free_at: When the last submitted copy ends.
        blocks: Blocks of all submitted copies.
        seconds: Time of all submitted copies.
    """

    free_at: float = 0.0
    blocks: int = 0
    seconds: float = 0.0

    def submit(self, now: float, blocks: int, seconds: float) -> float:
        """Submit a copy, and return when it ends."""
        self.free_at = max(now, self.free_at) + seconds
        self.blocks += blocks
        self.seconds += seconds
        return self.free_at


class VirtualWorker(OffloadingWorker):
    """Copies nothing, and reports each copy when its time has passed.

    Loads and stores run at the same time, as PCIe transfers in both directions do.
    """

    def __init__(self, clock: Clock, bandwidth: float, block_bytes: int) -> None:
        """Take the bandwidth of each direction, in bytes per second."""
        self._clock = clock
        self._block_seconds = block_bytes / bandwidth
        self.loads, self.stores = Link(), Link()
        self.wait_seconds = 0.0
        self._ends: dict[int, float] = {}

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        return self._submit(self.stores, job_id, len(src_spec.block_ids))

    # vLLM 0.33 adds `expedited`.
    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, **_: Any
    ) -> bool:
        return self._submit(self.loads, job_id, len(dst_spec.block_ids))

    def _submit(self, link: Link, job_id: int, blocks: int) -> bool:
        seconds = blocks * self._block_seconds
        self._ends[job_id] = link.submit(self._clock.now, blocks, seconds)
        return True

    @property
    def next_end(self) -> float | None:
        """When the next copy in flight ends, or None if there is none."""
        return min(self._ends.values(), default=None)

    def get_finished(self) -> list[TransferResult]:
        done = [job_id for job_id, end in self._ends.items() if end <= self._clock.now]
        for job_id in done:
            del self._ends[job_id]
        return [TransferResult(job_id, success=True) for job_id in done]

    def wait(self, job_ids: set[int]) -> None:
        """Let the step wait for copies, because it will overwrite their blocks."""
        before = self._clock.now
        for job_id in job_ids & self._ends.keys():
            self._clock.advance_to(self._ends[job_id])
        self.wait_seconds += self._clock.now - before


class HostMemory:
    """The worker side of an engine's OffloadingConnector.

    Args:
        engine: An engine whose configuration has the OffloadingConnector.
        bandwidth: Of each direction, in bytes per second.
        prefill_rate: Tokens that a step computes per second.
    """

    def __init__(self, engine: Engine, bandwidth: float, prefill_rate: float) -> None:
        config = engine.vllm_config
        self._connector: Any = KVConnectorFactory.create_connector(
            config, KVConnectorRole.WORKER, engine.worker_kv_cache_config
        )
        self._prefill_rate = prefill_rate
        self._clock = Clock()
        plan = engine.worker_kv_cache_config
        self._block_bytes = plan.kv_cache_tensors[0].size // plan.num_blocks
        self._worker = VirtualWorker(self._clock, bandwidth, self._block_bytes)
        # vLLM's connector makes its worker when it gets the tensors of the KV cache.
        self._connector.connector_worker.worker = self._worker

    def step(self, output: SchedulerOutput) -> KVConnectorOutput:
        """Start the copies of a step, let its time pass, and report the copies that have ended.

        The order of the calls is that of vLLM's model runner. A step that computes nothing lasts
        until the next copy ends.
        """
        connector, clock = self._connector, self._clock
        connector.handle_preemptions(output.kv_connector_metadata)
        connector.bind_connector_metadata(output.kv_connector_metadata)
        connector.start_load_kv(None)
        connector.wait_for_save()
        clock.now += output.total_num_scheduled_tokens / self._prefill_rate
        if not output.total_num_scheduled_tokens and self._worker.next_end is not None:
            clock.advance_to(self._worker.next_end)
        sent, received = connector.get_finished(output.finished_req_ids)
        report = KVConnectorOutput(
            finished_sending=sent or None,
            finished_recving=received or None,
            kv_connector_worker_meta=connector.build_connector_worker_meta(),
        )
        connector.clear_connector_metadata()
        return report

    def record(self, tally: Tally) -> None:
        """Write the bytes and the times of all copies into the counters of a replay."""
        worker = self._worker
        tally.loaded_bytes = worker.loads.blocks * self._block_bytes
        tally.stored_bytes = worker.stores.blocks * self._block_bytes
        tally.load_seconds = worker.loads.seconds
        tally.wait_seconds = worker.wait_seconds
