# SPDX-License-Identifier: Apache-2.0
"""What a recorded model is asked."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import torch

PROMPTS, TOKENS = 64, 1024

EVERY_RULE = 4
"""Prompts for which every rule is measured, and not ours and vLLM's alone."""


def of_model(folder: Path) -> torch.Tensor:
    """Return int64 [PROMPTS, TOKENS]: text of Python's documentation by the model's tokenizer."""
    from transformers import AutoTokenizer

    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = AutoTokenizer.from_pretrained(folder)(text[: 8 * PROMPTS * TOKENS])["input_ids"]
    return torch.tensor(ids[: PROMPTS * TOKENS]).view(PROMPTS, TOKENS)
