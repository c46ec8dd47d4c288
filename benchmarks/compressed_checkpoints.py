# SPDX-License-Identifier: Apache-2.0
"""Measure what states of Gated DeltaNet lose if their checkpoints are stored in 8 bits.

`python -m benchmarks.compressed_checkpoints [--output FILE]`. The trained Qwen3-Next model answers
questions in conversations of 16 turns (float32, transformers). Every turn resumes from the stored
states of the turn before. All rules answer the same questions. A vLLM engine (bfloat16) answers a
few of them too, to check that both run the same model.

The trained model forgets quickly, so a second measurement uses one head of Gated DeltaNet as a
memory of random keys and values, with a slow decay and the size of Qwen3.6's heads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from benchmarks.markdown import machine, table
from testing import model_cases
from testing.engine_host import EngineHost
from testing.machine import host
from testing.recall_sequences import BOS, FIRST_SYMBOL, FIRST_VALUE, KEYS, VOCAB_SIZE, corpus
from vllm_hybrid_kv.kernels.reference import rotate

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests/recall/models/qwen3-next"
SHAPE = ROOT / "testing/shapes/qwen3.6-35b-a3b/config.json"

LARGEST = 3e38
"""Larger magnitudes could overflow when they are restored."""

TURNS = (1, 4, 16)
"""The turns whose answers are counted. A turn resumes from as many checkpoints as its number."""
CONVERSATIONS, BATCH = 560, 56
FIRST_PAIRS, PAIRS, TEXT = 48, 12, 12
QUESTIONS, FEW_QUESTIONS = 36, 2
"""Questions in the turns that are counted, and in the other turns."""
ENGINE_CONVERSATIONS = 16

HEAD, MEMORIES, MEMORY_PAIRS, VALUES, DECAY = 128, 320, 32, 892, 0.9995


@dataclass(frozen=True)
class Rule:
    """How states are stored.

    Attributes:
        steps: The largest code: 127 stores 8 bits, 7 stores 4 bits, 0 stores zeros.
        rotated: Whether rows are rotated before they are rounded to codes.
        conv: Whether the states of the convolution are stored by the same rule.
        running: Whether the recurrent state is rounded after every token, not only at rest.
    """

    steps: int = 127
    rotated: bool = False
    conv: bool = False
    running: bool = False
    bfloat16: bool = False


RULES = {
    "bfloat16": Rule(bfloat16=True),
    "int8": Rule(),
    "int8, rotated": Rule(rotated=True),
    "int8, conv too": Rule(conv=True),
    "int4, rotated": Rule(7, rotated=True),
    "zeros": Rule(0),
    "int8, running": Rule(running=True),
    "int8, rotated, running": Rule(rotated=True, running=True),
}


def compress(rows: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """Round float32 rows to codes, with one scale per row.

    The scale has only 8 significant bits, so that code * scale is exact in float32. Without a
    rotation, a restored row therefore compresses to the same codes and scale again.

    Args:
        rows: float32 [..., D]. Rows whose magnitudes are all below 1e-36 are stored as zeros.
        rule: How to store the rows.

    Returns:
        int8 codes [..., D] and bfloat16 scales [..., 1].

    Raises:
        ValueError: A number is not finite, or its magnitude is above `LARGEST`.
    """
    rows = rotate(rows) if rule.rotated else rows
    largest = rows.abs().amax(-1, keepdim=True)
    if not bool((largest <= LARGEST).all()):
        raise ValueError(f"states must be finite and at most {LARGEST}, got {largest.max()}")
    scales = (largest / max(rule.steps, 1)).to(torch.bfloat16)
    scales[scales < torch.finfo(torch.bfloat16).tiny] = 0
    codes = (rows / scales).where(scales > 0, 0).round().clamp(-rule.steps, rule.steps)
    return codes.to(torch.int8), scales


def restore(codes: torch.Tensor, scales: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Return the float32 rows [..., D] of `codes` and `scales`; see `compress`."""
    rows = codes.to(torch.float32) * scales.to(torch.float32)
    return rotate(rows) if rule.rotated else rows


def stored(rows: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Return float32 rows [..., D] as they are after they were stored and restored."""
    if rule.bfloat16:
        return rows.to(torch.bfloat16).to(torch.float32)
    return restore(*compress(rows, rule), rule)


def stored_state(state: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Store and restore a recurrent state [..., key dims, value dims].

    vLLM's layout is [..., value dims, key dims], so a row has the key dims of one value dim.
    """
    return stored(state.mT, rule).mT


def store_checkpoint(cache: Any, rule: Rule, head: int) -> None:
    """Replace the states in a cache of transformers by what `rule` restores of them.

    Args:
        cache: A `transformers.DynamicCache`.
        rule: How to store the states.
        head: Channels of the convolution's states that share a scale, for each token.
    """
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            state, conv = layer.recurrent_states[0], layer.conv_states[0]
            if not rule.running:
                state.copy_(stored_state(state, rule))
            if rule.conv:
                rows = conv.mT.unflatten(-1, (-1, head))
                conv.copy_(stored(rows, rule).flatten(-2).mT)


def round_running(rule: Rule | None) -> Callable[..., Any]:
    """Make a Gated DeltaNet that rounds its state by `rule` after every token."""

    def delta_rule(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        initial_state: torch.Tensor | None = None, **inputs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        g, beta = inputs.pop("g"), inputs.pop("beta")
        outputs, state = [], initial_state
        for token in range(query.shape[1]):
            parts = [part[:, token : token + 1] for part in (query, key, value)]
            gates = {"g": g[:, token : token + 1], "beta": beta[:, token : token + 1]}
            output, state = qwen3_next.torch_recurrent_gated_delta_rule(
                *parts, initial_state=state, **gates, **inputs
            )
            state = state if rule is None else stored_state(state, rule)
            outputs.append(output)
        return torch.cat(outputs, 1), state

    return delta_rule


@dataclass(frozen=True)
class Conversation:
    """Token ids of all turns, where each turn ends, and for each turn the indexes of its answers.

    Attributes:
        tokens: int64 [T].
        ends: The end of the prompt before turn 1, then the ends of all turns.
        answers: The answers of turn 1, 2, ...; the token before an answer is its question.
    """

    tokens: np.ndarray
    ends: list[int]
    answers: list[list[int]]


def draw_conversation(draw: np.random.Generator) -> Conversation:
    """Draw pairs of keys and values and text; each turn then asks for pairs of earlier turns.

    No pair is asked for twice. A turn has questions, new pairs and text, so it resumes inside text.
    """
    count = FIRST_PAIRS + TURNS[-1] * PAIRS
    keys = FIRST_SYMBOL + draw.permutation(KEYS)[:count]
    pairs = np.stack([keys, draw.integers(FIRST_VALUE, VOCAB_SIZE, count)], 1).tolist()
    tokens, known, not_asked = [BOS], 0, list[Any]()
    ends, answers = list[int](), list[list[int]]()
    for turn in range(TURNS[-1] + 1):
        if turn:
            draw.shuffle(not_asked)
            questions = QUESTIONS if turn in TURNS else FEW_QUESTIONS
            answers.append([len(tokens) + 2 * i + 1 for i in range(questions)])
            tokens += [token for _ in range(questions) for token in not_asked.pop()]
        new = pairs[known : known + (PAIRS if turn else FIRST_PAIRS)]
        known += len(new)
        not_asked += new
        start = int(draw.integers(0, len(corpus()) - TEXT))
        tokens += [token for pair in new for token in pair] + corpus()[start:][:TEXT].tolist()
        ends.append(len(tokens))
    return Conversation(np.array(tokens), ends, answers)


@torch.inference_mode()
def answer(
    model: Any, asked: Sequence[Conversation], rule: Rule | None
) -> tuple[dict[int, torch.Tensor], list[torch.Tensor]]:
    """Answer the questions of conversations; every turn resumes from states stored by `rule`.

    Returns:
        For each of `TURNS`, log-probabilities [conversations, questions, vocabulary]; and the
        recurrent states at the last checkpoint, before they are stored.
    """
    tokens = torch.from_numpy(np.stack([one.tokens for one in asked]))
    ends, answers = asked[0].ends, asked[0].answers
    cache, start, found, states = None, 0, {}, list[torch.Tensor]()
    steps = contextlib.ExitStack()
    if rule is not None and rule.running:
        name = "torch_chunk_gated_delta_rule"
        steps.enter_context(mock.patch.object(qwen3_next, name, round_running(rule)))
    with steps:
        for turn, end in enumerate(ends):
            output = model.model(tokens[:, start:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            if turn in TURNS:
                places = [index - 1 - start for index in answers[turn - 1]]
                logits = model.lm_head(output.last_hidden_state[:, places])
                found[turn] = logits.float().log_softmax(-1)
            layers = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
            states = [layer.recurrent_states[0].clone() for layer in layers]
            if rule is not None:
                store_checkpoint(cache, rule, model.config.linear_key_head_dim)
            start = end
    return found, states


def wanted(asked: Sequence[Conversation], turn: int) -> torch.Tensor:
    """Return the right answers [conversations, questions] of a turn."""
    return torch.from_numpy(np.stack([one.tokens[one.answers[turn - 1]] for one in asked]))
