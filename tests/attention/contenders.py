# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 - what vLLM finds when it is imported has to be there before
"""Our GPU backend and stock's, run on the same batches in Triton's interpreter.

Everything is vLLM's own code or ours: metadata builders, implementations, kernels. What a CPU
lacks is put in its place: Triton, which vLLM switches off there, and FlashAttention.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

# Before vLLM is imported: the backend of this process interprets the GPU kernels.
os.environ["VLLM_HYBRID_KV_CPU_ISA"] = "interpreter"
os.environ["VLLM_PLUGINS"] = ""

import torch
import triton
import triton.language as tl
import triton.runtime.interpreter
import vllm.triton_utils
from steps import Step
from torch.utils._python_dispatch import TorchDispatchMode

vllm.triton_utils.triton = triton
vllm.triton_utils.tl = tl
# vLLM's workspace returns memory to a device before it grows.
torch.accelerator.empty_cache = lambda: None

from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import turboquant_attn as stock_backend
from vllm.v1.attention.ops import triton_turboquant_decode as stock_decode
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    KVQuantMode,
)
from vllm.v1.worker import workspace
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.utils import AttentionGroup, allocate_kv_cache

from vllm_hybrid_kv.attention import gpu
from vllm_hybrid_kv.attention.backend import K8V4AttentionBackend, K8V4AttentionImpl
from vllm_hybrid_kv.attention.metadata import K8V4MetadataBuilder
from vllm_hybrid_kv.kernels import k8v4

HEADS, KV_HEADS, HEAD_SIZE, PAGE = 4, 2, 64, 16
TABLE_WIDTH = 32
SCALE = HEAD_SIZE**-0.5
DTYPE = torch.bfloat16

TOLERANCE = 0.4
"""Largest ||out - exact|| / ||exact|| of a token's head that fp8 keys and 4-bit values explain.
What the tests are about is off by more than that, mostly by 1."""


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: dict[str, Any]
) -> torch.Tensor:
    """Attend in float32 with the last tokens of a request to all of its K and V."""
    group = query.shape[1] // key.shape[1]
    key = key.float().repeat_interleave(group, 1)
    value = value.float().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * SCALE
    cap = layer.get("logits_soft_cap")
    if cap:
        scores = torch.tanh(scores / cap) * cap
    queries, keys = scores.shape[1:]
    apart = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None, :]
    hidden = apart < 0
    if layer.get("sliding_window"):
        hidden |= apart >= layer["sliding_window"]
    scores = scores.masked_fill(hidden, float("-inf"))
    if layer.get("sinks") is not None:
        sinks = torch.tensor(layer["sinks"])[:, None, None].expand(-1, queries, 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """What FlashAttention gives, for stock's prefill."""
    assert options["causal"]
    out = torch.empty_like(q)
    starts = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    for (q0, k0), (q1, k1) in itertools.pairwise(starts):
        out[q0:q1] = exact_attention(q[q0:q1], k[k0:k1], v[k0:k1], {}).to(q.dtype)
    return out


def common_metadata(step: Step) -> tuple[CommonAttentionMetadata, torch.Tensor]:
    """What a model runner hands to metadata builders, and the slot of each token so far."""
    starts = torch.tensor([0, *step.queries]).cumsum(0).to(torch.int32)
    pages = [-(-length // PAGE) for length in step.lengths]
    table = torch.zeros(len(pages), TABLE_WIDTH, dtype=torch.int32)
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(1))
    slots, new_slots, first = [], [], 0
    for row, (count, length, new) in enumerate(zip(pages, step.lengths, step.queries, strict=True)):
        table[row, :count] = order[first : first + count]
        first += count
        position = torch.arange(length)
        mine = table[row, position // PAGE].long() * PAGE + position % PAGE
        slots.append(mine)
        new_slots.append(mine[length - new :])
    lengths = torch.tensor(step.lengths, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=lengths,
        num_reqs=len(pages),
        num_actual_tokens=sum(step.queries),
        max_query_len=max(step.queries),
        max_seq_len=max(step.lengths) + step.bound,
        seq_lens_cpu_upper_bound=lengths + step.bound,
        block_table_tensor=table,
        slot_mapping=torch.cat(new_slots),
        causal=True,
    )
    return common, torch.cat(slots)


def vllm_config(max_model_len: int = 1024, **changes: Any) -> Any:
    """The parts of an engine's configuration that builders and implementations read."""
    # Where vLLM has no platform it does not guess one.
    config = VllmConfig(device_config=DeviceConfig(device="cpu"))
    config.model_config = SimpleNamespace(
        max_model_len=max_model_len,
        dtype=DTYPE,
        get_num_attention_heads=lambda parallel: HEADS,
    )
    config.scheduler_config.max_num_batched_tokens = 2048
    config.attention_config.tq_max_kv_splits_for_cuda_graph = 2  # each takes the interpreter time
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def spec() -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=PAGE,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        dtype=torch.uint8,
        kv_quant_mode=KVQuantMode.TURBOQUANT_K8V4,
    )


class Backend:
    """A backend's builder and implementation of one layer.

    Args:
        name: "ours" or "stock".
        config: Of the engine.
        parameters: Of the layer.
    """

    def __init__(self, name: str, config: Any, parameters: dict[str, Any]) -> None:
        stock = name == "stock"
        self.stock = stock
        builder = stock_backend.TurboQuantMetadataBuilder if stock else K8V4MetadataBuilder
        impl = stock_backend.TurboQuantAttentionImpl if stock else K8V4AttentionImpl
        if stock:
            stock_backend._HAS_FLASH_ATTN = True
            stock_backend.flash_attn_varlen_func = flash_attention
        with set_current_vllm_config(config):
            self.impl = impl(
                num_heads=HEADS,
                head_size=HEAD_SIZE,
                scale=SCALE,
                num_kv_heads=KV_HEADS,
                kv_cache_dtype="turboquant_k8v4",
                **{
                    parameter: torch.tensor(value) if parameter == "sinks" else value
                    for parameter, value in parameters.items()
                },
            )
            self.builder = builder(spec(), [], config, torch.device("cpu"))
        self.layer = torch.nn.Module()

    def cache(self, tokens: int) -> torch.Tensor:
        """Pages for so many tokens, as vLLM would lay them out for the backend."""
        blocks, slot = -(-tokens // PAGE), k8v4.slot_bytes(HEAD_SIZE)
        if self.stock:
            return torch.zeros(blocks, PAGE, KV_HEADS, slot, dtype=torch.uint8).transpose(1, 2)
        return torch.zeros(blocks, KV_HEADS, PAGE, slot, dtype=torch.uint8)

    def store(
        self, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        self.impl.do_kv_cache_update(self.layer, key, value, cache, slots)

    def forward(self, tensors: list[torch.Tensor], cache: torch.Tensor, metadata: Any) -> Any:
        out = torch.full((*tensors[0].shape,), 7.0, dtype=DTYPE)
        self.impl.forward(self.layer, *tensors, cache, metadata, out)
        return out


@dataclass
class Texts:
    """K, V and queries of the requests of a step.

    Attributes:
        key, value: bf16 [all tokens, KV_HEADS, HEAD_SIZE].
        query: bf16 [new tokens, HEADS, HEAD_SIZE].
        new: Indices of the new tokens among all.
    """

    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor
    new: torch.Tensor


def texts(step: Step, seed: int = 0) -> Texts:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(step.lengths), KV_HEADS, HEAD_SIZE)
    ends = torch.tensor(step.lengths).cumsum(0).tolist()
    new = torch.cat(
        [torch.arange(end - count, end) for end, count in zip(ends, step.queries, strict=True)]
    )
    return Texts(
        (torch.randn(shape, generator=generator) * step.key_size).to(DTYPE),
        torch.randn(shape, generator=generator).to(DTYPE),
        torch.randn(len(new), HEADS, HEAD_SIZE, generator=generator).to(DTYPE),
        new,
    )


def expected(step: Step, made: Texts) -> torch.Tensor:
    outputs, first, row = [], 0, 0
    for length, count in zip(step.lengths, step.queries, strict=True):
        keys = slice(first, first + length)
        rows = slice(row, row + count)
        outputs.append(
            exact_attention(made.query[rows], made.key[keys], made.value[keys], step.layer)
        )
        first, row = first + length, row + count
    return torch.cat(outputs)


def error(out: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest relative error of a token's head."""
    apart = (out.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return float(apart.max())


def step_error(name: str, step: Step) -> float:
    """Run one step as a model runner does and return its largest relative error.

    The GPU is one without a conversion to fp8: compute capability 8.0 or 8.6.
    """
    stock_decode._FP8_E4B15[0] = 1
    backend = Backend(name, vllm_config(), step.layer)
    common, slots = common_metadata(step)
    made = texts(step)
    cache = backend.cache(int(slots.max()) + 1)
    backend.store(made.key, made.value, cache, slots)
    metadata = backend.builder.build(0, common)
    key, value = made.key[made.new], made.value[made.new]
    out = backend.forward([made.query, key, value], cache, metadata)
    return error(out, expected(step, made))


class Recorder(TorchDispatchMode):
    """Runs operations again as a captured graph does: the same tensors, the same numbers.

    Of what Python does between them nothing is repeated.

    Args:
        launch: Whether kernels are launched as well; what they give is not defined otherwise.
    """

    def __init__(self, launch: bool = True) -> None:
        super().__init__()
        self._launches_kernels = launch
        self.launches: list[tuple[Any, Any, Any]] = []
        self._operations: list[Callable[[], None]] = []
        self._executor = triton.runtime.interpreter.GridExecutor
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._inside and isinstance(result, torch.Tensor):
            made = not any(
                alias.alias_info is not None for alias in func._schema.returns
            )  # neither a view nor an argument

            def again() -> None:
                repeated = func(*args, **kwargs)
                if made:
                    result.copy_(repeated)

            self._operations.append(again)
        return result

    def __enter__(self) -> Recorder:
        self._launch, self._capturing = self._executor.__call__, gpu._capturing

        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.launches.append((executor, args, kwargs))
            self._operations.append(lambda: self._launch(executor, *args, **kwargs))
            if self._launches_kernels:
                self._inside = True
                self._launch(executor, *args, **kwargs)
                self._inside = False

        self._executor.__call__ = launch
        gpu._capturing = lambda device: True
        return super().__enter__()

    def __exit__(self, *failed: Any) -> None:
        super().__exit__(*failed)
        self._executor.__call__, gpu._capturing = self._launch, self._capturing

    def replay(self) -> None:
        for operation in self._operations:
            operation()


def replay_error(name: str, captured: Step, replayed: Step) -> float:
    """Capture a step, replay it as another one, and return the largest relative error.

    As a model runner does: the tensors stay the same, their contents are written anew; where
    there are fewer requests than captured the others have no tokens.
    """
    backend = Backend(name, vllm_config(), {})
    common, _ = common_metadata(captured)
    other, slots = common_metadata(replayed)
    made = texts(replayed)
    cache = backend.cache(int(slots.max()) + 1)
    tokens = common.num_actual_tokens
    key = torch.zeros(tokens, KV_HEADS, HEAD_SIZE, dtype=DTYPE)
    tensors = [torch.zeros(tokens, HEADS, HEAD_SIZE, dtype=DTYPE), key, key.clone()]
    out = torch.empty_like(tensors[0])
    metadata = backend.builder.build_for_cudagraph_capture(common)
    # The run before the capture.
    backend.impl.forward(backend.layer, *tensors, cache, metadata, out)
    with Recorder() as recorder:
        backend.impl.forward(backend.layer, *tensors, cache, metadata, out)
    launched = [executor.fn.__name__ for executor, _, _ in recorder.launches]
    # A plan from before the capture would not be wrong for decodes, but made for other lengths.
    assert name == "stock" or "plan_kernel" in launched

    backend.store(made.key, made.value, cache, slots)
    requests = other.num_reqs
    common.seq_lens.zero_()[:requests] = other.seq_lens
    common.query_start_loc.fill_(other.num_actual_tokens)[:requests] = other.query_start_loc[:-1]
    common.block_table_tensor[:requests] = other.block_table_tensor
    new = len(made.new)
    for tensor, content in zip(
        tensors, (made.query, made.key[made.new], made.value[made.new]), strict=True
    ):
        tensor[:new] = content
    recorder.replay()
    return error(out[:new], expected(replayed, made))


def captured_lengths() -> list[int]:
    """Lengths that the runs before a capture attend to."""
    common, _ = common_metadata(Step((200, 90), (3, 3)))
    Backend("ours", vllm_config(), {}).builder.build_for_cudagraph_capture(common)
    return common.seq_lens.tolist()


def draft_error(update: bool) -> float:
    """Attend for a draft's next token with the metadata of the one before."""
    backend = Backend("ours", vllm_config(), {})
    before, after = Step((40, 17), (1, 1)), Step((41, 18), (1, 1))
    common, slots = common_metadata(after)
    made = texts(after)
    cache = backend.cache(int(slots.max()) + 1)
    backend.store(made.key, made.value, cache, slots)
    common.seq_lens.copy_(torch.tensor(before.lengths))
    metadata = backend.builder.build_for_drafting(common, 0)
    tensors = [made.query, made.key[made.new], made.value[made.new]]
    backend.forward(tensors, cache, metadata)
    plans = list(metadata.plans.values())
    common.seq_lens.copy_(torch.tensor(after.lengths))
    if update:
        backend.builder.update_draft_decode_metadata(metadata)
    found = error(backend.forward(tensors, cache, metadata), expected(after, made))
    assert (list(metadata.plans.values()) == plans) != update
    return found


def kernels_of(launches: list[Any]) -> set[Any]:
    """What launches compile on a GPU: a kernel, its constants and the kinds of its arguments."""
    return {
        (
            executor.fn.__name__,
            tuple(sorted(kwargs.items())),
            tuple(getattr(value, "dtype", type(value)) for value in args),
        )
        for executor, args, kwargs in launches
    }


def not_warmed_up(steps: list[Step]) -> set[Any]:
    """Return what the steps launch that was not launched when the engine started."""
    layer = {"sliding_window": 20}
    backend = Backend("ours", vllm_config(), layer)
    with Recorder(launch=False) as warm:
        cache = backend.cache(2 * PAGE)
        gpu._warm_up_layer(backend.impl, cache, DTYPE, max_requests=300)
    launched = []
    for step in steps:
        common, slots = common_metadata(step)
        made = texts(step)
        cache = backend.cache(int(slots.max()) + 1)
        tensors = [made.query, made.key[made.new], made.value[made.new]]
        with Recorder(launch=False) as recorder:
            backend.store(*tensors[1:], cache, common.slot_mapping)
            backend.forward(tensors, cache, backend.builder.build(0, common))
        launched += recorder.launches
    return kernels_of(launched) - kernels_of(warm.launches)


def second_runner_error(bound: int) -> float:
    """Run a step with metadata built as vLLM's second model runner does."""
    step = Step((20, 9), (2, 2), bound=bound)
    backend = Backend("ours", vllm_config(), {})
    group = AttentionGroup(K8V4AttentionBackend, ["layer"], spec(), 0)
    group.create_metadata_builders(vllm_config(), torch.device("cpu"), PAGE)
    common, slots = common_metadata(step)
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
    made = texts(step)
    cache = backend.cache(int(slots.max()) + 1)
    backend.store(made.key, made.value, cache, slots)
    tensors = [made.query, made.key[made.new], made.value[made.new]]
    return error(backend.forward(tensors, cache, metadata["layer"]), expected(step, made))


def pages_of(cache: torch.Tensor, layer: int, blocks: int) -> torch.Tensor:
    """A layer's pages as a connector sees them: bytes of vLLM's allocation, of the planned size."""
    page = K8V4AttentionBackend.customize_spec(spec()).page_size_bytes
    raw = torch.tensor([], dtype=torch.uint8).set_(cache.untyped_storage())
    return raw[layer * page * blocks :][: page * blocks].view(blocks, page)


def moved_pages_are_equal() -> bool:
    """Attend to pages that were moved, as bytes, into another layer's blocks in another order."""
    blocks = 9
    planned = K8V4AttentionBackend.customize_spec(spec())
    page = planned.page_size_bytes
    config = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[
            KVCacheTensor(
                layers=["a", "b"], size=2 * page * blocks, offset=0,
                layer_stride=page * blocks, block_stride=page,
            )
        ],
        kv_cache_groups=[KVCacheGroupSpec(["a", "b"], planned)],
    )  # fmt: skip
    layout = K8V4AttentionBackend.supported_kv_cache_layouts()[0]
    caches = allocate_kv_cache(config, torch.device("cpu"), layout)
    step = Step((50, 33), (1, 3))
    backend = Backend("ours", vllm_config(), {})
    common, slots = common_metadata(step)
    made = texts(step)
    backend.store(made.key, made.value, caches["a"].view(torch.uint8), slots)
    tensors = [made.query, made.key[made.new], made.value[made.new]]

    def attend(layer: str) -> torch.Tensor:
        metadata = backend.builder.build(0, common)
        return backend.forward(tensors, caches[layer].view(torch.uint8), metadata)

    before = attend("a")
    order = torch.arange(blocks).flip(0)
    pages_of(caches["b"], 1, blocks)[order] = pages_of(caches["a"], 0, blocks)
    common.block_table_tensor.copy_(order[common.block_table_tensor.long()])
    return torch.equal(before, attend("b")) and not torch.equal(before, attend("a"))


def refused(name: str, asked: dict[str, Any]) -> list[str]:
    """Return why a backend refuses a layer of a GPU."""
    usual: dict[str, Any] = {
        "head_size": HEAD_SIZE, "dtype": DTYPE, "kv_cache_dtype": "turboquant_k8v4",
        "block_size": PAGE, "use_mla": False, "has_sink": False, "use_sparse": False,
        "use_mm_prefix": False, "use_per_head_quant_scales": False,
        "device_capability": (9, 0), "attn_type": "decoder",
    }  # fmt: skip
    backend = stock_backend.TurboQuantAttentionBackend if name == "stock" else K8V4AttentionBackend
    options = {**usual, **asked}
    options["device_capability"] = DeviceCapability(*options["device_capability"])
    return backend.validate_configuration(**options)


def shared_plans() -> bool:
    """Whether a group's layers plan again what those of a group of the same spec have planned."""
    backend = Backend("ours", vllm_config(), {})
    common, slots = common_metadata(Step((20,), (1,)))
    made = texts(Step((20,), (1,)))
    cache = backend.cache(int(slots.max()) + 1)
    first = backend.builder.build(0, common)
    table = common.block_table_tensor.clone()
    second = backend.builder.update_block_table(first, table, common.slot_mapping)
    tensors = [made.query, made.key[made.new], made.value[made.new]]
    backend.forward(tensors, cache, first)
    plans = list(first.plans.values())
    backend.forward(tensors, cache, second)
    return second.block_table is table and list(second.plans.values()) == plans != []


def workspace_bytes(name: str, max_model_len: int) -> int:
    """Return what a backend takes of vLLM's workspace by the time that requests are served."""
    workspace.init_workspace_manager(torch.device("cpu"))
    try:
        step = Step((40,), (1,))
        backend = Backend(name, vllm_config(max_model_len), {})
        profiled = torch.zeros(8, HEADS, HEAD_SIZE, dtype=DTYPE)
        backend.impl.forward(
            backend.layer, profiled, profiled, profiled, torch.tensor([]), None, profiled
        )
        workspace.lock_workspace()
        common, slots = common_metadata(step)
        made = texts(step)
        cache = backend.cache(int(slots.max()) + 1)
        backend.store(made.key, made.value, cache, slots)
        tensors = [made.query, made.key[made.new], made.value[made.new]]
        backend.forward(tensors, cache, backend.builder.build(0, common))
        manager = workspace.current_workspace_manager()
        return sum(manager._workspace_size_bytes(taken) for taken in manager._current_workspaces)
    finally:
        workspace.reset_workspace_manager()
