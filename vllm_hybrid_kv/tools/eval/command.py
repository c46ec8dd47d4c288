# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv eval`: how quantised KV caches change a model's predictions."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer
from rich.console import Console

from vllm_hybrid_kv.tools.output import (
    JsonOption,
    MarkdownOption,
    PlotOption,
    ToolError,
    check_paths,
    write,
)
from vllm_hybrid_kv.version import __version__

SCHEMA = 1
"""The JSON document's version. It grows if a key is removed or changes its meaning."""


def evaluate(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the hub.")],
    data: Annotated[
        Path,
        typer.Option(help="Plain text; or .jsonl with 'text' or 'prompt_token_ids' in each line."),
    ],
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            help="Cache dtypes. Settings of the plugin may follow in brackets: [boundary_layers=2]."
        ),
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
    # Imported here, because these modules import pydantic, numpy or torch.
    from vllm_hybrid_kv.settings import SECTION, resolve
    from vllm_hybrid_kv.tools.eval.report import draw, report
    from vllm_hybrid_kv.tools.eval.run import Run, opened, parse
    from vllm_hybrid_kv.tools.eval.sequences import read_sequences

    variants = parse(kv_cache_dtype, reference)
    for variant in variants:
        resolve({SECTION: variant.settings}, {})
    arguments = _engine_arguments(engine_args)
    vllm = _vllm_version()
    with Console(stderr=True).status("Reading the data"):
        sequences = read_sequences(data, lambda: _tokenizer(model, arguments), context, limit)
    identity = _identity(model, sequences, arguments, reference, vllm)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = work or cache / "vllm-hybrid-kv" / "eval" / _digest(identity)[:16]
    try:
        with opened(folder, identity):
            caches, scores = Run(folder, model, sequences, arguments).measure(variants)
    except OSError as error:
        raise ToolError(f"{folder}: {error.strerror or error}") from None
    except KeyboardInterrupt:
        raise ToolError("interrupted; run the same command again to continue") from None
    failed = [f"{cache['name']}: {cache['reason']}" for cache in caches if cache["reason"]]
    # Keep a folder that the user chose, so that a later run can add caches.
    if work is None and not failed:
        shutil.rmtree(folder, ignore_errors=True)
    document = {
        "model": model,
        "data": str(data),
        "sequences": len(sequences),
        "positions": sum(len(sequence) - 1 for sequence in sequences),
        "longest": max(map(len, sequences)),
        "versions": {"vllm_hybrid_kv": __version__, "vllm": vllm},
        "reference": reference,
        "caches": caches,
    }
    write(
        # JSON has neither infinities nor NaN.
        json.loads(json.dumps(document), parse_constant=lambda _: None),
        lambda: report(document),
        schema=SCHEMA,
        json_=json_,
        markdown=markdown,
        plot=plot,
        draw=lambda path: draw(path, document, scores),
    )
    if failed:
        raise ToolError("; ".join(failed))


def _engine_arguments(text: str) -> dict[str, Any]:
    from vllm_hybrid_kv.tools.eval.run import RESERVED

    try:
        arguments = {name.replace("-", "_"): value for name, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        raise ToolError(
            f'--engine-args: {text!r} is not a JSON object; write {{"name": value}}'
        ) from None
    if reserved := sorted(set(arguments) & set(RESERVED)):
        raise ToolError(f"--engine-args: remove {', '.join(reserved)}, which eval itself sets")
    return arguments


def _vllm_version() -> str:
    from vllm_hybrid_kv.plugin import vllm_version

    # Quiet only this import; the engines log as usual.
    with patch.dict(os.environ):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            return vllm_version()[0]
        except ImportError as error:
            raise ToolError(str(error)) from None


def _tokenizer(model: str, arguments: Mapping[str, Any]) -> Any:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    name = arguments.get("tokenizer") or model
    try:
        return AutoTokenizer.from_pretrained(
            name, trust_remote_code=bool(arguments.get("trust_remote_code"))
        )
    except (OSError, ValueError, KeyError) as error:
        raise ToolError(
            f"the tokenizer of {name} cannot be loaded ({error}); use data with 'prompt_token_ids'"
        ) from None


def _identity(
    model: str,
    sequences: list[list[int]],
    arguments: Mapping[str, Any],
    reference: str,
    vllm: str,
) -> dict[str, Any]:
    """Collect everything that can change scores, except the cache, as JSON values."""
    from vllm_hybrid_kv.settings import ENVIRONMENT_PREFIX

    stats = {file.name: file.stat() for file in sorted(Path(model).glob("*")) if file.is_file()}
    return {
        # A folder's files, or nothing for a name on the hub.
        "model": [model, {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}],
        "data": _digest(sequences),
        "engine_args": arguments,
        "reference": reference,
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(ENVIRONMENT_PREFIX) or name == "VLLM_PLUGINS"
        },
        "vllm": vllm,
        "vllm_hybrid_kv": __version__,
    }


def _digest(value: Any) -> str:
    """Return the SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
