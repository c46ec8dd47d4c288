# SPDX-License-Identifier: Apache-2.0
"""Plan all text-generating architectures of vLLM, and run one per kind of KV cache ("pattern")."""
