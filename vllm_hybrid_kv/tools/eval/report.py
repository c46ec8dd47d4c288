# SPDX-License-Identifier: Apache-2.0
"""Show the result of an evaluation as tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from vllm_hybrid_kv.tools.output import Table, figure

DRAWN = (1e-6, 1e3)
"""The range of the axis, in nats. Divergences outside, even infinity, are drawn at its ends."""


def report(document: Mapping[str, Any]) -> Iterator[Table | str]:
    """Yield the lines and tables to print for the JSON document of an evaluation."""
    reference, *others = caches = [cache for cache in document["caches"] if not cache["reason"]]
    yield (
        f"{document['model']} in {reference['dtype']} on {reference['device']}, vLLM "
        f"{document['versions']['vllm']}: {document['positions']:,} predictions in "
        f"{document['sequences']:,} windows of up to {document['longest']:,} tokens"
    )
    if reference["quantised_layers"]:
        yield (
            f"note: the model's configuration makes {reference['name']} "
            f"{reference['cache_dtype']}; use --reference bfloat16 to compare with an unquantised "
            "cache"
        )
    columns = ("cache", "quantised", ">perplexity", ">mean KL", ">99 %", ">99.9 %", ">largest")
    yield Table(
        f"KL divergence of the next token from {reference['name']}, nats",
        (*columns, ">top-1"),
        [
            (
                _folded(cache["name"]),
                f"{cache['quantised_layers']} of "
                f"{cache['quantised_layers'] + cache['unquantised_layers']}",
                f"{cache['perplexity']:,.3f}",
                f"{cache['divergence_mean']:.5f}"
                + (f" ± {cache['divergence_error']:.5f}" if document["sequences"] > 1 else ""),
                f"{cache['divergence_p99']:.4f}",
                f"{cache['divergence_p999']:.4f}",
                f"{cache['divergence_max']:.3f}",
                f"{100 * cache['agreement']:.2f} %",
            )
            for cache in caches
        ],
        "quantised: attention layers; top-1: the most probable token is the same",
    )
    yield Table(
        "by tokens of context: mean KL divergence, top-1 agreement",
        (
            *(">context", ">predictions", ">perplexity"),
            *(f">{_folded(cache['name'])}" for cache in others),
        ),
        [
            (
                f"{row['first']:,}-{row['last']:,}",
                f"{row['positions']:,}",
                f"{row['perplexity']:,.3f}",
                *(
                    f"{part['divergence_mean']:.5f} {100 * part['agreement']:5.1f} %"
                    for part in (cache["by_position"][number] for cache in others)
                ),
            )
            for number, row in enumerate(reference["by_position"])
        ],
        "perplexity: of the reference",
    )


def _folded(name: str) -> str:
    """Return the name of a cache with its settings on a second line."""
    return name.replace("[", "\n").removesuffix("]")


def draw(
    path: Path, document: Mapping[str, Any], scores: Mapping[str, Sequence[numpy.ndarray]]
) -> None:
    """Draw each cache's KL divergence from the reference, by position and as a distribution.

    `scores` has the scores of each window, by the name of the cache.
    """
    reference, *others = document["caches"]
    with figure(path, 1, 2, figsize=(13, 5)) as (drawn, (left, right)):
        drawn.suptitle(
            f"{Path(document['model']).name}: KL divergence of the next token from "
            f"{reference['name']}, {document['positions']:,} predictions"
        )
        for number, cache in enumerate(others):
            if cache["reason"]:
                continue
            colour, rows = f"C{number}", cache["by_position"]
            middles = [(row["first"] * row["last"]) ** 0.5 for row in rows]
            for name, style in (("divergence_mean", "o-"), ("divergence_p99", "--")):
                values = numpy.clip([row[name] for row in rows], *DRAWN)
                left.plot(middles, values, style, color=colour, markersize=4)
            divergences = numpy.concatenate(scores[cache["name"]], axis=1)[1]
            values = numpy.sort(numpy.clip(divergences, *DRAWN))
            above = 1 - numpy.arange(len(values)) / len(values)
            right.plot(
                *(values, above),
                color=colour,
                label=f"{cache['name']}, mean {cache['divergence_mean']:.2g}",
            )
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
        left.set(yscale="log", xlabel="tokens of context", ylabel="nats")
        left.set_title("by position: mean, and 99 % dashed", fontsize=10)
        right.set(xscale="log", yscale="log", xlabel="nats", ylabel="share of predictions above")
        right.set_title("the tail", fontsize=10)
        drawn.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)
