# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 - the environment and modules must be prepared before vLLM is imported
"""Rehearse CUDA graphs with real vLLM engines on a CPU, in Triton's interpreter.

vLLM's own code resolves the graph mode, captures, dispatches and replays, in both model runners.
Only torch's graphs are replaced, by recordings. Before each replay the model also runs without the
graph, on the same metadata, so that outputs and kernel launches can be compared.

Import this module first in a process that interprets Triton.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("import this module only in a process that interprets Triton")
os.environ["VLLM_HYBRID_KV_CPU_ISA"] = "interpreter"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_CPU_CI_ENV"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import triton
import triton.language as tl
import vllm.triton_utils
from vllm.triton_utils import importing

# On CPUs vLLM disables Triton, and without Triton it disables its second model runner.
vllm.triton_utils.triton = triton
vllm.triton_utils.tl = tl
vllm.triton_utils.HAS_TRITON = importing.HAS_TRITON = True

import vllm.compilation.cuda_graph as graph_wrapper
import vllm.v1.worker.gpu.cudagraph_utils as graph_manager
import vllm.v1.worker.gpu_model_runner as first_runner
from vllm.compilation import cudagraph_pool
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker import workspace

from testing.attention.recording import CaptureError, Recorder, differences
from testing.engine_worker import greedy, start_engine, stop_engine
from vllm_hybrid_kv.attention import backend, gpu, kernel_factory

Answers = list[list[tuple[int, float]]]
"""For each request the generated tokens and their log-probabilities."""

DEFAULTS: dict[str, Any] = {
    "kv_cache_dtype": "turboquant_k8v4",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "block_size": 16,
    "num_gpu_blocks_override": 32,
    "enable_prefix_caching": False,
    "gpu_memory_utilization": 0.3,
    "skip_tokenizer_init": True,
    "seed": 0,
    "compilation_config": {"mode": 0},
    # vLLM would run its own kernels to compile them, which takes seconds in the interpreter.
    "kernel_config": {"enable_jit_warmup": False},
}
"""Arguments of `vllm.LLM`."""


@dataclass
class Rehearsal:
    """What happened in an engine with graphs.

    Attributes:
        graphs: Shapes of the captured graphs.
        replays: Shapes of the graphs in the order of their replays.
        wrong: Replays whose output was not that of the model without the graph.
        differences: Each difference found between launches with a graph and without it, once.
        kernels: For each graph, the names of the kernels that it launches.
        all_replays: How many graphs were replayed, including those of drafts.
        answers: The tokens of each request and their log-probabilities.
        error: Why a capture failed.
    """

    graphs: list[tuple[int, int]] = field(default_factory=list)
    replays: list[tuple[int, int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    kernels: list[set[str]] = field(default_factory=list)
    all_replays: int = 0
    answers: Answers = field(default_factory=list)
    error: str | None = None


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    replays = 0

    def __init__(self) -> None:
        self.recorder = Recorder(launch=False)

    def replay(self) -> None:
        Graph.replays += 1
        self.recorder.replay()


@contextlib.contextmanager
def capture(graph: Graph, pool: Any = None, stream: Any = None) -> Iterator[None]:
    """Stand in for `torch.cuda.graph`."""

    def synchronise(*_: Any) -> None:
        raise CaptureError("synchronises during a capture")

    waiting = torch.accelerator.synchronize
    torch.accelerator.synchronize = torch.cuda.synchronize = synchronise
    try:
        with graph.recorder:
            yield
    finally:
        torch.accelerator.synchronize = waiting


def _stand_in() -> None:
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture
    torch.cuda.Stream = lambda *_, **__: SimpleNamespace(wait_stream=lambda stream: None)
    torch.accelerator.get_memory_info = lambda *_: (0, 0)
    CpuPlatform.get_global_graph_pool = CpuPlatform.graph_pool_handle = lambda self: (0, 0)
    cudagraph_pool.set_graph_pool_id = lambda pool: None
    graph_wrapper.weak_ref_tensors = lambda tensors: tensors
    for module in (graph_manager, first_runner):
        module.graph_capture = lambda device: contextlib.nullcontext()
    vars(backend)["current_platform"] = _AsIfCuda()


class _AsIfCuda:
    """vLLM's platform, which our backend believes to be CUDA."""

    def is_cuda_alike(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        from vllm.platforms import current_platform

        return getattr(current_platform, name)


_stand_in()


@contextlib.contextmanager
def _graph_mode(mode: CUDAGraphMode, sizes: list[int]) -> Iterator[None]:
    """Let engines have CUDA graphs although their platform is a CPU."""
    check = CpuPlatform.__dict__["check_and_update_config"]

    def check_and_update_config(cls: Any, config: Any) -> None:
        check.__func__(cls, config)
        compilation = config.compilation_config
        compilation.cudagraph_mode = mode
        compilation.cudagraph_capture_sizes = sizes
        compilation.max_cudagraph_capture_size = max(sizes)
        compilation.cudagraph_num_of_warmups = 1

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = check


class Engine:
    """A vLLM engine whose model runner captures stand-ins of CUDA graphs.

    Args:
        runner: 1 or 2, the version of vLLM's model runner.
        model: A folder with a model.
        mode: The name of a `CUDAGraphMode`.
        sizes: Numbers of tokens to capture.
        arguments: Arguments of `vllm.LLM`.
    """

    def __init__(
        self,
        runner: int,
        model: str,
        *,
        mode: str = "FULL_DECODE_ONLY",
        sizes: tuple[int, ...] = (1, 4),
        **arguments: Any,
    ) -> None:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(runner - 1)
        workspace.init_workspace_manager(torch.device("cpu"))
        with _graph_mode(CUDAGraphMode[mode], list(sizes)):
            self._llm = start_engine(model=model, **{**DEFAULTS, **arguments})
        core = self._llm.llm_engine.engine_core.engine_core
        self._runner = core.model_executor.driver_worker.worker.model_runner
        self._watch = _watch_first if runner == 1 else _watch_second
        for layer in self._runner.compilation_config.static_forward_context.values():
            # The custom operator would hide what the layer launches.
            layer.use_direct_call = True

    def generate(self, prompts: list[list[int]], tokens: int) -> Answers:
        """Generate greedily, before any graph is captured."""
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = []
        for output in self._llm.generate(requests, greedy(tokens), use_tqdm=False):
            (completion,) = output.outputs
            chosen = zip(completion.token_ids, completion.logprobs, strict=True)
            answers.append([(token, candidates[token].logprob) for token, candidates in chosen])
        return answers

    def rehearse(
        self, prompts: list[list[int]], tokens: int, fault: str | None = None
    ) -> Rehearsal:
        """Capture graphs, generate with them, and forget them, optionally with a planted fault."""
        found = Rehearsal()
        try:
            planted = FAULTS[fault]() if fault else contextlib.nullcontext()
            with planted, self._watch(self._runner, found):
                self._runner.capture_model()
                found.answers = self.generate(prompts, tokens)
        except CaptureError as error:
            found.error = str(error)
        _Stale.made.clear()
        return found

    def close(self) -> None:
        stop_engine(self._llm)
        workspace.reset_workspace_manager()


def _compare(
    found: Rehearsal, shape: Any, graph: Graph, runner: Any, metadata: Any, run: Any, replay: Any
) -> Any:
    """Run the model without its graph and with it, and record how the two differ."""
    rows = int(next(iter(metadata.values())).query_start_loc[-1])
    layers = runner.compilation_config.static_forward_context.values()
    caches = [layer.kv_cache for layer in layers if hasattr(layer, "kv_cache")]
    before = [cache.clone() for cache in caches]
    with Recorder(capture=False) as recorder:
        wanted = run()[:rows].clone()
    stored = [cache.clone() for cache in caches]
    for cache, contents in zip(caches, before, strict=True):
        cache.copy_(contents)
    found.replays.append(shape)
    result = replay()
    found.all_replays = Graph.replays
    error = (result[:rows].float() - wanted.float()).abs().nan_to_num(float("inf")).max()
    if error:
        found.wrong.append(f"{shape}: error {float(error):.3g}")
    if not all(map(torch.equal, caches, stored)):
        found.wrong.append(f"{shape}: other pages")
    for difference in differences(graph.recorder, recorder):
        if difference not in found.differences:
            found.differences.append(difference)
    return result


@contextlib.contextmanager
def _watch_first(runner: Any, found: Rehearsal) -> Iterator[None]:
    """Give the first model runner its graphs, as `load_model` does on GPUs, and compare replays."""
    model = runner.model
    wrapper = graph_wrapper.CUDAGraphWrapper(
        model, runner.vllm_config, runtime_mode=CUDAGraphMode.FULL
    )
    call = graph_wrapper.CUDAGraphWrapper.__call__

    def compared(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = get_forward_context()
        key = context.batch_descriptor
        entry = self.concrete_cudagraph_entries.get(key)
        if context.cudagraph_runtime_mode != CUDAGraphMode.FULL:
            return self.runnable(*args, **kwargs)
        shape = (key.num_tokens, key.num_reqs)
        if entry is None:
            found.graphs.append(shape)
            output = call(self, *args, **kwargs)
            entry = self.concrete_cudagraph_entries[key]
            found.kernels.append({launch.kernel for launch in entry.cudagraph.recorder.launched()})
            return output
        return _compare(
            found, shape, entry.cudagraph, runner, context.attn_metadata,
            lambda: self.runnable(*args, **kwargs), lambda: call(self, *args, **kwargs),
        )  # fmt: skip

    graph_wrapper.CUDAGraphWrapper.__call__ = compared
    runner.model = wrapper
    try:
        yield
    finally:
        graph_wrapper.CUDAGraphWrapper.__call__ = call
        runner.model = model


@contextlib.contextmanager
def _watch_second(runner: Any, found: Rehearsal) -> Iterator[None]:
    """Compare the replays of the second model runner."""
    state, manager = runner.model_state, graph_manager.ModelCudaGraphManager
    prepare, replay = state.prepare_attn, manager.run_fullgraph
    last: Any = None

    def prepare_attn(
        input_batch: Any, mode: Any, tables: Any, slots: Any, *more: Any, **kw: Any
    ) -> Any:
        nonlocal last
        metadata = prepare(input_batch, mode, tables, slots, *more, **kw)
        last = (input_batch, slots, metadata)
        return metadata

    def run_fullgraph(self: Any, key: Any) -> Any:
        batch, slots, metadata = last

        def run() -> torch.Tensor:
            by_layer = graph_manager.build_slot_mappings_by_layer(slots, runner.kv_cache_config)
            with set_forward_context(
                metadata, runner.vllm_config, num_tokens=key.num_tokens, slot_mapping=by_layer
            ):
                return runner.model(
                    input_ids=batch.input_ids, positions=batch.positions,
                    inputs_embeds=None, intermediate_tensors=None,
                )  # fmt: skip

        return _compare(
            found, (key.num_tokens, key.num_reqs), self.graphs[key], runner, metadata,
            run, lambda: replay(self, key),
        )  # fmt: skip

    state.prepare_attn, manager.run_fullgraph = prepare_attn, run_fullgraph
    try:
        yield
        for key, graph in runner.cudagraph_manager.graphs.items():
            found.graphs.append((key.num_tokens, key.num_reqs))
            found.kernels.append({launch.kernel for launch in graph.recorder.launched()})
    finally:
        state.prepare_attn, manager.run_fullgraph = prepare, replay
        runner.cudagraph_manager.release_graphs()


def _fault(target: Any, name: str, wrong: Callable[..., Any]) -> Callable[[], Any]:
    """Make a fault: `wrong` replaces a function and gets the original as its first argument."""

    def plant() -> Any:
        original = getattr(target, name)
        return patch.object(target, name, lambda *args, **kwargs: wrong(original, *args, **kwargs))

    return plant


def _read_on_host(plan: Any, kernels: Any, layer: Any, metadata: Any, cache: Any) -> Any:
    metadata.max_query_len = min(metadata.max_query_len, int(metadata.seq_lens.max()))
    return plan(kernels, layer, metadata, cache)


def _read_list(plan: Any, kernels: Any, layer: Any, metadata: Any, cache: Any) -> Any:
    metadata.max_query_len = min(metadata.max_query_len, max(metadata.seq_lens.tolist()))
    return plan(kernels, layer, metadata, cache)


def _fresh_buffer(build: Any, builder: Any, *arguments: Any) -> Any:
    metadata = build(builder, *arguments)
    return replace(metadata, seq_lens=metadata.seq_lens.clone())


def _requests_of_batch(build: Any, builder: Any, *arguments: Any) -> Any:
    metadata, common = build(builder, *arguments), arguments[1]
    requests = int((common.query_start_loc_cpu.diff() > 0).sum())
    return replace(
        metadata,
        seq_lens=metadata.seq_lens[:requests],
        query_start_loc=metadata.query_start_loc[: requests + 1],
        block_table=metadata.block_table[:requests],
    )


class _Stale(dict[Any, Any]):
    """Plans of earlier steps."""

    made: dict[Any, Any] = {}  # noqa: RUF012 - shared on purpose

    def get(self, key: Any, default: Any = None) -> Any:
        return self.made.get(key[:-1], default)

    def __setitem__(self, key: Any, plan: Any) -> None:
        self.made[key[:-1]] = plan


def _stale_plan(build: Any, builder: Any, *arguments: Any) -> Any:
    plans = _Stale()
    plans.made = _Stale.made.setdefault(arguments[1].num_reqs, {})
    return replace(build(builder, *arguments), plans=plans)


def _keep_tensor(plan: Any, kernels: Any, layer: Any, metadata: Any, cache: Any) -> Any:
    if kernel_factory.is_capturing(cache.device):
        kept = _Stale.made.setdefault("lengths", metadata.seq_lens + 0)
        metadata = replace(metadata, seq_lens=kept[: len(metadata.seq_lens)])
    return plan(kernels, layer, metadata, cache)


FAULTS: dict[str, Callable[[], Any]] = {
    "reads on the host": _fault(gpu.GpuKernels, "plan", _read_on_host),
    "reads a list on the host": _fault(gpu.GpuKernels, "plan", _read_list),
    "metadata in a new buffer": _fault(backend.K8V4MetadataBuilder, "build", _fresh_buffer),
    "grid of this batch": _fault(backend.K8V4MetadataBuilder, "build", _requests_of_batch),
    "plan of an earlier step": _fault(backend.K8V4MetadataBuilder, "build", _stale_plan),
    "tensor of another graph": _fault(gpu.GpuKernels, "plan", _keep_tensor),
}
"""Faults that a rehearsal has to find."""
