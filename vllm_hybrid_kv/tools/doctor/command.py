# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv doctor`: whether the plugin works here, and why not."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from vllm_hybrid_kv.tools.doctor.diagnosis import diagnose
from vllm_hybrid_kv.tools.doctor.screen import show


def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print it for machines.")] = False,
    additional_config: Annotated[
        str, typer.Option(help="As vLLM's: checks the settings in it as well.")
    ] = "",
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that importing vLLM and its plugins may take.")
    ] = 180.0,
) -> None:
    """Say whether the plugin works in this environment, and why not.

    vLLM is imported in a process of its own, as a server would, but no engine is started. The exit
    status is 0 where all is well, 1 with warnings, 2 where the plugin cannot be active.
    """
    if additional_config:
        try:
            json.loads(additional_config)
        except ValueError as error:
            typer.echo(f"vllm-hybrid-kv doctor: --additional-config is not JSON: {error}", err=True)
            raise typer.Exit(2) from None
    with Console(stderr=True).status("Importing vLLM in a process of its own"):
        diagnosis = diagnose(additional_config, timeout)
    if json_:
        typer.echo(json.dumps(diagnosis.as_json(), indent=1))
    else:
        show(diagnosis, Console())
    raise typer.Exit(diagnosis.exit_status)
