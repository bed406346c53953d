"""HTML pages of one file: pictures, style and script inlined, nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from unclip.checkpoint import written_file


def render(template: str, **values: Any) -> str:
    """Fill a template of this room's `templates` folder; whatever is put in is escaped."""
    environment = Environment(
        loader=PackageLoader("unclip.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    style = environment.get_template("style.css").render()
    return environment.get_template(template).render(style=style, **values)


def write_page(page: str, out: Path) -> None:
    """Write a page, whole or not at all."""
    with written_file(out) as path:
        path.write_text(page, encoding="utf-8")


def number(value: float | None) -> str:
    """A number of a table: a whole one as it is, of others the four digits that mean something."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def inlined(picture: Path | Image.Image, side: int, lossless: bool = True) -> str:
    """A picture as the `src` of an `img`: lossless where its longer side is at most `side` px, else
    shrunk to that and lossy. What its file says beside the pixels is left out.

    Raises:
        ValueError: the file is no picture.
    """
    try:
        image = Image.open(picture) if isinstance(picture, Path) else picture
        image = image.convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"{picture} cannot be read as a picture: {error}") from error
    lossless = lossless and max(image.size) <= side
    image.thumbnail((side, side), Image.Resampling.LANCZOS)  # which never enlarges
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=90, lossless=lossless)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
