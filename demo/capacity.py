# SPDX-License-Identifier: Apache-2.0
"""Start an engine of a model only to let vLLM log how many tokens its KV cache holds."""

from __future__ import annotations

import argparse


def main() -> None:
    """Plan and allocate the KV cache, then end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--gpu-memory-utilization", type=float, required=True)
    options = parser.parse_args()

    from vllm import LLM

    LLM(
        options.model,
        kv_cache_dtype=options.kv_cache_dtype,
        max_model_len=options.max_model_len,
        gpu_memory_utilization=options.gpu_memory_utilization,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
    )


if __name__ == "__main__":
    main()
