"""Train the oracle that reads the shapes world: `python -m unclip.training.oracle`.

Shapes: B pictures, M = 3 objects at most, K = 2 heads, G = 16 cells a side of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from unclip.config import one_line_errors, parse, to_dict
from unclip.data.oracle import GRID, SIDE, SIZES, Oracle, OracleConfig, cell_centres
from unclip.data.shapes import COLOURS, SHAPES, Scene, ShapesConfig, draw_scene, render
from unclip.training.fit import FitConfig, Objective, fit
from unclip.training.noise import normal, uniform

MAX_OBJECTS = 3


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Flaws of generated pictures that the oracle learns to look past; each has a random strength
    up to these, and half of the pictures go without each."""

    blur: float = 0.8
    """Greatest share of the blurred picture (binomial 5 x 5, about 1 px) in the mix, 0 to 1."""
    noise: float = 0.08
    """Greatest standard deviation of white noise, in units of [-1, 1]."""
    brightness: float = 0.08
    """Greatest shift of a picture and, half as large, of each of its channels."""
    contrast: float = 0.08
    """Greatest change of a picture's gain around 1."""


@dataclass(frozen=True, kw_only=True)
class TrainOracleConfig:
    """Everything `python -m unclip.training.oracle` needs."""

    run: Path = Path("runs/oracle")
    """Folder of this run; the oracle lands in its sub-folder `oracle`."""
    fresh: bool = False
    """Start over, discarding what the run's folder holds."""
    oracle: OracleConfig = field(default_factory=OracleConfig)
    """The network."""
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    """The world to train on; both of its splits are used, whatever `split` says."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Flaws added to the pictures."""
    fit: FitConfig = field(default_factory=FitConfig)
    """The loop."""

    def __post_init__(self) -> None:
        if self.shapes.image_size != SIDE or self.shapes.crop_size is not None:
            raise ValueError(
                f"the oracle trains on whole pictures of {SIDE} px; got shapes.image_size "
                f"{self.shapes.image_size} and crop_size {self.shapes.crop_size}: use {SIDE} and "
                "null"
            )


def describe_objects(scene: Scene) -> Tensor:
    """A scene's objects as rows (size, shape, colour, x, y), [M, 5]; -1 in rows without one."""
    rows = torch.full((MAX_OBJECTS, 5), -1.0)
    names = tuple(COLOURS)
    for row, o in zip(rows, scene.objects, strict=False):
        attributes = (SIZES.index(o.size), SHAPES.index(o.shape), names.index(o.colour))
        row.copy_(torch.tensor((*attributes, o.x, o.y)))
    return rows


class ReadableShapes(Dataset[dict[str, Tensor]]):
    """Pictures with their objects: even indices show the `train` split, odd ones `held_out`.

    Every third pair of indices is a small object inside a large one, the scene hardest to read.

    Samples: ``image`` [3, 64, 64] in [-1, 1], ``objects`` [M, 5] (see `describe_objects`).
    """

    endless = True

    def __init__(self, config: ShapesConfig) -> None:
        self.splits = replace(config, split="train"), replace(config, split="held_out")

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """A batch at once: rendering is vectorised over pictures."""
        scenes = [self._scene(index) for index in indices]
        images = render(scenes, SIDE).float().div_(127.5).sub_(1)
        return [
            {"image": image, "objects": describe_objects(scene)}
            for image, scene in zip(images, scenes, strict=True)
        ]

    def _scene(self, index: int) -> Scene:
        config = self.splits[index % 2]
        if index % 6 < 4:
            return draw_scene(config, index // 2)[0]
        pairs = replace(config, object_weights=(0.0, 1.0, 0.0))
        # One pair in five is nested; a stride keeps the searches of two indices apart.
        tries = (draw_scene(pairs, number)[0] for number in count(index * 1000))
        return next(scene for scene in tries if scene.relation == "inside")


def augment(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, H, W] with flaws; not clamped, a sampler's overshoot is one of them."""
    batch, device = len(images), images.device

    def strength(channels: int = 1) -> Tensor:  # [B, channels, 1, 1], 0 for every second picture
        on = uniform(generator, batch, 1, 1, 1, device=device) < 0.5
        return on * uniform(generator, batch, channels, 1, 1, device=device)

    def signed(channels: int = 1) -> Tensor:
        sign = uniform(generator, batch, channels, 1, 1, device=device) < 0.5
        return strength(channels) * torch.where(sign, -1.0, 1.0)

    line = images.new_tensor([1, 4, 6, 4, 1]) / 16
    kernel = torch.outer(line, line).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    images = images + config.blur * strength() * (blurred - images)
    images = images * (1 + config.contrast * signed())
    images = images + config.brightness * (signed() + 0.5 * signed(3))
    white = normal(generator, *images.shape, device=device)
    return images + config.noise * strength() * white


class OracleObjective(Objective):
    """Objectness as a soft bump around each centre; shape, colour and offset under the bumps."""

    stage = "oracle"
    network: Oracle

    def __init__(self, config: OracleConfig, flaws: AugmentConfig) -> None:
        super().__init__()
        self.network = Oracle(config)
        self.flaws = flaws

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Sum of the four losses; `accuracy` is of shape and colour together at the centres."""
        maps = self.network(augment(batch["image"], self.flaws, generator))
        size, shape, colour = batch["objects"][..., :3].long().unbind(-1)  # [B, M] each
        place = batch["objects"][..., 3:] * GRID  # [B, M, 2], in cells

        apart = place[:, :, None, None] - cell_centres(place.device)  # [B, M, G, G, 2]
        bump = torch.exp(-0.5 * apart.square().sum(-1))  # [B, M, G, G]: a Gaussian, sigma 1 cell
        own = F.one_hot(size + 1, len(SIZES) + 1)[..., 1:]  # [B, M, K]; a missing object owns none
        heat, owner = (bump[:, None] * own.mT[..., None, None]).max(2)  # [B, K, G, G]

        near = heat > 0.3  # about the 3 x 3 cells around the centre
        b, _, row, column = near.nonzero(as_tuple=True)
        m = owner[near]
        shape, colour, offset = shape[b, m], colour[b, m], apart[b, m, row, column]
        seen_shape, seen_colour = maps.shape[near].float(), maps.colour[near].float()

        # Soft targets keep the cross-entropy above 0; its excess over the entropy is what is left.
        logits = maps.objectness.float()
        excess = F.binary_cross_entropy_with_logits(logits, heat, reduction="none")
        excess = excess + torch.xlogy(heat, heat) + torch.xlogy(1 - heat, 1 - heat)
        losses = {
            "objectness": excess.sum() / len(heat),
            "shape": F.cross_entropy(seen_shape, shape),
            "colour": F.cross_entropy(seen_colour, colour),
            "offset": F.smooth_l1_loss(maps.offset[near].float(), offset),
        }
        hit = (seen_shape.argmax(-1) == shape) & (seen_colour.argmax(-1) == colour)
        accuracy = hit[heat[near] > 0.75].float().mean()
        return {"loss": torch.stack(list(losses.values())).sum(), "accuracy": accuracy, **losses}

    def export(self, folder: Path) -> None:
        """Write the oracle's folder in half precision, which reads the same at half the size."""
        self.network.save(folder, torch.float16)


def main() -> None:
    """Parse the command line and train."""
    config = parse(TrainOracleConfig, description=__doc__)
    torch.manual_seed(config.fit.seed)
    with one_line_errors():
        fit(
            OracleObjective(config.oracle, config.augment),
            ReadableShapes(config.shapes),
            config.fit,
            config.run,
            resolved=to_dict(config),
            fresh=config.fresh,
        )


if __name__ == "__main__":
    main()
