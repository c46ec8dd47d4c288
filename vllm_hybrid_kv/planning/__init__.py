# SPDX-License-Identifier: Apache-2.0
"""Plans of hybrid KV caches: page sizes and capacity, as functions over vLLM's specs."""
