# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv doctor`: whether the plugin works here, and why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_hybrid_kv.tools.doctor.report import SCHEMA, diagnose
from vllm_hybrid_kv.tools.doctor.screen import text
from vllm_hybrid_kv.tools.output import MarkdownOption, ToolError, write


def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    additional_config: Annotated[
        str, typer.Option(help="JSON as for vLLM; its settings are checked, too.")
    ] = "",
    timeout: Annotated[
        float, typer.Option(min=1, help="Most seconds for importing vLLM and its plugins.")
    ] = 180.0,
    markdown: MarkdownOption = False,
) -> None:
    """Check whether the plugin works in this environment, and say why not.

    A child process imports vLLM as a server does; no engine starts. The exit status is 0 if all
    is well, 1 with warnings, 2 if the plugin cannot be active.
    """
    if additional_config:
        try:
            json.loads(additional_config)
        except ValueError as error:
            raise ToolError(f"--additional-config is not JSON: {error}") from None
    with Console(stderr=True).status("Importing vLLM in a child process"):
        report = diagnose(additional_config, timeout)
    write(
        report.to_json(),
        lambda: text(report),
        schema=SCHEMA,
        json_=Path("-") if json_ else None,
        markdown=markdown,
    )
    raise typer.Exit(report.exit_status)
