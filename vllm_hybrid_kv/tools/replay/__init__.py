# SPDX-License-Identifier: Apache-2.0
"""Replay recorded traffic through vLLM's real scheduler, with no model and no GPU."""
