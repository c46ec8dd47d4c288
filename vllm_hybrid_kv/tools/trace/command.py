# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv trace`: make a trace for `replay` from chats or from a log of vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_hybrid_kv.errors import did_you_mean
from vllm_hybrid_kv.tools.output import (
    JsonOption,
    MarkdownOption,
    Table,
    ToolError,
    check_paths,
    counted,
    write,
)
from vllm_hybrid_kv.tools.replay.trace import TracedRequest, shareable_tokens, write_trace
from vllm_hybrid_kv.tools.trace.chats import Gaps, read_chats
from vllm_hybrid_kv.tools.trace.numbering import numbered
from vllm_hybrid_kv.tools.trace.vllm_log import read_log

SCHEMA = 1
CHATS, VLLM_LOG = FORMATS = ("chats", "vllm-log")


def trace(
    file: Annotated[Path, typer.Argument(help="Chats as JSON lines, or a log of vLLM.")],
    out: Annotated[Path, typer.Option(help="The trace to write.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="For chats: a folder or a hub name of a tokenizer with a chat template."),
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help=f"The format of FILE: {' or '.join(FORMATS)}.")
    ] = CHATS,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a hash id.")] = 16,
    chat_gap: Annotated[
        float, typer.Option(min=0, help="Seconds between chats without timestamps.")
    ] = 1.0,
    turn_gap: Annotated[
        float, typer.Option(min=0, help="Seconds between answers of a chat without timestamps.")
    ] = 60.0,
    answer_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of answers that a log of vLLM lacks."),
    ] = None,
    json_: JsonOption = None,
    markdown: MarkdownOption = False,
) -> None:
    """Convert chats, or a log of `vllm serve`, into a trace for `replay`.

    The trace has numbers of blocks, lengths and times, but neither text nor token ids.

    A line of `chats` is an object with OpenAI's `messages`. Each message of an assistant becomes a
    request: its prompt is the chat before the message, through the tokenizer's chat template. A
    chat or a message may have a `timestamp`, in ISO 8601 or seconds.

    A `vllm-log` needs VLLM_LOGGING_LEVEL=DEBUG, --enable-log-requests and --enable-log-outputs.
    """
    check_paths(json_, None)
    if format_ not in FORMATS:
        raise ToolError(
            f"--format: {format_!r} is not a format: choose {' or '.join(FORMATS)}"
            f"{did_you_mean(format_, FORMATS)}"
        )
    notes = []
    try:
        if format_ == CHATS:
            recorded = read_chats(file, _load(tokenizer), Gaps(chat_gap, turn_gap))
        else:
            log = read_log(file, answer_tokens)
            recorded = log.requests
            if log.without_answer:
                notes.append(
                    f"{counted(log.without_answer, 'request')} without an answer left out; "
                    "--answer-tokens keeps them"
                )
            if log.without_prompt:
                notes.append(f"{counted(log.without_prompt, 'request')} with embeddings left out")
    except OSError as error:
        raise ToolError(f"{file}: {error.strerror}") from None
    first = recorded[0].timestamp
    requests = list(numbered(recorded, first, block_size))
    try:
        write_trace(out, requests)
    except OSError as error:
        raise ToolError(f"--out: {out}: {error.strerror}") from None
    numbers = _numbers(requests)
    write(
        {"trace": str(out), **numbers, "notes": notes},
        lambda: _parts(out, numbers, notes),
        schema=SCHEMA,
        json_=json_,
        markdown=markdown,
    )


def _load(tokenizer: str | None) -> Any:
    if tokenizer is None:
        raise ToolError(
            "chats need --tokenizer: the folder or hub name of the model that is served"
        )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError, KeyError) as error:
        raise ToolError(f"--tokenizer: {tokenizer} cannot be loaded: {error}") from None
    if not loaded.chat_template:
        raise ToolError(f"--tokenizer: {tokenizer} has no chat template; pass one that has")
    return loaded


def _numbers(requests: Sequence[TracedRequest]) -> dict[str, Any]:
    return {
        "block_size": requests[0].block_size,
        "requests": len(requests),
        "prompt_tokens": sum(request.input_length for request in requests),
        "answer_tokens": sum(request.output_length for request in requests),
        "shareable_tokens": shareable_tokens(requests),
        "seconds": requests[-1].timestamp / 1000,
    }


def _parts(out: Path, numbers: dict[str, Any], notes: Sequence[str]) -> Iterator[str | Table]:
    share = numbers["shareable_tokens"] / numbers["prompt_tokens"]
    yield Table(
        str(out),
        ("", ">number"),
        [
            ("requests", f"{numbers['requests']:,}"),
            ("prompt tokens", f"{numbers['prompt_tokens']:,}"),
            ("answer tokens", f"{numbers['answer_tokens']:,}"),
            ("seconds from first to last", f"{numbers['seconds']:,.0f}"),
            ("tokens of a hash id", f"{numbers['block_size']:,}"),
        ],
        f"{share:.1%} of the prompt tokens repeat whole blocks of {numbers['block_size']} tokens "
        "of earlier requests.",
    )
    yield from notes
