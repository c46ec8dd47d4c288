# SPDX-License-Identifier: Apache-2.0
"""Draw queries, keys and values at random, or record them from a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from testing.recall_sequences import documentation

SCORE_SIZES = (1.0, 2.0)
"""Random queries are scaled so that their scores have these standard deviations over the keys.
With 1, a third of the tokens get most of the weight. With 2, a handful of tokens get it."""

RECORDED = "recorded"

PROMPTS, TOKENS = 4, 1024
"""How many prompts to record from a model, and how many tokens each prompt has."""

KV_HEADS = 2
QUERIES = 64
"""How many tokens at the end of a sequence are queries."""


@dataclass(frozen=True)
class Sample:
    """One layer of one sequence.

    Attributes:
        name: The source: a distribution or a layer.
        queries: Maps a score size, or RECORDED, to the last Q tokens' queries, float32 [Q, Hq, D].
        key: float32 [L, H, D].
        value: float32 [L, H, D].
        scale: Factor of the scores.
        window: Tokens that a query sees, including itself; None for all.
    """

    name: str
    queries: dict[str, torch.Tensor]
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    window: int | None = None


Draw = Callable[[torch.Generator, tuple[int, ...]], torch.Tensor]


def gaussian(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def student(freedom: int) -> Draw:
    """Return a function that draws from Student's t distribution, which has heavy tails."""

    def draw(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
        squares = sum(gaussian(generator, shape).square() for _ in range(freedom))
        return gaussian(generator, shape) * torch.rsqrt(squares / freedom)

    return draw


def laplace(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    return (-uniform.sign() * torch.log1p(-2 * uniform.abs())).to(torch.float32)


def mixture(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw normal numbers, of which one in fifty is eight times as large."""
    large = torch.rand(shape, generator=generator) < 0.02
    return gaussian(generator, shape) * torch.where(large, 8.0, 1.0)


def outlier_channels(one_of: int, size: float) -> Draw:
    """Draw normal numbers. In every head, one dim in `one_of` is `size` times as large."""

    def draw(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
        numbers = gaussian(generator, shape)
        dims = torch.randperm(shape[-1], generator=generator)[: max(1, shape[-1] // one_of)]
        numbers[..., dims] *= size
        return numbers

    return draw


def channel_means(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw normal numbers, and add a mean to each dim, like a bias: a normal number times 3."""
    return gaussian(generator, shape) + 3 * gaussian(generator, shape[1:])


def offset(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw normal numbers around the same mean for all dims."""
    return gaussian(generator, shape) + 10


DISTRIBUTIONS: dict[str, Draw] = {
    "Gaussian": gaussian,
    "Student t, 3": student(3),
    "Student t, 4": student(4),
    "Laplace": laplace,
    "1 in 50 x 8": mixture,
    "channels x 6": outlier_channels(32, 6.0),
    "channels x 20": outlier_channels(64, 20.0),
    "one channel x 100": outlier_channels(1024, 100.0),
    "channel means": channel_means,
    "offset 10": offset,
}
"""How keys and values are drawn."""


def drawn(head_size: int, length: int, seed: int) -> Iterator[Sample]:
    for name, draw in DISTRIBUTIONS.items():
        generator = torch.Generator().manual_seed(seed)
        shape = (length, KV_HEADS, head_size)
        key, value = draw(generator, shape), draw(generator, shape)
        query = gaussian(generator, (QUERIES, KV_HEADS, head_size))
        query /= torch.einsum("qhd,khd->qhk", query, key).std(-1, keepdim=True)
        queries = {f"{size:g}": size * query for size in SCORE_SIZES}
        yield Sample(name, queries, key, value, 1.0)


def prompts(folder: Path) -> torch.Tensor:
    """Tokenise `documentation` for a model. Returns int64 [PROMPTS, TOKENS]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(documentation()[: 8 * PROMPTS * TOKENS])["input_ids"]
    return torch.tensor(ids[: PROMPTS * TOKENS]).view(PROMPTS, TOKENS)


def recorded(folder: Path, token_ids: torch.Tensor) -> Iterator[Sample]:
    """Run a model on prompts, and yield queries, keys and values of every attention layer.

    Args:
        folder: A transformers model, in float32.
        token_ids: int64 [prompts, tokens].
    """
    import transformers

    samples: list[Sample] = []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        q, k, v = (x[0].detach().transpose(0, 1) for x in (query, key, value))
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        queries = {RECORDED: q[-QUERIES:]}
        window = options.get("sliding_window")
        samples.append(Sample(f"layer {module.layer_idx}", queries, k, v, scale, window))
        return transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, mask, **options
        )

    transformers.AttentionInterface.register("recording", attend)
    transformers.masking_utils.AttentionMaskInterface.register(
        "recording", transformers.masking_utils.sdpa_mask
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="recording"
    ).eval()
    for prompt in token_ids:
        samples.clear()
        with torch.inference_mode():
            model(prompt[None], use_cache=False)
        yield from samples
