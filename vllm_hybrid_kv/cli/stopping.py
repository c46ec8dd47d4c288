# SPDX-License-Identifier: Apache-2.0
"""How commands end on wrong input: one line, exit status 2, no traceback."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from vllm_hybrid_kv.cli.sizes import parse_size


def stop(command: str, message: str) -> typer.Exit:
    """Print why a command ends, and return what it raises.

    Args:
        command: The subcommand's name; empty if there is none.
        message: The line.
    """
    who = " ".join(filter(None, ("vllm-hybrid-kv", command)))
    typer.echo(f"{who}: {' '.join(message.split())}", err=True)
    return typer.Exit(2)


_ClickException: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
"""The base of errors that typer raises for wrong arguments; newer ones bring their own click."""


class OneLineErrors(TyperGroup):
    """A command whose usage errors are one line, not typer's box."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and, if it stands alone, end the process."""
        run = functools.partial(
            super().main, args, prog_name, complete_var, False, windows_expand_args, **extra
        )
        if not standalone_mode:
            return run()
        try:
            status = run()
        except typer.Abort:
            status = stop("", "aborted").exit_code
        except _ClickException as error:
            context = error.ctx
            command = context.info_name if context is not None and context.parent else ""
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
                status = error.exit_code
            else:
                status = stop(command, error.format_message()).exit_code
        sys.exit(status)


def memory_size(command: str, text: str) -> int:
    """Return the bytes that a user asked for with `--memory`, or end the command.

    Raises:
        typer.Exit: It is no size.
    """
    try:
        return parse_size(text)
    except ValueError as error:
        raise stop(command, f"--memory: {error}") from None


def check_outputs(command: str, json_: Path | None, plot: Path | None) -> None:
    """End a command whose output files cannot be written, before it does any work.

    Args:
        command: The subcommand's name.
        json_: The file of `--json`; `-` for the output.
        plot: The file of `--plot`.

    Raises:
        typer.Exit: A file's folder does not exist, the file is a folder, matplotlib is not
            installed or does not know the file's format.
    """
    for option, path in (("--json", json_), ("--plot", plot)):
        if path is None or str(path) == "-":
            continue
        reason = "Is a directory" if path.is_dir() else "No such file or directory"
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise stop(command, f"{option}: {path}: {reason}")
    if plot is None:
        return
    try:
        import matplotlib  # noqa: F401
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError:
        message = "--plot needs matplotlib: pip install 'vllm-hybrid-kv[plot]'"
        raise stop(command, message) from None
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if (ending := plot.suffix[1:].lower()) and ending not in formats:
        raise stop(command, f"--plot: {plot}: {ending!r} is none of {', '.join(formats)}")


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
