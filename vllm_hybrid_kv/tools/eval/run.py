# SPDX-License-Identifier: Apache-2.0
"""A run: one engine for each cache, one after another, each in a child process.

What vLLM compiles and patches belongs to a process, so that a process runs one engine only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_hybrid_kv.settings import environment_name
from vllm_hybrid_kv.tools.child import Child
from vllm_hybrid_kv.tools.eval.folder import Folder
from vllm_hybrid_kv.tools.eval.scores import Scores
from vllm_hybrid_kv.tools.eval.variants import CacheVariant
from vllm_hybrid_kv.tools.output import ToolError

ENGINE = "vllm_hybrid_kv.tools.eval.engine:score"

DEFAULTS = {
    "max_num_batched_tokens": 512,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "seed": 0,
}
"""Arguments of vLLM that a user may change. The chunk size bounds the logits in memory, and
compilation takes longer than it saves."""

FIXED = {"max_num_seqs": 1, "enable_prefix_caching": False, "disable_log_stats": True}
"""Arguments that the recorder needs: one request at a time, and every token computed."""

RESERVED = (
    *FIXED,
    *("model", "kv_cache_dtype", "max_model_len", "additional_config", "worker_extension_cls"),
    "speculative_config",
)

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    # One sequence at a time needs little; vLLM's default is a share of the whole memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # The engine runs in the child itself: it starts faster, and ends with it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""Defaults for the environment of the child."""


class CacheError(ToolError):
    """One cache cannot be measured; others may."""


class Run:
    """An evaluation of several caches of one model, in a folder."""

    def __init__(
        self,
        folder: Folder,
        model: str,
        sequences: Sequence[Sequence[int]],
        engine: Mapping[str, Any],
    ) -> None:
        """Prepare a run.

        Args:
            folder: A folder that is open for it.
            model: A folder, or a name on the hub.
            sequences: The tokens of each sequence.
            engine: Further arguments of vLLM's `LLM`.
        """
        self._folder = folder
        self._sequences = [list(sequence) for sequence in sequences]
        self._engine = {
            **DEFAULTS,
            **engine,
            **FIXED,
            "model": model,
            # The longest prompt, and the one token that vLLM has to generate.
            "max_model_len": max(map(len, self._sequences)) + 1,
        }

    def measure(
        self, variant: CacheVariant, reference: CacheVariant, progress: Callable[[int], None]
    ) -> tuple[dict[str, Any], list[Scores]]:
        """Score the sequences that have no scores yet; return the engine's facts and all scores.

        Args:
            variant: The cache.
            reference: The cache to compare with; it was measured before, or is the same.
            progress: Called with the number of scored sequences.

        Raises:
            CacheError: The engine does not start, or fails.
            OSError: The folder cannot be written.
        """
        folder, states_folder = self._folder.of(variant.name), self._folder.of(reference.name)
        numbers = range(len(self._sequences))
        states = [states_folder / f"{number:05}.safetensors" for number in numbers]
        journal, job_file, log = (folder / n for n in ("scores.jsonl", "job.json", "log.txt"))
        facts, scored = read_scores(journal)
        is_reference = variant == reference
        pending = [
            number
            for number, tokens in enumerate(self._sequences)
            if len(scored.get(number, ())) != len(tokens) - 1
            or (is_reference and not states[number].exists())
        ]
        done = len(numbers) - len(pending)
        progress(done)
        if pending or facts is None:
            job = {
                "engine": self._engine,
                "kv_cache_dtype": variant.kv_cache_dtype,
                "settings": dict(variant.settings),
                "sequences": self._sequences,
                "pending": pending,
                "states": list(map(str, states)),
                "is_reference": is_reference,
            }
            job_file.write_text(json.dumps(job))
            with (
                journal.open("a") as lines,
                Child(ENGINE, str(job_file), log=log, environment=_environment(variant)) as child,
            ):
                for message in child.messages():
                    # A line that an interruption cut off may come before it.
                    lines.write(f"\n{json.dumps(message)}")
                    lines.flush()
                    done += "number" in message
                    progress(done)
            if child.problem is not None or done < len(numbers):
                problem = child.problem or "the engine ended early"
                raise CacheError(f"{problem}; the engine's output is in {log}")
            facts, scored = read_scores(journal)
        return facts or {}, [scored[number] for number in numbers]


def read_scores(journal: Path) -> tuple[dict[str, Any] | None, dict[int, Scores]]:
    """Return the facts and the scores by sequence of a `scores.jsonl`, which may not exist.

    Incomplete lines are ignored; a later line replaces an earlier one for the same sequence.
    """
    facts, scored = None, {}
    for line in journal.read_text().splitlines() if journal.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        facts = entry.get("facts", facts)
        if "scores" in entry:
            scored[entry["number"]] = Scores(**entry["scores"])
    return facts, scored


def _environment(variant: CacheVariant) -> dict[str, str]:
    environment = {**ENVIRONMENT, **os.environ}
    for setting in variant.settings:
        # The variable would override the setting of this cache.
        environment.pop(environment_name(setting), None)
    return environment
