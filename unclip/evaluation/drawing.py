"""The pictures of a result folder: drawn by a model, or taken from elsewhere; gone on with after a
stop.

A picture is written whole or not at all, so that one that is there is done. Several processes draw
a share each.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from unclip.checkpoint import written_file
from unclip.data.images import decode_image, to_pil
from unclip.evaluation.captions import Item
from unclip.evaluation.references import picture_files, plain_id
from unclip.evaluation.results import RESULT
from unclip.pipeline import CascadeOptions, UnCLIP

DRAWING = "drawing.json"
"""How a folder's pictures are drawn, written before the first of them."""


@dataclass(frozen=True)
class Crew:
    """The processes that draw, seen from one of them; alone unless told otherwise."""

    index: int = 0
    count: int = 1
    wait: Callable[[], object] = lambda: None
    """Comes back when all have called it."""

    @property
    def is_main(self) -> bool:
        return self.index == 0


def image_name(position: int) -> str:
    """Of the picture at a position, within the result folder."""
    return f"images/{position:06d}.png"


def open_folder(folder: Path, values: Mapping[str, Any]) -> None:
    """Write how pictures are drawn into a new folder, or see that one that is there goes on so.

    One without a picture is begun again, and so is an unfinished one of pictures from elsewhere:
    those are copies, and what stopped the command may have been mended among the originals.

    Raises:
        ValueError: the folder holds pictures drawn in another way, or something else.
        OSError: it cannot be written.
    """
    path = folder / DRAWING
    if path.is_file():
        there = json.loads(path.read_text())
        copies = "pictures" in there and "pictures" in values
        unfinished = copies and not (folder / RESULT).is_file()
        if unfinished or not any(folder.glob("images/*.png")):
            shutil.rmtree(folder / "images", ignore_errors=True)
            path.unlink()
            return open_folder(folder, values)
        if (change := _difference(there, json.loads(json.dumps(values)))) is not None:
            name, old, new = change
            raise ValueError(
                f"out must hold pictures drawn with these settings; got {folder}, where {name} is "
                f"{old} and not {new}: choose another --out, or go on with that"
            )
        return
    if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise ValueError(
            f"out must be a new folder, or one that this command wrote; got {folder}, which holds "
            "other things: choose another --out"
        )
    with written_file(path) as aside:
        aside.write_text(json.dumps(values, indent=1) + "\n")


def _difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            found = _difference(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if old == new else (name, old, new)


def missing(folder: Path, count: int) -> list[int]:
    """Positions whose picture is not there yet."""
    return [k for k in range(count) if not (folder / image_name(k)).is_file()]


def draw(
    pipe: UnCLIP,
    items: Sequence[Item],
    seeds: Sequence[int],
    folder: Path,
    options: CascadeOptions,
    crew: Crew,
    batch_size: int,
) -> dict[str, float]:
    """Draw this process's share of the pictures that are not there yet.

    Args:
        pipe: the model.
        items, seeds: of each picture.
        folder: result folder.
        options: how.
        crew: who draws. batch_size: pictures at a time.

    Returns:
        Stage -> seconds of this process.

    Raises:
        ValueError: a picture is not finite.
        OSError: one cannot be written.
    """
    todo = missing(folder, len(items))[crew.index :: crew.count]
    seconds: dict[str, float] = {}
    with tqdm(total=len(todo), unit="picture", disable=not (todo and crew.is_main)) as bar:
        for start in range(0, len(todo), batch_size):
            rows = todo[start : start + batch_size]
            drawn = pipe(
                [items[k].caption for k in rows],
                seed=[seeds[k] for k in rows],
                batch_size=batch_size,
                progress=False,
                **asdict(options),
            )
            for k, image in zip(rows, drawn.images, strict=True):
                if not image.isfinite().all():
                    raise ValueError(
                        f"pictures must be finite; got NaN or infinity for {items[k].caption!r} "
                        f"(id {items[k].id}, seed {seeds[k]}): draw with --dtype float32, or look "
                        "at the weights"
                    )
                save(to_pil(image), folder / image_name(k))
            for stage, spent in drawn.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
            bar.update(len(rows))
    return seconds


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with written_file(path) as aside:
        picture.save(aside, "png")


def files_state(source: Path) -> str:
    """Another text where a folder's pictures are others, by their names, sizes and times."""
    states = [(path, path.stat()) for path in picture_files(source)]
    lines = [f"{path.relative_to(source)} {s.st_size} {s.st_mtime_ns}\n" for path, s in states]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def take(source: Path, items: Sequence[Item], folder: Path) -> str:
    """Copy pictures drawn elsewhere into the result folder, as lossless PNGs.

    Args:
        source: their folder.
        items: of each picture that is wanted.
        folder: result folder.

    Returns:
        `ids` where each picture's name is its caption's id, else `order`: the names' own, numbers
        in them counted as numbers.

    Raises:
        ValueError: there are not as many pictures as captions, or one cannot be read.
        FileNotFoundError: there is no such folder.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"pictures must be a folder; got {source}: name one that is there")
    files = picture_files(source)
    if len(files) != len(items):
        raise ValueError(
            f"pictures must hold one for each caption, {len(items)}; got {len(files)} in {source}: "
            "draw what is missing, take out what is not meant, or set --num"
        )
    named = {plain_id(file.relative_to(source).as_posix()): file for file in files}
    by_id = all(plain_id(item.id) in named for item in items) and len(
        {item.id for item in items}
    ) == len(items)
    for k in missing(folder, len(items)):
        file = named[plain_id(items[k].id)] if by_id else files[k]
        try:
            picture = decode_image(file.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"pictures: {file} cannot be read ({error}): write it again"
            ) from error
        save(picture, folder / image_name(k))
    return "ids" if by_id else "order"
