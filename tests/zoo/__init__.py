# SPDX-License-Identifier: Apache-2.0
"""Every architecture of vLLM's registry that generates text: plans, and engines by pattern."""
