# SPDX-License-Identifier: Apache-2.0
"""Names that vLLM and the plugin share."""

from __future__ import annotations

CACHE_DTYPE = "turboquant_k8v4"
"""The value of `--kv-cache-dtype` that selects k8v4 pages."""

BACKEND = "TURBOQUANT"
"""The name under which vLLM registers the attention backend that reads k8v4 pages."""
