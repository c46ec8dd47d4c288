# SPDX-License-Identifier: Apache-2.0
"""What a refusal must not say: Python's own messages, and words about another device."""

from __future__ import annotations

import re

FORBIDDEN = (
    r"Traceback",
    r"NoneType",
    r"has no attribute",
    r"object is not",
    r"not subscriptable",
    r"unexpected keyword",
    r"positional argument",
    r"name '\w+' is not defined",
    r"cannot import name",
    r"No module named",
    r"KeyError|IndexError|AttributeError|TypeError|RuntimeError|AssertionError|ImportError",
    r"meta tensor",
    r"on meta",
    r"\bCPUs?\b",
    r"\bcpu\b",
    r"is_act_and_mul",
    r"\bxpu\b",
    r"empty sequence",
    r"0x[0-9a-f]{6,}",
    r"/tmp/",
    r"cannot be built without weights",
    r"does not build from this configuration",
    r"\(\w+\.py, line \d+\)",
    r"AttentionSelectorConfig",
)
"""Patterns of which none may occur in what a plan for GPUs says."""


def unfit(text: str) -> list[str]:
    """Return which of `FORBIDDEN` a refusal has; one without words has `no words`."""
    found = [pattern for pattern in FORBIDDEN if re.search(pattern, text)]
    return found if len(text.split()) > 2 else [*found, "no words"]
