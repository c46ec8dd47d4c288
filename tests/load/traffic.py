# SPDX-License-Identifier: Apache-2.0
"""Random requests, some of them cancelled, and the comparison of their answers.

`vllm bench serve` measures load too, but it neither cancels requests nor compares answers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from testing.tokenizer import VOCAB_SIZE

MODEL = "load"
LONGEST_PROMPT, LONGEST_ANSWER = 600, 120
SHARED = 0.3
"""Share of requests that begin like another one."""

CANCELLED = 0.15
"""Share of requests that the client cancels in mid-answer."""

LIKELIEST = 5
"""Number of candidates with log-probabilities for each token of an answer computed alone."""


@dataclass(frozen=True)
class Planned:
    """A request to send.

    Attributes:
        prompt: Token ids.
        cancelled_after: Number of tokens after which the client hangs up, or None.
    """

    prompt: tuple[int, ...]
    answer: int
    cancelled_after: int | None


def plan(count: int, seed: int) -> list[Planned]:
    """Draw requests."""
    draw = random.Random(seed)
    planned: list[Planned] = []
    for _ in range(count):
        length = draw.randint(4, LONGEST_PROMPT)
        prompt: list[int] = []
        if planned and draw.random() < SHARED:
            other = draw.choice(planned).prompt
            prompt = list(other[: draw.randint(1, min(len(other), length))])
        prompt += [draw.randrange(8, VOCAB_SIZE) for _ in range(length - len(prompt))]
        answer = draw.randint(1, LONGEST_ANSWER)
        stop = draw.randint(1, answer) if draw.random() < CANCELLED and answer > 1 else None
        planned.append(Planned(tuple(prompt), answer, stop))
    return planned


def margin(
    alone: Sequence[int], likeliest: Sequence[dict[int, float]], answer: Sequence[int]
) -> tuple[int, float]:
    """Compare two answers at the first token in which they differ.

    Args:
        alone: The answer computed alone.
        likeliest: The log-probabilities of the likeliest candidates for each of its tokens.
        answer: Another answer.

    Returns:
        The index of the first different token, and how much likelier the token of `alone` was
        than that of `answer`; infinity if the latter is missing or not among the likeliest.
    """
    pairs = zip(alone, answer, strict=False)
    end = min(len(alone), len(answer))
    index = next((i for i, (a, b) in enumerate(pairs) if a != b), end)
    if index == end:
        return index, math.inf
    logs = likeliest[index]
    return index, logs[alone[index]] - logs.get(answer[index], -math.inf)


class Client:
    """Sends requests to a server; several threads may use it."""

    def __init__(self, url: str) -> None:
        # Server and client both close connections after 5 idle seconds; a request sent at that
        # moment is lost.
        limits = httpx.Limits(max_connections=None, keepalive_expiry=1.0)
        self._client = openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=600,
            http_client=openai.DefaultHttpxClient(limits=limits),
        )

    def ask(self, request: Planned) -> list[int] | Exception | None:
        """Return the answer's token ids, None if the request was cancelled, or its error."""
        tokens: list[int] = []
        try:
            with self._send(request, stream=True) as stream:
                for chunk in stream:
                    for choice in chunk.choices:
                        tokens += (choice.model_extra or {}).get("token_ids") or ()
                    if len(tokens) >= (request.cancelled_after or math.inf):
                        return None
        except Exception as error:
            return error
        return tokens

    def ask_alone(self, request: Planned) -> tuple[list[int], list[dict[int, float]]]:
        """Return the answer's token ids, and the likeliest candidates for each token."""
        (choice,) = self._send(request, logprobs=LIKELIEST).choices
        likeliest = [
            {int(name.removeprefix("token_id:")): log for name, log in of_token.items()}
            for of_token in choice.logprobs.top_logprobs
        ]
        return list(choice.token_ids), likeliest

    def _send(self, request: Planned, **more: Any) -> Any:
        return self._client.completions.create(
            model=MODEL,
            prompt=list(request.prompt),
            max_tokens=request.answer,
            temperature=0.0,
            extra_body={
                "ignore_eos": True,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            },
            **more,
        )
