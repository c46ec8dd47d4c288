# SPDX-License-Identifier: Apache-2.0
"""Check that engines with a k8v4 cache give equal outputs, however requests are batched or cut."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

from benchmarks.engine import configurations
from benchmarks.engine.configurations import AUTO, CHUNKS, REFERENCE, Configuration
from benchmarks.engine.engines import Engines
from benchmarks.engine.report import Verdict
from benchmarks.engine.workload import prompt_pool
from testing.engine_host import EngineError, EngineHost, Output
from testing.output_comparison import Bounds, compare, decisive, far_from_unquantised

SCORED = 8
"""How many of the longest texts are also scored with an unquantised cache, for comparison."""


@dataclass
class ModelChecks:
    """The checks of one model.

    Attributes:
        prompts: The prompts that are compared, shortest first.
        outputs: The outputs of an eager engine that computed each prompt alone.
        unquantised: What an engine with an unquantised cache returned from `_scores`. Empty if
            vLLM could not compute it.
    """

    engines: Engines
    head_size: int
    bounds: Bounds
    prompts: list[list[int]] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    unquantised: list[list[float]] = field(default_factory=list)

    def run(self) -> None:
        """Start the engines. Add a row for each comparison, or the reason why there is none."""
        engines = self.engines
        try:
            auto = engines.start(AUTO)
        except EngineError as error:
            engines.add("all", "", Verdict.UNSUPPORTED, f"with auto: {error.reason}")
            return
        with contextlib.closing(auto):
            has_reference = self._make_reference(auto)
        second = auto.started["runner"] == 2
        tried, skipped = configurations.to_check(engines.name, engines.place, second)
        if not has_reference:
            skipped |= {c.name: "there is no reference" for c in tried}
            tried = []
        for name, reason in skipped.items():
            engines.add(name, "", Verdict.SKIPPED, reason)
        with ThreadPoolExecutor(engines.jobs) as pool:
            list(pool.map(self._check, tried))

    def _make_reference(self, auto: EngineHost) -> bool:
        sizes, pool = self.engines.sizes, prompt_pool(self.engines.sizes)
        try:
            with self.engines.running(REFERENCE) as engine:
                outputs = engine.generate(pool, sizes.tokens, fresh=True)
                self.prompts = choose(outputs, pool, sizes.prompts, self.bounds)
                self.outputs = engine.generate(self.prompts, sizes.tokens, alone=True, fresh=True)
                self._check_batches(REFERENCE, engine)
        except EngineError as error:
            self._add_failure(REFERENCE, error, pool)
            return False
        try:
            self.unquantised = self._scores(auto)
        except EngineError as error:
            what = "log-probabilities of prompts"
            self.engines.add(AUTO.name, what, Verdict.UNSUPPORTED, error.reason)
            return True
        generated = [output.logprobs for output in self.outputs[-SCORED:]]
        pairs = zip(generated, self.unquantised, strict=True)
        expected = [scores[-len(logprobs) :] for logprobs, scores in pairs]
        self._check_scores(REFERENCE, "generated tokens", generated, expected)
        return True

    def _check(self, configuration: Configuration) -> None:
        try:
            with self.engines.running(configuration) as engine:
                alone = engine.generate(
                    self.prompts, self.engines.sizes.tokens, alone=True, fresh=True
                )
                self._compare(configuration, "alone", alone)
                self._check_batches(configuration, engine)
                if configuration.speculation is not None:
                    self._check_drafts(configuration, engine)
                if configuration.chunk == CHUNKS.chunk and self.unquantised:
                    scores = self._scores(engine)
                    self._check_scores(configuration, "tokens of prompts", scores, self.unquantised)
        except EngineError as error:
            self._add_failure(configuration, error, self.prompts)

    def _check_batches(self, configuration: Configuration, engine: EngineHost) -> None:
        tokens = self.engines.sizes.tokens
        at_once = engine.generate(self.prompts, tokens, fresh=True)
        self._compare(configuration, "all at once", at_once)
        if configuration.prefix_caching is not False:
            again = engine.generate(self.prompts, tokens)
            cached = sum(output.cached for output in again)
            detail = f"{cached} prompt tokens from the cache"
            self._compare(configuration, "again, from the prefix cache", again, detail, cached > 0)

    def _compare(
        self,
        configuration: Configuration,
        what: str,
        outputs: list[Output],
        detail: str = "",
        conclusive: bool = True,
    ) -> None:
        found = compare(outputs, self.outputs, self.bounds)
        if found.different:
            verdict, detail = Verdict.DIFFERENT, "; ".join(found.different[:3])
        elif not found.tokens:
            verdict, detail = Verdict.INCONCLUSIVE, "every choice of a token was close"
        else:
            verdict = Verdict.EQUAL if conclusive else Verdict.INCONCLUSIVE
        numbers = (len(outputs), found.tokens, found.apart)
        self.engines.add(configuration.name, what, verdict, detail, *numbers)

    def _check_drafts(self, configuration: Configuration, engine: EngineHost) -> None:
        metrics = engine.metrics()
        drafted = metrics.get("vllm:spec_decode_num_draft_tokens", 0)
        accepted = metrics.get("vllm:spec_decode_num_accepted_tokens", 0)
        verdict = Verdict.EQUAL if 0 < accepted < drafted else Verdict.INCONCLUSIVE
        detail = f"{drafted:.0f} drafted, {accepted:.0f} accepted"
        self.engines.add(configuration.name, "drafts both accepted and rejected", verdict, detail)

    def _scores(self, engine: EngineHost) -> list[list[float]]:
        """Return the log-probabilities of the longest prompts and outputs, from token two on."""
        pairs = zip(self.prompts[-SCORED:], self.outputs[-SCORED:], strict=True)
        texts = [prompt + output.tokens for prompt, output in pairs]
        outputs = engine.generate(texts, 1, prompt_logprobs=True)
        return [output.prompt_logprobs or [] for output in outputs]

    def _check_scores(
        self,
        configuration: Configuration,
        what: str,
        measured: list[list[float]],
        unquantised: list[list[float]],
    ) -> None:
        spread = statistics.pstdev(chain(*self.unquantised))
        scores, expected = list(chain(*measured)), list(chain(*unquantised))
        mean, exceeded = far_from_unquantised(scores, expected, self.head_size, spread)
        verdict = Verdict.DIFFERENT if exceeded else Verdict.EQUAL
        detail = "; ".join(exceeded) or "within the error of the format"
        what += ", compared with an unquantised cache"
        numbers = (len(measured), len(scores), mean)
        self.engines.add(configuration.name, what, verdict, detail, *numbers)

    def _add_failure(
        self, configuration: Configuration, error: EngineError, prompts: list[list[int]]
    ) -> None:
        """Add a failure. vLLM is at fault if the engine also fails without plugin and k8v4."""
        tokens = self.engines.sizes.tokens
        verdict, reason = Verdict.FAILED, error.reason
        try:
            with self.engines.running(configuration.control()) as engine:
                engine.generate(prompts, tokens, alone=True, fresh=True)
                engine.generate(prompts, tokens, fresh=True)
                engine.generate(prompts, tokens)
        except EngineError as same:
            verdict, reason = Verdict.UNSUPPORTED, f"with auto: {same.reason}"
        self.engines.add(configuration.name, "", verdict, reason)


def choose(
    outputs: Sequence[Output], prompts: Sequence[list[int]], count: int, bounds: Bounds
) -> list[list[int]]:
    """Choose prompts to compare, and return them shortest first.

    A prompt is skipped if rounding can change the first token of its output. Half of the chosen
    prompts are the longest. The other half are those whose outputs have the longest beginning that
    rounding cannot change.
    """
    counts = [decisive(output, bounds) for output in outputs]
    usable = [i for i, number in enumerate(counts) if number]
    usable.sort(key=lambda i: len(prompts[i]))
    long, rest = usable[-(count // 2) :], usable[: -(count // 2)]
    rest.sort(key=lambda i: counts[i])
    chosen = [prompts[i] for i in long + rest[len(long) - count :]]
    return sorted(chosen, key=len)
