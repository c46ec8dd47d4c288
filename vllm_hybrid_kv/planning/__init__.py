# SPDX-License-Identifier: Apache-2.0
"""Plans hybrid KV caches: chooses page sizes and computes capacities, from vLLM's specs."""
