# SPDX-License-Identifier: Apache-2.0
"""Which engines are started, with which settings, and which are left out and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from testing.machine import has_compiled_extension

K8V4 = "turboquant_k8v4"
HYBRIDS = ("qwen3-next", "qwen3.5")
"""Models with Gated DeltaNet. vLLM can draft with a multi-token prediction layer for both."""

NUM_SPECULATIVE_TOKENS = 3
SPECULATION: dict[str, dict[str, Any]] = {
    "ngram": {
        "method": "ngram",
        "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    },
    "mtp": {"method": "mtp", "num_speculative_tokens": NUM_SPECULATIVE_TOKENS},
}

GRAPHS = {
    "piecewise graphs": "PIECEWISE",
    "full graphs": "FULL_AND_PIECEWISE",
    "full graphs, decode only": "FULL_DECODE_ONLY",
}
"""vLLM's `cudagraph_mode` by our name of it."""


@dataclass(frozen=True)
class Place:
    """What the engines run on.

    Attributes:
        device: vLLM's name of the platform's device type, such as "cuda" or "cpu".
        compiled: Whether vLLM's compiled extension is there.
        memory_bytes: Of the device.
    """

    device: str
    compiled: bool
    memory_bytes: int

    @property
    def has_graphs(self) -> bool:
        """Whether vLLM can capture graphs here."""
        return self.device != "cpu" and self.compiled


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
    """An engine's settings, as far as they differ from one engine to the next.

    Attributes:
        name: As it stands in the report.
        cache_dtype: vLLM's `kv_cache_dtype`.
        plugin: Whether this plugin is loaded; without, no plugin is.
        graphs: vLLM's `cudagraph_mode`; None runs eagerly.
        speculation: A key of `SPECULATION`, or None.
        chunk: Tokens of a step at most, which cuts longer prompts into chunks.
        prefix_caching: None leaves it as vLLM has it by default.
        runner: "0" and "1" ask for vLLM's first and second model runner, None leaves it to vLLM.
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
        """Return the arguments of `vllm.LLM` that follow from this."""
        found: dict[str, Any] = {
            "kv_cache_dtype": self.cache_dtype,
            "enforce_eager": self.graphs is None,
            "max_num_batched_tokens": self.chunk,
        }
        if self.graphs is not None:
            found["compilation_config"] = {"cudagraph_mode": self.graphs}
        if self.speculation is not None:
            found["speculative_config"] = SPECULATION[self.speculation]
            # Whether cached states stay right is what such a configuration checks.
            allowed = {"allow_unsafe_drafts": True}
            found["additional_config"] = {"hybrid_kv": allowed}
        if self.prefix_caching is not None:
            found["enable_prefix_caching"] = self.prefix_caching
        return found

    def environment(self) -> dict[str, str]:
        """Return the environment variables that follow from this."""
        found = {"VLLM_PLUGINS": "hybrid_kv" if self.plugin else ""}
        if self.runner is not None:
            found["VLLM_USE_V2_MODEL_RUNNER"] = self.runner
        return found

    def control(self) -> Configuration:
        """Return the same without the plugin and with an unquantised cache.

        What that engine cannot do is none of this plugin's fault.
        """
        return replace(self, name=f"{self.name}, auto", cache_dtype="auto", plugin=False)


@dataclass(frozen=True)
class LeftOut:
    """A configuration that is not tried.

    Attributes:
        name: Its name.
        reason: Why.
    """

    name: str
    reason: str


REFERENCE = Configuration("eager")
"""What the other engines of a model are compared with."""

AUTO = REFERENCE.control()
CHUNKS = Configuration("prompts in chunks of 96", chunk=96)


def to_check(
    model: str, place: Place, runner: str | None, second: bool
) -> tuple[list[Configuration], list[LeftOut]]:
    """Return what is compared with `REFERENCE`.

    Args:
        model: Its name.
        place: Where.
        runner: The model runner that all engines of the model are asked to use.
        second: Whether that, or else vLLM by itself, is its second model runner.
    """
    found, left_out = [CHUNKS], []
    if place.device == "cpu":
        left_out.append(LeftOut("the other model runner", "vLLM's second one needs a GPU"))
    elif runner == "0":
        left_out.append(LeftOut("the other model runner", "vLLM's second one failed with auto"))
    else:
        found.append(Configuration("the other model runner", runner="0" if second else "1"))
    graphs = [Configuration(name, graphs=mode) for name, mode in GRAPHS.items()]
    # A draft's verification is a batch of several tokens for each request, captured as such.
    methods = ["ngram", *(["mtp"] if model in HYBRIDS else [])]
    # What a hybrid caches while it speculates is vLLM's to choose.
    caching = None if model in HYBRIDS else True
    for method in methods:
        found.append(Configuration(method, speculation=method, prefix_caching=caching))
        if model in HYBRIDS:
            # Moving states for the cache takes kernels that CPUs lack.
            name = f"{method}, no prefix cache"
            if method == "ngram" and place.device == "cpu":
                reason = (
                    "vLLM's causal_conv1d_update_cpu was seen to stop here, seemingly where a "
                    "request gets fewer drafts than it had accepted before"
                )
                left_out.append(LeftOut(name, reason))
            else:
                found.append(Configuration(name, speculation=method, prefix_caching=False))
        graphs.append(
            Configuration(
                f"{method}, full graphs",
                graphs=GRAPHS["full graphs"],
                speculation=method,
                prefix_caching=caching,
            )
        )
    if place.has_graphs:
        found += graphs
    else:
        left_out += [LeftOut(graph.name, no_graphs(place)) for graph in graphs]
    if model not in HYBRIDS:
        left_out.append(LeftOut("mtp", "vLLM has no such drafting for this type of model"))
    return [replace(c, runner=c.runner or runner) for c in found], left_out


def no_graphs(place: Place) -> str:
    """Return why no graphs are captured."""
    if place.device == "cpu":
        return "CPUs have no graphs"
    return "vLLM's compiled extension is not there"


def to_time(
    model: str, place: Place, runner: str | None
) -> tuple[dict[str, list[Configuration]], list[LeftOut]]:
    """Return the engines whose speed is compared, by mode, and what is left out.

    The first of each mode is ours, the second has an unquantised cache.
    """
    modes = {"eager": Configuration("eager")}
    methods = ["ngram", *(["mtp"] if model in HYBRIDS else [])]
    for method in methods:
        modes[method] = Configuration(method, speculation=method)
    left_out = []
    if place.has_graphs:
        graphs = GRAPHS["full graphs"]
        modes |= {f"{n}, full graphs": replace(c, graphs=graphs) for n, c in list(modes.items())}
    else:
        left_out.append(LeftOut("with graphs", no_graphs(place)))
    if place.device == "cpu":
        left_out.append(
            LeftOut(
                "stock k8v4", "stock vLLM has none on CPUs: 0.32 computes nonsense, 0.33 refuses"
            )
        )
    found = {}
    for mode, base in modes.items():
        # Every request is to read pages of its own.
        base = replace(base, runner=runner, prefix_caching=False, chunk=8192)
        caches = {
            "k8v4": base,
            "auto": replace(base, cache_dtype="auto", plugin=False),
            "fp8": replace(base, cache_dtype="fp8", plugin=False),
        }
        if place.device != "cpu":
            caches["stock k8v4"] = replace(base, plugin=False)
        found[mode] = [replace(c, name=name) for name, c in caches.items()]
    return found, left_out
