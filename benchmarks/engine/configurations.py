# SPDX-License-Identifier: Apache-2.0
"""Choose which engines to start, with which settings, and say why others are skipped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from testing.machine import has_compiled_extension
from testing.model_cases import NGRAM
from testing.output_comparison import UNQUANTISED_ENDS

K8V4 = "turboquant_k8v4"
HYBRIDS = ("qwen3-next", "qwen3.5")
"""Models with Gated DeltaNet. vLLM can draft with a multi-token prediction layer for both."""

NUM_SPECULATIVE_TOKENS = 3
SPECULATION: dict[str, dict[str, Any]] = {
    "ngram": {**NGRAM, "num_speculative_tokens": NUM_SPECULATIVE_TOKENS},
    "mtp": {"method": "mtp", "num_speculative_tokens": NUM_SPECULATIVE_TOKENS},
}

FULL_GRAPHS = "FULL_AND_PIECEWISE"
GRAPHS = {
    "piecewise graphs": "PIECEWISE",
    "full graphs": FULL_GRAPHS,
    "full graphs, decode only": "FULL_DECODE_ONLY",
}
"""Our names for the values of vLLM's `cudagraph_mode`."""


@dataclass(frozen=True)
class Place:
    """The machine: device type, memory, and whether vLLM's compiled extension is installed."""

    device: str
    compiled: bool
    memory_bytes: int

    @property
    def why_no_graphs(self) -> str:
        """The reason why vLLM cannot capture graphs; empty if it can."""
        if self.device == "cpu":
            return "CPUs have no graphs"
        return "" if self.compiled else "no compiled vLLM extension"


def find_place() -> Place:
    """Describe the machine that vLLM runs on.

    Raises:
        ImportError: vLLM is not installed.
        RuntimeError: vLLM finds no device.
    """
    from vllm.platforms import current_platform

    device = current_platform.device_type
    if not device:
        raise RuntimeError("vLLM finds no device here that it can run on")
    return Place(device, has_compiled_extension(), current_platform.get_device_total_memory())


@dataclass(frozen=True)
class Configuration:
    """The settings in which engines differ.

    Attributes:
        cache_dtype: vLLM's `kv_cache_dtype`.
        plugin: Load this plugin; otherwise no plugin is loaded.
        graphs: vLLM's `cudagraph_mode`; None runs eagerly.
        speculation: A key of `SPECULATION`, or None.
        chunk: Maximum number of tokens of a step; longer prompts are cut into chunks.
        prefix_caching: None uses vLLM's default.
        runner: "0" or "1" selects vLLM's first or second model runner, None uses the default.
    """

    name: str
    cache_dtype: str = K8V4
    plugin: bool = True
    graphs: str | None = None
    speculation: str | None = None
    chunk: int = 2048
    prefix_caching: bool | None = True
    runner: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `vllm.LLM`."""
        settings: dict[str, Any] = dict(UNQUANTISED_ENDS)
        found: dict[str, Any] = {
            "kv_cache_dtype": self.cache_dtype,
            "enforce_eager": self.graphs is None,
            "max_num_batched_tokens": self.chunk,
            "enable_prefix_caching": self.prefix_caching,
            "additional_config": {"hybrid_kv": settings},
        }
        if self.graphs is not None:
            found["compilation_config"] = {"cudagraph_mode": self.graphs}
        if self.speculation is not None:
            found["speculative_config"] = SPECULATION[self.speculation]
            # Start even if drafts can corrupt cached states: comparing outputs would show it.
            settings["allow_unsafe_drafts"] = True
        return found

    def environment(self) -> dict[str, str]:
        found = {"VLLM_PLUGINS": "hybrid_kv" if self.plugin else ""}
        if self.runner is not None:
            found["VLLM_USE_V2_MODEL_RUNNER"] = self.runner
        return found

    def control(self) -> Configuration:
        """Return a copy without plugin and quantisation. If its engine fails, vLLM is at fault."""
        return replace(self, name=f"{self.name}, auto", cache_dtype="auto", plugin=False)


Skipped = dict[str, str]
"""Maps the name of each skipped configuration to the reason."""

REFERENCE = Configuration("eager")
"""The engine with which the other engines of a model are compared."""

AUTO = REFERENCE.control()
CHUNKS = Configuration("prompts in chunks of 96", chunk=96)


def to_check(model: str, place: Place, second: bool) -> tuple[list[Configuration], Skipped]:
    """Return the engines that are compared with `REFERENCE`, and those that are skipped.

    `second` says whether the model runs on vLLM's second model runner by default.
    """
    found, skipped = [CHUNKS], {}
    other_runner = "the other model runner"
    if place.device == "cpu":
        skipped[other_runner] = "vLLM's second one needs a GPU"
    else:
        found.append(Configuration(other_runner, runner="0" if second else "1"))
    graphs = [Configuration(name, graphs=mode) for name, mode in GRAPHS.items()]
    for method in _methods(model):
        drafts = Configuration(method, speculation=method)
        if model in HYBRIDS:
            # Let vLLM decide whether a hybrid model uses prefix caching while it speculates.
            drafts = replace(drafts, prefix_caching=None)
        found.append(drafts)
        # Steps that verify drafts, with several tokens per request, are captured as graphs too.
        graphs.append(replace(drafts, name=f"{method}, full graphs", graphs=FULL_GRAPHS))
    if place.why_no_graphs:
        skipped |= {graph.name: place.why_no_graphs for graph in graphs}
    else:
        found += graphs
    if model not in HYBRIDS:
        skipped["mtp"] = "vLLM has no such drafting for this type of model"
    return found, skipped


def _methods(model: str) -> list[str]:
    return ["ngram", "mtp"] if model in HYBRIDS else ["ngram"]


def to_time(model: str, place: Place) -> tuple[dict[str, list[Configuration]], Skipped]:
    """Return the engines to time, by mode, and those that are skipped.

    In each mode, the first engine is ours and the second one has an unquantised cache.
    """
    modes = {"eager": REFERENCE}
    for method in _methods(model):
        modes[method] = Configuration(method, speculation=method)
    skipped = {}
    if place.why_no_graphs:
        skipped["with graphs"] = place.why_no_graphs
    else:
        modes |= {f"{n}, full graphs": replace(c, graphs=FULL_GRAPHS) for n, c in modes.items()}
    if place.device == "cpu":
        skipped["stock k8v4"] = "stock vLLM has none on CPUs: 0.32 computes nonsense, 0.33 refuses"
    found = {}
    for mode, base in modes.items():
        # No prefix caching, because every request must read its own pages.
        ours = replace(base, name="k8v4", prefix_caching=False, chunk=8192)
        others = {"auto": "auto", "fp8": "fp8"}
        if place.device != "cpu":
            others["stock k8v4"] = K8V4
        stock = [
            replace(ours, name=name, cache_dtype=dtype, plugin=False)
            for name, dtype in others.items()
        ]
        found[mode] = [ours, *stock]
    return found, skipped
