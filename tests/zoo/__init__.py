# SPDX-License-Identifier: Apache-2.0
"""Plan every architecture in vLLM's registry that generates text, and run one of each pattern."""
