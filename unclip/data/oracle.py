"""The oracle: reads a picture of the shapes world back into what is drawn on it, and where.

A small centre-point detector (the idea of CenterNet, Zhou et al. 2019): on a 16 x 16 grid over the
picture, one head for each size word predicts whether an object's centre is near, and its shape,
colour and exact place. Two heads, because an `inside` scene has a small and a large object at one
centre. It is a measuring instrument: it is trained on every combination, held-out ones included.

Shapes: B pictures, M readings, K = 2 heads (one a size word), G = 16 cells a side of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unclip.checkpoint import fill, load_stage, save_stage, unfilled
from unclip.config import from_dict, to_dict
from unclip.data.shapes import COLOURS, RADII, SHAPES

SIZES = tuple(RADII)
SIDE = 64
"""Side of the pictures the network sees, px."""
STRIDE = 4
GRID = SIDE // STRIDE
SHIPPED = Path(__file__).resolve().parent.parent / "pretrained" / "oracle"
"""The oracle that comes with the package."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One object as the oracle sees it. `x`, `y` are fractions of the picture's side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    confidence: float = 1.0
    """How sure the oracle is that an object is there, 0 to 1."""

    @property
    def cell(self) -> tuple[int, int]:
        """(column, row) of the 3 x 3 grid that the centre lies in, as `SceneObject.cell`."""
        return min(2, int(self.x * 3)), min(2, int(self.y * 3))


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """Size of the network and how its maps are read."""

    width: int = 64
    """Channels at 16 x 16."""
    fine_blocks: int = 2
    """Residual blocks at 32 x 32, half as wide: they find edges, whatever the two colours."""
    dilations: tuple[int, ...] = (1, 2)
    """Dilation of each block at 16 x 16; together they must see the largest object whole."""
    threshold: float = 0.4
    """Least objectness of a reading, 0 to 1."""
    max_objects: int = 3
    """Most readings a picture."""

    def __post_init__(self) -> None:
        if self.width < 2 or self.width % 2:
            raise ValueError(f"oracle.width must be even and above 0; got {self.width}: use 64")
        if not 0 < self.threshold < 1:
            raise ValueError(f"oracle.threshold must lie in (0, 1); got {self.threshold}: use 0.4")
        if self.max_objects < 1:
            raise ValueError(
                f"oracle.max_objects must be at least 1; got {self.max_objects}: use 3"
            )


@dataclass(frozen=True, slots=True)
class Maps:
    """What the network says of each cell of the grid."""

    objectness: Tensor
    """[B, K, G, G], logits: is the centre of an object of this size near?"""
    shape: Tensor
    """[B, K, G, G, 6], logits over SHAPES."""
    colour: Tensor
    """[B, K, G, G, 8], logits over COLOURS."""
    offset: Tensor
    """[B, K, G, G, 2]: (x, y) of the object's centre from the cell's, in cells."""


def cell_centres(device: torch.device | str = "cpu") -> Tensor:
    """(x, y) of the cells' centres, [G, G, 2], in cells from the picture's corner."""
    line = torch.arange(GRID, device=device) + 0.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], -1)


class _Residual(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


class Oracle(nn.Module):
    """Pictures to the objects on them."""

    stage = "oracle"

    def __init__(self, config: OracleConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or OracleConfig()
        width = config.width
        self.trunk = nn.Sequential(
            nn.PixelUnshuffle(2),  # [B, 12, 32, 32]
            nn.Conv2d(12, width // 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            *(_Residual(width // 2, 1) for _ in range(config.fine_blocks)),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1, bias=False),  # [B, W, G, G]
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *(_Residual(width, dilation) for dilation in config.dilations),
        )
        self.parts = (1, len(SHAPES), len(COLOURS), 2)
        self.head = nn.Conv2d(width, len(SIZES) * sum(self.parts), 1)
        # Nearly every cell is empty: start from there, or the first steps only learn that.
        nn.init.constant_(self.head.bias[:: sum(self.parts)], -4.0)  # type: ignore[index]

    def forward(self, images: Tensor) -> Maps:
        """Maps of pictures [B, 3, 64, 64] in [-1, 1]."""
        out = rearrange(self.head(self.trunk(images)), "b (k c) h w -> b k h w c", k=len(SIZES))
        objectness, shape, colour, offset = out.split(self.parts, -1)
        return Maps(objectness.squeeze(-1), shape, colour, offset)

    @torch.no_grad()
    def read(self, images: Tensor, batch_size: int = 256) -> list[list[Reading]]:
        """The objects on each picture, the surest first.

        Args:
            images: [B, 3, H, W] in [-1, 1]; resized to 64 px where H and W differ from that.
            batch_size: pictures at a time, which bounds the memory.

        Raises:
            ValueError: `images` is not [B, 3, H, W], or the network is in training mode.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W]; got {list(images.shape)}")
        if self.training:
            raise ValueError(
                "the oracle is in training mode, where readings depend on the batch: "
                "call eval() first"
            )
        weight = self.head.weight
        readings: list[list[Reading]] = []
        for chunk in images.split(batch_size):
            chunk = chunk.to(weight.device, weight.dtype)
            if chunk.shape[-2:] != (SIDE, SIDE):
                chunk = F.interpolate(
                    chunk, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False
                )
            readings += self._decode(self(chunk))
        return readings

    def _decode(self, maps: Maps) -> list[list[Reading]]:
        objectness = maps.objectness.sigmoid()
        peak = objectness == F.max_pool2d(objectness, 3, stride=1, padding=1)
        chosen = peak & (objectness > self.config.threshold)  # [B, K, G, G]
        place = (cell_centres(objectness.device) + maps.offset) / GRID
        rows = zip(
            chosen.nonzero()[:, :2].tolist(),
            maps.shape[chosen].argmax(-1).tolist(),
            maps.colour[chosen].argmax(-1).tolist(),
            place[chosen].clamp(0, 1).tolist(),
            objectness[chosen].tolist(),
            strict=True,
        )
        found: list[list[Reading]] = [[] for _ in objectness]
        names = tuple(COLOURS)
        for (b, size), shape, colour, (x, y), confidence in rows:
            found[b].append(Reading(SHAPES[shape], names[colour], SIZES[size], x, y, confidence))
        return [self._distinct(readings) for readings in found]

    def _distinct(self, readings: list[Reading]) -> list[Reading]:
        """The surest readings, without a second one of the same object.

        An object between the two sizes may wake both heads; a true pair at one centre differs in
        colour, or nobody could see it.
        """
        kept: list[Reading] = []
        for new in sorted(readings, key=lambda r: -r.confidence):
            doubled = any(
                new.colour == old.colour and max(abs(new.x - old.x), abs(new.y - old.y)) < 0.1
                for old in kept
            )
            if not doubled and len(kept) < self.config.max_objects:
                kept.append(new)
        return kept

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the oracle's folder."""
        save_stage(folder, {"stage": self.stage, **to_dict(self.config)}, self.state_dict(), dtype)

    @classmethod
    def load(cls, folder: Path = SHIPPED) -> Oracle:
        """Read an oracle's folder; raises FileNotFoundError or ValueError with what is wrong."""
        config, tensors = load_stage(folder, cls.stage)
        oracle = unfilled(lambda: cls(from_dict(OracleConfig, config)))
        fill(oracle, tensors, folder)
        return oracle.eval()
