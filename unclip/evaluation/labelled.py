"""Pictures to be judged: files, folders with or without labels, captioned sources.

Shapes: H W picture, S the side it is read at.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from unclip.data.captioned import CaptionedConfig, CaptionedDataset
from unclip.data.images import decode_image, to_tensor
from unclip.data.shapes import ShapesConfig, draw_scene, render
from unclip.data.tables import CAPTION_FILES
from unclip.data.tars import EXTENSIONS

TABLES = (".tar", ".tar.gz", ".tgz", ".parquet")
"""Files that hold many pictures."""
WORLD = ShapesConfig(split="held_out", object_weights=(1, 0, 0), caption_detail="full")
SCENES = 500
"""What the source `shapes` is."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture and what is said of it."""

    name: str
    """Where it came from."""
    said: str | None
    """Its caption, or the name of its sub-folder; None where nothing is said."""
    image: Tensor
    """[3, S, S] in [-1, 1]."""


class Pictures:
    """The pictures of some sources one after another.

    A source is a picture file, a folder, whatever `CaptionedConfig.data` names, or `shapes`:
    held-out scenes of one object from the built-in world, 500 unless limited. What is said of a
    folder's pictures is its captions file's; else, of those in sub-folders, the sub-folder's name;
    else the `.txt` beside each, where there is one.

    Attributes:
        sub_folders: the names of the sub-folders that hold pictures.
        skipped: name -> reason of the pictures that iteration could not read.
    """

    def __init__(self, sources: Sequence[str], size: int, limit: int | None = None) -> None:
        """Find the pictures.

        Args:
            sources: files, folders, tars.
            size: the side S they are read at, px: the shorter side is resized to it, and the
                middle square cut out.
            limit: use only the first so many.

        Raises:
            FileNotFoundError, ValueError: a source is not there, or holds no picture.
        """
        if not sources:
            raise ValueError(
                "pictures must name a picture, a folder or a captioned source; got none: name one"
            )
        self.sub_folders: list[str] = []
        self.skipped: dict[str, str] = {}
        self._readers: list[tuple[str, Callable[[], Picture]]] = []
        for source in sources:
            self._readers += self._find(source, size, limit)
        self._readers = self._readers[:limit]

    def __len__(self) -> int:
        return len(self._readers)

    def __iter__(self) -> Iterator[Picture]:
        """Read them; those that cannot be read are left out with a warning.

        Raises:
            ValueError: none could be read.
        """
        for name, read in self._readers:
            try:
                picture = read()
            except (ValueError, OSError) as error:
                self.skipped[name] = str(error)
                log.warning("left out %s: %s", name, error)
                continue
            yield picture
        if len(self.skipped) == len(self):
            name, reason = next(iter(self.skipped.items()))
            raise ValueError(
                f"pictures must be pictures; got {len(self)} of which none can be read, such as "
                f"{name} ({reason}): name others"
            )

    def _find(
        self, source: str, size: int, limit: int | None
    ) -> list[tuple[str, Callable[[], Picture]]]:
        if source == "shapes":
            world = replace(WORLD, image_size=size)
            rows = range(SCENES if limit is None else limit)
            return [(f"{source}, {row}", partial(_draw, world, row)) for row in rows]
        path = Path(source)
        if path.is_file() and not path.name.endswith(TABLES):
            return [(source, partial(_read, path, None, size))]
        if path.is_dir() and not any((path / name).is_file() for name in CAPTION_FILES):
            files = [file for file in sorted(path.rglob("*")) if _is_picture(file)]
            labels = [_sub_folder(file, path) for file in files]
            if any(labels) or (files and not any(f.with_suffix(".txt").is_file() for f in files)):
                self.sub_folders += sorted({label for label in labels if label is not None})
                pairs = zip(files, labels, strict=True)
                return [(str(file), partial(_read, file, label, size)) for file, label in pairs]
        dataset = CaptionedDataset(CaptionedConfig(data=source, image_size=size))
        rows = range(len(dataset))
        return [(f"{source}, {row}", partial(_read_row, dataset, row)) for row in rows]


def label_among(said: str | None, classes: Sequence[str]) -> int | None:
    """Which class a caption or a folder's name speaks of: the one that it is, or the only one that
    it names in whole words, whatever the case; None where it names none or several."""

    def plain(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower().replace("_", " ")))

    text, names = plain(said or ""), [plain(name) for name in classes]
    if text in names:
        return names.index(text)
    named = [k for k, name in enumerate(names) if name and f" {name} " in f" {text} "]
    return named[0] if len(named) == 1 else None


def _is_picture(path: Path) -> bool:
    return path.is_file() and path.suffix.lower().lstrip(".") in EXTENSIONS


def _sub_folder(file: Path, folder: Path) -> str | None:
    inside = file.relative_to(folder).parts
    return inside[0] if len(inside) > 1 else None


def _read(path: Path, said: str | None, size: int) -> Picture:
    image = to_tensor(decode_image(path.read_bytes(), draft=size), size)
    return Picture(name=str(path), said=said, image=image)


def _draw(world: ShapesConfig, row: int) -> Picture:
    scene, caption = draw_scene(world, row)
    image = render([scene], world.image_size)[0].float().div_(127.5).sub_(1)
    return Picture(name=f"shapes, {row}", said=caption.text, image=image)


def _read_row(dataset: CaptionedDataset, row: int) -> Picture:
    sample = dataset.read(row)
    return Picture(name=sample["key"], said=sample["caption"], image=sample["image"])
