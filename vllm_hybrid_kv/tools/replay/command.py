# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv replay`: what a prefix cache would give on recorded traffic."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vllm_hybrid_kv.tools.figures import figure
from vllm_hybrid_kv.tools.output import hand_out
from vllm_hybrid_kv.tools.plan.described import described, read_config
from vllm_hybrid_kv.tools.preparation import check_environment, check_strategy, prepare
from vllm_hybrid_kv.tools.serve_options import check_config_file, config_path, parse
from vllm_hybrid_kv.tools.sizes import format_size
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
    from vllm_hybrid_kv.tools.replay.trace import TracedRequest


@dataclass(frozen=True)
class Outcome:
    """What one strategy came to with one size of memory.

    Attributes:
        coordinator: The strategy.
        memory: Bytes of KV cache.
        blocks: Blocks of the pool.
        block_tokens: Tokens of a block.
        match_tokens: Hits end at multiples of these tokens.
        requests: Requests answered.
        prompt_tokens: Tokens of their prompts.
        hit_tokens: Those of them that came from the cache: prefill saved.
        hit_rate: `hit_tokens / prompt_tokens`.
        recomputed_tokens: Tokens that full attention had in the cache, and that were computed
            again for want of a state or a window.
        preemptions: How often a request was preempted.
        evicted_blocks: Blocks with cached contents that were taken for others, by kind of group.
        steps: Steps of the scheduler.
        step_ms: Median time of a step in the scheduler.
        request_ms: Time in the scheduler by request, all steps together.
        progress: The hit rate after each twentieth of the requests.
    """

    coordinator: str
    memory: int
    blocks: int
    block_tokens: int
    match_tokens: int
    requests: int
    prompt_tokens: int
    hit_tokens: int
    hit_rate: float
    recomputed_tokens: int
    preemptions: int
    evicted_blocks: dict[str, int]
    steps: int
    step_ms: float
    request_ms: float
    progress: list[float]


def replay(
    context: typer.Context,
    trace: Annotated[Path, typer.Argument(help="Requests in Mooncake's format.", dir_okay=False)],
    model: Annotated[
        str, typer.Option(help="A folder with a config.json, that file, or a name on the hub.")
    ],
    memory: Annotated[
        list[str], typer.Option(help="Memory of the KV cache, like 20GiB. More than one: a sweep.")
    ],
    coordinator: Annotated[str, typer.Option(help="The strategy.")] = "hybrid_aware",
    compare: Annotated[
        list[str] | None, typer.Option(help="Another strategy, beside it. May be repeated.")
    ] = None,
    match_unit: Annotated[
        str, typer.Option(help="Strategy of the match unit; stock for the coordinator stock.")
    ] = "auto",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 32,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first N requests only.")
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write the outcome there; - for the output.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the hit rates there (matplotlib).")
    ] = None,
) -> None:
    """Send recorded requests through vLLM's real scheduler, with no model and no GPU.

    Prompts, answers and their order are the trace's; a fixed number of requests is in flight.
    The planner, the scheduler and the coordinators are those that `vllm serve` would run.
    """
    console = Console(stderr=True)
    sizes = [memory_size("replay", text) for text in memory]
    strategies = list(dict.fromkeys([*(compare or ()), coordinator]))
    check_outputs("replay", json_, plot)
    for option, name in (
        *(("--compare", name) for name in compare or ()),
        ("--coordinator", coordinator),
    ):
        check_strategy("replay", option, "coordinator", name)
    check_strategy("replay", "--match-unit", "prefix_match_unit", match_unit)
    check_environment("replay", ["coordinator", "prefix_match_unit"])
    from vllm_hybrid_kv.tools.replay.trace import TraceError, read_trace

    try:
        requests = read_trace(trace, limit)
        path = config_path(model)
        read_config(path)
        check_config_file(context.args)
        prepare()
        with described(path) as description:
            built = _build(description, model, context.args, concurrency)
            outcomes = [
                _run(description, built, requests, size, name, match_unit, concurrency, console)
                for size in sizes
                for name in strategies
            ]
    except (ImportError, OSError, TraceError, ValueError) as error:
        raise _stop(str(error)) from None
    hand_out(
        "replay",
        [asdict(outcome) for outcome in outcomes],
        lambda: _tables(outcomes, requests),
        json_,
        plot,
        lambda path: _draw(path, outcomes),
    )


@contextmanager
def _vllm_in_one_line(description: Described) -> Iterator[None]:
    """Turn an error of vLLM about a described model into one line."""
    try:
        yield
    except Exception as error:
        message = description.in_words(one_line(error))
        raise ValueError(in_our_options(message)) from error


def _stop(message: str) -> typer.Exit:
    return stop("replay", message)


def _build(description: Described, model: str, options: Sequence[str], concurrency: int) -> Model:
    from vllm_hybrid_kv.tools.plan.engine import Model

    _, arguments = parse([model, *options])
    if arguments["max_num_seqs"] is None:
        arguments["max_num_seqs"] = concurrency
    with _vllm_in_one_line(description):
        return Model(
            {
                **arguments,
                "model": description.folder,
                "enable_prefix_caching": True,
                "gpu_memory_utilization": 0.1,
            }
        )


def _run(
    description: Described,
    model: Model,
    requests: Sequence[TracedRequest],
    memory: int,
    coordinator: str,
    prefix_match_unit: str,
    concurrency: int,
    console: Console,
) -> Outcome:
    from vllm_hybrid_kv.tools.plan.plan import hit_alignment
    from vllm_hybrid_kv.tools.replay.replay import Replay

    unit = "stock" if coordinator == "stock" else prefix_match_unit
    with _vllm_in_one_line(description):
        engine = model.engine(memory, {"coordinator": coordinator, "prefix_match_unit": unit})
        model.check(engine)
    replayed = Replay(engine, requests, concurrency)
    bar = Progress(
        TextColumn(f"{coordinator}, {format_size(memory)}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("hit rate {task.fields[rate]:.1%}"),
        TimeRemainingColumn(),
        console=console,
    )
    progress: list[float] = []
    with bar:
        task = bar.add_task("", total=len(requests), rate=0.0)

        def answered(count: int) -> None:
            rate = replayed.tally.hit_rate
            bar.update(task, completed=count, rate=rate)
            while len(progress) < 20 * count // len(requests):
                progress.append(rate)

        tally = replayed.run(answered)
    times = [1000 * seconds for seconds in tally.schedule_seconds]
    return Outcome(
        coordinator=coordinator,
        memory=memory,
        blocks=engine.kv_cache_config.num_blocks,
        block_tokens=engine.scheduler_block_size,
        match_tokens=hit_alignment(engine),
        requests=tally.requests,
        prompt_tokens=tally.prompt_tokens,
        hit_tokens=tally.hit_tokens,
        hit_rate=tally.hit_rate,
        recomputed_tokens=tally.recomputed_tokens,
        preemptions=tally.preemptions,
        evicted_blocks=dict(tally.evicted_blocks),
        steps=tally.steps,
        step_ms=statistics.median(times),
        request_ms=sum(times) / tally.requests,
        progress=progress,
    )


def _tables(outcomes: Sequence[Outcome], requests: Sequence[TracedRequest]) -> Iterator[Table]:
    """Give one table for each size of memory, a column for each strategy."""
    from vllm_hybrid_kv.tools.replay.trace import BLOCK_TOKENS, shareable_tokens

    tokens = sum(request.input_length for request in requests)
    shared = shareable_tokens(requests) / tokens
    rows: dict[str, Callable[[Outcome], str]] = {
        "hit rate": lambda o: f"{o.hit_rate:.2%}",
        "tokens of prefill saved": lambda o: f"{o.hit_tokens:,}",
        "recomputed for want of a state": lambda o: f"{o.recomputed_tokens:,}",
        "preemptions": lambda o: f"{o.preemptions:,}",
        "scheduler, ms a step (median)": lambda o: f"{o.step_ms:.2f}",
        "scheduler, ms a request": lambda o: f"{o.request_ms:.1f}",
        "prefixes matched by (tokens)": lambda o: f"{o.match_tokens:,}",
        "blocks of the pool": lambda o: f"{o.blocks:,} of {o.block_tokens:,} tokens",
    }
    for memory in dict.fromkeys(outcome.memory for outcome in outcomes):
        columns = [outcome for outcome in outcomes if outcome.memory == memory]
        kinds = dict.fromkeys(kind for outcome in columns for kind in outcome.evicted_blocks)
        table = Table(
            title=f"{len(requests):,} requests, {tokens:,} prompt tokens, {format_size(memory)}",
            caption=f"{shared:.1%} of the prompt tokens are in whole blocks of {BLOCK_TOKENS} that "
            "came before.",
        )
        table.add_column()
        for outcome in columns:
            table.add_column(outcome.coordinator, justify="right")
        for name, value in rows.items():
            table.add_row(name, *(value(outcome) for outcome in columns))
        for kind in kinds:
            counts = (f"{outcome.evicted_blocks.get(kind, 0):,}" for outcome in columns)
            table.add_row(f"evicted blocks, {kind.replace('_', ' ')}", *counts)
        yield table


def _draw(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Draw hit rates by memory, or where there is one size, along the trace."""
    sweep = len({outcome.memory for outcome in outcomes}) > 1
    by_strategy: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_strategy.setdefault(outcome.coordinator, []).append(outcome)
    with figure(path, figsize=(7, 4.5)) as (_, axes):
        for name, rows in by_strategy.items():
            if sweep:
                rows.sort(key=lambda row: row.memory)
                x: list[Any] = [row.memory / (1 << 30) for row in rows]
                axes.plot(x, [100 * row.hit_rate for row in rows], marker="o", label=name)
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
