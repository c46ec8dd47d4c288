# SPDX-License-Identifier: Apache-2.0
"""Training data and results of the recall models; tests/e2e/test_recall.py queries the models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoConfig, AutoTokenizer

from testing.recall_sequences import ANSWER, FIRST_BYTE, KINDS
from tests.recall.shapes import SHAPES, build_tokenizer
from tests.recall.train import LENGTHS, attend, train

MODELS = Path(__file__).parent / "models"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_answer_repeats_an_earlier_token(kind: str, length: int) -> None:
    draw = np.random.default_rng(length)
    answers = 0
    for _ in range(20):
        sequence = KINDS[kind](draw, length)
        assert len(sequence.tokens) == len(sequence.kinds) == len(sequence.sources) == length
        (places,) = (sequence.kinds == ANSWER).nonzero()
        assert (sequence.sources[places] < places - 1).all()
        assert (sequence.tokens[sequence.sources[places]] == sequence.tokens[places]).all()
        answers += len(places)
    assert (answers > 0) == (kind != "text")


@pytest.mark.parametrize("length", LENGTHS)
def test_a_key_determines_its_answer(length: int) -> None:
    sequence = KINDS["recall"](np.random.default_rng(length), length)
    tokens = sequence.tokens.tolist()
    (places,) = (sequence.kinds == ANSWER).nonzero()
    for place in places:
        # A key occurs twice: before its value, and in the question.
        assert tokens.count(tokens[place - 1]) == 2
        assert tokens[place - 1] == tokens[sequence.sources[place] - 1]


@pytest.mark.parametrize("length", [64, 256, 512])
@pytest.mark.parametrize("window", [None, 64])
def test_attention_for_training_equals_torchs(length: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(2, heads, length, 32, generator=generator) for heads in (4, 2, 2)
    )
    back = torch.arange(length)[:, None] - torch.arange(length)
    seen = (back >= 0) & (back < (window or length))
    expected = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True
    )
    out, _ = attend(torch.nn.Identity(), query, key, value, None, 0.3, window)
    torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_committed_model_has_the_shape_of_the_script_and_learnt_to_recall(shape: str) -> None:
    config, expected = AutoConfig.from_pretrained(MODELS / shape), SHAPES[shape]()
    for name in ("hidden_size", "num_hidden_layers", "layer_types", "vocab_size", "head_dim"):
        assert getattr(config, name) == getattr(expected, name)
    with safe_open(MODELS / shape / "model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    curve = json.loads((MODELS / shape / "curve.json").read_text())
    assert curve[0]["recall"] < 0.7
    assert curve[-1]["length"] == LENGTHS[-1]
    assert min(curve[-1]["recall"], curve[-1]["copy"]) >= 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tokenizer_makes_a_token_of_each_byte(shape: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / shape)
    text = "Größe: 1\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == [FIRST_BYTE + byte for byte in text.encode()]
    assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_training_learns_within_a_few_steps(tmp_path: Path) -> None:
    train("gemma3", tmp_path, seed=0, most_steps=16)
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert curve[-1]["answer_loss"] < curve[0]["answer_loss"] - 1
    assert (tmp_path / "model.safetensors").exists()
