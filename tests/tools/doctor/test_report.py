# SPDX-License-Identifier: Apache-2.0
"""Doctor's report has a verdict and a text, even if the child process ended early."""

import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vllm_hybrid_kv.tools.doctor import command
from vllm_hybrid_kv.tools.doctor.report import read, text
from vllm_hybrid_kv.tools.doctor.runner import EXIT_STATUS, finding
from vllm_hybrid_kv.tools.main import app
from vllm_hybrid_kv.tools.output import show
from vllm_hybrid_kv.version import __version__

SCHEMA = json.loads(
    (Path(__file__).resolve().parents[3] / "docs" / "doctor.schema.json").read_text()
)
WHO = f"hybrid_kv {__version__}"
FUNCTION = "vllm.v1.core.kv_cache_utils.unify_kv_cache_spec_page_size"


def patch(*edits, name="coordinator"):
    lines = dict.fromkeys(("replaces", "why", "upstream", "until"), "a line")
    keys = ("name", "active", "why")
    return {"name": name, **lines, "edits": [dict(zip(keys, edit, strict=True)) for edit in edits]}


DEVICE = {"kind": "cpu", "name": "A CPU", "kernels": "cpu:amx", "why": "the fastest"}
SETTING = {"name": "debug", "value": False, "source": "default", "choices": ["false", "true"]}
FACTS = [
    {"vllm_plugins": None, "plugins": []},
    {"settings": [SETTING]},
    {"vllm": {"version": "0.32.0", "folder": "/site/vllm"}},
    {"minor": "0.32", "platform": {"device": "cpu", "cpu": True, "gpu": False}},
    {"active": True, "refused": False, "foreign": []},
    {"strategies": [], "isa": "amx"},
    {"patches": [patch(("vllm.a.f", True, []))]},
    {"torch": {"cuda": None, "hip": None}, "devices": [DEVICE]},
]
"""The facts that the checks record one after another on a healthy machine with vLLM for CPUs."""


def messages(*findings, **changes):
    """Return what a child that ends normally sends: `FACTS` with `changes`, then the findings."""
    facts = {name: value for part in FACTS for name, value in part.items()}
    return [{"facts": facts | changes, "findings": list(findings)}, {"end": True}]


@pytest.fixture
def printed(monkeypatch, capsys):
    """A function that prints a report and returns its lines."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(found):
        show(text(found))
        return capsys.readouterr().out.splitlines()

    return call


@pytest.mark.parametrize("count", range(len(FACTS) + 1))
@pytest.mark.parametrize("begun", [False, True])
def test_a_report_that_ends_early_keeps_what_came_before(count, begun, printed):
    sent = []
    for number, facts in enumerate(FACTS[:count]):
        sent.append({"begin": f"Checking {number}"})
        sent.append({"facts": facts, "findings": [finding("warning", f"{number}", "m")]})
    if begun:
        sent.append({"begin": "Checking the last"})
    found = read(sent, "ended with SIGKILL")
    jsonschema.validate(found, SCHEMA)
    assert printed(found)[0] == found["verdict"]
    # Problems come first.
    names = [str(number) for number in range(count)]
    assert [one["check"] for one in found["findings"]] == ["process", *names]
    activity = (
        f"Checking {'the last' if begun else count - 1}" if begun or count else "Starting Python"
    )
    assert found["findings"][0]["message"] == f"{activity} ended with SIGKILL"
    if count < len(FACTS):
        assert found["devices"][0]["why"] == "unknown, because an earlier check failed"


@pytest.mark.parametrize(
    ("ending", "output", "message", "remedy"),
    [
        (None, ["a", "Killed"], "exit status 0; its last output is: Killed", "Reinstall"),
        ("took more than 2.5 s", [], "Importing it took more than 2.5 s", "--timeout"),
    ],
)
def test_an_early_end_names_its_cause(ending, output, message, remedy):
    (found,) = read([{"begin": "Importing it"}], ending, output)["findings"]
    assert (found["severity"], found["check"]) == ("problem", "process")
    assert message in found["message"]
    assert remedy in found["remedy"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(list(EXIT_STATUS)), max_size=4))
def test_the_worst_finding_decides_the_exit_status(severities):
    found = read(messages(*(finding(severity, "c", "m") for severity in severities)))
    expected = 2 if "problem" in severities else 1 if "warning" in severities else 0
    assert found["exit_status"] == expected


def test_the_plugin_is_active_if_every_patch_is():
    healthy = read(messages())
    jsonschema.validate(healthy, SCHEMA)
    assert healthy["active"]
    assert healthy["verdict"] == f"{WHO} is active on vLLM 0.32.0 (cpu): all is well."
    place = {"place": "vllm.b.f", "module": "rival", "package": ""}
    assert not read(messages(foreign=[place]))["active"]
    assert not read(messages(patches=[]))["active"]
    inactive = patch(("vllm.a.f", False, []))
    found = read(messages(finding("warning", "w", "m"), patches=[*healthy["patches"], inactive]))
    assert not found["active"]
    assert found["verdict"].endswith(
        "would work on vLLM 0.32.0 (cpu) but is not loaded: 1 warning."
    )


def test_findings_that_may_cause_others_come_first():
    names = ("note", "n"), ("problem", "settings"), ("problem", "vllm"), ("warning", "w")
    found = read(messages(*(finding(*name, "m") for name in names)))
    assert [one["check"] for one in found["findings"]] == ["vllm", "settings", "w", "n"]


def test_the_json_has_the_keys_of_schema_1_as_well():
    found = read(messages())
    (new,), (old,) = found["patches"], found["seams"]
    assert new["edits"] == [{"name": "vllm.a.f", "active": True, "why": []}]
    assert old == new | {"edits": [{"name": "vllm.a.f", "in_force": True, "why": []}]}


def test_the_text_starts_with_the_verdict_and_the_worst_finding(printed):
    note = finding("note", "n", "good to know")
    problem = finding("problem", "p", "is [bold]it[/bold] 'amx'?", "Mend vllm-hybrid-kv[cpu]")
    assert printed(read(messages(note, problem)))[:4] == [
        f"{WHO} cannot be active here: 1 problem.",
        # No full stop follows the question mark, and rich does not interpret the markup.
        "problem: is [bold]it[/bold] 'amx'?",
        "  Mend vllm-hybrid-kv[cpu].",
        "note: good to know.",
    ]


def test_a_long_reason_is_shortened_and_names_stay_whole(printed):
    reason = f"{FUNCTION} has the signature (*args, **kwargs), known is ({'argument, ' * 30})"
    edits = [
        (FUNCTION, False, [reason]),
        ("vllm.a.Scheduler.method", False, []),
        *((f"vllm.a.{i} (checked, not patched)", True, []) for i in "xy"),
        ("vllm.a.z (checked, not patched)", False, ["vllm.a.z differs"]),
    ]
    one = patch(("vllm.a.f", True, []), ("vllm.a.g (checked, not patched)", True, []))
    lines = printed(read(messages(patches=[one, patch(*edits, name="p")])))
    rows = [line.split() for line in lines]
    assert ["coordinator", "f", "active"] in rows
    assert ["p", "unify_kv_cache_spec_page_size", "failed"] in rows
    assert ["Scheduler.method", "would", "fit"] in rows
    assert ["z", "(checked,", "not", "patched)", "failed"] in rows
    assert ["1", "function", "that", "it", "relies", "on", "unchanged"] in rows
    assert ["2", "functions", "that", "it", "relies", "on", "unchanged"] in rows
    *table, long, short = lines
    assert long.startswith(f"{FUNCTION} has the signature (*args, **kwargs), known is")
    assert long.endswith("...")
    assert short == "vllm.a.z differs"
    assert max(map(len, table)) <= 80


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (["--json"], None),
        (["--json", "--timeout", "5"], None),
        (["--json", "-"], None),
        (["--json", "out.json"], "out.json"),
        (["--json=out.json", "--markdown"], "out.json"),
    ],
)
def test_json_is_printed_or_written_to_a_file(arguments, file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = read(messages(finding("warning", "w", "m")))
    monkeypatch.setattr(command, "diagnose", lambda *_: found)
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert done.exit_code == 1
    assert json.loads((tmp_path / file).read_text() if file else done.stdout) == found
    assert (found["verdict"] in done.stdout.splitlines()) == (file is not None)
