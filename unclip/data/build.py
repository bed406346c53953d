"""Making a captioned set of tars: from a captions file and pictures, or from a colour-emoji font.

`python -m unclip.data pack captions.csv --out DIR` and `python -m unclip.data emoji --out DIR`.
The tars are the same whenever they are made of the same files, and the samples lie in them shuffled
by a hash of their keys.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unclip.checkpoint import written_whole
from unclip.data.captioned import CaptionedConfig
from unclip.data.images import WHITE, decode_image
from unclip.data.tables import read_caption_lines

logger = logging.getLogger(__name__)

FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "C:/Windows/Fonts",
)
FONT_NAMES = ("*[Ee]moji*.tt[fc]", "seguiemj.ttf")
FONT_SIZES = (109, 160, 136, 128, 96, 64, 72, 48, 32, 20)
"""Pixels. Fonts of bitmaps come in a few sizes or one: Noto's 109, Apple's 160 and less."""
INK = (1, 2, 3, 255)
"""What glyphs without colours of their own are drawn in, to be told by it."""
SKIN_TONES = dict.fromkeys(range(0x1F3FB, 0x1F400))


@dataclass(frozen=True)
class Sample:
    """One captioned picture on its way into a tar."""

    key: str
    """Its name in the tar: no dots, so that what follows one is the extension."""
    caption: str
    picture: bytes
    """Encoded."""
    extension: str
    """The kind of picture: png, jpg or webp."""
    split_by: str
    """Samples with the same go into the same split."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What else is known, for the json."""


def fraction(text: str) -> float:
    """A number in [0, 1) that follows from the text alone, evenly spread."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def write_tars(
    samples: Iterable[Sample], out: Path, *, val_share: float = 0.05, samples_per_tar: int = 10_000
) -> dict[str, int]:
    """Write `train-00000.tar`, ..., `val-00000.tar`, ... into a new folder.

    A sample is in the validation split if a hash of its `split_by` says so: the choice stays as it
    is when samples are added.  Samples are written in the order given.

    Returns:
        split -> samples.

    Raises:
        ValueError: a share or number is out of range, the folder holds something, or a key comes
            twice.
        OSError: the folder cannot be written; nothing is left of it then.
    """
    if not 0 <= val_share < 1:
        raise ValueError(f"val_share must lie in [0, 1); got {val_share}: use 0.05, say")
    if samples_per_tar < 1:
        raise ValueError(f"samples_per_tar must be at least 1; got {samples_per_tar}: use 10000")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be a new folder; got {out}, which is there: choose another")
    counts: Counter[str] = Counter()
    tars: dict[str, tarfile.TarFile] = {}
    keys: set[str] = set()
    with written_whole(out) as folder:
        try:
            for sample in samples:
                if sample.key in keys:
                    raise ValueError(f"keys must differ; got {sample.key!r} twice: rename one")
                keys.add(sample.key)
                split = "val" if fraction(sample.split_by) < val_share else "train"
                number, place = divmod(counts[split], samples_per_tar)
                if place == 0:
                    if split in tars:
                        tars[split].close()
                    name = f"{split}-{number:05d}.tar"
                    tars[split] = tarfile.open(folder / name, "w")  # noqa: SIM115
                _add(tars[split], sample)
                counts[split] += 1
        finally:
            for tar in tars.values():
                tar.close()
        if not counts:
            raise ValueError(f"there must be samples to write; got none for {out}")
    return dict(counts)


def _add(tar: tarfile.TarFile, sample: Sample) -> None:
    meta = json.dumps({"caption": sample.caption, **sample.meta}, ensure_ascii=False)
    files = {sample.extension: sample.picture, "txt": sample.caption.encode("utf-8")}
    for extension, content in (files | {"json": meta.encode("utf-8")}).items():
        member = tarfile.TarInfo(f"{sample.key}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


# From a captions file and pictures


def captioned_samples(
    captions: Path,
    pictures: Path | None = None,
    *,
    caption_column: str | None = None,
    split_column: str = "file_name",
    max_side: int | None = None,
    max_bad_share: float = 0.01,
) -> Iterator[Sample]:
    """The lines of a csv or jsonl file with the pictures they name, shuffled by a hash.

    Pictures are taken as they are, once they have proved to be ones; those whose shorter side is
    above `max_side` are made smaller and become JPEGs.  Lines without caption or with a picture
    that is missing or corrupt are left out and named in the log.

    Args:
        captions: `file_name`, a caption, and other columns, which go into the json.
        pictures: the folder that the names lie in; None is the captions' own.
        split_column: what a sample's split follows from: with the column of an artist, say, no
            artist is in both.

    Raises:
        ValueError: a column is missing, or more than `max_bad_share` of the lines are left out.
    """
    folder = pictures or captions.parent
    config = CaptionedConfig(data=str(captions), caption_column=caption_column)
    lines = read_caption_lines(captions, config)
    if lines and split_column not in lines[0][2]:
        raise ValueError(
            f"split_column must be a column of {captions}; got {split_column!r}: choose one of "
            f"{', '.join(lines[0][2])}"
        )
    bad: Counter[str] = Counter()
    for name, caption, row in sorted(lines, key=lambda line: fraction(line[0])):
        try:
            if not caption.strip():
                raise ValueError("no caption")
            picture, extension = _encoded(folder / name, max_side)
        except (ValueError, OSError) as error:
            cause = "missing picture" if isinstance(error, OSError) else str(error)
            bad[cause] += 1
            logger.warning("left out %s: %s", name, cause)
            if sum(bad.values()) > max_bad_share * len(lines):
                raise ValueError(
                    f"{captions} must name pictures that can be read, each with a caption; got "
                    f"{sum(bad.values())} of {len(lines)} lines so far that do not "
                    f"({dict(bad)}): mend them or raise max_bad_share ({max_bad_share})"
                ) from error
            continue
        key = Path(name).with_suffix("").as_posix().replace("/", "_").replace(".", "_")
        meta = {n: value for n, value in row.items() if isinstance(value, (str, int, float))}
        yield Sample(key, caption.strip(), picture, extension, str(row[split_column]), meta)


def _encoded(path: Path, max_side: int | None) -> tuple[bytes, str]:
    """A picture's bytes and extension, smaller if asked for. Raises ValueError if it is none."""
    data = path.read_bytes()
    image = decode_image(data, draft=max_side)
    with Image.open(io.BytesIO(data)) as opened:
        shorter, kind = min(opened.size), str(opened.format).lower()
    kinds = {"png": "png", "jpeg": "jpg", "webp": "webp"}
    if kind in kinds and (max_side is None or shorter <= max_side):
        return data, kinds[kind]
    if max_side is not None and shorter > max_side:
        scale = max_side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), "jpg"


# From a colour-emoji font


def find_font() -> Path:
    """The first colour-emoji font in the system's folders. Raises FileNotFoundError."""
    for folder in FONT_FOLDERS:
        for pattern in FONT_NAMES:
            found = sorted(Path(folder).expanduser().rglob(pattern))
            if found:
                return found[0]
    raise FileNotFoundError(
        f"there is no emoji font in {', '.join(FONT_FOLDERS)}: install one (Debian: "
        "fonts-noto-color-emoji) or give its path"
    )


def emoji_names() -> dict[str, str]:
    """Emoji -> English name, of all fully qualified emoji, by the package `emoji`.

    Raises ValueError if it is not installed.
    """
    try:
        import emoji
    except ImportError as error:
        raise ValueError(
            "names of emoji need the package emoji, which is not installed: "
            'pip install "unclip[emoji]"'
        ) from error
    return {
        symbol: known["en"].strip(":").replace("_", " ")
        for symbol, known in emoji.EMOJI_DATA.items()
        if known["status"] == emoji.STATUS["fully_qualified"]
    }


def emoji_samples(
    names: dict[str, str], font: Path, *, size: int = 64, caption: str = "emoji of {name}"
) -> Iterator[Sample]:
    """Each emoji that the font has, drawn on white as a PNG of `size` pixels a side.

    Those it lacks, or has without colour, are left out and counted in the log; sequences (flags,
    skin tones, families) need Pillow's Raqm layout.  All skin tones of one emoji share a split.

    Raises:
        ValueError: the caption lacks {name}, or the font cannot be read or draws nothing in colour.
    """
    if "{name}" not in caption:
        raise ValueError(f"caption must hold {{name}}; got {caption!r}: use 'emoji of {{name}}'")
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}: use 64, say")
    drawer = _GlyphDrawer(font)
    lacking = 0
    for symbol in sorted(names, key=fraction):
        picture = drawer.draw(symbol)
        if picture is None:
            lacking += 1
            continue
        points = "-".join(f"{ord(character):x}" for character in symbol)
        buffer = io.BytesIO()
        _square(picture, size).save(buffer, "PNG", optimize=True)
        family = symbol.translate(SKIN_TONES)
        meta = {"name": names[symbol], "cp": points, "font": font.name}
        text = caption.format(name=names[symbol])
        yield Sample(points, text, buffer.getvalue(), "png", family, meta)
    if lacking == len(names):
        raise ValueError(
            f"font must draw emoji in colour; got {font}, which draws none of {lacking}: use one "
            "of bitmaps or COLRv0, such as Noto Color Emoji"
        )
    if lacking:
        logger.warning("%s lacks %d of %d emoji", font.name, lacking, len(names))


class _GlyphDrawer:
    """Draws single glyphs of a colour font."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"font must be a file; got {path}")
        for size in FONT_SIZES:
            try:
                self._font = ImageFont.truetype(str(path), size)
                break
            except OSError as error:
                reason = error
        else:
            raise ValueError(f"font must be one that can be read; got {path}: {reason}")
        # What the font draws for a character that nobody has: an empty box, mostly.
        self._blank = self._render("\U0010fffd").tobytes()
        self._width = self._font.getlength("\U0001f600")  # 😀

    def _render(self, text: str) -> Image.Image:
        left, top, right, bottom = (round(x) for x in self._font.getbbox(text))
        canvas = Image.new("RGBA", (max(1, right - left), max(1, bottom - top)))
        draw = ImageDraw.Draw(canvas)
        draw.text((-left, -top), text, fill=INK, font=self._font, embedded_color=True)
        return canvas

    def draw(self, text: str) -> Image.Image | None:
        """The glyph, or None if there is none, or none in colour, or more than one."""
        if self._width and self._font.getlength(text) > 1.5 * self._width:
            return None
        picture = self._render(text)
        if picture.tobytes() == self._blank or picture.getbbox() is None:
            return None
        pixels = np.asarray(picture)
        colours = pixels[pixels[..., 3] > 127][:, :3]  # [N, 3] of what is seen
        return picture if (colours != INK[:3]).any() else None


def _square(picture: Image.Image, size: int) -> Image.Image:
    """The picture in the middle of a white square, with a margin of a sixteenth."""
    picture = picture.crop(picture.getbbox())
    inner = size * 7 / 8
    scale = inner / max(picture.size)
    shape = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = picture.resize(shape, Image.Resampling.LANCZOS, reducing_gap=3.0)
    canvas = Image.new("RGBA", (size, size), (*WHITE, 255))
    canvas.alpha_composite(small, ((size - small.width) // 2, (size - small.height) // 2))
    return canvas.convert("RGB")


# Commands


def add_commands(commands: Any) -> None:
    """Add `pack` and `emoji` to the subparsers of `python -m unclip.data`."""
    pack = commands.add_parser("pack", help="make tars of a captions file and its pictures")
    pack.add_argument("captions", type=Path, help="csv or jsonl with file_name and a caption")
    pack.add_argument("--pictures", type=Path, help="their folder; else that of the captions")
    pack.add_argument("--caption-column", help="else caption, text, txt or prompt")
    pack.add_argument("--split-by", default="file_name", help="column: the same go into one split")
    pack.add_argument("--max-side", type=int, help="larger pictures get this shorter side, px")
    pack.add_argument("--max-bad-share", type=float, default=0.01, help="of lines, to stop above")
    pack.set_defaults(run=_pack)
    emoji = commands.add_parser("emoji", help="make tars of a colour-emoji font")
    emoji.add_argument("--font", type=Path, help="else the system's")
    emoji.add_argument("--size", type=int, default=64, help="pixels a side")
    emoji.add_argument("--caption", default="emoji of {name}", help="with {name} in it")
    emoji.set_defaults(run=_emoji)
    for parser in (pack, emoji):
        parser.add_argument("--out", type=Path, required=True, help="a new folder")
        parser.add_argument("--val-share", type=float, default=0.05, help="for validation")
        parser.add_argument("--samples-per-tar", type=int, default=10_000)


def _pack(args: argparse.Namespace) -> int:
    samples = captioned_samples(
        args.captions,
        args.pictures,
        caption_column=args.caption_column,
        split_column=args.split_by,
        max_side=args.max_side,
        max_bad_share=args.max_bad_share,
    )
    return _write(samples, args)


def _emoji(args: argparse.Namespace) -> int:
    font = args.font or find_font()
    samples = emoji_samples(emoji_names(), font, size=args.size, caption=args.caption)
    return _write(samples, args)


def _write(samples: Iterable[Sample], args: argparse.Namespace) -> int:
    counts = write_tars(
        samples, args.out, val_share=args.val_share, samples_per_tar=args.samples_per_tar
    )
    for split, count in sorted(counts.items()):
        print(f"{split}: {count} samples in {args.out / split}-*.tar")
    return 0
