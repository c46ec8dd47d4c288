# SPDX-License-Identifier: Apache-2.0
"""Scenarios for a backend. Each function runs one and returns its result."""

from __future__ import annotations

import math
import unittest.mock
from types import SimpleNamespace
from typing import Any

import torch

# Import `backends` before vLLM, because it prepares the process.
from testing.attention.backends import (
    DTYPE,
    HEAD_SIZE,
    HEADS,
    KV_HEADS,
    PAGE,
    Backend,
    error,
    expected,
    spec,
    stored,
    texts,
    vllm_config,
)

# isort: split
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends import turboquant_attn as stock_backend
from vllm.v1.attention.ops import triton_turboquant_decode as stock_decode
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.worker import workspace
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.utils import AttentionGroup, allocate_kv_cache

from testing.attention.recording import Recorder, kernels_of
from testing.attention.steps import Step, common_metadata
from vllm_hybrid_kv.attention import gpu
from vllm_hybrid_kv.attention.backend import K8V4AttentionBackend
from vllm_hybrid_kv.kernels import known_answer
from vllm_hybrid_kv.kernels import triton as triton_kernels

CPU = torch.device("cpu")


def step_error(name: str, step: Step) -> float:
    """Run one step as a model runner does and return its largest relative error.

    vLLM's backend runs as on a GPU that cannot convert to fp8 (compute capability 8.0 or 8.6).
    """
    stock_decode._FP8_E4B15[0] = 1
    backend = Backend(name, vllm_config(), step.layer)
    common, made, cache = stored(backend, step)
    metadata = backend.builder.build(0, common)
    return error(backend.forward(made.tensors, cache, metadata), expected(step, made))


def replay_error(name: str, captured: Step, replayed: Step) -> float:
    """Capture a step, replay it as another one, and return the largest relative error.

    As in a model runner, the tensors stay the same and get new contents. If `replayed` has fewer
    requests than `captured`, the missing requests have no tokens.
    """
    backend = Backend(name, vllm_config(), {})
    common, _ = common_metadata(captured, PAGE)
    other, slots = common_metadata(replayed, PAGE)
    made = texts(replayed)
    cache = backend.cache(int(slots.max()) + 1)
    tokens = common.num_actual_tokens
    key = torch.zeros(tokens, KV_HEADS, HEAD_SIZE, dtype=DTYPE)
    query, value = torch.zeros(tokens, HEADS, HEAD_SIZE, dtype=DTYPE), key.clone()
    out = torch.empty_like(query)
    metadata = backend.builder.build_for_cudagraph_capture(common)
    # A model runner runs a step once before it captures the step.
    backend.impl.forward(backend.layer, query, key, value, cache, metadata, out)
    with Recorder() as recorder:
        backend.impl.forward(backend.layer, query, key, value, cache, metadata, out)
    launched = [executor.fn.__name__ for executor, _, _ in recorder.launches]
    # The graph must contain the plan's kernel, because every replay has new lengths.
    assert name == "stock" or "plan_kernel" in launched

    backend.store(made.key, made.value, cache, slots)
    requests = other.num_reqs
    common.seq_lens.zero_()[:requests] = other.seq_lens
    common.query_start_loc.fill_(other.num_actual_tokens)[:requests] = other.query_start_loc[:-1]
    common.block_table_tensor[:requests] = other.block_table_tensor
    new = len(made.new)
    for tensor, content in zip((query, key, value), made.tensors, strict=True):
        tensor[:new] = content
    recorder.replay()
    return error(out[:new], expected(replayed, made))


def captured_lengths() -> list[int]:
    """Return the sequence lengths that our metadata builder sets for a graph capture."""
    common, _ = common_metadata(Step((200, 90), (3, 3)), PAGE)
    Backend("ours", vllm_config(), {}).builder.build_for_cudagraph_capture(common)
    return common.seq_lens.tolist()


def draft_error(update: bool) -> float:
    """Return the error of a second draft step with the metadata of the first, updated or not."""
    backend = Backend("ours", vllm_config(), {})
    before, after = Step((40, 17), (1, 1)), Step((41, 18), (1, 1))
    common, made, cache = stored(backend, after)
    common.seq_lens.copy_(torch.tensor(before.lengths))
    metadata = backend.builder.build_for_drafting(common, 0)
    backend.forward(made.tensors, cache, metadata)
    plans = list(metadata.plans.values())
    common.seq_lens.copy_(torch.tensor(after.lengths))
    if update:
        backend.builder.update_draft_decode_metadata(metadata)
    result = error(backend.forward(made.tensors, cache, metadata), expected(after, made))
    assert (list(metadata.plans.values()) == plans) != update
    return result


def not_warmed_up(steps: list[Step]) -> set[Any]:
    """Return the kernels of the steps that the start of an engine does not warm up."""
    layer = {"sliding_window": 20}
    backend = Backend("ours", vllm_config(), layer)
    with Recorder(launch=False, capture=False) as warm:
        known_answer.forget()
        # Without launches, the known-answer test cannot pass, so accept any error.
        with unittest.mock.patch.dict(known_answer.BOUNDS, {DTYPE: math.inf}):
            gpu.GpuKernels(debug=False).test(
                {"layer": backend.impl}, PAGE, DTYPE, CPU, "all", decode_query_len=1
            )
            triton_kernels.warm_up_plans(
                HEADS, KV_HEADS, HEAD_SIZE, CPU, max_requests=300, decode_query_len=1, window=20
            )
    launched = []
    for step in steps:
        common, slots = common_metadata(step, PAGE)
        made = texts(step)
        cache = backend.cache(int(slots.max()) + 1)
        with Recorder(launch=False, capture=False) as recorder:
            backend.store(made.key, made.value, cache, common.slot_mapping)
            backend.forward(made.tensors, cache, backend.builder.build(0, common))
        launched += recorder.launches
    return kernels_of(launched) - kernels_of(warm.launches)


def second_runner_error(bound: int) -> float:
    """Return the error of a step with metadata of vLLM's model runner V2; see `Step.bound`."""
    step = Step((20, 9), (2, 2), bound=bound)
    backend = Backend("ours", vllm_config(), {})
    group = AttentionGroup(K8V4AttentionBackend, ["layer"], spec(), 0)
    group.create_metadata_builders(vllm_config(), CPU, PAGE)
    common, made, cache = stored(backend, step)
    metadata = build_attn_metadata(
        attn_groups=[[group]],
        num_reqs=common.num_reqs,
        num_tokens=common.num_actual_tokens,
        query_start_loc_gpu=common.query_start_loc,
        query_start_loc_cpu=common.query_start_loc_cpu,
        max_query_len=common.max_query_len,
        seq_lens=common.seq_lens,
        max_seq_len=common.max_seq_len,
        block_tables=[common.block_table_tensor],
        slot_mappings=common.slot_mapping[None],
        kv_cache_config=SimpleNamespace(kv_cache_groups=[None]),
        seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound,
    )
    return error(backend.forward(made.tensors, cache, metadata["layer"]), expected(step, made))


def pages_of(cache: torch.Tensor, layer: int, blocks: int) -> torch.Tensor:
    """View a layer's pages as a connector sees them: as bytes of vLLM's allocation."""
    page = K8V4AttentionBackend.customize_spec(spec()).page_size_bytes
    raw = torch.tensor([], dtype=torch.uint8).set_(cache.untyped_storage())
    return raw[layer * page * blocks :][: page * blocks].view(blocks, page)


def moved_pages_are_equal() -> bool:
    """Move pages as bytes to another layer, in another order, and compare the layers' outputs."""
    blocks = 9
    planned = K8V4AttentionBackend.customize_spec(spec())
    page = planned.page_size_bytes
    config = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[
            KVCacheTensor(
                layers=["a", "b"],
                size=2 * page * blocks,
                offset=0,
                layer_stride=page * blocks,
                block_stride=page,
            )
        ],
        kv_cache_groups=[KVCacheGroupSpec(["a", "b"], planned)],
    )
    layout = K8V4AttentionBackend.supported_kv_cache_layouts()[0]
    caches = allocate_kv_cache(config, CPU, layout)
    step = Step((50, 33), (1, 3))
    backend = Backend("ours", vllm_config(), {})
    common, slots = common_metadata(step, PAGE)
    made = texts(step)
    backend.store(made.key, made.value, caches["a"].view(torch.uint8), slots)

    def attend(layer: str) -> torch.Tensor:
        metadata = backend.builder.build(0, common)
        return backend.forward(made.tensors, caches[layer].view(torch.uint8), metadata)

    before = attend("a")
    order = torch.arange(blocks).flip(0)
    pages_of(caches["b"], 1, blocks)[order] = pages_of(caches["a"], 0, blocks)
    common.block_table_tensor.copy_(order[common.block_table_tensor.long()])
    return torch.equal(before, attend("b")) and not torch.equal(before, attend("a"))


def refused(name: str, changes: dict[str, Any]) -> list[str]:
    """Return why a backend refuses a layer on a GPU. `changes` replace the usual options."""
    usual: dict[str, Any] = {
        "head_size": HEAD_SIZE,
        "dtype": DTYPE,
        "kv_cache_dtype": "turboquant_k8v4",
        "block_size": PAGE,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": (9, 0),
        "attn_type": "decoder",
    }
    backend = stock_backend.TurboQuantAttentionBackend if name == "stock" else K8V4AttentionBackend
    options = {**usual, **changes}
    options["device_capability"] = DeviceCapability(*options["device_capability"])
    return backend.validate_configuration(**options)


def shared_plans() -> bool:
    """Return whether two groups with the same spec share the plans of their layers."""
    backend = Backend("ours", vllm_config(), {})
    common, made, cache = stored(backend, Step((20,), (1,)))
    first = backend.builder.build(0, common)
    table = common.block_table_tensor.clone()
    second = backend.builder.update_block_table(first, table, common.slot_mapping)
    backend.forward(made.tensors, cache, first)
    plans = list(first.plans.values())
    backend.forward(made.tensors, cache, second)
    return second.block_table is table and list(second.plans.values()) == plans != []


def workspace_bytes(name: str, max_model_len: int) -> int:
    """Return how many bytes of vLLM's workspace a backend uses after the first request."""
    workspace.init_workspace_manager(CPU)
    try:
        backend = Backend(name, vllm_config(max_model_len), {})
        profiled = torch.zeros(8, HEADS, HEAD_SIZE, dtype=DTYPE)
        backend.impl.forward(
            backend.layer, profiled, profiled, profiled, torch.tensor([]), None, profiled
        )
        workspace.lock_workspace()
        common, made, cache = stored(backend, Step((40,), (1,)))
        backend.forward(made.tensors, cache, backend.builder.build(0, common))
        manager = workspace.current_workspace_manager()
        return sum(manager._workspace_size_bytes(taken) for taken in manager._current_workspaces)
    finally:
        workspace.reset_workspace_manager()
