# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-hybrid-kv`: its subcommands, and how it reports their errors."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.tools.doctor import command as doctor
from vllm_hybrid_kv.tools.eval import command as evaluate
from vllm_hybrid_kv.tools.plan import command as plan
from vllm_hybrid_kv.tools.replay import command as replay
from vllm_hybrid_kv.tools.trace import command as trace
from vllm_hybrid_kv.version import __version__

_ClickException: Any = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)
"""The base class of typer's errors for wrong arguments. Newer typer releases bundle click."""


class OneLineErrors(TyperGroup):
    """A group of commands that prints an error as one line instead of a box or a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HybridKVError as error:
            _print_error(ctx.invoked_subcommand, str(error))
            raise typer.Exit(2) from None

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            sys.exit(super().main(*args, **{**options, "standalone_mode": False}))
        except typer.Abort:
            _print_error(None, "aborted")
        except _ClickException as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                command = error.ctx.info_name if error.ctx and error.ctx.parent else None
                _print_error(command, error.format_message())
        sys.exit(2)


def _print_error(command: str | None, message: str) -> None:
    program = f"vllm-hybrid-kv {command}" if command else "vllm-hybrid-kv"
    typer.echo(f"{program}: {' '.join(message.split())}", err=True)


def _print_version(chosen: bool) -> None:
    if chosen:
        typer.echo(f"vllm-hybrid-kv {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown"
)


@app.callback()
def tools(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the plugin's version."
        ),
    ] = False,
) -> None:
    """Tools for hybrid and quantised KV caches. Only `eval` runs a model."""


SERVE_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of a command that also takes options of `vllm serve`."""

app.command("doctor", cls=doctor.JsonToScreen)(doctor.doctor)
app.command(
    "plan",
    context_settings=SERVE_OPTIONS,
    options_metavar="MODEL --memory SIZE [OPTIONS] [SERVE OPTIONS]",
)(plan.plan)
app.command("eval")(evaluate.evaluate)
app.command(
    "replay",
    context_settings=SERVE_OPTIONS,
    options_metavar="--model MODEL --memory SIZE [OPTIONS] [SERVE OPTIONS]",
)(replay.replay)
app.command("trace")(trace.trace)
