# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments are reported in one line with status 2, before vLLM is imported."""

import sys

import pytest

from testing import processes
from testing.shapes import SHAPES
from testing.virtual_environments import distribution
from vllm_hybrid_kv.version import __version__

LLAMA = str(SHAPES["llama-3.1-8b"])
PLAN = ("plan", LLAMA, "--memory", "24GiB")
REPLAY = ("replay", "trace.jsonl", "--model", LLAMA, "--memory", "1GiB")
EVAL = ("eval", "model", "--data", "data.jsonl")

COMMAND = """
import sys
from vllm_hybrid_kv.tools.main import app
try:
    app(prog_name="vllm-hybrid-kv")
finally:
    print(sorted({"vllm", "torch", "transformers"} & set(sys.modules)))
"""


@pytest.fixture
def run(tmp_path):
    """A function that runs the command in a process that prints the slow packages it imported."""
    (tmp_path / "folder").mkdir()
    site = tmp_path / "site"
    distribution(site, "acme-kv", "1.5", "[vllm_hybrid_kv]\nacme = acme_kv\n")
    return lambda *arguments, **environment: processes.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=tmp_path,
        **{"PYTHONPATH": str(site), **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope",), "No such command 'nope'"),
        (("--nope",), "No such option: --nope"),
        (("plan", LLAMA), "plan: Missing option '--memory'"),
        (("plan", LLAMA, "--memory", "much"), "plan: --memory: 'much' is not a size"),
        ((*PLAN, "--boundary-layers", "-1"), "plan: Invalid value for '--boundary-layers'"),
        ((*PLAN, "--device", "tpu"), "plan: --device: 'tpu' is not a device"),
        ((*PLAN, "--unify", "best"), "plan: --unify: 'best' is not a strategy: choose lcm or "),
        ((*PLAN, "--unify", "min_wast"), "; did you mean 'min_waste'?"),
        # `acme` is a strategy of another package, so the command accepts it.
        (("plan", "missing", *PLAN[2:], "--unify", "acme"), "plan: missing: No such file"),
        (("plan", "no/such-model", *PLAN[2:]), "the local Hugging Face cache has no config.json"),
        ((*PLAN, "--json", "no/such/file"), "plan: --json: no/such/file: No such file"),
        ((*PLAN, "--json", "folder"), "plan: --json: folder: Is a directory"),
        ((*PLAN, "--plot", "plan.larch"), "plan: --plot: plan.larch: 'larch' is none of "),
        (("replay",), "replay: Missing argument"),
        ((*REPLAY, "--coordinator", "lru"), "replay: --coordinator: 'lru' is not a strategy"),
        ((*REPLAY, "--compare", "lru"), "replay: --compare: 'lru' is not a strategy"),
        ((*REPLAY, "--match-unit", "16"), "replay: --match-unit: '16' is not a strategy"),
        (REPLAY, "replay: trace.jsonl cannot be read: No such file"),
        (("doctor", "--timeout", "0"), "doctor: Invalid value for '--timeout'"),
        (("doctor", "--additional-config", "{"), "doctor: --additional-config is not JSON: "),
        ((*EVAL, "--nope"), "eval: No such option: --nope"),
    ],
)
def test_a_wrong_argument_is_reported_before_vllm_is_imported(run, arguments, message):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith(("vllm-hybrid-kv ", "vllm-hybrid-kv: "))
    assert message in line


@pytest.mark.parametrize(("name", "value"), [("COORDINATOR", "lru"), ("BOUNDARY_LAYERS", "few")])
def test_a_wrong_setting_in_the_environment_is_reported_before_vllm_is_imported(run, name, value):
    done = run(*PLAN, **{f"VLLM_HYBRID_KV_{name}": value})
    assert (done.returncode, done.stdout) == (2, "[]\n")
    (line,) = done.stderr.splitlines()
    assert f"VLLM_HYBRID_KV_{name}" in line
    assert repr(value) in line


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ((), ("Commands", "doctor", "--version")),
        (("plan",), ("plan MODEL --memory SIZE", "min_waste", "defaults to turboquant_k8v4")),
        (("replay",), ("hybrid_aware, stock", "auto, stock", "recomputed without a state:")),
    ],
)
def test_help_names_commands_arguments_choices_and_rows(run, arguments, texts):
    printed = " ".join(run(*arguments, "--help", COLUMNS="200").stdout.split())
    assert all(text in printed for text in texts)


def test_the_version_is_printed_and_a_missing_command_is_an_error(run):
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"vllm-hybrid-kv {__version__}\n[]\n")
    without = run()
    assert without.returncode == 2
    assert "doctor" in without.stdout + without.stderr
