# SPDX-License-Identifier: Apache-2.0
"""The package is one pure-Python wheel that contains the kernels and imports without vLLM."""

import sys
import zipfile
from email.parser import Parser
from pathlib import Path

from testing.processes import run

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_runs_on_any_python_and_platform(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_contains_every_module_of_the_tree(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_hybrid_kv").rglob("*.py")}
    modules |= {
        f"vllm_hybrid_kv/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")
    }
    assert packed == modules


def test_the_wheel_declares_its_requirements_and_entry_points(unpacked_package):
    (info,) = unpacked_package.glob("*.dist-info")
    metadata = Parser().parsestr((info / "METADATA").read_text())
    needs = {
        need.partition(">")[0] for need in metadata.get_all("Requires-Dist") if ";" not in need
    }
    assert needs == {"pluggy", "pydantic", "rich", "typer"}
    assert {"cpu", "cuda", "plot", "test"} <= set(metadata.get_all("Provides-Extra"))
    entry_points = (info / "entry_points.txt").read_text().split()
    assert entry_points == [
        *("[console_scripts]", "vllm-hybrid-kv", "=", "vllm_hybrid_kv.tools.main:app"),
        *("[vllm.general_plugins]", "hybrid_kv", "=", "vllm_hybrid_kv.plugin:register"),
    ]
    assert list(info.rglob("LICENSE"))


def test_the_editable_install_finds_the_kernels_from_any_folder(tmp_path):
    code = "import vllm_hybrid_kv.kernels.k8v4 as k; print(k.__file__)"
    done = run([sys.executable, "-c", code], cwd=tmp_path)
    assert Path(done.stdout.strip()).name == "k8v4.py", done.stderr
