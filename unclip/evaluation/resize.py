"""Pictures on their way to a metric: squares of one size in 8 bits, and a network's own resize.

How a picture is resized moves FID by more than most models differ (Parmar et al. 2022): all of it
is here. Shapes: B pictures, H W a picture's own size, S a side in px.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Backend = Literal["clean", "pil", "torch", "torch_aliased", "tensorflow"]
"""`clean`: Pillow's antialiased bicubic of each channel in floating point, clamped and not rounded,
clean-fid's. `pil`: the same on 8 bits, rounded, as CLIP and DINOv2 preprocess. `torch`: torch's
antialiased bicubic. `torch_aliased`: torch's bilinear without antialiasing, and `tensorflow`: that
of the first FID, as torch-fidelity has it; both alias, and are here to repeat older numbers."""
Crop = Literal["center", "none"]


@dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """How drawn and real pictures are brought to one size before anything is measured."""

    side: int | None = None
    """Side of all pictures, px; None: they have one size already, and a picture of another is an
    error."""
    backend: Literal["clean", "pil", "torch", "torch_aliased"] = "pil"
    """The filter; the result is rounded to 8 bits, as a file would be."""
    crop: Crop = "center"
    """What becomes of a longer side: the middle square is cut out, or it is pressed into one."""

    def __post_init__(self) -> None:
        if self.side is not None and self.side < 1:
            raise ValueError(f"resize.side must be at least 1; got {self.side}: use 256, say")


def quantised(images: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] as the 8 bits [B, 3, H, W] a file would hold.

    Raises:
        ValueError: one of them is not finite.
    """
    bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"pictures must be finite; got NaN or infinity in number {bad[0]} of {len(images)}: "
            "draw in float32, or look at the weights"
        )
    return images.float().add(1).mul(127.5).round().clamp(0, 255).byte()


def resized(pictures: Tensor, side: int, backend: Backend) -> Tensor:
    """Pictures [B, 3, H, W] of 8 bits as [B, 3, side, side], fp32 from 0 to 255; those that have
    that size already are as they were."""
    if pictures.dtype != torch.uint8:
        raise ValueError(f"pictures must be uint8; got {pictures.dtype}: quantise them first")
    if pictures.shape[-2:] == (side, side):
        return pictures.float()
    if backend in ("clean", "pil"):
        arrays = pictures.permute(0, 2, 3, 1).cpu().numpy()
        by_pillow = _clean if backend == "clean" else _pil
        parts = np.stack([by_pillow(array, side) for array in arrays])
        return torch.from_numpy(parts).permute(0, 3, 1, 2).to(pictures.device, torch.float32)
    floats = pictures.float()
    if backend == "torch":
        floats = F.interpolate(floats, (side, side), mode="bicubic", antialias=True)
        return floats.clamp(0, 255)
    if backend == "torch_aliased":
        return F.interpolate(floats, (side, side), mode="bilinear", align_corners=False)
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    by_tensorflow: Tensor = interpolate_bilinear_2d_like_tensorflow1x(
        floats, size=(side, side), align_corners=False
    )
    return by_tensorflow


def _pil(picture: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _clean(picture: np.ndarray, side: int) -> np.ndarray:
    channels = [
        Image.fromarray(picture[..., k].astype(np.float32)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        for k in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], -1).clip(0, 255)


def fitted(picture: Tensor, config: ResizeConfig) -> Tensor:
    """One picture [3, H, W] of 8 bits as `config` has it: [3, S, S] of 8 bits, or as it is where
    `side` is None."""
    if config.side is None:
        return picture
    if config.crop == "center":
        height, width = picture.shape[-2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        picture = picture[:, top : top + side, left : left + side]
    return resized(picture[None], config.side, config.backend)[0].round().clamp(0, 255).byte()
