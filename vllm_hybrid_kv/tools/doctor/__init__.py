# SPDX-License-Identifier: Apache-2.0
"""Finds out whether the plugin works in this environment, and why not.

vLLM is asked in a process of its own (`child.py` starts it, `probe.py` runs in it): it may be
missing, raise, hang or end the process that imports it. Everything else here needs the standard
library and rich alone.
"""
