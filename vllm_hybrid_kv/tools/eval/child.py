# SPDX-License-Identifier: Apache-2.0
"""The process that runs one engine: sends the sequences, one at a time, and writes their scores.

It says how far it is in lines of JSON on a pipe, for what vLLM prints goes to a log.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy

from vllm_hybrid_kv.tools.eval.folder import Scored, write_scores

RECORDER = "vllm_hybrid_kv.tools.eval.recorder.Recorder"

TOLERANCE = 1e-3
"""Between a log-probability that vLLM computes in float32 and ours of the same logits, as a share
of it and beside it."""


def main(job_file: str, pipe: str) -> None:
    """Run an engine for a job.

    Args:
        job_file: Has what `run.Run` wrote into it.
        pipe: The number of the open file that takes the lines.
    """
    status = 1
    try:
        with os.fdopen(int(pipe), "w") as report:
            try:
                _work(json.loads(Path(job_file).read_text()), report)
                status = 0
            except BaseException as error:  # vLLM may end its process by SystemExit
                traceback.print_exc()
                _say(report, error=_one_line(error))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads that vLLM leaves behind may keep a process from ending.
        os._exit(status)


def _work(job: dict[str, Any], report: TextIO) -> None:
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    llm = LLM(
        **job["engine"],
        kv_cache_dtype=job["kv_cache_dtype"],
        additional_config={"hybrid_kv": job["settings"]},
        worker_extension_cls=RECORDER,
    )
    _check_vocabulary(llm, job["sequences"])
    quantised, whole = over_ranks(llm.collective_rpc("hybrid_kv_layers"))
    config = llm.llm_engine.vllm_config
    _say(
        report,
        facts={
            "cache_dtype": config.cache_config.cache_dtype,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "quantised_layers": len(quantised),
            "unquantised_layers": len(whole),
            "device": current_platform.get_device_name(),
        },
    )
    sampling = SamplingParams(
        max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, prompt_logprobs=0
    )
    for number in job["pending"]:
        tokens = job["sequences"][number]
        states = job["states"][number]
        llm.collective_rpc("hybrid_kv_begin", args=(tokens, states, job["keep"]))
        (output,) = llm.generate({"prompt_token_ids": tokens}, sampling, use_tqdm=False)
        answers = llm.collective_rpc("hybrid_kv_end", args=(states,))
        answer = next((answer for answer in answers if answer is not None), None)
        scored = _checked(answer, tokens, output.prompt_logprobs)
        write_scores(Path(job["scores"][number]), scored)
        _say(report, done=number)
    llm.llm_engine.engine_core.shutdown()


def over_ranks(answers: Sequence[Sequence[Sequence[str]]]) -> list[set[str]]:
    """Return the quantised layers and the others of a model, of what each rank has of both.

    Ranks of a pipeline have different layers, those of a tensor-parallel group the same.
    """
    return [{name for names in ranks for name in names} for ranks in zip(*answers, strict=True)]


def _check_vocabulary(llm: Any, sequences: list[list[int]]) -> None:
    # Past its end vLLM stops with the first request that has such a token.
    size = llm.llm_engine.model_config.get_vocab_size()
    if (largest := max(map(max, sequences))) >= size:
        raise ValueError(
            f"the data has token {largest}, the model's vocabulary {size}: not its own"
        )


def _checked(answer: dict[str, Any] | None, tokens: list[int], theirs: Any) -> Scored:
    """Return what was recorded, if it is what vLLM says of the same tokens.

    Raises:
        RuntimeError: The recorder saw other logits than vLLM used.
    """
    if answer is None or len(answer["logprobs"]) != len(tokens) - 1:
        raise RuntimeError("the model's logits were not seen: this vLLM computes them elsewhere")
    ours = numpy.array(answer["logprobs"])
    said = [
        float(at[token].logprob) for token, at in zip(tokens[1:], list(theirs)[1:], strict=True)
    ]
    close = numpy.isclose(ours, said, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
    if not close.all():
        at = int(numpy.argmin(close))
        raise RuntimeError(
            f"the token after {at + 1} has a log-probability of {ours[at]:.4f} by the logits that "
            f"were seen, and vLLM says {said[at]:.4f}: they are not those of this position"
        )
    return Scored(ours, numpy.array(answer["divergences"]), numpy.array(answer["agreements"]))


def _say(report: TextIO, **line: Any) -> None:
    report.write(json.dumps(line) + "\n")
    report.flush()


def _one_line(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return (
        said
        if isinstance(error, ValueError | SystemExit) and said
        else (f"{type(error).__name__}: {said}" if said else type(error).__name__)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
