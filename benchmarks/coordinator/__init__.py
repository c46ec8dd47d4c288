# SPDX-License-Identifier: Apache-2.0
"""Measures prefix cache lookups, compared with vLLM's own coordinator.

    python -m benchmarks.coordinator [--out DIR] [--quick]

Real coordinators on real block pools, prompts of 131,072 tokens, no model. Both coordinators run in
one process, with alternating calls on pools with equal contents: four prompts in turn, and blocks
of other requests. Each call is the first lookup of a request: its hashes are new objects, whose
hash values Python has not cached. Times are medians. Ratios are medians over rounds of the ratio in
one round, because a shared machine changes its speed.
"""
