# SPDX-License-Identifier: Apache-2.0
"""The patch that lets CPU engines discard the samples of seeded requests."""

from __future__ import annotations

from typing import Any

import torch

from vllm_hybrid_kv.patches.context import Context
from vllm_hybrid_kv.patches.mechanism import Patch


class RewindableGenerator(torch.Generator):
    """A CPU generator that vLLM's model runner can rewind after it has discarded a sample.

    To rewind, the runner subtracts one draw from a generator's offset. CPU generators have no
    offset and raise an error. The runner discards only samples of incomplete prompts, so all draws
    since a request joined the batch are discarded. Rewinding returns to the state before them.
    """

    _joined: torch.Tensor

    def join_batch(self) -> None:
        """Save the state that `set_offset` returns to."""
        self._joined = self.get_state()

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        """Return to the state in which the request joined the batch."""
        self.set_state(self._joined)


def seeded_sampling_patch(context: Context) -> Patch:
    """Keep seeded requests with chunked prompts from ending a CPU engine with an error."""

    def add_request(original: Any, self: Any, request: Any) -> Any:
        generator = request.generator
        if generator is not None and generator.device.type == "cpu":
            if not isinstance(generator, RewindableGenerator):
                rewindable = RewindableGenerator(device="cpu")
                rewindable.set_state(generator.get_state())
                request.generator = generator = rewindable
            generator.join_batch()
        return original(self, request)

    return Patch(
        "seeded_sampling",
        replaces="InputBatch.add_request",
        why="after a chunk of a prompt the runner rewinds a request's generator by its offset, "
        "which CPU generators do not have: the error ends the engine for all requests",
        until="vLLM's model runner rewinds CPU generators",
        edits=[context.rebind("InputBatch.add_request", add_request)],
    )
