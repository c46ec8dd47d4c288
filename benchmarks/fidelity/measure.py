# SPDX-License-Identifier: Apache-2.0
"""The error of attention when keys and values are stored by a rule."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.fidelity.rules import (
    EXACT,
    KEY_RULES,
    MAIN_RULES,
    OURS,
    STOCK,
    VALUE_RULES,
    Rule,
    e4m3,
    exact,
)
from benchmarks.fidelity.sources import Sample

Errors = dict[str, dict[str, float]]
"""Relative errors of attention outputs, by kind of query and by rule."""


def _weights(sample: Sample, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return the weights [H, group, Q, L] of the last Q tokens' queries."""
    queries, heads, dims = query.shape
    length, kv_heads, _ = key.shape
    grouped = query.view(queries, kv_heads, heads // kv_heads, dims)
    scores = torch.einsum("qhgd,khd->hgqk", grouped, key) * sample.scale
    distance = torch.arange(length - queries, length)[:, None] - torch.arange(length)[None]
    visible = distance >= 0
    if sample.window is not None:
        visible &= distance < sample.window
    return torch.softmax(scores.masked_fill(~visible, -torch.inf), -1)


def _output(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.einsum("hgqk,khd->qhgd", weights, value)


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the mean over rows of the error's norm relative to the exact row's."""
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-20)).mean())


def _errors(sample: Sample, rules: Mapping[str, tuple[Rule, Rule]]) -> Errors:
    """Return the errors of rules for keys and values, by name."""
    keys = {rule: rule(sample.key) for rule, _ in rules.values()}
    values = {rule: rule(sample.value) for _, rule in rules.values()}
    errors: Errors = {}
    for kind, query in sample.queries.items():
        wanted = _output(_weights(sample, query, sample.key), sample.value)
        weights = {rule: _weights(sample, query, key) for rule, key in keys.items()}
        errors[kind] = {
            name: _relative(_output(weights[key], values[value]), wanted)
            for name, (key, value) in rules.items()
        }
    return errors


def errors_of_values(sample: Sample, rules: Mapping[str, Rule] = VALUE_RULES) -> Errors:
    """Return the errors of rules for values, with keys in e4m3."""
    return _errors(sample, {name: (e4m3, rule) for name, rule in rules.items()})


def errors_of_keys(sample: Sample) -> Errors:
    """Return the errors of every rule for keys, with exact values."""
    return _errors(sample, {name: (rule, exact) for name, rule in KEY_RULES.items()})


def _mean(errors: Sequence[Errors]) -> Errors:
    return {
        kind: {name: statistics.fmean(one[kind][name] for one in errors) for name in rules}
        for kind, rules in errors[0].items()
    }


def summarise(samples: Iterable[Sample], every_rule: int) -> list[dict[str, Any]]:
    """Return a row for each source of the samples, with means over its samples.

    Args:
        samples: The samples of all sources.
        every_rule: Samples of each source on which every rule is measured; `MAIN_RULES` are
            measured on all.

    Returns:
        For JSON: errors of rules for values and for keys, and of ours relative to stock's with
        its standard error and the part of the keys.
    """
    main: dict[str, list[Errors]] = {}
    values: dict[str, list[Errors]] = {}
    keys: dict[str, list[Errors]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for sample in samples:
        name = sample.name
        size = {"length": sample.key.shape[0], "head_size": sample.key.shape[2]}
        rows.setdefault(name, {**size, "source": name, "heavy": sample.heavy})
        main.setdefault(name, []).append(errors_of_values(sample, MAIN_RULES))
        if len(main[name]) <= every_rule:
            values.setdefault(name, []).append(errors_of_values(sample))
            keys.setdefault(name, []).append(errors_of_keys(sample))
    return [
        {
            **row,
            "values": _mean(values[name]),
            "keys": _mean(keys[name]),
            "samples": len(main[name]),
            "ours_to_stock": {
                kind: {
                    "ratio": mean[OURS] / mean[STOCK],
                    "standard_error": _standard_error(main[name], kind),
                    "keys_alone": mean[EXACT] / mean[STOCK],
                }
                for kind, mean in _mean(main[name]).items()
            },
        }
        for name, row in rows.items()
    ]


def _standard_error(errors: Sequence[Errors], kind: str) -> float:
    ratios = [one[kind][OURS] / one[kind][STOCK] for one in errors]
    return statistics.stdev(ratios) / len(ratios) ** 0.5
