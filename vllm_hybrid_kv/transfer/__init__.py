# SPDX-License-Identifier: Apache-2.0
"""Pages that leave an engine: what they carry with them, and who may carry them."""
