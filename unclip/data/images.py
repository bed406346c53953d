"""Pictures between files and tensors: decode anything Pillow reads, resize, crop, and back.

Tensors are float32 in [-1, 1].  Shapes: B batch, H height, W width, S the side of a square picture.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

WHITE = (255, 255, 255)
MAX_PIXELS = 89_478_485
"""Where Pillow starts to warn; it refuses twice as many."""


class PictureTooLarge(ValueError):
    """A picture has more pixels than may be decoded."""


def decode_image(
    data: bytes | Image.Image,
    *,
    background: tuple[int, int, int] = WHITE,
    max_pixels: int = MAX_PIXELS,
    draft: int | None = None,
) -> Image.Image:
    """Decode a picture of any mode to upright 8-bit RGB.

    The EXIF orientation is applied; every kind of transparency (an alpha channel, a palette with
    transparent entries, a colour key) is composited over `background`; 16-bit grey is scaled to
    8 bits; of an animation the first frame is taken.  CMYK becomes RGB by the plain ink formula
    R = (1 - C)(1 - K), and colour profiles are not applied.  With `draft`, large JPEGs may come out
    smaller, by a whole factor, but with a shorter side of at least twice that many pixels: decoding
    them costs a fraction then.

    Raises PictureTooLarge, before anything is decoded, if there are more than `max_pixels`, and
    ValueError, naming the reason, if the data is corrupt, truncated or of no known format.
    """
    try:
        if isinstance(data, bytes):
            image = _open(data, max_pixels, draft)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
        else:
            image = ImageOps.exif_transpose(data)
        return _to_rgb(image, background)
    except PictureTooLarge:
        raise
    except UnidentifiedImageError as error:
        raise ValueError("the picture cannot be decoded: no known image format") from error
    except Exception as error:  # Pillow's readers raise a dozen types on bad bytes
        reason = str(error) or type(error).__name__
        raise ValueError(f"the picture cannot be decoded: {reason}") from error


def _open(data: bytes, max_pixels: int, draft: int | None) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.width * image.height > max_pixels:
        raise PictureTooLarge(
            f"the picture has {image.width} x {image.height} pixels, above max_pixels {max_pixels}"
        )
    if draft is not None:  # only JPEG's reader knows it; the smaller side decides on the factor
        image.draft(None, (2 * draft, 2 * draft))
    return image


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):  # I;16 and I hold 16-bit grey; convert() would clip it to white
        grey = np.asarray(image).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    if image.mode == "F":
        raise ValueError("a picture of floats names no white level; save it with 8 or 16 bits")
    return image.convert("RGB")


def to_tensor(
    image: Image.Image,
    size: int,
    *,
    crop: Literal["center", "random"] = "center",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Resize the shorter side to `size` with antialiasing and crop to a square.

    `crop` says where the square lies along the longer side; a random crop draws from `generator`.
    Returns float32 [3, size, size] in [-1, 1].
    """
    side = min(image.size)
    slack = max(image.size) - side
    if crop == "random":
        offset = int(torch.randint(slack + 1, (), generator=generator))
    else:
        offset = slack // 2
    left, top = (offset, 0) if image.width > image.height else (0, offset)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size != (size, size):
        # The square is cut first, so that a long banner costs no more than a square. reducing_gap
        # lets Pillow shrink by a whole factor before the filter; with 3 nobody sees the difference.
        image = image.resize(
            (size, size),
            Image.Resampling.BICUBIC,
            box=(left, top, left + side, top + side),
            reducing_gap=3.0,
        )
    return to_plain_tensor(image)


def to_plain_tensor(image: Image.Image) -> Tensor:
    """An RGB picture of its own size as float32 [3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, H, W] uint8
    return torch.empty(pixels.shape).copy_(pixels).div_(127.5).sub_(1)


def to_pil(image: Tensor) -> Image.Image:
    """Turn [3, H, W] in [-1, 1] into an 8-bit RGB picture; values are rounded and clamped."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must have the shape [3, H, W]; got {list(image.shape)}")
    pixels = image.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return Image.fromarray(pixels.byte().permute(1, 2, 0).cpu().numpy())


def resize(images: Tensor, size: int) -> Tensor:
    """Resize [B, 3, H, W] in [-1, 1] to [B, 3, size, size] by an antialiased bicubic filter.

    The result is clamped to [-1, 1].  Pictures that have the size already are returned as they are.
    """
    if images.shape[-2:] == (size, size):
        return images
    resized = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return resized.clamp(-1, 1)  # bicubic overshoots at edges
