# SPDX-License-Identifier: Apache-2.0
"""Measure how much quantised KV caches change the predictions of two small pretrained models.

    make eval-demo
    python -m benchmarks.accuracy [--model NAME ...] [--accept-gemma-terms] [--windows N]

`vllm-hybrid-kv eval` runs the real engine on Python's language reference, and compares next-token
distributions with those of the bfloat16 cache. Caches that vLLM cannot run on this machine
are imitated: the engine rounds keys and values by a rule of `benchmarks.fidelity` (see `engine`).
Examples are vLLM's own k8v4, which needs a GPU, and exact rounding to e4m3.
"""
