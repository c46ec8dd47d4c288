# SPDX-License-Identifier: Apache-2.0
"""vLLM's planner for a model that is described by its config.json and never run."""
