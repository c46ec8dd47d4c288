# SPDX-License-Identifier: Apache-2.0
"""Test which bytes the host tier on CPUs copies, and that it checks its memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
)
from vllm.v1.kv_offload.cpu import gpu_worker
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from vllm_hybrid_kv.transfer.cpu_offloading import MemcpyWorker

BLOCKS, CHUNKS, MARGIN = 14, 12, 5
"""Blocks of the KV cache, chunks of the tier, and bytes next to each row that no copy may touch."""


@dataclass
class Tier:
    """A KV cache and a tier of random bytes, and a worker that copies between them.

    Attributes:
        rows: For each tensor, the cache as uint8 [BLOCKS, page + MARGIN] and the tier as uint8
            [CHUNKS, blocks_per_chunk x page + MARGIN]. They share memory with the worker's tensors.
        pages: For each tensor, the bytes of a page.
        groups: For each KV cache group, the tensor and the used bytes of each of its layers.
        per_chunk: Blocks in a chunk.
    """

    rows: list[tuple[np.ndarray, np.ndarray]]
    pages: list[int]
    groups: list[list[tuple[int, int]]]
    per_chunk: int
    worker: MemcpyWorker

    def tensors(self) -> list[np.ndarray]:
        return [array for pair in self.rows for array in pair]


def make_tier(pages: list[int], groups: list[list[tuple[int, int]]], per_chunk: int) -> Tier:
    random = np.random.default_rng(0)
    rows, caches, chunks = [], [], []
    for page in pages:
        cache = random.integers(0, 256, (BLOCKS, page + MARGIN), dtype=np.uint8)
        tier = random.integers(0, 256, (CHUNKS, per_chunk * page + MARGIN), dtype=np.uint8)
        rows.append((cache, tier))
        tensor = torch.from_numpy(cache.view(np.int8))[:, :page]
        caches.append(CanonicalKVCacheTensor(tensor, page))
        chunks.append(torch.from_numpy(tier.view(np.int8))[:, : per_chunk * page])
    refs = [[CanonicalKVCacheRef(*layer) for layer in group] for group in groups]
    worker = MemcpyWorker(CanonicalKVCaches(caches, refs), per_chunk, chunks)
    return Tier(rows, pages, groups, per_chunk, worker)


@dataclass(frozen=True)
class Transfer:
    """Blocks of some groups and the chunks that hold them.

    Attributes:
        blocks: For each group, the ids of consecutive blocks of a request.
        first: For each group, the index of its first block in the request.
        chunks: The ids of the chunks, group after group.
    """

    blocks: list[list[int]]
    first: list[int]
    chunks: list[int]

    def pages(self) -> GPULoadStoreSpec:
        return GPULoadStoreSpec(
            [block for group in self.blocks for block in group],
            group_sizes=[len(group) for group in self.blocks],
            block_indices=self.first,
        )


def number_of_chunks(first: int, count: int, per_chunk: int) -> int:
    """Count the chunks that hold at least one of the blocks."""
    return len({index // per_chunk for index in range(first, first + count)})


@st.composite
def tiers_and_transfers(draw: st.DrawFn) -> tuple[Tier, Transfer]:
    # A page of a group may use a part of the tensor's page, and groups may share tensors.
    pages = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    layer = st.integers(0, len(pages) - 1).flatmap(
        lambda tensor: st.tuples(st.just(tensor), st.integers(1, pages[tensor]))
    )
    layers = st.lists(layer, min_size=1, max_size=3, unique_by=lambda layer: layer[0])
    groups = draw(st.lists(layers, min_size=1, max_size=3))
    per_chunk = draw(st.integers(1, 3))
    counts = [draw(st.integers(0, 4)) for _ in groups]
    first = [draw(st.integers(0, 7)) for _ in groups]
    needed = [
        number_of_chunks(start, count, per_chunk)
        for start, count in zip(first, counts, strict=True)
    ]
    blocks = iter(draw(st.permutations(range(BLOCKS))))
    # No chunk is in two groups.
    used = draw(st.permutations(range(CHUNKS)))[: sum(needed)]
    transfer = Transfer([[next(blocks) for _ in range(n)] for n in counts], first, used)
    return make_tier(pages, groups, per_chunk), transfer


def copies(tier: Tier, transfer: Transfer) -> list[tuple[int, int, int, int, int]]:
    """List tensor, block, chunk, first byte in the chunk and bytes, of each copy.

    This model numbers the parts of a request's chunks, and looks each block up by its number.
    """
    found, chunks = [], list(transfer.chunks)
    for blocks, first, layers in zip(transfer.blocks, transfer.first, tier.groups, strict=True):
        numbers = [first + offset for offset in range(len(blocks))]
        own = {number: chunks.pop(0) for number in sorted({n // tier.per_chunk for n in numbers})}
        for number, block in zip(numbers, blocks, strict=True):
            for tensor, used in layers:
                start = number % tier.per_chunk * tier.pages[tensor]
                found.append((tensor, block, own[number // tier.per_chunk], start, used))
    return found


class VllmHandler(gpu_worker.SingleDirectionOffloadingHandler):
    """The code with which vLLM copies blocks on GPUs, with memmove instead of CUDA's copies."""

    def __init__(self, tier: Tier, store: bool) -> None:
        caches, chunks, _ = zip(*tier.worker._tensors, strict=True)
        self.gpu_to_cpu = store
        self.layer_refs_per_group = tier.worker._groups
        self.src_tensors, self.dst_tensors = (caches, chunks) if store else (chunks, caches)
        self.src_blocks_per_chunk = 1 if store else tier.per_chunk
        self.dst_blocks_per_chunk = tier.per_chunk if store else 1
        self._canonical_copy_plans = None
        self._fill_group_ops = self._fill_direct_ops
        self._buffer_pool, self._stream_pool, self._transfers = [], [], []
        self._event_pool = [mock.Mock(), mock.Mock()]
        self._transfer_events: dict[int, Any] = {}

    def _swap_blocks_batch(self, sources, targets, sizes, **_: Any) -> None:
        for source, target, size in zip(
            sources.tolist(), targets.tolist(), sizes.tolist(), strict=True
        ):
            ctypes.memmove(target, source, size)


def submit(worker: MemcpyWorker, transfer: Transfer, store: bool) -> None:
    chunks = CPULoadStoreSpec(transfer.chunks)
    if store:
        assert worker.submit_store(7, transfer.pages(), chunks)
    else:
        assert worker.submit_load(7, chunks, transfer.pages())


@pytest.mark.parametrize("store", [True, False])
@settings(max_examples=100, deadline=None)
@given(case=tiers_and_transfers())
def test_a_transfer_copies_the_used_bytes_of_its_pages_and_no_others(
    store: bool, case: tuple[Tier, Transfer]
) -> None:
    tier, transfer = case
    expected = [array.copy() for array in tier.tensors()]
    size = 0
    for tensor, block, chunk, start, used in copies(tier, transfer):
        cache, chunks = expected[2 * tensor], expected[2 * tensor + 1]
        if store:
            chunks[chunk, start : start + used] = cache[block, :used]
        else:
            cache[block, :used] = chunks[chunk, start : start + used]
        size += used
    submit(tier.worker, transfer, store)
    for array, wanted in zip(tier.tensors(), expected, strict=True):
        np.testing.assert_array_equal(array, wanted)
    (result,) = tier.worker.get_finished()
    assert (result.job_id, result.success, result.transfer_size) == (7, True, size)
    assert result.transfer_time > 0
    assert tier.worker.get_finished() == []


@pytest.mark.parametrize("store", [True, False])
@settings(max_examples=50, deadline=None)
@given(case=tiers_and_transfers())
def test_a_transfer_copies_what_vllm_copies_on_gpus(
    store: bool, case: tuple[Tier, Transfer]
) -> None:
    tier, transfer = case
    twin = make_tier(tier.pages, tier.groups, tier.per_chunk)
    submit(tier.worker, transfer, store)
    pages, chunks = transfer.pages(), CPULoadStoreSpec(transfer.chunks)
    with mock.patch.object(gpu_worker, "current_platform", mock.MagicMock()):
        VllmHandler(twin, store).transfer_async(7, *((pages, chunks) if store else (chunks, pages)))
    for array, wanted in zip(tier.tensors(), twin.tensors(), strict=True):
        np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize(
    ("blocks", "first", "chunks"),
    [
        ([[0, 1], [2]], [0, 0], [0]),
        ([[0, 1], [2]], [0, 0], [0, 1, 2]),
        ([[0, 1], [2]], [1, 0], [0, 1]),
        ([[0, 1]], [0], [0]),
    ],
    ids=["too few", "too many", "across two chunks", "a group is missing"],
)
def test_chunks_that_do_not_fit_the_blocks_raise_before_any_byte_is_copied(
    store: bool, blocks: list[list[int]], first: list[int], chunks: list[int]
) -> None:
    tier = make_tier([8], [[(0, 8)], [(0, 5)]], per_chunk=2)
    before = [array.copy() for array in tier.tensors()]
    with pytest.raises(ValueError, match=rf"do not fit {len(chunks)} chunks of 2 blocks"):
        submit(tier.worker, Transfer(blocks, first, chunks), store)
    for array, wanted in zip(tier.tensors(), before, strict=True):
        np.testing.assert_array_equal(array, wanted)
    assert tier.worker.get_finished() == []
