# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from testing.shapes import SHAPES
from vllm_hybrid_kv.tools.plan.engine import Model
from vllm_hybrid_kv.tools.plan.model_description import described


@pytest.fixture(scope="session")
def shape() -> Iterator[Callable[..., Model]]:
    """A function that builds each of `SHAPES` once, as an engine on GPUs would."""
    built: dict[tuple[Any, ...], Model] = {}
    with ExitStack() as stack:

        def build(name: str, kv_cache_dtype: str, ranks: int = 1, **settings: int) -> Model:
            key = (name, kv_cache_dtype, ranks, *settings.items())
            if key not in built:
                description = stack.enter_context(described(SHAPES[name]))
                arguments: dict[str, Any] = {
                    "model": description.folder,
                    "kv_cache_dtype": kv_cache_dtype,
                    "tensor_parallel_size": ranks,
                    # With more requests than a plan's state blocks, vLLM would refuse CUDA graphs.
                    "max_num_seqs": 256,
                }
                if name == "llama-4-scout":
                    # The model's maximum of 10 million tokens fits no memory size of the tests.
                    arguments["max_model_len"] = 131072
                built[key] = Model(arguments, settings=settings)
            return built[key]

        yield build
