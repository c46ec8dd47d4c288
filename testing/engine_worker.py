# SPDX-License-Identifier: Apache-2.0
"""A process that runs vLLM engines, one after another, and does what its parent asks.

Run by `engine_host.EngineHost`. Importing vLLM takes many times as long as starting an engine
of a small model, so one process serves several engines; each is shut down before the next.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from testing import handed_over, planted_plans, requests
from testing.handed_over import Handed
from testing.requests import Output


class Worker:
    """One engine at a time, and the requests to it."""

    def __init__(self) -> None:
        self.llm: Any = None

    def start(self, **engine_args: Any) -> dict[str, Any]:
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        began = time.monotonic()
        _let_vllm_scan_llvmlite()
        with _no_collections():
            try:
                self.llm = LLM(worker_extension_cls="testing.faults.WorkerExtension", **engine_args)
            except Exception:
                # The next engine would use the process groups of this one.
                cleanup_dist_env_and_memory()
                raise
        config = self.llm.llm_engine.vllm_config
        cache = config.cache_config
        return {
            "compiled": config.compilation_config.mode.name != "NONE",
            "seconds": time.monotonic() - began,
            "block_size": cache.block_size,
            "capacity_tokens": cache.kv_cache_size_tokens,
        }

    def stop(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        if self.llm is None:
            return
        with _no_collections():
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            cleanup_dist_env_and_memory()
        gc.collect()

    def generate(self, **how: Any) -> list[Output]:
        return requests.generate(self.llm, **how)

    def hand_over(self, prompts: list[list[int]], **how: Any) -> list[Handed]:
        return handed_over.hand_over(self.llm, prompts, **how)

    def pages(self, blocks: tuple[list[int], ...]) -> handed_over.Pages:
        return handed_over.pages(self.llm, blocks)

    def metrics(self) -> dict[str, float]:
        return requests.metrics(self.llm)

    def layers(self) -> dict[str, dict[str, Any]]:
        """Return each attention layer's backend, block size and page size as vLLM runs them."""
        core = self.llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        layers = {}
        for groups in runner.attn_groups:
            for group in groups:
                for name in group.layer_names:
                    layers[name] = {
                        "backend": f"{group.backend.__module__}.{group.backend.__qualname__}",
                        "block_size": group.kv_cache_spec.block_size,
                        "page_bytes": group.kv_cache_spec.page_size_bytes,
                        "content_bytes": getattr(group.kv_cache_spec, "real_page_size_bytes", None),
                    }
        return layers

    def plan(self) -> dict[str, Any]:
        """Return the engine core's plan of the KV cache, and what vLLM reports of it."""
        core = self.llm.llm_engine.engine_core.engine_core
        cache = self.llm.llm_engine.vllm_config.cache_config
        planned = core.scheduler.kv_cache_config
        # The scheduler's plan has one layer's spec for each group.
        runner = core.model_executor.driver_worker.worker.model_runner
        pages = []
        for number, group in enumerate(runner.kv_cache_config.kv_cache_groups):
            spec = group.kv_cache_spec
            by_layer = getattr(spec, "kv_cache_specs", dict.fromkeys(group.layer_names, spec))
            for name in group.layer_names:
                page = by_layer[name]
                pages.append((number, name, page.block_size, page.page_size_bytes))
        managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
        return {
            "blocks": planned.num_blocks,
            "num_gpu_blocks": cache.num_gpu_blocks,
            "bytes": planned.kv_cache_tensors[0].size,
            "pages": pages,
            "reported_tokens": cache.kv_cache_size_tokens,
            "reported_concurrency": cache.kv_cache_max_concurrency,
            "match_tokens": managers[0].cache_hit_alignment_tokens,
            "scheduler_block_tokens": core.scheduler.block_size,
        }

    def plant(self, fault: str | None) -> None:
        self.llm.collective_rpc("plant_fault", args=(fault,))

    def plant_in_plans(self, fault: str | None) -> None:
        planted_plans.plant(fault)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Ignore calls of `gc.collect`.

    vLLM collects five times as an engine starts and three times as it stops. A collection takes
    0.3 s, and both take less than that without them.
    """
    collect = gc.collect
    gc.collect = lambda *_: 0
    try:
        yield
    finally:
        gc.collect = collect


def _let_vllm_scan_llvmlite() -> None:
    """Let an engine start in a process that has imported numba already.

    On CPUs vLLM 0.32 looks into `vars()` of every name of every module as its worker starts.
    llvmlite's library object answers any attribute with a C function, `__dict__` too, and the
    look fails. `vllm serve` never meets this: there each worker is a new process.
    """
    if "llvmlite.binding.ffi" in sys.modules:
        from llvmlite.binding import ffi

        ffi.lib._fntab["__dict__"] = {}


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        from testing.triton.processes import interpret_faster

        interpret_faster()
    connection = Connection(int(sys.argv[1]))
    worker = Worker()
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            break
        try:
            connection.send((True, getattr(worker, command)(**arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))
    worker.stop()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Nothing that vLLM leaves behind may keep the tests waiting.
    os._exit(0)
