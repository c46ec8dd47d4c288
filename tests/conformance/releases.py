# SPDX-License-Identifier: Apache-2.0
"""Get what vLLM's tests need: the tests of each release, their packages, and unpacked wheels."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from testing.processes import run
from vllm_hybrid_kv.patches.targets import MINORS

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache"

RELEASES = {minor: f"{minor}.0" for minor in MINORS}
"""For each supported minor, the release whose tests are run."""

SUITE = "tests/v1/core"
"""The folder of vLLM's tests that is run."""

INSTALLED_MINOR = "0.32"
"""The minor that is installed. Other minors have no CPU build and are only unpacked."""

WHEEL_0_33 = "HYBRID_KV_TEST_WHEEL_033_DIR"

OUTER_VARIABLES = ("VLLM_HYBRID_KV_", "HYBRID_KV_TEST_", "PYTEST_", "PYTHONPATH", "VLLM_PLUGINS")
"""Environment variables with these prefixes must not reach a child process that runs tests."""

# A package that vLLM's conftest.py imports, and a pytest plugin that ends tests that hang.
TEST_TOOLS = ("tblib==3.2.2", "pytest-timeout==2.4.0")

# To read the source archive's metadata, pip runs its setup.py, which imports these packages.
BUILD_TOOLS = ("setuptools-rust==1.13.0", "setuptools-scm==10.3.4")

# vLLM's tests name these models but need no weights. If a folder has the model's name, vLLM
# downloads nothing. A config.json with these fields is enough.
_OPT = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "torch_dtype": "float16"}
MODEL_CONFIGURATIONS: dict[str, dict[str, object]] = {
    "facebook/opt-125m": _OPT,
    "facebook/opt-350m": {
        **_OPT,
        "hidden_size": 1024,
        "word_embed_proj_dim": 512,
        "ffn_dim": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "do_layer_norm_before": False,
    },
    "Qwen/Qwen1.5-7B": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": "bfloat16",
        "intermediate_size": 11008,
    },
    "Qwen/Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "torch_dtype": "bfloat16",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 40960,
    },
    "Qwen/Qwen3-Next-80B-A3B-Instruct": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "torch_dtype": "bfloat16",
        "intermediate_size": 5120,
        "max_position_embeddings": 262144,
    },
}


PIP_TIMEOUT_S = 3600.0


class ConformanceError(Exception):
    """vLLM's tests could not be run."""


def fetch_tests(minor: str) -> Path:
    """Return the folder with a release's `tests/` and `pyproject.toml`; download it once.

    Raises:
        ConformanceError: The download failed.
    """
    release = RELEASES[minor]
    folder = CACHE / f"vllm-tests-{release}"
    with filled_once(folder) as empty:
        if empty is not None:
            _download_tests(release, empty)
    return folder


def fetch_test_tools() -> Path:
    """Return a folder with `TEST_TOOLS`, which vLLM's tests need; download them once.

    Raises:
        ConformanceError: The download failed.
    """
    folder = CACHE / "vllm-tests-tools"
    with filled_once(folder) as empty:
        if empty is not None:
            pip("install", "--no-deps", "--target", str(empty), *TEST_TOOLS)
    return folder


def unpacked_wheel(minor: str) -> Path | None:
    """Return the folder to put on `PYTHONPATH` for a minor; None for the installed minor.

    Raises:
        ConformanceError: The wheel is not unpacked.
    """
    if minor == INSTALLED_MINOR:
        return None
    release = RELEASES[minor]
    folder = Path(os.environ.get(WHEEL_0_33) or CACHE / f"vllm-{release}")
    if not (folder / "vllm" / "__init__.py").is_file():
        raise ConformanceError(
            f"vLLM {release} is not unpacked in {folder}: "
            f"python -m pip install --no-deps --target {folder} vllm=={release}"
        )
    return folder


def environment_of(minor: str, *path: Path | None) -> dict[str, str]:
    """Return environment variables for a process that tests a minor; `path` is its `PYTHONPATH`."""
    return {
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, path))),
        "HYBRID_KV_TEST_VLLM_MINOR": minor,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # vLLM caches model classes in this folder, so every release needs one of its own.
        "VLLM_CACHE_ROOT": str(CACHE / f"vllm-{minor}-cache"),
    }


def write_model_configurations(folder: Path) -> None:
    """Write a folder with a config.json for every model that the tests name."""
    for name, configuration in MODEL_CONFIGURATIONS.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(configuration, indent=1))


def _download_tests(release: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        tools = Path(scratch) / "tools"
        pip("install", "--target", str(tools), *BUILD_TOOLS)
        pip(
            *("download", "--no-deps", "--no-binary", "vllm", "--no-build-isolation"),
            *("--dest", scratch, f"vllm=={release}"),
            # Otherwise setup.py would need CUDA to build extensions, and git to find the version.
            PYTHONPATH=str(tools),
            VLLM_TARGET_DEVICE="empty",
            VLLM_VERSION_OVERRIDE=release,
            SETUPTOOLS_SCM_PRETEND_VERSION=release,
        )
        top = f"vllm-{release}/"
        with tarfile.open(Path(scratch) / f"vllm-{release}.tar.gz") as archive:
            for member in archive:
                path = member.name.removeprefix(top)
                # pyproject.toml declares the markers of the tests, so extract it too.
                if path == "pyproject.toml" or path.startswith("tests/"):
                    archive.extract(member.replace(name=path), folder, filter="data")


def pip(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = run(command, timeout_s=PIP_TIMEOUT_S, **environment)
    if done.returncode:
        raise ConformanceError(f"pip {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")


@contextmanager
def filled_once(folder: Path) -> Iterator[Path | None]:
    """Yield an empty folder for the caller to fill, or None if `folder` exists.

    When the caller is done, the filled folder becomes `folder`. Other processes wait until then.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            yield None
            return
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        part.rename(folder)
