# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv replay`: the prefix-cache hit rate on recorded traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_hybrid_kv.tools.options import check_environment, check_strategy, memory_size
from vllm_hybrid_kv.tools.output import (
    JsonOption,
    MarkdownOption,
    PlotOption,
    Table,
    check_paths,
    figure,
    format_size,
    progress_bar,
    write,
)
from vllm_hybrid_kv.tools.plan.model_description import config_path, described, read_config
from vllm_hybrid_kv.tools.plan.vllm_import import prepare
from vllm_hybrid_kv.tools.serve_options import check_config_file, parse

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.plan.engine import Model
    from vllm_hybrid_kv.tools.plan.model_description import ModelDescription
    from vllm_hybrid_kv.tools.replay.scheduler import Tally
    from vllm_hybrid_kv.tools.replay.trace import TracedRequest

SCHEMA = 1


@dataclass(frozen=True)
class Outcome:
    """The result of one strategy with one size of memory.

    Attributes:
        coordinator: The strategy.
        memory: Bytes of KV cache.
        blocks: Blocks of the pool.
        block_tokens: Tokens of a block.
        match_tokens: Hits end at multiples of these tokens.
        tally: The counters.
        progress: The hit rate after each twentieth of the requests.
    """

    coordinator: str
    memory: int
    blocks: int
    block_tokens: int
    match_tokens: int
    tally: Tally
    progress: list[float]

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        tally = fields.pop("tally")
        del tally["schedule_seconds"], tally["hits"]
        return {
            **fields,
            **tally,
            # `asdict` cannot copy a Counter.
            "evicted_blocks": dict(self.tally.evicted_blocks),
            "hit_rate": self.tally.hit_rate,
            "step_ms": self.tally.step_ms,
            "request_ms": self.tally.request_ms,
        }


def replay(
    context: typer.Context,
    trace: Annotated[Path, typer.Argument(help="Requests in Mooncake's format.", dir_okay=False)],
    model: Annotated[
        str,
        typer.Option(help="A folder with a config.json, that file, or a locally cached hub name."),
    ],
    memory: Annotated[
        list[str],
        typer.Option(help="Memory of the KV cache, such as 20GiB. Repeat it to compare sizes."),
    ],
    coordinator: Annotated[
        str, typer.Option(help="Strategy of the setting coordinator.")
    ] = "hybrid_aware",
    compare: Annotated[
        list[str] | None, typer.Option(help="Another strategy to compare with. Can be repeated.")
    ] = None,
    match_unit: Annotated[
        str,
        typer.Option(
            help="Strategy of the setting prefix_match_unit. The coordinator stock always uses "
            "stock."
        ),
    ] = "auto",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Replay only the first N requests.")] = (
        None
    ),
    json_: JsonOption = None,
    plot: PlotOption = None,
    markdown: MarkdownOption = False,
) -> None:
    """Replay recorded requests through vLLM's scheduler, without a model or a GPU.

    Prompts, answers and their order come from the trace; a fixed number of requests is in flight.
    The planner, the scheduler and the coordinators are those that `vllm serve` runs. SERVE OPTIONS
    are options of `vllm serve`, such as --max-model-len.
    """
    sizes = [memory_size(text) for text in memory]
    strategies = list(dict.fromkeys([*(compare or ()), coordinator]))
    check_paths(json_, plot)
    for name in compare or ():
        check_strategy("--compare", "coordinator", name)
    check_strategy("--coordinator", "coordinator", coordinator)
    check_strategy("--match-unit", "prefix_match_unit", match_unit)
    check_environment(["coordinator", "prefix_match_unit"])
    from vllm_hybrid_kv.tools.replay.trace import read_trace

    requests = read_trace(trace, limit)
    path = config_path(model)
    read_config(path)
    check_config_file(context.args)
    prepare()
    with described(path) as description:
        built = _build(description, model, context, concurrency)
        outcomes = [
            _run(description, built, requests, size, name, match_unit, concurrency)
            for size in sizes
            for name in strategies
        ]
    write(
        [outcome.to_json() for outcome in outcomes],
        lambda: _tables(outcomes, requests),
        schema=SCHEMA,
        json_=json_,
        markdown=markdown,
        plot=plot,
        draw=lambda path: _draw(path, outcomes),
    )


def _build(
    description: ModelDescription, model: str, context: typer.Context, concurrency: int
) -> Model:
    from vllm_hybrid_kv.tools.plan.engine import Model

    _, arguments = parse(context, model)
    if arguments["max_num_seqs"] is None:
        arguments["max_num_seqs"] = concurrency
    with description.errors_in_one_line():
        return Model({**arguments, "model": description.folder, "enable_prefix_caching": True})


def _run(
    description: ModelDescription,
    model: Model,
    requests: Sequence[TracedRequest],
    memory: int,
    coordinator: str,
    prefix_match_unit: str,
    concurrency: int,
) -> Outcome:
    from vllm_hybrid_kv.tools.plan.kv_cache_plan import hit_alignment
    from vllm_hybrid_kv.tools.replay.scheduler import Replay

    unit = "stock" if coordinator == "stock" else prefix_match_unit
    with description.errors_in_one_line():
        engine = model.engine(memory, {"coordinator": coordinator, "prefix_match_unit": unit})
        model.check(engine)
    replayed = Replay(engine, requests, concurrency)
    progress: list[float] = []
    with progress_bar("hit rate {task.fields[rate]:.1%}") as bar:
        title = f"{coordinator}, {format_size(memory)}"
        task = bar.add_task(title, total=len(requests), rate=0.0)

        def finished(count: int) -> None:
            rate = replayed.tally.hit_rate
            bar.update(task, completed=count, rate=rate)
            while len(progress) < 20 * count // len(requests):
                progress.append(rate)

        tally = replayed.run(finished)
    return Outcome(
        coordinator=coordinator,
        memory=memory,
        blocks=engine.kv_cache_config.num_blocks,
        block_tokens=engine.scheduler_block_size,
        match_tokens=hit_alignment(engine),
        tally=tally,
        progress=progress,
    )


def _tables(outcomes: Sequence[Outcome], requests: Sequence[TracedRequest]) -> Iterator[Table]:
    """Yield a table for each size of memory, with a column for each strategy."""
    from vllm_hybrid_kv.tools.replay.trace import BLOCK_TOKENS, shareable_tokens

    tokens = sum(request.input_length for request in requests)
    shared = shareable_tokens(requests) / tokens
    rows: dict[str, Callable[[Outcome], str]] = {
        "hit rate": lambda o: f"{o.tally.hit_rate:.2%}",
        "prefill tokens saved": lambda o: f"{o.tally.hit_tokens:,}",
        "tokens recomputed without a state": lambda o: f"{o.tally.recomputed_tokens:,}",
        "preemptions": lambda o: f"{o.tally.preemptions:,}",
        "scheduler, ms per step (median)": lambda o: f"{o.tally.step_ms:.2f}",
        "scheduler, ms per request": lambda o: f"{o.tally.request_ms:.1f}",
        "match unit, tokens": lambda o: f"{o.match_tokens:,}",
        "block, tokens": lambda o: f"{o.block_tokens:,}",
        "blocks": lambda o: f"{o.blocks:,}",
    }
    for memory in dict.fromkeys(outcome.memory for outcome in outcomes):
        columns = [outcome for outcome in outcomes if outcome.memory == memory]
        kinds = dict.fromkeys(kind for outcome in columns for kind in outcome.tally.evicted_blocks)
        evicted = {
            f"evicted blocks, {kind.replace('_', ' ')}": (
                lambda o, kind=kind: f"{o.tally.evicted_blocks.get(kind, 0):,}"
            )
            for kind in kinds
        }
        yield Table(
            f"{len(requests):,} requests, {tokens:,} prompt tokens, {format_size(memory)}",
            ("", *(f">{outcome.coordinator}" for outcome in columns)),
            [
                (name, *(value(outcome) for outcome in columns))
                for name, value in {**rows, **evicted}.items()
            ],
            f"{shared:.1%} of the prompt tokens repeat whole blocks of {BLOCK_TOKENS} tokens of "
            "earlier requests.",
        )


def _draw(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Draw hit rates by memory, or along the trace if there is one size."""
    sweep = len({outcome.memory for outcome in outcomes}) > 1
    by_strategy: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_strategy.setdefault(outcome.coordinator, []).append(outcome)
    with figure(path, figsize=(7, 4.5)) as (_, axes):
        for name, rows in by_strategy.items():
            if sweep:
                rows.sort(key=lambda row: row.memory)
                x: list[Any] = [row.memory / (1 << 30) for row in rows]
                axes.plot(x, [100 * row.tally.hit_rate for row in rows], marker="o", label=name)
            else:
                rates = rows[0].progress
                x = [100 * (i + 1) / len(rates) for i in range(len(rates))]
                axes.plot(x, [100 * rate for rate in rates], label=name)
        if sweep:
            axes.set_xscale("log")
        axes.set_xlabel("KV cache, GiB" if sweep else "% of the trace")
        axes.set_ylabel("prompt tokens from the cache, %")
        axes.set_ylim(bottom=0)
        axes.legend()
