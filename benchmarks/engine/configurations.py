# SPDX-License-Identifier: Apache-2.0
"""The engines that are started, their settings, and the ones that are skipped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from testing.machine import has_compiled_extension
from testing.model_cases import NGRAM

K8V4 = "turboquant_k8v4"
HYBRIDS = ("qwen3-next", "qwen3.5")
"""Models with Gated DeltaNet. vLLM can draft with a multi-token prediction layer for both."""

NUM_SPECULATIVE_TOKENS = 3
SPECULATION: dict[str, dict[str, Any]] = {
    "ngram": {**NGRAM, "num_speculative_tokens": NUM_SPECULATIVE_TOKENS},
    "mtp": {"method": "mtp", "num_speculative_tokens": NUM_SPECULATIVE_TOKENS},
}

GRAPHS = {
    "piecewise graphs": "PIECEWISE",
    "full graphs": "FULL_AND_PIECEWISE",
    "full graphs, decode only": "FULL_DECODE_ONLY",
}
"""Our names of vLLM's `cudagraph_mode`s."""


@dataclass(frozen=True)
class Place:
    """The device that the engines run on.

    Attributes:
        device: vLLM's device type, such as "cuda" or "cpu".
        compiled: Whether vLLM's compiled extension is installed.
    """

    device: str
    compiled: bool
    memory_bytes: int

    @property
    def has_graphs(self) -> bool:
        """Whether vLLM can capture graphs."""
        return self.device != "cpu" and self.compiled

    @property
    def why_no_graphs(self) -> str:
        """The reason if vLLM cannot capture graphs."""
        return "CPUs have no graphs" if self.device == "cpu" else "no compiled vLLM extension"


def find_place() -> Place:
    """Return the place that vLLM runs on here.

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
        found: dict[str, Any] = {
            "kv_cache_dtype": self.cache_dtype,
            "enforce_eager": self.graphs is None,
            "max_num_batched_tokens": self.chunk,
        }
        if self.graphs is not None:
            found["compilation_config"] = {"cudagraph_mode": self.graphs}
        if self.speculation is not None:
            found["speculative_config"] = SPECULATION[self.speculation]
            # This benchmark checks whether cached states stay correct with drafts.
            found["additional_config"] = {"hybrid_kv": {"allow_unsafe_drafts": True}}
        if self.prefix_caching is not None:
            found["enable_prefix_caching"] = self.prefix_caching
        return found

    def environment(self) -> dict[str, str]:
        """Return the environment variables."""
        found = {"VLLM_PLUGINS": "hybrid_kv" if self.plugin else ""}
        if self.runner is not None:
            found["VLLM_USE_V2_MODEL_RUNNER"] = self.runner
        return found

    def control(self) -> Configuration:
        """Return the same without the plugin and with an unquantised cache.

        If that engine fails too, the failure is vLLM's.
        """
        return replace(self, name=f"{self.name}, auto", cache_dtype="auto", plugin=False)


@dataclass(frozen=True)
class Skipped:
    """A configuration that is not run, and the reason."""

    name: str
    reason: str


REFERENCE = Configuration("eager")
"""The engine with which the other engines of a model are compared."""

AUTO = REFERENCE.control()
CHUNKS = Configuration("prompts in chunks of 96", chunk=96)


def to_check(
    model: str, place: Place, runner: str | None, second: bool
) -> tuple[list[Configuration], list[Skipped]]:
    """Return the engines that are compared with `REFERENCE`, and those that are skipped.

    Args:
        runner: The model runner that all engines of the model must use, if any.
        second: Whether the model's engines run on vLLM's second model runner.
    """
    found, skipped = [CHUNKS], []
    other_runner = "the other model runner"
    if place.device == "cpu":
        skipped.append(Skipped(other_runner, "vLLM's second one needs a GPU"))
    elif runner == "0":
        skipped.append(Skipped(other_runner, "vLLM's second one failed with auto"))
    else:
        found.append(Configuration(other_runner, runner="0" if second else "1"))
    graphs = [Configuration(name, graphs=mode) for name, mode in GRAPHS.items()]
    # vLLM chooses what a hybrid caches while it speculates.
    caching = None if model in HYBRIDS else True
    for method in _methods(model):
        drafts = Configuration(method, speculation=method, prefix_caching=caching)
        found.append(drafts)
        uncached = replace(drafts, name=f"{method}, no prefix cache", prefix_caching=False)
        # Moving states for the cache takes kernels that CPUs lack.
        if model in HYBRIDS and method == "ngram" and place.device == "cpu":
            reason = (
                "vLLM's causal_conv1d_update_cpu stopped here, apparently when a request got "
                "fewer drafts than it had accepted before"
            )
            skipped.append(Skipped(uncached.name, reason))
        elif model in HYBRIDS:
            found.append(uncached)
        # The verification of drafts, several tokens for each request, is captured as a graph too.
        graphs.append(replace(drafts, name=f"{method}, full graphs", graphs=GRAPHS["full graphs"]))
    if place.has_graphs:
        found += graphs
    else:
        skipped += [Skipped(graph.name, place.why_no_graphs) for graph in graphs]
    if model not in HYBRIDS:
        skipped.append(Skipped("mtp", "vLLM has no such drafting for this type of model"))
    return [replace(c, runner=c.runner or runner) for c in found], skipped


def _methods(model: str) -> list[str]:
    return ["ngram", "mtp"] if model in HYBRIDS else ["ngram"]


def to_time(
    model: str, place: Place, runner: str | None
) -> tuple[dict[str, list[Configuration]], list[Skipped]]:
    """Return the engines to time, by mode, and those that are skipped.

    The first of each mode is ours, the second has an unquantised cache.
    """
    modes = {"eager": REFERENCE}
    for method in _methods(model):
        modes[method] = Configuration(method, speculation=method)
    skipped = []
    if place.has_graphs:
        graphs = GRAPHS["full graphs"]
        modes |= {f"{n}, full graphs": replace(c, graphs=graphs) for n, c in list(modes.items())}
    else:
        skipped.append(Skipped("with graphs", place.why_no_graphs))
    if place.device == "cpu":
        reason = "stock vLLM has none on CPUs: 0.32 computes nonsense, 0.33 refuses"
        skipped.append(Skipped("stock k8v4", reason))
    found = {}
    for mode, base in modes.items():
        # Every request must read pages of its own.
        base = replace(base, runner=runner, prefix_caching=False, chunk=8192)
        caches = {
            "k8v4": base,
            "auto": replace(base, cache_dtype="auto", plugin=False),
            "fp8": replace(base, cache_dtype="fp8", plugin=False),
        }
        if place.device != "cpu":
            caches["stock k8v4"] = replace(base, plugin=False)
        found[mode] = [replace(c, name=name) for name, c in caches.items()]
    return found, skipped
