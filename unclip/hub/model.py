"""A model as the formats hand it over: stages, and readers of stages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from unclip.clip import FrozenCLIP
from unclip.priors import DiffusionPrior
from unclip.stages import DecoderStage, UpsamplerStage

STAGES = ("clip", "prior", "decoder", "upsamplers")


@dataclass
class Stages:
    """A model's stages; None, or an empty list, where only some were asked for."""

    clip: FrozenCLIP | None = None
    prior: DiffusionPrior | None = None
    decoder: DecoderStage | None = None
    upsamplers: list[UpsamplerStage] = field(default_factory=list)


@dataclass
class Model:
    """What a model's folder holds, of whatever format; each stage is read when it is called for."""

    path: Path
    clip: Callable[[], FrozenCLIP] | None = None
    prior: Callable[[], DiffusionPrior] | None = None
    decoder: Callable[[], DecoderStage] | None = None
    upsamplers: list[Callable[[], UpsamplerStage]] = field(default_factory=list)
    base: str | None = None
    """Name of the model that completes this one."""
    clip_fingerprint: str | None = None
    """Of the CLIP that the stages were trained on."""
    adapters: dict[str, Path] = field(default_factory=dict)
    """Stage -> folder of the LoRA adapter that is merged into it: into the base's, where this model
    has no such stage. An upsampler goes by its size, `upsampler_256`."""


def fill_exactly(
    network: nn.Module, ours: Mapping[str, Tensor], left: Collection[str], source: Path
) -> None:
    """Load converted weights into a network; nothing may be missing, left over or misshapen.

    Args:
        network: what to fill.
        ours: the weights under our names.
        left: names in the checkpoint that the conversion has not understood.
        source: where they came from, for the error.

    Raises:
        ValueError: naming the first five tensors and the likely cause.
    """
    wanted = network.state_dict()
    missing = sorted(set(wanted) - set(ours))
    extra = sorted({*left, *(set(ours) - set(wanted))})
    shapes = [
        f"{name} {list(ours[name].shape)} for {list(wanted[name].shape)}"
        for name in wanted
        if name in ours and ours[name].shape != wanted[name].shape
    ]
    for fault, names, cause in (
        ("lacks", missing, "it is not whole, or its config is another model's"),
        ("has no place for", extra, "its config is another model's"),
        ("has other shapes than its config says:", shapes, "its config is another model's"),
    ):
        if names:
            listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            raise ValueError(f"{source} {fault} {listed}: {cause}; copy or download it again")
    network.load_state_dict(dict(ours))
