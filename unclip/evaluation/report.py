"""A page to look at: `python -m unclip.evaluation.report DIR [DIR ...] --out report.html`.

One HTML file, without anything fetched from elsewhere, of one or several result folders side by
side: metrics with their intervals, tables, curves, pictures (random, best and worst by a score),
and what it takes to repeat them. A sweep's folder stands for its points and adds their curves.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.config import one_line_errors
from unclip.evaluation.compare import DISTANCE_RESAMPLES, RESAMPLES, compare, spelled
from unclip.evaluation.curves import score_figure, svg, sweep_figure
from unclip.evaluation.pages import inlined, number, render, write_page
from unclip.evaluation.results import Metric, Result, Sample, is_sweep, read_result, read_sweep

if TYPE_CHECKING:
    from unclip.evaluation.neighbours import Neighbours

THUMB, NEAR = 192, 64
"""Longer side of a picture in the page, and of a neighbour, px; smaller ones stay as they are."""
FEW = 5000
"""Pictures up to which a report resamples distances; of more `compare` does, and takes long."""
PREFERRED = ("clip_score", "fss", "oracle_all")
"""Scores that pictures are ranked by, the first that is there."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a report shows."""

    random: int = 24
    """Pictures drawn by lot, of each result; the same captions of all where they have the same."""
    extremes: int = 12
    """Best and worst pictures, so many of each."""
    score: str | None = None
    """What they are ranked by; None: CLIPScore, or the first score that is there."""
    seed: int = 0
    """Of the lot."""
    neighbours: bool = False
    """Show beside each picture the nearest of the reference set, read from where the protocol says,
    where an encoder's features of both are there."""
    encoder: str | None = None
    """Whose features say what is near; None: CLIP's, or the first that has a reference."""
    resamples: int = RESAMPLES
    """Of the differences between the first result and the others; 0 leaves them out."""

    def __post_init__(self) -> None:
        for name in ("random", "extremes", "resamples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}: use 12")


def build_report(folders: Sequence[Path], options: ReportOptions | None = None) -> str:
    """The page of some result folders and sweeps.

    Raises:
        FileNotFoundError, ValueError: a folder is no result, unfinished or damaged; no picture has
            the score; the reference set is not there.
    """
    options = options or ReportOptions()
    results, sweeps = _read(folders)
    heads = _heads(results)
    named = dict(zip(heads, results, strict=True))
    neighbours: dict[str, Neighbours] = {}
    if options.neighbours:
        from unclip.evaluation.neighbours import neighbours_of

        neighbours = {head: neighbours_of(one, options.encoder) for head, one in named.items()}
    groups, not_ranked = _groups(named, neighbours, options)
    return render(
        "report.html",
        title=" / ".join(dict.fromkeys(result.name for result in results)) + ": what was measured",
        columns=[_column(head, result) for head, result in named.items()],
        metrics=_metric_rows(results),
        comparisons=[] if sweeps else _comparisons(named, options),
        tables=[
            _table(f"{name}, {head}" if len(named) > 1 else name, table)
            for head, result in named.items()
            for name, table in result.tables.items()
        ],
        curves=_curves(named, sweeps),
        groups=groups,
        not_ranked=not_ranked,
    )


def rank(samples: Sequence[Sample], score: str, better: str | None) -> list[Sample]:
    """Samples that have a score, the best first; equals stay in order."""
    scored = [s for s in samples if s.scores.get(score) is not None]
    sign = 1 if better == "lower" else -1
    return sorted(scored, key=lambda s: sign * (s.scores[score] or 0.0))


Sweeps = list[tuple[str, str, list[tuple[Any, Mapping[str, Metric]]]]]


def _read(folders: Sequence[Path]) -> tuple[list[Result], Sweeps]:
    results: list[Result] = []
    sweeps: Sweeps = []
    for folder in folders:
        if is_sweep(folder):
            axis, points = read_sweep(folder)
            found = [(value, read_result(path)) for value, path in points]
            results += [result for _, result in found]
            sweeps.append((str(folder), axis, [(v, r.metrics) for v, r in found]))
        else:
            results.append(read_result(folder))
    return results, sweeps


def _heads(results: Sequence[Result]) -> list[str]:
    """A short name for each result: its folder's, or more of the path where two are alike."""
    parts = [result.folder.resolve().parts for result in results]
    for depth in range(1, max(map(len, parts)) + 1):
        heads = ["/".join(part[-depth:]) for part in parts]
        if len(set(heads)) == len(heads):
            return heads
    raise ValueError(
        f"each folder must be named once; got {results[0].folder} and others, one of them twice"
    )


# --- numbers --------------------------------------------------------------------------------------


def _column(head: str, result: Result) -> dict[str, Any]:
    model = result.model.get("name", "")
    facts = [
        ("model", model),
        ("drawn on", result.device),
        ("at", result.created),
        ("seconds", ", ".join(f"{k} {number(v)}" for k, v in result.seconds.items())),
        ("versions", ", ".join(f"{k} {v}" for k, v in result.versions.items())),
    ]
    weights = {f: h for metric in result.metrics.values() for f, h in metric.weights.items()}
    settings = {name: metric.settings for name, metric in result.metrics.items()}
    return {
        "head": head,
        "model": model,
        "count": len(result.samples),
        "created": result.created,
        "folder": str(result.folder),
        "command": shlex.join(result.command),
        "protocol_name": result.name,
        "protocol_sha256": result.protocol_sha256,
        "protocol": _plain(result.protocol),
        "settings": _plain(settings),
        "hashes": [*result.model.get("stages", {}).items(), *weights.items()],
        "facts": [(name, value) for name, value in facts if value],
    }


def _plain(values: Any) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False)


def _metric_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys(name for result in results for name in result.metrics):
        metrics = [result.metrics.get(name) for result in results]
        better = next(m.better for m in metrics if m is not None)
        values = [m.value for m in metrics if m is not None and m.value is not None]
        reasons = {m.reason for m in metrics if m is not None}
        best = None
        if len(values) > 1 and better in ("lower", "higher"):
            best = min(values) if better == "lower" else max(values)
        rows.append(
            {
                "name": name,
                "better": f"{better} is better" if better else "",
                "cells": [_cell(metric, best) for metric in metrics],
                # The same for all, and so said once.
                "reason": reasons.pop() if len(reasons) == 1 and not values else None,
            }
        )
    return rows


def _cell(metric: Metric | None, best: float | None) -> dict[str, Any] | None:
    if metric is None:
        return None
    interval = None if metric.interval is None else [number(end) for end in metric.interval]
    return {
        "value": None if metric.value is None else number(metric.value),
        "best": best is not None and metric.value == best,
        "interval": interval,
        "count": metric.count,
        "reason": metric.reason,
    }


def _comparisons(named: Mapping[str, Result], options: ReportOptions) -> list[dict[str, Any]]:
    """Each result held against the first."""
    (first, a), *others = named.items()
    told: list[dict[str, Any]] = []
    for head, b in others if options.resamples else ():
        one: dict[str, Any] = {"head": f"{head} (B) against {first} (A)", "refused": None}
        told.append(one)
        try:
            few = max(len(a.samples), len(b.samples)) <= FEW
            found = compare(
                a,
                b,
                resamples=options.resamples,
                distance_resamples=DISTANCE_RESAMPLES if few else 0,
            )
        except ValueError as error:
            one["refused"] = str(error)
            continue
        one["paired"] = found.paired
        one["drawn_by"] = f"Drawn by other {spelled(found.drawn_by)}." if found.drawn_by else ""
        one["rows"] = [
            {
                "name": d.metric,
                "difference": "-" if d.difference is None else f"{d.difference:+.4g}",
                "interval": _ends(d.interval),
                "verdict": d.verdict or ("" if d.note else "no telling"),
                "note": d.note,
            }
            for d in found.differences
        ]
    return told


def _ends(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else "[{}, {}]".format(*map(number, interval))


def _table(name: str, table: Any) -> dict[str, Any]:
    """A table of rows and cells, whose cells are numbers or fractions with their interval (as the
    oracle's); another is shown as it is."""
    rows = []
    if isinstance(table, Mapping) and not any(
        isinstance(v, (Mapping, list)) for v in table.values()
    ):
        table = {title: {"": value} for title, value in table.items()}
    if isinstance(table, Mapping) and all(isinstance(row, Mapping) for row in table.values()):
        heads = list(dict.fromkeys(head for row in table.values() for head in row))
        for title, row in table.items():
            rows.append({"name": title, "cells": [_table_cell(row.get(h)) for h in heads]})
        if all(cell is not None for row in rows for cell in row["cells"]):
            return {"name": name, "heads": heads, "rows": rows}
    return {"name": name, "rows": None, "plain": _plain(table)}


def _table_cell(cell: Any) -> dict[str, Any] | None:
    if isinstance(cell, Mapping) and {"fraction", "low", "high", "count"} <= set(cell):
        if not cell["count"]:
            return {"value": "-", "interval": ""}
        ends = ", ".join(f"{100 * cell[end]:.1f}" for end in ("low", "high"))
        return {"value": f"{100 * cell['fraction']:.1f}%", "interval": ends}
    if isinstance(cell, (int, float)):
        return {"value": number(cell), "interval": ""}
    if cell is None or isinstance(cell, str):
        return {"value": cell or "-", "interval": ""}
    return None


def _curves(named: Mapping[str, Result], sweeps: Sweeps) -> list[dict[str, Any]]:
    curves = [
        {"head": f"{axis}, {folder}", "svg": svg(sweep_figure(axis, points))}
        for folder, axis, points in sweeps
    ]
    # Of a verdict, right or wrong, the mean says all.
    scores = [
        name
        for name in dict.fromkeys(name for result in named.values() for name in result.scores)
        if any(s.scores.get(name) not in (None, 0, 1) for r in named.values() for s in r.samples)
    ]
    if scores:
        drawn = svg(score_figure(named, scores))
        curves.append({"head": "Scores of single pictures, cumulative", "svg": drawn})
    return curves


# --- pictures -------------------------------------------------------------------------------------


Group = dict[str, Any]


def _groups(
    named: Mapping[str, Result],
    neighbours: Mapping[str, Neighbours],
    options: ReportOptions,
) -> tuple[list[Group], str | None]:
    """Pictures by lot, the best and the worst, and why the latter are missing."""

    def group(head: str, heads: Sequence[str], rows: Sequence[int]) -> Group:
        cards = []
        for row in rows:
            shown = [_picture(named[name], row, neighbours.get(name)) for name in heads]
            cards.append({"caption": named[heads[0]].samples[row].caption, "pictures": shown})
        return {"head": head, "heads": list(heads), "cards": cards}

    every = [[(s.id, s.caption) for s in result.samples] for result in named.values()]
    together = [list(named)] if all(one == every[0] for one in every) else [[h] for h in named]
    groups = []
    for heads in together:
        count = len(named[heads[0]].samples)
        rows = random.Random(options.seed).sample(range(count), min(options.random, count))
        alone = len(named) > 1 and len(heads) == 1
        groups.append(group(f"By lot{', ' + heads[0] if alone else ''}", heads, sorted(rows)))
    known = list(dict.fromkeys(name for result in named.values() for name in result.scores))
    score = options.score or next((n for n in (*PREFERRED, *known) if n in known), None)
    if score is None:
        return groups, "No best and worst: the pictures have no scores of their own."
    if score not in known:
        raise ValueError(
            f"score must be one that pictures have; got {score!r}: use "
            + (", ".join(known) or "none, there is none")
        )
    for head, result in named.items():
        metric = result.metrics.get(score)
        ranked = rank(result.samples, score, metric.better if metric else None)
        count = min(options.extremes, len(ranked))
        places = {sample.path: row for row, sample in enumerate(result.samples)}
        of = f", {head}" if len(named) > 1 else ""
        for name, chosen in (("Best", ranked[:count]), ("Worst", ranked[::-1][:count])):
            rows = [places[sample.path] for sample in chosen]
            groups.append(group(f"{name} by {score}{of}", [head], rows))
    return groups, None


def _picture(result: Result, row: int, neighbours: Neighbours | None) -> dict[str, Any]:
    sample, near = result.samples[row], None
    if neighbours is not None:
        picture, cosine = neighbours.to(row)
        near = {"src": inlined(picture, NEAR), "cosine": f"cosine {cosine:.3f}"}
    scores = [(n, "-" if v is None else number(v)) for n, v in sample.scores.items()]
    return {
        "src": inlined(sample.path, THUMB),
        "seed": sample.seed,
        "scores": scores,
        "near": near,
    }


# --- python -m unclip.evaluation.report -----------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="results and sweeps")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file to write")
    parser.add_argument("--random", type=int, default=24, help="pictures drawn by lot")
    parser.add_argument("--extremes", type=int, default=12, help="best and worst, so many of each")
    parser.add_argument("--score", help="what best and worst are ranked by; else CLIPScore")
    parser.add_argument("--seed", type=int, default=0, help="of the lot")
    parser.add_argument(
        "--neighbours", action="store_true", help="show the nearest picture of the reference set"
    )
    parser.add_argument("--encoder", help="whose features say what is near")
    parser.add_argument(
        "--resamples", type=int, default=RESAMPLES, help="of differences; 0 leaves them out"
    )
    options = vars(parser.parse_args(argv))
    folders, out = options.pop("folders"), options.pop("out")
    with one_line_errors():
        write_page(build_report(folders, ReportOptions(**options)), out)
        print(out)


if __name__ == "__main__":
    main()
