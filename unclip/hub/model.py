"""A model as the formats hand it over: stages, and readers of stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from unclip.clip import FrozenCLIP
from unclip.glide import GlideStage
from unclip.priors import PCA, Prior
from unclip.stages import DecoderStage, PictureStage

Part = TypeVar("Part", covariant=True)
STAGES = ("clip", "prior", "decoder", "upsamplers")


class Reader(Protocol[Part]):
    """Reads a stage."""

    def __call__(self, dtype: torch.dtype = ...) -> Part:
        """The stage, its networks' weights in `dtype`; fp32 if left out."""


@dataclass
class Stages:
    """A model's stages; None, or an empty list, where only some were asked for."""

    clip: FrozenCLIP | None = None
    prior: Prior | None = None
    decoder: DecoderStage | GlideStage | None = None
    upsamplers: list[PictureStage] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)
    """Options that the model is sampled with unless told otherwise; see
    `unclip.pipeline.CascadeOptions`."""
    pca: PCA | None = None
    """Principal components of the CLIP's image embeddings."""


@dataclass
class Model:
    """What a model's folder holds, of whatever format; each stage is read when it is called for,
    its networks in the dtype that the reader is given."""

    path: Path
    clip: Callable[[], FrozenCLIP] | None = None
    prior: Reader[Prior] | None = None
    decoder: Reader[DecoderStage | GlideStage] | None = None
    upsamplers: list[Reader[PictureStage]] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)
    """What its authors sample it with."""
    pca: Reader[PCA] | None = None
    """Of the image embeddings of the CLIP that lies beside it."""
    base: str | None = None
    """Name of the model that completes this one."""
    clip_fingerprint: str | None = None
    """Of the CLIP that the stages were trained on."""
    adapters: dict[str, Path] = field(default_factory=dict)
    """Stage -> folder of the LoRA adapter that is merged into it: into the base's, where this model
    has no such stage. An upsampler goes by its size, `upsampler_256`."""
