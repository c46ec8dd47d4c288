# SPDX-License-Identifier: Apache-2.0
"""Make synthetic traces of traffic that differs from a chat service's.

The format of traces can express shared prefixes only in whole blocks of 512 tokens. So prompts that
are repeated, or continued in a later turn, have at least 512 tokens.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator, Sequence

from vllm_hybrid_kv.tools.replay.trace import BLOCK_TOKENS, TracedRequest

SYSTEM_BLOCKS = 12
"""How many blocks the agents' system prompt has, including tools."""
REPEATED = 0.1
"""The share of short prompts that repeat an earlier one."""
CONTINUED = 0.15
"""The share of short prompts that are the second turn of an earlier one."""
MEMORY = 200
"""Only this many of the latest prompts that fill a block are repeated or continued."""


def agents(requests: int, seed: int = 0) -> list[TracedRequest]:
    """Return a trace of agents that share one long system prompt with tools.

    The system prompt has 6,144 tokens. A session has a task of 600 to 6,000 tokens and 4 to 40
    calls. Each call adds the last answer and 200 to 4,000 tokens of a tool's result, 2 to 60 s
    after the answer. A new session starts every 4 s on average.
    """
    draw = random.Random(seed)
    ids = itertools.count()
    system = [next(ids) for _ in range(SYSTEM_BLOCKS)]
    sent: list[TracedRequest] = []
    # A heap of each session's next call: time, session number (breaks ties), the prompt's blocks
    # up to now, the next prompt's tokens, and how many calls are left.
    due: list[tuple[float, int, list[int], int, int]] = []
    sessions = itertools.count()
    begin = 0.0
    while len(sent) < requests:
        while not due or begin <= due[0][0]:
            first = SYSTEM_BLOCKS * BLOCK_TOKENS + int(600 * 10 ** draw.random())
            heapq.heappush(due, (begin, next(sessions), list(system), first, draw.randint(4, 40)))
            begin += draw.expovariate(1 / 4000)
        now, session, blocks, tokens, calls = heapq.heappop(due)
        blocks += [next(ids) for _ in range(tokens // BLOCK_TOKENS - len(blocks))]
        answer = draw.randint(30, 300)
        sent.append(_request(now, tokens, answer, blocks, ids))
        tokens += answer + int(200 * 20 ** draw.random())
        if calls > 1:
            wait = 20 * answer + 2000 * 30 ** draw.random()
            heapq.heappush(due, (now + wait, session, blocks, tokens, calls - 1))
    return sent


def short_prompts(requests: int, seed: int = 0) -> list[TracedRequest]:
    """Return a trace of short prompts, most of which share nothing.

    New prompts have 30 to 1,500 tokens. 10 % of the requests repeat one of the last 200 prompts
    that fill a block. 15 % continue one of these prompts with its answer and 20 to 200 more
    tokens; no prompt is continued twice.
    """
    draw = random.Random(seed)
    ids = itertools.count()
    sent: list[TracedRequest] = []
    # Prompts of at least one block, because a trace cannot express shorter shared prefixes.
    recent: list[TracedRequest] = []
    now = 0.0
    for _ in range(requests):
        kind = draw.random()
        answer = draw.randint(20, 400)
        if recent and kind < REPEATED:
            earlier = draw.choice(recent)
            one = _request(now, earlier.input_length, answer, earlier.full_ids, ids)
        elif recent and kind < REPEATED + CONTINUED:
            earlier = recent.pop(draw.randrange(len(recent)))
            tokens = earlier.input_length + earlier.output_length + draw.randint(20, 200)
            more = tokens // BLOCK_TOKENS - len(earlier.full_ids)
            blocks = [*earlier.full_ids, *(next(ids) for _ in range(more))]
            one = _request(now, tokens, answer, blocks, ids)
        else:
            tokens = int(30 * 50 ** draw.random())
            blocks = [next(ids) for _ in range(tokens // BLOCK_TOKENS)]
            one = _request(now, tokens, answer, blocks, ids)
            if blocks:
                recent = [*recent[1 - MEMORY :], one]
        sent.append(one)
        now += draw.expovariate(1 / 200)
    return sent


def _request(
    now: float, tokens: int, answer: int, full: Sequence[int], ids: Iterator[int]
) -> TracedRequest:
    """Make a request. Its partial last block gets a new id, as in recorded traces."""
    tail = [next(ids)] if tokens % BLOCK_TOKENS else []
    return TracedRequest(round(now), tokens, answer, (*full, *tail))
