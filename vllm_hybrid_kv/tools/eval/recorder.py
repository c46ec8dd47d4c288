# SPDX-License-Identifier: Apache-2.0
"""Scores the predictions of a prompt in vLLM's workers, which have whole distributions.

vLLM computes the logits of all prompt positions if a request wants log-probabilities of its
prompt, but returns only a few. `Recorder`, a `worker_extension_cls` of vLLM, wraps the model's
head. For the reference it saves the hidden states that the head gets, a few KiB per token. For
another cache it also applies the head to those, and compares both distributions. This is exact
for any vocabulary, on the rank that has the logits. One request runs at a time, so that rows
arrive in the order of positions.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_hybrid_kv.tools.eval.scores import Scores

HIDDEN_STATES = "hidden_states"


@dataclass
class _Request:
    """The current request.

    Attributes:
        tokens: The prompt.
        is_reference: Whether its hidden states are saved.
        states: The reference's hidden states, in chunks.
        position: The position of the next row.
        scores: Scores on this rank; empty if it gets no logits.
    """

    tokens: torch.Tensor
    is_reference: bool
    states: list[torch.Tensor]
    position: int = 0
    scores: Scores = field(default_factory=Scores)


class _Head:
    """Replaces a model's head, and scores its logits while vLLM scores a prompt."""

    def __init__(self, runner: Any) -> None:
        self.request: _Request | None = None
        self._scoring = False
        self._compute: Callable[..., torch.Tensor | None] = runner.model.compute_logits
        runner.model.compute_logits = self
        # vLLM has two model runners. In the second, ranks without the head have no such worker.
        owner, name = (
            (runner, "_get_prompt_logprobs_dict")
            if hasattr(runner, "_get_prompt_logprobs_dict")
            else (runner.prompt_logprobs_worker, "compute_prompt_logprobs")
        )
        if owner is None:
            return
        original = getattr(owner, name)

        @functools.wraps(original)
        def score_prompt(*args: Any, **kwargs: Any) -> Any:
            # In one runner the first argument is the bound method that this object replaces.
            self._scoring = True
            try:
                return original(*args, **kwargs)
            finally:
                self._scoring = False

        setattr(owner, name, score_prompt)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = self._compute(hidden_states, *args, **kwargs)
        if self._scoring and self.request is not None:
            self._score(self.request, hidden_states, logits)
        return logits

    def _score(
        self, request: _Request, hidden_states: torch.Tensor, logits: torch.Tensor | None
    ) -> None:
        begin = request.position
        end = request.position = begin + len(hidden_states)
        reference = None
        if request.is_reference:
            request.states.append(hidden_states.to("cpu", copy=True))
        else:
            # On every rank, because each rank of a tensor-parallel group has a part of the head.
            states = request.states[0][begin:end].to(hidden_states.device)
            reference = self._compute(states)
        if logits is None:
            return
        # The last position of a prompt has no next token.
        targets = request.tokens[begin + 1 : end + 1].to(logits.device)
        rows = len(targets)
        request.scores.add(logits[:rows], targets, None if reference is None else reference[:rows])


class Recorder:
    """Methods that vLLM adds to its workers, for `collective_rpc`."""

    def hybrid_kv_begin(self, tokens: list[int], file: str, is_reference: bool) -> None:
        """Score the next request.

        Args:
            tokens: Its prompt.
            file: The file of the reference's hidden states, to be written or read.
            is_reference: Whether this is the reference.
        """
        head = self.__dict__.setdefault("_hybrid_kv_head", None)
        if head is None:
            head = self.__dict__["_hybrid_kv_head"] = _Head(self.model_runner)  # type: ignore[attr-defined]
        states = [] if is_reference else [load_file(file)[HIDDEN_STATES]]
        head.request = _Request(torch.tensor(tokens), is_reference, states)

    def hybrid_kv_end(self, file: str) -> dict[str, Any] | None:
        """Return the fields of the request's `Scores`, or None on ranks without logits."""
        head: _Head = self.__dict__["_hybrid_kv_head"]
        request, head.request = head.request, None
        if request is None or not request.scores:
            return None
        if request.is_reference:
            partial = Path(f"{file}.{os.getpid()}")
            save_file({HIDDEN_STATES: torch.cat(request.states)}, partial)
            partial.replace(file)
        return asdict(request.scores)

    def hybrid_kv_layers(self) -> list[list[str]]:
        """Return the names of this rank's quantised attention layers, and of the others."""
        from vllm.v1.kv_cache_interface import AttentionSpec, KVQuantMode

        quantised: list[str] = []
        unquantised: list[str] = []
        for group in self.model_runner.kv_cache_config.kv_cache_groups:  # type: ignore[attr-defined]
            spec = group.kv_cache_spec
            specs = getattr(spec, "kv_cache_specs", None) or dict.fromkeys(group.layer_names, spec)
            for name in group.layer_names:
                if isinstance(specs[name], AttentionSpec):
                    mode = specs[name].kv_quant_mode
                    (unquantised if mode == KVQuantMode.NONE else quantised).append(name)
        return [quantised, unquantised]
