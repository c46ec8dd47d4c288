# SPDX-License-Identifier: Apache-2.0
"""How all tools print tables and write JSON documents."""

import json
from pathlib import Path

import pytest

from vllm_hybrid_kv.tools.output import Table, ToolError, counted, show, write

WIDE = Table(
    "Strategies",
    ("", *(f">strategy_{i}" for i in range(9))),
    [("tokens", *(f"{1_234_567 + i:,}" for i in range(9)))],
    "Every number is whole.",
)


@pytest.mark.parametrize("columns", [None, "40", "80", "100"])
def test_a_table_that_is_too_wide_is_split_and_keeps_every_number(monkeypatch, capsys, columns):
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    show(["A line of text. " * 10, WIDE])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.count("A line of text.") == 10
    assert max(map(len, lines)) <= max(int(columns or 80), 80)
    text = "\n".join(lines)
    assert all(f"{1_234_567 + i:,}" in text and f"strategy_{i}" in text for i in range(9))
    assert text.count("tokens") == 2
    assert (text.count("Strategies"), text.count("Every number is whole.")) == (1, 1)


def test_text_wraps_before_a_table_is_split(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    show([Table("", ("reason", ">a number"), [("words " * 30, "1,000"), ("[bold]x[/bold]", "2")])])
    lines = capsys.readouterr().out.splitlines()
    assert sum("words" in line for line in lines) > 1
    assert any(line.startswith("[bold]x[/bold]") and line.endswith("2") for line in lines)


def test_a_table_is_markdown(capsys):
    show([Table("Groups", ("kind", ">blocks"), [("a|b", "1,024")], "A note.")], markdown=True)
    assert capsys.readouterr().out.strip() == (
        "**Groups**\n\n| kind | blocks |\n| --- | ---: |\n| a\\|b | 1,024 |\n\nA note."
    )


@pytest.mark.parametrize(
    ("document", "written"),
    [({"a": 1}, {"schema": 2, "a": 1}), ([{"a": 1}], [{"schema": 2, "a": 1}])],
)
def test_a_document_has_its_schema_version(tmp_path, capsys, document, written):
    for path in (Path("-"), tmp_path / "out.json"):
        write(document, lambda: ["printed"], schema=2, json_=path)
    printed = capsys.readouterr().out
    assert json.loads(printed.removesuffix("printed\n")) == written
    assert json.loads((tmp_path / "out.json").read_text()) == written


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    def fail(path):
        raise ValueError("unknown")

    with pytest.raises(ToolError, match=r"--json: .*: Is a directory"):
        write({}, list, schema=1, json_=tmp_path)
    with pytest.raises(ToolError, match=r"--plot: .*: unknown"):
        write({}, list, schema=1, plot=tmp_path, draw=fail)


def test_one_thing_is_counted_in_the_singular():
    assert [counted(n, "request") for n in (1, 1024)] == ["1 request", "1,024 requests"]
