# SPDX-License-Identifier: Apache-2.0
"""The roofline picture: how close each contender comes to what the device can do."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.sections import Limits

_MARKERS = {"decode": "o", "verify": "s", "chunked": "^", "prefill": "D"}
_SAID = "circles: decode, squares: verification, triangles: chunks, diamonds: whole prompts"


def points(
    results: Iterable[Mapping[str, Any]],
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Return operations a byte of KV cache and 1e12 operations a second, by contender and section.

    Args:
        results: All that was measured.
    """
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for result in results:
        if result["section"] not in _MARKERS:
            continue
        for name, achieved in result.get("achieved", {}).items():
            intensity = achieved["tflop_s"] * 1e3 / achieved["gb_s"]
            found.setdefault((name, result["section"]), []).append((intensity, achieved["tflop_s"]))
    return found


def draw(
    results: Iterable[Mapping[str, Any]], limits: Limits, title: str, file: Path
) -> str | None:
    """Write the picture.

    Args:
        results: All that was measured.
        limits: The two roofs.
        title: The GPU.
        file: Where to.

    Returns:
        Why there is none, or None.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        return f"matplotlib: {error}"
    matplotlib.use("Agg")
    plot = importlib.import_module("matplotlib.pyplot")
    measured = points(results)
    if not measured:
        return "nothing was measured"
    figure, axes = plot.subplots(figsize=(9, 6))
    names = sorted({name for name, _ in measured}, key=lambda name: (name != "ours", name))
    intensities = [x for of_one in measured.values() for x, _ in of_one]
    low, high = 0.5 * min(intensities), 2 * max(intensities)
    ridge = limits.matmul_tflop_s * 1e3 / limits.copy_gb_s
    roof_at = sorted({low, ridge, max(high, ridge)})
    roof = [min(limits.matmul_tflop_s, x * limits.copy_gb_s / 1e3) for x in roof_at]
    axes.plot(roof_at, roof, color="black", label="copy bandwidth, bf16 product (measured)")
    for (name, section), of_one in measured.items():
        colour = f"C{names.index(name) % 10}"
        label = name if section == "decode" or (name, "decode") not in measured else None
        axes.scatter(*zip(*of_one, strict=True), s=26, marker=_MARKERS[section], color=colour,
                     label=label)  # fmt: skip
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations for a byte of KV cache in the format of the contender",
        ylabel="10^12 operations a second",
        title=title,
    )
    axes.text(0.01, 0.01, _SAID, transform=axes.transAxes, fontsize=7)
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plot.close(figure)
    return None
