# SPDX-License-Identifier: Apache-2.0
"""Ways to go wrong on purpose, to prove that the end-to-end comparisons would show them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

FAULTS = ("swapped nibbles", "scale of the neighbour", "stale page", "clipped keys")
"""Ways to store a cache wrongly."""

STATE_FAULT = "states not copied"
"""A request that resumes inside a block gets a block whose state nobody copied there."""

KERNEL_FAULT = "kernel swaps nibbles"
"""The store kernel itself is wrong, which an engine finds when it starts."""

STEP_FAULTS = (
    "page of the neighbour",
    "lost slot",
    "window off by one",
    "one token short",
    "drafts one token short",
    "drafts see each other",
    "heads of the neighbour",
    "stored too late",
)
"""Ways to run a step wrongly.

* page of the neighbour: what continues a prompt reads its second page in place of its first
* lost slot: the last token of a step of several is not stored
* window off by one: sliding windows are a token too long
* one token short: in a step of several requests a decode does not see its own token
* drafts one token short: where drafts are verified, each token sees one token fewer
* drafts see each other: a token to be verified sees the drafts behind it
* heads of the neighbour: the second tensor-parallel process shifts its query heads by one
* stored too late: a step's tokens are stored when it has attended
"""

NUMBER_FAULTS = (
    "NaN key",
    "NaN value",
    "infinite key",
    "infinite value",
    "negative infinite value",
)
"""Numbers that one request alone has in its keys or values, in every layer.

It is the one of more than `MARKED_TOKENS` tokens. The first head of its first token in each step
is spoilt.
"""

MARKED_TOKENS = 400

_originals: dict[tuple[Any, str], Callable[..., Any]] = {}


class WorkerExtension:
    """What vLLM adds to its workers, in whatever process they run."""

    def plant_fault(self, fault: str | None) -> None:
        """Plant a fault in this worker's process."""
        plant(fault)

    def read_pages(self, blocks: tuple[list[int], ...]) -> dict[str, list[bytes]]:
        """Return what blocks hold in this worker: by layer, the bytes of each of its group's.

        Args:
            blocks: Their ids, by KV group.
        """
        from vllm.v1.kv_cache_interface import group_kernel_blocks

        runner = self.model_runner  # type: ignore[attr-defined]
        config = runner.kv_cache_config
        layers = runner.compilation_config.static_forward_context
        pages = {}
        for group, ids in zip(config.kv_cache_groups, blocks, strict=True):
            for name in group.layer_names:
                cache = layers[name].kv_cache
                # States come as several tensors.
                parts = cache if isinstance(cache, (list, tuple)) else [cache]
                by_block = [group_kernel_blocks(part, config.num_blocks) for part in parts]
                pages[name] = [b"".join(as_bytes(part[i]) for part in by_block) for i in ids]
        return pages


def as_bytes(tensor: torch.Tensor) -> bytes:
    """Return what a tensor holds, one element after the other."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def plant(fault: str | None) -> None:
    """Put a fault into the k8v4 backend of this process, in place of the one before.

    Args:
        fault: `STATE_FAULT`, `KERNEL_FAULT`, or one of `FAULTS`, `STEP_FAULTS` and
            `NUMBER_FAULTS`; None for none.
    """
    known = (STATE_FAULT, KERNEL_FAULT, *FAULTS, *STEP_FAULTS, *NUMBER_FAULTS)
    if fault is not None and fault not in known:
        raise ValueError(f"no fault {fault!r}; there are {', '.join(known)}")
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    if fault in ("lost slot", *FAULTS):
        _spoil_updates(fault)
    elif fault == KERNEL_FAULT:
        _swap_nibbles_in_the_kernel()
    elif fault == STATE_FAULT:
        from vllm.v1.worker import gpu_model_runner

        _replace(gpu_model_runner, "copy_kv_cache_blocks_inplace", lambda _: lambda *_, **__: None)
    elif fault in NUMBER_FAULTS:
        _spoil_numbers(fault)
    elif fault == "stored too late":
        _update_after_attention()
    elif fault in ("window off by one", "heads of the neighbour"):
        _spoil_attention(fault)
    elif fault is not None:
        _spoil_metadata(fault)


def _replace(owner: Any, name: str, make: Callable[[Callable[..., Any]], Any]) -> None:
    original = _originals.setdefault((owner, name), getattr(owner, name))
    setattr(owner, name, make(original))


def _spoil_updates(fault: str) -> None:
    from vllm_hybrid_kv.attention.backend import K8V4AttentionImpl

    def make(original: Callable[..., Any]) -> Any:
        def update(
            self: Any, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any
        ) -> None:
            if fault == "clipped keys":
                # What a conversion by way of e4b15 does to large keys.
                key = key.clamp(-1.75, 1.75)
            stored = (slot_mapping >= 0).nonzero().flatten()
            if fault == "lost slot" and stored.numel() > 1:
                slot_mapping = slot_mapping.clone()
                slot_mapping[stored[-1]] = -1
            original(self, layer, key, value, kv_cache, slot_mapping)
            blocks = slot_mapping[slot_mapping >= 0].div(kv_cache.shape[2], rounding_mode="floor")
            blocks = blocks.unique()
            if fault == "stale page" and blocks.numel() > 3:
                kv_cache[blocks[1]] = kv_cache[blocks[2]]
            if fault in ("swapped nibbles", "scale of the neighbour"):
                _spoil_pages(fault, kv_cache, blocks, key.shape[-1])

        return update

    _replace(K8V4AttentionImpl, "do_kv_cache_update", make)


def _spoil_pages(fault: str, kv_cache: Any, blocks: Any, head_size: int) -> None:
    """Swap the nibbles of some pages' values, or give each token the scale of the one before."""
    from vllm_hybrid_kv.kernels import k8v4

    page = k8v4.PageFormat(head_size, kv_cache.shape[2], k8v4.cpu_layout(head_size))
    for block in blocks.tolist():
        for head in range(kv_cache.shape[1]):
            region = kv_cache[block, head].view(-1)
            if fault == "swapped nibbles":
                values = region[page.value_offset : page.scale_offset]
                values.copy_((values >> 4) | (values << 4))
            else:
                scales = region[page.scale_offset : page.zero_offset]
                scales.copy_(scales.clone().roll(2))


def _swap_nibbles_in_the_kernel() -> None:
    from vllm_hybrid_kv.kernels import cpu, known_answer

    known_answer.forget()

    def make(original: Callable[..., Any]) -> Any:
        def store(key: Any, value: Any, cache: Any, slots: Any, **more: Any) -> None:
            original(key, value, cache, slots, **more)
            blocks = slots[slots >= 0].div(cache.shape[2], rounding_mode="floor").unique()
            _spoil_pages("swapped nibbles", cache, blocks, key.shape[-1])

        return store

    _replace(cpu, "quantise_and_store", make)


def _spoil_numbers(fault: str) -> None:
    from vllm.forward_context import get_forward_context

    from vllm_hybrid_kv.attention.backend import K8V4AttentionImpl

    number = float("nan") if "NaN" in fault else float("inf")

    def make(original: Callable[..., Any]) -> Any:
        def update(self: Any, layer: Any, key: Any, value: Any, *more: Any) -> None:
            steps = get_forward_context().attn_metadata
            step = steps[layer.layer_name] if steps else None
            marked = step is not None and int(step.seq_lens.max()) > MARKED_TOKENS
            if marked:
                row = int(step.query_start_loc[int(step.seq_lens.argmax())])
                spoilt = (key if "key" in fault else value).clone()
                spoilt[row, 0, 3] = -number if "negative" in fault else number
                key, value = (spoilt, value) if "key" in fault else (key, spoilt)
            original(self, layer, key, value, *more)

        return update

    _replace(K8V4AttentionImpl, "do_kv_cache_update", make)


def _update_after_attention() -> None:
    from vllm_hybrid_kv.attention.backend import K8V4AttentionImpl

    kept: dict[int, tuple[Any, ...]] = {}
    updates: list[Callable[..., Any]] = []

    def make_update(original: Callable[..., Any]) -> Any:
        updates.append(original)

        def update(self: Any, *arguments: Any) -> None:
            kept[id(self)] = arguments

        return update

    def make_forward(original: Callable[..., Any]) -> Any:
        def forward(self: Any, *arguments: Any, **more: Any) -> Any:
            output = original(self, *arguments, **more)
            if id(self) in kept:
                updates[0](self, *kept.pop(id(self)))
            return output

        return forward

    _replace(K8V4AttentionImpl, "do_kv_cache_update", make_update)
    _replace(K8V4AttentionImpl, "forward", make_forward)


def _spoil_attention(fault: str) -> None:
    from vllm.distributed import get_tensor_model_parallel_rank

    from vllm_hybrid_kv.attention.backend import K8V4AttentionImpl

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

    _replace(K8V4AttentionImpl, "forward", make)


def _spoil_metadata(fault: str) -> None:
    from vllm_hybrid_kv.attention.metadata import K8V4MetadataBuilder

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
            # Steps of a few tokens for each request are those that verify drafts.
            if fault == "drafts one token short" and 1 < queries.max() <= 4:
                short = (cached & (queries > 1)).to(step.seq_lens.dtype)
                return replace(step, seq_lens=step.seq_lens - short)
            if fault == "drafts see each other" and 1 < queries.max() <= 4:
                return replace(step, causal=False)
            return step

        return build

    _replace(K8V4MetadataBuilder, "build", make)


# For a fault that has to be there before an engine starts.
if _fault := os.environ.get("PLANTED_KERNEL_FAULT"):
    plant(_fault)
