# SPDX-License-Identifier: Apache-2.0
"""Changes planted in a small package are found, each as what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.drift import proposal, synthetic, targets
from tests.drift.adapters import Adapter, read_known
from tests.drift.release import DriftError
from tests.drift.synthetic import edited
from tests.drift.targets import Finding

# A method that is not what it was, in a package that is otherwise the same.
INIT = "def __init__(self, config, blocks):"


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return synthetic.adapter(synthetic.write(tmp_path_factory.mktemp("known")))


@pytest.fixture
def compare(known: Adapter, tmp_path: Path) -> Callable[..., dict[str, Finding]]:
    def compare(adapter: Adapter = known, **changed: Any) -> dict[str, Finding]:
        release = synthetic.write(tmp_path / "new", "0.91.0", **changed)
        (findings,) = targets.compare([adapter], release)
        return {finding.field: finding for finding in findings}

    return compare


def kinds(findings: dict[str, Finding]) -> dict[str, tuple[str, ...]]:
    return {field: finding.kinds for field, finding in findings.items() if finding.kinds}


def test_what_is_the_same_is_unchanged(compare):
    commented = edited("planning", ("total = 0", "total = 0\n\n        # From zero on."))
    findings = compare(**commented)
    assert kinds(findings) == {}
    assert findings.keys() == synthetic.PLACES.keys()


def test_another_body_is_shown_as_a_diff(compare):
    findings = compare(**edited("planning", ("total += size", "total += 2 * size")))
    assert kinds(findings) == {"plan": ("body",)}
    assert "-        total += size" in findings["plan"].diff
    assert "+        total += 2 * size" in findings["plan"].diff


def test_parameters_that_came_and_went_are_named(compare):
    findings = compare(
        **edited("planning", ("sizes=(1, 2)", "*, lookahead=0, sizes=(1, 3)")),
        **edited("managing", (INIT, "def __init__(self, blocks, config):")),
    )
    assert kinds(findings) == {"plan": ("signature", "body"), "init": ("signature", "body")}
    assert findings["plan"].came == ("*", "lookahead=0", "sizes=(1, 3)")
    assert findings["plan"].went == ("sizes=(1, 2)",)
    assert (findings["init"].came, findings["init"].went) == ((), ())


def test_a_function_in_another_module_has_moved(compare):
    text = synthetic.FILES["planning.py"]
    findings = compare(planning=None, sizing=text, **edited("managing", ("planning", "sizing")))
    assert kinds(findings) == {"plan": ("moved",), "capacity": ("moved",)}
    assert str(findings["plan"].now) == "vllm.sizing.plan"
    assert not findings["plan"].still_importable


def test_a_function_that_is_imported_where_it_was_has_moved_too(compare):
    text = synthetic.FILES["planning.py"]
    findings = compare(planning="from .sizing import capacity, plan\n", sizing=text)
    assert kinds(findings) == {"plan": ("moved",), "capacity": ("moved",)}
    assert findings["plan"].still_importable


def test_a_function_that_moved_and_changed_is_both(compare):
    text = synthetic.FILES["planning.py"].replace("total += size", "total += 2 * size")
    findings = compare(planning="from .sizing import capacity, plan\n", sizing=text)
    assert kinds(findings)["plan"] == ("moved", "body")


def test_of_two_functions_of_a_name_the_one_alike_has_moved(compare):
    text = synthetic.FILES["planning.py"]
    similar = text.replace("total += size", "total -= size")
    findings = compare(
        planning=None, a_copy=similar, sizing=text, **edited("managing", ("planning", "sizing"))
    )
    assert str(findings["plan"].now) == "vllm.sizing.plan"


def test_another_function_of_the_name_is_not_taken_for_it(compare):
    capacity = "def capacity(config):\n    return len(config)\n"
    another = "def plan(route):\n    return sorted(route)\n"
    findings = compare(planning=capacity, a_route=another)
    assert kinds(findings) == {"plan": ("gone",)}


def test_a_method_of_a_class_that_moved_has_moved(compare):
    findings = compare(managing=None, managers=synthetic.FILES["managing.py"], checking=None)
    assert kinds(findings) == {"init": ("moved",), "make": ("moved",)}
    assert str(findings["init"].now) == "vllm.managers.Manager.__init__"


def test_a_method_that_a_base_has_now_has_moved(compare):
    method = """
            @classmethod
            def make(cls, config):
                return cls(config, capacity(config))
        """
    findings = compare(
        **edited("managing", (method, ""), ("class Manager", f"{method}\n\n        class Manager"))
    )
    assert kinds(findings) == {"make": ("moved",)}
    assert str(findings["make"].now) == "vllm.managing.Base.make"


def test_what_is_gone_has_its_nearest_names(compare):
    findings = compare(
        **edited("planning", ("def plan(", "def make_plan("), ("def capacity(", "def capacities(")),
        **edited("managing", ("def make(", "def made("), ("import capacity", "import capacities")),
    )
    assert kinds(findings) == dict.fromkeys(("plan", "capacity", "make"), ("gone",))
    assert findings["capacity"].nearest == ("vllm.planning.capacities",)
    assert findings["make"].nearest == ("vllm.managing.Manager.made",)


def test_what_is_no_function_any_more_cannot_be_read(compare):
    findings = compare(
        **edited(
            "planning", ("def capacity(config):\n            return len(config)", "capacity = 3")
        )
    )
    assert kinds(findings) == {"capacity": ("unreadable",)}
    assert "TypeError" in findings["capacity"].error


def test_without_the_known_release_fingerprints_tell_and_diffs_do_not(compare, known):
    findings = compare(
        replace(known, known=None), **edited("planning", ("total += size", "total += 2 * size"))
    )
    assert kinds(findings) == {"plan": ("body",)}
    assert findings["plan"].diff == ()


def test_a_release_that_cannot_be_imported_is_one_message(known, tmp_path):
    release = synthetic.write(tmp_path, "0.91.0", __init__="import torch_of_tomorrow\n")
    with pytest.raises(DriftError, match=r"vLLM 0\.91\.0 .* cannot be imported: ModuleNotFound"):
        targets.compare([known], release)


def test_the_proposed_fields_make_the_adapter_fit(compare, known, tmp_path):
    text = synthetic.FILES["planning.py"]
    findings = compare(
        planning=None,
        sizing=text.replace("sizes=(1, 2)", 'sizes=(1, 2), unit="token", *, lookahead=None'),
        **edited("managing", ("planning", "sizing"), (INIT, f"{INIT}\n                super()")),
    )
    assert kinds(findings).keys() == {"plan", "capacity", "init"}
    source = proposal.adapter_module(known, list(findings.values()), "0.91.0")
    fixed = replace(known, targets=read_known(source))
    (again,) = targets.compare([fixed], synthetic.Release(tmp_path / "new"))
    assert [finding.kinds for finding in again] == [()] * len(synthetic.PLACES)
