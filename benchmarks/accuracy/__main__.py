# SPDX-License-Identifier: Apache-2.0
"""The command `python -m benchmarks.accuracy`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy import models, report
from benchmarks.accuracy.measure import VARIANTS, measure, windows
from testing.machine import host
from vllm_hybrid_kv.tools.eval.report import draw


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description="What quantised KV caches cost on pretrained models",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", action="append", choices=models.MODELS, help="all that are allowed if omitted")
    add("--accept-gemma-terms", action="store_true", help="you accept the terms of Gemma")
    add("--caches", type=int, default=len(VARIANTS), help="the first N caches only")
    add("--windows", type=int, default=6, help="of the text")
    add("--context", type=int, default=2048, help="tokens of a window")
    add("--out", type=Path, default=models.ROOT / "benchmarks" / "results", help="for the results")
    add("--work", type=Path, default=models.ROOT / ".cache" / "accuracy",
        help="for the models, and for interrupted runs")  # fmt: skip
    add("--pip-args", default="", help="arguments of pip, such as an index")
    options = parser.parse_args(arguments)
    if not options.accept_gemma_terms:
        print(models.GEMMA_TERMS)
        if models.GEMMA in (options.model or ()):
            raise SystemExit(2)
        options.model = [models.SMOLLM2]
    options.model = options.model or list(models.MODELS)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for name in options.model:
        model = models.made(name, options.work, shlex.split(options.pip_args))
        work = options.work / f"{name}-{options.context}"
        sequences = windows(model, options.context, options.windows, work)
        document, scores = measure(model, sequences, work, VARIANTS[: options.caches])
        draw(options.out / f"accuracy-{name}.png", document, scores)
        results.append((document, scores))
    text = report.markdown(results, host())
    (options.out / "accuracy.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
