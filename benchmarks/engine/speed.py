# SPDX-License-Identifier: Apache-2.0
"""How fast engines decode, with one cache dtype and another, in turn."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from benchmarks.engine import configurations as known
from benchmarks.engine.checks import describe
from benchmarks.engine.configurations import Configuration, Place
from benchmarks.engine.process import Engine, EngineError, Engines
from benchmarks.engine.results import Gap, Results, Speed, Verdict
from benchmarks.engine.subjects import Sizes, random_prompt, repeated_prompt

OURS, UNQUANTISED = "k8v4", "auto"


class ModelSpeed:
    """The speed of one model.

    Args:
        model: Its name.
        engines: Starts its engines.
        place: Where they run.
        sizes: How much is measured.
        runner: The model runner that all engines are asked to use.
        jobs: Engines that may start beside each other.
        results: Takes what is found.
        say: Called with each line of progress.
    """

    def __init__(
        self,
        model: str,
        engines: Engines,
        place: Place,
        sizes: Sizes,
        runner: str | None,
        jobs: int,
        results: Results,
        say: Callable[[str], None],
    ) -> None:
        self._model = model
        self._engines = engines
        self._place = place
        self._sizes = sizes
        self._runner = runner
        self._jobs = jobs
        self._results = results
        self._say = say

    def run(self) -> None:
        """Measure every mode, and add a row for each speed that was or was not measured."""
        modes, left_out = known.to_time(self._model, self._place, self._runner)
        for row in left_out:
            self._skip(row.name, "", Verdict.LEFT_OUT, row.reason)
        for mode, configurations in modes.items():
            self._measure(mode, configurations)

    def _measure(self, mode: str, configurations: list[Configuration]) -> None:
        with ExitStack() as stack:
            engines = self._start(stack, mode, configurations)
            for batch, length in self._sizes.cells:
                if len(engines) < 2:
                    reason = "fewer than two engines run"
                    self._skip(mode, "", Verdict.LEFT_OUT, reason, (batch, length))
                    continue
                self._measure_cell(mode, engines, batch, length)

    def _start(
        self, stack: ExitStack, mode: str, configurations: list[Configuration]
    ) -> dict[str, Engine]:
        """Start a mode's engines, which run beside each other and work in turn."""

        def start(configuration: Configuration) -> Engine | EngineError:
            try:
                return self._engines.start(configuration, mode)
            except EngineError as error:
                return error

        with ThreadPoolExecutor(self._jobs) as pool:
            found = dict(
                zip((c.name for c in configurations), pool.map(start, configurations), strict=True)
            )
        for engine in found.values():
            if isinstance(engine, Engine):
                stack.callback(engine.close)
        for configuration in configurations:
            engine = found[configuration.name]
            if isinstance(engine, Engine):
                row = describe(self._model, configuration, engine.started)
                self._results.engines.append({**row, "mode": mode})
        # What vLLM cannot run with an unquantised cache either is no failure of ours.
        control_runs = isinstance(found[UNQUANTISED], Engine)
        for name, outcome in found.items():
            if isinstance(outcome, EngineError):
                failed = name == OURS and control_runs
                verdict = Verdict.FAILED if failed else Verdict.CANNOT
                self._skip(mode, name, verdict, str(outcome))
        return {name: engine for name, engine in found.items() if isinstance(engine, Engine)}

    def _measure_cell(self, mode: str, engines: dict[str, Engine], batch: int, length: int) -> None:
        """Measure one batch, and drop an engine that fails at it from `engines`."""
        cell = (batch, length)
        speculates = mode.startswith(tuple(known.SPECULATION))
        decoded = self._sizes.decoded * (known.NUM_SPECULATIVE_TOKENS + 1 if speculates else 1)
        runs: dict[str, _Run] = {}
        for name, engine in engines.items():
            capacity = engine.started["capacity_tokens"]
            if batch * (length + decoded) > capacity:
                reason = f"its cache holds {capacity} tokens"
                self._skip(mode, name, Verdict.LEFT_OUT, reason, cell)
            else:
                runs[name] = _Run(engine, batch, self._sizes.steps)
        make = repeated_prompt if mode.startswith("ngram") else random_prompt
        prompts = [make(length, seed) for seed in range(batch)]
        for run in runs.values():
            run.attempt(lambda run: run.begin(prompts, decoded))
        names = list(runs)
        for number in range(self._sizes.rounds):
            # Each is the first of a round as often as any other.
            shift = number % max(1, len(names))
            for name in names[shift:] + names[:shift]:
                runs[name].attempt(_Run.measure)
        for run in runs.values():
            run.attempt(_Run.finish)
        # What goes well with an unquantised cache has to go well with ours.
        control_runs = UNQUANTISED in runs and runs[UNQUANTISED].error is None
        for name, run in runs.items():
            if run.error is not None:
                failed = name == OURS and control_runs
                verdict = Verdict.FAILED if failed else Verdict.CANNOT
                self._skip(mode, name, verdict, str(run.error), cell)
                engines.pop(name).close()
            elif run.preempted:
                reason = "its cache was too small: a request had to wait"
                self._skip(mode, name, Verdict.LEFT_OUT, reason, cell)
        usable = {
            name: run.milliseconds
            for name, run in runs.items()
            if run.error is None and not run.preempted
        }
        if usable:
            speed = Speed(self._model, mode, batch, length, usable)
            self._results.speeds.append(speed)
            each = ", ".join(f"{name} {speed.ms_per_token(name):.2f} ms" for name in usable)
            self._say(f"{self._model}, {mode}, {batch} x {length}: {each}")

    def _skip(
        self,
        mode: str,
        cache: str,
        verdict: Verdict,
        reason: str,
        cell: tuple[int, int] | None = None,
    ) -> None:
        self._results.gaps.append(Gap(self._model, mode, cache, verdict, reason, cell))
        where = f"{cell[0]} x {cell[1]}" if cell else ""
        words = (self._model, mode, cache, where, verdict.value, reason)
        self._say(", ".join(filter(None, words)))


class _Run:
    """One batch on one engine, until that fails."""

    def __init__(self, engine: Engine, batch: int, steps: int) -> None:
        self.milliseconds: list[float] = []
        self.error: EngineError | None = None
        self.preempted = False
        self._engine = engine
        self._batch = batch
        self._steps = steps
        self._preemptions = 0.0

    def attempt(self, do: Callable[[_Run], None]) -> None:
        if self.error is None:
            try:
                do(self)
            except EngineError as error:
                self.error = error

    def begin(self, prompts: list[list[int]], max_tokens: int) -> None:
        self._preemptions = self._count_preemptions()
        self._engine.begin(prompts, max_tokens)

    def measure(self) -> None:
        seconds, tokens = self._engine.decode(self._steps)
        self.milliseconds.append(1e3 * seconds * self._batch / tokens)

    def finish(self) -> None:
        self.preempted = self._count_preemptions() > self._preemptions
        self._engine.finish()

    def _count_preemptions(self) -> float:
        return self._engine.metrics().get("vllm:num_preemptions", 0.0)
