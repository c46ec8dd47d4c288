# SPDX-License-Identifier: Apache-2.0
"""Check whether a vLLM release changed functions that the plugin patches or relies on.

    python -m tests.drift 0.34.0

`docs/internals.md` explains how to support a new release.
"""
