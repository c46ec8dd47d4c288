# SPDX-License-Identifier: Apache-2.0
"""Time the decoding of engines with different caches, in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
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
    times: dict[str, list[float]] = {}
    for cache, host in running.items():
        capacity = host.started["capacity_tokens"]
        if batch * (length + decoded) > capacity:
            skip(cache, Verdict.SKIPPED, f"its cache holds {capacity} tokens")
        else:
            times[cache] = []
    failed: dict[str, EngineError] = {}

    def attempt(cache: str, command: Callable[[EngineHost], Any]) -> Any:
        if cache not in failed:
            try:
                return command(running[cache])
            except EngineError as error:
                failed[cache] = error
        return None

    def preemptions(cache: str) -> float:
        metrics = attempt(cache, EngineHost.metrics) or {}
        return float(metrics.get("vllm:num_preemptions", 0.0))

    make = repeated_prompt if mode.startswith("ngram") else random_prompt
    prompts = [make(length, seed) for seed in range(batch)]
    names = list(times)
    before = {cache: preemptions(cache) for cache in names}
    for cache in names:
        attempt(cache, lambda host: host.begin_decoding(prompts, decoded))
    for number in range(sizes.rounds):
        # Each engine is the first of a round equally often.
        shift = number % max(1, len(names))
        for cache in names[shift:] + names[:shift]:
            timed = attempt(cache, lambda host: host.decode(sizes.steps))
            if timed is not None:
                seconds, tokens = timed
                times[cache].append(1e3 * seconds * batch / tokens)
    after = {cache: preemptions(cache) for cache in names}
    for cache in names:
        attempt(cache, EngineHost.end_decoding)
    control_runs = UNQUANTISED in times and UNQUANTISED not in failed
    for cache in names:
        if cache in failed:
            skip(cache, _verdict(cache, control_runs), failed[cache].reason)
            running.pop(cache).close()
            del times[cache]
        elif after[cache] > before[cache]:
            skip(cache, Verdict.SKIPPED, "its cache was too small: a request was preempted")
            del times[cache]
    if times:
        speed = Speed(engines.name, mode, batch, length, times)
        engines.results.speeds.append(speed)
        each = ", ".join(f"{cache} {speed.ms_per_token(cache):.2f} ms" for cache in times)
        engines.say(f"{engines.name}, {mode}, {batch} x {length}: {each}")
