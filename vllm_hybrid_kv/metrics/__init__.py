# SPDX-License-Identifier: Apache-2.0
"""Prometheus counters of the prefix cache, written by the scheduler and shown by the server."""
