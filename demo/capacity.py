# SPDX-License-Identifier: Apache-2.0
"""How many tokens a KV cache holds, as vLLM itself plans it. Run as a program of its own.

`python -m demo.capacity MODEL CACHE_DTYPE` starts an engine in this process, which is what it
takes to know every layer's cache, and prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from demo.server import ENVIRONMENT, ServerError

MARK = "capacity: "
"""Stands before the line of JSON, among whatever vLLM prints."""


@dataclass(frozen=True)
class Capacity:
    """The plan of a KV cache.

    Attributes:
        tokens: What vLLM logs as the KV cache size.
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


def plan(model: Path, engine_arguments: dict[str, Any]) -> Capacity:
    """Let vLLM plan the cache of an engine that serves nothing.

    Args:
        model: Folder of the model.
        engine_arguments: Of `vllm.LLM`.

    Raises:
        ServerError: vLLM does not start with them; the message ends with what it printed.
    """
    command = [sys.executable, "-m", "demo.capacity", str(model), json.dumps(engine_arguments)]
    done = subprocess.run(
        command,
        env={**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return Capacity(**json.loads(line.removeprefix(MARK)))
    printed = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
    raise ServerError(f"vLLM did not plan a cache for {engine_arguments}:\n{printed}")


def _main() -> None:
    from vllm import LLM

    model, arguments = sys.argv[1:]
    llm = LLM(model=model, **json.loads(arguments))
    capacity = Capacity.of(llm.llm_engine.vllm_config.cache_config)
    print(MARK + json.dumps(asdict(capacity)), flush=True)


if __name__ == "__main__":
    _main()
