# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-hybrid-kv` and its subcommands."""

from __future__ import annotations

import typer

from vllm_hybrid_kv.tools.doctor import command as doctor
from vllm_hybrid_kv.tools.eval import command as evaluate
from vllm_hybrid_kv.tools.plan import command as plan
from vllm_hybrid_kv.tools.replay import command as replay
from vllm_hybrid_kv.tools.serve_options import PASS_THROUGH
from vllm_hybrid_kv.tools.stopping import OneLineErrors

app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    help="Looks at hybrid and quantised KV caches.",
)


@app.callback()
def main() -> None:
    """Look at a KV cache; only `eval` runs a model."""


app.command("doctor")(doctor.doctor)
app.command("plan", context_settings=PASS_THROUGH)(plan.plan)
app.command("eval")(evaluate.evaluate)
app.command("replay", context_settings=PASS_THROUGH)(replay.replay)
