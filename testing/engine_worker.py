# SPDX-License-Identifier: Apache-2.0
"""Run vLLM engines in this process, one after another, on behalf of an `EngineHost`.

Importing vLLM takes many times as long as starting an engine of a small model, so one process
runs several engines. It shuts each one down before it starts the next.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from testing import planted_faults
from testing.engine_host import HandedOver, Output, Pages, execute_commands


def start_engine(**arguments: Any) -> Any:
    """Start and return a `vllm.LLM`. A process can start several, one after another."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    _let_vllm_scan_llvmlite()
    with _no_collections():
        try:
            return LLM(**arguments)
        except BaseException:
            # Otherwise the next engine would use the process groups of the failed engine.
            cleanup_dist_env_and_memory()
            raise


def stop_engine(llm: Any) -> None:
    """Stop the engine of a `vllm.LLM`. The caller must drop the object and collect garbage."""
    from vllm.distributed import cleanup_dist_env_and_memory

    with _no_collections():
        llm.llm_engine.engine_core.shutdown()
        llm.llm_engine = None
        cleanup_dist_env_and_memory()


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Skip `gc.collect`. An engine calls it eight times, at 0.3 s each, as it starts and ends."""
    collect = gc.collect
    gc.collect = lambda *_: 0
    try:
        yield
    finally:
        gc.collect = collect


def _let_vllm_scan_llvmlite() -> None:
    """Let an engine start in a process that has already imported numba.

    When a CPU worker of vLLM 0.32 starts, it calls `vars()` on every attribute of every module.
    llvmlite's library object returns a C function for any attribute, even `__dict__`, so the
    scan fails. `vllm serve` is not affected, because there each worker is a new process.
    """
    if "llvmlite.binding.ffi" in sys.modules:
        from llvmlite.binding import ffi

        ffi.lib._fntab["__dict__"] = {}


def greedy(max_tokens: int, **more: Any) -> Any:
    """Make sampling parameters for exactly `max_tokens` greedy tokens, with `more` added."""
    from vllm import SamplingParams

    # Two log-probabilities, because the second shows how close the choice was.
    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=2,
        **more,
    )


def read(output: Any) -> Output:
    """Convert a finished `vllm.RequestOutput`."""
    completion = output.outputs[0]
    logprobs, margins = [], []
    for token, candidates in zip(completion.token_ids, completion.logprobs, strict=True):
        values = sorted((c.logprob for c in candidates.values()), reverse=True)
        logprobs.append(candidates[token].logprob)
        margins.append(values[0] - values[1])
    prompt_logprobs = prompt_ranks = None
    if output.prompt_logprobs is not None:
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        of_prompt = [candidates[token] for token, candidates in pairs]
        prompt_logprobs = [candidate.logprob for candidate in of_prompt]
        prompt_ranks = [candidate.rank for candidate in of_prompt]
    tokens = list(completion.token_ids)
    return Output(
        tokens, logprobs, margins, prompt_logprobs, prompt_ranks, output.num_cached_tokens or 0
    )


class Worker:
    """Runs one engine at a time. `EngineHost` sends the names and arguments of its methods."""

    def __init__(self, llm: Any = None) -> None:
        self.llm = llm
        self._streams: list[str] = []
        self._count = 0
        self._preemptions = 0.0

    @property
    def _core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def _runner(self) -> Any:
        return self._core.model_executor.driver_worker.worker.model_runner

    def start(self, **arguments: Any) -> dict[str, Any]:
        """Start an engine and return facts about it."""
        extension = f"{planted_faults.__name__}.WorkerExtension"
        self.llm = start_engine(worker_extension_cls=extension, **arguments)
        from vllm_hybrid_kv.state import STATE

        config = self.llm.llm_engine.vllm_config
        compilation = config.compilation_config
        layers = compilation.static_forward_context.values()
        backends = [
            layer.get_attn_backend() for layer in layers if hasattr(layer, "get_attn_backend")
        ]
        names = (f"{b.__module__.partition('.')[0]}.{b.__qualname__}" for b in backends)
        return {
            "plugin": STATE.active_patches is not None,
            "runner": 2 if config.use_v2_model_runner else 1,
            "compiled": compilation.mode.name != "NONE",
            "graphs": compilation.cudagraph_mode.name,
            "backends": dict(Counter(names)),
            "block_size": config.cache_config.block_size,
            "capacity_tokens": config.cache_config.kv_cache_size_tokens,
        }

    def stop(self) -> None:
        if self.llm is not None:
            stop_engine(self.llm)
            self.llm = None
            gc.collect()

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        prompt_logprobs: bool = False,
        alone: bool = False,
        fresh: bool = False,
        seed: int | None = None,
        salt: str | None = None,
    ) -> list[Output]:
        """Send greedy requests, or requests at temperature 1 if there is a `seed`.

        `prompt_logprobs` also returns the log-probabilities of the prompts; vLLM then reads no
        cached prefix. `alone` sends one request after another instead of all at once. `fresh`
        resets the prefix cache and a host tier before each batch. `salt` is vLLM's `cache_salt`.
        """
        sampling = greedy(max_tokens, prompt_logprobs=0 if prompt_logprobs else None)
        if seed is not None:
            sampling.temperature, sampling.seed = 1.0, seed
        salted = {"cache_salt": salt} if salt else {}
        requests = [{"prompt_token_ids": prompt, **salted} for prompt in prompts]
        outputs = []
        for batch in [[r] for r in requests] if alone else [requests]:
            if fresh and not self.llm.reset_prefix_cache(reset_connector=True):
                raise RuntimeError("the prefix cache could not be reset")
            outputs += self.llm.generate(batch, sampling, use_tqdm=False)
        return [read(output) for output in outputs]

    def hand_over(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int,
        params: Sequence[dict[str, Any] | None],
    ) -> list[HandedOver]:
        """Send greedy requests one after another, each with its parameters for the connector."""
        engine, scheduler = self.llm.llm_engine, self._core.scheduler
        manager = scheduler.kv_cache_manager
        handed = []
        for prompt, given in zip(prompts, params, strict=True):
            extra = {"kv_transfer_params": given} if given else None
            sampling = greedy(max_tokens, extra_args=extra)
            engine.add_request("handed over", {"prompt_token_ids": prompt}, sampling)
            blocks: tuple[list[int], ...] = ()
            arrived, finished = None, None
            while engine.has_unfinished_requests():
                for request in scheduler.finished_recving_kv_req_ids:
                    # Read the blocks before a step appends to them.
                    arrived = self.pages(manager.get_block_ids(request))
                for request in scheduler.running:
                    blocks = manager.get_block_ids(request.request_id)
                for output in engine.step():
                    finished = output if output.finished else finished
            assert finished is not None
            handed.append(HandedOver(read(finished), finished.kv_transfer_params, blocks, arrived))
        return handed

    def pages(self, blocks: tuple[list[int], ...]) -> Pages:
        """Return the contents of blocks in each worker. `blocks` lists ids by KV group."""
        return self.llm.collective_rpc("read_pages", args=(blocks,))

    def metrics(self) -> dict[str, float]:
        """Return vLLM's counters and gauges by name."""
        return {m.name: m.value for m in self.llm.get_metrics() if hasattr(m, "value")}

    def layers(self) -> dict[str, dict[str, Any]]:
        """Return backend, block size and page size of each layer with a KV cache."""
        layers = {}
        for groups in self._runner.attn_groups:
            for group in groups:
                spec = group.kv_cache_spec
                for name in group.layer_names:
                    layers[name] = {
                        "backend": f"{group.backend.__module__}.{group.backend.__qualname__}",
                        "block_size": spec.block_size,
                        "page_bytes": spec.page_size_bytes,
                        "content_bytes": getattr(spec, "real_page_size_bytes", None),
                    }
        return layers

    def plan(self) -> dict[str, Any]:
        """Return the plan of the engine's KV cache, and the capacity that vLLM reports."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        scheduler = self._core.scheduler
        planned = scheduler.kv_cache_config
        # The runner's plan has a spec for each layer; the scheduler's has one for each group.
        pages = []
        for number, group in enumerate(self._runner.kv_cache_config.kv_cache_groups):
            spec = group.kv_cache_spec
            by_layer = getattr(spec, "kv_cache_specs", dict.fromkeys(group.layer_names, spec))
            for name in group.layer_names:
                page = by_layer[name]
                pages.append((number, name, page.block_size, page.page_size_bytes))
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        return {
            "blocks": planned.num_blocks,
            "num_gpu_blocks": cache.num_gpu_blocks,
            "bytes": planned.kv_cache_tensors[0].size,
            "pages": pages,
            "reported_tokens": cache.kv_cache_size_tokens,
            "reported_concurrency": cache.kv_cache_max_concurrency,
            "match_tokens": managers[0].cache_hit_alignment_tokens,
            "scheduler_block_tokens": scheduler.block_size,
        }

    def plant(self, fault: str | None) -> None:
        """Plant one of `planted_faults` in every worker; None removes it."""
        if self.llm is None:
            planted_faults.plant(fault)
        else:
            self.llm.collective_rpc("plant_fault", args=(fault,))

    def begin_decoding(self, prompts: list[list[int]], max_tokens: int) -> None:
        """Start requests and run steps until each has produced a token."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine = self.llm.llm_engine
        self._preemptions = self.metrics()["vllm:num_preemptions"]
        for prompt in prompts:
            self._count += 1
            name = f"stream-{self._count}"
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
            self._streams.append(name)
        waiting = set(self._streams)
        while waiting:
            if not engine.has_unfinished_requests():
                raise RuntimeError(f"{len(waiting)} requests ended without a token")
            for output in engine.step():
                if output.outputs[0].token_ids:
                    waiting.discard(output.request_id)

    def decode(self, steps: int) -> tuple[float, int]:
        """Run timed steps of the `begin_decoding` requests; return seconds and tokens."""
        engine = self.llm.llm_engine
        # The first step is not timed, because the device may have run other engines.
        engine.step()
        tokens = 0
        began = time.perf_counter()
        for _ in range(steps):
            for output in engine.step():
                if output.finished:
                    raise RuntimeError("a request ended while it was timed")
                tokens += len(output.outputs[0].token_ids)
        seconds = time.perf_counter() - began
        if not tokens:
            raise RuntimeError(f"{steps} steps produced no token")
        return seconds, tokens

    def end_decoding(self) -> int:
        """Abort the requests of `begin_decoding`; return the preemptions since then."""
        engine = self.llm.llm_engine
        engine.abort_request(self._streams)
        self._streams = []
        while engine.has_unfinished_requests():
            engine.step()
        return int(self.metrics()["vllm:num_preemptions"] - self._preemptions)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        from testing.triton.processes import interpret_faster

        interpret_faster()
    worker = Worker()
    execute_commands(partial(getattr, worker), worker.stop)


if __name__ == "__main__":
    main()
