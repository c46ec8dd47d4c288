# SPDX-License-Identifier: Apache-2.0
"""Each kind of measurement: the contenders and their results."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.contenders import Batch, Contender
from benchmarks.gpu.contenders.libraries import (
    FlashAttnPackage,
    FlashInferBf16,
    FlashInferFp8,
    Sdpa,
    TorchFlash,
)
from benchmarks.gpu.contenders.ours import Ours, OursOneToken, empty_cache
from benchmarks.gpu.contenders.vllm_kernels import (
    Stock,
    StockBackend,
    UnifiedBf16,
    UnifiedFp8,
    VllmFlashBf16,
    VllmFlashFp8,
)
from benchmarks.gpu.environment import Unavailable, free_bytes, l2_bytes
from benchmarks.gpu.measure import Call, alternating, ratio, spread
from benchmarks.gpu.shapes import Job, layers_needed
from vllm_hybrid_kv.kernels.triton import quantise_and_store

LAYERS_OF_A_MODEL = 16
"""Attention layers that share the plan of a step: those of a hybrid model with 64 layers of which
every fourth attends. Models without other layers have more."""

LARGEST_DISTANCE = 0.3
"""||out - ours|| / ||ours|| beyond which a contender does not compute the same. On random data
values of 4 bits are 0.1 away from bf16."""

SHARE_OF_MEMORY = 0.9
"""Largest share of the free memory that caches take."""

_PAGED: tuple[type[Contender], ...] = (
    Ours, Stock, UnifiedFp8, UnifiedBf16, VllmFlashBf16, VllmFlashFp8, FlashInferBf16,
    FlashInferFp8, FlashAttnPackage,
)  # fmt: skip

COMPETITORS: Mapping[str, tuple[type[Contender], ...]] = {
    "decode": _PAGED,
    "verify": (*_PAGED, OursOneToken),
    "chunked": (*_PAGED, TorchFlash),
    "prefill": (Ours, Stock, VllmFlashBf16, FlashInferBf16, TorchFlash, Sdpa, UnifiedBf16),
}


@dataclass(frozen=True)
class Limits:
    """The measured limits of the device.

    Attributes:
        copy_gb_s: Bytes read and written by a large copy, 1e9 a second.
        matmul_tflop_s: Operations of a large bf16 product, 1e12 a second.
    """

    copy_gb_s: float
    matmul_tflop_s: float


def measure_limits(copied_bytes: int, device: torch.device, seconds: float) -> Limits:
    """Measure the device's copy bandwidth and the rate of a large product."""
    source = torch.zeros(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if device.type == "cuda" else 32
    factors = torch.randn(2, size, size, device=device).to(torch.bfloat16)
    product = torch.empty((size, size), dtype=torch.bfloat16, device=device)
    calls: dict[str, list[Call]] = {
        "copy": [partial(target.copy_, source)],
        "matmul": [partial(torch.matmul, *factors, out=product)],
    }
    times, errors = alternating(calls, device, seconds)
    for error in errors.values():
        raise error
    return Limits(
        2 * copied_bytes / spread(times["copy"]).median / 1e6,
        2 * size**3 / spread(times["matmul"]).median / 1e9,
    )


def build(
    competitors: Sequence[type[Contender]], batch: Batch, layers: int
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Make the contenders of a measurement.

    Args:
        competitors: Their classes, ours first.
        batch: The batch.
        layers: Caches of each.

    Returns:
        The contenders by name, and why others are left out: too little memory, or an error.
    """
    built: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    for competitor in competitors:
        needed = layers * batch.shape.cache_bytes(competitor.stored)
        free = SHARE_OF_MEMORY * free_bytes(batch.device)
        if needed > free:
            left_out[competitor.name] = (
                f"its caches take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            )
            continue
        with _leaving_out(competitor.name, left_out):
            built[competitor.name] = competitor(batch, layers)
    return built, left_out


@contextmanager
def _leaving_out(name: str, left_out: dict[str, str]) -> Iterator[None]:
    """Leave a contender out if it fails, with the reason; ours may only run out of memory."""
    try:
        yield
    except Unavailable as error:
        left_out[name] = str(error)
    except Exception as error:
        if name.startswith(Ours.name) and not isinstance(error, torch.OutOfMemoryError):
            raise
        left_out[name] = f"{type(error).__name__}: {str(error)[:300]}"


class AllDiffer(Exception):
    """The output of ours differs from every other contender's."""


def distances(outputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return ||out - ours|| / ||ours|| of the contenders with as many new tokens.

    Raises:
        AllDiffer: No output is close to ours.
    """
    ours = outputs[Ours.name].float()
    found = {
        name: float((out.float() - ours).norm() / ours.norm().clamp_min(1e-20))
        for name, out in outputs.items()
        if name != Ours.name and out.shape == ours.shape
    }
    if found and not any(distance <= LARGEST_DISTANCE for distance in found.values()):
        raise AllDiffer(f"the output of ours differs from all others: {found}")
    return found


def medians_and_ratios(
    times: Mapping[str, Sequence[float]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return milliseconds of each contender, and the ratios of the others' times to ours."""
    ours = times[Ours.name]
    ratios = {name: asdict(ratio(of, ours)) for name, of in times.items() if name != Ours.name}
    return {name: asdict(spread(of)) for name, of in times.items()}, ratios


def achieved(
    moved_bytes: int, milliseconds: float, limits: Limits, flops: int | None = None
) -> dict[str, float]:
    """Return 1e9 bytes a second, their share of the copy bandwidth, and 1e12 operations a second.

    Args:
        moved_bytes: Bytes of a call.
        milliseconds: Time of a call.
        limits: Of the device.
        flops: Operations of a call, if they count.
    """
    gb_s = moved_bytes / milliseconds / 1e6
    found = {"gb_s": gb_s, "share_of_copy": gb_s / limits.copy_gb_s}
    return found if flops is None else found | {"tflop_s": flops / milliseconds / 1e9}


def _times(
    calls: Mapping[str, Sequence[Call]],
    left_out: dict[str, str],
    device: torch.device,
    seconds: float,
) -> dict[str, list[float]]:
    """Measure contenders; those that fail are left out."""
    times, errors = alternating(calls, device, seconds)
    for name, error in errors.items():
        with _leaving_out(name, left_out):
            raise error
    return times


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


_STEP = ", once a step"


def measure_attention(
    job: Job, device: torch.device, seconds: float, limits: Limits
) -> dict[str, Any]:
    """Measure all contenders of a section at a shape.

    Returns:
        For JSON: median and quartiles of milliseconds, of ratios to ours, bandwidth and operations,
        the distance of each output from ours, and who was left out why.

    Raises:
        Exception: Ours failed.
    """
    shape = job.shape
    assert shape is not None
    layers = layers_needed(shape.cache_bytes(Ours.stored), l2_bytes(device))
    built, left_out = build(COMPETITORS[job.section], Batch(shape, device), layers)
    outputs: dict[str, torch.Tensor] = {}
    calls: dict[str, list[Call]] = {}
    for name, contender in built.items():
        with _leaving_out(name, left_out):
            outputs[name] = contender.attend(0)
            calls[name] = [partial(contender.attend, layer) for layer in range(layers)]
            if contender.once_a_step is not None:
                contender.once_a_step()
                calls[name + _STEP] = [contender.once_a_step]
    result: dict[str, Any] = {
        "section": job.section,
        "shape": shape.as_dict(),
        "layers": layers,
        "left_out": left_out,
        "notes": {name: built[name].note for name in outputs if built[name].note},
    }
    if Ours.name not in outputs:
        return result
    result["distance"] = distances(outputs)
    for name, distance in result["distance"].items():
        if not distance <= LARGEST_DISTANCE:
            # Its time would be that of different work.
            del calls[name]
            left_out[name] = f"its output is {distance:.2f} of the size of ours away from ours"
    times = _times(calls, left_out, device, seconds)
    if Ours.name not in times:
        return result
    for name in [name for name in times if name.endswith(_STEP)]:
        step = spread(times.pop(name))
        owner = name.removesuffix(_STEP)
        if owner not in times:
            continue
        result.setdefault("once_a_step_ms", {})[owner] = asdict(step)
        times[owner] = [time + step.median / LAYERS_OF_A_MODEL for time in times[owner]]
    result["ms"], result["times_ours"] = medians_and_ratios(times)
    result["achieved"] = {
        name: achieved(
            shape.read_bytes(built[name].stored), spread(of).median, limits, shape.flops
        )
        for name, of in times.items()
        if name == Ours.name or name in result["distance"]
    }  # fmt: skip
    del built, calls, outputs
    _release(device)
    return result


def measure_store(job: Job, device: torch.device, seconds: float, limits: Limits) -> dict[str, Any]:
    """Measure quantise-and-store, stock's, and a copy of as many bytes; see `measure_attention`."""
    shape = job.shape
    assert shape is not None
    layers = layers_needed(shape.stored_bytes, l2_bytes(device))
    batch = Batch(shape, device)
    left_out: dict[str, str] = {}
    calls = _storing(batch, layers, left_out)
    for name, (first, *_) in calls.items():
        with _leaving_out(name, left_out):
            first()
    medians, ratios = medians_and_ratios(_times(calls, left_out, device, seconds))
    del calls
    _release(device)
    return {
        "section": job.section,
        "shape": shape.as_dict(),
        "layers": layers,
        "left_out": left_out,
        "notes": {},
        "ms": medians,
        "times_ours": ratios,
        "achieved": {
            name: achieved(shape.stored_bytes, median["median"], limits)
            for name, median in medians.items()
        },
    }


def _storing(batch: Batch, layers: int, left_out: dict[str, str]) -> dict[str, list[Call]]:
    key, value, slots = next(batch.stored())
    sources = [(key.clone(), value.clone()) for _ in range(layers)]
    copied = [
        torch.zeros(2, batch.shape.stored_bytes // 2, dtype=torch.uint8, device=batch.device)
        for _ in sources
    ]
    calls: dict[str, list[Call]] = {
        Ours.name: [partial(quantise_and_store, *kv, empty_cache(batch), slots) for kv in sources],
        "copy": [partial(pair[0].copy_, pair[1]) for pair in copied],
    }
    with _leaving_out(Stock.name, left_out):
        backend = StockBackend(batch)
        calls[Stock.name] = [
            partial(backend.store, *kv, backend.empty_cache(), slots) for kv in sources
        ]
    return calls
