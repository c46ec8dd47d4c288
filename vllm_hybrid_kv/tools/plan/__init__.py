# SPDX-License-Identifier: Apache-2.0
"""Run vLLM's planner for a model that is only described by its config.json and never runs."""
