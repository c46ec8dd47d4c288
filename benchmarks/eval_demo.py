# SPDX-License-Identifier: Apache-2.0
"""How k8v4 pages and boundary layers change predictions.

    python -m benchmarks.eval_demo [--model FOLDER] [--out DIR] [--windows N]

Runs `vllm-hybrid-kv eval` with the unquantised cache, fp8, and k8v4 with 0, 1 and 2 unquantised
layers at each end, on a trained model of `tests/recall`. Its data, which the model was not trained
on, is text of Python's documentation and pairs of symbols to recall.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from testing.machine import host

ROOT = Path(__file__).resolve().parents[1]
TRAINED = ROOT / "tests" / "recall" / "models" / "gemma3"
K8V4 = "turboquant_k8v4"
CACHES = ("fp8", *(f"{K8V4}[boundary_layers={number}]" for number in (0, 1, 2)))
WINDOW = 1024
SEED = 6
NAME = "eval_demo"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}",
        description="How k8v4 pages change predictions",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, default=TRAINED, help="a trained model of tests/recall")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="for the results")
    add("--windows", type=int, default=10, help="sequences of each kind")
    add("--work", type=Path, default=ROOT / ".cache" / NAME, help="for interrupted runs")
    return parser.parse_args(arguments)


def trained_data(count: int) -> tuple[str, list[list[int]]]:
    """Return a description of the data for a trained model, and the data."""
    import numpy

    from testing import recall_sequences as recall

    draw = numpy.random.default_rng(SEED)
    text = recall.held_out()
    starts = draw.integers(0, len(text) - WINDOW, count)
    texts = [[recall.BOS, *text[at : at + WINDOW - 1].tolist()] for at in starts]
    pairs = [recall.recall_sequence(draw, WINDOW).tokens.tolist() for _ in range(count)]
    description = (
        f"{count} windows of text from Python's documentation that it was not trained on, and "
        f"{count} of pairs to recall between text, {WINDOW:,} tokens each"
    )
    return description, [*texts, *pairs]


def evaluate(model: Path, data: Path, out: Path, work: Path) -> str:
    """Run the command and return its output; its progress goes to the screen."""
    command = [
        *(str(Path(sys.executable).with_name("vllm-hybrid-kv")), "eval", str(model)),
        *("--data", str(data), "--kv-cache-dtype", ",".join(CACHES), "--context", str(WINDOW)),
        *("--work", str(work)),
        *("--json", str(out / f"{NAME}.json"), "--plot", str(out / f"{NAME}.png")),
    ]
    environment = {**os.environ, "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def markdown(data: str, model: str, printed: str) -> str:
    machine = host()
    return f"""# What k8v4 pages change about predictions

`make eval-demo`, which is `python -m benchmarks.{NAME}`. {model}

Data: {data}.

Machine: {machine["cpu"]}, {machine["cpus"]} CPUs; Python {machine["python"]}, vLLM \
{machine["vllm"]}.

```
{printed}
```

![KL divergence by position, and its tail]({NAME}.png)
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    model, work = options.model, options.work / "trained"
    what, sequences = trained_data(options.windows)
    about = f"The model is that of `{_from_here(model)}`, trained on recall and text."
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data.jsonl"
        data.write_text("".join(f"{json.dumps({'prompt_token_ids': s})}\n" for s in sequences))
        printed = evaluate(_from_here(model), data, options.out, work).strip()
    print(printed)
    (options.out / f"{NAME}.md").write_text(markdown(what, about, printed))


def _from_here(path: Path) -> Path:
    """Return a path relative to the current folder, if it is inside."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    main()
