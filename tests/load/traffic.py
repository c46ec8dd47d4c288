# SPDX-License-Identifier: Apache-2.0
"""Requests of random lengths, some of them given up on, many at a time."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import openai

MODEL = "load"
LONGEST_PROMPT, LONGEST_ANSWER = 600, 120
SHARED = 0.3
"""Of the requests so many begin as another does."""

LIKELIEST = 5
"""Tokens whose log-probabilities are asked for with an answer computed alone."""

CANCELLED = 0.15
"""So many are given up on by the client, in the middle of the answer."""


@dataclass(frozen=True)
class Planned:
    """A request to send.

    Attributes:
        prompt: Token ids.
        answer: How many tokens it asks for.
        cancelled_after: Tokens after which the client hangs up; None if it waits for all.
    """

    prompt: tuple[int, ...]
    answer: int
    cancelled_after: int | None


def plan(count: int, vocabulary: int, seed: int) -> list[Planned]:
    """Draw requests.

    Args:
        count: How many.
        vocabulary: Tokens there are; the first few are special and left out.
        seed: Everything is drawn from it.
    """
    draw = random.Random(seed)
    planned: list[Planned] = []
    for _ in range(count):
        length = draw.randint(4, LONGEST_PROMPT)
        prompt: list[int] = []
        if planned and draw.random() < SHARED:
            other = draw.choice(planned).prompt
            prompt = list(other[: draw.randint(1, min(len(other), length))])
        prompt += [draw.randrange(8, vocabulary) for _ in range(length - len(prompt))]
        answer = draw.randint(1, LONGEST_ANSWER)
        stop = draw.randint(1, answer) if draw.random() < CANCELLED and answer > 1 else None
        planned.append(Planned(tuple(prompt), answer, stop))
    return planned


def margin(
    alone: Sequence[int], likeliest: Sequence[dict[int, float]], answer: Sequence[int]
) -> tuple[int, float]:
    """Say by how much one answer lost to another where they part.

    Args:
        alone: The answer computed alone.
        likeliest: For each of its tokens, the likeliest ones with their log-probabilities.
        answer: Another one.

    Returns:
        The number of the first token that differs, and how much likelier that of `alone` was than
        that of `answer`; infinitely, where that is not among the likeliest, or has no token there.
    """
    pairs = zip(alone, answer, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(alone), len(answer)))
    if place == min(len(alone), len(answer)):
        return place, math.inf
    logs = likeliest[place]
    return place, logs[alone[place]] - logs.get(answer[place], -math.inf)


class Client:
    """Sends requests to a server and keeps their answers."""

    def __init__(self, url: str) -> None:
        """Prepare.

        Args:
            url: The server's.
        """
        # vLLM's server closes connections that were idle for 5 seconds, and so do clients: what is
        # sent at that moment is lost.
        soon_closed = httpx.Limits(max_connections=None, keepalive_expiry=1.0)
        self._client = openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=600,
            http_client=openai.DefaultAsyncHttpxClient(limits=soon_closed),
        )

    async def ask(self, request: Planned) -> list[int] | None:
        """Send a request and return the answer's token ids; None if it was given up on."""
        stream = await self._send(request, stream=True)
        tokens: list[int] = []
        async with stream:
            async for chunk in stream:
                for choice in chunk.choices:
                    tokens += (choice.model_extra or {}).get("token_ids") or ()
                if len(tokens) >= (request.cancelled_after or math.inf):
                    return None
        return tokens

    async def ask_alone(self, request: Planned) -> tuple[list[int], list[dict[int, float]]]:
        """Send a request; return its answer, and for each token the likeliest and their logs."""
        completion = await self._send(request, logprobs=LIKELIEST)
        (choice,) = completion.choices
        likeliest = [
            {int(name.removeprefix("token_id:")): log for name, log in of_token.items()}
            for of_token in choice.logprobs.top_logprobs
        ]
        return list(choice.token_ids), likeliest

    async def _send(self, request: Planned, **more: Any) -> Any:
        return await self._client.completions.create(
            model=MODEL,
            prompt=list(request.prompt),
            max_tokens=request.answer,
            temperature=0.0,
            # Names of tokens come with log-probabilities only.
            extra_body={
                "ignore_eos": True,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            },
            **more,
        )

    async def rounds(
        self,
        planned: Sequence[Planned],
        at_once: int,
        go_on: Callable[[], bool],
        answered: Callable[[int, list[int] | None, Exception | None], None],
    ) -> None:
        """Send all requests, again and again while `go_on` says so.

        Args:
            planned: The requests.
            at_once: How many at a time.
            go_on: Asked before each further round.
            answered: Told the number of the request, its answer, and what went wrong.
        """
        rooms = asyncio.Semaphore(at_once)

        async def one(number: int) -> None:
            try:
                answer = await self.ask(planned[number])
            except Exception as error:
                answered(number, None, error)
            else:
                answered(number, answer, None)
            finally:
                rooms.release()

        while True:
            async with asyncio.TaskGroup() as tasks:
                for number in range(len(planned)):
                    await rooms.acquire()
                    tasks.create_task(one(number))
            if not go_on():
                return
