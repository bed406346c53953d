"""Pictures of a protocol's captions, measured, in a result folder: what `python -m unclip.evaluate`
runs.

    DIR/result.json        settings, metrics, versions, command: written last and whole
    DIR/samples.jsonl      a line a picture: id, caption, seed, file, scores
    DIR/images/000000.png  lossless, by position
    DIR/features/NAME.npz  `features` of drawn pictures and `reference`, a file an encoder
    DIR/drawing.json       how pictures are drawn, by which a stopped command goes on
"""

from __future__ import annotations

import io
import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from unclip import __version__
from unclip.checkpoint import written_file
from unclip.evaluation.captions import Item, list_captions, list_sha256
from unclip.evaluation.drawing import (
    Crew,
    draw,
    files_state,
    image_name,
    open_folder,
    take,
)
from unclip.evaluation.encoders import weights_sha256
from unclip.evaluation.measuring import Measured, Measuring, check_counts, reference_ids
from unclip.evaluation.protocol import Protocol, digest, protocol_values
from unclip.evaluation.references import RealPictures
from unclip.evaluation.results import FEATURES, FORMAT, RESULT, SAMPLES
from unclip.pipeline import UnCLIP, check_prompt

log = logging.getLogger(__name__)

PACKAGES = (
    "torch",
    "torchvision",
    "torch-fidelity",
    "torchmetrics",
    "open_clip_torch",
    "transformers",
    "numpy",
    "pillow",
)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Protocol):
    """A protocol, and what is measured by it."""

    out: Path = Path("results/evaluation")
    """Result folder; one whose pictures are not all there is gone on with."""
    model: str | None = None
    """What draws: a shipped name, a folder (a training run's too), or `org/name` on the Hub."""
    prior: str | None = None
    """Take the prior of another model."""
    decoder: str | None = None
    """Take the decoder of another model."""
    upsampler: str | None = None
    """Take the upsamplers of another model."""
    pictures: Path | None = None
    """A folder of pictures that were drawn elsewhere: named by the captions' ids, or in order."""
    batch_size: int = 16
    """Pictures drawn at a time, on each process."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the networks that draw."""
    offload: bool = False
    """Keep each stage on the CPU but while it works: slower, in the memory of the largest."""
    device: str | None = None
    """Where networks run; None takes what Accelerate found."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}: use 16")
        if self.model is None and self.pictures is None:
            raise ValueError(
                "model must be named, or pictures that were drawn already; got neither: add "
                "--model shapes, or --pictures FOLDER"
            )


def evaluate(
    config: EvaluateConfig, crew: Crew, device: str, command: Sequence[str]
) -> dict[str, Any] | None:
    """Draw what is missing, measure, and write the result folder.

    Args:
        config: a protocol and what is measured by it.
        command: what is run, for the result file.
        crew: the processes; each draws its share, the main one measures.
        device: where this process's networks run, unless the config says.

    Returns:
        What stands in `result.json`; None on all processes but the main one.

    Raises:
        ValueError: captions, pictures or settings do not fit, or the folder holds others.
        FileNotFoundError: a model, a source or a folder is not there.
        OSError: a file cannot be written.
    """
    began = time.perf_counter()
    device = config.device or device
    captions = list_captions(config.captions)
    each = config.samples_per_caption
    items = [item for item in captions[: config.num] for _ in range(each)]
    seeds = [config.seed + k for k in range(len(items))]
    data = config.reference.data
    reference = None if data is None else RealPictures(data, config.captions)
    ids = None if reference is None else reference_ids(config, reference, items)
    check_counts(config, len(items), captions, None if ids is None else len(ids))
    if config.pictures is None:
        for item in items:
            check_prompt(item.caption, f"the caption of {item.id}")
    pipe = _load(config, device)
    stages = {} if pipe is None else stages_of(pipe)
    model: dict[str, Any] = {"name": model_name(config), "stages": stages}
    if pipe is not None:
        model["dtype"] = config.dtype
    if crew.is_main:
        open_folder(config.out, _drawing(config, items, seeds, stages))
    crew.wait()
    seconds: dict[str, float] = {"loading": time.perf_counter() - began}
    if config.pictures is not None:
        if crew.is_main:
            model["matched_by"] = take(config.pictures, items, config.out)
    elif pipe is not None:
        spent = draw(pipe, items, seeds, config.out, config.cascade, crew, config.batch_size)
        seconds |= {f"drawing_{stage}": value for stage, value in spent.items()}
    crew.wait()
    if not crew.is_main:
        return None
    began = time.perf_counter()
    measuring = Measuring(
        config, config.out, items, captions, reference, pipe, model["name"], device
    )
    measured = measuring.measure()
    seconds["measuring"] = time.perf_counter() - began
    result = {
        "format": FORMAT,
        "name": config.name,
        "protocol": (values := protocol_values(config)),
        "protocol_sha256": digest(values),
        "model": model,
        "metrics": measured.metrics,
        "tables": measured.tables,
        "seconds": seconds,
        "versions": versions(),
        "command": list(command),
        "device": device_name(device),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write(config.out, result, measured, items, seeds)
    return result


def _load(config: EvaluateConfig, device: str) -> UnCLIP | None:
    if config.model is None:
        return None
    return UnCLIP.from_pretrained(
        config.model,
        prior=config.prior,
        decoder=config.decoder,
        upsampler=config.upsampler,
        device=device,
        dtype=getattr(torch, config.dtype),
        offload=config.offload,
    )


def model_name(config: EvaluateConfig) -> str:
    """What a result is called by: the model and the stages it took from others."""
    if config.model is None:
        assert config.pictures is not None
        return f"pictures of {config.pictures.name}"
    others = [
        f"{stage} {name}"
        for stage in ("prior", "decoder", "upsampler")
        if (name := getattr(config, stage)) is not None
    ]
    return ", ".join([config.model, *others])


def stages_of(pipe: UnCLIP) -> dict[str, str]:
    """Stage -> sha256 of its weights, whatever format they came in."""
    found: dict[str, nn.Module | None] = {
        "clip": pipe.clip,
        "prior": pipe.prior,
        "decoder": pipe.decoder,
    }
    found |= {f"upsampler_{stage.image_size}": stage for stage in pipe.upsamplers}
    return {name: weights_sha256(stage) for name, stage in found.items() if stage is not None}


def _drawing(
    config: EvaluateConfig,
    items: Sequence[Item],
    seeds: Sequence[int],
    stages: Mapping[str, str],
) -> dict[str, Any]:
    """What decides the pictures; all else may change when a folder is measured again."""
    if config.pictures is not None:
        return {
            "captions_sha256": list_sha256(items),
            "count": len(items),
            "pictures": str(config.pictures),
            "pictures_state": files_state(config.pictures),
        }
    values = protocol_values(config)
    return {
        "captions_sha256": list_sha256(items),
        "count": len(items),
        "seed": seeds[0],
        "samples_per_caption": config.samples_per_caption,
        "cascade": values["cascade"],
        "dtype": config.dtype,
        "stages": dict(stages),
    }


def versions() -> dict[str, str]:
    """Of this package, of Python and of those that have a say in the numbers."""
    found = {"unclip": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """What networks ran on, for people."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return device


def write(
    folder: Path,
    result: Mapping[str, Any],
    measured: Measured,
    items: Sequence[Item],
    seeds: Sequence[int],
) -> None:
    """Write the features, the samples and, last, the result."""
    for name, arrays in measured.features.items():
        buffer = io.BytesIO()
        np.savez(buffer, **{key: tensor.numpy() for key, tensor in arrays.items()})  # type: ignore[arg-type]
        _write(folder / FEATURES / f"{name}.npz", buffer.getvalue())
    lines = [
        {
            "id": item.id,
            "caption": item.caption,
            "seed": seed,
            "file": image_name(k),
            "scores": {name: scores[k] for name, scores in measured.scores.items()},
        }
        for k, (item, seed) in enumerate(zip(items, seeds, strict=True))
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    _write(folder / SAMPLES, text.encode())
    # A number that is none is a defect, and no JSON.
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    _write(folder / RESULT, text.encode())


def _write(path: Path, data: bytes) -> None:
    try:
        with written_file(path) as aside:
            aside.write_bytes(data)
    except OSError as error:
        raise OSError(
            f"could not write {path}: {error.strerror or error}; mend that, and the same command "
            "goes on from the pictures that are there"
        ) from error


def format_result(result: Mapping[str, Any]) -> str:
    """A result for people: a line a metric, and why where there is no value."""
    lines = [f"{result['name']}: {result['model']['name']}"]
    for name, metric in result["metrics"].items():
        if metric["value"] is None:
            lines.append(f"  {name:<20} not computed: {metric['reason']}")
            continue
        low_high = metric.get("interval")
        ends = "" if low_high is None else f"[{low_high[0]:.4g}, {low_high[1]:.4g}]"
        better = {"lower": "lower is better", "higher": "higher is better", None: ""}
        lines.append(
            f"  {name:<20} {metric['value']:>10.4g} {ends:<18} n={metric['count']:<6} "
            f"{better[metric['better']]}".rstrip()
        )
    return "\n".join(lines)
