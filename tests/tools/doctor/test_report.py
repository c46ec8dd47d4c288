# SPDX-License-Identifier: Apache-2.0
"""The report: what a child process that ended anywhere leaves, the verdict, devices, the text."""

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools.doctor.conftest import FACTS
from vllm_hybrid_kv.tools.doctor import report
from vllm_hybrid_kv.tools.doctor.report import Report, devices, read
from vllm_hybrid_kv.tools.doctor.runner import EXIT_STATUS, Finding, problem, warning
from vllm_hybrid_kv.tools.doctor.screen import text
from vllm_hybrid_kv.tools.output import show
from vllm_hybrid_kv.version import __version__

SCHEMA = json.loads(
    (Path(__file__).resolve().parents[3] / "docs" / "doctor.schema.json").read_text()
)
FUNCTION = "vllm.v1.core.kv_cache_utils.unify_kv_cache_spec_page_size"
REASON = f"{FUNCTION} has the signature (*args, **kwargs), known is ({'argument, ' * 30})"
WHO = f"hybrid_kv {__version__}"


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdef"), unique=True), st.data())
def test_a_report_that_ends_early_keeps_what_came_before(names, data):
    messages = []
    for name in names:
        messages.append({"begin": f"checking {name}"})
        messages.append({"facts": {name: 1}, "findings": [vars(warning(name, "m"))]})
    messages.append({"end": True})
    cut = data.draw(st.integers(0, len(messages)))
    found = read(messages[:cut], "ended with SIGKILL", ())
    assert list(found.facts) == names[: len(found.facts)]
    checks = [finding.check for finding in found.findings]
    if cut == len(messages):
        assert checks == names
    else:
        # Problems come first.
        assert checks == ["process", *found.facts]
        activity = f"Checking {names[(cut - 1) // 2]}" if cut else "Starting Python"
        assert found.findings[0].message == f"{activity} ended with SIGKILL"


@pytest.mark.parametrize(
    ("ending", "output", "message", "remedy"),
    [
        (None, ["a", "Killed"], "exit status 0; its last output is: Killed", "Reinstall"),
        ("took more than 2.5 s", [], "Importing it took more than 2.5 s", "--timeout"),
    ],
)
def test_an_early_end_names_its_cause(ending, output, message, remedy):
    (finding,) = read([{"begin": "importing it"}], ending, output).findings
    assert (finding.severity, finding.check) == ("problem", "process")
    assert message in finding.message
    assert remedy in finding.remedy


@given(st.lists(st.sampled_from(list(EXIT_STATUS)), max_size=4))
def test_the_worst_finding_decides_the_exit_status(severities):
    found = Report([Finding(severity, "c", "m") for severity in severities])
    expected = 2 if "problem" in severities else 1 if "warning" in severities else 0
    assert found.exit_status == expected


def test_the_plugin_is_active_if_every_patch_is(facts):
    healthy = Report([], facts)
    assert healthy.active
    assert healthy.verdict == f"{WHO} is active on vLLM 0.32.0 (cpu): all is well."
    place = {"place": "vllm.b.f", "module": "rival", "package": ""}
    assert not Report([], facts | {"foreign": [place]}).active
    assert not Report([], {name: facts[name] for name in facts if name != "patches"}).active
    facts["patches"][0]["edits"][0]["active"] = False
    assert not Report([], facts).active


def device_rows(facts, **changes):
    return [(row["kernels"], row["why"]) for row in devices({**facts, **changes})]


AVX = {"paths": ["portable", "avx512_bf16"], "numba": None}
LIMITS = "for bfloat16 and head sizes that are multiples of 32, portable otherwise"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("cpu:amx", f"the fastest on this CPU; {LIMITS}")),
        (
            {
                "isa": "portable",
                "cpu": {
                    "paths": ["portable"],
                    "lacking": {"portable": [], "avx512_bf16": ["x", "y"]},
                },
            },
            ("cpu:portable", "the fastest on this CPU; avx512_bf16 needs x, y"),
        ),
        (
            {"isa": "avx512_bf16", "cpu": AVX | {"lacking": FACTS["cpu"]["lacking"]}},
            (
                "cpu:avx512_bf16",
                f"the fastest on this CPU; amx is refused by the operating system; {LIMITS}",
            ),
        ),
        (
            {"isa": "portable", "settings": [{"name": "cpu_isa", "source": "VARIABLE"}]},
            ("cpu:portable", "chosen by VARIABLE; amx would be faster"),
        ),
    ],
)
def test_a_cpu_shows_its_kernels_and_why(changes, expected, facts):
    assert device_rows(facts, **changes) == [expected]


def test_a_machine_shows_its_devices_by_name(gpu_facts, monkeypatch):
    monkeypatch.setattr(report, "cpu_model", lambda: "A CPU")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert [row["name"] for row in devices(gpu_facts)] == ["A CPU, 1 core", "A GPU, 24 GiB"]


@pytest.mark.parametrize(
    ("row", "kernels", "why"),
    [
        (
            {"served": True, "origin": "derived"},
            "triton",
            "tile sizes derived, not measured on compute capability 9.0",
        ),
        (
            {"served": True, "origin": "measured"},
            "triton",
            "tile sizes measured on compute capability 9.0",
        ),
        ({"served": False}, None, "compute capability 9.0; the kernels need 7.5"),
    ],
)
def test_a_gpu_shows_its_kernels_and_why(row, kernels, why, gpu_facts):
    cpu, gpu = device_rows(gpu_facts, tile_sizes={"9.0": row})
    assert cpu == (None, "vLLM runs on cuda")
    assert gpu == (kernels, why)


def test_an_amd_gpu_shows_its_architecture(gpu_facts):
    gpu_facts["gpus"][0]["capability"] = None
    assert device_rows(gpu_facts)[1] == ("triton", "tile sizes derived, not measured on gfx942")


def test_a_gpu_has_no_kernels_with_a_vllm_for_cpus(facts, gpu_facts):
    assert device_rows(facts, gpus=gpu_facts["gpus"])[1] == (None, "vLLM runs on cpu")


def test_the_json_has_the_keys_of_schema_1_as_well(facts):
    found = Report([], facts).to_json()
    jsonschema.validate(found, SCHEMA)
    (patch,), (seam,) = found["patches"], found["seams"]
    assert patch["edits"] == [{"name": "vllm.a.f", "active": True, "why": []}]
    assert seam == patch | {"edits": [{"name": "vllm.a.f", "in_force": True, "why": []}]}


def printed(found):
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        patch.setenv("COLUMNS", "80")
        show(text(found))
    return output.getvalue().splitlines()


@settings(deadline=None, max_examples=50)
@given(
    st.sets(st.sampled_from(sorted(FACTS))),
    st.lists(st.sampled_from([problem("p", "m"), warning("w", "m"), Finding("note", "n", "m")])),
)
def test_any_incomplete_report_has_a_verdict_text_and_valid_json(missing, findings):
    facts = {name: value for name, value in FACTS.items() if name not in missing}
    if "plugins" in missing:  # one check records all of them
        facts = {k: v for k, v in facts.items() if k not in ("active", "foreign", "left_alone")}
    if "foreign" in missing:
        facts.pop("active", None)
    found = Report(findings, facts)
    jsonschema.validate(found.to_json(), SCHEMA)
    assert printed(found)[0] == found.verdict
    if not missing:
        assert found.active


def test_the_text_starts_with_the_verdict_and_the_worst_finding():
    findings = [Finding("note", "n", "good to know"), problem("p", "is it 'amx'?", "Mend it")]
    lines = printed(read([{"findings": list(map(vars, findings))}, {"end": True}], None, ()))
    assert lines[:4] == [
        f"{WHO} cannot be active here: 1 problem.",
        # A sentence that has its end gets no second one.
        "problem: is it 'amx'?",
        "  Mend it.",
        "note: good to know.",
    ]


def test_a_long_reason_is_shortened_and_names_stay_whole(facts):
    (other,) = facts["patches"]
    edits = [
        {"name": FUNCTION, "active": False, "why": [REASON]},
        {"name": "vllm.a.Scheduler.method", "active": False, "why": []},
        *[{"name": f"vllm.a.{i} (checked, not patched)", "active": True, "why": []} for i in "xy"],
        {"name": "vllm.a.z (checked, not patched)", "active": False, "why": ["vllm.a.z differs"]},
    ]
    lines = printed(
        Report([], facts | {"patches": [other, {**other, "name": "p", "edits": edits}]})
    )
    rows = [line.split() for line in lines]
    assert ["coordinator", "f", "active"] in rows
    assert ["p", "unify_kv_cache_spec_page_size", "failed"] in rows
    assert ["Scheduler.method", "would", "fit"] in rows
    assert ["z", "(checked,", "not", "patched)", "failed"] in rows
    assert ["2", "functions", "that", "it", "relies", "on", "unchanged"] in rows
    *table, long, short = lines
    assert long.startswith(f"{FUNCTION} has the signature (*args, **kwargs), known is")
    assert long.endswith("...")
    assert short == "vllm.a.z differs"
    assert max(map(len, table)) <= 80


def test_text_that_looks_like_markup_is_printed_unchanged():
    message = "settings [bold]x[/bold] from vllm-hybrid-kv[cpu]"
    assert printed(Report([problem("p", message)]))[1] == f"problem: {message}."
