# SPDX-License-Identifier: Apache-2.0
"""Check messages that refuse a model: no Python errors, nothing about other devices."""

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
"""Patterns that must not occur in an error message of a plan for GPUs."""


def unfit(text: str) -> list[str]:
    """Return the patterns of `FORBIDDEN` that match, and `no words` if the text is too short."""
    found = [pattern for pattern in FORBIDDEN if re.search(pattern, text)]
    return found if len(text.split()) > 2 else [*found, "no words"]
