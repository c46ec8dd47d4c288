# SPDX-License-Identifier: Apache-2.0
"""A soak test of vLLM's real scheduler. A "world" is a random engine with random requests."""
