# SPDX-License-Identifier: Apache-2.0
"""Write the zoo's results to docs/models.md and the README."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from benchmarks import markdown
from tests.zoo.architectures import architectures
from tests.zoo.bounds import verdict
from tests.zoo.language_models import LANGUAGE_MODELS
from tests.zoo.patterns import Pattern
from tests.zoo.workers import ROOT

PAGE = ROOT / "docs" / "models.md"
README = ROOT / "README.md"
MARKS = "<!-- made by make zoo -->\n", "<!-- end -->"
"""The marks before and after the README's table."""

K8V4 = "turboquant_k8v4"

KINDS = {
    "served and compared": "served and compared",
    "planned; pattern run": "planned, its pattern served and compared",
    "planned: it has no attention": "planned, no attention to quantise",
    "planned only": "planned only",
    "refused": "refused",
}
"""Maps the beginning of a status to the line of the README's table that counts it."""
Tables = dict[str, dict[str, Any]]

HEAD = """# Models

`make zoo` writes this page; do not edit it. It has a row for every architecture that generates text
in the registries of vLLM 0.32 and 0.33. Multimodal models are planned as their language model.

- **Plans** are for one GPU with 128 GiB of KV cache. vLLM's planner makes them without weights,
  from the configuration in the column *Configuration*. The columns *fp8* and *k8v4* compare the
  number of tokens that fit with `auto`.
- **Engines** are vLLM's on a CPU. They run a small model with random weights that has the
  architecture's pattern of layers, with two checks. Prompt log-probabilities with k8v4 and with
  `auto` agree within the error of the format. A repeated prompt has the same log-probabilities
  when it comes from the prefix cache.

"""


def write(tables: Tables) -> None:
    PAGE.write_text(render(tables))
    before, _, rest = README.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    README.write_text(f"{before}{MARKS[0]}{summary(tables)}\n{MARKS[1]}{after}")


def pattern(row: dict[str, Any]) -> Pattern | None:
    """Return a row's pattern, or None if vLLM could not build the model."""
    return Pattern.from_json(row["pattern"]) if row.get("pattern") else None


def representatives(tables: Tables) -> dict[Pattern, str]:
    """Choose for each pattern the architecture whose engine runs.

    Prefer an architecture that ran, then one that has not run yet, then one that vLLM cannot run
    on CPUs.
    """
    found: dict[Pattern, str] = {}
    for name, row in sorted(tables["plans"].items()):
        kind = pattern(row)
        if kind is None or row["minor"] != "0.32" or row["planned_as"] != name:
            continue
        if "refused" in row["plans"][K8V4] or not kind.attention:
            continue
        if kind not in found or _rank(tables, name) < _rank(tables, found[kind]):
            found[kind] = name
    return found


def _rank(tables: Tables, name: str) -> int:
    ran = tables["engines"].get(name)
    if ran is None:
        return 1
    return 2 if "refused" in ran["auto"] else 0


def engine_of(row: dict[str, Any], kind: Pattern) -> str:
    """Say in a few words how an architecture's engine ran, for the table of patterns."""
    if "refused" in row["auto"]:
        return f"vLLM on CPUs does not run this pattern: {row['auto']['refused']}"
    if "refused" in row[K8V4]:
        return f"k8v4 refused: {row[K8V4]['refused']}"
    broken = verdict(row, bool(kind.state))
    return f"differs: {'; '.join(broken)}" if broken else "agrees"


def status_of(name: str, tables: Tables) -> str:
    """Say whether an architecture is served, planned or refused, for its cell in the table."""
    base = LANGUAGE_MODELS.get(name, name)
    row = tables["plans"][base]
    if "refused" in row["plans"]["auto"]:
        return f"not planned, not even with auto: {row['plans']['auto']['refused']}"
    if refusal := row["plans"][K8V4].get("refused"):
        return f"refused: {refusal}"
    kind = pattern(row)
    if kind is not None and not kind.attention:
        return "planned: it has no attention, so the cache dtype has no effect"
    runs_as = representatives(tables).get(kind) if kind else None
    ran = tables["engines"].get(runs_as or "")
    if kind is None or ran is None:
        return "planned only: its pattern has not run"
    outcome = engine_of(ran, kind)
    if outcome == "agrees":
        model = ran.get("model", runs_as)
        return "served and compared" if model == base else f"planned; pattern run as {model}"
    return f"planned only; {runs_as}: {outcome}"


def render(tables: Tables) -> str:
    patterns, rows = [], []
    chosen = representatives(tables)
    for kind, count in _patterns(tables):
        ran = tables["engines"].get(chosen.get(kind, ""), {})
        model = ran.get("model", chosen.get(kind, "-"))
        patterns.append([str(kind), str(count), model, _cell(_result(kind, tables))])
    for name, architecture in architectures().items():
        base = LANGUAGE_MODELS.get(name, name)
        row = tables["plans"][base]
        source = row.get("source", "-") if base == name else f"as {base}"
        if base == name and row.get("planned_as", name) != name:
            source += f", its language model {row['planned_as']}"
        served = _times(row, "fp8"), _times(row, K8V4), _cell(status_of(name, tables))
        minors = " and ".join(architecture.minors)
        rows.append([name, minors, source, str(pattern(row) or "-"), *served])
    columns = ["Architecture", "vLLM", "Configuration", "Pattern", "fp8", "k8v4", "Status"]
    lines = [HEAD, summary(tables), "", "## Patterns", ""]
    lines += markdown.table(["Pattern", "Architectures", "Run as", "Result"], patterns)
    lines += ["", "## Architectures", "", *markdown.table(columns, rows)]
    return "\n".join(lines) + "\n"


def summary(tables: Tables) -> str:
    """Return the README's table, which counts the architectures by kind of status."""
    counted = Counter(_kind_of(status_of(name, tables)) for name in architectures())
    rows = [[kind, str(count)] for kind, count in counted.most_common()]
    return "\n".join(markdown.table(["Status", "Architectures"], rows))


def _patterns(tables: Tables) -> list[tuple[Pattern, int]]:
    """Count the architectures of each planned pattern, most frequent first."""
    rows = (tables["plans"][LANGUAGE_MODELS.get(name, name)] for name in architectures())
    return Counter(kind for row in rows if (kind := pattern(row))).most_common()


def _result(kind: Pattern, tables: Tables) -> str:
    if not kind.attention:
        return "planned, has no attention to quantise"
    name = representatives(tables).get(kind)
    if name is None:
        return f"refused: {_reason(kind, tables)}"
    ran = tables["engines"].get(name)
    return engine_of(ran, kind) if ran else "planned only"


def _reason(kind: Pattern, tables: Tables) -> str:
    """Return the most frequent reason for which architectures of a pattern are refused."""
    reasons: Counter[str] = Counter()
    for row in tables["plans"].values():
        if pattern(row) == kind and (refusal := row["plans"][K8V4].get("refused")):
            found = re.search(r"cannot serve this (?:model|layer): (.*?)\. Serve", refusal)
            reasons[found[1] if found else refusal] += 1
    return reasons.most_common(1)[0][0] if reasons else "only vLLM 0.33 has it"


def _kind_of(status: str) -> str:
    return next((kind for start, kind in KINDS.items() if status.startswith(start)), "not planned")


def _times(row: dict[str, Any], dtype: str) -> str:
    auto, other = row["plans"]["auto"], row["plans"][dtype]
    if "refused" in other:
        return "refused"
    if not auto.get("tokens") or not other.get("tokens"):
        return "-"
    return f"{other['tokens'] / auto['tokens']:.2f}x"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
