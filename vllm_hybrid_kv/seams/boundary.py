# SPDX-License-Identifier: Apache-2.0
"""The seam that has a setting say how many layers at each end stay unquantised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm_hybrid_kv.seams.base import MethodRebinding, Notice, Seam, Target

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_asked: ContextVar[int | None] = ContextVar("boundary_layers", default=None)


@contextmanager
def boundary_layers(asked: int | None) -> Iterator[None]:
    """Have the engine that is configured meanwhile leave so many layers at each end unquantised.

    Args:
        asked: How many; None for as many as vLLM would.
    """
    token = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(token)


def boundary_seam(get_boundary_layers: Target) -> Seam:
    """Let the setting take the place of vLLM's number.

    Args:
        get_boundary_layers: `TurboQuantConfig.get_boundary_skip_layers`.
    """

    def make(original: Any) -> Any:
        def get_boundary_skip_layers(model_config: ModelConfig, n: int = 2) -> list[str]:
            asked = _asked.get()
            layers: list[str] = original(model_config, n if asked is None else asked)
            return layers

        return get_boundary_skip_layers

    return Seam(
        "boundary_layers",
        Notice(
            replaces="TurboQuantConfig.get_boundary_skip_layers, which it hands the number",
            why="vLLM's number is fixed, was found for coarser presets, and no option lowers it",
            upstream="vllm-project/vllm#39931 (hybrid models are let off the rule)",
            until="vLLM lets users choose it",
        ),
        [MethodRebinding(get_boundary_layers, make)],
    )
