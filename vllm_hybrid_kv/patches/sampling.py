# SPDX-License-Identifier: Apache-2.0
"""The patch that lets CPU engines discard the samples of seeded requests."""

from __future__ import annotations

from typing import Any

import torch

from vllm_hybrid_kv.patches.base import MethodRebinding, Patch, PatchInfo, Target


class RewindableGenerator(torch.Generator):
    """A CPU generator that vLLM's model runner can rewind after it has discarded a sample.

    The runner subtracts one draw from the offset of a generator. CPU generators have none, and
    raise. It discards only samples of prompts that are not computed to their end, so every draw
    since a request joined the batch is discarded up to then: rewinding means returning there.
    """

    _joined: torch.Tensor

    def join_batch(self) -> None:
        """Save the state that `set_offset` returns to."""
        self._joined = self.get_state()

    def get_offset(self) -> int:
        """Return 0, as CPU generators have no offset."""
        return 0

    def set_offset(self, offset: int) -> None:
        """Return to the state in which the request joined the batch."""
        self.set_state(self._joined)


def seeded_sampling_patch(add_request: Target) -> Patch:
    """Keep a seeded request with a chunked prompt from ending a CPU engine.

    Args:
        add_request: `InputBatch.add_request`.
    """

    def make(original: Any) -> Any:
        def add(self: Any, request: Any) -> int:
            generator = request.generator
            if generator is not None and generator.device.type == "cpu":
                if not isinstance(generator, RewindableGenerator):
                    rewindable = RewindableGenerator(device="cpu")
                    rewindable.set_state(generator.get_state())
                    request.generator = generator = rewindable
                generator.join_batch()
            index: int = original(self, request)
            return index

        return add

    return Patch(
        "seeded_sampling",
        PatchInfo(
            replaces="InputBatch.add_request, which it wraps",
            why="after a chunk of a prompt the runner rewinds a request's generator by its offset, "
            "which CPU generators do not have: the error ends the engine for all requests",
            upstream="none known",
            until="vLLM's model runner rewinds CPU generators",
        ),
        [MethodRebinding(add_request, make)],
    )
