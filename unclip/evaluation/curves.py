"""Curves of a sweep, and how single pictures' scores lie: figures for files and for pages."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from unclip.evaluation.results import Metric, Result

INK = "#010203"
"""Of text and lines; in a page it becomes the text's own colour, light or dark."""
COLUMNS = 3
FIDELITY = ("fid", "fd_clip", "kid", "cmmd")
"""What stands against CLIPScore, the first that was computed."""


def sweep_figure(axis: str, points: Sequence[tuple[Any, Mapping[str, Metric]]]) -> Figure:
    """The curve of fidelity against CLIPScore, and each metric against the axis.

    Args:
        axis: what was varied. points: its values, and the metrics of each.

    Raises:
        ValueError: no metric was computed.
    """
    names = [n for n in dict.fromkeys(n for _, m in points for n in m) if _values(points, n)]
    if not names:
        raise ValueError("a sweep must have a metric to draw; got none that was computed")
    others = [n for n in names if n.startswith("fd_") and n not in FIDELITY]
    fidelity = next((n for n in (*FIDELITY, *others) if n in names), None)
    pair = [("clip_score", fidelity)] if fidelity and "clip_score" in names else []
    figure, axes = _panels(len(names) + len(pair))
    for panel, (x, y) in zip(axes, pair, strict=False):
        _trade_off(panel, axis, points, x, str(y))
    for panel, name in zip(axes[len(pair) :], names, strict=False):
        _against(panel, axis, points, name)
    return figure


def score_figure(results: Mapping[str, Result], scores: Sequence[str]) -> Figure:
    """For each score, which share of the pictures lies at or below a value, a line a result."""
    figure, axes = _panels(len(scores))
    for panel, score in zip(axes, scores, strict=False):
        for head, result in results.items():
            found = sorted(v for s in result.samples if (v := s.scores.get(score)) is not None)
            shares = [(k + 1) / len(found) for k in range(len(found))]
            panel.step(found, shares, where="post", label=head)
        panel.set(xlabel=score, ylabel="share of pictures", ylim=(0, 1.02))
        if len(results) > 1:
            panel.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def svg(figure: Figure) -> str:
    """A figure as an element of a page: no prologue, no links, text and lines in the page's own
    colour."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "unclip"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", drawn)
    drawn = drawn.replace("xlink:href", "href").replace(INK, "currentColor")
    return drawn


def _values(points: Sequence[tuple[Any, Mapping[str, Metric]]], name: str) -> list[tuple[Any, Any]]:
    """Value of the axis and metric, of the points where it was computed."""
    return [
        (value, metrics[name])
        for value, metrics in points
        if name in metrics and metrics[name].value is not None
    ]


def _places(values: Sequence[Any]) -> list[Any]:
    """Where values stand on the axis: checkpoints at their step, other paths under their last part
    as long as that tells them apart."""
    steps = [re.search(r"step-(\d+)/?$", str(value)) for value in values]
    if all(steps):
        return [int(step[1]) for step in steps if step]
    if all(isinstance(value, Real) for value in values):
        return list(values)
    names = [Path(str(value)).name for value in values]
    return names if len(set(names)) == len(names) else [str(value) for value in values]


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    inked: Any = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    with rc_context(dict.fromkeys(inked, INK)):
        figure = Figure(figsize=(3.6 * columns, 2.9 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for panel in axes[:count]:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[count:]:
        panel.remove()
    return figure, axes[:count]


def _trade_off(
    panel: Axes, axis: str, points: Sequence[tuple[Any, Mapping[str, Metric]]], x: str, y: str
) -> None:
    across = dict(_values(points, x))
    both = [(v, across[v].value, up.value) for v, up in _values(points, y) if v in across]
    panel.plot([one[1] for one in both], [one[2] for one in both], "o-", markersize=4)
    for place, (_, right, up) in zip(_places([one[0] for one in both]), both, strict=True):
        panel.annotate(
            str(place), (right, up), (4, 4), textcoords="offset points", fontsize=8, color=INK
        )
    panel.set(xlabel=x, ylabel=y, title=f"by {axis}")
    panel.margins(0.12)


def _against(
    panel: Axes, axis: str, points: Sequence[tuple[Any, Mapping[str, Metric]]], name: str
) -> None:
    found = _values(points, name)
    places = _places([value for value, _ in found])
    numeric = all(isinstance(place, Real) for place in places)
    heights = [metric.value for _, metric in found]
    ends = [metric.interval or (metric.value, metric.value) for _, metric in found]
    errors = [
        [max(0.0, h - low) for h, (low, _) in zip(heights, ends, strict=True)],
        [max(0.0, high - h) for h, (_, high) in zip(heights, ends, strict=True)],
    ]
    panel.errorbar(places, heights, errors, fmt="o-" if numeric else "o", markersize=4, capsize=2)
    if not numeric:
        panel.tick_params("x", labelrotation=20)
    better = found[0][1].better
    panel.set(xlabel=axis, ylabel=f"{name} ({better} is better)" if better else name)
