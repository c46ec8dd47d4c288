# SPDX-License-Identifier: Apache-2.0
"""Run one engine in a child process, and score its predictions in vLLM's workers.

If a request wants log-probabilities of its prompt, vLLM computes the logits of all prompt
positions, but returns only a few. `Recorder`, a `worker_extension_cls` of vLLM, wraps the model's
head. With the reference cache, it saves the inputs of the head (hidden states, a few KiB per
token). With any other cache, it also applies the head to the saved states. The rank that has the
logits then compares the two distributions over the whole vocabulary. One request runs at a time,
so that logits arrive in the order of positions.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch

from vllm_hybrid_kv.tools.eval.scores import score

HIDDEN_STATES = "hidden_states"

TOLERANCE = 1e-3
"""Largest accepted difference, absolute and relative, between the log-probabilities that vLLM and
the recorder compute in float32 from the same logits."""

REPORT = "report this with the versions of vLLM and vllm-hybrid-kv"


def run(send: Callable[..., None], job_file: str) -> None:
    """Run an engine for a job of `run.Run`; write its facts and the scores of each window.

    Raises:
        ValueError: A token is not in the model's vocabulary.
        RuntimeError: The recorder saw other logits than vLLM used.
    """
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    job = json.loads(Path(job_file).read_text())
    llm = LLM(**job["engine"], worker_extension_cls=f"{__name__}.{Recorder.__name__}")
    config = llm.llm_engine.vllm_config
    # The engine has no tokenizer, and vLLM then does not check that tokens exist.
    size, largest = config.model_config.get_vocab_size(), max(map(max, job["sequences"]))
    if largest >= size:
        raise ValueError(
            f"the data has the token {largest}, but the model's vocabulary has {size} tokens; "
            "use data that was tokenised for this model"
        )
    # Merge the layers of all ranks, because pipeline stages have different layers.
    layers = {
        name: on for rank in llm.collective_rpc("hybrid_kv_start") for name, on in rank.items()
    }
    facts = {
        "cache_dtype": config.cache_config.cache_dtype,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "quantised_layers": sum(layers.values()),
        "unquantised_layers": len(layers) - sum(layers.values()),
        "device": current_platform.get_device_name(),
    }
    write(Path(job["facts"]), json.dumps(facts).encode())
    sampling = SamplingParams(
        max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, prompt_logprobs=0
    )
    for number in job["pending"]:
        tokens, states = job["sequences"][number], job["states"][number]
        llm.collective_rpc("hybrid_kv_begin", args=(tokens, states, job["is_reference"]))
        (output,) = llm.generate({"prompt_token_ids": tokens}, sampling, use_tqdm=False)
        by_rank = llm.collective_rpc("hybrid_kv_end", args=(states,))
        scores: list[list[float]] = next(filter(None, by_rank), [[]])
        check_logprobs(scores[0], tokens, output.prompt_logprobs)
        write(Path(job["scores"][number]), json.dumps(scores).encode())
        send(scored=number)
    llm.llm_engine.engine_core.shutdown()


def check_logprobs(recorded: list[float], tokens: list[int], prompt_logprobs: Any) -> None:
    """Raise RuntimeError unless the recorded log-probabilities are those that vLLM returned."""
    if len(recorded) != len(tokens) - 1:
        raise RuntimeError(
            f"the recorder got the logits of {len(recorded)} of {len(tokens) - 1} predictions, "
            f"because this vLLM computes them in another place; {REPORT}"
        )
    returned = [at[token].logprob for token, at in zip(tokens, prompt_logprobs, strict=True) if at]
    close = numpy.isclose(recorded, returned, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
    if not close.all():
        at = int(numpy.argmin(close))
        raise RuntimeError(
            f"the recorded log-probability after {at + 1} tokens is {recorded[at]:.4f}, but vLLM "
            f"returned {returned[at]:.4f}: the recorder saw the logits of another position; "
            f"{REPORT}"
        )


def write(file: Path, content: bytes) -> None:
    """Write a file atomically, so that it is complete if it exists."""
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(file)


class _Head:
    """Replaces a model's head, and scores its logits while vLLM scores a prompt."""

    def __init__(self, runner: Any) -> None:
        self._scoring = False
        self._compute: Callable[..., torch.Tensor | None] = runner.model.compute_logits
        runner.model.compute_logits = self
        # V1's model runner scores prompts itself. V2's has a helper object on ranks with the head.
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
            # In V2, the first argument is `model.compute_logits`, which is this object.
            self._scoring = True
            try:
                return original(*args, **kwargs)
            finally:
                self._scoring = False

        setattr(owner, name, score_prompt)

    def begin(self, tokens: list[int], reference: torch.Tensor | None) -> None:
        """Prepare to score a prompt against saved hidden states or, if None, to record them."""
        self._tokens, self._reference = torch.tensor(tokens), reference
        self._position = 0
        self.states: list[torch.Tensor] = []
        # Empty on ranks that get no logits.
        self.scores: list[torch.Tensor] = []

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = self._compute(hidden_states, *args, **kwargs)
        if self._scoring:
            self._score(hidden_states, logits)
        return logits

    def _score(self, hidden_states: torch.Tensor, logits: torch.Tensor | None) -> None:
        begin = self._position
        end = self._position = begin + len(hidden_states)
        if self._reference is None:
            self.states.append(hidden_states.to("cpu", copy=True))
            reference = logits
        else:
            # Compute on every rank, because each tensor-parallel rank has a part of the head.
            reference = self._compute(self._reference[begin:end].to(hidden_states.device))
        if logits is None or reference is None:
            return
        # The last position of a prompt has no next token.
        targets = self._tokens[begin + 1 : end + 1].to(logits.device)
        self.scores.append(score(logits[: len(targets)], targets, reference[: len(targets)]))


class Recorder:
    """Methods that vLLM adds to its workers, so that `collective_rpc` can call them."""

    def hybrid_kv_start(self) -> dict[str, bool]:
        """Wrap the model's head, and return which attention layers are quantised."""
        runner = self.model_runner  # type: ignore[attr-defined]
        self._hybrid_kv_head = _Head(runner)
        return attention_layers(runner.kv_cache_config)

    def hybrid_kv_begin(self, tokens: list[int], file: str, is_reference: bool) -> None:
        """Prepare to score a request against the states in `file`, or to record the states."""
        states = None if is_reference else safetensors.torch.load_file(file)[HIDDEN_STATES]
        self._hybrid_kv_head.begin(tokens, states)

    def hybrid_kv_end(self, file: str) -> list[list[float]] | None:
        """Return the request's scores (None on ranks without logits), and save recorded states."""
        head = self._hybrid_kv_head
        if not head.scores:
            return None
        if head.states:
            states = {HIDDEN_STATES: torch.cat(head.states)}
            write(Path(file), safetensors.torch.save(states))
        scores: list[list[float]] = torch.cat(head.scores, 1).tolist()
        return scores


def attention_layers(kv_cache_config: Any) -> dict[str, bool]:
    """Map the name of each attention layer of a rank to whether the layer is quantised."""
    from vllm.v1.kv_cache_interface import AttentionSpec, KVQuantMode

    specs: dict[str, Any] = {}
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        specs |= getattr(spec, "kv_cache_specs", None) or dict.fromkeys(group.layer_names, spec)
    return {
        name: spec.kv_quant_mode != KVQuantMode.NONE
        for name, spec in specs.items()
        if isinstance(spec, AttentionSpec)
    }
