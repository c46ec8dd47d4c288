# SPDX-License-Identifier: Apache-2.0
"""How far attention is off when keys and values are stored by a rule."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.fidelity.rules import KEY_RULES, VALUE_RULES, Rule, e4m3
from benchmarks.fidelity.sources import Sample

Errors = dict[str, dict[str, float]]
"""Relative errors of attention outputs, by kind of query and by rule."""


def _weights(sample: Sample, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return the weights [H, group, Q, L] of the last Q tokens' queries."""
    queries, heads, dims = query.shape
    length, kv_heads, _ = key.shape
    grouped = query.view(queries, kv_heads, heads // kv_heads, dims)
    scores = torch.einsum("qhgd,khd->hgqk", grouped, key) * sample.scale
    behind = torch.arange(length - queries, length)[:, None] - torch.arange(length)[None]
    seen = behind >= 0
    if sample.window is not None:
        seen &= behind < sample.window
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)


def _attended(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.einsum("hgqk,khd->qhgd", weights, value)


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the mean over rows of the error's norm relative to the exact row's."""
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-20)).mean())


def errors_of_values(sample: Sample, rules: Mapping[str, Rule] = VALUE_RULES) -> Errors:
    """Return the errors of rules for values, keys in e4m3, against nothing rounded."""
    stored = {name: rule(sample.value) for name, rule in rules.items()}
    found: Errors = {}
    for kind, query in sample.queries.items():
        exact = _attended(_weights(sample, query, sample.key), sample.value)
        weights = _weights(sample, query, e4m3(sample.key))
        found[kind] = {
            name: _relative(_attended(weights, value), exact) for name, value in stored.items()
        }
    return found


def errors_of_keys(sample: Sample) -> Errors:
    """Return the errors of every rule for keys, values exact, against nothing rounded."""
    stored = {name: rule(sample.key) for name, rule in KEY_RULES.items()}
    found: Errors = {}
    for kind, query in sample.queries.items():
        exact = _attended(_weights(sample, query, sample.key), sample.value)
        found[kind] = {
            name: _relative(_attended(_weights(sample, query, key), sample.value), exact)
            for name, key in stored.items()
        }
    return found
