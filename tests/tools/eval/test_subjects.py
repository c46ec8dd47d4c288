# SPDX-License-Identifier: Apache-2.0
"""A list of caches is read as it is written, and what is none is refused in words."""

import pytest

from vllm_hybrid_kv.tools.eval.errors import EvaluationError
from vllm_hybrid_kv.tools.eval.subjects import Subject, parse

K8V4 = "turboquant_k8v4"


def test_the_reference_comes_first_and_once():
    assert [one.name for one in parse("fp8, auto,fp8", "auto")] == ["auto", "fp8"]
    assert [one.name for one in parse("auto", "bfloat16")] == ["bfloat16", "auto"]


def test_settings_stand_in_brackets_and_have_their_types():
    _, fp8, some = parse(f"fp8,{K8V4}[unify_page_sizes=lcm, boundary_layers=0,debug=true]", "auto")
    assert fp8 == Subject("fp8")
    settings = {"boundary_layers": 0, "debug": True, "unify_page_sizes": "lcm"}
    assert some == Subject(K8V4, settings)
    assert some.name == f"{K8V4}[boundary_layers=0,debug=true,unify_page_sizes=lcm]"


def test_a_name_is_read_as_the_same_cache():
    (_, one) = parse(f"{K8V4}[debug=true,boundary_layers=1]", "auto")
    assert parse(one.name, "auto")[1] == one


def test_one_dtype_with_other_settings_is_another_cache():
    names = [one.name for one in parse(f"{K8V4},{K8V4}[boundary_layers=0]", "auto")]
    assert names == ["auto", K8V4, f"{K8V4}[boundary_layers=0]"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no dtype of a cache"),
        ("fp8,,auto", "'' is no dtype"),
        (f"{K8V4}[boundary_layers=0", "is no dtype of a cache; write dtypes between commas"),
        (f"{K8V4}[boundary_layers]", "write NAME=VALUE, not 'boundary_layers'"),
        ("auto", "'auto' has nothing to compare with auto"),
    ],
)
def test_what_is_no_list_of_caches_is_refused(text, message):
    with pytest.raises(EvaluationError) as error:
        parse(text, "auto")
    assert message in str(error.value)
