# SPDX-License-Identifier: Apache-2.0
"""Build a small byte-level BPE tokenizer with a chat template, and prompts of its tokens."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 512
"""Number of tokens, including special ones."""

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (BOS, EOS, PAD, *ROLES)
"""Their ids are 0, 1, 2, ... in this order."""

BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID = 0, 1, 2

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TRAINING_TEXT = """
A page holds the keys and the values of a block of tokens for one layer of the model.
The scheduler asks the cache for free blocks before it runs the next step of a request.
When two prompts begin with the same words the second one reads the pages of the first.
A hybrid model keeps a small state for some layers and a growing cache for the others.
Keys are stored in eight bits and values in four bits with a scale and a zero for each token.
The river runs slowly through the old town and the children watch the boats from the bridge.
In winter the lake is covered with ice and the people walk across it to the other side.
She opened the window and the sound of the sea and the smell of salt came into the room.
Every morning the baker lights the oven long before the sun is up and the streets are empty.
He wrote a long letter to his brother and told him about the garden and the apple trees.
The train left the station at noon and crossed the mountains before the evening came.
"""


def build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train the tokenizer (in milliseconds), save it to a model's folder and return it.

    It has exactly `VOCAB_SIZE` tokens and encodes every text, because all 256 bytes are tokens.

    Raises:
        ValueError: The training text is too short for that many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT.strip().splitlines(), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(
            f"the training text gives {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}"
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
    )
    fast.save_pretrained(folder)
    return fast


def word_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the tokens that decode to a space and one whole word of the training text."""
    words = {f" {word}" for word in re.findall(r"[a-z]{3,}", TRAINING_TEXT)}
    return [
        token
        for token in range(len(SPECIAL_TOKENS), VOCAB_SIZE)
        if tokenizer.decode([token]) in words
    ]


def random_prompt(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    tokens = [draw.randrange(len(SPECIAL_TOKENS), VOCAB_SIZE) for _ in range(length - 1)]
    return [BOS_TOKEN_ID, *tokens]


def repeated_prompt(length: int, seed: int) -> list[int]:
    """Return a prompt that repeats a short text, so that ngram speculation proposes drafts."""
    text = random_prompt(7 + seed % 5, seed)[1:]
    return (text * math.ceil(length / len(text)))[:length]


def mixed_prompts(count: int, longest: int = 800) -> list[list[int]]:
    """Make prompts of 2 to `longest` tokens. Their lengths are spread on a logarithmic scale."""
    draw = random.Random(0)
    lengths = [round(2 * (longest / 2) ** draw.random()) for _ in range(count)]
    return [random_prompt(length, seed) for seed, length in enumerate(lengths)]
