# SPDX-License-Identifier: Apache-2.0
"""Read the requests in a log of `vllm serve`, written as text, in colours or as JSON.

With `--enable-log-requests` and VLLM_LOGGING_LEVEL=DEBUG the log has the token ids of the prompts,
with `--enable-log-outputs` also those of the answers. Formats of vLLM 0.32 and 0.33:

    Request ID details: prompt: '...', prompt_token_ids: [1, 2], prompt_embeds shape: None.
    Received request ID: params: SamplingParams(...), lora_request: None.
    Generated response ID details: output_token_ids: [3, 4]
    Generated response ID (streaming delta) details: output_token_ids: [3]
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from vllm_hybrid_kv.tools.output import ToolError
from vllm_hybrid_kv.tools.trace.numbering import Recorded

OPTIONS = "VLLM_LOGGING_LEVEL=DEBUG vllm serve MODEL --enable-log-requests --enable-log-outputs"

_TIME = re.compile(r"(\d\d-\d\d \d\d:\d\d:\d\d)")
_PROMPT = re.compile(
    # The text of a prompt may look like token ids, so take the last match of a line.
    r"Request (\S+) details: prompt: .*, prompt_token_ids: (?:None|\[([\d, ]*)\]), prompt_embeds "
)
_ANSWER = re.compile(
    r"Generated response (\S+)( \(streaming delta\))? details: "
    r"output_token_ids: [\[(]([\d, ]*)[\])]"
)
_TRUNCATED = re.compile(r"non-default args: .*'max_log_len': (\d+)")

_YEAR_S = 366 * 24 * 3600
"""The log has no year. Times are counted from the first request, modulo a leap year."""


@dataclass
class Log:
    """The requests of a log.

    Attributes:
        requests: Those with a prompt and an answer, in order.
        without_prompt: How many requests have embeddings instead of tokens.
        without_answer: How many requests have no answer in the log.
    """

    requests: list[Recorded] = field(default_factory=list)
    without_prompt: int = 0
    without_answer: int = 0


def read_log(path: Path, answer_tokens: int | None) -> Log:
    """Read a log. Requests without an answer in it get `answer_tokens`, or are left out if None.

    Raises:
        ToolError: The log has no prompts, or no answers, or both are truncated.
    """
    prompts: dict[str, tuple[float, list[int]]] = {}
    answers = _Answers()
    log = Log()
    now = first = 0.0
    received = False
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if found := _TRUNCATED.search(line):
                raise ToolError(
                    f"{path}, line {number}: the server truncated prompts to {found[1]} tokens; "
                    "log without --max-log-len"
                )
            received = received or "Received request" in line
            if found := _ANSWER.search(line):
                answers.add(found[1], found[2] is not None, len(re.findall(r"\d+", found[3])))
            elif found := _PROMPT.search(line):
                if not found[2]:
                    log.without_prompt += 1
                    continue
                if time := _TIME.search(line):
                    now = datetime.strptime(f"2000-{time[1]}", "%Y-%m-%d %H:%M:%S").timestamp()
                first = first if prompts else now
                tokens = [int(token) for token in found[2].split(",")]
                prompts[found[1]] = ((now - first) % _YEAR_S, tokens)
    if not prompts:
        lacks = "no token ids of prompts" if received else "no requests"
        raise ToolError(f"{path} has {lacks}; log with {OPTIONS}")
    siblings = Counter(name.rpartition("-")[0] for name in prompts)
    for name, (time_s, tokens) in prompts.items():
        answer = answers.tokens(name, siblings) or answer_tokens
        if answer is None:
            log.without_answer += 1
        else:
            log.requests.append(Recorded(1000 * time_s, tokens, answer))
    if not log.requests:
        raise ToolError(
            f"{path} has no token ids of answers; log with {OPTIONS}, or pass their number as "
            "--answer-tokens (vLLM 0.32 logs no answers of /v1/completions)"
        )
    return log


class _Answers:
    """Counts the tokens of answers by the name of the request in the log."""

    def __init__(self) -> None:
        self._whole: dict[str, list[int]] = defaultdict(list)
        self._streamed: Counter[str] = Counter()

    def add(self, name: str, streamed: bool, tokens: int) -> None:
        if streamed:
            self._streamed[name] += tokens
        else:
            self._whole[name].append(tokens)

    def tokens(self, name: str, siblings: Counter[str]) -> int:
        """Return the tokens of all answers of a request; 0 if the log has none.

        `siblings` has the number of names `ID-i` for each `ID`.
        """
        if name in self._whole or name in self._streamed:
            return sum(self._whole.get(name, ())) + self._streamed[name]
        # /v1/completions logs prompt `i` of a request as `ID-i`, and all its answers as `ID`.
        base, _, index = name.rpartition("-")
        if not index.isdigit():
            return 0
        whole = self._whole.get(base, [])
        if int(index) < len(whole):
            return whole[int(index)]
        return self._streamed[base] // siblings[base]
