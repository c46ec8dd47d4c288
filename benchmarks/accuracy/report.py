# SPDX-License-Identifier: Apache-2.0
"""Write the report of a run, in Markdown."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.accuracy.measure import (
    E4M3,
    FLOOR,
    FORMAT_1,
    OURS,
    REFERENCE,
    VARIANTS,
    VLLM,
    Scores,
    ratio,
)
from benchmarks.accuracy.models import GEMMA, MODELS, SMOLLM2
from benchmarks.markdown import machine, table

GOALS = {
    SMOLLM2: {FORMAT_1.name: 0.6, VLLM.name: 0.5, E4M3.name: 0.75},
    GEMMA: {FORMAT_1.name: 0.6, VLLM.name: 0.5, E4M3.name: 1.05},
}
"""Upper limits, by model and cache, of k8v4's mean divergence divided by that cache's."""


def _caches(caches: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for cache in caches:
        layers = cache["quantised_layers"] + cache["unquantised_layers"]
        quantised = layers if "by rule" in cache["name"] else cache["quantised_layers"]
        rows.append(
            [
                *(cache["name"], f"{quantised} of {layers}", f"{cache['perplexity']:,.3f}"),
                f"{cache['divergence_mean']:.5f} ± {cache['divergence_error'] or 0:.5f}",
                *(f"{cache[f'divergence_{name}']:.4f}" for name in ("p99", "p999", "max")),
                f"{100 * cache['agreement']:.2f} %",
            ]
        )
    columns = ["cache", "quantised layers", "perplexity", "mean KL, nats"]
    return table([*columns, "99 %", "99.9 %", "largest", "same top-1"], rows)


def _by_position(caches: Sequence[Mapping[str, Any]]) -> list[str]:
    reference, *others = caches
    rows = [
        [
            f"{row['first']:,}-{row['last']:,}",
            *(f"{row['positions']:,}", f"{row['perplexity']:.3f}"),
            *(f"{cache['by_position'][i]['divergence_mean']:.5f}" for cache in others),
        ]
        for i, row in enumerate(reference["by_position"])
    ]
    names = [cache["name"] for cache in others]
    return table(["context", "predictions", "perplexity, bf16", *names], rows)


def _ratios(model: str, scores: Mapping[str, Scores]) -> list[str]:
    rows = []
    for name in scores:
        if name in (REFERENCE.name, OURS.name):
            continue
        found, low, high = ratio(scores, OURS.name, name)
        goal = GOALS[model].get(name)
        verdict = "" if goal is None else f"{goal} {'met' if found <= goal else 'missed'}"
        rows.append([name, f"{found:.3f}", f"{low:.3f} to {high:.3f}", verdict])
    if not rows:
        return []
    return table([f"mean KL of {OURS.name} relative to", "ratio", "95 %", "goal"], rows)


def _missing(scores: Mapping[str, Scores]) -> list[str]:
    missing = [variant.name for variant in VARIANTS if variant.name not in scores]
    return [f"Not measured yet: {'; '.join(missing)}.", ""] if missing else []


def markdown(
    results: Sequence[tuple[Mapping[str, Any], Mapping[str, Scores]]],
    host: Mapping[str, Any],
) -> str:
    """Write the report. `results` lists the return values of `measure.measure`, one per model."""
    lines = [
        "# What quantised KV caches cost on pretrained models",
        "",
        f"`make eval-demo`, which is `python -m benchmarks.accuracy`. Machine: {machine(host)}.",
        "",
        "KL divergence of the next token's distribution from that of the bf16 cache, in the real "
        "engine. Text: Python's language reference, which comes with Python as "
        f"`pydoc_data.topics` (of Python {platform.python_version()}; PSF licence). The weights "
        "come from Python packages and are dequantised from 4 bits. ± is a standard error, and "
        "95 % an interval of a bootstrap, over windows; with few windows both are rough.",
        "",
        f"* `{OURS.name}`: pages of this package, all layers quantised.",
        "* `by rule`: keys and values are rounded by a rule of `benchmarks.fidelity` before vLLM "
        "stores them in its bf16 cache. vLLM's own k8v4 does not run on CPUs.",
        f"* `{FLOOR.name}`: the same cache with prompts in chunks of 384 tokens instead of 512. "
        "This is the noise of bfloat16 arithmetic; every other number contains about as much.",
        "* `fp8`: vLLM's own kernel. On CPUs it cuts the mantissa off instead of rounding, so its "
        "error is twice that of e4m3.",
    ]
    for document, scores in results:
        model = document["model"]
        lines += [
            *("", f"## {MODELS[model]}", ""),
            f"{document['positions']:,} predictions in {document['sequences']} windows of "
            f"{document['longest']:,} tokens.",
            *("", *_caches(document["caches"]), "", *_ratios(model, scores), "", *_missing(scores)),
            *("Mean KL by tokens of context:", "", *_by_position(document["caches"])),
            *("", f"![KL divergence by position, and its tail](accuracy-{model}.png)"),
        ]
    return "\n".join(lines) + "\n"
