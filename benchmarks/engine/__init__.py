# SPDX-License-Identifier: Apache-2.0
"""Real engines, one by one in processes of their own: are they right, and how fast do they decode?

See `__main__` for the command.
"""
