# SPDX-License-Identifier: Apache-2.0
"""Plans as text: the groups of one, several side by side, and what a server would warn of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from vllm_hybrid_kv.tools.sizes import format_size

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.plan.plan import Plan, Planned


@dataclass(frozen=True)
class Column:
    """One of several plans side by side: a plan, or why there is none.

    Attributes:
        name: What it stands under: a dtype or a strategy.
        planned: The plan.
        reason: Why there is none.
    """

    name: str
    planned: Planned | None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON has it, None where there is none, and why."""
        plan = None if self.planned is None else self.planned.plan.to_json()
        return {"name": self.name, "plan": plan, "reason": self.reason or None}


@dataclass(frozen=True)
class Result:
    """What was asked for and what came of it.

    Attributes:
        model: Where the description is.
        architecture: The class that was planned.
        device: What was planned for.
        tensor_parallel_size: Ranks; a plan is that of one.
        notes: What was changed of the description.
        asked: The plan that was asked for.
        dtypes: It and others, by dtype of the cache.
        strategies: The same by strategy, if that was asked for.
    """

    model: str
    architecture: str
    device: str
    tensor_parallel_size: int
    notes: Sequence[str]
    asked: Planned
    dtypes: Sequence[Column]
    strategies: Sequence[Column]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON has it; sizes in bytes and tokens."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "device": self.device,
            "tensor_parallel_size": self.tensor_parallel_size,
            "notes": list(self.notes),
            "plan": self.asked.plan.to_json(),
            "dtypes": [column.to_json() for column in self.dtypes],
            "strategies": [column.to_json() for column in self.strategies],
        }


def report(result: Result) -> Iterator[Table | str]:
    """Give what is to be printed, part by part."""
    plan = result.asked.plan
    stages = 1 + max(pages.stage for pages in plan.pages)
    ranks = result.tensor_parallel_size * stages
    where = {"gpu": "on each GPU of" if ranks > 1 else "on a GPU", "cpu": "on this machine's CPU"}
    yield (
        f"{result.architecture}, {plan.kv_cache_dtype}, {format_size(plan.memory)} of KV cache "
        f"{where[result.device]}{f' {ranks}' if ranks > 1 and result.device == 'gpu' else ''}"
    )
    yield from result.notes
    yield _groups(plan)
    yield _side_by_side("cache dtypes", result.dtypes)
    if result.strategies:
        yield _side_by_side(f"unify_page_sizes, {plan.kv_cache_dtype}", result.strategies)
    for column in (*result.dtypes, *result.strategies):
        if column.reason:
            yield f"{column.name}: {column.reason}"
    yield from (f"warning: {line}" for line in plan.warnings)


def _groups(plan: Plan) -> Table:
    from vllm_hybrid_kv.tools.plan.plan import merge_alike

    table = Table(
        title=f"KV groups, {plan.unify_page_sizes}",
        caption=f"A block has {plan.block_bytes:,} bytes: a page of every layer of one group.",
    )
    staged = any(pages.stage for pages in plan.pages)
    for name in (*(("stage",) if staged else ()), "groups", "layers", "kind", "stores"):
        table.add_column(name, overflow="fold")
    for name in ("block,\ntokens", "page,\nbytes", "padding,\nbytes", "\n%"):
        table.add_column(name, justify="right")
    for pages, groups in merge_alike(plan.pages):
        table.add_row(
            *((f"{pages.stage}",) if staged else ()),
            ranges(groups),
            f"{len(pages.layers)}",
            pages.kind,
            pages.stores,
            f"{pages.block_tokens:,}",
            f"{pages.page_bytes:,}",
            f"{pages.padding_bytes:,}",
            f"{100 * pages.padding:.2f}",
        )
    return table


def ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers with runs drawn together: 0-2, 4."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _side_by_side(title: str, columns: Sequence[Column]) -> Table:
    plans = [column.planned.plan for column in columns if column.planned is not None]
    table = Table(title=title)
    table.add_column()
    for column in columns:
        table.add_column(column.name, justify="right")
    for name, value in _rows(plans[0].capacity.max_model_len if plans else 0).items():
        table.add_row(
            name,
            *("-" if column.planned is None else value(column.planned.plan) for column in columns),
        )
    return table


def _rows(max_model_len: int) -> dict[str, Callable[[Plan], str]]:
    from vllm_hybrid_kv.planning.capacity import SHORT_REQUEST

    return {
        "block, tokens": lambda p: _distinct(page.block_tokens for page in p.pages),
        "block, bytes": lambda p: f"{p.block_bytes:,}",
        "blocks": lambda p: f"{p.blocks:,}",
        "padding of the pool": lambda p: f"{100 * p.pool_padding:.2f} %",
        f"tokens in requests of {max_model_len:,}": lambda p: f"{p.capacity.max_len_tokens:,}",
        f"requests of {max_model_len:,} at once": lambda p: f"{p.capacity.max_len_requests:,}",
        f"requests of {min(SHORT_REQUEST, max_model_len):,} at once": (
            lambda p: f"{p.capacity.short_requests:,}"
        ),
        "tokens that vLLM reports": lambda p: f"{p.reported_tokens:,}",
        "prefixes matched by, tokens": lambda p: _if_cached(p, f"{p.match_tokens:,}"),
        "shortest prompt that can hit": lambda p: _if_cached(
            p, f"{p.smallest_hit:,}" + ("" if p.can_hit else " (too long)")
        ),
    }


def _if_cached(plan: Plan, text: str) -> str:
    return text if plan.prefix_caching else "no prefix cache"


def _distinct(numbers: Iterator[int]) -> str:
    return " and ".join(f"{number:,}" for number in sorted(set(numbers)))
