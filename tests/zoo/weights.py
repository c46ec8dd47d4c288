# SPDX-License-Identifier: Apache-2.0
"""Draw random weights that make a model's output depend on its KV cache.

vLLM's own dummy weights are so small that all tokens are equally likely. With these weights the
outputs of attention and MLP are as large as their inputs. Attention scores have a standard
deviation of about 1, and that of logits is about `LOGIT_SIZE`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

LOGIT_SIZE = 4.0


def fill(model: Any) -> None:
    """Replace all weights of a model that vLLM built with the same random weights every time."""
    generator = torch.Generator().manual_seed(0)
    kinds = {
        f"{name}.{own}" if name else own: type(module).__name__
        for name, module in model.named_modules()
        for own, _ in module.named_parameters(recurse=False)
    }
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            weight.data.copy_(_drawn(name, weight, kinds[name], generator))


def _drawn(name: str, weight: torch.Tensor, kind: str, generator: torch.Generator) -> torch.Tensor:
    own = name.rsplit(".", 1)[-1]
    normal = torch.randn(weight.shape, generator=generator)
    uniform = torch.rand(weight.shape, generator=generator)
    if own == "A_log":
        return (1 + 15 * uniform).log()
    if own == "A":
        return -(1 + 15 * uniform)  # Mamba's loaders negate A.
    if own in ("dt_bias", "e_score_correction_bias") or name.endswith("dt_proj.bias"):
        return normal * 0.1 - (3.0 if "dt" in name else 0.0)
    if "norm" in name.lower() or "Norm" in kind:
        return torch.zeros(weight.shape) if "Gemma" in kind or own == "bias" else 1 + 0.1 * normal
    if own in ("D", "scale", "layer_scalar", "per_layer_scale") or weight.dim() == 0:
        return torch.ones(weight.shape)
    if weight.dim() == 1:
        return 0.1 * normal
    if "Embedding" in kind and "LMHead" not in kind:
        return normal * (LOGIT_SIZE / math.sqrt(weight.shape[-1]))
    size = LOGIT_SIZE if "LMHead" in kind else 1.0
    return normal * (size / math.sqrt(weight.shape[-1]))
