# SPDX-License-Identifier: Apache-2.0
"""What keeps an evaluation from going on, in words for the person who asked for it."""

from __future__ import annotations

from vllm_hybrid_kv.tools.output import ToolError


class EvaluationError(ToolError):
    """An evaluation cannot start or go on."""


class SubjectError(EvaluationError):
    """One cache cannot be measured; others may."""
