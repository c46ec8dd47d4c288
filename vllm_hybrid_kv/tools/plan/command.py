# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv plan`: shows the KV cache that a server would have, without starting it."""

from __future__ import annotations

import functools
from typing import Annotated, Any

import typer

from vllm_hybrid_kv.hooks import BUILT_IN_NAMES
from vllm_hybrid_kv.state import STATE
from vllm_hybrid_kv.tools.options import check_environment, check_strategy, memory_size, parse
from vllm_hybrid_kv.tools.output import (
    JsonOption,
    MarkdownOption,
    PlotOption,
    ToolError,
    check_paths,
    write,
)
from vllm_hybrid_kv.tools.plan.model_description import DEVICES, config_path, described, read_config
from vllm_hybrid_kv.tools.plan.plot import draw
from vllm_hybrid_kv.tools.plan.report import PlanColumn, PlanResult, report
from vllm_hybrid_kv.tools.plan.vllm_import import prepare

SCHEMA = 1
ALWAYS_SHOWN = ("auto", "fp8", "turboquant_k8v4")
"""Cache dtypes that every plan is compared with."""


def plan(
    context: typer.Context,
    memory: Annotated[
        str, typer.Option(help="Memory of the KV cache on each device, such as 24GiB.")
    ],
    unify: Annotated[
        str | None,
        typer.Option(
            help="Strategy of the setting unify_page_sizes: "
            f"{', '.join(BUILT_IN_NAMES['unify_page_sizes'])}, or another package's."
        ),
    ] = None,
    boundary_layers: Annotated[
        int | None,
        typer.Option(min=0, help="Unquantised attention layers at each end of non-hybrid models."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="gpu: plan for an H100. cpu: plan for the CPU of this machine.")
    ] = "gpu",
    compare: Annotated[
        bool, typer.Option("--compare", help="Show every strategy that --unify can name.")
    ] = False,
    json_: JsonOption = None,
    plot: PlotOption = None,
    markdown: MarkdownOption = False,
) -> None:
    """Show the KV cache that a server would have. Needs no weights, no GPU and no download.

    MODEL is a config.json, a folder with a config.json, or the name of a model in the local Hugging
    Face cache. vLLM's own planner runs with the plugin's strategies, so `vllm serve` reports the
    same numbers with the same options. SERVE OPTIONS are options of `vllm serve`, such as
    --max-model-len. --kv-cache-dtype defaults to turboquant_k8v4.
    """
    size = memory_size(memory)
    if device not in DEVICES:
        raise ToolError(f"--device: {device!r} is not a device: choose {' or '.join(DEVICES)}")
    check_paths(json_, plot)
    if unify is not None:
        check_strategy("--unify", "unify_page_sizes", unify)
    by_option = {
        "unify_page_sizes": unify is not None or compare,
        "boundary_layers": boundary_layers is not None,
    }
    check_environment(name for name, chosen in by_option.items() if chosen)
    if context.args and not context.args[0].startswith("-"):
        # Users mostly name the model first. Check it before the import of vLLM, which is slow.
        read_config(config_path(context.args[0]))
    prepare()
    from vllm_hybrid_kv.tools.plan.engine import Model
    from vllm_hybrid_kv.tools.plan.kv_cache_plan import Plan, plan_of

    model, arguments = parse(context)
    kv_cache_dtype = arguments["kv_cache_dtype"]
    of_layers = {} if boundary_layers is None else {"boundary_layers": boundary_layers}
    settings = {} if unify is None else {"unify_page_sizes": unify}
    with described(config_path(model, arguments.get("revision"))) as description:

        @functools.cache
        def built(dtype: str) -> Model:
            stored = description.kv_cache_dtype if dtype == "auto" else None
            of_model = {"model": description.folder, "kv_cache_dtype": stored or dtype}
            return Model({**arguments, **of_model}, device, of_layers)

        def planned(dtype: str, settings: dict[str, Any]) -> Plan:
            with description.errors_in_one_line():
                return plan_of(built(dtype), size, settings)

        def column(name: str, dtype: str, settings: dict[str, Any]) -> PlanColumn:
            try:
                return PlanColumn(name, planned(dtype, settings))
            except ToolError as error:
                return PlanColumn(name, None, str(error))

        strategies = STATE.strategies if compare else None
        result = PlanResult(
            model=model,
            architecture=description.architecture,
            device=device,
            tensor_parallel_size=arguments["tensor_parallel_size"],
            notes=description.notes,
            plan=planned(kv_cache_dtype, settings),
            dtypes=[
                column(name, name, settings)
                for name in dict.fromkeys((*ALWAYS_SHOWN, kv_cache_dtype))
            ],
            strategies=[
                column(name, kv_cache_dtype, {"unify_page_sizes": name})
                for name in (strategies.available("unify_page_sizes") if strategies else ())
            ],
        )
    write(
        result.to_json(),
        lambda: report(result),
        schema=SCHEMA,
        json_=json_,
        markdown=markdown,
        plot=plot,
        draw=lambda path: draw(path, result),
    )
