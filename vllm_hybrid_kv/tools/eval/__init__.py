# SPDX-License-Identifier: Apache-2.0
"""What a quantised KV cache changes about a model's predictions, measured by vLLM's own engine."""
