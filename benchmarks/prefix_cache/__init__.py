# SPDX-License-Identifier: Apache-2.0
"""Measure prefix cache hits by memory, strategy, model and traffic.

    python -m benchmarks.prefix_cache [--trace FILE] [--jobs N] [--parts PART...] [--out DIR]

Whole traces go through vLLM's real planner and scheduler, as in `vllm-hybrid-kv replay`. No model
runs, so hits do not depend on the machine. The part `overhead` measures the scheduler's time. It
runs last and alone.

The public trace is `conversation_trace.jsonl` of the Mooncake repository's FAST '25 release
(https://github.com/kvcache-ai/Mooncake, FAST25-release/traces). Without it, only synthetic traces
are replayed.
"""
