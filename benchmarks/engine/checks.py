# SPDX-License-Identifier: Apache-2.0
"""Whether engines with a k8v4 cache give the same, however their steps are put together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from benchmarks.engine import configurations as known
from benchmarks.engine.comparing import (
    Bounds,
    Comparison,
    choose,
    compare,
    far_from_unquantised,
)
from benchmarks.engine.configurations import Configuration, LeftOut, Place
from benchmarks.engine.process import Engine, EngineError, Engines
from benchmarks.engine.results import Check, Results, Verdict
from benchmarks.engine.subjects import Sizes, prompt_pool
from testing.requests import Output

SCORED = 8
"""Prompts, with what was generated, whose log-probabilities are compared with an unquantised
cache's."""


@dataclass(frozen=True)
class Reference:
    """What an eager engine gives for each prompt alone, computed from the first token on.

    Attributes:
        prompts: The prompts.
        outputs: Theirs.
        scored: Indices of those whose texts are scored.
        unquantised: The log-probabilities of each scored text's tokens from the second on, with
            an unquantised cache; None where vLLM could not say.
    """

    prompts: list[list[int]]
    outputs: list[Output]
    scored: list[int]
    unquantised: list[list[float]] | None = None

    def texts(self) -> list[list[int]]:
        """Return the texts that are scored: prompts and what was generated."""
        return [self.prompts[i] + self.outputs[i].tokens for i in self.scored]


class ModelChecks:
    """The checks of one model.

    Args:
        model: Its name.
        head_size: Elements of its attention heads.
        engines: Starts its engines.
        place: Where they run.
        sizes: How much is compared.
        bounds: How far rounding moves its outputs.
        jobs: Engines that may run beside each other.
        results: Takes what is found.
        say: Called with each line of progress.
    """

    def __init__(
        self,
        model: str,
        head_size: int,
        engines: Engines,
        place: Place,
        sizes: Sizes,
        bounds: Bounds,
        jobs: int,
        results: Results,
        say: Callable[[str], None],
    ) -> None:
        self._model = model
        self._head_size = head_size
        self._engines = engines
        self._place = place
        self._sizes = sizes
        self._bounds = bounds
        self._jobs = jobs
        self._results = results
        self._say = say

    def run(self) -> str | None:
        """Start the engines, compare, and add a row for everything that was or was not compared.

        Returns:
            The model runner that vLLM had to be told to use, if any.
        """
        try:
            auto, runner = start_unquantised(self._engines, self._place, known.AUTO)
        except EngineError as error:
            self._add(Check(self._model, "all", "", Verdict.CANNOT, f"with auto: {error}"))
            return None
        try:
            self._started(known.AUTO, auto)
            second = auto.started["runner"] == 2
            if runner is not None:
                reason = "vLLM's second one failed with an unquantised cache; the first runs all"
                self._add(Check(self._model, "model runner", "", Verdict.CANNOT, reason))
            reference = self._reference(replace(known.REFERENCE, runner=runner), auto)
        finally:
            auto.close()
        tried, left_out = known.to_check(self._model, self._place, runner, second)
        if reference is None:
            reason = "there is nothing to compare it with"
            left_out = [*(LeftOut(c.name, reason) for c in tried), *left_out]
            tried = []
        for row in left_out:
            self._add(Check(self._model, row.name, "", Verdict.LEFT_OUT, row.reason))
        with ThreadPoolExecutor(self._jobs) as pool:
            for _ in pool.map(lambda c: self._check(c, reference), tried):
                pass
        return runner

    def _reference(self, configuration: Configuration, auto: Engine) -> Reference | None:
        sizes, bounds = self._sizes, self._bounds
        try:
            with self._engines.running(configuration) as engine:
                self._started(configuration, engine)
                pool = prompt_pool(sizes)
                first = engine.generate(pool, sizes.tokens, fresh=True)
                chosen = choose(first, pool, sizes.prompts, bounds)
                prompts = [pool[i] for i in chosen]
                outputs = engine.generate(prompts, sizes.tokens, alone=True, fresh=True)
                by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
                reference = Reference(prompts, outputs, by_length[-SCORED:])
                for check in self._in_company(configuration, engine, reference):
                    self._add(check)
                reference = self._score(reference, auto)
                if reference.unquantised is not None:
                    self._add(self._decoded_beside_unquantised(configuration.name, reference))
                return reference
        except EngineError as error:
            self._add(self._failure(configuration, error, prompt_pool(sizes)))
            return None

    def _check(self, configuration: Configuration, reference: Reference | None) -> None:
        assert reference is not None
        name = configuration.name
        try:
            with self._engines.running(configuration) as engine:
                self._started(configuration, engine)
                prompts, tokens = reference.prompts, self._sizes.tokens
                alone = engine.generate(prompts, tokens, alone=True, fresh=True)
                self._add(self._compared(name, "alone", alone, reference))
                for check in self._in_company(configuration, engine, reference):
                    self._add(check)
                if configuration.speculation is not None:
                    self._add(self._drafts(name, engine))
                if configuration.chunk == known.CHUNKS.chunk:
                    scores = scored(engine, reference.texts())
                    self._add(self._scores_beside_unquantised(name, scores, reference))
        except EngineError as error:
            self._add(self._failure(configuration, error, reference.prompts))

    def _in_company(
        self, configuration: Configuration, engine: Engine, reference: Reference
    ) -> Iterator[Check]:
        name = configuration.name
        prompts, tokens = reference.prompts, self._sizes.tokens
        at_once = engine.generate(prompts, tokens, fresh=True)
        yield self._compared(name, "all at once", at_once, reference)
        if configuration.prefix_caching is False:
            return
        again = engine.generate(prompts, tokens)
        check = self._compared(name, "again, from the prefix cache", again, reference)
        cached = sum(output.cached for output in again)
        if check.verdict is Verdict.EQUAL and not cached:
            yield replace(
                check, verdict=Verdict.NOTHING_SHOWN, detail="vLLM found no token in its cache"
            )
        else:
            yield replace(check, detail=check.detail or f"{cached} prompt tokens found there")

    def _compared(self, name: str, what: str, outputs: list[Output], reference: Reference) -> Check:
        found: Comparison = compare(outputs, reference.outputs, self._bounds)
        if found.different:
            verdict, detail = Verdict.DIFFERENT, "; ".join(found.different[:3])
        elif not found.tokens:
            verdict, detail = Verdict.NOTHING_SHOWN, "every choice of a token was close"
        else:
            verdict, detail = Verdict.EQUAL, ""
        return Check(
            self._model, name, what, verdict, detail, found.prompts, found.tokens, found.apart
        )

    def _drafts(self, name: str, engine: Engine) -> Check:
        metrics = engine.metrics()
        drafted = metrics.get("vllm:spec_decode_num_draft_tokens", 0)
        accepted = metrics.get("vllm:spec_decode_num_accepted_tokens", 0)
        both = 0 < accepted < drafted
        verdict = Verdict.EQUAL if both else Verdict.NOTHING_SHOWN
        detail = f"{drafted:.0f} drafted, {accepted:.0f} accepted"
        return Check(self._model, name, "drafts both accepted and rejected", verdict, detail)

    def _score(self, reference: Reference, auto: Engine) -> Reference:
        """Let an unquantised engine score the reference's texts."""
        try:
            return replace(reference, unquantised=scored(auto, reference.texts()))
        except EngineError as error:
            self._add(
                Check(
                    self._model,
                    known.AUTO.name,
                    "log-probabilities of prompts",
                    Verdict.CANNOT,
                    str(error),
                )
            )
            return reference

    def _decoded_beside_unquantised(self, name: str, reference: Reference) -> Check:
        assert reference.unquantised is not None
        measured, unquantised = [], []
        for i, scores in zip(reference.scored, reference.unquantised, strict=True):
            logprobs = reference.outputs[i].logprobs
            measured += logprobs
            unquantised += scores[-len(logprobs) :]
        what = "generated tokens, beside an unquantised cache"
        return self._beside_unquantised(name, what, measured, unquantised, reference)

    def _scores_beside_unquantised(
        self, name: str, scores: list[list[float]], reference: Reference
    ) -> Check:
        what = "tokens of prompts, beside an unquantised cache"
        if reference.unquantised is None:
            detail = "vLLM gave no log-probabilities to compare with"
            return Check(self._model, name, what, Verdict.CANNOT, detail)
        return self._beside_unquantised(
            name, what, flat(scores), flat(reference.unquantised), reference
        )

    def _beside_unquantised(
        self,
        name: str,
        what: str,
        measured: list[float],
        unquantised: list[float],
        reference: Reference,
    ) -> Check:
        assert reference.unquantised is not None
        spread = statistics.pstdev(flat(reference.unquantised))
        mean, broken = far_from_unquantised(measured, unquantised, self._head_size, spread)
        verdict = Verdict.DIFFERENT if broken else Verdict.EQUAL
        detail = "; ".join(broken) or "within the error of the format"
        return Check(
            self._model, name, what, verdict, detail, len(reference.scored), len(measured), mean
        )

    def _failure(
        self, configuration: Configuration, error: EngineError, prompts: list[list[int]]
    ) -> Check:
        """Say whether vLLM can run the same without this plugin and with an unquantised cache."""
        name, tokens = configuration.name, self._sizes.tokens
        try:
            with self._engines.running(configuration.control()) as engine:
                engine.generate(prompts, tokens, alone=True, fresh=True)
                engine.generate(prompts, tokens, fresh=True)
                engine.generate(prompts, tokens)
        except EngineError as same:
            return Check(self._model, name, "", Verdict.CANNOT, f"with auto: {same}")
        return Check(self._model, name, "", Verdict.FAILED, str(error))

    def _started(self, configuration: Configuration, engine: Engine) -> None:
        self._results.engines.append(describe(self._model, configuration, engine.started))

    def _add(self, check: Check) -> None:
        self._results.checks.append(check)
        words = (self._model, check.configuration, check.check, check.verdict.value, check.detail)
        self._say(", ".join(filter(None, words)))


def describe(model: str, configuration: Configuration, started: dict[str, Any]) -> dict[str, Any]:
    """Return an engine's row of the report: what it was asked to be and what it is."""
    return {
        "model": model,
        "configuration": configuration.name,
        "cache_dtype": configuration.cache_dtype,
        **started,
    }


def scored(engine: Engine, texts: list[list[int]]) -> list[list[float]]:
    """Return the log-probabilities of each text's tokens from the second on."""
    outputs = engine.generate(texts, 1, prompt_logprobs=True)
    return [output.prompt_logprobs or [] for output in outputs]


def flat(scores: list[list[float]]) -> list[float]:
    """Return the numbers of all texts in one list."""
    return list(chain.from_iterable(scores))


def start_unquantised(
    engines: Engines, place: Place, configuration: Configuration
) -> tuple[Engine, str | None]:
    """Start an engine of stock vLLM, with its first model runner if it does not run otherwise.

    Returns:
        The engine, which has answered a request, and the runner that it had to be told, if any.

    Raises:
        EngineError: It runs with neither.
    """
    runners = (None,) if place.device == "cpu" else (None, "0")
    for runner in runners:
        engine = None
        try:
            engine = engines.start(replace(configuration, runner=runner))
            engine.generate([[5, 6, 7, 8]], 2)
            return engine, runner
        except EngineError:
            if engine is not None:
                engine.close()
            if runner == runners[-1]:
                raise
    raise AssertionError("the last runner returns or raises")
