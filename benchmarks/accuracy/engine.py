# SPDX-License-Identifier: Apache-2.0
"""Run the engine of `vllm-hybrid-kv eval`, and imitate another cache by rounding keys and values.

A rule of `benchmarks.fidelity.rules` rounds keys and values before vLLM stores them as bfloat16.
Bfloat16 holds e4m3 numbers exactly, but rounds the results of other rules to 8 significant bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.fidelity import rules
from vllm_hybrid_kv.tools.eval import engine

RULE = "HYBRID_KV_BENCHMARK_RULE"
"""The environment variable that names the rule. Without it, nothing is rounded."""


def run(send: Callable[..., None], job_file: str) -> None:
    """Run eval's engine. If the environment names a rule, round all keys and values by it."""
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
