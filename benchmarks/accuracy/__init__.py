# SPDX-License-Identifier: Apache-2.0
"""What quantised KV caches cost on two small pretrained models.

    make eval-demo
    python -m benchmarks.accuracy [--model NAME ...] [--accept-gemma-terms] [--windows N]

`vllm-hybrid-kv eval` compares the next-token distributions of the real engine with those of the
bfloat16 cache, on text of Python's language reference. Next to the caches that vLLM runs on this
machine it measures rules of `benchmarks.fidelity` in the same engine (`engine`), among them vLLM's
own k8v4, which needs a GPU, and exact rounding to e4m3.
"""
