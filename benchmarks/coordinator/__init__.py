# SPDX-License-Identifier: Apache-2.0
"""How long does a prefix-cache lookup take, beside vLLM's own coordinator?

    python -m benchmarks.coordinator [--out DIR] [--quick]

Real coordinators on real block pools, with prompts of 131,072 tokens and no model. Both sides run
in one process, their calls in turn, on pools with the same contents: four prompts go round, and
other requests' blocks lie beside them. Each call is the first lookup of a request: its hashes are
new objects, whose hash values Python has not computed yet. Times are medians; ratios are medians
over rounds of one round's times, because a shared machine changes its speed from one second to
the next.
"""
