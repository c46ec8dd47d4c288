# SPDX-License-Identifier: Apache-2.0
"""Draw conversations, and let a model answer their questions from stored states."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from benchmarks.compressed_checkpoints.storage import (
    Rule,
    running_delta_rule,
    state_layers,
    store_checkpoint,
    stored_state,
)
from testing.recall_sequences import BOS, FIRST_SYMBOL, FIRST_VALUE, KEYS, VOCAB_SIZE, corpus

TURNS = (1, 4, 16)
"""The turns whose answers are counted. A turn resumes from as many checkpoints as its number."""


@dataclass(frozen=True)
class Plan:
    """The conversations of a model.

    Attributes:
        first_pairs, pairs, text: Pairs before turn 1, and pairs and bytes of text in each turn.
        questions, few: Questions in each of `TURNS`, and in each of the other turns.
        conversations, batch: How many conversations to measure, and how many at once.
    """

    first_pairs: int
    pairs: int
    text: int
    questions: tuple[int, ...]
    few: int
    conversations: int
    batch: int


@dataclass(frozen=True)
class Conversation:
    """The token ids of a conversation.

    Attributes:
        tokens: int64 [T].
        ends: The end of the prompt before turn 1, then the end of each turn.
        answers: For turn 1, 2, ... the indexes of the answers. A key comes before each answer.
    """

    tokens: np.ndarray
    ends: list[int]
    answers: list[list[int]]


def draw_conversation(draw: np.random.Generator, plan: Plan) -> Conversation:
    """Draw pairs of keys and values, questions about the pairs of earlier turns, and text.

    No pair is asked for twice. A turn ends, and the next one resumes, inside text.
    """
    count = plan.first_pairs + TURNS[-1] * plan.pairs
    keys = FIRST_SYMBOL + draw.permutation(KEYS)[:count]
    pairs = np.stack([keys, draw.integers(FIRST_VALUE, VOCAB_SIZE, count)], 1).tolist()
    tokens, not_asked, ends, answers = [BOS], list[Any](), list[int](), list[list[int]]()
    for turn in range(TURNS[-1] + 1):
        if turn:
            draw.shuffle(not_asked)
            questions = dict(zip(TURNS, plan.questions, strict=True)).get(turn, plan.few)
            answers.append([len(tokens) + 2 * i + 1 for i in range(questions)])
            tokens += [token for _ in range(questions) for token in not_asked.pop()]
        new = [pairs.pop() for _ in range(plan.pairs if turn else plan.first_pairs)]
        not_asked += new
        start = int(draw.integers(0, len(corpus()) - plan.text))
        tokens += [token for pair in new for token in pair]
        tokens += corpus()[start : start + plan.text].tolist()
        ends.append(len(tokens))
    return Conversation(np.array(tokens), ends, answers)


def right_answers(asked: Sequence[Conversation], turn: int) -> torch.Tensor:
    """Return the right answers, int64 [conversations, questions], of a turn."""
    return torch.from_numpy(np.stack([one.tokens[one.answers[turn - 1]] for one in asked]))


@torch.inference_mode()
def answer(
    model: Any, asked: Sequence[Conversation], rule: Rule | None
) -> tuple[dict[int, torch.Tensor], list[torch.Tensor]]:
    """Answer the questions of conversations; each turn resumes from states stored by `rule`.

    Returns:
        For each of `TURNS`, log-probabilities, float64 [conversations, questions, vocabulary]. And
        for each layer, the recurrent states at the end of the last turn, before they are stored.
    """
    tokens = torch.from_numpy(np.stack([one.tokens for one in asked]))
    cache, start, found, states = None, 0, {}, list[torch.Tensor]()
    # Without attention layers, transformers cannot tell how many tokens a cache has, so it fails to
    # build masks. It skips that if a mask for each type of layer is given.
    kinds = set(model.config.layer_types)
    masks = None if "full_attention" in kinds else dict.fromkeys(kinds)
    with contextlib.ExitStack() as patches:
        if rule is not None and rule.running:
            delta_rule = running_delta_rule(lambda state: stored_state(state, rule))
            patches.enter_context(
                mock.patch.object(qwen3_next, "torch_chunk_gated_delta_rule", delta_rule)
            )
        for turn, end in enumerate(asked[0].ends):
            output = model.model(
                tokens[:, start:end],
                attention_mask=masks,
                position_ids=torch.arange(start, end)[None],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            if turn in TURNS:
                keys = [index - 1 - start for index in asked[0].answers[turn - 1]]
                logits = model.lm_head(output.last_hidden_state[:, keys])
                found[turn] = logits.double().log_softmax(-1)
            states = [layer.recurrent_states[0].clone() for layer in state_layers(cache)]
            if rule is not None:
                store_checkpoint(cache, rule, model.config.linear_key_head_dim)
            start = end
    return found, states
