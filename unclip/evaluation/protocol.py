"""A protocol: all that decides a measured number besides the model, in one YAML file."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from unclip.config import to_dict
from unclip.data.shapes import ShapesConfig
from unclip.evaluation.encoders import (
    CLIPConfig,
    DINOConfig,
    InceptionConfig,
    LPIPSConfig,
    NetworkConfig,
)
from unclip.evaluation.resize import ResizeConfig
from unclip.pipeline import CascadeOptions

EncoderName = Literal["inception", "clip", "dinov2", "face"]
ENCODERS = ("inception", "clip", "dinov2", "face")
METRICS: dict[str, Literal["lower", "higher"] | None] = {
    "fid": "lower",
    "kid": "lower",
    "inception_score": "higher",
    "precision": "higher",
    "recall": "higher",
    "clip_score": "higher",
    "r_precision": "higher",
    "cmmd": "lower",
    **{f"fd_{name}": "lower" for name in ENCODERS},
    "lpips_diversity": "higher",
    "prior_frechet": "lower",
    "prior_frechet_floor": None,
    "oracle_all": "higher",
    "oracle_shape": "higher",
    "oracle_colour": "higher",
    "oracle_place": "higher",
    "fsd": "lower",
    "fss": "higher",
}
"""Metric -> which way is better; None where neither is."""


@dataclass(frozen=True, kw_only=True)
class CaptionsConfig:
    """Which captions are drawn, and in which order."""

    data: str = "shapes"
    """`shapes`; a list `.jsonl` with `id` and `caption` a line; or captioned pictures as
    `source.data` of the training scripts."""
    ids: Path | None = None
    """A text file of ids, one a line: which captions, and in which order; None: all of them."""
    sha256: str | None = None
    """What the hash of the list of ids and captions begins with; another list is an error."""
    count: int | None = None
    """Of `shapes`, which has no end: so many scenes."""
    caption_key: str = "txt"
    """Tars: the extension that holds the caption, or a key of the json as in `json.caption`."""
    caption_column: str | None = None
    """Tables: the column of captions."""
    split: str = "train"
    """Split of a Hub data set."""
    shapes: ShapesConfig = field(
        default_factory=lambda: ShapesConfig(split="held_out", caption_detail="full")
    )
    """Which world, where `data` is `shapes`."""

    def __post_init__(self) -> None:
        if self.data == "shapes" and self.count is None:
            raise ValueError(
                "captions.count must say how many of the endless shapes world; got null: use 500"
            )
        if self.count is not None and self.count < 1:
            raise ValueError(f"captions.count must be at least 1; got {self.count}: use 500")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The real pictures that drawn ones are held against."""

    data: str | None = None
    """Pictures: `shapes`, a folder, or captioned pictures as `captions.data`; None: there are
    none, and metrics that want some are not computed."""
    which: Literal["all", "captions"] = "all"
    """All of them, or those of the captions alone, by id: for MS-COCO the whole validation set of
    some 40,000, or the same 30,000 pictures."""
    start: int = 0
    """Of `shapes`: the first scene."""
    count: int | None = None
    """Use only so many; None: all there are."""
    sha256: str | None = None
    """What the hash of the set begins with, as a result file states it: of its pictures' 8 bits
    when they have been resized. Another set is an error."""
    floor: str | None = None
    """More real pictures, whose distance to the captions' own is the prior's floor; None takes
    those of `data` that are no caption's own."""

    def __post_init__(self) -> None:
        if self.data == "shapes" and self.which == "all" and self.count is None:
            raise ValueError(
                "reference.count must say how many of the endless shapes world; got null: use 2000"
            )
        if self.count is not None and self.count < 2:
            raise ValueError(f"reference.count must be at least 2; got {self.count}: use 2000")


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """What else the metrics need to be told."""

    seed: int = 0
    """Of KID's subsets, the Inception Score's splits and the mismatched captions."""
    kid_subsets: int = 100
    """Random subsets that KID is a mean over."""
    kid_subset_size: int = 1000
    """Pictures of each."""
    inception_splits: int = 10
    """Splits that the Inception Score is a mean over."""
    precision_recall_encoder: EncoderName = "inception"
    """Whose features precision and recall compare."""
    neighbours: int = 3
    """Precision and recall reach as far as a picture's so-manieth nearest fellow."""
    r_precision_captions: int = 100
    """Captions a picture is held against: its own and mismatched ones."""
    cmmd_sigma: float = 10.0
    """Width of CMMD's kernel."""
    cmmd_scale: float = 1000.0
    """What CMMD is multiplied by."""

    def __post_init__(self) -> None:
        least = {
            "kid_subsets": 1,
            "kid_subset_size": 2,
            "inception_splits": 1,
            "neighbours": 1,
            "r_precision_captions": 2,
        }
        for name, number in least.items():
            if getattr(self, name) < number:
                default = next(f.default for f in fields(self) if f.name == name)
                raise ValueError(
                    f"settings.{name} must be at least {number}; got {getattr(self, name)}: "
                    f"use {default}"
                )
        for name in ("cmmd_sigma", "cmmd_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"settings.{name} must be above 0; got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Captions, seeds, how pictures are drawn and resized, what they are held against, metrics."""

    name: str = "folder"
    """What the protocol is called."""
    captions: CaptionsConfig = field(default_factory=lambda: CaptionsConfig(count=500))
    """Which captions."""
    num: int | None = None
    """Draw only the first so many captions; mismatched ones still come from all."""
    samples_per_caption: int = 1
    """Pictures of each caption."""
    seed: int = 0
    """Picture k has the seed `seed + k`."""
    cascade: CascadeOptions = field(default_factory=CascadeOptions)
    """How pictures are drawn; a model's own `sampling` has no say."""
    resize: ResizeConfig = field(default_factory=ResizeConfig)
    """How drawn and real pictures come to one size."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """What they are held against."""
    metrics: tuple[str, ...] = ("clip_score", "r_precision")
    """What is measured."""
    settings: MetricSettings = field(default_factory=MetricSettings)
    """How."""
    max_repeated: float = 0.1
    """Share of pictures, drawn or real, that may be the same as one before, to the last bit."""
    inception: InceptionConfig = field(default_factory=InceptionConfig)
    """Inception-v3: fid, kid, inception_score."""
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    """A CLIP: clip_score, r_precision, cmmd, fd_clip."""
    dinov2: DINOConfig = field(default_factory=DINOConfig)
    """DINOv2: fd_dinov2."""
    face: NetworkConfig = field(default_factory=NetworkConfig)
    """A network of your own: fsd, fss, fd_face."""
    lpips: LPIPSConfig = field(default_factory=LPIPSConfig)
    """LPIPS: lpips_diversity."""

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                near = difflib.get_close_matches(name, METRICS, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(METRICS)}"
                raise ValueError(f"metrics must be names that are known; got {name!r}: {hint}")
        for name in ("num", "samples_per_caption"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}: use 1")
        if not 0 <= self.max_repeated <= 1:
            raise ValueError(f"max_repeated must lie in [0, 1]; got {self.max_repeated}: use 0.1")
        if "lpips_diversity" in self.metrics and self.samples_per_caption < 2:
            raise ValueError(
                "samples_per_caption must be at least 2 for lpips_diversity; got "
                f"{self.samples_per_caption}: use 4"
            )
        oracle = next((name for name in self.metrics if name.startswith("oracle")), None)
        if oracle is not None and self.captions.data != "shapes":
            raise ValueError(
                f"metrics must leave out {oracle} unless captions.data is 'shapes', whose world "
                f"alone the oracle reads; got {self.captions.data!r}: take it out"
            )


def protocol_values(protocol: Protocol) -> dict[str, Any]:
    """The protocol's own fields, of it or of a config that adds to it."""
    names = {f.name for f in fields(Protocol)}
    return {name: value for name, value in to_dict(protocol).items() if name in names}


def digest(values: Any) -> str:
    """sha256 of values' canonical JSON: keys sorted, no spaces."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
