# SPDX-License-Identifier: Apache-2.0
"""Cache policies of other servers, simulated for `replay --compare`.

A peer is not a coordinator of vLLM and cannot serve. `loop.py` simulates a scheduler, and a module
per peer has its policy. What the simulation omits is listed in docs/prefix-caching.md.
"""

from __future__ import annotations

PEERS = ("sglang", "marconi")
"""The names of the peers, for tools that must not import vLLM."""
