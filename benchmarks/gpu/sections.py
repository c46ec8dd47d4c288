# SPDX-License-Identifier: Apache-2.0
"""Each kind of measurement: who competes, and what is noted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.contenders import Batch, Contender, Unavailable
from benchmarks.gpu.contenders.flash import (
    FlashAttnPackage,
    Sdpa,
    TorchFlash,
    VllmFlashBf16,
    VllmFlashFp8,
)
from benchmarks.gpu.contenders.flashinfer import FlashInferBf16, FlashInferFp8
from benchmarks.gpu.contenders.ours import Ours
from benchmarks.gpu.contenders.stock import Backend, Stock, empty_cache
from benchmarks.gpu.contenders.unified import UnifiedBf16, UnifiedFp8
from benchmarks.gpu.environment import free_bytes, l2_bytes
from benchmarks.gpu.measure import Call, Replay, alternating, ratio, spread
from benchmarks.gpu.shapes import PAGE, Job, Shape, bf16_bytes, k8v4_bytes, layers_needed
from vllm_hybrid_kv.kernels.triton import quantise_and_store

LAYERS_OF_A_MODEL = 16
"""Attention layers among which the plan of a step is divided: those of a hybrid model with 64
layers of which every fourth attends. Models without other layers have more."""

LARGEST_DISTANCE = 0.3
"""||out - ours|| / ||ours|| beyond which a contender does not compute the same thing. Values of 4
bits are 0.1 away from bf16 in the same measure on random data."""

SHARE_OF_MEMORY = 0.9
"""Of the free memory, what caches may take."""


class OursOneToken(Ours):
    """Ours with one new token a request, beside several."""

    name = "ours, one token"

    def __init__(self, batch: Batch, layers: int) -> None:
        super().__init__(Batch(replace(batch.shape, queries=1), batch.device), layers)


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
    """What the device can do, measured first.

    Attributes:
        copy_gb_s: Bytes read and written by a large copy, 1e9 a second.
        matmul_tflop_s: Of a large bf16 product.
    """

    copy_gb_s: float
    matmul_tflop_s: float


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_limits(copied_bytes: int, device: torch.device, seconds: float) -> Limits:
    """Measure the device's copy bandwidth and the rate of a large product.

    Args:
        copied_bytes: Bytes of the copy's source, many times the L2 cache.
        device: Where.
        seconds: Time that the rounds take, about.
    """
    source = torch.zeros(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if device.type == "cuda" else 32
    factors = torch.randn(2, size, size, device=device).to(torch.bfloat16)
    product = torch.empty((size, size), dtype=torch.bfloat16, device=device)
    times = alternating(
        {
            "copy": Replay([partial(target.copy_, source)], device),
            "matmul": Replay([partial(torch.matmul, *factors, out=product)], device),
        },
        seconds,
    )
    return Limits(
        2 * copied_bytes / spread(times["copy"]).median / 1e6,
        2 * size**3 / spread(times["matmul"]).median / 1e9,
    )


def build(
    competitors: Sequence[type[Contender]], batch: Batch, layers: int
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Make the contenders of a measurement, in order; what does not fit or fails is left out.

    Args:
        competitors: Their classes, ours first.
        batch: What is attended to.
        layers: Caches of each.

    Returns:
        Those that take part by name, and why the others do not.
    """
    shape, device = batch.shape, batch.device
    built: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    for competitor in competitors:
        needed = layers * shape.cache_bytes(competitor.token_bytes(shape.heads.size))
        free = SHARE_OF_MEMORY * free_bytes(device)
        if needed > free:
            left_out[competitor.name] = (
                f"its caches take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            )
            continue
        with _told(competitor, left_out):
            built[competitor.name] = competitor(batch, layers)
    return built, left_out


@contextmanager
def _told(competitor: type[Contender], left_out: dict[str, str]) -> Iterator[None]:
    """Leave a contender out if it fails, with the reason; ours must run, if memory is enough."""
    try:
        yield
    except Unavailable as error:
        left_out[competitor.name] = str(error)
    except Exception as error:
        if issubclass(competitor, Ours) and not isinstance(error, torch.OutOfMemoryError):
            raise
        left_out[competitor.name] = f"{type(error).__name__}: {str(error)[:300]}"


class AllDiffer(Exception):
    """Ours computes something else than every other contender."""


def distances(replays: Mapping[str, Replay]) -> dict[str, float]:
    """Return ||out - ours|| / ||ours|| of what contenders with as many new tokens computed.

    Raises:
        AllDiffer: Nobody's output is near ours.
    """
    ours = replays[Ours.name].result
    assert isinstance(ours, torch.Tensor)
    wanted = ours.float()
    found: dict[str, float] = {}
    for name, replay in replays.items():
        out = replay.result
        assert isinstance(out, torch.Tensor)
        if name != Ours.name and out.shape == wanted.shape:
            found[name] = float((out.float() - wanted).norm() / wanted.norm().clamp_min(1e-20))
    if found and not any(distance <= LARGEST_DISTANCE for distance in found.values()):
        raise AllDiffer(f"the output of ours differs from all others: {found}")
    return found


def calls_of(contender: Contender, layers: int, long: bool) -> list[Call]:
    """Return the calls of a graph: all layers in turn, and four calls unless they are long."""
    rounds = 1 if long else -(-4 // layers)
    calls: list[Call] = [partial(contender.attend, layer) for layer in range(layers)]
    return calls * rounds


def measure_attention(
    job: Job, device: torch.device, seconds: float, limits: Limits
) -> dict[str, Any]:
    """Measure all contenders of a section at a shape.

    Args:
        job: Which section and shape.
        device: Where.
        seconds: Time that the rounds take, about.
        limits: What the device can do.

    Returns:
        For JSON: median and quartiles of milliseconds, of ratios to ours, what they amount to, how
        far outputs are from ours, and who was left out why.

    Raises:
        Exception: Ours failed.
    """
    shape = job.shape
    assert shape is not None
    smallest = shape.cache_bytes(k8v4_bytes(shape.heads.size))
    layers = layers_needed(smallest, l2_bytes(device))
    batch = Batch(shape, device)
    built, left_out = build(COMPETITORS[job.section], batch, layers)
    # Without a GPU any call is a long one.
    long = smallest >= 1 << 30 or device.type != "cuda"
    replays, steps = _replays(built, left_out, layers, long, device)
    result: dict[str, Any] = {
        "section": job.section,
        "shape": shape.as_dict(),
        "layers": layers,
        "left_out": left_out,
        "notes": {name: built[name].note for name in replays if built[name].note},
    }
    if Ours.name not in replays:
        return result
    times = alternating(replays | steps, seconds)
    result["distance"] = distances(replays)
    for name, distance in result["distance"].items():
        if not distance <= LARGEST_DISTANCE:
            # Its time would be the time of other work.
            del times[name]
            left_out[name] = f"its output is {distance:.2f} of the size of ours away from ours"
    for name in steps:
        step = spread(times.pop(name))
        owner = name.removesuffix(_STEP)
        result.setdefault("once_a_step_ms", {})[owner] = asdict(step)
        times[owner] = [time + step.median / LAYERS_OF_A_MODEL for time in times[owner]]
    result["ms"], result["times_ours"] = medians_and_ratios(times)
    result["achieved"] = {
        name: achieved(
            built[name].token_bytes(shape.heads.size), shape, spread(times[name]).median, limits
        )
        for name in times
        if name == Ours.name or name in result["distance"]
    }
    del built, replays, steps
    _release(device)
    return result


def medians_and_ratios(
    times: Mapping[str, Sequence[float]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return milliseconds of each contender, and times as long as ours of the others."""
    ours = times[Ours.name]
    ratios = {name: asdict(ratio(of, ours)) for name, of in times.items() if name != Ours.name}
    return {name: asdict(spread(of)) for name, of in times.items()}, ratios


_STEP = ", once a step"


def _replays(
    built: Mapping[str, Contender],
    left_out: dict[str, str],
    layers: int,
    long: bool,
    device: torch.device,
) -> tuple[dict[str, Replay], dict[str, Replay]]:
    """Capture each contender, and what it does once a step; a failure is noted in `left_out`."""
    replays: dict[str, Replay] = {}
    steps: dict[str, Replay] = {}
    for name, contender in built.items():
        with _told(type(contender), left_out):
            replay = Replay(calls_of(contender, layers, long), device)
            if contender.once_a_step is not None:
                steps[name + _STEP] = Replay([contender.once_a_step], device)
            replays[name] = replay
    return replays, steps


def achieved(
    token_bytes: int, shape: Shape, milliseconds: float, limits: Limits
) -> dict[str, float]:
    """Return what a time amounts to.

    Args:
        token_bytes: Bytes of a token of one KV head in its cache.
        shape: The batch.
        milliseconds: Of a call.
        limits: What the device can do.

    Returns:
        KV bytes 1e9 a second, their share of the copy bandwidth, and 1e12 operations a second.
    """
    gb_s = shape.read_bytes(token_bytes) / milliseconds / 1e6
    return {
        "gb_s": gb_s,
        "share_of_copy": gb_s / limits.copy_gb_s,
        "tflop_s": shape.flops / milliseconds / 1e9,
    }


def stored_bytes(shape: Shape) -> int:
    """Bytes that storing a shape's tokens reads, in bf16, and writes, in k8v4."""
    heads = shape.heads
    return shape.tokens * heads.kv * (bf16_bytes(heads.size) + k8v4_bytes(heads.size))


def measure_store(job: Job, device: torch.device, seconds: float, limits: Limits) -> dict[str, Any]:
    """Measure quantise-and-store beside stock's and beside a copy of as many bytes in all.

    Args:
        job: Its shape's tokens are stored.
        device: Where.
        seconds: Time that the rounds take, about.
        limits: What the device can do.
    """
    shape = job.shape
    assert shape is not None
    total = stored_bytes(shape)
    layers = layers_needed(total, l2_bytes(device))
    batch = Batch(shape, device)
    key, value, slots = next(batch.stored())
    sources = [(key.clone(), value.clone()) for _ in range(layers)]
    left_out: dict[str, str] = {}
    calls: dict[str, list[Call]] = {
        Ours.name: _ours_storing(batch, sources, slots),
        "copy": _copying(total // 2, layers, device),
    }
    try:
        calls[Stock.name] = _stock_storing(batch, sources, slots)
    except Unavailable as error:
        left_out[Stock.name] = str(error)
    times = alternating({name: Replay(of, device) for name, of in calls.items()}, seconds)
    medians, ratios = medians_and_ratios(times)
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
            name: {
                "gb_s": total / median["median"] / 1e6,
                "share_of_copy": total / median["median"] / 1e6 / limits.copy_gb_s,
            }
            for name, median in medians.items()
        },
    }


_Sources = Sequence[tuple[torch.Tensor, torch.Tensor]]


def _ours_storing(batch: Batch, sources: _Sources, slots: torch.Tensor) -> list[Call]:
    heads = batch.shape.heads
    dims = (batch.pages, heads.kv, PAGE, k8v4_bytes(heads.size))
    return [
        partial(
            quantise_and_store,
            key,
            value,
            torch.zeros(dims, dtype=torch.uint8, device=batch.device),
            slots,
        )
        for key, value in sources
    ]


def _stock_storing(batch: Batch, sources: _Sources, slots: torch.Tensor) -> list[Call]:
    backend = Backend(batch)
    return [partial(backend.store, key, value, empty_cache(batch), slots) for key, value in sources]


def _copying(copied_bytes: int, layers: int, device: torch.device) -> list[Call]:
    pairs = [torch.zeros(2, copied_bytes, dtype=torch.uint8, device=device) for _ in range(layers)]
    return [partial(pair[0].copy_, pair[1]) for pair in pairs]


Measure = Callable[[Job, torch.device, float, Limits], dict[str, Any]]


def measure_of(section: str) -> Measure:
    """Return how the jobs of a section are measured, `bandwidth` aside."""
    return measure_store if section == "store" else measure_attention
