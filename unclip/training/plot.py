"""Draw the loss curves of runs: `python -m unclip.training.plot RUN [RUN ...] --out loss.png`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from unclip.config import one_line_errors


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, in the order of their steps; where a resumed run repeats
    a step, the later line.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {run} is not the folder of a training run")
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [line for _, line in sorted({line["step"]: line for line in lines}.items())]


def plot(runs: list[Path], metric: str, out: Path) -> None:
    """Write a picture of `metric` against samples seen, one curve a run, on logarithmic axes; the
    same on held-out data is dashed.

    Raises:
        ValueError: no run has such a metric.
    """
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        lines, colour = read_metrics(run), None
        for name, style, told in ((metric, "-", ""), (f"val/{metric}", "--", ", held out")):
            points = [(line["samples"], line[name]) for line in lines if name in line]
            if points:
                label = f"{run.name}{told}"
                (drawn,) = axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
                colour = drawn.get_color()
    if not axes.lines:
        known = sorted({name for run in runs for line in read_metrics(run) for name in line})
        raise ValueError(
            f"metric must be one that a run has; got {metric}: choose one of {', '.join(known)}"
        )
    axes.set(xlabel="samples seen", ylabel=metric, xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves, not over them
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, bbox_inches="tight")


def main() -> None:
    """Parse the command line and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--metric", default="loss", help="a key of metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("loss.png"))
    arguments = parser.parse_args()
    with one_line_errors():
        plot(arguments.runs, arguments.metric, arguments.out)


if __name__ == "__main__":
    main()
