# SPDX-License-Identifier: Apache-2.0
"""The engine of `vllm-hybrid-kv eval` with a rule of `benchmarks.fidelity.rules` for its cache.

vLLM's attention on CPUs stores keys and values in bfloat16 after the rule. bfloat16 holds e4m3
exactly, and rounds what the other rules return to 8 bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.fidelity import rules
from vllm_hybrid_kv.tools.eval import engine

RULE = "HYBRID_KV_BENCHMARK_RULE"
"""The environment variable that names the rule; the engine stores unchanged without it."""


def run(send: Callable[..., None], job_file: str) -> None:
    """Run `engine.run` with the rule of the environment."""
    if name := os.environ.get(RULE):
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

        rule = rules.RULES[name]
        store = CPUAttentionBackendImpl.do_kv_cache_update

        def store_by_rule(
            self: Any, layer: Any, key: torch.Tensor, value: torch.Tensor, *rest: Any
        ) -> None:
            key, value = rule.key(key.float()).to(key), rule.value(value.float()).to(value)
            store(self, layer, key, value, *rest)

        CPUAttentionBackendImpl.do_kv_cache_update = store_by_rule
    engine.run(send, job_file)
