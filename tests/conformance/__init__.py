# SPDX-License-Identifier: Apache-2.0
"""vLLM's own tests of its core, run with and without the plugin.

    python -m tests.conformance --minor 0.32 --strategy fixed_point

`docs/internals.md` explains it.
"""
