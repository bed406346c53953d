"""Result folders, as `python -m unclip.evaluate` writes them: what was measured, and the pictures.

A folder holds `result.json` (written last, so that a folder without it is unfinished),
`samples.jsonl` (a line a picture, in the protocol's order), the pictures, and
`features/NAME.npz` with what an encoder NAME saw. Reading one waits for no torch.

Shapes: N pictures, M pictures of the reference, D width of an encoder's features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
RESULT, SAMPLES, FEATURES = "result.json", "samples.jsonl", "features"
SWEEP = "sweep.json"
MEND = "measure it again, or pass another folder"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a result, or why it is none."""

    value: float | None
    """None where it was not computed."""
    better: str | None = None
    """`lower` or `higher`; None where neither is."""
    count: int = 0
    """Pictures, or embeddings, that it was computed from."""
    interval: tuple[float, float] | None = None
    """Ends of its 95% interval."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What decides its value beside the pictures."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """File -> sha256 of the networks that it looks through."""
    reason: str | None = None
    """Why there is no value, and the command that mends it."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture of a result."""

    id: str
    """Of its caption, in the protocol."""
    caption: str
    seed: int | None
    path: Path
    """Its file."""
    scores: Mapping[str, float | None]
    """Of this picture alone; a verdict is 1.0 or 0.0."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished result folder."""

    folder: Path
    name: str
    """Of the protocol."""
    protocol: Mapping[str, Any]
    protocol_sha256: str
    model: Mapping[str, Any]
    """Its `name`, and the sha256 of each of its `stages`."""
    metrics: Mapping[str, Metric]
    samples: tuple[Sample, ...]
    tables: Mapping[str, Any]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    command: tuple[str, ...]
    device: str
    created: str

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the scores that some picture has."""
        names = dict.fromkeys(n for s in self.samples for n, v in s.scores.items() if v is not None)
        return tuple(names)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the encoders whose features are there."""
        return tuple(sorted(path.stem for path in (self.folder / FEATURES).glob("*.npz")))

    def features(self, encoder: str) -> tuple[np.ndarray, np.ndarray | None]:
        """What an encoder saw: [N, D] of the pictures, and [M, D] of the reference or None.

        Raises:
            FileNotFoundError: there are none of that encoder.
            ValueError: they are damaged, not finite, or not one a picture.
        """
        path = self.folder / FEATURES / f"{encoder}.npz"
        if not path.is_file():
            known = ", ".join(self.encoders) or "none"
            raise FileNotFoundError(f"{path} is missing: there are features of {known}")
        try:
            with np.load(path, allow_pickle=False) as file:
                drawn = file["features"]
                reference = file.get("reference")
        except Exception as error:  # a damaged zip raises whatever its reader stumbles over
            raise ValueError(f"{path} is damaged ({error}): {MEND}") from error
        for name, array in (("features", drawn), ("reference", reference)):
            if array is not None and (array.ndim != 2 or not np.isfinite(array).all()):
                raise ValueError(
                    f"{name} of {path} must be finite numbers [N, D]; got {list(array.shape)}: "
                    f"{MEND}"
                )
        if reference is not None and reference.shape[1] != drawn.shape[1]:
            raise ValueError(
                f"features and reference of {path} must be of one width; got {drawn.shape[1]} and "
                f"{reference.shape[1]}: {MEND}"
            )
        if len(drawn) != len(self.samples):
            raise ValueError(
                f"{path} must hold one row a picture; got {len(drawn)} for {len(self.samples)}: "
                f"{MEND}"
            )
        return drawn, reference


def read_result(folder: Path) -> Result:
    """Read a result folder, all but its pictures and features.

    Raises:
        FileNotFoundError: it is not there, unfinished, or lacks a picture.
        ValueError: it is of another format, damaged, or its parts do not fit each other.
    """
    folder = Path(folder)
    values = _read_json(folder, RESULT)
    try:
        result = Result(
            folder=folder,
            name=str(values["name"]),
            protocol=values["protocol"],
            protocol_sha256=values["protocol_sha256"],
            model=values["model"],
            metrics={name: _metric(one) for name, one in values["metrics"].items()},
            samples=_read_samples(folder),
            tables=values.get("tables") or {},
            seconds=values.get("seconds") or {},
            versions=values.get("versions") or {},
            command=tuple(values.get("command") or ()),
            device=str(values.get("device", "")),
            created=str(values.get("created", "")),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / RESULT} lacks or misuses {error}: {MEND}") from error
    if not result.samples:
        raise ValueError(f"{folder / SAMPLES} must have a line a picture; got none: {MEND}")
    for name, metric in result.metrics.items():
        known = metric.value is not None and math.isfinite(metric.value)
        if not (known or (metric.value is None and metric.reason)):
            raise ValueError(
                f"metrics.{name} of {folder / RESULT} must have a finite value, or none and a "
                f"reason; got {metric.value}: {MEND}"
            )
    return result


def read_sweep(folder: Path) -> tuple[str, list[tuple[Any, Path]]]:
    """The axis of a sweep, and the values and folders of its finished points.

    Raises:
        FileNotFoundError: the folder is not there or holds no sweep.
        ValueError: it is of another format, or no point is finished.
    """
    folder = Path(folder)
    values = _read_json(folder, SWEEP)
    try:
        axis = str(values["axis"])
        points = [(point["value"], folder / point["folder"]) for point in values["points"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / SWEEP} lacks or misuses {error}: {MEND}") from error
    finished = [(value, path) for value, path in points if (path / RESULT).is_file()]
    if not finished:
        raise ValueError(
            f"{folder} must have a finished point; got none of {len(points)}: run the sweep again, "
            "it goes on"
        )
    return axis, finished


def is_sweep(folder: Path) -> bool:
    """Whether the folder is a sweep's."""
    return (Path(folder) / SWEEP).is_file()


def differing(a: Any, b: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted name -> the two values, of what differs between plain values; None where one lacks
    it."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys([*a, *b]):
            found |= differing(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    return {} if a == b else {prefix: (a, b)}


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there: pass a folder that unclip.evaluate wrote")
    if not path.is_file():
        if name == RESULT and is_sweep(folder):
            raise FileNotFoundError(f"{folder} is a sweep: pass one of its points' folders")
        said = "is unfinished" if (folder / SAMPLES).is_file() else "is none"
        raise FileNotFoundError(
            f"{path} is missing: the folder {said}; run the command that makes it to its end"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): {MEND}") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} must be of format {FORMAT}; got {found!r}: use the version of unclip that "
            "wrote it, or measure again"
        )
    return dict(values)


def _metric(values: Mapping[str, Any]) -> Metric:
    known = {name: values[name] for name in Metric.__dataclass_fields__ if name in values}
    if known.get("interval") is not None:
        low, high = known["interval"]
        known["interval"] = (float(low), float(high))
    return Metric(**known)


def _read_samples(folder: Path) -> tuple[Sample, ...]:
    path = folder / SAMPLES
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {MEND}")
    samples = []
    # Not splitlines: a caption may hold what Unicode takes for the end of a line.
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for number, line in enumerate(lines if any(lines) else (), start=1):
        try:
            samples.append(_sample(folder, json.loads(line)))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"line {number} of {path} is not a sample ({error}): {MEND}"
            ) from error
    missing = [sample.path for sample in samples if not sample.path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} is missing, one of {len(missing)} of {len(samples)} pictures: {MEND}"
        )
    extra = set((folder / "images").glob("*.png")) - {sample.path for sample in samples}
    if extra:
        raise ValueError(
            f"{path} must have a line a picture; got {len(samples)} lines, and {len(extra)} "
            f"pictures without one, such as {min(extra).name}: {MEND}"
        )
    return tuple(samples)


def _sample(folder: Path, values: Mapping[str, Any]) -> Sample:
    scores = {
        name: None if value is None or not math.isfinite(value) else float(value)
        for name, value in (values.get("scores") or {}).items()
    }
    return Sample(
        id=str(values["id"]),
        caption=str(values["caption"]),
        seed=values.get("seed"),
        path=folder / values["file"],
        scores=scores,
    )
