# SPDX-License-Identifier: Apache-2.0
"""The package is one pure-Python wheel that contains the kernels and imports without vLLM."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # Build from a copy, because setuptools leaves a build folder and reuses its old files.
    source = tmp_path_factory.mktemp("source")
    for name in ("vllm_hybrid_kv", "kernels"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", str(folder), str(source)),
        ],
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run_isolated(code, folder):
    """Run code with the unpacked wheel and the standard library only."""
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_the_wheel_runs_on_any_python_and_platform(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_contains_every_module_of_the_tree(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_hybrid_kv").rglob("*.py")}
    modules |= {
        f"vllm_hybrid_kv/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")
    }
    assert packed == modules


def test_the_wheel_declares_its_requirements_and_entry_points(unpacked):
    (info,) = unpacked.glob("*.dist-info")
    metadata = Parser().parsestr((info / "METADATA").read_text())
    needs = {
        need.partition(">")[0] for need in metadata.get_all("Requires-Dist") if ";" not in need
    }
    assert needs == {"pluggy", "pydantic", "rich", "typer"}
    assert {"cpu", "cuda", "plot", "test"} <= set(metadata.get_all("Provides-Extra"))
    entry_points = (info / "entry_points.txt").read_text().split()
    assert entry_points == [
        "[console_scripts]",
        "vllm-hybrid-kv",
        "=",
        "vllm_hybrid_kv.tools.main:app",
        "[vllm.general_plugins]",
        "hybrid_kv",
        "=",
        "vllm_hybrid_kv.plugin:register",
    ]
    assert list(info.rglob("LICENSE"))


def test_the_package_imports_without_vllm(unpacked):
    done = run_isolated("import vllm_hybrid_kv; print(vllm_hybrid_kv.__version__)", unpacked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_editable_install_finds_the_kernels_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import vllm_hybrid_kv.kernels.k8v4 as k; print(k.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).name == "k8v4.py"
