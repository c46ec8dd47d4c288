# SPDX-License-Identifier: Apache-2.0
"""How commands end on wrong input: one line, exit status 2, no traceback."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

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


def check_folder(command: str, option: str, path: Path | None) -> None:
    """End a command whose output file cannot be made, before it does any work.

    Raises:
        typer.Exit: The file's folder does not exist.
    """
    if path is not None and str(path) != "-" and not path.absolute().parent.is_dir():
        raise stop(command, f"{option}: {path}: No such file or directory")


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

    from vllm_hybrid_kv.cli.serve_options import option_of

    if isinstance(error, ValidationError):
        message = "; ".join(
            ": ".join(
                (
                    *(option_of(str(part)) for part in details["loc"]),
                    details["msg"].removeprefix("Value error, "),
                )
            )
            for details in error.errors()
        )
    elif isinstance(error, ValueError | NotImplementedError):
        message = str(error)
    else:
        message = (
            "vLLM's class of this model cannot be built without weights "
            f"({_where(error)}); set VLLM_LOGGING_LEVEL=DEBUG to see why"
        )
        if os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG":
            traceback.print_exception(error)
    return " ".join(message.split())


def in_our_options(message: str) -> str:
    """Name the option of `plan` and `replay` after advice to give a server more memory."""
    if "gpu_memory_utilization" in message:
        return f"{message.rstrip('.')}. Here: more --memory."
    return message


def _where(error: Exception) -> str:
    """Return the file and line that an error came from."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{Path(last.filename).name}, line {last.lineno}"
