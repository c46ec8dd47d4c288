# SPDX-License-Identifier: Apache-2.0
"""Time the decoding of engines with different caches, in turn."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.engine import configurations
from benchmarks.engine.configurations import NUM_SPECULATIVE_TOKENS, SPECULATION, Configuration
from benchmarks.engine.engines import Engines
from benchmarks.engine.report import OURS, Speed, Verdict
from testing.engine_host import EngineError, EngineHost
from testing.tokenizer import random_prompt, repeated_prompt


def measure(engines: Engines) -> None:
    """Time every mode of a model, and add a row for each batch that was not timed."""
    modes, skipped = configurations.to_time(engines.name, engines.place)
    for name, reason in skipped.items():
        engines.add(name, "speed", Verdict.SKIPPED, reason)
    for mode, caches in modes.items():
        with contextlib.ExitStack() as stack:
            running = _start(engines, stack, mode, caches)
            for batch, length in engines.sizes.cells:
                if len(running) >= 2:
                    _measure_batch(engines, mode, running, batch, length)
                else:
                    what = f"speed of {batch} x {length}"
                    engines.add(mode, what, Verdict.SKIPPED, "fewer than two engines run")


def _start(
    engines: Engines, stack: contextlib.ExitStack, mode: str, caches: list[Configuration]
) -> dict[str, EngineHost]:
    failed: dict[str, EngineError] = {}

    def start(configuration: Configuration) -> EngineHost | None:
        try:
            return engines.start(configuration, mode)
        except EngineError as error:
            failed[configuration.name] = error
            return None

    with ThreadPoolExecutor(engines.jobs) as pool:
        found = dict(zip((c.name for c in caches), pool.map(start, caches), strict=True))
    running = {name: host for name, host in found.items() if host is not None}
    for host in running.values():
        stack.callback(host.close)
    _add_failures(engines, mode, "speed", failed)
    return running


def _add_failures(engines: Engines, mode: str, what: str, failed: dict[str, EngineError]) -> None:
    """Add failures. A failure of k8v4 counts as ours only if the unquantised cache works."""
    for cache, error in failed.items():
        ours = cache == OURS and "auto" not in failed
        verdict = Verdict.FAILED if ours else Verdict.UNSUPPORTED
        engines.add(f"{mode}, {cache}", what, verdict, error.reason)


def _measure_batch(
    engines: Engines, mode: str, running: dict[str, EngineHost], batch: int, length: int
) -> None:
    """Time one batch, and remove an engine that fails from `running`."""
    sizes, what = engines.sizes, f"speed of {batch} x {length}"
    speculates = mode.startswith(tuple(SPECULATION))
    decoded = sizes.decoded * (NUM_SPECULATIVE_TOKENS + 1 if speculates else 1)
    times: dict[str, list[float]] = {}
    for cache, host in running.items():
        capacity = host.started["capacity_tokens"]
        if batch * (length + decoded) > capacity:
            reason = f"its cache holds {capacity} tokens"
            engines.add(f"{mode}, {cache}", what, Verdict.SKIPPED, reason)
        else:
            times[cache] = []
    failed: dict[str, EngineError] = {}

    def call(cache: str, command: str, *arguments: Any) -> Any:
        if cache not in failed:
            try:
                return getattr(running[cache], command)(*arguments)
            except EngineError as error:
                failed[cache] = error
        return None

    make = repeated_prompt if mode.startswith("ngram") else random_prompt
    prompts = [make(length, seed) for seed in range(batch)]
    names = list(times)
    for cache in names:
        call(cache, "begin_decoding", prompts, decoded)
    for number in range(sizes.rounds):
        # Let the engines take turns at being first.
        shift = number % max(1, len(names))
        for cache in names[shift:] + names[:shift]:
            timed = call(cache, "decode", sizes.steps)
            if timed is not None:
                seconds, tokens = timed
                times[cache].append(1e3 * seconds * batch / tokens)
    preempted = {cache: call(cache, "end_decoding") for cache in names}
    _add_failures(engines, mode, what, failed)
    for cache in names:
        if cache in failed:
            running.pop(cache).close()
        elif preempted[cache]:
            reason = "its cache was too small: a request was preempted"
            engines.add(f"{mode}, {cache}", what, Verdict.SKIPPED, reason)
        if cache in failed or preempted[cache]:
            del times[cache]
    if times:
        speed = Speed(engines.name, mode, batch, length, times)
        engines.results.speeds.append(speed)
        engines.say(f"{engines.name}, {mode}, {batch} x {length}: {speed.cells()}")
