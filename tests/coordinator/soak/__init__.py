# SPDX-License-Identifier: Apache-2.0
"""A soak: random worlds of requests through vLLM's real scheduler, checked after every step."""
