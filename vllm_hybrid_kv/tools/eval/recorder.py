# SPDX-License-Identifier: Apache-2.0
"""Scores a prompt's predictions in vLLM's workers, where whole distributions are.

vLLM computes the logits of a prompt's positions when a request asks for log-probabilities of the
prompt, and hands out a few of them. `Recorder` stands beside the model's head then. Of the
reference it keeps the hidden states that the head was given, a few KiB a token; for another cache
it gives those to the head once more, and compares: exact for any vocabulary, on whichever rank the
logits are. One request runs at a time, so that rows come in the order of positions.

This is vLLM's own way in: `worker_extension_cls`.
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

from vllm_hybrid_kv.tools.eval.scores import Scores, score

HIDDEN_STATES = "hidden_states"


@dataclass
class _Request:
    """The one that runs.

    Attributes:
        tokens: The prompt.
        keep: Whether the hidden states are kept: it is the reference.
        states: Those kept so far, a chunk each; or those of the reference.
        position: Of the next row.
        scores: So far; of this rank, which may get no logits.
    """

    tokens: torch.Tensor
    keep: bool
    states: list[torch.Tensor]
    position: int = 0
    scores: Scores = field(default_factory=lambda: Scores([], [], []))


class _Head:
    """Stands in the place of a model's head, and scores while a prompt is scored."""

    def __init__(self, runner: Any) -> None:
        self.request: _Request | None = None
        self._scoring = False
        self._compute: Callable[..., torch.Tensor | None] = runner.model.compute_logits
        runner.model.compute_logits = self
        # vLLM has two model runners. Of the second, ranks without the head have no such worker.
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
            # The first argument of one of them is the bound method that this object replaces.
            self._scoring = True
            try:
                return original(*args, **kwargs)
            finally:
                self._scoring = False

        setattr(owner, name, score_prompt)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = self._compute(hidden_states, *args, **kwargs)
        if self._scoring and self.request is not None:
            self._take(self.request, hidden_states, logits)
        return logits

    def _take(
        self, request: _Request, hidden_states: torch.Tensor, logits: torch.Tensor | None
    ) -> None:
        begin = request.position
        end = request.position = begin + len(hidden_states)
        reference = None
        if request.keep:
            request.states.append(hidden_states.to("cpu", copy=True))
        else:
            # Every rank of a tensor-parallel group has part of the head.
            theirs = request.states[0][begin:end].to(hidden_states.device)
            reference = self._compute(theirs)
        if logits is None:
            return
        # The last row has no token to come, if it is there at all.
        targets = request.tokens[begin + 1 : end + 1].to(logits.device)
        rows = len(targets)
        found = score(logits[:rows], targets, None if reference is None else reference[:rows])
        request.scores.logprobs.extend(found.logprobs)
        request.scores.divergences.extend(found.divergences)
        request.scores.agreements.extend(found.agreements)


class Recorder:
    """Methods that vLLM's worker gets; callable by `collective_rpc`."""

    def hybrid_kv_begin(self, tokens: list[int], file: str, keep: bool) -> None:
        """Score the next request.

        Args:
            tokens: Its prompt.
            file: Where the reference's hidden states are, or are to be kept.
            keep: Whether this is the reference.
        """
        head = self.__dict__.setdefault("_hybrid_kv_head", None)
        if head is None:
            head = self.__dict__["_hybrid_kv_head"] = _Head(self.model_runner)  # type: ignore[attr-defined]
        states = [] if keep else [load_file(file)[HIDDEN_STATES]]
        head.request = _Request(torch.tensor(tokens), keep, states)

    def hybrid_kv_end(self, file: str) -> dict[str, Any] | None:
        """Return the scores of the request, as `Scores` has them, on the rank that has them."""
        head: _Head = self.__dict__["_hybrid_kv_head"]
        request, head.request = head.request, None
        if request is None or not request.scores.logprobs:
            return None
        if request.keep:
            partial = Path(f"{file}.{os.getpid()}")
            save_file({HIDDEN_STATES: torch.cat(request.states)}, partial)
            partial.replace(file)
        return asdict(request.scores)

    def hybrid_kv_layers(self) -> list[list[str]]:
        """Name this rank's attention layers whose cache is quantised, and the others."""
        from vllm.v1.kv_cache_interface import AttentionSpec, KVQuantMode

        quantised: list[str] = []
        whole: list[str] = []
        for group in self.model_runner.kv_cache_config.kv_cache_groups:  # type: ignore[attr-defined]
            spec = group.kv_cache_spec
            by_layer = getattr(spec, "kv_cache_specs", None) or dict.fromkeys(
                group.layer_names, spec
            )
            for name in group.layer_names:
                if isinstance(by_layer[name], AttentionSpec):
                    mode = by_layer[name].kv_quant_mode
                    (whole if mode == KVQuantMode.NONE else quantised).append(name)
        return [quantised, whole]
