# SPDX-License-Identifier: Apache-2.0
"""Traces made for the benchmark, of traffic that differs from a chat service's."""

from __future__ import annotations

import heapq
import itertools
import random

from vllm_hybrid_kv.replay.trace import BLOCK_TOKENS, TracedRequest


def agents(requests: int, seed: int = 0) -> list[TracedRequest]:
    """Make a trace of agents that share one long system prompt with their tools.

    The system prompt has 6,144 tokens. An agent's session has 4 to 40 calls; each sends all that
    came before, the last answer and what a tool returned, 200 to 4,000 tokens more, 2 to 60 s
    after the answer. A new session begins every 4 s on average.

    Args:
        requests: How many requests.
        seed: Of the random numbers.
    """
    draw = random.Random(seed)
    ids = itertools.count()
    system = [next(ids) for _ in range(12)]
    sent: list[TracedRequest] = []
    # When, a tie-breaker, the blocks so far, the tokens so far, and the calls that are left.
    due: list[tuple[float, int, list[int], int, int]] = []
    sessions = itertools.count()
    begin = 0.0
    while len(sent) < requests:
        while not due or begin <= due[0][0]:
            start = (begin, next(sessions), list(system), 12 * BLOCK_TOKENS, draw.randint(4, 40))
            heapq.heappush(due, start)
            begin += draw.expovariate(1 / 4000)
        now, session, blocks, tokens, calls = heapq.heappop(due)
        tokens += int(200 * 20 ** draw.random())
        full = tokens // BLOCK_TOKENS
        blocks += [next(ids) for _ in range(full - len(blocks))]
        tail = [next(ids)] if tokens % BLOCK_TOKENS else []
        answer = draw.randint(30, 300)
        sent.append(TracedRequest(round(now), tokens, answer, (*blocks, *tail)))
        if calls > 1:
            wait = 20 * answer + 2000 * 30 ** draw.random()
            heapq.heappush(due, (now + wait, session, blocks, tokens + answer, calls - 1))
    return sent


def short_prompts(requests: int, seed: int = 0) -> list[TracedRequest]:
    """Make a trace of short prompts that have nothing in common: no cache can hit.

    Args:
        requests: How many requests, of 30 to 1,500 tokens.
        seed: Of the random numbers.
    """
    draw = random.Random(seed)
    ids = itertools.count()
    sent = []
    now = 0.0
    for _ in range(requests):
        tokens = int(30 * 50 ** draw.random())
        blocks = tuple(next(ids) for _ in range(-(-tokens // BLOCK_TOKENS)))
        sent.append(TracedRequest(round(now), tokens, draw.randint(20, 400), blocks))
        now += draw.expovariate(1 / 200)
    return sent
