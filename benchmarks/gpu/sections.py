# SPDX-License-Identifier: Apache-2.0
"""Run each kind of measurement: choose the contenders, and collect their results."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.contenders import (
    Batch,
    Contender,
    Ours,
    OursDecodes,
    OursOneToken,
    OursPrefills,
    TorchFlash,
)
from benchmarks.gpu.contenders.vllm_kernels import (
    OursInVllm,
    Stock,
    StockBackend,
    UnifiedBf16,
    UnifiedFp8,
    VllmFlashBf16,
    VllmFlashFp8,
)
from benchmarks.gpu.environment import device_for_kernels, interpreted, l2_bytes
from benchmarks.gpu.measure import Call, alternating, leaving_out, ratio, spread
from benchmarks.gpu.shapes import Job, Shape, layers_needed
from vllm_hybrid_kv.kernels.triton import quantise_and_store

LAYERS_OF_A_MODEL = 16
"""How many attention layers share the plan of a step: as in a hybrid model of 64 layers, of which
every fourth is an attention layer. Models with only attention layers have more."""

LARGEST_DISTANCE = 0.3
"""If ||out - ours|| / ||ours|| exceeds this, a contender does not compute the same. On random data,
4-bit values alone cause a distance of 0.1 from bf16."""

_PAGED: tuple[type[Contender], ...] = (
    Ours, Stock, VllmFlashBf16, VllmFlashFp8, TorchFlash, UnifiedFp8, UnifiedBf16,
)  # fmt: skip

CONTENDERS: Mapping[str, tuple[type[Contender], ...]] = {
    "decode": _PAGED,
    "verify": (*_PAGED, OursOneToken),
    "mixed": (Ours, OursDecodes, OursPrefills, OursInVllm, *_PAGED[1:]),
    "chunked": (Ours, OursInVllm, *_PAGED[1:]),
    "prefill": (Ours, OursInVllm, Stock, VllmFlashBf16, TorchFlash, UnifiedBf16),
}


def copy_bandwidth(seconds: float) -> float:
    """Measure how many GB (1e9 bytes) a large copy reads and writes per second."""
    device, copied_bytes = device_for_kernels(), 1 << (16 if interpreted() else 30)
    source = torch.zeros(copied_bytes, dtype=torch.uint8, device=device)
    calls = {"copy": [partial(source.clone().copy_, source)]}
    times = alternating(calls, device, seconds, {})
    return 2 * copied_bytes / spread(times["copy"])["median"] / 1e6


def build(
    contenders: Sequence[type[Contender]], batch: Batch, layers: int, left_out: dict[str, str]
) -> dict[str, Any]:
    """Make contenders that have caches for `layers` layers, except those in `left_out`.

    `left_out` gets the reason of each contender that cannot be made.
    """
    built: dict[str, Any] = {}
    for contender in contenders:
        if contender.name in left_out:
            continue
        with leaving_out(contender.name, left_out):
            built[contender.name] = contender(batch, layers)
    return built


def small(shape: Shape) -> Shape:
    """Return a shape with few tokens that uses the same kernels."""
    if interpreted():
        return shape
    new = tuple(min(count, 512) for count in shape.new)
    context = 0 if shape.new == shape.lengths else 256
    return Shape(shape.heads, tuple(context + count for count in new), new)


def compile_job(job: Job) -> None:
    """Fill Triton's cache on disk: every contender attends once, to few tokens."""
    if job.section not in CONTENDERS:
        return
    # A contender that fails here fails again when it is measured, and is reported then.
    with contextlib.suppress(Exception):
        built = build(CONTENDERS[job.section], Batch(small(job.shape), device_for_kernels()), 1, {})
        for contender in built.values():
            with contextlib.suppress(Exception):
                contender.attend(0)


def distances(outputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return how far each contender's output is from ours: ||out - ours|| / ||ours||.

    Contenders that compute another number of new tokens are skipped.

    Raises:
        RuntimeError: No output is close to ours.
    """
    ours = outputs[Ours.name].float()
    found = {
        name: float((out.float() - ours).norm() / ours.norm().clamp_min(1e-20))
        for name, out in outputs.items()
        if name != Ours.name and out.shape == ours.shape
    }
    if found and not any(distance <= LARGEST_DISTANCE for distance in found.values()):
        raise RuntimeError(f"the output of ours differs from all others: {found}")
    return found


def result_of(
    job: Job,
    layers: int,
    times: Mapping[str, Sequence[float]],
    moved_bytes: Mapping[str, int],
    bandwidth: float,
    left_out: Mapping[str, str],
    **more: Any,
) -> dict[str, Any]:
    """Describe a measurement for JSON, without times if our kernel was left out.

    Args:
        job: What was measured.
        layers: How many caches were used in turn.
        times: Milliseconds of each contender's samples.
        moved_bytes: Bytes that a call moves, for each contender whose speed is compared.
        bandwidth: The device's copy bandwidth, see `copy_bandwidth`.
        left_out: Why contenders were not measured.
        more: More keys.
    """
    result = {
        "section": job.section, "shape": job.shape.as_dict(), "layers": layers,
        "left_out": left_out, "notes": {}, **more,
    }  # fmt: skip
    if Ours.name not in times:
        return result
    ms = {name: spread(of) for name, of in times.items()}
    achieved = {}
    for name, count in moved_bytes.items():
        if name in ms:
            gb_s = count / ms[name]["median"] / 1e6
            achieved[name] = {"gb_s": gb_s, "share_of_copy": gb_s / bandwidth}
            if job.section != "store":
                achieved[name]["tflop_s"] = job.shape.flops / ms[name]["median"] / 1e9
    ratios = {name: ratio(of, times[Ours.name]) for name, of in times.items() if name != Ours.name}
    return result | {"ms": ms, "times_ours": ratios, "achieved": achieved}


def measure(job: Job, seconds: float, bandwidth: float, left_out: dict[str, str]) -> dict[str, Any]:
    """Measure all contenders of a job, except those in `left_out`; see `result_of`.

    Raises:
        Exception: Our kernel failed, or a contender broke the CUDA context.
    """
    of_section = _measure_store if job.section == "store" else _measure_attention
    device = device_for_kernels()
    try:
        return of_section(job, device, seconds, bandwidth, left_out)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure_attention(
    job: Job, device: torch.device, seconds: float, bandwidth: float, left_out: dict[str, str]
) -> dict[str, Any]:
    shape = job.shape
    layers = layers_needed(shape.read_bytes(Ours.stored), l2_bytes(device))
    built = build(CONTENDERS[job.section], Batch(shape, device), layers, left_out)
    outputs: dict[str, torch.Tensor] = {}
    calls: dict[str, list[Call]] = {}
    for name, contender in built.items():
        with leaving_out(name, left_out):
            outputs[name] = contender.attend(0)
            calls[name] = [partial(contender.attend, layer) for layer in range(layers)]
    if Ours.name not in outputs:
        return result_of(job, layers, {}, {}, bandwidth, left_out)
    apart = distances(outputs)
    for name, distance in apart.items():
        if not distance <= LARGEST_DISTANCE:
            # This contender computes something else, so do not compare its time.
            del calls[name]
            left_out[name] = f"its output is {distance:.2f} of the size of ours away from ours"
    plan = f"{Ours.name}, plan"
    calls[plan] = [built[Ours.name].plan]
    times = alternating(calls, device, seconds, left_out)
    step, alone = spread(times.pop(plan)), spread(times[Ours.name])
    share = step["median"] / LAYERS_OF_A_MODEL
    for name in times:
        if name.startswith(Ours.name):
            times[name] = [time + share for time in times[name]]
    comparable = [name for name in times if name == Ours.name or name in apart]
    return result_of(
        job, layers, times, {name: shape.read_bytes(built[name].stored) for name in comparable},
        bandwidth, left_out, distance=apart,
        notes={name: built[name].note for name in outputs if built[name].note},
        once_a_step_ms=step, kernel_ms=alone,
    )  # fmt: skip


def _measure_store(
    job: Job, device: torch.device, seconds: float, bandwidth: float, left_out: dict[str, str]
) -> dict[str, Any]:
    """Time our store kernel, vLLM's, and a copy that moves as many bytes."""
    moved = job.shape.stored_bytes
    layers = layers_needed(moved, l2_bytes(device))
    batch = Batch(job.shape, device)
    key, value, slots = next(batch.stored())
    sources = [(key.clone(), value.clone()) for _ in range(layers)]
    copied = torch.zeros(layers, 2, moved // 2, dtype=torch.uint8, device=device)
    calls: dict[str, list[Call]] = {
        Ours.name: [partial(quantise_and_store, *kv, Ours.empty_cache(batch), slots)
                    for kv in sources],
        "copy": [partial(target.copy_, source) for source, target in copied],
    }  # fmt: skip
    if Stock.name not in left_out:
        with leaving_out(Stock.name, left_out):
            stock = StockBackend(batch)
            calls[Stock.name] = [
                partial(stock.store, *kv, stock.empty_cache(), slots) for kv in sources
            ]
    for name, (first, *_) in calls.items():
        with leaving_out(name, left_out):
            first()
    times = alternating(calls, device, seconds, left_out)
    return result_of(job, layers, times, dict.fromkeys(times, moved), bandwidth, left_out)
