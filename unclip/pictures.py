"""Pictures as files: PNGs that remember what made them, grids, strips, animations, and pictures of
any kind read as tensors.

Importing this waits for no torch. Shapes: H W a picture's own size.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY, FORMAT, VERSION = "unclip", "unclip-picture", 1
NOT_OURS = (
    "--from-png {path} must be a picture that sample.py wrote, with its metadata; got one without: "
    "editors and web sites strip it, take the original file"
)
AnimationFormat = Literal["gif", "webp", "apng"]
FRAME_MS = 120
"""How long an animation shows a frame."""

# --------------------------------------------------------------------------------------- reading


def read_picture(path: Path) -> Tensor:
    """A picture of any format and mode as [3, H, W] in [-1, 1], upright, over white where it is
    transparent; raises ValueError where it cannot be read."""
    from unclip.data.images import decode_image, to_plain_tensor

    return to_plain_tensor(_decoded(path, decode_image))


def read_mask(path: Path) -> Tensor:
    """A mask [H, W], 0 (black) to 1 (white), upright; raises ValueError where it cannot be read."""
    return (read_picture(path).mean(dim=0) + 1) / 2


def _decoded(path: Path, decode: Any) -> Image.Image:
    try:
        picture: Image.Image = decode(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return picture


# --------------------------------------------------------------------------------------- writing


def to_pil(image: Tensor) -> Image.Image:
    """A tensor [3, H, W] in [-1, 1] as a picture."""
    from unclip.data.images import to_pil

    return to_pil(image)


def check_writable(folder: Path) -> None:
    """Make the folder; raise OSError unless files can be written into it."""
    probe = folder / ".unclip-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write into --out {folder} ({error.strerror}): choose another folder"
        ) from error


def next_number(folder: Path) -> int:
    """One more than the highest number that a file in the folder begins with."""
    numbers = [re.match(r"(\d{4,})-", path.name) for path in folder.iterdir()]
    return max((int(match[1]) for match in numbers if match), default=-1) + 1


def slug(prompt: str) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "picture"


def write_new(path: Path, content: bytes) -> Path:
    """Write a file, whole or not at all, and never over one that is there."""
    with path.open("xb") as file:
        try:
            file.write(content)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return path


def save(picture: Image.Image, made_by: dict[str, Any], path: Path) -> Path:
    """Write a PNG that says what made it; never over a file that is there."""
    import torch

    from unclip import __version__

    versions = {"unclip": __version__, "torch": torch.__version__}
    values = {"format": FORMAT, "version": VERSION, **made_by, "versions": versions}
    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA_KEY, json.dumps(values))
    info.add_itxt("Description", made_by["prompt"])
    return write_new(path, encoded(picture, pnginfo=info))


def encoded(picture: Image.Image, **options: Any) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "png", **options)
    return buffer.getvalue()


def animated(pictures: Sequence[Image.Image], kind: AnimationFormat) -> bytes:
    """Pictures there and back again without end, as the bytes of an animated file."""
    frames = [*pictures, *pictures[-2:0:-1]]
    buffer = io.BytesIO()
    options: dict[str, Any] = {"save_all": True, "duration": FRAME_MS, "loop": 0}
    if kind == "gif":
        # One palette for all frames, so that still colours do not flicker.
        palette = strip(pictures).quantize(256)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    name = "png" if kind == "apng" else kind
    frames[0].save(buffer, name, append_images=frames[1:], **options)
    return buffer.getvalue()


def read_metadata(path: Path) -> dict[str, Any]:
    """What `save` wrote into a PNG; raises ValueError for any other picture."""
    try:
        with Image.open(path) as picture:
            values = json.loads(picture.info.get(METADATA_KEY, "null"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--from-png {path} cannot be read: {error}") from error
    known = ("format", FORMAT), ("version", VERSION)
    if not isinstance(values, dict) or not all(values.get(k) == v for k, v in known):
        raise ValueError(NOT_OURS.format(path=path))
    return values


def strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size side by side, edge to edge."""
    width, height = pictures[0].size
    canvas = Image.new("RGB", (width * len(pictures), height))
    for k, picture in enumerate(pictures):
        canvas.paste(picture, (k * width, 0))
    return canvas


def grid(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """The pictures row by row, each with its caption, wrapped, above it."""
    gap, line_height = 12, 18
    font = ImageFont.load_default(size=14)
    width, height = max(pictures[0].width, 128), pictures[0].height
    texts = [wrap(caption, font, width) for caption in captions]
    head = line_height * max(map(len, texts)) + 4
    rows = math.ceil(len(pictures) / columns)
    size = columns * (width + gap) + gap, rows * (head + height + gap) + gap
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for k, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        left = gap + k % columns * (width + gap)
        top = gap + k // columns * (head + height + gap)
        for n, line in enumerate(lines):
            # Captions stand on their picture, whatever the number of their lines.
            y = top + head - 4 - line_height * (len(lines) - n)
            pen.text((left, y), line, fill="black", font=font)
        canvas.paste(picture, (left, top + head))
    return canvas


def wrap(text: str, font: Any, width: int) -> list[str]:
    """A text in lines of at most `width` px, four of them at the most."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= 4 else [*lines[:3], lines[3] + " ..."]
