# SPDX-License-Identifier: Apache-2.0
"""A soak: vLLM's real scheduler runs random worlds of requests, with checks after every step."""
