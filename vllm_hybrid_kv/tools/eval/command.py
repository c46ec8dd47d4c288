# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv eval`: what a quantised KV cache changes about a model's predictions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from vllm_hybrid_kv.settings import ENVIRONMENT_PREFIX, SECTION
from vllm_hybrid_kv.tools.eval.plot import draw
from vllm_hybrid_kv.tools.eval.report import Column, Evaluation, report
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
    from vllm_hybrid_kv.tools.eval.run import Run
    from vllm_hybrid_kv.tools.eval.subjects import Subject

SCHEMA = 1


def evaluate(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the hub.")],
    data: Annotated[
        Path,
        typer.Option(help="Plain text; or .jsonl with 'text' or 'prompt_token_ids' in each line."),
    ],
    kv_cache_dtype: Annotated[
        str,
        typer.Option(help="Caches between commas; settings like k[boundary_layers=0]."),
    ] = "fp8,turboquant_k8v4",
    reference: Annotated[str, typer.Option(help="The cache that all are compared with.")] = "auto",
    context: Annotated[int, typer.Option(min=2, help="The most tokens of a window.")] = 2048,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first N windows only.")] = None,
    engine_args: Annotated[
        str, typer.Option(help='Further arguments of vLLM, like {"tensor_parallel_size": 2}.')
    ] = "{}",
    work: Annotated[
        Path | None,
        typer.Option(help="Where an interrupted run goes on; by default in the user's cache."),
    ] = None,
    json_: JsonOption = None,
    plot: PlotOption = None,
    markdown: MarkdownOption = False,
) -> None:
    """Compare predictions with quantised caches to those without: perplexity, KL, top-1.

    vLLM's own engine runs the model, once for each cache. A run that was interrupted goes on when
    the same command is given again.
    """
    check_paths(json_, plot)
    subjects = _subjects(kv_cache_dtype, reference)
    arguments = _engine_arguments(engine_args)
    vllm = _vllm_version()
    with Console(stderr=True).status("Reading the data"):
        sequences = _sequences(model, data, context, limit, arguments)
    identity = _identity(model, sequences, arguments, reference, vllm)
    try:
        columns = _measure(model, subjects, sequences, arguments, identity, work)
    except KeyboardInterrupt:
        raise ToolError("interrupted; run the same command again to continue", 130) from None
    evaluation = Evaluation(
        model=model,
        data=str(data),
        sequences=len(sequences),
        positions=sum(len(sequence) - 1 for sequence in sequences),
        longest=max(map(len, sequences)),
        versions={"vllm_hybrid_kv": __version__, "vllm": vllm},
        columns=columns,
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
    if missing := [column for column in columns if column.summary is None]:
        raise ToolError("; ".join(f"{column.name}: {column.reason}" for column in missing))


def _subjects(text: str, reference: str) -> list[Subject]:
    from vllm_hybrid_kv.settings import resolve
    from vllm_hybrid_kv.tools.eval.subjects import parse

    subjects = parse(text, reference)
    for subject in subjects:
        resolve({SECTION: subject.settings}, {})
    return subjects


def _engine_arguments(text: str) -> dict[str, Any]:
    from vllm_hybrid_kv.tools.eval.errors import EvaluationError
    from vllm_hybrid_kv.tools.eval.run import RESERVED

    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise EvaluationError(f"--engine-args is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise EvaluationError(f"--engine-args is no object: {text}")
    arguments = {name.replace("-", "_"): value for name, value in arguments.items()}
    if taken := sorted(set(arguments) & set(RESERVED)):
        raise EvaluationError(f"--engine-args: eval itself sets {', '.join(taken)}")
    return arguments


def _vllm_version() -> str:
    from vllm_hybrid_kv.plugin import vllm_version
    from vllm_hybrid_kv.tools.eval.errors import EvaluationError

    level = os.environ.get("VLLM_LOGGING_LEVEL")
    os.environ["VLLM_LOGGING_LEVEL"] = level or "ERROR"
    try:
        return vllm_version()[0]
    except ImportError as error:
        raise EvaluationError(str(error)) from None
    finally:
        # Not for the engines, whose logs are to be read.
        if level is None:
            del os.environ["VLLM_LOGGING_LEVEL"]


def _sequences(
    model: str, data: Path, context: int, limit: int | None, arguments: dict[str, Any]
) -> list[list[int]]:
    from vllm_hybrid_kv.tools.eval.errors import EvaluationError
    from vllm_hybrid_kv.tools.eval.sequences import read_sequences

    def tokenizer() -> Any:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from transformers import AutoTokenizer

        name = arguments.get("tokenizer") or model
        trusted = bool(arguments.get("trust_remote_code"))
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)
        except (OSError, ValueError, KeyError) as error:
            said = " ".join(str(error).split())
            raise EvaluationError(
                f"{name} has no tokenizer that can be loaded ({said}); give the data as "
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
    """Return what scores depend on, beside the cache that they are of."""
    from vllm_hybrid_kv.tools.eval.folder import digest, model_identity

    ours = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(ENVIRONMENT_PREFIX) or name == "VLLM_PLUGINS"
    }
    return {
        "model": model_identity(model),
        "data": digest(sequences),
        "engine_args": arguments,
        "reference": reference,
        "environment": ours,
        "vllm": vllm,
        "vllm_hybrid_kv": __version__,
    }


def _measure(
    model: str,
    subjects: Sequence[Subject],
    sequences: Sequence[Sequence[int]],
    arguments: dict[str, Any],
    identity: dict[str, Any],
    work: Path | None,
) -> list[Column]:
    from vllm_hybrid_kv.tools.eval.folder import Folder, digest
    from vllm_hybrid_kv.tools.eval.run import Run

    folder = Folder(work or _cache() / digest(identity)[:16])
    bar = progress_bar("{task.fields[state]}")
    with folder.opened(identity), bar:
        run = Run(folder, model, sequences, arguments)
        columns = [
            _column(run, subject, subjects[0], bar, len(sequences), alone=subject is subjects[0])
            for subject in subjects
        ]
    # What is kept lets a run go on, and caches be added; where nobody said where, it goes.
    if work is None and all(column.summary is not None for column in columns):
        shutil.rmtree(folder.path, ignore_errors=True)
    return columns


def _column(
    run: Run, subject: Subject, reference: Subject, bar: Progress, total: int, *, alone: bool
) -> Column:
    """Measure one cache; where another can do without it, say why it could not be."""
    from vllm_hybrid_kv.tools.eval.errors import SubjectError
    from vllm_hybrid_kv.tools.eval.summary import summarise

    task = bar.add_task(subject.name, total=total, state="starting the engine")

    def scored(count: int) -> None:
        bar.update(task, completed=count, state="" if count else "starting the engine")

    try:
        measured = run.measure(subject, reference, scored)
    except SubjectError as error:
        bar.update(task, state="failed")
        if alone:
            raise SubjectError(f"{subject.name}: {error}") from None
        return Column(subject.name, str(error))
    facts = dict(measured.facts)
    if facts["device"] == "cpu":
        facts["device"] = cpu_model()
    return Column(subject.name, "", summarise(measured.scored), facts, measured.scored)


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "vllm-hybrid-kv" / "eval"
