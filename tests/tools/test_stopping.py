# SPDX-License-Identifier: Apache-2.0
"""What commands say of vLLM's errors: its words for users, the missing field, or one clear line."""

import pytest
from transformers import LlamaConfig

from vllm_hybrid_kv.tools.serve_options import UNKNOWN, one_line


def caused_by(cause: Exception) -> Exception:
    try:
        raise RuntimeError("of a library") from cause
    except RuntimeError as error:
        return error


def missing_field() -> Exception:
    try:
        LlamaConfig().route_norm  # noqa: B018
    except AttributeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no\n such size"), "no such size"),
        (AssertionError("needs FlashInfer"), "needs FlashInfer"),
        (caused_by(ValueError("heads must be even")), "heads must be even"),
        (AssertionError(), UNKNOWN),
        (TypeError("'NoneType' object is not subscriptable"), UNKNOWN),
    ],
)
def test_an_error_is_said_in_its_words_for_users_or_in_one_clear_line(error, said):
    assert one_line(error) == said


def test_a_field_that_the_configuration_lacks_is_named():
    assert one_line(missing_field()).startswith("the configuration has no 'route_norm', which")
