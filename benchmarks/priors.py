"""The five kinds of prior side by side, on the same embeddings, steps and seeds.

    python benchmarks/priors.py --work DIR --train ROWS --val ROWS [--floor ROWS] [--steps 300]

ROWS are folders that `python -m unclip.embed` wrote. Every kind but the linear one has the same
transformer and sees the same batches; each is trained with each seed by train_prior.py and measured
by unclip.evaluation.prior. Runs that are there already are not repeated. Prints a Markdown table:
means over the seeds, and in brackets the least and the most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("linear", "one_step", "autoregressive", "flow", "diffusion")
SIZES = {"width": 128, "depth": 4, "head_dim": 32}


def call(*words: str) -> None:
    """Run a command of this repository; stdout is the table's."""
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=sys.stderr)


def train(kind: str, seed: int, a: argparse.Namespace, run: Path) -> float:
    """Train one prior; seconds of processor time, which other work on the machine leaves alone."""
    flags = [f"--config=configs/prior/{kind}.yaml", f"--data={a.train.resolve()}", f"--run={run}"]
    if kind == "linear":
        flags.append("--linear.num_samples=1000000")
    else:
        section = "prior" if kind == "diffusion" else kind
        flags += [f"--{section}.network.{name}={value}" for name, value in SIZES.items()]
        flags.append(f"--max-steps={a.steps}")
    began = processor_seconds()
    call("train_prior.py", *flags, f"--fit.seed={seed}", "--num-workers=0")
    return processor_seconds() - began


def processor_seconds() -> float:
    """Of the commands that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def measured(kind: str, seed: int, a: argparse.Namespace) -> dict[str, Any]:
    """What is known of one kind and seed."""
    run = a.work.resolve() / f"{kind}-{seed}"
    result = run / "measured.json"
    if not result.is_file():
        seconds = train(kind, seed, a, run)
        flags = [f"--model={run}", f"--data={a.val.resolve()}", f"--num={a.num}"]
        if a.floor is not None:
            flags.append(f"--floor={a.floor.resolve()}")
        if kind == "flow":  # heun asks the network twice a step
            flags.append("--num-inference-steps=16")
        call("-m", "unclip.evaluation.prior", *flags, f"--out={run / 'writing.json'}")
        values = json.loads((run / "writing.json").read_text())
        result.write_text(json.dumps({**values, "seconds": seconds}, indent=2))
    return dict(json.loads(result.read_text()))


COLUMNS = {
    "Frechet": ("frechet_sampled_to_real", "{:.4f}"),
    "cosine": ("cosine_sampled", "{:.3f}"),
    "recall": ("recall", "{:.2f}"),
    "precision": ("precision", "{:.2f}"),
    "between samples": ("cosine_between_samples_of_one_caption", "{:.3f}"),
    "parameters": ("parameters", "{:,}"),
    "training s (processor)": ("seconds", "{:.0f}"),
    "ms a sample": ("milliseconds_a_sample", "{:.2f}"),
}


def row(name: str, runs: Sequence[dict[str, Any]]) -> str:
    """A line of the table."""
    cells = []
    for key, form in COLUMNS.values():
        values = [run[key] for run in runs]
        mean = sum(values) / len(values)
        cell = form.format(int(mean) if key == "parameters" else mean)
        if len(set(values)) > 1 and key not in ("seconds", "milliseconds_a_sample"):
            cell += f" [{form.format(min(values))}, {form.format(max(values))}]"
        cells.append(cell)
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--train", type=Path, required=True, help="embeddings to train on")
    parser.add_argument("--val", type=Path, required=True, help="embeddings to measure on")
    parser.add_argument("--floor", type=Path, help="more, for the floor (default: rest of --val)")
    parser.add_argument("--num", type=int, default=1000, help="captions measured")
    parser.add_argument("--steps", type=int, default=300, help="of 128 embeddings each")
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()
    lines = []
    for kind in KINDS:
        # Nothing is drawn when the linear one is solved: all its seeds are one.
        runs = [measured(kind, s, a) for s in range(1 if kind == "linear" else a.seeds)]
        lines.append(row(kind.replace("_", " "), runs))
    one = runs[0]
    text = f"{one['frechet_text_embed_to_real']:.4f} | {one['cosine_text_embed']:.3f}"
    floor = f"{one['frechet_real_to_real']:.4f} | | {one['recall_of_real']:.2f}"
    print(f"| prior | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}")
    print("\n".join(lines))
    print(f"| text_embed itself | {text} |" + " |" * (len(COLUMNS) - 2))
    print(f"| mean embedding | | {one['cosine_mean_embed']:.3f} |" + " |" * (len(COLUMNS) - 2))
    print(f"| other real ones (floor) | {floor} |" + " |" * (len(COLUMNS) - 3))


if __name__ == "__main__":
    main()
