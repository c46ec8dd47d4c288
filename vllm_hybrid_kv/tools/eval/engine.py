# SPDX-License-Identifier: Apache-2.0
"""Runs one engine in a child process, and sends the scores of each sequence to the parent."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy

RECORDER = "vllm_hybrid_kv.tools.eval.recorder.Recorder"

TOLERANCE = 1e-3
"""Largest accepted difference, absolute and relative, between the log-probabilities that vLLM and
the recorder compute in float32 from the same logits."""


def score(send: Callable[..., None], job_file: str) -> None:
    """Run an engine for a job, and send `facts`, then `number` and `scores` of each sequence.

    Args:
        send: Sends a message to the parent.
        job_file: The JSON that `run.Run` wrote.

    Raises:
        ValueError: A token is not in the model's vocabulary.
        RuntimeError: The recorder saw other logits than vLLM used.
    """
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    job = json.loads(Path(job_file).read_text())
    llm = LLM(
        **job["engine"],
        kv_cache_dtype=job["kv_cache_dtype"],
        additional_config={"hybrid_kv": job["settings"]},
        worker_extension_cls=RECORDER,
    )
    config = llm.llm_engine.vllm_config
    # Without this check vLLM would stop at the first request with a token beyond the vocabulary.
    size, largest = config.model_config.get_vocab_size(), max(map(max, job["sequences"]))
    if largest >= size:
        raise ValueError(
            f"the data has the token {largest}, but the model's vocabulary has {size} tokens; "
            "use data that was tokenised for this model"
        )
    quantised, unquantised = over_ranks(llm.collective_rpc("hybrid_kv_layers"))
    send(
        facts={
            "cache_dtype": config.cache_config.cache_dtype,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "quantised_layers": len(quantised),
            "unquantised_layers": len(unquantised),
            "device": current_platform.get_device_name(),
        }
    )
    sampling = SamplingParams(
        max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, prompt_logprobs=0
    )
    for number in job["pending"]:
        tokens, states = job["sequences"][number], job["states"][number]
        llm.collective_rpc("hybrid_kv_begin", args=(tokens, states, job["is_reference"]))
        (output,) = llm.generate({"prompt_token_ids": tokens}, sampling, use_tqdm=False)
        by_rank = llm.collective_rpc("hybrid_kv_end", args=(states,))
        scores = next((scores for scores in by_rank if scores is not None), None)
        check_scores(scores, tokens, output.prompt_logprobs)
        send(number=number, scores=scores)
    llm.llm_engine.engine_core.shutdown()


def over_ranks(layers: Sequence[Sequence[Sequence[str]]]) -> list[set[str]]:
    """Return the quantised and the unquantised layers of a model, given those of each rank.

    The ranks of a pipeline have different layers. Tensor-parallel ranks have the same layers.
    """
    return [{name for names in ranks for name in names} for ranks in zip(*layers, strict=True)]


def check_scores(scores: dict[str, Any] | None, tokens: list[int], prompt_logprobs: Any) -> None:
    """Compare recorded log-probabilities with those that vLLM returned.

    Raises:
        RuntimeError: The log-probabilities differ, or some of them were not recorded.
    """
    if scores is None or len(scores["logprobs"]) != len(tokens) - 1:
        raise RuntimeError(
            "the recorder did not get the model's logits; this vLLM computes them in another place"
        )
    ours = numpy.array(scores["logprobs"])
    theirs = [
        float(at[token].logprob)
        for token, at in zip(tokens[1:], list(prompt_logprobs)[1:], strict=True)
    ]
    close = numpy.isclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
    if not close.all():
        at = int(numpy.argmin(close))
        raise RuntimeError(
            f"the recorded log-probability after {at + 1} tokens is {ours[at]:.4f}, but vLLM "
            f"returned {theirs[at]:.4f}: the recorder saw the logits of another position"
        )
