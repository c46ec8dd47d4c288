# SPDX-License-Identifier: Apache-2.0
"""Train a recall model: `python -m tests.recall.train gemma3` (or another name of `SHAPES`).

Sequences start short and become longer when the share of correct answers reaches a goal. Only
answers and text count in the loss. The result is the folder `tests/recall/models/NAME` with
`config.json`, `model.safetensors` in bfloat16, the tokenizer and `curve.json`.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from testing import recall_sequences
from testing.recall_sequences import ANSWER, KINDS
from tests.recall.initial_weights import new_model
from tests.recall.shapes import SHAPES, save

RECENT_STEPS = 8
WARM_UP_STEPS = 20
TEXT_WEIGHT = 0.2


@dataclass(frozen=True)
class Schedule:
    """How a model is trained.

    Attributes:
        lengths, rows: The tokens of a sequence and the sequences of a step, by stage.
        shares: The share of each of `KINDS`, by stage; the last entry is for all later stages.
        good: A stage ends when recall and copying reach this share of correct answers.
        last_steps: How many steps use the full length, while the learning rate falls to zero.
    """

    # The first stage gets more copies, which have more to predict.
    lengths: tuple[int, ...] = (64, 256, 1024, 2048)
    rows: tuple[int, ...] = (16, 4, 2, 2)
    shares: tuple[tuple[float, ...], ...] = ((0.3, 0.6, 0.1), (0.5, 0.3, 0.2))
    good: float = 0.95
    learning_rate: float = 3e-3
    last_steps: int = 80


SCHEDULES = {
    # A state of 128 x 128 holds fewer pairs than a KV cache, and copies have too many.
    "gated-deltanet": Schedule(
        (32, 64, 128, 256), (64, 32, 16, 8), ((0.9, 0.0, 0.1),), 0.93, 2e-3, 450
    ),
}
"""The schedules of the models that are not trained by the default `Schedule()`."""


def batch(
    draw: np.random.Generator, length: int, rows: int, shares: Sequence[float]
) -> tuple[list, list]:
    """Draw kinds and sequences. `shares` has the share of each of `KINDS`."""
    kinds = list(draw.choice(list(KINDS), p=shares, size=rows))
    return kinds, [KINDS[kind](draw, length) for kind in kinds]


def losses(
    model, rows: list[recall_sequences.Sequence]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of answers, the loss of text, and each row's share of correct answers."""
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    kinds = torch.from_numpy(np.stack([row.kinds for row in rows]))
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    kinds, wanted = kinds[:, 1:], tokens[:, 1:]
    counted = kinds > 0
    logits, labels = model.lm_head(hidden[counted]).float(), wanted[counted]
    loss = functional.cross_entropy(logits, labels, reduction="none")
    answers = kinds[counted] == ANSWER
    right = torch.full(kinds.shape, torch.nan)
    right[kinds == ANSWER] = (logits.argmax(-1) == labels)[answers].float()
    answer_loss, text_loss = (
        part.mean() if len(part) else loss.new_zeros(()) for part in (loss[answers], loss[~answers])
    )
    return answer_loss, text_loss, right.nanmean(dim=1)


def rate(plan: Schedule, step: int, full_since: int | None) -> float:
    """Return the learning rate of a step. Sequences reached full length at step `full_since`."""
    if full_since is not None:
        return plan.learning_rate * max(0.0, 1 - (step - full_since) / plan.last_steps)
    return plan.learning_rate * min(1.0, (step + 1) / WARM_UP_STEPS)


def train(name: str, folder: Path, seed: int, most_steps: int | None = None) -> None:
    """Train a model for at most `most_steps` steps, and save it in a folder."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    plan = SCHEDULES.get(name, Schedule())
    model = new_model(name).train()
    masters = list(model.parameters())
    # A copy in bfloat16 computes the gradients, and the optimiser updates the float32 weights.
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    print(f"{sum(p.numel() for p in masters) / 1e6:.2f} M parameters", flush=True)
    groups = [
        {"params": [p for p in masters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in masters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)
    curve: list[dict[str, float]] = []
    stage, full_since, began = 0, None, time.monotonic()
    shares_of = dict(zip(KINDS, zip(*plan.shares, strict=True), strict=True))
    answered = [kind for kind in ("recall", "copy") if any(shares_of[kind])]
    recent = {kind: collections.deque(maxlen=RECENT_STEPS) for kind in answered}
    step = 0
    while step != most_steps and (full_since is None or step < full_since + plan.last_steps):
        drawn = plan.shares[min(stage, len(plan.shares) - 1)]
        kinds, rows = batch(draw, plan.lengths[stage], plan.rows[stage], drawn)
        for group in optimiser.param_groups:
            group["lr"] = rate(plan, step, full_since)
        answers, text, right = losses(rounded, rows)
        rounded.zero_grad(set_to_none=True)
        (answers + TEXT_WEIGHT * text).backward()
        for master, parameter in zip(masters, rounded.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimiser.step()
        with torch.no_grad():
            for master, parameter in zip(masters, rounded.parameters(), strict=True):
                parameter.copy_(master)
        for kind, steps in recent.items():
            steps.append([float(r) for r, k in zip(right, kinds, strict=True) if k == kind])
        flat = {kind: [share for step in steps for share in step] for kind, steps in recent.items()}
        shares = {kind: sum(of_kind) / max(1, len(of_kind)) for kind, of_kind in flat.items()}
        if step % 5 == 0:
            point = {
                "step": step,
                "length": plan.lengths[stage],
                "seconds": round(time.monotonic() - began, 1),
                "answer_loss": round(answers.item(), 4),
                "text_loss": round(text.item(), 4),
                **{kind: round(share, 4) for kind, share in shares.items()},
            }
            curve.append(point)
            print(json.dumps(point), flush=True)
        step += 1
        enough = len(recent["recall"]) == RECENT_STEPS and min(shares.values()) > plan.good
        if full_since is None and enough:
            stage += 1
            for steps in recent.values():
                steps.clear()
            if stage == len(plan.lengths) - 1:
                full_since = step
    save(model, folder, curve)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    models = Path(__file__).parent / "models"
    train(arguments.name, arguments.out or models / arguments.name, arguments.seed)
