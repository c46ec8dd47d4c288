# SPDX-License-Identifier: Apache-2.0
"""Run `vllm-hybrid-kv doctor` from the wheel, in real virtual environments with known faults."""

import json
from pathlib import Path

import jsonschema
import pytest

from testing.virtual_environments import distribution
from tests.conformance.releases import environment_of, unpacked_wheel

SCHEMA = json.loads(
    (Path(__file__).resolve().parents[2] / "docs" / "doctor.schema.json").read_text()
)


def read(done):
    """Return the JSON that a run printed, after checking its schema and its exit status."""
    assert done.stdout.startswith("{"), done.stderr
    found = json.loads(done.stdout)
    jsonschema.validate(found, SCHEMA)
    assert found["exit_status"] == done.returncode
    assert "Traceback" not in done.stderr
    return found


def finding(found, check, severity="problem"):
    (only,) = (finding for finding in found["findings"] if finding["check"] == check)
    assert only["severity"] == severity
    return only


def edits(found):
    return {edit["name"]: edit for patch in found["patches"] for edit in patch["edits"]}


@pytest.fixture(scope="module")
def healthy(make_environment):
    """The doctor's JSON in an environment without faults."""
    return read(make_environment().doctor("--json"))


def test_without_faults_every_patch_is_active_and_the_status_is_0(healthy):
    assert healthy["exit_status"] == 0
    assert healthy["active"] is True
    assert healthy["verdict"].endswith("(cpu): all is well.")
    assert healthy["findings"] == []
    assert all(edit["active"] and not edit["why"] for edit in edits(healthy).values())
    assert {"page_sizes", "coordinator", "attention_backend", "backend_selection"} <= {
        patch["name"] for patch in healthy["patches"]
    }
    (device,) = healthy["devices"]
    assert device["kernels"].startswith("cpu:")
    assert device["why"].startswith("the fastest on this CPU")


def test_settings_show_their_source_and_strategies_their_package(healthy):
    rows = {row["name"]: row for row in healthy["settings"]}
    assert {row["source"] for row in healthy["settings"]} == {"default"}
    assert rows["debug"]["choices"] == ["false", "true"]
    assert rows["unify_page_sizes"]["choices"] == ["lcm", "min_waste", "stock"]
    picked = {row["setting"]: row["name"] for row in healthy["strategies"] if row["picked"]}
    assert picked == {setting: rows[setting]["value"] for setting in picked}
    assert len(picked) == 4
    assert {row["origin"] for row in healthy["strategies"]} == {"built in"}


def test_a_plugin_that_vllm_plugins_excludes_is_a_warning_next_to_others(
    make_environment,
):
    # Give one environment several faults, because each import of vLLM takes long.
    environment = make_environment(without=("vllm-",))
    distribution(environment.later("older"), "vllm-hybrid-kv", "0.0.1")
    distribution(
        environment.site,
        "acme-kv",
        "1.5",
        "[vllm_hybrid_kv]\nacme = acme_kv\n",
        acme_kv="from vllm_hybrid_kv import hookimpl\n"
        "@hookimpl\ndef hybrid_kv_unify_page_sizes(kv_cache_spec, stock):\n"
        "    return stock(kv_cache_spec)\n",
    )
    config = {"hybrid_kv": {"prefix_match_unit": "stock", "debug": True}}
    found = read(
        environment.doctor(
            *("--json", "--additional-config", json.dumps(config)),
            VLLM_PLUGINS="other",
            VLLM_HYBRID_KV_UNIFY_PAGE_SIZES="acme",
        )
    )
    assert found["exit_status"] == 1
    assert found["active"] is False
    assert "would work on vLLM" in found["verdict"]
    left_out = finding(found, "vllm_plugins", "warning")
    assert "VLLM_PLUGINS=other does not name hybrid_kv" in left_out["message"]
    assert "VLLM_PLUGINS=other,hybrid_kv" in left_out["remedy"]
    assert all(edit["why"] == [] and not edit["active"] for edit in edits(found).values())

    assert "PackageNotFoundError: vllm" in finding(found, "metadata", "warning")["message"]
    assert "vllm-hybrid-kv 0.0.1 in" in finding(found, "copies", "warning")["message"]
    assert (
        "prefix_match_unit=stock (from --additional-config)"
        in finding(found, "prefix_caching", "warning")["message"]
    )
    sources = {row["name"]: row["source"] for row in found["settings"]}
    assert sources["debug"] == "--additional-config"
    assert sources["unify_page_sizes"] == "VLLM_HYBRID_KV_UNIFY_PAGE_SIZES"
    (acme,) = (row for row in found["strategies"] if row["name"] == "acme")
    assert acme == {
        "setting": "unify_page_sizes",
        "hook": "hybrid_kv_unify_page_sizes",
        "name": "acme",
        "origin": "acme-kv 1.5",
        "picked": True,
    }


RIVAL = """
def register():
    from vllm.v1.core import kv_cache_coordinator
    stock = kv_cache_coordinator.get_kv_cache_coordinator
    def mine(*args, **kwargs):
        return stock(*args, **kwargs)
    kv_cache_coordinator.get_kv_cache_coordinator = mine
"""

LATE_RIVAL = """
import functools
def register():
    from vllm.v1.core import kv_cache_manager, kv_cache_utils
    # One in its own module, the other in a calling module; wraps() copies name and module.
    wrapped = kv_cache_utils.resolve_kv_cache_block_sizes
    @functools.wraps(wrapped)
    def sizes(*args, **kwargs):
        return wrapped(*args, **kwargs)
    kv_cache_utils.resolve_kv_cache_block_sizes = sizes
    factory = kv_cache_manager.get_kv_cache_coordinator
    @functools.wraps(factory)
    def make(*args, **kwargs):
        return factory(*args, **kwargs)
    kv_cache_manager.get_kv_cache_coordinator = make
"""

PLUGIN = "[vllm.general_plugins]\nrival = rival_patch:register\n"


def test_a_rival_that_patches_vllm_first_is_named_and_keeps_the_plugin_inactive(make_environment):
    environment = make_environment()
    first = environment.site.parent / "first"
    distribution(first, "rival-kv", "2.0", PLUGIN, rival_patch=RIVAL)
    found = read(environment.doctor("--json", PYTHONPATH=str(first)))
    assert found["exit_status"] == 2
    assert found["active"] is False
    rival = finding(found, "rival")
    assert "nothing is patched" in rival["message"]
    assert "rival_patch (from rival-kv 2.0)" in rival["message"]
    assert "VLLM_PLUGINS=hybrid_kv" in rival["remedy"]
    factory = edits(found)["vllm.v1.core.kv_cache_coordinator.get_kv_cache_coordinator"]
    assert "has the source hash" in factory["why"][0]
    assert "((*args, **kwargs))" in factory["why"][0]


def test_a_rival_that_patches_our_targets_afterwards_is_named_in_every_module(make_environment):
    environment = make_environment()
    late = environment.later("late")
    distribution(late, "rival-kv", "2.0", PLUGIN, rival_patch=LATE_RIVAL)
    done = environment.doctor("--json")
    found = read(done)
    assert found["exit_status"] == 2
    assert found["active"] is False
    rival = finding(found, "rival")
    assert "vllm.v1.core.kv_cache_utils.resolve_kv_cache_block_sizes" in rival["message"]
    assert "vllm.v1.core.kv_cache_manager.get_kv_cache_coordinator" in rival["message"]
    assert "rival_patch (from rival-kv 2.0)" in rival["message"]
    moved = edits(found)["vllm.v1.core.kv_cache_utils.resolve_kv_cache_block_sizes"]
    assert moved["why"]
    assert moved["active"] is False


PLATFORM = """
from vllm.platforms.interface import UnspecifiedPlatform

class Platform(UnspecifiedPlatform):
    @classmethod
    def get_kv_cache_config_builder_cls(cls, vllm_config):
        return "acme_builder.Builder"
"""
BUILDER = """
from vllm.v1.core.kv_cache_planning import DefaultKVCacheConfigBuilder

class Builder(DefaultKVCacheConfigBuilder):
    def get_kv_cache_groups(self, vllm_config, kv_cache_spec):
        return []
"""
FINDS = "def find():\n    return 'acme_platform.Platform'\n"


def test_on_vllm_0_33_every_patch_is_active_and_other_faults_are_warnings(make_environment):
    # vLLM 0.33 is only an unpacked wheel without a CPU platform, so the test installs the platform
    # of a vendor, which groups layers itself.
    environment = make_environment()
    distribution(
        environment.site,
        *("acme-platform", "1.0", "[vllm.platform_plugins]\nacme = acme_find:find\n"),
        acme_find=FINDS,
        acme_platform=PLATFORM,
        acme_builder=BUILDER,
    )
    found = read(environment.doctor("--json", **environment_of("0.33", unpacked_wheel("0.33"))))
    assert found["exit_status"] == 1
    assert found["active"] is True
    assert found["versions"]["vllm"].startswith("0.33.")
    assert found["versions"]["vllm_fits"] is True
    assert "vLLM runs on no known device" in finding(found, "device", "warning")["message"]
    assert "are installed; Python imports" in finding(found, "copies", "warning")["message"]
    assert "acme_builder.Builder" in finding(found, "grouping", "warning")["message"]


def test_invalid_settings_and_a_strategy_that_cannot_be_imported_are_problems(make_environment):
    environment = make_environment()
    distribution(
        environment.site,
        "acme-kv",
        "1.5",
        "[vllm_hybrid_kv]\nacme = acme_kv\n",
        acme_kv="import not_there\n",
    )
    distribution(
        environment.site,
        "loud-kv",
        "3.0",
        "[vllm.general_plugins]\nloud = loud_kv:register\n",
        loud_kv="def register(): raise RuntimeError('too loud')\n",
    )
    found = read(
        environment.doctor("--json", VLLM_HYBRID_KV_NONSENSE="1", VLLM_HYBRID_KV_CPU_ISA="pentium")
    )
    assert found["exit_status"] == 2
    said = finding(found, "settings")["message"]
    assert "unknown environment variable VLLM_HYBRID_KV_NONSENSE; valid: " in said
    assert "cpu_isa='pentium' (from VLLM_HYBRID_KV_CPU_ISA) is not valid" in said
    assert "acme_kv cannot be imported" in finding(found, "strategy")["message"]
    assert "'acme' (from acme-kv 1.5)" in finding(found, "strategy")["message"]
    loud = finding(found, "other_plugin")["message"]
    assert "loud (from loud-kv 3.0) raises: RuntimeError: too loud" in loud


@pytest.fixture(scope="module")
def without_vllm(make_environment):
    return make_environment(without=("vllm", "torch", "functorch"))


def test_without_vllm_and_torch_the_remedy_is_what_to_install(without_vllm):
    found = read(without_vllm.doctor("--json"))
    assert found["exit_status"] == 2
    assert found["versions"]["vllm"] is None
    assert found["versions"]["torch"] is None
    missing = finding(found, "vllm")
    assert missing["message"] == "vLLM is not installed"
    assert "vllm-hybrid-kv[cpu]" in missing["remedy"]
    assert found["devices"][0]["kernels"] is None
    assert found["devices"][0]["why"] == "unknown, because an earlier check failed"
    assert {row["source"] for row in found["settings"]} == {"default"}


def test_the_text_has_the_same_problems_and_no_traceback(without_vllm):
    done = without_vllm.doctor(VLLM_HYBRID_KV_DEBUG="perhaps")
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert lines[0].endswith("cannot be active here: 2 problems.")
    assert lines[1] == "problem: vLLM is not installed."
    assert "debug='perhaps' (from VLLM_HYBRID_KV_DEBUG)" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def fake_vllm(make_environment):
    """A function that writes the source of an environment's vLLM."""
    environment = make_environment(without=("vllm", "torch", "functorch"))
    distribution(environment.site, "vllm", "0.32.0")
    folder = environment.package("vllm", __init__="")

    def write(init, version="__version__ = '0.32.0'\n__version_tuple__ = (0, 32, 0)\n"):
        (folder / "__init__.py").write_text(init)
        (folder / "version.py").write_text(version)
        return environment

    return write


@pytest.mark.parametrize(
    ("code", "reason", "remedy"),
    [
        ("raise RuntimeError('built for x')", "RuntimeError: built for x", "Reinstall the package"),
        ("import sys; sys.exit('no licence')", "SystemExit: no licence", "Reinstall the package"),
        ("import no_x", "ModuleNotFoundError: No module named 'no_x'", "Install no_x"),
    ],
)
def test_an_error_of_vllm_is_shown_with_its_place(fake_vllm, code, reason, remedy):
    found = read(fake_vllm(code).doctor("--json"))
    assert found["exit_status"] == 2
    broken = finding(found, "vllm")
    assert reason in broken["message"]
    assert "vllm/__init__.py:1" in broken["message"]
    assert broken["remedy"].startswith(remedy)


@pytest.mark.parametrize(
    ("code", "options", "end"),
    [
        ("import os; os.abort()", (), "ended with SIGABRT at "),
        ("import time; time.sleep(600)", ("--timeout", "4"), "took more than 4 s"),
    ],
)
def test_a_vllm_that_ends_or_blocks_the_process_is_shown(fake_vllm, code, options, end):
    found = read(fake_vllm(code).doctor("--json", *options))
    assert found["exit_status"] == 2
    assert finding(found, "process")["message"].startswith(f"Importing vLLM {end}")


def test_an_unsupported_vllm_is_shown_with_the_supported_versions(fake_vllm):
    environment = fake_vllm("", "__version__ = '0.99.0'\n__version_tuple__ = (0, 99, 0)\n")
    found = read(environment.doctor("--json"))
    assert found["exit_status"] == 2
    assert found["versions"]["vllm_fits"] is False
    assert (
        "supports vLLM 0.32 and 0.33, this is vLLM 0.99.0" in finding(found, "version")["message"]
    )


def test_a_vllm_in_the_current_folder_is_ignored(without_vllm):
    checkout = without_vllm.site.parent / "vllm"
    checkout.mkdir()
    (checkout / "__init__.py").write_text("raise RuntimeError('a checkout')")
    found = read(without_vllm.doctor("--json"))
    assert finding(found, "vllm")["message"] == "vLLM is not installed"


def test_a_torchvision_that_cannot_be_imported_is_a_warning(make_environment):
    environment = make_environment(without=("vllm", "torch", "functorch"))
    environment.package(
        "torchvision",
        __init__="raise RuntimeError('operator torchvision::nms does not exist')",
    )
    found = read(environment.doctor("--json"))
    broken = finding(found, "torchvision", "warning")
    assert "operator torchvision::nms does not exist" in broken["message"]
    assert "pip uninstall torchvision torchaudio torchcodec" in broken["remedy"]


def test_a_plugin_without_metadata_is_a_problem(make_environment):
    environment = make_environment(without=("vllm", "torch", "functorch"))
    for information in environment.site.glob("vllm_hybrid_kv-*.dist-info"):
        information.unlink()
    found = read(environment.doctor("--json"))
    assert "no installed package registers" in finding(found, "entry_point")["message"]
