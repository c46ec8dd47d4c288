# SPDX-License-Identifier: Apache-2.0
"""Compares a release of vLLM with the functions that the plugin patches.

    python -m tests.drift 0.34.0

`docs/internals.md` explains it.
"""
