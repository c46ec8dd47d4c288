# SPDX-License-Identifier: Apache-2.0
"""The capacity of a KV cache, as vLLM plans it in a process of its own.

`python -m demo.capacity MODEL ARGUMENTS` starts an engine, because only an engine knows the cache
of every layer, and prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from testing.processes import ProcessError, kill_group, start_group
from testing.server import ENVIRONMENT, START_TIMEOUT_S

MARK = "capacity: "
"""Precedes the line of JSON in vLLM's output."""

PLAN_ENVIRONMENT = {
    **ENVIRONMENT,
    # A single process, which starts faster, with one thread, which leaves the server its core.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Capacity:
    """The plan of a KV cache.

    Attributes:
        tokens: The KV cache size that vLLM logs: tokens that fit in requests of max_model_len.
        block_size: Tokens of an attention block.
        num_blocks: Number of blocks in the pool.
    """

    tokens: int
    block_size: int
    num_blocks: int


class Plan:
    """A plan that vLLM makes in a process of its own, see `planning`."""

    def __init__(self, arguments: dict[str, Any], process: subprocess.Popen[Any], log: Path):
        self._arguments = arguments
        self._process = process
        self._log = log

    def check(self) -> None:
        """Raise a ProcessError if the process has failed."""
        if self._process.poll():
            raise ProcessError(f"vLLM did not plan a cache for {self._arguments}", self._log)

    def result(self) -> Capacity:
        """Wait for the plan and return it.

        Raises:
            ProcessError: vLLM does not start with these arguments, or takes too long.
        """
        try:
            self._process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            message = f"vLLM did not plan a cache in {START_TIMEOUT_S:.0f} s"
            raise ProcessError(message, self._log) from error
        self.check()
        # Anywhere in a line, because vLLM's progress bars go to the same file.
        found = re.search(rf"{MARK}({{.*?}})", self._log.read_text(errors="replace"))
        if found is None:
            raise ProcessError("vLLM planned a cache but printed no capacity", self._log)
        return Capacity(**json.loads(found.group(1)))


@contextlib.contextmanager
def planning(model: Path, engine_arguments: dict[str, Any], log: Path) -> Iterator[Plan]:
    """Let vLLM plan a cache during a `with` block, in parallel with the block.

    Args:
        model: Folder of the model.
        engine_arguments: Of `vllm.LLM`.
        log: File for the output.
    """
    command = [sys.executable, "-m", "demo.capacity", str(model), json.dumps(engine_arguments)]
    process = start_group(command, log, PLAN_ENVIRONMENT)
    try:
        yield Plan(engine_arguments, process, log)
    finally:
        kill_group(process)


def _main() -> None:
    from vllm import LLM

    model, arguments = sys.argv[1:]
    cache = LLM(model=model, **json.loads(arguments)).llm_engine.vllm_config.cache_config
    capacity = Capacity(cache.kv_cache_size_tokens, cache.block_size, cache.num_gpu_blocks)
    print(MARK + json.dumps(asdict(capacity)), flush=True)


if __name__ == "__main__":
    _main()
