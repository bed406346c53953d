"""Real pictures by id: whole, in 8 bits, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.data.captioned import CaptionedDataset
from unclip.data.images import decode_image
from unclip.data.shapes import ShapesConfig, draw_scene, render
from unclip.data.tables import CAPTION_FILES
from unclip.data.tars import EXTENSIONS
from unclip.evaluation.captions import open_captioned, shapes_id, shapes_index
from unclip.evaluation.protocol import CaptionsConfig
from unclip.evaluation.resize import ResizeConfig, fitted


def read_bits(path: Path) -> Tensor:
    """A picture file as [3, H, W] of 8 bits, upright, over white where it is transparent.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return _bits(decode_image(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}: write it again") from error


def _bits(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def plain_id(id: str) -> str:
    """An id without the ending of a picture's file."""
    stem, _, ending = id.rpartition(".")
    return stem if stem and ending.lower() in EXTENSIONS else id


class RealPictures:
    """The pictures of a source, by id.

    Attributes:
        ids: of all of them, in order; for `shapes`, which has no end, None.
        side: of the shapes world's pictures, px.
    """

    def __init__(self, data: str, captions: CaptionsConfig, side: int = 64) -> None:
        """Find the pictures.

        Args:
            data: as `ReferenceConfig.data`.
            captions: how captions are read, where the source has some.
            side: as the attribute.

        Raises:
            FileNotFoundError, ValueError: there is no such source, or no picture in it.
        """
        self.data, self.side = data, side
        self.ids: list[str] | None = None
        self._world: ShapesConfig | None = None
        self._rows: dict[str, Callable[[], Tensor]] = {}
        if data == "shapes":
            self._world = captions.shapes
            return
        for id, read in self._found(Path(data), captions):
            self._rows.setdefault(plain_id(id), read)
        self.ids = list(self._rows)

    def _found(
        self, folder: Path, captions: CaptionsConfig
    ) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        plain = folder.is_dir() and not any((folder / name).is_file() for name in CAPTION_FILES)
        if plain and (files := picture_files(folder)):
            for file in files:
                yield file.relative_to(folder).as_posix(), partial(read_bits, file)
            return
        dataset = open_captioned(self.data, captions)
        for row in range(len(dataset)):
            yield dataset.key(row)[0], partial(_look, dataset, row)

    def read(self, id: str) -> Tensor:
        """One picture, [3, H, W] of 8 bits.

        Raises:
            ValueError: there is none of that id, or it cannot be read.
        """
        if self._world is not None:
            scene, _ = draw_scene(self._world, shapes_index(id))
            return render([scene], self.side)[0]
        if plain_id(id) not in self._rows:
            raise ValueError(
                f"reference.data must hold a picture of each caption's id; got {self.data!r} "
                f"without {id!r} among {len(self._rows)}, such as {next(iter(self._rows))!r}: "
                "name the captions' own pictures"
            )
        return self._rows[plain_id(id)]()

    def some(self, start: int, count: int | None) -> list[str]:
        """The ids from `start` on, `count` of them or all.

        Raises:
            ValueError: there are fewer.
        """
        if self._world is not None:
            assert count is not None
            return [shapes_id(self._world.split, k) for k in range(start, start + count)]
        assert self.ids is not None
        ids = self.ids[start:]
        if count is not None and len(ids) < count:
            raise ValueError(
                f"reference.count must not exceed the pictures of {self.data!r}, {len(ids)}; got "
                f"{count}: lower it"
            )
        return ids[:count]


def _look(dataset: CaptionedDataset, row: int) -> Tensor:
    return _bits(dataset.look(row)[0])


def picture_files(folder: Path) -> list[Path]:
    """The picture files in a folder and below, `2.png` before `10.png`."""
    files = [path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in EXTENSIONS]
    return sorted(files, key=lambda path: _natural(path.relative_to(folder).as_posix()))


def _natural(name: str) -> list[tuple[int, str]]:
    parts: list[tuple[int, str]] = []
    digits = ""
    for letter in name + " ":
        if letter.isdecimal():
            digits += letter
            continue
        if digits:
            parts.append((int(digits), ""))
            digits = ""
        parts.append((-1, letter))
    return parts


def batches(
    ids: Sequence[str],
    read: Callable[[str], Tensor],
    resize: ResizeConfig,
    size: tuple[int, int],
    what: str,
    batch_size: int,
) -> Iterator[Tensor]:
    """Pictures [B, 3, H, W] of 8 bits and of one size, a few at a time.

    Args:
        ids: which. read: gives one.
        resize: how they come to one size.
        size: (H, W) that they must have then.
        what: `reference` or `pictures`, for the error.

    Raises:
        ValueError: one has another size.
    """
    for start in range(0, len(ids), batch_size):
        batch = []
        for id in ids[start : start + batch_size]:
            picture = fitted(read(id), resize)
            if (found := tuple(picture.shape[-2:])) != size:
                raise ValueError(
                    f"{what} must hold pictures of {size[1]} x {size[0]} px, as the first drawn "
                    f"one; got {found[1]} x {found[0]} in {id!r}: set resize.side to bring all "
                    "to one size"
                )
            batch.append(picture)
        yield torch.stack(batch)
