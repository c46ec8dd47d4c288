# SPDX-License-Identifier: Apache-2.0
"""Check that engines with a k8v4 cache give equal outputs, however their steps are composed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain

from benchmarks.engine import configurations
from benchmarks.engine.configurations import AUTO, CHUNKS, REFERENCE, Configuration
from benchmarks.engine.engines import Engines
from benchmarks.engine.report import Check, Verdict
from benchmarks.engine.workload import prompt_pool
from testing.engine_host import EngineError, EngineHost
from testing.engine_requests import Output
from testing.output_comparison import Bounds, compare, decisive, far_from_unquantised

SCORED = 8
"""Number of texts whose log-probabilities are compared with those of an unquantised cache."""


@dataclass(frozen=True)
class Reference:
    """The outputs of an eager engine that computed each prompt alone, from its first token on.

    Attributes:
        scored: Indices of the prompts whose texts are scored.
        unquantised: The log-probabilities of each scored text's tokens from the second on, with
            an unquantised cache; None if vLLM could not compute them.
    """

    prompts: list[list[int]]
    outputs: list[Output]
    scored: list[int]
    unquantised: list[list[float]] | None = None

    def texts(self) -> list[list[int]]:
        """Return the texts to score: prompts and their outputs."""
        return [self.prompts[i] + self.outputs[i].tokens for i in self.scored]


class ModelChecks:
    """The checks of one model.

    Args:
        engines: Its engines.
        head_size: Elements of its attention heads.
        bounds: How far rounding moves its outputs.
    """

    def __init__(self, engines: Engines, head_size: int, bounds: Bounds) -> None:
        self._engines = engines
        self._sizes = engines.sizes
        self._head_size = head_size
        self._bounds = bounds

    def run(self) -> str | None:
        """Start the engines, compare them, and add a row for each comparison or its absence.

        Returns:
            The model runner that vLLM needs, if not the default.
        """
        engines = self._engines
        try:
            auto, runner = engines.start_unquantised()
        except EngineError as error:
            self._add("all", "", Verdict.UNSUPPORTED, f"with auto: {error.reason}")
            return None
        try:
            second = auto.started["runner"] == 2
            if runner is not None:
                reason = "vLLM's second one failed with an unquantised cache; the first runs all"
                self._add("model runner", "", Verdict.UNSUPPORTED, reason)
            reference = self._reference(replace(REFERENCE, runner=runner), auto)
        finally:
            auto.close()
        tried, skipped = configurations.to_check(engines.name, engines.place, runner, second)
        for row in skipped:
            self._add(row.name, "", Verdict.SKIPPED, row.reason)
        if reference is None:
            for configuration in tried:
                self._add(configuration.name, "", Verdict.SKIPPED, "there is no reference")
            return runner
        with ThreadPoolExecutor(engines.jobs) as pool:
            list(pool.map(lambda c: self._check(c, reference), tried))
        return runner

    def _reference(self, configuration: Configuration, auto: EngineHost) -> Reference | None:
        sizes, name = self._sizes, configuration.name
        try:
            with self._engines.running(configuration) as engine:
                pool = prompt_pool(sizes)
                outputs = engine.generate(pool, sizes.tokens, fresh=True)
                prompts = [pool[i] for i in choose(outputs, pool, sizes.prompts, self._bounds)]
                outputs = engine.generate(prompts, sizes.tokens, alone=True, fresh=True)
                by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
                reference = Reference(prompts, outputs, by_length[-SCORED:])
                self._check_batches(configuration, engine, reference)
        except EngineError as error:
            self._add_failure(configuration, error, prompt_pool(sizes))
            return None
        try:
            reference = replace(reference, unquantised=_scores(auto, reference.texts()))
        except EngineError as error:
            what = "log-probabilities of prompts"
            self._add(AUTO.name, what, Verdict.UNSUPPORTED, error.reason)
            return reference
        assert reference.unquantised is not None
        measured, unquantised = [], []
        for i, scores in zip(reference.scored, reference.unquantised, strict=True):
            measured += reference.outputs[i].logprobs
            unquantised += scores[-len(reference.outputs[i].logprobs) :]
        what = "generated tokens, compared with an unquantised cache"
        self._check_scores(name, what, measured, unquantised, reference)
        return reference

    def _check(self, configuration: Configuration, reference: Reference) -> None:
        name = configuration.name
        try:
            with self._engines.running(configuration) as engine:
                alone = engine.generate(
                    reference.prompts, self._sizes.tokens, alone=True, fresh=True
                )
                self._engines.add(self._compared(name, "alone", alone, reference))
                self._check_batches(configuration, engine, reference)
                if configuration.speculation is not None:
                    self._check_drafts(name, engine)
                if configuration.chunk == CHUNKS.chunk:
                    what = "tokens of prompts, compared with an unquantised cache"
                    scores = _flat(_scores(engine, reference.texts()))
                    if reference.unquantised is None:
                        self._add(name, what, Verdict.UNSUPPORTED, "vLLM gave no log-probabilities")
                    else:
                        unquantised = _flat(reference.unquantised)
                        self._check_scores(name, what, scores, unquantised, reference)
        except EngineError as error:
            self._add_failure(configuration, error, reference.prompts)

    def _check_batches(
        self, configuration: Configuration, engine: EngineHost, reference: Reference
    ) -> None:
        name, prompts, tokens = configuration.name, reference.prompts, self._sizes.tokens
        at_once = engine.generate(prompts, tokens, fresh=True)
        self._engines.add(self._compared(name, "all at once", at_once, reference))
        if configuration.prefix_caching is False:
            return
        again = engine.generate(prompts, tokens)
        check = self._compared(name, "again, from the prefix cache", again, reference)
        cached = sum(output.cached for output in again)
        if check.verdict is Verdict.EQUAL and not cached:
            check = replace(check, verdict=Verdict.INCONCLUSIVE, detail="no prefix cache hit")
        elif not check.detail:
            check = replace(check, detail=f"{cached} prompt tokens from the cache")
        self._engines.add(check)

    def _compared(self, name: str, what: str, outputs: list[Output], reference: Reference) -> Check:
        found = compare(outputs, reference.outputs, self._bounds)
        if found.different:
            verdict, detail = Verdict.DIFFERENT, "; ".join(found.different[:3])
        elif not found.tokens:
            verdict, detail = Verdict.INCONCLUSIVE, "every choice of a token was close"
        else:
            verdict, detail = Verdict.EQUAL, ""
        counts = (found.prompts, found.tokens, found.apart)
        return Check(self._engines.name, name, what, verdict, detail, *counts)

    def _check_drafts(self, name: str, engine: EngineHost) -> None:
        metrics = engine.metrics()
        drafted = metrics.get("vllm:spec_decode_num_draft_tokens", 0)
        accepted = metrics.get("vllm:spec_decode_num_accepted_tokens", 0)
        verdict = Verdict.EQUAL if 0 < accepted < drafted else Verdict.INCONCLUSIVE
        detail = f"{drafted:.0f} drafted, {accepted:.0f} accepted"
        self._add(name, "drafts both accepted and rejected", verdict, detail)

    def _check_scores(
        self,
        name: str,
        what: str,
        measured: list[float],
        unquantised: list[float],
        reference: Reference,
    ) -> None:
        assert reference.unquantised is not None
        spread = statistics.pstdev(_flat(reference.unquantised))
        mean, exceeded = far_from_unquantised(measured, unquantised, self._head_size, spread)
        verdict = Verdict.DIFFERENT if exceeded else Verdict.EQUAL
        detail = "; ".join(exceeded) or "within the error of the format"
        counts = (len(reference.scored), len(measured), mean)
        self._engines.add(Check(self._engines.name, name, what, verdict, detail, *counts))

    def _add_failure(
        self, configuration: Configuration, error: EngineError, prompts: list[list[int]]
    ) -> None:
        """Add a failure, of vLLM if it fails too without the plugin and quantisation."""
        name, tokens = configuration.name, self._sizes.tokens
        try:
            with self._engines.running(configuration.control()) as engine:
                engine.generate(prompts, tokens, alone=True, fresh=True)
                engine.generate(prompts, tokens, fresh=True)
                engine.generate(prompts, tokens)
        except EngineError as same:
            self._add(name, "", Verdict.UNSUPPORTED, f"with auto: {same.reason}")
        else:
            self._add(name, "", Verdict.FAILED, error.reason)

    def _add(self, name: str, what: str, verdict: Verdict, detail: str) -> None:
        self._engines.add(Check(self._engines.name, name, what, verdict, detail))


def choose(
    outputs: Sequence[Output], prompts: Sequence[list[int]], count: int, bounds: Bounds
) -> list[int]:
    """Return the indices of the prompts to compare.

    Half are the longest prompts, so that many pages are read; the others have the most decisive
    tokens. All have two decisive tokens, or one if too few have two.
    """
    lengths = [decisive(output, bounds) for output in outputs]
    usable = [i for i, length in enumerate(lengths) if length >= 2]
    if len(usable) < count:
        usable = [i for i, length in enumerate(lengths) if length >= 1]
    long = sorted(usable, key=lambda i: len(prompts[i]))[-(count // 2) :]
    rest = sorted(set(usable) - set(long), key=lambda i: lengths[i])
    return sorted(long + rest[-(count - len(long)) :])


def _scores(engine: EngineHost, texts: list[list[int]]) -> list[list[float]]:
    """Return the log-probabilities of each text's tokens from the second on."""
    outputs = engine.generate(texts, 1, prompt_logprobs=True)
    return [output.prompt_logprobs or [] for output in outputs]


def _flat(scores: list[list[float]]) -> list[float]:
    return list(chain.from_iterable(scores))
