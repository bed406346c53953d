"""Result folders as `unclip.evaluate` leaves them, of tiny pictures, for the tests of what reads
them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CAPTION = 'a "red" <b>circle</b> & a square'


def write_result(
    folder: Path,
    scores: dict[str, Sequence[Any]],
    *,
    captions: Sequence[str] | None = None,
    features: dict[str, dict[str, np.ndarray]] | None = None,
    metrics: dict[str, dict[str, Any]] | None = None,
    protocol: dict[str, Any] | None = None,
    seed: int = 0,
    side: int = 8,
    **more: Any,
) -> Path:
    """A finished folder, a picture a score; each score is a metric too, its mean."""
    rng = np.random.default_rng(seed)
    count = len(next(iter(scores.values())))
    captions = captions or [f"{CAPTION} {k}" for k in range(count)]
    (folder / "images").mkdir(parents=True)
    lines = []
    for k in range(count):
        file = f"images/{k:06d}.png"
        pixels = rng.integers(256, size=(side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / file)
        own = {name: values[k] for name, values in scores.items()}
        line = {"id": f"row-{k}", "caption": captions[k], "seed": k, "file": file, "scores": own}
        lines.append(json.dumps(line))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    for name, arrays in (features or {}).items():
        (folder / "features").mkdir(exist_ok=True)
        np.savez(folder / "features" / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    means = {
        name: {
            "value": float(np.mean(told)),
            "better": "higher",
            "count": len(values),
            "settings": {},
        }
        for name, values in scores.items()
        if (told := [v for v in values if v is not None])
    }
    values = {
        "format": 1,
        "name": "tiny",
        "protocol": protocol or {"captions": {"count": count}, "cascade": {"guidance_scale": 3.0}},
        "protocol_sha256": "0" * 64,
        "model": {"name": "shapes", "stages": {"decoder": "d" * 64}},
        "metrics": means | (metrics or {}),
        "tables": {},
        "seconds": {"drawing": 1.5},
        "versions": {"unclip": "0"},
        "command": ["evaluate.py", "--out", str(folder.name), "--name", "<x>"],
        "device": "cpu",
        "created": "2026-01-01T00:00:00+00:00",
        **more,
    }
    (folder / "result.json").write_text(json.dumps(values))
    return folder


def spoil(folder: Path, **values: Any) -> Path:
    """Put other values into result.json."""
    path = folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder
