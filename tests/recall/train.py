# SPDX-License-Identifier: Apache-2.0
"""Train a recall model: `python -m tests.recall.train gemma3` or `qwen3-next`.

One core, under an hour; the same machine and seed give the same weights. Sequences begin short
and become longer when the model answers `GOOD` of the questions. Only answers and text count.
Writes the model's folder (`config.json`, `model.safetensors` in bfloat16, the tokenizer) and
`curve.json` to `tests/recall/models/NAME`.
"""

from __future__ import annotations

import argparse
import collections
import copy
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from tests.recall.attention import use_short_attention
from tests.recall.beginning import new_model
from tests.recall.sequences import ANSWER, KINDS, Sequence
from tests.recall.shapes import SHAPES, save

LENGTHS = (64, 256, 1024, 2048)
ROWS = (16, 4, 2, 2)
GOOD, LATELY = 0.95, 8
"""Share of right answers, of recall and of copying, from which on sequences become longer, and
over how many steps it is taken."""
LEARNING_RATE = 3e-3
WARM_UP_STEPS = 20
LAST_STEPS = 80
"""Steps at the full length, in which the learning rate falls to zero."""
TEXT_WEIGHT = 0.2


def batch(draw: np.random.Generator, length: int, rows: int, first: bool) -> dict[str, list]:
    """Draw sequences; in the first stage mostly copying, in which half of all tokens count."""
    shares = [0.3, 0.6, 0.1] if first else [0.5, 0.3, 0.2]
    drawn = draw.choice(list(KINDS), p=shares, size=rows)
    return {"kinds": list(drawn), "rows": [KINDS[kind](draw, length) for kind in drawn]}


def losses(model, rows: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the losses of answers and of text, and the share of right answers row by row."""
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
    text = loss[~answers]
    zero = loss.new_zeros(())
    return (
        loss[answers].mean() if answers.any() else zero,
        text.mean() if len(text) else zero,
        right.nanmean(dim=1),
    )


def rate(step: int, last_from: int | None) -> float:
    """Return the learning rate of a step; `last_from` is where the full length began."""
    if last_from is not None:
        return LEARNING_RATE * max(0.0, 1 - (step - last_from) / LAST_STEPS)
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS)


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def train(
    name: str, folder: Path, seed: int, most_steps: int | None = None, save_every_s: float = 60.0
) -> None:
    """Train the model of a name into a folder, with `most_steps` no longer than that."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    model = new_model(name).train()
    masters = list(model.parameters())
    # Activations, and so most of the work, are in bfloat16; the optimiser adds in float32.
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    use_short_attention(rounded)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    curve: list[dict[str, float]] = []
    stage, last_from, began, saved = 0, None, time.monotonic(), time.monotonic()
    lately = {kind: collections.deque(maxlen=LATELY) for kind in ("recall", "copy")}
    step = 0
    while step != most_steps and (last_from is None or step < last_from + LAST_STEPS):
        length = LENGTHS[stage]
        drawn = batch(draw, length, ROWS[stage], first=stage == 0)
        for group in optimiser.param_groups:
            group["lr"] = rate(step, last_from)
        answers, text, right = losses(rounded, drawn["rows"])
        rounded.zero_grad(set_to_none=True)
        (answers + TEXT_WEIGHT * text).backward()
        for master, parameter in zip(masters, rounded.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            for master, parameter in zip(masters, rounded.parameters(), strict=True):
                parameter.copy_(master)
        for kind, seen in lately.items():
            seen += [[float(r) for r, k in zip(right, drawn["kinds"], strict=True) if k == kind]]
        shares = {kind: _mean(list(itertools.chain(*seen))) for kind, seen in lately.items()}
        if step % 5 == 0:
            point = {
                "step": step,
                "length": length,
                "seconds": round(time.monotonic() - began, 1),
                "answer_loss": round(answers.item(), 4),
                "text_loss": round(text.item(), 4),
                **{kind: round(share, 4) for kind, share in shares.items()},
            }
            curve.append(point)
            print(json.dumps(point), flush=True)
        step += 1
        enough = len(lately["recall"]) == LATELY and min(shares.values()) > GOOD
        if last_from is None and enough:
            stage += 1
            for seen in lately.values():
                seen.clear()
            if stage == len(LENGTHS) - 1:
                last_from = step
        if time.monotonic() - saved > save_every_s:
            save(model, folder, curve)
            saved = time.monotonic()
    save(model, folder, curve)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.out or Path(__file__).parent / "models" / arguments.name
    train(arguments.name, folder, arguments.seed)


if __name__ == "__main__":
    main()
