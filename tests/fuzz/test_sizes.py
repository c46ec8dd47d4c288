# SPDX-License-Identifier: Apache-2.0
"""Any text is read as a memory size, or causes an error that quotes it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.tools.options import memory_size
from vllm_hybrid_kv.tools.output import ToolError, format_size

WRITTEN = st.builds(
    "{}{}{}".format,
    st.integers() | st.floats(),
    st.sampled_from(("", " ")),
    st.sampled_from(("", "B", "k", "GiB", "GB", "T")),
)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=20) | WRITTEN)
def test_any_text_is_a_size_or_is_refused(text):
    message = ""
    try:
        size = memory_size(text)
    except ToolError as error:
        message = str(error)
    assert repr(text) in message or (size >= 1 and format_size(size))
