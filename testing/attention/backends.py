# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 - the environment and modules must be prepared before vLLM is imported
"""Run our GPU backend and vLLM's TurboQuant backend ("stock") on the same batches.

Metadata builders, implementations and kernels are the real ones and run in Triton's interpreter.
Two parts are replaced: Triton, which vLLM disables on CPUs, and FlashAttention, which needs a GPU.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

if os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("import this module only in a process that interprets Triton")
# With this setting our backend runs the GPU kernels in the interpreter.
os.environ["VLLM_HYBRID_KV_CPU_ISA"] = "interpreter"
os.environ["VLLM_PLUGINS"] = ""

import torch
import triton
import triton.language as tl
import vllm.triton_utils

from testing.attention import steps
from testing.attention.steps import Step

vllm.triton_utils.triton = triton
vllm.triton_utils.tl = tl
# Stock's backend asks vLLM's platform about AMD GPUs, which loads `vllm._C`. On a CPU without
# bfloat16 instructions, another library has already registered the operators of `vllm._C`.
# PyTorch aborts a process that registers operators twice.
if not torch.cpu._is_avx512_bf16_supported():
    sys.modules["vllm._C"] = ModuleType("vllm._C")
# vLLM's workspace calls this before it grows, but a CPU has no accelerator cache.
torch.accelerator.empty_cache = lambda: None

from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends import turboquant_attn as stock_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode

from vllm_hybrid_kv.attention.backend import K8V4AttentionImpl, K8V4MetadataBuilder
from vllm_hybrid_kv.kernels import k8v4

HEADS, KV_HEADS, HEAD_SIZE, PAGE = 4, 2, 64, 16
SCALE = HEAD_SIZE**-0.5
DTYPE = torch.bfloat16


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: dict[str, Any]
) -> torch.Tensor:
    """Compute float32 attention of a request's last tokens to all of its keys and values."""
    group = query.shape[1] // key.shape[1]
    key = key.float().repeat_interleave(group, 1)
    value = value.float().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * SCALE
    cap = layer.get("logits_soft_cap")
    if cap:
        scores = torch.tanh(scores / cap) * cap
    queries, keys = scores.shape[1:]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None, :]
    hidden = distance < 0
    if layer.get("sliding_window"):
        hidden |= distance >= layer["sliding_window"]
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
    """Stand in for FlashAttention, which vLLM's backend calls for prefills."""
    assert options["causal"]
    out = torch.empty_like(q)
    starts = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    for (q0, k0), (q1, k1) in itertools.pairwise(starts):
        out[q0:q1] = exact_attention(q[q0:q1], k[k0:k1], v[k0:k1], {}).to(q.dtype)
    return out


def vllm_config(max_model_len: int = 1024) -> Any:
    """Return the parts of an engine's configuration that builders and implementations read."""
    # Without a platform, vLLM needs an explicit device.
    config = VllmConfig(device_config=DeviceConfig(device="cpu"))
    config.model_config = SimpleNamespace(
        max_model_len=max_model_len, dtype=DTYPE, get_num_attention_heads=lambda parallel: HEADS
    )
    config.scheduler_config.max_num_batched_tokens = 2048
    # Few splits, because each split takes time in the interpreter.
    config.attention_config.tq_max_kv_splits_for_cuda_graph = 2
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
    """One layer of a backend: its metadata builder and its implementation.

    Args:
        name: "ours" or "stock".
        config: The engine's configuration.
        parameters: The layer's parameters.
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
        """Allocate pages for a number of tokens, in the backend's layout."""
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
        query, key, value = tensors
        self.impl.forward(self.layer, query, key, value, cache, metadata, out)
        return out


@dataclass
class Texts:
    """Random queries, keys and values for all requests of one step.

    Attributes:
        key, value: bf16 [all tokens, KV_HEADS, HEAD_SIZE].
        query: bf16 [new tokens, HEADS, HEAD_SIZE].
        new: Indices of the new tokens among all tokens.
    """

    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor
    new: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Query, key and value of the new tokens."""
        return [self.query, self.key[self.new], self.value[self.new]]


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
    """Return the largest relative error over all tokens and heads."""
    errors = (out.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return float(errors.max())


def stored(backend: Backend, step: Step) -> tuple[Any, Texts, torch.Tensor]:
    """Store random tokens for a step. Returns the builders' input, the tokens and the cache."""
    common, slots = steps.common_metadata(step, PAGE)
    made = texts(step)
    cache = backend.cache(int(slots.max()) + 1)
    backend.store(made.key, made.value, cache, slots)
    return common, made, cache
