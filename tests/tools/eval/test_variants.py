# SPDX-License-Identifier: Apache-2.0
"""Parsing of `--kv-cache-dtype`."""

import pytest

from vllm_hybrid_kv.tools.eval.variants import CacheVariant, parse
from vllm_hybrid_kv.tools.output import ToolError

K8V4 = "turboquant_k8v4"


def names(text, reference="auto"):
    return [one.name for one in parse(text, reference)]


def test_the_reference_comes_first_and_once():
    assert names("fp8, auto,fp8") == ["auto", "fp8"]
    assert names("auto", "bfloat16") == ["bfloat16", "auto"]


def test_settings_in_brackets_have_their_types():
    _, fp8, some = parse(f"fp8,{K8V4}[unify_page_sizes=lcm, boundary_layers=0,debug=true]", "auto")
    assert fp8 == CacheVariant("fp8")
    settings = {"boundary_layers": 0, "debug": True, "unify_page_sizes": "lcm"}
    assert some == CacheVariant(K8V4, settings)
    assert some.name == f"{K8V4}[boundary_layers=0,debug=true,unify_page_sizes=lcm]"
    assert parse(some.name, "auto")[1] == some


def test_one_dtype_with_other_settings_is_another_cache():
    text = f"{K8V4},{K8V4}[boundary_layers=0]"
    assert names(text) == ["auto", *text.split(",")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a cache dtype"),
        ("fp8,,auto", "'' is not a cache dtype"),
        (f"{K8V4}[boundary_layers=0", "is not a cache dtype; separate dtypes with commas"),
        (f"{K8V4}[boundary_layers]", "write NAME=VALUE, not 'boundary_layers'"),
        ("auto", "'auto' has nothing to compare with auto"),
    ],
)
def test_invalid_lists_are_rejected(text, message):
    with pytest.raises(ToolError) as error:
        parse(text, "auto")
    assert message in str(error.value)
