# SPDX-License-Identifier: Apache-2.0
"""Compare answers that resume from stored states with answers that resume from exact states."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.compressed_checkpoints.conversations import (
    TURNS,
    Plan,
    answer,
    draw_conversation,
    right_answers,
)
from benchmarks.compressed_checkpoints.storage import RULES, stored_state
from benchmarks.markdown import table
from testing import model_cases
from testing.engine_host import EngineHost

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "tests/recall/models"
ENGINE_CONVERSATIONS = 16
GOAL = 0.2
"""How many percentage points of recall checkpoints may lose after the last turn."""

PLANS = {
    "qwen3-next": Plan(60, 6, 8, (12, 12, 72), 2, 280, 56),
    "gated-deltanet": Plan(16, 3, 4, (5, 5, 20), 1, 1000, 200),
}
"""The conversations of each model in `MODELS`."""


@dataclass
class Tally:
    """The answers of one rule in one turn, by conversation and question.

    Attributes:
        right, exact: bool [conversations, questions], with the rule and with exact checkpoints.
        divergence: KL divergence from the distribution with exact checkpoints, in nats.
    """

    right: list[torch.Tensor] = field(default_factory=list)
    exact: list[torch.Tensor] = field(default_factory=list)
    divergence: list[torch.Tensor] = field(default_factory=list)

    def difference(self) -> tuple[float, float]:
        """Return the difference of recall in points, and half of its 95 % interval.

        The answers of a conversation count as one sample. The interval is at least that of the
        rule of three, which takes the answers as independent.
        """
        right, exact = torch.cat(self.right).double(), torch.cat(self.exact).double()
        points = 100 * (right - exact).mean(1)
        half = 1.96 * float(points.std()) / len(points) ** 0.5
        return float(points.mean()), max(half, 300 / right.numel())

    def exact_recall(self) -> float:
        """Return the share of right answers with exact checkpoints."""
        return float(torch.cat(self.exact).double().mean())

    def cells(self) -> list[str]:
        difference, half = self.difference()
        kl = float(torch.cat(self.divergence).double().mean())
        return [f"{difference:+.3f} ± {half:.3f}", f"{kl:.1e}"]


def measure(name: str, conversations: int | None = None) -> list[str]:
    """Measure all rules with a model; return a section in Markdown."""
    torch.set_num_threads(1)
    plan = PLANS[name]
    model: Any = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    draw, total = np.random.default_rng(0), conversations or plan.conversations
    tallies: dict[tuple[str, int], Tally] = defaultdict(Tally)
    errors: dict[str, list[float]] = defaultdict(list)
    for first in range(0, total, plan.batch):
        asked = [draw_conversation(draw, plan) for _ in range(min(plan.batch, total - first))]
        exact, states = answer(model, asked, None)
        for label, rule in RULES.items():
            began = time.process_time()
            found, _ = answer(model, asked, rule)
            for turn in TURNS:
                right, logprobs, expected = right_answers(asked, turn), found[turn], exact[turn]
                tally = tallies[label, turn]
                tally.right.append(logprobs.argmax(-1) == right)
                tally.exact.append(expected.argmax(-1) == right)
                tally.divergence.append((expected.exp() * (expected - logprobs)).sum(-1))
            for state in states:
                difference = (stored_state(state, rule) - state).norm(dim=(-2, -1))
                errors[label].append(float((difference / state.norm(dim=(-2, -1))).mean()))
            print(name, first, label, f"{time.process_time() - began:.1f} s", flush=True)
    columns = ["stored as", "error of a state"]
    columns += [f"turn {turn}: {what}" for turn in TURNS for what in ("recall, points", "KL, nats")]
    rows = [
        [
            label,
            f"{np.mean(errors[label]):.2%}",
            *(cell for turn in TURNS for cell in tallies[label, turn].cells()),
        ]
        for label in RULES
    ]
    turns = ", ".join(map(str, TURNS))
    answers = ", ".join(f"{total * questions:,}" for questions in plan.questions)
    exact_recall = ", ".join(f"{tallies['int8', turn].exact_recall():.2%}" for turn in TURNS)
    return [
        f"## {name}",
        "",
        f"{total:,} conversations of {len(asked[0].tokens)} tokens. "
        f"In turns {turns} they have {answers} answers. "
        f"With exact checkpoints {exact_recall} are right.",
        "",
        *table(columns, rows),
        "",
        f"After {TURNS[-1]} turns:",
        "",
        *(
            f"- {label}: {verdict(*tallies[label, TURNS[-1]].difference())}"
            for label, rule in RULES.items()
            if rule.steps == 127
        ),
        "",
    ]


def verdict(difference: float, half: float) -> str:
    """Say whether the 95 % interval of a difference in points shows that the goal is met."""
    words = f"recall changes by {difference:+.3f} ± {half:.3f} points. The goal of at most {GOAL} "
    if difference - half >= -GOAL:
        return words + "points lost is met."
    missed = difference + half < -GOAL
    return words + (
        "points lost is missed." if missed else "points lost is neither met nor missed."
    )


def compare_with_engine(name: str) -> list[str]:
    """Compare log-probabilities of right answers with those of a vLLM engine in bfloat16."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    draw = np.random.default_rng(1)
    asked = [draw_conversation(draw, PLANS[name]) for _ in range(ENGINE_CONVERSATIONS)]
    found, _ = answer(model, asked, None)
    with tempfile.TemporaryDirectory() as folder:
        settings = model_cases.settings(MODELS / name, "bfloat16", kv_cache_dtype="auto")
        with contextlib.closing(EngineHost(Path(folder) / "log.txt")) as engine:
            engine.engine(**settings)
            prompts = [one.tokens.tolist() for one in asked]
            outputs = engine.generate(prompts, 1, prompt_logprobs=True)
    ours, theirs, ranks = [], [], []
    for turn in TURNS:
        ours.append(found[turn].gather(-1, right_answers(asked, turn)[..., None]).flatten())
        places = [(output, i - 1) for output, one in zip(outputs, asked, strict=True)
                  for i in one.answers[turn - 1]]  # fmt: skip
        theirs += [(output.prompt_logprobs or [])[i] for output, i in places]
        ranks += [(output.prompt_ranks or [])[i] for output, i in places]
    difference = (torch.cat(ours) - torch.tensor(theirs)).abs()
    right = torch.cat(
        [(found[turn].argmax(-1) == right_answers(asked, turn)).flatten() for turn in TURNS]
    )
    return [
        f"vLLM (bfloat16, unquantised cache) and transformers (float32) answer {len(ranks):,} "
        f"questions of {name}: {np.mean(np.array(ranks) == 1):.2%} and "
        f"{float(right.double().mean()):.2%} are right. The log-probabilities of the right answers "
        f"differ by {float(difference.mean()):.4f} nats on average and by at most "
        f"{float(difference.max()):.3f}.",
        "",
    ]
