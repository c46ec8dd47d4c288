# SPDX-License-Identifier: Apache-2.0
"""How many tokens a KV cache holds, as vLLM itself plans it. Run as a program of its own.

`python -m demo.capacity MODEL CACHE_DTYPE` starts an engine in this process, which is what it
takes to know every layer's cache, and prints one line of JSON.
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
"""Stands before the line of JSON, among whatever vLLM prints."""

PLAN_ENVIRONMENT = {
    # In one process, which starts faster, and with one thread, which leaves the server its core.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Capacity:
    """The plan of a KV cache.

    Attributes:
        tokens: The KV cache size that vLLM logs: tokens that fit in requests of max_model_len.
        block_size: Tokens of an attention block.
        num_blocks: Blocks in the pool.
    """

    tokens: int
    block_size: int
    num_blocks: int

    @classmethod
    def of(cls, cache_config: Any) -> Capacity:
        """Read the plan from an engine's cache configuration."""
        return cls(
            tokens=cache_config.kv_cache_size_tokens,
            block_size=cache_config.block_size,
            num_blocks=cache_config.num_gpu_blocks,
        )


class Plan:
    """A cache that vLLM plans in a process of its own, for an engine that serves nothing.

    Attributes:
        log: File with everything that the process prints.
    """

    def __init__(self, model: Path, engine_arguments: dict[str, Any], log: Path) -> None:
        """Start the process; use `planning` instead, which also ends it.

        Args:
            model: Folder of the model.
            engine_arguments: Of `vllm.LLM`.
            log: Where its output goes.
        """
        self.log = log
        self._arguments = engine_arguments
        command = [sys.executable, "-m", "demo.capacity", str(model), json.dumps(engine_arguments)]
        self._process = start_group(command, log, {**ENVIRONMENT, **PLAN_ENVIRONMENT})

    def check(self) -> None:
        """Raise a ProcessError if the process has failed."""
        if self._process.poll():
            raise ProcessError(f"vLLM did not plan a cache for {self._arguments}", self.log)

    def result(self) -> Capacity:
        """Wait for the plan.

        Raises:
            ProcessError: vLLM does not start with these arguments, or takes too long.
        """
        try:
            self._process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise ProcessError(
                f"vLLM did not plan a cache in {START_TIMEOUT_S:.0f} s", self.log
            ) from error
        self.check()
        # Wherever it stands in a line: vLLM's progress bars go to the same file.
        found = re.search(rf"{MARK}({{.*?}})", self.log.read_text(errors="replace"))
        if found is None:
            raise ProcessError("vLLM planned a cache without saying which", self.log)
        return Capacity(**json.loads(found.group(1)))

    def stop(self) -> None:
        """End its processes, whether it is done or not."""
        kill_group(self._process)


@contextlib.contextmanager
def planning(model: Path, engine_arguments: dict[str, Any], log: Path) -> Iterator[Plan]:
    """Let vLLM plan a cache for the length of a `with` block, beside what the block does.

    Args:
        model: Folder of the model.
        engine_arguments: Of `vllm.LLM`.
        log: Where its output goes.

    Yields:
        The plan, whose `result` is there some time later.
    """
    plan = Plan(model, engine_arguments, log)
    try:
        yield plan
    finally:
        plan.stop()


def _main() -> None:
    from vllm import LLM

    model, arguments = sys.argv[1:]
    llm = LLM(model=model, **json.loads(arguments))
    capacity = Capacity.of(llm.llm_engine.vllm_config.cache_config)
    print(MARK + json.dumps(asdict(capacity)), flush=True)


if __name__ == "__main__":
    _main()
