# SPDX-License-Identifier: Apache-2.0
"""The exit status is what the worst finding makes it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hybrid_kv.tools.doctor.findings import (
    EXIT_STATUS,
    Finding,
    Severity,
    exit_status,
    ordered,
)

FINDINGS = st.lists(st.builds(Finding, st.sampled_from(Severity), st.text(), st.text()))


@settings(deadline=None)
@given(FINDINGS)
def test_the_status_is_0_with_notes_1_with_warnings_and_2_with_problems(findings):
    severities = {finding.severity for finding in findings}
    if Severity.PROBLEM in severities:
        assert exit_status(findings) == 2
    elif Severity.WARNING in severities:
        assert exit_status(findings) == 1
    else:
        assert exit_status(findings) == 0


@settings(deadline=None)
@given(FINDINGS)
def test_the_worst_come_first_and_equals_keep_their_order(findings):
    in_order = ordered(findings)
    statuses = [EXIT_STATUS[finding.severity] for finding in in_order]
    assert statuses == sorted(statuses, reverse=True)
    for severity in Severity:
        assert [one for one in in_order if one.severity is severity] == [
            one for one in findings if one.severity is severity
        ]
