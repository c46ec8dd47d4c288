# SPDX-License-Identifier: Apache-2.0
"""Convert recorded chats, or the log of a vLLM server, into a trace for `replay`."""
