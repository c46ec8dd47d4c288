# SPDX-License-Identifier: Apache-2.0
"""Show the result of `plan` as text, tables and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_hybrid_kv.tools.options import in_tool_options
from vllm_hybrid_kv.tools.output import Table, format_size

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.plan.kv_cache_plan import Plan


@dataclass(frozen=True)
class PlanColumn:
    """A column of the comparison: a plan, or the reason why there is none."""

    name: str
    plan: Plan | None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "plan": self.plan and self.plan.to_json()}


@dataclass(frozen=True)
class PlanResult:
    """The plan for the user's options, and the plans that it is compared with."""

    model: str
    architecture: str
    device: str
    tensor_parallel_size: int
    notes: Sequence[str]
    plan: Plan
    dtypes: Sequence[PlanColumn]
    strategies: Sequence[PlanColumn]

    def to_json(self) -> dict[str, Any]:
        """Return the document for `--json`; sizes are in bytes or tokens."""
        return {
            **vars(self),
            "plan": self.plan.to_json(),
            "dtypes": [column.to_json() for column in self.dtypes],
            "strategies": [column.to_json() for column in self.strategies],
        }


def report(result: PlanResult) -> Iterator[Table | str]:
    """Yield the lines and tables to print."""
    plan = result.plan
    ranks = result.tensor_parallel_size * (1 + max(pages.stage for pages in plan.pages))
    gpus = f"on each GPU of {ranks}" if ranks > 1 else "on a GPU"
    yield (
        f"{result.architecture}, {plan.kv_cache_dtype}, {format_size(plan.memory)} of KV cache "
        f"{gpus if result.device == 'gpu' else 'on the CPU of this machine'}"
    )
    yield from result.notes
    yield _groups(plan)
    yield _comparison("Cache dtypes", result.dtypes)
    if result.strategies:
        yield _comparison(f"unify_page_sizes with {plan.kv_cache_dtype}", result.strategies)
    for column in (*result.dtypes, *result.strategies):
        if column.reason:
            yield f"{column.name}: {column.reason}"
    yield from (f"warning: {in_tool_options(line)}" for line in plan.warnings)


def _groups(plan: Plan) -> Table:
    from vllm_hybrid_kv.tools.plan.kv_cache_plan import merge_equal

    stages = ("stage",) if any(pages.stage for pages in plan.pages) else ()
    return Table(
        f"KV groups, planned with {plan.unify_page_sizes}",
        (
            *(*stages, "groups", "layers", "kind", "stores"),
            *(">block, tokens", ">page, bytes", ">padding, bytes", ">padding, %"),
        ),
        [
            (
                *(str(pages.stage) for _ in stages),
                ranges(groups),
                str(len(pages.layers)),
                pages.kind,
                pages.stores,
                f"{pages.block_tokens:,}",
                f"{pages.page_bytes:,}",
                f"{pages.padding_bytes:,}",
                f"{100 * pages.padding:.2f}",
            )
            for pages, groups in merge_equal(plan.pages)
        ],
        f"A block has {plan.block_bytes:,} bytes: one page of every layer of a group.",
    )


def ranges(numbers: Sequence[int]) -> str:
    """Format ascending numbers, with runs as ranges: `0-2, 4`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _comparison(title: str, columns: Sequence[PlanColumn]) -> Table:
    numbers = [_numbers(column.plan) if column.plan else {} for column in columns]
    return Table(
        title,
        ("", *(f">{column.name}" for column in columns)),
        [
            (name, *(plan.get(name, "-") for plan in numbers))
            for name in dict.fromkeys(name for plan in numbers for name in plan)
        ],
    )


def _numbers(plan: Plan) -> dict[str, str]:
    blocks = sorted({pages.block_tokens for pages in plan.pages})
    capacity = plan.capacity
    longest = f"{capacity.max_model_len:,}"
    match_unit = shortest = "no prefix cache"
    if plan.prefix_caching:
        match_unit = f"{plan.match_tokens:,}"
        shortest = f"{plan.smallest_hit:,}" + ("" if plan.can_hit else " (too long)")
    return {
        "block, tokens": " and ".join(f"{tokens:,}" for tokens in blocks),
        "block, bytes": f"{plan.block_bytes:,}",
        "blocks": f"{plan.blocks:,}",
        "padding of the pool": f"{100 * plan.pool_padding:.2f} %",
        f"tokens in requests of {longest}": f"{capacity.max_len_tokens:,}",
        f"concurrent requests of {longest}": f"{capacity.max_len_requests:,}",
        f"concurrent requests of {capacity.short_request:,}": f"{capacity.short_requests:,}",
        "tokens that vLLM reports": f"{plan.reported_tokens:,}",
        "match unit, tokens": match_unit,
        "shortest prompt that can hit": shortest,
    }
