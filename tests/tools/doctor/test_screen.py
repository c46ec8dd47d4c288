# SPDX-License-Identifier: Apache-2.0
"""The screen says the worst first and breaks nothing that has to be copied."""

import io

import pytest
from rich.console import Console

from vllm_hybrid_kv.tools.doctor.child import Answer
from vllm_hybrid_kv.tools.doctor.diagnosis import Diagnosis
from vllm_hybrid_kv.tools.doctor.findings import Finding, Severity, ordered
from vllm_hybrid_kv.tools.doctor.installation import Copy, Installation
from vllm_hybrid_kv.tools.doctor.screen import show

FUNCTION = "vllm.v1.core.kv_cache_utils.unify_kv_cache_spec_page_size"
REASON = f"{FUNCTION} has the signature (*args, **kwargs), known is ({'argument, ' * 30})"


def patch(name, *edits):
    return {
        "name": name,
        "edits": [{"name": edit, "in_force": not why, "why": why} for edit, why in edits],
    }


def screen(width, findings=(), patches=()):
    installation = Installation(
        plugin_version="0.1.0",
        plugin_folder="/site/vllm_hybrid_kv",
        plugin_copies=(Copy("vllm-hybrid-kv", "0.1.0", "/site", False),),
        vllm_copies=(),
        vllm_module=None,
        plugins=(),
        strategies=(),
        vllm_plugins=None,
        python="3.11.7",
        cpu_model="A CPU",
        cpu_count=2,
    )
    answer = Answer({"patches": list(patches)}, {}, None, "", ())
    show(
        Diagnosis(installation, answer, ordered(findings), []),
        Console(width=width, file=(file := io.StringIO())),
    )
    return file.getvalue().splitlines()


def test_the_verdict_is_followed_by_the_worst_and_its_way_out():
    lines = screen(
        80,
        [
            Finding(Severity.NOTE, "n", "good to know"),
            Finding(Severity.PROBLEM, "p", "it is broken", "Mend it"),
        ],
    )
    assert lines[0] == "hybrid_kv 0.1.0 cannot be active here: 1 problem."
    assert lines[1] == "problem: it is broken."
    assert lines[2].rstrip() == "  Mend it."
    assert lines[3] == "note: good to know."


@pytest.mark.parametrize("width", [80, 120])
def test_a_long_reason_is_cut_and_leaves_names_whole(width):
    lines = screen(
        width, patches=[patch("page_sizes", (FUNCTION, [REASON])), patch("other", ("f", []))]
    )
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    assert "unify_kv_cache_spec_page_size" in text
    assert "has the signature" in " ".join(text.split())
    assert "..." in text
    assert text.count("argument") < 5
    (other,) = (line for line in lines if line.startswith("other"))
    assert other.rstrip().endswith("in force, verified")


def test_a_patch_with_an_edit_that_is_not_applied_is_not_called_verified():
    edits = patch("page_sizes", ("f", []), ("g", []))
    edits["edits"][1]["in_force"] = False
    (line,) = (line for line in screen(80, patches=[edits]) if line.startswith("page_sizes"))
    assert line.rstrip().endswith("not applied, would fit")


def test_what_looks_like_markup_is_printed_as_it_is():
    message = "settings [bold]x[/bold] from vllm-hybrid-kv[cpu]"
    lines = screen(80, [Finding(Severity.PROBLEM, "p", message)])
    assert lines[1] == f"problem: {message}."
