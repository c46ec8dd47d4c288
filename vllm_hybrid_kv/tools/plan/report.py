# SPDX-License-Identifier: Apache-2.0
"""The result of `plan` as text, tables and JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_hybrid_kv.tools.output import Table, format_size
from vllm_hybrid_kv.tools.serve_options import in_tool_options

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.plan.kv_cache_plan import Plan, Planned


@dataclass(frozen=True)
class PlanColumn:
    """One of several plans that are compared, or the reason why there is no plan."""

    name: str
    planned: Planned | None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        plan = None if self.planned is None else self.planned.plan.to_json()
        return {"name": self.name, "plan": plan, "reason": self.reason or None}


@dataclass(frozen=True)
class PlanResult:
    """The plan for the user's options, and the plans that it is compared with."""

    model: str
    architecture: str
    device: str
    tensor_parallel_size: int
    notes: Sequence[str]
    planned: Planned
    dtypes: Sequence[PlanColumn]
    strategies: Sequence[PlanColumn]

    def to_json(self) -> dict[str, Any]:
        """Return the document for `--json`; sizes are in bytes or tokens."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "device": self.device,
            "tensor_parallel_size": self.tensor_parallel_size,
            "notes": list(self.notes),
            "plan": self.planned.plan.to_json(),
            "dtypes": [column.to_json() for column in self.dtypes],
            "strategies": [column.to_json() for column in self.strategies],
        }


def report(result: PlanResult) -> Iterator[Table | str]:
    """Yield the lines and tables to print."""
    plan = result.planned.plan
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
    """Return ascending numbers with runs as ranges: `0-2, 4`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _comparison(title: str, columns: Sequence[PlanColumn]) -> Table:
    plans = [column.planned.plan for column in columns if column.planned is not None]
    return Table(
        title,
        ("", *(f">{column.name}" for column in columns)),
        [
            (
                name,
                *(
                    "-" if column.planned is None else value(column.planned.plan)
                    for column in columns
                ),
            )
            for name, value in _rows(plans[0].capacity.max_model_len if plans else 0).items()
        ],
    )


def _rows(max_model_len: int) -> dict[str, Callable[[Plan], str]]:
    from vllm_hybrid_kv.planning.capacity import SHORT_REQUEST

    short = min(SHORT_REQUEST, max_model_len)
    return {
        "block, tokens": lambda p: _distinct(page.block_tokens for page in p.pages),
        "block, bytes": lambda p: f"{p.block_bytes:,}",
        "blocks": lambda p: f"{p.blocks:,}",
        "padding of the pool": lambda p: f"{100 * p.pool_padding:.2f} %",
        f"tokens in requests of {max_model_len:,}": lambda p: f"{p.capacity.max_len_tokens:,}",
        f"concurrent requests of {max_model_len:,}": lambda p: f"{p.capacity.max_len_requests:,}",
        f"concurrent requests of {short:,}": lambda p: f"{p.capacity.short_requests:,}",
        "tokens that vLLM reports": lambda p: f"{p.reported_tokens:,}",
        "match unit, tokens": lambda p: _if_cached(p, f"{p.match_tokens:,}"),
        "shortest prompt that can hit": lambda p: _if_cached(
            p, f"{p.smallest_hit:,}" + ("" if p.can_hit else " (too long)")
        ),
    }


def _if_cached(plan: Plan, text: str) -> str:
    return text if plan.prefix_caching else "no prefix cache"


def _distinct(numbers: Iterable[int]) -> str:
    return " and ".join(f"{number:,}" for number in sorted(set(numbers)))
