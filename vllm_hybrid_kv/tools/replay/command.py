# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv replay`: the prefix-cache hit rate on recorded traffic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_hybrid_kv.hooks import BUILT_IN_NAMES
from vllm_hybrid_kv.tools.options import check_environment, check_strategy, memory_size, parse
from vllm_hybrid_kv.tools.output import (
    JsonOption,
    MarkdownOption,
    PlotOption,
    Table,
    ToolError,
    check_paths,
    counted,
    figure,
    format_size,
    progress_bar,
    write,
)
from vllm_hybrid_kv.tools.plan.model_description import config_path, described, read_config
from vllm_hybrid_kv.tools.plan.vllm_import import prepare
from vllm_hybrid_kv.tools.replay.peers import PEERS
from vllm_hybrid_kv.tools.replay.trace import (
    BLOCK_TOKENS,
    TracedRequest,
    read_trace,
    shareable_tokens,
)

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.plan.engine import Engine, Model
    from vllm_hybrid_kv.tools.replay.scheduler import Tally

SCHEMA = 1
COORDINATORS = ", ".join(BUILT_IN_NAMES["coordinator"])
MATCH_UNITS = ", ".join(BUILT_IN_NAMES["prefix_match_unit"])


@dataclass(frozen=True)
class Outcome:
    """The result of a replay with one strategy (`coordinator`) and one size of memory (in bytes).

    Attributes:
        blocks: Blocks of the pool; 0 for a peer, which is simulated without blocks.
        host_memory: Bytes of host memory for the OffloadingConnector; 0 without it.
        prefill_rate: Tokens that the model computes per second.
        match_tokens: Hits end at multiples of this number of tokens.
        progress: The hit rate after each twentieth of the requests.
    """

    coordinator: str
    memory: int
    host_memory: int
    prefill_rate: float
    blocks: int
    block_tokens: int
    match_tokens: int
    tally: Tally
    progress: list[float]

    @property
    def name(self) -> str:
        """The heading of its column."""
        if not self.host_memory:
            return self.coordinator
        # Non-breaking spaces keep the size on one line.
        host = f"+ {format_size(self.host_memory)}".replace(" ", "\N{NO-BREAK SPACE}")
        return f"{self.coordinator} {host}"

    @property
    def saved_seconds(self) -> float:
        """The prefill time of the tokens that were loaded from host memory."""
        return self.tally.host_hit_tokens / self.prefill_rate

    def to_json(self) -> dict[str, Any]:
        rates = {name: getattr(self.tally, name) for name in ("hit_rate", "step_ms", "request_ms")}
        document = {**vars(self), **vars(self.tally), **rates}
        document["host_saved_seconds"] = self.saved_seconds
        for name in ("tally", "schedule_seconds", "hits"):
            del document[name]
        return document


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
        str,
        typer.Option(
            help=f"Strategy of the setting coordinator: {COORDINATORS}, or another package's."
        ),
    ] = "hybrid_aware",
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="Another strategy to compare with. Can be repeated. "
            f"{' and '.join(PEERS)} are simulations of these systems."
        ),
    ] = None,
    match_unit: Annotated[
        str,
        typer.Option(
            help=f"Strategy of the setting prefix_match_unit: {MATCH_UNITS}, or another package's. "
            "The coordinator stock always uses stock."
        ),
    ] = "auto",
    host_memory: Annotated[
        list[str] | None,
        typer.Option(
            help="Host memory for vLLM's OffloadingConnector, such as 64GiB; 0 is none. Repeat it "
            "to compare sizes."
        ),
    ] = None,
    host_bandwidth: Annotated[
        str,
        typer.Option(help="Bytes per second between device and host memory, in each direction."),
    ] = "25GB",
    prefill_rate: Annotated[
        float, typer.Option(min=1, help="Tokens that the model computes per second.")
    ] = 20_000,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Replay only the first N requests.")] = (
        None
    ),
    trace_block_size: Annotated[
        int, typer.Option(min=1, help="Tokens of a hash id, for lines without a block_size.")
    ] = BLOCK_TOKENS,
    json_: JsonOption = None,
    plot: PlotOption = None,
    markdown: MarkdownOption = False,
) -> None:
    """Replay recorded requests through vLLM's scheduler, without a model or a GPU.

    Prompts, answers and their order come from the trace; a fixed number of requests is in flight.
    The planner, the scheduler and the coordinators are those that `vllm serve` runs. SERVE OPTIONS
    are options of `vllm serve`, such as --max-model-len. --kv-cache-dtype defaults to
    turboquant_k8v4.

    Rows of the table:

    - hit rate: the share of prompt tokens that came from the prefix cache
    - prefill tokens saved: the prompt tokens that came from the prefix cache
    - tokens recomputed without a state: tokens that full attention had cached, but that were
      recomputed because another KV group lacked them
    - from the device, from host memory: the parts of the hit rate by tier
    - loaded from, stored in host memory: bytes that were copied
    - time of loads: how long the copies from host memory take at --host-bandwidth
    - prefill time that they save: the time of the same tokens at --prefill-rate
    - steps waited for copies: how long steps waited because they needed the blocks of a copy
    - preemptions: how often the scheduler preempted a request
    - scheduler, ms: time in vLLM's scheduler, without the model
    - match unit: hits end at multiples of this number of tokens
    - block, blocks: tokens of a block, and blocks of the pool
    - evicted blocks: cached blocks that were evicted, by kind of KV group
    """
    sizes = [memory_size(text) for text in memory]
    hosts = [memory_size(text, "--host-memory", least=0) for text in host_memory or ["0"]]
    bandwidth = memory_size(host_bandwidth, "--host-bandwidth")
    strategies = list(dict.fromkeys([*(compare or ()), coordinator]))
    check_paths(json_, plot)
    for name in compare or ():
        if name not in PEERS:
            check_strategy("--compare", "coordinator", name)
    check_strategy("--coordinator", "coordinator", coordinator)
    check_strategy("--match-unit", "prefix_match_unit", match_unit)
    check_environment(["coordinator", "prefix_match_unit"])
    requests = read_trace(trace, limit, trace_block_size)
    path = config_path(model)
    read_config(path)
    prepare()
    from vllm_hybrid_kv.tools.plan.engine import Model

    outcomes: list[Outcome] = []
    sizes_of_problem: dict[str, str] = {}
    _, arguments = parse(context, model)
    with described(path) as description:
        arguments |= {"model": description.folder, "enable_prefix_caching": True}
        if arguments["max_num_seqs"] is None:
            arguments["max_num_seqs"] = concurrency
        models: dict[int, Model] = {}
        for host in dict.fromkeys(hosts):
            # `kv_offloading_size` is in GiB. vLLM writes it into the transfer config, so copy that.
            tier = {"kv_offloading_size": host / (1 << 30)} if host else {}
            with description.errors_in_one_line():
                models[host] = Model(copy.deepcopy(arguments) | tier)
        for size, name, host in product(sizes, strategies, models):
            unit = "stock" if name == "stock" else match_unit
            try:
                if name in PEERS:
                    # The peers are simulated without host memory.
                    if host == hosts[0]:
                        peer = _run_peer(
                            models[host], requests, size, name, concurrency, prefill_rate
                        )
                        outcomes.append(peer)
                    continue
                with description.errors_in_one_line():
                    settings = {"coordinator": name, "prefix_match_unit": unit}
                    engine = models[host].engine(size, settings)
                    models[host].check(engine)
                speeds = (float(bandwidth), prefill_rate)
                outcomes.append(_run(engine, requests, size, name, concurrency, host, *speeds))
            except ToolError as error:
                # Continue, because other sizes and strategies may work.
                sizes_of_problem.setdefault(str(error), f"--memory {format_size(size)}")
    if outcomes:
        write(
            [outcome.to_json() for outcome in outcomes],
            lambda: _tables(outcomes, requests),
            schema=SCHEMA,
            json_=json_,
            markdown=markdown,
            plot=plot,
            draw=lambda path: _draw(path, outcomes),
        )
    if sizes_of_problem:
        raise ToolError(
            "; ".join(f"{size}: {problem}" for problem, size in sizes_of_problem.items())
        )


def _run(
    engine: Engine,
    requests: Sequence[TracedRequest],
    memory: int,
    name: str,
    concurrency: int,
    host_memory: int,
    bandwidth: float,
    prefill_rate: float,
) -> Outcome:
    from vllm_hybrid_kv.tools.plan.kv_cache_plan import hit_alignment
    from vllm_hybrid_kv.tools.replay.host_memory import HostMemory
    from vllm_hybrid_kv.tools.replay.scheduler import Replay

    host = HostMemory(engine, bandwidth, prefill_rate) if host_memory else None
    replayed = Replay(engine, requests, concurrency, host)
    progress = _shown(f"{name}, {format_size(memory)}", len(requests), replayed.tally, replayed.run)
    return Outcome(
        coordinator=name,
        memory=memory,
        host_memory=host_memory,
        prefill_rate=prefill_rate,
        blocks=engine.kv_cache_config.num_blocks,
        block_tokens=engine.scheduler_block_size,
        match_tokens=hit_alignment(engine),
        tally=replayed.tally,
        progress=progress,
    )


def _run_peer(
    model: Model,
    requests: Sequence[TracedRequest],
    memory: int,
    name: str,
    concurrency: int,
    prefill_rate: float,
) -> Outcome:
    """Simulate a peer with the memory, the layers and the batch size of `model`."""
    from vllm_hybrid_kv.tools.replay.peers.loop import Peer, sizes
    from vllm_hybrid_kv.tools.replay.peers.registry import best_run

    progress: dict[Peer, list[float]] = {}

    def run(peer: Peer) -> None:
        progress[peer] = _shown(
            f"{name}, {format_size(memory)}",
            len(requests),
            peer.tally,
            partial(peer.run, requests, concurrency, model.max_num_batched_tokens),
        )

    peer = best_run(name, sizes(model.specs, memory, model.text_config), run)
    return Outcome(
        coordinator=name,
        memory=memory,
        host_memory=0,
        prefill_rate=prefill_rate,
        blocks=0,
        block_tokens=0,
        match_tokens=peer.unit,
        tally=peer.tally,
        progress=progress[peer],
    )


def _shown(
    label: str, total: int, tally: Tally, run: Callable[[Callable[[int], None]], object]
) -> list[float]:
    """Run a replay with a progress bar, and return the hit rate after each twentieth of it."""
    progress: list[float] = []
    with progress_bar("hit rate {task.fields[rate]:.1%}") as bar:
        task = bar.add_task(label, total=total, rate=0.0)

        def finished(count: int) -> None:
            bar.update(task, completed=count, rate=tally.hit_rate)
            while len(progress) < 20 * count // total:
                progress.append(tally.hit_rate)

        run(finished)
    return progress


def _tables(outcomes: Sequence[Outcome], requests: Sequence[TracedRequest]) -> Iterator[Table]:
    """Yield a table for each size of memory, with a column for each strategy."""
    tokens = sum(request.input_length for request in requests)
    shared = shareable_tokens(requests) / tokens
    for memory in dict.fromkeys(outcome.memory for outcome in outcomes):
        shown = [outcome for outcome in outcomes if outcome.memory == memory]
        tiers = any(outcome.host_memory for outcome in shown)
        columns = [_numbers(outcome, tiers) for outcome in shown]
        yield Table(
            f"{counted(len(requests), 'request')}, {counted(tokens, 'prompt token')}, "
            f"{format_size(memory)}",
            ("", *(f">{outcome.name}" for outcome in shown)),
            [
                (
                    name,
                    *(
                        column.get(name, "0" if outcome.blocks else "-")
                        for outcome, column in zip(shown, columns, strict=True)
                    ),
                )
                for name in dict.fromkeys(name for column in columns for name in column)
            ],
            f"{shared:.1%} of the prompt tokens repeat whole blocks of {requests[0].block_size} "
            "tokens of earlier requests.",
        )


def _numbers(outcome: Outcome, tiers: bool) -> dict[str, str]:
    """Return the rows of a column, with those of host memory if `tiers` is set."""
    tally = outcome.tally
    if not outcome.blocks:
        return {
            "hit rate": f"{tally.hit_rate:.2%}",
            "prefill tokens saved": f"{tally.hit_tokens:,}",
            "match unit, tokens": f"{outcome.match_tokens:,}",
        }
    from_host = tally.host_hit_tokens / tally.prompt_tokens
    by_tier = {
        "  from the device": f"{tally.hit_rate - from_host:.2%}",
        "  from host memory": f"{from_host:.2%}",
        "loaded from host memory": format_size(tally.loaded_bytes),
        "stored in host memory": format_size(tally.stored_bytes),
        "time of loads, s": f"{tally.load_seconds:,.1f}",
        "prefill time that they save, s": f"{outcome.saved_seconds:,.1f}",
        "steps waited for copies, s": f"{tally.wait_seconds:,.2f}",
    }
    return {
        "hit rate": f"{tally.hit_rate:.2%}",
        **(by_tier if tiers else {}),
        "prefill tokens saved": f"{tally.hit_tokens:,}",
        "tokens recomputed without a state": f"{tally.recomputed_tokens:,}",
        "preemptions": f"{tally.preemptions:,}",
        "scheduler, ms per step (median)": f"{tally.step_ms:.2f}",
        "scheduler, ms per request": f"{tally.request_ms:.1f}",
        "match unit, tokens": f"{outcome.match_tokens:,}",
        "block, tokens": f"{outcome.block_tokens:,}",
        "blocks": f"{outcome.blocks:,}",
        **{
            f"evicted blocks, {kind.replace('_', ' ')}": f"{blocks:,}"
            for kind, blocks in tally.evicted_blocks.items()
        },
    }


def _draw(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Draw hit rates by host memory, by memory, or along the trace if there is only one size."""
    hosts = len({outcome.host_memory for outcome in outcomes}) > 1
    sweep = hosts or len({outcome.memory for outcome in outcomes}) > 1
    by_strategy: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: (outcome.memory, outcome.host_memory)):
        name = outcome.coordinator
        if hosts:
            name += f", KV cache of {format_size(outcome.memory)}"
        by_strategy.setdefault(name, []).append(outcome)
    with figure(path, figsize=(7, 4.5)) as (_, axes):
        for name, rows in by_strategy.items():
            if sweep:
                sizes = [(row.host_memory if hosts else row.memory) / (1 << 30) for row in rows]
                axes.plot(sizes, [100 * row.tally.hit_rate for row in rows], "o-", label=name)
            else:
                rates = [100 * rate for rate in rows[0].progress]
                axes.plot(range(5, 101, 5), rates, label=name)
        axes.set(
            xlabel="host memory, GiB" if hosts else "KV cache, GiB" if sweep else "% of the trace",
            ylabel="prompt tokens from the cache, %",
            xscale="log" if sweep and not hosts else "linear",
        )
        axes.set_ylim(bottom=0)
        axes.legend()
