# SPDX-License-Identifier: Apache-2.0
"""Run a layer with decode context parallelism in two processes that communicate over gloo.

vLLM's own collectives, slot mapping and correction kernels run; Triton interprets the kernels.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

# Import this first, because it prepares the process.
from testing.attention import cuda_graphs  # noqa: F401 - prepares the process

# isort: split
import torch
import vllm.distributed.parallel_state as parallel_state
from vllm.config import DeviceConfig, ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.ops import dcp
from vllm.v1.worker.block_table import BlockTable

from vllm_hybrid_kv.attention.backend import K8V4AttentionImpl, K8V4MetadataBuilder
from vllm_hybrid_kv.kernels import k8v4

# vLLM counts the constants of a compiled kernel. An interpreted one does not list them.
_correction = dcp.CorrectAttnCPOutKernel.kernel
_correction.constexprs = [
    index
    for index, name in enumerate(_correction.arg_names)
    if "constexpr" in str(_correction.fn.__annotations__.get(name))
]

RANKS = 2
HEADS, HEAD_SIZE, PAGE, BLOCKS = 4, 64, 16, 16
"""Query heads of all ranks, which share one KV head."""

TIMEOUT_S = 60.0
"""How long to wait for a rank. A step takes seconds."""

DTYPE = torch.float32
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A step of a layer.

    Attributes:
        lengths: Tokens of each request, including its new ones.
        queries: New tokens of each request.
        interleave: How many tokens in a row a rank stores.
        combine: `ag_rs` or `a2a`, vLLM's way to merge the ranks' results.
        sinks: Whether the heads have sinks.
        nan: A request with a NaN in the value of its last token before the step, if not None.
        padding: Tokens after the last request, as in a captured graph.
    """

    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    interleave: int = 1
    combine: str = "ag_rs"
    sinks: bool = False
    nan: int | None = None
    padding: int = 0


def outputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Run a step on two ranks and on one.

    Returns:
        The output of all heads [tokens, HEADS, HEAD_SIZE] with context parallelism and without
        it, and how many tokens each rank stored.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            arguments = (case, rank, f"file://{folder}/store", theirs)
            processes.append(context.Process(target=_run, args=arguments))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            found = [pipe.recv() for pipe in pipes if pipe.poll(TIMEOUT_S)]
        finally:
            for process in processes:
                process.join(1.0)
                process.kill()
    assert len(found) == RANKS, f"a rank did not answer within {TIMEOUT_S} s"
    shared = torch.cat([torch.from_numpy(out) for out, _, _ in found], dim=1)
    return shared, torch.from_numpy(found[0][1]), [stored for _, _, stored in found]


def _run(case: Case, rank: int, init_method: str, pipe: Connection) -> None:
    os.environ["VLLM_DIST_IDENT"] = init_method.replace("/", "_")
    config = VllmConfig(device_config=DeviceConfig(device="cpu"))
    config.parallel_config = ParallelConfig(
        tensor_parallel_size=RANKS,
        decode_context_parallel_size=RANKS,
        dcp_comm_backend=case.combine,
        cp_kv_cache_interleave_size=case.interleave,
        distributed_executor_backend="mp",
    )
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(RANKS, rank, init_method, rank, "gloo")
        parallel_state.initialize_model_parallel(
            RANKS, decode_context_model_parallel_size=RANKS, backend="gloo"
        )
        shared, alone, stored = _outputs(case, config, rank)
        # Send arrays. Tensors would be sent in shared memory, which this process later deletes.
        pipe.send((shared.numpy(), alone.numpy(), stored))
    pipe.close()
    # Both ranks must have finished before one of them closes its connections.
    torch.distributed.barrier()
    os._exit(0)


def _outputs(case: Case, config: Any, rank: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    total, new = sum(case.lengths), sum(case.queries)
    key, value = torch.randn(2, total, 1, HEAD_SIZE, generator=generator, dtype=DTYPE)
    query = torch.randn(new + case.padding, HEADS, HEAD_SIZE, generator=generator, dtype=DTYPE)
    sinks = torch.randn(HEADS, generator=generator) + 2 if case.sinks else None
    ends = torch.tensor(case.lengths).cumsum(0)
    counts = torch.tensor(case.queries)
    if case.nan is not None:
        value[ends[case.nan] - counts[case.nan] - 1] = torch.nan
    positions = torch.cat([torch.arange(length) for length in case.lengths])
    new_tokens = torch.cat(
        [torch.arange(end - count, end) for end, count in zip(ends, counts, strict=True)]
    )
    padding = torch.zeros(case.padding, 1, HEAD_SIZE, dtype=DTYPE)
    step = (torch.cat([key[new_tokens], padding]), torch.cat([value[new_tokens], padding]))
    starts = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32)

    def run(heads: slice, ranks: int) -> tuple[torch.Tensor, int]:
        impl = K8V4AttentionImpl(
            num_heads=heads.stop - heads.start,
            head_size=HEAD_SIZE,
            scale=HEAD_SIZE**-0.5,
            num_kv_heads=1,
            kv_cache_dtype="turboquant_k8v4",
            sinks=None if sinks is None else sinks[heads],
        )
        table = BlockTable(PAGE, 8, 8, 512, False, CPU, case.interleave)
        table.dcp_world_size, table.dcp_rank = ranks, rank if ranks > 1 else 0
        impl.dcp_world_size = ranks
        first = 1
        for row, length in enumerate(case.lengths):
            blocks = -(-length // (PAGE * ranks))
            table.add_row(list(range(first, first + blocks)), row)
            first += blocks
        table.commit_block_table(len(case.lengths))
        table.compute_slot_mapping(len(case.lengths), starts, positions)
        slots = table.slot_mapping.gpu[:total]
        cache = torch.zeros(BLOCKS, 1, PAGE, k8v4.slot_bytes(HEAD_SIZE), dtype=torch.uint8)
        # Other requests left infinite scales.
        cache.view(torch.int16).fill_(0x7C00)
        impl.do_kv_cache_update(torch.nn.Module(), key, value, cache, slots)
        out = torch.full((len(query), impl.num_heads, HEAD_SIZE), 7.0, dtype=DTYPE)
        common = _common(case, table.get_device_tensor(len(case.lengths)))
        builder = object.__new__(K8V4MetadataBuilder)
        builder.layer_names, builder._decode_query_len = ["layer"], max(case.queries)
        builder._parallel_config = config.parallel_config
        batch = (torch.nn.Module(), query[:, heads].contiguous(), *step, cache)
        impl.forward(*batch, builder.build(0, common), out)
        return out[:new], int((slots >= 0).sum())

    own = HEADS // RANKS
    shared, stored = run(slice(rank * own, (rank + 1) * own), RANKS)
    alone, _ = run(slice(0, HEADS), 1)
    return shared, alone, stored


def _common(case: Case, table: torch.Tensor) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *case.queries]).cumsum(0).to(torch.int32)
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=len(lengths),
        num_actual_tokens=sum(case.queries) + case.padding,
        max_query_len=max(case.queries),
        max_seq_len=max(case.lengths),
        seq_lens_cpu_upper_bound=lengths.clone(),
        block_table_tensor=table,
        slot_mapping=torch.empty(0),
    )
