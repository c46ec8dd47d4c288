# SPDX-License-Identifier: Apache-2.0
"""Run real engines with k8v4 caches, compare their outputs, and time them against other caches.

    python -m benchmarks.engine --out DIR [--smallest]

The engines run on the device that vLLM finds. Their models are small and have random weights: full
attention, sliding windows, and Gated DeltaNet with and without experts. Each engine has a process
of its own, so that its memory is returned and a failure is only a row of the report.

* Equal outputs: prompts alone, all at once, from the prefix cache, in chunks, with ngram and
  multi-token prediction, with piecewise and full graphs, with either model runner.
* Decode speed compared with `--kv-cache-dtype auto`, `fp8` and stock vLLM's k8v4, in turn.

The report gives the error of each engine that vLLM cannot run with an unquantised cache and
without the plugin. The exit status is 1 if outputs differ, or if an engine of ours fails and the
same engine of vLLM does not.

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

import torch

from benchmarks.engine import report, speed, workload
from benchmarks.engine.checks import ModelChecks
from benchmarks.engine.configurations import Place, find_place
from benchmarks.engine.engines import Engines
from benchmarks.engine.report import Gap, Results, Verdict
from testing import machine
from testing.engine_host import EngineError
from testing.models import build_model

PARTS = ("checks", "speed")


class Command:
    """The command for any number of models.

    Args:
        arguments: The command's arguments.
        place: The device.
        scratch: Folder for the models.
        results: Collects the rows.
        save: Called after each row, so that an interrupted run has a report.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        place: Place,
        scratch: Path,
        results: Results,
        save: Callable[[], None],
    ) -> None:
        self._arguments = arguments
        self._place = place
        self._sizes = workload.SMALLEST if arguments.smallest else workload.FULL
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
        if "checks" in self._arguments.parts:
            runner = self._check(model)
        if "speed" in self._arguments.parts:
            self._time(model, runner)

    def _check(self, model: str) -> str | None:
        config = workload.config_to_compare(model)
        dtype = workload.dtype_of(model, self._place.device)
        path = build_model(config, self._scratch / model, getattr(torch, dtype))
        arguments = {
            "dtype": dtype,
            "max_model_len": self._sizes.longest + 2 * self._sizes.tokens + 16,
            "max_num_seqs": 32,
            "kv_cache_memory_bytes": 1 << 30,
        }
        engines = self._engines(model, path, f"{model}-check", arguments)
        return ModelChecks(engines, config.head_dim, workload.bounds_of(model, dtype)).run()

    def _time(self, model: str, runner: str | None) -> None:
        config = workload.config_to_time(model, self._sizes)
        path = build_model(config, self._scratch / f"{model}-speed", torch.bfloat16)
        arguments = {
            "dtype": "bfloat16",
            "max_model_len": config.max_position_embeddings,
            "max_num_seqs": max(batch for batch, _ in self._sizes.cells),
            "kv_cache_memory_bytes": int(self._sizes.cache_share * self._place.memory_bytes),
        }
        engines = self._engines(model, path, f"{model}-speed", arguments)
        if "checks" not in self._arguments.parts:
            try:
                engine, runner = engines.start_unquantised()
            except EngineError as error:
                reason = f"with auto: {error.reason}"
                engines.add_gap(Gap(model, "all", "", Verdict.UNSUPPORTED, reason))
                return
            engine.close()
        speed.measure(engines, runner)

    def _engines(self, model: str, path: Path, log: str, arguments: dict[str, object]) -> Engines:
        jobs = self._arguments.jobs or (1 if self._place.device == "cpu" else 4)
        return Engines(
            *(model, path, arguments, self._place, self._sizes, jobs, self._arguments.timeout),
            *(self._logs / log, self._results, self._say),
        )

    def _say(self, line: str) -> None:
        # Engines that run at the same time are checked by several threads.
        with self._saving:
            print(f"{time.monotonic() - self._began:6.0f} s  {line}", flush=True)
            self._save()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command's arguments."""
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
    parser.add_argument(
        "--jobs", type=int, help="engines that start at the same time (default: 4, on a CPU 1)"
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
