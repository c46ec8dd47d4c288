# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv eval`: how quantised KV caches change a model's predictions."""
