# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's `OffloadingConnector` run on CPUs, where its KV cache is in host memory already.

The connector keeps cached blocks in a second pool of host memory. On a GPU, vLLM copies blocks with
CUDA streams. On a CPU, the workers below copy them with memcpy. The scheduler's side of the
connector (lookups, evictions, events, metrics) is vLLM's.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from vllm.utils.cpu_resource_utils import get_cgroup_memory_limit
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from vllm_hybrid_kv.errors import HybridKVError

GIB = 1 << 30


class MemcpyWorker(OffloadingWorker):
    """Copies blocks between the KV cache and the host tier, in the process that runs the model.

    A copy is complete when `submit_store` or `submit_load` returns. vLLM submits copies between two
    forward passes of this process, so no copy reads a page while a kernel writes it, and no kernel
    reads a page while a copy writes it. This also holds with asynchronous scheduling.
    """

    def __init__(
        self,
        kv_caches: CanonicalKVCaches,
        blocks_per_chunk: int,
        chunks: Sequence[torch.Tensor],
        region: SharedOffloadRegion | None = None,
    ) -> None:
        """Prepare copies between `kv_caches` and `chunks`.

        Args:
            kv_caches: The KV cache, as tensors of int8 [blocks, bytes per page].
            blocks_per_chunk: Blocks in a chunk of the tier.
            chunks: The tier: for each tensor of `kv_caches`, int8 [chunks, blocks_per_chunk x bytes
                per page].
            region: The shared memory that holds `chunks`, to be released on shutdown; None if
                `chunks` own their memory.
        """
        self._tensors = [
            (tensor.tensor, chunk, tensor.page_size_bytes)
            for tensor, chunk in zip(kv_caches.tensors, chunks, strict=True)
        ]
        self._groups = kv_caches.group_data_refs
        self._blocks_per_chunk = blocks_per_chunk
        self._region = region
        self._finished: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: BlockIDsLoadStoreSpec
    ) -> bool:
        self._copy(job_id, src_spec, dst_spec, store=True)
        return True

    def submit_load(
        self,
        job_id: int,
        src_spec: BlockIDsLoadStoreSpec,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,
    ) -> bool:
        self._copy(job_id, dst_spec, src_spec, store=False)
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Return at once, because a submitted copy is complete."""

    def shutdown(self) -> None:
        self._tensors.clear()
        if self._region is not None:
            # The scheduler may have removed the file's name, which vLLM would warn about.
            self._region._creator &= Path(self._region.mmap_path).exists()
            self._region.cleanup()
            self._region = None

    def _copy(
        self, job_id: int, pages: GPULoadStoreSpec, chunks: BlockIDsLoadStoreSpec, *, store: bool
    ) -> None:
        started, size = time.perf_counter(), 0
        for group, block, chunk, part in self._pairs(pages, chunks):
            for ref in self._groups[group]:
                cache, tier, page_bytes = self._tensors[ref.tensor_idx]
                start, used = part * page_bytes, ref.page_size_bytes
                page, copy = cache[block, :used], tier[chunk, start : start + used]
                (copy if store else page).copy_(page if store else copy)
                size += used
        self._finished.append(
            TransferResult(job_id, True, size, max(time.perf_counter() - started, 1e-9))
        )

    def _pairs(
        self, pages: GPULoadStoreSpec, chunks: BlockIDsLoadStoreSpec
    ) -> list[tuple[int, int, int, int]]:
        """Return group, block id, chunk id, and the block's index in the chunk, for each block.

        The blocks of a group are consecutive blocks of a request. `pages.block_indices` tells
        where the first one is, so it also tells where it is in its chunk.
        """
        size = self._blocks_per_chunk
        skipped = [first % size for first in pages.block_indices]
        counts = [
            cdiv(skip + count, size) if count else 0
            for skip, count in zip(skipped, pages.group_sizes, strict=True)
        ]
        blocks, ids = iter(pages.block_ids.tolist()), chunks.block_ids.tolist()
        if len(counts) != len(self._groups) or sum(counts) != len(ids):
            raise ValueError(
                f"{len(pages.group_sizes)} groups of {pages.group_sizes} blocks, the first ones "
                f"{pages.block_indices}, do not fit {len(ids)} chunks of {size} blocks"
            )
        pairs, start = [], 0
        for group, count in enumerate(pages.group_sizes):
            for part in range(skipped[group], skipped[group] + count):
                pairs.append((group, next(blocks), ids[start + part // size], part % size))
            start += counts[group]
        return pairs


class MemcpySpec(CPUOffloadingSpec):
    """vLLM's `CPUOffloadingSpec` for engines on CPUs, with private memory in each worker."""

    _worker: OffloadingWorker | None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            # The kernel provides zeroed pages when they are first written.
            chunks = [
                torch.empty(
                    (self.num_chunks, tensor.page_size_bytes * self.blocks_per_chunk),
                    dtype=torch.int8,
                )
                for tensor in kv_caches.tensors
            ]
            self._worker = MemcpyWorker(kv_caches, self.blocks_per_chunk, chunks)
        return self._worker


class TieredMemcpySpec(TieringOffloadingSpec):
    """vLLM's `TieringOffloadingSpec` for engines on CPUs.

    All processes share the memory, because the scheduler's process writes chunks to further tiers.
    """

    _worker: OffloadingWorker | None

    def get_manager(self) -> OffloadingManager:
        manager = super().get_manager()
        region = self._scheduler_mmap
        # Workers map the region before the scheduler does. With its name removed, the kernel frees
        # the memory when the last process ends, however it ends.
        if region is not None and not region._creator:
            Path(region.mmap_path).unlink(missing_ok=True)
        return manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self.config.canonical_layout:
            raise HybridKVError(
                "the OffloadingConnector has no canonical layout on CPUs. Remove canonical_layout "
                "from kv_connector_extra_config"
            )
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                # Copies of the same pages, such as those of MLA, are stored once.
                rank=0 if self.replicated_layout else self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            chunks = [
                region.create_next_worker_view(tensor.page_size_bytes * self.blocks_per_chunk)
                for tensor in kv_caches.tensors
            ]
            self._worker = MemcpyWorker(kv_caches, self.blocks_per_chunk, chunks, region)
        return self._worker


SPECS: dict[type[OffloadingSpec], type[OffloadingSpec]] = {
    CPUOffloadingSpec: MemcpySpec,
    TieringOffloadingSpec: TieredMemcpySpec,
}
"""For each of vLLM's specs, the one that engines on CPUs use instead."""


def check_memory(options: Mapping[str, Any]) -> None:
    """Check that the host tier of a connector with these options fits into memory.

    Raises:
        HybridKVError: The tier is larger than the memory of the machine or the cgroup, or, if
            processes share it, than what is left of /dev/shm.
    """
    needed = int(options.get("cpu_bytes_to_use") or 0)
    memory = min(psutil.virtual_memory().total, get_cgroup_memory_limit() or sys.maxsize)
    rooms = {"the memory of this machine or cgroup": memory}
    if options.get("spec_name") == TieringOffloadingSpec.__name__:
        rooms["/dev/shm, which docker run --shm-size enlarges,"] = shutil.disk_usage(
            "/dev/shm"
        ).free
    for place, room in rooms.items():
        if needed > room:
            raise HybridKVError(
                f"the host tier of the OffloadingConnector has {needed / GIB:.2f} GiB, but {place} "
                f"has {room / GIB:.2f} GiB. Pass a smaller --kv-offloading-size, or a smaller "
                "cpu_bytes_to_use in --kv-transfer-config"
            )
