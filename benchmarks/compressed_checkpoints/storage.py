# SPDX-License-Identifier: Apache-2.0
"""Round states to 8 bits and restore them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from vllm_hybrid_kv.kernels.reference import rotate

LARGEST = 3e38
"""Larger magnitudes could overflow when they are restored."""


@dataclass(frozen=True)
class Rule:
    """How states are stored.

    Attributes:
        steps: The largest code: 127 for 8 bits, 7 for 4 bits, 0 to store zeros.
        rotated: Whether rows are rotated before they are rounded to codes.
        bfloat16: Whether rows are stored in bfloat16, without codes.
        conv: Whether the states of the convolution are stored by the same rule.
        running: Whether the recurrent state is rounded after every token, not only at rest.
    """

    steps: int = 127
    rotated: bool = False
    bfloat16: bool = False
    conv: bool = False
    running: bool = False


RULES = {
    "bfloat16": Rule(bfloat16=True),
    "int8": Rule(),
    "int8, rotated": Rule(rotated=True),
    "int8, convolution too": Rule(conv=True),
    "int4, rotated": Rule(7, rotated=True),
    "zeros": Rule(0),
    "int8, running": Rule(running=True),
}


def compress(rows: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows to codes, with one scale per row.

    A scale has only 8 significant bits, so code * scale is exact in float32. Without a rotation,
    a restored row therefore compresses to the same codes and scale again.

    Args:
        rows: float32 [..., D]. Rows whose magnitudes are all below 1e-36 are stored as zeros.
        rule: How to store the rows.

    Returns:
        int8 codes [..., D] and bfloat16 scales [..., 1].

    Raises:
        ValueError: A number is not finite, or its magnitude is above `LARGEST`.
    """
    rows = rotate(rows) if rule.rotated else rows
    largest = rows.abs().amax(-1, keepdim=True)
    if not bool((largest <= LARGEST).all()):
        raise ValueError(f"states must be finite and at most {LARGEST}, got {largest.max()}")
    scales = (largest / max(rule.steps, 1)).to(torch.bfloat16)
    scales[scales < torch.finfo(torch.bfloat16).tiny] = 0
    codes = (rows / scales).where(scales > 0, 0).round().clamp(-rule.steps, rule.steps)
    return codes.to(torch.int8), scales


def restore(codes: torch.Tensor, scales: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Return the float32 rows [..., D] of `codes` and `scales`; see `compress`."""
    rows = codes.to(torch.float32) * scales.to(torch.float32)
    return rotate(rows) if rule.rotated else rows


def stored(rows: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Return float32 rows [..., D] as they are after they were stored and restored."""
    if rule.bfloat16:
        return rows.to(torch.bfloat16).to(torch.float32)
    return restore(*compress(rows, rule), rule)


def stored_state(state: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Store and restore a recurrent state [..., key dims, value dims].

    vLLM's layout is [..., value dims, key dims], so a row has the key dims of one value dim.
    """
    return stored(state.mT.contiguous(), rule).mT


def store_checkpoint(cache: Any, rule: Rule, head_size: int) -> None:
    """Store and restore the states in a `transformers.DynamicCache`, in place.

    `head_size` channels of the convolution's state have one scale, for each token.
    """
    for layer in state_layers(cache):
        if not rule.running:
            state = layer.recurrent_states[0]
            state.copy_(stored_state(state, rule))
        if rule.conv:
            rows = layer.conv_states[0].mT.unflatten(-1, (-1, head_size))
            layer.conv_states[0].copy_(stored(rows, rule).flatten(-2).mT)


def state_layers(cache: Any) -> list[Any]:
    """Return the layers of a `transformers.DynamicCache` that hold states."""
    return [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]


def running_delta_rule(round_state: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """Make a function that replaces transformers' `torch_chunk_gated_delta_rule`.

    It computes one token after another, and passes the state [B, heads, key dims, value dims]
    through `round_state` after each.
    """

    def delta_rule(
        *tensors: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
        initial_state: torch.Tensor | None, **how: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        outputs, state = [], initial_state
        for parts in zip(*(part.split(1, 1) for part in (*tensors, g, beta)), strict=True):
            output, state = qwen3_next.torch_recurrent_gated_delta_rule(
                *parts[:3], g=parts[3], beta=parts[4], initial_state=state, **how
            )
            state = round_state(state)
            outputs.append(output)
        return torch.cat(outputs, 1), state

    return delta_rule
