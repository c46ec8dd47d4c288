# SPDX-License-Identifier: Apache-2.0
"""Run one engine for each cache, one after another, each in its own child process.

Compiled code and patches of vLLM stay in a process, so each process runs only one engine.
An interrupted run continues from its folder:

run.json                      what the scores depend on; another run cannot use the folder
lock                          locked by the process that uses the folder
<cache>/facts.json            facts of its engine
<cache>/00000.json            the scores of a window
<cache>/log.txt               the output of its engine
<reference>/00000.safetensors hidden states of the reference
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy

from vllm_hybrid_kv.settings import SECTION, environment_name
from vllm_hybrid_kv.tools.child import Child
from vllm_hybrid_kv.tools.eval.scores import summarise
from vllm_hybrid_kv.tools.machine import cpu_model
from vllm_hybrid_kv.tools.output import ToolError, progress_bar

_COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^\[]*\])")
_SETTING = r"\s*(\w+)\s*=\s*([^,=\[\]]*)"
_VARIANT = re.compile(rf"([\w.-]+)(?:\[({_SETTING}(?:,{_SETTING})*)\])?")

ENGINE = "vllm_hybrid_kv.tools.eval.engine:run"

DEFAULTS = {
    "max_num_batched_tokens": 512,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "seed": 0,
}
"""Arguments of vLLM that a user may override. Short chunks of prompts limit the memory for logits.
Nothing is compiled, because that takes longer than it saves."""

FIXED = {"max_num_seqs": 1, "enable_prefix_caching": False, "disable_log_stats": True}
"""Arguments that the recorder needs: one request at a time, and every token computed."""

RESERVED = (
    *FIXED,
    *("model", "kv_cache_dtype", "max_model_len", "additional_config", "worker_extension_cls"),
    "speculative_config",
)

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    # 1 GiB is enough for one sequence. vLLM's default is a share of the whole memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # The engine runs in the child itself, so it starts faster and ends with the child.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""Environment variables of the child, unless the user has set them."""


@dataclass(frozen=True)
class CacheVariant:
    """One cache to compare.

    Attributes:
        name: The cache as on the command line, such as `turboquant_k8v4[boundary_layers=2]`.
        kv_cache_dtype: A value of vLLM's `--kv-cache-dtype`.
        settings: Settings of the plugin; they override the environment.
    """

    name: str
    kv_cache_dtype: str
    settings: dict[str, str]


def parse(text: str, reference: str) -> list[CacheVariant]:
    """Parse a comma-separated list of caches. The reference comes first, even if not listed.

    Raises:
        ToolError: The text is not such a list, or contains only the reference.
    """
    names = dict.fromkeys(
        name.strip() for name in (reference, *_COMMA_OUTSIDE_BRACKETS.split(text))
    )
    variants = []
    for name in names:
        if (match := _VARIANT.fullmatch(name)) is None:
            raise ToolError(
                f"--kv-cache-dtype: {name!r} is not a cache dtype; separate dtypes with commas and "
                "put settings in brackets, like fp8,turboquant_k8v4[boundary_layers=2]"
            )
        settings = dict(re.findall(_SETTING, match[2] or ""))
        variants.append(CacheVariant(name, match[1], settings))
    if len(variants) == 1:
        raise ToolError(
            f"--kv-cache-dtype: {text!r} has nothing to compare with {reference}; "
            "add another cache, like fp8,turboquant_k8v4"
        )
    return variants


@contextmanager
def opened(folder: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """Make and lock a folder for a run whose scores depend on `identity` (JSON).

    Raises:
        ToolError: The folder belongs to another run, is in use, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise ToolError(
            f"{folder}: {error.strerror}; choose a writable folder with --work"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ToolError(
                f"{folder}: another evaluation uses this folder; wait for it, or choose another "
                "folder with --work"
            ) from None
        file = folder / "run.json"
        try:
            stored = dict(json.loads(file.read_text()) if file.exists() else identity)
        except (ValueError, TypeError):
            stored = {}
        if differs := [name for name in identity if stored.get(name) != identity[name]]:
            raise ToolError(
                f"{folder} belongs to an evaluation with another {', '.join(differs)}; choose "
                "another folder with --work, or remove it"
            )
        file.write_text(json.dumps(identity, indent=1) + "\n")
        yield


@dataclass(frozen=True)
class Run:
    """An evaluation of several caches of one model.

    Attributes:
        folder: The folder, locked by `opened`.
        model: A folder, or a name on the hub.
        sequences: The tokens of each window.
        engine: Further arguments of vLLM's `LLM`.
    """

    folder: Path
    model: str
    sequences: Sequence[list[int]]
    engine: Mapping[str, Any]

    def measure(
        self, variants: Sequence[CacheVariant]
    ) -> tuple[list[dict[str, Any]], dict[str, list[numpy.ndarray]]]:
        """Return facts and statistics of all caches, and the scores by the name of the cache.

        A cache that fails has a `reason`.

        Raises:
            ToolError: The reference, which comes first, failed.
            OSError: The folder cannot be written, or an engine ended early.
        """
        caches: list[dict[str, Any]] = []
        scores = {}
        with progress_bar("{task.fields[state]}") as bar:
            for variant in variants:
                task = bar.add_task(variant.name, total=len(self.sequences), state="")
                update = functools.partial(bar.update, task)
                try:
                    facts, scores[variant.name] = self.score(variant, variants[0], update)
                except ToolError as error:
                    update(state="failed")
                    if not caches:
                        raise ToolError(f"{variant.name}: {error}") from None
                    caches.append({"name": variant.name, "reason": str(error)})
                    continue
                if facts["device"] == "cpu":
                    facts["device"] = cpu_model()
                facts |= summarise(scores[variant.name])
                caches.append({"name": variant.name, "reason": None, **facts})
        return caches, scores

    def score(
        self, variant: CacheVariant, reference: CacheVariant, update: Callable[..., None]
    ) -> tuple[dict[str, Any], list[numpy.ndarray]]:
        """Score the windows that have no scores yet; return the engine's facts and all scores.

        `reference` was scored before, or equals `variant`. `update` updates the progress bar.

        Raises:
            ToolError: The engine does not start, or fails.
        """
        folder, states = (
            self.folder / quote(cache.name, safe="[=,]") for cache in (variant, reference)
        )
        folder.mkdir(exist_ok=True)
        facts, job_file, log = (folder / name for name in ("facts.json", "job.json", "log.txt"))
        numbers = range(len(self.sequences))
        files = [folder / f"{number:05}.json" for number in numbers]
        pending = [number for number in numbers if not files[number].exists()]
        update(completed=len(files) - len(pending))
        if pending or not facts.exists():
            update(state="starting the engine")
            job = {
                "engine": {
                    **DEFAULTS,
                    **self.engine,
                    **FIXED,
                    "model": self.model,
                    # The longest prompt, and the one token that vLLM has to generate.
                    "max_model_len": max(map(len, self.sequences)) + 1,
                    "kv_cache_dtype": variant.kv_cache_dtype,
                    "additional_config": {SECTION: variant.settings},
                },
                "sequences": self.sequences,
                "pending": pending,
                "facts": str(facts),
                "scores": list(map(str, files)),
                "states": [str(states / f"{number:05}.safetensors") for number in numbers],
                "is_reference": variant == reference,
            }
            job_file.write_text(json.dumps(job))
            environment = {**ENVIRONMENT, **os.environ}
            for setting in variant.settings:
                # The variable would override the setting of this cache.
                environment.pop(environment_name(setting), None)
            with Child(ENGINE, str(job_file), log=log, environment=environment) as child:
                for _ in child.messages():
                    update(advance=1, state="")
            if child.problem is not None:
                raise ToolError(f"{child.problem}; the engine's output is in {log}")
        return json.loads(facts.read_text()), [
            numpy.array(json.loads(file.read_text())) for file in files
        ]
