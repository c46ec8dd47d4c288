# SPDX-License-Identifier: Apache-2.0
"""Attention for training on a CPU; torch's is slow for short sequences and sliding windows."""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SHORT = 256
"""Tokens up to which the whole matrix of scores is fastest."""


def use_short_attention(model: PreTrainedModel) -> None:
    """Make a model of transformers use `attend`; its sequences must not be padded."""
    ALL_ATTENTION_FUNCTIONS.register("recall", attend)
    model.config._attn_implementation = "recall"


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: None,
    scaling: float,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Return causal attention, [batch, tokens, heads, size] from [batch, heads, tokens, size]."""
    length = query.shape[2]
    if sliding_window is not None and length > 2 * sliding_window:
        out = _banded(query, key, value, scaling, sliding_window)
    elif length <= SHORT:
        out = _whole(query, key, value, scaling, sliding_window)
    else:
        out = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
    return out.transpose(1, 2), None


def _weigh(scores: torch.Tensor, seen: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    hidden = torch.zeros(seen.shape, dtype=scores.dtype).masked_fill(~seen, -1e9)
    return (scores + hidden).softmax(-1) @ value


def _whole(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    batch, heads, length, size = query.shape
    group = heads // key.shape[1]
    place = torch.arange(length)
    back = place[:, None] - place
    seen = (back >= 0) & (back < (window or length))
    query = query.reshape(batch, heads // group, group * length, size) * scaling
    return _weigh(query @ key.mT, seen.repeat(group, 1), value).view(batch, heads, length, size)


def _banded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int
) -> torch.Tensor:
    """Attend from the tokens of each window to that window and the one before."""
    batch, heads, length, size = query.shape
    count = length // window

    def two_windows(x: torch.Tensor) -> torch.Tensor:
        x = x.repeat_interleave(heads // x.shape[1], 1).view(-1, count, window, size)
        return torch.cat((functional.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1], x), 2)

    back = torch.arange(window)[:, None] - torch.arange(-window, window)
    seen = ((back >= 0) & (back < window)).repeat(count, 1, 1)
    seen[0, :, :window] = False
    query = (query * scaling).reshape(-1, count, window, size)
    out = _weigh(query @ two_windows(key).mT, seen, two_windows(value))
    return out.reshape(batch, heads, length, size)
