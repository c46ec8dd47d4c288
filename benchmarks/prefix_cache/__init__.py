# SPDX-License-Identifier: Apache-2.0
"""What does a prefix cache hit, by memory, strategy, model and traffic?

    python -m benchmarks.prefix_cache [--trace FILE] [--jobs N] [--resume] [--out DIR]

Whole traces go through vLLM's real planner and scheduler, as `vllm-hybrid-kv replay` sends them: no
model runs, so the numbers do not depend on the machine. The scheduler's own time is measured by the
part `overhead`, which runs last and alone.

The public trace is `conversation_trace.jsonl` of the Mooncake repository's FAST '25 release
(https://github.com/kvcache-ai/Mooncake, FAST25-release/traces). Without it only the traces that
are made here are replayed. Every finished run is kept in `.cache/prefix_cache`, with what it was
run on and a fingerprint of the sources; `--resume` takes from there what has not changed since.
"""
