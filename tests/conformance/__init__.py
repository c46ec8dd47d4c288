# SPDX-License-Identifier: Apache-2.0
"""Run vLLM's own tests of its core with and without the plugin.

    python -m tests.conformance --minor 0.32 --strategy fixed_point

`docs/internals.md` explains the command and its expected differences.
"""
