# SPDX-License-Identifier: Apache-2.0
"""For any `--additional-config` and environment, there are valid settings or one error message."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.json_values import json_values
from vllm_hybrid_kv.errors import HybridKVSettingsError
from vllm_hybrid_kv.settings import ENVIRONMENT_PREFIX, SECTION, Settings, environment_name, resolve

FIELDS = tuple(Settings.model_fields)

ANY_JSON = json_values("stock", "auto", "lcm", "true", "interpreter", "0")
NAMES = st.sampled_from(FIELDS) | st.text(max_size=20)
SECTIONS = st.dictionaries(NAMES, ANY_JSON, max_size=4) | ANY_JSON
VALUES = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
VARIABLES = st.dictionaries(
    st.sampled_from([*map(environment_name, FIELDS), ENVIRONMENT_PREFIX + "FIELD", "PATH"]),
    VALUES | st.sampled_from(("stock", "auto", "true", "0")),
    max_size=4,
)


def resolved(additional_config: Any, environment: dict[str, str]) -> Settings | str:
    try:
        return resolve(additional_config, environment)
    except HybridKVSettingsError as error:
        return str(error)


@settings(max_examples=500, deadline=None)
@given(SECTIONS, VARIABLES)
def test_any_section_and_environment_give_settings_or_one_message(section, environment):
    answer = resolved({SECTION: section, "another": 1}, environment)
    if isinstance(answer, Settings):
        for field in FIELDS:
            source = answer.source(field)
            if source == environment_name(field):
                assert environment[source]
            elif source == "--additional-config":
                assert field in section
            else:
                assert getattr(answer, field) == Settings.model_fields[field].default
    else:
        # The error message names a part of the input.
        names = [*map(str, section)] if isinstance(section, dict) else [repr(section)]
        assert any(name in answer or repr(name) in answer for name in (*names, *environment)), (
            answer
        )
