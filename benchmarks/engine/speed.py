# SPDX-License-Identifier: Apache-2.0
"""Time the decoding of engines with different caches, in turn."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.engine import configurations
from benchmarks.engine.configurations import NUM_SPECULATIVE_TOKENS, SPECULATION, Configuration
from benchmarks.engine.engines import Engines
from benchmarks.engine.report import OURS, Gap, Speed, Verdict
from testing.engine_host import EngineError, EngineHost
from testing.tokenizer import random_prompt, repeated_prompt

UNQUANTISED = "auto"


def measure(engines: Engines, runner: str | None) -> None:
    """Time every mode of a model, and add a row for each time or its absence.

    Args:
        engines: The model's engines.
        runner: The model runner that vLLM needs, if not the default.
    """
    modes, skipped = configurations.to_time(engines.name, engines.place, runner)
    for row in skipped:
        engines.add(Gap(engines.name, row.name, "", Verdict.SKIPPED, row.reason))
    for mode, caches in modes.items():
        with contextlib.ExitStack() as stack:
            running = _start(engines, stack, mode, caches)
            for cell in engines.sizes.cells:
                if len(running) >= 2:
                    _measure_cell(engines, mode, running, *cell)
                else:
                    reason = "fewer than two engines run"
                    gap = Gap(engines.name, mode, "", Verdict.SKIPPED, reason, cell)
                    engines.add(gap)


def _start(
    engines: Engines, stack: contextlib.ExitStack, mode: str, caches: list[Configuration]
) -> dict[str, EngineHost]:
    def start(configuration: Configuration) -> EngineHost | EngineError:
        try:
            return engines.start(configuration, mode)
        except EngineError as error:
            return error

    with ThreadPoolExecutor(engines.jobs) as pool:
        found = dict(zip((c.name for c in caches), pool.map(start, caches), strict=True))
    running = {name: host for name, host in found.items() if isinstance(host, EngineHost)}
    for host in running.values():
        stack.callback(host.close)
    for name, outcome in found.items():
        if isinstance(outcome, EngineError):
            verdict = _verdict(name, UNQUANTISED in running)
            engines.add(Gap(engines.name, mode, name, verdict, outcome.reason))
    return running


def _verdict(cache: str, control_runs: bool) -> Verdict:
    """Return whose failure it is: ours only if an unquantised cache works."""
    return Verdict.FAILED if cache == OURS and control_runs else Verdict.UNSUPPORTED


def _measure_cell(
    engines: Engines, mode: str, running: dict[str, EngineHost], batch: int, length: int
) -> None:
    """Time one batch, and remove an engine that fails from `running`."""
    sizes = engines.sizes

    def skip(cache: str, verdict: Verdict, reason: str) -> None:
        engines.add(Gap(engines.name, mode, cache, verdict, reason, (batch, length)))

    speculates = mode.startswith(tuple(SPECULATION))
    decoded = sizes.decoded * (NUM_SPECULATIVE_TOKENS + 1 if speculates else 1)
    runs: dict[str, _Run] = {}
    for cache, host in running.items():
        capacity = host.started["capacity_tokens"]
        if batch * (length + decoded) > capacity:
            skip(cache, Verdict.SKIPPED, f"its cache holds {capacity} tokens")
        else:
            runs[cache] = _Run(host, batch)
    make = repeated_prompt if mode.startswith("ngram") else random_prompt
    prompts = [make(length, seed) for seed in range(batch)]
    for run in runs.values():
        run.attempt("begin", prompts, decoded)
    names = list(runs)
    for number in range(sizes.rounds):
        # Each engine is the first of a round equally often.
        shift = number % max(1, len(names))
        for cache in names[shift:] + names[:shift]:
            runs[cache].attempt("measure", sizes.steps)
    for run in runs.values():
        run.attempt("end")
    control_runs = UNQUANTISED in runs and runs[UNQUANTISED].error is None
    usable = {}
    for cache, run in runs.items():
        if run.error is not None:
            skip(cache, _verdict(cache, control_runs), run.error.reason)
            running.pop(cache).close()
        elif run.preempted:
            skip(cache, Verdict.SKIPPED, "its cache was too small: a request was preempted")
        else:
            usable[cache] = run.milliseconds
    if usable:
        speed = Speed(engines.name, mode, batch, length, usable)
        engines.results.speeds.append(speed)
        each = ", ".join(f"{cache} {speed.ms_per_token(cache):.2f} ms" for cache in usable)
        engines.say(f"{engines.name}, {mode}, {batch} x {length}: {each}")


class _Run:
    """One batch on one engine, until it fails."""

    def __init__(self, host: EngineHost, batch: int) -> None:
        self.milliseconds: list[float] = []
        self.error: EngineError | None = None
        self.preempted = False
        self._host = host
        self._batch = batch
        self._preemptions = 0.0

    def attempt(self, stage: str, *arguments: Any) -> None:
        """Run a stage unless an earlier one failed."""
        if self.error is None:
            try:
                getattr(self, stage)(*arguments)
            except EngineError as error:
                self.error = error

    def begin(self, prompts: list[list[int]], max_tokens: int) -> None:
        self._preemptions = self._count_preemptions()
        self._host.begin_decoding(prompts, max_tokens)

    def measure(self, steps: int) -> None:
        seconds, tokens = self._host.decode(steps)
        self.milliseconds.append(1e3 * seconds * self._batch / tokens)

    def end(self) -> None:
        self.preempted = self._count_preemptions() > self._preemptions
        self._host.end_decoding()

    def _count_preemptions(self) -> float:
        return self._host.metrics().get("vllm:num_preemptions", 0.0)
