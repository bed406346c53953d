"""Two results side by side: `python -m unclip.evaluation.compare A B [--out F.json]`.

Prints each metric of two result folders, the difference B - A, and its 95% bootstrap interval: over
pictures where each has a score, over their features where the metric is a distance of
distributions. Where both drew the same captions the resamples are paired.

Shapes: N pictures, M pictures of the reference, D width of their features.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unclip.checkpoint import written_file
from unclip.config import one_line_errors
from unclip.evaluation.intervals import percentile_interval, resampled
from unclip.evaluation.redrawn import (
    Statistic,
    cmmd_to,
    frechet_to,
    kid_to,
    precision_to,
    recall_to,
)
from unclip.evaluation.results import Metric, Result, differing, read_result

RESAMPLES = 1000
DISTANCE_RESAMPLES = 100
"""Of a distance of distributions, which takes long."""
TOLERANCE = 1e-3
"""How far, relative to it, the value that scores or features give may lie from the metric's: other
devices, other sums."""
DRAWN_BY = ("cascade", "seed")
"""What a protocol says of how pictures are drawn, which is what is compared; the rest says how they
are measured, and must be the same,"""
NO_MATTER = ("name", "metrics")
"""but for these: metrics are held against each other one by one."""
OUTCOMES = ("std",)
"""Of a metric's settings: what came out."""
PAIRS_LIMIT = 5000
"""Pictures of which something is kept in memory for all pairs."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of two results."""

    metric: str
    a: float | None
    b: float | None
    better: str | None
    """`lower` or `higher`; None where neither is."""
    difference: float | None
    """b - a; None where they cannot be compared."""
    interval: tuple[float, float] | None
    """Of the difference, 95%."""
    paired: bool | None
    """Whether the resamples were; None without an interval."""
    count: tuple[int, int]
    """Pictures of a and of b."""
    note: str | None
    """What is missing and why."""

    @property
    def verdict(self) -> str:
        """`A`, `B` or, where the interval holds 0 or is not known, nothing."""
        if (
            self.interval is None
            or self.better is None
            or self.interval[0] <= 0 <= self.interval[1]
        ):
            return ""
        return "B" if (self.interval[0] > 0) == (self.better == "higher") else "A"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two results, metric by metric."""

    drawn_by: dict[str, tuple[Any, Any]]
    """What differs in how the pictures were drawn: dotted name -> its two values."""
    measured_by: dict[str, tuple[Any, Any]]
    """What differs in how they were measured; empty unless compared all the same."""
    paired: bool
    """Whether picture k of both is of the same caption."""
    differences: tuple[Difference, ...]


def compare(
    a: Result,
    b: Result,
    *,
    anyway: bool = False,
    resamples: int = RESAMPLES,
    distance_resamples: int = DISTANCE_RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Hold b against a.

    Args:
        a, b: what is compared.
        anyway: compare even what was measured differently.
        resamples: of means. distance_resamples: of distances of distributions; 0 leaves their
            intervals out.
        seed: of the resamples.

    Raises:
        ValueError: the protocols differ in how pictures are measured.
    """
    if min(resamples, distance_resamples) < 0:
        raise ValueError(f"resamples must not be negative; got {resamples}, {distance_resamples}")
    paired = [(s.id, s.caption) for s in a.samples] == [(s.id, s.caption) for s in b.samples]
    drawn_by, measured_by = protocol_differences(a, b, paired)
    if measured_by and not anyway:
        raise ValueError(
            f"the protocols of {a.folder} and {b.folder} must be the same but for how pictures are "
            f"drawn; they differ in {spelled(measured_by)}: measure both by one protocol, or "
            "compare them --anyway"
        )
    differences = []
    for name in dict.fromkeys([*a.metrics, *b.metrics]):
        count = distance_resamples if name not in (*a.scores, *b.scores) else resamples
        differences.append(_difference(name, a, b, paired, count, seed))
    return Comparison(
        drawn_by=drawn_by, measured_by=measured_by, paired=paired, differences=tuple(differences)
    )


def protocol_differences(
    a: Result, b: Result, paired: bool
) -> tuple[dict[str, tuple[Any, Any]], dict[str, tuple[Any, Any]]]:
    """What differs between two protocols: in how pictures are drawn, and in how they are
    measured."""
    drawn_by: dict[str, tuple[Any, Any]] = {}
    measured_by: dict[str, tuple[Any, Any]] = {}
    # The same data may lie elsewhere; R-precision states the hash of all captions, drawn or not.
    no_matter = {*NO_MATTER}
    if paired:
        no_matter.add("captions.data")
    if len(hashes := _reference_hashes(a)) == 1 and hashes == _reference_hashes(b):
        no_matter.add("reference.data")
    for key, pair in differing(a.protocol, b.protocol).items():
        section = key.split(".")[0]
        if not {section, key} & no_matter:
            (drawn_by if section in DRAWN_BY else measured_by)[key] = pair
    return drawn_by, measured_by


def _reference_hashes(result: Result) -> set[str]:
    settings = [metric.settings for metric in result.metrics.values()]
    return {said["reference_sha256"] for said in settings if "reference_sha256" in said}


def spelled(differences: dict[str, tuple[Any, Any]]) -> str:
    """Differences as a line of text."""
    return ", ".join(f"{key} ({a!r} and {b!r})" for key, (a, b) in differences.items())


def _difference(
    name: str, a: Result, b: Result, paired: bool, resamples: int, seed: int
) -> Difference:
    ours, theirs = a.metrics.get(name), b.metrics.get(name)
    values = [None if metric is None else metric.value for metric in (ours, theirs)]
    known: dict[str, Any] = {
        "metric": name,
        "a": values[0],
        "b": values[1],
        "better": next(m.better for m in (ours, theirs) if m is not None),
        "count": tuple(0 if m is None else m.count for m in (ours, theirs)),
        "difference": None,
        "interval": None,
        "paired": None,
        "note": None,
    }
    if ours is None or theirs is None or ours.value is None or theirs.value is None:
        without = "A" if values[1] is not None else "B" if values[0] is not None else "either"
        return Difference(**known | {"note": f"not computed for {without}"})
    unlike = differing(_measured_by(ours), _measured_by(theirs))
    if unlike:
        return Difference(**known | {"note": f"measured differently: {spelled(unlike)}"})
    known["difference"] = theirs.value - ours.value
    statistics = [_statistic(name, result) for result in (a, b)]
    reasons = [said for said in statistics if isinstance(said, str)]
    if reasons or resamples == 0:
        return Difference(**known | {"note": f"no interval: {(reasons or ['not asked for'])[0]}"})
    first, second = statistics

    def both(rows_a: np.ndarray, rows_b: np.ndarray | None = None) -> float:
        return second(rows_a if rows_b is None else rows_b) - first(rows_a)  # type: ignore[operator]

    counts = [len(a.samples)] if paired else [len(a.samples), len(b.samples)]
    found = resampled(both, *counts, resamples=resamples, seed=seed)
    known["interval"] = percentile_interval(
        known["difference"], found, centred=name not in a.scores
    )
    return Difference(**known | {"paired": paired})


def _measured_by(metric: Metric) -> dict[str, Any]:
    settings = {name: v for name, v in metric.settings.items() if name not in OUTCOMES}
    return {"settings": settings, "weights": metric.weights}


def _statistic(name: str, result: Result) -> Statistic | str:
    """A metric as a function of the rows of the pictures it is computed from, or why there is
    none."""
    value = result.metrics[name].value
    assert value is not None
    found = _mean(name, result) if name in result.scores else _of_sets(name, result)
    if isinstance(found, str):
        return found
    again = found(np.arange(len(result.samples)))
    if not abs(again - value) <= TOLERANCE * max(1.0, abs(value)):
        return f"what {result.folder} holds of single pictures gives {again:.4g}, not {value:.4g}"
    return found


def _mean(name: str, result: Result) -> Statistic:
    scores = np.array([s.scores.get(name) for s in result.samples], dtype=float)  # None is NaN

    def mean(rows: np.ndarray) -> float:
        drawn = scores[rows]
        return float(np.nanmean(drawn)) if np.isfinite(drawn).any() else float("nan")

    return mean


def _of_sets(name: str, result: Result) -> Statistic | str:
    encoder = _encoder(name, result)
    if encoder is None:
        return "it is not resampled"
    if encoder not in result.encoders:
        return f"{result.folder} holds no features of {encoder}"
    features, reference = result.features(encoder)
    if reference is None:
        return f"{result.folder} holds no features of the reference"
    if name == "fid" or name.startswith("fd_"):
        return frechet_to(reference, features)
    if max(len(features), len(reference)) > PAIRS_LIMIT:
        return f"it is of all pairs, and more than {PAIRS_LIMIT} pictures are not resampled"
    settings = result.metrics[name].settings
    if name == "kid":
        return kid_to(reference, features)
    if name == "cmmd":
        return cmmd_to(reference, features, settings.get("sigma", 10), settings.get("scale", 1000))
    of_reach = precision_to if name == "precision" else recall_to
    return of_reach(reference, features, settings.get("neighbours", 3))


def _encoder(name: str, result: Result) -> str | None:
    """Whose features a metric of two sets is made of; None for other metrics."""
    if name in ("precision", "recall"):
        settings = result.protocol.get("settings") or {}
        return settings.get("precision_recall_encoder", "inception")
    if name.startswith("fd_"):
        return name.removeprefix("fd_")
    return {"fid": "inception", "kid": "inception", "cmmd": "clip"}.get(name)


# --- python -m unclip.evaluation.compare ----------------------------------------------------------


def format_comparison(found: Comparison, a: Result, b: Result) -> str:
    """A table for people."""
    lines = [f"A  {a.folder}", f"B  {b.folder}"]
    if found.drawn_by:
        lines.append(f"drawn differently: {spelled(found.drawn_by)}")
    if found.measured_by:
        lines.append(f"MEASURED DIFFERENTLY: {spelled(found.measured_by)}")
    same = "of the same captions: paired" if found.paired else "of other captions: not paired"
    lines += [f"pictures {same}", ""]
    lines.append(f"{'metric':<22}{'A':>10}{'B':>10}{'B - A':>10}  {'95% interval':<22}better")
    for one in found.differences:
        interval = "" if one.interval is None else "[{:.4g}, {:.4g}]".format(*one.interval)
        numbers = "".join(
            f"{'-' if v is None else format(v, spec):>10}"
            for v, spec in ((one.a, ".4g"), (one.b, ".4g"), (one.difference, "+.4g"))
        )
        said = one.note or one.verdict or "no telling"
        lines.append(f"{one.metric:<22}{numbers}  {interval:<22}{said}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare two folders and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, metavar="A", help="a result folder")
    parser.add_argument("b", type=Path, metavar="B", help="another")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument(
        "--anyway", action="store_true", help="compare even what was measured differently"
    )
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of means")
    parser.add_argument(
        "--distance-resamples",
        type=int,
        default=DISTANCE_RESAMPLES,
        help="of distances of distributions; 0 leaves their intervals out",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    options = vars(parser.parse_args(argv))
    folders, out = (options.pop("a"), options.pop("b")), options.pop("out")
    with one_line_errors():
        a, b = (read_result(folder) for folder in folders)
        found = compare(a, b, **options)
        if out is not None:
            told = {"a": str(a.folder), "b": str(b.folder), "settings": options, **asdict(found)}
            with written_file(out) as path:
                path.write_text(json.dumps(told, indent=2) + "\n")
        print(format_comparison(found, a, b))


if __name__ == "__main__":
    main()
