# SPDX-License-Identifier: Apache-2.0
"""Plant deliberate errors, which the end-to-end comparisons must detect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

FAULTS = ("swapped nibbles", "swapped scales", "stale page", "clipped keys")
"""Faults in the contents of the cache."""

STATE_FAULT = "states not copied"
"""A request that resumes inside a block gets its own block, but the state is not copied to it."""

LOAD_FAULT = "blocks not loaded"
"""Blocks that a request hits in the host tier are not copied into the KV cache."""

KERNEL_FAULT = "kernel swaps nibbles"
"""The store kernel itself is wrong, so the engine must refuse to start."""

STEP_FAULTS = (
    "page of the neighbour",  # A continued prompt reads its second page instead of its first.
    "lost slot",  # The last token of a step of several tokens is not stored.
    "window off by one",  # Sliding windows are one token too long.
    "one token short",  # In a step with several requests, a decode does not see its own token.
    "drafts one token short",  # When drafts are verified, each token sees one token fewer.
    "drafts see each other",  # A draft token sees the drafts after it.
    "heads of the neighbour",  # The second tensor-parallel process rotates its query heads.
    "stored too late",  # A step's tokens are stored after its attention.
)
"""Faults in the metadata, the store or the attention of a step."""

NUMBER_FAULTS = (
    "NaN key",
    "NaN value",
    "infinite key",
    "infinite value",
    "negative infinite value",
)
"""Bad numbers in the keys or values of the only request with more than `MARKED_TOKENS` tokens.

In every layer and step, the request's first token gets the number in its first head.
"""

DTYPE_FAULT = "shared layer with another dtype"
"""A layer that reads another layer's pages uses its own dtype, as vLLM does without our patch."""

HEAD_SIZE_FAULT = "group read with another head size"
"""In the plan, the head size of the first k8v4 group is twice that of the group's layers."""

MARKED_TOKENS = 400

_originals: dict[tuple[Any, str], Callable[..., Any]] = {}


class WorkerExtension:
    """Methods that vLLM adds to its workers."""

    def plant_fault(self, fault: str | None) -> None:
        plant(fault)

    def read_pages(self, blocks: tuple[list[int], ...]) -> dict[str, list[bytes]]:
        """Return the contents of blocks, by layer. `blocks` lists block ids by KV group."""
        from vllm.v1.kv_cache_interface import group_kernel_blocks

        runner = self.model_runner  # type: ignore[attr-defined]
        config = runner.kv_cache_config
        layers = runner.compilation_config.static_forward_context
        pages = {}
        for group, ids in zip(config.kv_cache_groups, blocks, strict=True):
            for name in group.layer_names:
                cache = layers[name].kv_cache
                # The cache of a state layer consists of several tensors.
                parts = cache if isinstance(cache, (list, tuple)) else [cache]
                by_block = [group_kernel_blocks(part, config.num_blocks) for part in parts]
                pages[name] = [b"".join(_as_bytes(part[i]) for part in by_block) for i in ids]
        return pages


def _as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def plant(fault: str | None) -> None:
    """Remove this process's faults, then plant `fault` unless it is None.

    Raises:
        ValueError: There is no such fault.
    """
    if fault is not None and fault not in _PLANTERS:
        raise ValueError(f"no fault {fault!r}; the faults are {', '.join(_PLANTERS)}")
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    if fault is not None:
        _PLANTERS[fault](fault)


def _replace(owner: Any, name: str, make: Callable[[Callable[..., Any]], Any]) -> None:
    original = _originals.setdefault((owner, name), getattr(owner, name))
    setattr(owner, name, make(original))


def _replace_method(name: str, make: Callable[[Callable[..., Any]], Any]) -> None:
    from vllm_hybrid_kv.attention.backend import K8V4AttentionImpl

    _replace(K8V4AttentionImpl, name, make)


def _spoil_updates(fault: str) -> None:
    def make(original: Callable[..., Any]) -> Any:
        def update(self: Any, layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any) -> None:
            if fault == "clipped keys":
                # This is what a saturating conversion to fp8 does to large keys.
                key = key.clamp(-1.75, 1.75)
            stored = (slots >= 0).nonzero().flatten()
            if fault == "lost slot" and stored.numel() > 1:
                slots = slots.clone()
                slots[stored[-1]] = -1
            original(self, layer, key, value, kv_cache, slots)
            blocks = _blocks(slots, kv_cache)
            if fault == "stale page" and blocks.numel() > 3:
                kv_cache[blocks[1]] = kv_cache[blocks[2]]
            if fault in ("swapped nibbles", "swapped scales"):
                _spoil_pages(fault, kv_cache, blocks, key.shape[-1])

        return update

    _replace_method("do_kv_cache_update", make)


def _blocks(slots: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    return slots[slots >= 0].div(cache.shape[2], rounding_mode="floor").unique()


def _spoil_pages(fault: str, kv_cache: Any, blocks: Any, head_size: int) -> None:
    """Swap the nibbles of the values, or the scales of keys with those of values."""
    from vllm_hybrid_kv.kernels import k8v4

    page = k8v4.PageFormat(head_size, kv_cache.shape[2], k8v4.Layout.CPU_TILED)
    for block in blocks.tolist():
        for head in range(kv_cache.shape[1]):
            region = kv_cache[block, head].view(-1)
            if fault == "swapped nibbles":
                values = region[page.value_offset : page.key_scale_offset]
                values.copy_((values >> 4) | (values << 4))
            else:
                scales = region[page.key_scale_offset :]
                scales.copy_(scales.clone().roll(2 * page.page_size))


def _swap_nibbles_in_the_kernel(_: str) -> None:
    from vllm_hybrid_kv.kernels import cpu, known_answer

    known_answer.forget()

    def make(original: Callable[..., Any]) -> Any:
        def store(key: Any, value: Any, cache: Any, slots: Any, **more: Any) -> None:
            original(key, value, cache, slots, **more)
            _spoil_pages("swapped nibbles", cache, _blocks(slots, cache), key.shape[-1])

        return store

    _replace(cpu, "quantise_and_store", make)


def _skip_state_copies(_: str) -> None:
    from vllm.v1.worker import gpu_model_runner

    _replace(gpu_model_runner, "copy_kv_cache_blocks_inplace", lambda _: lambda *_, **__: None)


def _skip_loads(_: str) -> None:
    from vllm_hybrid_kv.transfer.cpu_offloading import MemcpyWorker

    def make(original: Callable[..., Any]) -> Any:
        def copy(self: Any, *jobs: Any, store: bool) -> None:
            cache = self._tensors
            if not store:
                self._tensors = [(tensor.clone(), *more) for tensor, *more in cache]
            original(self, *jobs, store=store)
            self._tensors = cache

        return copy

    _replace(MemcpyWorker, "_copy", make)


def _spoil_numbers(fault: str) -> None:
    from vllm.forward_context import get_forward_context

    number = float("nan") if "NaN" in fault else float("inf")

    def make(original: Callable[..., Any]) -> Any:
        def update(self: Any, layer: Any, key: Any, value: Any, *more: Any) -> None:
            steps: Any = get_forward_context().attn_metadata
            if steps and int((step := steps[layer.layer_name]).seq_lens.max()) > MARKED_TOKENS:
                row = int(step.query_start_loc[int(step.seq_lens.argmax())])
                spoilt = (key if "key" in fault else value).clone()
                spoilt[row, 0, 3] = -number if "negative" in fault else number
                key, value = (spoilt, value) if "key" in fault else (key, spoilt)
            original(self, layer, key, value, *more)

        return update

    _replace_method("do_kv_cache_update", make)


def _update_after_attention(_: str) -> None:
    pending: dict[int, tuple[Callable[..., Any], tuple[Any, ...]]] = {}

    def make_update(original: Callable[..., Any]) -> Any:
        def update(self: Any, *arguments: Any) -> None:
            pending[id(self)] = original, arguments

        return update

    def make_forward(original: Callable[..., Any]) -> Any:
        def forward(self: Any, *arguments: Any, **more: Any) -> Any:
            output = original(self, *arguments, **more)
            if id(self) in pending:
                update, of_update = pending.pop(id(self))
                update(self, *of_update)
            return output

        return forward

    _replace_method("do_kv_cache_update", make_update)
    _replace_method("forward", make_forward)


def _spoil_attention(fault: str) -> None:
    from vllm.distributed import get_tensor_model_parallel_rank

    def make(original: Callable[..., Any]) -> Any:
        def forward(self: Any, layer: Any, query: Any, *arguments: Any, **more: Any) -> Any:
            window = self.sliding_window
            if fault == "window off by one" and window is not None:
                self.sliding_window = window + 1
            if fault == "heads of the neighbour" and get_tensor_model_parallel_rank() == 1:
                query = query.roll(1, dims=1)
            try:
                return original(self, layer, query, *arguments, **more)
            finally:
                self.sliding_window = window

        return forward

    _replace_method("forward", make)


def _spoil_metadata(fault: str) -> None:
    from vllm_hybrid_kv.attention.backend import K8V4MetadataBuilder

    def make(original: Callable[..., Any]) -> Any:
        def build(self: Any, *arguments: Any, **more: Any) -> Any:
            step = original(self, *arguments, **more)
            queries = step.query_start_loc.diff()
            cached = step.seq_lens - queries > 0
            if fault == "page of the neighbour":
                table = step.block_table.clone()
                continued = cached & (queries > 1)
                table[continued, 0] = table[continued, 1]
                return replace(step, block_table=table)
            if fault == "one token short" and len(queries) > 1:
                short = (cached & (queries == 1)).to(step.seq_lens.dtype)
                return replace(step, seq_lens=step.seq_lens - short)
            # A step with a few tokens per request verifies drafts.
            if fault == "drafts one token short" and 1 < queries.max() <= 4:
                short = (cached & (queries > 1)).to(step.seq_lens.dtype)
                return replace(step, seq_lens=step.seq_lens - short)
            if fault == "drafts see each other" and 1 < queries.max() <= 4:
                return replace(step, causal=False)
            return step

        return build

    _replace(K8V4MetadataBuilder, "build", make)


def _ignore_the_layer_whose_pages_are_shared(_: str) -> None:
    from vllm_hybrid_kv.patches import layers

    _replace(layers, "_use_target_dtype", lambda original: lambda arguments: None)


def _plan_for_wider_heads(_: str) -> None:
    from vllm.v1.executor.abstract import Executor

    def make(original: Callable[..., Any]) -> Any:
        def initialize_from_config(self: Any, plans: list[Any]) -> Any:
            group = next(
                group
                for group in plans[0].kv_cache_groups
                if group.kv_cache_spec.kv_quant_mode.is_turboquant
            )
            spec = group.kv_cache_spec
            group.kv_cache_spec = replace(spec, head_size=2 * spec.head_size)
            return original(self, plans)

        return initialize_from_config

    _replace(Executor, "initialize_from_config", make)


_PLANTERS: dict[str, Callable[[str], None]] = {
    **dict.fromkeys(STEP_FAULTS, _spoil_metadata),
    **dict.fromkeys(("lost slot", *FAULTS), _spoil_updates),
    **dict.fromkeys(("window off by one", "heads of the neighbour"), _spoil_attention),
    **dict.fromkeys(NUMBER_FAULTS, _spoil_numbers),
    "stored too late": _update_after_attention,
    STATE_FAULT: _skip_state_copies,
    LOAD_FAULT: _skip_loads,
    KERNEL_FAULT: _swap_nibbles_in_the_kernel,
    DTYPE_FAULT: _ignore_the_layer_whose_pages_are_shared,
    HEAD_SIZE_FAULT: _plan_for_wider_heads,
}
