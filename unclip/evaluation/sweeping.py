"""One protocol at several values of one setting: a result folder each, a table and curves.

DIR/sweep.json    what is varied, the points, and the settings that they share
DIR/AXIS=VALUE/   a result folder a point; one that is finished is not measured again
DIR/sweep.csv     a line a finished point
DIR/sweep.png     the curves
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from unclip.checkpoint import written_file
from unclip.evaluation.curves import sweep_figure
from unclip.evaluation.results import (
    FORMAT,
    RESULT,
    SWEEP,
    Result,
    differing,
    read_result,
    read_sweep,
)

Axis = Literal["guidance", "steps", "sampler", "embed", "prior", "candidates", "checkpoint"]
AXES: tuple[Axis, ...] = get_args(Axis)
NUMBERS: dict[str, type] = {"guidance": float, "steps": int, "candidates": int}
"""Axes whose values are numbers; the others' are names."""
Point = tuple[Any, Path]
"""A value, and the result folder of it."""

log = logging.getLogger(__name__)


def typed(axis: Axis, words: Sequence[str]) -> list[Any]:
    """The values of an axis: numbers in their order, names as they come, each once.

    Raises:
        ValueError: there are none, or one is no number where it must be, or stands twice.
    """
    kind = NUMBERS.get(axis, str)
    try:
        values = [kind(word) for word in words]
    except ValueError as error:
        said = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"values of {axis} must be {said}; got {' '.join(words)}") from error
    folders = [folder_name(axis, value) for value in values]
    if not values or len(set(folders)) < len(folders):
        raise ValueError(
            f"values of {axis} must be one or more, each once and by another name; got "
            f"{' '.join(words) or 'none'}: write some like --values 1 2 3"
        )
    return sorted(values) if axis in NUMBERS else values


def folder_name(axis: Axis, value: Any) -> str:
    """Of a point, within the sweep's folder; of a path the last two parts tell it from others."""
    text = "-".join(Path(value).parts[-2:]) if isinstance(value, str) else str(value)
    return f"{axis}=" + re.sub(r"[^\w.+-]+", "-", text).strip("-")


def open_sweep(
    folder: Path, axis: Axis, values: Sequence[Any], settings: Mapping[str, Any]
) -> list[Point]:
    """Write what is varied into a new folder, or see that one that is there goes on with it.

    Args:
        folder: of the sweep.
        axis: what is varied.
        values: new ones are added to those that are there.
        settings: plain values that all points share.

    Returns:
        All points, those of an earlier command too.

    Raises:
        ValueError: the folder is of another axis or of other settings, or holds something else.
    """
    path = folder / SWEEP
    shared = json.loads(json.dumps(settings))
    names = {folder_name(axis, value): value for value in values}
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        # Not read_sweep: nothing need be finished.
        old = {"axis": there.get("axis"), "settings": there.get("settings")}
        changed = differing(old, {"axis": axis, "settings": shared})
        if changed:
            name, (before, now) = next(iter(changed.items()))
            raise ValueError(
                f"out must hold a sweep of the same settings; got {folder}, where "
                f"{name.removeprefix('settings.')} is {before!r} and not {now!r}: choose another "
                "--out, or go on with that"
            )
        names = {point["folder"]: point["value"] for point in there["points"]} | names
    elif folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise ValueError(
            f"out must be a new folder, or that of a sweep; got {folder}, which holds other "
            "things: choose another --out"
        )
    points = [(value, name) for name, value in names.items()]
    if axis in NUMBERS:
        points.sort()
    told = {
        "format": FORMAT,
        "axis": axis,
        "points": [{"value": value, "folder": name} for value, name in points],
        "settings": shared,
    }
    with written_file(path) as aside:
        aside.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [(value, folder / name) for value, name in points]


def sweep(
    folder: Path,
    axis: Axis,
    values: Sequence[Any],
    settings: Mapping[str, Any],
    run: Callable[[Any, Path], object],
    *,
    is_main: bool = True,
    wait: Callable[[], object] = lambda: None,
) -> None:
    """Measure each point that is not finished, and write the table and the curves after each.

    Args:
        folder, axis, values, settings: as `open_sweep`.
        run: measures one value into a result folder; every process calls it.
        is_main: whether this process writes. wait: comes back when all processes have called it.

    Raises:
        ValueError: as `open_sweep`, or what `run` raises; finished points stay.
    """
    if is_main:
        open_sweep(folder, axis, values, settings)
    wait()
    told = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
    points = [(point["value"], folder / point["folder"]) for point in told["points"]]
    todo = [(value, path) for value, path in points if not (path / RESULT).is_file()]
    wait()  # No process may look for what another has already finished.
    for value, path in todo:
        run(value, path)
        if is_main:
            write_tables(folder)
    if is_main and not todo:
        write_tables(folder)


def write_tables(folder: Path) -> None:
    """Write `sweep.csv` and `sweep.png` of the finished points."""
    axis, points = read_sweep(folder)
    results = [(value, read_result(path)) for value, path in points]
    with written_file(folder / "sweep.csv") as aside:
        aside.write_text(as_csv(axis, results), encoding="utf-8")
    try:
        figure = sweep_figure(axis, [(value, result.metrics) for value, result in results])
    except ValueError as error:
        log.warning("no curves: %s", error)
        return
    with written_file(folder / "sweep.png") as aside:
        figure.savefig(aside, format="png", dpi=120)


def as_csv(axis: str, results: Sequence[tuple[Any, Result]]) -> str:
    """A line a point: its value, each metric and the ends of its interval; empty where there is
    none."""
    names = dict.fromkeys(name for _, result in results for name in result.metrics)
    rows = []
    for value, result in results:
        row = {axis: value}
        for name in names:
            metric = result.metrics.get(name)
            ends = (metric.interval if metric else None) or (None, None)
            row |= {name: metric.value if metric else None}
            row |= {f"{name}_low": ends[0], f"{name}_high": ends[1]}
        rows.append(row)
    columns = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
