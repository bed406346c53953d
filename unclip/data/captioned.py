"""Captioned pictures from WebDataset tars, folders, Parquet files and the Hub, as a map-style set.

Tars are indexed once and then read in place (`unclip.data.tars`), pictures in folders too.  Reading
and caching Parquet files, Hub data sets and compressed tars (which are copied once into Arrow
files) belong to Hugging Face `datasets`; HF_HOME or HF_DATASETS_CACHE say where its cache lies.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import glob
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from unclip.data.filters import Column, Filter, Mask, columns_of, scalars
from unclip.data.images import MAX_PIXELS, WHITE, PictureTooLarge, decode_image, to_tensor
from unclip.data.tars import (
    BAD_CAPTION,
    EXTENSIONS,
    FILTERED,
    NO_CAPTION,
    NO_PICTURE,
    TarRows,
    is_remote,
)

logger = logging.getLogger(__name__)

CAPTION_FILES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
CAPTION_COLUMNS = ("caption", "text", "txt", "prompt")

CORRUPT, TOO_LARGE, UNREADABLE, TOO_LONG = (
    "corrupt picture",
    "picture above max_pixels",
    "file that has gone or changed",
    "picture above max_aspect",
)
CAUSES = (CORRUPT, TOO_LARGE, UNREADABLE, TOO_LONG)
"""Why a sample is skipped while reading."""
NEIGHBOURS = 8
"""So many samples after a bad one are asked to stand in for it before others are drawn: whole
tars may be bad, and one sample is not to stand in for them all."""


@dataclass(frozen=True, kw_only=True)
class CaptionedConfig:
    """Where captioned pictures come from and the size they get."""

    data: str | list[str]
    """WebDataset tars or Parquet files (a path, a glob, a brace range `{00000..00004}`, an address
    such as `hf://datasets/org/name/*.tar`, or a list of these), a folder of either (img2dataset's
    output, say), a folder of pictures with captions (a .txt beside each, or one of captions.csv,
    captions.jsonl, metadata.csv, metadata.jsonl with file_name and caption), or a Hub data set
    `org/name`."""

    image_size: int = 64
    """Pixels a side: the shorter side is resized to it and the centre square is cut out."""

    caption_key: str = "txt"
    """Tars: the extension that holds the caption, or a key of the json as in `json.caption`. A list
    in the json is several captions of one picture."""

    caption_choice: Literal["first", "random"] = "first"
    """Of several captions: the first, or one drawn each epoch."""

    image_column: str | None = None
    """Hub and Parquet: the column of pictures; None takes the one column of type Image."""

    caption_column: str | None = None
    """Hub, Parquet and caption files: the column of captions; None takes the first of caption,
    text, txt and prompt that is there."""

    split: str = "train"
    """The split of a Hub data set, such as `train` or `train[:1000]`. Unused for local files."""

    where: str = ""
    """Which samples to use, by the keys of their json or the columns of their table:
    `aesthetic >= 5 and width >= 256 and language in ["en"]`; see `unclip.data.filters`."""

    max_bad_share: float = 0.5
    """Share of damaged samples, or tars, above which the run stops."""

    background: tuple[int, int, int] = WHITE
    """The colour (0 to 255) that lies under transparent pictures."""

    crop_size: int | None = None
    """If set, a random square of this many pixels is cut from the resized picture (training of
    upsamplers). The place depends on `seed`, the epoch and the sample's index alone."""

    crop: Literal["center", "random"] = "center"
    """Where the square is cut along the longer side."""

    flip: bool = False
    """Whether every other picture is mirrored. Captions that say left and right become wrong."""

    max_aspect: float | None = None
    """Pictures whose longer side is more than so many times the shorter are skipped. Where the json
    tells the sizes, `where` does it better: the sample is then not even drawn."""

    max_pixels: int = MAX_PIXELS
    """Larger pictures are not decoded: a small file can hold one that fills the memory."""

    seed: int = 0
    """Seed of the random crops, flips and choices."""

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
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(
                f"max_bad_share must lie in [0, 1]; got {self.max_bad_share}: use 0.1, say"
            )
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(f"max_aspect must be at least 1; got {self.max_aspect}: use 2, say")
        if self.max_pixels < 1:
            raise ValueError(
                f"max_pixels must be at least 1; got {self.max_pixels}: use {MAX_PIXELS}, say"
            )
        if self.where:
            Filter(self.where)  # which says what it does not understand
        if len(self.background) != 3 or not all(0 <= level <= 255 for level in self.background):
            raise ValueError(
                f"background must be three levels from 0 to 255; got {self.background}: "
                "use [255, 255, 255] for white"
            )


class Rows(Protocol):
    """What a source gives: encoded pictures and their captions, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image` (bytes) and `captions` (a list of one or more)."""

    def key(self, index: int) -> tuple[str, str]:
        """The row's key, and the file that holds it; known even if that file has gone."""

    @property
    def dropped(self) -> dict[str, int]:
        """Cause -> samples of the source that are not among the rows."""


class TooLong(ValueError):
    """A picture is more elongated than `max_aspect` allows."""


class CaptionedDataset(Dataset[dict[str, Any]]):
    """`ds[i]` is {"image": float32 [3, S, S] in [-1, 1], "caption": str, "key": str}.

    `ds[i, e]` is the same picture in epoch e, with another random crop; `ds[i]` is epoch 0.  S is
    `crop_size` if set, else `image_size`.  `key` is the sample's key in a tar, the path within
    a folder, or else the row's number.

    A sample that cannot be read does not stop training: it is named once in the log, entered in
    `skipped`, and another good sample stands in for it, always the same one: of the next few the
    first that is good, or else one drawn by its number.  If more than `max_bad_share` of the
    samples are bad, ValueError is raised.  The record of bad samples lies in shared memory, so it
    covers the workers of a DataLoader too.

    Raises FileNotFoundError if `data` names nothing, and ValueError if captions or pictures that
    the source promises are not there.
    """

    def __init__(self, config: CaptionedConfig) -> None:
        self.config = config
        self._rows = _open(config)
        if not len(self._rows):
            causes = ", ".join(f"{n} {cause}" for cause, n in self._rows.dropped.items())
            raise ValueError(
                f"data must hold captioned pictures; got none in {config.data!r}"
                + (f" ({causes})" if causes else "")
            )
        # One byte a sample (0, or 1 + the cause's number) rather than a dict: a tensor can be
        # shared between processes.
        self._bad = torch.zeros(len(self._rows), dtype=torch.uint8).share_memory_()
        self._draws = (
            config.crop_size is not None
            or config.crop == "random"
            or config.flip
            or config.caption_choice == "random"
        )
        self.varies_by_epoch = self._draws

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        index, epoch = index if isinstance(index, tuple) else (index, 0)
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        asked = index = index % len(self)
        attempt = 0
        while True:
            if not self._bad[index]:
                try:
                    return self._sample(index, epoch)
                except (ValueError, OSError) as error:
                    self._set_bad(index, error)
            attempt += 1
            if attempt <= NEIGHBOURS:
                index = (index + 1) % len(self)
            else:
                index = int(np.random.default_rng((asked, attempt)).integers(len(self)))

    def read(self, index: int) -> dict[str, Any]:
        """Sample `index` as in epoch 0, and no other in its stead.

        Raises ValueError or OSError if it cannot be read.
        """
        return self._sample(index, epoch=0)

    @property
    def skipped(self) -> dict[str, str]:
        """The samples found bad so far, by any worker: key -> reason."""
        reasons = {}
        for index in self._bad.nonzero().flatten().tolist():
            try:
                self._sample(index, epoch=0)
            except (ValueError, OSError) as error:
                reasons[self._rows.key(index)[0]] = str(error)
        return reasons

    @property
    def skips(self) -> dict[str, int]:
        """Samples found bad while reading, by any worker of this process: cause -> count."""
        counts = torch.bincount(self._bad, minlength=len(CAUSES) + 1)[1:].tolist()
        return dict(zip(CAUSES, counts, strict=True))

    @property
    def dropped(self) -> dict[str, int]:
        """Samples of the source that were left out when it was opened: cause -> count."""
        return self._rows.dropped

    def _sample(self, index: int, epoch: int) -> dict[str, Any]:
        config, row = self.config, self._rows[index]
        picture = decode_image(
            row["image"],
            background=config.background,
            max_pixels=config.max_pixels,
            draft=config.image_size,
        )
        aspect = max(picture.size) / min(picture.size)
        if config.max_aspect is not None and aspect > config.max_aspect:
            raise TooLong(f"its sides are 1 to {aspect:.2f}, above max_aspect {config.max_aspect}")
        # What is drawn for a sample follows from the seed, the epoch and its number alone.
        generator = None
        if self._draws:
            generator = torch.Generator().manual_seed(
                (config.seed * 1_000_003 + epoch) * 1_000_033 + index
            )
        size, captions = config.crop_size, row["captions"]
        image = to_tensor(picture, config.image_size, crop=config.crop, generator=generator)
        if size is not None:  # [3, image_size, image_size] -> [3, size, size]
            places = config.image_size - size + 1
            top, left = torch.randint(places, (2,), generator=generator).tolist()
            image = image[:, top : top + size, left : left + size].contiguous()
        if config.flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        choice = 0
        if config.caption_choice == "random":
            choice = int(torch.randint(len(captions), (), generator=generator))
        return {"image": image, "caption": captions[choice], "key": self._rows.key(index)[0]}

    def _set_bad(self, index: int, error: Exception) -> None:
        if isinstance(error, OSError):
            cause = UNREADABLE
        elif isinstance(error, PictureTooLarge):
            cause = TOO_LARGE
        else:
            cause = TOO_LONG if isinstance(error, TooLong) else CORRUPT
        key, file = self._rows.key(index)
        name = f"{key} of {file or self.config.data}"
        self._bad[index] = 1 + CAUSES.index(cause)
        skips = self.skips
        if cause == TOO_LONG:
            if skips[TOO_LONG] == len(self):
                raise ValueError(
                    f"max_aspect must leave some pictures; got {self.config.max_aspect}, which "
                    f"none of {len(self)} in {self.config.data!r} meets: raise it"
                ) from error
            return
        bad = sum(skips.values()) - skips[TOO_LONG]
        logger.warning("skipped %s: %s (%d of %d so far)", name, error, bad, len(self))
        if bad > len(self) * self.config.max_bad_share or sum(skips.values()) == len(self):
            raise ValueError(
                f"data must hold pictures that can be read; got {bad} of {len(self)} that cannot, "
                f"the last being {name}: {error}: copy or unpack the data set again, or raise "
                f"max_bad_share ({self.config.max_bad_share})"
            ) from error


class TableRows:
    """Rows of a table with the columns `caption` (a text, or a list of them), the encoded picture
    as `image` or as one column an extension, and where there are such `__key__` and `__url__`."""

    def __init__(self, table: datasets.Dataset, dropped: dict[str, int] | None = None) -> None:
        self._table = table
        self.dropped = dropped or {}
        self._names = [n for n in ("__key__", "__url__") if n in table.column_names]

    def __len__(self) -> int:
        return len(self._table)

    def key(self, index: int) -> tuple[str, str]:
        row = self._table.select_columns(self._names)[index] if self._names else {}
        return row.get("__key__", str(index)), row.get("__url__", "")

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._table[index]
        captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        captions = [text.strip() for text in captions if text and text.strip()]
        return {"captions": captions, "image": _picture_bytes(row)}


def _picture_bytes(row: dict[str, Any]) -> bytes:
    """The encoded picture of a row: the first of its picture columns that is not empty."""
    picture = next(row[name] for name in ("image", *EXTENSIONS) if row.get(name) is not None)
    if isinstance(picture, bytes):
        return picture
    return Path(picture["path"]).read_bytes() if picture["bytes"] is None else picture["bytes"]


# Sources


def _open(config: CaptionedConfig) -> Rows:
    if isinstance(config.data, str):
        path = Path(config.data)
        if path.is_dir():
            for kind in ("tar", "parquet"):
                if files := sorted(str(file) for file in path.glob(f"*.{kind}")):
                    return _open_files(files, config)
            return _open_folder(path, config)
        if not re.search(r"[*?\[{]|://|\.(tar|tar\.gz|tgz|parquet)$", config.data):
            return _open_hub(config.data, config)
    return _open_files(_expand(config.data), config)


def _open_files(files: list[str], config: CaptionedConfig) -> Rows:
    if all(file.endswith(".parquet") for file in files):
        return _from_columns(_load("parquet", files), str(config.data), config)
    if any(file.endswith("gz") for file in files):
        return _open_compressed(files, config)
    return TarRows(files, config.caption_key, config.where, config.max_bad_share)


def _expand(data: str | list[str]) -> list[str]:
    """The files that paths, addresses, globs and brace ranges name, in order."""
    files = []
    for pattern in [data] if isinstance(data, str) else data:
        for path in _expand_braces(pattern):
            if is_remote(path):
                found = _expand_remote(path)
            else:
                found = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
            if not found:
                within = "" if path == pattern else f" (from {pattern!r})"
                there = "" if is_remote(path) else f": {_what_is_there(path)}"
                raise FileNotFoundError(f"no file matches {path!r}{within}{there}")
            files += found
    return files


def _expand_remote(address: str) -> list[str]:
    """The files at an fsspec address: itself, what its pattern matches, or a folder's tars."""
    system, path = fsspec.core.url_to_fs(address)
    if not re.search(r"[*?\[]", path):
        if not system.isdir(path):
            return [address] if system.exists(path) else []
        path = path.rstrip("/") + "/*.tar"
    return [system.unstrip_protocol(found) for found in sorted(system.glob(path))]


def _what_is_there(pattern: str) -> str:
    """The nearest folder above a path or pattern, and what it holds."""
    folder = Path(pattern).parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{folder.resolve()} holds {', '.join(names[:5]) or 'nothing'}{more}"


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


def _open_compressed(files: list[str], config: CaptionedConfig) -> TableRows:
    """Compressed tars cannot be read at offsets: `datasets` copies them into its cache."""
    # Naming the columns ourselves keeps out of the cache what is not needed, and frees us from the
    # builder's guess by the first five samples, which fails on mixed extensions and on json files
    # of varying keys. Pictures stay bytes: decoding them is our business.
    if config.where:
        raise ValueError(
            f"where needs tars that are not compressed; got {files[0]}: unpack them by gunzip"
        )
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


def _open_folder(folder: Path, config: CaptionedConfig) -> TableRows:
    pictures = {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.suffix.lower().lstrip(".") in EXTENSIONS
    }
    dropped: Counter[str] = Counter()
    captions: list[tuple[str, str, Any]]
    captions_file = next((folder / n for n in CAPTION_FILES if (folder / n).is_file()), None)
    if captions_file is not None:
        captions = read_caption_lines(captions_file, config)
        missing = [n for n, *_ in captions if n not in pictures and not (folder / n).is_file()]
        if missing:
            raise ValueError(
                f"{captions_file} must name pictures that are in {folder}; got "
                f"{len(missing)} of {len(captions)} that are not, such as "
                f"{', '.join(missing[:3])}: add the pictures or take their lines out"
            )
    else:
        captions = []
        for name in sorted(pictures):
            beside = (folder / name).with_suffix(".txt")
            if not beside.is_file():
                continue
            try:
                captions.append((name, beside.read_text(encoding="utf-8"), {}))
            except UnicodeDecodeError as error:
                logger.warning("%s: %s", beside, error)
                dropped[BAD_CAPTION] += 1
    captions = [entry for entry in captions if entry[1].strip()]
    if not captions:
        raise ValueError(
            f"{folder} must hold captioned pictures; got {len(pictures)} pictures and a caption "
            f"for none: add a .txt beside each, or one of {', '.join(CAPTION_FILES)}"
        )
    if left := len(pictures - {name for name, *_ in captions}):
        logger.warning("dropped %d of %d pictures without caption", left, len(pictures))
        dropped[NO_CAPTION] = left - dropped[BAD_CAPTION]
    bad = dropped[BAD_CAPTION]
    if bad > config.max_bad_share * (bad + len(captions)):
        raise ValueError(
            f"{folder} must hold captions in UTF-8; got {bad} that are not and {len(captions)} "
            f"that are: convert them, or raise max_bad_share ({config.max_bad_share})"
        )
    if config.where:
        known = [
            dict(scalars(values or _read_json((folder / name).with_suffix(".json"))))
            for name, _, values in captions
        ]
        kept = _passes(config.where, columns_of(known), len(captions), f"captions in {folder}")
        dropped[FILTERED] = int((~kept).sum())
        captions = [entry for entry, keep in zip(captions, kept, strict=True) if keep]
    rows = datasets.Dataset.from_dict(
        {
            "__key__": [name for name, *_ in captions],
            "caption": [text for _, text, _ in captions],
            "image": [str(folder / name) for name, *_ in captions],
        }
    )
    rows = rows.cast_column("image", datasets.Image(decode=False))
    return TableRows(rows, {cause: n for cause, n in dropped.items() if n})


def _read_json(path: Path) -> Any:
    """The json beside a picture, as img2dataset writes it; None if there is none to read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())


def _passes(where: str, columns: dict[str, Column], length: int, source: str) -> Mask:
    """Which samples a filter keeps, bool [length], with a word about the others."""
    kept_by = Filter(where)
    kept_by.check_names(columns, source)
    kept = kept_by(columns, length)
    logger.info("%d of %d %s are outside the filter", length - kept.sum(), length, source)
    return kept


def read_caption_lines(file: Path, config: CaptionedConfig) -> list[tuple[str, str, Any]]:
    """The lines of a csv or jsonl file: a picture's path within the folder, its caption, and the
    whole line."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            rows = list(csv.DictReader(lines))
        else:
            rows = [json.loads(line) for line in lines if line.strip()]
    columns = list(rows[0]) if rows else []
    if "file_name" not in columns:
        raise ValueError(f"{file} must have a column file_name; got {columns}: rename one to it")
    column = _caption_column(columns, str(file), config)
    return [(Path(row["file_name"]).as_posix(), str(row.get(column) or ""), row) for row in rows]


def _open_hub(name: str, config: CaptionedConfig) -> TableRows:
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


def _from_columns(rows: datasets.Dataset, name: str, config: CaptionedConfig) -> TableRows:
    """Rename the picture and caption columns of a table to ours and drop the others."""
    encoded = ("binary", "large_binary")  # how img2dataset writes pictures: a column `jpg`
    images = [
        column
        for column, feature in rows.features.items()
        if isinstance(feature, datasets.Image)
        or (column in EXTENSIONS and getattr(feature, "dtype", None) in encoded)
    ]
    image = config.image_column or (images[0] if len(images) == 1 else None)
    if image not in images:
        raise ValueError(
            f"image_column must be a column of pictures of {name}; got {config.image_column!r}: "
            f"choose one of {images or '(there are none)'} among {rows.column_names}"
        )
    caption = _caption_column(rows.column_names, name, config)
    if not _holds_texts(rows.features[caption]):
        raise ValueError(
            f"caption_column must hold strings; got {caption!r} of {name}, which holds "
            f"{rows.features[caption]}: choose another of {rows.column_names}"
        )
    dropped = 0
    if config.where:
        columns = {c: _to_column(rows, c) for c in sorted(Filter(config.where).names)}
        there = {c: column for c, column in columns.items() if column is not None}
        kept = _passes(config.where, there, len(rows), f"rows of {name}")
        dropped, rows = int((~kept).sum()), rows.select(np.flatnonzero(kept))
    extra = [column for column in ("__key__", "__url__") if column in rows.column_names]
    rows = rows.select_columns([image, caption, *extra])
    rows = rows.rename_columns({image: "image", caption: "caption"})
    if isinstance(rows.features["image"], datasets.Image):
        rows = rows.cast_column("image", datasets.Image(decode=False))
    complete = _keep_complete(rows, ["image"])
    if dropped:
        complete.dropped[FILTERED] = dropped
    return complete


def _holds_texts(feature: Any) -> bool:
    """Whether a column holds a caption, or a list of captions, for each row."""
    feature = getattr(feature, "feature", feature)
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _to_column(rows: datasets.Dataset, name: str) -> Column | None:
    """A column of a table as a filter wants it, or None if it holds no numbers, truths or texts."""
    if name not in rows.column_names:
        return None
    values = rows.with_format("arrow")[name][:]
    kind = values.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return values.cast(pa.float64()).to_numpy()  # null becomes NaN
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return np.array(values.fill_null("").to_pylist())
    return None


def _caption_column(columns: list[str], name: str, config: CaptionedConfig) -> str:
    column = config.caption_column or next((c for c in CAPTION_COLUMNS if c in columns), None)
    if column not in columns:
        raise ValueError(
            f"caption_column must be a column of {name}; got {config.caption_column!r}: "
            f"choose one of {', '.join(columns)}"
        )
    return column


def _keep_complete(rows: datasets.Dataset, image_columns: Sequence[str]) -> TableRows:
    """Drop, with one warning, the samples that lack a picture or a caption."""
    rows = rows.with_format(None)
    table = rows.data.table  # asked column by column in Arrow, which decodes no picture
    if rows._indices is not None:  # what a filter left is a selection of the table
        table = table.take(rows._indices.column(0))
    has_image = functools.reduce(pc.or_, [pc.is_valid(table[name]) for name in image_columns])
    texts = table["caption"]
    if pa.types.is_list(texts.type) or pa.types.is_large_list(texts.type):
        texts = pc.binary_join(texts, " ")
    has_caption = pc.not_equal(pc.utf8_trim_whitespace(texts), "")  # null where null
    complete = pc.and_(pc.fill_null(has_caption, False), has_image)
    if pc.all(complete).as_py():
        return TableRows(rows)
    kept = [index for index, whole in enumerate(complete.to_pylist()) if whole]
    lost = len(rows) - len(kept)
    logger.warning("dropped %d samples without picture or caption", lost)
    causes = {NO_PICTURE: len(rows) - int(pc.sum(has_image).as_py() or 0)}
    causes[NO_CAPTION] = lost - causes[NO_PICTURE]
    return TableRows(rows.select(kept), {cause: n for cause, n in causes.items() if n})
