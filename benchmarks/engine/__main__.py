# SPDX-License-Identifier: Apache-2.0
"""Run real engines with k8v4 caches, compare their outputs, and time them against other caches.

    python -m benchmarks.engine --out DIR [--smallest]

The engines run on the device that vLLM finds. Their models are small and have random weights: full
attention, sliding windows, and Gated DeltaNet with and without experts. Each engine has a process
of its own, so that its memory is freed and its failure only adds a row to the report.

* Outputs must be equal, whether prompts run alone, all at once, from the prefix cache or in chunks.
  Further engines use ngram and multi-token prediction, graphs, or either model runner.
* Decode speed is compared with `--kv-cache-dtype auto`, `fp8` and stock vLLM's k8v4, in turn.

If vLLM cannot run an engine even with an unquantised cache and without the plugin, the report has
vLLM's error. The exit status is 1 if outputs differ, or if an engine fails only with the plugin
and k8v4.

Writes `engine.md` and `engine.json` to DIR after every row, and the engines' logs to DIR/logs.
A complete run starts many engines: `--models` and `--parts` select some.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from benchmarks.engine import report, speed, workload
from benchmarks.engine.checks import ModelChecks
from benchmarks.engine.configurations import Place, find_place
from benchmarks.engine.engines import Engines
from benchmarks.engine.report import Results
from testing import machine
from testing.models import build_model

PARTS = ("checks", "speed")


def run_model(
    model: str,
    options: argparse.Namespace,
    place: Place,
    scratch: Path,
    results: Results,
    say: Callable[[str], None],
) -> None:
    """Check and time one model. Its weights are written to the folder `scratch`."""
    sizes = workload.SMALLEST if options.smallest else workload.FULL
    jobs = 1 if place.device == "cpu" else 4

    def engines(part: str, config: PreTrainedConfig, dtype: str, **arguments: Any) -> Engines:
        name = f"{model}-{part}"
        path = build_model(config, scratch / name, getattr(torch, dtype))
        arguments["dtype"] = dtype
        log = options.out / "logs" / name
        log.parent.mkdir(parents=True, exist_ok=True)
        where = (place, sizes, jobs, log)
        return Engines(model, path, arguments, *where, results, say)

    if "checks" in options.parts:
        config = workload.config_of(model)
        checked = engines(
            "check",
            config,
            workload.dtype_of(model, place.device),
            max_model_len=sizes.longest + 2 * sizes.tokens + 16,
            max_num_seqs=32,
            kv_cache_memory_bytes=1 << 30,
        )
        bounds = workload.bounds_of(model, checked.arguments["dtype"])
        ModelChecks(checked, config.head_dim, bounds).run()
    if "speed" in options.parts:
        config = workload.config_to_time(model, sizes)
        timed = engines(
            "speed",
            config,
            "bfloat16",
            max_model_len=config.max_position_embeddings,
            max_num_seqs=max(batch for batch, _ in sizes.cells),
            kv_cache_memory_bytes=int(sizes.cache_share * place.memory_bytes),
        )
        speed.measure(timed)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models, parts = workload.MODELS, PARTS
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--smallest", action="store_true", help="few and short prompts and batches")
    options = parser.parse_args(words)
    options.out = options.out.resolve()
    return options


def main() -> int:
    options = parse()
    try:
        place, described = find_place(), machine.vllm_platform()
    except (ImportError, RuntimeError) as error:
        raise SystemExit(f"python -m benchmarks.engine: {error}") from error
    results = Results()
    saving = threading.Lock()
    began = time.monotonic()

    def say(line: str) -> None:
        # Engines that run at the same time are checked by several threads.
        with saving:
            print(f"{time.monotonic() - began:6.0f} s  {line}", flush=True)
            report.write(results, described, options.out)

    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            run_model(model, options, place, Path(scratch), results, say)
    print(report.markdown(results, described))
    print(f"The report is in {options.out}.")
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
