"""Captioned pictures in tables: Parquet files, Hub data sets, and folders with their captions.

Reading and caching Parquet files and Hub data sets belong to Hugging Face `datasets`; HF_HOME or
HF_DATASETS_CACHE say where its cache lies.  Pictures in folders are read where they are.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import json
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unclip.data.causes import (
    BAD_CAPTION,
    BAD_FILE,
    EMPTY_CAPTION,
    FILTERED,
    NAMES_KEPT,
    NO_CAPTION,
    NO_PICTURE,
    TOO_LONG,
    Tally,
)
from unclip.data.filters import Column, Filter, Mask, columns_of, not_too_long, scalars
from unclip.data.storage import digest, retried, source_of
from unclip.data.tars import EXTENSIONS

if TYPE_CHECKING:
    from unclip.data.captioned import CaptionedConfig

logger = logging.getLogger(__name__)

CAPTION_FILES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
CAPTION_COLUMNS = ("caption", "text", "txt", "prompt")


class TableRows:
    """Rows of a table with the columns `caption` (a text, or a list of them), the encoded picture
    or its path as `image`, and where there are such `__key__` and `__url__`.

    Args:
        table: of complete samples.
        dropped: the others.
        state: another text where the table is made of other files.
        kind: what it is, for people.
    """

    shard_sizes = None

    def __init__(self, table: datasets.Dataset, dropped: Tally, state: str, kind: str) -> None:
        self.kind = kind
        self._table = table
        self.dropped = dropped
        self._state = state
        self._names = [n for n in ("__key__", "__url__") if n in table.column_names]

    def __len__(self) -> int:
        return len(self._table)

    def fingerprint(self) -> str:
        """Another text where what the rows come from, or which are rows, is another."""
        return digest(self._state, len(self))

    def key(self, index: int) -> tuple[str, str]:
        """The key of a row, and the file it came from, where that is known."""
        row = self._table.select_columns(self._names)[index] if self._names else {}
        return row.get("__key__", str(index)), row.get("__url__", "")

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._table[index]
        captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        captions = [text.strip() for text in captions if text and text.strip()]
        return {"captions": captions, "image": _picture_bytes(row["image"])}


def _picture_bytes(picture: Any) -> bytes:
    if isinstance(picture, bytes):
        return picture
    return Path(picture["path"]).read_bytes() if picture["bytes"] is None else picture["bytes"]


def _check(dropped: Tally, kept: int, config: CaptionedConfig, source: str) -> None:
    """Say what is left out; ValueError if too much of it is damaged."""
    if not dropped.counts:
        return
    count = sum(dropped.counts.values())
    logger.warning("dropped %d of %d samples of %s: %s", count, count + kept, source, dropped)
    if dropped.bad > config.max_bad_share * (dropped.bad + kept):
        named = [name for names in dropped.names.values() for name in names]
        raise ValueError(
            f"{source} must hold samples that can be read; got {dropped.bad} of "
            f"{dropped.bad + kept} that are not ({dropped}), such as {', '.join(named[:3])}: mend "
            f"them or take them out, or raise max_bad_share ({config.max_bad_share})"
        )


def _select(
    columns: dict[str, Column], names: Sequence[str] | range, config: CaptionedConfig, source: str
) -> tuple[Mask, Tally]:
    """Which samples the filters keep, bool [N], and a tally of the others."""
    dropped, kept = Tally(), np.ones(len(names), dtype=bool)

    def leave(cause: str, passing: Mask) -> None:
        nonlocal kept
        out_now = np.flatnonzero(kept & ~passing)
        dropped.add(cause, [str(names[k]) for k in out_now[:NAMES_KEPT]], len(out_now))
        kept &= passing

    if config.where:
        kept_by = Filter(config.where)
        kept_by.check_names(columns, source)
        leave(FILTERED, kept_by(columns, len(names)))
    if config.max_aspect is not None:
        leave(TOO_LONG, not_too_long(config.max_aspect, columns, len(names)))
    return kept, dropped


# A folder


def open_folder(folder: Path, config: CaptionedConfig) -> TableRows:
    """The pictures of a folder with their captions, from a file of them or a .txt beside each.

    Raises ValueError if there are none, or too many are damaged.
    """
    pictures = {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.suffix.lower().lstrip(".") in EXTENSIONS
    }
    dropped = Tally()
    listed = next((folder / n for n in CAPTION_FILES if (folder / n).is_file()), None)
    if listed is not None:
        captions = _listed(folder, listed, pictures, config, dropped)
    else:
        captions = _beside(folder, pictures, dropped)
    empty = [name for name, text, _ in captions if not text.strip()]
    dropped.add(EMPTY_CAPTION, empty)
    captions = [entry for entry in captions if entry[1].strip()]
    if not captions and not dropped.bad:
        raise ValueError(
            f"{folder} must hold captioned pictures; got {len(pictures)} pictures and a caption "
            f"for none: add a .txt beside each, or one of {', '.join(CAPTION_FILES)}"
        )
    _check(dropped, len(captions), config, str(folder))
    if config.where or config.max_aspect is not None:
        known = [
            dict(scalars(values or _read_json((folder / name).with_suffix(".json"))))
            for name, _, values in captions
        ]
        names = [name for name, *_ in captions]
        kept, outside = _select(columns_of(known), names, config, f"captions in {folder}")
        dropped.update(outside)
        captions = [entry for entry, keep in zip(captions, kept, strict=True) if keep]
    rows = datasets.Dataset.from_dict(
        {
            "__key__": [name for name, *_ in captions],
            "caption": [text for _, text, _ in captions],
            "image": [str(folder / name) for name, *_ in captions],
        }
    )
    rows = rows.cast_column("image", datasets.Image(decode=False))
    states = [(n, text, _state_of(folder / n)) for n, text, _ in captions]
    return TableRows(rows, dropped, digest(states), "folder of pictures")


def _state_of(path: Path) -> list[int]:
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def _listed(
    folder: Path, file: Path, pictures: set[str], config: CaptionedConfig, dropped: Tally
) -> list[tuple[str, str, Any]]:
    """What a captions file names: a picture's path, its caption, and the whole line."""
    lines = read_caption_lines(file, config)
    missing = [n for n, *_ in lines if n not in pictures and not (folder / n).is_file()]
    if len(missing) > config.max_bad_share * len(lines):
        raise ValueError(
            f"{file} must name pictures that are in {folder}; got "
            f"{len(missing)} of {len(lines)} that are not, such as "
            f"{', '.join(missing[:3])}: add the pictures or take their lines out"
        )
    dropped.add(NO_PICTURE, missing)
    dropped.add(NO_CAPTION, sorted(pictures - {name for name, *_ in lines}))
    gone = set(missing)
    return [line for line in lines if line[0] not in gone]


def _beside(folder: Path, pictures: set[str], dropped: Tally) -> list[tuple[str, str, Any]]:
    """The same, from the texts that lie beside the pictures."""
    texts = {file.relative_to(folder).as_posix() for file in folder.rglob("*.txt")}
    captions: list[tuple[str, str, Any]] = []
    for name in sorted(pictures):
        beside = Path(name).with_suffix(".txt").as_posix()
        if beside not in texts:
            dropped.add(NO_CAPTION, [name])
            continue
        try:
            captions.append((name, (folder / beside).read_text(encoding="utf-8"), {}))
        except UnicodeDecodeError:
            dropped.add(BAD_CAPTION, [beside])
    dropped.add(
        NO_PICTURE, sorted(texts - {Path(n).with_suffix(".txt").as_posix() for n in pictures})
    )
    return captions


def _read_json(path: Path) -> Any:
    """The json beside a picture, as img2dataset writes it; None if there is none to read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())


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


# Parquet files and Hub data sets


def open_parquet(files: Sequence[str], config: CaptionedConfig) -> TableRows:
    """The rows of Parquet files; those that cannot be read are left out.

    Raises ValueError if too many cannot, or columns are missing.
    """
    with ThreadPoolExecutor(32) as threads:
        states = list(threads.map(_parquet_state, files))
    dropped = Tally()
    for file, state in zip(files, states, strict=True):
        if isinstance(state, str):
            dropped.add(BAD_FILE, [f"{file}: {state}"])
    good = [f for f, state in zip(files, states, strict=True) if not isinstance(state, str)]
    _check(dropped, len(good), config, f"the files of {config.data}")
    rows = datasets.load_dataset(
        "parquet",
        # The library globs every path again, so brackets in a folder's name must be escaped.
        data_files=[glob.escape(file) for file in good],
        split="train",
    )
    found = _from_columns(rows, str(config.data), config, dropped, digest(states))
    found.kind = f"{len(files)} Parquet files"
    return found


def _parquet_state(file: str) -> list[Any] | str:
    """Size and time of a file; or why it cannot be read."""
    source = source_of(file)

    def rows() -> int:
        with fsspec.open(file, "rb") as opened:
            return pq.read_metadata(opened).num_rows

    try:
        return [Path(file).name, source.size, source.changed, retried(rows, file)]
    except pa.ArrowException as error:
        return " ".join(str(error).split())


def open_hub(name: str, config: CaptionedConfig) -> TableRows:
    """A data set of the Hub.

    Raises FileNotFoundError if there is none, and ValueError if columns are missing.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"no file or folder {name!r}")
    try:
        rows = datasets.load_dataset(name, split=config.split)
    except OSError as error:  # not found, no access, no network
        raise FileNotFoundError(
            f"there is no file or folder {name!r}, and as a Hub data set it cannot be loaded: "
            f"{error}"
        ) from error
    # Their folder is named for the data set's version.
    files = [Path(file["filename"]) for file in rows.cache_files]
    state = digest(name, config.split, sorted({file.parent.name for file in files}))
    return _from_columns(rows, name, config, Tally(), state)


def _from_columns(
    rows: datasets.Dataset, name: str, config: CaptionedConfig, dropped: Tally, state: str
) -> TableRows:
    """Rename the picture and caption columns of a table to ours and drop the others."""
    images = [name for name, feature in rows.features.items() if _holds_pictures(name, feature)]
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
    numbers = np.arange(len(rows))
    if config.where or config.max_aspect is not None:
        asked = {"width", "height"} | (Filter(config.where).names if config.where else set())
        columns = {c: _to_column(rows, c) for c in sorted(asked)}
        there = {c: column for c, column in columns.items() if column is not None}
        kept, outside = _select(there, range(len(rows)), config, f"rows of {name}")
        dropped.update(outside)
        numbers = np.flatnonzero(kept)
        rows = rows.select(numbers)
    extra = [column for column in ("__key__", "__url__") if column in rows.column_names]
    rows = rows.select_columns([image, caption, *extra])
    rows = rows.rename_columns({image: "image", caption: "caption"})
    if isinstance(rows.features["image"], datasets.Image):
        rows = rows.cast_column("image", datasets.Image(decode=False))
    kept, incomplete = _complete(rows, numbers)
    dropped.update(incomplete)
    _check(incomplete, int(kept.sum()), config, name)
    rows = rows if kept.all() else rows.select(np.flatnonzero(kept))
    return TableRows(rows, dropped, state, "Hub data set")


def _holds_pictures(name: str, feature: Any) -> bool:
    """Whether a column holds encoded pictures: as `datasets` writes them, as other libraries write
    the same (a struct), or as img2dataset does (a column `jpg`)."""
    if isinstance(feature, dict):
        return "bytes" in feature
    is_bytes = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or (name in EXTENSIONS and is_bytes)


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


def _complete(rows: datasets.Dataset, numbers: Column) -> tuple[Mask, Tally]:
    """Which rows have a picture and a caption, bool [N], and a tally of the others."""
    table = rows.with_format(None).data.table  # asked column by column, which decodes no picture
    if rows._indices is not None:  # what a filter left is a selection of the table
        table = table.take(rows._indices.column(0))
    texts = table["caption"]
    if pa.types.is_list(texts.type) or pa.types.is_large_list(texts.type):
        texts = pc.binary_join(texts, " ")
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), False)
    has = [pc.is_valid(table["image"]), pc.is_valid(texts), pc.invert(blank)]
    dropped, kept = Tally(), np.ones(len(rows), dtype=bool)
    for cause, there in zip((NO_PICTURE, NO_CAPTION, EMPTY_CAPTION), has, strict=True):
        there = np.array(there.to_pylist(), dtype=bool)
        lacking = numbers[kept & ~there]
        dropped.add(cause, [f"row {k}" for k in lacking[:NAMES_KEPT]], len(lacking))
        kept &= there
    return kept, dropped
