# SPDX-License-Identifier: Apache-2.0
"""What a new release of vLLM moved under the plugin, and which adapter needs what.

    python -m tests.drift 0.34.0

`docs/drift.md` explains it.
"""
