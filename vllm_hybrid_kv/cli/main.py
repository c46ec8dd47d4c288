# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-hybrid-kv` and its subcommands."""

from __future__ import annotations

import typer

from vllm_hybrid_kv.cli import doctor, plan, replay

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Looks at hybrid and quantised KV caches without running a model.",
)


@app.callback()
def main() -> None:
    """Look at a KV cache without running a model."""


app.command("doctor")(doctor.doctor)
app.command("plan")(plan.plan)
app.command("replay")(replay.replay)
