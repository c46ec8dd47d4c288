# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv eval`: how quantised KV caches change a model's predictions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vllm_hybrid_kv.tools.machine import cpu_model
from vllm_hybrid_kv.tools.output import (
    JsonOption,
    MarkdownOption,
    PlotOption,
    ToolError,
    check_paths,
    progress_bar,
    write,
)
from vllm_hybrid_kv.version import __version__

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.eval.report import CacheResult
    from vllm_hybrid_kv.tools.eval.run import Run
    from vllm_hybrid_kv.tools.eval.variants import CacheVariant

SCHEMA = 1
"""Changes if a key of `Evaluation.to_json` is removed or changes its meaning."""


def evaluate(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the hub.")],
    data: Annotated[
        Path,
        typer.Option(help="Plain text; or .jsonl with 'text' or 'prompt_token_ids' in each line."),
    ],
    kv_cache_dtype: Annotated[
        str,
        typer.Option(help="Cache dtypes with settings: fp8,turboquant_k8v4[boundary_layers=0]."),
    ] = "fp8,turboquant_k8v4",
    reference: Annotated[str, typer.Option(help="The cache to compare all with.")] = "auto",
    context: Annotated[int, typer.Option(min=2, help="Most tokens of a window.")] = 2048,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N windows only.")] = None,
    engine_args: Annotated[
        str, typer.Option(help='Further arguments of vLLM, like {"tensor_parallel_size": 2}.')
    ] = "{}",
    work: Annotated[
        Path | None,
        typer.Option(help="Folder from which an interrupted run continues; default: user's cache."),
    ] = None,
    json_: JsonOption = None,
    plot: PlotOption = None,
    markdown: MarkdownOption = False,
) -> None:
    """Compare predictions with quantised and unquantised caches: perplexity, KL, top-1.

    vLLM's own engine runs the model, once for each cache. The same command continues an
    interrupted run.
    """
    check_paths(json_, plot)
    # These import pydantic, numpy or torch.
    from vllm_hybrid_kv.settings import SECTION, resolve
    from vllm_hybrid_kv.tools.eval.folder import Folder, digest
    from vllm_hybrid_kv.tools.eval.report import Evaluation, draw, report
    from vllm_hybrid_kv.tools.eval.run import Run
    from vllm_hybrid_kv.tools.eval.variants import parse

    variants = parse(kv_cache_dtype, reference)
    for variant in variants:
        resolve({SECTION: variant.settings}, {})
    arguments = _engine_arguments(engine_args)
    vllm = _vllm_version()
    with Console(stderr=True).status("Reading the data"):
        sequences = _sequences(model, data, context, limit, arguments)
    identity = _identity(model, sequences, arguments, reference, vllm)
    folder = Folder(work or _cache() / digest(identity)[:16])
    try:
        with folder.opened(identity):
            caches = _measure(Run(folder, model, sequences, arguments), variants, len(sequences))
    except OSError as error:
        raise ToolError(f"{folder.path}: {error.strerror or error}") from None
    except KeyboardInterrupt:
        raise ToolError("interrupted; run the same command again to continue", 130) from None
    failed = [f"{cache.name}: {cache.error}" for cache in caches if cache.summary is None]
    # A folder that the user chose stays, so that caches can be added.
    if work is None and not failed:
        shutil.rmtree(folder.path, ignore_errors=True)
    evaluation = Evaluation(
        model=model,
        data=str(data),
        sequences=len(sequences),
        positions=sum(len(sequence) - 1 for sequence in sequences),
        longest=max(map(len, sequences)),
        versions={"vllm_hybrid_kv": __version__, "vllm": vllm},
        caches=caches,
    )
    write(
        evaluation.to_json(),
        lambda: report(evaluation),
        schema=SCHEMA,
        json_=json_,
        markdown=markdown,
        plot=plot,
        draw=lambda path: draw(path, evaluation),
    )
    if failed:
        raise ToolError("; ".join(failed))


def _engine_arguments(text: str) -> dict[str, Any]:
    from vllm_hybrid_kv.tools.eval.run import RESERVED

    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise ToolError(f"--engine-args is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ToolError(f'--engine-args is not a JSON object: {text}; write {{"name": value}}')
    arguments = {name.replace("-", "_"): value for name, value in arguments.items()}
    if reserved := sorted(set(arguments) & set(RESERVED)):
        raise ToolError(f"--engine-args: remove {', '.join(reserved)}, which eval itself sets")
    return arguments


def _vllm_version() -> str:
    from vllm_hybrid_kv.plugin import vllm_version

    level = os.environ.get("VLLM_LOGGING_LEVEL")
    os.environ["VLLM_LOGGING_LEVEL"] = level or "ERROR"
    try:
        return vllm_version()[0]
    except ImportError as error:
        raise ToolError(str(error)) from None
    finally:
        # The engines log as usual.
        if level is None:
            del os.environ["VLLM_LOGGING_LEVEL"]


def _sequences(
    model: str, data: Path, context: int, limit: int | None, arguments: dict[str, Any]
) -> list[list[int]]:
    from vllm_hybrid_kv.tools.eval.sequences import read_sequences

    def tokenizer() -> Any:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from transformers import AutoTokenizer

        name = arguments.get("tokenizer") or model
        trusted = bool(arguments.get("trust_remote_code"))
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)
        except (OSError, ValueError, KeyError) as error:
            raise ToolError(
                f"the tokenizer of {name} cannot be loaded ({error}); use data with "
                "'prompt_token_ids'"
            ) from None

    return read_sequences(data, tokenizer, context, limit)


def _identity(
    model: str,
    sequences: Sequence[Sequence[int]],
    arguments: dict[str, Any],
    reference: str,
    vllm: str,
) -> dict[str, Any]:
    """Return what scores depend on, without the caches."""
    from vllm_hybrid_kv.settings import ENVIRONMENT_PREFIX
    from vllm_hybrid_kv.tools.eval.folder import digest, model_identity

    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(ENVIRONMENT_PREFIX) or name == "VLLM_PLUGINS"
    }
    return {
        "model": model_identity(model),
        "data": digest(sequences),
        "engine_args": arguments,
        "reference": reference,
        "environment": variables,
        "vllm": vllm,
        "vllm_hybrid_kv": __version__,
    }


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "vllm-hybrid-kv" / "eval"


def _measure(run: Run, variants: Sequence[CacheVariant], total: int) -> list[CacheResult]:
    """Measure all caches; a cache that fails has an error, but the reference must not fail."""
    from vllm_hybrid_kv.tools.eval.report import CacheResult
    from vllm_hybrid_kv.tools.eval.run import CacheError
    from vllm_hybrid_kv.tools.eval.summary import summarise

    results: list[CacheResult] = []
    with progress_bar("{task.fields[state]}") as bar:
        for variant in variants:
            task = bar.add_task(variant.name, total=total, state="")

            def scored(count: int, task: Any = task) -> None:
                bar.update(task, completed=count, state="" if count else "starting the engine")

            try:
                facts, scores = run.measure(variant, variants[0], scored)
            except CacheError as error:
                bar.update(task, state="failed")
                if not results:
                    raise ToolError(f"{variant.name}: {error}") from None
                results.append(CacheResult(variant.name, str(error)))
                continue
            if facts["device"] == "cpu":
                facts["device"] = cpu_model()
            results.append(CacheResult(variant.name, "", summarise(scores), facts, scores))
    return results
