# SPDX-License-Identifier: Apache-2.0
"""How commands end on wrong input: one line, exit status 2, no traceback."""

from __future__ import annotations

import typer

from vllm_hybrid_kv.cli.sizes import parse_size


def stop(command: str, message: str) -> typer.Exit:
    """Print why a command ends, and return what it raises.

    Args:
        command: The subcommand's name.
        message: The line.
    """
    typer.echo(f"vllm-hybrid-kv {command}: {' '.join(message.split())}", err=True)
    return typer.Exit(2)


def memory_size(command: str, text: str) -> int:
    """Return the bytes that a user asked for with `--memory`, or end the command.

    Raises:
        typer.Exit: It is no size.
    """
    try:
        return parse_size(text)
    except ValueError as error:
        raise stop(command, f"--memory: {error}") from None


def need_matplotlib(command: str) -> None:
    """End a command that is to plot where there is nothing to plot with.

    Raises:
        typer.Exit: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        message = "--plot needs matplotlib: pip install 'vllm-hybrid-kv[plot]'"
        raise stop(command, message) from None


def one_line(error: Exception) -> str:
    """Return what an error of vLLM's says in one line, with its kind where it is no word to a user.

    Args:
        error: What came of building or planning a model.
    """
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        message = "; ".join(
            ": ".join(
                (
                    *(str(part) for part in details["loc"]),
                    details["msg"].removeprefix("Value error, "),
                )
            )
            for details in error.errors()
        )
    elif isinstance(error, ValueError | NotImplementedError):
        message = str(error)
    else:
        message = f"vLLM cannot build this model: {type(error).__name__}: {error}"
    return " ".join(message.split())
