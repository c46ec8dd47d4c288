# SPDX-License-Identifier: Apache-2.0
"""Start the engines of one model, and record their results."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine.configurations import Configuration, Place
from benchmarks.engine.report import Results, Row, Verdict
from benchmarks.engine.workload import Sizes
from testing.engine_host import EngineError, EngineHost

CALL_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Engines:
    """The engines of one model.

    Attributes:
        arguments: Arguments of `vllm.LLM` for all engines of the model.
        jobs: How many engines may start at the same time.
        log: The path of each engine's log begins with this.
    """

    name: str
    folder: Path
    arguments: dict[str, Any]
    place: Place
    sizes: Sizes
    jobs: int
    log: Path
    results: Results
    say: Callable[[str], None]

    def start(self, configuration: Configuration, mode: str = "") -> EngineHost:
        """Start an engine. The caller closes it. `mode` becomes part of its row and log name."""
        words = "".join(c if c.isalnum() else "-" for c in f"{mode} {configuration.name}".strip())
        log = self.log.with_name(f"{self.log.name}-{words}.txt")
        log.unlink(missing_ok=True)
        # VLLM_CPU_KVCACHE_SPACE would override `kv_cache_memory_bytes`. `EngineHost` would set one
        # thread, but timed engines need all.
        threads = os.environ.get("OMP_NUM_THREADS")
        environment = {"VLLM_CPU_KVCACHE_SPACE": None, "OMP_NUM_THREADS": threads}
        if configuration.graphs is not None:
            # Engines that start at the same time must not share what they compile.
            environment["VLLM_CACHE_ROOT"] = str(log.with_suffix(".cache"))
        host = EngineHost(log, CALL_TIMEOUT_S, **environment, **configuration.environment())
        with contextlib.ExitStack() as on_error:
            on_error.callback(host.close)
            host.engine(
                model=str(self.folder),
                gpu_memory_utilization=0.1,
                **{**configuration.arguments(), **self.arguments},
            )
            if host.started["plugin"] != configuration.plugin:
                raise EngineError(
                    "the plugin is not active: is vllm-hybrid-kv installed in this Python?"
                    if configuration.plugin
                    else "the plugin is active although VLLM_PLUGINS is empty"
                )
            on_error.pop_all()
        row = {"model": self.name, "mode": mode, "configuration": configuration.name}
        row["cache_dtype"] = configuration.cache_dtype
        self.results.engines.append({**row, **host.started})
        return host

    def running(self, configuration: Configuration) -> contextlib.closing[EngineHost]:
        return contextlib.closing(self.start(configuration))

    def add(self, engine: str, what: str, verdict: Verdict, detail: str = "", *more: Any) -> None:
        """Add a row about an engine to the report, and print it. `more` are the row's numbers."""
        row = Row(self.name, engine, what, verdict, detail, *more)
        self.results.rows.append(row)
        self.say(str(row))
