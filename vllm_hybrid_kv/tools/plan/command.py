# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv plan`: shows the KV cache that a server would have, without starting it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_hybrid_kv.state import STATE
from vllm_hybrid_kv.tools.options import check_environment, check_strategy, memory_size
from vllm_hybrid_kv.tools.output import (
    JsonOption,
    MarkdownOption,
    PlotOption,
    ToolError,
    check_paths,
    write,
)
from vllm_hybrid_kv.tools.plan.model_description import DEVICES, config_path, read_config
from vllm_hybrid_kv.tools.plan.plot import draw
from vllm_hybrid_kv.tools.plan.report import PlanColumn, PlanResult, report
from vllm_hybrid_kv.tools.plan.vllm_import import prepare
from vllm_hybrid_kv.tools.serve_options import check_config_file, early_model, parse

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.plan.engine import Model
    from vllm_hybrid_kv.tools.plan.kv_cache_plan import Planned
    from vllm_hybrid_kv.tools.plan.model_description import ModelDescription

SCHEMA = 1
ALWAYS_SHOWN = ("auto", "fp8", "turboquant_k8v4")
"""Cache dtypes that every plan is compared with."""


def plan(
    context: typer.Context,
    memory: Annotated[
        str, typer.Option(help="Memory of the KV cache on each device, such as 24GiB.")
    ],
    unify: Annotated[
        str | None, typer.Option(help="Strategy of the setting unify_page_sizes.")
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
    --max-model-len.
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
    check_config_file(context.args)
    if (early := early_model(context.args)) is not None:
        read_config(config_path(early))
    prepare()
    from vllm_hybrid_kv.tools.plan.model_description import described

    model, arguments = parse(context)
    kv_cache_dtype = arguments["kv_cache_dtype"]
    with described(config_path(model, arguments.get("revision"))) as description:
        models = _Models(description, device, arguments, boundary_layers)
        settings = {} if unify is None else {"unify_page_sizes": unify}
        planned = models.plan(kv_cache_dtype, size, settings)
        dtypes = [
            models.column(name, name, size, settings)
            for name in dict.fromkeys((*ALWAYS_SHOWN, kv_cache_dtype))
        ]
        strategies = [
            models.column(name, kv_cache_dtype, size, {"unify_page_sizes": name})
            for name in (_strategies() if compare else ())
        ]
    result = PlanResult(
        model=model,
        architecture=description.architecture,
        device=device,
        tensor_parallel_size=arguments["tensor_parallel_size"],
        notes=description.notes,
        planned=planned,
        dtypes=dtypes,
        strategies=strategies,
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


class _Models:
    """A described model, built once for each cache dtype."""

    def __init__(
        self,
        description: ModelDescription,
        device: str,
        arguments: dict[str, Any],
        boundary_layers: int | None,
    ) -> None:
        self._description = description
        self._device = device
        self._settings = {} if boundary_layers is None else {"boundary_layers": boundary_layers}
        self._arguments = {**arguments, "model": description.folder}
        self._built: dict[str, Model] = {}

    def plan(self, kv_cache_dtype: str, memory: int, settings: dict[str, Any]) -> Planned:
        from vllm_hybrid_kv.tools.plan.engine import Model
        from vllm_hybrid_kv.tools.plan.kv_cache_plan import plan_of

        with self._description.errors_in_one_line():
            if kv_cache_dtype not in self._built:
                stored = self._description.kv_cache_dtype
                resolved = stored if kv_cache_dtype == "auto" and stored else kv_cache_dtype
                self._built[kv_cache_dtype] = Model(
                    {**self._arguments, "kv_cache_dtype": resolved}, self._device, self._settings
                )
            return plan_of(self._built[kv_cache_dtype], memory, settings)

    def column(
        self, name: str, kv_cache_dtype: str, memory: int, settings: dict[str, Any]
    ) -> PlanColumn:
        try:
            return PlanColumn(name, self.plan(kv_cache_dtype, memory, settings))
        except ToolError as error:
            return PlanColumn(name, None, str(error))


def _strategies() -> list[str]:
    strategies = STATE.strategies
    return strategies.available("unify_page_sizes") if strategies is not None else []
