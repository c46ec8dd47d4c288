# SPDX-License-Identifier: Apache-2.0
"""Run real engines with k8v4 caches, compare what they say, and time them beside other caches.

    python -m benchmarks.engine --out DIR [--smallest]

On whatever platform vLLM runs here. Small models with random weights: full attention, sliding
windows, and Gated DeltaNet with and without experts. Each engine is a process of its own, so that
its memory comes back and one that fails is a row of the report.

* Equal outputs: prompts alone, all at once, from the prefix cache, in chunks, with ngram and
  multi-token prediction, with piecewise and full graphs, with either model runner.
* Speed of decoding beside `--kv-cache-dtype auto`, `fp8` and stock vLLM's k8v4, the engines in
  turn.

What vLLM cannot run, with an unquantised cache and without the plugin, is in the report with the
last line of its error. Ends with 1 if outputs differ, or if an engine of ours fails where vLLM's
does not.

Writes `engine.md` and `engine.json` to DIR, with each finding anew, and the engines' logs to
DIR/logs. All of it takes many engine starts: `--models` and `--parts` divide it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.engine import configurations as known
from benchmarks.engine import report, subjects
from benchmarks.engine.checks import ModelChecks, start_unquantised
from benchmarks.engine.configurations import Place, find_place
from benchmarks.engine.process import EngineError, Engines
from benchmarks.engine.results import Gap, Results, Verdict
from benchmarks.engine.speed import ModelSpeed
from benchmarks.engine.subjects import Sizes
from testing import machine
from testing.models import build_model

PARTS = ("checks", "speed")


class Command:
    """The command.

    Args:
        arguments: From the command line.
        place: Where the engines run.
        scratch: Folder for the models.
        results: Takes what is found.
        save: Called with each finding, so that a run that is cut short has a report.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        place: Place,
        scratch: Path,
        results: Results,
        save: Callable[[], None],
    ) -> None:
        self._place = place
        self._parts = arguments.parts
        self._jobs = arguments.jobs or (1 if place.device == "cpu" else 4)
        self._timeout_s = arguments.timeout
        self._sizes: Sizes = subjects.SMALLEST if arguments.smallest else subjects.FULL
        self._scratch = scratch
        self._logs = arguments.out / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._results = results
        self._save = save
        self._saving = threading.Lock()
        self._began = time.monotonic()

    def run(self, model: str) -> None:
        """Check and time one model."""
        runner = None
        if "checks" in self._parts:
            runner = self._check(model)
        if "speed" in self._parts:
            self._time(model, runner, probed="checks" in self._parts)

    def _check(self, model: str) -> str | None:
        config = subjects.to_compare(model)
        dtype = subjects.dtype_of(model, self._place.device)
        path = build_model(config, self._scratch / model, getattr(torch, dtype))
        engines = Engines(
            path,
            dtype,
            self._logs / f"{model}-check",
            self._timeout_s,
            max_model_len=self._sizes.longest + 2 * self._sizes.tokens + 16,
            max_num_seqs=32,
            kv_cache_memory_bytes=1 << 30,
            gpu_memory_utilization=0.1,
        )
        checks = ModelChecks(
            model,
            config.head_dim,
            engines,
            self._place,
            self._sizes,
            subjects.bounds_of(model, dtype),
            self._jobs,
            self._results,
            self._say,
        )
        return checks.run()

    def _time(self, model: str, runner: str | None, probed: bool) -> None:
        config = subjects.to_time(model, self._sizes)
        path = build_model(config, self._scratch / f"{model}-speed", torch.bfloat16)
        batches = [batch for batch, _ in self._sizes.cells]
        engines = Engines(
            path,
            "bfloat16",
            self._logs / f"{model}-speed",
            self._timeout_s,
            max_model_len=config.max_position_embeddings,
            max_num_seqs=max(batches),
            kv_cache_memory_bytes=int(self._sizes.cache_share * self._place.memory_bytes),
            gpu_memory_utilization=0.1,
        )
        if not probed:
            try:
                engine, runner = start_unquantised(engines, self._place, known.AUTO)
            except EngineError as error:
                gap = Gap(model, "all", "", Verdict.CANNOT, f"with auto: {error}")
                self._results.gaps.append(gap)
                return
            engine.close()
        ModelSpeed(
            model,
            engines,
            self._place,
            self._sizes,
            runner,
            self._jobs,
            self._results,
            self._say,
        ).run()

    def _say(self, line: str) -> None:
        # Engines that run beside each other are checked by threads.
        with self._saving:
            print(f"{time.monotonic() - self._began:6.0f} s  {line}", flush=True)
            self._save()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command's arguments."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--models", nargs="+", choices=subjects.MODELS, default=subjects.MODELS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--smallest", action="store_true", help="few and short prompts and batches")
    parser.add_argument(
        "--jobs", type=int, help="engines that start beside each other: 4, on a CPU 1"
    )
    parser.add_argument(
        "--timeout", type=float, default=900.0, help="seconds that a call of an engine may take"
    )
    arguments = parser.parse_args(words)
    arguments.out = arguments.out.resolve()
    return arguments


def main() -> int:
    """Run the command and return its exit status."""
    arguments = parse()
    try:
        place, described = find_place(), machine.vllm_platform()
    except (ImportError, RuntimeError) as error:
        raise SystemExit(f"python -m benchmarks.engine: {error}") from error
    results = Results()

    def save() -> None:
        report.write(results, described, arguments.out)

    with tempfile.TemporaryDirectory() as scratch:
        command = Command(arguments, place, Path(scratch), results, save)
        for model in arguments.models:
            command.run(model)
    save()
    print(report.markdown(results, described))
    print(f"The report is in {arguments.out}.")
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
