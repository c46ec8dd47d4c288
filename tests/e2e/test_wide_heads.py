# SPDX-License-Identifier: Apache-2.0
"""A Gemma 4 whose global layers have heads of 512 dims, and kernels that are wrong."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from testing import faults
from testing.engine_host import EngineError, EngineHost
from testing.random_models import build
from testing.workload import random_prompt

pytestmark = pytest.mark.engine

PROMPTS = [random_prompt(length, seed=length) for length in (300, 97)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("gemma4", tmp_path_factory.mktemp("gemma4"), global_head_dim=512)


Serve = Callable[[str], list[float]]


@pytest.fixture(scope="module")
def serve(host: EngineHost, model: Path) -> Serve:
    """A function that returns the log-probabilities of the prompts with a cache dtype."""

    def run(dtype: str) -> list[float]:
        engine = host.engine(
            model=str(model), kv_cache_dtype=dtype, enforce_eager=True,
            additional_config={"hybrid_kv": {"boundary_layers": 0}},
        )  # fmt: skip
        if dtype != "auto":
            backends = {layer["backend"].rsplit(".", 1)[1] for layer in engine.layers().values()}
            assert backends == {"K8V4AttentionBackend"}
        outputs = engine.generate(PROMPTS, max_tokens=4, prompt_logprobs=True)
        return [number for output in outputs for number in output.prompt_logprobs or []]

    return run


def test_heads_of_512_dims_next_to_64_give_the_log_probabilities_of_auto(serve: Serve) -> None:
    wanted, got = serve("auto"), serve("turboquant_k8v4")
    assert len(got) == len(wanted) == sum(map(len, PROMPTS)) - len(PROMPTS)
    errors = [abs(a - b) for a, b in zip(got, wanted, strict=True)]
    spread = statistics.pstdev(wanted)
    # The mean that `test_prompt_log_probabilities` derives for heads of 512 dims.
    assert 0.005 * spread < statistics.fmean(errors) < 0.12 * spread


def test_a_wrong_kernel_stops_the_engine_with_the_layer_the_error_and_the_way_out(
    model: Path, tmp_path: Path
) -> None:
    host = EngineHost(tmp_path / "log.txt", PLANTED_KERNEL_FAULT=faults.KERNEL_FAULT)
    try:
        with pytest.raises(EngineError) as caught:
            host.engine(model=str(model), kv_cache_dtype="turboquant_k8v4", enforce_eager=True)
    finally:
        host.close()
    said = str(caught.value)
    assert "HybridKVKernelError: layer model.layers." in said
    assert re.search(
        r"fail their known-answer test: (decode|a step of \d+ new tokens) has a relative error of "
        r"\S+, the bound is 0\.01\. Serve the model with --kv-cache-dtype auto",
        said,
    ), said[-2000:]
