# SPDX-License-Identifier: Apache-2.0
"""Run the engines of a model, one after another, and compare their scores."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
from transformers import AutoTokenizer

from benchmarks.accuracy.engine import RULE
from benchmarks.accuracy.models import ROOT
from benchmarks.fidelity import rules
from testing.recall_sequences import documentation
from vllm_hybrid_kv.tools.eval import run as eval_run
from vllm_hybrid_kv.tools.eval.scores import summarise
from vllm_hybrid_kv.tools.eval.sequences import read_sequences
from vllm_hybrid_kv.tools.machine import cpu_model

Scores = list[numpy.ndarray]
"""Each window's scores, float64 [3, positions]; see `vllm_hybrid_kv.tools.eval.scores`."""


@dataclass(frozen=True)
class Variant:
    """A cache to measure: one of vLLM's cache dtypes, or bfloat16 after rounding by a rule."""

    name: str
    dtype: str = "auto"
    settings: dict[str, str] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    rule: str = ""


K8V4 = "turboquant_k8v4"
REFERENCE = Variant("bf16")
FLOOR = Variant("bf16, other chunks", engine={"max_num_batched_tokens": 384})
OURS = Variant("k8v4", K8V4, {"boundary_layers": "0"})
BOUNDARY = Variant("k8v4, boundary_layers=2", K8V4, {"boundary_layers": "2"})
FP8 = Variant("fp8", "fp8")
FORMAT_1, VLLM, E4M3 = (
    Variant(f"{name}, by rule", rule=name) for name in (rules.FORMAT_1, rules.VLLM, rules.FP8)
)
VARIANTS = (REFERENCE, OURS, FORMAT_1, VLLM, E4M3, BOUNDARY, FP8, FLOOR)

RESAMPLES, SEED = 10_000, 0


def windows(model: Path, context: int, count: int, work: Path) -> list[list[int]]:
    """Cut the first tokens of Python's documentation into windows of equal length."""
    text = work / "text.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(documentation())
    return read_sequences(text, lambda: AutoTokenizer.from_pretrained(model), context, count)


def measure(
    model: Path,
    sequences: Sequence[list[int]],
    work: Path,
    variants: Sequence[Variant] = VARIANTS,
) -> tuple[dict[str, Any], dict[str, Scores]]:
    """Score the same windows with every cache, and continue an interrupted run from `work`.

    Returns the document that `vllm-hybrid-kv eval` writes, and each cache's scores.
    """
    from vllm_hybrid_kv.plugin import vllm_version

    identity = {
        "model": model.name,
        "data": hashlib.sha256(str(sequences).encode()).hexdigest(),
        "vllm": vllm_version()[0],
    }
    scores: dict[str, Scores] = {}
    caches = []
    with eval_run.opened(work, identity):
        for variant in variants:
            begin = time.monotonic()
            facts, scores[variant.name] = _score(variant, model, sequences, work)
            statistics = summarise(scores[variant.name])
            caches.append({"name": variant.name, "reason": None, **facts, **statistics})
            print(
                f"{model.name}, {variant.name}: KL {statistics['divergence_mean']:.5f}, "
                f"{time.monotonic() - begin:.0f} s",
                flush=True,
            )
    return {
        "model": model.name,
        "sequences": len(sequences),
        "positions": sum(len(sequence) - 1 for sequence in sequences),
        "longest": max(map(len, sequences)),
        "versions": {"vllm": identity["vllm"]},
        "device": cpu_model(),
        "caches": caches,
    }, scores


def _score(
    variant: Variant, model: Path, sequences: Sequence[list[int]], work: Path
) -> tuple[dict[str, Any], Scores]:
    cache, reference = (
        eval_run.CacheVariant(each.name, each.dtype, each.settings) for each in (variant, REFERENCE)
    )
    environment = {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        # By default, vLLM limits torch, which does most of the work, to one thread.
        "OMP_NUM_THREADS": str(os.cpu_count()),
        RULE: variant.rule,
    }
    engine = f"{_score.__module__.rsplit('.', 1)[0]}.engine:run"
    with patch.dict(os.environ, environment), patch.object(eval_run, "ENGINE", engine):
        run = eval_run.Run(work, str(model), sequences, variant.engine)
        return run.score(cache, reference, lambda **_: None)


def ratio(scores: Mapping[str, Scores], one: str, other: str) -> tuple[float, float, float]:
    """Divide one cache's mean KL divergence by another's. Returns the ratio and its 95 % interval.

    The interval is a bootstrap over whole windows, because positions of one window depend on each
    other. Every resample uses the same windows for both caches.
    """
    sums = numpy.array([[window[1].sum() for window in scores[name]] for name in (one, other)])
    lengths = numpy.array([[window.shape[1] for window in scores[name]] for name in (one, other)])
    draws = numpy.random.default_rng(SEED).integers(0, sums.shape[1], (RESAMPLES, sums.shape[1]))

    def of(chosen: Any) -> Any:
        means = sums[:, chosen].sum(-1) / lengths[:, chosen].sum(-1)
        return means[0] / means[1]

    low, high = numpy.percentile(of(draws), [2.5, 97.5])
    return float(of(numpy.arange(sums.shape[1]))), float(low), float(high)
