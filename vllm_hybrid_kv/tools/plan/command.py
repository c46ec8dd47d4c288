# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv plan`: the KV cache of a server that is not started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.state import STATE
from vllm_hybrid_kv.tools.output import hand_out
from vllm_hybrid_kv.tools.plan.described import DescriptionError, read_config
from vllm_hybrid_kv.tools.plan.devices import DEVICES
from vllm_hybrid_kv.tools.plan.plot import draw
from vllm_hybrid_kv.tools.plan.report import Column, Result, report
from vllm_hybrid_kv.tools.preparation import check_environment, check_strategy, prepare
from vllm_hybrid_kv.tools.serve_options import (
    OptionError,
    check_config_file,
    config_path,
    early_model,
    parse,
)
from vllm_hybrid_kv.tools.stopping import (
    check_outputs,
    in_our_options,
    memory_size,
    one_line,
    stop,
)

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.plan.described import Described
    from vllm_hybrid_kv.tools.plan.engine import Model
    from vllm_hybrid_kv.tools.plan.plan import Planned

SIDE_BY_SIDE = ("auto", "fp8", "turboquant_k8v4")
"""Dtypes of the cache that every plan is shown beside."""


def plan(
    context: typer.Context,
    memory: Annotated[str, typer.Option(help="Memory of the KV cache, like 24GiB; of each GPU.")],
    unify: Annotated[
        str | None, typer.Option(help="Strategy that makes pages one size: unify_page_sizes.")
    ] = None,
    boundary_layers: Annotated[
        int | None,
        typer.Option(min=0, help="Layers at each end left unquantised, unless it is hybrid."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="gpu plans for GPUs, whatever this machine is; cpu for it.")
    ] = "gpu",
    compare: Annotated[
        bool, typer.Option("--compare", help="Show every strategy of --unify, side by side.")
    ] = False,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write the plans there; - for the output.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a block and the capacity there (matplotlib).")
    ] = None,
) -> None:
    """Show the KV cache that a server would have: no weights, no GPU, no download.

    vLLM's own planning code is asked, with the plugin's strategies, so that the numbers are those
    that `vllm serve` would report with the same arguments.
    """
    size = memory_size("plan", memory)
    if device not in DEVICES:
        raise _stop(f"--device: {device!r} is not a device: choose {' or '.join(DEVICES)}")
    check_outputs("plan", json_, plot)
    if unify is not None:
        check_strategy("plan", "--unify", "unify_page_sizes", unify)
    chosen = {"unify_page_sizes": unify is not None or compare}
    chosen["boundary_layers"] = boundary_layers is not None
    check_environment("plan", [name for name, by_option in chosen.items() if by_option])
    with _stopping():
        check_config_file(context.args)
        if (early := early_model(context.args)) is not None:
            read_config(config_path(early))
        prepare()
        from vllm_hybrid_kv.tools.plan.described import described

        model, arguments = parse(context.args)
        kv_cache_dtype = arguments["kv_cache_dtype"]
        with described(config_path(model, arguments.get("revision"))) as description:
            models = _Models(description, device, arguments, boundary_layers)
            settings = {} if unify is None else {"unify_page_sizes": unify}
            asked = models.plan(kv_cache_dtype, size, settings)
            dtypes = [
                models.column(name, name, size, settings)
                for name in dict.fromkeys((*SIDE_BY_SIDE, kv_cache_dtype))
            ]
            strategies = [
                models.column(name, kv_cache_dtype, size, {"unify_page_sizes": name})
                for name in (_strategies() if compare else ())
            ]
    result = Result(
        model=model,
        architecture=description.architecture,
        device=device,
        tensor_parallel_size=arguments["tensor_parallel_size"],
        notes=description.notes,
        asked=asked,
        dtypes=dtypes,
        strategies=strategies,
    )
    hand_out(
        "plan",
        result.to_json(),
        lambda: report(result),
        json_,
        plot,
        lambda path: draw(path, result),
    )


class _Models:
    """A described model with each dtype of the cache that is asked for, built once."""

    def __init__(
        self,
        description: Described,
        device: str,
        arguments: dict[str, Any],
        boundary_layers: int | None,
    ) -> None:
        self._description = description
        self._device = device
        self._settings = {} if boundary_layers is None else {"boundary_layers": boundary_layers}
        self._arguments = {
            **arguments,
            "model": description.folder,
            # So that vLLM does not look how much of this machine's memory is free.
            "gpu_memory_utilization": 0.1,
        }
        self._built: dict[str, Model] = {}

    def plan(self, kv_cache_dtype: str, memory: int, settings: dict[str, Any]) -> Planned:
        """Plan with one dtype.

        Raises:
            PlanError: vLLM would not start so.
        """
        from vllm_hybrid_kv.tools.plan.engine import Model
        from vllm_hybrid_kv.tools.plan.plan import plan_of

        try:
            if kv_cache_dtype not in self._built:
                stored = self._description.kv_cache_dtype
                resolved = stored if kv_cache_dtype == "auto" and stored else kv_cache_dtype
                self._built[kv_cache_dtype] = Model(
                    {**self._arguments, "kv_cache_dtype": resolved}, self._device, self._settings
                )
            return plan_of(self._built[kv_cache_dtype], memory, settings)
        except Exception as error:
            message = self._description.in_words(one_line(error))
            raise PlanError(in_our_options(message)) from error

    def column(
        self, name: str, kv_cache_dtype: str, memory: int, settings: dict[str, Any]
    ) -> Column:
        """Plan with one dtype, or say why it cannot be."""
        try:
            return Column(name, self.plan(kv_cache_dtype, memory, settings))
        except PlanError as error:
            return Column(name, None, str(error))


class PlanError(ValueError):
    """A cache cannot be planned as asked."""


def _strategies() -> list[str]:

    strategies = STATE.strategies
    return strategies.available("unify_page_sizes") if strategies is not None else []


@contextmanager
def _stopping() -> Iterator[None]:
    try:
        yield
    except (PlanError, DescriptionError, OptionError, HybridKVError, ImportError) as error:
        raise _stop(str(error)) from None


def _stop(message: str) -> typer.Exit:
    return stop("plan", message)
