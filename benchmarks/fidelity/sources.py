# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values to store: drawn at random, or recorded from a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

SCORE_SIZES = (1.0, 2.0)
"""Standard deviations of a random query's scores over the keys: 1, as of unit queries and keys,
spreads the weights over a third of the tokens, 2 leaves a handful."""

RECORDED = "recorded"

KV_HEADS = 2
QUERIES = 64
"""Query tokens, the last of a sequence."""


@dataclass(frozen=True)
class Sample:
    """One layer of one sequence.

    Attributes:
        name: Where it comes from.
        heavy: Whether its values have heavy tails.
        queries: float32 [Q, Hq, D] of the last Q tokens, by what is said of them.
        key: float32 [L, H, D].
        value: Likewise.
        scale: Factor of the scores.
        window: Tokens that a query sees, itself among them; None for all.
    """

    name: str
    heavy: bool
    queries: dict[str, torch.Tensor]
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    window: int | None = None


Draw = Callable[[torch.Generator, tuple[int, ...]], torch.Tensor]


def gaussian(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def student(freedom: int) -> Draw:
    """Return Student's t, whose tails fall as a power of the size."""

    def draw(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
        squares = sum(gaussian(generator, shape).square() for _ in range(freedom))
        return gaussian(generator, shape) * torch.rsqrt(squares / freedom)

    return draw


def laplace(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    return (-uniform.sign() * torch.log1p(-2 * uniform.abs())).to(torch.float32)


def mixture(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw normal numbers, one in fifty of them eight times as large."""
    large = torch.rand(shape, generator=generator) < 0.02
    return gaussian(generator, shape) * torch.where(large, 8.0, 1.0)


def outlier_channels(one_of: int, size: float) -> Draw:
    """Return normal numbers of which one dim in `one_of`, of every head, is `size` times larger."""

    def draw(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
        numbers = gaussian(generator, shape)
        dims = torch.randperm(shape[-1], generator=generator)[: max(1, shape[-1] // one_of)]
        numbers[..., dims] *= size
        return numbers

    return draw


def channel_means(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw normal numbers around means of their dims, three times as large, as of a bias."""
    return gaussian(generator, shape) + 3 * gaussian(generator, shape[1:])


def offset(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw normal numbers around one mean for all dims."""
    return gaussian(generator, shape) + 10


DISTRIBUTIONS: dict[str, tuple[bool, Draw]] = {
    "Gaussian": (False, gaussian),
    "Student t, 3": (True, student(3)),
    "Student t, 4": (True, student(4)),
    "Laplace": (True, laplace),
    "1 in 50 x 8": (True, mixture),
    "channels x 6": (False, outlier_channels(32, 6.0)),
    "channels x 20": (False, outlier_channels(64, 20.0)),
    "one channel x 100": (False, outlier_channels(1024, 100.0)),
    "channel means": (False, channel_means),
    "offset 10": (False, offset),
}
"""Of keys and values: whether their tails are heavy, and how they are drawn."""


def drawn(head_size: int, length: int, seed: int) -> Iterator[Sample]:
    """Draw a sample of every distribution; keys and values of one size whatever the tails."""
    for name, (heavy, draw) in DISTRIBUTIONS.items():
        generator = torch.Generator().manual_seed(seed)
        shape = (length, KV_HEADS, head_size)
        key, value = draw(generator, shape), draw(generator, shape)
        query = gaussian(generator, (QUERIES, KV_HEADS, head_size))
        query /= torch.einsum("qhd,khd->qhk", query, key).std(-1, keepdim=True)
        queries = {f"{size:g}": size * query for size in SCORE_SIZES}
        yield Sample(name, heavy, queries, key, value, 1.0)


def recorded(folder: str, token_ids: torch.Tensor) -> Iterator[Sample]:
    """Yield what every attention layer of a model would store and ask of a prompt.

    Args:
        folder: A model of transformers, in float32.
        token_ids: int64 [prompts, tokens].
    """
    import transformers

    layers: list[dict[str, Any]] = []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        layers.append(
            {
                "layer": module.layer_idx,
                "scale": options.get("scaling") or query.shape[-1] ** -0.5,
                "window": options.get("sliding_window"),
                "tensors": [x.detach().transpose(1, 2) for x in (query, key, value)],
            }
        )
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
        layers.clear()
        with torch.inference_mode():
            model(prompt[None], use_cache=False)
        for found in layers:
            query, key, value = (x[0] for x in found["tensors"])
            yield Sample(
                f"layer {found['layer']}", False,
                {RECORDED: query[-QUERIES:]}, key, value, found["scale"], found["window"],
            )  # fmt: skip
