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

from vllm_hybrid_kv.tools.sizes import parse_size


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
    """Return what an error of vLLM's says in one line, or `UNKNOWN` if it has no words for users.

    Args:
        error: What came of building or planning a model.
    """
    from pydantic import ValidationError

    from vllm_hybrid_kv.tools.serve_options import option_of

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
    else:
        message = _said(error) or _missing_field(error) or UNKNOWN
        if message == UNKNOWN and os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG":
            traceback.print_exception(error)
    return " ".join(message.split())


UNKNOWN = (
    "vLLM's class of this model does not build from this configuration; set "
    "VLLM_LOGGING_LEVEL=DEBUG to see where it fails"
)


def _said(error: BaseException) -> str | None:
    """Return the words of an error, or of its cause, that vLLM wrote for users."""
    if isinstance(error, ValueError | NotImplementedError | AssertionError):
        return str(error) or None
    return _said(error.__cause__) if error.__cause__ is not None else None


def _missing_field(error: Exception) -> str | None:
    """Return a line about the field of a configuration that was asked for in vain."""
    from transformers import PreTrainedConfig

    if not (isinstance(error, AttributeError) and isinstance(error.obj, PreTrainedConfig)):
        return None
    return (
        f"the configuration has no {error.name!r}, which vLLM's class of this model reads; add it "
        "to the config.json"
    )


def in_our_options(message: str) -> str:
    """Name the option of `plan` and `replay` after advice to give a server more memory."""
    if "gpu_memory_utilization" in message:
        return f"{message.rstrip('.')}. Here: more --memory."
    return message
