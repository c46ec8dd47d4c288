# SPDX-License-Identifier: Apache-2.0
"""What keeps an evaluation from going on, in words for the person who asked for it."""

from __future__ import annotations


class EvaluationError(ValueError):
    """An evaluation cannot start or go on."""


class SubjectError(EvaluationError):
    """One cache cannot be measured; others may."""
