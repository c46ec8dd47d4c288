# SPDX-License-Identifier: Apache-2.0
"""Where what a command found goes: the screen, a JSON file, a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType

from vllm_hybrid_kv.tools.stopping import stop

LEAST_WIDTH = 100
"""Columns that a table needs."""


def hand_out(
    command: str,
    numbers: Any,
    parts: Callable[[], Iterable[RenderableType]],
    json_: Path | None,
    plot: Path | None,
    draw: Callable[[Path], None],
) -> None:
    """Write what a command found wherever it was asked for.

    Args:
        command: The subcommand's name.
        numbers: For `--json`.
        parts: Gives what is printed.
        json_: Takes the numbers; `-` has them printed in the place of the rest.
        plot: Takes the picture.
        draw: Draws it.

    Raises:
        typer.Exit: A file cannot be written.
    """
    printed = str(json_) == "-"
    if json_ is not None:
        text = json.dumps(numbers, indent=1) + "\n"
        if printed:
            typer.echo(text, nl=False)
        else:
            try:
                json_.write_text(text)
            except OSError as error:
                raise stop(command, f"--json: {json_}: {error.strerror}") from None
    if not printed:
        console = Console()
        # Narrower tables cut numbers.
        console.width = max(console.width, LEAST_WIDTH)
        for part in parts():
            console.print(part, markup=False, highlight=False)
    if plot is not None:
        try:
            draw(plot)
        except (OSError, ValueError) as error:
            raise stop(command, f"--plot: {plot}: {error}") from None
