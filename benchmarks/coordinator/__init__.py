# SPDX-License-Identifier: Apache-2.0
"""Time prefix cache lookups, compared with vLLM's own coordinator.

    python -m benchmarks.coordinator [--out DIR]

The coordinators and block pools are real, and no model runs. Prompts have 131,072 tokens. Calls of
both coordinators alternate in one process. Both pools hold the same blocks: those of four prompts,
which are looked up in turn, and those of other requests. Each call is a request's first lookup: its
hashes are new objects, whose hash values Python has not cached. Times are medians. Ratios are
computed in each round, because a shared machine changes its speed, and their median is reported.
"""
