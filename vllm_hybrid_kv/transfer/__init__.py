# SPDX-License-Identifier: Apache-2.0
"""Pages that leave an engine: their fingerprint, and the connectors that can carry them."""
