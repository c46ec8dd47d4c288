# SPDX-License-Identifier: Apache-2.0
"""The documentation's links resolve, the files it names exist, and no text uses the old idiom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

# Words that this project no longer uses, because plainer words of the field exist.
IDIOM = re.compile(
    r"\bbeside\b|\blikewise\b|\bamiss\b|\bat hand\b|\bin force\b|\bgiven up\b|\bgave up\b"
    r"|\bin the place of\b|\bwhat came of\b|\bfor it is\b|\bfor (there|they) (is|are)\b"
    r"|\bof then\b|\btold of\b",
    re.IGNORECASE,
)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes from a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_resolves(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    paths = r"`((?:tests|testing|benchmarks|docs|kernels)/[\w./-]+)`"
    for name in re.findall(paths, page.read_text()):
        assert (ROOT / name).exists(), name


def test_no_text_uses_the_old_idiom() -> None:
    folders = ("vllm_hybrid_kv", "kernels", "testing", "tests", "benchmarks", "demo", "docs")
    files = {path for name in folders for path in (ROOT / name).rglob("*.*")}
    files |= {ROOT / name for name in ("Makefile", "pyproject.toml", "setup.cfg", "README.md")}
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted(files)
        if path.suffix in (".py", ".md", ".toml", ".cfg", "") and path != Path(__file__).resolve()
        if "results" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if IDIOM.search(line)
    ]
    assert found == []
