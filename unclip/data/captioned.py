"""Captioned pictures from WebDataset tars, folders, Parquet files and the Hub, as a map-style set.

Reading and caching belong to Hugging Face `datasets`; its cache lies where HF_HOME or
HF_DATASETS_CACHE says.  Tars are copied once into Arrow files there (less than the tars' own size),
so that every sample can be read at random; later openings only map those files, until a tar
changes.  Pictures in folders are read in place.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import glob
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset

from unclip.data.images import WHITE, decode_image, to_tensor

logger = logging.getLogger(__name__)

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
CAPTION_FILES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
CAPTION_COLUMNS = ("caption", "text", "txt", "prompt")


@dataclass(frozen=True, kw_only=True)
class CaptionedConfig:
    """Where captioned pictures come from and the size they get."""

    data: str | list[str]
    """WebDataset tars or Parquet files (a path, a glob, a brace range `{00000..00004}`, or a list
    of these), a folder of tars, a folder of pictures with captions (a .txt beside each, or one of
    captions.csv, captions.jsonl, metadata.csv, metadata.jsonl with file_name and caption), or a Hub
    data set `org/name`."""

    image_size: int = 64
    """Pixels a side: the shorter side is resized to it and the centre square is cut out."""

    caption_key: str = "txt"
    """Tars: the extension that holds the caption, or a key of the json as in `json.caption`."""

    image_column: str | None = None
    """Hub and Parquet: the column of pictures; None takes the one column of type Image."""

    caption_column: str | None = None
    """Hub, Parquet and caption files: the column of captions; None takes the first of caption,
    text, txt and prompt that is there."""

    split: str = "train"
    """The split of a Hub data set, such as `train` or `train[:1000]`. Unused for local files."""

    background: tuple[int, int, int] = WHITE
    """The colour (0 to 255) that lies under transparent pictures."""

    crop_size: int | None = None
    """If set, a random square of this many pixels is cut from the resized picture (training of
    upsamplers). The place depends on `seed`, the epoch and the sample's index alone."""

    seed: int = 0
    """Seed of the random crops."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError(f"data must name something; got {self.data!r}: give tars or a folder")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1; got {self.image_size}: use 64, say")
        if self.crop_size is not None and not 1 <= self.crop_size <= self.image_size:
            raise ValueError(
                f"crop_size must be from 1 to image_size; got {self.crop_size} for an image_size "
                f"of {self.image_size}: lower it or raise image_size"
            )
        if len(self.background) != 3 or not all(0 <= level <= 255 for level in self.background):
            raise ValueError(
                f"background must be three levels from 0 to 255; got {self.background}: "
                "use [255, 255, 255] for white"
            )


class CaptionedDataset(Dataset[dict[str, Any]]):
    """`ds[i]` is {"image": float32 [3, S, S] in [-1, 1], "caption": str, "key": str}.

    `ds[i, e]` is the same picture in epoch e, with another random crop; `ds[i]` is epoch 0.  S is
    `crop_size` if set, else `image_size`.  `key` is the sample's key in a tar, the path within
    a folder, or else the row's number.

    A picture that cannot be decoded does not stop training: it is named once in the log, entered in
    `skipped`, and the next good sample stands in for it, always the same one.  If more than half of
    the pictures are bad, ValueError is raised.  The record of bad pictures lies in shared memory,
    so it covers the workers of a DataLoader too.

    Raises FileNotFoundError if `data` names nothing, and ValueError if captions or pictures that
    the source promises are not there.
    """

    def __init__(self, config: CaptionedConfig) -> None:
        self.config = config
        self._rows = _open(config)
        if not len(self._rows):
            raise ValueError(f"data must hold captioned pictures; got none in {config.data!r}")
        # One flag a sample rather than a dict: a tensor can be shared between processes.
        self._bad = torch.zeros(len(self._rows), dtype=torch.bool).share_memory_()
        self.varies_by_epoch = config.crop_size is not None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        index, epoch = index if isinstance(index, tuple) else (index, 0)
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        while True:
            if not self._bad[index]:
                row = self._rows[index]
                try:
                    image = self._image(row, index, epoch)
                    caption = row["caption"].strip()
                    return {"image": image, "caption": caption, "key": _key(row, index)}
                except (ValueError, OSError) as error:
                    self._set_bad(row, index, error)
            index = (index + 1) % len(self)

    def read(self, index: int) -> dict[str, Any]:
        """Sample `index` as in epoch 0, and no other in its stead.

        Raises ValueError or OSError if it cannot be read.
        """
        row = self._rows[index]
        image = self._image(row, index, epoch=0)
        return {"image": image, "caption": row["caption"].strip(), "key": _key(row, index)}

    @property
    def skipped(self) -> dict[str, str]:
        """The pictures found bad so far, by any worker: key -> reason."""
        reasons = {}
        for index in self._bad.nonzero().flatten().tolist():
            row = self._rows[index]
            try:
                self._image(row, index, epoch=0)
            except (ValueError, OSError) as error:
                reasons[_key(row, index)] = str(error)
        return reasons

    def _image(self, row: dict[str, Any], index: int, epoch: int) -> Tensor:
        picture = decode_image(_picture_bytes(row), background=self.config.background)
        image = to_tensor(picture, self.config.image_size)  # [3, image_size, image_size]
        size = self.config.crop_size
        if size is None:
            return image
        generator = torch.Generator().manual_seed(
            (self.config.seed * 1_000_003 + epoch) * 1_000_033 + index
        )
        places = self.config.image_size - size + 1
        top, left = torch.randint(places, (2,), generator=generator).tolist()
        return image[:, top : top + size, left : left + size].contiguous()

    def _set_bad(self, row: dict[str, Any], index: int, error: Exception) -> None:
        name = f"{_key(row, index)} of {row.get('__url__', self.config.data)}"
        self._bad[index] = True
        bad = int(self._bad.sum())
        logger.warning("skipped %s: %s (%d of %d so far)", name, error, bad, len(self))
        if bad > len(self) / 2:
            raise ValueError(
                f"data must hold pictures that can be read; got {bad} of {len(self)} that cannot, "
                f"the last being {name}: {error}: copy or unpack the data set again"
            ) from error


def _key(row: dict[str, Any], index: int) -> str:
    return row.get("__key__", str(index))


def _picture_bytes(row: dict[str, Any]) -> bytes:
    """The encoded picture of a row: the first of its picture columns that is not empty."""
    picture = next(row[name] for name in ("image", *EXTENSIONS) if row.get(name) is not None)
    if isinstance(picture, bytes):
        return picture
    return picture["bytes"] or Path(picture["path"]).read_bytes()


# Sources. Each gives a table with the columns `caption`, the encoded picture as `image` or as one
# column an extension, and where the source has them `__key__` and `__url__` (the tar).


def _open(config: CaptionedConfig) -> datasets.Dataset:
    if isinstance(config.data, str):
        path = Path(config.data)
        if path.is_dir():
            tars = sorted(str(file) for file in path.glob("*.tar"))
            return _open_tars(tars, config) if tars else _open_folder(path, config)
        if not re.search(r"[*?\[{]|\.(tar|tar\.gz|tgz|parquet)$", config.data):
            return _open_hub(config.data, config)
    files = _expand(config.data)
    if all(file.endswith(".parquet") for file in files):
        return _from_columns(_load("parquet", files), str(config.data), config)
    return _open_tars(files, config)


def _expand(data: str | list[str]) -> list[str]:
    """The files that paths, globs and brace ranges name, in order."""
    files = []
    for pattern in [data] if isinstance(data, str) else data:
        for path in _expand_braces(pattern):
            found = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
            if not found:
                within = "" if path == pattern else f" (from {pattern!r})"
                raise FileNotFoundError(f"no file matches {path!r}{within}")
            files += found
    return files


def _expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar; `{train,val}.tar` -> train.tar, val.tar."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if not brace:
        return [pattern]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", brace[1]):
        first, last = span.groups()
        options = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    else:
        options = brace[1].split(",")
    head, tail = pattern[: brace.start()], pattern[brace.end() :]
    return [path for option in options for path in _expand_braces(head + option + tail)]


def _load(builder: str, files: list[str], **options: Any) -> datasets.Dataset:
    # The library globs every path again, so brackets in a folder's name must be escaped.
    paths = [glob.escape(file) for file in files]
    try:
        return datasets.load_dataset(builder, data_files=paths, split="train", **options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(
            f"{', '.join(files[:3])}{', ...' if len(files) > 3 else ''} must hold UTF-8 text and "
            f"valid json; got {error.__cause__!r}: mend or take out that sample"
        ) from error


def _open_tars(files: list[str], config: CaptionedConfig) -> datasets.Dataset:
    for file in files:
        _check_end(file)
    _check_caption_key(files[0], config.caption_key)
    # Naming the columns ourselves keeps out of the cache what is not needed, and frees us from the
    # builder's guess by the first five samples, which fails on mixed extensions and on json files
    # of varying keys. Pictures stay bytes: decoding them is our business.
    field, *keys = config.caption_key.split(".")
    caption: Any = datasets.Value("string")
    for key in reversed(keys):
        caption = {key: caption}
    columns: dict[str, Any] = {name: datasets.Value("binary") for name in EXTENSIONS}
    columns |= {name: datasets.Value("string") for name in ("__key__", "__url__")}
    features = datasets.Features(columns | {field: caption})
    rows = _load("webdataset", files, features=features)
    if keys:
        rows = rows.flatten()
    return _keep_complete(rows.rename_column(config.caption_key, "caption"), EXTENSIONS)


def _check_end(tar: str) -> None:
    """Raise ValueError if a tar lacks the zeros that end it: the builder takes it as it is."""
    with open(tar, "rb") as file:
        file.seek(-min(512, os.path.getsize(tar)), os.SEEK_END)
        if tar.endswith(".tar") and any(file.read()):
            raise ValueError(f"{tar} must end with zeros; got a tar cut off: fetch it again")


def _check_caption_key(tar: str, caption_key: str) -> None:
    """Raise ValueError, listing what there is, if the first files of the tar lack the caption."""
    there: set[str] = set()
    with tarfile.open(tar) as members:
        for member in itertools.islice(filter(tarfile.TarInfo.isfile, members), 100):
            _, _, extension = os.path.basename(member.name).partition(".")
            content = members.extractfile(member)
            if extension == "json" and content is not None:
                with contextlib.suppress(ValueError):  # one bad json hides no key of the others
                    there |= _string_keys("json", json.load(content))
            elif extension not in EXTENSIONS:
                there.add(extension)
    if caption_key not in there:
        raise ValueError(
            f"caption_key must name the captions in {tar}; got {caption_key!r}: "
            f"choose one of {', '.join(sorted(there)) or '(there are none)'}"
        )


def _string_keys(prefix: str, value: Any) -> set[str]:
    """The dotted keys of all strings in a json value."""
    if isinstance(value, str):
        return {prefix}
    items = value.items() if isinstance(value, dict) else ()
    return {key for name, item in items for key in _string_keys(f"{prefix}.{name}", item)}


def _open_folder(folder: Path, config: CaptionedConfig) -> datasets.Dataset:
    pictures = {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.suffix.lower().lstrip(".") in EXTENSIONS
    }
    captions_file = next((folder / n for n in CAPTION_FILES if (folder / n).is_file()), None)
    if captions_file is not None:
        captions = _read_captions(captions_file, config)
        missing = [n for n, _ in captions if n not in pictures and not (folder / n).is_file()]
        if missing:
            raise ValueError(
                f"{captions_file} must name pictures that are in {folder}; got "
                f"{len(missing)} of {len(captions)} that are not, such as "
                f"{', '.join(missing[:3])}: add the pictures or take their lines out"
            )
    else:
        beside = ((name, (folder / name).with_suffix(".txt")) for name in sorted(pictures))
        captions = [(name, f.read_text(encoding="utf-8")) for name, f in beside if f.is_file()]
    captions = [(name, caption) for name, caption in captions if caption.strip()]
    if not captions:
        raise ValueError(
            f"{folder} must hold captioned pictures; got {len(pictures)} pictures and a caption "
            f"for none: add a .txt beside each, or one of {', '.join(CAPTION_FILES)}"
        )
    names, texts = zip(*captions, strict=True)
    if dropped := len(pictures - set(names)):
        logger.warning("dropped %d of %d pictures without caption", dropped, len(pictures))
    paths = [str(folder / name) for name in names]
    rows = datasets.Dataset.from_dict({"__key__": names, "caption": texts, "image": paths})
    return rows.cast_column("image", datasets.Image(decode=False))


def _read_captions(file: Path, config: CaptionedConfig) -> list[tuple[str, str]]:
    """The lines of a csv or jsonl file: a picture's path within the folder, and a caption."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            rows = list(csv.DictReader(lines))
        else:
            rows = [json.loads(line) for line in lines if line.strip()]
    columns = list(rows[0]) if rows else []
    if "file_name" not in columns:
        raise ValueError(f"{file} must have a column file_name; got {columns}: rename one to it")
    column = _caption_column(columns, str(file), config)
    return [(Path(row["file_name"]).as_posix(), str(row.get(column) or "")) for row in rows]


def _open_hub(name: str, config: CaptionedConfig) -> datasets.Dataset:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"no file or folder {name!r}")
    try:
        rows = datasets.load_dataset(name, split=config.split)
    except OSError as error:  # not found, no access, no network
        raise FileNotFoundError(
            f"there is no file or folder {name!r}, and as a Hub data set it cannot be loaded: "
            f"{error}"
        ) from error
    return _from_columns(rows, name, config)


def _from_columns(rows: datasets.Dataset, name: str, config: CaptionedConfig) -> datasets.Dataset:
    """Rename the picture and caption columns of a table to ours and drop the others."""
    images = [c for c, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    image = config.image_column or (images[0] if len(images) == 1 else None)
    if image not in images:
        raise ValueError(
            f"image_column must be a column of pictures of {name}; got {config.image_column!r}: "
            f"choose one of {images or '(there are none)'} among {rows.column_names}"
        )
    caption = _caption_column(rows.column_names, name, config)
    if getattr(rows.features[caption], "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"caption_column must hold strings; got {caption!r} of {name}, which holds "
            f"{rows.features[caption]}: choose another of {rows.column_names}"
        )
    extra = [column for column in ("__key__", "__url__") if column in rows.column_names]
    rows = rows.select_columns([image, caption, *extra])
    rows = rows.rename_columns({image: "image", caption: "caption"})
    return _keep_complete(rows.cast_column("image", datasets.Image(decode=False)), ["image"])


def _caption_column(columns: list[str], name: str, config: CaptionedConfig) -> str:
    column = config.caption_column or next((c for c in CAPTION_COLUMNS if c in columns), None)
    if column not in columns:
        raise ValueError(
            f"caption_column must be a column of {name}; got {config.caption_column!r}: "
            f"choose one of {', '.join(columns)}"
        )
    return column


def _keep_complete(rows: datasets.Dataset, image_columns: Sequence[str]) -> datasets.Dataset:
    """Drop, with one warning, the samples that lack a picture or a caption."""
    table = rows.data.table  # asked column by column in Arrow, which decodes no picture
    has_image = functools.reduce(pc.or_, [pc.is_valid(table[name]) for name in image_columns])
    has_caption = pc.not_equal(pc.utf8_trim_whitespace(table["caption"]), "")  # null where null
    complete = pc.and_(pc.fill_null(has_caption, False), has_image)
    if pc.all(complete).as_py():
        return rows
    kept = [index for index, whole in enumerate(complete.to_pylist()) if whole]
    logger.warning("dropped %d samples without picture or caption", len(rows) - len(kept))
    return rows.select(kept)
