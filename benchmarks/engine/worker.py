# SPDX-License-Identifier: Apache-2.0
"""The process of one engine, which does what its parent asks. Run by `process.Engine`."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

from testing import requests
from testing.requests import Output


class Worker:
    """An engine and the requests to it."""

    def __init__(self) -> None:
        self.llm: Any = None
        self._begun: list[str] = []
        self._count = 0

    def start(self, **engine_args: Any) -> dict[str, Any]:
        from vllm import LLM

        from vllm_hybrid_kv.state import STATE

        began = time.perf_counter()
        self.llm = LLM(
            skip_tokenizer_init=True,
            disable_log_stats=False,
            seed=0,
            **engine_args,
        )
        config = self.llm.llm_engine.vllm_config
        return {
            "seconds": time.perf_counter() - began,
            "plugin": STATE.active_patches is not None,
            "runner": 2 if config.use_v2_model_runner else 1,
            "graphs": config.compilation_config.cudagraph_mode.name,
            "backends": self._backends(),
            "block_size": config.cache_config.block_size,
            "capacity_tokens": config.cache_config.kv_cache_size_tokens,
        }

    def generate(self, **how: Any) -> list[Output]:
        return requests.generate(self.llm, **how)

    def metrics(self) -> dict[str, float]:
        return requests.metrics(self.llm)

    def begin(self, prompts: list[list[int]], max_tokens: int) -> None:
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
        for prompt in prompts:
            self._count += 1
            name = f"speed-{self._count}"
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
            self._begun.append(name)
        waiting = set(self._begun)
        while waiting:
            if not engine.has_unfinished_requests():
                raise RuntimeError(f"{len(waiting)} requests ended without a token")
            for output in engine.step():
                if output.outputs[0].token_ids:
                    waiting.discard(output.request_id)

    def decode(self, steps: int) -> tuple[float, int]:
        engine = self.llm.llm_engine
        # One without a watch: the device has run other engines since the last.
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
            raise RuntimeError(f"no token came in {steps} steps")
        return seconds, tokens

    def finish(self) -> None:
        engine = self.llm.llm_engine
        engine.abort_request(self._begun)
        self._begun = []
        while engine.has_unfinished_requests():
            engine.step()

    def _backends(self) -> dict[str, int]:
        """Return how many layers run on which backend."""
        context = self.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        found: Counter[str] = Counter()
        for layer in context.values():
            if hasattr(layer, "get_attn_backend"):
                backend = layer.get_attn_backend()
                ours = backend.__module__.startswith("vllm_hybrid_kv")
                found[("vllm_hybrid_kv " if ours else "") + backend.__qualname__] += 1
        return dict(found)


def reason(error: BaseException) -> str:
    """Return the last line of an error that says something, and the error's name.

    pydantic ends its messages with the value that it was given, and a link.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [
        line.split(" [type=")[0]
        for line in lines
        if not line.startswith("For further information visit")
    ]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    worker = Worker()
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            break
        try:
            connection.send((True, getattr(worker, command)(**arguments)))
        except Exception as error:
            traceback.print_exc()
            connection.send((False, reason(error)))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # The process is the engine: its memory goes back with it.
    os._exit(0)
