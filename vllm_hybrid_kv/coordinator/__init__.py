# SPDX-License-Identifier: Apache-2.0
"""Coordinators of prefix caching over several KV groups."""
