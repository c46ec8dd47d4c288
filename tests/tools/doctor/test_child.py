# SPDX-License-Identifier: Apache-2.0
"""What a process reported stands, wherever it ended."""

import json
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.tools.doctor.checks import STAGES
from vllm_hybrid_kv.tools.doctor.child import Error, read
from vllm_hybrid_kv.tools.doctor.probe import Probe, describe

ERROR = {"kind": "ImportError", "message": "no", "missing": "", "where": "x.py:1"}


def report(stages, errors=(), end=True):
    lines = []
    for stage in stages:
        lines.append({"begin": stage})
        lines.append(
            {"stage": stage, "error": ERROR}
            if stage in errors
            else {"stage": stage, "found": stage}
        )
    return "".join(json.dumps(line) + "\n" for line in [*lines, *([{"end": True}] if end else [])])


@settings(deadline=None)
@given(st.lists(st.sampled_from(sorted(STAGES)), unique=True), st.data())
def test_a_report_cut_anywhere_gives_what_was_found_before(stages, data):
    errors = data.draw(st.sets(st.sampled_from(stages))) if stages else set()
    whole = report(stages, errors)
    cut = data.draw(st.integers(0, len(whole)))
    answer = read(whole[:cut], "", -signal.SIGKILL, 1)
    done = [*answer.found, *answer.errors]
    assert done == [stage for stage in done if stage in stages]
    assert set(answer.errors) <= errors
    # The last line counts with its end of line or without.
    if cut >= len(whole) - 1:
        assert answer.unfinished is None
        assert len(done) == len(stages)
    else:
        assert answer.unfinished in ("start", *stages)
        assert answer.ended == "ended the process with SIGKILL"


def test_an_end_before_the_first_stage_is_pythons():
    assert read("", "Killed\n\n", 1, 9).unfinished == "start"
    assert read("", "Killed\n\n", 1, 9).output == ("Killed",)


def test_a_process_that_was_ended_for_its_time_says_how_long_it_had():
    assert read(report(["torch"], end=False), "", None, 2.5).ended == "took more than 2.5 s"


def test_a_fault_names_the_line_that_it_was_in():
    output = (
        'hello\n  File "/early.py", line 1\nFatal Python error: Aborted\n\n'
        'Current thread 0x1 (most recent call first):\n  File "/a/b.py", line 12 in <module>\n'
        '  File "/c.py", line 3 in f\n'
    )
    answer = read(report(["torch"], end=False), output, -signal.SIGABRT, 9)
    assert answer.ended == "ended the process with SIGABRT at /a/b.py:12"


def test_a_signal_without_a_name_is_a_number():
    assert read("", "", -250, 9).ended == "ended the process with signal 250"


def test_an_exception_goes_through_the_report(tmp_path):
    def raises():
        import not_there_at_all  # noqa: F401

    with pytest.raises(ModuleNotFoundError) as raised:
        raises()
    error = Error(**json.loads(json.dumps(describe(raised.value))))
    assert error.missing == "not_there_at_all"
    assert error.where.startswith(__file__)
    assert str(error) == "ModuleNotFoundError: No module named 'not_there_at_all'"


def test_every_stage_of_the_probe_has_words():
    stages = {
        name for name, value in vars(Probe).items() if callable(value) and not name.startswith("_")
    }
    assert stages - {"run"} == set(STAGES) - {"start"}
