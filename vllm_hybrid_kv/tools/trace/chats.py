# SPDX-License-Identifier: Apache-2.0
"""Read chats in OpenAI's format: each message of an assistant is the answer of a request."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from reprlib import repr as short
from typing import Any

from pydantic import BaseModel, ValidationError

from vllm_hybrid_kv.tools.output import ToolError
from vllm_hybrid_kv.tools.trace.numbering import Recorded


class Message(BaseModel, extra="allow"):
    """A message. Further fields, such as `tool_call_id`, go to the chat template."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    timestamp: datetime | None = None


class Chat(BaseModel):
    """A line of the file. A timestamp is ISO 8601, or a number of seconds."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    timestamp: datetime | None = None


@dataclass(frozen=True)
class Gaps:
    """The seconds to assume where chats have no timestamps.

    Attributes:
        chats: From the first request of a chat to the first request of the next chat.
        turns: From a request of a chat to the next.
    """

    chats: float
    turns: float


def read_chats(path: Path, tokenizer: Any, gaps: Gaps) -> list[Recorded]:
    """Return a request for each message of an assistant, in the order of their times.

    The prompt is the chat before the message, through the tokenizer's chat template. The answer has
    the tokens that the template adds for the message.

    Raises:
        ToolError: A line is not a chat, only some requests have a timestamp, or the chat template
            rejects a chat.
    """
    requests: list[Recorded] = []
    dated = False
    chats = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            chat = _parse(line, place)
            begin = chat.timestamp.timestamp() if chat.timestamp else chats * gaps.chats
            turns = [i for i, message in enumerate(chat.messages) if message.role == "assistant"]
            for turn, index in enumerate(turns):
                time = chat.messages[index].timestamp
                has_time = time is not None or chat.timestamp is not None
                if requests and has_time != dated:
                    raise ToolError(
                        f"{place}: message {index + 1} has {'a' if has_time else 'no'} timestamp, "
                        "unlike the answers before; give every chat a timestamp, or none"
                    )
                dated = has_time
                seconds = time.timestamp() if time else begin + turn * gaps.turns
                prompt, answer = _tokens(chat, index, tokenizer, place)
                requests.append(Recorded(1000 * seconds, prompt, answer))
            chats += 1
    if not requests:
        raise ToolError(f"{path} has no messages whose role is 'assistant', so no requests")
    requests.sort(key=lambda request: request.timestamp)
    return requests


def _parse(line: bytes, place: str) -> Chat:
    try:
        return Chat.model_validate_json(line)
    except ValidationError as error:
        fault = error.errors()[0]
        field = "".join(f"{part}: " for part in fault["loc"])
        raise ToolError(
            f"{place}: {field}{fault['msg']}, got {short(fault['input'])}; a line is "
            '{"messages": [{"role": "user", "content": "..."}, ...]}, or pass --format vllm-log'
        ) from None


def _tokens(chat: Chat, index: int, tokenizer: Any, place: str) -> tuple[list[int], int]:
    """Return the prompt's tokens for the message at an index, and the message's token count."""
    messages = [
        _for_template(message, f"{place}: message {number}")
        for number, message in enumerate(chat.messages[: index + 1], 1)
    ]
    options = {"tools": chat.tools, "tokenize": True, "return_dict": False}
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # A template is a program, and raises what it likes.
        raise ToolError(
            f"{place}: the chat template rejects the first {index + 1} messages: {error}; change "
            "the chat, or pass the tokenizer of the model that answered it"
        ) from error
    # Templates may omit the thoughts of earlier answers, so `whole` need not contain `prompt`.
    pairs = zip(prompt, whole, strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return prompt, max(len(whole) - common, 1)


def _for_template(message: Message, place: str) -> dict[str, Any]:
    """Return a message as vLLM passes it to the template: text as one string, arguments parsed."""
    fields = message.model_dump(exclude_unset=True, exclude={"timestamp"})
    if isinstance(message.content, list):
        for part in message.content:
            if not isinstance(part.get("text"), str):
                raise ToolError(
                    f"{place}: a content part has the type {short(part.get('type'))}; only text "
                    "can be converted, so remove the part or the chat"
                )
        fields["content"] = "\n".join(part["text"] for part in message.content)
    else:
        # Many templates concatenate strings.
        fields["content"] = message.content or ""
    for call in fields.get("tool_calls") or ():
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError:
                # vLLM does the same.
                function["arguments"] = {}
    return fields
