# SPDX-License-Identifier: Apache-2.0
"""Run mixed batches in vLLM's orders, and long prefills with a torch FlashAttention."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import unittest.mock
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

# Import `backends` before vLLM, because it prepares the process.
from testing.attention.backends import DTYPE, HEADS, PAGE, Backend, stored, texts, vllm_config

# isort: split
from vllm.v1.attention.backends.utils import reorder_batch_to_split_decodes_and_prefills
from vllm.v1.worker import workspace
from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

from testing.attention.recording import Recorder, kernels_of
from testing.attention.steps import Request, Step, common_metadata
from testing.triton.flash_attention import flash_attn_varlen_func
from vllm_hybrid_kv.attention import gpu, kernel_factory
from vllm_hybrid_kv.attention.flash import FlashAttention
from vllm_hybrid_kv.kernels import known_answer, reference
from vllm_hybrid_kv.kernels import triton as triton_kernels
from vllm_hybrid_kv.kernels.k8v4 import Layout

CPU = torch.device("cpu")
DRAFTS = 3
TORCH = FlashAttention(2, flash_attn_varlen_func)


def backend(*, drafts: int = 0, flash: bool = True, **layer: Any) -> Backend:
    config = vllm_config()
    if drafts:
        config.speculative_config = SimpleNamespace(
            num_speculative_tokens=drafts, parallel_drafting=False
        )
    made = Backend("ours", config, layer)
    made.impl.flash = TORCH if flash else None
    return made


def _ordered_by_v1(requests: dict[str, Request], threshold: int) -> list[str]:
    """Order requests as vLLM's model runner V1 does."""
    names = list(requests)
    computed = [one.length - one.new for one in requests.values()]
    prompts = [one.length if one.prefilling else one.length - one.new for one in requests.values()]
    batch = SimpleNamespace(
        req_ids=names,
        num_computed_tokens_cpu=np.array(computed),
        num_prompt_tokens=np.array(prompts),
    )

    def swap(i: int, k: int) -> None:
        names[i], names[k] = names[k], names[i]
        for numbers in (batch.num_computed_tokens_cpu, batch.num_prompt_tokens):
            numbers[[i, k]] = numbers[[k, i]]

    batch.swap_states = swap
    scheduled = {name: one.new for name, one in requests.items()}
    reorder_batch_to_split_decodes_and_prefills(
        batch, SimpleNamespace(num_scheduled_tokens=scheduled), decode_threshold=threshold
    )
    return names


ORDERS: dict[str, Callable[[dict[str, Request]], list[str]]] = {
    "none": list,
    "V1, threshold of the drafts": lambda requests: _ordered_by_v1(requests, 1 + DRAFTS),
    # A group of states, or decode context parallelism.
    "V1, threshold of 1": lambda requests: _ordered_by_v1(requests, 1),
    "V2": lambda requests: sort_batch_req_ids(
        {name: one.new for name, one in requests.items()},
        {name: [0] * one.drafts for name, one in requests.items() if one.drafts},
        1 + DRAFTS,
    ),
}


def error(made: Backend, step: Step, out: torch.Tensor, common: Any, cache: torch.Tensor) -> float:
    """Return the largest relative error of a row, compared with the reference on the same pages."""
    query = texts(step).query
    wanted, _ = reference.paged_attention(
        query, cache, common.block_table_tensor, common.seq_lens, common.query_start_loc,
        Layout.LINEAR, scale=made.impl.scale, window=made.impl.sliding_window,
    )  # fmt: skip
    return float(((out.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def launches(
    requests: dict[str, Request], order: str, flash: bool = True
) -> tuple[list[str], list[list[str]], float]:
    """Run a step and return its order, the requests of each launch, and the largest error."""
    names = ORDERS[order](requests)
    ordered = [requests[name] for name in names]
    step = Step(tuple(one.length for one in ordered), tuple(one.new for one in ordered), bound=1)
    made = backend(drafts=DRAFTS, flash=flash)
    common, tokens, cache = stored(made, step)
    # The lengths on the host are exact for prefills, and upper bounds for decodes.
    exact = torch.tensor([one.new > 1 + DRAFTS for one in ordered])
    common.seq_lens_cpu_upper_bound = torch.where(exact, common.seq_lens, common.seq_lens + 1)
    metadata = made.builder.build(0, common)
    out = made.forward(tokens.tensors, cache, metadata)
    served = []
    (plans,) = metadata.plans.values()
    for plan in plans:
        if isinstance(plan, triton_kernels.PrefillPlan):
            indices = {one.request for one in plan.prefills}
        else:
            indices = set(plan.row_tiles[:, 0].tolist()) - {-1}
        served.append(sorted(names[index] for index in indices))
    return names, served, error(made, step, out, common, cache)


def path_difference(new: int) -> tuple[list[str], float, float]:
    """Attend from the last `new` of 200 tokens.

    Returns:
        The kinds of plan with FlashAttention, the error compared with the reference, and the
        largest relative difference from our own kernel.
    """
    step = Step((200,), (new,))
    outs, kinds, worst = [], [], 0.0
    for flash in (True, False):
        made = backend(flash=flash)
        common, tokens, cache = stored(made, step)
        metadata = made.builder.build(0, common)
        outs.append(made.forward(tokens.tensors, cache, metadata))
        kinds.append([type(plan).__name__ for plans in metadata.plans.values() for plan in plans])
        worst = max(worst, error(made, step, outs[-1], common, cache))
    first, second = (out.float() for out in outs)
    return kinds[0], worst, float(((first - second).norm(dim=-1) / second.norm(dim=-1)).max())


def chunk_difference(cuts: Sequence[int], layer: dict[str, Any]) -> float:
    """Prefill 256 tokens whole and in chunks, and return the largest relative difference.

    As in an engine, a chunk is stored before it attends. The chunks before it have the role of a
    cached prefix.
    """
    whole = Step((256,), (256,), layer=layer)
    made = backend(**layer)
    common, tokens, cache = stored(made, whole)
    expected = made.forward(tokens.tensors, cache, made.builder.build(0, common))
    cache = made.cache(int(common.slot_mapping.max()) + 1)
    worst = 0.0
    for start, end in itertools.pairwise([0, *cuts, 256]):
        part, _ = common_metadata(Step((end,), (end - start,)), PAGE)
        part.block_table_tensor = common.block_table_tensor
        rows = [tensor[start:end] for tensor in tokens.tensors]
        made.store(rows[1], rows[2], cache, common.slot_mapping[start:end])
        out = made.forward(rows, cache, made.builder.build(0, part)).float()
        wanted = expected[start:end].float()
        worst = max(worst, float(((out - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()))
    return worst


def self_test(fault: str | None, layer: dict[str, Any]) -> str:
    """Run the known-answer test with a fault in FlashAttention. Returns the message, or ''."""

    def faulty(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if fault == "window":
            arguments["window_size"] = [-1, -1]
        if fault == "causal":
            arguments["causal"] = False
        if fault == "first key":
            arguments["k"][0] = 0.0
        out, lse = flash_attn_varlen_func(**arguments)
        return out, lse / math.log(2.0) if fault == "base 2" else lse

    made = backend(**layer)
    made.impl.flash = FlashAttention(2, faulty)
    known_answer.forget()
    try:
        gpu.GpuKernels(debug=True).test(
            {"layer": made.impl}, 64, DTYPE, CPU, "interpreter", decode_query_len=1,
        )  # fmt: skip
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


def workspace_bytes(max_model_len: int) -> tuple[int, int]:
    """Return the bytes of vLLM's workspace after profiling, and after a long prefill."""

    def taken() -> int:
        manager = workspace.current_workspace_manager()
        return sum(manager._workspace_size_bytes(one) for one in manager._current_workspaces)

    workspace.init_workspace_manager(CPU)
    try:
        made = Backend("ours", vllm_config(max_model_len), {})
        made.impl.flash = TORCH
        profiled = torch.zeros(8, HEADS, made.impl.head_size, dtype=DTYPE)
        made.impl.forward(
            made.layer, profiled, profiled, profiled, torch.tensor([]), None, profiled
        )
        workspace.lock_workspace()
        before = taken()
        common, tokens, cache = stored(made, Step((140, 20), (140, 1)))
        made.forward(tokens.tensors, cache, made.builder.build(0, common))
        return before, taken()
    finally:
        workspace.reset_workspace_manager()


def not_warmed_up() -> set[Any]:
    """Return the kernels that steps with long prefills launch but an engine's start does not."""
    made = backend(sliding_window=20)
    steps = [
        Step((200, 9), (200, 1)),
        Step((200, 90, 40), (130, 30, 1)),
        Step((130, 140), (130, 140)),
    ]
    known_answer.forget()
    launched: list[Any] = []
    with Recorder(launch=False, capture=False) as warm:
        # Without launches no result is right.
        with unittest.mock.patch.object(known_answer, "require", _run_only):
            gpu.GpuKernels(debug=False).test(
                {"layer": made.impl}, PAGE, DTYPE, CPU, "all", decode_query_len=1
            )
        triton_kernels.warm_up_plans(
            HEADS, made.impl.num_kv_heads, made.impl.head_size, CPU, max_requests=300,
            decode_query_len=1, window=20,
        )  # fmt: skip
    for step in steps:
        common, _ = common_metadata(dataclasses.replace(step, layer={}), PAGE)
        tokens = texts(step)
        cache = made.cache(int(common.block_table_tensor.max() + 1) * PAGE)
        metadata = made.builder.build(0, common)
        with Recorder(launch=False, capture=False) as recorder:
            # Plan as outside of a capture, with pieces so short that prefills have several.
            plan_prefill = triton_kernels.plan_prefill
            triton_kernels.plan_prefill = functools.partial(plan_prefill, rows=64, piece=64)
            with unittest.mock.patch.object(kernel_factory, "is_capturing", return_value=False):
                plans = gpu.GpuKernels(debug=False).plan(made.impl, metadata, cache)
            triton_kernels.plan_prefill = plan_prefill
            metadata.plans[made.impl.num_heads, 20, TORCH.version, True] = plans
            made.forward(tokens.tensors, cache, metadata)
        launched += recorder.launches
    return kernels_of(launched) - kernels_of(warm.launches)


def _run_only(path: str, variant: Any, batches: Any, store: Any, *arguments: Any) -> None:
    for queries, attend in batches:
        known_answer._run(variant, known_answer._requests(variant, queries), attend, store, CPU)
