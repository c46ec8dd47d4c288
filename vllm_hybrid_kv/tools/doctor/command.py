# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv doctor`: whether the plugin works here, and why not."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from vllm_hybrid_kv.tools.doctor.report import SCHEMA, diagnose, text
from vllm_hybrid_kv.tools.output import JsonOption, MarkdownOption, ToolError, check_paths, write


class JsonToScreen(TyperCommand):
    """A command that prints the JSON if its option `--json` has no file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for index, arg in enumerate(args):
            if arg == "--json" and (args[index + 1 :] or ["--"])[0].startswith("--"):
                args[index] = "--json=-"
        return super().parse_args(ctx, args)


def doctor(
    json_: JsonOption = None,
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
    is well, 1 with warnings, 2 if the plugin cannot be active. A bare --json prints the JSON.
    """
    check_paths(json_, None)
    if additional_config:
        try:
            json.loads(additional_config)
        except ValueError as error:
            raise ToolError(f"--additional-config is not JSON: {error}") from None
    with Console(stderr=True).status("Importing vLLM in a child process"):
        document = diagnose(additional_config, timeout)
    write(document, lambda: text(document), schema=SCHEMA, json_=json_, markdown=markdown)
    raise typer.Exit(document["exit_status"])
