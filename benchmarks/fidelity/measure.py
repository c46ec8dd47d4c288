# SPDX-License-Identifier: Apache-2.0
"""Measure the error of attention when keys and values are stored by a rule."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.fidelity.rules import FORMAT_2, PARTS, RULES
from benchmarks.fidelity.sources import Sample

Errors = dict[str, dict[str, float]]
"""Relative errors of attention outputs, by kind of query and by rule."""


def _output(
    sample: Sample, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Compute the attention outputs [Q, H, group, D] of the last Q tokens."""
    queries, heads, dims = query.shape
    length, kv_heads, _ = key.shape
    grouped = query.view(queries, kv_heads, heads // kv_heads, dims)
    scores = torch.einsum("qhgd,khd->hgqk", grouped, key) * sample.scale
    distance = torch.arange(length - queries, length)[:, None] - torch.arange(length)[None]
    visible = distance >= 0
    if sample.window is not None:
        visible &= distance < sample.window
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1)
    return torch.einsum("hgqk,khd->qhgd", weights, value)


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Compute each row's relative error ||found - exact|| / ||exact||; return the mean."""
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-20)).mean())


def errors(sample: Sample) -> Errors:
    """Measure the errors of `RULES` and `PARTS` (rules for keys or values alone) on one sample."""
    found: Errors = {kind: {} for kind in sample.queries}
    wanted = {k: _output(sample, q, sample.key, sample.value) for k, q in sample.queries.items()}
    for name, rule in {**RULES, **PARTS}.items():
        key, value = rule.key(sample.key), rule.value(sample.value)
        for kind, query in sample.queries.items():
            output = _output(sample, rule.query(query), key, value)
            found[kind][name] = _relative(output, wanted[kind])
    return found


def summarise(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Return a row for each source and kind of query, with means over its samples.

    Returns:
        Rows for JSON. `errors` has the mean error of each rule. In `ratios`, the error of format 2
        (today's k8v4) is divided by the rule's error; an entry is the mean and its standard error.
    """
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for sample in samples:
        length, _, head_size = sample.key.shape
        sizes[sample.name] = {"length": length, "head_size": head_size}
        for kind, of in errors(sample).items():
            found.setdefault((sample.name, kind), []).append(of)
    return [
        {
            "source": source,
            "kind": kind,
            "samples": len(of),
            **sizes[source],
            "errors": {name: statistics.fmean(one[name] for one in of) for name in of[0]},
            "ratios": {name: _ratio(of, name) for name in RULES if name != FORMAT_2},
        }
        for (source, kind), of in found.items()
    ]


def _ratio(of: list[dict[str, float]], name: str) -> tuple[float, float]:
    ratios = [one[FORMAT_2] / max(one[name], 1e-20) for one in of]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0
    return statistics.fmean(ratios), error
