# SPDX-License-Identifier: Apache-2.0
"""Handles pages that leave an engine: fingerprints them, and checks the KV connectors."""
