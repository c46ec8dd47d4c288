# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels behind the attention backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from vllm import envs
from vllm.distributed.parallel_state import is_global_first_rank
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from vllm_hybrid_kv.attention import kernel_factory
from vllm_hybrid_kv.attention.backend import K8V4AttentionImpl, K8V4Metadata
from vllm_hybrid_kv.attention.flash import LONG_PREFILL
from vllm_hybrid_kv.attention.kernel_factory import Kernels, group_of, variant_of
from vllm_hybrid_kv.kernels import triton
from vllm_hybrid_kv.kernels.known_answer import Attend, Call


class GpuKernels(Kernels):
    """Runs the Triton kernels on a GPU, or in Triton's interpreter on a CPU.

    A step has up to three launches, each with its own division of work: decodes, prefills, and long
    prefills, which FlashAttention serves if the layer has one. Each launch finds its requests by
    their numbers of new tokens, so requests may have any order.
    """

    def __init__(self, *, debug: bool) -> None:
        super().__init__(triton, debug=debug)

    def warm_up(
        self,
        layers: Mapping[str, K8V4AttentionImpl],
        spec: AttentionSpec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_requests: int,
        decode_query_len: int,
    ) -> None:
        # Triton's interpreter needs seconds for a hundred tokens, so test only decoding there.
        interpreted = device.type == "cpu"
        name = "interpreter" if interpreted else torch.cuda.get_device_name(device)
        self.test(
            layers,
            spec.block_size,
            dtype,
            device,
            name,
            decode_query_len=decode_query_len,
            decodes_only=interpreted,
        )
        if interpreted:
            return
        shapes = {
            (layer.num_heads, layer.num_kv_heads, layer.head_size, layer.sliding_window)
            for layer in layers.values()
        }

        def plan() -> None:
            for num_heads, num_kv_heads, head_size, window in shapes:
                triton.warm_up_plans(
                    num_heads,
                    num_kv_heads,
                    head_size,
                    device,
                    max_requests=max_requests,
                    decode_query_len=decode_query_len,
                    window=window,
                )

        self.compile_first(plan)
        plan()

    @staticmethod
    def compile_first(launch: Callable[[], object]) -> None:
        """Compile the kernels that a function launches, in threads on NVIDIA GPUs.

        vLLM does not use threads for AMD GPUs, because LLVM can abort then, so neither do we.
        """
        threads = envs.VLLM_TRITON_JIT_WARMUP_NUM_THREADS
        if not current_platform.is_cuda() or threads <= 1:
            return
        # With a delay, nothing is shown if all kernels have been compiled already.
        options = {"delay": 1e-3, "mininterval": 0.0, "disable": not is_global_first_rank()}
        with tqdm(desc="Compiling k8v4 kernels", **options) as bar:

            def show(compiled: int, submitted: int) -> None:
                with bar.get_lock():
                    bar.total = submitted
                    bar.update(max(0, compiled - bar.n))

            triton.compile_in_threads(launch, threads, show)

    def test(
        self,
        layers: Mapping[str, K8V4AttentionImpl],
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        name: str,
        *,
        decode_query_len: int,
        decodes_only: bool = False,
    ) -> None:
        """Run every kernel that the layers may need, and compare the results with known answers."""

        def batches(layer_name: str) -> list[tuple[list[int], Attend]]:
            layer = layers[layer_name]
            decodes: Attend = partial(_attend_known, decodes=True)
            tests = [([decode_query_len], decodes)]
            if decodes_only:
                return tests
            if layer.flash is not None:
                # Pieces that are much shorter than usual: with 256 tokens, the long request has
                # three of them. With 1024, both requests are in one call.
                for piece in (256, 1024):
                    attend = partial(_attend_long_known, flash=layer.flash.function, piece=piece)
                    tests.append(([LONG_PREFILL], attend))
            # Batches with many row tiles use a second kernel, which does not split the keys.
            prefills = [-(-triton.MOST_ROWS[-1] // group_of(layer))]
            tests += [(prefills, partial(_attend_known, split=split)) for split in (True, False)]
            return tests

        variants = {
            layer_name: variant_of(layer, page_size, dtype, layer.num_kv_heads)
            for layer_name, layer in layers.items()
        }
        advice = "Serve the model with --kv-cache-dtype auto or fp8"
        for flash in {layer.flash for layer in layers.values()}:
            path = f"triton:{name}, decodes of {decode_query_len}"
            if flash is not None:
                path = f"{path}, FlashAttention {flash.version}"
            served = {key: one for key, one in variants.items() if layers[key].flash == flash}
            self.require_known_answers(path, served, batches, device, advice)

    def reserve(self, layer: K8V4AttentionImpl, device: torch.device) -> None:
        _scratch(layer, device)
        if layer.flash is not None:
            _prefill_workspace(layer, device)

    def plan(
        self, layer: K8V4AttentionImpl, metadata: K8V4Metadata, cache: torch.Tensor
    ) -> list[triton.LaunchPlan | triton.PrefillPlan]:
        most = metadata.decode_query_len
        counts = [b - a for a, b in pairwise(metadata.starts_on_host)]
        if max(counts, default=0) <= most or kernel_factory.is_capturing(cache.device):
            # The lengths of a captured batch are not those of its replays.
            return [self._plan(layer, metadata, cache, most=metadata.max_query_len)]
        plans: list[triton.LaunchPlan | triton.PrefillPlan] = []
        if any(0 < count <= most for count in counts):
            plans.append(self._plan(layer, metadata, cache, most=most))
        long: list[triton.Prefill] = []
        if layer.flash is not None and metadata.causal and metadata.lengths_on_host:
            long = [
                triton.Prefill(
                    request,
                    metadata.starts_on_host[request],
                    count,
                    metadata.lengths_on_host[request],
                )
                for request, count in enumerate(counts)
                if count > most and count >= LONG_PREFILL
            ]
        longest = LONG_PREFILL - 1 if long else max(metadata.max_query_len, triton.MOST_ROWS[-1])
        if sum(count > most for count in counts) > len(long):
            plans.append(self._plan(layer, metadata, cache, least=most + 1, most=longest))
        if long:
            plans.append(
                triton.plan_prefill(
                    long,
                    layer.num_heads,
                    layer.head_size,
                    cache.device,
                    window=layer.sliding_window,
                )
            )
        return plans

    def _plan(
        self,
        layer: K8V4AttentionImpl,
        metadata: K8V4Metadata,
        cache: torch.Tensor,
        *,
        most: int,
        least: int = 0,
    ) -> triton.LaunchPlan:
        """Plan a launch for the requests with `least` to `most` new tokens."""
        return triton.plan_attention(
            metadata.seq_lens,
            metadata.query_start_loc,
            metadata.num_tokens,
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_size,
            min_query_len=least,
            max_query_len=most,
            decodes=most <= metadata.decode_query_len,
            causal=metadata.causal,
            window=layer.sliding_window,
            scratch=_scratch(layer, cache.device),
        )

    def launch(
        self, plan: Any, layer: K8V4AttentionImpl, *batch: torch.Tensor, **options: Any
    ) -> None:
        if not isinstance(plan, triton.PrefillPlan):
            super().launch(plan, layer, *batch, **options)
            return
        assert layer.flash is not None
        triton.prefill_attention(
            *batch,
            plan=plan,
            flash=layer.flash.function,
            workspace=_prefill_workspace(layer, batch[0].device),
            **options,
        )


def _workspace(
    device: torch.device, *shapes: tuple[tuple[int, ...], torch.dtype]
) -> list[torch.Tensor]:
    """Return tensors for one call of a kernel.

    All layers share vLLM's workspace, which cannot grow after the warm-up. So the sizes depend on
    the layer and the device, but not on the batch.
    """
    if is_workspace_manager_initialized():
        return current_workspace_manager().get_simultaneous(*shapes)
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]


def _scratch(layer: K8V4AttentionImpl, device: torch.device) -> torch.Tensor:
    """Return float32 scratch memory for one call of `paged_attention`."""
    numbers = triton.largest_scratch(layer.num_kv_heads, layer.head_size, device)
    return _workspace(device, ((numbers,), torch.float32))[0]


def _prefill_workspace(layer: K8V4AttentionImpl, device: torch.device) -> list[torch.Tensor]:
    """Return the workspace for one call of `prefill_attention`."""
    shapes = triton.prefill_workspace(layer.num_heads, layer.num_kv_heads, layer.head_size)
    return _workspace(device, *shapes)


def _attend_known(call: Call, *, decodes: bool = False, split: bool | None = None) -> None:
    starts = call["query_start_loc"]
    tokens, num_heads, head_size = call["query"].shape
    plan = triton.plan_attention(
        call["seq_lens"],
        starts,
        tokens,
        num_heads,
        call["cache"].shape[1],
        head_size,
        max_query_len=int(starts.diff().max()),
        decodes=decodes,
        window=call["window"],
        split=split,
    )
    triton.paged_attention(**call, plan=plan)


def _attend_long_known(call: Call, *, flash: triton.Flash, piece: int) -> None:
    query, cache, starts = call["query"], call["cache"], call["query_start_loc"].tolist()
    _, num_heads, head_size = query.shape
    prefills = [
        triton.Prefill(request, start, end - start, length)
        for request, ((start, end), length) in enumerate(
            zip(pairwise(starts), call["seq_lens"].tolist(), strict=True)
        )
    ]
    plan = triton.plan_prefill(
        prefills, num_heads, head_size, query.device, window=call["window"], rows=256, piece=piece
    )
    shapes = triton.prefill_workspace(num_heads, cache.shape[1], head_size, rows=256, piece=piece)
    workspace = [torch.empty(shape, dtype=dtype, device=query.device) for shape, dtype in shapes]
    triton.prefill_attention(**call, plan=plan, flash=flash, workspace=workspace)
